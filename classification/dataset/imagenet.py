"""ImageNet-style folders for single-label classification (DATA.DATASET imagenet)."""

import os
from pathlib import Path

import common.torchvision_shim  # noqa: F401

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from common.errors import UserError
from config import KNOBS
from dataset.files.images import ImageError
from dataset.releases import use_instead
from dataset.transforms import photo_transform

TASK = "single_label"  # of this module: the defaults of the config are then those of photographs
FOLDERS = {"train": "train", "validate": "val", "test": "val"}  # ImageNet's test labels are not public


def _load(path):
    """RGB image, or an ImageError that names the file."""
    try:
        return default_loader(path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read as an image ({error}); replace the file") from error


class ImageNetDataset(ImageFolder):
    """`<root>/train/<class>/*`, `<root>/val/<class>/*`; item = (image, class index)."""

    task = TASK

    def __init__(self, root, split, transform=None):
        folder = Path(root) / FOLDERS[split]
        if not os.path.isdir(folder):
            raise UserError(
                f"{folder} is not a folder; --data-path must hold train/ and val/ with a folder per class"
                f"{use_instead(root, 'imagenet')}"
            )
        try:
            super().__init__(str(folder), transform, loader=_load)
        except OSError as error:  # no class folders, an empty one, or one that cannot be read
            raise UserError(str(error)) from error
        self.label_names = tuple(self.classes)
        self.summary, self.warnings = f"{split}: {len(self):,} images in {len(self.classes):,} classes", []

    def ids(self):
        """What identifies the images in tables of predictions: column name -> values [N]."""
        return {"path": [str(Path(path).relative_to(self.root)) for path, _ in self.samples]}


def build(config, *splits):
    """The datasets of `splits` that `config` describes, with augmentation for train."""
    datasets = [ImageNetDataset(config.DATA.DATA_PATH, s, photo_transform(config, train=s == "train")) for s in splits]
    jitter = config.AUG.COLOR_JITTER
    if "train" in splits and config.AUG.AUTO_AUGMENT and jitter not in (0, KNOBS["AUG.COLOR_JITTER"].default):
        text = f"AUG.COLOR_JITTER {jitter} has no effect beside AUG.AUTO_AUGMENT {config.AUG.AUTO_AUGMENT!r}"
        datasets[splits.index("train")].warnings.append(text)
    return datasets
