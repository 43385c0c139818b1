"""Precedence, and a clear error for every mistake in files, --opts and flags."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from config import from_dict, get_config, lookup, parse_args, to_dict, without_effect

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
        (["TRAIN.BASE_LR", "nan"], "TRAIN.BASE_LR is nan; it must be at least 0"),
        (["AUG.REPROB", "1.5"], "AUG.REPROB is 1.5; it must be between 0 and 1"),
        (["AMP_DTYPE", "half"], "AMP_DTYPE is 'half'; choose one of auto, bfloat16, float16"),
        (["MODEL.INTERN_IMAGE.DEPTHS", "[4,4,18.5,4]"], "DEPTHS must be 4 numbers such as"),
        (["train.epochs", "3"], r"unknown key train.epochs \(did you mean TRAIN.EPOCHS\?\)"),
        (["TRAIN.POS_WEIGHT_CAP", "0.5"], r"TRAIN.POS_WEIGHT_CAP is 0.5; it must be 0 \(off\), or at least 1"),
        (["DATA.UNCERTAIN", "{default:", "zeros}"], "--opts: quote the value that begins with '{default:'"),
        (["MODEL.INTERN_IMAGE.DEPTHS", "[4,4]"], "DEPTHS must be 4 numbers such as"),
        (["AUG.CROP_SCALE", "[0.9,0.5]"], r"AUG.CROP_SCALE is \[0.9, 0.5\]; it must be"),
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
    bad.write_text("BASE: bad.yaml")
    with pytest.raises(UserError, match="bad.yaml: BASE leads back to the file itself"):
        load(cfg=bad)
    bad.write_text("")
    with pytest.raises(UserError, match="bad.yaml holds no keys"):
        load(cfg=bad)
    for section, name in (("TRAIN:\n", "TRAIN"), ("TRAIN: {EMA: 3}\n", "TRAIN.EMA"), ("AUG: []\n", "AUG")):
        bad.write_text(section)
        with pytest.raises(UserError, match=f"bad.yaml: the section {name} holds .*; give it keys, or remove it"):
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
    with pytest.raises(UserError, match="a.pth: unknown key TRAIN.EPOCH .did you mean TRAIN.EPOCHS"):
        from_dict({"TRAIN": {"EPOCH": 3}}, "a.pth")


@pytest.mark.parametrize(
    "opts, task, uses, line",
    [
        (["TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.EPS", "1e-6"], "multilabel", (), "TRAIN.OPTIMIZER.EPS 1e-06"),
        (["DATA.ZIP_MODE", "True", "DATA.ALLOW_MISSING", "True"], "multilabel", (), None),  # it acts there too
        (["DATA.NO_FINDING_CLEARS", "True"], "single_label", (), "DATA.NO_FINDING_CLEARS True"),
        (["TRAIN.LOSS", "nosuch"], "single_label", (), "TRAIN.LOSS 'nosuch'"),
        (["MODEL.LABEL_SMOOTHING", "0.2"], "multilabel", (), "MODEL.LABEL_SMOOTHING 0.2"),
        (["TEST.EMA", "True"], "multilabel", (), "TEST.EMA True"),
        (["TRAIN.USE_CHECKPOINT", "True"], "multilabel", (), "TRAIN.USE_CHECKPOINT True"),
        (["TRAIN.LR_LAYER_DECAY_RATIO", "0.5"], "multilabel", (), "TRAIN.LR_LAYER_DECAY_RATIO 0.5"),
        (["DATA.CSV", "a.csv", "DATA.LABELER", "negbio"], "multilabel", (), "DATA.LABELER 'negbio'"),
        (["DATA.DICOM_RECIPE", "mimic_jpg", "DATA.DICOM_WINDOW", "1"], "multilabel", (), "DATA.DICOM_WINDOW 1"),
        (["TRAIN.USE_CHECKPOINT", "True"], "multilabel", ("TRAIN.USE_CHECKPOINT",), None),
        (["DATA.PREFETCH", "2"], "multilabel", (), "DATA.PREFETCH 2"),
        (["TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.MOMENTUM", "0.5"], "multilabel", (), None),
    ],
)
def test_settings_without_effect_are_named(opts, task, uses, line):
    """Beside what the main configuration sets for a backbone that uses it and for X-rays."""
    uses = {"MODEL.DROP_PATH_RATE", *uses}
    before = without_effect(load(), task, uses, "cpu")
    new = [x for x in without_effect(load("--opts", *opts), task, uses, "cpu") if x not in before]
    assert [x.split(" has no effect: ")[0] for x in new] == ([line] if line else [])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*cxr*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_configurations_set_nothing_in_vain(path):
    uses = {"MODEL.DROP_PATH_RATE", "TRAIN.USE_CHECKPOINT"}
    assert without_effect(load(cfg=path), "multilabel", uses, "cpu") == []


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
