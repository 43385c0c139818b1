"""Every knob of the project, its default and its meaning; the only place that writes a config.

Order of precedence, later wins: the defaults here, the files named in BASE, the YAML of `--cfg`,
`--opts KEY VALUE ...`, the flags given on the command line. Keys of the published InternImage
classification code keep their names and meanings; others are marked (new).
"""

import argparse
import ast
from pathlib import Path

import yaml
from yacs.config import CfgNode as CN

from errors import UserError, did_you_mean

_C = CN()
_C.BASE = [""]  # YAML files to start from, relative to the file that names them

# ---------------------------------------------------------------------------------------- data
_C.DATA = CN()
_C.DATA.DATASET = "imagenet"  # a file in dataset/: mimic_cxr, imagenet
_C.DATA.DATA_PATH = ""  # the release folder (or its files/)
_C.DATA.CSV = ""  # (new) a table of your own instead of the official ones: path, split, labels[, subject_id]
_C.DATA.LABELER = "chexpert"  # (new) which official label file: chexpert or negbio
_C.DATA.TEST_LABELER = "same"  # (new) labels of the test split: same, or radiologist (mimic-cxr-*-test-set-labeled.csv)
_C.DATA.VIEWS = "all"  # (new) all, frontal, AP, PA, lateral; blank views are told from the texts of the metadata
_C.DATA.LABELS = []  # (new) label columns; empty: the 14 of CheXpert
_C.DATA.UNCERTAIN = "zeros"  # (new) what -1 becomes: zeros, ones, ignore (masked in loss and metrics), smooth
# ... for all labels, or by label: {default: zeros, Consolidation: ignore}
_C.DATA.MISSING = "zeros"  # (new) what a blank becomes, likewise
_C.DATA.IMAGE_FORMAT = "auto"  # (new) auto, jpg, dcm, png: which images of the official layout to read
_C.DATA.DICOM_RECIPE = "window"  # (new) window: as displayed; mimic_jpg: as the JPG release of MIMIC-CXR was made
_C.DATA.DICOM_WINDOW = 0  # (new) which window or VOI LUT of a DICOM that has several
_C.DATA.ON_BAD_IMAGE = "error"  # (new) an image that cannot be read: error, or skip (said and counted, not replaced)
_C.DATA.ALLOW_MISSING = False  # (new) leave out images that are not there; all files are then looked for at start
_C.DATA.ZIP_MODE = False  # read the images from <DATA_PATH>/*.zip (uncompressed)
_C.DATA.IMG_ON_MEMORY = False  # read all encoded images into shared memory at start, once a node
_C.DATA.BATCH_SIZE = 128  # images per GPU and forward pass
_C.DATA.IMG_SIZE = 224
_C.DATA.INTERPOLATION = "bicubic"  # bicubic, bilinear
_C.DATA.RESIZE = "squeeze"  # (new) how an X-ray becomes a square: squeeze, or pad (aspect kept, black beside it)
_C.DATA.NUM_WORKERS = 8  # loading processes per GPU
_C.DATA.PIN_MEMORY = True

# --------------------------------------------------------------------------------------- model
_C.MODEL = CN()
_C.MODEL.TYPE = "intern_image"  # a file in models/
_C.MODEL.NAME = ""  # folder of the run below OUTPUT; empty: the name of the YAML file
_C.MODEL.PRETRAINED = ""  # weights to start from (a published checkpoint, say)
_C.MODEL.RESUME = ""  # checkpoint of this project to go on from, or to evaluate
_C.MODEL.NUM_CLASSES = 1000
_C.MODEL.DROP_RATE = 0.0
_C.MODEL.DROP_PATH_RATE = 0.1  # stochastic depth of the last block, linear from 0
_C.MODEL.LABEL_SMOOTHING = 0.1  # single-label tasks only

_C.MODEL.INTERN_IMAGE = CN()
_C.MODEL.INTERN_IMAGE.CHANNELS = 64
_C.MODEL.INTERN_IMAGE.DEPTHS = [4, 4, 18, 4]
_C.MODEL.INTERN_IMAGE.GROUPS = [4, 8, 16, 32]
_C.MODEL.INTERN_IMAGE.LAYER_SCALE = None  # initial value of the scale of each branch, or None
_C.MODEL.INTERN_IMAGE.OFFSET_SCALE = 1.0
_C.MODEL.INTERN_IMAGE.MLP_RATIO = 4.0
_C.MODEL.INTERN_IMAGE.POST_NORM = False
_C.MODEL.INTERN_IMAGE.RES_POST_NORM = False  # H
_C.MODEL.INTERN_IMAGE.DW_KERNEL_SIZE = None  # H, G: 5
_C.MODEL.INTERN_IMAGE.USE_CLIP_PROJECTOR = False  # H, G
_C.MODEL.INTERN_IMAGE.LEVEL2_POST_NORM = False  # H, G
_C.MODEL.INTERN_IMAGE.LEVEL2_POST_NORM_BLOCK_IDS = None  # H, G: blocks 5, 11, 17, ...
_C.MODEL.INTERN_IMAGE.CENTER_FEATURE_SCALE = False  # H, G
_C.MODEL.INTERN_IMAGE.REMOVE_CENTER = False

# ------------------------------------------------------------------------------------ training
_C.TRAIN = CN()
_C.TRAIN.EPOCHS = 300
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.WEIGHT_DECAY = 0.05  # not on norms and biases
_C.TRAIN.BASE_LR = 5e-4  # peak learning rate at a batch of LR_REFERENCE_BATCH
_C.TRAIN.WARMUP_LR = 5e-7  # where warm-up starts, scaled as BASE_LR
_C.TRAIN.MIN_LR = 5e-6  # where the schedule ends, scaled as BASE_LR
# (new) rates are multiplied by batch x GPUs x accumulation / this. 512 is the published rule for
# ImageNet; it would turn the 1e-4 of a batch of 32 into 6e-6, so the MIMIC configurations say 32.
_C.TRAIN.LR_REFERENCE_BATCH = 512
_C.TRAIN.CLIP_GRAD = 5.0  # largest norm of the gradient; 0: no clipping
_C.TRAIN.ACCUMULATION_STEPS = 1  # forward passes per update
_C.TRAIN.USE_CHECKPOINT = False  # recompute activations in the backward pass to save memory
_C.TRAIN.AUTO_RESUME = True  # go on from the run's last checkpoint
_C.TRAIN.LOSS = "bce"  # (new) multi-label tasks: bce, focal, asymmetric (rows of utils_multilabel.LOSSES)
_C.TRAIN.POS_WEIGHT_CAP = 0.0  # (new) weigh positives by negatives/positives of the label, at most this; 0: no weights
_C.TRAIN.LR_SCHEDULER = CN()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine, linear, step
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # step: epochs between decays
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step: factor of a decay
_C.TRAIN.OPTIMIZER = CN()
_C.TRAIN.OPTIMIZER.NAME = "adamw"  # adamw, sgd
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # sgd
_C.TRAIN.OPTIMIZER.DCN_LR_MUL = None  # factor on the rates of the operator's offsets and center scales
_C.TRAIN.LR_LAYER_DECAY = False  # smaller rates for earlier blocks
_C.TRAIN.LR_LAYER_DECAY_RATIO = 0.875
_C.TRAIN.EMA = CN()
_C.TRAIN.EMA.ENABLE = False  # keep, validate and save an exponential moving average of the weights
_C.TRAIN.EMA.DECAY = 0.9998

# -------------------------------------------------------------------------------- augmentation
_C.AUG = CN()
_C.AUG.COLOR_JITTER = 0.4  # brightness and contrast
_C.AUG.GAMMA = 0.0  # (new) X-rays: gamma between 1/(1 + this) and 1 + this
_C.AUG.ROTATION = 0.0  # (new) X-rays: rotation by up to so many degrees to either side
_C.AUG.SHIFT = 0.0  # (new) X-rays: shift by up to this part of the side
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # timm's RandAugment string; imagenet only
_C.AUG.REPROB = 0.25  # probability of random erasing
_C.AUG.REMODE = "pixel"
_C.AUG.RECOUNT = 1
_C.AUG.CROP_SCALE = [0.08, 1.0]  # (new) area of the random crop relative to the image
_C.AUG.HFLIP = 0.5  # (new) probability of a horizontal flip
_C.AUG.MIXUP = 0.8
_C.AUG.CUTMIX = 1.0
_C.AUG.MIXUP_PROB = 1.0  # probability that a batch is mixed at all
_C.AUG.MIXUP_SWITCH_PROB = 0.5  # of those, the part that gets cutmix where both are on
_C.AUG.MEAN = [0.485, 0.456, 0.406]  # ImageNet's
_C.AUG.STD = [0.229, 0.224, 0.225]

# ------------------------------------------------------------------------------ testing, other
_C.TEST = CN()
_C.TEST.EMA = False  # --eval takes ema_best_ckpt.pth of the run, the averaged weights
_C.TEST.CROP = True  # resize to 8/7 of the size and take the centre; False: the whole image, squeezed
_C.AMP_OPT_LEVEL = "O1"  # O0: float32, O1: mixed precision
_C.AMP_DTYPE = "auto"  # (new) auto (bfloat16 where the device has it), bfloat16, float16
_C.OUTPUT = "output"  # a run lives in OUTPUT/MODEL.NAME/TAG
_C.RESULTS = "results"  # (new) an evaluation lives in RESULTS/evaluation_<timestamp>
_C.TAG = "default"
_C.SAVE_FREQ = 1  # epochs between ckpt_epoch_N.pth; the last checkpoint is kept after every epoch
_C.PRINT_FREQ = 10  # updates between lines of the log
_C.SEED = 0
_C.EVAL_MODE = False  # evaluate on the test split instead of training
_C.THROUGHPUT_MODE = False  # measure images/s of the forward pass and stop

# Keys whose default is None: what they may hold besides.
_OPTIONAL = {
    "MODEL.INTERN_IMAGE.LAYER_SCALE": float,
    "MODEL.INTERN_IMAGE.DW_KERNEL_SIZE": int,
    "MODEL.INTERN_IMAGE.LEVEL2_POST_NORM_BLOCK_IDS": list,
    "TRAIN.OPTIMIZER.DCN_LR_MUL": float,
}

# Keys whose value may be a mapping as well as a text.
_MAPPINGS = ("DATA.UNCERTAIN", "DATA.MISSING")
_CHOICES = {
    "DATA.LABELER": ("chexpert", "negbio"),
    "DATA.TEST_LABELER": ("same", "radiologist"),
    "DATA.VIEWS": ("all", "frontal", "AP", "PA", "lateral"),
    "DATA.IMAGE_FORMAT": ("auto", "jpg", "dcm", "png"),
    "DATA.DICOM_RECIPE": ("window", "mimic_jpg"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear"),
    "DATA.RESIZE": ("squeeze", "pad"),
    "DATA.ON_BAD_IMAGE": ("error", "skip"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AMP_OPT_LEVEL": ("O0", "O1"),
    "AMP_DTYPE": ("auto", "bfloat16", "float16"),
}

_AT_LEAST = {
    "DATA.DICOM_WINDOW": 0,
    "DATA.BATCH_SIZE": 1,
    "DATA.IMG_SIZE": 32,
    "DATA.NUM_WORKERS": 0,
    "MODEL.NUM_CLASSES": 1,
    "TRAIN.EPOCHS": 1,
    "TRAIN.POS_WEIGHT_CAP": 0,
    "TRAIN.WARMUP_EPOCHS": 0,
    "TRAIN.WEIGHT_DECAY": 0,
    "TRAIN.BASE_LR": 0,
    "TRAIN.WARMUP_LR": 0,
    "TRAIN.MIN_LR": 0,
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": 1,
    "TRAIN.LR_LAYER_DECAY_RATIO": 0,
    "MODEL.INTERN_IMAGE.CHANNELS": 2,
    "AUG.COLOR_JITTER": 0,
    "AUG.GAMMA": 0,
    "AUG.ROTATION": 0,
    "AUG.RECOUNT": 1,
    "SEED": 0,
    "TRAIN.LR_REFERENCE_BATCH": 1,
    "TRAIN.CLIP_GRAD": 0,
    "TRAIN.ACCUMULATION_STEPS": 1,
    "SAVE_FREQ": 1,
    "PRINT_FREQ": 1,
    "AUG.MIXUP": 0,
    "AUG.CUTMIX": 0,
}

_FRACTIONS = (
    "MODEL.DROP_RATE",
    "MODEL.DROP_PATH_RATE",
    "TRAIN.EMA.DECAY",
    "AUG.REPROB",
    "AUG.HFLIP",
    "AUG.SHIFT",
    "AUG.MIXUP_PROB",
    "AUG.MIXUP_SWITCH_PROB",
)

# Flags of main.py that change the config, in the names of argparse.
_FLAGS = {
    "data_path": "DATA.DATA_PATH",
    "dataset": "DATA.DATASET",
    "batch_size": "DATA.BATCH_SIZE",
    "zip": "DATA.ZIP_MODE",
    "output": "OUTPUT",
    "tag": "TAG",
    "pretrained": "MODEL.PRETRAINED",
    "resume": "MODEL.RESUME",
    "eval": "EVAL_MODE",
    "ema": "TEST.EMA",
    "throughput": "THROUGHPUT_MODE",
    "accumulation_steps": "TRAIN.ACCUMULATION_STEPS",
    "use_checkpoint": "TRAIN.USE_CHECKPOINT",
    "amp_opt_level": "AMP_OPT_LEVEL",
}


class Parser(argparse.ArgumentParser):
    """argparse that names the nearest known flag."""

    def parse_args(self, args=None):
        known, unknown = self.parse_known_args(args)
        if unknown:
            flags = [f for a in self._actions for f in a.option_strings]
            self.error(f"unknown argument {unknown[0]}{did_you_mean(unknown[0], flags)}")
        return known


def parse_args(argv=None):
    parser = Parser(description="InternImage on chest X-rays: training and evaluation.", allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="YAML file of the experiment")
    add("--opts", nargs="+", action="extend", metavar="KEY VALUE", help="config keys to change, e.g. TRAIN.EPOCHS 10")
    add("--data-path", help="data folder (DATA.DATA_PATH)")
    add("--dataset", help="mimic_cxr or imagenet (DATA.DATASET)")
    add("--batch-size", type=int, help="images per GPU and forward pass (DATA.BATCH_SIZE)")
    add("--zip", action="store_true", default=None, help="read images from zip files (DATA.ZIP_MODE)")
    add("--output", help="root of all runs (OUTPUT)")
    add("--tag", help="name of this run (TAG)")
    add("--pretrained", metavar="FILE", help="weights to start from (MODEL.PRETRAINED)")
    add("--resume", metavar="FILE", help="checkpoint to go on from or to evaluate (MODEL.RESUME)")
    add("--eval", action="store_true", default=None, help="evaluate on the test split (best_ckpt.pth of the run)")
    add("--ema", action="store_true", default=None, help="with --eval: the averaged weights (ema_best_ckpt.pth)")
    add("--throughput", action="store_true", default=None, help="measure images/s of the forward pass and stop")
    add("--accumulation-steps", type=int, help="forward passes per update (TRAIN.ACCUMULATION_STEPS)")
    add("--use-checkpoint", action="store_true", default=None, help="recompute activations to save memory")
    add("--amp-opt-level", choices=["O0", "O1"], help="O0: float32, O1: mixed precision (AMP_OPT_LEVEL)")
    add("--local-rank", "--local_rank", type=int, help="accepted for old launchers; unused")
    return parser.parse_args(argv)


def _flatten(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict) and prefix + key not in _MAPPINGS:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def lookup(config, key):
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


_DEFAULTS = dict(_flatten(_C))


def _typed(key, value, source):
    """`value` in the type of the key's default, or an error that names the key."""
    default = _DEFAULTS[key]
    kind = _OPTIONAL.get(key, type(default))
    if value is None and default is None:
        return None
    # YAML reads 1e-4 as text, and an integer is a fine float; a bool is not a number here.
    if kind is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is list and isinstance(value, tuple):
        value = list(value)
    if kind is str and value is None:
        value = ""
    if key in _MAPPINGS and isinstance(value, dict):
        return value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{source}: {key} must be of type {kind.__name__}, got {value!r}")
    if kind is list and default:
        if len(value) != len(default) or not all(isinstance(v, (int, float)) for v in value):
            raise UserError(f"{source}: {key} must be {len(default)} numbers such as {default}, got {value!r}")
        value = [type(d)(v) for d, v in zip(default, value)]
    return value


def _set(config, key, value, source):
    if key not in _DEFAULTS:
        raise UserError(f"{source}: unknown key {key}{did_you_mean(key, _DEFAULTS)}")
    *parents, name = key.split(".")
    for parent in parents:
        config = config[parent]
    config[name] = _typed(key, value, source)


def _merge_file(config, path, above=()):
    path = Path(path)
    if path.resolve() in above:
        raise UserError(f"config file {path}: BASE leads back to the file itself")
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"config file {path} holds no keys")
    bases = content.pop("BASE", None) or []
    for base in [bases] if isinstance(bases, str) else bases:
        if base:
            _merge_file(config, path.parent / base, (*above, path.resolve()))
    for key, value in _flatten(content):
        _set(config, key, value, path)


def _literal(text):
    """`--opts` values: Python literals where they are some, else text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _validate(config):
    for key, choices in _CHOICES.items():
        if lookup(config, key) not in choices:
            raise UserError(f"{key} is {lookup(config, key)!r}; choose one of {', '.join(choices)}")
    for key, minimum in _AT_LEAST.items():
        if not lookup(config, key) >= minimum:  # so that NaN fails too
            raise UserError(f"{key} is {lookup(config, key)}; it must be at least {minimum}")
    for key in _FRACTIONS:
        if not 0 <= lookup(config, key) <= 1:
            raise UserError(f"{key} is {lookup(config, key)}; it must lie between 0 and 1")
    low, high = config.AUG.CROP_SCALE
    if not 0 < low <= high <= 1:
        raise UserError(f"AUG.CROP_SCALE is {[low, high]}; it must be [smallest, largest] area within 0 to 1")
    m = config.MODEL.INTERN_IMAGE
    if m.USE_CLIP_PROJECTOR and config.DATA.IMG_SIZE % 32:
        raise UserError(f"DATA.IMG_SIZE is {config.DATA.IMG_SIZE}; with the CLIP projector it must be a multiple of 32")
    for level, groups in enumerate(m.GROUPS):
        if groups < 1 or m.CHANNELS * 2**level % groups:
            raise UserError(
                f"MODEL.INTERN_IMAGE.GROUPS: level {level} has {m.CHANNELS * 2**level} channels, "
                f"which do not divide into {groups} groups"
            )


def get_config(args):
    """The config that parsed arguments describe, validated and frozen.

    args needs `cfg`; `opts` (a list KEY VALUE ...) and the flags of `_FLAGS` count where present
    and not None.
    """
    config = _C.clone()
    _merge_file(config, args.cfg)
    opts = getattr(args, "opts", None) or []
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs KEY VALUE; {opts[-1]!r} has no partner")
    for key, text in zip(opts[::2], opts[1::2]):
        # text keys stay text: TAG 007 is a name
        value = text if isinstance(_DEFAULTS.get(key), str) else _literal(text)
        if key in _MAPPINGS:  # written as in the YAML file
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise UserError(f"--opts: {key} is not valid YAML: {text!r}") from error
        _set(config, key, value, "--opts")
    for flag, key in _FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None:
            _set(config, key, value, f"--{flag.replace('_', '-')}")
    config.MODEL.NAME = config.MODEL.NAME or Path(args.cfg).stem
    _validate(config)
    config.freeze()
    return config


def to_dict(config):
    """The config as plain dictionaries, for JSON and checkpoints."""
    return {k: to_dict(v) if isinstance(v, CN) else v for k, v in config.items()}


def differences(old, new):
    """Lines 'KEY old -> new' for the keys of two plain config dictionaries that differ."""
    old, new = dict(_flatten(old)), dict(_flatten(new))
    return [f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]


def from_dict(content, source):
    """The frozen config of a plain dictionary, as :func:`to_dict` wrote it; keys it lacks have their defaults.

    source: what to call it in errors, a checkpoint say. Keys that are no longer known are passed over.
    """
    config = _C.clone()
    for key, value in _flatten(content):
        if key in _DEFAULTS and key != "BASE":
            _set(config, key, value, source)
    _validate(config)
    config.freeze()
    return config
