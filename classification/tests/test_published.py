"""What a fork of the published InternImage classification code brings: its YAML files, flags, weights and rates."""

import argparse
import json
import logging
import re
from pathlib import Path

import common.torchvision_shim  # noqa: F401  (before timm)

import numpy as np
import pytest
import torch
import yaml

from common.errors import UserError
from config import differences, get_config, parse_args, to_dict
from conftest import epochs
from dataset.build import own_values as data_values
from dataset.mixing import build_mixing
from models import build_model, own_values
from test_model import GOLDEN, fill, small
from training import checkpoint
from training.optimizer import parameter_groups
from training.run import start_weights
from training.step import freeze

LOG = logging.getLogger("test")
# The published files, by their keys and values: of each size MODEL.INTERN_IMAGE, and MODEL.DROP_PATH_RATE.
BIG = {"DW_KERNEL_SIZE": 5, "LEVEL2_POST_NORM": True, "CENTER_FEATURE_SCALE": True, "USE_CLIP_PROJECTOR": True}
SIZES = {
    "t": (0.1, 64, [4, 4, 18, 4], {}),
    "s": (0.4, 80, [4, 4, 21, 4], {"LAYER_SCALE": "1e-5", "POST_NORM": True, "GROUPS": [5, 10, 20, 40]}),
    "b": (0.5, 112, [4, 4, 21, 4], {"LAYER_SCALE": "1e-5", "POST_NORM": True, "GROUPS": [7, 14, 28, 56]}),
    "l": (0.1, 160, [5, 5, 22, 5],
          {"LAYER_SCALE": "1e-5", "POST_NORM": True, "OFFSET_SCALE": 2.0, "GROUPS": [10, 20, 40, 80]}),
    "xl": (0.2, 192, [5, 5, 24, 5],
           {"LAYER_SCALE": "1e-5", "POST_NORM": True, "OFFSET_SCALE": 2.0, "GROUPS": [12, 24, 48, 96]}),
    "h": (0.2, 320, [6, 6, 32, 6],
          {**BIG, "LAYER_SCALE": "None", "POST_NORM": False, "RES_POST_NORM": True, "GROUPS": [10, 20, 40, 80],
           "LEVEL2_POST_NORM_BLOCK_IDS": [5, 11, 17, 23, 29]}),
    "g": (0.4, 512, [2, 2, 48, 4],
          {**BIG, "LAYER_SCALE": "None", "POST_NORM": True, "GROUPS": [16, 32, 64, 128],
           "LEVEL2_POST_NORM_BLOCK_IDS": [5, 11, 17, 23, 29, 35, 41, 47]}),
}  # fmt: skip
PUBLISHED = [
    *((size, 224, decay) for size in "tsb" for decay in (True, False)),
    *((size, 384, decay) for size in ("l", "xl") for decay in (True, False)),
    *((size, side, decay) for size, side in (("h", 640), ("g", 512)) for decay in (True, False)),
    ("h", 384, True),
    ("inat", 384, False),
]  # fmt: skip


def published_yaml(size, side, decay):
    rate, channels, depths, more = SIZES["h" if size == "inat" else size]
    model = {"GROUPS": [4, 8, 16, 32], "CORE_OP": "DCNv3", "CHANNELS": channels, "DEPTHS": depths, "OFFSET_SCALE": 1.0}
    content = {
        "DATA": {"IMG_ON_MEMORY": True},
        "MODEL": {"TYPE": "intern_image", "DROP_PATH_RATE": rate, "INTERN_IMAGE": model | {"MLP_RATIO": 4.0} | more},
        "TRAIN": {"EMA": {"ENABLE": True, "DECAY": 0.9999}, "BASE_LR": "5e-4"},
    }
    if side > 224:
        content |= {"AUG": {"MIXUP": 0.0, "CUTMIX": 0.0, "REPROB": 0.0}, "AMP_OPT_LEVEL": "O0", "EVAL_FREQ": 1}
        content["DATA"]["IMG_SIZE"] = side
        content["MODEL"] |= {"LABEL_SMOOTHING": 0.3, "PRETRAINED": "pretrained/weights.pth"}
        content["TRAIN"] |= {"EPOCHS": 20, "WARMUP_EPOCHS": 2, "WEIGHT_DECAY": 0.05, "BASE_LR": "2e-05", "MIN_LR": 0.0}
        content["TRAIN"] |= {"WARMUP_LR": 0.0, "USE_CHECKPOINT": True, "OPTIMIZER": {"DCN_LR_MUL": 0.1}}
        content["TRAIN"] |= {"LR_LAYER_DECAY": True, "LR_LAYER_DECAY_RATIO": 0.9} if decay else {}
    if side == 640:
        content["TRAIN"]["OPTIMIZER"]["USE_ZERO"] = True
    if size == "inat":
        content["DATA"] |= {"DATASET": "inat18", "IMG_ON_MEMORY": False}
        content["MODEL"] |= {"TYPE": "intern_image_meta_former", "DROP_PATH_RATE": 0.6}
        content["TRAIN"] |= {"EPOCHS": 100, "WARMUP_EPOCHS": 0, "RAND_INIT_FT_HEAD": True}
        content["TRAIN"]["EMA"]["ENABLE"] = False
        del content["TRAIN"]["OPTIMIZER"]
    return content


def load(tmp_path, content, *argv):
    """(config, notes) of a YAML file of this content."""
    path, notes = tmp_path / "fork.yaml", []
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    config = get_config(parse_args(["--cfg", str(path), *argv]), data_values, own_values, notes=notes)
    return config, notes


@pytest.mark.parametrize("size, side, decay", PUBLISHED)
def test_the_published_files_build_the_models_they_mean(tmp_path, size, side, decay):
    config, notes = load(tmp_path, published_yaml(size, side, decay))
    with torch.device("meta"):
        model = build_model(config)
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text())["h" if size == "inat" else size]
    if size == "inat":
        shapes |= {"head.weight": [8142, 768], "head.bias": [8142]}
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == shapes
    assert (config.DATA.IMG_SIZE, config.TRAIN.LR_LAYER_DECAY) == (side, decay and side > 224)
    assert config.TRAIN.FSDP == (side == 640)
    assert config.TRAIN.BASE_LR == (2e-5 if side > 224 else 5e-4)
    said = ["USE_ZERO True .* TRAIN.FSDP"] * (side == 640) + ["MODEL.TYPE .* the image alone"] * (size == "inat")
    assert len(notes) == len(said) and all(re.search(text, note) for text, note in zip(said, notes))


@pytest.mark.parametrize(
    "theirs, ours, said",
    [
        ("DATA: {CACHE_MODE: no}", {}, "DATA.IMG_ON_MEMORY True keeps all"),
        ("MODEL: {INTERN_IMAGE: {CORE_OP: DCNv3_pytorch}}", {}, "computes the same function"),
        ("TRAIN: {ACCUMULATION_STEPS: 0}", {"TRAIN.ACCUMULATION_STEPS": 1}, ""),
        ("TRAIN: {OPTIMIZER: {FREEZE_BACKBONE: [0, 2]}}", {"TRAIN.FREEZE": ["levels.0", "levels.2"]}, ""),
        ("TRAIN: {OPTIMIZER: {FREEZE_BACKBONE: None}}", {"TRAIN.FREEZE": []}, ""),
        ("TRAIN: {OPTIMIZER: {BETAS: '(0.9, 0.95)'}}", {"TRAIN.OPTIMIZER.BETAS": [0.9, 0.95]}, ""),
        ("AUG: {AUTO_AUGMENT: none, RANDOM_RESIZED_CROP: True}", {"AUG.AUTO_AUGMENT": ""}, "always crops at random"),
        ("AUG: {CUTMIX_MINMAX: [0.2, 0.8], MIXUP_MODE: elem}", {"AUG.MIXUP_MODE": "elem"}, ""),
        ("AMP_TYPE: bfloat16\nAMP_OPT_LEVEL: O2", {"AMP_DTYPE": "bfloat16", "AMP_OPT_LEVEL": "O1"}, ""),
        ("TEST: {SEQUENTIAL: True}\nLOCAL_RANK: 0\nSAVE_CKPT_NUM: 2", {"SAVE_KEEP": 2}, ""),
        ("EVAL_22K_TO_1K: True\nMODEL: {DROP_PATH_TYPE: uniform}", {"MODEL.DROP_PATH_TYPE": "uniform"}, "is reduced"),
        ("DATA: {INTERPOLATION: lanczos}", {"DATA.INTERPOLATION": "bicubic"}, "bicubic interpolation"),
        ("DATA: {DATASET: imagenet22K}", {"DATA.DATASET": "imagenet", "MODEL.NUM_CLASSES": 21841}, "train/ and val/"),
    ],
)
def test_published_keys_do_what_they_say_or_are_named(tmp_path, theirs, ours, said):
    config, notes = load(tmp_path, theirs)
    for key, value in ours.items():
        node = config
        for name in key.split("."):
            node = node[name]
        assert node == value
    assert len(notes) == bool(said) and said in "".join(notes)


def test_published_flags(tmp_path):
    flags = ["--cache-mode", "full", "--save-ckpt-num", "3", "--use-zero", "--local-rank", "1", "--amp-opt-level", "O2"]
    config, notes = load(tmp_path, "SEED: 1", *flags, "--accumulation-steps", "0")
    assert (config.SAVE_KEEP, config.AMP_OPT_LEVEL, config.TRAIN.ACCUMULATION_STEPS) == (3, "O1", 1)
    assert config.TRAIN.FSDP
    assert [note.split(" is an option")[0] for note in notes] == [
        "command line: DATA.CACHE_MODE 'full'", "command line: TRAIN.OPTIMIZER.USE_ZERO True",
    ]  # fmt: skip
    with pytest.raises(UserError, match="DATA.CACHE_MODE is 'all'; choose one of no, False, full, part"):
        load(tmp_path, "SEED: 1", "--cache-mode", "all")


@pytest.mark.parametrize(
    "typo, nearest",
    [("EVAL_FREK: 1", "EVAL_FREQ"), ("MODEL: {INTERN_IMAGE: {CORE_OPT: DCNv3}}", "MODEL.INTERN_IMAGE.CORE_OP"),
     ("AMP_TYP: float16", "AMP_TYPE"), ("TRAIN: {OPTIMIZER: {USE_ZERRO: True}}", "TRAIN.OPTIMIZER.USE_ZERO")],
)  # fmt: skip
def test_a_typo_is_still_named(tmp_path, typo, nearest):
    with pytest.raises(UserError, match=rf"unknown key .* \(did you mean {nearest}\?\)"):
        load(tmp_path, typo)


def test_an_operator_that_is_not_theirs_is_an_error(tmp_path):
    with pytest.raises(UserError, match="CORE_OP is 'DCNv4'; choose one of DCNv3, DCNv3_pytorch"):
        load(tmp_path, "MODEL: {INTERN_IMAGE: {CORE_OP: DCNv4}}")
    with pytest.raises(UserError, match="CUTMIX_MINMAX is .*; it must be .smallest, largest. side within 0 to 1"):
        load(tmp_path, "AUG: {CUTMIX_MINMAX: [0.8]}")


# ------------------------------------------------------------------------------------ optimisation
def published_scales(depths, decay, big):
    """The rates of the published `lr_decay_keywords`, written out: part of the model -> factor."""
    factor, exponent = {}, 0
    for level in (3, 2, 1, 0):
        for block in reversed(range(depths[level])):
            factor[f"levels.{level}.blocks.{block}"] = decay**exponent
            exponent += 1
    factor["patch_embed"] = factor["levels.0.blocks.0"]
    for level in (0, 1, 2):
        factor[f"levels.{level}.downsample"] = factor[f"levels.{level}.norm"] = factor[f"levels.{level + 1}.blocks.0"]
    full = ["levels.3.norm", "head"]
    full += (
        ["levels.2.post_norms", "dcnv3_head_x4", "dcnv3_head_x3", "clip_projector", "fc_norm"] if big else ["conv_head"]
    )
    return factor | dict.fromkeys(full, 1.0)


@pytest.mark.parametrize("size, decay", [("t", 0.875), ("h", 0.9)])
def test_layer_decay_is_the_published_table(tmp_path, size, decay):
    more = {"LR_LAYER_DECAY": True, "LR_LAYER_DECAY_RATIO": decay, "OPTIMIZER": {"DCN_LR_MUL": 0.1}}
    content = published_yaml(size, 640 if size == "h" else 224, True)
    content["TRAIN"] |= more
    config, _ = load(tmp_path, content)
    with torch.device("meta"):
        model = build_model(config)
    expected = published_scales(model.depths, decay, size == "h")
    assert expected["levels.3.blocks.0"] == pytest.approx(decay ** (model.depths[3] - 1))
    groups, met, sizes = parameter_groups(model, config), set(), {n: p.ndim for n, p in model.named_parameters()}
    for group in groups:
        for name in group["names"]:
            part = max((p for p in expected if f"{name}.".startswith(f"{p}.")), key=len)
            met.add(part)
            slow = ".dcn.offset." in name or "center_feature_scale_proj" in name
            assert group["lr_scale"] == pytest.approx(expected[part] * (0.1 if slow else 1)), name
            undecayed = name.endswith("bias") or sizes[name] == 1
            assert group["weight_decay"] == (0 if undecayed else 0.05), name
    assert met == expected.keys()
    assert sum(len(g["names"]) for g in groups) == len(list(model.parameters()))
    assert len(groups) <= 4 * (sum(model.depths) + 1)


def test_dcn_lr_mul_without_layer_decay(tmp_path):
    content = published_yaml("h", 384, False)
    config, _ = load(tmp_path, content)
    with torch.device("meta"):
        groups = parameter_groups(build_model(config), config)
    assert sorted((g["lr_scale"], g["weight_decay"]) for g in groups) == [(0.1, 0), (0.1, 0.05), (1, 0), (1, 0.05)]
    slow = {n for g in groups for n in g["names"] if g["lr_scale"] == 0.1}
    assert slow and all(".dcn.offset." in n or "center_feature_scale_proj" in n for n in slow)


# --------------------------------------------------------------------------------------- training
def test_eval_freq_and_start_epoch(run_main):
    """From epoch START_EPOCH on, validated every EVAL_FREQ epochs and at the end; every epoch is saved."""
    folder = run_main(TRAIN__EPOCHS=5, EVAL_FREQ=2, TRAIN__START_EPOCH=2)
    assert [line["epoch"] for line in epochs(folder)] == [4, 5]
    assert sorted(p.name for p in folder.glob("ckpt_epoch*")) == [f"ckpt_epoch_{k}.pth" for k in (3, 4, 5)]


def test_levels_are_frozen_by_their_numbers(tmp_path):
    config, _ = load(tmp_path, "TRAIN: {OPTIMIZER: {FREEZE_BACKBONE: [0, 2]}}")
    model = small()
    freeze(model, config.TRAIN.FREEZE)
    still = {name.split(".blocks")[0][:8] for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {"levels.0", "levels.2"}
    with pytest.raises(UserError, match="TRAIN.FREEZE: the model has no part 'levels.4'"):
        freeze(model, ["levels.4"])


def mixed(tmp_path, images, targets, classes=3, seed=0, **aug):
    off = {"MIXUP": 0.0, "CUTMIX": 0.0}
    config, _ = load(tmp_path, {"AUG": off | aug, "MODEL": {"NUM_CLASSES": classes}})
    torch.manual_seed(seed)
    return build_mixing(config)(images, targets)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_modes(tmp_path, mode):
    """Images that are the one-hot target itself: whatever is mixed, both are mixed alike; one ratio, or several."""
    targets = torch.arange(6)
    images = torch.eye(6)[:, :, None, None].expand(6, 6, 4, 4)[:, :6]
    pictures, soft = mixed(tmp_path, images, targets, classes=6, MIXUP=1.0, MIXUP_MODE=mode)
    assert torch.allclose(pictures.mean((2, 3)), soft, atol=1e-6)
    own = soft[torch.arange(6), targets]
    partner = soft - torch.diag(own)
    other = partner.argmax(1).tolist()
    assert other == ([5, 4, 3, 2, 1, 0] if mode == "pair" else [5, 0, 1, 2, 3, 4])
    ratios = {round(float(v), 4) for v in own}
    assert len(ratios) == {"batch": 1, "pair": 3, "elem": 6}[mode]


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_cutmix_within_bounds(tmp_path, mode):
    """The pasted part covers the share that the targets have, with sides within the bounds."""
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 40, 40)
    for seed in range(8):
        pictures, soft = mixed(
            tmp_path, images, torch.arange(4), classes=4, seed=seed, CUTMIX_MINMAX=[0.2, 0.5], MIXUP_MODE=mode
        )
        for k, (picture, target) in enumerate(zip(pictures, soft)):
            foreign = picture[0] != k
            rows, columns = foreign.any(1).sum().item(), foreign.any(0).sum().item()
            assert 8 <= rows <= 20 and 8 <= columns <= 20 and foreign.sum() == rows * columns
            assert target[(k - 1) % 4].item() == pytest.approx(rows * columns / 1600)


def test_uniform_drop_path(tmp_path):
    content = "MODEL: {DROP_PATH_RATE: 0.3, DROP_PATH_TYPE: %s, INTERN_IMAGE: {CHANNELS: 16, DEPTHS: [1, 1, 2, 1]}}"
    rates = {}
    for kind in ("uniform", "linear"):
        with torch.device("meta"):
            model = build_model(load(tmp_path, content % kind)[0])
        rates[kind] = [block.drop_path.probability for level in model.levels for block in level.blocks]
    assert rates["uniform"] == [0.3] * 5 and np.allclose(rates["linear"], [0, 0.075, 0.15, 0.225, 0.3])


# ---------------------------------------------------------------------------------------- weights
def test_a_22k_head_becomes_the_1k_head(tmp_path):
    """The logits of the reduced model are the outputs of the whole one at the published rows."""
    whole = small(num_classes=21841)
    fill(whole, 3)
    torch.save({"model": whole.state_dict()}, tmp_path / "22k.pth")
    model = small(num_classes=1000)
    report = checkpoint.load_pretrained(model, tmp_path / "22k.pth", LOG)
    assert report["replaced"] == []
    rows = np.loadtxt(Path(checkpoint.__file__).with_name("imagenet_22k_to_1k.txt"), int).ravel()
    assert (len(rows), len(set(rows)), rows[0], rows[999]) == (1000, 999, 359, rows.max())
    assert rows[849] == rows[850] == 11136  # teapot and teddy: the one duplicate
    assert (np.diff(rows) >= 0).all()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), whole.eval()(images)[:, rows])
    fresh = small(num_classes=14)
    before = fresh.head.weight.clone()
    assert checkpoint.load_pretrained(fresh, tmp_path / "22k.pth", LOG)["replaced"] == ["head.bias", "head.weight"]
    assert torch.equal(fresh.head.weight, before)


def test_rand_init_ft_head(tmp_path):
    """A thousandth of the initial values, also where 21,841 classes could be reduced; a head that fits is loaded."""
    whole = small(num_classes=21841)
    fill(whole, 3)
    torch.save({"model": whole.state_dict()}, tmp_path / "22k.pth")
    config = argparse.Namespace(
        MODEL=argparse.Namespace(TYPE="intern_image", PRETRAINED=str(tmp_path / "22k.pth")),
        TRAIN=argparse.Namespace(RAND_INIT_FT_HEAD=True),
    )
    model = small(num_classes=1000)
    before = model.head.weight.clone()
    start_weights(config, model, LOG)
    assert torch.equal(model.head.weight, before * 0.001)
    assert torch.equal(model.conv_head[0].weight, whole.conv_head[0].weight)
    same = small(num_classes=21841)
    start_weights(config, same, LOG)
    assert torch.equal(same.head.weight, whole.head.weight)


@pytest.mark.parametrize("size, side", dict.fromkeys((size, side) for size, side, _ in PUBLISHED))
def test_our_configurations_are_the_published_ones(tmp_path, size, side):
    """All that changes the model or its training, but for FSDP and mixed precision."""
    kind = {"inat": "h_22ktoinat18", "t": "t_1k", "s": "s_1k", "b": "b_1k"}.get(size, f"{size}_22kto1k")
    path = Path(__file__).parents[1] / "configs" / f"internimage_{kind}_{side}.yaml"
    ours = get_config(parse_args(["--cfg", str(path)]), data_values, own_values)
    theirs, _ = load(tmp_path, published_yaml(size, side, size != "inat"))
    found = differences(to_dict(theirs), to_dict(ours))
    of_theirs = {
        "DATA.BATCH_SIZE",
        "DATA.IMG_ON_MEMORY",
        "MODEL.NAME",
        "MODEL.PRETRAINED",
        "TRAIN.FSDP",
        "AMP_OPT_LEVEL",
    }
    assert not found.keys() - of_theirs - {"OUTPUT", "CFG", "RESULTS"}, found
