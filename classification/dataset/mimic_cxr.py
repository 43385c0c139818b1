"""MIMIC-CXR as a dataset for multi-label classification (DATA.DATASET mimic_cxr)."""

import torch
from PIL import Image

from dataset import tables
from dataset.images import decode
from dataset.labels import LABELS, apply_policy
from dataset.stores import FileStore, MemoryStore, ZipStore
from dataset.transforms import radiograph_transform, resized_side
from errors import UserError


class MIMICCXRDataset(torch.utils.data.Dataset):
    """One split of MIMIC-CXR, or of a table of the user's own; item = (image, target).

    Args:
        root: the release folder or its `files/`, see :func:`dataset.tables.load_table`.
        split: train, validate (or val) or test.
        transform: PIL image -> anything; None returns the PIL image.
        mode: of that image, RGB (the grey values three times) or L (grey, a third of the work).
        uncertain, missing: policy for -1 and for blank labels, or one by label, see :mod:`dataset.labels`.
        in_zip: read the images from `root/*.zip`.
        on_memory: read all of them now, see :class:`dataset.stores.MemoryStore`.
        dicom_recipe, dicom_window, shrink_to: how a file becomes grey, see :func:`dataset.images.decode`.
        table: further arguments of :func:`dataset.tables.load_table`.

    Items: (transform(image), target [L] float32 of 0, 1, NaN = unknown).

    Raises:
        UserError: at construction, for anything wrong with folders, tables or the split;
        ImageError: from an item, naming the file.
    """

    task = "multilabel"

    def __init__(
        self,
        root,
        split,
        transform=None,
        *,
        mode="RGB",
        uncertain="zeros",
        missing="zeros",
        in_zip=False,
        on_memory=False,
        dicom_recipe="window",
        dicom_window=0,
        shrink_to=0,
        **table,
    ):
        whole = tables.load_table(root, in_zip=in_zip, **table)
        self.store = ZipStore(whole.root) if in_zip else FileStore(whole.root)
        if in_zip:
            self.store.check(whole.path)
        rows = whole.split == tables.split_index(split)
        if not rows.any():
            raise UserError(f"{root}: the split {split!r} has no image")
        self.table = whole.select(rows)
        if on_memory:
            self.store = MemoryStore(self.store, self.table.path)
        self.label_names = whole.label_names
        targets = apply_policy(whole.labels, whole.label_names, uncertain=uncertain, missing=missing)
        soft = split == "train"
        self.targets = apply_policy(
            self.table.labels, whole.label_names, uncertain=uncertain, missing=missing, soft=soft
        )
        self.transform, self.mode = transform, mode
        self.decoding = {"recipe": dicom_recipe, "window": dicom_window, "shrink_to": shrink_to}
        self.summary = tables.summary(whole, targets)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        path = self.table.path[index].decode()
        grey = decode(self.store.read(path), str(self.store.root / path), **self.decoding)
        image = Image.fromarray(grey).convert(self.mode)
        if self.transform is not None:
            image = self.transform(image)
        return image, torch.from_numpy(self.targets[index])

    def rows(self):
        """Identifiers of the images for tables of predictions: column name -> values [N]."""
        return {
            "dicom_id": [d.decode() for d in self.table.dicom_id],
            "study_id": self.table.study,
            "subject_id": self.table.subject,
        }


def build(config, split):
    """The split of the dataset that `config` describes, with augmentation for train."""
    d = config.DATA
    dataset = MIMICCXRDataset(
        d.DATA_PATH,
        split,
        radiograph_transform(config, train=split == "train"),
        mode="L",
        uncertain=d.UNCERTAIN,
        missing=d.MISSING,
        in_zip=d.ZIP_MODE,
        on_memory=d.IMG_ON_MEMORY,
        dicom_recipe=d.DICOM_RECIPE,
        dicom_window=d.DICOM_WINDOW,
        shrink_to=2 * resized_side(config),  # so that the resizing after it still has four pixels for each of its own
        csv=d.CSV,
        labeler=d.LABELER,
        test_labeler=d.TEST_LABELER,
        views=d.VIEWS,
        label_names=tuple(d.LABELS) or LABELS,
        image_format=d.IMAGE_FORMAT,
        allow_missing=d.ALLOW_MISSING,
    )
    if split == "train" and config.AUG.HFLIP > 0:
        dataset.summary += "\nwarning: AUG.HFLIP mirrors X-rays; the heart then lies on either side"
    return dataset
