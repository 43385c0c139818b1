"""Keys, values and flags of the published InternImage classification code that this one does not have.

They are those of `classification/config.py` and `main.py` in github.com/OpenGVLab/InternImage. A key that is not here
means the same in both.
"""

from common.errors import UserError

ANY = object()  # every other value


def _renamed(key):
    return lambda value: {key: value}


def _levels(value):
    levels = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return {"TRAIN.FREEZE": [f"levels.{level}" for level in levels]}


# Key -> rows of (a value or ANY, what is set here: {key: value} or a function value -> that, what happens instead: a
# line for the log, "" if nothing differs). A value without a row is kept if the key exists here, else it is an error.
TABLE = {
    "DATA.CACHE_MODE": [
        (mode, {}, "images are read when they are needed; DATA.IMG_ON_MEMORY True keeps all of them in shared memory")
        for mode in ("no", False, "full", "part")  # YAML reads no as False
    ],
    "DATA.DATASET": [
        ("imagenet22K", {"DATA.DATASET": "imagenet", "MODEL.NUM_CLASSES": 21841},
         "DATA_PATH holds train/ and val/ with a folder per class, as for ImageNet-1k"),
    ],
    "DATA.INTERPOLATION": [
        (way, {"DATA.INTERPOLATION": "bicubic"}, "images are resized by bicubic interpolation")
        for way in ("random", "lanczos", "hamming")
    ],
    "MODEL.TYPE": [
        ("INTERN_IMAGE", {"MODEL.TYPE": "intern_image"}, ""),
        ("intern_image_meta_former", {"MODEL.TYPE": "intern_image"},
         "the model sees the image alone: the part that reads its date and coordinates is left out"),
    ],
    "MODEL.INTERN_IMAGE.CORE_OP": [
        ("DCNv3", {}, ""),
        ("DCNv3_pytorch", {}, "the operator of ops_dcnv3 computes the same function, on CPUs as well"),
    ],
    "TRAIN.ACCUMULATION_STEPS": [(0, {"TRAIN.ACCUMULATION_STEPS": 1}, "")],
    "TRAIN.OPTIMIZER.USE_ZERO": [
        (False, {}, ""),
        (True, {"TRAIN.FSDP": True}, "TRAIN.FSDP True shards parameters, gradients and optimizer over the GPUs"),
    ],
    "TRAIN.OPTIMIZER.FREEZE_BACKBONE": [(ANY, _levels, "")],
    "AUG.AUTO_AUGMENT": [("none", {"AUG.AUTO_AUGMENT": ""}, "")],
    "AUG.RANDOM_RESIZED_CROP": [
        (False, {}, ""),
        (True, {}, "training always crops at random (AUG.CROP_SCALE), evaluation never does"),
    ],
    "TEST.SEQUENTIAL": [(value, {}, "") for value in (True, False)],  # both: every image once and in order
    "AMP_OPT_LEVEL": [(level, {"AMP_OPT_LEVEL": "O1"}, "") for level in ("", "O2")],  # one mixed precision there, too
    "AMP_TYPE": [(ANY, _renamed("AMP_DTYPE"), "")],
    "EVAL_22K_TO_1K": [
        (False, {}, ""),
        (True, {}, "a head of 21,841 classes is reduced to 1,000 whenever it is loaded for 1,000"),
    ],
    "LOCAL_RANK": [(ANY, lambda value: {}, "")],  # the launcher sets it in the environment
    "SAVE_CKPT_NUM": [(ANY, _renamed("SAVE_KEEP"), "")],
}  # fmt: skip
FLAGS = {
    "--cache-mode": "DATA.CACHE_MODE",
    "--save-ckpt-num": "SAVE_CKPT_NUM",
    "--use-zero": "TRAIN.OPTIMIZER.USE_ZERO",
    "--local-rank": "LOCAL_RANK",
}


def translate(pairs, known, source, notes):
    """(key, value) pairs with the published keys and values replaced by ours.

    known: our keys. notes: a list to which a line is added for each of them that does something else here.

    UserError: a value that the published key does not have either.
    """
    for key, value in pairs:
        rows = TABLE.get(key, [])
        row = next((row for row in rows if row[0] is ANY or (type(row[0]), row[0]) == (type(value), value)), None)
        if row is None and rows and key not in known:
            choices = ", ".join(str(value) for value, *_ in rows)
            raise UserError(f"{source}: {key} is {value!r}; choose one of {choices}")
        _, becomes, note = row or (None, {key: value}, "")
        yield from (becomes(value) if callable(becomes) else becomes).items()
        if note:
            notes.append(f"{source}: {key} {value!r} is an option of the published code; {note}")
