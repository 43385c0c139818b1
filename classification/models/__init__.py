from .build import build_model, own_values, pretrained_file

__all__ = ["build_model", "own_values", "pretrained_file"]
