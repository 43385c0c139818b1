"""`python -m dataset.synthetic`: see `dataset.synthetic.tree`."""

from dataset.synthetic.tree import main

if __name__ == "__main__":
    main()
