"""Config -> model. A backbone is a file in this folder with a `build(config)`, found by MODEL.TYPE."""

import importlib
from pathlib import Path

from errors import UserError

_NOT_BACKBONES = {"__init__", "build", "clip_head"}


def build_model(config):
    """The model of MODEL.TYPE: images [N, 3, S, S] -> logits [N, MODEL.NUM_CLASSES]."""
    known = sorted({p.stem for p in Path(__file__).parent.glob("*.py")} - _NOT_BACKBONES)
    if config.MODEL.TYPE not in known:
        raise UserError(f"MODEL.TYPE is {config.MODEL.TYPE!r}; choose one of {', '.join(known)}")
    return importlib.import_module(f"models.{config.MODEL.TYPE}").build(config)
