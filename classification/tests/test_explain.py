"""Grad-CAM against its closed form, where its places lie, and what DCNv3 samples."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from config import from_dict
from models import build_model
from predicting import explain

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
    assert explain.first_places(model, 96)[n] + (n // 2) / n == pytest.approx(middle, abs=1e-3)


def test_the_places_of_intern_image():
    assert explain.first_places(model_of(), 64) == {n: 0.5 / 64 for n in (64, 32, 16, 8, 4, 2)}


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


def test_a_map_of_zeros_has_no_mark(tmp_path):
    """One panel instead of two: there is no place to look from."""
    grey, widths = np.zeros((40, 30), np.uint8), []
    levels = [(np.array([[0.2, 0.3], [2.0, 0.5]]), np.array([0.5, 0.5]))]
    for cam in (np.zeros((2, 2), np.float32), np.array([[0, 0.5], [0, 0]], np.float32)):
        explain.draw_overlay(tmp_path / "o.png", grey, (0, 0, 30, 40), cam, (0.3, 0.4), levels, "Edema: 0.1")
        widths.append(Image.open(tmp_path / "o.png").width)
    assert widths[0] < widths[1]
