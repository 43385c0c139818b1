"""A checkpoint alone -> a model that can be asked: weights, labels, size and preprocessing come from it."""

import logging
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from yacs.config import CfgNode

import config as config_module
from common import builders
from common.errors import UserError
from dataset.files.images import ImageError, decode, decode_photo
from dataset.preparing import decoding, evaluation_transform, normalize
from models import build_model, own_values
from training import checkpoint

LEAST = 16  # pixels in a row or column of what may be an X-ray


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds: path, its sha256, model (eval mode), labels and config.

    domain: of the images it was trained on, see `dataset.files.domain`; empty where the checkpoint does not say.
    classes: of photographs, each of one of the labels; else of X-rays with several.
    """

    path: Path
    digest: str
    model: nn.Module
    label_names: tuple[str, ...]
    config: CfgNode
    domain: str
    classes: bool = False

    def reader(self):
        """Function (bytes, name of the file) -> uint8 [1 or 3, S, S] as evaluation reads it; it goes to other
        processes."""
        return _PhotoReader(self.config) if self.classes else _Reader(self.config)

    def activate(self, logits):
        """Probabilities of logits [N, L]."""
        return logits.softmax(1) if self.classes else logits.sigmoid()

    def normalize(self, images):
        """uint8 [N, 1, S, S] -> float32 [N, 3, S, S] as the model takes it."""
        return normalize(images, self.config.AUG.MEAN, self.config.AUG.STD)


class _Reader:
    def __init__(self, config):
        self.decoding, self.transform = decoding(config), evaluation_transform(config)

    def __call__(self, data, name):
        grayscale = decode(data, name, **self.decoding)
        if min(grayscale.shape) < LEAST:
            raise ImageError(f"{name}: {' x '.join(map(str, grayscale.shape))} pixels are too few for an X-ray")
        return self.transform(Image.fromarray(grayscale))


class _PhotoReader:
    def __init__(self, config):
        from dataset.transforms import (
            photo_transform,
        )  # torchvision takes longer to import than sixty X-rays to predict

        self.transform = photo_transform(config, train=False)

    def __call__(self, data, name):
        return self.transform(decode_photo(data, name))


def _load_published(path, cfg, device):
    """The model of published weights, by the YAML file of its configuration; its labels are the numbers of classes."""
    from dataset.build import own_values as data_values

    config = config_module.get_config(Namespace(cfg=cfg), data_values, own_values)
    model = build_model(config)
    found = checkpoint.load_pretrained(model, path, logging.getLogger(__name__))
    if lacking := [*found["replaced"], *found["missing"]]:
        raise UserError(f"{path} lacks {lacking[0]} of the model of {cfg} ({len(lacking)} such keys)")
    names = tuple(map(str, range(config.MODEL.NUM_CLASSES)))
    classes = getattr(builders.find("dataset", config.DATA.DATASET, "DATA.DATASET"), "TASK", "") == "single_label"
    return Trained(path, found["sha256"], model.to(device).eval(), names, config, "", classes)


def load(path, *, ema=False, device="cpu", dicom_recipe=None, cfg=None):
    """The model of one of our checkpoints.

    cfg: of published weights instead, the YAML file of their configuration.
    ema: the EMA weights that the checkpoint holds beside its own (TRAIN.EMA.ENABLE).
    dicom_recipe: instead of the one it was trained with.

    UserError: no such file, damaged, not of this project, without labels, or without an EMA.
    """
    path = Path(path)
    if cfg:
        return _load_published(path, cfg, device)
    state, sha256 = checkpoint.read_with_digest(path)
    missing = [k for k in ("model", "label_names", "config") if not isinstance(state, dict) or not state.get(k)]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of this project: it holds no {missing[0]}; give one that main.py wrote, or "
            "published weights with their configuration (--cfg)"
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
    domain, classes = state.get("domain") or "", state.get("task") == "single_label"
    return Trained(path, sha256, model.to(device).eval(), tuple(names), config, domain, classes)
