"""Releases as they are downloaded -> the one table: splits, labels, views, paths, and every mistake in them."""

import gzip
import io
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import prepare_mimic
from benchmarks.loading import write_nih_tables
from common.errors import UserError
from conftest import ROOT, SHARED
from dataset import brax, chexpert, mimic_cxr, nih, padchest, releases, vindr
from dataset.files.stores import FileStore
from dataset.labels import LABELS, UNKNOWN
from dataset.mimic_cxr import load_table as load_mimic
from dataset.patients import patients_of, refuse_known, together

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
    assert table.view.tolist() == ["AP", "PA", "lateral", "frontal", "AP", "frontal", "lateral"]
    edema = by_image(table, "Edema")
    same(edema, dict(zip(edema, [NAN, NAN, NAN, NAN, 0, 0, 0])))
    assert by_image(table, "Cardiomegaly")["train/patient00002/study1/view1_frontal.jpg"] == -1
    assert by_image(table, "No Finding")["test/patient64741/study1/view1_frontal.jpg"] == 1
    assert by_image(table, "Support Devices")["train/patient00003/study1/view1_frontal.jpg"] == 1
    frontal = chexpert.load_table(root.parent, views="frontal")
    assert frontal.view.tolist() == ["AP", "PA", "frontal", "AP", "frontal"]  # Frontal/Lateral decides


def test_chexpert_with_tables_beside_the_top_folder(chexpert_at, tmp_path):
    root = chexpert_at("CheXpert-v1.0-small")
    for name in ("train.csv", "valid.csv", "groundtruth.csv"):
        (root / name).rename(tmp_path / name)
    table = chexpert.load_table(tmp_path, label_names=("Edema",))
    assert table.path[0] == b"CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg" and len(table) == 7


@pytest.mark.parametrize("inside", [False, True])
def test_chexpert_in_the_folders_of_its_full_size(chexpert_at, tmp_path, inside):
    """Four folders, as they are unpacked; a copy of them reads alike, zipped too."""
    whole, root = chexpert_at("whole"), tmp_path / "full"
    first, train_1, train_2 = (
        root / f"CheXpert-v1.0 batch {what}" for what in ("1 (validate & csv)", "2 (train 1)", "3 (train 2)")
    )
    for name in ("train.csv", "valid.csv", "valid", "test", "groundtruth.csv"):
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).rename((first if name[0] in "tv" and name != "test" else root) / name)
    for patient, place in (("patient00001", train_1), ("patient00002", train_2), ("patient00003", train_2 / "train")):
        place.mkdir(parents=True, exist_ok=True)
        (whole / "train" / patient).rename(place / patient)
    table = chexpert.load_table(first if inside else root)
    assert table.root == root and len(table) == 7
    found = [path.decode().removeprefix("CheXpert-v1.0 batch ") for path in table.path.tolist()]
    assert found[0] == "2 (train 1)/patient00001/study1/view1_frontal.jpg"
    assert found[3:5] == ["3 (train 2)/train/patient00003/study1/view1_frontal.jpg",
                          "1 (validate & csv)/valid/patient64541/study1/view1_frontal.jpg"]  # fmt: skip
    assert found[5] == "test/patient64741/study1/view1_frontal.jpg"
    for flags in ([], ["--zip"]):
        copy = tmp_path / f"copy{len(flags)}"
        prepare_mimic.main(["build", "--dataset", "chexpert", "--data-path", str(root), "--output", str(copy),
                            "--workers", "1", *flags])  # fmt: skip
        assert chexpert.load_table(copy, in_zip=bool(flags)).path.tolist() == table.path.tolist()


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
    assert (
        "unknown to nih, masked in loss and metrics: Enlarged Cardiomediastinum, Fracture, Support Devices" in summary
    )
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


# ------------------------------------------------------------------------------------------------ PadChest
PADCHEST = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
    "MethodProjection,Pediatric,MethodLabel,Labels,Localizations"
)
LONG = 216840111366964012487858717522009210095150  # beyond any float; patients differ in the last digits alone


@pytest.fixture
def padchest_at(tmp_path):
    """make(place) -> a folder of 40 images of 20 patients and a few oddities; place: how the images lie."""

    def make(place="{dir}/{image}"):
        root = tmp_path / "padchest"
        kinds = {
            "['pleural effusion', 'cardiomegaly']": "Physician",
            "['laminar atelectasis', ' NSG tube ']": "Physician",
            "['normal']": "Physician",
            "['no pneumothorax seen', 'pseudonodule']": "Physician",  # no term of these is one that is mapped
        }
        rows = [
            (f"{LONG + k}_00-{k:03d}-x.png", k % 3, f"{LONG}{k // 2}", f"{LONG + k // 2}", *list(kinds.items())[k % 4])
            for k in range(40)
        ]
        rows += [
            ("net.png", 1, "s1", "p1", "['pneumonia']", "RNN_model"),
            ("blank.png", 1, "s2", "p2", "", "Physician"),
            ("excluded.png", 1, "s3", "p3", "['exclude', 'unchanged']", "Physician"),
        ]
        projections = ["PA", "AP_horizontal", "L", "COSTAL"]
        lines = [
            f'{k},{image},{folder},20110101,{study},{patient},1950,M,,{projections[k % 4]},Manual,No,{by},"{terms}",[]'
            for k, (image, folder, study, patient, terms, by) in enumerate(rows)
        ]
        write(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", PADCHEST, *lines)
        for k, (image, folder, *_) in enumerate(rows):
            draw(root / place.format(dir=folder, image=image), k)
        return root

    return make


@pytest.mark.parametrize("place", ["{dir}/{image}", "{image}", "images/{image}"])
def test_padchest(padchest_at, place):
    table = padchest.load_table(padchest_at(place))
    assert len(table) == 40 and set(splits_of(table).values()) == {"test"}
    assert table.left_out == {
        "image labelled by a network (DATA.LABELLED_BY physicians)": 1, "image without labels": 1,
        "image labelled exclude": 1,
    }  # fmt: skip
    assert len(set(table.subject)) == 20 and table.subject[-1].decode() == str(LONG + 19)
    assert table.view.tolist()[:4] == ["PA", "AP", "lateral", "other"]
    first = [f"{LONG + k}_00-{k:03d}-x.png" for k in range(4)]
    for label, values in {
        "Pleural Effusion": [1, 0, 0, 0], "Cardiomegaly": [1, 0, 0, 0], "Atelectasis": [0, 1, 0, 0],
        "Support Devices": [0, 1, 0, 0], "No Finding": [0, 0, 1, 0], "Pneumothorax": [0] * 4, "Lung Lesion": [0] * 4,
    }.items():  # fmt: skip
        found = by_image(table, label)
        assert [found[image] for image in first] == values, label
    own = padchest.load_table(table.root, label_names=("pseudonodule", "normal"), labelled_by="all")
    assert len(own) == 41 and own.labels.sum(0).tolist() == [10, 10]


def test_a_release_without_splits_is_split_by_patient_to_train_on(padchest_at):
    table = padchest.load_table(padchest_at(), split_seed=3)
    counts = pd.Series({s.decode(): k for s, k in zip(table.subject, table.split)}).value_counts()
    assert counts.to_dict() == {0: 14, 1: 2, 2: 4}  # of 20 patients
    assert any("drawn by DATA.SPLIT_SEED 3: 70 % of the patients train" in note for note in table.notes)


@pytest.mark.parametrize("text", ["pneumonia", "['pneumonia'", "{'pneumonia'}", "[1]", "__import__('os')"])
def test_padchest_labels_that_are_no_list(padchest_at, text):
    root = padchest_at()
    path = next(root.glob("*.csv"))
    path.write_text(path.read_text().replace("['normal']", text, 1))
    with pytest.raises(UserError, match="Labels is .* in data row 3; expected a list"):
        padchest.load_table(root)


# ------------------------------------------------------------------------------------------------ VinDr
@pytest.fixture
def vindr_at(tmp_path):
    """make(suffix, other) -> 20 images of train read by three, 3 of test."""

    def make(suffix=".dicom", other="Other disease", place="annotations"):
        root = tmp_path / "vindr"
        names = [other if name == "Other disease" else name for name in vindr.FINDINGS]
        # How many of the three see (Edema, Rib fracture) in images 0 to 3; No finding else.
        votes = {0: (3, 0), 1: (2, 1), 2: (1, 3), 3: (0, 0)}
        lines = []
        for k in range(20):
            for reader in (2, 0, 1):
                edema, rib = (reader < n for n in votes.get(k, (0, 0)))
                marked = {"Edema": edema, "Rib fracture": rib, "No finding": not (edema or rib), other: k == 5}
                lines.append(f"{k:032x},R{reader + 8}," + ",".join(str(int(marked.get(n, 0))) for n in names))
        write(root / place / "image_labels_train.csv", "image_id,rad_id," + ",".join(names), *lines)
        lines = [f"{100 + k:032x}," + ",".join(str(int(n == "Edema" and k == 0)) for n in names) for k in range(3)]
        write(root / place / "image_labels_test.csv", "image_id," + ",".join(names), *lines)
        for k in range(20):
            draw(root / f"train/{k:032x}{suffix}", k)
        for k in range(100, 103):
            draw(root / f"test/{k:032x}{suffix}", k)
        return root

    return make


@pytest.mark.parametrize("suffix", [".dicom", ".dcm", ".png", ""])
def test_vindr(vindr_at, suffix):
    root = vindr_at(suffix)
    table = vindr.load_table(root)
    assert len(table) == 23 and table.path[0].decode() == f"train/{0:032x}{suffix}"
    assert pd.Series(splits_of(table)).value_counts().to_dict() == {"train": 18, "test": 3, "validate": 2}
    assert (table.subject == b"").all() and table.view is None
    assert any("a tenth of the images (the release has no patient ids) of train" in note for note in table.notes)
    first = [f"{k:032x}" for k in range(4)]
    expected = {"majority": ([1, 1, 0, 0], [0, 0, 1, 0]), "any": ([1, 1, 1, 0], [0, 1, 1, 0])}
    for readers, (edema, fracture) in expected.items():
        table = vindr.load_table(root, readers=readers)
        assert [by_image(table, "Edema")[image] for image in first] == edema
        assert [by_image(table, "Fracture")[image] for image in first] == fracture
    assert [by_image(table, "Edema")[f"{100 + k:032x}"] for k in range(3)] == [1, 0, 0]
    assert vindr.load_table(root / "annotations").root == vindr.load_table(root / "train").root == root


@pytest.mark.parametrize("there", ["Other disease", "Other diseases"])
def test_vindr_writes_other_disease_in_two_ways(vindr_at, there):
    root = vindr_at(other=there, place=".")
    for asked in ("Other disease", "Other diseases"):
        table = vindr.load_table(root, label_names=(asked,))
        assert table.labels.sum() == 1 and table.labels[5] == 1
    whole = vindr.load_table(root, label_names=vindr.FINDINGS)
    assert whole.labels.shape == (23, 28) and whole.label_names[26] == "Other disease"


def test_vindr_readers_at_odds_are_uncertain(vindr_at):
    root = vindr_at()
    path = root / "annotations/image_labels_train.csv"
    lines = path.read_text().splitlines()
    assert lines[4].startswith(f"{1:032x},R10")
    path.write_text("\n".join(lines[:4] + lines[5:]))  # of image 1 the reader who sees nothing has gone
    assert by_image(vindr.load_table(root), "Edema")[f"{1:032x}"] == 1
    path.write_text("\n".join(lines[:4] + lines[4:5] + lines[6:]))  # one of two sees it
    assert by_image(vindr.load_table(root), "Edema")[f"{1:032x}"] == -1
    assert by_image(vindr.load_table(root, readers="any"), "Edema")[f"{1:032x}"] == 1


# ------------------------------------------------------------------------------------------------ BRAX
BRAX = (
    "DicomPath,PngPath,PatientID,PatientSex,PatientAge,AccessionNumber,StudyDate,No Finding,Enlarged Cardiomediastinum,"
    "Cardiomegaly,Lung Lesion,Lung Opacity,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,"
    "Pleural Other,Fracture,Support Devices,ViewPosition,Rows,Columns,Manufacturer"
)


@pytest.fixture
def brax_at(tmp_path):
    """make(kinds) -> 12 images of 6 patients, of these kinds (dcm, png)."""

    def make(*kinds, strip=False):
        root, lines = tmp_path / "brax", []
        for k in range(12):
            stem = f"id_{k // 2:04d}/Study_{k}.{k}/Series_1/image-{k}"
            paths = {"dcm": f"Anonymized_DICOMs/{stem}.dcm", "png": f"images/{stem}.png"}
            labels = ["1.0", "", "-1.0", "0.0"] + [""] * 10 if k % 2 else [""] * 4 + ["1"] + [""] * 9
            view = ("PA", "L", "AP", "RL", "", "LT-DECUB")[k % 6]
            patient = f"Patient_{k // 2},M,85 or more,{k},20200101"
            lines.append(f"{paths['dcm']},{paths['png']},{patient},{','.join(labels)},{view},1,1,X")
            for kind in kinds:
                draw(root / (paths[kind].partition("/")[2] if strip else paths[kind]), k)
        write(root / "master_spreadsheet_update.csv", BRAX, *lines)
        return root

    return make


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("kind", ["dcm", "png"])
def test_brax(brax_at, kind, strip):
    root = brax_at(kind, strip=strip)
    table = brax.load_table(root)
    assert len(table) == 12 and set(splits_of(table).values()) == {"test"} and len(set(table.subject)) == 6
    assert all((root / path.decode()).is_file() and path.endswith(kind.encode()) for path in table.path)
    assert table.view.tolist()[:6] == ["PA", "lateral", "AP", "lateral", "", "other"]
    label = {name: list(by_image(table, name).values())[:2] for name in LABELS}
    np.testing.assert_array_equal(label["Lung Opacity"], [1, NAN])
    np.testing.assert_array_equal(label["Lung Lesion"], [NAN, 0])
    np.testing.assert_array_equal(label["Cardiomegaly"], [NAN, -1])
    np.testing.assert_array_equal(label["No Finding"], [NAN, 1])
    assert {m["kind"] for m in table.label_mapping.values()} == {"exact"}
    cleared = by_image(brax.load_table(root, no_finding_clears=True), "Edema")
    np.testing.assert_array_equal(list(cleared.values())[:2], [NAN, 0])


def test_brax_as_both_kinds(brax_at):
    root = brax_at("dcm", "png")
    with pytest.raises(UserError, match="holds both .* images; say which to read: DATA.IMAGE_FORMAT dcm or png"):
        brax.load_table(root)
    for kind in ("dcm", "png"):
        assert brax.load_table(root, image_format=kind).path[0].endswith(kind.encode())


def test_the_page_has_the_mapping():
    """The table of docs/data.md is what the code does; approximate labels are in italics there."""
    lines = (ROOT.parent / "docs" / "data.md").read_text().splitlines()
    rows = {cells[1]: cells[2:5] for line in lines if len(cells := [c.strip() for c in line.split("|")]) == 6}
    for label in LABELS:
        for module, cell in zip((nih, padchest, vindr), rows[label]):
            source = module.RELEASE.mapping.get(label)
            names = ", ".join(source.names) if source else "–"
            assert cell == (names if source is None or source.exact else f"*{names}*"), (label, module.__name__)


# ------------------------------------------------------------------------------------------------ external tests
def test_an_external_test_in_one_command(trained_once, run_main, nih_at, tmp_path, monkeypatch, capsys):
    """A model of MIMIC-CXR tested on NIH: the folder names the set, and the report says what can be compared."""
    monkeypatch.chdir(tmp_path)
    evaluate = ["--eval", "--resume", trained_once / "best_ckpt.pth", "--dataset", "nih"]
    run_main(*evaluate, data=nih_at(), RESULTS="", TEST__REPORT=True)
    (folder,) = (tmp_path / "results/nih").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["dataset"] == "nih" and metrics["trained_on"] == ["mimic_cxr"] and metrics["images"] == 4
    mapping = metrics["label_mapping"]
    assert list(mapping) == list(LABELS) and mapping["Pleural Effusion"] == {"from": ["Effusion"], "kind": "exact"}
    assert mapping["Fracture"] == {"from": [], "kind": "unknown"} and metrics["positives"]["Fracture"] == 0
    assert metrics["negatives"]["Fracture"] == 0 and metrics["auc"]["Fracture"] is None
    summary = (folder / "summary.md").read_text()
    assert "Labels of the model in these data" in summary and "7 of 14 labels are the same in nih." in summary
    assert "| Lung Lesion | Mass, Nodule | nearly the same | 4 |" in summary
    assert "| Fracture | – | not comparable: unknown to the data | 0 |" in summary
    assert "Labels of the model in these data" in (folder / "report.html").read_text()
    assert "An external test: trained on mimic_cxr, tested on nih." in (folder / "model_card.md").read_text()
    predictions = pd.read_csv(folder / "predictions.csv")
    assert predictions["Fracture_target"].isna().all() and (predictions["Fracture_label"] == UNKNOWN).all()
    assert "label_mapping" in json.loads((folder / "report.json").read_text())
    run_main(*evaluate, data=nih_at(), RESULTS="elsewhere")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_a_model_is_not_tested_on_patients_that_it_was_trained_on(run_main, nih_at, tmp_path):
    root = nih_at()
    opts = {"TRAIN__EPOCHS": 1, "DATA__BATCH_SIZE": 4, "DATA__DATASET": "nih"}
    run = run_main(data=root, out="nih", **opts)
    last = run / "last_ckpt.pth"  # two validation images of one patient choose no best one
    run_main("--eval", "--resume", last, data=root, out="nih", **opts)  # its own test split
    lists = [root / "train_val_list.txt", root / "test_list.txt"]
    texts = [path.read_text() for path in lists]
    for path, text in zip(lists, texts[::-1]):
        path.write_text(text)
    with pytest.raises(UserError, match="trained or chosen on 10 of the 10 patients of this test split of nih"):
        run_main("--eval", "--resume", last, data=root, out="b", **opts)
    state = torch.load(last, weights_only=True)
    assert {name: len(known) for name, known in state["patients"].items()} == {"nih": 10}


# ------------------------------------------------------------------------------------------------ the tools
LOAD = {"nih": nih, "chexpert": chexpert, "padchest": padchest, "vindr": vindr, "brax": brax}


@pytest.fixture
def release_at(chexpert_at, nih_at, padchest_at, vindr_at, brax_at):
    """release_at(name) -> its small folder with pictures that can be read."""
    make = {"chexpert": chexpert_at, "nih": lambda: nih_at(place=PLACES["twelve"]), "padchest": padchest_at}
    make |= {"vindr": lambda: vindr_at(".png"), "brax": lambda: brax_at("png")}
    return lambda name: make[name]()


@pytest.mark.parametrize("flags", [[], ["--zip"]], ids=["folder", "zip"])
@pytest.mark.parametrize("name", LOAD)
def test_a_copy_reads_as_the_release(release_at, name, flags, tmp_path):
    root, out = release_at(name), tmp_path / "copy"
    argv = ["--data-path", str(root), "--dataset", name, "--workers", "1", "--output"]
    assert prepare_mimic.main(["build", *argv, str(out), "--size", "32", *flags]) == 0
    whole, small = LOAD[name].load_table(root), LOAD[name].load_table(out, in_zip=bool(flags))
    for column in ("dicom_id", "study", "subject", "split", "labels"):
        np.testing.assert_array_equal(getattr(small, column), getattr(whole, column))
    image = Image.open(io.BytesIO(small.store.read(small.path[0].decode())))
    assert image.format == "JPEG" and min(image.size) == 32


@pytest.mark.parametrize("name", LOAD)
def test_the_audit_of_a_release(release_at, name, tmp_path):
    root = release_at(name)
    argv = ["audit", "--data-path", str(root), "--dataset", name, "--workers", "1", "--output", str(tmp_path / "audit")]
    found = LOAD[name].load_table(root).path
    prepare_mimic.main(argv)
    before = pd.read_csv(tmp_path / "audit/audit.csv")
    assert set(before["problem"]) <= {"duplicate pixels"}
    (root / found[0].decode()).unlink()
    (root / found[-1].decode()).write_bytes(b"no image")
    draw((root / found[1].decode()).with_name("more.png"), 99)
    assert prepare_mimic.main(argv) == 1
    after = pd.read_csv(tmp_path / "audit/audit.csv").set_index("problem")["path"]
    assert after["missing"] == found[0].decode() and after["unreadable"] == found[-1].decode()
    assert after["extra"].endswith("more.png")


# ------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize("wrong", [*LOAD, "mimic_cxr"])
@pytest.mark.parametrize("name", LOAD)
def test_the_wrong_release_is_recognised(release_at, name, wrong):
    root, load = release_at(name), {**LOAD, "mimic_cxr": mimic_cxr}[wrong].load_table
    if name != wrong:
        with pytest.raises(UserError, match=f"it looks like {name}: use --dataset {name}$"):
            load(root)


def test_a_release_is_no_folder_of_photographs(run_main, release_at):
    with pytest.raises(UserError, match="must hold train/ and val/.* it looks like nih: use --dataset nih$"):
        run_main(data=release_at("nih"), DATA__DATASET="imagenet")


@pytest.mark.parametrize("name", LOAD)
def test_a_tree_of_mimic_is_recognised(tree, name):
    with pytest.raises(UserError, match="holds no tables of .* it looks like mimic_cxr: use --dataset mimic_cxr$"):
        LOAD[name].load_table(tree)


@pytest.mark.parametrize("name, file, message", [
    ("nih", "test_list.txt", "holds no test_list.txt, the official test split"),
    ("nih", "train_val_list.txt", "holds no train_val_list.txt, the official train split"),
    ("chexpert", "train.csv", "holds no train.csv, the training split of CheXpert"),
    ("chexpert", "valid.csv", "holds no valid.csv, the validation split of CheXpert"),
    ("vindr", "annotations/image_labels_test.csv", "holds no annotations/image_labels_test.csv, the labels of th"),
    ("vindr", "annotations/image_labels_train.csv", "holds no annotations/image_labels_train.csv, the labels of th"),
])  # fmt: skip
def test_a_table_is_missing(release_at, name, file, message):
    root = release_at(name)
    (root / file).unlink()
    with pytest.raises(UserError, match=message):
        LOAD[name].load_table(root)


@pytest.mark.parametrize("name", LOAD)
def test_images_lie_elsewhere(release_at, name, tmp_path):
    root = release_at(name)
    for path in [p for p in root.rglob("*") if p.suffix in (".png", ".jpg")]:
        moved = tmp_path / "elsewhere" / path.relative_to(root)
        moved.parent.mkdir(parents=True, exist_ok=True)
        path.rename(moved)
    # The studies of CheXpert's test set are looked for first: their images are named by the folder alone.
    with pytest.raises(UserError, match=f"no image found as files: looked for {root}|holds no image of this study"):
        LOAD[name].load_table(root)


@pytest.mark.parametrize("name, column", [
    ("chexpert", "Edema"), ("nih", "Finding Labels"), ("padchest", "Projection"), ("vindr", "Rib fracture"),
    ("brax", "Pleural Other"),
])  # fmt: skip
def test_a_column_is_missing(release_at, name, column):
    root = release_at(name)
    path = LOAD[name].load_table(root).sources[0]
    text = path.read_text()
    path.write_text(text.replace(column, "Something", 1))
    with pytest.raises(UserError, match=f"column '{column}' is missing"):
        LOAD[name].load_table(root)


@pytest.mark.parametrize("name", ["chexpert", "nih", "vindr", "brax"])
def test_a_table_that_is_none(release_at, name):
    root = release_at(name)
    path = LOAD[name].load_table(root).sources[0]
    path.write_bytes(b"\x1f\x8b<html>")
    with pytest.raises(UserError, match=f"{path.name}: cannot be read as CSV"):
        LOAD[name].load_table(root)


@pytest.mark.parametrize("name", LOAD)
def test_labels_that_nobody_has(release_at, name):
    with pytest.raises(UserError, match=f"DATA.LABELS: 'Pleural Efusion' is no label of {name}.*Pleural Effusion"):
        LOAD[name].load_table(release_at(name), label_names=("Pleural Efusion",))


def test_a_vindr_image_without_annotations(vindr_at):
    root = vindr_at()
    draw(root / "train/0123.dicom")
    with pytest.raises(UserError, match="image_labels_train.csv has no row of train/0123.dicom .1 such images."):
        vindr.load_table(root)


def test_a_vindr_row_without_a_reader_or_twice(vindr_at):
    root = vindr_at()
    path = root / "annotations/image_labels_train.csv"
    text = path.read_text()
    path.write_text(text.replace(",R10,", ",,", 1))
    with pytest.raises(UserError, match="rad_id is empty in data row 1"):
        vindr.load_table(root)
    path.write_text(text.replace(",R10,", ",R8,", 1))
    with pytest.raises(UserError, match="image 0+ of the reader R8 has more than one row"):
        vindr.load_table(root)


def test_nih_lists_that_are_at_odds(nih_at):
    root = nih_at()
    train, test = (root / name for name in ("train_val_list.txt", "test_list.txt"))
    names = train.read_text().splitlines()
    train.write_text("\n".join(names[1:]))
    assert nih.load_table(root).left_out["image that neither list of the split names"] == 1
    test.write_text(test.read_text() + names[5] + "\n")
    with pytest.raises(UserError, match=f"test_list.txt: {names[5]} is in train_val_list.txt too"):
        nih.load_table(root)
    train.write_text("\n".join(name for name in names if name != names[5]))  # its patient's other image stays
    with pytest.raises(UserError, match="are in more than one split, such as subject_id 3"):
        nih.load_table(root)


def test_a_finding_that_nih_does_not_have(nih_at):
    root = nih_at()
    path = root / "Data_Entry_2017_v2020.csv"
    path.write_text(path.read_text().replace("Infiltration,", "Infiltrate,", 1))
    with pytest.raises(UserError, match=r"the finding 'Infiltrate' is none of NIH's \(did you mean Infiltration\?\)"):
        nih.load_table(root)


def test_a_partial_download(release_at):
    for name, module in LOAD.items():
        root = release_at(name)
        table = module.load_table(root)
        (root / table.path[0].decode()).unlink()
        with pytest.raises(UserError, match="image missing: .*DATA.ALLOW_MISSING"):
            module.load_table(root)
        assert len(module.load_table(root, allow_missing=True)) == len(table) - 1


CXR_LT = "dicom_id,subject_id,study_id,fpath,Atelectasis,Pneumomediastinum,Subcutaneous Emphysema,Tortuous Aorta"


@pytest.mark.parametrize("header, name", [
    (CXR_LT, "train_labeled.csv"), (CXR_LT.replace("fpath", "path"), "any.csv"),
    ("dicom_id,subject_id,study_id,fpath,A,B,C,D", "cxr-lt-2024-test.csv"),
])  # fmt: skip
def test_tables_of_cxr_lt_are_refused(tmp_path, header, name):
    path = "files/p10/p10000032/s50414267/02aa804e.jpg"
    write(tmp_path / name, header, f"02aa804e,10000032,50414267,{path},1,0,0,0")
    for csv in ("", name):
        with pytest.raises(UserError, match="is a table of CXR-LT.*most of its test patients are in MIMIC-CXR's train"):
            load_mimic(tmp_path, csv=csv)
    write(tmp_path / name, header, "1,2,3,a.jpg,1,0,0,0")  # such labels of another hospital are no fault
    with pytest.raises(UserError, match="no mimic-cxr|column|does not exist|image missing"):
        load_mimic(tmp_path)


@pytest.mark.parametrize("name, labels", [("nih", nih.FINDINGS), ("vindr", vindr.FINDINGS)])
def test_training_on_the_labels_of_a_release(run_main, release_at, name, labels):
    opts = {"DATA__LABELS": list(labels), "MODEL__NUM_CLASSES": len(labels), "DATA__BATCH_SIZE": 4}
    run = run_main(data=release_at(name), DATA__DATASET=name, TRAIN__EPOCHS=1, **opts)
    assert torch.load(run / "last_ckpt.pth", weights_only=True)["label_names"] == list(labels)
    loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["train_loss"]
    assert 0 < loss < 2


def test_patients_known_to_a_model():
    """Exact unions; another data set, and images without patients, are compared with their own kind only."""
    import config as config_module

    config = config_module.from_dict({"DATA": {"DATASET": "nih"}}, "test")

    def dataset(*subjects):
        return SimpleNamespace(
            ids=lambda: {"dicom_id": [f"i{k}" for k in range(len(subjects))], "subject_id": subjects}
        )

    known = together(patients_of(dataset("1", "2", "2"), config), patients_of(dataset("2", "3"), config), {})
    assert known["nih"].dtype == torch.int64 and len(known["nih"]) == 3
    refuse_known(known, dataset("4", "01", "1.0"), config, "a.pth")
    refuse_known({"chexpert": known["nih"]}, dataset("1"), config, "a.pth")
    refuse_known({}, dataset("1"), config, "a.pth")
    refuse_known(known, SimpleNamespace(ids=lambda: {"path": ["1"]}), config, "a.pth")  # photographs have no patients
    with pytest.raises(UserError, match="a.pth was trained or chosen on 2 of the 3 patients .*, such as 2: the score"):
        refuse_known(known, dataset("4", "2", "3", "3"), config, "a.pth")
    images = patients_of(dataset("", ""), config)
    with pytest.raises(UserError, match="on 1 of the 1 patients"):
        refuse_known(images, dataset(""), config, "a.pth")


def test_training_without_a_split_asks_for_one(run_main, release_at):
    opts = {"DATA__DATASET": "brax", "DATA__BATCH_SIZE": 4, "TRAIN__EPOCHS": 1}
    with pytest.raises(UserError, match="brax has no splits of its own.*DATA.SPLIT_SEED"):
        run_main(data=release_at("brax"), **opts)
    run = run_main(data=release_at("brax"), DATA__SPLIT_SEED=0, **opts)
    assert json.loads((run / "config.json").read_text())["DATA"]["SPLIT_SEED"] == 0
    assert "split drawn by DATA.SPLIT_SEED 0: 70 % of the patients train" in (run / "log_rank0.txt").read_text()


def test_nih_at_its_full_size(tmp_path, monkeypatch):
    """The official counts; a sample of the files is looked for, not 112,120."""
    images, looked = write_nih_tables(tmp_path), []
    monkeypatch.setattr(FileStore, "missing", lambda _, paths: np.zeros(looked.append(len(paths)) or len(paths), bool))
    table = nih.load_table(tmp_path)
    assert len(images) == len(table) == 112_120 and len(np.unique(table.subject)) == 30_805
    train, validate, test = (table.select(table.split == k) for k in range(3))
    assert len(train) + len(validate) == 86_524 and len(test) == 25_596
    patients = [len(np.unique(t.subject)) for t in (train, validate, test)]
    assert patients == [28_008 - 2_801, 2_801, 2_797]  # a tenth, rounded up
    assert sum(looked) < 1_000


def test_several_tables_that_fit_are_an_error(padchest_at, brax_at, nih_at, own_tree):
    """Except where one replaces the other: BRAX's update, NIH's second version, a plain table its gzipped one."""
    root = padchest_at()
    (table,) = root.glob("*.csv")
    (root / "A_subset.csv").write_text("".join(table.read_text().splitlines(True)[:3]))
    with pytest.raises(
        UserError, match=rf"holds several tables \*.csv \(A_subset.csv, {table.name}\); keep the one to"
    ):
        padchest.load_table(root)
    root = brax_at("png")
    (table,) = root.glob("master_spreadsheet*.csv")
    text = table.read_text()
    table.unlink()
    (root / "master_spreadsheet_update.csv").write_text(text)
    (root / "master_spreadsheet.csv").write_text("".join(text.splitlines(True)[:2]))
    assert brax.load_table(root).sources[0].name == "master_spreadsheet_update.csv"
    (root / "master_spreadsheet_update.csv").rename(root / "master_spreadsheet_v3.csv")
    with pytest.raises(UserError, match="master_spreadsheet.csv, master_spreadsheet_v3.csv"):
        brax.load_table(root)
    split = next(own_tree.glob("*-split.csv.gz"))
    plain = split.with_suffix("")
    plain.write_bytes(gzip.decompress(split.read_bytes()))
    assert load_mimic(own_tree).sources[0] == plain
    plain.rename(own_tree / "mimic-cxr-2.1.0-split.csv")
    with pytest.raises(UserError, match="mimic-cxr-2.0.0-split.csv.gz, mimic-cxr-2.1.0-split.csv"):
        load_mimic(own_tree)


def test_padchest_in_latin_1_and_with_ids_that_a_spreadsheet_rounded(padchest_at):
    root = padchest_at()
    (table,) = root.glob("*.csv")
    text = table.read_text()
    before = padchest.load_table(root)
    table.write_bytes(text.replace("Physician", "Physician \u00e9l\u00e8ve", 1).encode("latin-1"))
    after = padchest.load_table(root)
    assert after.path.tolist() == before.path.tolist()
    patient = pd.read_csv(io.StringIO(text), dtype=str)["PatientID"].iloc[0]
    table.write_text(text.replace(patient, "2.16840E+35"))
    with pytest.raises(UserError, match="PatientID is '2.16840E.35' in data row 1: a spreadsheet has rounded it"):
        padchest.load_table(root)


def test_what_is_there_instead_of_the_images_is_named(tree, release_at, tmp_path):
    with pytest.raises(UserError, match="it has .jpg images: use DATA.IMAGE_FORMAT auto"):
        load_mimic(tree, image_format="png")
    with pytest.raises(UserError, match="DATA.IMAGE_FORMAT jpg: the release has no such images; use auto"):
        nih.load_table(release_at("nih"), image_format="jpg")
    for name, root, load in (("mimic_cxr", tree, load_mimic), ("nih", release_at("nih"), nih.load_table)):
        copy = tmp_path / f"zipped_{name}"
        prepare_mimic.main(["build", "--dataset", name, "--data-path", str(root), "--output", str(copy), "--zip"])
        with pytest.raises(UserError, match="has images_0000.zip: to read images from zip files use --zip"):
            load(copy)


def as_nobody(function):
    """The error of `function` as a user without rights, in a process of its own."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.setuid(65534)
        try:
            function()
            text = "nothing"
        except UserError as error:
            text = str(error)
        except BaseException as error:
            text = repr(error)
        os.write(writing, text.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with open(reading, "rb") as file:
        return file.read().decode()


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user")
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_closed_data_folder_is_one_line(release_at, tmp_path, mode):
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    root = release_at("nih")
    root.chmod(mode)
    for load in (nih.load_table, load_mimic):
        assert as_nobody(lambda load=load: load(root)) == (
            f"data path {root} cannot be read (Permission denied); you need the rights to list and to enter it"
        )
    above = as_nobody(lambda: nih.load_table(root / "images"))
    assert above.startswith(f"data path {root / 'images'} ") and "Error" not in above
    root.chmod(0o755)
    table = next(root.glob("Data_Entry*"))
    table.chmod(0)
    assert f"{table}: cannot be read as CSV" in as_nobody(lambda: nih.load_table(root))
    table.chmod(0o644)
    for place in ("images", *(f"images_{k:03d}" for k in range(1, 13))):
        if (root / place).is_dir():
            (root / place).chmod(0)
    assert re.search("images.*: the folder cannot be read .Permission denied", as_nobody(lambda: nih.load_table(root)))
