import torchvision_shim  # noqa: F401  (before timm, which imports torchvision)

from .build import build_model

__all__ = ["build_model"]
