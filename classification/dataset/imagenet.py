"""Photographs of one class each (DATA.DATASET imagenet), in any of these layouts of a folder with train and val:

    train/<class>/*.jpg             the classes are the folders of train/
    train.txt  train/...            a list: path below train/, then the class, as a number from 0 or a name
    train.zip  train_map.txt        with --zip: an uncompressed archive, and the list of its images

A list is called train.txt, train_map.txt or meta_data/train.txt. The split test is read from `test` where that has
classes, else from `val`.
"""

import functools
from pathlib import Path

import common.torchvision_shim  # noqa: F401  (before torchvision)

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.errors import UserError
from config import KNOBS
from dataset.files.images import decode_photo
from dataset.files.stores import FileStore, MemoryStore, ZipStore
from dataset.releases import use_instead
from dataset.transforms import photo_transform

TASK = "single_label"  # of this module: the defaults of the config are then those of photographs
LISTS = ("{}.txt", "{}_map.txt", "meta_data/{}.txt")


class PhotoDataset:
    """Photographs of one class each; item = (transform(RGB image), class index).

    Args:
        store: one of `dataset.files.stores`. listed: what names its images, for errors. split: for the log.
        names: paths in the store [N]. targets: class indices [N]. label_names: the classes.
        on_memory: read all of them now.

    UserError: at construction, for images that do not exist; of folders an even sample is looked up.
    ImageError: from an item, naming the file.
    """

    task = TASK

    def __init__(self, store, listed, split, names, targets, label_names, transform=None, on_memory=False):
        self.names, self.targets = np.char.encode(names), np.asarray(targets)
        sample = self.names[store.rows_to_check(len(names))]
        if len(absent := sample[store.missing(sample)]):
            raise UserError(
                f"{listed} names images that are not in {store.root}, such as {absent[0].decode()} ({len(absent):,} of "
                f"{len(sample):,} that were looked up); correct --data-path, or the list"
            )
        self.store = MemoryStore(store, self.names) if on_memory else store
        self.root, self.transform, self.label_names = store.root, transform, tuple(label_names)
        self.summary = f"{split}: {len(names):,} images in {len(self.label_names):,} classes"
        lacking = np.flatnonzero(np.bincount(self.targets, minlength=len(self.label_names)) == 0)
        named = ", ".join(self.label_names[k] for k in lacking[:10]) + (", ..." if len(lacking) > 10 else "")
        self.warnings = [f"{split}: no image of {len(lacking):,} of the classes: {named}"] if len(lacking) else []

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        name = self.names[index].decode()
        image = decode_photo(self.store.read(name), str(self.root / name))
        return image if self.transform is None else self.transform(image), int(self.targets[index])

    def ids(self):
        """What identifies the images in tables of predictions: column name -> values [N]."""
        return {"path": [name.decode() for name in self.names]}


def _find_list(root, split):
    """The list of a split's images, or None."""
    return next((root / name.format(split) for name in LISTS if (root / name.format(split)).is_file()), None)


def _read_list(file):
    """(names, their classes as texts) of a list of images."""
    names, classes = [], []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        parts = line.rsplit(None, 1)
        if len(parts) == 1:
            raise UserError(f"{file}: line {number} is {line!r}; expected a path and its class")
        if parts:
            names.append(parts[0].rpartition(".zip@/")[2])
            classes.append(parts[1])
    return names, classes


def _read_split(root, split, zipped):
    """(store, what lists its images, their names, their classes as texts) of train, val or test."""
    store, file = ZipStore(root, f"{split}.zip") if zipped else FileStore(root / split), _find_list(root, split)
    if file:
        return store, file, *_read_list(file)
    if not zipped and not store.root.is_dir():
        raise UserError(
            f"{store.root} is not a folder; --data-path must hold train/ and val/ with a folder per class, or with "
            f"lists such as {split}.txt{use_instead(root, 'imagenet')}"
        )
    names = [name for name in store.names() if "/" in name and name.lower().endswith(IMG_EXTENSIONS)]
    return store, store.root, names, [name.partition("/")[0] for name in names]


def _numbered(root, split, classes):
    """Whether the classes of a split, texts, are numbers of a list."""
    return _find_list(root, split) is not None and all(text.isdecimal() for text in classes)


def _name_classes(root, split, read, count, zipped):
    """The classes by their index, as a split has them; count: MODEL.NUM_CLASSES."""
    if not zipped and _find_list(root, split) is None and (root / split).is_dir():
        return sorted(folder.name for folder in (root / split).iterdir() if folder.is_dir())
    _, _, names, classes = read(split)
    if not _numbered(root, split, classes):
        return sorted(set(classes))
    # A number is called as the folder of its images, if each number has one of its own.
    folders = {int(text): name.split("/")[-2] for name, text in zip(names, classes) if "/" in name}
    own = folders if len(set(folders.values())) == len(folders) else {}
    return [own.get(k, str(k)) for k in range(count)]


def build(config, *splits):
    """The datasets of `splits` that `config` describes, with augmentation for train."""
    data, root, found = config.DATA, Path(config.DATA.DATA_PATH).expanduser(), []
    zipped, count = data.ZIP_MODE, config.MODEL.NUM_CLASSES
    read = functools.cache(lambda folder: _read_split(root, folder, zipped))
    first = "train" if (root / ("train.zip" if zipped else "train")).exists() else "val"
    classes = _name_classes(root, first, read, count, zipped)
    index = {name: k for k, name in enumerate(classes)}
    tested = _find_list(root, "test") or any((root / "test" / name).is_dir() for name in classes)
    for split in splits:
        folder = {"train": "train", "validate": "val", "test": "test" if tested else "val"}[split]
        store, listed, names, texts = read(folder)
        if not names:
            raise UserError(f"{listed} has no images; expected a folder per class, or a list of images")
        numbered = _numbered(root, folder, texts)
        targets = [int(text) if numbered else index.get(text, -1) for text in texts]
        for name, text, target in zip(names, texts, targets):
            if not 0 <= target < len(classes):
                why = f"MODEL.NUM_CLASSES is {count}" if numbered else f"{root / first} does not have it"
                raise UserError(f"{listed}: {name} is of the class {text}, but {why}")
        transform = photo_transform(config, train=split == "train")
        found.append(PhotoDataset(store, listed, split, names, targets, classes, transform, data.IMG_ON_MEMORY))
    jitter = config.AUG.COLOR_JITTER
    if "train" in splits and config.AUG.AUTO_AUGMENT and jitter not in (0, KNOBS["AUG.COLOR_JITTER"].default):
        text = f"AUG.COLOR_JITTER {jitter} has no effect beside AUG.AUTO_AUGMENT {config.AUG.AUTO_AUGMENT!r}"
        found[splits.index("train")].warnings.append(text)
    return found
