"""What is wrong with a tree of X-rays: every image read, every row compared. Runs without torch.

Where training stops at the first fault, this counts them all.
"""

import hashlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from PIL import Image

from common.folders import output_folder, walk
from dataset import mimic_cxr, tables
from dataset.files.images import ENDINGS, SUFFIXES, ImageError, decode, orientation, sniff, take_warnings, warning_kind
from dataset.files.stores import FileStore
from dataset.labels import BLANK, LABELS
from dataset.tools.processes import in_processes
from dataset.tools.readers import find_reader

# Everything that can be found. A row of the table: problem, path, detail.
PROBLEMS = yaml.safe_load(Path(__file__).with_name("problems.yaml").read_text(encoding="utf-8"))


def _look(task):
    """One image: ([(problem, detail)], hash of its pixels or None, (height, width) or None)."""
    root, path, checksum = task
    found = []
    try:
        data = FileStore(root).read(path)
        if checksum and hashlib.sha256(data).hexdigest() != checksum:
            found.append(("wrong checksum", f"expected {checksum}"))
        suffix, content = Path(path).suffix.lower(), sniff(data)
        if content and suffix and suffix not in ENDINGS[content]:  # read nevertheless: the content decides
            found.append(("wrong suffix", f"the content is {ENDINGS[content][0]}"))
        grey = decode(data, str(root / path))
        found += [("odd header", text) for _, text, _ in take_warnings()]
        if content != "dcm":
            with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as picture:
                warnings.simplefilter("ignore")  # said above
                if orientation(picture) > 1:
                    found.append(("turned", f"EXIF orientation {orientation(picture)}"))
                if picture.mode in ("RGB", "RGBA", "CMYK", "P", "YCbCr"):
                    found.append(("colour", picture.mode))
                if getattr(picture, "n_frames", 1) > 1:
                    found.append(("several frames", str(picture.n_frames)))
    except ImageError as error:
        return [*found, ("unreadable", str(error))], None, None
    height, width = grey.shape
    if min(height, width) < 32 or max(height, width) > 4 * min(height, width):
        found.append(("odd size", f"{height} x {width}"))
    if grey.min() == grey.max():
        found.append(("constant", f"grey level {grey.min()}"))
    return found, hashlib.sha256(grey.tobytes() + repr(grey.shape).encode()).digest(), (height, width)


def _checksums(base):
    sums = {}
    for name in ("SHA256SUMS.txt", "SHA256SUMS"):
        if (base / name).is_file():
            for line in (base / name).read_text().splitlines():
                digest, _, path = line.partition(" ")
                sums[path.strip().lstrip("*")] = digest.lower()
    return sums


def _whole_ids(frame, columns, source, add):
    """The rows whose ids are whole numbers, with these as integers."""
    read = {column: tables.integers(frame, column) for column in columns}
    bad = np.any([bad for _, bad in read.values()], axis=0)
    add("bad id", source.name, (f"data row {row + 1}" for row in np.flatnonzero(bad)))
    return frame.assign(**{column: values for column, (values, _) in read.items()})[~bad]


def _check_images(images, name, source, add):
    """What is wrong in a table with one row an image; the rows that name another image each. name: its column."""
    images = images.assign(**{name: images[name].str.strip(), "split": tables.split_names(images)})
    blank = images[name] == ""
    add("bad id", source.name, (f"data row {row + 1}: no {name}" for row in np.flatnonzero(blank)))
    images = images[~blank]
    add("duplicate row", source.name, (f"{name} {value}" for value in images[name][images[name].duplicated()]))
    images = images.drop_duplicates(name)
    bad = images["split"][~images["split"].isin(tables.SPLITS)].value_counts()
    add("bad split", source.name, (f"{value!r} in {count} rows" for value, count in bad.items()))
    if "subject_id" in images:
        splits = images.groupby("subject_id")["split"].unique()
        several = splits[splits.map(len) > 1].items()
        add("two splits", source.name, (f"subject_id {subject} in {', '.join(there)}" for subject, there in several))
    return images


def _check_labels(frame, source, add):
    for name in (name for name in LABELS if name in frame):
        counts = frame[name].value_counts()
        bad = counts[[tables.read_label(text) is None for text in counts.index]]
        add("bad label", source.name, (f"{name}: {value!r} in {count} rows" for value, count in bad.items()))


def _check_studies(images, source, add):
    """What is wrong in the official label table, with one row a study."""
    studies = _whole_ids(tables.read_csv(source, ("study_id",)), ["study_id"], source, add)
    _check_labels(studies, source, add)
    blank = studies[[name for name in LABELS if name in studies]].isin(BLANK).all(axis=1)
    for problem, found in (
        ("duplicate row", studies["study_id"][studies["study_id"].duplicated()]),
        ("no label", studies["study_id"][blank]),
        ("no label row", np.setdiff1d(images["study_id"], studies["study_id"])),
        ("no image", np.setdiff1d(studies["study_id"], images["study_id"])),
    ):
        add(problem, source.name, (f"study_id {study}" for study in found))


def _official_images(folder, add):
    """(the images of the split file, with `key`: their paths without suffix; the metadata by dicom_id, or None)."""
    source = mimic_cxr.needed_csv(folder, "split")
    images = tables.read_csv(source, ("dicom_id", "study_id", "subject_id", "split"))
    images = _check_images(_whole_ids(images, ["study_id", "subject_id"], source, add), "dicom_id", source, add)
    labels = mimic_cxr.find_csv(folder, "chexpert") or mimic_cxr.find_csv(folder, "negbio")
    if labels is not None:
        _check_studies(images, labels, add)
    outside = images["dicom_id"].str.contains(r"[/\\]|^\.\.?$")
    add("outside", source.name, "dicom_id " + images["dicom_id"][outside])
    images = images[~outside].assign(key=mimic_cxr.image_stems(images))
    metadata = mimic_cxr.find_csv(folder, "metadata")
    read = metadata and tables.read_csv(metadata, ("dicom_id",)).drop_duplicates("dicom_id").set_index("dicom_id")
    return images, read


def _own_images(source, add):
    """The images of a table of the user's own, with `key`: their paths."""
    images = tables.read_csv(source, ("path", "split"))
    _check_labels(images, source, add)
    for column in ("subject_id", "study_id"):
        if column in images:
            images[column] = images[column].str.strip()
            blank = np.flatnonzero(images[column] == "")
            add("bad id", source.name, (f"data row {row + 1}: no {column}" for row in blank))
    images = _check_images(images, "path", source, add)
    outside = images["path"].map(lambda path: ".." in path.split("/"))
    add("outside", source.name, "path " + images["path"][outside])
    return images[~outside].assign(key=images["path"].map(os.path.normpath))


def _release_images(reader, root, which, add):
    """(root, the images of a release's own tables, with `key`: their paths)."""
    table = reader.whole_table(root, checked=False, **which)
    paths, subjects = ([text.decode() for text in column.tolist()] for column in (table.path, table.subject))
    images = pd.DataFrame({"path": paths, "split": [tables.SPLITS[k] for k in table.split], "subject_id": subjects})
    images = images if any(subjects) else images.drop(columns="subject_id")
    return table.root, _check_images(images, "path", table.sources[0], add).assign(key=lambda frame: frame["path"])


def _find_images(base, known, official):
    """{key: paths} of the image files of a tree, and of those elsewhere that a table names by absolute paths."""
    there = {}
    top = base / "files" if official and (base / "files").is_dir() else base
    files = (os.path.join(where, name) for where, _, names in walk(top) for name in names)
    for path in filter(os.path.isfile, files):
        relative, suffix = os.path.relpath(path, base), os.path.splitext(path)[1]
        # A file without the suffix of an image is one if the table names it.
        key = relative.removesuffix(suffix) if official and suffix in SUFFIXES else relative
        if (suffix and suffix in SUFFIXES) or key in known:
            there.setdefault(key, []).append(relative)
    for key in known:
        if key not in there and os.path.isfile(base / key):
            there[key] = [key]
    return there


def audit(root, output, *, dataset="mimic_cxr", csv="", workers=None, log=print, **which):
    """Reads every image under `root` and compares them with its tables; writes audit.csv and audit.txt into `output`.

    The keywords are the options of prepare_mimic.py; which: see `cache.make_copy`. Returns the table of problems:
    problem, path (of the image or the CSV file), detail. UserError: no table of images, or one without its columns; of
    releases but MIMIC-CXR any fault in the tables themselves.
    """
    problems, output = [], output_folder(output, "--output")

    def add(problem, path, details):
        problems.extend((problem, path, detail) for detail in details)

    reader, metadata = find_reader(dataset), None
    own = reader.find_own_csv(root, csv)
    official = reader is mimic_cxr.RELEASE and own is None
    if reader is not mimic_cxr.RELEASE:
        base, images = _release_images(reader, root, which, add)
    else:
        folder = mimic_cxr.find_folder(root)
        base = folder.root
        images, metadata = (_own_images(own, add), None) if own else _official_images(folder, add)
    known = set(images["key"])
    there = _find_images(base, known, official)
    problems += [("missing", key, "") for key in images["key"][~images["key"].isin(there.keys())]]
    problems += [("extra", path, "") for key, found in sorted(there.items()) if key not in known for path in found]
    paths = [path for _, found in sorted(there.items()) for path in found]
    sums, first, sizes = _checksums(base), {}, {}
    tasks = [(base, path, sums.get(path)) for path in paths]
    for path, (found, pixels, size) in zip(paths, in_processes(_look, tasks, workers)):
        problems += [(problem, path, detail) for problem, detail in found]
        if pixels is not None and first.setdefault(pixels, path) != path:
            add("duplicate pixels", path, [first[pixels]])
        sizes[path] = size
    if metadata is not None and {"Rows", "Columns"} <= set(metadata.columns):
        expected = metadata[["Rows", "Columns"]].apply(pd.to_numeric, errors="coerce")
        for path, size in sizes.items():
            name = Path(path).stem
            if size and name in expected.index and tuple(expected.loc[name]) != size:
                add("other size than metadata", path, [f"{size[0]} x {size[1]}, metadata {tuple(expected.loc[name])}"])
    return _write(problems, output, images, metadata, len(paths), log)


def _write(problems, output, images, metadata, count, log):
    table = pd.DataFrame(problems, columns=["problem", "path", "detail"])
    lines = [f"{len(images):,} rows, {count:,} image files"]
    lines += [f"{name:>10}  {n:,} images" for name, n in images["split"].value_counts().items()]
    if metadata is not None and "ViewPosition" in metadata:
        views = metadata["ViewPosition"].str.strip().where(lambda view: ~view.str.lower().isin(BLANK), "unknown")
        views = views.value_counts()
        lines.append("views: " + ", ".join(f"{view} {n:,}" for view, n in views.items()))
    for problem, meaning in PROBLEMS.items():
        these = table[table["problem"] == problem]
        kinds = these["detail"].map(warning_kind) if problem == "odd header" else these["problem"]
        for _, alike in these.groupby(kinds, sort=False):
            example = alike.iloc[0]
            lines.append(
                f"{len(alike):>8,}  {problem}: {meaning}; first: {example['path']} {example['detail']}".rstrip()
            )
    lines.append("nothing is wrong" if table.empty else f"all of them in {output / 'audit.csv'}")
    table.to_csv(output / "audit.csv", index=False)
    (output / "audit.txt").write_text("\n".join(lines) + "\n")
    log("\n".join(lines))
    return table
