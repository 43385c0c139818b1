"""A synthetic MIMIC-CXR tree, so that everything runs without credentialed data.

The images are cartoons of chest X-rays. Each of the 14 labels has a visible sign of its own kind (`SIGNS`), so a
model has something to learn. Nothing learnt here applies to patients.

    python -m dataset.synthetic --out FOLDER                  # JPG tree with the official CSVs
    python -m dataset.synthetic --out FOLDER --format dicom   # the same images as DICOM
    python -m dataset.synthetic --out FOLDER --layout nih     # the same images in the layout of another release
    python -m dataset.synthetic --out FOLDER --one-view       # each sign of a study in one of its views alone
    python -m dataset.synthetic --sheet signs.png             # one example of every sign

`plan` samples the tables (patients, studies, labels, views), `write_tree` writes images and files. `drawing.py` draws
an image; `layouts.py` and `files.py` have the forms of the releases.
"""

import argparse
import functools
import gzip
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dataset.labels import LABELS
from dataset.synthetic.drawing import draw, frame, random_anatomy, render
from dataset.synthetic.files import SAVERS
from dataset.synthetic.layouts import LAYOUTS

VERSION = 1  # raise it whenever the same parameters would give other files: old trees are then rewritten
MARKER, KIND, FIRST = "synthetic.json", "synthetic MIMIC-CXR", "mimic"
OTHER_IDS = "as_mimic.csv"  # in the other layouts: image (its path), dicom_id (that of the same image in the first)
SPLITS = {"train": 0.70, "validate": 0.12, "test": 0.18}

# Chance of each sign in a study with findings (Support Devices: in any study).
PREVALENCE = {
    "Atelectasis": 0.24, "Cardiomegaly": 0.27, "Consolidation": 0.19, "Edema": 0.22, "Enlarged Cardiomediastinum": 0.19,
    "Fracture": 0.20, "Lung Lesion": 0.20, "Lung Opacity": 0.26, "Pleural Effusion": 0.28, "Pleural Other": 0.19,
    "Pneumonia": 0.21, "Pneumothorax": 0.19, "Support Devices": 0.28,
}  # fmt: skip
HEALTHY = 0.23  # share of studies without any pathology; a few more come about by chance
UNCERTAIN = 0.025  # chance of -1 for each label of a study with findings
FAINT, CLEAR = 0.25, (0.55, 1.0)  # strength of a sign behind half of the -1, and behind a 1


def plan(*, patients=320, studies=(1, 4), images=(1, 3), seed=42):
    """The tables without any drawing: (image table, study table), one row an image and one a study.

    Studies: subject_id, study_id, split, date, time, study_seed, signs ({label: strength}, the truth of the image) and
    the 14 labels as they are written (1, 0, -1, NaN). Images: dicom_id, subject_id, study_id, split, view, image_seed.
    studies and images: smallest and largest number a patient and a study.
    """
    _check(patients=patients, seed=seed, studies=studies, images=images)
    # One stream each for ids, views, labels and splits, so that none depends on another.
    ids, views, truth, shuffle = (np.random.default_rng([seed, i]) for i in range(4))
    counts = ids.integers(studies[0], studies[1] + 1, patients)
    subject_ids = 10_000_000 + ids.choice(10_000_000, patients, replace=False)
    study_ids = 50_000_000 + ids.choice(10_000_000, counts.sum(), replace=False)
    study_rows, image_rows = [], []
    for subject, study in zip(np.repeat(subject_ids, counts).tolist(), study_ids.tolist()):
        signs, written = _draw_labels(truth)
        year, month, day, hour, minute, second = ids.integers([2110, 1, 1, 0, 0, 0], [2200, 13, 29, 24, 60, 60])
        date, clock = int(f"{year}{month:02}{day:02}"), int(f"{hour}{minute:02}{second:02}")
        own = {"subject_id": subject, "study_id": study}
        study_seed = int(ids.integers(2**31))
        study_rows.append({**own, "date": date, "time": clock, "study_seed": study_seed, "signs": signs, **written})
        # A frontal view first, then mostly lateral ones; AP images are of patients in bed.
        frontal, lateral = ("PA", 0.85) if views.random() < 0.6 else ("AP", 0.40)
        for i in range(views.integers(images[0], images[1] + 1)):
            dicom_id = ids.bytes(20).hex("-", 4)
            view = "LATERAL" if i and views.random() < lateral else frontal
            image_rows.append({"dicom_id": dicom_id, **own, "view": view, "image_seed": int(ids.integers(2**31))})
    study_table = pd.DataFrame(study_rows).sort_values(["subject_id", "study_id"], ignore_index=True)
    image_table = pd.DataFrame(image_rows).sort_values(["subject_id", "study_id", "dicom_id"], ignore_index=True)
    split = _split(study_table, shuffle)
    study_table.insert(2, "split", study_table["subject_id"].map(split))
    image_table.insert(3, "split", image_table["subject_id"].map(split))
    return image_table, study_table


def _draw_labels(rng):
    """One study: what the images show ({label: strength}) and what the tables have ({label: 1, 0, -1 or NaN})."""
    sick, signs, written = rng.random() >= HEALTHY, {}, dict.fromkeys(LABELS, np.nan)
    for label, prevalence in PREVALENCE.items():
        chance, strength, doubt, faint, stated = rng.random(5)  # always five, so that labels stay independent
        possible = sick or label == "Support Devices"
        if possible and chance < prevalence:
            signs[label], written[label] = CLEAR[0] + (CLEAR[1] - CLEAR[0]) * strength, 1.0
        elif possible and doubt < UNCERTAIN:
            written[label] = -1.0
            if faint < 0.5:
                signs[label] = FAINT
        elif stated < 1 / 3:
            written[label] = 0.0
    if not set(signs) - {"Support Devices"}:  # nothing to find: then nothing is in doubt, as in the real tables
        for label in PREVALENCE:
            if written[label] == -1 and label != "Support Devices":
                written[label] = np.nan
        written["No Finding"] = 1.0
    return signs, written


def _split(studies, rng):
    """{subject_id: split}. Patients are shuffled until each split has each label both ways (1 and 0, of No Finding only
    1); trees too small for that keep the shuffle that comes closest."""
    subjects, patient = np.unique(studies["subject_id"], return_inverse=True)
    values = studies[list(LABELS)].to_numpy()
    wanted = np.hstack([values == 1, values == 0])  # [studies, 28]
    held = [max(1, round(SPLITS[name] * len(subjects))) for name in ("validate", "test")]
    codes, best, best_score = np.repeat(range(3), [len(subjects) - sum(held), *held]), None, -1
    for _ in range(100):
        split = rng.permutation(codes)
        score = sum(int(wanted[split[patient] == code].any(0).sum()) for code in range(3))
        if score > best_score:
            best, best_score = split, score
        if score == 3 * (2 * len(LABELS) - 1):
            break
    return {int(subject): list(SPLITS)[code] for subject, code in zip(subjects, best)}


def image_rows(images, studies, *, seed, size):
    """The plan as one table, a row an image, for `dataset.synthetic.layouts`: the columns of both tables, Rows,
    Columns, sex and age of the patient, and the numbers `patient`, `study` of the patient, `number` in the study."""
    rows = images.merge(studies.drop(columns=["subject_id", "split"]), on="study_id", how="left")
    rows["patient"] = pd.factorize(rows["subject_id"])[0] + 1
    rows["study"] = rows.groupby("subject_id")["study_id"].transform(lambda ids: pd.factorize(ids)[0] + 1)
    rows["number"] = rows.groupby("study_id").cumcount() + 1
    people, count = np.random.default_rng([seed, 4]), rows["patient"].max()
    ages = people.permutation(np.linspace(18, 95, count).round().astype(int))  # always a patient of 85 or more
    rows["age"], rows["sex"] = ages[rows["patient"] - 1], people.choice(["F", "M"], count)[rows["patient"] - 1]
    rows["Rows"], rows["Columns"] = zip(*(frame(np.random.default_rng(k), size) for k in rows["image_seed"]))
    return rows


def _signs_of_one_view(rows):
    """The signs of each image: of those of its study the ones whose view it is."""
    views = rows.groupby("study_id")["view"].agg(lambda found: sorted(set(found)))
    return [
        {
            label: strength
            for label, strength in row.signs.items()
            if np.random.default_rng([row.study_seed, 100 + LABELS.index(label)]).choice(views[row.study_id])
            == row.view
        }
        for row in rows.itertuples()
    ]


# ---------------------------------------------------------------------------------------------------------- files
def write_tree(
    root, *, patients=320, size=320, layout=FIRST, image_format="", seed=42, progress=True,
    studies=(1, 4), images=(1, 3), one_view=False,
):  # fmt: skip
    """Writes images, the tables of a layout and the marker, and returns the summary:
    {"images", "studies", "patients": counts by split, "positives": {label: studies by split}, "reused": bool}.

    layout: a key of `dataset.synthetic.layouts.LAYOUTS`; in all but MIMIC-CXR's own, `as_mimic.csv` has the dicom_id
    of each image. image_format: of the layout's; empty: its first. one_view: each sign of a study is in one of its
    views alone, a random one; its label is that of the study all the same.

    The same parameters give the same bytes. A complete tree of the same parameters is reused, another synthetic tree is
    replaced, and a folder with other data is refused (ValueError).
    """
    _check(size=size, layout=layout, image_format=image_format)  # the rest is checked by `plan`
    root, chosen = Path(root), LAYOUTS[layout]
    parameters = {
        "kind": KIND, "version": VERSION, "patients": patients, "size": size,
        "format": image_format or chosen.formats[0], "seed": seed, "studies": list(studies), "images": list(images),
        **({} if layout == FIRST else {"layout": layout}),  # the trees of the first are older than layouts are
        **({"one_view": True} if one_view else {}),
    }  # fmt: skip
    image_table, study_table = plan(patients=patients, studies=studies, images=images, seed=seed)
    rows = image_rows(image_table, study_table, seed=seed, size=size)
    rows["signs"] = _signs_of_one_view(rows) if one_view else rows["signs"]
    rows, tables = chosen.write(rows, parameters["format"])
    found = _read_marker(root)
    if found and found["parameters"] == parameters and found.get("summary"):
        if all((root / file).is_file() for file in rows["file"]):
            return {**found["summary"], "reused": True}
    try:
        root.mkdir(parents=True, exist_ok=True)
        _write_marker(root, {"parameters": parameters})  # without a summary: a stopped run is known to be ours
    except OSError as error:
        raise ValueError(f"Folder {str(root)!r} cannot be written ({error.strerror}): name another one.") from error
    if found:
        _remove(root, LAYOUTS[found["parameters"].get("layout", FIRST)].entries)
    _write_images(root, rows, size, seed, progress)
    if layout != FIRST:
        tables[OTHER_IDS] = rows[["file", "dicom_id"]].rename(columns={"file": "image"})
    for name, table in tables.items():
        write_table(root / name, table)

    def by_split(rows):
        return {split: int((rows["split"] == split).sum()) for split in SPLITS}

    summary = {
        "images": by_split(rows),
        "studies": by_split(study_table),
        "patients": by_split(study_table.drop_duplicates("subject_id")),
        "positives": {label: by_split(study_table[study_table[label] == 1]) for label in LABELS},
    }
    _write_marker(root, {"parameters": parameters, "summary": summary})
    return {**summary, "reused": False}


def write_table(path, table):
    """A table, or text, of a layout."""
    text = table if isinstance(table, str) else table.to_csv(index=False, lineterminator="\n")
    path.parent.mkdir(exist_ok=True)
    # Without the time, which makes equal files differ.
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


def _remove(root, entries):
    """What a former run of ours left, by the patterns of its layout."""
    for path in [path for pattern in (*entries, OTHER_IDS) for path in root.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check(patients=320, size=320, layout=FIRST, image_format="", seed=42, studies=(1, 4), images=(1, 3)):
    """One clear line for a value that cannot work."""
    if not 10 <= patients <= 100_000:
        raise ValueError(f"patients={patients}: choose 10 to 100000, so that three splits can be filled.")
    if not 64 <= size <= 4096:
        raise ValueError(f"size={size}: choose 64 to 4096 pixels; signs vanish below, and nothing is gained above.")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown: choose one of {', '.join(LAYOUTS)}.")
    formats = LAYOUTS[layout].formats
    if image_format and image_format not in formats:
        raise ValueError(f"image format {image_format!r} is not in layout {layout}: choose {' or '.join(formats)}.")
    if seed < 0:
        raise ValueError(f"seed={seed}: choose 0 or more.")
    for name, (low, high) in {"studies": studies, "images": images}.items():
        if not 1 <= low <= high <= 100:
            raise ValueError(f"{name}=({low}, {high}): choose (smallest, largest) within 1 to 100.")


def _read_marker(root):
    """The marker of a synthetic tree, or None for a folder that is free; ValueError for other data."""
    try:
        marker = json.loads((root / MARKER).read_text())
        if marker["parameters"]["kind"] == KIND and marker["parameters"].get("layout", FIRST) in LAYOUTS:
            return marker
    except FileNotFoundError:
        if not root.exists() or {path.name for path in root.iterdir()} <= {MARKER + ".part"}:
            return None
    except NotADirectoryError:
        raise ValueError(f"{str(root)!r} is not a folder: name another one.") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"Folder {str(root)!r} holds data that this program did not write (no valid {MARKER}); it is left "
        "alone: name an empty or new folder."
    )


def _write_marker(root, content):
    (root / (MARKER + ".part")).write_text(json.dumps(content, indent=1))
    os.replace(root / (MARKER + ".part"), root / MARKER)  # complete or absent


def _write_image(row, *, root, size, seed):
    """Draws and writes the image of a row."""
    anatomy = random_anatomy(np.random.default_rng([seed, row.subject_id]))
    picture = render(row.signs, row.view, anatomy, row.study_seed, row.image_seed, size)
    path = root / row.file
    path.parent.mkdir(parents=True, exist_ok=True)
    SAVERS[row.form](path, picture, row)


def _write_images(root, rows, size, seed, progress):
    """Draws and writes all images, on all processors."""
    write = functools.partial(_write_image, root=root, size=size, seed=seed)
    images = [SimpleNamespace(**row) for row in rows.to_dict("records")]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        written = pool.imap(write, images, chunksize=4)
        for _ in tqdm(written, "synthetic images", len(images), disable=not progress, mininterval=1, unit="image"):
            pass


# --------------------------------------------------------------------------------------------------- command line
def write_sheet(path, seed=42, cell=190):
    """A contact sheet (PNG): for each label a frontal and a lateral view with that sign alone."""
    columns, text = 7, 18
    sheet = Image.new("L", (columns * cell, 2 * (2 * cell + text)), 255)
    for i, label in enumerate(LABELS):
        left, top = i % columns * cell, i // columns * (2 * cell + text)
        for row, view in enumerate(("PA", "LATERAL")):
            picture = draw({label}, view, np.random.default_rng([seed, i]))
            tile = Image.fromarray((picture * 255).astype(np.uint8))
            tile.thumbnail((cell - 4, cell - 4))
            sheet.paste(tile, (left + (cell - tile.width) // 2, top + row * cell + (cell - tile.height) // 2))
        ImageDraw.Draw(sheet).text((left + 4, top + 2 * cell + 2), label, fill=0, font=ImageFont.load_default())
    sheet.save(path, "PNG")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m dataset.synthetic", description=__doc__.split("\n")[0])
    parser.add_argument("--out", metavar="FOLDER", help="folder for the tree")
    parser.add_argument("--patients", type=int, default=320, help="10 or more (default 320: about 1600 images)")
    parser.add_argument("--size", type=int, default=320, help="longer side of the images in pixels (default 320)")
    parser.add_argument("--layout", default=FIRST, help=f"whose files: {', '.join(LAYOUTS)} (default {FIRST})")
    formats = " or ".join(LAYOUTS[FIRST].formats)
    parser.add_argument("--format", dest="image_format", default="", help=f"of layout {FIRST}: {formats}")
    parser.add_argument("--one-view", action="store_true", help="each sign of a study in one of its views alone")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--sheet", metavar="FILE.png", help="contact sheet with one example of every sign")
    args = parser.parse_args(argv)
    if not args.out and not args.sheet:
        parser.error("nothing to do: name a folder with --out, or an image with --sheet.")
    try:
        if args.out:
            options = {key: value for key, value in vars(args).items() if key not in ("out", "sheet")}
            summary = write_tree(args.out, **options)
            _print_summary(summary, args.out, LAYOUTS[args.layout].dataset)
        if args.sheet:
            write_sheet(args.sheet, max(0, args.seed))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename!r} cannot be written ({error.strerror}): name another folder.")


def _print_summary(summary, root, dataset):
    rows = {name: summary[name] for name in ("patients", "studies", "images")}
    rows |= {f"studies with {label}": counts for label, counts in summary["positives"].items()}
    print(f"\n{pd.DataFrame(rows).T.to_string()}\n\n{'Found complete' if summary['reused'] else 'Written'}: {root}")
    other = "" if dataset == LAYOUTS[FIRST].dataset else f" --dataset {dataset}"
    print(f"Next: python main.py --cfg configs/internimage_tiny_synthetic.yaml{other} --data-path {root}")
