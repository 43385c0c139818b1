"""Finds a backbone or a dataset by its name: a file in its folder with a `build`."""

import importlib
from pathlib import Path

from errors import UserError


def find(folder, name, key):
    """The `build` of `folder/name.py`; key is the config key that named it.

    Raises:
        UserError: no such file, or one without a `build(config, ...)`; names those there are.
    """
    known = sorted(p.stem for p in Path(__file__).with_name(folder).glob("*.py") if "\ndef build(" in p.read_text())
    if name not in known:
        raise UserError(f"{key} is {name!r}; choose one of {', '.join(known)}")
    return importlib.import_module(f"{folder}.{name}").build
