"""How the tools read a dataset: by its own reader or, where its module has only `build`, by the datasets it makes."""

import contextlib
from pathlib import Path

import numpy as np
import pandas as pd

from common import builders
from common.errors import UserError
from config import from_dict
from dataset import tables
from dataset.labels import UNKNOWN
from dataset.releases import Release


def find_reader(name):
    """The reader of the dataset `name`: its :class:`dataset.releases.Release`, or :class:`Built`.

    UserError: no such dataset.
    """
    module = builders.find("dataset", name, "--dataset")
    return getattr(module, "RELEASE", None) or Built(name, module)


class Built(Release):
    """A dataset whose module has only `build`; each image needs a `path` in `ids()` or `descriptions()`."""

    def __init__(self, name, module):
        super().__init__(name, signs={}, read=module.build)

    def learned_labels(self, root, csv=""):
        self.find_own_csv(root, csv)
        return next(iter(self._datasets(root).values())).label_names

    def load_table(self, root, *, label_names=(), image_format="auto", allow_missing=False, checked=True):
        """The table of all images, with their labels; an image that is in two splits is in the first of them."""
        datasets, parts = self._datasets(root, IMAGE_FORMAT=image_format, ALLOW_MISSING=allow_missing), []
        for split, dataset in datasets.items():
            columns = dataset.ids() | getattr(dataset, "descriptions", dict)()
            if dataset.task != "multilabel" or "path" not in columns:
                raise UserError(
                    f"--dataset {self.name}: {'' if 'path' in columns else 'no '}path in ids() or descriptions(), task "
                    f"{dataset.task}; the tools need a path for each image, and the task multilabel"
                )
            frame = pd.DataFrame({name: np.asarray(values).astype(str) for name, values in columns.items()})
            labels = getattr(dataset, "labels", dataset.targets)
            parts.append(
                frame.assign(split=split, **{name: labels[:, k] for k, name in enumerate(dataset.label_names)})
            )
        frame = pd.concat(parts).drop_duplicates("path").reset_index(drop=True)
        blank = pd.Series("", frame.index)
        table = tables.Table(
            root=Path(getattr(dataset, "root", root)).absolute(),
            sources=(Path(root),),
            label_names=dataset.label_names,
            path=tables.to_bytes(frame["path"]),
            dicom_id=tables.to_bytes(frame.get("dicom_id", frame["path"])),
            study=tables.to_bytes(frame.get("study_id", blank)),
            subject=tables.to_bytes(frame.get("subject_id", blank)),
            split=frame["split"].map(tables.SPLITS.index).to_numpy(np.int8),
            labels=frame[list(dataset.label_names)].to_numpy(np.float32),
        )
        return tables.check_table(table, allow_missing) if checked else table

    def tables_to_copy(self, _root, table, _csv=""):
        """{"images.csv": a table of the images in the form of the user's own}: the copy is read as --dataset mimic_cxr.

        A label without any known value has no column.
        """
        ids = {"path": table.path, "dicom_id": table.dicom_id, "study_id": table.study, "subject_id": table.subject}
        frame = pd.DataFrame({name: [text.decode() for text in values.tolist()] for name, values in ids.items()})
        frame = frame.loc[:, (frame != "").all()].assign(split=[tables.SPLITS[k] for k in table.split])
        labels = pd.DataFrame(table.labels, columns=list(table.label_names)).replace(UNKNOWN, np.nan)
        return {"images.csv": pd.concat([frame, labels.dropna(axis=1, how="all")], axis=1)}

    def _datasets(self, root, **data):
        """{split: dataset} of the splits that have images."""
        data |= {"DATASET": self.name, "DATA_PATH": str(Path(root).expanduser())}
        config, found = from_dict({"DATA": data}, f"--dataset {self.name}"), {}
        for split in tables.SPLITS:
            with contextlib.suppress(tables.EmptySplit):
                (found[split],) = self.read(config, split)
        if not found:
            raise UserError(f"--dataset {self.name}: no split has an image in {root}")
        return found
