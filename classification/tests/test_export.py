"""export.py: the graphs against the golden operator figures and against PyTorch, and clear errors."""

import json
import sys

import numpy as np
import pytest
import torch

import dcnv3
import export
from common.errors import UserError
from conftest import SHARED, write_checkpoint
from models.exporting import save_onnx
from test_model import CLIP

onnx = pytest.importorskip("onnx", reason="requirements_export.txt is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="requirements_export.txt is not installed")
pytest.importorskip("onnxscript", reason="requirements_export.txt is not installed")

GOLDEN_OP = SHARED / "golden" / "dcnv3_op.npz"


def run_onnx(path, images):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]


class OneLayer(torch.nn.Module):
    """The operator alone, with offsets and mask of a golden case; its input comes as images do."""

    def __init__(self, offset, mask, parameters):
        super().__init__()
        self.offset, self.mask = torch.nn.Parameter(offset), torch.nn.Parameter(mask)
        self.parameters_ = parameters

    def forward(self, images):
        batch = images.shape[0]
        offset, mask = (t.expand(batch, *t.shape[1:]) for t in (self.offset, self.mask))
        return dcnv3.dcnv3(images, offset, mask, **self.parameters_)


@pytest.mark.skipif(not GOLDEN_OP.exists(), reason="the golden operator figures of ../shared are not there")
def test_deform_conv_gives_the_golden_figures(tmp_path, monkeypatch):
    """Kernels, strides, paddings and dilations of unequal sides, offset_scale, remove_center: all golden cases."""
    golden = np.load(GOLDEN_OP)
    for case in json.loads(str(golden["cases"])):
        name = case["name"]
        get = lambda what: torch.from_numpy(golden[f"{name}.{what}"]).float()[:1]  # noqa: E731
        same = ("group", "kernel", "stride", "dilation", "offset_scale", "remove_center")
        parameters = {k: case[k] for k in same} | {"padding": case["pad"]}
        layer, images = OneLayer(get("offset"), get("mask"), parameters), get("input")
        example = (images.expand(2, *images.shape[1:]),), ({0: torch.export.Dim("batch", min=1, max=64)},)
        monkeypatch.setattr("models.exporting._example", lambda _size: example)
        save_onnx(layer, 0, tmp_path / "op.onnx", metadata={})
        np.testing.assert_allclose(run_onnx(tmp_path / "op.onnx", images.numpy()), get("output"), atol=2e-5)


VARIANTS = {
    "T": {},
    "XL without centre": {"POST_NORM": True, "LAYER_SCALE": 1e-5, "OFFSET_SCALE": 2.0, "REMOVE_CENTER": True},
    "H": {
        "RES_POST_NORM": True, "LEVEL2_POST_NORM": True, "LEVEL2_POST_NORM_BLOCK_IDS": [0],
        **{key.upper(): value for key, value in CLIP.items()},
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_onnx_is_standard_and_gives_the_probabilities(variant, tmp_path, capsys):
    path, model = write_checkpoint(tmp_path / "a.pth", intern_image=VARIANTS[variant])
    output = tmp_path / "out" / "model.onnx"
    assert export.main([str(path), "--output", str(output)]) == 0
    assert [p.name for p in output.parent.iterdir()] == ["model.onnx"]
    graph = onnx.load(output)
    onnx.checker.check_model(graph)
    assert [o.domain for o in graph.opset_import] == [""] and not graph.functions
    types = [n.op_type for n in graph.graph.node]
    assert {n.domain for n in graph.graph.node} == {""} and types.count("DeformConv") == 4
    assert not {"Loop", "If", "Scan"} & set(types)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = torch.sigmoid(model(images))
        assert expected.std() > 0.01
        np.testing.assert_allclose(run_onnx(output, images.numpy()), expected, atol=1e-5)
    metadata = onnxruntime.InferenceSession(str(output)).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"])[0] == "Atelectasis" and metadata["size"] == "32"
    assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406] and json.loads(metadata["std"])[2] == 0.225
    said = capsys.readouterr().out
    assert "DeformConv 4" in said and " MB; " in said and "PyTorch" in said


def test_torch_program(tmp_path):
    path, model = write_checkpoint(tmp_path / "a.pth")
    assert export.main([str(path), "--output", str(tmp_path / "m.pt2"), "--format", "torch"]) == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program(images), torch.sigmoid(model(images)))
    assert json.loads(json.loads(extra["metadata.json"])["labels"])[0] == "Atelectasis"


def test_the_average_is_exported_where_asked(tmp_path):
    path, _ = write_checkpoint(tmp_path / "a.pth")
    content = torch.load(path, weights_only=True)
    _, other = write_checkpoint(tmp_path / "other.pth", seed=5)
    torch.save(content | {"model_ema": other.state_dict()}, path)
    export.main([str(path), "--output", str(tmp_path / "m.onnx"), "--ema"])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", images.numpy()), other(images).sigmoid(), atol=1e-5)


def test_errors_are_one_line_and_nothing_is_left(tmp_path, monkeypatch):
    path, _ = write_checkpoint(tmp_path / "a.pth")
    out = tmp_path / "out"

    def fails(message, *flags, name="m.onnx", checkpoint=path):
        with pytest.raises(UserError, match=message) as raised:
            export.main([str(checkpoint), "--output", str(out / name), *flags])
        assert "\n" not in str(raised.value)
        assert not out.exists() or not list(out.iterdir())

    fails("--opset 18 has no DeformConv", "--opset", "18")
    fails("opset 99", "--opset", "99")
    fails("end in .pt2", "--format", "torch")
    fails("absent.pth does not exist", checkpoint=tmp_path / "absent.pth")
    fails("holds no average", "--ema")
    fails("absent: does not exist", "--images", str(tmp_path / "absent"))
    out.mkdir(exist_ok=True)
    fails("cannot be written", name="")
    # A file that gives other probabilities is not handed out.
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    fails("differs from PyTorch")
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: 1 / 0)
    fails("cannot run the graph.*division by zero")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    fails("onnxscript is not installed: pip install -r requirements_export.txt")
