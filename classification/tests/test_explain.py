"""Grad-CAM against its closed form, where its places lie, and what DCNv3 samples."""

import functools
import json

import matplotlib.axes
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import predict
from benchmarks import localisation
from config import from_dict
from conftest import write_checkpoint
from dataset import tables
from dataset.labels import LABELS
from models import build_model
from predicting import explain, overlays

SMALL = {"CHANNELS": 16, "DEPTHS": [1, 1, 1, 1], "GROUPS": [1, 2, 4, 8]}


def model_of(size=64, **settings):
    torch.manual_seed(3)
    model = {"NUM_CLASSES": 5, "INTERN_IMAGE": {**SMALL, **settings}}
    return build_model(from_dict({"DATA": {"IMG_SIZE": size}, "MODEL": model}, "test")).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def test_grad_cam_is_what_each_place_adds_to_the_logit(images):
    model = model_of()
    maps = explain.grad_cam(model, images, [4, 0])
    with torch.no_grad():
        features = model.feature_maps(images)
    head = model.head.weight.detach()
    added = torch.einsum("kf,nfhw->nkhw", head[[4, 0]], features) / features[0, 0].numel()
    assert maps.shape == (2, 2, 2, 2) and 0 < (added > 0).float().mean() < 1
    torch.testing.assert_close(maps, added.relu(), rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        logits = added.sum((2, 3)) + model.head.bias[[4, 0]]
        torch.testing.assert_close(logits, model(images)[:, [4, 0]], rtol=1e-4, atol=1e-6)


def test_the_map_depends_on_the_weights(images):
    """Adebayo et al. 2018."""
    model = model_of()
    before = explain.grad_cam(model, images, [0])
    torch.manual_seed(4)
    nn.init.normal_(model.head.weight)
    after = explain.grad_cam(model, images, [0])
    assert not torch.allclose(before / before.max(), after / after.max(), atol=0.1)


class Shrinking(nn.Module):
    """Layers of positive weights, so that the gradient shows all that a place sees."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def feature_maps(self, images):
        return self.layers(images)


class Merge(nn.Module):
    """Halves as Swin does."""

    def forward(self, x):
        return sum(x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))


def conv(kernel, stride, padding, channels=1):
    return nn.Conv2d(channels, 1, kernel, stride, padding)


@pytest.mark.parametrize(
    "layers",
    [
        [conv(3, 2, 1, 3), conv(3, 2, 1), conv(3, 1, 1), conv(3, 2, 1)],  # InternImage
        [conv(7, 2, 3, 3), nn.AvgPool2d(3, 2, 1), conv(1, 2, 0)],  # ResNet
        [conv(4, 4, 0, 3), conv(7, 1, 3), conv(2, 2, 0)],  # ConvNeXt
        [conv(4, 4, 0, 3), Merge()],  # Swin
        [conv(3, 2, 0, 3), nn.AvgPool2d(2, 2), conv(5, 3, 2)],
    ],
)
def test_a_place_lies_in_the_middle_of_what_it_sees(layers):
    """Against the gradient: the middle of the pixels that a place in the middle depends on."""
    model = Shrinking(*layers)
    images = torch.rand(1, 3, 96, 96, requires_grad=True)
    features = model.feature_maps(images)
    n = features.shape[-1]
    (gradient,) = torch.autograd.grad(features[0, 0, n // 2, n // 2], images)
    seen = gradient[0, 0].sum(0).nonzero()
    middle = (seen.min() + seen.max() + 1).item() / 2 / 96
    assert explain.first_positions(model, 96)[n] + (n // 2) / n == pytest.approx(middle, abs=1e-3)


def test_the_places_of_intern_image():
    assert explain.first_positions(model_of(), 64) == {n: 0.5 / 64 for n in (64, 32, 16, 8, 4, 2)}


class Elsewhere(nn.Module):
    """A place each 4 pixels, whose features a DCNv3 layer takes from two places further right and one further up."""

    def __init__(self):
        super().__init__()
        self.dcn = explain.DCNv3(4, 1)
        for layer in (self.dcn.offset, self.dcn.mask):
            nn.init.zeros_(layer.weight)
        with torch.no_grad():
            self.dcn.offset.bias.view(-1, 2).copy_(torch.tensor([2.0, -1.0]))
            self.dcn.mask.bias.copy_(20.0 * (torch.arange(9) == 4))  # the point in the middle alone
            for layer in (self.dcn.input_proj, self.dcn.output_proj):
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)

    def feature_maps(self, images):
        places = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)
        return self.dcn(places.expand(-1, 4, -1, -1).permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)

    def classify(self, maps):
        return maps.mean((1, 2, 3))[:, None]


def test_full_resolution_shows_what_the_places_are_made_of():
    """A light spot: the place that shines is not the one that it lies in."""
    images = torch.zeros(1, 3, 64, 64)
    images[:, :, 24:28, 40:44] = 1  # row 6 and column 10 of the places
    model = Elsewhere()
    cam, fine = (function(model, images, [0])[0, 0] for function in (explain.grad_cam, explain.full_resolution))
    assert cam.shape == (16, 16) and divmod(int(cam.argmax()), 16) == (7, 8)
    x, y = explain.maximum(fine.numpy())
    assert fine.shape == (64, 64) and abs(64 * x - 42) <= 1 and abs(64 * y - 26) <= 1
    torch.testing.assert_close(fine.mean(), cam.mean())
    weight = fine.sum(0) / fine.sum(), fine.sum(1) / fine.sum()
    for share, middle in zip(weight, (42, 26)):
        assert share @ (torch.arange(64) + 0.5) == pytest.approx(middle, abs=0.01)
        assert share[middle - 8 : middle + 8].sum() > 0.97


def test_full_resolution_has_the_mean_of_the_places(images):
    model = model_of()
    cam, fine = (function(model, images, [4, 0]) for function in (explain.grad_cam, explain.full_resolution))
    assert fine.shape == (2, 2, 64, 64) and not fine.requires_grad and (fine >= 0).all()
    torch.testing.assert_close(fine.mean((2, 3)), cam.mean((2, 3)))
    nn.init.constant_(model.head.weight, 0)
    assert not explain.full_resolution(model, images, [0]).any()


def test_sampling_points_are_those_of_the_kernel_where_the_offsets_are_zero(images):
    model = model_of()
    for module in model.modules():
        if isinstance(module, explain.DCNv3):
            for layer in (module.offset, module.mask):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
    first = 0.5 / 64
    places = torch.tensor([[first + 1 / 2, first], [first + 0.3, first + 0.99]])
    levels = explain.sampling_points(model, images, places)
    for side, groups, (points, weights) in zip((16, 8, 4, 2), SMALL["GROUPS"], levels, strict=True):
        for k in (0, 1):
            cell = (places[k] - first).mul(side).round().clamp(max=side - 1).numpy()
            grid = {(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
            found = (points[k] - first) * side - cell
            assert {tuple(p) for p in found.round(4).astype(int)} == grid and len(found) == 9 * groups
            np.testing.assert_allclose(found, found.round(), atol=1e-4)
        np.testing.assert_allclose(weights, 1 / (9 * groups), rtol=1e-5)


@pytest.fixture(scope="module")
def gray():
    return np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)


def panel(path):
    """The pixels of an overlay."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_one_map_has_one_mark_and_no_map_none(gray, tmp_path, monkeypatch):
    """The mark is where the map is largest; sampling points have none of their own."""
    marks, levels = [], [(np.array([[0.2, 0.3], [2.0, 0.5]]), np.array([0.5, 0.5]))]
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda self, *a, **k: marks.append((*a[:2], a[2])) or plot(self, *a, **k)
    )
    for cam in (np.zeros((2, 2), np.float32), np.array([[0, 0.5], [0, 0]], np.float32)):
        for points in ((), levels):
            overlays.draw_overlay(tmp_path / "o.png", gray, (0, 0, 30, 40), cam, "Edema", levels=points)
    assert marks == [(22.5, 10.0, "+")] * 2


def test_one_scale_for_a_run_and_negatives_faded(gray, tmp_path):
    """How far an overlay is from the X-ray alone: by its own value against the scale's end, and weaker if negative."""

    def drawn(value, **options):
        cam = np.full((2, 2), value, np.float32)
        overlays.draw_overlay(tmp_path / "o.png", gray, (0, 0, 30, 40), cam, "Edema", highest=1.0, **options)
        return panel(tmp_path / "o.png")

    none = drawn(0.0)
    strength = [np.abs(drawn(value) - none).sum() for value in (0.05, 0.3, 1.0)]
    assert 0 < strength[0] < strength[1] < strength[2]
    assert np.abs(drawn(1.0, faded=True) - none).sum() < 0.6 * strength[2]


def test_the_title_names_threshold_calibration_and_auroc():
    text = overlays.title("Edema", 0.063, 0.21, False, True, 0.894)
    for part in ("Edema", "0.063", "threshold 0.210: negative", "AUROC in the test 0.894"):
        assert part in text
    assert "not calibrated" not in text and "positive" in overlays.title("Edema", 0.21, 0.21, True, False, None)
    assert (
        "not calibrated" in (bare := overlays.title("Edema", 0.5, None, True, False, None)) and "no threshold" in bare
    )


def test_file_names_of_labels_do_not_collide():
    names = ["Pleural Effusion", "A B", "A/B", "a_b", "A_B_2", "Röntgen (PA)"]
    files = overlays.file_names(names)
    assert files[0] == "Pleural_Effusion" and len({file.lower() for file in files}) == len(names)
    assert all("/" not in file for file in files)


def test_overlays_of_a_run(tmp_path, capsys):
    """Probability and threshold of a title are on one scale; a label is faded by its threshold; a rerun draws none."""
    path, _ = write_checkpoint(tmp_path / "a.pth")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 60), np.uint8))
    for name in ("a.png", "b.png"):
        image.save(tmp_path / name)
    evaluation, out, drawn = tmp_path / "e", tmp_path / "o.csv", []
    evaluation.mkdir()
    argv = [str(path), str(tmp_path / "a.png"), str(tmp_path / "b.png"), "-j", "0", "--output"]
    assert predict.main([*argv, str(out)]) == 0
    raw = float(tables.read_csv(out, ()).iloc[0]["Edema"])
    labels = {name: {"threshold": raw} for name in LABELS}
    report = {"thresholds": {"youden": {"rule": "", "labels": labels}}}
    (evaluation / "report.json").write_text(json.dumps(report))
    platt = {name: {"slope": 2.0, "intercept": -1.0} for name in LABELS}
    digest = predict.trained.load(path).digest
    calibration = {"platt": platt, "temperature": None, "chosen": dict.fromkeys(LABELS, {"method": "platt"})}
    (evaluation / "calibration.json").write_text(json.dumps(calibration))
    metrics = {"auc": dict.fromkeys(LABELS, 0.75), "checkpoint_sha256": digest}
    (evaluation / "metrics.json").write_text(json.dumps(metrics))
    flags = ["--thresholds", str(evaluation), "--calibrated", str(evaluation), "--sampling-points"]
    flags += ["--explain", str(tmp_path / "x"), "--labels", "Edema", "Fracture"]
    with pytest.MonkeyPatch.context() as patch:
        draw = overlays.draw_overlay
        patch.setattr(overlays, "draw_overlay", lambda *a, **k: drawn.append((a, k)) or draw(*a, **k))
        for _ in range(2):
            assert predict.main([*argv, str(tmp_path / "c.csv"), *flags]) == 0
    calibrated = 1 / (1 + np.exp(1.0 - 2 * np.log(raw / (1 - raw))))
    text = drawn[0][0][4]
    assert f"probability {calibrated:.3f}, threshold {calibrated:.3f}: positive\ncalibrated" in text and "0.750" in text
    files = sorted(file.name for file in (tmp_path / "x").iterdir())
    assert files == [f"00000{k}_{n}_{label}.png" for k, n in ((1, "a"), (2, "b")) for label in ("Edema", "Fracture")]
    assert len(drawn) == 4 and len({k["highest"] for _, k in drawn}) == 1 and all(k["levels"] for _, k in drawn)
    assert max(float(a[3].max()) for a, _ in drawn) == pytest.approx(drawn[0][1]["highest"])
    entry = json.loads((tmp_path / "run.json").read_text())["c.csv"]
    assert entry["thresholds"]["Edema"] == pytest.approx(calibrated) and entry["overlay_scale"] > 0


def test_the_benchmark_counts_the_hits_of_each_method(tmp_path, capsys, monkeypatch):
    """Of a model with label attention that attention beside Grad-CAM; counted again by the pixels of the sign."""
    names = ["Edema", "Pneumothorax", "Support Devices"]
    monkeypatch.setattr(localisation, "SIGNS", dict.fromkeys(names))
    monkeypatch.setattr(localisation, "draw", functools.partial(localisation.draw, size=64))
    options = {"MODEL__HEAD": "label_attention", "MODEL__HEAD_WIDTH": 32, "DATA__IMG_SIZE": 64}
    path, model = write_checkpoint(tmp_path / "c.pth", labels=names, **options)
    localisation.main([str(path), "--images", "3"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    start = lines.index(["label", "attention", "Grad-CAM", "untrained", "its mean map", "centre", "anywhere"])
    found = {line[0]: line[1:] for line in lines[start:]}
    asked = predict.trained.load(path)
    for k, method in enumerate(("attention", "Grad-CAM")):
        hits = []
        for picture, field in localisation.drawings("Edema", 3, windows=True):
            image = asked.normalize(asked.reader().transform(Image.fromarray(picture))[None])
            cam = explain.full_resolution(model, image, [0], method=method)[0, 0]
            row, column = divmod(int(cam.argmax()), 64)
            row, column = (int((at + 0.5) / 64 * side) for at, side in zip((row, column), picture.shape))
            hits.append(field[row, column] == 0)
        assert found["Edema"][k] == f"{np.mean(hits):.2f}"
    drawn = [line[0] for line in lines[start + len(names) + 6 :]]
    assert drawn[3:] == [
        "nothing",
        "label_attention",
        "head",
        "conv_head",
        "levels.3",
        "levels.2",
        "levels.1",
        "levels.0",
    ]
