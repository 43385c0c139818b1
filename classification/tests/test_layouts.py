"""The synthetic trees of other releases: official in form, the plan's labels, the same pictures. Read with the csv and
pandas modules alone, not with the project's readers."""

import ast
import csv
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dataset.files.images import decode
from dataset.labels import LABELS
from dataset.synthetic import tree as synthetic
from dataset.synthetic.layouts import LAYOUTS

OTHERS = [name for name in LAYOUTS if name != "mimic"]
FRONTAL = ("nih", "vindr")


@pytest.fixture(scope="module")
def planned():
    images, studies = synthetic.plan(patients=20, studies=(1, 1), images=(1, 2))
    return synthetic.image_rows(images, studies, seed=42, size=64).set_index("dicom_id")


def read(path, **keywords):
    return pd.read_csv(path, dtype=str, keep_default_na=False, **keywords)


def rows_of(root, planned):
    """{path of an image in a tree: its row of the plan}."""
    ids = read(root / "as_mimic.csv")
    assert ids["image"].is_unique and ids["dicom_id"].is_unique
    return {image: planned.loc[dicom_id] for image, dicom_id in zip(ids["image"], ids["dicom_id"])}


@pytest.mark.parametrize("layout", OTHERS)
def test_every_picture_is_there_and_shows_what_the_jpg_does(layouts, planned, layout):
    """As the project reads it. A 16-bit PNG is read between its own percentiles .1 and 99.9."""
    mimic, root, full = layouts("mimic"), layouts(layout), 0
    rows = rows_of(root, planned)
    expected = planned[planned["view"] != "LATERAL"] if layout in FRONTAL else planned
    assert {row.name for row in rows.values()} == set(expected.index)
    suffixes = (".jpg", ".png", ".dicom")
    assert set(rows) == {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in suffixes}
    for image, row in rows.items():
        grey = decode((root / image).read_bytes(), image)
        with Image.open(next(mimic.glob(f"files/*/*/*/{row.name}.jpg"))) as picture:
            pixels = np.asarray(picture)
        assert pixels.shape == (row.Rows, row.Columns)
        low, high = np.percentile(pixels, (0.1, 99.9), method="nearest").astype(float)
        if layout == "padchest" and (low, high) != (0, 255):
            pixels = np.round(((pixels - low) * 255 / (high - low)).clip(0, 255))
            np.testing.assert_allclose(grey, pixels, atol=1)  # float32 may round the other way
            continue
        full += 1
        np.testing.assert_array_equal(grey, pixels, image)
    assert full > 0.8 * len(rows) or layout == "padchest"


def test_the_bytes_and_forms_of_images(layouts):
    mimic, forms = layouts("mimic"), {}
    jpgs = {path.read_bytes() for path in mimic.rglob("*.jpg")}
    assert jpgs == {path.read_bytes() for path in layouts("chexpert").rglob("*.jpg")}
    for layout in ("nih", "padchest", "brax"):
        forms[layout] = {Image.open(path).mode for path in layouts(layout).rglob("*.png")}
    assert forms == {"nih": {"L", "RGBA"}, "padchest": {"I;16"}, "brax": {"L"}}
    import pydicom

    headers = [pydicom.dcmread(path) for path in layouts("vindr").rglob("*.dicom")]
    assert {ds.PhotometricInterpretation for ds in headers} == {"MONOCHROME1", "MONOCHROME2"}
    assert {ds.BitsStored for ds in headers} == {12, 14, 16}
    assert not any("PatientID" in ds or "StudyDate" in ds for ds in headers)


def test_chexpert(layouts, planned):
    root = layouts("chexpert")
    rows = rows_of(root, planned)
    tables = {name: read(root / f"{name}.csv") for name in ("train", "valid", "groundtruth")}
    labels = list(tables["groundtruth"].columns[1:])
    assert sorted(labels) == sorted(LABELS) and labels[:5:4] == ["No Finding", "Lung Lesion"]
    assert list(tables["train"])[:5] == ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA"]
    for name, split in (("train", "train"), ("valid", "validate")):
        assert len(tables[name]) == (planned["split"] == split).sum()
        for line in tables[name].to_dict("records"):
            prefix, _, image = line["Path"].partition("/")
            row = rows[image]
            assert prefix == "CheXpert-v1.0-small" and row.split == split
            side = "lateral" if row["view"] == "LATERAL" else "frontal"
            assert re.fullmatch(rf"{name}/patient\d{{5}}/study\d/view\d_{side}\.jpg", image)
            assert (line["Frontal/Lateral"], line["AP/PA"]) == (side.title(), row["view"].replace("LATERAL", ""))
            for label in LABELS:
                if split == "train":
                    assert line[label] == ("" if np.isnan(row[label]) else str(row[label]))
                else:  # read by radiologists
                    assert line[label] == ("1.0" if row[label] == 1 else "0.0")
    assert list(tables["train"]["Sex"]).count("Unknown") == 1
    assert set(tables["train"]["Sex"]) == {"Unknown", "Female", "Male"} and "Unknown" not in set(tables["valid"]["Sex"])
    tested = {image: row for image, row in rows.items() if row.split == "test"}
    assert {f"CheXpert-v1.0-small/{image.rpartition('/')[0]}" for image in tested} == set(
        tables["groundtruth"]["Study"]
    )
    assert tables["groundtruth"]["Study"].is_unique


def test_nih(layouts, planned):
    root = layouts("nih")
    rows = {image.rpartition("/")[2]: (image, row) for image, row in rows_of(root, planned).items()}
    with open(root / "Data_Entry_2017_v2020.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert ",".join(header) == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    assert len(lines) == len(rows) and {len(line) for line in lines} == {11}
    for name, findings, follow_up, patient, _, _, view, width, height, *_ in lines:
        image, row = rows[name]
        assert re.fullmatch(r"images_0(0[1-9]|1[0-2])/images/\d{8}_\d{3}\.png", image)
        assert name == f"{int(patient):08}_{int(follow_up):03}.png" and view == row["view"]
        assert (int(width), int(height)) == (row.Columns, row.Rows)
        names = set(findings.split("|"))
        positive = {label for label in LABELS if row[label] == 1}
        assert ("Effusion" in names) == ("Pleural Effusion" in positive)
        assert bool({"Mass", "Nodule"} & names) == ("Lung Lesion" in positive)
        assert ("Pleural_Thickening" in names) == ("Pleural Other" in positive)
        for label in ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pneumonia", "Pneumothorax"):
            assert (label in names) == (label in positive)
        unknown = {"Fracture", "Support Devices", "Enlarged Cardiomediastinum", "No Finding"}
        assert (findings == "No Finding") == (positive <= unknown)
    lists = {name: (root / name).read_text().split() for name in ("train_val_list.txt", "test_list.txt")}
    assert set(lists["test_list.txt"]) == {name for name, (_, row) in rows.items() if row.split == "test"}
    assert sorted(sum(lists.values(), [])) == sorted(rows)
    assert len({image.partition("/")[0] for image, _ in rows.values()}) == 12


def test_padchest(layouts, planned):
    root = layouts("padchest")
    rows, table = rows_of(root, planned), read(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv")
    assert len(table) == len(planned) and len(set(table["ImageDir"])) == 3
    ids = table["PatientID"]
    assert ids.str.fullmatch(r"\d{36}").all() and ids.nunique() == planned["subject_id"].nunique()
    assert ids.astype(float).nunique() < ids.nunique()  # as numbers some are one
    assert set(table["MethodLabel"]) == {"Physician", "RNN_model"}
    assert {"PA", "AP_horizontal", "L"} == set(table["Projection"])
    patients, odd = {}, 0
    for line in table.to_dict("records"):
        row = rows[f"{line['ImageDir']}/{line['ImageID']}"]
        assert patients.setdefault(line["PatientID"], row.subject_id) == row.subject_id
        findings = ast.literal_eval(line["Labels"])
        odd += any(name != name.strip() or not name for name in findings)
        findings = {name.strip() for name in findings}
        for label in ("Atelectasis", "Cardiomegaly", "Consolidation", "Pleural Effusion", "Pneumonia", "Pneumothorax"):
            assert (label.lower() in findings) == (row[label] == 1)
        assert ("pulmonary edema" in findings) == (row["Edema"] == 1)
        assert "normal" not in findings or all(row[label] != 1 for label in LABELS if label != "No Finding")
    assert odd


def test_vindr(layouts, planned):
    root = layouts("vindr")
    rows = {image.rpartition("/")[2][:-6]: (image, row) for image, row in rows_of(root, planned).items()}
    train, test = (read(root / f"annotations/image_labels_{name}.csv") for name in ("train", "test"))
    assert len(train.columns) == 2 + 28 and len(test.columns) == 1 + 28
    assert (train.columns[-2], test.columns[-2]) == ("Other diseases", "Other disease")
    assert {image for image, (_, row) in rows.items() if row.split == "test"} == set(test["image_id"])
    assert {image for image, (_, row) in rows.items() if row.split != "test"} == set(train["image_id"])
    assert set(train.groupby("image_id")["rad_id"].nunique()) == {3} and len(train) == 3 * train["image_id"].nunique()
    values = train.set_index("image_id").drop(columns="rad_id").astype(int)
    votes, disagreed = values.groupby(level=0).sum(), 0
    truth = pd.concat(
        [votes // 2, test.set_index("image_id").astype(int).rename(columns={"Other disease": "Other diseases"})]
    )
    for image, line in truth.iterrows():
        path, row = rows[image]
        assert re.fullmatch(r"(train|test)/[0-9a-f]{32}\.dicom", path)
        for name, label in (
            ("Pleural effusion", "Pleural Effusion"),
            ("Edema", "Edema"),
            ("Lung Opacity", "Lung Opacity"),
        ):
            assert line[name] == (row[label] == 1)
        assert bool(line["Rib fracture"] + line["Clavicle fracture"]) == (row["Fracture"] == 1)
        disagreed += image in votes.index and ((votes.loc[image] % 3) != 0).any()
    assert disagreed > 5
    assert ((values["No finding"] == 1) == (values.drop(columns="No finding").sum(axis=1) == 0)).all()


def test_brax(layouts, planned):
    root = layouts("brax")
    rows, table = rows_of(root, planned), read(root / "master_spreadsheet_update.csv")
    assert list(table)[7:12] == [
        "No Finding",
        "Enlarged Cardiomediastinum",
        "Cardiomegaly",
        "Lung Lesion",
        "Lung Opacity",
    ]
    assert sorted(list(table)[7:21]) == sorted(LABELS) and len(table) == len(planned)
    assert set(table["ViewPosition"]) == {"PA", "AP", "L"} and "85 or more" in set(table["PatientAge"])
    for line in table.to_dict("records"):
        row = rows[line["PngPath"]]
        assert line["DicomPath"].startswith("Anonymized_DICOMs/") and line["DicomPath"].endswith(f"{row.name}.dcm")
        for label in LABELS:
            assert line[label] == ("" if np.isnan(row[label]) else str(row[label]))
    assert table["PatientID"].nunique() == planned["subject_id"].nunique()


@pytest.fixture
def without_pictures(monkeypatch):
    """Images without a picture: what is tested is which files there are."""

    def touch(root, rows, *_):
        for file in rows["file"]:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()

    monkeypatch.setattr(synthetic, "_write_images", touch)


def test_layouts_in_one_folder_replace_each_other(tmp_path, without_pictures, capsys):
    few = {"patients": 20, "size": 64, "progress": False}
    synthetic.write_tree(tmp_path, **few)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for layout in OTHERS:
        assert not synthetic.write_tree(tmp_path, layout=layout, **few)["reused"]
        assert json.loads((tmp_path / synthetic.MARKER).read_text())["parameters"]["layout"] == layout
        assert synthetic.write_tree(tmp_path, layout=layout, **few)["reused"]
        synthetic.write_tree(tmp_path, **few)  # nothing of the other is left
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(SystemExit):
        synthetic.main(["--out", str(tmp_path), "--layout", "nihh"])
    assert "layout 'nihh' is unknown: choose one of mimic, chexpert" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not in layout nih: choose png"):
        synthetic.write_tree(tmp_path, layout="nih", image_format="dicom", **few)


def test_command_line_names_the_dataset(tmp_path, without_pictures, capsys):
    synthetic.main(["--out", str(tmp_path), "--layout", "nih", "--patients", "10", "--size", "64"])
    assert f"internimage_tiny_synthetic.yaml --dataset nih --data-path {tmp_path}" in capsys.readouterr().out
