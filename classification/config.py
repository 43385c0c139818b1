"""Every knob: default, meaning, allowed values, when it takes effect. The only module that writes a config.

Order of precedence, later wins: the defaults here, those of the data and the backbone, the files named in BASE, the
YAML of `--cfg`, `--opts KEY VALUE ...`, the flags given on the command line. Keys of the published InternImage
classification code keep their names and meanings, or are translated (`common/published.py`); others are marked (new).
"""

import argparse
import ast
import copy
import functools
import math
from dataclasses import dataclass, field
from operator import getitem
from pathlib import Path

import yaml
from yacs.config import CfgNode as CN

from common import published
from common.errors import UserError, did_you_mean
from common.files import read_yaml


# --------------------------------------------------------------------------------- allowed values
# Each makes, or is, a function: value -> what is wrong with it, or None.
def rule(holds, text):
    return lambda value: None if holds(value) else text


def one_of(*choices):
    return rule(lambda value: value in choices, f"choose one of {', '.join(map(str, choices))}")


def at_least(least):
    return rule(lambda value: value >= least, f"it must be at least {least}")  # NaN fails too


def above(low, most=math.inf):
    text = f"it must be above {low}" + (f" and at most {most}" if most < math.inf else "")
    return rule(lambda value: low < value <= most, text)


def between(low, high):
    return rule(lambda value: low <= value <= high, f"it must be between {low} and {high}")


def off_or_at_least(least):
    return rule(lambda value: value == 0 or value >= least, f"it must be 0 (off), or at least {least}")


def multiple_of(number):
    return rule(lambda value: value > 0 and value % number == 0, f"it must be a multiple of {number}")


fraction = rule(lambda value: 0 <= value < 1, "it must be at least 0 and below 1")
odd = rule(lambda value: value >= 1 and value % 2, "it must be odd: 1, 3, 5, ...")
on = rule(lambda value: value not in (None, 0) and value == value, "it must be on")
side_range = rule(
    lambda value: len(value) == 2 and all(type(v) in (int, float) for v in value) and 0 < value[0] <= value[1] <= 1,
    "it must be [smallest, largest] side within 0 to 1",
)
area_range = rule(lambda value: 0 < value[0] <= value[1] <= 1, "it must be [smallest, largest] area within 0 to 1")


def each(allowed):
    def wrong(values):
        found = next(filter(None, map(allowed, values)), None)
        return found and found.replace("it must", "each number must")

    return wrong


def block_numbers(value):
    good = all(type(v) is int and v >= 0 for v in value) and len(set(map(str, value))) == len(value)
    return None if good else "it must be a list of different whole numbers, counted from 0"


def names(value):
    if not all(isinstance(name, str) and name.strip() for name in value):
        return "it must be a list of names"
    twice = next((name for name in value if value.count(name) > 1), None)
    return f"{twice} is in it twice" if twice else None


def folder_below(value):
    """A relative path that stays below the folder it is appended to."""
    inside = value.isprintable() and not value.startswith("/") and not {"..", "."} & set(value.split("/"))
    return None if inside else "it must be the name of a folder, without .. and without a / in front"


def not_empty(value):
    return None if value.strip() else "it must not be empty"


def run_folder(value):
    return not_empty(value) or folder_below(value)


def other_than(*choices):
    def wrong(value):
        values = value.values() if isinstance(value, dict) else [value]  # a mapping: of any label
        return None if any(v not in choices for v in values) else f"it must be other than {value!r}"

    return wrong


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
    takes_effect: the conditions under which it does: another key, or several of which one is enough, and the value or
        one of the functions above; `task`, the task of the dataset; `model`, that the backbone uses it; `data`, that
        the dataset uses it; `device`, the type of device. If one does not hold, a value other than the default gives
        a warning.
    kind: the type besides None, where the default is None. mapping: a mapping is allowed as well.
    xrays: the default for X-rays, where `default` is for photographs.
    flag: its own flag of main.py.
    """

    default: object
    meaning: str
    allowed: object = None
    takes_effect: dict = field(default_factory=dict)
    kind: type = None
    mapping: bool = False
    flag: str = ""
    xrays: object = None


XRAYS, PHOTOS = {"task": "multilabel"}, {"task": "single_label"}
INTERN_IMAGE, TIMM = {"MODEL.TYPE": "intern_image"}, {"MODEL.TYPE": "timm"}
MODEL, DATA, GPU = {"model": True}, {"data": True}, {"device": "cuda"}
STUDIES = {"DATA.UNIT": "study"}
ATTENDED = {("MODEL.HEAD", "MODEL.FUSION"): one_of("label_attention", "attention")}
STEP = {"TRAIN.LR_SCHEDULER.NAME": "step"}
ERASING = {"AUG.REPROB": above(0)}
MIXED = {("AUG.MIXUP", "AUG.CUTMIX", "AUG.CUTMIX_MINMAX"): on}
SGD, ADAMW = {"TRAIN.OPTIMIZER.NAME": "sgd"}, {"TRAIN.OPTIMIZER.NAME": "adamw"}

# fmt: off
KNOBS = {
    # ------------------------------------------------------------------------------------- data
    "DATA.DATASET": Knob("imagenet", "a file in dataset/: mimic_cxr, cxr_lt, chexpert, nih, padchest, vindr, brax, "
                         "imagenet, inat18", flag="--dataset"),
    "DATA.DATA_PATH": Knob("", "the data folder: a release, or its files/", flag="--data-path"),
    "DATA.SOURCES": Knob([], "(new) several releases at once, instead of DATASET and DATA_PATH: [{dataset: mimic_cxr, "
                         "path: FOLDER}, ...]; a source may have its own name, csv, split_seed, ...", sources),
    "DATA.SOURCES_MIX": Knob("size", "(new) an epoch of several sources: every image once (size), or as many of each "
                             "source (even)", one_of("size", "even"), takes_effect=DATA),
    "DATA.SAMPLER": Knob("uniform", "(new) how often an image is in an epoch: once (uniform), or by the rarest of its "
                         "labels, in inverse proportion (balanced) or to the root of it (sqrt)"),
    "DATA.CXR_LT": Knob("2024-1", "(new) CXR-LT: year and task", one_of("2023", "2024-1", "2024-2"), takes_effect=DATA),
    "DATA.IMAGES": Knob("", "(new) CXR-LT: the folder of MIMIC-CXR-JPG, or of its small copy, if it is not beside the "
                        "tables", takes_effect=DATA),
    "DATA.CSV": Knob("", "(new) a table of your own instead of the official ones: path, split, labels[, subject_id]",
                     takes_effect={"DATA.DATASET": "mimic_cxr"}),
    "DATA.LABELER": Knob("chexpert", "(new) which official label file", one_of("chexpert", "negbio"),
                          takes_effect=DATA),
    "DATA.TEST_LABELER": Knob("same", "(new) labels of the test split: those, or mimic-cxr-*-test-set-labeled.csv",
                              one_of("same", "radiologist"), takes_effect=DATA),
    "DATA.UNIT": Knob("image", "(new) what is one question with one answer: an image, or a study with all its images",
                      one_of("image", "study"), takes_effect=XRAYS),
    "DATA.MAX_VIEWS": Knob(4, "(new) images of a study at most; of more, training samples anew each epoch, evaluation "
                           "takes one of each view first", at_least(1), takes_effect=STUDIES),
    "DATA.VIEWS": Knob("all", "(new) which views; if the view is blank, the texts of the metadata decide",
                       one_of("all", "frontal", "AP", "PA", "lateral"), takes_effect=XRAYS),
    "DATA.LABELS": Knob([], "(new) label columns, also those that only this release has; empty: the 14 of CheXpert",
                        names, takes_effect=XRAYS),
    "DATA.APPROXIMATE_LABELS": Knob(True, "(new) False: labels with only an approximate counterpart in the release "
                                    "are unknown",
                                    takes_effect=DATA),
    "DATA.SPLIT_SEED": Knob(None, "(new) seed of the random splits per patient, where a release has none; "
                            "null: 0 for a validation split, and a release without any splits is all test",
                            at_least(0), kind=int, takes_effect=DATA),
    "DATA.READERS": Knob("majority", "(new) VinDr: a label is positive if most readers marked it, or if any did",
                         one_of("majority", "any"), takes_effect=DATA),
    "DATA.LABELLED_BY": Knob("physicians", "(new) PadChest: only images labelled by physicians, or all images",
                             one_of("physicians", "all"), takes_effect=DATA),
    "DATA.UNCERTAIN": Knob("zeros", "(new) what -1 becomes: zeros, ones, ignore (masked in loss and metrics), smooth; "
                           "for all labels, or per label: {default: zeros, Consolidation: ignore}",
                           takes_effect=XRAYS, mapping=True),
    "DATA.MISSING": Knob("zeros", "(new) what a blank becomes, in the same form", takes_effect=XRAYS, mapping=True),
    "DATA.NO_FINDING_CLEARS": Knob(False, "(new) if No Finding is 1, blank labels become 0, except Support Devices",
                                   takes_effect=XRAYS | {"DATA.MISSING": other_than("zeros")}),
    "DATA.PSEUDO_LABELS": Knob("", "(new) a table of predict.py whose probabilities fill the unknown labels of train",
                               takes_effect=XRAYS),
    "DATA.IMAGE_FORMAT": Knob("auto", "(new) which images of a release to read",
                              one_of("auto", "jpg", "dcm", "png", "tif"), takes_effect=DATA),
    "DATA.DICOM_RECIPE": Knob("window", "(new) window: as displayed; mimic_jpg: as MIMIC-CXR's JPG release was made",
                              one_of("window", "mimic_jpg"), takes_effect=DATA),
    "DATA.DICOM_WINDOW": Knob(0, "(new) which window or VOI LUT of a DICOM that has several", at_least(0),
                              takes_effect=DATA | {"DATA.DICOM_RECIPE": "window"}),
    "DATA.ON_BAD_IMAGE": Knob("error", "(new) an image that cannot be read: error, or skip (logged and counted)",
                              one_of("error", "skip")),
    "DATA.ALLOW_MISSING": Knob(False, "(new) leave out images whose file is missing; every file is looked up at start",
                               takes_effect=XRAYS),
    "DATA.LIMIT": Knob(0, "(new) at most this many images of each split, of randomly chosen patients; 0: all",
                       at_least(0), takes_effect=XRAYS),
    "DATA.ZIP_MODE": Knob(False, "read the images from <DATA_PATH>/*.zip (uncompressed); photographs: from train.zip "
                          "and val.zip", flag="--zip"),
    "DATA.IMG_ON_MEMORY": Knob(False, "read all encoded images into shared memory at start, once a node"),
    "DATA.BATCH_SIZE": Knob(128, "images, or studies by DATA.UNIT, per GPU and forward pass", at_least(1),
                            flag="--batch-size"),
    "DATA.IMG_SIZE": Knob(224, "side of the model's input in pixels; timm: the backbone's own unless set",
                          between(32, 4096)),
    "DATA.INTERPOLATION": Knob("bicubic", "how images are resized", one_of("bicubic", "bilinear")),
    "DATA.RESIZE": Knob("squeeze", "(new) how an X-ray becomes a square: squeeze, or pad (aspect kept, black borders)",
                        one_of("squeeze", "pad"), takes_effect=XRAYS),
    "DATA.NUM_WORKERS": Knob(8, "loading processes per GPU", at_least(0)),
    "DATA.PIN_MEMORY": Knob(True, "batches in memory that a GPU reads directly"),
    "DATA.PREFETCH": Knob(1, "(new) batches copied to the GPU while it computes", between(0, 100), takes_effect=GPU),
    # ------------------------------------------------------------------------------------ model
    "MODEL.TYPE": Knob("intern_image", "a file in models/: intern_image, timm"),
    "MODEL.NAME": Knob("", "folder of the runs below OUTPUT; empty: the name of the YAML file", folder_below),
    "MODEL.PRETRAINED": Knob("", "weights to start from, such as a published checkpoint", flag="--pretrained"),
    "MODEL.RESUME": Knob("", "checkpoint of this project to continue from, or to evaluate", flag="--resume"),
    "MODEL.NUM_CLASSES": Knob(1000, "labels, or classes", at_least(1)),
    "MODEL.HEAD": Knob("pool", "(new) from the last feature maps to logits: as the backbone does (pool), or by a query "
                       "per label that attends to them (label_attention)", one_of("pool", "label_attention")),
    "MODEL.HEAD_WIDTH": Knob(256, "(new) channels of label_attention and of MODEL.FUSION attention", multiple_of(32),
                             takes_effect=ATTENDED),
    "MODEL.FUSION": Knob("mean", "(new) how the images of a study become one answer: mean or largest of their logits, "
                         "or the mean and what queries per label find by a transformer over all their feature maps "
                         "(attention)",
                         one_of("mean", "max", "attention"), takes_effect=STUDIES),
    "MODEL.FUSION_LAYERS": Knob(2, "(new) layers of that transformer", at_least(1),
                                takes_effect={"MODEL.FUSION": "attention"}),
    "MODEL.DROP_RATE": Knob(0.0, "dropout", fraction, takes_effect=MODEL),
    "MODEL.DROP_PATH_RATE": Knob(0.1, "stochastic depth of the last block (MODEL.DROP_PATH_TYPE)", fraction,
                                 takes_effect=MODEL),
    "MODEL.DROP_PATH_TYPE": Knob("linear", "stochastic depth rises linearly to the last block, or is uniform",
                                 one_of("linear", "uniform"), takes_effect=INTERN_IMAGE),
    "MODEL.LABEL_SMOOTHING": Knob(0.1, "of class targets (for labels: TRAIN.LOSS smooth_bce)", fraction,
                                  takes_effect=PHOTOS),

    "MODEL.INTERN_IMAGE.CHANNELS": Knob(64, "of the first level; each further level has twice as many", at_least(4),
                                        takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.DEPTHS": Knob([4, 4, 18, 4], "blocks per level", each(at_least(1)), takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.GROUPS": Knob([4, 8, 16, 32], "DCNv3 groups per level", each(at_least(1)),
                                      takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.LAYER_SCALE": Knob(None, "initial value of the scale of each branch, or None", at_least(0),
                                           kind=float, takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.OFFSET_SCALE": Knob(1.0, "stretches the sampling grid and offsets", above(0),
                                            takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.MLP_RATIO": Knob(4.0, "width of the MLP relative to the channels", at_least(0.25),
                                         takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.POST_NORM": Knob(False, "norms after the branches: S, B, L, XL, G", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.RES_POST_NORM": Knob(False, "norms on both sides: H", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.DW_KERNEL_SIZE": Knob(None, "of the depthwise convolution; H, G: 5", odd, kind=int,
                                              takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.USE_CLIP_PROJECTOR": Knob(False, "attention pooling: H, G", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.LEVEL2_POST_NORM": Knob(
        False, "a norm after the blocks of LEVEL2_POST_NORM_BLOCK_IDS: H, G",
        takes_effect=INTERN_IMAGE | {"MODEL.INTERN_IMAGE.LEVEL2_POST_NORM_BLOCK_IDS": other_than(None, [])}),
    "MODEL.INTERN_IMAGE.LEVEL2_POST_NORM_BLOCK_IDS": Knob(
        None, "blocks of the third level, counted from 0; H, G: 5, 11, 17, ...", block_numbers, kind=list,
        takes_effect=INTERN_IMAGE | {"MODEL.INTERN_IMAGE.LEVEL2_POST_NORM": True}),
    "MODEL.INTERN_IMAGE.CENTER_FEATURE_SCALE": Knob(False, "learnt share of the input beside the operator's output: "
                                                    "H, G", takes_effect=INTERN_IMAGE),
    "MODEL.INTERN_IMAGE.REMOVE_CENTER": Knob(False, "no sampling point in the middle", takes_effect=INTERN_IMAGE),
    "MODEL.TIMM.NAME": Knob("", "(new) which backbone: a name of timm's, such as densenet121 or resnet50.a1_in1k",
                            takes_effect=TIMM),
    "MODEL.TIMM.DOWNLOAD": Knob(False, "(new) start from the weights that timm names, fetched from Hugging Face",
                                takes_effect=TIMM | {"MODEL.PRETRAINED": ""}),
    # --------------------------------------------------------------------------------- training
    "TRAIN.EPOCHS": Knob(300, "passes over the train split", at_least(1)),
    "TRAIN.START_EPOCH": Knob(0, "epoch with which a new run starts, counted from 0", at_least(0)),
    "TRAIN.WARMUP_EPOCHS": Knob(20, "epochs of rising learning rate", at_least(0)),
    "TRAIN.WEIGHT_DECAY": Knob(0.05, "not on norms and biases", at_least(0)),
    "TRAIN.BASE_LR": Knob(5e-4, "peak learning rate at a batch of LR_REFERENCE_BATCH", at_least(0), xrays=1e-4),
    "TRAIN.WARMUP_LR": Knob(5e-7, "learning rate at which warm-up starts, scaled as BASE_LR", at_least(0),
                             takes_effect={"TRAIN.WARMUP_EPOCHS": above(0)}),
    "TRAIN.MIN_LR": Knob(5e-6, "learning rate at which the schedule ends, scaled as BASE_LR", at_least(0)),
    # 512 is the published rule for ImageNet; it would turn the 1e-4 of a batch of 32 into 6e-6.
    "TRAIN.LR_REFERENCE_BATCH": Knob(512, "(new) rates are multiplied by batch x GPUs x accumulation / this",
                                      at_least(1), xrays=32),
    "TRAIN.CLIP_GRAD": Knob(5.0, "largest norm of the gradient; 0: no clipping", at_least(0)),
    "TRAIN.ACCUMULATION_STEPS": Knob(1, "forward passes per update", at_least(1), flag="--accumulation-steps"),
    "TRAIN.USE_CHECKPOINT": Knob(False, "recompute activations in the backward pass to save memory", takes_effect=MODEL,
                                 flag="--use-checkpoint"),
    "TRAIN.COMPILE": Knob(False, "(new) torch.compile: fewer passes over memory; the first update takes minutes, once"),
    "TRAIN.FSDP": Knob(False, "(new) each GPU keeps a shard of weights, gradients, moments and EMA, by PyTorch's "
                       "fully_shard: for models that one GPU cannot hold; started by jobs.launch, torchrun or srun"),
    "TRAIN.FSDP_OFFLOAD": Knob(False, "(new) the shards are in CPU memory between their uses: much slower",
                               takes_effect={"TRAIN.FSDP": True}),
    "TRAIN.GRADIENT_DTYPE": Knob("float32", "(new) precision in which the gradients of several GPUs are added",
                                 one_of("float32", "bfloat16")),
    "TRAIN.AUTO_RESUME": Knob(True, "resume from the run's last checkpoint"),
    "TRAIN.STOP_AFTER": Knob(0, "(new) early stopping: end after so many epochs without a better score (BEST_BY) of "
                             "the model or its EMA; 0: never", at_least(0)),
    "TRAIN.FREEZE": Knob([], "(new) modules that do not train, such as [patch_embed, levels.0]; their norms "
                         "and drop path run as in evaluation", names),
    "TRAIN.RAND_INIT_FT_HEAD": Knob(False, "a classifier that a file does not have starts from a thousandth of its "
                                    "initial weights", takes_effect={"MODEL.PRETRAINED": other_than("")}),
    "TRAIN.LOSS": Knob("bce", "(new) loss of multi-label tasks, a row of utils_multilabel.LOSSES", takes_effect=XRAYS),
    "TRAIN.LOSS_OPTIONS": Knob({}, "(new) parameters of the loss, such as {gamma: 2.0}", takes_effect=XRAYS,
                               mapping=True),
    "TRAIN.BEST_BY": Knob("mean_auc", "(new) the metric that chooses best_ckpt.pth, by its key in metrics.json; of "
                          "classes acc1 unless set"),
    "TRAIN.POS_WEIGHT_CAP": Knob(0.0, "(new) weigh positives by negatives/positives of the label, at most this; 0: no "
                                 "weights", off_or_at_least(1), takes_effect=XRAYS),
    "TRAIN.LR_SCHEDULER.NAME": Knob("cosine", "how the rate falls", one_of("cosine", "linear", "step")),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Knob(30, "epochs between decays", at_least(1), takes_effect=STEP),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Knob(0.1, "factor of a decay", above(0, most=1), takes_effect=STEP),
    "TRAIN.OPTIMIZER.NAME": Knob("adamw", "algorithm of the updates", one_of("adamw", "sgd")),
    "TRAIN.OPTIMIZER.EPS": Knob(1e-8, "added to the denominator", above(0), takes_effect=ADAMW),
    "TRAIN.OPTIMIZER.BETAS": Knob([0.9, 0.999], "decay of the moments", each(fraction), takes_effect=ADAMW),
    "TRAIN.OPTIMIZER.MOMENTUM": Knob(0.9, "Nesterov's", fraction, takes_effect=SGD),
    "TRAIN.OPTIMIZER.DCN_LR_MUL": Knob(None, "factor on the rates of the operator's offsets and center scales",
                                       at_least(0), kind=float, takes_effect=MODEL),
    "TRAIN.LR_LAYER_DECAY": Knob(False, "smaller rates for earlier blocks", takes_effect=MODEL),
    "TRAIN.LR_LAYER_DECAY_RATIO": Knob(0.875, "factor from one block to the one before", above(0, most=1),
                                       takes_effect={"TRAIN.LR_LAYER_DECAY": True}),
    "TRAIN.BACKBONE_LR_SCALE": Knob(1.0, "(new) factor on the rate of the backbone, behind which label_attention or "
                                    "MODEL.FUSION attention comes", above(0), takes_effect=MODEL),
    "TRAIN.EMA.ENABLE": Knob(False, "keep, validate and save an exponential moving average of the weights"),
    "TRAIN.EMA.DECAY": Knob(0.9998, "of the EMA, per update", fraction, takes_effect={"TRAIN.EMA.ENABLE": True}),
    "TRAIN.EMA.WARMUP": Knob(False, "(new) DECAY rises from 0 with the updates, as in timm: for short runs",
                             takes_effect={"TRAIN.EMA.ENABLE": True}),
    # ----------------------------------------------------------------------------- augmentation
    "AUG.COLOR_JITTER": Knob(0.4, "brightness and contrast; of photographs only without AUTO_AUGMENT", between(0, 1),
                             xrays=0.0),
    "AUG.GAMMA": Knob(0.0, "(new) X-rays: gamma between 1/(1 + this) and 1 + this", at_least(0), takes_effect=XRAYS),
    "AUG.ROTATION": Knob(0.0, "(new) X-rays: rotation by up to this many degrees to either side", between(0, 180),
                         takes_effect=XRAYS),
    "AUG.SHIFT": Knob(0.0, "(new) X-rays: shift by up to this fraction of the side", between(0, 1), takes_effect=XRAYS),
    "AUG.AUTO_AUGMENT": Knob("rand-m9-mstd0.5-inc1", "photographs: timm's RandAugment string", takes_effect=PHOTOS),
    "AUG.REPROB": Knob(0.25, "probability of random erasing", between(0, 1), xrays=0.1),
    "AUG.REMODE": Knob("pixel", "values of the erased rectangles", one_of("const", "rand", "pixel"),
                       takes_effect=ERASING),
    "AUG.RECOUNT": Knob(1, "largest number of rectangles", at_least(1), takes_effect=ERASING),
    "AUG.CROP_SCALE": Knob([0.08, 1.0], "(new) area of the random crop relative to the image", area_range,
                           xrays=[0.8, 1.0]),
    "AUG.HFLIP": Knob(0.5, "(new) probability of a horizontal flip", between(0, 1), xrays=0.0),
    "AUG.MIXUP": Knob(0.8, "strength of mixup; 0: off", at_least(0), xrays=0.0),
    "AUG.CUTMIX": Knob(1.0, "strength of cutmix; 0: off", at_least(0), xrays=0.0),
    "AUG.CUTMIX_MINMAX": Knob(None, "[smallest, largest] side of the pasted part, relative to the image; then "
                              "AUG.CUTMIX has no effect", side_range, kind=list),
    "AUG.MIXUP_MODE": Knob("batch", "mix a whole batch by one ratio (batch), or each pair, or each image by its own",
                           one_of("batch", "pair", "elem"), takes_effect=MIXED),
    "AUG.MIXUP_PROB": Knob(1.0, "probability that a batch is mixed at all", between(0, 1), takes_effect=MIXED),
    "AUG.MIXUP_SWITCH_PROB": Knob(0.5, "fraction of the mixed batches that gets cutmix, if both are on", between(0, 1),
                                  takes_effect={"AUG.MIXUP": above(0), ("AUG.CUTMIX", "AUG.CUTMIX_MINMAX"): on}),
    "AUG.MIXUP_OFF_EPOCH": Knob(0, "(new) how many epochs mix batches, from the first on; 0: all", at_least(0),
                                takes_effect=MIXED),
    "AUG.MEAN": Knob([0.485, 0.456, 0.406], "of normalisation: ImageNet's; timm: the backbone's own unless set",
                     each(between(0, 1))),
    "AUG.STD": Knob([0.229, 0.224, 0.225], "of normalisation, from the same source", each(above(0))),
    # --------------------------------------------------------------------------- testing, other
    "TEST.EMA": Knob(False, "--eval takes the EMA weights: ema_best_ckpt.pth of the run, or those in --resume",
                     takes_effect={"EVAL_MODE": True}, flag="--ema"),
    "TEST.TTA": Knob(False, "(new) --eval with test-time augmentation: the mean probability over six shifts and scales",
                     takes_effect={"EVAL_MODE": True} | XRAYS, flag="--tta"),
    "TEST.REPORT": Knob(True, "(new) --eval ends with the report of report.py"),
    "TEST.CROP": Knob(True, "take the centre: of X-rays resized to 8/7 of the size, of photographs whose short side is "
                      "the size; False: the whole image", xrays=False),
    "AMP_OPT_LEVEL": Knob("O1", "O0: float32, O1: mixed precision", one_of("O0", "O1"), flag="--amp-opt-level"),
    "AMP_DTYPE": Knob("auto", "(new) auto: what is fast on the device", one_of("auto", "bfloat16", "float16"),
                      takes_effect={"AMP_OPT_LEVEL": "O1"}),
    "TF32": Knob(False, "(new) float32 products with 10 bits of mantissa, which is faster", takes_effect=GPU),
    "DETERMINISTIC": Knob(False, "(new) two identical runs on a GPU give the same bits too; slower"),
    "OUTPUT": Knob("output", "root of all runs; the folder of a run is OUTPUT/MODEL.NAME/TAG", not_empty,
                   flag="--output"),
    "RESULTS": Knob("", "(new) evaluations are written to RESULTS/evaluation_<timestamp>; empty: results/<dataset>"),
    "TAG": Knob("default", "name of this run", run_folder, flag="--tag"),
    "SAVE_FREQ": Knob(1, "epochs between ckpt_epoch_N.pth; last_ckpt.pth is written after every epoch", at_least(1)),
    "SAVE_KEEP": Knob(0, "(new) how many ckpt_epoch_N.pth to keep, the newest; 0: all", at_least(0)),
    "LOG.TENSORBOARD": Knob(False, "(new) write epochs and a batch for TensorBoard too, which must be installed"),
    "EVAL_FREQ": Knob(1, "epochs between validations; the last epoch is always validated", at_least(1)),
    "PRINT_FREQ": Knob(10, "updates between lines of the log", at_least(1)),
    "SEED": Knob(0, "of all random numbers", between(0, 2**32 - 1)),
    "CFG": Knob("", "(new) name of the file of --cfg, filled in at start: another file does not resume the run"),
    "EVAL_MODE": Knob(False, "evaluate on the test split instead of training", flag="--eval"),
    "THROUGHPUT_MODE": Knob(False, "measure the training step, and the loading of --data-path, and stop",
                            flag="--throughput"),
    "THROUGHPUT_PLAN": Knob(False, "(new) compute instead what training needs in the memory of a GPU; needs none",
                            takes_effect={"THROUGHPUT_MODE": True}, flag="--plan"),
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
    add("--cfg", metavar="FILE", help="YAML file of the experiment; --eval --resume takes that of the checkpoint")
    add("--opts", nargs="+", action="extend", metavar="KEY VALUE", help="config keys to change, e.g. TRAIN.EPOCHS 10")
    for key, knob in KNOBS.items():
        if knob.flag:
            value = {"type": type(knob.default), "metavar": "VALUE"}
            kind = {"action": "store_true"} if knob.default is False else value
            add(knob.flag, default=None, help=f"{knob.meaning} ({key})", **kind)
    for flag, key in published.FLAGS.items():
        other = f"--{flag[2:].replace('-', '_')}"  # as older launchers write it
        add(flag, other, dest=key, nargs="?", const="True", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.cfg and not (args.eval and args.resume):
        parser.error("the following arguments are required: --cfg (only --eval --resume CHECKPOINT goes without)")
    return args


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
    return functools.reduce(getitem, key.split("."), config)


def _flatten(node, source, prefix=""):
    """(dotted key, value) of nested mappings."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if key not in KNOBS and isinstance(value, dict):
            yield from _flatten(value, source, f"{key}.")
        elif key in SECTIONS:
            raise UserError(f"{source}: the section {key} is {value!r}; give it keys, or remove it")
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
    if kind is str and type(value) is int and knob.allowed and not knob.allowed(str(value)):
        value = str(value)  # a year
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        brackets = ", in brackets: [...]" if kind is list else ""
        raise UserError(f"{source}: {key} must be of type {kind.__name__}{brackets}, got {value!r}")
    if kind is list and default:
        number = type(default[0])
        value = [_number(number, v) for v in value]
        if len(value) != len(default) or not all(type(v) is number for v in value):
            raise UserError(f"{source}: {key} must be {len(default)} numbers such as {default}, got {value!r}")
    if any(isinstance(v, float) and not math.isfinite(v) for v in (value if kind is list else [value])):
        raise UserError(f"{source}: {key} is {value!r}; it must be finite")
    return value


def _backbone(config):
    return config.MODEL.TIMM.NAME if config.MODEL.TYPE == "timm" else config.MODEL.TYPE


def _put(config, key, value):
    *sections, name = key.split(".")
    functools.reduce(getitem, sections, config)[name] = value


def _set(config, pairs, source):
    """Write (key, value) pairs into the config, each in the type of its key. source: named in errors."""
    for key, value in pairs:
        if key not in KNOBS:
            near = did_you_mean(key.upper(), [*KNOBS, *published.TABLE])
            raise UserError(f"{source}: unknown key {key}{near}")
        _put(config, key, _typed(key, value, source))


def _override(config, pairs, source, notes):
    """:func:`_set` of a file, --opts or the flags over the sources before it, published keys translated.

    What those set for another backbone or other data does not carry over.
    """
    before, pairs = config.clone(), dict(published.translate(pairs, KNOBS, source, notes))
    _set(config, pairs.items(), source)
    if "DATA.DATASET" in pairs and "DATA.SOURCES" not in pairs:
        config.DATA.SOURCES = []
    for key, value in _outdated(before, config):
        if key not in pairs:
            _put(config, key, value)


def _outdated(before, config):
    """(key, value to replace it) of what `before` holds only for its own backbone or data, if `config` has others."""
    if _backbone(config) != _backbone(before) and before.MODEL.NAME:
        yield "MODEL.NAME", _backbone(config)
    if config.MODEL.TYPE != before.MODEL.TYPE:
        for key, knob in KNOBS.items():
            if knob.takes_effect.get("MODEL.TYPE") == before.MODEL.TYPE:
                yield key, copy.deepcopy(knob.default)
    if before.RESULTS == f"results/{data_name(before)}" != f"results/{data_name(config)}":
        yield "RESULTS", ""  # the default folder of other data, from the config.json of a run


class _Loader(yaml.SafeLoader):
    """Without keys that are given twice: YAML would use the last and drop the others."""

    def construct_mapping(self, node, deep=False):
        names = [name.value for name, _ in node.value]
        for name, _ in node.value:
            if names.count(name.value) > 1 and name.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{name.value} is given twice", name.start_mark)
        return super().construct_mapping(node, deep)


def _merge_file(config, path, notes, above=()):
    path = Path(path)
    if path.resolve() in above:
        raise UserError(f"config file {path}: BASE leads back to the file itself")
    content = read_yaml(path, f"config file {path}", _Loader)
    bases = content.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"config file {path}: BASE is {bases!r}; it must be a list of YAML files")
    for base in filter(None, bases):
        _merge_file(config, path.parent / base, notes, (*above, path.resolve()))
    config.CFG = ""  # of a base
    pairs = (
        (key, _value(key, value, path) if isinstance(value, str) else value) for key, value in _flatten(content, path)
    )
    _override(config, pairs, path, notes)


def _value(key, text, source="--opts"):
    """The value of a text: a Python literal, which YAML reads as text (None, 1e-4, (1, 2)), or as in a YAML file."""
    if key in KNOBS and isinstance(KNOBS[key].default, str) and not (KNOBS[key].mapping and text.startswith("{")):
        return text  # TAG 007 is a name
    for read in (ast.literal_eval, yaml.safe_load):
        try:
            return read(text)
        except (ValueError, SyntaxError, yaml.YAMLError):
            continue
    if text.startswith(("{", "[", "(")):
        raise UserError(f"{source}: {key} {text!r} cannot be read; check its brackets, quotes and commas")
    return text


def _pairs(opts):
    for k, text in enumerate(opts):
        key, equals, value = text.partition("=")
        if equals and (key.upper() in KNOBS or text == "="):
            raise UserError(f"--opts takes KEY VALUE without an equals sign, such as {key or opts[k - 1]} {value or 3}")
        if text.startswith(("{", "[", "(")) and not text.endswith(("}", "]", ")")):
            if any(later.endswith(("}", "]", ")")) for later in opts[k:]):
                raise UserError(f"--opts: quote the value that begins with {text!r}, so the shell passes it as one")
            raise UserError(f"--opts: {text!r} has a bracket that is not closed")
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs KEY VALUE; {opts[-1]!r} has no partner")
    return [(key, _value(key, text)) for key, text in zip(opts[::2], opts[1::2])]


def get_config(args, *own_values, saved=None, notes=None):
    """The config that parsed arguments describe, validated and frozen.

    args needs `cfg`; `opts` (a list KEY VALUE ...) and the flags (by argparse's names) count where they are not None.
    saved: what :func:`to_dict` made, in place of the file `cfg`, and what it is of: (content, path).
    own_values: functions config -> {key: default} of its data and of its backbone (`dataset.build.own_values`,
        `models.own_values`).
    notes: a list to which a line is added for each option of the published code that does something else here.
    """
    notes = [] if notes is None else notes
    config = _checked(_with_arguments(_defaults(), args, saved, notes))
    if own := [pair for values in own_values for pair in values(config).items()]:
        defaults = _defaults()
        _set(defaults, own, "default")
        config = _checked(_with_arguments(defaults, args, saved, []))
    return config


def _with_arguments(config, args, saved, notes):
    """`config` with the file, or the saved config, and the other arguments written over it."""
    if saved:
        _set(config, _known_pairs(*saved), saved[1])
    else:
        _merge_file(config, args.cfg, notes)
    _override(config, _pairs(getattr(args, "opts", None) or []), "--opts", notes)
    flags = {k: getattr(args, knob.flag.strip("-").replace("-", "_"), None) for k, knob in KNOBS.items() if knob.flag}
    flags |= {key: _value(key, value) for key in published.FLAGS.values() if (value := getattr(args, key, None))}
    given = {key: value for key, value in flags.items() if value is not None}
    _override(config, given.items(), "command line", notes)
    config.MODEL.NAME = config.MODEL.NAME or Path(args.cfg).stem
    config.RESULTS = config.RESULTS or f"results/{data_name(config)}"
    config.CFG = config.CFG or Path(args.cfg or "").name
    return config


def _known_pairs(content, source):
    pairs = _flatten(content, source)
    return [(key, value) for key, value in pairs if key in KNOBS and not _outlived(key, value)]


def _outlived(key, value):
    """Whether a saved option of training alone, which a trained model does not need, has a value no longer allowed."""
    if not key.startswith(("TRAIN.", "AUG.")) or key in ("AUG.MEAN", "AUG.STD"):
        return False
    try:
        value = _typed(key, value, "")
    except UserError:
        return True
    return bool(value is not None and KNOBS[key].allowed and KNOBS[key].allowed(value))


def from_dict(content, source):
    """The config that :func:`to_dict` made, perhaps in another version, validated and frozen.

    Keys that this version does not have are left out, those that are missing have their defaults, and so have options
    of training alone whose value is no longer allowed; :func:`unfamiliar` names all three.

    UserError: names the key, and `source`, the file it came from.
    """
    config = _defaults()
    _set(config, _known_pairs(content, source), source)
    return _checked(config, f"{source}: ")


def unfamiliar(content, source):
    """A line that names the keys by which a saved config differs from those of this version; empty if none does."""
    pairs = {key: value for key, value in _flatten(content, source) if key != "BASE"}
    outlived = [f"{key} {value!r}" for key, value in pairs.items() if key in KNOBS and _outlived(key, value)]
    unknown, missing = [key for key in pairs if key not in KNOBS], [key for key in KNOBS if key not in pairs]
    parts = [f"has {', '.join(unknown)}, which this version does not have and ignores"] if unknown else []
    parts += [f"lacks {', '.join(missing)}, for which the defaults are used"] if missing else []
    parts += [f"has {', '.join(outlived)}, no longer allowed: the defaults are used"] if outlived else []
    return f"{source}: its config {', and '.join(parts)}" if parts else ""


def refuse_another_file(saved, config, path):
    """Raise a UserError if the checkpoint `path`, with the config `saved`, is of a run of another --cfg than now."""
    begun = saved.get("CFG") or config.CFG
    if begun != config.CFG:
        raise UserError(
            f"{path} is of a run of {begun}, not of {config.CFG}: use another --tag or MODEL.NAME, or continue that "
            f"run on purpose with --resume {path}"
        )


def _checked(config, source=""):
    for key, knob in KNOBS.items():
        value = lookup(config, key)
        if value is not None and knob.allowed and (wrong := knob.allowed(value)):
            raise UserError(f"{source}{key} is {value!r}; {wrong}")
    config.freeze()
    return config


# --------------------------------------------------------------------------------------- sources
# Key of one of DATA.SOURCES -> key of the config, for that source alone: what its reader uses.
SOURCE_KEYS = {"dataset": "DATA.DATASET", "path": "DATA.DATA_PATH"} | {
    key.removeprefix("DATA.").lower(): key
    for key, knob in KNOBS.items()
    if (
        key in ("DATA.ALLOW_MISSING", "DATA.ZIP_MODE", "DATA.PSEUDO_LABELS")
        or {"data", "DATA.DATASET"} & set(knob.takes_effect)
    )
    and key not in ("DATA.SOURCES_MIX", "DATA.DICOM_RECIPE", "DATA.DICOM_WINDOW")
}


def source_name(source):
    return source.get("name", source["dataset"])


def source_configs(config):
    """{name of a source: its config} for each of DATA.SOURCES; without them that of DATA.DATASET."""
    found = {}
    for source in config.DATA.SOURCES:
        name, one = source_name(source), config.clone()
        one.defrost()
        own = {SOURCE_KEYS[key]: value for key, value in source.items() if key != "name"}
        alone = {"DATA.SOURCES": [], "DATA.SOURCES_MIX": "size"}
        _set(one, [*own.items(), *alone.items()], f"DATA.SOURCES {name}")
        found[name] = _checked(one, f"DATA.SOURCES {name}: ")
    return found or {config.DATA.DATASET: config}


def data_name(config):
    """The name of the data: DATA.DATASET, or the names of DATA.SOURCES."""
    named = [] if sources(config.DATA.SOURCES) else map(source_name, config.DATA.SOURCES)  # `_checked` names the fault
    return "+".join(named) or config.DATA.DATASET


# --------------------------------------------------------------------------------------- reading
def to_dict(config):
    """The config as plain dictionaries, for JSON and checkpoints."""
    return {k: to_dict(v) if isinstance(v, CN) else v for k, v in config.items()}


def units(unit):
    """The plural of a DATA.UNIT, or of patient."""
    return {"image": "images", "study": "studies", "patient": "patients"}[unit]


def backbone_name(config):
    """The name of the model in tables: timm's, or that of the run, such as internimage_b."""
    return config.MODEL.TIMM.NAME if config.MODEL.TYPE == "timm" else config.MODEL.NAME


def differences(old, new):
    """{key: (old value, new value)} of two plain config dictionaries, for the keys of this version that differ."""
    old, new = (dict(_flatten(c, "")) for c in (old, new))
    values = {key: (old.get(key, knob.default), new.get(key, knob.default)) for key, knob in KNOBS.items()}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def without_effect(config, task, uses, device):
    """{key: a line with the reason} of the knobs that are set and do nothing, by their `takes_effect`.

    task: of the dataset. uses: the keys that the backbone, the dataset and a mixing use. device: its type, cpu or cuda.
    """
    lines = {}
    for key, knob in KNOBS.items():
        value = lookup(config, key)
        off = not value and "data" not in knob.takes_effect  # a seed of 0 is one
        used = key in uses and "data" not in knob.takes_effect  # by the backbone or a mixing, whatever else is set
        if off or used or value == knob.default:
            continue
        reasons = (_obstacle(config, key, *condition, task, uses, device) for condition in knob.takes_effect.items())
        if reason := next(filter(None, reasons), None):
            lines[key] = f"{key} {value!r} has no effect: {reason}"
    return lines


def _obstacle(config, key, condition, wanted, task, uses, device):
    """Why one condition of `takes_effect` does not hold, or None if it does."""
    match condition:
        case "model":
            return None if key in uses else f"the backbone MODEL.TYPE {config.MODEL.TYPE} has no such thing"
        case "data":
            return None if key in uses else f"the data of DATA.DATASET {config.DATA.DATASET} do not use it"
        case "device":
            return None if device == wanted else f"it is for a GPU, and this runs on {device}"
        case "task":
            return None if task == wanted else f"it is for {wanted} data, this is {task}"
    allowed = wanted if callable(wanted) else one_of(wanted)
    found = {k: lookup(config, k) for k in ([condition] if isinstance(condition, str) else condition)}
    wrong = [f"{k} is {value!r}" for k, value in found.items() if allowed(value)]
    if len(wrong) < len(found):
        return None
    needed = allowed(next(iter(found.values()))) if callable(wanted) else f"it must be {wanted!r}"
    return f"{' and '.join(wrong)}; {needed}"


def doubtful(config, updates, workers, ranks):
    """A line for each setting that this run cannot make use of.

    updates: of the whole run. workers: loading processes per process of training, as many as there are CPUs for.
    ranks: processes of training.
    """
    t = config.TRAIN
    if t.WARMUP_EPOCHS >= t.EPOCHS:
        yield (
            f"TRAIN.WARMUP_EPOCHS {t.WARMUP_EPOCHS} is not below TRAIN.EPOCHS {t.EPOCHS}: the peak learning rate is "
            "never reached"
        )
    if t.MIN_LR > t.BASE_LR:
        yield f"TRAIN.MIN_LR {t.MIN_LR:g} is above TRAIN.BASE_LR {t.BASE_LR:g}: the learning rate rises to the end"
    left = t.EMA.DECAY**updates
    if t.EMA.ENABLE and not t.EMA.WARMUP and left > 0.1:
        yield (
            f"TRAIN.EMA.DECAY {t.EMA.DECAY} is too slow for a run of {updates} updates: {left:.0%} of the EMA will be "
            "the weights it started from; use a smaller one, or TRAIN.EMA.WARMUP True"
        )
    if t.GRADIENT_DTYPE != "float32" and ranks == 1:
        yield f"TRAIN.GRADIENT_DTYPE {t.GRADIENT_DTYPE} has no effect: one process adds no gradients of others"
    if workers < config.DATA.NUM_WORKERS:
        yield (
            f"DATA.NUM_WORKERS {config.DATA.NUM_WORKERS}: only {workers} loading processes per training process are "
            "started, for want of CPUs; ask for more CPUs (--cpus-per-task), or set DATA.NUM_WORKERS lower"
        )


# ----------------------------------------------------------------------------------------- the page
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
    """The text of docs/options.md, by docs/options.md.j2: a row for each of KNOBS."""
    import jinja2

    sections = {}
    for key, knob in KNOBS.items():
        allowed = knob.allowed and _wanted(knob.allowed, knob.default) or TYPES[knob.kind or type(knob.default)]
        conditions = [_condition(keys, wanted) for keys, wanted in knob.takes_effect.items()]
        section = key.partition(".")[0] if "." in key else "Others"
        sections.setdefault(section, []).append((key, knob, allowed, conditions))
    template = (Path(__file__).parents[1] / "docs" / "options.md.j2").read_text()
    return jinja2.Template(template, trim_blocks=True, lstrip_blocks=True).render(sections=sections)


if __name__ == "__main__":
    print(options_page(), end="")
