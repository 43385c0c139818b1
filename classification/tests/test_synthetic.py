"""The synthetic tree: deterministic, official in form, free of leaks, the same picture as JPG and as DICOM."""

import gzip
import json
import re

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from dataset.labels import LABELS
from dataset.synthetic import files as synthetic_files
from dataset.synthetic import tree as synthetic
from dataset.synthetic.drawing import SIGNS, draw, random_anatomy
from dataset.synthetic.tree import plan, write_tree

TINY = dict(patients=24, size=96, studies=(1, 2), images=(1, 2), progress=False)
PATHOLOGIES = [label for label in SIGNS if label != "Support Devices"]


@pytest.fixture(scope="module")
def jpg(tmp_path_factory):
    root = tmp_path_factory.mktemp("jpg")
    return root, write_tree(root, **TINY)


@pytest.fixture(scope="module")
def dicom(tmp_path_factory):
    root = tmp_path_factory.mktemp("dicom")
    return root, write_tree(root, image_format="dicom", **TINY)


@pytest.fixture(scope="module")
def default_plan():
    return plan()


def table(root, name):
    return pd.read_csv(root / f"mimic-cxr-2.0.0-{name}.csv.gz")


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def display(path):
    """What a viewer shows, through pydicom's own pipeline."""
    ds = pydicom.dcmread(path)
    values = apply_modality_lut(ds.pixel_array, ds).astype(np.int32)  # slope 1: whole numbers, which a LUT needs
    shown = np.asarray(apply_voi_lut(values, ds), float)
    return ds, -shown if ds.PhotometricInterpretation == "MONOCHROME1" else shown


@pytest.mark.parametrize("image_format", ["jpg", "dicom"])
def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path, image_format):
    few = {**TINY, "patients": 10, "images": (1, 1), "image_format": image_format}
    for name, seed in (("a", 5), ("b", 5), ("other", 6)):
        write_tree(tmp_path / name, seed=seed, **few)
    first, second, other = (content(tmp_path / name) for name in ("a", "b", "other"))
    assert first == second and len(first) > 14
    assert not set(first.values()) & set(other.values())
    assert not {name for name in first if name.startswith("files")} & set(other)


def test_layout_and_ids(jpg, dicom):
    for root, suffix in ((jpg[0], "jpg"), (dicom[0], "dcm")):
        split = table(root, "split")
        expected = {
            f"files/p{str(row.subject_id)[:2]}/p{row.subject_id}/s{row.study_id}/{row.dicom_id}.{suffix}"
            for row in split.itertuples()
        }
        assert {name for name in content(root) if name.startswith("files")} == expected
    assert split["dicom_id"].is_unique and split.groupby("study_id")["subject_id"].nunique().max() == 1
    assert split["dicom_id"].map(lambda name: bool(re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{8}){4}", name))).all()
    assert split["subject_id"].between(10_000_000, 19_999_999).all()
    assert split["study_id"].between(50_000_000, 59_999_999).all()
    for name in ("chexpert", "split", "metadata"):  # one seed: same ids and tables in both formats
        pd.testing.assert_frame_equal(table(jpg[0], name), table(dicom[0], name))


def test_tables_are_official(jpg):
    root, summary = jpg
    labels, split, metadata = (table(root, name) for name in ("chexpert", "split", "metadata"))
    assert list(labels) == ["subject_id", "study_id", *LABELS]
    assert list(split) == ["dicom_id", "study_id", "subject_id", "split"]
    assert list(metadata) == [
        "dicom_id",
        "subject_id",
        "study_id",
        "PerformedProcedureStepDescription",
        "ViewPosition",
        "Rows",
        "Columns",
        "StudyDate",
        "StudyTime",
        "ProcedureCodeSequence_CodeMeaning",
        "ViewCodeSequence_CodeMeaning",
        "PatientOrientationCodeSequence_CodeMeaning",
    ]
    assert set(labels["study_id"]) == set(split["study_id"]) and labels["study_id"].is_unique
    assert set(split["dicom_id"]) == set(metadata["dicom_id"])
    assert set(split["split"]) == {"train", "validate", "test"}
    assert split.groupby("subject_id")["split"].nunique().max() == 1
    assert set(metadata["ViewPosition"]) <= {"PA", "AP", "LATERAL"}
    for row in metadata.itertuples():
        with Image.open(next(root.glob(f"files/*/*/*/{row.dicom_id}.jpg"))) as image:
            assert (image.mode, image.size) == ("L", (row.Columns, row.Rows)) and max(image.size) == 96
    assert sum(summary["images"].values()) == len(split)
    assert (
        summary["positives"]["No Finding"]["train"]
        == (labels["No Finding"].eq(1) & labels["study_id"].isin(split.query("split == 'train'")["study_id"])).sum()
    )


def test_labels_of_the_default_plan(default_plan):
    images, studies = default_plan
    assert 1300 < len(images) < 1800 and studies["subject_id"].nunique() == 320
    values = studies[list(LABELS)]
    assert set(np.unique(values.fillna(9))) == {-1, 0, 1, 9}
    assert set(values["No Finding"].dropna()) == {1}
    drawn = studies["signs"].map(lambda signs: bool(set(signs) & set(PATHOLOGIES)))
    assert (values["No Finding"].eq(1) == ~drawn).all()
    positive = values.eq(1)
    assert positive.mean().between(0.10, 0.33).all(), positive.mean()
    for label in SIGNS:
        strength = studies["signs"].map(lambda signs: signs.get(label, 0))
        assert (strength[positive[label]] >= synthetic.CLEAR[0]).all()
        assert (strength[values[label].isna() | values[label].eq(0)] == 0).all()
        assert set(strength[values[label].eq(-1)]) <= {0, synthetic.FAINT}
    assert values.eq(-1).to_numpy().sum() > 50 and 0.2 < (values[PATHOLOGIES] == 0).to_numpy().mean() < 0.35


def test_splits_of_the_default_plan(default_plan):
    images, studies = default_plan
    assert studies.groupby("subject_id")["split"].nunique().max() == 1
    assert (images["split"] == images["study_id"].map(studies.set_index("study_id")["split"])).all()
    share = studies.drop_duplicates("subject_id")["split"].value_counts(normalize=True)
    assert share.to_dict() == pytest.approx({"train": 0.70, "validate": 0.12, "test": 0.18}, abs=0.01)
    for name, rows in studies.groupby("split"):
        for label in LABELS:
            assert (rows[label] == 1).sum() >= 5, (name, label)
            negative = rows[label].isna() if label == "No Finding" else rows[label] == 0
            assert negative.sum() >= 5, (name, label)


def test_nothing_but_the_picture_tells_the_labels(default_plan):
    """Views, numbers of images and ids hang together with no label by more than chance."""
    images, studies = default_plan
    facts = pd.DataFrame(
        {
            "number": images.groupby("study_id").size(),
            "lateral": images["view"].eq("LATERAL").groupby(images["study_id"]).mean(),
            "portable": images["view"].eq("AP").groupby(images["study_id"]).any(),
            "seed": images.groupby("study_id")["image_seed"].first(),
        }
    ).astype(float)
    facts = studies.set_index("study_id").join(facts).reset_index()
    for label in LABELS:
        for fact in ("number", "lateral", "portable", "seed", "study_id", "subject_id", "study_seed", "date", "time"):
            correlation = np.corrcoef(facts[label].eq(1), facts[fact])[0, 1]
            assert abs(correlation) < 4 / np.sqrt(len(facts)), (label, fact, correlation)


def test_jpg_and_dicom_show_the_same_picture(jpg, dicom):
    seen = set()
    for row in table(dicom[0], "metadata").itertuples():
        ds, shown = display(next(dicom[0].glob(f"files/*/*/*/{row.dicom_id}.dcm")))
        with Image.open(next(jpg[0].glob(f"files/*/*/*/{row.dicom_id}.jpg"))) as image:
            expected = np.asarray(image, float)
        assert shown.shape == expected.shape == (ds.Rows, ds.Columns) == (row.Rows, row.Columns)
        assert np.corrcoef(shown.ravel(), expected.ravel())[0, 1] > 0.99, row.dicom_id
        voi = "lut" if "VOILUTSequence" in ds else "window" if "WindowCenter" in ds else "none"
        seen.add((ds.PhotometricInterpretation, ds.BitsStored, voi))
        assert (ds.PatientID, ds.StudyID, ds.Modality) == (str(row.subject_id), str(row.study_id), "DX")
        assert ds.BitsAllocated == 16 and ds.HighBit == ds.BitsStored - 1 and ds.PixelRepresentation == 0
        assert int(ds.pixel_array.max()) < 2**ds.BitsStored
    assert {photometric for photometric, _, _ in seen} == {"MONOCHROME1", "MONOCHROME2"}
    assert {bits for _, bits, _ in seen} == {12, 16} and {voi for _, _, voi in seen} == {"window", "lut", "none"}


@pytest.mark.parametrize("voi", ["window", "lut", "none"])
@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("inverse", [True, False])
def test_every_form_of_dicom_values(tmp_path, voi, bits, inverse):
    """All twelve combinations, by a generator whose choices are set."""

    class Chosen:
        def random(self):
            return 0.0 if inverse else 0.9

        def choice(self, options, p=None):
            return bits if bits in options else voi

        def uniform(self, low, high):
            return (low + high) / 2

    picture = np.linspace(-0.3, 1.4, 64 * 80, dtype=np.float32).reshape(64, 80)
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3"
    synthetic_files.store_pixels(ds, picture, Chosen())
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    ds, shown = display(tmp_path / "a.dcm")
    assert ("VOILUTSequence" in ds, "WindowCenter" in ds) == (voi == "lut", voi == "window")
    assert ds.BitsStored == bits and ds.PhotometricInterpretation == ("MONOCHROME1" if inverse else "MONOCHROME2")
    assert np.corrcoef(shown.ravel(), np.clip(picture, 0, 1).ravel())[0, 1] > 0.9999


@pytest.mark.parametrize("view", ["PA", "LATERAL"])
@pytest.mark.parametrize("label", SIGNS)
def test_each_sign_is_seen_and_leaves_the_corners_alone(label, view):
    for seed in range(2):
        anatomy = random_anatomy(np.random.default_rng(99))
        without, with_sign = (
            draw(labels, view, np.random.default_rng(seed), anatomy, size=128) for labels in ((), {label})
        )
        assert with_sign.dtype == np.float32 and with_sign.min() >= 0 and with_sign.max() <= 1
        change = np.abs(with_sign - without)
        assert change.mean() > 0.001 and (change > 0.06).mean() > 0.003, (seed, change.mean(), (change > 0.06).mean())
        h, w = change.shape[0] // 10, change.shape[1] // 10
        for corner in (change[:h, :w], change[:h, -w:], change[-h:, :w], change[-h:, -w:]):
            assert corner.max() < 1e-4


def test_strength_and_no_finding():
    rng = np.random.default_rng
    plain, none = draw((), "AP", rng(3), size=96), draw({"No Finding"}, "AP", rng(3), size=96)
    assert np.array_equal(plain, none)
    faint, clear = (np.abs(draw({"Lung Opacity": k}, "AP", rng(3), size=96) - plain).mean() for k in (0.3, 1.0))
    assert 0 < faint < 0.8 * clear


def test_complete_tree_is_reused_and_other_trees_replaced(tmp_path):
    few = {**TINY, "patients": 10, "images": (1, 1), "studies": (1, 1)}
    assert not write_tree(tmp_path, **few)["reused"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write_tree(tmp_path, **few)["reused"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps
    before = content(tmp_path)
    next(tmp_path.glob("files/*/*/*/*.jpg")).unlink()  # an image is missing: written again
    assert not write_tree(tmp_path, **few)["reused"]
    assert content(tmp_path) == before
    marker = json.loads((tmp_path / synthetic.MARKER).read_text())
    del marker["summary"]  # as a stopped run leaves it
    (tmp_path / synthetic.MARKER).write_text(json.dumps(marker))
    assert not write_tree(tmp_path, **few)["reused"]
    assert not write_tree(tmp_path, **{**few, "seed": 1})["reused"]
    assert len(list(tmp_path.glob("files/*/*/*/*"))) == 10  # nothing of the former tree is left


def test_any_unknown_file_makes_a_folder_foreign(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="did not write"):
        write_tree(tmp_path, **TINY)
    assert content(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("marker", [None, "{}", "no json", '{"parameters": 3}'])
def test_foreign_data_is_refused_and_left_alone(tmp_path, marker):
    foreign = tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz"
    foreign.write_bytes(gzip.compress(b"subject_id,study_id\n"))
    if marker is not None:
        (tmp_path / synthetic.MARKER).write_text(marker)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="did not write"):
        write_tree(tmp_path, **TINY)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"patients": 9}, "patients=9"),
        ({"size": 63}, "size=63"),
        ({"image_format": "png"}, "'png'"),
        ({"seed": -1}, "seed=-1"),
        ({"studies": (3, 2)}, "studies="),
    ],
)
def test_wrong_arguments_are_named(tmp_path, wrong, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        write_tree(tmp_path / "new", **{**TINY, **wrong})
    assert not (tmp_path / "new").exists()


def test_command_line(tmp_path, capsys):
    sheet_path = str(tmp_path / "s.png")
    synthetic.main(["--out", str(tmp_path / "t"), "--patients", "10", "--size", "64", "--sheet", sheet_path])
    out, err = capsys.readouterr()
    assert "synthetic images: 100%" in err and "Pleural Effusion" in out
    assert f"python main.py --cfg configs/internimage_tiny_synthetic.yaml --data-path {tmp_path / 't'}" in out
    with Image.open(sheet_path) as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 500
    (tmp_path / "file").write_text("")
    for args, named in (
        (["--patients", "3"], "patients=3"),
        (["--size", "9"], "size=9"),
        ([], "--sheet"),
        (["--format", "png"], "'png'"),
        (["--out", str(tmp_path / "file" / "x")], "file"),
    ):
        with pytest.raises(SystemExit) as stop:
            synthetic.main((["--out", str(tmp_path / "u")] if args and "--out" not in args else []) + args)
        assert stop.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]


def test_draw_refuses_unknown_names():
    with pytest.raises(ValueError, match="Fractur"):
        draw({"Fractur"}, "PA", np.random.default_rng(0))
    with pytest.raises(ValueError, match="'LL'"):
        draw((), "LL", np.random.default_rng(0))


def test_signs_in_one_view_of_a_study(tmp_path):
    """Of a study with several views each sign is in the images of one; its label is that of the study."""
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_write_images", lambda root, found, *_: rows.append(found))
        write_tree(tmp_path / "one", patients=30, size=64, one_view=True, progress=False)
        write_tree(tmp_path / "all", patients=30, size=64, progress=False)
    one, whole = rows
    for study, part in one.groupby("study_id"):
        signs = whole[whole.study_id == study].signs.iloc[0]
        shown = {view: set.intersection(*map(set, images.signs)) for view, images in part.groupby("view")}
        assert sum(map(len, shown.values())) == len(signs) and set().union(*shown.values()) == set(signs)
    views = {
        view for _, part in one.groupby("study_id") if part.view.nunique() > 1 for view in part.view[part.signs != {}]
    }
    assert "LATERAL" in views and views & {"PA", "AP"}
    tables = [sorted(p.read_bytes() for p in (tmp_path / name).glob("*.csv.gz")) for name in ("one", "all")]
    assert tables[0] == tables[1]
