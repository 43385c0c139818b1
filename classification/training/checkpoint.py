"""Checkpoints: write whole ones, find the last, resume from it, load foreign weights.

Nothing here ever runs code from a file: everything is read with `weights_only=True`.
"""

import contextlib
import os
import re
import shutil
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load

import config as config_module
from common import builders
from common.errors import UserError, reason
from common.files import rename, sha256
from dataset.patients import seen_by
from models.attention import Around

LAST = "last_ckpt.pth"  # after every epoch, or where a signal stopped the run
PREVIOUS = "last_ckpt.previous.pth"
BEST = "best_ckpt.pth"
EMA_BEST = "ema_best_ckpt.pth"


# ----------------------------------------------------------------------------------------- files
def save(state, folder, names):
    """Write `state` under every name. A reader sees the old file or the whole new one, never a part.

    Files are written in the order of `names`, each a copy of its own (a damaged disk block then
    costs one of them). The file that was LAST until now is kept as PREVIOUS.
    """
    folder = Path(folder)
    temporary, source = folder / "checkpoint.tmp", None
    try:
        for name in names:
            if source is None:
                with open(temporary, "wb") as file:
                    torch.save(state, file)
            else:
                shutil.copyfile(source, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            source = folder / name
            if name == LAST and source.exists():
                rename(source, folder / PREVIOUS)
            rename(temporary, source)
    except (OSError, RuntimeError) as error:
        full = isinstance(error, RuntimeError)  # so torch reports a full disk, in words of its own
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        why = "no space left, most likely" if full else error.strerror
        raise UserError(
            f"{folder / name}: the checkpoint could not be written ({why}); make room: earlier checkpoints are "
            "intact, and the same command continues from them"
        ) from error


def remove_old(folder, keep):
    """Delete all but the newest `keep` of ckpt_epoch_N.pth; 0 keeps all."""
    for path in numbered(folder)[keep:] if keep else []:
        path.unlink()


def numbered(folder):
    """ckpt_epoch_N.pth of a run, the largest N first: file dates change when a folder is copied."""
    found = [(int(m[1]), p) for p in Path(folder).glob("ckpt_epoch_*.pth") if (m := re.search(r"_(\d+)\.pth$", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def check_space(config, folder, size, log):
    """Warn where the disk has less room than the checkpoints of a run need; size: bytes of one.

    UserError: there is no room for one.
    """
    free, written = shutil.disk_usage(folder).free, len(list(Path(folder).glob("*.pth")))
    if free < 2 * size and written < 2:
        raise UserError(
            f"{folder} has {free / 1e6:,.0f} MB free, a checkpoint takes {size / 1e6:,.0f} MB and is written "
            "beside the one before; make room, or choose another --output"
        )
    every = -(-config.TRAIN.EPOCHS // config.SAVE_FREQ)
    files = 4 + config.TRAIN.EMA.ENABLE + min(every, config.SAVE_KEEP or every)  # last, its previous, best, a new one
    needed = max(0, files - written) * size
    if free < needed:
        log.warning(
            f"{folder} has {free / 1e6:,.0f} MB free, and {files} checkpoints take {needed / 1e6:,.0f} MB more; make "
            "room, or keep fewer with SAVE_FREQ and SAVE_KEEP"
        )


class _Inert:
    """Stands in for a class or function that a foreign checkpoint names (a yacs CfgNode, say).

    Its "objects" are plain OrderedDicts, one of the few types that torch's safe reader fills.
    """

    def __new__(cls, *_, **__):
        return OrderedDict()


def read(path, mesh=None):
    """Content of a checkpoint file, on the CPU; mesh: what is in shards is sharded over it, on its device.

    Objects of unknown classes become plain dictionaries; their code is never run.

    Raises:
        UserError: missing, truncated, damaged, or not a checkpoint.
    """
    return _read(path, lambda file: None, mesh)[0]


def read_config(path):
    """The config in one of our checkpoints, a dictionary."""
    state = _read(path, lambda file: None, whole=False)[0]
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise UserError(f"{path} is not a checkpoint of this project: it has no config; name the experiment with --cfg")
    _refuse_foreign_modules(state["config"], path)
    return state["config"]


def _refuse_foreign_modules(config, path):
    """Raise a UserError where the config in `path`, which may be anyone's file, names a module outside this project."""
    model, data = (config[key] if isinstance(config.get(key), dict) else {} for key in ("MODEL", "DATA"))
    sources = data["SOURCES"] if isinstance(data.get("SOURCES"), list) else []
    named = [("models", "MODEL.TYPE", model["TYPE"])] if "TYPE" in model else []
    named += [("dataset", "DATA.DATASET", data["DATASET"])] if "DATASET" in data else []
    named += [("dataset", "DATA.SOURCES", one.get("dataset")) for one in sources if isinstance(one, dict)]
    for package, key, name in named:
        try:
            builders.find(package, name, key, outside=False)
        except UserError as error:
            raise UserError(f"{path}: {error}, or name your --cfg as well") from error


def read_with_digest(path):
    """(content, sha256 in hex) of one and the same bytes, even if a training replaces the file meanwhile."""
    return _read(path, sha256)


def _read(path, digest, mesh=None, whole=True):
    """(content, digest of the bytes) of a file; not whole: unchecked, its tensors left in the file or its shards."""
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"checkpoint {path} {'is a folder' if path.is_dir() else 'does not exist'}")
        with open(path, "rb") as file:
            found = digest(file)
            file.seek(0)
            if path.suffix == ".safetensors":
                return load(file.read()), found
            if whole and (part := _damaged_part(file)):
                raise ValueError(f"{part} in it does not match its checksum: a bad copy or disk")
            try:
                unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            except ValueError:  # the format before torch 1.6: nothing is allowed there
                unknown = []
            file.seek(0)
            inert = torch.serialization.safe_globals([(_Inert, name) for name in unknown])
            with inert, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the pickle protocol of foreign files
                lazy = not whole and zipfile.is_zipfile(path)  # not the format before torch 1.6
                state = torch.load(path if lazy else file, map_location="cpu", weights_only=True, mmap=lazy)
            if whole and isinstance(state, dict) and "shards" in state:
                from training import sharding  # takes longer to import than predict.py to begin

                state = sharding.read(state, path, mesh)
            return state, found
    except UserError:
        raise
    except PermissionError as error:  # of the file, or of a folder above it
        raise UserError(
            f"checkpoint {path} cannot be opened ({error.strerror}); ask its owner to let you read it"
        ) from error
    # A damaged file can raise almost anything (RuntimeError, EOFError, UnpicklingError, KeyError, ...).
    except Exception as error:
        raise UserError(_what_is_wrong(path, error)) from error


def _damaged_part(file):
    """Name of a part that its checksum contradicts, or None. torch.load checks none, and would load changed weights."""
    found = None
    if zipfile.is_zipfile(file):  # not the format before torch 1.6, which has no checksums
        with zipfile.ZipFile(file) as archive:
            written = any(part.CRC for part in archive.infolist())  # torch can leave them out: all are 0 then
            found = archive.testzip() if written else None
    file.seek(0)
    return found


def _what_is_wrong(path, error):
    """Why a file is no checkpoint: what it is instead, where its first bytes tell."""
    with open(path, "rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`, or download it"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path} is a web page, not a checkpoint: the download failed; download it again"
    # torch's own text about unpickling advises to load unsafely: it is not handed on.
    why = type(error).__name__ if "weights_only" in str(error) else reason(error).split(". ")[0]  # the rest: guesses
    if isinstance(error, LookupError):  # of a pickle: a number, or a list that is empty
        why = "its content is damaged"
    if path.suffix != ".safetensors" and not start.startswith((b"pk", b"\x80")):
        why = "it does not begin as a file of torch.save does" if start else "the file is empty"
    return f"{path} is not a whole checkpoint ({why}); use another one"


def find_last(folder, log, mesh=None):
    """(path, state) of the newest whole checkpoint of a run, or None; mesh: as for `read`.

    A file that cannot be read is named in a warning, and the next one is tried.
    """
    folder = Path(folder)
    candidates = [folder / LAST, folder / PREVIOUS, *numbered(folder), folder / BEST]
    there = [path for path in candidates if path.is_file()]
    for path in there:
        try:
            return path, read(path, mesh)
        except UserError as error:
            log.warning(f"{error} - falling back to the one before")
    if there:  # to begin anew here would overwrite what may still be saved
        raise UserError(f"none of the checkpoints in {folder} can be read; move them away or use another --tag")
    return None


def refuse_to_overwrite(folder):
    """Raises a UserError where a run lies in `folder`: a new one there would replace its best checkpoint."""
    if there := sorted(p.name for p in Path(folder).glob("*ckpt*.pth")):
        raise UserError(
            f"TRAIN.AUTO_RESUME is False, but {folder} holds a run ({there[0]}): a new one would overwrite it. "
            "Use another --tag, or move it away"
        )


# ---------------------------------------------------------------------------------------- resume
def _other_shapes(theirs, ours):
    """{key that both have: a line} where its shapes differ."""
    pairs = {k: (tuple(theirs[k].shape), tuple(ours[k].shape)) for k in ours if k in theirs}
    return {k: f"{k} is {a}, here {b}" for k, (a, b) in pairs.items() if a != b}


def check_weights(module, weights, path):
    """Raise a UserError unless `weights` are tensors of the names and shapes of the module (which may be on meta)."""
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UserError(f"{path} is not a checkpoint of this project: its weights are no dictionary of tensors")
    ours = module.state_dict()
    problems = [f"{k} is missing" for k in ours if k not in weights]
    problems += [f"{k} is not in this model" for k in weights if k not in ours]
    problems += _other_shapes(weights, ours).values()
    if problems:
        raise UserError(
            f"{path} is a checkpoint of another model: {problems[0]} ({len(problems)} such keys); "
            "use the configuration it was trained with, or another --tag to begin a new run"
        )


def check_labels(state, path, label_names, others="the data has"):
    """Raise a UserError unless `state` is one of our checkpoints, of these labels, those of `others`."""
    if not isinstance(state, dict) or "model" not in state or "label_names" not in state:
        raise UserError(f"{path} is not a checkpoint of this project; load foreign weights with --pretrained")
    if list(state["label_names"]) != list(label_names):
        raise UserError(
            f"{path} was trained on the labels {', '.join(state['label_names'])}; {others} {', '.join(label_names)}"
        )


def check_origin(state, path, label_names, config):
    """Raise a UserError unless `state` is one of our checkpoints, of these labels and the same DATA.UNIT."""
    check_labels(state, path, label_names)
    unit = state["config"].get("DATA", {}).get("UNIT", "image")
    if unit != config.DATA.UNIT:
        raise UserError(
            f"{path} was trained with DATA.UNIT {unit}, here it is {config.DATA.UNIT}; set DATA.UNIT {unit}, or start "
            "from its weights with --pretrained"
        )


def load_weights(model, state, path, label_names, ema=False):
    """Weights of one of our checkpoints for evaluation; ema: those of its EMA.

    UserError: not one of ours, another model, other labels, or no EMA in it.
    """
    check_labels(state, path, label_names)
    weights = state["model_ema" if ema else "model"]
    if weights is None:
        raise UserError(f"{path} has no EMA weights (TRAIN.EMA.ENABLE was off); evaluate it without --ema")
    check_weights(model, weights, path)
    model.load_state_dict(weights)


# What the model sees of an image; trained with another value, its scores are lower.
SEEN = ("DATA.IMG_SIZE", "DATA.RESIZE", "DATA.INTERPOLATION", "AUG.MEAN", "AUG.STD", "TEST.CROP")
# What it learns; changed within a run, its epochs cannot be compared.
LEARNT = (*SEEN, "DATA.MAX_VIEWS", "DATA.UNCERTAIN", "DATA.MISSING", "DATA.VIEWS", "DATA.LABELER", "DATA.SAMPLER",
          "DATA.PSEUDO_LABELS", "TRAIN.LOSS")  # fmt: skip


def log_differences(state, path, config, log, but=(), warned=()):
    """Log which options have changed since the checkpoint at `path` was written, apart from `but`.

    warned: those whose change is a warning.
    """
    if line := config_module.unfamiliar(state["config"], path):
        log.warning(line)
    changed = config_module.differences(state["config"], config_module.to_dict(config))
    for key, (old, new) in changed.items():
        if key not in but:
            (log.warning if key in warned else log.info)(f"changed since the checkpoint: {key} {old!r} -> {new!r}")


# ------------------------------------------------------------------------------- foreign weights
ATTENTIONS = ("label_attention.", "study_attention.")  # the heads of `models/attention.py`
# What wraps a model puts before its names: DataParallel, torch.compile, Lightning and Hugging Face, detectors.
_WRAPPED = re.compile(r"(?:module\.|_orig_mod\.|model\.|backbone\.)*")


def _without_prefix(weights, ours):
    """The weights under the prefix that leaves most names of `ours`; what the file holds beside it is dropped."""
    prefixes = {""}
    for key in weights:
        parts = _WRAPPED.match(key)[0].split(".")[:-1]
        prefixes |= {".".join(parts[:k]) + "." for k in range(1, len(parts) + 1)}

    def fitting(prefix):
        return sum(key.startswith(prefix) and key[len(prefix) :] in ours for key in weights)

    best = max(sorted(prefixes), key=fitting)
    return {k[len(best) :]: v for k, v in weights.items() if k.startswith(best)} if fitting(best) else weights


def _weights(content, path):
    """The weights in a file of any of the known shapes."""
    for key in ("model", "module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, dict) else {}
    if not weights:
        raise UserError(f"{path} holds no weights (looked under model, module, state_dict and at the top)")
    return weights


def _state_dict(content, path, ours):
    """:func:`_weights` with the published names."""
    weights = {re.sub(r"\blayer_scale([12])$", r"gamma\1", k): v for k, v in _weights(content, path).items()}
    return _without_prefix(weights, ours)


def reduce_to_1k(weights, classifier, classes):
    """The weights with a classifier of the 21,841 classes of ImageNet-22k reduced to the 1,000 of ImageNet-1k, if the
    model has `classes` 1,000: the same logits as those outputs of the whole classifier."""
    head = [f"{classifier}.weight", f"{classifier}.bias"]
    if classes != 1000 or any(k not in weights or len(weights[k]) != 21841 for k in head):
        return weights
    rows = np.loadtxt(Path(__file__).with_name("imagenet_22k_to_1k.txt"), int).ravel()
    return weights | {k: weights[k][rows] for k in head}


def load_pretrained(model, path, log, small_head=False):
    """Start from the weights of a published checkpoint (InternImage's own, the Hugging Face copy, timm's).

    A classifier of another size is left as initialised, and so is a part of the model of which the file has nothing;
    of 21,841 classes it is reduced to 1,000, see :func:`reduce_to_1k`. small_head: in either case it becomes a
    thousandth of its initial values instead (TRAIN.RAND_INIT_FT_HEAD).
    Returns {loaded, replaced, missing, unexpected}, lists of keys as files have them, and logs them; `patients` and
    `trained` of `dataset.patients.seen_by`; and the file's `sha256`.

    Raises:
        UserError: the file is of another architecture.
    """
    content, sha256 = read_with_digest(path)
    part, lacking, keys = model, [], _weights(content, path)
    while isinstance(part, Around):
        own = part.own_keys()
        absent = [name for name in own if not any(f".{key}".endswith(f".{name}") for key in keys)]
        lacking += absent
        if len(absent) < len(own):  # such as the head of an image model, without what fuses images
            break
        part = part.backbone  # of it alone is the file
    # What wraps all of our own names is not in the file's either.
    wrapped = _WRAPPED.match(os.path.commonprefix([*part.state_dict()]))[0]
    ours = {k.removeprefix(wrapped): v for k, v in part.state_dict().items() if k not in lacking}
    theirs = _state_dict(content, path, ours.keys())
    if hasattr(part, "fitted"):
        theirs = part.fitted(theirs)
    head = part.classifier.removeprefix(wrapped)
    reduced = theirs if small_head else reduce_to_1k(theirs, head, len(ours[f"{head}.weight"]))
    if reduced is not theirs:
        log.info(f"{path}: its classifier of 21,841 classes is reduced to those of ImageNet-1k")
    theirs = reduced
    found = match_weights(theirs, ours, {name.removeprefix(wrapped) for name in _classifiers(part)}, path)
    if small_head:
        for key in found["replaced"]:
            ours[key].mul_(0.001)
    part.load_state_dict({wrapped + k: theirs[k] for k in found["loaded"]}, strict=False)
    found["missing"] += lacking
    for head in ATTENTIONS:  # beside the backbone
        if not any(head in key for key in model.state_dict()):
            found["unexpected"] += [key for key in keys if head in key]
    count = f"{len(found['loaded'])} of {len(model.state_dict())}"
    log.info(f"pretrained weights from {path}: {count} keys loaded, all but these")
    for what in ("replaced", "missing", "unexpected"):
        log.info(f"  {what}: {', '.join(found[what]) or 'none'}")
    known, trained = seen_by(content)
    return found | {"patients": known, "trained": trained, "sha256": sha256}


def _classifiers(model):
    """Names of its last layer, and of that of the backbone in it."""
    inner = [f"backbone.{name}" for name in _classifiers(model.backbone)] if isinstance(model, Around) else []
    return [model.classifier, *inner]


def match_weights(theirs, ours, classifiers, path):
    """Which weights of a file fit a model: {loaded, replaced, missing, unexpected}, lists of keys.

    theirs, ours: {name: tensor}. classifiers: names of last layers; their keys are `replaced`, all or none, where the
    file has one of another shape.

    UserError: the file is of another architecture.
    """
    head = {k for k in ours if k.startswith(tuple(f"{name}." for name in classifiers))}
    reshaped = _other_shapes(theirs, ours)
    loaded = [k for k in theirs if k in ours and k not in reshaped]
    replaced = sorted(head if head & (theirs.keys() - set(loaded)) else ())
    loaded = sorted(set(loaded) - set(replaced))
    missing, unexpected = [k for k in ours if k not in theirs], [k for k in theirs if k not in ours]
    parts, known = {k.split(".")[0] for k in theirs}, {k.split(".")[0] for k in ours} - classifiers
    wrong = [line for k, line in reshaped.items() if k not in head]
    wrong += [f"{k} is missing in the file" for k in missing if k not in head and k.split(".")[0] in parts]
    wrong += [f"{k} is not in this model" for k in unexpected if k.split(".")[0] in known]
    if not loaded:
        raise UserError(_nothing_fits(path, theirs, ours))
    if wrong or len(loaded) < len(ours) / 2:
        first = wrong[0] if wrong else f"{missing[0]} is missing in the file"
        raise UserError(
            f"{path} is of another architecture: {first} ({len(wrong) or len(missing)} such keys); "
            "choose the configuration that belongs to the file"
        )
    return {"loaded": loaded, "replaced": replaced, "missing": missing, "unexpected": unexpected}


def _nothing_fits(path, theirs, ours):
    """Why no key of a file is one of the model's: another architecture, or names with a prefix that is not known."""
    for key in theirs:
        if prefix := next((key[: -len(name)] for name in ours if key.endswith("." + name)), None):
            return f"{path}: its names begin with {prefix!r}, which is no known prefix; remove it from the keys"
    return (
        f"{path} is of another architecture: it has no key of this model, such as {next(iter(ours))}, but "
        f"{next(iter(theirs))}; choose the configuration that belongs to the file"
    )
