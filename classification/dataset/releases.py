"""What the readers of releases share: label mapping, splits by patient, finding folders and images.

A release is a module with a :class:`Release`: the marks it is known by, and a `read` that turns its tables into a
:class:`Reading`. How a model's labels follow from its own says `mappings.yaml`; all that comes after is here and in
`tables.py`. Runs without torch.
"""

import fnmatch
import functools
import hashlib
import importlib
import itertools
import os
import pkgutil
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from common.errors import UserError, did_you_mean
from common.folders import cannot_be_read
from dataset import tables
from dataset.files.domain import COPY_RECIPE, copied_name
from dataset.files.images import ENDINGS
from dataset.files.stores import FileStore, ZipStore
from dataset.labels import LABELS, UNKNOWN
from dataset.tables import SPLITS, Table
from dataset.views import find_views
from dataset.xrays import build_radiographs

PROBES = 20  # images looked for to learn where all of them lie
MOST_FOLDERS = 100  # in a folder of releases; one with more holds the images of one


# ------------------------------------------------------------------------------------------------ labels
MAPPINGS = yaml.safe_load(Path(__file__).with_name("mappings.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Source:
    """Where a label of a model comes from: the release's labels of which any makes it positive, see mappings.yaml."""

    names: tuple
    exact: bool


def _any_of(values):
    """[N] of several findings: 1 where any is, else -1, else NaN, else 0."""
    values = np.stack(values)
    found = np.zeros(values.shape[1], np.float32)
    for value, here in ((np.nan, np.isnan(values)), (-1, values == -1), (1, values == 1)):
        found[here.any(0)] = value
    return found


def map_labels(reading, mapping, label_names, approximate_labels, release, foreign=False):
    """(labels [N, L] float32, {label: {"from": names, "kind": exact, approximate or unknown}}).

    UserError: a label that neither the 14 of CheXpert nor the release has; not with `foreign`: it is unknown then.
    """
    own = {name: Source((name,), True) for name in reading.names}
    values, mapped = np.full((len(reading.image), len(label_names)), UNKNOWN, np.float32), {}
    for k, label in enumerate(label_names):
        source = mapping.get(label) or own.get(label)
        if source is None and label not in LABELS and not foreign:
            known = [*reading.names, *LABELS]
            there = f"; its labels: {', '.join(reading.names)}" if len(reading.names) < 40 else ""
            raise UserError(
                f"DATA.LABELS: {label!r} is no label of {release}, and none of CheXpert's 14"
                f"{did_you_mean(label, known)}{there}"
            )
        if source is None or not (source.exact or approximate_labels):
            mapped[label] = {"from": [], "kind": "unknown"}
            continue
        values[:, k] = _any_of([reading.finding(name) for name in source.names])
        mapped[label] = {"from": list(source.names), "kind": "exact" if source.exact else "approximate"}
    return values, mapped


def _say_mapping(mapped, release):
    """The notes of a summary on labels that are not the release's own under the same definition."""
    nearly = [f"{label} ({', '.join(m['from'])})" for label, m in mapped.items() if m["kind"] == "approximate"]
    unknown = [label for label, m in mapped.items() if m["kind"] == "unknown"]
    notes = []
    if nearly:
        notes.append(f"approximate labels (from): {'; '.join(nearly)}; DATA.APPROXIMATE_LABELS False leaves them out")
    if unknown:
        notes.append(f"unknown to {release}, masked in loss and metrics: {', '.join(unknown)}")
    return notes


# ------------------------------------------------------------------------------------------------ splits
def draw(units, seed):
    """(place of each row's unit in a seeded order of the units [N], their number); the same wherever it is drawn."""
    names, row = np.unique(np.asarray(units, dtype=str), return_inverse=True)
    order = sorted(range(len(names)), key=lambda k: hashlib.sha256(f"{seed} {names[k]}".encode()).digest())
    place = np.empty(len(names), int)
    place[order] = np.arange(len(names))
    return place[row], len(names)


def _split(reading, seed, completed):
    """(splits [N] as indices, a note or ""): the release's own; completed: by patient with a seed."""
    what = "patients" if reading.subject is not None else "images (the release has no patient ids)"
    units = reading.image if reading.subject is None else reading.subject
    if reading.split is None and seed is None:
        note = "no splits of its own: all of it is the test split (DATA.SPLIT_SEED splits it to train on)"
        return np.full(len(units), SPLITS.index("test"), np.int8), note
    if reading.split is None:
        place, count = draw(units, seed)
        split = np.where(place * 10 < count, 1, np.where(place * 10 < 3 * count, 2, 0)).astype(np.int8)
        return split, f"split drawn by DATA.SPLIT_SEED {seed}: 70 % of the {what} train, 10 % validate, 20 % test"
    split = np.array([SPLITS.index(name) for name in reading.split], np.int8)
    if not completed or (split == SPLITS.index("validate")).any():
        return split, ""
    train = split == SPLITS.index("train")
    place, count = draw(np.asarray(units)[train], seed or 0)
    split[np.flatnonzero(train)[place * 10 < count]] = SPLITS.index("validate")
    return split, f"validation: a tenth of the {what} of train, drawn by DATA.SPLIT_SEED {seed or 0}"


# ------------------------------------------------------------------------------------------------ folders
def _having(place, pattern, columns):
    """The tables of this name in a folder, plain or gzipped; with `columns` those that have them."""
    found = []
    for path in sorted((*place.glob(pattern), *place.glob(f"{pattern}.gz"))):
        try:
            if not columns or set(columns) <= set(tables.read_csv(path, (), rows=False).columns):
                found.append(path)
        except UserError:  # whatever it is, it is not that
            continue
    return found


class Folder:
    """The folder of a release: its tables, and the names of its images.

    tables: the folder of the tables where that is another; also: further folders that may hold some.
    """

    def __init__(self, root, in_zip=False, also=(), tables=None):
        self.root, self.store = root, ZipStore(root) if in_zip else FileStore(root)
        self.searched = (tables or root, *also)
        self.places = ", ".join(map(str, self.searched))

    def table(self, *patterns, columns=()):
        """Path of the table of the first of these names that is there, with these columns; None without any.

        A plain one comes before the same one gzipped.

        UserError: several tables of a pattern fit.
        """
        for place, pattern in itertools.product(self.searched, patterns):
            found = {path.name.removesuffix(".gz"): path for path in reversed(_having(place, pattern, columns))}
            if len(found) > 1:
                several = ", ".join(sorted(path.name for path in found.values()))
                raise UserError(f"{place} holds several tables {pattern} ({several}); keep the one to read there")
            if found:
                return next(iter(found.values()))
        return None

    def needed(self, *patterns, why, columns=()):
        """The same; a UserError that says what it is where there is none."""
        path = self.table(*patterns, columns=columns)
        if path is None:
            raise UserError(f"{self.root} holds no {patterns[0]}, {why}; download it into the folder")
        return path

    def files(self, where):
        """Names of the files in a folder below the root, without those of its own folders."""
        if isinstance(self.store, ZipStore):
            return self._members.get(where, [])
        return [entry.name for entry in self._entries(where)]

    def folders(self, where, pattern):
        """Names of the folders of this pattern in a folder below the root."""
        if isinstance(self.store, ZipStore):
            above = f"{where}/" if where else ""
            there = {path[len(above) :].partition("/")[0] for path in self._members if path.startswith(above)}
        else:
            there = [entry.name for entry in self._entries(where) if entry.is_dir()]
        return sorted(name for name in there if fnmatch.fnmatchcase(name, pattern))

    def _entries(self, where):
        """What a folder below the root holds, by name; nothing where there is no such folder."""
        try:
            with os.scandir(self.root / where) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            cannot_be_read(error)

    @functools.cached_property
    def _members(self):
        found = {}
        for path in self.store.index.paths.tolist():
            where, _, name = path.decode().rpartition("/")
            found.setdefault(where, []).append(name)
        return found


def data_folder(given, option="--data-path"):
    """The data folder that an option names as an absolute path, once it is sure that it can be read.

    UserError: it is no folder, or this user may not list and enter it.
    """
    folder = Path(given).expanduser().absolute()
    try:
        os.listdir(folder)
        os.stat(os.path.join(folder, "."))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"data path {folder} is not a folder; give the release folder with {option}") from error
    except OSError as error:
        raise UserError(
            f"data path {folder} cannot be read ({error.strerror}); you need the rights to list and to enter it"
        ) from error
    return folder


def _roots(folder, signs):
    """The folders that hold a release: `folder`, else one above it, else those in it; by the first sign found."""
    with os.scandir(folder) as entries:  # asks the file system for no more than the names
        below = sorted(Path(entry.path) for entry in entries if entry.is_dir())
    below = below if len(below) <= MOST_FOLDERS else []
    for pattern, columns in signs.items():
        for places in ([folder], [folder.parent], [folder.parent.parent], below):
            if found := [place for place in places if _having(place, pattern, columns)]:
                return found
    return []


def _modules_with_signs():
    """{name: module} of the datasets that are known by their tables: only these are imported, others may need torch."""
    import dataset

    found = {}
    for info in pkgutil.iter_modules(dataset.__path__):
        text = (Path(info.module_finder.path) / f"{info.name}.py").read_text() if not info.ispkg else ""
        if re.search(r"^SIGNS\b", text, re.MULTILINE):
            found[info.name] = importlib.import_module(f"dataset.{info.name}")
    return found


def recognise(folder):
    """The names of the datasets whose tables are in `folder`."""
    return [name for name, module in _modules_with_signs().items() if _roots(folder, module.SIGNS)]


def use_instead(folder, name):
    """The end of an error of the dataset `name`: which release lies in `folder` instead, or nothing."""
    folder = Path(folder).expanduser().absolute()
    others = [other for other in (recognise(folder) if folder.is_dir() else []) if other != name]
    return f"; it looks like {' and '.join(others)}: use --dataset {others[0]}" if others else ""


def find_root(given, name, signs, of_several="*"):
    """The folder that holds the tables of a release; `given` is it, one above or one below it.

    of_several: pattern of the folder's name by which one of several is chosen.
    """
    folder = data_folder(given)
    roots = _roots(folder, signs)
    roots = [root for root in roots if fnmatch.fnmatchcase(root.name, of_several)] or roots
    if not roots:
        other = use_instead(folder, name)
        for pattern, columns in signs.items() if not other else ():
            for path in _having(folder, pattern, ()) if pattern[0] != "*" else ():  # of the name, but not such a table
                tables.need_columns(tables.read_csv(path, (), rows=False), columns, path)
        raise UserError(f"{folder} holds no tables of {name} ({', '.join(signs)}){other}")
    if len(roots) > 1:
        raise UserError(f"{folder} holds {name} more than once ({', '.join(r.name for r in roots)}); give one of them")
    return roots[0]


def _find_paths(reading, folder, image_format, allow_missing):
    """The paths of the images as bytes [N], in that of the ways in which they may lie of which images are there: an
    even sample of each is looked for. A single way is taken as it is.

    Where images may be missing and none of the sample is there, all are looked for.
    """
    copied = (folder.root / COPY_RECIPE).is_file()
    ways = [(np.asarray(paths, object), suffix) for paths in reading.paths for suffix in reading.suffixes]
    if len(ways) == 1:
        return tables.to_bytes(ways[0][0])
    count = len(ways[0][0])
    probes, every = np.unique(np.linspace(0, count - 1, min(count, PROBES)).astype(int)), slice(None)

    def names(way, rows):
        paths = way[0][rows] + way[1]
        return [copied_name(path) for path in paths] if copied else paths

    def kind(way):
        return Path(names(way, [0])[0]).suffix.lower()

    def hits(way, rows=probes):
        return int((~folder.store.missing(tables.to_bytes(names(way, rows)))).sum())

    asked = [way for way in ways if copied or image_format == "auto" or kind(way) in ENDINGS[image_format]]
    if not asked:
        raise UserError(f"DATA.IMAGE_FORMAT {image_format}: the release has no such images; use auto")
    there = [hits(way) for way in asked]
    if not any(there) and allow_missing:
        there = [hits(way, every) for way in asked]
    if not any(there):
        looked = list(dict.fromkeys(str(folder.root / names(way, probes)[0]) for way in asked))
        raise UserError(
            f"no image found {folder.store.place}: looked for {', '.join(looked[:4])} and others; --data-path must be "
            "the folder of the release, with the images in their folders"
            + ("" if allow_missing else ", and a part of them needs DATA.ALLOW_MISSING True")
            + _other_images(folder, dict.fromkeys(kind(way) for way in ways if hits(way)))
        )
    kinds = dict.fromkeys(kind(way) for way, n in zip(asked, there) if n)
    if len(kinds) > 1:
        formats = [name for name, endings in ENDINGS.items() if set(kinds) & set(endings)]
        raise UserError(
            f"{folder.root} holds both {' and '.join(kinds)} images; say which to read: DATA.IMAGE_FORMAT "
            f"{' or '.join(formats)}"
        )
    return tables.to_bytes(names(asked[int(np.argmax(there))], every))


def _other_images(folder, suffixes):
    """The end of an error on images that are not found: what there is instead, such as images of other `suffixes`."""
    if suffixes:
        return f"; it has {' and '.join(suffixes)} images: use DATA.IMAGE_FORMAT auto"
    shards = [] if isinstance(folder.store, ZipStore) else sorted(folder.root.glob("*.zip"))
    return f"; {folder.root} has {shards[0].name}: to read images from zip files use --zip" if shards else ""


# ------------------------------------------------------------------------------------------------ releases
@dataclass
class Reading:
    """What a release's own tables say, one value an image.

    image, subject, study, view: texts [N]; subject None: no patient ids. image names the image, and is unique.
    paths: arrays of paths [N] relative to the root, one of each way in which the images may lie; suffixes: what may
        follow each of them.
    finding: name of one of the release's labels -> float32 [N] of 1, 0, -1, NaN. names: those labels.
    split: names of SPLITS [N]; None: the release has no splits.
    lacks_test: what is not there, so that the validation split is tested; else empty.
    lacks_view: why there are no views, for whom asks for one.
    notes: texts for the summary.
    default_labels: () -> (the labels of a model where DATA.LABELS names none, notes for the summary).
    """

    sources: tuple
    image: pd.Series
    subject: pd.Series | None
    study: pd.Series | None
    view: np.ndarray | None
    paths: Iterable
    finding: Callable
    names: tuple
    split: np.ndarray | None = None
    suffixes: tuple = ("",)
    lacks_test: str = ""
    lacks_view: str = ""
    left_out: dict = field(default_factory=dict)
    notes: tuple = ()
    default_labels: Callable = lambda: (LABELS, ())


def views(positions, also=()):
    """Views [N] of texts as :func:`dataset.views.find_views` gives them; also: {text of the release: view}."""
    also = {"L": "LATERAL", "RL": "LATERAL", **dict(also)}
    return find_views(pd.DataFrame({"ViewPosition": positions.str.strip().replace(also)})).astype(str)


@dataclass(frozen=True)
class Release:
    """A release that is read as it is downloaded.

    name: of its module, DATA.DATASET.
    signs: {name of a table: columns} by which its folder is known, the surest first.
    read(folder, **options) -> :class:`Reading`; options: {its keyword: config key}.
    uses: further config keys that it uses.
    parts: pattern of the folders in which a download is unpacked; the folder above them is then the root.
    all_images: the options by which `read` leaves out no image, and finds no fault in one that is too many.
    population, primary_metric, label_groups: see :class:`dataset.tables.Table`.
    """

    name: str
    signs: dict
    read: Callable
    options: dict = field(default_factory=dict)
    uses: tuple = ()
    all_images: dict = field(default_factory=dict)
    parts: str = ""
    population: str = ""
    primary_metric: str = ""
    label_groups: dict = field(default_factory=dict)

    @functools.cached_property
    def mapping(self):
        """{label of a model: :class:`Source`}."""
        kinds = MAPPINGS.get(self.name, {}).items()
        return {label: Source(tuple(names), kind == "exact") for kind, found in kinds for label, names in found.items()}

    def load_table(
        self,
        root,
        *,
        label_names=None,
        foreign_labels=False,
        approximate_labels=True,
        no_finding_clears=False,
        views="all",
        split_seed=None,
        image_format="auto",
        allow_missing=False,
        in_zip=False,
        testing=False,
        checked=True,
        **options,
    ):
        """The table of all images under `root`, checked.

        Args:
            root: the folder of the release, the one above it, or one in it.
            label_names: the labels, of the 14 of CheXpert (None: those, or a table's own) or of the release's own.
            foreign_labels: other labels are allowed, and unknown.
            approximate_labels: False: what is mapped approximately is unknown.
            no_finding_clears: where No Finding is 1, a blank label is 0, but for Support Devices.
            views: all, or a key of :data:`dataset.views.VIEWS`.
            image_format: auto, or one of :data:`dataset.files.images.ENDINGS`.
            allow_missing: leave out images that are not there instead of an error.
            in_zip: images lie in zip files, see :class:`dataset.files.stores.ZipStore`.
            split_seed: by which splits are drawn that the release does not have; None: 0 for a validation split, and
                a release without any splits is all test.
            testing: the test split is wanted: where the release lacks it, the validation split is it.
            checked: False: without the checks of patients and files.
            options: of `read`.

        UserError: names the file, column or value.
        """
        folder = self.folder(root, in_zip, **options)
        reading = self.read(folder, **options)
        tables.no_duplicates(reading.image, "image", reading.sources[0])
        label_names, notes = reading.default_labels() if label_names is None else (tuple(label_names), ())
        labels, mapped = map_labels(reading, self.mapping, label_names, approximate_labels, self.name, foreign_labels)
        if no_finding_clears and "No Finding" in reading.names:
            tables.clear_findings(labels, label_names, reading.finding("No Finding") == 1)
        split, note = _split(reading, split_seed, "DATA.SPLIT_SEED" in self.uses)
        notes = [*reading.notes, *notes, *filter(None, [note])]
        if reading.lacks_test and testing:
            split[split == SPLITS.index("validate")] = SPLITS.index("test")
            notes.append(f"the test split is the release's validation split: {reading.lacks_test} is not there")
        unknown = np.full(len(reading.image), b"")
        table = Table(
            root=folder.root,
            sources=tuple(reading.sources),
            label_names=label_names,
            path=_find_paths(reading, folder, image_format, allow_missing),
            dicom_id=tables.to_bytes(reading.image),
            study=unknown if reading.study is None else tables.to_bytes(reading.study),
            subject=unknown if reading.subject is None else tables.to_bytes(reading.subject),
            split=split,
            labels=labels,
            view=reading.view,
            store=folder.store,
            left_out=dict(reading.left_out),
            notes=(*notes, *_say_mapping(mapped, self.name)),
            label_mapping=mapped,
            population=self.population,
            primary_metric=self.primary_metric,
            label_groups=self.label_groups,
        )
        if views != "all":
            if table.view is None:
                why = reading.lacks_view or f"{self.name} does not tell the views of its images"
                raise UserError(f"DATA.VIEWS {views}: {why}")
            table = tables.select_views(table, views)
        return tables.check_table(table, allow_missing) if checked else table

    def folder(self, root, in_zip=False, **_options):
        """The :class:`Folder` that holds it; root: see :meth:`load_table`; options: of `read`."""
        found = find_root(root, self.name, self.signs)
        return Folder(found.parent if fnmatch.fnmatchcase(found.name, self.parts) else found, in_zip)

    def find_own_csv(self, _root, csv=""):
        """None: a release is read from its own tables; a UserError where another one is named."""
        if csv:
            raise UserError(f"{csv}: a table of your own is read by --dataset mimic_cxr, not by {self.name}")

    def learned_labels(self, root, csv=""):
        """The labels that training learns where DATA.LABELS names none."""
        self.find_own_csv(root, csv)
        return LABELS

    def whole_table(self, root, *, csv="", **given):
        """The table of all images that the release names, without labels: for those who audit and copy them."""
        self.find_own_csv(root, csv)
        own = {"csv": csv} if csv else {}
        return self.load_table(root, label_names=(), **own, **given, **self.all_images)

    def tables_to_copy(self, _root, table, _csv=""):
        """{path in a copy: table} of the files that a copy of the release needs."""
        below = {path: path.is_relative_to(table.root) for path in table.sources}
        return {str(path.relative_to(table.root)) if below[path] else path.name: path for path in table.sources}

    def table(self, config, *splits):
        """The table that `config` describes, for these splits."""
        d, keys = config.DATA, dict(self.options)
        for name in ("approximate_labels", "no_finding_clears", "views", "split_seed", "image_format", "allow_missing"):
            keys[name] = f"DATA.{name.upper()}"
        options = {keyword: d[key.removeprefix("DATA.")] for keyword, key in keys.items()}
        table = self.load_table(
            d.DATA_PATH, label_names=tuple(d.LABELS) or None, foreign_labels=bool(d.PSEUDO_LABELS),
            in_zip=d.ZIP_MODE, testing="test" in splits, **options,
        )  # fmt: skip
        completed = "DATA.SPLIT_SEED" in self.uses and d.SPLIT_SEED is None
        if completed and "train" in splits and not (table.split == SPLITS.index("train")).any():
            raise UserError(
                f"DATA.DATASET {self.name} has no splits of its own, all of it is the test split; to train on it set "
                "DATA.SPLIT_SEED (0, say), which splits it by patient"
            )
        return table

    def build(self, config, *splits):
        """The datasets of `splits` that `config` describes, over one table."""
        return build_radiographs(config, self.table(config, *splits), splits, self.uses_of(config))

    def uses_of(self, _config):
        """The config keys that it uses beside those of all X-rays."""
        approximates = any(not source.exact for source in self.mapping.values())
        uses = {"DATA.IMAGE_FORMAT", *self.uses, *self.options.values()}
        return frozenset(uses | ({"DATA.APPROXIMATE_LABELS"} if approximates else set()))
