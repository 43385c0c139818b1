"""export.py: the graphs against the golden operator figures and against PyTorch, and clear errors."""

import importlib.util
import json
import logging
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dcnv3
import export
import predict
from common.errors import UserError
from conftest import ROOT, SHARED, write_checkpoint
from dataset import tables
from dataset.labels import LABELS
from models import build_model
from models.exporting import save_onnx
from predicting import trained
from test_model import CLIP
from training.checkpoint import load_pretrained

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
@pytest.mark.parametrize("decompose", [False, True])
def test_the_operator_gives_the_golden_figures(decompose, tmp_path, monkeypatch):
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
        save_onnx(layer, 0, tmp_path / "op.onnx", metadata={}, decompose=decompose)
        np.testing.assert_allclose(run_onnx(tmp_path / "op.onnx", images.numpy()), get("output"), atol=2e-5)


VARIANTS = {
    "T": {},
    "XL without centre": {"POST_NORM": True, "LAYER_SCALE": 1e-5, "OFFSET_SCALE": 2.0, "REMOVE_CENTER": True},
    "H": {
        "RES_POST_NORM": True, "LEVEL2_POST_NORM": True, "LEVEL2_POST_NORM_BLOCK_IDS": [0],
        **{key.upper(): value for key, value in CLIP.items()},
    },
    "label attention": {},
}  # fmt: skip
HEADS = {"label attention": {"MODEL__HEAD": "label_attention", "MODEL__HEAD_WIDTH": 32}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_onnx_is_standard_and_gives_the_probabilities(variant, tmp_path, capsys):
    path, model = write_checkpoint(tmp_path / "a.pth", intern_image=VARIANTS[variant], **HEADS.get(variant, {}))
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


def test_grid_sample_instead_of_deform_conv_and_float16(tmp_path, capsys):
    """--decompose for runtimes without DeformConv, --half; both against PyTorch in float32."""
    path, model = write_checkpoint(tmp_path / "a.pth", intern_image=VARIANTS["XL without centre"])
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = torch.sigmoid(model(images))
    for flag, tolerance in (("--decompose", 1e-5), ("--half", 2e-2)):
        output = tmp_path / f"{flag[2:]}.onnx"
        assert export.main([str(path), "--output", str(output), flag]) == 0
        graph = onnx.load(output)
        types = [node.op_type for node in graph.graph.node]
        assert (types.count("GridSample"), types.count("DeformConv")) == ((4, 0) if flag == "--decompose" else (0, 4))
        assert {node.domain for node in graph.graph.node} == {""} and not {"Loop", "If", "Scan"} & set(types)
        found = run_onnx(output, images.numpy())
        assert found.dtype == np.float32 and np.abs(found - expected.numpy()).max() < tolerance
    halves = sum(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.graph.initializer)
    assert halves > 20 and "largest difference from PyTorch" in capsys.readouterr().out


REAL = sorted((SHARED / "cxr_sample" / "files").rglob("*.jpg"))[::120]


@pytest.mark.skipif(not REAL, reason="the real X-rays of ../shared are not there")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"DATA__RESIZE": "pad", "TEST__CROP": True, "DATA__INTERPOLATION": "bilinear"},
        {"DATA__IMG_SIZE": 64, "AUG__MEAN": [0.5, 0.4, 0.3]},
    ],
)
def test_the_reference_prepares_x_rays_by_the_metadata_alone(settings, tmp_path):
    """onnxruntime, numpy and Pillow on real JPGs, of which one is turned and one is RGB, against predict.py."""
    reference = ROOT.parent / "docs" / "onnx_reference.py"
    source = reference.read_text()
    assert len(source.splitlines()) <= 40
    imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import", "from"))}
    assert imported <= {"json", "sys", "numpy", "onnxruntime", "PIL"}
    spec = importlib.util.spec_from_file_location("onnx_reference", reference)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    path, _ = write_checkpoint(tmp_path / "a.pth", **settings)
    export.main([str(path), "--output", str(tmp_path / "m.onnx")])
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "in").mkdir()
    for k, jpg in enumerate(REAL[:6]):
        (tmp_path / "in" / f"{k}.jpg").write_bytes(jpg.read_bytes())
    with Image.open(REAL[0]) as picture:
        picture.save(tmp_path / "in/6.jpg", exif=turned)
        picture.convert("RGB").resize((2000, 1500)).save(tmp_path / "in/7.png")
    predict.main([str(path), str(tmp_path / "in"), "--output", str(tmp_path / "o.csv"), "-j", "0"])
    rows = tables.read_csv(tmp_path / "o.csv", ())
    expected = rows[list(LABELS)].astype(float).to_numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    found = [session.run(None, {"images": module.prepare(image, about)})[0][0] for image in rows["path"]]
    assert expected.std(0).max() > 5e-3 and len(found) >= 4
    assert np.abs(np.array(found) - expected).max() < 2e-3


def test_the_metadata_say_which_weights(tmp_path):
    path, _ = write_checkpoint(tmp_path / "a.pth", ema_seed=4, domain="dicom window")
    export.main([str(path), "--output", str(tmp_path / "m.onnx"), "--ema"])
    about = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_modelmeta().custom_metadata_map
    keys = ("weights", "domain", "dicom_recipe", "antialias", "precision", "resize", "side", "shrink_to")
    values = ["ema", "dicom window", "window", "true", "float32", "squeeze", "32", "72"]
    assert [about[key] for key in keys] == values


def test_weights_to_share_hold_no_patients_and_no_paths(tmp_path):
    opts = {"DATA__DATA_PATH": "/secret/mimic", "OUTPUT": "/secret/out", "MODEL__PRETRAINED": "/secret/w.pth"}
    opts |= {"TAG": "smith", "DATA__CSV": "secret.csv"}
    path, _ = write_checkpoint(tmp_path / "a.pth", ema_seed=4, **opts)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"patients": {"mimic_cxr": {"train": b"secret"}}, "optimizer": {"state": "secret"}}, path)
    for flags, seed in (([], 3), (["--ema"], 4)):
        shared = tmp_path / "shared.pth"
        assert export.main([str(path), "--output", str(shared), "--format", "weights", *flags]) == 0
        found = torch.load(shared, weights_only=True)
        assert set(found) == {"model", "model_ema", "weights", "task", "label_names", "config", "domain"}
        assert not any(word in shared.read_bytes() for word in (b"secret", b"smith"))
        _, model = write_checkpoint(tmp_path / "other.pth", seed=seed)
        torch.testing.assert_close(trained.load(shared).model.state_dict(), model.state_dict(), rtol=0, atol=0)
        fresh = build_model(trained.load(path).config)
        load_pretrained(fresh, shared, logging.getLogger())
        torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)


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
    fails("--opset 99: the installed onnx has opsets up to .*; choose 19 to", "--opset", "99")
    fails("--opset 19 has no GridSample .*; choose 20", "--opset", "19", "--decompose")
    fails("must end in .pt2", "--format", "torch")
    fails("must end in .pth", "--format", "weights")
    fails("--decompose does not go with --format torch", "--format", "torch", "--decompose")
    fails("--half does not go with --format weights", "--format", "weights", "--half", name="a.pth")
    fails("absent.pth does not exist", checkpoint=tmp_path / "absent.pth")
    fails("holds no", "--ema")
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
