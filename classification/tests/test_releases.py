"""Releases as they are downloaded -> the one table: splits, labels, views, paths, and every mistake in them."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import SHARED
from dataset import brax, chexpert, nih, padchest, releases, vindr
from dataset.labels import LABELS, UNKNOWN
from dataset.mimic_cxr import load_table as load_mimic
from errors import UserError

NAN = np.nan


def draw(path, seed=0):
    """A small grey picture at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.random.default_rng(seed).integers(0, 255, (40, 36), np.uint8)
    Image.fromarray(grey).save(path, "PNG" if path.suffix not in (".jpg",) else "JPEG")


def write(path, header, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def by_image(table, label):
    """{image: value of a label} of a table."""
    values = table.labels[:, table.label_names.index(label)]
    return dict(zip([name.decode() for name in table.dicom_id], values.tolist()))


def splits_of(table):
    return {name.decode(): releases.SPLITS[k] for name, k in zip(table.dicom_id, table.split)}


def same(found, expected):
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal([found[k] for k in expected], list(expected.values()))


# ------------------------------------------------------------------------------------------------ CheXpert
CHEXPERT = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


@pytest.fixture
def chexpert_at(tmp_path):
    """make(top, prefix, test=...) -> the folder that holds train.csv."""

    def make(top="CheXpert-v1.0-small", prefix="CheXpert-v1.0-small/", test=True):
        root = tmp_path / top
        rows = [
            ("train", "patient00001/study1/view1_frontal.jpg", "Female,68,Frontal,AP,1.0" + "," * 13),
            ("train", "patient00002/study1/view1_frontal.jpg", "Unknown,0,Frontal,PA,,,-1.0,1.0,,,0.0" + "," * 7),
            ("train", "patient00002/study2/view2_lateral.jpg", "Male,9,Lateral,,,,,,,,,,,,1.0,,,"),
            ("train", "patient00003/study1/view1_frontal.jpg", "Male,9,Frontal,LL,,,,,,,,,,,,,,1.0"),
            ("valid", "patient64541/study1/view1_frontal.jpg", "Male,73,Frontal,AP,0.0,1.0" + ",0.0" * 12),
        ]
        for split in ("train", "valid"):
            lines = [f"{prefix}{s}/{path},{rest}" for s, path, rest in rows if s == split]
            write(root / f"{split}.csv", CHEXPERT, *lines)
        for k, (split, path, _) in enumerate(rows):
            draw(root / split / path, k)
        if test:
            labels = CHEXPERT.split(",")[5:][::-1]  # another order
            header = "Study," + ",".join(labels)
            write(root / "groundtruth.csv", header, "CheXpert-v1.0/test/patient64741/study1" + ",0.0" * 13 + ",1.0")
            for name in ("view1_frontal.jpg", "view2_lateral.jpg"):
                draw(root / "test/patient64741/study1" / name)
        return root

    return make


@pytest.mark.parametrize("top", ["CheXpert-v1.0-small", "CheXpert-v1.0", "mine"])
@pytest.mark.parametrize("prefix", ["CheXpert-v1.0-small/", "CheXpert-v1.0/", ""])
def test_chexpert(chexpert_at, top, prefix):
    root = chexpert_at(top, prefix)
    table = chexpert.load_table(root)
    assert len(table) == 7 and table.root == root
    assert list(splits_of(table).values()) == ["train"] * 4 + ["validate"] + ["test"] * 2
    assert table.subject.tolist()[:3] == [b"patient00001", b"patient00002", b"patient00002"]
    assert table.study.tolist()[1:3] == [b"patient00002/study1", b"patient00002/study2"]
    assert table.view.tolist() == ["AP", "PA", "lateral", "lateral", "AP", "frontal", "lateral"]
    edema = by_image(table, "Edema")
    same(edema, dict(zip(edema, [NAN, NAN, NAN, NAN, 0, 0, 0])))
    assert by_image(table, "Cardiomegaly")["train/patient00002/study1/view1_frontal.jpg"] == -1
    assert by_image(table, "No Finding")["test/patient64741/study1/view1_frontal.jpg"] == 1
    assert by_image(table, "Support Devices")["train/patient00003/study1/view1_frontal.jpg"] == 1
    frontal = chexpert.load_table(root.parent, views="frontal")
    assert frontal.view.tolist() == ["AP", "PA", "AP", "frontal"]


def test_chexpert_with_tables_beside_the_top_folder(chexpert_at, tmp_path):
    root = chexpert_at("CheXpert-v1.0-small")
    for name in ("train.csv", "valid.csv", "groundtruth.csv"):
        (root / name).rename(tmp_path / name)
    table = chexpert.load_table(tmp_path, label_names=("Edema",))
    assert table.path[0] == b"CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg" and len(table) == 7


def test_chexpert_without_its_test_set_tests_on_valid(chexpert_at):
    root = chexpert_at(test=False)
    assert list(splits_of(chexpert.load_table(root)).values()) == ["train"] * 4 + ["validate"]
    table = chexpert.load_table(root, testing=True)
    assert list(splits_of(table).values()) == ["train"] * 4 + ["test"]
    assert "the test split is the release's validation split: groundtruth.csv is not there" in table.notes


# ------------------------------------------------------------------------------------------------ NIH
NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


@pytest.fixture
def nih_at(tmp_path):
    """make(name, place) -> a folder of 24 images, two a patient; place(k): the folder of image k."""

    def make(name="Data_Entry_2017_v2020.csv", place=lambda k: "images", trailing=""):
        root = tmp_path / "nih"
        findings = ["No Finding", "Effusion|Mass", "Infiltration", "Pleural_Thickening|Nodule", "Hernia", "Fibrosis"]
        images = [f"{k // 2 + 1:08d}_{k % 2:03d}.png" for k in range(24)]
        lines = [
            f"{image},{findings[k % 6]},{k % 2},{k // 2 + 1},{40 + k},M,{'AP' if k % 3 else 'PA'},2500,2048,0.1,0.1"
            for k, image in enumerate(images)
        ]
        write(root / name, NIH + trailing, *(line + trailing for line in lines))
        (root / "train_val_list.txt").write_text("\n".join(images[:20]))
        (root / "test_list.txt").write_text("\n".join(images[20:]) + "\n")
        for k, image in enumerate(images):
            draw(root / place(k) / image, k)
        return root

    return make


PLACES = {
    "one folder": lambda k: "images",
    "twelve": lambda k: f"images_{k // 2 + 1:03d}/images",
    "twelve flat": lambda k: f"images_{k // 2 + 1:03d}",
    "beside": lambda k: "",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"])
def test_nih(nih_at, name, place):
    root = nih_at(name, PLACES[place], "," if name == "Data_Entry_2017.csv" else "")
    table = nih.load_table(root)
    assert len(table) == 24 and all((root / path.decode()).is_file() for path in table.path)
    counts = pd.Series(splits_of(table)).value_counts()
    assert counts.to_dict() == {"train": 18, "test": 4, "validate": 2}  # one of ten patients, with both images
    assert len(set(table.subject[table.split == 1])) == 1
    first = [f"{k // 2 + 1:08d}_{k % 2:03d}.png" for k in range(6)]
    for label, values in {
        "No Finding": [1, 0, 0, 0, 0, 0],
        "Pleural Effusion": [0, 1, 0, 0, 0, 0],
        "Lung Lesion": [0, 1, 0, 1, 0, 0],
        "Lung Opacity": [0, 0, 1, 0, 0, 0],
        "Pleural Other": [0, 0, 0, 1, 0, 0],
        "Fracture": [UNKNOWN] * 6,
    }.items():
        found = by_image(table, label)
        assert [found[image] for image in first] == values, label
    assert table.view.tolist()[:4] == ["PA", "AP", "AP", "PA"] and table.study[1] == b"1_1"
    below = root / PLACES[place](0) if place != "twelve" else root / "images_001"
    assert nih.load_table(below).path.tolist() == table.path.tolist()
    assert nih.load_table(root.parent).path.tolist() == table.path.tolist()


def test_labels_that_a_release_does_not_know_stay_unknown(nih_at):
    root = nih_at()
    table = nih.load_table(root).with_targets("zeros", "zeros")
    fracture = table.targets[:, LABELS.index("Fracture")]
    assert np.isnan(fracture).all() and table.label_mapping["Fracture"] == {"from": [], "kind": "unknown"}
    assert table.label_mapping["Lung Lesion"] == {"from": ["Mass", "Nodule"], "kind": "approximate"}
    assert table.label_mapping["Pleural Effusion"] == {"from": ["Effusion"], "kind": "exact"}
    summary = table.summary()
    assert summary.count("Fracture") == 2 and "Fracture  " in summary
    assert any(line.split() == ["Fracture", "-", "-", "-"] for line in summary.splitlines())
    assert "unknown to nih, masked in loss and metrics: Enlarged Cardiomediastinum, Fracture, Support Devices" in summary
    strict = nih.load_table(root, approximate_labels=False).with_targets("zeros", "zeros")
    unknown = {label for label, m in strict.label_mapping.items() if m["kind"] == "unknown"}
    assert unknown == {"Enlarged Cardiomediastinum", "Fracture", "Support Devices", "Lung Lesion", "Lung Opacity",
                       "No Finding", "Pleural Other"}  # fmt: skip
    columns = [k for k, label in enumerate(LABELS) if label in unknown]
    assert np.isnan(strict.targets[:, columns]).all() and not np.isnan(np.delete(strict.targets, columns, 1)).any()


def test_own_labels_of_a_release(nih_at):
    table = nih.load_table(nih_at(), label_names=nih.FINDINGS)
    assert by_image(table, "Hernia")["00000003_000.png"] == 1 and by_image(table, "Mass")["00000003_000.png"] == 0
    assert {m["kind"] for m in table.label_mapping.values()} == {"exact"}
    with pytest.raises(UserError, match=r"DATA.LABELS: 'Efusion' is no label of nih.*did you mean Effusion\?"):
        nih.load_table(nih_at(), label_names=("Efusion",))


def test_the_tenth_of_the_patients_is_seeded_and_does_not_depend_on_the_order(nih_at):
    root = nih_at()
    first = splits_of(nih.load_table(root))
    path = root / "Data_Entry_2017_v2020.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[:0:-1]]))
    assert splits_of(nih.load_table(root)) == first
    drawn = {tuple(sorted(k for k, v in splits_of(nih.load_table(root, split_seed=s)).items() if v == "validate"))
             for s in range(12)}  # fmt: skip
    assert len(drawn) > 3


@pytest.mark.skipif(not (SHARED / "nih_sample").is_dir(), reason="no shared/nih_sample")
def test_the_same_real_images_as_nih_and_as_mimic():
    """Exact labels, and those made of masses, nodules and pleural thickening, are the same; every image is joined."""
    ours, other = nih.load_table(SHARED / "nih_sample"), load_mimic(SHARED / "cxr_sample")
    joined = pd.read_csv(SHARED / "nih_sample/as_mimic.csv", dtype=str).set_index("image")["dicom_id"]
    rows = pd.Index(other.dicom_id).get_indexer([joined[image.decode()].encode() for image in ours.dicom_id])
    assert len(ours) == 60 and (rows >= 0).all()
    mapped = [k for k, label in enumerate(LABELS) if ours.label_mapping[label]["kind"] != "unknown"]
    compared = [k for k in mapped if LABELS[k] != "Lung Opacity"]  # of more than infiltrations there
    assert len(compared) == 10
    ours, theirs = ours.with_targets().targets, other.with_targets().targets[rows]
    np.testing.assert_array_equal(ours[:, compared], theirs[:, compared])
    assert (ours[:, compared] == 1).sum() > 60
