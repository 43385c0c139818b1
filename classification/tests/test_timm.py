"""Backbones of timm: trained, resumed, evaluated, exported and explained as InternImage is; each mistake one line."""

import csv
import json
import logging

import common.torchvision_shim  # noqa: F401  (before timm)

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay

import config as config_module
import dcnv3
import export
import predict
from common.errors import UserError
from conftest import ROOT, epochs
from models import build_model, own_values
from models.cost import count_gmacs
from predicting import explain
from training import checkpoint
from training.optimizer import parameter_groups

SMALL = "test_resnet"  # made for tests by timm's authors


def config_of(name=SMALL, **opts):
    content = {"MODEL": {"TYPE": "timm", "NUM_CLASSES": 14, "TIMM": {"NAME": name}}}
    for key, value in opts.items():
        *sections, last = key.split("__")
        node = content
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return config_module.from_dict(content, "test")


@pytest.fixture
def run_timm(run_main):
    """run_main with a backbone of timm."""

    def run(*flags, name=SMALL, **opts):
        return run_main(*flags, MODEL__TYPE="timm", MODEL__NAME="tiny", MODEL__TIMM__NAME=name, **opts)

    return run


# ------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout", "hrnet_w18_small", "densenet121"])
def test_what_a_backbone_says_of_itself(name):
    """Logits are timm's own of the same weights; features with places lead to the same logits."""
    config = config_of(name, DATA__IMG_SIZE=64)
    torch.manual_seed(0)
    model = build_model(config).eval()
    theirs = timm.create_model(name, num_classes=14).eval()
    theirs.load_state_dict({k.removeprefix("backbone."): v for k, v in model.state_dict().items()})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-5)
        maps = model.feature_maps(images)
        assert maps.shape[2:] == (2, 2)
        torch.testing.assert_close(model.classify(maps), model(images), rtol=1e-4, atol=1e-5)
    assert ("MODEL.DROP_PATH_RATE" in model.uses) == name.startswith("test_")


def test_the_rates_are_timms_own():
    config = config_of("test_vit", DATA__IMG_SIZE=64, TRAIN__LR_LAYER_DECAY=True, TRAIN__LR_LAYER_DECAY_RATIO=0.5)
    model = build_model(config)
    network = model.backbone
    of_timm = param_groups_layer_decay(
        network, weight_decay=0.05, no_weight_decay_list=network.no_weight_decay(), layer_decay=0.5
    )
    expected = {id(p): (g["lr_scale"], g["weight_decay"]) for g in of_timm for p in g["params"]}
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in parameter_groups(model, config) for p in g["params"]}
    assert found == expected and len(expected) == len(list(model.parameters()))
    assert found[id(network.head.weight)] == (1.0, 0.05)
    assert found[id(network.pos_embed)] == (0.5 ** (len(network.blocks) + 1), 0.0)


def test_size_and_normalisation_are_the_backbones_own_unless_set(tmp_path):
    path = tmp_path / "a.yaml"

    def load(text):
        path.write_text("MODEL: {TYPE: timm, TIMM: {NAME: test_vit}}\n" + text)
        c = config_module.get_config(config_module.parse_args(["--cfg", str(path)]), own_values)
        return c.DATA.IMG_SIZE, c.AUG.MEAN, c.AUG.STD

    assert load("") == (160, [0.5] * 3, [0.5] * 3)
    # 224 and ImageNet's mean are what config.py has as defaults: set, they count all the same.
    imagenet = [0.485, 0.456, 0.406]
    assert load(f"DATA: {{IMG_SIZE: 224}}\nAUG: {{MEAN: {imagenet}}}") == (224, imagenet, [0.5] * 3)


def test_its_name_names_the_run(tmp_path):
    def load(*opts, cfg="densenet121_mimic_cxr_224.yaml"):
        args = config_module.parse_args(["--cfg", str(ROOT / "configs" / cfg), "--opts", "SEED", "1", *opts])
        config = config_module.get_config(args)
        return config.MODEL.NAME, config_module.backbone_name(config)

    assert load() == ("densenet121", "densenet121.ra_in1k")
    assert load("MODEL.TIMM.NAME", "resnet50") == ("resnet50", "resnet50")
    b = "internimage_b_mimic_cxr_224.yaml"
    assert load("MODEL.TYPE", "timm", "MODEL.TIMM.NAME", "resnet50", cfg=b) == ("resnet50", "resnet50")
    assert load(cfg=b) == ("internimage_b", "internimage_b")


# ------------------------------------------------------------------------------------------ cost
class Attention(torch.nn.Module):
    """One head over S * S places of three channels, the places of the image: two products of (S * S)^2 * 3 each."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        places = self.scale * images.flatten(2).transpose(1, 2)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(places, places, places)


def test_the_cost_of_attention_and_of_dcnv3():
    assert count_gmacs(Attention(), 8) == 2 * 64**2 * 3 / 1e9

    class Sampling(Attention):
        def forward(self, images):
            x = self.scale * images.permute(0, 2, 3, 1).repeat(1, 1, 1, 4)  # 12 channels
            offset, mask = (torch.zeros(*x.shape[:3], 2 * 9 * k) for k in (2, 1))  # 2 groups of 9 points
            return dcnv3.dcnv3(x, offset, mask, group=2)

    assert count_gmacs(Sampling(), 8) == 5 * 64 * 9 * 12 / 1e9


@pytest.mark.parametrize("name, published", [("resnet50", 4.09), ("swin_tiny_patch4_window7_224", 4.5), ("T", 5)])
def test_the_cost_is_the_published_one(name, published):
    """torchvision's table, table 1 of Swin, table 1 of InternImage; to the digits that are printed there."""
    if name == "T":
        args = config_module.parse_args(["--cfg", str(ROOT / "configs" / "internimage_t_1k_224.yaml")])
        config = config_module.get_config(args)
    else:
        config = config_of(name, MODEL__NUM_CLASSES=1000)
    gmacs = count_gmacs(build_model(config), 224)
    assert round(gmacs, len(str(published).partition(".")[2])) == published


# ------------------------------------------------------------------------------ pretrained weights
@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """published(name) -> a file as the hub has it: timm's names, 1,000 classes, safetensors."""
    folder = tmp_path_factory.mktemp("hub")

    def write(name):
        torch.manual_seed(1)
        save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")
        return folder / f"{name}.safetensors"

    return write


LOG = logging.getLogger("test_timm")


@pytest.mark.parametrize("form", ["safetensors", "pth", "bin", "wrapped", "ours"])
def test_every_form_of_a_weights_file(published, form, tmp_path):
    path = published("test_convnext")
    weights = checkpoint.read(path)
    if form != "safetensors":
        content = {
            "wrapped": {"state_dict": {f"module.{k}": v for k, v in weights.items()}},
            "ours": {"model": {f"backbone.{k}": v for k, v in weights.items()}},
        }.get(form, weights)
        path = tmp_path / f"w.{form if form == 'bin' else 'pth'}"
        torch.save(content, path)
    model = build_model(config_of("test_convnext", DATA__IMG_SIZE=64))
    head = model.backbone.head.fc.weight.clone()
    keys = checkpoint.load_pretrained(model, path, LOG)
    assert keys["replaced"] == ["head.fc.bias", "head.fc.weight"]
    assert keys["missing"] == [] and keys["unexpected"] == []
    assert sorted(keys["loaded"]) == sorted(weights.keys() - keys["replaced"])
    assert torch.equal(model.backbone.head.fc.weight, head)
    assert all(torch.equal(model.backbone.state_dict()[k], weights[k]) for k in keys["loaded"])


def test_a_head_that_fits_is_taken(published):
    model = build_model(config_of("test_convnext", DATA__IMG_SIZE=64, MODEL__NUM_CLASSES=1000))
    keys = checkpoint.load_pretrained(model, published("test_convnext"), LOG)
    assert keys["replaced"] == [] and "head.fc.weight" in keys["loaded"]


def test_position_tables_fit_another_image_size(published):
    """timm resamples them; nothing else may change."""
    path = published("test_vit")
    model = build_model(config_of("test_vit", DATA__IMG_SIZE=224))
    checkpoint.load_pretrained(model, path, LOG)
    ours, theirs = model.backbone.state_dict(), checkpoint.read(path)
    assert ours["pos_embed"].shape[1] == 1 + 14**2 and theirs["pos_embed"].shape[1] == 1 + 10**2
    table = theirs["pos_embed"][0, 1:].T.reshape(1, -1, 10, 10)
    expected = torch.nn.functional.interpolate(table, (14, 14), mode="bicubic", antialias=True)
    torch.testing.assert_close(ours["pos_embed"][0, 1:].T.reshape(1, -1, 14, 14), expected)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if "pos" not in k and "head" not in k)


@pytest.mark.parametrize(
    "name, other",
    [("test_convnext", "test_resnet"), ("test_convnext2", "test_convnext"), ("test_vit", "test_vit3"),
     ("test_resnet", "test_vit"), ("vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224")],
)  # fmt: skip
def test_weights_of_another_backbone(published, name, other):
    path = published(other)
    with pytest.raises(UserError, match=f"{other}.safetensors is of another architecture: .*; choose the configur"):
        checkpoint.load_pretrained(build_model(config_of(name, DATA__IMG_SIZE=64)), path, LOG)


def test_the_download(published, run_timm, monkeypatch):
    asked = []
    path = published(SMALL)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *what: asked.append(what) or str(path))
    folder = run_timm(TRAIN__EPOCHS=1, MODEL__TIMM__DOWNLOAD=True)
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors")]
    assert "replaced: fc.bias, fc.weight" in (folder / "log_rank0.txt").read_text()

    def refuse(*_):
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    message = (
        r"DOWNLOAD: https://huggingface.co/timm/test_resnet\S+ cannot be downloaded \(Name or service not known\); "
    )
    with pytest.raises(UserError, match=message + "fetch it on a machine with a network and name it with --pretrained"):
        run_timm(TRAIN__EPOCHS=1, MODEL__TIMM__DOWNLOAD=True, out="other")
    assert len(epochs(run_timm(TRAIN__EPOCHS=2, MODEL__TIMM__DOWNLOAD=True))) == 2  # a resumed run needs no network


# -------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "name, size, message",
    [
        ("", 64, "MODEL.TYPE timm needs MODEL.TIMM.NAME, such as densenet121"),
        (
            "densenet_121",
            64,
            r"MODEL.TIMM.NAME is 'densenet_121': timm \S+ has no such model \(did you mean densenet121",
        ),
        ("densenet121.ra_in2k", 64, r"'densenet121.ra_in2k': timm .* \(did you mean densenet121.ra_in1k\?\)"),
        ("hf-hub:someone/model", 64, "MODEL.TIMM.NAME is 'hf-hub:someone/model': timm .* has no such model"),
        ("inception_v3", 64, r"inception_v3 does not take images of DATA.IMG_SIZE 64 \(.*\); its own size is 299"),
        ("levit_128s", 64, "MODEL.TIMM.NAME: levit_128s does not end in one linear layer"),
    ],
)
def test_a_backbone_that_cannot_be(name, size, message):
    with pytest.raises(UserError, match=message):
        build_model(config_of(name, DATA__IMG_SIZE=size))


def test_settings_without_effect():
    def named(config, uses=()):
        lines = config_module.without_effect(config, "multilabel", uses, "cpu").values()
        return [line.split(" has no")[0] for line in lines]

    config = config_of(
        "densenet121", DATA__IMG_SIZE=64, MODEL__DROP_RATE=0.1, MODEL__DROP_PATH_RATE=0.3, TRAIN__USE_CHECKPOINT=True,
        MODEL__INTERN_IMAGE={"CHANNELS": 32}, TRAIN__OPTIMIZER={"DCN_LR_MUL": 0.1},
    )  # fmt: skip
    assert named(config, build_model(config).uses) == [
        "MODEL.DROP_PATH_RATE 0.3", "MODEL.INTERN_IMAGE.CHANNELS 32", "TRAIN.OPTIMIZER.DCN_LR_MUL 0.1",
    ]  # fmt: skip
    intern_image = {"MODEL": {"TIMM": {"NAME": "densenet121", "DOWNLOAD": True}}}
    assert named(config_module.from_dict(intern_image, "test"), {"MODEL.DROP_PATH_RATE"}) == [
        "MODEL.TIMM.NAME 'densenet121'", "MODEL.TIMM.DOWNLOAD True",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------- the runs
def test_a_run_that_is_resumed_equals_one_that_is_not(run_timm, tmp_path):
    whole = run_timm(TRAIN__EPOCHS=2, out="whole")
    run_timm(TRAIN__EPOCHS=1, TRAIN__WARMUP_EPOCHS=1, out="parts")
    saved = checkpoint.read(tmp_path / "parts" / "tiny" / "default" / checkpoint.LAST)
    assert saved["epoch"] == 1
    parts = run_timm(TRAIN__EPOCHS=2, out="parts")
    one, two = (checkpoint.read(folder / checkpoint.LAST) for folder in (whole, parts))
    for kind in ("model", "model_ema"):
        assert all(torch.equal(one[kind][k], two[kind][k]) for k in one[kind]), kind
    assert epochs(whole)[-1] == epochs(parts)[-1]


def test_trained_evaluated_predicted_explained_exported(run_timm, tree, tmp_path, capsys):
    folder = run_timm(TRAIN__EPOCHS=1)
    run_timm("--eval", "--ema", TRAIN__EPOCHS=1)
    metrics = json.loads(next(tmp_path.glob("out/results/*/metrics.json")).read_text())
    model = build_model(config_of(DATA__IMG_SIZE=32))
    assert metrics["backbone"] == SMALL and metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["gmacs"] > 0 and metrics["images_per_s"] > 0 and metrics["device"].endswith("float32, batch 16")

    best = folder / checkpoint.BEST
    image = min(tree.rglob("*.jpg"))
    predict.main([str(best), str(image), "--output", str(tmp_path / "p.csv"), "-j", "0",
                  "--explain", str(tmp_path / "maps"), "--labels", "Edema"])  # fmt: skip
    assert len(list((tmp_path / "maps").glob("*.png"))) == 1
    with open(tmp_path / "p.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["Edema"]) < 1
    with pytest.raises(UserError, match="test_vit: its last features are tokens, not feature maps"):
        explain.check(build_model(config_of("test_vit", DATA__IMG_SIZE=64)), 64, "v.pth")
    export.main([str(best), "--output", str(tmp_path / "m.pt2"), "--format", "torch"])
    assert "largest difference from PyTorch" in capsys.readouterr().out


def test_recomputation_changes_no_gradient():
    def gradients(recompute):
        config = config_of("test_convnext", DATA__IMG_SIZE=64, TRAIN__USE_CHECKPOINT=recompute)
        torch.manual_seed(0)
        model = build_model(config)
        assert ("TRAIN.USE_CHECKPOINT" in model.uses) == recompute
        model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True)))
