"""predict.py: the values of --eval, every way to name images, going on after a kill, options, and clear errors."""

import csv
import errno
import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import predict
from common.errors import UserError
from conftest import ROOT, write_checkpoint
from dataset.files.images import decode
from dataset.labels import LABELS
from dataset.synthetic.tree import write_tree
from dicom_writer import EXPLICIT, encapsulated
from dicom_writer import image as dicom
from predicting import prediction_file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("model") / "a.pth", ema_seed=4)[0])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve images in two folders, four of them damaged or no images; not to be changed."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    (root / "deep" / "er").mkdir(parents=True)
    for k in range(9):
        image = Image.fromarray(rng.integers(0, 255, (40 + k, 50), dtype=np.uint8)).resize((80, 70))
        image.save(root / ("deep/er" if k % 2 else "deep") / f"{k}.{'png' if k % 3 else 'jpg'}")
    (root / "deep" / "cut.jpg").write_bytes((root / "deep/0.jpg").read_bytes()[:300])
    (root / "deep" / "empty.png").touch()
    (root / "deep" / "notes.txt").write_text("no image")
    (root / "deep" / "noname").write_bytes((root / "deep/0.jpg").read_bytes())
    (root / "deep" / ".hidden.jpg").touch()
    (root / "none").mkdir()
    return root


def run(*arguments, output, fails=0):
    """predict.main -> rows of the table; `fails` is how many errors it must count."""
    argv = [*map(str, arguments), "--output", str(output), "-j", "0"]
    if fails:
        with pytest.raises(SystemExit) as stopped:
            predict.main(argv)
        assert stopped.value.code == 1
    else:
        assert predict.main(argv) == 0
    with open(output, newline="") as file:
        return list(csv.DictReader(file))


def values(rows):
    return np.array([[float(row[name]) for name in LABELS] for row in rows])


# ------------------------------------------------------------------------------------ the values
def test_the_probabilities_are_those_of_an_evaluation(one_epoch, run_main, tree, tmp_path):
    run_main("--eval", TRAIN__EPOCHS=1)
    (evaluation,) = (tmp_path / "out" / "results").glob("evaluation_*")
    truth = pd.read_csv(evaluation / "predictions.csv", dtype=str).set_index("dicom_id")
    rows = run(one_epoch / "best_ckpt.pth", tree, output=tmp_path / "all.csv")
    assert list(rows[0]) == ["path", "error", "dicom_id", "study_id", "subject_id", "view", *LABELS]
    test = [row for row in rows if row["dicom_id"] in truth.index]
    assert len(test) == len(truth) and len(rows) > len(truth)
    expected = truth.loc[[row["dicom_id"] for row in test]]
    for row, (_, other) in zip(test, expected.iterrows()):
        assert (row["study_id"], row["subject_id"]) == (other["study_id"], other["subject_id"])
    probabilities = expected[[f"{name}_probability" for name in LABELS]].to_numpy(float)
    assert probabilities.std() > 0.01
    np.testing.assert_allclose(values(test), probabilities, atol=1e-6)


def test_dicom_png_and_jpg_of_one_image(model, tmp_path):
    """The format is told from the content: each file also lies there under the name of another format."""
    write_tree(tmp_path / "dicom", patients=10, size=64, image_format="dicom", progress=False)
    dicom = sorted((tmp_path / "dicom").rglob("*.dcm"))[:4]
    for k, path in enumerate(dicom):
        grey = Image.fromarray(decode(path.read_bytes(), str(path)))
        grey.save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}_png.dcm").write_bytes((tmp_path / f"{k}.png").read_bytes())
        (tmp_path / f"{k}_dicom.jpg").write_bytes(path.read_bytes())
    rows = run(model, *dicom, output=tmp_path / "dicom.csv")
    for names in (["{}.png"], ["{}_png.dcm"], ["{}_dicom.jpg"]):
        others = run(model, *(tmp_path / names[0].format(k) for k in range(4)), output=tmp_path / f"{names[0]}.csv")
        np.testing.assert_allclose(values(others), values(rows), atol=1e-6)
    assert {row["view"] for row in rows} <= {"PA", "AP", "lateral"}
    assert [row["dicom_id"] for row in rows] == [path.stem for path in dicom]


def test_ema_tta_and_several_checkpoints(model, pictures, tmp_path):
    path = pictures / "deep/0.jpg"
    plain = values(run(model, path, output=tmp_path / "plain.csv"))
    ema = values(run(model, path, "--ema", output=tmp_path / "ema.csv"))
    other, network = write_checkpoint(tmp_path / "other.pth", seed=4, DATA__IMG_SIZE=64)
    write_checkpoint(tmp_path / "same.pth", seed=4)
    np.testing.assert_allclose(ema, values(run(tmp_path / "same.pth", path, output=tmp_path / "same.csv")), atol=1e-7)
    assert np.abs(ema - plain).max() > 0.01
    # Models of other sizes are each given the image in their own size.
    second = values(run(other, path, output=tmp_path / "second.csv"))
    both = values(run(model, other, path, output=tmp_path / "both.csv"))
    np.testing.assert_allclose(both, (plain + second) / 2, atol=1e-7)

    # The mean over crops, each computed here by hand.
    crops = values(run(other, path, "--tta", output=tmp_path / "tta.csv"))
    loaded = predict.trained.load(other)
    whole = loaded.normalize(loaded.reader()(path.read_bytes(), "x")[None])
    assert predict.TTA[0] == (0, 0, 1) and (0.05, 0.05, 0.9) in predict.TTA
    expected = []
    for left, top, side in predict.TTA:
        x, y, n = round(64 * left), round(64 * top), round(64 * side)
        part = torch.nn.functional.interpolate(whole[..., y : y + n, x : x + n], size=(64, 64), mode="bilinear")
        with torch.no_grad():
            expected.append(torch.sigmoid(network(part).double()).numpy())
    np.testing.assert_allclose(crops, np.mean(expected, 0), atol=1e-6)
    assert np.abs(crops - second).max() > 1e-3


def test_calibration_and_thresholds(model, pictures, tmp_path):
    pytest.importorskip("analysis.calibration")
    plain = values(run(model, pictures / "deep/0.jpg", output=tmp_path / "plain.csv"))[0]
    platt = {name: {"slope": 0.5, "intercept": -0.2} for name in LABELS} | {"Edema": None}
    (tmp_path / "e").mkdir()
    chosen = {name: {"method": "temperature" if name == "Edema" else "platt"} for name in LABELS}
    fitted_for = {"checkpoints_sha256": ["0" * 64]}
    content = {"platt": platt, "temperature": 2.0, "chosen": chosen, "fitted_for": fitted_for}
    (tmp_path / "e/calibration.json").write_text(json.dumps(content))
    cuts = {name: {"threshold": None if k == 0 else float(plain[k])} for k, name in enumerate(LABELS)}
    cuts["Fracture"]["threshold"] = float(plain[LABELS.index("Fracture")]) + 1e-6
    report = {"thresholds": {"youden": {"rule": "x", "labels": cuts}}, "fitted_for": fitted_for}
    (tmp_path / "e/report.json").write_text(json.dumps(report))
    flags = ("--calibrated", tmp_path / "e", "--thresholds", tmp_path / "e")
    (row,) = run(model, pictures / "deep/0.jpg", *flags, output=tmp_path / "c.csv")
    z = np.log(plain / (1 - plain))
    expected = 1 / (1 + np.exp(-(0.5 * z - 0.2)))
    expected[LABELS.index("Edema")] = 1 / (1 + np.exp(-z[LABELS.index("Edema")] / 2))
    np.testing.assert_allclose(values([row])[0], expected, atol=1e-6)
    # At the threshold is positive, just below it not; calibration does not move an operating point.
    called = {name: row[f"{name}_positive"] for name in LABELS}
    assert called == dict.fromkeys(LABELS, "1") | {LABELS[0]: "", "Fracture": "0"}
    for flag, name, message in [
        ("--calibrated", "absent", "absent: No such file.*report.py"),
        ("--thresholds", "absent", "absent: No such file.*report.py"),
    ]:
        with pytest.raises(UserError, match=message):
            run(model, pictures / "deep/0.jpg", flag, tmp_path / name, output=tmp_path / "x.csv")
    # What differs from the fitting is noted for both, printed and in run.json; what is the same is not.
    assert json.loads((tmp_path / "run.json").read_text())["c.csv"]["notes"] == [
        f"{flag} {tmp_path / 'e'} was fitted for another checkpoint (sha256 000000000000...)" for flag in flags[::2]
    ]  # fmt: skip
    with pytest.raises(UserError, match="no thresholds by the rule 'f1': choose one of youden"):
        run(model, pictures, "--thresholds", tmp_path / "e", "--rule", "f1", output=tmp_path / "x.csv")


# ------------------------------------------------------------------------------------ the inputs
def test_files_folders_patterns_and_tables(model, pictures, tmp_path):
    rows = run(model, pictures, output=tmp_path / "folder.csv", fails=2)
    deep = pictures / "deep"
    expected = {str(p) for p in deep.rglob("*") if p.suffix in (".jpg", ".png", "") and p.is_file()}
    expected -= {str(deep / ".hidden.jpg")}
    assert {row["path"] for row in rows} == expected and len(rows) == len(expected) == 12
    bad = {row["path"]: row for row in rows if row["error"]}
    assert set(bad) == {str(deep / "cut.jpg"), str(deep / "empty.png")}
    assert all("cut.jpg" in r["error"] or "empty.png" in r["error"] for r in bad.values())
    assert all(r[name] == "" for r in bad.values() for name in LABELS)
    good = {row["path"]: row for row in rows if not row["error"]}
    # The same image by another way has the same values, whatever else is in its batch.
    pattern = run(model, deep / "**/*.png", output=tmp_path / "pattern.csv", fails=1)
    assert {r["path"] for r in pattern} == {p for p in expected if p.endswith(".png")}
    for row in pattern:
        if not row["error"]:
            np.testing.assert_allclose(values([row]), values([good[row["path"]]]), atol=1e-6)
    names = ["er/1.png", "0.jpg", "absent.jpg", "0.jpg"]
    table = pd.DataFrame({"path": names, "study_id": ["5", None, "7", "8"], "ViewPosition": ["PA", "LL", None, None]})
    table.to_csv(deep / "table.csv", index=False)
    try:
        rows = run(model, deep / "table.csv", deep / "0.jpg", output=tmp_path / "table.csv", fails=1)
    finally:
        (deep / "table.csv").unlink()
    assert [r["path"] for r in rows] == ["er/1.png", "0.jpg", "absent.jpg", str(deep / "0.jpg")]
    assert [r["view"] for r in rows] == ["PA", "", "", ""] and rows[0]["study_id"] == "5"
    assert "absent.jpg: No such file" in rows[2]["error"]
    np.testing.assert_allclose(values(rows[1::2]), values([good[str(deep / "0.jpg")]] * 2), atol=1e-6)


def test_a_folder_holds_what_the_decoder_reads(model, pictures, tmp_path, capsys):
    folder, grey = tmp_path / "in", Image.open(pictures / "deep/0.jpg")
    folder.mkdir()
    named = ["a.tif", "b.BMP", "c.webp", "d.gif", "e.png", "f.jp2", "g.pgm", "h.jfif"]
    for name in named:
        grey.save(folder / name, format={"jfif": "JPEG", "jp2": "JPEG2000", "pgm": "PPM"}.get(name[2:]))
    grey.save(folder / "i.pcx")  # known by its content
    (folder / "j.tga").write_bytes(b"broken")
    for name in ("k.txt", "l.txt", "m.csv", "n.zip", "noname", ".hidden", "o.eps"):
        (folder / name).write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" if name == "o.eps" else b"no image"
        )
    (folder / ".git").mkdir()
    rows = run(model, folder, output=tmp_path / "a.csv")
    assert [os.path.basename(row["path"]) for row in rows] == [*named, "i.pcx"]
    tif = values(rows)[0]
    assert np.abs(values(rows)[[1, 4, 6, 8]] - tif).max() < 1e-6 and np.abs(values(rows) - tif).max() < 0.1
    lines = capsys.readouterr().out.splitlines()
    (left,) = [line for line in lines if "left out" in line]
    assert left.startswith("note, 9 file(s) left out") and ".txt" in left
    for kind in ("2 .txt", "2 hidden", "1 .csv", "1 .zip", "1 without an ending", "1 .eps", "1 .tga"):
        assert kind in left


# What a folder of a hospital holds beside chest radiographs: name -> (SOP class, modality, body part, in the table)
CR, DX, SC = (f"1.2.840.10008.5.1.4.1.1.{k}" for k in ("1", "1.1", "7"))
CONTENTS = {
    "chest": (DX, "DX", "CHEST", "chest"),
    "thorax": (CR, "CR", "PORT THORAX", "chest"),
    "plain": (None, None, None, "chest"),
    "ct": ("1.2.840.10008.5.1.4.1.1.2", "CT", "CHEST", "other"),
    "mr": ("1.2.840.10008.5.1.4.1.1.4", "MR", None, "other"),
    "mammogram": ("1.2.840.10008.5.1.4.1.1.1.2", "MG", "BREAST", "other"),
    "hand": (DX, "DX", "HAND", "other"),
    "abdomen": (CR, "CR", "ABDOMEN", "other"),
    "spine": (CR, "CR", "THORACIC SPINE", "other"),
    "tooth": (None, "IO", None, "other"),
    "video": ("1.2.840.10008.5.1.4.1.1.77.1.4.1", "XC", None, "none"),
    "state": ("1.2.840.10008.5.1.4.1.1.11.1", "PR", None, "none"),
    "report": ("1.2.840.10008.5.1.4.1.1.88.11", "SR", None, "none"),
    "dose": (None, "SR", None, "none"),
    "pdf": ("1.2.840.10008.5.1.4.1.1.104.1", "DOC", None, "none"),
}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    root = tmp_path_factory.mktemp("hospital")
    pixels = np.random.default_rng(2).integers(0, 4000, (60, 50))
    for name, (kind, modality, part, table) in CONTENTS.items():
        extra = [("SOPClassUID", "UI", kind), ("Modality", "CS", modality), ("BodyPartExamined", "CS", part)]
        extra += [("PatientID", "LO", "SMITH"), ("StudyID", "SH", "S77")]
        gone = ("PixelData", "Rows", "Columns") if table == "none" else ()
        (root / f"{name}.dcm").write_bytes(dicom(pixels, *extra, *((what, "", None) for what in gone)))
    import pydicom.data

    (root / "DICOMDIR").write_bytes(open(pydicom.data.get_testdata_file("DICOMDIR"), "rb").read())
    return root


def test_what_is_no_chest_radiograph_is_said_and_what_is_no_image_is_counted(model, hospital, tmp_path, capsys):
    rows = {os.path.basename(r["path"]).split(".")[0]: r for r in run(model, hospital, output=tmp_path / "a.csv")}
    assert set(rows) == {name for name, (*_, table) in CONTENTS.items() if table != "none"}
    assert all(row["Edema"] and not row["error"] for row in rows.values())
    said = capsys.readouterr().out
    assert "note, 7 file(s), not a chest radiograph: " in said and "1 CT Image" in said
    assert "1 BodyPartExamined HAND" in said and "BodyPartExamined CHEST" not in said
    assert "note, 6 file(s), no image: not in the table: " in said and "1 Basic Text SR" in said and "Directory" in said
    # The same of a table that is whole already, and with changes in it.
    assert len(run(model, hospital, output=tmp_path / "a.csv")) == len(rows)
    assert "note, 7 file(s), not a chest" in capsys.readouterr().out
    only = run(model, hospital, "--only-chest", output=tmp_path / "b.csv", fails=1)
    wrong = {os.path.basename(row["path"]) for row in only if row["error"]}
    assert wrong == {f"{name}.dcm" for name, (*_, table) in CONTENTS.items() if table == "other"}
    assert all("not a chest radiograph" in row["error"] for row in only if row["error"])
    assert [row["Edema"] for row in only if row["error"]] == [""] * 7


def test_no_ids(model, hospital, tmp_path):
    with_ids = run(model, hospital / "chest.dcm", hospital / "hand.dcm", output=tmp_path / "a.csv")
    assert [with_ids[0][k] for k in ("dicom_id", "study_id", "subject_id")] == ["1.2.3", "S77", "SMITH"]
    (hospital / "SMITH.dcm").write_bytes(b"\0" * 128 + b"DICM")
    try:
        paths = [hospital / name for name in ("chest.dcm", "hand.dcm", "SMITH.dcm")]
        rows = run(model, *paths, "--no-ids", output=tmp_path / "b.csv", fails=1)
    finally:
        (hospital / "SMITH.dcm").unlink()
    assert list(rows[0]) == ["path", "error", "view", *LABELS] and [row["path"] for row in rows] == ["1", "2", "3"]
    assert values(rows[:2]).tolist() == values(with_ids).tolist() and rows[2]["error"].startswith("3: ")
    for text in ("SMITH", "S77", "1.2.3", str(hospital)):
        assert text not in (tmp_path / "b.csv").read_text()


def test_headers_that_make_no_sense_cost_no_batch(model, tmp_path):
    pixels = np.random.default_rng(2).integers(0, 4000, (60, 50))
    odd = {
        "fl": ("StudyID", "FL", b"123456"),
        "code": ("ViewCodeSequence", "LO", "PA"),
        "vr": ("PatientID", "ZZ", b"12"),
        "nul": ("SpecificCharacterSet", "CS", b"ISO_IR 100\0\0"),
        "many": ("Modality", "CS", "CR\\DX"),
        "plain": ("PatientID", "LO", "7"),
    }
    for name, element in odd.items():
        (tmp_path / f"{name}.dcm").write_bytes(dicom(pixels, element))
    rows = {os.path.basename(row["path"])[:-4]: row for row in run(model, tmp_path, output=tmp_path / "out" / "a.csv")}
    assert set(rows) == set(odd) and {row["error"] for row in rows.values()} == {""}
    assert len({row["Edema"] for row in rows.values()}) == 1


def colour(pixels, kind, planar=0, compress=None):
    """A secondary capture with RGB pixels [H, W, 3] as the DICOM says."""
    height, width, _ = pixels.shape
    if kind.startswith("YBR") and not compress:
        pixels = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    data = np.moveaxis(pixels, 2, 0).tobytes() if planar else pixels.tobytes()
    syntax = EXPLICIT
    if compress:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=95, subsampling=compress)
        data, syntax = encapsulated(out.getvalue()), "1.2.840.10008.1.2.4.50"
    extra = [("SOPClassUID", "UI", SC), ("SamplesPerPixel", "US", 3), ("PhotometricInterpretation", "CS", kind)]
    extra += [("PlanarConfiguration", "US", planar)]
    return dicom((data, height, width), *extra, bits=(8, 8, 7), syntax=syntax)


def test_a_secondary_capture_of_grey_pixels_is_read(model, tmp_path):
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (9, 8), np.uint8)).resize((80, 90), 3)
    grey = np.asarray(picture).copy()
    grey[0, :2] = 0, 255  # so that a window over its own range changes nothing
    rgb = np.repeat(grey[..., None], 3, 2)
    for content, levels in (
        (colour(rgb, "RGB"), 0), (colour(rgb, "RGB", 1), 0), (colour(rgb, "YBR_FULL"), 1),
        (colour(rgb, "YBR_FULL", compress=0), 1), (colour(rgb, "YBR_FULL_422", compress=1), 8),
    ):  # fmt: skip
        assert np.abs(decode(content, "x").astype(int) - grey).max() <= levels
    marked = rgb.copy()
    marked[:4, 60:] = 255, 255, 0
    assert (decode(colour(marked, "RGB"), "x")[4:] == grey[4:]).all()
    Image.fromarray(grey).save(tmp_path / "0.png")
    (tmp_path / "1.dcm").write_bytes(colour(rgb, "RGB"))
    found = values(run(model, tmp_path, output=tmp_path / "out/a.csv"))
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    red = np.zeros_like(rgb)
    red[..., 0] = grey
    (tmp_path / "red.dcm").write_bytes(colour(red, "RGB"))
    (row,) = run(model, tmp_path / "red.dcm", output=tmp_path / "out/b.csv", fails=1)
    assert "colour image" in row["error"]


@pytest.mark.parametrize("size", [(1, 1), (300, 3)])
def test_few_pixels_are_no_x_ray(model, size, tmp_path):
    Image.new("L", size).save(tmp_path / "a.png")
    (tmp_path / "b.dcm").write_bytes(dicom(np.full(size[::-1], 7)))
    for row in run(model, tmp_path, output=tmp_path / "out/a.csv", fails=2):
        assert f"{size[1]} x {size[0]} pixels are too few for an X-ray" in row["error"] and row["Edema"] == ""


def test_any_name_and_a_circle_of_links(model, pictures, tmp_path):
    """Names with commas, line ends and bytes that are no UTF-8; links that lead back; a pipe, which is never read."""
    folder, content = tmp_path / "in", (pictures / "deep/0.jpg").read_bytes()
    (folder / "sub").mkdir(parents=True)
    names = [
        "a,b.jpg",
        "new\nline.jpg",
        "car\rriage.jpg",
        'quo"te.jpg',
        "[1].jpg",
        os.fsdecode(b"\xff.jpg"),
        "sub/x.jpg",
    ]
    for name in names:
        (folder / name).write_bytes(content)
    (folder / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    expected = [str(folder / name) for name in sorted(names[:-1]) + names[-1:]]
    argv = [model, str(folder), "--output", str(tmp_path / "a.csv"), "-b", "2", "-j", "0"]
    assert predict.main(argv) == 0
    whole = (tmp_path / "a.csv").read_bytes()
    with open(tmp_path / "a.csv", newline="", errors="surrogateescape") as file:
        assert [row["path"] for row in csv.DictReader(file)] == expected
    (tmp_path / "a.csv").write_bytes(whole[: len(whole) // 2])
    assert predict.main(argv) == 0 and (tmp_path / "a.csv").read_bytes() == whole
    (row,) = run(model, folder / "[1].jpg", output=tmp_path / "b.csv")
    (row,) = run(model, folder / "pipe.jpg", output=tmp_path / "c.csv", fails=1)
    assert row["error"].endswith("pipe.jpg: is no file")


def test_tables_of_two_folders_may_call_images_alike(model, pictures, tmp_path):
    for folder, image in (("a", "deep/0.jpg"), ("b", "deep/er/1.png")):
        (tmp_path / folder / "files/p10/p10000001/s50000001").mkdir(parents=True)
        (tmp_path / folder / "files/p10/p10000001/s50000001/x.jpg").write_bytes((pictures / image).read_bytes())
        path = "files/p10/p10000001/s50000001/x.jpg"
        (tmp_path / folder / "list.tsv").write_text(f"path\tstudy_id\tview\n {path} \t\tPA\n{path}\t\tPA\n")
    rows = run(model, tmp_path / "a/list.tsv", tmp_path / "b/list.tsv", output=tmp_path / "o.csv")
    assert [(row["path"], row["study_id"], row["view"]) for row in rows] == [(path, "50000001", "PA")] * 2
    alone = [run(model, pictures / image, output=tmp_path / f"{k}.csv")[0] for k, image in
             enumerate(("deep/0.jpg", "deep/er/1.png"))]  # fmt: skip
    np.testing.assert_allclose(values(rows), values(alone), atol=1e-6)


def test_json_holds_the_same(model, pictures, tmp_path):
    rows = run(model, pictures, output=tmp_path / "a.csv", fails=2)
    with pytest.raises(SystemExit):
        predict.main([model, str(pictures), "--output", str(tmp_path / "a.json"), "--format", "json"])
    objects = json.loads((tmp_path / "a.json").read_text())
    assert [{k: "" if v is None else str(v) for k, v in o.items()} for o in objects] == rows
    content = json.loads((tmp_path / "run.json").read_text())
    assert set(content) == {"a.csv", "a.json"}
    entry = content["a.json"]
    assert entry["command"]["checkpoints"] == [hashlib.sha256(open(model, "rb").read()).hexdigest()]
    assert (entry["images"], entry["errors"]) == (12, 2) and entry["versions"]["torch"] == torch.__version__


def test_another_domain_and_view_are_said(tmp_path, capsys):
    write_tree(tmp_path / "dicom", patients=10, size=64, image_format="dicom", progress=False)
    path, _ = write_checkpoint(tmp_path / "a.pth", domain="pictures", DATA__VIEWS="frontal")
    rows = run(path, tmp_path / "dicom", output=tmp_path / "a.csv")
    lateral = sum(row["view"] == "lateral" for row in rows)
    said = capsys.readouterr().out
    assert f"note, {len(rows)} image(s): the model was trained on pictures, these images are dicom window" in said
    assert "use --dicom-recipe mimic_jpg" in said
    assert lateral and f"note, {lateral} image(s): the model was trained on DATA.VIEWS frontal" in said
    run(path, tmp_path / "dicom", "--dicom-recipe", "mimic_jpg", output=tmp_path / "b.csv")
    assert "--dicom-recipe" not in capsys.readouterr().out
    assert (tmp_path / "a.csv").read_bytes() != (tmp_path / "b.csv").read_bytes()


# ------------------------------------------------------------------------------------- going on
def table_of(path, stamps, texts, form="csv", most=99):
    """Write, or resume, a table of images with these stamps; image 1 has an error, image 5 no row."""
    names = [f'a,{k}\n"x' for k in range(len(stamps))]
    table = prediction_file.PredictionFile(
        path, ["path", "error", "p"], [(n, [n, s]) for n, s in zip(names, stamps)], command={"a": (1, 2)}, about={},
        batch=3, form=form,
    )  # fmt: skip
    done = []
    for batch in table.todo[:most]:
        rows = [{"path": names[k], "error": "x" if k == 1 else "", "p": texts[k]} for k in batch]
        table.add(batch.start, [(None, "SR") if k == 5 else (row, "") for k, row in zip(batch, rows)])
        done += batch
    table.finish()
    assert table.count(prediction_file.ERROR) == (1 in range(len(table.entries)))
    return done


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_table_cut_anywhere_becomes_the_whole_one(form, tmp_path):
    stamps, texts = range(7), "abcdefg"
    table_of(tmp_path / "whole", stamps, texts, form)
    whole, beside = (tmp_path / "whole").read_bytes(), (tmp_path / "whole.images").read_bytes()
    if form == "json":
        assert [row["p"] for row in json.loads(whole)] == list("abcdeg")
    table_of(tmp_path / "cut", stamps, texts, form, most=1)
    for name, content in (("cut", whole), ("cut.images", beside)):
        for length in range(len(content)):
            (tmp_path / "cut").write_bytes(whole)
            (tmp_path / "cut.images").write_bytes(beside)
            (tmp_path / name).write_bytes(content[:length])
            table_of(tmp_path / "cut", stamps, texts, form)
            assert (tmp_path / "cut").read_bytes() == whole, (name, length)
            assert (tmp_path / "cut.images").read_bytes() == beside


@pytest.mark.parametrize("form", ["csv", "json"])
def test_batches_with_a_changed_image_are_made_again(form, tmp_path):
    """As if the table had been made with the new images from the start, in whatever state it was."""
    new = [0, 1, 2, 3, 99, 5, 6]
    for batches in (2, 3):
        table_of(tmp_path / "a", range(7), "abcdefg", form, most=batches)
        assert table_of(tmp_path / "a", new, "ABCDEFG", form) == [3, 4, 5, *([6] if batches == 2 else [])]
        table_of(tmp_path / "b", new, "abcDEFG" if batches == 2 else "abcDEFg", form)
        for name in ("", ".images"):
            assert (tmp_path / f"a{name}").read_bytes() == (tmp_path / f"b{name}").read_bytes()
            (tmp_path / f"a{name}").unlink(), (tmp_path / f"b{name}").unlink()


def test_an_image_replaced_or_mended_under_its_name_is_predicted_again(model, pictures, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    names = ("0.jpg", "2.png", "4.png", "6.jpg")
    for name in names:
        (folder / name).write_bytes((pictures / "deep" / name).read_bytes())
    other = (pictures / "deep/8.png").read_bytes()
    (folder / "4.png").write_bytes(b"")
    flags = (model, folder, "-b", "1")
    before = run(*flags, output=tmp_path / "a.csv", fails=1)
    assert "1 have changed" not in capsys.readouterr().out
    (folder / "4.png").write_bytes((pictures / "deep/4.png").read_bytes())
    (folder / "2.png").write_bytes(other)
    after = run(*flags, output=tmp_path / "a.csv")
    assert "2 of 4 images are done already, 2 have changed since" in capsys.readouterr().out
    assert after[::3] == before[::3] and after[2]["error"] == "" and after[1] != before[1]
    np.testing.assert_allclose(values(after), values(run(*flags, output=tmp_path / "new.csv")), atol=1e-7)
    # The same size and another content: the time of the change tells.
    size = (folder / "0.jpg").stat()
    content = bytearray((folder / "0.jpg").read_bytes())
    content[-20:-10] = bytes(10)
    (folder / "0.jpg").write_bytes(content)
    os.utime(folder / "0.jpg", ns=(size.st_atime_ns, size.st_mtime_ns + 1))
    run(*flags, output=tmp_path / "a.csv")
    assert "3 of 4 images are done already, 1 have changed since" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EACCES])
def test_a_file_system_without_locks_is_one_note(number, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(prediction_file.fcntl, "lockf", refuse)
    if number == errno.EACCES:
        with pytest.raises(UserError, match="is being written by another process"):
            table_of(tmp_path / "a", range(7), "abcdefg")
    else:
        table_of(tmp_path / "a", range(7), "abcdefg")
        table_of(tmp_path / "a", [9, *range(1, 7)], "abcdefg")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and all("no locks" in line and str(tmp_path / "a") in line for line in lines)


def test_killed_and_gone_on_equals_the_whole(model, tree, tmp_path, capsys, monkeypatch):
    whole = tmp_path / "whole.csv"
    assert predict.main([model, str(tree), "--output", str(whole), "-b", "4"]) == 0
    killed = tmp_path / "killed.csv"
    argv = [model, str(tree), "--output", str(killed), "-b", "4", "-j", "1"]
    add = prediction_file.PredictionFile.add

    def die_after_three(table, first, found):
        add(table, first, found)
        if first == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(prediction_file.PredictionFile, "add", die_after_three)
        process = multiprocessing.get_context("fork").Process(target=predict.main, args=(argv,))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert killed.read_bytes().count(b"\n") - 1 == 12 < whole.read_bytes().count(b"\n") - 1
    assert predict.main(argv) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert "are done already" in capsys.readouterr().out
    before = killed.stat().st_size
    assert predict.main(argv) == 0 and killed.stat().st_size == before


def test_the_output_of_another_command_is_left_alone(model, pictures, tmp_path):
    image = pictures / "deep/0.jpg"
    run(model, image, output=tmp_path / "a.csv")
    before = (tmp_path / "a.csv").read_bytes()
    other, _ = write_checkpoint(tmp_path / "other.pth", seed=9)
    for arguments, message in [
        ((model, image, "--tta"), "tta was False, now True"),
        ((other, image), "begun by another command: checkpoints was"),
        ((model, pictures / "deep"), "paths was"),
        ((model, image, "--format", "json"), "format was 'csv', now 'json'"),
    ]:
        with pytest.raises(UserError, match=message):
            run(*arguments, output=tmp_path / "a.csv")
        assert (tmp_path / "a.csv").read_bytes() == before
    (tmp_path / "mine.csv").write_text("my own table\n")
    with pytest.raises(UserError, match="mine.csv exists already, and not by predict.py"):
        run(model, image, output=tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "my own table\n"
    with pytest.raises(UserError, match="cannot be written"):
        run(model, image, output=tmp_path / "a.csv" / "b.csv")


def test_files_that_came_since_are_said(model, pictures, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("b.jpg", "c.jpg"):
        (tmp_path / "in" / name).write_bytes((pictures / "deep/0.jpg").read_bytes())
    run(model, tmp_path / "in", output=tmp_path / "a.csv")
    (tmp_path / "in" / "a.jpg").write_bytes((pictures / "deep/0.jpg").read_bytes())
    with pytest.raises(UserError, match="holds other images than are asked for now"):
        run(model, tmp_path / "in", "-b", "1", output=tmp_path / "a.csv")


# ------------------------------------------------------------------------------------ bad input
def test_bad_input_is_one_line(model, pictures, tmp_path):
    image, out = pictures / "deep/0.jpg", tmp_path / "out.csv"
    whole = torch.load(model, weights_only=True)
    config = whole["config"]

    def checkpoint(name, content):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    (tmp_path / "cut.pth").write_bytes(open(model, "rb").read()[:5000])
    pd.DataFrame({"file": ["a.jpg"]}).to_csv(tmp_path / "nopath.csv", index=False)
    pd.DataFrame({"path": []}).to_csv(tmp_path / "norows.csv", index=False)
    (tmp_path / "blank.csv").write_text("path,view\na.jpg,PA\n,AP\n")
    (tmp_path / "odd.json").write_text('{"platt": [1]}')
    warm = {"platt": {}, "temperature": "warm", "chosen": {name: {"method": "temperature"} for name in LABELS}}
    (tmp_path / "odder.json").write_text(json.dumps(warm))
    huge = {**config, "MODEL": {**config["MODEL"], "INTERN_IMAGE": {**config["MODEL"]["INTERN_IMAGE"]}}}
    huge["MODEL"]["INTERN_IMAGE"]["CHANNELS"] = 2**20
    bent = {**config, "MODEL": {**config["MODEL"], "INTERN_IMAGE": 7}}
    few, _ = write_checkpoint(tmp_path / "few.pth", labels=("Edema", "Fracture"))
    no_average, _ = write_checkpoint(tmp_path / "plain.pth")
    nan = {k: v * float("nan") if v.is_floating_point() else v for k, v in whole["model"].items()}
    for arguments, message in [
        ((tmp_path / "absent.pth", image), "absent.pth does not exist"),
        ((tmp_path / "cut.pth", image), "cut.pth is not a whole checkpoint"),
        ((image, image), "0.jpg is not a whole checkpoint"),
        ((checkpoint("bare.pth", whole["model"]), image), "bare.pth is not a checkpoint of this project: it holds no"),
        ((checkpoint("l.pth", {**whole, "label_names": []}), image), "holds no label_names"),
        ((checkpoint("n.pth", {**whole, "label_names": list(range(14))}), image), "no list of different names"),
        ((checkpoint("m.pth", {**whole, "label_names": ["a"]}), image), "1 labels for a model of MODEL.NUM_CLASSES 14"),
        ((checkpoint("t.pth", torch.ones(3)), image), "t.pth is not a checkpoint of this project"),
        ((checkpoint("w.pth", {**whole, "model": {"a": 1}}), image), "no dictionary of tensors"),
        ((checkpoint("c.pth", {**whole, "config": "x"}), image), "its config is no dictionary"),
        ((checkpoint("h.pth", {**whole, "config": huge}), image), "h.pth is a checkpoint of another model"),
        ((checkpoint("b.pth", {**whole, "config": bent}), image), "b.pth: .*INTERN_IMAGE"),
        ((checkpoint("nan.pth", {**whole, "model": nan}), image), "not finite"),
        ((model, few, image), "few.pth has other labels than"),
        ((no_average, image, "--ema"), "--ema: .*plain.pth holds no EMA weights"),
        ((model, tmp_path / "gone"), "gone: does not exist"),
        ((model, str(tmp_path / "*.gone")), "no image matches this pattern"),
        ((model, pictures / "none"), "none: no image in this folder"),
        ((model, tmp_path / "nopath.csv"), "nopath.csv.*path"),
        ((model, tmp_path / "norows.csv"), "norows.csv"),
        ((model, model), "no image is named"),
        ((model, image, "--labels", "Edema"), "--labels .* give --explain"),
        ((model, image, "--explain", tmp_path / "e", "--labels", "Edma"), "no label 'Edma' .did you mean Edema"),
        ((model, no_average, image, "--explain", tmp_path / "e"), "--explain takes one checkpoint"),
        ((model, image, "--explain", image), "--explain .* cannot be written"),
        ((model, pictures / "deep", "--explain", pictures / "deep/e"), "e is in .*deep: its overlays would be"),
        ((model, image, "--device", "gpu"), "--device gpu"),
        ((model, image, "--device", "meta"), "--device meta: the models run on cpu and cuda"),
        ((model, image, "--rule", "f1"), "--rule .* give --thresholds"),
        ((model, image, "--calibrated", tmp_path / "odd.json"), "odd.json is not a calibration.json"),
        ((model, image, "--calibrated", tmp_path / "odder.json"), "odder.json .* its values are no numbers"),
        ((model, tmp_path / "blank.csv"), "path is empty in data row 2"),
        ((tmp_path, image), "is a folder"),
        ((checkpoint("d.pth", {**whole, "label_names": ["a"] * 14}), image), "no list of different names"),
        ((checkpoint("v.pth", {**whole, "label_names": ["view", *LABELS[1:]]}), image), "label 'view' has the name of"),
        ((model, image, "-b", "0"), "-b is 0"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            run(*arguments, output=out)
        assert "\n" not in str(raised.value), message
        assert not out.exists() or message == "not finite"
        out.unlink(missing_ok=True)


def test_outputs_that_are_refused(model, pictures, tmp_path):
    for output, message in [(tmp_path / "run.json", "choose another name"), ("/dev/null", "it is no file")]:
        with pytest.raises(UserError, match=message):
            run(model, pictures / "deep/0.jpg", output=output)


def test_the_command_ends_with_one_line(model, tmp_path):
    process = subprocess.run(
        [sys.executable, "predict.py", model, str(tmp_path / "gone"), "--output", str(tmp_path / "a.csv")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in process.stderr


def test_a_checkpoint_imports_no_module_of_its_choice(model, pictures, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    content = torch.load(model, weights_only=True)
    for name in ("evil", "this", "models.evil", "classifier"):
        content["config"]["MODEL"]["TYPE"] = name
        torch.save(content, tmp_path / "e.pth")
        with pytest.raises(UserError, match=f"e.pth: MODEL.TYPE is '{name}', no file of models/"):
            run(tmp_path / "e.pth", pictures / "deep/0.jpg", output=tmp_path / "a.csv")
    assert "this" not in sys.modules and "evil" not in sys.modules


def test_the_start_imports_what_it_needs():
    code = "import sys, predict; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(process.stdout.split())
    assert "torch" in loaded and not loaded & {"torchvision", "timm", "matplotlib", "torch.distributed.fsdp"}
