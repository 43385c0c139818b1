"""Every knob: default, meaning, allowed values, when it takes effect. The only module that writes a config.

Order of precedence, later wins: the defaults here, those of the backbone, the files named in BASE, the YAML of
`--cfg`, `--opts KEY VALUE ...`, the flags given on the command line. Keys of the published InternImage
classification code keep their names and meanings; others are marked (new).
"""

import argparse
import ast
import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from yacs.config import CfgNode as CN

from common.errors import UserError, did_you_mean


# --------------------------------------------------------------------------------- allowed values
# Each makes a function: value -> what is wrong with it, or None.
def one_of(*choices):
    return lambda value: None if value in choices else f"choose one of {', '.join(map(str, choices))}"


def at_least(least):
    return lambda value: None if value >= least else f"it must be at least {least}"  # NaN fails too


def between(low, high):
    return lambda value: None if low <= value <= high else f"it must be between {low} and {high}"


def off_or_at_least(least):
    return lambda value: None if value == 0 or value >= least else f"it must be 0 (off), or at least {least}"


def area_range(value):
    low, high = value
    return None if 0 < low <= high <= 1 else "it must be [smallest, largest] area within 0 to 1"


def sources(value):
    """DATA.SOURCES: mappings with dataset, path and further :data:`SOURCE_KEYS`, of different names."""
    form, known, seen = "{dataset: mimic_cxr, path: FOLDER}", ["name", *SOURCE_KEYS], set()
    for k, source in enumerate(value, start=1):
        if not isinstance(source, dict):
            return f"source {k} must be a mapping such as {form}"
        for key in source:
            if key not in known:
                nearest = did_you_mean(str(key), known)
                return f"source {k} has the unknown key {key!r}{nearest}; the keys are {', '.join(known)}"
        for key in ("dataset", "path", *({"name"} & set(source))):
            if not isinstance(source.get(key), str) or not source[key]:
                return f"source {k} needs a text as {key}, such as {form}"
        if source_name(source) in seen:
            return f"two sources are called {source_name(source)}: give each a name of its own, or make them one folder"
        seen.add(source_name(source))
    return None


@dataclass(frozen=True)
class Knob:
    """One option.

    allowed: one of the functions above.
    takes_effect: the conditions under which it does: other keys and their values; `task`, the task of the dataset;
        `model`, that the backbone uses it; `data`, that the dataset uses it; `device`, the type of device. If one
        does not hold, a value other than the default gives a warning.
    kind: the type besides None, where the default is None. mapping: a mapping is allowed as well.
    flag: its own flag of main.py.
    """

    default: object
    meaning: str
    allowed: object = None
    takes_effect: dict = field(default_factory=dict)
    kind: type = None
    mapping: bool = False
    flag: str = ""


XRAYS, PHOTOS = {"task": "multilabel"}, {"task": "single_label"}
OFFICIAL = {"DATA.DATASET": "mimic_cxr", "DATA.CSV": ""}
INTERN_IMAGE, TIMM = {"MODEL.TYPE": "intern_image"}, {"MODEL.TYPE": "timm"}
MODEL, DATA, GPU = {"model": True}, {"data": True}, {"device": "cuda"}
STEP = {"TRAIN.LR_SCHEDULER.NAME": "step"}
SGD, ADAMW = {"TRAIN.OPTIMIZER.NAME": "sgd"}, {"TRAIN.OPTIMIZER.NAME": "adamw"}

# fmt: off
KNOBS = {
    # ------------------------------------------------------------------------------------- data
    "DATA.DATASET": Knob("imagenet", "a file in dataset/: mimic_cxr, chexpert, nih, padchest, vindr, brax, imagenet",
                         flag="--dataset"),
    "DATA.DATA_PATH": Knob("", "the data folder: a release, or its files/", flag="--data-path"),
    "DATA.SOURCES": Knob([], "(new) several releases at once, instead of DATASET and DATA_PATH: [{dataset: mimic_cxr, "
                         "path: FOLDER}, ...]; a source may have its own name, csv, split_seed, ...", sources),
    "DATA.SOURCES_MIX": Knob("size", "(new) an epoch of several sources: every image once (size), or as many of each "
                             "source (even)", one_of("size", "even"), takes_effect=DATA),
    "DATA.SAMPLER": Knob("uniform", "(new) how often an image is in an epoch: once (uniform), or by the rarest of its "
                         "labels, in inverse proportion (balanced) or to the root of it (sqrt)"),
    "DATA.CSV": Knob("", "(new) a table of your own instead of the official ones: path, split, labels[, subject_id]",
                     takes_effect={"DATA.DATASET": "mimic_cxr"}),
    "DATA.LABELER": Knob("chexpert", "(new) which official label file", one_of("chexpert", "negbio"),
                          takes_effect=OFFICIAL),
    "DATA.TEST_LABELER": Knob("same", "(new) labels of the test split: those, or mimic-cxr-*-test-set-labeled.csv",
                              one_of("same", "radiologist"), takes_effect=OFFICIAL),
    "DATA.VIEWS": Knob("all", "(new) which views; for a blank one the texts of the metadata decide",
                       one_of("all", "frontal", "AP", "PA", "lateral"), takes_effect=XRAYS),
    "DATA.LABELS": Knob([], "(new) label columns, the release's own too; empty: the 14 of CheXpert",
                        takes_effect=XRAYS),
    "DATA.APPROXIMATE_LABELS": Knob(True, "(new) False: labels that a release has only nearly are unknown",
                                    takes_effect=DATA),
    "DATA.SPLIT_SEED": Knob(None, "(new) draws by patient the splits that a release does not have: null is 0 for a "
                            "validation split, and a release without any splits is then all test", kind=int,
                            takes_effect=DATA),
    "DATA.READERS": Knob("majority", "(new) VinDr: positive is what most of the readers marked, or any of them",
                         one_of("majority", "any"), takes_effect=DATA),
    "DATA.LABELLED_BY": Knob("physicians", "(new) PadChest: the images whose labels are physicians', or all",
                             one_of("physicians", "all"), takes_effect=DATA),
    "DATA.UNCERTAIN": Knob("zeros", "(new) what -1 becomes: zeros, ones, ignore (masked in loss and metrics), smooth; "
                           "for all labels, or by label: {default: zeros, Consolidation: ignore}",
                           takes_effect=XRAYS, mapping=True),
    "DATA.MISSING": Knob("zeros", "(new) what a blank becomes, likewise", takes_effect=XRAYS, mapping=True),
    "DATA.NO_FINDING_CLEARS": Knob(False, "(new) where No Finding is 1, a blank label is 0, but for Support Devices",
                                   takes_effect=XRAYS),
    "DATA.IMAGE_FORMAT": Knob("auto", "(new) which images of a release to read",
                              one_of("auto", "jpg", "dcm", "png", "tif"), takes_effect=DATA),
    "DATA.DICOM_RECIPE": Knob("window", "(new) window: as displayed; mimic_jpg: as MIMIC-CXR's JPG release was made",
                              one_of("window", "mimic_jpg"), takes_effect=XRAYS),
    "DATA.DICOM_WINDOW": Knob(0, "(new) which window or VOI LUT of a DICOM that has several", at_least(0),
                              takes_effect=XRAYS | {"DATA.DICOM_RECIPE": "window"}),
    "DATA.ON_BAD_IMAGE": Knob("error", "(new) an image that cannot be read: error, or skip (said and counted)",
                              one_of("error", "skip")),
    "DATA.ALLOW_MISSING": Knob(False, "(new) leave out images that are not there; all are then looked for at start",
                               takes_effect=XRAYS),
    "DATA.LIMIT": Knob(0, "(new) at most this many images of each split, of randomly chosen patients; 0: all",
                       at_least(0), takes_effect=XRAYS),
    "DATA.ZIP_MODE": Knob(False, "read the images from <DATA_PATH>/*.zip (uncompressed)", takes_effect=XRAYS,
                          flag="--zip"),
    "DATA.IMG_ON_MEMORY": Knob(False, "read all encoded images into shared memory at start, once a node",
                               takes_effect=XRAYS),
    "DATA.BATCH_SIZE": Knob(128, "images per GPU and forward pass", at_least(1), flag="--batch-size"),
    "DATA.IMG_SIZE": Knob(224, "side in pixels of what the model sees; timm: the backbone's own unless set",
                          between(32, 4096)),
    "DATA.INTERPOLATION": Knob("bicubic", "how images are resized", one_of("bicubic", "bilinear")),
    "DATA.RESIZE": Knob("squeeze", "(new) how an X-ray becomes a square: squeeze, or pad (aspect kept, black beside)",
                        one_of("squeeze", "pad"), takes_effect=XRAYS),
    "DATA.NUM_WORKERS": Knob(8, "loading processes per GPU", at_least(0)),
    "DATA.PIN_MEMORY": Knob(True, "batches in memory that a GPU reads directly"),
    "DATA.PREFETCH": Knob(1, "(new) batches that cross to the GPU while it computes", at_least(0), takes_effect=GPU),
    # ------------------------------------------------------------------------------------ model
    "MODEL.TYPE": Knob("intern_image", "a file in models/: intern_image, timm"),
    "MODEL.NAME": Knob("", "folder of the run below OUTPUT; empty: the name of the YAML file"),
    "MODEL.PRETRAINED": Knob("", "weights to start from (a published checkpoint, say)", flag="--pretrained"),
    "MODEL.RESUME": Knob("", "checkpoint of this project to go on from, or to evaluate", flag="--resume"),
    "MODEL.NUM_CLASSES": Knob(1000, "labels, or classes", at_least(1)),
    "MODEL.DROP_RATE": Knob(0.0, "dropout", between(0, 1), takes_effect=MODEL),
    "MODEL.DROP_PATH_RATE": Knob(0.1, "stochastic depth of the last block, linear from 0", between(0, 1),
                                 takes_effect=MODEL),
    "MODEL.LABEL_SMOOTHING": Knob(0.1, "of class targets (for labels: TRAIN.LOSS smooth_bce)", between(0, 1),
                                  takes_effect=PHOTOS),

    "MODEL.INTERN_IMAGE.CHANNELS": Knob(64, "of the first level; each further level has twice as many", at_least(2),
                                        takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.DEPTHS": Knob([4, 4, 18, 4], "blocks of the levels", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.GROUPS": Knob([4, 8, 16, 32], "DCNv3 groups of the levels", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.LAYER_SCALE": Knob(None, "initial value of the scale of each branch, or None", kind=float,
                                           takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.OFFSET_SCALE": Knob(1.0, "stretches the sampling grid and offsets", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.MLP_RATIO": Knob(4.0, "width of the MLP relative to the channels", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.POST_NORM": Knob(False, "norms after the branches: S, B, L, XL, G", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.RES_POST_NORM": Knob(False, "norms on both sides: H", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.DW_KERNEL_SIZE": Knob(None, "of the depthwise convolution; H, G: 5", kind=int,
                                              takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.USE_CLIP_PROJECTOR": Knob(False, "attention pooling: H, G", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.LEVEL2_POST_NORM": Knob(False, "H, G", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.LEVEL2_POST_NORM_BLOCK_IDS": Knob(None, "H, G: blocks 5, 11, 17, ...", kind=list,
                                                          takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.CENTER_FEATURE_SCALE": Knob(False, "H, G", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.REMOVE_CENTER": Knob(False, "no sampling point in the middle", takes_effect=INTERN_IMAGE),
    "MODEL.TIMM.NAME": Knob("", "(new) which backbone: a name of timm's, such as densenet121 or resnet50.a1_in1k",
                            takes_effect=TIMM),
    "MODEL.TIMM.DOWNLOAD": Knob(False, "(new) start from the weights that timm names, fetched from Hugging Face",
                                takes_effect=TIMM | {"MODEL.PRETRAINED": ""}),
    # --------------------------------------------------------------------------------- training
    "TRAIN.EPOCHS": Knob(300, "passes over the train split", at_least(1)),
    "TRAIN.WARMUP_EPOCHS": Knob(20, "epochs of rising learning rate", at_least(0)),
    "TRAIN.WEIGHT_DECAY": Knob(0.05, "not on norms and biases", at_least(0)),
    "TRAIN.BASE_LR": Knob(5e-4, "peak learning rate at a batch of LR_REFERENCE_BATCH", at_least(0)),
    "TRAIN.WARMUP_LR": Knob(5e-7, "where warm-up starts, scaled as BASE_LR", at_least(0)),
    "TRAIN.MIN_LR": Knob(5e-6, "where the schedule ends, scaled as BASE_LR", at_least(0)),
    # 512 is the published rule for ImageNet; it would turn the 1e-4 of a batch of 32 into 6e-6, so the MIMIC
    # configurations say 32.
    "TRAIN.LR_REFERENCE_BATCH": Knob(512, "(new) rates are multiplied by batch x GPUs x accumulation / this",
                                      at_least(1)),
    "TRAIN.CLIP_GRAD": Knob(5.0, "largest norm of the gradient; 0: no clipping", at_least(0)),
    "TRAIN.ACCUMULATION_STEPS": Knob(1, "forward passes per update", at_least(1), flag="--accumulation-steps"),
    "TRAIN.USE_CHECKPOINT": Knob(False, "recompute activations in the backward pass to save memory", takes_effect=MODEL,
                                 flag="--use-checkpoint"),
    "TRAIN.COMPILE": Knob(False, "(new) torch.compile: fewer passes over memory; the first update takes minutes, once"),
    "TRAIN.AUTO_RESUME": Knob(True, "go on from the run's last checkpoint"),
    "TRAIN.LOSS": Knob("bce", "(new) multi-label tasks: a row of utils_multilabel.LOSSES", takes_effect=XRAYS),
    "TRAIN.LOSS_OPTIONS": Knob({}, "(new) parameters of the loss, such as {gamma: 2.0}", takes_effect=XRAYS,
                               mapping=True),
    "TRAIN.BEST_BY": Knob("mean_auc", "(new) the metric that chooses best_ckpt.pth, by its key in metrics.json; of "
                          "classes acc1 unless set"),
    "TRAIN.POS_WEIGHT_CAP": Knob(0.0, "(new) weigh positives by negatives/positives of the label, at most this; 0: no "
                                 "weights", off_or_at_least(1), takes_effect=XRAYS),
    "TRAIN.LR_SCHEDULER.NAME": Knob("cosine", "how the rate falls", one_of("cosine", "linear", "step")),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Knob(30, "epochs between decays", at_least(1), takes_effect=STEP),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Knob(0.1, "factor of a decay", takes_effect=STEP),
    "TRAIN.OPTIMIZER.NAME": Knob("adamw", "what turns gradients into updates", one_of("adamw", "sgd")),
    "TRAIN.OPTIMIZER.EPS": Knob(1e-8, "added to the denominator", takes_effect=ADAMW),
    "TRAIN.OPTIMIZER.BETAS": Knob([0.9, 0.999], "decay of the moments", takes_effect=ADAMW),
    "TRAIN.OPTIMIZER.MOMENTUM": Knob(0.9, "Nesterov's", between(0, 1), takes_effect=SGD),
    "TRAIN.OPTIMIZER.DCN_LR_MUL": Knob(None, "factor on the rates of the operator's offsets and center scales",
                                       kind=float, takes_effect=MODEL),
    "TRAIN.LR_LAYER_DECAY": Knob(False, "smaller rates for earlier blocks", takes_effect=MODEL),
    "TRAIN.LR_LAYER_DECAY_RATIO": Knob(0.875, "from one block to the one before", at_least(0),
                                       takes_effect={"TRAIN.LR_LAYER_DECAY": True}),
    "TRAIN.EMA.ENABLE": Knob(False, "keep, validate and save an exponential moving average of the weights"),
    "TRAIN.EMA.DECAY": Knob(0.9998, "of the average, per update", between(0, 1),
                            takes_effect={"TRAIN.EMA.ENABLE": True}),
    # ----------------------------------------------------------------------------- augmentation
    "AUG.COLOR_JITTER": Knob(0.4, "brightness and contrast; of photographs only without AUTO_AUGMENT", at_least(0)),
    "AUG.GAMMA": Knob(0.0, "(new) X-rays: gamma between 1/(1 + this) and 1 + this", at_least(0), takes_effect=XRAYS),
    "AUG.ROTATION": Knob(0.0, "(new) X-rays: rotation by up to so many degrees to either side", at_least(0),
                         takes_effect=XRAYS),
    "AUG.SHIFT": Knob(0.0, "(new) X-rays: shift by up to this part of the side", between(0, 1), takes_effect=XRAYS),
    "AUG.AUTO_AUGMENT": Knob("rand-m9-mstd0.5-inc1", "photographs: timm's RandAugment string", takes_effect=PHOTOS),
    "AUG.REPROB": Knob(0.25, "probability of random erasing", between(0, 1)),
    "AUG.REMODE": Knob("pixel", "what is put there", one_of("const", "rand", "pixel")),
    "AUG.RECOUNT": Knob(1, "largest number of rectangles", at_least(1)),
    "AUG.CROP_SCALE": Knob([0.08, 1.0], "(new) area of the random crop relative to the image", area_range),
    "AUG.HFLIP": Knob(0.5, "(new) probability of a horizontal flip", between(0, 1)),
    "AUG.MIXUP": Knob(0.8, "strength of mixup; 0: off", at_least(0)),
    "AUG.CUTMIX": Knob(1.0, "strength of cutmix; 0: off", at_least(0)),
    "AUG.MIXUP_PROB": Knob(1.0, "probability that a batch is mixed at all", between(0, 1)),
    "AUG.MIXUP_SWITCH_PROB": Knob(0.5, "of those, the part that gets cutmix where both are on", between(0, 1)),
    "AUG.MIXUP_OFF_EPOCH": Knob(0, "(new) batches are mixed in so many epochs, and not in those after; 0: in all",
                                at_least(0)),
    "AUG.MEAN": Knob([0.485, 0.456, 0.406], "of normalisation: ImageNet's; timm: the backbone's own unless set"),
    "AUG.STD": Knob([0.229, 0.224, 0.225], "of normalisation, likewise"),
    # --------------------------------------------------------------------------- testing, other
    "TEST.EMA": Knob(False, "--eval takes the averaged weights: ema_best_ckpt.pth of the run, or those in --resume",
                     takes_effect={"EVAL_MODE": True}, flag="--ema"),
    "TEST.REPORT": Knob(True, "(new) --eval ends with the report of report.py", takes_effect=XRAYS),
    "TEST.CROP": Knob(True, "resize to 8/7 of the size and take the centre; False: the whole image"),
    "AMP_OPT_LEVEL": Knob("O1", "O0: float32, O1: mixed precision", one_of("O0", "O1"), flag="--amp-opt-level"),
    "AMP_DTYPE": Knob("auto", "(new) auto: what is fast on the device", one_of("auto", "bfloat16", "float16"),
                      takes_effect={"AMP_OPT_LEVEL": "O1"}),
    "TF32": Knob(False, "(new) what is computed in float32 has 10 bits of mantissa, and is faster", takes_effect=GPU),
    "DETERMINISTIC": Knob(False, "(new) the same run is the same to the bit on a GPU too, where it is slower"),
    "OUTPUT": Knob("output", "root of all runs: one lives in OUTPUT/MODEL.NAME/TAG", flag="--output"),
    "RESULTS": Knob("", "(new) an evaluation lives in RESULTS/evaluation_<timestamp>; empty: results/<DATA.DATASET>"),
    "TAG": Knob("default", "name of this run", flag="--tag"),
    "SAVE_FREQ": Knob(1, "epochs between ckpt_epoch_N.pth; the last checkpoint is kept after every epoch", at_least(1)),
    "LOG.TENSORBOARD": Knob(False, "(new) write epochs and a batch for TensorBoard too, which must be installed"),
    "PRINT_FREQ": Knob(10, "updates between lines of the log", at_least(1)),
    "SEED": Knob(0, "of all random numbers", at_least(0)),
    "EVAL_MODE": Knob(False, "evaluate on the test split instead of training", flag="--eval"),
    "THROUGHPUT_MODE": Knob(False, "measure the training step, and the loading of --data-path, and stop",
                            flag="--throughput"),
}
# fmt: on


# ----------------------------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, and the nearest known flag. Flags may stand among the paths."""

    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help lists the flags")

    def parse_args(self, args=None):
        parse = self.parse_known_args if self._subparsers else self.parse_known_intermixed_args
        known, unknown = parse(args)
        if unknown:
            flags = [f for a in self._actions for f in a.option_strings]
            self.error(f"unknown argument {unknown[0]}{did_you_mean(unknown[0], flags)}")
        return known


def parse_args(argv=None):
    """The flags of main.py: those of the knobs, `--cfg` and `--opts`."""
    parser = Parser(description="InternImage on chest X-rays: training and evaluation.", allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="YAML file of the experiment")
    add("--opts", nargs="+", action="extend", metavar="KEY VALUE", help="config keys to change, e.g. TRAIN.EPOCHS 10")
    for key, knob in KNOBS.items():
        if knob.flag:
            value = {"type": type(knob.default), "metavar": "VALUE"}
            kind = {"action": "store_true"} if knob.default is False else value
            add(knob.flag, default=None, help=f"{knob.meaning} ({key})", **kind)
    add("--local-rank", "--local_rank", type=int, help="accepted for old launchers; unused")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------- writing
def _defaults():
    config = CN()
    config.BASE = [""]  # YAML files to start from, relative to the file that names them
    for key, knob in KNOBS.items():
        *sections, name = key.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, CN())
        node[name] = copy.deepcopy(knob.default)
    return config


SECTIONS = {key[:k] for key in KNOBS for k, letter in enumerate(key) if letter == "."}


def lookup(config, key):
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def _flatten(node, source, prefix=""):
    """(dotted key, value) of nested mappings."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if key not in KNOBS and isinstance(value, dict):
            yield from _flatten(value, source, f"{key}.")
        elif key in SECTIONS:
            raise UserError(f"{source}: the section {key} holds {value!r}; give it keys, or remove it")
        else:
            yield key, value


def _number(kind, value):
    """`value` as int or float where that loses nothing, else as it is."""
    if isinstance(value, str):  # YAML reads 1e-4 as text
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return kind(value) if kind is float or (math.isfinite(value) and value == int(value)) else value


def _typed(key, value, source):
    """`value` in the type of the key's default, or an error that names the key."""
    knob = KNOBS[key]
    default, kind = knob.default, knob.kind or type(knob.default)
    if value is None and default is None:
        return None
    if knob.mapping and isinstance(value, dict):
        return value
    if kind is float:
        value = _number(float, value)
    if kind is list and isinstance(value, tuple):
        value = list(value)
    if kind is str and value is None:
        value = ""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{source}: {key} must be of type {kind.__name__}, got {value!r}")
    if kind is list and default:
        number = type(default[0])
        value = [_number(number, v) for v in value]
        if len(value) != len(default) or not all(type(v) is number for v in value):
            raise UserError(f"{source}: {key} must be {len(default)} numbers such as {default}, got {value!r}")
    return value


def _backbone(config):
    return config.MODEL.TIMM.NAME if config.MODEL.TYPE == "timm" else config.MODEL.TYPE


def _put(config, key, value):
    section, _, name = key.rpartition(".")
    (lookup(config, section) if section else config)[name] = value


def _set(config, pairs, source):
    """Writes (key, value) pairs of one source: a file, --opts or the flags."""
    pairs, before, type_before = dict(pairs), _backbone(config), config.MODEL.TYPE
    results_before = f"results/{data_name(config)}"
    for key, value in pairs.items():
        if key not in KNOBS:
            raise UserError(f"{source}: unknown key {key}{did_you_mean(key.upper(), KNOBS)}")
        _put(config, key, _typed(key, value, source))
    # What a file below said of another backbone is not said of this one: its name, and how it is built.
    if _backbone(config) != before and config.MODEL.NAME and "MODEL.NAME" not in pairs:
        config.MODEL.NAME = _backbone(config)
    for key, knob in KNOBS.items():
        backbone = knob.takes_effect.get("MODEL.TYPE", config.MODEL.TYPE)
        if backbone == type_before != config.MODEL.TYPE and key not in pairs:
            _put(config, key, copy.deepcopy(knob.default))
    if "DATA.DATASET" in pairs and "DATA.SOURCES" not in pairs:
        config.DATA.SOURCES = []  # of a file below
    if config.RESULTS == results_before != f"results/{data_name(config)}" and "RESULTS" not in pairs:
        config.RESULTS = ""  # the folder of a run's own data (its config.json, say), which are not tested now


def _merge_file(config, path, above=()):
    path = Path(path)
    if path.resolve() in above:
        raise UserError(f"config file {path}: BASE leads back to the file itself")
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config file {path} is not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"config file {path} holds no keys")
    bases = content.pop("BASE", None) or []
    for base in [bases] if isinstance(bases, str) else bases:
        if base:
            _merge_file(config, path.parent / base, (*above, path.resolve()))
    _set(config, _flatten(content, path), path)


def _value(key, text):
    """What the text of `--opts` means: as in a YAML file, or a Python literal."""
    if key in KNOBS and isinstance(KNOBS[key].default, str) and not (KNOBS[key].mapping and text.startswith("{")):
        return text  # TAG 007 is a name
    for read in (ast.literal_eval, yaml.safe_load):
        try:
            return read(text)
        except (ValueError, SyntaxError, yaml.YAMLError):
            continue
    return text


def _pairs(opts):
    for text in opts:
        if text[:1] in ("{", "[", "(") and text[-1] not in "}])":
            raise UserError(f"--opts: quote the value that begins with {text!r}, so that the shell hands it on as one")
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs KEY VALUE; {opts[-1]!r} has no partner")
    return [(key, _value(key, text)) for key, text in zip(opts[::2], opts[1::2])]


def get_config(args, own_values=None):
    """The config that parsed arguments describe, validated and frozen.

    args needs `cfg`; `opts` (a list KEY VALUE ...) and the flags (by argparse's names) count where they are not None.
    own_values: function (config) -> {key: value}, what its backbone has as defaults (`models.own_values`).
    """
    config = _defaults()
    _merge_arguments(config, args)
    if own := own_values(config) if own_values else {}:
        config = _defaults()
        _set(config, own, f"MODEL.TYPE {config.MODEL.TYPE}")
        _merge_arguments(config, args)
    return _checked(config)


def _merge_arguments(config, args):
    _merge_file(config, args.cfg)
    _set(config, _pairs(getattr(args, "opts", None) or []), "--opts")
    flags = {k: getattr(args, knob.flag.strip("-").replace("-", "_"), None) for k, knob in KNOBS.items() if knob.flag}
    _set(config, {key: value for key, value in flags.items() if value is not None}, "command line")
    config.MODEL.NAME = config.MODEL.NAME or Path(args.cfg).stem
    config.RESULTS = config.RESULTS or f"results/{data_name(config)}"


def from_dict(content, source):
    """The config that :func:`to_dict` made, validated and frozen; what is not in it has its default.

    Raises:
        UserError: names the key, and `source`, the file it came from.
    """
    config = _defaults()
    _set(config, _flatten({k: v for k, v in content.items() if k != "BASE"}, source), source)
    return _checked(config)


def _checked(config):
    for key, knob in KNOBS.items():
        value = lookup(config, key)
        wrong = knob.allowed(value) if knob.allowed else None
        if wrong:
            raise UserError(f"{key} is {value!r}; {wrong}")
    config.freeze()
    return config


# --------------------------------------------------------------------------------------- sources
# Key of one of DATA.SOURCES -> key of the config, for that source alone: what its reader uses.
SOURCE_KEYS = {"dataset": "DATA.DATASET", "path": "DATA.DATA_PATH"} | {
    key.removeprefix("DATA.").lower(): key
    for key, knob in KNOBS.items()
    if key in ("DATA.ALLOW_MISSING", "DATA.ZIP_MODE") or ({"data", "DATA.DATASET"} & set(knob.takes_effect))
}
SOURCE_KEYS.pop("sources_mix")


def source_name(source):
    return source.get("name", source["dataset"])


def source_configs(config):
    """{name of a source: its config} for each of DATA.SOURCES; without them that of DATA.DATASET."""
    found = {}
    for source in config.DATA.SOURCES:
        name, one = source_name(source), config.clone()
        one.defrost()
        own = {SOURCE_KEYS[key]: value for key, value in source.items() if key != "name"}
        _set(one, {**own, "DATA.SOURCES": [], "DATA.SOURCES_MIX": "size"}, f"DATA.SOURCES {name}")
        found[name] = _checked(one)
    return found or {config.DATA.DATASET: config}


def data_name(config):
    """What the data are called: DATA.DATASET, or the names of DATA.SOURCES."""
    named = [] if sources(config.DATA.SOURCES) else map(source_name, config.DATA.SOURCES)  # `_checked` tells the fault
    return "+".join(named) or config.DATA.DATASET


# --------------------------------------------------------------------------------------- reading
def to_dict(config):
    """The config as plain dictionaries, for JSON and checkpoints."""
    return {k: to_dict(v) if isinstance(v, CN) else v for k, v in config.items()}


def backbone_name(config):
    """What a table calls the model: timm's name of it, or that of the run (internimage_b, say)."""
    return config.MODEL.TIMM.NAME if config.MODEL.TYPE == "timm" else config.MODEL.NAME


def differences(old, new):
    """{key: (old value, new value)} of two plain config dictionaries, for the keys that differ."""
    old, new = (dict(_flatten(c, "")) for c in (old, new))
    return {k: (old.get(k), new.get(k)) for k in sorted({*old, *new}) if old.get(k) != new.get(k)}


def without_effect(config, task, uses, device):
    """A line for each knob that is set and does nothing, by its `takes_effect`.

    task: of the dataset. uses: the keys that the backbone and the dataset use. device: its type, cpu or cuda.
    """
    lines = []
    for key, knob in KNOBS.items():
        value = lookup(config, key)
        off = not value and "data" not in knob.takes_effect  # a seed of 0 is one
        if off or value == knob.default:
            continue
        for condition, wanted in knob.takes_effect.items():
            if condition == "model":
                missing = None if key in uses else f"the backbone MODEL.TYPE {config.MODEL.TYPE} has no such thing"
            elif condition == "data":
                missing = None if key in uses else f"DATA.DATASET {config.DATA.DATASET} has no such thing"
            elif condition == "device":
                missing = None if device == wanted else f"it takes effect on a GPU, and this runs on {device}"
            elif condition == "task":
                missing = None if task == wanted else f"it is for {wanted} data, this is {task}"
            else:
                found = lookup(config, condition)
                missing = (
                    None if found == wanted else f"it takes effect with {condition} {wanted!r}, which is {found!r}"
                )
            if missing:
                lines.append(f"{key} {value!r} has no effect: {missing}")
                break
    return lines


# ----------------------------------------------------------------------------------------- the page
PAGE = """# What does an option do?

```
$PY main.py --cfg FILE --opts KEY VALUE KEY VALUE
```

An option is set by `--opts`, by its flag if the table shows one, or in a YAML file. A later source wins: the defaults
below, the backbone's defaults, the files of `BASE`, the file of `--cfg`, `--opts`, flags. An option that is set and has
no effect gives a warning. `$PY` is the Python of the set-up. `$PY config.py > ../docs/options.md` writes this page.
"""
TYPES = {str: "text", int: "whole number", float: "number", bool: "True, False", list: "list", dict: "mapping"}
CONDITIONS = {"model": "the backbone uses it", "data": "the dataset uses it", "device": "the device is a GPU"}


def _wanted(allowed, default):
    """What a function of allowed values asks for in words: its fault of a value that fails, or an empty text."""
    for value in (math.nan, "\0", [math.nan, math.nan], default):
        try:
            fault = allowed(value)
        except (TypeError, AttributeError, ValueError):  # for values of another type
            continue
        if fault:
            return fault.removeprefix("it must be ").removeprefix("choose one of ")
    return ""


def _condition(keys, wanted):
    if keys in CONDITIONS:
        return CONDITIONS[keys]
    keys = (keys,) if isinstance(keys, str) else keys
    wanted = _wanted(wanted, KNOBS[keys[0]].default) if callable(wanted) else wanted
    return f"{' or '.join(keys)} is {wanted or 'empty'}"


def options_page():
    """The text of docs/options.md: a row for each of KNOBS."""
    sections = {}
    for key, knob in KNOBS.items():
        default = "null" if knob.default is None else str(knob.default) or '""'
        allowed = knob.allowed and _wanted(knob.allowed, knob.default) or TYPES[knob.kind or type(knob.default)]
        conditions = [_condition(keys, wanted) for keys, wanted in knob.takes_effect.items()]
        flag = f" `{knob.flag}`" if knob.flag else ""
        meaning = knob.meaning.removeprefix("(new) ").replace("<", "&lt;")
        row = f"| `{key}`{flag} | `{default}` | {allowed} | {meaning} | {', '.join(conditions)} |"
        sections.setdefault(key.partition(".")[0] if "." in key else "Others", []).append(row)
    head = "| key and flag | default | allowed | meaning | takes effect if |\n|---|---|---|---|---|"
    return PAGE + "".join("\n".join((f"\n## {name}\n", head, *rows, "")) for name, rows in sections.items())


if __name__ == "__main__":
    print(options_page(), end="")
