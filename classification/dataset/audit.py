"""What is wrong with a MIMIC-CXR tree: every image read, every row compared. Runs without torch.

Where training stops at the first fault, this counts them all.
"""

import hashlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from dataset import mimic_cxr, tables
from dataset.images import ENDINGS, SUFFIXES, ImageError, decode, orientation, sniff, take_warnings, warning_kind
from dataset.labels import LABELS
from dataset.processes import in_processes
from dataset.stores import FileStore

# Everything that can be found, in the order of the summary. A row of the table: problem, path, detail.
PROBLEMS = {
    "missing": "images of the split file that are not there",
    "extra": "images that no row of the split file names",
    "unreadable": "images that cannot be read",
    "wrong suffix": "images of another format than their name says",
    "colour": "colour images (training takes their luminance)",
    "turned": "pictures that an EXIF orientation turns (training takes them upright)",
    "odd header": "images that are read although something in them is odd",
    "several frames": "pictures of several frames (training takes the first)",
    "odd size": "images under 32 pixels, or with sides more than 4 : 1",
    "other size than metadata": "full-size images whose rows and columns differ from the metadata file",
    "constant": "images of one grey level",
    "duplicate pixels": "images equal to an earlier one",
    "wrong checksum": "images that differ from SHA256SUMS",
    "duplicate row": "rows that repeat an image or a study",
    "bad id": "rows whose ids are not whole numbers or are missing",
    "bad label": "label values other than 1, 0, -1 and nothing",
    "bad split": "splits other than train, validate and test",
    "no label row": "studies with images and without a label row",
    "no label": "studies whose label row is blank",
    "no image": "studies with labels and without an image",
    "two splits": "patients in two splits",
    "outside": "paths that lead out of the data folder",
}


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


def _ids(frame, columns):
    """Rows whose ids are whole numbers, as integers, and the positions of the others."""
    values = frame[columns].apply(pd.to_numeric, errors="coerce")
    good = (values.notna() & (values % 1 == 0)).all(axis=1)
    kept = frame[good].copy()
    kept[columns] = values[good].astype(np.int64)
    return kept, np.flatnonzero(~good)


def _checksums(base):
    sums = {}
    for name in ("SHA256SUMS.txt", "SHA256SUMS"):
        if (base / name).is_file():
            for line in (base / name).read_text().splitlines():
                digest, _, path = line.partition(" ")
                sums[path.strip().lstrip("*")] = digest.lower()
    return sums


def _tables(base, folders, add):
    """(images: dicom_id, study_id, subject_id, split, stem; metadata or None), once what is wrong is added."""
    path = mimic_cxr.find_csv(folders, "split")
    if path is None:
        mimic_cxr.load_table(base)  # says what was looked for
    labels_path = mimic_cxr.find_csv(folders, "chexpert") or mimic_cxr.find_csv(folders, "negbio")
    images, bad = _ids(
        tables.read_csv(path, ("dicom_id", "study_id", "subject_id", "split")), ["study_id", "subject_id"]
    )
    for row in bad:
        add("bad id", path.name, f"data row {row + 1}")
    blank = images["dicom_id"].isna()
    for row in np.flatnonzero(blank):
        add("bad id", path.name, f"data row {row + 1}: no dicom_id")
    images = images[~blank]
    for name in images["dicom_id"][images["dicom_id"].duplicated()]:
        add("duplicate row", path.name, f"dicom_id {name}")
    images = images.drop_duplicates("dicom_id")
    names = tables.split_names(images)
    for value, count in names[~names.isin(tables.SPLITS)].value_counts().items():
        add("bad split", path.name, f"{value!r} in {count} rows")
    splits = images.assign(split=names).groupby("subject_id")["split"].unique()
    for subject, there in splits[splits.map(len) > 1].items():
        add("two splits", path.name, f"subject_id {subject} in {', '.join(there)}")

    if labels_path is not None:
        studies = tables.read_csv(labels_path, ("study_id",))
        studies, bad = _ids(studies, ["study_id"])
        for row in bad:
            add("bad id", labels_path.name, f"data row {row + 1}")
        for study in studies["study_id"][studies["study_id"].duplicated()]:
            add("duplicate row", labels_path.name, f"study_id {study}")
        label_columns = [c for c in LABELS if c in studies]
        for name in label_columns:
            values = pd.to_numeric(studies[name], errors="coerce")
            wrong = ~(values.isin([1, 0, -1]) | studies[name].isna())
            for value, count in studies[name][wrong].astype(str).value_counts().items():
                add("bad label", labels_path.name, f"{name}: {value!r} in {count} rows")
        for study in studies["study_id"][studies[label_columns].isna().all(axis=1)]:
            add("no label", labels_path.name, f"study_id {study}")
        for study in np.setdiff1d(images["study_id"], studies["study_id"]):
            add("no label row", labels_path.name, f"study_id {study}")
        for study in np.setdiff1d(studies["study_id"], images["study_id"]):
            add("no image", labels_path.name, f"study_id {study}")

    images["stem"] = mimic_cxr.image_stems(images)
    inside = ~images["dicom_id"].str.contains(r"[/\\]|^\.\.?$")
    for name in images["dicom_id"][~inside]:
        add("outside", path.name, f"dicom_id {name}")
    metadata = mimic_cxr.find_csv(folders, "metadata")
    frame = None if metadata is None else tables.read_csv(metadata, ("dicom_id",)).drop_duplicates("dicom_id")
    return images[inside], None if frame is None else frame.set_index("dicom_id")


def audit(root, output, *, workers=None, log=print):
    """Reads every image of the official layout under `root`; writes audit.csv and audit.txt into `output`.

    Returns:
        the table of problems: problem, path (of the image or the CSV file), detail.

    Raises:
        UserError: no split file, or one without its columns.
    """
    base, folders = mimic_cxr.find_folders(root)
    problems = []

    def add(problem, path, detail=""):
        problems.append((problem, path, detail))

    images, metadata = _tables(base, folders, add)
    there = {}  # stem -> paths
    for folder, _, names in os.walk(base / "files"):
        for name in names:
            path = Path(folder, name)
            if path.suffix in SUFFIXES:
                relative = path.relative_to(base).as_posix()
                there.setdefault(relative.removesuffix(path.suffix), []).append(relative)
    known = dict(zip(images["stem"], images["dicom_id"]))
    for stem in known:
        if stem not in there:
            add("missing", stem)
    paths = []
    for stem, found in sorted(there.items()):
        if stem not in known:
            for path in found:
                add("extra", path)
        paths += found

    sums, first, sizes = _checksums(base), {}, {}
    tasks = [(base, path, sums.get(path)) for path in paths]
    for path, (found, pixels, size) in zip(paths, in_processes(_look, tasks, workers)):
        for problem, detail in found:
            add(problem, path, detail)
        if pixels is not None and first.setdefault(pixels, path) != path:
            add("duplicate pixels", path, first[pixels])
        sizes[path] = size
    if metadata is not None and {"Rows", "Columns"} <= set(metadata.columns):
        expected = metadata[["Rows", "Columns"]].apply(pd.to_numeric, errors="coerce")
        for path, size in sizes.items():
            name = Path(path).stem
            if size and name in expected.index and tuple(expected.loc[name]) != size:
                add("other size than metadata", path, f"{size[0]} x {size[1]}, metadata {tuple(expected.loc[name])}")
    return _write(problems, Path(output), images, metadata, len(paths), log)


def _write(problems, output, images, metadata, count, log):
    table = pd.DataFrame(problems, columns=["problem", "path", "detail"])
    lines = [f"{len(images):,} rows, {count:,} image files"]
    lines += [f"{name:>10}  {n:,} images" for name, n in images["split"].value_counts().items()]
    if metadata is not None and "ViewPosition" in metadata:
        views = metadata["ViewPosition"].fillna("none").value_counts()
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
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / "audit.csv", index=False)
    (output / "audit.txt").write_text("\n".join(lines) + "\n")
    log("\n".join(lines))
    return table
