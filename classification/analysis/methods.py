"""How the data were prepared and the model was trained: what a checkpoint and a config record, as lines of a paper."""

import platform
import subprocess
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path

from config import units

LABELERS = {"chexpert": "the CheXpert labeler", "negbio": "the NegBio labeler"}
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "pydicom", "scikit-learn")
OFF = "recorded only in a checkpoint of this software"


# ----------------------------------------------------------------------------------------- record
def describe_checkpoint(state, path):
    """What metrics.json keeps of a checkpoint's training: {"config", "epoch", ...}; `state` is its content."""
    kept = ("config", "epoch", "update", "weights", "best_by", "max_accuracy", "max_ema_accuracy", "images_per_update",
            "averaged", "pseudo_labels")  # fmt: skip
    found = {key: state[key] for key in kept if key in state}
    with suppress(OSError):
        found["written"] = datetime.fromtimestamp(Path(path).stat().st_mtime).isoformat(" ", "minutes")
    return found


def describe_software():
    """Versions, the processor's kind, the date and the version of this code, at the time of the call."""
    found = {"date": datetime.now().isoformat(" ", "minutes"), "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["system"] = f"{platform.system()} {platform.machine()}"
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        found["code"] = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return found


# ------------------------------------------------------------------------------------------ lines
def _labels(about):
    read = "a radiologist for the test split" * (about["test_labeler"] == "radiologist")
    found = ", ".join(filter(None, [LABELERS.get(about["labeler"]), read]))
    return f"{found}, from the radiology reports" if found else "the label file of the data set"


def _disjoint(evaluation):
    """Whether the splits have no patient in common, and how that is known."""
    test, held_out, m = evaluation.test, evaluation.validate, evaluation.metrics
    if test.unit != "patient":
        return "not known: the predictions name no patients"
    trained = "whether training had patients of the test split is not recorded"
    if m.get("trained_on") and set(m.get("tested_on", [])) & set(m["trained_on"]):
        trained = ("no patient of the test split was in training or validation (main.py --eval compares the patients "
                   "with those in the checkpoint, and refuses to test where they meet)")  # fmt: skip
    elif m.get("trained_on"):
        trained = f"trained on another data set ({', '.join(m['trained_on'])})"
    compared = "no patient of the test split is in the validation split (compared in this report); "
    return compared * (held_out is not None and held_out.unit == "patient") + trained


def _preparation(config):
    """The way of an image into the model, and what training adds to it."""
    d, aug = config.get("DATA", {}), config.get("AUG", {})
    if "IMG_SIZE" not in d:
        return []
    size, side = d["IMG_SIZE"], int(d["IMG_SIZE"] * 8 / 7)
    whole = "aspect kept, black beside" if d.get("RESIZE") == "pad" else "width and height each"
    crop = config.get("TEST", {}).get("CROP", True)
    steps = [
        f"grayscale; resized to {side if crop else size} pixels ({whole}, {d.get('INTERPOLATION', 'bicubic')})",
        f"the middle {size} x {size} pixels taken" * crop,
        f"normalised by mean {aug.get('MEAN')} and deviation {aug.get('STD')}" * ("MEAN" in aug),
        f"DICOM: {d.get('DICOM_RECIPE')}" * ("DICOM_RECIPE" in d),
        f"views: {d.get('VIEWS', 'all')}",
        "test-time augmentation: the mean probability over shifts and scales" * bool(config.get("TEST", {}).get("TTA")),
    ]
    return [("preprocessing", "; ".join(filter(None, steps)))]


def _augmentation(aug):
    kinds = {
        "CROP_SCALE": "random crops of {} of the area", "ROTATION": "rotation by up to {} degrees",
        "SHIFT": "shift by up to {} of the side", "HFLIP": "horizontal flips ({})",
        "COLOR_JITTER": "brightness and contrast ({})", "GAMMA": "gamma ({})", "REPROB": "random erasing ({})",
        "MIXUP": "mixup ({})", "CUTMIX": "cutmix ({})",
    }  # fmt: skip
    found = [text.format(aug[key]) for key, text in kinds.items() if aug.get(key)]
    return ", ".join(found) or "none"


def _start(model):
    if model.get("PRETRAINED"):
        return Path(model["PRETRAINED"]).name
    if model.get("TIMM", {}).get("DOWNLOAD"):
        return f"the pretrained weights of timm for {model['TIMM']['NAME']}"
    return "random"


def _training(config, record):
    t, batch = config.get("TRAIN", {}), record.get("images_per_update")
    if not t:
        return []
    o, schedule = t.get("OPTIMIZER", {}), t.get("LR_SCHEDULER", {})
    peak = t["BASE_LR"] * batch / t["LR_REFERENCE_BATCH"] if batch and "LR_REFERENCE_BATCH" in t else None
    own = {"adamw": f"betas {o.get('BETAS')}", "sgd": f"momentum {o.get('MOMENTUM')}"}.get(o.get("NAME"), "")
    rates = [
        f"peak learning rate {peak:.3g}" if peak else f"TRAIN.BASE_LR {t.get('BASE_LR')}",
        f"{t.get('WARMUP_EPOCHS')} epochs of warm-up, then {schedule.get('NAME')} over {t.get('EPOCHS')} epochs in all",
    ]
    ema = t.get("EMA", {})
    regular = [f"weight decay {t.get('WEIGHT_DECAY')}", f"gradient norm at most {t.get('CLIP_GRAD') or 'any'}",
               f"stochastic depth {config.get('MODEL', {}).get('DROP_PATH_RATE', 0)}",
               f"EMA of the weights with decay {ema.get('DECAY')}" * bool(ema.get("ENABLE"))]  # fmt: skip
    return [
        ("initial weights", _start(config.get("MODEL", {}))),
        ("optimizer", f"{o.get('NAME')}, {own}; {', '.join(filter(None, regular))}"),
        ("loss", " ".join(str(t[key]) for key in ("LOSS", "LOSS_OPTIONS") if t.get(key))),
        ("batch", f"{batch} {units(config.get('DATA', {}).get('UNIT', 'image'))} per update" if batch else None),
        ("schedule", "; ".join(rates)),
        ("augmentation in training", _augmentation(config.get("AUG", {}))),
        ("precision", {"O0": "float32", "O1": "mixed"}.get(config.get("AMP_OPT_LEVEL"))),
        ("training seed", config.get("SEED")),
    ]


def _chosen(config, record, epochs):
    """Epochs done and the one that was chosen, by which score; of a mean of checkpoints what went in."""
    if averaged := record.get("averaged"):
        used = ["/".join(Path(m["path"]).parts[-2:]) for m in averaged["members"] if m["used"]]
        return f"the mean of the weights of {len(used)} checkpoints ({averaged['how']}): {', '.join(used)}"
    done = epochs[-1]["epoch"] if epochs else None
    wanted, by = config.get("TRAIN", {}).get("EPOCHS"), record.get("best_by", "mean_auc")
    ema = record.get("weights") == "model_ema"
    best = record.get("max_ema_accuracy" if ema else "max_accuracy")
    parts = [f"{done} done" + f" of {wanted} planned" * bool(wanted) if done else ""]
    if "epoch" in record:
        score = f" of {best:.4f}" if isinstance(best, float) else ""
        kind = "EMA weights" if ema else "weights"
        parts.append(f"these are the {kind} after epoch {record['epoch']}; the best validation {by} until then{score}")
    return "; ".join(filter(None, parts)) or None


def collect(evaluation, about, epochs):
    """[{"what", "text"}] for report.json; a text of None is not known.

    about: as in the report; epochs: of metrics.jsonl.
    """
    m, what = evaluation.metrics, about["architecture"]
    record, software = m.get("training", {}), m.get("software", {})
    config = record.get("config", {})
    versions = ", ".join(f"{k} {v}" for k, v in software.items() if k not in ("date", "code", "system"))
    rows = [
        ("labels", _labels(about)),
        ("splits", _disjoint(evaluation)),
        *_preparation(evaluation.config),
        ("architecture", what and f"{what}, {about.get('parameters', 0):,} parameters"),
        *(_training(config, record) or [("training", f"not recorded: {OFF}")]),
        ("epochs", _chosen(config, record, epochs)),
        ("checkpoint written", record.get("written")),
        ("software", ", ".join(filter(None, [versions, software.get("system")]))),
        ("code version", software.get("code")),
        ("hardware of the test", m.get("device")),
        ("date of the test", software.get("date")),
    ]
    return [{"what": what, "text": str(text)} for what, text in rows if text not in (None, "")]
