"""Lets torchvision be imported beside a CPU build of torch. Import before torchvision and timm.

PyPI's torchvision wheel is linked against CUDA. Beside a CPU torch its compiled half cannot load,
and importing it fails with "operator torchvision::nms does not exist", because the Python half
registers fake kernels for two operators that the compiled half would have declared. This project
uses no compiled operator of torchvision, so declaring the two is all that is needed. Where
torchvision matches torch (a CUDA machine, or both from PyTorch's CPU index) nothing is done.
"""

import importlib.metadata

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None  # declarations vanish with their Library object

if torch.version.cuda is None and not importlib.metadata.version("torchvision").endswith("+cpu"):
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _library.define(_name + _SCHEMA)
