"""export.py --page: the page in a real browser against predict.py, its requests, its errors; and the packages it takes.

PAGE_RUNTIME names a folder with the packages of npm (npm install onnxruntime-web dicom-parser ...), AXE_CORE the file
axe.min.js of the package axe-core.
"""

import base64
import csv
import io
import json
import os
import re
import subprocess
import tarfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dicom_writer as dicom
import export
import predict
import report
from analysis import applied
from chromium import BROWSER, Chromium
from common.errors import UserError
from conftest import ROOT, SHARED, write_checkpoint
from dataset import tables
from dataset.files.images import decode
from dataset.synthetic.drawing import draw
from models.exporting import pools_linearly
from page import folder as page_folder
from page.packages import NAMED, PACKAGES, RUNTIME, take_packages
from predicting import explain, trained
from test_model import CLIP
from test_report import table

NAMES = ["Edema", "Lung Lesion", "Pneumonia"]
PACKAGES_AT = os.environ.get("PAGE_RUNTIME", "")
needs_browser = pytest.mark.skipif(
    BROWSER is None or not PACKAGES_AT, reason="no Chromium, or PAGE_RUNTIME names no folder with the packages of npm"
)
FILES = {path.name: path.read_text() for path in (ROOT / "page").glob("*.*") if path.suffix in (".js", ".html", ".css")}


# ------------------------------------------------------------------------------------- the folder, without a browser
def package(folder, name, version="1.30.0", without=()):
    """A folder like that of a package of npm, its files a few letters."""
    for file in PACKAGES[name][1]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("/*! Copyright (c) The Holders */")
    (folder / "package.json").write_text(json.dumps({"name": name, "version": version, "license": "MIT"}))


def test_packages_come_from_folders_and_tarballs_with_their_licences(tmp_path):
    package(tmp_path / "node_modules" / RUNTIME, RUNTIME)
    package(tmp_path / "node_modules" / "dicom-parser", "dicom-parser", "1.8.21")
    (tmp_path / "node_modules/dicom-parser/LICENSE").write_text("its own text")
    with tarfile.open(tmp_path / "runtime.tgz", "w:gz") as tar:
        tar.add(tmp_path / "node_modules" / RUNTIME, "package")
    others = [name for name in PACKAGES if name not in (RUNTIME, "dicom-parser")]
    for source in ("", "node_modules", f"node_modules/{RUNTIME}"):
        files, missing = take_packages([tmp_path / source])
        assert missing == others and files["runtime/dicom-parser/LICENSE"] == b"its own text"
    files, missing = take_packages([tmp_path / "runtime.tgz"])
    assert missing == ["dicom-parser", *others]
    assert {Path(name).name for name in files} == {
        *(Path(f).name for f in PACKAGES[RUNTIME][1]),
        "package.json",
        "LICENSE",
    }
    licence = files[f"runtime/{RUNTIME}/LICENSE"].decode()
    assert "Copyright (c) The Holders" in licence and "Permission is hereby granted" in licence and "MIT" in licence


def test_what_is_no_runtime_is_refused(tmp_path, monkeypatch):
    package(tmp_path / "old", RUNTIME, "1.22.0")
    (tmp_path / "empty").mkdir()
    for source, message in {
        "old": "onnxruntime-web 1.22.0 has no DeformConv; give 1.30 or later",
        "empty": "holds no onnxruntime-web",
        "absent": "absent does not exist; give a folder or tarball",
    }.items():
        with pytest.raises(UserError, match=message):
            take_packages([tmp_path / source])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"install Node.js, or run `npm pack onnxruntime-web@.*--runtime") as raised:
        take_packages(None)
    assert "\n" not in str(raised.value) and NAMED in str(raised.value)
    refused = subprocess.CalledProcessError(1, "npm", stderr="npm error code ENOTFOUND\nnpm error network")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(refused))
    with pytest.raises(UserError, match="npm error code ENOTFOUND.*--runtime"):
        take_packages(None)


def test_mistakes_are_one_line_and_write_nothing(tmp_path, monkeypatch):
    path, _ = write_checkpoint(tmp_path / "a.pth", labels=NAMES)
    package(tmp_path / "runtime", RUNTIME)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.doc").write_text("mine")
    target, runtime = str(tmp_path / "page"), ("--runtime", str(tmp_path / "runtime"))
    for argv, message in (
        ((path, "--page", tmp_path / "full", *runtime), "full exists and is no page of export.py"),
        ((path, "--page", target, "--half", *runtime), "leave --half and --format out"),
        ((path, "--page", target, "--evaluation", tmp_path / "none", *runtime), "none.*No such file.*report.py"),
        ((path, "--page", target, "--output", "m.onnx"), "not allowed with"),
        (("--page", target), "CHECKPOINT is missing"),
        ((path, "--serve", target), "--serve takes no CHECKPOINT"),
        (("--serve", target), "is no page of export.py; make one with"),
        ((path, "--output", "m.onnx", *runtime), "--runtime is an option of --page"),
    ):
        with pytest.raises(UserError, match=message):
            export.main([str(a) for a in argv])
    monkeypatch.setattr(page_folder, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"the weights take .* GB, browsers can use 2 GB; choose a smaller model"):
        export.main([str(path), "--page", target, *runtime])
    assert not Path(target).exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.doc"]


def test_the_maps_are_exact_where_the_mean_is_taken_and_left_out_elsewhere(tmp_path):
    path, model = write_checkpoint(tmp_path / "a.pth", labels=NAMES)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert pools_linearly(model, 32)
    with torch.no_grad():
        probabilities, maps = export.Mapped(model)(images)
        logits = model(images)
    torch.testing.assert_close(maps.sum((2, 3)) + model.head.bias, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(probabilities, logits.sigmoid())
    torch.testing.assert_close(maps.relu(), explain.grad_cam(model, images, range(3)), rtol=0, atol=1e-6)
    _, pooled_by_attention = write_checkpoint(tmp_path / "h.pth", intern_image={k.upper(): v for k, v in CLIP.items()})
    assert not pools_linearly(pooled_by_attention, 32)


def test_the_page_names_no_address_and_is_short():
    """Nothing of it loads from elsewhere, and its policy forbids that."""
    for name, text in FILES.items():
        assert not re.search(r"https?:|//\w+\.\w", text.replace("// ", "")), name
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', FILES["index.html"])[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'" and rules["form-action"] == "'none'"
    assert {word for rule in rules.values() for word in rule.split()} <= {
        "'none'", "'self'", "blob:", "data:", "'wasm-unsafe-eval'"
    }  # fmt: skip
    assert sum(text.count("\n") for text in FILES.values()) < 700


# ------------------------------------------------------------------------------------------------- in the browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(checkpoint, evaluation, folder of the page)."""
    root = tmp_path_factory.mktemp("exported")
    path, _ = write_checkpoint(root / "a.pth", labels=NAMES, domain="pictures", DATA__IMG_SIZE=96)
    test = table(root / "predictions.csv", names=NAMES)
    validate = table(root / "validate.csv", names=NAMES, seed=1, first=500_000, images=150)
    argv = [test, "--validate", validate, "--output", root / "evaluation", "--resamples", 200]
    report.main([str(a) for a in argv])
    argv = [path, "--page", root / "page", "--evaluation", root / "evaluation", "--runtime", PACKAGES_AT]
    assert export.main([str(a) for a in argv]) == 0
    return path, root / "evaluation", root / "page"


STATUS = "document.getElementById('status').textContent"


def open_page(browser, address, **look):
    browser.open(address, **look)
    browser.wait(f"{STATUS} && !{STATUS}.startsWith('Preparing')")


def read(browser, paths):
    """What the page finds in files: for each {name, fault, probabilities, calibrated, notes}."""
    browser.choose("#files", paths)
    browser.wait(f"{STATUS}.startsWith('{len(paths)} of {len(paths)} ')")
    return browser.run("pictures.map(p => ({...p, maps: p.maps && [...p.maps.data], gray: null}))")


def write_images(folder):
    """X-rays, real ones where ../shared is there, and the same content as DICOM; paths."""
    folder.mkdir()
    real = sorted((SHARED / "nih_sample/images").glob("*.png"))[::8]
    real += sorted((SHARED / "cxr_sample/files").rglob("*.jpg"))[::110]
    smooth = (draw({"Edema"}, "PA", np.random.default_rng(0)) * 255).astype(np.uint8)
    drawn = Image.fromarray(smooth)
    turned = Image.Exif()
    turned[0x0112] = 6
    drawn.save(folder / "turned.jpg", exif=turned, quality=95)
    drawn.resize((1500, 1811), Image.Resampling.BICUBIC).save(folder / "large.jpg", quality=95)
    drawn.convert("RGBA").save(folder / "rgba.png")
    drawn.convert("P").save(folder / "palette.png")
    window = [("WindowCenter", "DS", "2000"), ("WindowWidth", "DS", "3000")]
    (folder / "no_ending").write_bytes(dicom.image(smooth.astype(int) * 16, *window, bits=(16, 12, 11), inverted=True))
    return [*real, *sorted((SHARED / "cxr_dicom/files").rglob("*.dcm")), *sorted(folder.iterdir())]


@needs_browser
def test_probabilities_are_those_of_predict_and_no_request_goes_out(browser, exported, tmp_path):
    """From a local disk: all answers, calibrated ones, maps and the CSV; every request is for a file of the folder."""
    checkpoint, evaluation, folder = exported
    paths = write_images(tmp_path / "in")
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(map(str, paths)) + "\n")
    output = str(tmp_path / "expected.csv")
    predict.main([str(checkpoint), str(tmp_path / "list.csv"), "--output", output, "-j", "0"])
    expected = {"probabilities": tables.read_csv(output, ())[NAMES].astype(float).to_numpy()}
    expected["calibrated"] = applied.read_calibration(evaluation, NAMES)[0](expected["probabilities"])
    open_page(browser, f"file://{folder}/index.html")
    found = read(browser, paths)
    for key, values in expected.items():
        assert values.std(0).max() > 0.003 and [f["name"] for f in found] == [p.name for p in paths]
        differences = np.abs(np.array([f[key] for f in found]) - values).max(1)
        assert differences.max() < 2e-3, found[differences.argmax()]["name"]
    model = trained.load(checkpoint)
    image = model.normalize(model.reader()(paths[0].read_bytes(), "x")[None])
    maps = explain.grad_cam(model.model, image, range(3)).flatten()
    np.testing.assert_allclose(np.maximum(0, found[0]["maps"]), maps, atol=2e-3)
    assert all(request.startswith((f"file://{folder}/", "blob:null/")) for request in browser.requests)
    assert browser.faults == []
    text = browser.run(
        "(async () => { let text; const make = URL.createObjectURL;"
        " URL.createObjectURL = (blob) => (text = blob.text(), make(blob));"
        " document.getElementById('save').click(); return await text })()"
    )  # fmt: skip
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["path", "error", *NAMES] and len(rows) == len(paths) + 1
    np.testing.assert_allclose(np.array([row[2:] for row in rows[1:]], float), expected["calibrated"], atol=2e-3)


@needs_browser
def test_a_visit_of_the_server(browser, exported, tmp_path):
    """On 127.0.0.1 alone: nothing but the folder is asked for or given; labels, thresholds, AUROC and limits are shown;
    the mouse and the keys change the view."""
    _, evaluation, folder = exported
    server = page_folder.open_server(folder, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert server.server_address[0] == "127.0.0.1"
    for outside in ("/../a.pth", "/runtime/"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(address + outside)
    with pytest.raises(UserError, match="--port .* cannot be used.*choose another"):
        page_folder.open_server(folder, server.server_port)
    path = write_images(tmp_path / "in")[0]
    open_page(browser, f"{address}/index.html")
    read(browser, [path])
    assert browser.run("crossOriginIsolated") and browser.faults == []
    assert all(request.startswith((f"{address}/", f"blob:{address}/")) for request in browser.requests)
    assert not any("/local/" in request for request in browser.requests)
    found = json.loads((evaluation / "report.json").read_text())
    text = browser.run("document.body.innerText").replace("\u00a0", " ")
    edema = found["labels"]["Edema"]["auroc"]
    assert f"{edema['value']:.3f} ({edema['low']:.3f} to {edema['high']:.3f})" in text
    assert "For research, not for diagnosis" in text and found["headline"].split(" over ")[0] in text
    assert "not a medical device" in text and "does not record the checkpoint" in text
    value = "['zoom', 'center', 'width'].map(id => Number(document.getElementById(id).value))"
    before = browser.run(value)
    x, y = browser.run(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.getElementById('view').getBoundingClientRect())"
    )
    for kind, dx in (("mousePressed", 0), ("mouseMoved", 20), ("mouseReleased", 20)):
        button = {"button": "left", "buttons": 1, "clickCount": 1}
        browser.send("Input.dispatchMouseEvent", type=kind, x=x + dx, y=y + 2 * dx, **button)
    browser.send("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-100)
    after = browser.run(value)
    assert after[0] > before[0] and after[1] < before[1] and after[2] > before[2]
    browser.run("document.getElementById('view').focus()")
    browser.send("Input.dispatchKeyEvent", type="keyDown", key="0", text="0")
    assert browser.run(value) == before
    server.shutdown()


@needs_browser
def test_what_cannot_be_read_is_a_line_and_the_page_goes_on(browser, exported, tmp_path):
    _, _, folder = exported
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 50))
    bits, ct = {"bits": (16, 12, 11)}, ("Modality", "CS", "CT")
    colours = np.zeros((40, 50, 3), np.uint8)
    colours[..., 0] = 200
    jpg, png = io.BytesIO(), io.BytesIO()
    Image.fromarray((pixels >> 4).astype(np.uint8)).save(jpg, "JPEG")
    Image.fromarray((pixels * 16).astype(np.uint16)).save(png, "PNG")
    deflated, huge = "1.2.840.10008.1.2.1.99", [("Rows", "US", 60000), ("Columns", "US", 60000)]
    files = {
        "empty.png": (b"", "the file is empty"),
        "text.dcm": (b"not an image at all " * 20, "neither JPG, PNG nor DICOM"),
        "cut.jpg": (jpg.getvalue()[:-200], "cut short"),
        "deep.png": (png.getvalue(), "PNG of 16 bits"),
        "cut.dcm": (dicom.image(pixels, **bits)[:-100], "cut short"),
        "header.dcm": (dicom.image(pixels, **bits)[:200], "cut short"),
        "report.dcm": (dicom.image(pixels, ("PixelData", "OW", None), **bits), "no PixelData"),
        "deflated.dcm": (dicom.image(pixels, syntax=deflated, **bits), "transfer syntax .*99 is not supported"),
        "huge.dcm": (dicom.image(pixels, *huge, **bits), "60000 x 60000"),
        "volume.dcm": (dicom.image(pixels, ct, ("NumberOfFrames", "IS", "40"), **bits), "Modality CT"),
        "scan.tif": (b"II*\0" + bytes(100), "TIFF"),
        "small.png": (b"", "too few"),
    }  # fmt: skip
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    Image.new("L", (9, 40)).save(tmp_path / "small.png")
    Image.fromarray(colours).save(tmp_path / "cat.png")
    (tmp_path / "ct.dcm").write_bytes(dicom.image(pixels, ct, **bits))
    (tmp_path / "good.dcm").write_bytes(dicom.image(pixels, **bits))
    open_page(browser, f"file://{folder}/index.html")
    found = {
        f["name"]: f for f in read(browser, [tmp_path / name for name in (*files, "cat.png", "ct.dcm", "good.dcm")])
    }
    for name, (_, message) in files.items():
        assert re.search(message, found[name]["fault"]) and "\n" not in found[name]["fault"], found[name]
    assert "no radiograph: the picture is coloured" in found["cat.png"]["notes"][0]
    assert "no chest radiograph: its header has Modality CT" in found["ct.dcm"]["notes"][0]
    (note,) = found["good.dcm"]["notes"]
    assert note.startswith("The model was trained on pictures, these images are dicom window") and browser.faults == []
    assert len(found["good.dcm"]["probabilities"]) == 3


@needs_browser
def test_a_browser_or_model_that_cannot_work_is_one_line(browser, exported, tmp_path):
    _, _, folder = exported
    open_page(browser, f"file://{folder}/index.html", before="WebAssembly.validate = () => false")
    assert "no WebAssembly SIMD" in browser.run(STATUS)
    model = (folder / "model.onnx").read_bytes()
    scripts = {path: path.read_text() for path in (folder / "local").glob("model.onnx.*")}
    try:
        for path, text in scripts.items():
            part = base64.b64decode(text.split('"')[3]).replace(b"DeformConv", b"DeformXonv")
            path.write_text(f'receive("model.onnx", "{base64.b64encode(part).decode()}");')
        assert b"DeformConv" in model
        open_page(browser, f"file://{folder}/index.html")
        text = browser.run(STATUS)
        assert "The model cannot be used: this onnxruntime-web cannot run it" in text and "DeformXonv" in text
        path.unlink()
        open_page(browser, f"file://{folder}/index.html")
        assert "is missing: copy the whole folder" in browser.run(STATUS)
    finally:
        for path, text in scripts.items():
            path.write_text(text)


# --------------------------------------------------------------------------- the scripts against the project's own code
RNG = np.random.default_rng(0)
UNSIGNED, SIGNED = RNG.integers(0, 4096, (23, 31)), RNG.integers(-2000, 2000, (23, 31))
TWELVE, SIXTEEN = {"bits": (16, 12, 11)}, {"bits": (16, 16, 15), "signed": 1}


def window(center, width, function=None):
    given = [("WindowCenter", "DS", center), ("WindowWidth", "DS", width)]
    return given + ([] if function is None else [("VOILUTFunction", "CS", function)])


def lookup(stage, count, first, bits, entries, kind="<u2"):
    return [(f"{stage}LUTSequence", "SQ", dicom.lut(count, first, bits, np.asarray(entries).astype(kind).tobytes()))]


CASES = {
    "plain": dicom.image(UNSIGNED, **TWELVE),
    "inverted": dicom.image(UNSIGNED, inverted=True, **TWELVE),
    "signed": dicom.image(SIGNED, **SIXTEEN),
    "signed in 12 bits": dicom.image(SIGNED, bits=(16, 12, 11), signed=1),
    "window": dicom.image(UNSIGNED, *window("2000", "1500"), **TWELVE),
    "second window": dicom.image(UNSIGNED, *window("2000\\1000", "1500\\300"), **TWELVE),
    "decimal comma": dicom.image(UNSIGNED, *window("2000,5", "1500,25"), **TWELVE),
    "half empty": dicom.image(UNSIGNED, *window("2000\\", "4000"), **TWELVE),
    "sigmoid": dicom.image(UNSIGNED, *window("2000", "1500", "SIGMOID"), **TWELVE),
    "exact": dicom.image(UNSIGNED, *window("2000", "1500", "LINEAR_EXACT"), **TWELVE),
    "no function": dicom.image(UNSIGNED, *window("2000", "1500", ""), **TWELVE),
    "narrow": dicom.image(UNSIGNED, *window("2000", "0.5"), **TWELVE),
    "negative slope": dicom.image(
        UNSIGNED, *window("-500", "900"), ("RescaleSlope", "DS", "-0.37"), ("RescaleIntercept", "DS", "12.5"),
        inverted=True, **TWELVE,
    ),
    "slope of 0": dicom.image(UNSIGNED, ("RescaleSlope", "DS", "0"), **TWELVE),
    "VOI LUT": dicom.image(UNSIGNED, *lookup("VOI", 4096, 0, 10, np.arange(4096) // 4), **TWELVE),
    "VOI LUT of bytes": dicom.image(UNSIGNED, *lookup("VOI", 4096, 0, 8, np.arange(4096) // 16, "u1"), **TWELVE),
    "VOI LUT of signed values": dicom.image(SIGNED, *lookup("VOI", 3000, -1500, 12, np.arange(3000)), **SIXTEEN),
    "modality LUT": dicom.image(
        UNSIGNED, *lookup("Modality", 4096, 0, 16, 65535 - np.arange(4096) * 16), *window("40000", "30000"), **TWELVE
    ),
    "modality LUT alone": dicom.image(UNSIGNED, *lookup("Modality", 4096, 0, 16, 65535 - np.arange(4096)), **TWELVE),
    "padding": dicom.image(UNSIGNED // 500 * 500, ("PixelPaddingValue", "US", 0), inverted=True, **TWELVE),
    "padding range": dicom.image(
        UNSIGNED, ("PixelPaddingValue", "US", 0), ("PixelPaddingRangeLimit", "US", 300), **TWELVE
    ),
    "padding of other sign": dicom.image(
        np.maximum(SIGNED, -1500), ("PixelPaddingValue", "US", 65536 - 1500), **SIXTEEN
    ),
    "high bit": dicom.image(UNSIGNED << 4, bits=(16, 12, 15)),
    "other bits": dicom.image(UNSIGNED | (RNG.integers(0, 16, UNSIGNED.shape) << 12), **TWELVE),
    "8 bits": dicom.image(UNSIGNED >> 4, bits=(8, 8, 7)),
    "32 bits": dicom.image(UNSIGNED * 100_000, bits=(32, 32, 31)),
    "implicit": dicom.image(UNSIGNED, *window("2000", "1500"), syntax=dicom.IMPLICIT, **TWELVE),
    "big endian": dicom.image(UNSIGNED, *window("2000", "1500"), syntax=dicom.BIG_ENDIAN, **TWELVE),
    "big endian bytes": dicom.image(UNSIGNED >> 4, bits=(8, 8, 7), syntax=dicom.BIG_ENDIAN),
    "no preamble": dicom.image(UNSIGNED, *window("2000", "1500"), bare=True, **TWELVE),
    "one value": dicom.image(np.full((20, 20), 7), **TWELVE),
}  # fmt: skip
SCRIPTS = "\n".join(FILES[name] for name in ("preparing.js", "pictures.js", "dicom.js"))


def call(browser, data, script, **given):
    """The value of `script` with `bytes`, in a page with the scripts of the worker."""
    given = json.dumps({"data": base64.b64encode(data).decode(), **given})
    bytes_of = "const bytes = Uint8Array.from(atob(given.data), c => c.charCodeAt(0));"
    return browser.run(f"(async (given) => {{ {bytes_of} {script} }})({given})")


@pytest.fixture(scope="module")
def scripted(browser):
    browser.open("about:blank#scripts")
    parser = next(Path(PACKAGES_AT).rglob("dicomParser.min.js"))
    browser.run(
        f"{parser.read_text()};\n{SCRIPTS};\nObject.assign(self, {{readDicom, readPicture, reduce, prepare}}); 0"
    )
    return browser


@needs_browser
def test_dicom_is_read_to_the_same_gray_levels(scripted):
    """Both recipes, of every case of the header; compressed files are in the test against predict.py."""
    for name, data in CASES.items():
        for recipe in ("window", "mimic_jpg"):
            given = {"dicom_recipe": recipe, "dicom_window": int(name == "second window")}
            found = call(
                scripted,
                data,
                "const r = await readDicom(bytes, given); return [r.height, r.width, ...r.data]",
                **given,
            )
            expected = decode(data, name, recipe=recipe, window=given["dicom_window"])
            np.testing.assert_array_equal(np.array(found[2:]).reshape(found[:2]), expected, f"{name}, {recipe}")


@needs_browser
@pytest.mark.parametrize(
    "settings",
    [
        {"DATA__IMG_SIZE": 48, "TEST__CROP": True},
        {"DATA__IMG_SIZE": 64, "DATA__RESIZE": "pad", "DATA__INTERPOLATION": "bilinear", "AUG__MEAN": [0.5, 0.4, 0.3]},
        {"DATA__IMG_SIZE": 32, "DATA__RESIZE": "pad", "TEST__CROP": True},
    ],
)
def test_preparation_is_that_of_predict(scripted, settings, tmp_path):
    """Enlarged, reduced, and so large that JPG is decoded smaller: equal for PNG, to two gray levels for JPG."""
    path, _ = write_checkpoint(tmp_path / "a.pth", labels=NAMES, **settings)
    model = trained.load(path)
    reader, config = model.reader(), model.config
    square = reader.transform
    about = {"side": square.side, "size": square.size, "resize": square.resize, "interpolation": square.interpolation}
    about |= {"mean": list(config.AUG.MEAN), "std": list(config.AUG.STD), "shrink_to": reader.decoding["shrink_to"]}
    drawn = np.cumsum(np.random.default_rng(3).normal(size=(60, 83)), 1)
    drawn = Image.fromarray(np.interp(drawn, (drawn.min(), drawn.max()), (0, 255)).astype(np.uint8))
    script = (
        "const r = await readPicture(bytes, given.shrink_to);"
        "return [...prepare(reduce(r, Math.floor(Math.min(r.width, r.height) / given.shrink_to)), given)]"
    )
    for size in ((30, 41), (300, 217), (1501, 1203)):
        for kind, most in {"PNG": 0.01, "JPEG": 2.01}.items():
            file = io.BytesIO()
            drawn.resize(size, Image.Resampling.BICUBIC).save(file, kind, quality=95)
            found = np.array(call(scripted, file.getvalue(), script, **about)).reshape(3, square.size, square.size)
            expected = model.normalize(reader(file.getvalue(), "x")[None])[0].numpy()
            levels = np.abs(found - expected) * 255 * np.array(config.AUG.STD)[:, None, None]
            assert levels.max() < most and levels.mean() < most / 8, (size, kind, levels.max(), levels.mean())


@needs_browser
def test_axe_finds_nothing_at_both_widths_light_and_dark(browser, exported, tmp_path):
    axe = Path(os.environ.get("AXE_CORE", "axe.min.js"))
    if not axe.is_file():
        pytest.skip("AXE_CORE names no axe.min.js (npm install axe-core)")
    open_page(browser, f"file://{exported[2]}/index.html")
    (tmp_path / "bad.dcm").write_bytes(b"no")
    read(browser, [*write_images(tmp_path / "in")[-5:], tmp_path / "bad.dcm"])
    browser.run(f"{axe.read_text()}; 0")
    for size in ((1280, 900), (390, 844)):
        for dark in (False, True):
            browser.look(size, dark)
            time.sleep(0.1)
            violations = "axe.run().then(r => r.violations.map(v => [v.id, ...v.nodes.map(n => n.html)]))"
            assert browser.run(violations) == [] and browser.run("document.documentElement.scrollWidth") <= size[0]
