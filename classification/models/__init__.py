import common.torchvision_shim  # noqa: F401  (before timm, which imports torchvision)

from .build import build_model, own_values, pretrained_file

__all__ = ["build_model", "own_values", "pretrained_file"]
