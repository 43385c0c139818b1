"""Several releases at once (DATA.SOURCES): one split of each as one dataset, see `dataset.build.Dataset`.

Ids carry the name of their source, `chexpert:patient00001`: the same id in two releases is not the same patient. Labels
that a source does not know stay unknown (NaN) for its images.
"""

import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import UserError
from config import source_configs
from dataset.files.domain import kinds
from dataset.labels import unlearnable
from dataset.tables import SPLITS, aligned


class Sources:
    """The images of several datasets, one after the other; labels, ids and descriptions are those of all.

    parts: {name: dataset}, multi-label ones of the same labels.
    split: which one it is, for the warnings of what cannot be learnt.
    warnings: further texts.

    sources: the name of each image's source [N]; rows_of_sources: indices of each source's images.
    """

    task = "multilabel"
    root = "/"  # its paths are whole ones

    def __init__(self, parts, split, warnings=()):
        self.parts, datasets = parts, list(parts.values())
        ends = np.cumsum([len(part) for part in datasets])
        self.starts = np.concatenate([[0], ends[:-1]])
        self.rows_of_sources = [np.arange(start, end) for start, end in zip(self.starts, ends)]
        self.sources = np.repeat(np.array(list(parts)), [len(part) for part in datasets])
        self.label_names = datasets[0].label_names
        self.targets = np.concatenate([part.targets for part in datasets])
        if all(hasattr(part, "labels") for part in datasets):
            self.labels = np.concatenate([part.labels for part in datasets])
        self.label_mapping = _joined_mapping(self.label_names, parts)
        self.primary_metric = getattr(datasets[0], "primary_metric", "")
        self.label_groups = getattr(datasets[0], "label_groups", "")
        self.cohort = _joined_cohort(parts)
        domains = {kind for part in datasets for kind in getattr(part, "domain", "").split(" and ")}
        self.domain = " and ".join(sorted(domains - {""}))
        self.summary = self._summary()
        self.warnings = [*self._warnings(split), *warnings]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        k = int(np.searchsorted(self.starts, index, side="right")) - 1
        return list(self.parts.values())[k][index - self.starts[k]]

    def ids(self):
        """Where one source has no patients or studies, each of its images is one."""
        found = [part.ids() for part in self.parts.values()]
        images = np.concatenate([next(iter(ids.values())) for ids in found])
        columns = {}
        for column, texts in self._joined(found).items():
            rows = zip(self.sources, texts, images) if any(texts) else ()
            columns[column] = [f"{name}:{text or image}" for name, text, image in rows] or [""] * len(images)
        return columns

    def descriptions(self):
        """The source, and what the sources tell; blank where one does not. Paths are whole ones."""
        found = []
        for part in self.parts.values():
            found.append(dict(getattr(part, "descriptions", dict)()))
            if "path" in found[-1]:
                found[-1]["path"] = [str(Path(getattr(part, "root", "")) / text) for text in found[-1]["path"]]
        return {"source": self.sources, **self._joined(found)}

    def _joined(self, found):
        """The parts' {column: values} one after the other, blank where a part lacks a column."""
        frames = [pd.DataFrame(columns, range(len(part))) for columns, part in zip(found, self.parts.values())]
        return {column: list(values) for column, values in pd.concat(frames).fillna("").items()}

    def _summary(self):
        lines = [("images of patients", *SPLITS)]
        splits_of = {name: part.cohort["splits"] for name, part in self.parts.items() if hasattr(part, "cohort")}
        if len(splits_of) > 1:
            splits_of["together"] = self.cohort["splits"]
        for name, splits in splits_of.items():
            lines.append((name, *(_size(splits.get(split)) for split in SPLITS)))
        if "together" in splits_of:
            lines.append(("positives of known labels", "", "", ""))
            for label in self.label_names:
                counts = (self.cohort["splits"].get(split, {}).get("labels", {}).get(label) for split in SPLITS)
                lines.append((f"  {label}", *(f"{c['positives']:,} of {c['known']:,}" if c else "-" for c in counts)))
        return "\n".join([aligned(lines), *(f"{name}\n{part.summary}" for name, part in self.parts.items())])

    def _warnings(self, split):
        by_text = {}
        for name, part in self.parts.items():
            alone = unlearnable(part) if split == "train" else []  # which another source may mend
            for text in part.warnings:
                if text not in alone:
                    by_text.setdefault(text, []).append(name)
        found = [
            text if len(names) == len(self.parts) else f"{', '.join(names)}: {text}" for text, names in by_text.items()
        ]
        if len(kinds(self.domain)) > 1:
            named = "; ".join(f"{name} {getattr(part, 'domain', '')}" for name, part in self.parts.items())
            found.append(
                f"the sources are of different image domains ({named}), by which a model can tell them apart; "
                "DATA.DICOM_RECIPE mimic_jpg makes DICOMs like the JPGs of MIMIC-CXR"
            )
        return found + (unlearnable(self) if split == "train" else [])


def parts_of(dataset, config):
    """{name: (config of that source, its dataset of images)}; of one data set alone, itself."""
    dataset = getattr(dataset, "of_images", dataset)  # DATA.UNIT study
    parts = getattr(dataset, "parts", {config.DATA.DATASET: dataset})
    return {name: (one, parts[name]) for name, one in source_configs(config).items() if name in parts}


def population(config, dataset):
    """The name of those whose ids a dataset has: its `population`, where two releases are of the same patients."""
    return getattr(dataset, "population", "") or config.DATA.DATASET


def check_folders(configs):
    """Raises a UserError for a source whose path is no folder, or that of another one with the same table.

    configs: {name: its config}.
    """
    seen = {}
    for name, config in configs.items():
        path = Path(config.DATA.DATA_PATH).expanduser().resolve()
        if not os.path.isdir(path):
            raise UserError(f"DATA.SOURCES {name}: the path {config.DATA.DATA_PATH} is not a folder ({path})")
        place = path, config.DATA.CSV
        if place in seen:
            raise UserError(f"DATA.SOURCES {name}: the path {config.DATA.DATA_PATH} is that of {seen[place]}, too")
        seen[place] = name


def check_patients(configs, parts):
    """Raises a UserError where a patient is in train of one source and in validation or test of another of the same
    release.

    configs: {name: config of a source}; parts: {name: a dataset of it, of any split}.
    """
    for (name, one), (other, two) in itertools.permutations(configs.items(), 2):
        ours, theirs = (getattr(parts[source], "patients", {}) for source in (name, other))
        same = population(one, parts[name]) == population(two, parts[other])
        for split in ("validate", "test") if ours and theirs and same else ():
            if len(shared := np.intersect1d(ours["train"], theirs[split])):
                raise UserError(
                    f"DATA.SOURCES {name} trains on {len(shared):,} patient(s) that are in the {split} split of "
                    f"{other}, of the same release, such as {shared[0].decode()}: the score would measure memory. Give "
                    "both the same split; if they are different people, give them different ids"
                )


def check_alike(parts):
    """Raises a UserError where datasets {name: dataset} have not the same labels, each 0 or 1."""
    first = next(iter(parts))
    for name, part in parts.items():
        if part.task != Sources.task:
            raise UserError(f"DATA.SOURCES {name}: its task is {part.task}; only {Sources.task} data can be mixed")
        if part.label_names != parts[first].label_names:
            raise UserError(
                f"DATA.SOURCES {name} has the labels {', '.join(part.label_names)}; {first} has "
                f"{', '.join(parts[first].label_names)}: say which to learn with DATA.LABELS"
            )


def _size(counts):
    if not counts:
        return "-"
    return f"{counts['images']:,} of {counts['patients']:,}" if counts["patients"] else f"{counts['images']:,}"


def _joined_mapping(label_names, parts):
    """See `tables.Table.label_mapping`: approximate where it is so in any source, unknown where no source knows it."""
    own = {name: getattr(part, "label_mapping", {}) for name, part in parts.items()}
    joined = {}
    for label in label_names:
        itself = {"from": [label], "kind": "exact"}
        meanings = {name: mapping.get(label, itself) for name, mapping in own.items()}
        kinds = {m["kind"] for m in meanings.values()} - {"unknown"}
        named = [f"{name}: {text}" for name, m in meanings.items() for text in m["from"]]
        alike = all(m == itself for m in meanings.values())
        kind = "unknown" if not kinds else "approximate" if "approximate" in kinds else "exact"
        joined[label] = itself if alike else {"from": named, "kind": kind}
    return joined


def _joined_cohort(parts):
    """The sum of the parts' cohorts, see `tables.Table.cohort`, with the source as a further group."""
    cohorts = {name: getattr(part, "cohort", {}) for name, part in parts.items()}
    left_out = {f"{name}: {reason}": n for name, c in cohorts.items() for reason, n in c.get("left_out", {}).items()}
    splits = {}
    for split in SPLITS:
        own = {name: c["splits"][split] for name, c in cohorts.items() if split in c.get("splits", {})}
        if not own:
            continue
        joined = splits[split] = {"labels": {}}
        for count in ("images", "studies", "patients"):
            values = [part[count] for part in own.values()]
            joined[count] = None if None in values else sum(values)
        for label, first in next(iter(own.values()))["labels"].items():
            sums = {k: sum(part["labels"][label][k] for part in own.values()) for k in first if k != "prevalence"}
            sums["prevalence"] = sums["positives"] / sums["known"] if sums["known"] else None
            joined["labels"][label] = first | sums
        groups = {"source": {name: part["images"] for name, part in own.items()}, "view": Counter()}
        for part in own.values():
            views = part.get("groups", {}).get("view", {"": {"images": part["images"]}})
            groups["view"].update({view: counted["images"] for view, counted in views.items()})
        joined["groups"] = {
            kind: {name: {"images": n, "share": n / joined["images"]} for name, n in sorted(counts.items())}
            for kind, counts in groups.items()
        }
    return {"splits": splits, "left_out": left_out}
