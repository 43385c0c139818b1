"""A checkpoint alone -> a model that can be asked: weights, labels, size and preprocessing come from it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from yacs.config import CfgNode

import config as config_module
from common.errors import UserError
from dataset.files.images import ImageError, decode
from dataset.preparing import evaluation_transform, normalize, resized_side
from models import build_model
from training import checkpoint

LEAST = 16  # pixels in a row or column of what may be an X-ray


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds: path, its sha256, model (eval mode), labels and config.

    domain: of the images it was trained on, see `dataset.files.domain`; empty where the checkpoint does not say.
    """

    path: Path
    digest: str
    model: nn.Module
    label_names: tuple[str, ...]
    config: CfgNode
    domain: str

    def reader(self):
        """Function (bytes, name of the file) -> uint8 [1, S, S] as evaluation reads it; it goes to other processes."""
        return _Reader(self.config)

    def normalize(self, images):
        """uint8 [N, 1, S, S] -> float32 [N, 3, S, S] as the model takes it."""
        return normalize(images, self.config.AUG.MEAN, self.config.AUG.STD)


class _Reader:
    def __init__(self, config):
        self.decoding = {
            "recipe": config.DATA.DICOM_RECIPE,
            "window": config.DATA.DICOM_WINDOW,
            "shrink_to": 2 * resized_side(config.DATA.IMG_SIZE),
        }
        self.transform = evaluation_transform(config)

    def __call__(self, data, name):
        grayscale = decode(data, name, **self.decoding)
        if min(grayscale.shape) < LEAST:
            raise ImageError(f"{name}: {' x '.join(map(str, grayscale.shape))} pixels are too few for an X-ray")
        return self.transform(Image.fromarray(grayscale))


def load(path, *, ema=False, device="cpu", dicom_recipe=None):
    """The model of one of our checkpoints.

    ema: the EMA weights that the checkpoint holds beside its own (TRAIN.EMA.ENABLE).
    dicom_recipe: instead of the one it was trained with.

    UserError: no such file, damaged, not of this project, without labels, or without an EMA.
    """
    path = Path(path)
    state, sha256 = checkpoint.read_with_digest(path)
    missing = [k for k in ("model", "label_names", "config") if not isinstance(state, dict) or not state.get(k)]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of this project: it holds no {missing[0]}; give one that main.py wrote"
        )
    names = state["label_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise UserError(f"{path} is not a checkpoint of this project: its label_names are no list of different names")
    if not isinstance(state["config"], dict):
        raise UserError(f"{path} is not a checkpoint of this project: its config is no dictionary")
    config = config_module.from_dict(state["config"], path)
    if line := config_module.unfamiliar(state["config"], path):
        print(f"warning: {line}", file=sys.stderr)
    if dicom_recipe:
        config.defrost()
        config.DATA.DICOM_RECIPE = dicom_recipe
        config.freeze()
    if len(names) != config.MODEL.NUM_CLASSES:
        raise UserError(f"{path}: {len(names)} labels for a model of MODEL.NUM_CLASSES {config.MODEL.NUM_CLASSES}")
    weights = state["model"]
    if ema:
        weights = state.get("model_ema")
        if not weights:
            raise UserError(f"--ema: {path} holds no EMA weights; it was trained with TRAIN.EMA.ENABLE False")
    # Shapes are compared before any memory is taken: the config of a hostile file can ask for all of it.
    try:
        with torch.device("meta"):
            checkpoint.check_weights(build_model(config, outside=False), weights, path)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    model = build_model(config, outside=False)
    model.load_state_dict(weights)
    return Trained(path, sha256, model.to(device).eval(), tuple(names), config, state.get("domain") or "")
