"""A table of X-rays -> items (image, target). The module itself needs no torch: tools read tables through it."""

from PIL import Image

from dataset import tables
from dataset.files.domain import image_domain
from dataset.files.images import decode
from dataset.files.stores import MemoryStore
from dataset.labels import unlearnable
from dataset.pseudo_labels import fill_unknown


class RadiographDataset:
    """One split of a table of X-rays, see `dataset.build.Dataset`; item = (image, target).

    Args:
        table: :class:`dataset.tables.Table` of all splits; without targets it gets those of the default policy.
        split: train, validate (or val) or test.
        transform: PIL image -> anything; None returns the PIL image.
        mode: of that image, RGB (the grey values three times) or L (grey, a third of the work).
        on_memory: read all of them now, see :class:`dataset.files.stores.MemoryStore`.
        uses: keys of the config that it uses beside those of all X-rays.
        pseudo_labels: the record of :func:`dataset.pseudo_labels.fill_unknown`, None without such labels.
        decoding: how a file becomes grey, the keywords of :func:`dataset.files.images.decode`.

    Items: (transform(image), target [L] float32 of 0, 1, NaN = unknown).

    UserError: at construction, for an unknown or empty split or missing images;
    ImageError: from an item, naming the file.
    """

    task = "multilabel"

    def __init__(
        self,
        table,
        split,
        transform=None,
        *,
        mode="RGB",
        on_memory=False,
        uses=frozenset(),
        pseudo_labels=None,
        **decoding,
    ):
        if table.targets is None:
            table = table.with_targets()
        self.table = table.select(table.split == tables.split_index(split))
        if not len(self.table):
            raise tables.EmptySplit(f"{table.root}: the split {split!r} has no image")
        self.store = MemoryStore(table.store, self.table.path) if on_memory else table.store
        self.root = table.root
        self.domain = image_domain(self.store, self.table.path, recipe := decoding.get("recipe", "window"))
        self.label_names, self.targets = table.label_names, self.table.targets
        self.labels, self.cohort, self.patients = self.table.labels, table.cohort, table.patients()
        self.label_mapping, self.pseudo_labels = table.label_mapping, pseudo_labels
        self.population, self.primary_metric = table.population, table.primary_metric
        self.label_groups = table.label_groups
        of_dicom = ("DATA.DICOM_RECIPE", "DATA.DICOM_WINDOW") if f"dicom {recipe}" in self.domain else ()
        self.uses = uses.union(of_dicom)
        self.summary, self.warnings = table.summary(), unlearnable(self) if split == "train" else []
        self.transform, self.mode, self.decoding = transform, mode, decoding

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        import torch

        path = self.table.path[index].decode()
        grey = decode(self.store.read(path), str(self.store.root / path), **self.decoding)
        image = Image.fromarray(grey).convert(self.mode)
        if self.transform is not None:
            image = self.transform(image)
        return image, torch.from_numpy(self.targets[index])

    def ids(self):
        """What identifies the images in tables of predictions: column name -> values [N]."""
        columns = {"dicom_id": self.table.dicom_id, "study_id": self.table.study, "subject_id": self.table.subject}
        return {name: [text.decode() for text in column.tolist()] for name, column in columns.items()}

    def descriptions(self):
        """What else a table of predictions tells of the images: column name -> values [N]."""
        view = {} if self.table.view is None else {"view": self.table.view}
        return {**view, "path": [path.decode() for path in self.table.path]}


def build_radiographs(config, table, splits, uses=frozenset()):
    """The datasets of `splits` over one table, with the transforms and the label policy that `config` describes.

    uses: keys of the config that the table's release uses beside those of all X-rays.
    """
    from dataset.preparing import decoding
    from dataset.transforms import radiograph_transform

    d = config.DATA
    table = table.limited(d.LIMIT) if d.LIMIT else table
    table, pseudo_labels = table.with_targets(d.UNCERTAIN, d.MISSING), None
    if d.PSEUDO_LABELS and "train" in splits:
        table, pseudo_labels = fill_unknown(table, d.PSEUDO_LABELS)
    datasets = [
        RadiographDataset(
            table,
            split,
            radiograph_transform(config, train=split == "train"),
            mode="L",
            on_memory=d.IMG_ON_MEMORY,
            uses=uses,
            pseudo_labels=pseudo_labels,
            **decoding(config),
        )
        for split in splits
    ]
    if "train" in splits and config.AUG.HFLIP > 0:
        datasets[splits.index("train")].warnings.append("AUG.HFLIP mirrors X-rays; the heart then lies on either side")
    return datasets
