"""Lets torchvision be imported beside a CPU build of torch. Import before torchvision and timm.

PyPI's torchvision wheel is linked against CUDA. Beside a CPU torch its compiled half cannot load,
and importing it fails with "operator torchvision::nms does not exist", because the Python half
registers fake kernels for two operators that the compiled half would have declared. This project
uses no compiled operator of torchvision, so declaring the two is all that is needed. Where the
compiled half loads, nothing is done.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None  # declarations vanish with their Library object


def _compiled_half_loads():
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    try:
        for path in folder.glob("_C*.so"):
            torch.ops.load_library(path)
    except OSError:
        return False
    return True


if not _compiled_half_loads():
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _library.define(_name + _SCHEMA)
