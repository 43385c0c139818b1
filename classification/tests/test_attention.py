"""A query per label, and the fusion of a study's images: against formulas, and whatever the padding and the order."""

import itertools
import logging

import common.torchvision_shim  # noqa: F401

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from common.studies import Studies, join
from config import from_dict
from conftest import write_checkpoint
from models import build_model
from predicting import explain
from training import checkpoint
from training.optimizer import parameter_groups
from training.step import freeze

SMALL = {"CHANNELS": 16, "DEPTHS": [1, 1, 1, 1], "GROUPS": [1, 2, 4, 8]}
LOG = logging.getLogger("test")


def config_of(unit="image", train=None, **model):
    model = {"NUM_CLASSES": 5, "INTERN_IMAGE": SMALL, "HEAD_WIDTH": 64, **model}
    return from_dict({"DATA": {"IMG_SIZE": 64, "UNIT": unit}, "MODEL": model, "TRAIN": train or {}}, "test")


def model_of(unit="image", **model):
    torch.manual_seed(3)
    found = build_model(config_of(unit, **model)).eval()
    for name, parameter in found.named_parameters():  # what begins as zeros
        if "_attention" in name and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return found


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def studies(images):
    """One of three images and one of two."""
    return Studies(images, torch.tensor([1, 2, 3, 0, 1]), torch.tensor([[0, 1, 2], [3, 4, -1]]))


def test_a_query_per_label_by_its_formula(images):
    """Softmax of query times key, by head, written out; what comes behind it is PyTorch's own."""
    model = model_of(HEAD="label_attention")
    head, maps = model.label_attention, model.feature_maps(images)
    with torch.no_grad():
        tokens = head.norm0(head.project(maps.flatten(2).transpose(1, 2)))
        wq, wk, wv = head.attention.in_proj_weight.chunk(3)
        bq, bk, bv = head.attention.in_proj_bias.chunk(3)
        query, key, value = head.labels.query @ wq.T + bq, tokens @ wk.T + bk, tokens @ wv.T + bv
        parts, weights = [], []
        for h in (slice(0, 32), slice(32, 64)):
            weights.append((query[:, h] @ key[..., h].transpose(1, 2) / 32**0.5).softmax(-1))
            parts.append(weights[-1] @ value[..., h])
        answers = head.norm1(head.labels.query + head.attention.out_proj(torch.cat(parts, -1)))
        answers = head.norm2(answers + head.mlp(answers))
        logits = torch.einsum("nld,ld->nl", answers, head.labels.weight) + head.labels.bias
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-5)
        assert logits.std() > 0.1
        shown = explain.position_maps(model, images, [4, 0])
        torch.testing.assert_close(shown.flatten(2), torch.stack(weights).mean(0)[:, [4, 0]], rtol=1e-4, atol=1e-6)


def test_explain_shows_the_attention_and_the_benchmark_both(images):
    model = model_of(HEAD="label_attention")
    assert explain.methods(model) == ["attention", "Grad-CAM"] and explain.methods(model_of()) == ["Grad-CAM"]
    coarse, fine = explain.position_maps(model, images, [1]), explain.full_resolution(model, images, [1])
    assert coarse.shape == (5, 1, 2, 2) and fine.shape == (5, 1, 64, 64)
    torch.testing.assert_close(coarse.sum((2, 3)), torch.ones(5, 1))
    torch.testing.assert_close(fine.mean((2, 3)), coarse.mean((2, 3)))
    other = explain.full_resolution(model, images, [1], method="Grad-CAM")
    assert not torch.allclose(other / other.max(), fine / fine.max(), atol=0.1)


@pytest.mark.parametrize("fusion, function", [("mean", torch.mean), ("max", torch.amax)])
@pytest.mark.parametrize("head", ["pool", "label_attention"])
def test_mean_and_max_of_the_logits(images, studies, fusion, function, head):
    model, alone = model_of("study", FUSION=fusion, HEAD=head), model_of(HEAD=head)
    with torch.no_grad():
        logits = alone(images)
        expected = torch.stack([function(logits[rows], dim=0) for rows in ([0, 1, 2], [3, 4])])
        torch.testing.assert_close(model(studies), expected, rtol=0, atol=1e-6)
        assert torch.equal(model(images), logits)  # a study of one
    assert [f"backbone.{name}" for name in alone.state_dict()] == [*model.state_dict()]  # no new parameters


@pytest.mark.parametrize("fusion", ["mean", "max", "attention"])
def test_neither_padding_nor_the_order_nor_the_other_studies_count(images, studies, fusion):
    model = model_of("study", FUSION=fusion)
    with torch.no_grad():
        logits = model(studies)
        same = [
            model(studies._replace(rows=F.pad(studies.rows, (0, 4), value=-1))),
            model(studies._replace(rows=torch.tensor([[2, 0, 1], [4, 3, -1]]))),
            torch.cat([model(Studies(images[s], studies.view[s], torch.arange(n)[None])) for s, n in
                       ((slice(0, 3), 3), (slice(3, 5), 2))]),
        ]  # fmt: skip
        for other in same:
            torch.testing.assert_close(other, logits, rtol=0, atol=2e-6)
        alike = model(studies._replace(view=torch.tensor([2, 1, 3, 0, 1])))
        changed = (alike - logits).abs().amax(1) > 1e-4
        assert changed.tolist() == [fusion == "attention", False]  # the views of the first study are other ones
        twice = model(studies._replace(rows=torch.tensor([[0, 1, 2], [3, 3, -1]])))
        assert (twice[1] - logits[1]).abs().max() > 1e-3  # images do count


def test_explain_shows_images_of_a_study_by_its_own_logits(studies):
    """Grad-CAM of the study's logits, by finite differences along a channel; an image's head attends
    as in the image model."""
    model, labels, channels = model_of("study", FUSION="attention").double(), [0, 3], [7, 50, 120, 191]
    with torch.no_grad():
        maps = model.feature_maps(studies.images.double())
        maps[:, [c for c in range(maps.shape[1]) if c not in channels]] = 0
        expected = torch.zeros(5, 2, *maps.shape[2:], dtype=torch.double)
        before = model.classify(maps, *studies[1:]).sum(0)
        for image, channel in itertools.product(range(5), channels):
            moved = maps.clone()
            moved[image, channel] += 1e-5
            weight = (model.classify(moved, *studies[1:]).sum(0) - before)[labels] / 1e-5 / maps[0, 0].numel()
            expected[image] += weight[:, None, None] * maps[image, channel]
    found = explain.METHODS["Grad-CAM"](model, maps.requires_grad_(), labels, studies[1:])
    torch.testing.assert_close(torch.stack([*found], 1), expected.relu(), rtol=1e-3, atol=1e-6)
    assert expected.relu().any()
    shown = explain.position_maps(model.float(), studies.images, labels, studies[1:])
    turned = studies._replace(rows=torch.tensor([[2, 0, 1], [4, 3, -1]]))
    torch.testing.assert_close(explain.position_maps(model, studies.images, labels, turned[1:]), shown)
    head = {"HEAD": "label_attention"}
    both = [explain.position_maps(m, studies.images, labels, study) for m, study in
            ((model_of("study", FUSION="attention", **head), studies[1:]), (model_of(**head), ()))]  # fmt: skip
    assert all(torch.equal(maps.sum((2, 3)).round(decimals=5), torch.ones(5, 2)) for maps in both)


def test_items_joined_to_a_batch(studies):
    one = Studies(studies.images[:3], studies.view[:3], torch.tensor([[0, 1, 2]]))
    two = Studies(studies.images[3:], studies.view[3:], torch.tensor([[0, 1]]))
    assert all(torch.equal(a, b) for a, b in zip(join([one, two]), studies, strict=True))


@pytest.mark.parametrize(
    "unit, model",
    [("image", {"HEAD": "label_attention"}), ("study", {"FUSION": "attention"}),
     ("image", {"HEAD": "label_attention", "TYPE": "timm", "TIMM": {"NAME": "test_convnext"}})],
)  # fmt: skip
def test_all_that_trains_gets_a_gradient(unit, model, studies):
    """DistributedDataParallel waits for those that do not: the backbone's own classifier is one, and is frozen."""
    model = model_of(unit, **model).train()
    model(studies if unit == "study" else studies.images).sum().backward()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in model.named_parameters() if p.grad is not None}
    frozen = {name for name, _ in model.named_parameters()} - trains
    assert all("head" in name for name in frozen) and len(frozen) in ((0,) if unit == "study" else (2, 3, 4))


def test_two_stages(tmp_path, caplog, studies):
    """An image model's checkpoint is the backbone of a study model, which is frozen or learns at a rate of its own."""
    caplog.set_level(logging.INFO)
    labels = [f"label {k}" for k in range(5)]
    path, trained = write_checkpoint(
        tmp_path / "image.pth", labels=labels, DATA__IMG_SIZE=64, MODEL__DROP_PATH_RATE=0.0
    )
    model = model_of("study", FUSION="attention")
    before = model.study_attention.labels.query.clone()
    found = checkpoint.load_pretrained(model, path, LOG)
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in model.backbone.state_dict().items())
    assert torch.equal(model.study_attention.labels.query, before)
    assert found["replaced"] == found["unexpected"] == [] and found["missing"] == model.own_keys()
    assert "missing: study_attention.project.weight, " in caplog.text
    # A mean has nothing else: it is the image model.
    mean = model_of("study")
    assert checkpoint.load_pretrained(mean, path, LOG)["missing"] == []
    with torch.no_grad():
        torch.testing.assert_close(mean(studies)[1], trained(studies.images[3:]).mean(0))

    scaled = config_of("study", FUSION="attention", train={"BACKBONE_LR_SCALE": 0.1, "WEIGHT_DECAY": 0.05})
    rates = {n: g["lr_scale"] for g in parameter_groups(model, scaled) for n in g["names"]}
    assert {n.split(".")[0]: rate for n, rate in rates.items()} == {"backbone": 0.1, "study_attention": 1.0}
    undecayed = {n for g in parameter_groups(model, scaled) if not g["weight_decay"] for n in g["names"]}
    assert {"study_attention.labels.query", "study_attention.view.weight"} <= undecayed

    freeze(model, ["backbone"])
    model.train().backbone.eval()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        features = model.feature_maps(studies.images)
    assert kept == [] and not features.requires_grad
    model(studies).sum().backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"study_attention"}


@pytest.mark.parametrize("unit, model", [("image", {"HEAD": "label_attention"}), ("study", {"FUSION": "attention"}),
                                         ("study", {}), ("study", {"HEAD": "label_attention"})])  # fmt: skip
def test_a_whole_checkpoint_is_loaded_whole_and_its_backbone_elsewhere(unit, model, tmp_path):
    source, again, image = model_of(unit, **model), model_of(unit, **model), model_of()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    assert checkpoint.load_pretrained(again, tmp_path / "w.pth", LOG)["missing"] == []
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in source.state_dict().items())
    checkpoint.load_pretrained(image, tmp_path / "w.pth", LOG)
    prefix = next(k for k in source.state_dict() if k.endswith("patch_embed.conv1.weight")).removesuffix(
        "patch_embed.conv1.weight"
    )
    assert torch.equal(image.patch_embed.conv1.weight, source.state_dict()[f"{prefix}patch_embed.conv1.weight"])
    # Other labels: the queries and the last layer are as initialised.
    few = model_of(unit, **model | {"NUM_CLASSES": 3})
    replaced = checkpoint.load_pretrained(few, tmp_path / "w.pth", LOG)["replaced"]
    assert {k.split(".")[-2] for k in replaced} <= {"labels", "head"} and replaced


@pytest.mark.parametrize("head", ["pool", "label_attention"])
def test_attention_starts_as_the_mean_of_the_image_model(tmp_path, studies, head):
    alone, study = model_of(HEAD=head), build_model(config_of("study", FUSION="attention", HEAD=head)).eval()
    torch.save({"model": alone.state_dict()}, tmp_path / "w.pth")
    missing = checkpoint.load_pretrained(study, tmp_path / "w.pth", LOG)["missing"]
    assert {name.split(".")[0] for name in missing} == {"study_attention"}
    with torch.no_grad():
        logits = alone(studies.images)
        expected = torch.stack([logits[:3].mean(0), logits[3:].mean(0)])
        torch.testing.assert_close(study(studies), expected, rtol=0, atol=1e-6)


def test_layer_decay_reaches_the_backbone():
    config = config_of("study", FUSION="attention", train={"LR_LAYER_DECAY": True, "LR_LAYER_DECAY_RATIO": 0.5})
    rates = {n: g["lr_scale"] for g in parameter_groups(build_model(config), config) for n in g["names"]}
    plain = config_of(train={"LR_LAYER_DECAY": True, "LR_LAYER_DECAY_RATIO": 0.5})
    expected = {n: g["lr_scale"] for g in parameter_groups(build_model(plain), plain) for n in g["names"]}
    for name, rate in rates.items():
        assert rate == (expected[name.removeprefix("backbone.")] if name.startswith("backbone.") else 1.0)
    assert min(rates.values()) == 0.5**3


class Flat(torch.nn.Module):
    """A backbone without feature maps."""

    classifier, uses = "fc", frozenset()

    def __init__(self, classes):
        super().__init__()
        self.fc = torch.nn.Linear(3, classes)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))


def test_bad_input(monkeypatch):
    with pytest.raises(UserError, match=r"MODEL.FUSION max is of the images of a study, but DATA.UNIT is image"):
        build_model(config_of(FUSION="max"))
    with pytest.raises(UserError, match="DATA.MAX_VIEWS is 0; it must be at least 1"):
        from_dict({"DATA": {"MAX_VIEWS": 0}}, "test")
    with pytest.raises(UserError, match="HEAD_WIDTH is 100; it must be a multiple of 32"):
        config_of(HEAD_WIDTH=100)
    for options in ({"HEAD": "label_attention"}, {"FUSION": "attention"}):
        unit = "study" if "FUSION" in options else "image"
        with pytest.raises(UserError, match="test_vit: its last features are tokens, not feature maps"):
            build_model(config_of(unit, TYPE="timm", TIMM={"NAME": "test_vit"}, **options))
        monkeypatch.setattr("models.intern_image.build", lambda config: Flat(config.MODEL.NUM_CLASSES))
        with pytest.raises(UserError, match="MODEL.TYPE intern_image has no feature_maps"):
            build_model(config_of(unit, **options))
        monkeypatch.undo()


def test_logits_are_float32_under_autocast(studies):
    """Rounded to bfloat16 they would tie."""
    model = model_of("study", FUSION="attention")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(studies)
    assert rounded.dtype == torch.float32
    assert len(np.unique(rounded.flatten().numpy())) == 10
