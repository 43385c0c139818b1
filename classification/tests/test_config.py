"""Precedence, and a clear error for every mistake in files, --opts and flags."""

import json
from pathlib import Path

import common.torchvision_shim  # noqa: F401  (before timm)

import pytest
import torch
from timm.utils import ModelEmaV3

import main
from common.errors import UserError
from config import (
    KNOBS,
    differences,
    doubtful,
    from_dict,
    get_config,
    lookup,
    parse_args,
    refuse_another_file,
    to_dict,
    unfamiliar,
    without_effect,
)
from conftest import epochs
from dataset.build import build_datasets, own_values, worker_count
from dataset.transforms import photo_transform
from predicting import trained
from training import checkpoint
from training.optimizer import ema_decay

ROOT = Path(__file__).resolve().parents[1]
MIMIC = ROOT / "configs" / "internimage_b_mimic_cxr_224.yaml"


def load(*argv, cfg=MIMIC):
    return get_config(parse_args(["--cfg", str(cfg), *argv]))


def test_the_main_configuration_is_as_promised():
    c = load()
    assert (c.DATA.BATCH_SIZE, c.DATA.IMG_SIZE, c.DATA.NUM_WORKERS, c.MODEL.NUM_CLASSES) == (32, 224, 8, 14)
    assert (c.TRAIN.EPOCHS, c.TRAIN.WARMUP_EPOCHS, c.TRAIN.BASE_LR) == (50, 5, 1e-4)
    assert (c.TRAIN.EMA.ENABLE, c.TRAIN.EMA.DECAY, c.MODEL.DROP_PATH_RATE) == (True, 0.9999, 0.5)
    assert (c.AUG.COLOR_JITTER, c.AUG.MIXUP, c.AUG.CUTMIX, c.AUG.REPROB) == (0, 0, 0, 0.1)
    assert (c.SEED, c.SAVE_FREQ) == (42, 5)
    assert f"{c.OUTPUT}/{c.MODEL.NAME}/{c.TAG}" == "output/mimic_cxr/internimage_b/run1"
    assert c.RESULTS == "results/mimic_cxr"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path):
    load(cfg=path)


def test_precedence(tmp_path):
    (tmp_path / "base.yaml").write_text("TRAIN: {EPOCHS: 7, WARMUP_EPOCHS: 2}\nDATA: {BATCH_SIZE: 5}\n")
    (tmp_path / "exp.yaml").write_text("BASE: [base.yaml]\nTRAIN: {EPOCHS: 8}\n")
    c = load(cfg=tmp_path / "exp.yaml")
    assert (c.TRAIN.EPOCHS, c.TRAIN.WARMUP_EPOCHS, c.DATA.BATCH_SIZE) == (8, 2, 5)
    assert c.MODEL.NAME == "exp"
    c = load("--opts", "TRAIN.EPOCHS", "9", "DATA.BATCH_SIZE", "6", "--batch-size", "4", cfg=tmp_path / "exp.yaml")
    assert (c.TRAIN.EPOCHS, c.DATA.BATCH_SIZE) == (9, 4)
    # A flag that was not given changes nothing.
    (tmp_path / "on.yaml").write_text("TRAIN: {USE_CHECKPOINT: True}\nDATA: {ZIP_MODE: True}\nAMP_OPT_LEVEL: O0\n")
    c = load(cfg=tmp_path / "on.yaml")
    assert c.TRAIN.USE_CHECKPOINT and c.DATA.ZIP_MODE and c.AMP_OPT_LEVEL == "O0"


def test_every_promised_flag():
    c = load(
        "--data-path", "d", "--dataset", "mimic_cxr", "--batch-size", "3", "--output", "o", "--tag", "007",
        "--pretrained", "p", "--resume", "r", "--eval", "--throughput", "--accumulation-steps", "2",
        "--use-checkpoint", "--amp-opt-level", "O0", "--zip", "--local-rank", "3",
    )  # fmt: skip
    assert (c.DATA.DATA_PATH, c.DATA.DATASET, c.DATA.BATCH_SIZE, c.OUTPUT, c.TAG) == ("d", "mimic_cxr", 3, "o", "007")
    assert (c.MODEL.PRETRAINED, c.MODEL.RESUME, c.EVAL_MODE, c.THROUGHPUT_MODE) == ("p", "r", True, True)
    assert (c.TRAIN.ACCUMULATION_STEPS, c.TRAIN.USE_CHECKPOINT) == (2, True)
    assert (c.AMP_OPT_LEVEL, c.DATA.ZIP_MODE) == ("O0", True)


def test_numbers_in_the_ways_people_write_them(tmp_path):
    (tmp_path / "a.yaml").write_text("TRAIN: {BASE_LR: 1e-4, WEIGHT_DECAY: 0, CLIP_GRAD: 1}\n")
    c = load("--opts", "TRAIN.MIN_LR", "1e-6", "TRAIN.OPTIMIZER.BETAS", "(.9,.95)", cfg=tmp_path / "a.yaml")
    assert (c.TRAIN.BASE_LR, c.TRAIN.WEIGHT_DECAY, c.TRAIN.CLIP_GRAD, c.TRAIN.MIN_LR) == (1e-4, 0.0, 1.0, 1e-6)
    assert c.TRAIN.OPTIMIZER.BETAS == [0.9, 0.95]


@pytest.mark.parametrize(
    "opts, message",
    [
        (["TRAIN.EPOCH", "3"], r"--opts: unknown key TRAIN.EPOCH \(did you mean TRAIN.EPOCHS\?\)"),
        (["TRAIN.EPOCHS", "ten"], "--opts: TRAIN.EPOCHS must be of type int, got 'ten'"),
        (["TRAIN.EPOCHS", "1.5"], "TRAIN.EPOCHS must be of type int, got 1.5"),
        (["TRAIN.EMA.ENABLE", "1"], "TRAIN.EMA.ENABLE must be of type bool, got 1"),
        (["DATA.BATCH_SIZE", "0"], "DATA.BATCH_SIZE is 0; it must be at least 1"),
        (["TRAIN.BASE_LR", "nan"], "TRAIN.BASE_LR is nan; it must be finite"),
        (["AUG.MEAN", "[0.5, .inf, 0.5]"], r"AUG.MEAN is \[0.5, inf, 0.5\]; it must be finite"),
        (["AUG.REPROB", "1.5"], "AUG.REPROB is 1.5; it must be between 0 and 1"),
        (["AMP_DTYPE", "half"], "AMP_DTYPE is 'half'; choose one of auto, bfloat16, float16"),
        (["MODEL.INTERN_IMAGE.DEPTHS", "[4,4,18.5,4]"], "DEPTHS must be 4 numbers such as"),
        (["train.epochs", "3"], r"unknown key train.epochs \(did you mean TRAIN.EPOCHS\?\)"),
        (["TRAIN.POS_WEIGHT_CAP", "0.5"], r"TRAIN.POS_WEIGHT_CAP is 0.5; it must be 0 \(off\), or at least 1"),
        (["DATA.UNCERTAIN", "{default:", "zeros}"], "--opts: quote the value that begins with '{default:'"),
        (["MODEL.INTERN_IMAGE.DEPTHS", "[4,4]"], "DEPTHS must be 4 numbers such as"),
        (["AUG.CROP_SCALE", "[0.9,0.5]"], r"AUG.CROP_SCALE is \[0.9, 0.5\]; it must be"),
        (["TRAIN.EPOCHS=3"], "--opts takes KEY VALUE without an equals sign, such as TRAIN.EPOCHS 3"),
        (["SEED", "1", "train.epochs=3", "TAG=x"], "without an equals sign, such as train.epochs 3"),
        (["TRAIN.EPOCHS", "=", "3"], "without an equals sign, such as TRAIN.EPOCHS 3"),
        (["DATA.LABELS", "[Edema, Fracture"], r"--opts: '\[Edema, Fracture' has a bracket that is not closed"),
        (
            ["DATA.SOURCES", "[{dataset: nih, path: A}"],
            r"DATA.SOURCES '\[{dataset: nih, path: A}' cannot be read; check",
        ),
        (["DATA.SOURCES", "{dataset: nih, path: A}"], r"DATA.SOURCES must be of type list, in brackets: \[...\], got"),
        (["DATA.LABELS", "[Edema, Edema]"], r"DATA.LABELS is \['Edema', 'Edema'\]; Edema is in it twice"),
        (["DATA.LABELS", "[No, Edema]"], "it must be a list of names"),
        (["MODEL.INTERN_IMAGE.LEVEL2_POST_NORM_BLOCK_IDS", "[5, 5]"], "it must be a list of different whole numbers"),
        (["MODEL.INTERN_IMAGE.LEVEL2_POST_NORM_BLOCK_IDS", "[a]"], "it must be a list of different whole numbers"),
        (["TRAIN.EPOCHS"], "--opts takes pairs KEY VALUE; 'TRAIN.EPOCHS' has no partner"),
        (["TRAIN", "3"], "--opts: unknown key TRAIN"),
    ],
)
def test_bad_opts(opts, message):
    with pytest.raises(UserError, match=message):
        load("--opts", *opts)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="absent.yaml: No such file"):
        load(cfg=tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("TRAIN: {EPOCHS: [")
    with pytest.raises(UserError, match="bad.yaml is not valid YAML"):
        load(cfg=bad)
    bad.write_text("TRIAN: {EPOCHS: 3}")
    with pytest.raises(UserError, match="bad.yaml: unknown key TRIAN.EPOCHS .did you mean TRAIN.EPOCHS"):
        load(cfg=bad)
    bad.write_text("TRAIN: {EPOCHS: 3}\nSEED: 1\nTRAIN: {BASE_LR: 1}\n")
    with pytest.raises(
        UserError, match="bad.yaml is not valid YAML: TRAIN is given twice in .*bad.yaml|TRAIN is given twice"
    ):
        load(cfg=bad)
    for base in ("3", "[3]", "{a.yaml: 1}"):
        bad.write_text(f"BASE: {base}")
        with pytest.raises(UserError, match="bad.yaml: BASE is .*; it must be a list of YAML files"):
            load(cfg=bad)
    bad.write_text("BASE: bad.yaml")
    with pytest.raises(UserError, match="bad.yaml: BASE leads back to the file itself"):
        load(cfg=bad)
    bad.write_text("")
    with pytest.raises(UserError, match="bad.yaml has no keys"):
        load(cfg=bad)
    for section, name in (("TRAIN:\n", "TRAIN"), ("TRAIN: {EMA: 3}\n", "TRAIN.EMA"), ("AUG: []\n", "AUG")):
        bad.write_text(section)
        with pytest.raises(UserError, match=f"bad.yaml: the section {name} is .*; give it keys, or remove it"):
            load(cfg=bad)


def test_an_unknown_flag_names_the_nearest():
    with pytest.raises(UserError, match=r"^unknown argument --batchsize \(did you mean --batch-size\?\).*$"):
        load("--batchsize", "3")


def test_opts_given_twice_add_up():
    c = load("--opts", "TRAIN.EPOCHS", "3", "--tag", "x", "--opts", "SEED", "5")
    assert (c.TRAIN.EPOCHS, c.SEED, c.TAG) == (3, 5, "x")


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("TRAIN.EMA.ENABLE", "true", True),
        ("TRAIN.EMA.ENABLE", "False", False),
        ("DATA.LABELS", "[A, B]", ["A", "B"]),
        ("DATA.LABELS", "['A', 'B']", ["A", "B"]),
        ("AUG.CROP_SCALE", "[0.5, 1]", [0.5, 1.0]),
        ("DATA.UNCERTAIN", "{default: zeros, Consolidation: ignore}", {"default": "zeros", "Consolidation": "ignore"}),
        ("TRAIN.LOSS_OPTIONS", "{gamma: 1.5}", {"gamma": 1.5}),
        ("MODEL.INTERN_IMAGE.LAYER_SCALE", "null", None),
        ("MODEL.INTERN_IMAGE.LAYER_SCALE", "None", None),
        ("MODEL.INTERN_IMAGE.LAYER_SCALE", "1e-5", 1e-5),
    ],
)
def test_opts_take_yaml_and_python(key, text, value):
    assert lookup(load("--opts", key, text), key) == value


def test_the_name_of_a_run_follows_its_backbone(tmp_path):
    assert load("--opts", "MODEL.TYPE", "other").MODEL.NAME == "other"
    assert load("--opts", "MODEL.TYPE", "other", "MODEL.NAME", "mine").MODEL.NAME == "mine"
    (tmp_path / "exp.yaml").write_text(f"BASE: {MIMIC}\nMODEL: {{TYPE: other}}\n")
    assert load(cfg=tmp_path / "exp.yaml").MODEL.NAME == "other"
    (tmp_path / "exp.yaml").write_text("MODEL: {TYPE: other}\n")
    assert load(cfg=tmp_path / "exp.yaml").MODEL.NAME == "exp"


def test_a_config_comes_back_from_its_dictionary():
    config = load("--opts", "DATA.UNCERTAIN", "{default: zeros, Edema: ones}", "SEED", "3")
    assert from_dict(json.loads(json.dumps(to_dict(config))), "a.pth") == config
    assert unfamiliar(to_dict(config), "a.pth") == "" and differences(to_dict(config), to_dict(config)) == {}
    with pytest.raises(UserError, match="a.pth: SEED is -1; it must be between"):
        from_dict({"SEED": -1}, "a.pth")


def test_a_config_of_another_version_is_read_and_its_keys_are_named():
    saved = to_dict(load("--opts", "SEED", "3"))
    saved["TRAIN"]["OLD"], saved["ROOM"] = 1, {"DOOR": True}
    del saved["TRAIN"]["EMA"]["WARMUP"], saved["SAVE_FREQ"]
    config = from_dict(saved, "a.pth")
    assert (config.SEED, config.SAVE_FREQ, config.TRAIN.EMA.WARMUP) == (3, 1, False)
    assert unfamiliar(saved, "a.pth") == (
        "a.pth: its config has TRAIN.OLD, ROOM.DOOR, which this version does not have and ignores, and lacks "
        "TRAIN.EMA.WARMUP, SAVE_FREQ, for which the defaults are used"
    )
    assert differences(saved, to_dict(load("--opts", "SEED", "3"))) == {"SAVE_FREQ": (1, 5)}
    # A training option out of today's bounds: the model does not need it. One that the model needs is an error.
    saved = to_dict(load("--opts", "SEED", "3"))
    saved["TRAIN"]["CLIP_GRAD"], saved["AUG"]["MIXUP"] = -1, "much"
    assert from_dict(saved, "a.pth") == load("--opts", "SEED", "3", "TRAIN.CLIP_GRAD", "5.0", "AUG.MIXUP", "0.8")
    assert unfamiliar(saved, "a.pth").endswith("has TRAIN.CLIP_GRAD -1, AUG.MIXUP 'much', no longer allowed: the "
                                               "defaults are used")  # fmt: skip
    saved["AUG"]["STD"] = [1, 0, 1]
    with pytest.raises(UserError, match="a.pth: AUG.STD is .1.0, 0.0, 1.0.; each number must be above 0"):
        from_dict(saved, "a.pth")


# A value of the right type below and above what each number may be; None: there is no such bound.
BOUNDS = {
    "DATA.SPLIT_SEED": (-1, None), "DATA.DICOM_WINDOW": (-1, None), "DATA.BATCH_SIZE": (0, None),
    "DATA.LIMIT": (-1, None), "AUG.MIXUP_OFF_EPOCH": (-1, None), "DATA.MAX_VIEWS": (0, None),
    "MODEL.HEAD_WIDTH": (0, 100), "MODEL.FUSION_LAYERS": (0, None), "TRAIN.BACKBONE_LR_SCALE": (0.0, None),
    "DATA.IMG_SIZE": (31, 4097), "DATA.NUM_WORKERS": (-1, None), "DATA.PREFETCH": (-1, 101),
    "MODEL.NUM_CLASSES": (0, None), "MODEL.DROP_RATE": (-0.1, 1.0), "MODEL.DROP_PATH_RATE": (-0.1, 1.0),
    "MODEL.LABEL_SMOOTHING": (-0.1, 1.0), "MODEL.INTERN_IMAGE.CHANNELS": (3, None),
    "MODEL.INTERN_IMAGE.LAYER_SCALE": (-1e-5, None), "MODEL.INTERN_IMAGE.OFFSET_SCALE": (0.0, None),
    "MODEL.INTERN_IMAGE.MLP_RATIO": (0.2, None), "MODEL.INTERN_IMAGE.DW_KERNEL_SIZE": (-1, 4),
    "TRAIN.EPOCHS": (0, None), "TRAIN.WARMUP_EPOCHS": (-1, None), "TRAIN.WEIGHT_DECAY": (-0.1, None),
    "TRAIN.BASE_LR": (-1e-4, None), "TRAIN.WARMUP_LR": (-1e-4, None), "TRAIN.MIN_LR": (-1e-4, None),
    "TRAIN.LR_REFERENCE_BATCH": (0, None), "TRAIN.CLIP_GRAD": (-1.0, None), "TRAIN.ACCUMULATION_STEPS": (0, None),
    "TRAIN.POS_WEIGHT_CAP": (-1.0, None), "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": (0, None),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": (0.0, 1.1), "TRAIN.OPTIMIZER.EPS": (0.0, None),
    "TRAIN.OPTIMIZER.MOMENTUM": (-0.1, 1.0), "TRAIN.OPTIMIZER.DCN_LR_MUL": (-1.0, None),
    "TRAIN.LR_LAYER_DECAY_RATIO": (0.0, 1.1), "TRAIN.EMA.DECAY": (-0.1, 1.0), "AUG.COLOR_JITTER": (-0.1, 1.1),
    "AUG.GAMMA": (-0.1, None), "AUG.ROTATION": (-1.0, 181.0), "AUG.SHIFT": (-0.1, 1.1), "AUG.REPROB": (-0.1, 1.1),
    "AUG.RECOUNT": (0, None), "AUG.HFLIP": (-0.1, 1.1), "AUG.MIXUP": (-0.1, None), "AUG.CUTMIX": (-0.1, None),
    "AUG.MIXUP_PROB": (-0.1, 1.1), "AUG.MIXUP_SWITCH_PROB": (-0.1, 1.1), "SAVE_FREQ": (0, None),
    "SAVE_KEEP": (-1, None), "TRAIN.STOP_AFTER": (-1, None), "EVAL_FREQ": (0, None), "TRAIN.START_EPOCH": (-1, None),
    "PRINT_FREQ": (0, None), "SEED": (-1, 2**32),
    # Of lists: one of the numbers.
    "MODEL.INTERN_IMAGE.DEPTHS": (0, None), "MODEL.INTERN_IMAGE.GROUPS": (0, None),
    "TRAIN.OPTIMIZER.BETAS": (-0.1, 1.0), "AUG.CROP_SCALE": (0.0, 1.1), "AUG.MEAN": (-0.1, 1.1),
    "AUG.STD": (0.0, None),
}  # fmt: skip


def test_every_number_has_bounds():
    for key, knob in KNOBS.items():
        first = knob.default[0] if isinstance(knob.default, list) and knob.default else knob.default
        if isinstance(first, bool) or (knob.kind or type(first)) not in (int, float):
            continue
        assert knob.allowed and key in BOUNDS, f"{key} has no bounds, or a new one has no row here"
        for value in BOUNDS[key]:
            if value is not None:
                wrong = knob.allowed([*knob.default[:-1], value] if isinstance(knob.default, list) else value)
                assert wrong and wrong.startswith(("it must", "each number must")), (key, value)
        assert knob.default is None or knob.allowed(knob.default) is None


@pytest.mark.parametrize("key", ["TAG", "MODEL.NAME"])
@pytest.mark.parametrize("name", ["../../x", "/abs", "a/../../b", "..", ".", "a\nb"])
def test_a_run_does_not_leave_its_output(key, name):
    with pytest.raises(UserError, match=f"{key} is .*; it must be the name of a folder"):
        load("--opts", key, name)
    assert lookup(load("--opts", key, "a/b..c"), key) == "a/b..c"
    with pytest.raises(UserError, match="OUTPUT is ' '; it must not be empty"):
        load("--opts", "OUTPUT", " ")


def test_a_run_is_resumed_by_its_own_file_only(tmp_path):
    """The same folder, from two files; another folder's copy of the file and the run's config.json are its own."""
    own = tmp_path / "mine.yaml"
    own.write_text(f"BASE: {MIMIC}\nDATA: {{IMG_SIZE: 384}}\nMODEL: {{NAME: internimage_b_384}}\n")
    mine, shipped = load(cfg=own), load(cfg=MIMIC.with_name("internimage_b_mimic_cxr_384.yaml"))
    assert (mine.MODEL.NAME, mine.TAG) == (shipped.MODEL.NAME, shipped.TAG)
    with pytest.raises(UserError, match="run of mine.yaml, not of internimage_b_mimic_cxr_384.yaml: use another --tag"):
        refuse_another_file(to_dict(mine), shipped, "a/last_ckpt.pth")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(mine)))
    refuse_another_file(to_dict(mine), load(cfg=tmp_path / "config.json"), "a")
    (tmp_path / "based.yaml").write_text("BASE: config.json\n")
    assert load(cfg=tmp_path / "based.yaml").CFG == "based.yaml"


def test_x_rays_have_defaults_of_their_own(tmp_path):
    """Without BASE: those of the main configuration where ImageNet's would do harm; a file's own values count."""
    bare, shipped = tmp_path / "bare.yaml", load()
    bare.write_text("DATA: {DATASET: nih}\nAUG: {HFLIP: 0.5}\n")
    config = get_config(parse_args(["--cfg", str(bare)]), own_values)
    keys = [key for key, knob in KNOBS.items() if knob.xrays is not None]
    assert "AUG.MIXUP" in keys and "TRAIN.LR_REFERENCE_BATCH" in keys
    assert {k: lookup(config, k) for k in keys} == {k: lookup(shipped, k) for k in keys} | {"AUG.HFLIP": 0.5}
    bare.write_text("DATA: {DATASET: imagenet}\n")
    assert get_config(parse_args(["--cfg", str(bare)]), own_values).AUG.MIXUP == 0.8


def test_the_decay_of_the_ema_rises_as_timms():
    config = load("--opts", "TRAIN.EMA.WARMUP", "True")
    theirs = ModelEmaV3(torch.nn.Linear(1, 1), decay=0.9999, use_warmup=True)
    assert [ema_decay(config, step) for step in range(3)] == [theirs.get_decay(step + 1) for step in range(3)]
    assert ema_decay(config, 10**7) == 0.9999 == ema_decay(load(), 0)


@pytest.mark.parametrize("policy", ["foo", "rand-m9-x3"])
def test_a_policy_that_timm_does_not_have_is_named(policy):
    config = load("--opts", "AUG.AUTO_AUGMENT", policy)
    with pytest.raises(UserError, match=f"AUG.AUTO_AUGMENT is '{policy}': .*; write it as timm does"):
        photo_transform(config, train=True)


def test_what_a_run_is_too_short_for():
    def named(*opts, updates=100000, workers=8):
        return [line.split()[0] for line in doubtful(load("--opts", *opts), updates, workers, 1)]

    assert named("SEED", "1") == []
    assert named("SEED", "1", updates=72) == ["TRAIN.EMA.DECAY"]
    assert named("TRAIN.EMA.WARMUP", "True", updates=72) == []
    assert named("TRAIN.EMA.ENABLE", "False", updates=72) == []
    assert named("TRAIN.GRADIENT_DTYPE", "bfloat16") == ["TRAIN.GRADIENT_DTYPE"]
    assert named("TRAIN.EPOCHS", "5", "TRAIN.MIN_LR", "1", workers=1) == [
        "TRAIN.WARMUP_EPOCHS", "TRAIN.MIN_LR", "DATA.NUM_WORKERS",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "opts, task, uses, line",
    [
        (["TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.EPS", "1e-6"], "multilabel", (), "TRAIN.OPTIMIZER.EPS 1e-06"),
        (["DATA.ZIP_MODE", "True", "DATA.ALLOW_MISSING", "True"], "multilabel", (), None),  # both have one
        (["DATA.NO_FINDING_CLEARS", "True"], "single_label", (), "DATA.NO_FINDING_CLEARS True"),
        (["DATA.NO_FINDING_CLEARS", "True"], "multilabel", (), "DATA.NO_FINDING_CLEARS True"),
        (["DATA.NO_FINDING_CLEARS", "True", "DATA.MISSING", "{Edema: ignore}"], "multilabel", (), None),
        (
            ["DATA.NO_FINDING_CLEARS", "True", "DATA.MISSING", "{default: zeros}"],
            "multilabel",
            (),
            "DATA.NO_FINDING_CLEARS True",
        ),
        (["AUG.REPROB", "0", "AUG.REMODE", "rand"], "multilabel", (), "AUG.REMODE 'rand'"),
        (["AUG.REPROB", "0", "AUG.RECOUNT", "3"], "multilabel", (), "AUG.RECOUNT 3"),
        (["AUG.MIXUP_PROB", "0.5"], "multilabel", (), "AUG.MIXUP_PROB 0.5"),
        (["AUG.MIXUP_PROB", "0.5", "AUG.CUTMIX", "1"], "multilabel", (), None),
        (["AUG.MIXUP_SWITCH_PROB", "0.1", "AUG.CUTMIX", "1"], "multilabel", (), "AUG.MIXUP_SWITCH_PROB 0.1"),
        (["TRAIN.WARMUP_EPOCHS", "0", "TRAIN.WARMUP_LR", "1e-6"], "multilabel", (), "TRAIN.WARMUP_LR 1e-06"),
        (["TRAIN.EMA.ENABLE", "False"], "multilabel", (), "TRAIN.EMA.DECAY 0.9999"),
        (["MODEL.INTERN_IMAGE.LEVEL2_POST_NORM", "True"], "multilabel", (), "MODEL.INTERN_IMAGE.LEVEL2_POST_NORM True"),
        (
            ["MODEL.INTERN_IMAGE.LEVEL2_POST_NORM_BLOCK_IDS", "[5]"],
            "multilabel",
            (),
            "MODEL.INTERN_IMAGE.LEVEL2_POST_NORM_BLOCK_IDS [5]",
        ),
        (["TRAIN.LOSS", "nosuch"], "single_label", (), "TRAIN.LOSS 'nosuch'"),
        (["MODEL.LABEL_SMOOTHING", "0.2"], "multilabel", (), "MODEL.LABEL_SMOOTHING 0.2"),
        (["TEST.EMA", "True"], "multilabel", (), "TEST.EMA True"),
        (["TRAIN.USE_CHECKPOINT", "True"], "multilabel", (), "TRAIN.USE_CHECKPOINT True"),
        (["TRAIN.LR_LAYER_DECAY_RATIO", "0.5"], "multilabel", (), "TRAIN.LR_LAYER_DECAY_RATIO 0.5"),
        (["DATA.CSV", "a.csv", "DATA.LABELER", "negbio"], "multilabel", (), "DATA.LABELER 'negbio'"),
        (
            ["DATA.DICOM_RECIPE", "mimic_jpg", "DATA.DICOM_WINDOW", "1"],
            "multilabel",
            ("DATA.DICOM_RECIPE", "DATA.DICOM_WINDOW"),
            "DATA.DICOM_WINDOW 1",
        ),
        (["DATA.DICOM_RECIPE", "mimic_jpg"], "multilabel", (), "DATA.DICOM_RECIPE 'mimic_jpg'"),
        (["TRAIN.USE_CHECKPOINT", "True"], "multilabel", ("TRAIN.USE_CHECKPOINT",), None),
        (["DATA.PREFETCH", "2"], "multilabel", (), "DATA.PREFETCH 2"),
        (["TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.MOMENTUM", "0.5"], "multilabel", (), None),
    ],
)
def test_settings_without_effect_are_named(opts, task, uses, line):
    """Beside what the main configuration sets for a backbone that uses it and for X-rays."""
    uses = {"MODEL.DROP_PATH_RATE", *uses}
    before = without_effect(load(), task, uses, "cpu")
    found = without_effect(load("--opts", *opts), task, uses, "cpu")
    new = [x for key, x in found.items() if key not in before and x.startswith(f"{key} ")]
    assert [x.split(" has no effect: ")[0] for x in new] == ([line] if line else [])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*cxr*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_configurations_set_nothing_in_vain(path):
    uses = {"MODEL.DROP_PATH_RATE", "TRAIN.USE_CHECKPOINT"}
    assert without_effect(load(cfg=path), "multilabel", uses, "cpu") == {}


def test_another_backbone_forgets_what_a_file_below_said_of_the_first(tmp_path):
    """Else a configuration by BASE would be warned of options that it has not set."""
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text("MODEL: {NAME: b, DROP_PATH_RATE: 0.5, INTERN_IMAGE: {CHANNELS: 112, GROUPS: [7, 14, 28, 56]}}")
    own.write_text("BASE: [base.yaml]\nMODEL: {TYPE: timm, TIMM: {NAME: resnet10t}, INTERN_IMAGE: {CHANNELS: 48}}")
    config = get_config(parse_args(["--cfg", str(own)]))
    assert (config.MODEL.INTERN_IMAGE.GROUPS, config.MODEL.DROP_PATH_RATE) == ([4, 8, 16, 32], 0.5)
    assert config.MODEL.INTERN_IMAGE.CHANNELS == 48  # said beside the backbone: a mistake, which a warning names
    config = get_config(parse_args(["--cfg", str(base), "--opts", "MODEL.INTERN_IMAGE.CHANNELS", "64"]))
    assert config.MODEL.INTERN_IMAGE.GROUPS == [7, 14, 28, 56]


def test_options_of_tables_and_files_that_are_not_read_have_no_effect(own_tree, layouts, tiny):
    """A table that is found unasked, JPGs, DICOMs."""

    def used(root, *opts):
        config = load("--data-path", str(root), "--opts", "DATA.SPLIT_SEED", "0", *opts, cfg=tiny)
        (dataset,) = build_datasets(config, "train")
        keys = ("DATA.LABELER", "DATA.IMAGE_FORMAT", "DATA.DICOM_RECIPE", "DATA.DICOM_WINDOW")
        return [key in dataset.uses for key in keys], dataset

    seen, dataset = used(own_tree)
    assert seen == [True, True, False, False]
    for path in own_tree.glob("*.csv*"):
        path.unlink()
    rows = [f"{path.decode()},train,{k % 2}\n" for k, path in enumerate(dataset.table.path)]
    (own_tree / "mine.csv").write_text("path,split,Edema\n" + "".join(rows))
    assert used(own_tree, "MODEL.NUM_CLASSES", "1")[0] == [False] * 4
    assert used(layouts("vindr"), "DATA.DATASET", "vindr")[0] == [False, True, True, True]


def test_no_more_loading_processes_than_cpus(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    assert [worker_count(load("--opts", "DATA.NUM_WORKERS", n)) for n in ("0", "4", "8")] == [0, 4, 6]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [worker_count(load("--opts", "DATA.NUM_WORKERS", n)) for n in ("0", "1", "8")] == [0, 1, 1]


def test_a_run_and_its_checkpoints_outlive_files_and_knobs(run_main, tiny, tree, tmp_path):
    """Another file is refused unless --resume asks for it; a checkpoint of another version resumes with one line."""
    last = run_main(TRAIN__EPOCHS=1, TRAIN__EMA__DECAY=0.999) / checkpoint.LAST
    log = last.with_name("log_rank0.txt")
    assert "WARNING TRAIN.EMA.DECAY 0.999 is too slow for a run of" in log.read_text()
    (tmp_path / "other.yaml").write_text(tiny.read_text())
    argv = ["--cfg", str(tmp_path / "other.yaml"), "--data-path", str(tree), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="last_ckpt.pth is of a run of tiny.yaml, not of other.yaml: use another --tag"):
        main.main(argv)

    state = checkpoint.read(last)
    state["config"]["TRAIN"]["OLD"] = 1
    del state["config"]["TRAIN"]["EMA"]["WARMUP"]
    torch.save(state, last)
    assert main.main([*argv, "--resume", str(last)]) == 0
    named = "last_ckpt.pth: its config has TRAIN.OLD, which this version does not have and ignores, and lacks TRAIN."
    assert log.read_text().count(named) == 1 and len(epochs(last.parent)) == 2
    assert trained.load(last).config.TRAIN.EMA.WARMUP is False


def test_weights_that_may_not_be_read_are_one_line(monkeypatch):
    def closed(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", closed)  # as in a folder without x
    with pytest.raises(UserError, match="checkpoint a/b.pth cannot be opened .Permission denied."):
        checkpoint.read("a/b.pth")


def test_the_download_explains_itself(capsys):
    import download_weights

    with pytest.raises(SystemExit) as done:
        download_weights.main(["--help"])
    assert done.value.code == 0 and "internimage_b_1k_224.pth" in capsys.readouterr().out
