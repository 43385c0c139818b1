"""Probabilities for images: a checkpoint and files, folders, patterns or a table in, a table out.

    python predict.py output/.../best_ckpt.pth image.dcm --output prediction.csv
    python predict.py best_ckpt.pth FOLDER 'more/**/*.png' table.csv --output predictions.csv
    python predict.py a.pth b.pth FOLDER --output predictions.csv --tta      # the mean of several models
    python predict.py best_ckpt.pth image.dcm --output prediction.csv --explain overlays --labels Edema
    python predict.py best_ckpt.pth FOLDER --output studies.csv --by study   # a row per study, all its images at once
    python predict.py best_ckpt.pth FOLDER --output predictions.csv --features    # and predictions.npy

The checkpoint alone says model, labels, size and preprocessing. Each image, or study, is a row, written as soon as it
is predicted; the same command resumes where it was stopped, and predicts images again that have changed. An image that
cannot be read is a row with its error, and exit status 1 at the end. DICOM without an image (reports, presentation
states, videos) is counted, not predicted. The table holds the ids of patient, study and image that a DICOM or its path
has, unless --no-ids is given.
Read `predict` first.
"""

import argparse
import contextlib
import os
import sys
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import dcnv3
from analysis import applied
from common.errors import UserError, did_you_mean, run_command
from common.folders import check_tmpdir
from common.studies import Studies, images_of, join, view_numbers, with_images
from config import Parser, units
from dataset.files.contents import NO_IMAGE, NOT_CHEST, find_content, read_header
from dataset.files.domain import domain_warning
from dataset.files.images import ImageError
from dataset.studies import preferred_order
from dataset.tools.listing import IDS, count_kinds, identify, list_images
from dataset.views import VIEWS
from models.attention import Pooled
from models.inference import TTA, Augmented, autocast
from predicting import explain, features, trained
from predicting.prediction_file import ERROR, FORMATS, ROW, PredictionFile

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")
CPU_BATCH = 8  # a CPU is no faster with more, and rows come sooner
# Options that the values depend on.
COMMAND = (
    "paths", "format", "features", "ema", "tta", "calibrated", "thresholds", "dicom_recipe", "only_chest", "no_ids"
)  # fmt: skip


def parse_args(argv):
    parser = Parser(
        prog="predict.py", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of main.py; a PATH that ends in .pth is one to average with it")
    add("paths", nargs="+", metavar="PATH", help="image, folder, pattern, or CSV with a column path")
    add("--output", required=True, metavar="FILE", help="the table to write; run.json beside it says how it was made")
    add("--format", choices=list(FORMATS), default="csv", help="of the table; cxr-lt: as its challenge takes it")
    add("--cfg", metavar="FILE", help="published weights as CHECKPOINT: the configuration that they belong to")
    add("--ema", action="store_true", help="the EMA weights that the checkpoint holds")
    add("--tta", action="store_true", help=f"mean over {len(TTA)} shifts and scales, {len(TTA)} times the work")
    add("--calibrated", metavar="EVALUATION", help="apply calibration.json of this evaluation, which report.py wrote")
    add("--thresholds", metavar="EVALUATION", help="add <label>_positive, 1 or 0, by the thresholds of its report.json")
    add("--rule", help="which of the report's thresholds: youden (default), f1, sensitivity, specificity")
    add("--dicom-recipe", choices=["window", "mimic_jpg"], help="how DICOM becomes grayscale (that of the training)")
    add("--only-chest", action="store_true", help="an image that is no chest radiograph by its header is an error")
    add("--no-ids", action="store_true", help="without ids of patient, study and image; `path` is a number")
    add("--by", choices=["image", "study"], help="what the model is asked about (as it was trained, DATA.UNIT)")
    add("--images", default="", metavar="FOLDER", help="of a table of CXR-LT as PATH: as DATA.IMAGES")
    add("--explain", metavar="DIR", help="overlays of each image and label: Grad-CAM, or the label's attention")
    add("--sampling-points", action="store_true", help="with --explain: also where DCNv3 looked, from coarse to fine")
    add(
        "--features", nargs="?", const=features.LAST, metavar="LAYER",
        help="also the features of a layer, averaged over positions, in an .npy beside the table: any module's name, "
        "such as levels.2 (the last layer with positions)",
    )  # fmt: skip
    add("--labels", nargs="+", metavar="LABEL", help="with --explain: these labels only")
    add("--device", help="cuda, cuda:1, cpu (a GPU where there is one)")
    add(
        "-b",
        "--batch-size",
        type=int,
        help=f"images per forward pass (that of the training; on a CPU at most {CPU_BATCH})",
    )
    add("-j", "--workers", type=int, help="loading processes (on a GPU up to 8, else 1)")
    args = parser.parse_args(argv)
    for flag in ("thresholds", "explain", "no_ids") if args.format == "cxr-lt" else ():
        if getattr(args, flag):
            raise UserError(
                f"--format cxr-lt has dicom_id and probabilities alone; leave out --{flag.replace('_', '-')}"
            )
    return args


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
    how = {"ema": args.ema, "device": device, "dicom_recipe": args.dicom_recipe, "cfg": args.cfg}
    models = [trained.load(path, **how) for path in checkpoints]
    for other in models[1:]:
        if other.label_names != models[0].label_names:
            one, two = set(models[0].label_names), set(other.label_names)
            differ = ", ".join(sorted(one ^ two)) or "another order"
            raise UserError(f"{other.path} has other labels than {models[0].path}: {differ}; predict with each alone")
    # A model of images answers for a study by the mean of its logits.
    return [m if m.config.DATA.UNIT == "study" else replace(m, model=Pooled(m.model, "mean")) for m in models], paths


def _explained(args, models, paths):
    """Indices of the labels to explain."""
    if not args.explain:
        for flag, value in (("--labels", args.labels), ("--sampling-points", args.sampling_points)):
            if value:
                raise UserError(f"{flag} is an option of overlays: give --explain DIR as well")
        return []
    if len(models) > 1:
        raise UserError("--explain takes one checkpoint: the maps of several models have no common scale")
    if models[0].classes:
        raise UserError("--explain: the overlays are of X-rays, and this model is of photographs; leave it out")
    explain.check(models[0].model, models[0].config.DATA.IMG_SIZE, models[0].path)
    names = models[0].label_names
    for name in args.labels or []:
        if name not in names:
            raise UserError(f"--labels: the model has no label {name!r}{did_you_mean(name, names)}")
    folder = Path(args.explain).resolve()
    for path in paths:
        if os.path.isdir(path) and folder.is_relative_to(Path(path).resolve()):
            raise UserError(
                f"--explain {args.explain} is in {path}: its overlays would be predicted the next time; choose "
                "another folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--explain {args.explain} cannot be written ({error.strerror}); choose another") from error
    return [names.index(name) for name in args.labels or names]


# ----------------------------------------------------------------------------------------- images
def _grouped(images, by):
    """Lists of images, of each of which the table has a row."""
    if by == "image":
        return [[listed] for listed in images]
    studies, alone = {}, 0
    for k, listed in enumerate(images):
        ids = identify(listed, b"")
        if not ids["study_id"]:  # a DICOM has it in its header
            with contextlib.suppress(ImageError):
                ids = identify(listed, listed.read())
        alone += not ids["study_id"]
        studies.setdefault((ids["subject_id"], ids["study_id"]) if ids["study_id"] else k, []).append(listed)
    unknown = f"; {alone:,} images have no study_id, so each is one" if alone else ""
    print(f"{len(images):,} images of {len(studies):,} studies, by subject_id and study_id{unknown}")
    return list(studies.values())


class _Images(torch.utils.data.Dataset):
    """Items: ids and content of a row, the `images` that it is made of (Listed), their `facts`, and `batches`: for each
    model Studies of one, uint8; or without these its error.

    groups: lists of images; most: images of a study at most.
    """

    def __init__(self, groups, readers, only_chest, most):
        self.groups, self.readers, self.only_chest, self.most = groups, readers, only_chest, most

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index):
        found = [self._read(listed) for listed in self.groups[index]]
        good = [one for one in found if "tensors" in one]
        good = [good[k] for k in self._preferred([one["view"] for one in good])]
        chosen = good or [one for one in found if one["row"]][:1] or found[:1]
        images, tensors = ([one.pop(key, ()) for one in chosen] for key in ("listed", "tensors"))
        item = {**chosen[0], "images": images, "facts": chosen if good else []}
        for name in ("dicom_id", "view"):
            item[name] = ";".join(one[name] for one in chosen)
        item["content"] = ", ".join(dict.fromkeys(one["content"] for one in chosen if one["content"]))
        item["left_out"] = [one["error"] for one in found if one["error"]] if good else []
        if good:
            view, rows = torch.from_numpy(view_numbers([one["view"] for one in good])), torch.arange(len(good))[None]
            item["batches"] = [Studies(torch.stack(of_model), view, rows) for of_model in zip(*tensors)]
        return item

    def _preferred(self, views):
        return preferred_order(view_numbers(views), np.zeros(len(views), int))[: self.most] if views else []

    def _read(self, listed):
        """An image by itself: its ids and content, and `tensors`, uint8 [1, S, S] for each model, or its error."""
        item = {"error": "", "dicom": False, "content": "", "row": True, "listed": listed, **dict.fromkeys(IDS, "")}
        try:
            data = listed.read()
            item |= identify(listed, data)
            if (header := read_header(data)) is not None:
                item["dicom"] = True
                kind, item["content"] = find_content(header)
                item["row"] = kind != NO_IMAGE
                if kind == NO_IMAGE:
                    return item
                if kind == NOT_CHEST and self.only_chest:
                    raise ImageError(f"{listed.path}: {NOT_CHEST} ({item['content']}); predict it without --only-chest")
            item["tensors"] = [read(data, listed.path) for read in self.readers]
        except ImageError as error:
            item["error"] = " ".join(str(error).split())
        return item


def _notes(item, model):
    """What is to be said of the images of a row for this model; printed of all rows together."""
    data = model.config.DATA
    for error in item["left_out"]:
        yield f"left out of its study, whose other images answer: {error}"
    for image in item["facts"]:
        if text := domain_warning(model.domain, f"dicom {data.DICOM_RECIPE}" if image["dicom"] else "pictures"):
            yield text.replace("DATA.DICOM_RECIPE", "--dicom-recipe")
        view = image["view"]
        if view and view not in VIEWS.get(data.VIEWS, [view]):
            yield f"the model was trained on DATA.VIEWS {data.VIEWS}, these images are of the view {view}"


# ------------------------------------------------------------------------------------ probability
@torch.no_grad()
def probabilities(model, batch, tta=False, layer=None):
    """(probabilities float64 [N, L] as evaluation has them, features of a layer [N, F] or None) of uint8
    [N, 1 or 3, S, S], or Studies of such images (a layer: of one image each); with tta their mean over TTA."""
    device = next(model.model.parameters()).device
    network, batch = Augmented(model.model) if tta else model.model, batch.to(device)
    with autocast(model.config, device)[0]():
        images = model.normalize(images_of(batch))
        if layer is None:
            logits, of_layer = network(with_images(batch, images)), None
        else:
            logits, of_layer = features.forward(model.model.backbone, images, layer)
    result = model.activate(logits.cpu().double()).numpy()
    if not np.isfinite(result).all():
        raise UserError(f"{model.path}: the model's outputs are not finite; its weights are broken")
    return result, None if layer is None else of_layer.float().cpu().numpy()


# ------------------------------------------------------------------------------------------- main
def predict(args):
    """Predict, and write the table; returns (how many rows it has, how many with an error, what they are)."""
    device = _device(args.device)
    models, paths = _models(args, device)
    names, first = models[0].label_names, models[0]
    labels = _explained(args, models, paths)
    if args.tta and first.classes:
        raise UserError("--tta is for X-rays, and this model is of photographs; leave it out")
    if args.features is not None:
        if len(models) > 1 or args.tta or "study" in (args.by, first.config.DATA.UNIT):
            raise UserError("--features takes one checkpoint, a model of images, without --tta and --by study")
        features.check(first.model.backbone, args.features, first.path, args.output)
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
    left_out = Counter()
    by = args.by or first.config.DATA.UNIT
    groups = _grouped(list_images(paths, left_out, args.images), by)
    # Of each row the number of its group, and its images; a submission has a row per image.
    each = args.format == "cxr-lt"
    rows = [(k, part) for k, group in enumerate(groups) for part in (([one] for one in group) if each else [group])]
    paths = [";".join(image.path for image in images) for _, images in rows]
    shown = [str(k + 1) if args.no_ids else path for k, path in enumerate(paths)]

    command = {
        "checkpoints": [model.digest for model in models],
        **{k: getattr(args, k) for k in COMMAND},
        "rule": rule,
        "by": by if by == "study" else None,
        "explain": [args.explain, [names[k] for k in labels], args.sampling_points] if args.explain else None,
    }
    about = {
        "checkpoint_paths": [str(model.path.absolute()) for model in models],
        "device": str(device),
        "batch_size": batch,
        "notes": fitted_notes,
        "thresholds": _on_one_scale(cuts, names, adjust),
        "started": datetime.now().isoformat(timespec="seconds"),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "dcnv3": dcnv3.__version__},
    }
    ids = [name for name in IDS if not args.no_ids or name == "view"]
    columns = ["path", "error", *ids, *names, *(f"{name}_positive" for name in names if args.thresholds)]
    columns += [features.COLUMN] * (args.features is not None)
    if repeated := [name for k, name in enumerate(columns) if name in columns[:k]]:
        raise UserError(f"{first.path}: the label {repeated[0]!r} has the name of another column of the table")
    of_groups = [[image.stamp() for image in group] for group in groups]
    stamps = [of_groups[k][0] if by == "image" else [path, of_groups[k]] for path, (k, _) in zip(paths, rows)]
    table = PredictionFile(
        args.output, columns, list(zip(shown, stamps)), command=command, about=about, batch=batch, form=args.format
    )
    waiting, count, unit = sum(map(len, table.todo)), len(rows), units("image" if each else by)
    if waiting < count:
        print(f"{count - waiting:,} of {count:,} {unit} are done already, {table.changed:,} have changed since")
    kept = None if args.features is None else features.FeatureFile(args.output, count, waiting < count)

    notes, most = Counter(), first.config.DATA.MAX_VIEWS if first.config.DATA.UNIT == "study" else None
    content = _Images(groups, [model.reader() for model in models], args.only_chest, most)
    of_rows = [range(rows[part.start][0], rows[part.stop - 1][0] + 1) for part in table.todo]
    loader = DataLoader(content, batch_sampler=of_rows, num_workers=workers, collate_fn=list)
    with tqdm(total=count, initial=count - waiting, unit=f" {unit}", disable=not sys.stderr.isatty()) as bar:
        for numbers, items in zip(table.todo, loader):
            good = [k for k, item in enumerate(items) if "batches" in item]
            found = np.full((len(items), len(names)), np.nan)
            if good:
                batches = [join([items[k]["batches"][m] for k in good]) for m in range(len(models))]
                asked = [probabilities(m, b, args.tta, args.features) for m, b in zip(models, batches)]
                found[good] = np.mean([values for values, _ in asked], 0)
                if kept is not None:
                    kept.put(numbers.start, good, asked[0][1])
            for k in good:
                notes.update(_notes(items[k], first))
            at = [rows[k][0] - rows[numbers.start][0] for k in numbers]
            items, found, images = [dict(items[k]) for k in at], found[at], [rows[k][1] for k in numbers]
            for item, of_row in zip(items, images) if each else ():
                item["dicom_id"] = of_row[0].known.get("dicom_id") or of_row[0].file.stem
            made = _rows([(shown[k], of_row) for k, of_row in zip(numbers, images)], items, found, names, adjust, cuts)
            for k, row in zip(numbers, made):
                if row is not None:
                    row[features.COLUMN] = k
            contents = [item["content"] for item in items]
            table.add(numbers.start, list(zip(made, contents)))
            bar.update(len(made))
    finished = {"images": table.count(ROW, ERROR), "errors": table.count(ERROR)}
    if labels and (waiting or "overlay_scale" not in table.before):
        from predicting import overlays  # matplotlib takes longer to import than sixty images to predict

        finished["overlay_scale"] = overlays.draw_overlays(
            args.explain, first, lambda k: ((item := content[k])["images"], item["batches"][0]), table.read(), labels,
            cuts=about["thresholds"],
            calibrated=bool(args.calibrated), points=args.sampling_points, no_ids=args.no_ids,
            areas=overlays.read_areas(args.thresholds or args.calibrated, first.digest),
        )  # fmt: skip
    elif labels:
        finished["overlay_scale"] = table.before["overlay_scale"]
    table.finish(**finished, finished=datetime.now().isoformat(timespec="seconds"))
    for text, count in notes.items():
        print(f"note, {count} image(s): {text}")
    for count, kinds in ((table.contents(True), NOT_CHEST), (table.contents(False), "no image: not in the table")):
        if count:
            print(f"note, {sum(count.values()):,} file(s), {kinds}: {count_kinds(count)}")
    if left_out:
        print(f"note, {sum(left_out.values()):,} file(s) left out, not of an image format: {count_kinds(left_out)}")
    return finished["images"], finished["errors"], unit


def _on_one_scale(cuts, names, adjust):
    """Thresholds on the scale of the table: calibrated like its probabilities; {} without any."""
    if adjust is None or not cuts:
        return cuts
    values = adjust(np.array([[np.nan if cuts[name] is None else cuts[name] for name in names]]))[0]
    return {name: None if cuts[name] is None else float(value) for name, value in zip(names, values)}


def _rows(images, items, found, names, adjust, cuts):
    """Rows of the table for a batch, None for what is no image.

    images: of each (what the table has as its path, its list of `Listed`); found: probabilities [N, L], NaN where none.
    """
    adjusted = adjust(found) if adjust else found
    rows = []
    for k, (item, (shown, group)) in enumerate(zip(items, images)):
        error = item["error"]
        for listed in group if shown != ";".join(image.path for image in group) else ():  # --no-ids
            error = error.replace(str(listed.file), shown).replace(listed.path, shown)
        row = {"path": shown, "error": error, **{name: item[name] for name in IDS}}
        for j, name in enumerate(names):
            row[name] = None if error else float(f"{adjusted[k, j]:.8g}")
            # Thresholds were chosen among probabilities as evaluation writes them, so before any calibration.
            known = not error and cuts.get(name) is not None
            row[f"{name}_positive"] = int(float(f"{found[k, j]:.8g}") >= cuts[name]) if known else None
        rows.append(row if item["row"] else None)
    return rows


def main(argv=None):
    args = parse_args(argv)
    try:
        count, errors, unit = predict(args)
    except KeyboardInterrupt:
        print("stopped; the same command resumes here", file=sys.stderr)
        sys.exit(130)
    print(f"{count:,} {unit}, {errors:,} of them could not be read: {args.output}")
    if errors:
        sys.exit(1)
    return 0


if __name__ == "__main__":
    run_command(main)
