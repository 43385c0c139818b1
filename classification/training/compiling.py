"""TRAIN.COMPILE: the model by torch.compile, for training steps of one shape."""

import contextlib
import importlib.util
import os
import shutil
from pathlib import Path

import torch

from common.errors import UserError


def prepare(folder, device):
    """Before anything is compiled: look for a compiler, and keep what it makes in `folder`.

    A job that goes on, or another seed, finds it there.

    UserError: there is no compiler.
    """
    # Triton, which makes the kernels of a GPU, compiles the calls of them by a C compiler.
    variable, usual = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++",))
    names = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(map(shutil.which, names)):
        raise UserError(
            f"TRAIN.COMPILE True needs a compiler, and {' or '.join(names)} is not there; load a module that has one, "
            f"name one by {variable}, or set TRAIN.COMPILE False"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("TRAIN.COMPILE True needs triton on a GPU: pip install triton, or set TRAIN.COMPILE False")
    # Whatever it is now: importing torch's compiler sets it to a folder in /tmp, which ends with the job.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).absolute())


def compile_model(model, blocks=()):
    """`model` compiled as one graph for the shape of its first batch; the parameters are those of `model`.

    blocks: modules of a sharded model, each of which is compiled instead: they are gathered between two graphs.
    A graph break is an error: what falls out of the graph would cost time at every step without a word.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    return model if blocks else torch.compile(model, fullgraph=True, dynamic=False)


def uncompiled(when):
    """A context in which a compiled model runs as it is written, `when` that is so."""
    return torch.compiler.set_stance("force_eager") if when else contextlib.nullcontext()
