"""Testing a checkpoint: which weights, on which images, and the record that the evaluation's folder keeps."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import config as config_module
from analysis.methods import describe_checkpoint, describe_software
from common.errors import UserError
from dataset.build import build_datasets, build_loader
from dataset.files.domain import domain_warning
from dataset.patients import refuse_known
from dataset.sources import parts_of, population
from dataset.tables import EmptySplit
from models import build_model
from models.cost import count_gmacs
from models.inference import TTA, Augmented, autocast, device_name
from training import checkpoint
from training.tasks import TASKS

OF_EVALUATION = ("CFG", "EVAL_MODE", "MODEL.RESUME", "MODEL.PRETRAINED", "RESULTS", "TEST.EMA", "TEST.TTA")


@dataclass
class Tested:
    """A model with the weights under test: their file, its sha256, and its content without the weights."""

    model: nn.Module
    path: Path
    sha256: str
    origin: dict


def load_tested(config, folder, dataset, log):
    """The model with the weights to test on `dataset`: those of --resume, the run's best, or --pretrained."""
    model = build_model(config)
    # The run's best comes before PRETRAINED: a training command with --eval added tests what it trained.
    path = Path(config.MODEL.RESUME or folder / (checkpoint.EMA_BEST if config.TEST.EMA else checkpoint.BEST))
    if not config.MODEL.RESUME and config.MODEL.PRETRAINED and not path.exists():
        return _load_foreign(model, config.MODEL.PRETRAINED, config, folder, dataset, log)
    state, sha256 = checkpoint.read_with_digest(path)
    names = state.get("label_names") if isinstance(state, dict) else None
    if dataset.task == "single_label" and (names is None or (len(names), config.MODEL.NUM_CLASSES) == (21841, 1000)):
        return _load_foreign(model, path, config, folder, dataset, log)
    checkpoint.check_origin(state, path, dataset.label_names, config)
    checkpoint.load_weights(model, state, path, dataset.label_names, ema=config.TEST.EMA)
    refuse_known(state.get("patients", {}), dataset, config, path)
    checkpoint.log_differences(state, path, config, log, but=OF_EVALUATION)
    weights = ("model", "model_ema", "optimizer")
    return Tested(model, path, sha256, {key: value for key, value in state.items() if key not in weights})


def _load_foreign(model, path, config, folder, dataset, log):
    """The model with the weights of a file of another program, head included; its classes are in the data's order."""
    path = Path(path)
    if config.TEST.EMA:
        raise UserError(
            f"--ema: {folder / checkpoint.EMA_BEST} does not exist, and {path} has none that are read; "
            "leave out --ema, or name a checkpoint of main.py with --resume"
        )
    keys = checkpoint.load_pretrained(model, path, log)
    if keys["replaced"] or keys["missing"]:
        raise UserError(f"--eval: {path} has no head for these {config.MODEL.NUM_CLASSES} classes; train first")
    if any(head in key for key in keys["unexpected"] for head in checkpoint.ATTENTIONS):  # its answer is another one
        raise UserError(
            f"--eval: {path} answers by attention; set MODEL.HEAD, MODEL.FUSION and DATA.UNIT as it was trained"
        )
    refuse_known(keys["patients"], dataset, config, path)
    return Tested(model, path, keys["sha256"], {})


def build_test_sets(config, log):
    """(test split, validation split or None where there is none): thresholds are chosen on the second alone."""
    try:
        test_set, held_out = build_datasets(config, "test", "validate")
    except EmptySplit as error:
        (test_set,) = build_datasets(config, "test")  # if this is the empty split, that is an error
        log.warning(f"no thresholds and no scaling of probabilities, for want of a validation split: {error}")
        return test_set, None
    return test_set, held_out if TASKS[test_set.task].labels else None


def expected_bytes(*splits):
    """About what an evaluation of these splits (None: without) and its report take on the disk."""
    counts = [(len(s), len(s.label_names) if TASKS[s.task].labels else 10) for s in splits if s is not None]
    return 4_000_000 + sum(images * (250 + 60 * columns) for images, columns in counts)


def warnings_of(tested, dataset, config):
    """What makes the model's scores lower here than where it was trained, a line each."""
    found = [domain_warning(tested.origin.get("domain"), getattr(dataset, "domain", ""))]
    changed = config_module.differences(tested.origin.get("config", {}), config_module.to_dict(config))
    found += [
        f"the model was trained with {key} {changed[key][0]}, here it is {changed[key][1]}: its scores are lower; "
        f"use --opts {key} {shlex.quote(str(changed[key][0]))}"
        for key in checkpoint.SEEN
        if key in changed
    ]
    return [text for text in found if text]


def test_split(tested, split, config, world, log):
    """What the task's `test` gives of a split: metrics, and the arrays of predictions."""
    amp, _ = autocast(config, world.device)
    loader = build_loader(config, split, train=False, world=world, log=log)
    sources = getattr(split, "sources", None)
    model = Augmented(tested.model) if _augments(config, split) else tested.model
    return TASKS[split.task].test(model, loader, world, amp, label_names=split.label_names, sources=sources)


def _augments(config, dataset):
    return config.TEST.TTA and dataset.task == "multilabel"


def describe(tested, dataset, config, world, *, seconds, found, warnings):
    """metrics.json: what was tested on what, and the metrics `found`, which took so many seconds."""
    metrics = {k: v for k, v in found.items() if k not in ("logits", "probabilities", "targets", "rows", "columns")}
    processors = device_name(world.device) if world.size == 1 else f"{world.size} x {device_name(world.device)}"
    _, dtype = autocast(config, world.device)
    views = len(TTA) if _augments(config, dataset) else 1
    about = {
        "dataset": config_module.data_name(config),
        "root": str(getattr(dataset, "root", config.DATA.DATA_PATH)),
        "tested_on": sorted({population(*source) for source in parts_of(dataset, config).values()}),
        "trained_on": sorted(tested.origin.get("patients", {})),
        "checkpoint": str(tested.path),
        "checkpoint_sha256": tested.sha256,
        # None: the file holds averaged weights alone, so --ema of predict.py changes nothing.
        "ema": None if tested.origin.get("weights") in ("model_ema", "average") else config.TEST.EMA,
        "backbone": config_module.backbone_name(config),
        "parameters": sum(p.numel() for p in tested.model.parameters()),
        "gmacs": round(count_gmacs(tested.model, config.DATA.IMG_SIZE) * views, 3),
        "images_per_s": round(metrics["images"] / seconds, 1),
        "device": f"{processors}, {dtype}, batch {config.DATA.BATCH_SIZE}",
        "domain": {"trained": tested.origin.get("domain", ""), "tested": getattr(dataset, "domain", "")},
        "warnings": warnings,
        "config": config_module.to_dict(config),
        "skipped": len(dataset) - metrics["images"],
        "training": describe_checkpoint(tested.origin, tested.path),
        "software": describe_software(),
    }
    if TASKS[dataset.task].labels:
        about["label_policy"] = {"uncertain": config.DATA.UNCERTAIN, "missing": config.DATA.MISSING}
        about["label_mapping"] = getattr(dataset, "label_mapping", {})
        about["cohort"] = getattr(dataset, "cohort", {})
        own = {key: getattr(dataset, key, None) for key in ("primary_metric", "label_groups")}
        about |= {key: value for key, value in own.items() if value}
    return about | metrics
