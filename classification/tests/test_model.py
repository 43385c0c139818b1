"""The model against the published names, shapes and logits, and the loading of foreign weights."""

import json
import logging
import math
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from models.intern_image import InternImage
from training import checkpoint

GOLDEN = Path(__file__).parent / "golden"
LOGITS = json.loads((GOLDEN / "internimage_logits.json").read_text())
LOG = logging.getLogger("test")

POST = dict(layer_scale=1e-5, post_norm=True)
CLIP = dict(dw_kernel_size=5, use_clip_projector=True, center_feature_scale=True)
VARIANTS = {
    "t": dict(channels=64, depths=[4, 4, 18, 4], groups=[4, 8, 16, 32]),
    "s": dict(channels=80, depths=[4, 4, 21, 4], groups=[5, 10, 20, 40], **POST),
    "b": dict(channels=112, depths=[4, 4, 21, 4], groups=[7, 14, 28, 56], **POST),
    "l": dict(channels=160, depths=[5, 5, 22, 5], groups=[10, 20, 40, 80], offset_scale=2.0, **POST),
    "xl": dict(channels=192, depths=[5, 5, 24, 5], groups=[12, 24, 48, 96], offset_scale=2.0, **POST),
    "h": dict(
        channels=320, depths=[6, 6, 32, 6], groups=[10, 20, 40, 80], res_post_norm=True,
        level2_post_norm_block_ids=[5, 11, 17, 23, 29], **CLIP,
    ),
    "g": dict(
        channels=512, depths=[2, 2, 48, 4], groups=[16, 32, 64, 128], post_norm=True,
        level2_post_norm_block_ids=[5, 11, 17, 23, 29, 35, 41, 47], **CLIP,
    ),
}  # fmt: skip


def small(**changes):
    return InternImage(**{"num_classes": 14, "channels": 16, "depths": [1, 1, 3, 1], "groups": [1, 2, 4, 8], **changes})


def fill(model, seed):
    """Weights drawn by the recipe of the golden logits, in the order of the sorted names."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name in sorted(state):
        value = state[name]
        if name.endswith("num_batches_tracked"):
            value.zero_()
            continue
        r = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            r = 1 + 0.1 * r.abs()
        elif value.dim() >= 2:
            r = r / math.sqrt(value.numel() / value.shape[0])
        elif name.endswith(("gamma1", "gamma2")):
            r = 0.3 + 0.05 * r
        elif name.endswith("weight"):
            r = 1 + 0.05 * r
        else:
            r = 0.05 * r
        value.copy_(r)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_has_the_published_names_and_shapes(variant):
    with torch.device("meta"):
        model = InternImage(**VARIANTS[variant])
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert ours == json.loads((GOLDEN / "state_dict_shapes.json").read_text())[variant]


@pytest.mark.parametrize("case", LOGITS, ids=[c["name"] for c in LOGITS])
def test_golden_logits(case):
    i = case["intern_image"]
    keys = set(i) - {"LEVEL2_POST_NORM", "LEVEL2_POST_NORM_BLOCK_IDS"}
    model = InternImage(
        num_classes=case["num_classes"],
        level2_post_norm_block_ids=i["LEVEL2_POST_NORM_BLOCK_IDS"] or (),
        **{key.lower(): i[key] for key in keys},
    )
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    model = model.double().eval()
    fill(model, case["seed"])
    generator = torch.Generator().manual_seed(case["seed"])
    images = torch.randn(case["batch"], 3, case["size"], case["size"], generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits = model(images)
    expected = torch.tensor(case["logits"], dtype=torch.float64)
    assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_recomputation_gives_the_same_gradients():
    torch.manual_seed(0)
    model = small(drop_path_rate=0.3).double()
    fill(model, 1)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for use_checkpoint in (False, True):
        model.use_checkpoint = use_checkpoint
        model.zero_grad()
        torch.manual_seed(5)
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(dtype):
    model = small(layer_scale=1e-5, post_norm=True).eval()
    fill(model, 3)
    images = torch.randn(2, 3, 64, 64)
    exact = model(images)
    with torch.autocast("cpu", dtype=dtype):
        logits = model(images)
    logits.float().sum().backward()
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class TestPretrained:
    @pytest.fixture
    def published(self):
        """A model like a published one: 1000 classes, all weights away from their start."""
        model = small(num_classes=1000, layer_scale=1e-5, post_norm=True)
        fill(model, 9)
        return model

    def ours(self, **changes):
        return small(**{"layer_scale": 1e-5, "post_norm": True, **changes})

    def assert_loaded(self, model, published, but=("head.weight", "head.bias")):
        for name, value in published.state_dict().items():
            if name not in but:
                assert torch.equal(model.state_dict()[name], value), name

    @pytest.mark.parametrize("wrap", ["model", "module", "state_dict", None])
    def test_known_wrappings_with_another_head(self, published, tmp_path, wrap):
        weights = published.state_dict()
        torch.save({wrap: weights} if wrap else weights, tmp_path / "w.pth")
        model = self.ours()
        head = model.head.weight.clone()
        report = checkpoint.load_pretrained(model, tmp_path / "w.pth", LOG)
        self.assert_loaded(model, published)
        assert torch.equal(model.head.weight, head)
        assert report["replaced"] == ["head.bias", "head.weight"]
        assert report["missing"] == report["unexpected"] == []
        assert len(report["loaded"]) == len(weights) - 2

    def test_head_of_the_same_size_is_taken(self, published, tmp_path):
        torch.save({"model": published.state_dict()}, tmp_path / "w.pth")
        model = self.ours(num_classes=1000)
        report = checkpoint.load_pretrained(model, tmp_path / "w.pth", LOG)
        self.assert_loaded(model, published, but=())
        assert report["replaced"] == []

    @pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
    def test_hugging_face_names(self, published, tmp_path, suffix):
        weights = {"model." + k.replace("gamma", "layer_scale"): v.clone() for k, v in published.state_dict().items()}
        path = tmp_path / f"w{suffix}"
        if suffix == ".bin":
            torch.save(weights, path)
        else:
            from safetensors.torch import save_file

            save_file(weights, path)
        model = self.ours()
        checkpoint.load_pretrained(model, path, LOG)
        self.assert_loaded(model, published)

    def test_pickled_cfgnode_is_read_without_running_it(self, published, tmp_path, monkeypatch):
        from yacs.config import CfgNode

        content = {"model": published.state_dict(), "config": CfgNode({"TRAIN": CfgNode({"EPOCHS": 3})}), "epoch": 3}
        torch.save(content, tmp_path / "w.pth")
        monkeypatch.setattr(CfgNode, "__init__", lambda *a, **k: pytest.fail("code of the file's class ran"))
        model = self.ours()
        checkpoint.load_pretrained(model, tmp_path / "w.pth", LOG)
        self.assert_loaded(model, published)

    def test_a_file_with_code_does_not_run_it(self, published, tmp_path):
        marker = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return Path.touch, (marker,)

        torch.save({"model": published.state_dict(), "x": Evil()}, tmp_path / "w.pth")
        with zipfile.ZipFile(tmp_path / "w.pth") as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            assert b"touch" in archive.read(name), "the attack is not in the file"
        try:
            checkpoint.load_pretrained(self.ours(), tmp_path / "w.pth", LOG)
        except UserError:
            pass  # refusing the file is as good as passing over the object
        assert not marker.exists()

    @pytest.mark.parametrize(
        "other, message",
        [
            (dict(channels=32), "patch_embed.conv1.weight is"),
            (dict(depths=[1, 1, 2, 1]), "is missing in the file"),
            (dict(depths=[1, 1, 4, 1]), "is not in this model"),
            (dict(layer_scale=None), "gamma1 is missing in the file"),
        ],
    )
    def test_another_architecture_is_an_error(self, tmp_path, other, message):
        torch.save({"model": self.ours(**other).state_dict()}, tmp_path / "other.pth")
        model = self.ours()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(UserError, match=f"other.pth is of another architecture.*{message}"):
            checkpoint.load_pretrained(model, tmp_path / "other.pth", LOG)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    @pytest.mark.parametrize(
        "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "model.backbone."]
    )
    def test_known_prefixes_also_beside_other_keys(self, published, tmp_path, prefix):
        weights = {prefix + k: v for k, v in published.state_dict().items()}
        weights |= {"criterion.weight": torch.ones(3), "teacher.head.bias": torch.ones(1000)}
        torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "w.pth")
        model = self.ours()
        report = checkpoint.load_pretrained(model, tmp_path / "w.pth", LOG)
        self.assert_loaded(model, published)
        assert report["missing"] == report["unexpected"] == []

    def test_a_part_that_the_file_has_not_is_left_as_initialised(self, published, tmp_path):
        weights = {"backbone." + k: v for k, v in published.state_dict().items() if not k.startswith(("conv_", "head"))}
        torch.save(weights, tmp_path / "w.pth")
        model = self.ours()
        before = model.conv_head[0].weight.clone()
        report = checkpoint.load_pretrained(model, tmp_path / "w.pth", LOG)
        assert torch.equal(model.conv_head[0].weight, before)
        assert torch.equal(model.patch_embed.conv1.weight, published.patch_embed.conv1.weight)
        assert {k.split(".")[0] for k in report["missing"]} == {"conv_head", "head"}

    def test_an_unknown_prefix_is_told_from_another_architecture(self, published, tmp_path):
        path = tmp_path / "w.pth"
        torch.save({"student." + k: v for k, v in published.state_dict().items()}, path)
        with pytest.raises(UserError, match="w.pth: its names begin with 'student.', which is no known prefix"):
            checkpoint.load_pretrained(self.ours(), path, LOG)
        torch.save({"model.layer1.0.conv1.weight": torch.ones(3)}, path)
        with pytest.raises(UserError, match="w.pth is of another architecture: it has no key of this model"):
            checkpoint.load_pretrained(self.ours(), path, LOG)

    @pytest.mark.parametrize(
        "content, message",
        [
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                "is a Git LFS pointer.*git lfs pull",
            ),
            (b"<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page, not a checkpoint"),
            (b"\n<HTML>", "is a web page, not a checkpoint"),
            (b"hello", "is not a whole checkpoint .it does not begin as a file of torch.save does.;"),
            (b"\x80\2h\7.", "is not a whole checkpoint .its content is damaged.;"),
        ],
    )
    def test_what_a_download_left_instead(self, tmp_path, content, message):
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            checkpoint.read(tmp_path / "w.pth")
        assert "weights_only" not in str(error.value)

    def test_extra_heads_are_reported(self, published, tmp_path):
        torch.save(published.state_dict() | {"meta_head.weight": torch.ones(3)}, tmp_path / "w.pth")
        report = checkpoint.load_pretrained(self.ours(), tmp_path / "w.pth", LOG)
        assert report["unexpected"] == ["meta_head.weight"]

    def test_not_a_checkpoint(self, published, tmp_path):
        path = tmp_path / "w.pth"
        torch.save({"model": published.state_dict()}, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="w.pth is not a whole checkpoint"):
            checkpoint.load_pretrained(self.ours(), path, LOG)
        for content in (b"", b"hello", pickle.dumps({"a": 1})):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"w\.pth (is not a whole checkpoint|holds no weights)"):
                checkpoint.load_pretrained(self.ours(), path, LOG)
        with pytest.raises(UserError, match="absent.pth does not exist"):
            checkpoint.load_pretrained(self.ours(), tmp_path / "absent.pth", LOG)
