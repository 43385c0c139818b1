"""What the operator tests share."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import dcnv3

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# The operator is the compiled kernel where there is one, and else once more the reference.
IMPLEMENTATIONS = {"reference": dcnv3.reference, "operator": dcnv3.dcnv3}


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "internimage-mimic", "compiled")
KEPT = 24  # folders in it, of some MB each


def compile_once(make, compiler, files, *flags):
    """The folder that `make(folder)` has filled, in this run or, from the same files by the same compiler with the same
    flags, in an earlier one: nearly all the time of these tests would go to compilers."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((str(compiler), version, flags)).encode())
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=CACHE))
        make(part)
        if folder.exists():  # another run was faster
            shutil.rmtree(part)
        else:
            part.rename(folder)
        for old in sorted(CACHE.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    os.utime(folder)
    return folder


def random_inputs(
    n=2, h=6, w=7, group=3, width=4, points=9, out=None, spread=1.5, dtype=torch.float64, device="cpu", seed=0
):
    """Input, offset and mask (positive, also fit as logits), leaves that require gradients."""
    g = torch.Generator().manual_seed(seed)
    out_h, out_w = out or (h, w)
    input = torch.randn(n, h, w, group * width, generator=g, dtype=torch.float64)
    offset = torch.randn(n, out_h, out_w, group * points * 2, generator=g, dtype=torch.float64) * spread
    mask = torch.rand(n, out_h, out_w, group * points, generator=g, dtype=torch.float64)
    return [t.to(device, dtype).requires_grad_() for t in (input, offset, mask)]


def results(function, inputs, **arguments):
    """[output, grad_input, grad_offset, grad_mask] for a fixed random output gradient."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    output = function(*leaves, **arguments)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=g, dtype=torch.float64).to(output)
    output.backward(grad)
    return [output.detach(), *(t.grad for t in leaves)]


def assert_same(got, expected, **tolerance):
    for name, a, b in zip(("output", "grad_input", "grad_offset", "grad_mask"), got, expected):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}", **tolerance)
