import torchvision_shim  # noqa: F401  (before timm, which imports torchvision)
