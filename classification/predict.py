"""Probabilities for images: a checkpoint and files, folders, patterns or a table in, a table out.

    python predict.py output/.../best_ckpt.pth image.dcm --output prediction.csv
    python predict.py best_ckpt.pth FOLDER 'more/**/*.png' table.csv --output predictions.csv
    python predict.py a.pth b.pth FOLDER --output predictions.csv --tta      # the mean of several models
    python predict.py best_ckpt.pth image.dcm --output prediction.csv --explain overlays --labels Edema

The checkpoint alone says model, labels, size and preprocessing. A row an image, written as it is made; the same command
goes on where it was stopped. An image that cannot be read is a row with its error, and exit status 1 at the end.
Read `predict` first.
"""

import argparse
import os
import re
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import dcnv3
from analysis import applied
from common.errors import UserError, did_you_mean, run_command
from common.folders import check_tmpdir
from config import Parser
from dataset.files.domain import domain_warning
from dataset.files.images import ImageError, decode, sniff
from dataset.preparing import placement
from dataset.tools.listing import IDS, identify, list_images
from dataset.views import VIEWS
from predicting import trained
from predicting.prediction_file import FORMATS, PredictionFile
from training.inference import autocast

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")
CPU_BATCH = 8  # a CPU is no faster with more, and rows come sooner
# Parts of the image that --tta averages over: left, top and side as parts of its own. No flip: the heart has a side.
TTA = ((0, 0, 1), (0.05, 0.05, 0.9), (0, 0, 0.95), (0.05, 0, 0.95), (0, 0.05, 0.95), (0.05, 0.05, 0.95))


def parse_args(argv):
    parser = Parser(
        prog="predict.py", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of main.py; a PATH that ends in .pth is one to average with it")
    add("paths", nargs="+", metavar="PATH", help="image, folder, pattern, or CSV with a column path")
    add("--output", required=True, metavar="FILE", help="the table to write; run.json beside it says how it was made")
    add("--format", choices=list(FORMATS), default="csv", help="of the table")
    add("--ema", action="store_true", help="the averaged weights that the checkpoint holds")
    add("--tta", action="store_true", help=f"mean over {len(TTA)} shifts and scales, {len(TTA)} times the work")
    add("--calibrated", metavar="EVALUATION", help="apply calibration.json of this evaluation, which report.py wrote")
    add("--thresholds", metavar="EVALUATION", help="add <label>_positive, 1 or 0, by the thresholds of its report.json")
    add("--rule", help="which of the report's thresholds: youden (where none is said), f1, sensitivity, specificity")
    add("--dicom-recipe", choices=["window", "mimic_jpg"], help="how a DICOM becomes grey (that of the training)")
    add("--explain", metavar="DIR", help="a picture of each image and label: Grad-CAM, and where DCNv3 looks")
    add("--labels", nargs="+", metavar="LABEL", help="with --explain: these labels only")
    add("--device", help="cuda, cuda:1, cpu (a GPU where there is one)")
    add(
        "-b",
        "--batch-size",
        type=int,
        help=f"images per forward pass (that of the training; on a CPU at most {CPU_BATCH})",
    )
    add("-j", "--workers", type=int, help="loading processes (on a GPU up to 8, else 1)")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------- arguments
def _device(name):
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type in ("cpu", "cuda"):
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: the models run on cpu and cuda")
    return device


def batch_size(config, device, asked):
    """Images per forward pass: as asked, or that of the training; on a CPU few, or it would wait for a whole batch."""
    if asked is not None:
        return asked
    return min(CPU_BATCH, config.DATA.BATCH_SIZE) if device.type == "cpu" else config.DATA.BATCH_SIZE


def _models(args, device):
    """The checkpoints, and the paths that are left."""
    paths = [path for path in args.paths if not path.endswith(CHECKPOINT_SUFFIXES)]
    checkpoints = [args.checkpoint, *(path for path in args.paths if path.endswith(CHECKPOINT_SUFFIXES))]
    if not paths:
        raise UserError("no image is named: give files, folders, patterns or a CSV behind the checkpoint")
    models = [trained.load(path, ema=args.ema, device=device, dicom_recipe=args.dicom_recipe) for path in checkpoints]
    for other in models[1:]:
        if other.label_names != models[0].label_names:
            one, two = set(models[0].label_names), set(other.label_names)
            differ = ", ".join(sorted(one ^ two)) or "another order"
            raise UserError(f"{other.path} has other labels than {models[0].path}: {differ}; predict with each alone")
    return models, paths


def _explained(args, models, paths):
    """Indices of the labels to explain."""
    if not args.explain:
        if args.labels:
            raise UserError("--labels says which labels to explain: give --explain DIR as well")
        return []
    if len(models) > 1:
        raise UserError("--explain takes one checkpoint: the maps of several models have no common scale")
    from predicting import explain  # matplotlib takes longer to import than sixty images to predict

    explain.check(models[0].model, models[0].config.DATA.IMG_SIZE, models[0].path)
    names = models[0].label_names
    for name in args.labels or []:
        if name not in names:
            raise UserError(f"--labels: the model has no label {name!r}{did_you_mean(name, names)}")
    folder = Path(args.explain).resolve()
    for path in paths:
        if os.path.isdir(path) and folder.is_relative_to(Path(path).resolve()):
            raise UserError(
                f"--explain {args.explain} lies in {path}: its pictures would be predicted the next time; choose "
                "another folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--explain {args.explain} cannot be written ({error.strerror}); choose another") from error
    return [names.index(name) for name in args.labels or names]


# ----------------------------------------------------------------------------------------- images
class _Images(torch.utils.data.Dataset):
    """Items: ids and format of an image with its uint8 tensor [1, S, S] for each model, or with its error."""

    def __init__(self, images, readers):
        self.images, self.readers = images, readers

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        listed, item = self.images[index], {"error": "", "dicom": False, **dict.fromkeys(IDS, "")}
        try:
            data = listed.read()
            item |= identify(listed, data)
            item["dicom"] = sniff(data) == "dcm"
            item["images"] = [read(data, listed.path) for read in self.readers]
        except ImageError as error:
            item["error"] = " ".join(str(error).split())
        return item


def _loader(images, models, first, batch, workers):
    return DataLoader(
        _Images(images, [model.reader() for model in models]),
        batch_sampler=[range(k, min(k + batch, len(images))) for k in range(first, len(images), batch)],
        num_workers=workers,
        collate_fn=list,
    )


class _Notes:
    """What is to be said of the images as a whole: each thing once, with its count."""

    def __init__(self, model):
        self.model, self.counts = model, {}

    def look(self, item):
        config = self.model.config
        domain = f"dicom {config.DATA.DICOM_RECIPE}" if item["dicom"] else "pictures"
        if text := domain_warning(self.model.domain, domain):
            self._add(text.replace("DATA.DICOM_RECIPE", "--dicom-recipe"))
        views = VIEWS.get(config.DATA.VIEWS)
        if views and item["view"] and item["view"] not in views:
            self._add(
                f"the model was trained on DATA.VIEWS {config.DATA.VIEWS}, these images are of the view {item['view']}"
            )

    def _add(self, text):
        self.counts[text] = self.counts.get(text, 0) + 1

    def lines(self):
        return [f"note, {count} image(s): {text}" for text, count in self.counts.items()]


# ------------------------------------------------------------------------------------ probability
def tta_views(images):
    """float32 [N, 3, S, S] -> the parts of them in TTA, each [N, 3, S, S]."""
    size = images.shape[-1]
    for left, top, side in TTA:
        x, y, pixels = round(left * size), round(top * size), round(side * size)
        part = images[:, :, y : y + pixels, x : x + pixels]
        yield part if side == 1 else F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)


@torch.no_grad()
def probabilities(model, images, tta=False):
    """uint8 [N, 1, S, S] -> float64 [N, L], as evaluation has them; with tta their mean over the views."""
    device = next(model.model.parameters()).device
    images = model.normalize(images.to(device))
    found = []
    for view in tta_views(images) if tta else [images]:
        with autocast(model.config, device)[0]():
            logits = model.model(view)
        found.append(torch.sigmoid(logits.float().cpu().double()).numpy())
    result = np.mean(found, 0)
    if not np.isfinite(result).all():
        raise UserError(f"{model.path}: the model's outputs are not finite; its weights are broken")
    return result


def _draw(args, model, listed, number, tensor, row, labels):
    """The overlays of one image."""
    from predicting import explain

    recipe, window = model.config.DATA.DICOM_RECIPE, model.config.DATA.DICOM_WINDOW
    grey = decode(listed.read(), listed.path, recipe=recipe, window=window, shrink_to=1024)
    device = next(model.model.parameters()).device
    images = model.normalize(tensor[None].to(device))
    maps = explain.grad_cam(model.model, images, labels)[0].cpu().numpy()
    fine = explain.full_resolution(model.model, images, labels)[0].cpu().numpy()
    first = explain.first_places(model.model, images.shape[-1])[maps.shape[-1]]
    places = torch.tensor([explain.maximum(cam, first) for cam in maps])
    levels = explain.sampling_points(model.model, images.expand(len(labels), -1, -1, -1), places)
    for k, label in enumerate(labels):
        name = model.label_names[label]
        file = re.sub(r"[^\w.-]+", "_", f"{number:06d}_{Path(listed.path).stem[:100]}_{name}.png")
        try:
            explain.draw_overlay(
                Path(args.explain) / file, grey, placement(model.config, *grey.shape), fine[k], places[k].tolist(),
                [(p[k], w[k]) for p, w in levels], f"{name}: {row[name]:.3f}",
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"--explain: {error.filename or file} cannot be written ({error.strerror})") from error


# ------------------------------------------------------------------------------------------- main
def predict(args):
    """Predict, and write the table; returns (the images, those with an error)."""
    device = _device(args.device)
    models, paths = _models(args, device)
    names, first = models[0].label_names, models[0]
    labels = _explained(args, models, paths)
    batch = batch_size(first.config, device, args.batch_size)
    cpus = len(os.sched_getaffinity(0))
    workers = (1 if device.type == "cpu" else min(8, cpus)) if args.workers is None else args.workers
    if batch < 1 or workers < 0:
        raise UserError(f"-b is {batch} and -j is {workers}; they must be at least 1 and 0")
    check_tmpdir(workers, "-j 0")
    adjust, calibrated_for = applied.read_calibration(args.calibrated, names) if args.calibrated else (None, None)
    if args.rule and not args.thresholds:
        raise UserError("--rule says which thresholds to take: give --thresholds EVALUATION as well")
    rule = (args.rule or "youden") if args.thresholds else None
    cuts, cut_for = applied.read_thresholds(args.thresholds, rule, names) if args.thresholds else ({}, None)
    dicom = "dicom" in first.domain
    here = {
        "checkpoints_sha256": [model.digest for model in models],
        "ema": args.ema, "tta": args.tta,
        "dicom_recipe": args.dicom_recipe or (first.config.DATA.DICOM_RECIPE if dicom else None),
    }  # fmt: skip
    fitted_notes = [
        note
        for option, folder, fitted_for in (
            ("--calibrated", args.calibrated, calibrated_for),
            ("--thresholds", args.thresholds, cut_for),
        )
        if folder
        for note in applied.differences(option, folder, fitted_for, **here)
    ]
    for note in fitted_notes:
        print(f"note: {note}")
    images = list_images(paths)

    command = {
        "checkpoints": [model.digest for model in models],
        **{k: getattr(args, k) for k in ("paths", "format", "ema", "tta", "calibrated", "thresholds", "dicom_recipe")},
        "rule": rule,
        "explain": [args.explain, [names[k] for k in labels]] if args.explain else None,
    }
    about = {
        "checkpoint_paths": [str(model.path) for model in models],
        "device": str(device),
        "batch_size": batch,
        "notes": fitted_notes,
        "started": datetime.now().isoformat(timespec="seconds"),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "dcnv3": dcnv3.__version__},
    }
    columns = ["path", "error", *IDS, *names, *(f"{name}_positive" for name in names if args.thresholds)]
    if repeated := [name for k, name in enumerate(columns) if name in columns[:k]]:
        raise UserError(f"{first.path}: the label {repeated[0]!r} has the name of another column of the table")
    table = PredictionFile(
        args.output, columns, [image.path for image in images], command=command, about=about, batch=batch,
        form=args.format,
    )  # fmt: skip
    if table.done:
        print(f"{table.done:,} of {len(images):,} rows are there already")

    notes = _Notes(first)
    with tqdm(total=len(images), initial=table.done, unit="image", disable=not sys.stderr.isatty()) as bar:
        for items in _loader(images, models, table.done, batch, workers):
            good = [k for k, item in enumerate(items) if not item["error"]]
            found = np.full((len(items), len(names)), np.nan)
            if good:
                tensors = [torch.stack([items[k]["images"][m] for k in good]) for m in range(len(models))]
                found[good] = np.mean([probabilities(m, t, args.tta) for m, t in zip(models, tensors)], 0)
            rows = _rows(images, table.done, items, found, names, adjust, cuts)
            for k in good:
                notes.look(items[k])
                if labels:
                    number = table.done + k
                    _draw(args, first, images[number], number + 1, items[k]["images"][0], rows[k], labels)
            table.add(rows)
            bar.update(len(rows))
    table.finish(images=table.done, errors=table.errors, finished=datetime.now().isoformat(timespec="seconds"))
    for line in notes.lines():
        print(line)
    return table.done, table.errors


def _rows(images, first, items, found, names, adjust, cuts):
    """Rows of the table, of a batch that begins with image `first`; found: probabilities [N, L], NaN where none."""
    shown = adjust(found) if adjust else found
    rows = []
    for k, item in enumerate(items):
        row = {"path": images[first + k].path, "error": item["error"], **{name: item[name] for name in IDS}}
        for j, name in enumerate(names):
            row[name] = None if item["error"] else float(f"{shown[k, j]:.8g}")
            # Thresholds were chosen among probabilities as evaluation writes them, so before any calibration.
            known = not item["error"] and cuts.get(name) is not None
            row[f"{name}_positive"] = int(float(f"{found[k, j]:.8g}") >= cuts[name]) if known else None
        rows.append(row)
    return rows


def main(argv=None):
    args = parse_args(argv)
    try:
        count, errors = predict(args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(f"{count:,} images, {errors:,} of them could not be read: {args.output}")
    if errors:
        sys.exit(1)
    return 0


if __name__ == "__main__":
    run_command(main)
