"""Each kernel once, forward and backward, bfloat16: what ncu and compute-sanitizer look at. `--small`: shapes for the
slow tools, which each backward kernel fits, float32 too; `--cpu`: whether the script runs."""

import argparse

import torch

import dcnv3


def run(device, dtype, batch, size, group):
    """One forward and one backward pass; returns the gradients."""
    shapes = (group * 16, group * 18, group * 9, group * 16)
    *inputs, grad = (torch.randn(batch, size, size, n, device=device, dtype=dtype) for n in shapes)
    inputs = [t.requires_grad_() for t in inputs]
    return torch.autograd.grad(dcnv3.dcnv3(*inputs, group=group, mask_is_logits=True), inputs, grad)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args(argv)
    levels = [(32, 56 >> i, 7 << i) for i in range(4)]  # of InternImage-B
    shapes = [(2, 9, 7), (1, 17, 2), (3, 1, 4)] if arguments.small else levels
    for dtype in (torch.bfloat16, torch.float32)[: 1 + arguments.small]:
        for shape in shapes:
            gradients = run("cpu" if arguments.cpu else "cuda", dtype, *shape)
            finite = all(bool(t.isfinite().all()) for t in gradients)
            print(f"{shape} {dtype}: {'finite' if finite else 'FAILED: not finite'}", flush=True)


if __name__ == "__main__":
    main()
