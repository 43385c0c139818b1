"""Tables, labels and stores: the official layout, the user's own table, and every mistake in them."""

import gc
import os
import resource
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from common.errors import UserError
from conftest import SHARED, edit_csv
from dataset import tables
from dataset.files import stores
from dataset.files.stores import FileStore, MemoryStore, ZipStore
from dataset.labels import LABELS, apply_policy
from dataset.mimic_cxr import MIMICCXRDataset


def raw_csv(root, kind):
    return pd.read_csv(next(root.glob(f"mimic-cxr-*-{kind}.csv.gz")))


# ------------------------------------------------------------------------------------- official
def test_items_follow_the_official_tables(tree):
    splits, labels = raw_csv(tree, "split"), raw_csv(tree, "chexpert")
    for split in ("train", "validate", "test"):
        dataset = MIMICCXRDataset(tree, split)
        expected = splits[splits.split == split].merge(labels, on=["study_id", "subject_id"])
        assert len(dataset) == len(expected) > 0
        rows = pd.DataFrame(dataset.ids()).assign(i=range(len(dataset)))
        assert all(rows[c].map(type).eq(str).all() for c in rows.columns[:3])
        both = rows.merge(expected, on="dicom_id")
        assert len(both) == len(expected)
        zeros = both[list(LABELS)].fillna(0).replace(-1, 0).to_numpy(np.float32)
        np.testing.assert_array_equal(dataset.targets[both.i], zeros)
    image, target = dataset[3]
    assert image.mode == "RGB" and target.dtype == torch.float32 and target.shape == (14,)
    red, green, blue = image.split()
    assert red.tobytes() == green.tobytes() == blue.tobytes()
    row = {k: v[3] for k, v in dataset.ids().items()}
    subject, study, name = row["subject_id"], row["study_id"], row["dicom_id"]
    path = tree / f"files/p{str(subject)[:2]}/p{subject}/s{study}/{name}.jpg"
    np.testing.assert_array_equal(np.asarray(red), np.asarray(Image.open(path)))
    assert torch.equal(MIMICCXRDataset(tree, "val")[0][1], MIMICCXRDataset(tree, "validate")[0][1])


def test_transform_is_applied(tree):
    dataset = MIMICCXRDataset(tree, "test", lambda image: image.size)
    assert dataset[0][0] == MIMICCXRDataset(tree, "test")[0][0].size


def test_policies():
    raw = np.array([[1, 0, -1, np.nan]], np.float32)
    np.testing.assert_array_equal(apply_policy(raw, "abcd"), [[1, 0, 0, 0]])
    np.testing.assert_array_equal(apply_policy(raw, "abcd", uncertain="ones", missing="ignore"), [[1, 0, 1, np.nan]])
    np.testing.assert_array_equal(apply_policy(raw, "abcd", uncertain="ignore"), [[1, 0, np.nan, 0]])
    with pytest.raises(UserError, match="DATA.MISSING is 'nothing'; choose one of zeros, ones, ignore"):
        apply_policy(raw, "abcd", missing="nothing")

    raw = np.array([[-1, -1, np.nan, np.nan], [1, 0, 1, 0]], np.float32)
    mixed = dict(uncertain={"default": "ignore", "b": "ones"}, missing={"c": "smooth"})
    expected = np.array([[np.nan, 1, 0.15, 0], [1, 0, 1, 0]], np.float32)
    np.testing.assert_array_equal(apply_policy(raw, "abcd", **mixed), expected)
    expected[0, 2] = np.nan  # to measure by, a smooth target is unknown
    np.testing.assert_array_equal(apply_policy(raw, "abcd", **mixed, soft=False), expected)
    with pytest.raises(
        UserError, match=r"DATA.UNCERTAIN names the label 'Edem', which is not there \(did you mean Edema\?\)"
    ):
        apply_policy(raw[:, :1], ["Edema"], uncertain={"Edem": "ones"})


def test_a_policy_that_leaves_no_negatives_warns(tree):
    assert MIMICCXRDataset(tree, "train").warnings == []
    (warning,) = MIMICCXRDataset(tree, "train", missing={"No Finding": "ignore"}).warnings
    assert warning.startswith("No Finding cannot be learnt: the train split has 34 positives and 0 negatives")
    assert MIMICCXRDataset(tree, "test", missing={"No Finding": "ignore"}).warnings == []


@pytest.mark.parametrize("place", ["files", "above", "plain", "root_is_files"])
def test_csvs_are_found_beside_and_above_files(own_tree, place):
    expected = len(MIMICCXRDataset(own_tree, "train"))
    root = own_tree
    for path in list(own_tree.glob("*.csv.gz")):
        if place == "files":
            path.rename(own_tree / "files" / path.name)
        elif place == "above":
            path.rename(own_tree.parent / path.name)
        elif place == "plain":
            pd.read_csv(path).to_csv(path.with_suffix(""), index=False)
            path.unlink()
        else:
            root = own_tree / "files"
    assert len(MIMICCXRDataset(root, "train")) == expected


def test_column_order_and_byte_order_mark_do_not_matter(own_tree):
    expected = MIMICCXRDataset(own_tree, "train").targets
    labels = raw_csv(own_tree, "chexpert")
    path = next(own_tree.glob("*-chexpert.csv.gz"))
    path.unlink()
    labels[list(labels.columns)[::-1]].to_csv(
        path.with_suffix(""), index=False, encoding="utf-8-sig", lineterminator="\r\n"
    )
    np.testing.assert_array_equal(MIMICCXRDataset(own_tree, "train").targets, expected)


def test_summary_counts_what_is_there_and_what_is_left_out(own_tree):
    labels = raw_csv(own_tree, "chexpert")
    gone = labels.study_id.iloc[0]
    lost = (raw_csv(own_tree, "split").study_id == gone).sum()
    edit_csv(own_tree, "chexpert", lambda f: f[f.study_id != str(gone)])
    dataset = MIMICCXRDataset(own_tree, "train")
    splits = raw_csv(own_tree, "split")
    train = splits[(splits.split == "train") & (splits.study_id != gone)]
    lines = {line.split("  ")[0].strip() or line.split()[0]: line for line in dataset.summary.splitlines()}
    assert lines["images"].split()[1] == f"{len(train):,}"
    assert lines["patients"].split()[1] == str(train.subject_id.nunique())
    assert lines["studies"].split()[1] == str(train.study_id.nunique())
    positive = int(dataset.targets[:, LABELS.index("Edema")].sum())
    line = next(li for li in dataset.summary.splitlines() if li.strip().startswith("Edema"))
    assert line.split()[1] == str(positive)
    assert dataset.summary.endswith(f"left out: {lost} study without a label row")


def test_views(own_tree, tree):
    """Every view by ViewPosition; where that is blank, by the texts, and left out where these tell nothing."""
    metadata = raw_csv(tree, "metadata")
    by_view = {v: set(metadata.dicom_id[metadata.ViewPosition == v]) for v in ("AP", "PA", "LATERAL")}

    def read(views, root=own_tree):
        return [d for s in tables.SPLITS for d in MIMICCXRDataset(root, s, views=views).ids()["dicom_id"]]

    for views, expected in (
        ("AP", by_view["AP"]),
        ("PA", by_view["PA"]),
        ("lateral", by_view["LATERAL"]),
        ("frontal", by_view["AP"] | by_view["PA"]),
        ("all", set(metadata.dicom_id)),
    ):
        assert sorted(read(views)) == sorted(expected), views

    def blank(frame):
        pa, lateral, ap = (frame.index[frame.ViewPosition == v] for v in ("PA", "LATERAL", "AP"))
        frame.loc[[*pa[:2], *lateral[:2], *ap[:3]], "ViewPosition"] = None
        texts = ["ViewCodeSequence_CodeMeaning", "ProcedureCodeSequence_CodeMeaning"]
        frame.loc[[pa[1], lateral[1], *ap[:3]], texts] = None  # now the procedure alone tells, or does not
        frame.loc[[pa[1], lateral[1]], "PerformedProcedureStepDescription"] = "CHEST (PA AND LAT)"
        frame.loc[ap[1], "PerformedProcedureStepDescription"] = "L CHEST (LAT DECUB ONLY) LEFT"
        frame.loc[ap[2], "PerformedProcedureStepDescription"] = None
        blank.lost = {*frame.dicom_id[[pa[1], lateral[1], ap[1], ap[2]]]}
        return frame

    edit_csv(own_tree, "metadata", blank)
    for views in ("frontal", "lateral"):
        expected = by_view["AP"] | by_view["PA"] if views == "frontal" else by_view["LATERAL"]
        assert sorted(read(views)) == sorted(expected - blank.lost), views
    laterals = len(by_view["LATERAL"] - blank.lost)
    assert MIMICCXRDataset(own_tree, "test", views="frontal").summary.endswith(
        f"left out: {laterals} image of another view (DATA.VIEWS frontal); 4 image of unknown view"
    )
    next(own_tree.glob("*-metadata.csv.gz")).unlink()
    with pytest.raises(UserError, match=r"no mimic-cxr-\*-metadata.csv or .csv.gz in"):
        read("PA")


def test_radiologists_labels_of_the_test_split(own_tree, tree):
    """Only the test split changes; studies that he has not labelled are left out; his name of a label is known."""
    before = {s: MIMICCXRDataset(tree, s) for s in tables.SPLITS}
    studies = np.unique(before["test"].ids()["study_id"])
    labels = pd.DataFrame(0, index=studies[1:], columns=list(LABELS)).rename_axis("study_id")
    labels.loc[studies[1], ["Lung Opacity", "Edema"]] = [1, -1]
    labels = labels.rename(columns={"Lung Opacity": "Airspace Opacity"})
    labels.to_csv(own_tree / "mimic-cxr-2.1.0-test-set-labeled.csv")
    after = {s: MIMICCXRDataset(own_tree, s, test_labeler="radiologist") for s in tables.SPLITS}
    for split in ("train", "validate"):
        np.testing.assert_array_equal(after[split].targets, before[split].targets)
    rows = pd.Series(before["test"].ids()["study_id"])
    assert list(after["test"].ids()["study_id"]) == list(rows[rows != studies[0]])
    first = np.array(after["test"].ids()["study_id"]) == studies[1]
    opacity, edema = LABELS.index("Lung Opacity"), LABELS.index("Edema")
    assert (after["test"].targets[first, opacity] == 1).all() and after["test"].targets.sum() == first.sum()
    uncertain = MIMICCXRDataset(own_tree, "test", test_labeler="radiologist", uncertain="ignore")
    assert np.isnan(uncertain.targets[first, edema]).all()
    assert "test study that the radiologist has not labelled" in after["test"].summary
    assert "test-set-labeled.csv" in after["test"].summary
    with pytest.raises(UserError, match=r"no mimic-cxr-\*-test-set-labeled.csv"):
        MIMICCXRDataset(tree, "test", test_labeler="radiologist")


# ------------------------------------------------------------------------------------ own table
def own_table(tree, tmp_path, **extra):
    """A folder of PNG images with one CSV, made from the synthetic tree's first images."""
    root = tmp_path / "own"
    root.mkdir()
    splits = raw_csv(tree, "split").merge(raw_csv(tree, "chexpert"), on=["study_id", "subject_id"])
    rows = splits.groupby("split").head(4)
    frame = rows[["subject_id", "split", *LABELS]].assign(path=[f"im/{k}.png" for k in range(len(rows))], **extra)
    (root / "im").mkdir()
    for path in frame.path:
        Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(root / path)
    frame.to_csv(root / "mine.csv", index=False)
    return root, frame


def test_own_table(tree, tmp_path):
    root, frame = own_table(tree, tmp_path)
    dataset = MIMICCXRDataset(root, "validate")
    expected = frame[frame.split == "validate"]
    assert dataset.ids()["dicom_id"] == list(expected.path)
    np.testing.assert_array_equal(dataset.targets, expected[list(LABELS)].fillna(0).replace(-1, 0))
    assert dataset[0][0].size == (64, 64)
    edema = MIMICCXRDataset(root, "val", csv="mine.csv", label_names=("Edema",))
    np.testing.assert_array_equal(edema.targets[:, 0], dataset.targets[:, LABELS.index("Edema")])


def test_own_table_mistakes(tree, tmp_path):
    root, frame = own_table(tree, tmp_path)

    def broken(changed, **options):
        changed.to_csv(root / "mine.csv", index=False)
        with pytest.raises(UserError) as error:
            MIMICCXRDataset(root, "train", **options)
        return str(error.value)

    assert "mine.csv: column 'split' is missing" in broken(frame.drop(columns="split"))
    assert "mine.csv: column 'Edema' is missing" in broken(frame.drop(columns="Edema"), label_names=LABELS)
    assert "split is 'holdout' in data row 1; use train, validate, test" in broken(frame.assign(split="holdout"))
    assert "im/0.png has more than one row" in broken(pd.concat([frame, frame.head(1)]))
    assert "image missing" in broken(frame.assign(path="nowhere/" + frame.path))
    assert "in more than one split, such as subject_id 7" in broken(frame.assign(subject_id=7))
    assert "does not exist" in broken(frame, csv="other.csv")
    assert "the path 'a/../../b.png' leads out" in broken(frame.assign(path=["a/../../b.png", *frame.path[1:]]))
    assert "column 'ViewPosition' is missing" in broken(frame, views="PA")
    assert "belongs to the official tables" in broken(frame, test_labeler="radiologist")
    frame.to_csv(root / "second.csv", index=False)
    assert "several tables with a path column (mine.csv, second.csv)" in broken(frame)


# ------------------------------------------------------------------------------------- mistakes
def test_wrong_folders(tree, tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        MIMICCXRDataset(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"no mimic-cxr-\*-split.csv or .csv.gz in"):
        MIMICCXRDataset(tmp_path, "train")
    for path in tree.glob("*.csv.gz"):
        shutil.copy(path, tmp_path)
    with pytest.raises(UserError, match="no image found as files: looked for .*files/p1.*the folder of the release"):
        MIMICCXRDataset(tmp_path, "train")
    with pytest.raises(UserError, match="unknown split 'dev'; the splits are train, validate, test"):
        MIMICCXRDataset(tree, "dev")


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("chexpert", lambda f: f.drop(columns="Edema"), "chexpert.csv.gz: column 'Edema' is missing"),
        ("split", lambda f: f.drop(columns="dicom_id"), "split.csv.gz: column 'dicom_id' is missing"),
        ("chexpert", lambda f: f.assign(Edema="2.0"), r"label 'Edema' is '2.0' in data row 1; expected 1, 0, -1"),
        ("chexpert", lambda f: f.assign(Edema="yes"), "label 'Edema' is 'yes' in data row 1"),
        ("split", lambda f: f.assign(split="dev"), "split is 'dev' in data row 1; use train, validate, test"),
        ("split", lambda f: f.assign(subject_id="p10"), "subject_id is 'p10' in data row 1; expected an integer"),
        ("split", lambda f: pd.concat([f, f.head(2)]), r"has more than one row \(2 rows too many\)"),
        ("chexpert", lambda f: pd.concat([f, f.head(1)]), "study .* has more than one row"),
        ("chexpert", lambda f: f.assign(study_id="1"), "study 1 has more than one row"),
        ("chexpert", lambda f: f.head(1).assign(study_id="1"), "none of the studies"),
        ("split", lambda f: f.assign(split=["train", "test"] * (len(f) // 2) + ["train"] * (len(f) % 2)),
         r"patient\(s\) are in more than one split, such as subject_id 1\d{7} in train, test"),
        ("split", lambda f: f[f.split != "train"], "the split 'train' has no image"),
        ("split", lambda f: f.assign(dicom_id=None), "split.csv.gz: dicom_id is empty in data row 1"),
        ("split", lambda f: f.head(0), "split.csv.gz: the file has no rows"),
    ],
)  # fmt: skip
def test_bad_tables(own_tree, kind, change, message):
    edit_csv(own_tree, kind, change)
    with pytest.raises(UserError, match=message):
        MIMICCXRDataset(own_tree, "train")


def test_unreadable_table(own_tree):
    path = next(own_tree.glob("*-split.csv.gz"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="split.csv.gz: cannot be read as CSV"):
        MIMICCXRDataset(own_tree, "train")


def test_missing_image_is_found_at_start_and_can_be_left_out(own_tree):
    gone = sorted(own_tree.glob("files/*/*/*/*.jpg"))[5]
    gone.unlink()
    with pytest.raises(UserError, match=f"image missing: {gone} .*DATA.ALLOW_MISSING True"):
        MIMICCXRDataset(own_tree, "train")
    whole = sum(len(MIMICCXRDataset(own_tree, s, allow_missing=True)) for s in tables.SPLITS)
    assert whole == len(raw_csv(own_tree, "split")) - 1
    summary = MIMICCXRDataset(own_tree, "test", allow_missing=True).summary
    assert summary.endswith("left out: 1 image file missing (DATA.ALLOW_MISSING)")


def test_two_formats_in_one_tree_must_be_chosen_between(own_tree):
    for path in own_tree.glob("files/*/*/*/*.jpg"):
        Image.open(path).save(path.with_suffix(".png"))
    with pytest.raises(UserError, match="holds both .jpg and .png images.*DATA.IMAGE_FORMAT jpg or png"):
        MIMICCXRDataset(own_tree, "train")
    assert MIMICCXRDataset(own_tree, "train", image_format="png").table.path[0].endswith(b".png")


# --------------------------------------------------------------------------------------- stores
def test_dicom_tree_gives_the_pictures_of_the_jpg_tree(tree, tmp_path):
    from dataset.synthetic.tree import write_tree

    write_tree(tmp_path / "d", patients=12, size=64, image_format="dicom", progress=False)
    write_tree(tmp_path / "j", patients=12, size=64, image_format="jpg", progress=False)
    dicoms, jpgs = (MIMICCXRDataset(tmp_path / k, "train") for k in "dj")
    assert dicoms.ids()["dicom_id"] == jpgs.ids()["dicom_id"]
    np.testing.assert_array_equal(dicoms.targets, jpgs.targets)
    for k in range(len(jpgs)):
        a, b = (np.asarray(d[k][0].getchannel(0), float).ravel() for d in (dicoms, jpgs))
        assert np.corrcoef(a, b)[0, 1] > 0.99, jpgs.table.path[k]


def test_zip_gives_the_same_images(own_tree, tmp_path):
    expected = MIMICCXRDataset(own_tree, "test")
    first = np.asarray(expected[0][0])
    shutil.make_archive(str(tmp_path / "packed"), "zip", own_tree, "files")  # compressed
    shutil.rmtree(own_tree / "files")
    shutil.move(tmp_path / "packed.zip", own_tree / "images.zip")
    with pytest.raises(UserError, match="images.zip: .* is compressed; pack with zip -0"):
        ZipStore(own_tree)
    with zipfile.ZipFile(own_tree / "images.zip") as old, zipfile.ZipFile(own_tree / "new.zip", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (own_tree / "images.zip").unlink()
    np.testing.assert_array_equal(np.asarray(MIMICCXRDataset(own_tree, "test", in_zip=True)[0][0]), first)
    with zipfile.ZipFile(own_tree / "new.zip", "w") as new:
        new.writestr("files/other.jpg", b"")
    with pytest.raises(UserError, match="no image found in the zip files: looked for .*files/p1"):
        MIMICCXRDataset(own_tree, "test", in_zip=True)


# --------------------------------------------------------------------------------------- memory
@pytest.fixture
def shm(tmp_path, monkeypatch):
    monkeypatch.setattr(MemoryStore, "FOLDER", tmp_path / "shm")
    MemoryStore.FOLDER.mkdir()
    return MemoryStore.FOLDER


def test_images_in_memory_are_shared_and_leave_nothing(tree, shm):
    """A second process maps what the first has read; nobody else can read it, and it goes with the last of them."""
    plain, first = MIMICCXRDataset(tree, "train"), MIMICCXRDataset(tree, "train", on_memory=True)
    (held,) = shm.iterdir()
    size = plain[3][0].size
    assert held.stat().st_mode & 0o777 == 0o600 and held.stat().st_size < 100  # where the images are, not they
    assert os.fstat(first.store._file.fileno()).st_nlink == 0
    pid = os.fork()
    if not pid:  # a rank beside it: its files could not be read, so all comes from memory
        FileStore.read = None
        second = MIMICCXRDataset(tree, "train", on_memory=True)
        same = os.fstat(second.store._file.fileno()).st_ino == os.fstat(first.store._file.fileno()).st_ino
        os._exit(0 if second[3][0].size == size and same and len(list(shm.iterdir())) == 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert held.exists()
    for k in (0, 5, len(plain) - 1):
        assert first.store.read(first.table.path[k].decode()) == plain.store.read(plain.table.path[k].decode())
        assert plain[k][0].tobytes() == first[k][0].tobytes()
    del first
    gc.collect()
    assert not list(shm.iterdir())


def test_memory_of_a_killed_run_is_free_and_not_served_again(own_tree, shm):
    pid = os.fork()
    if not pid:
        store = MIMICCXRDataset(own_tree, "test", on_memory=True).store
        os._exit(0 if len(store.ends) > 1 else 1)  # ends as a kill does, without clearing up
    assert os.waitpid(pid, 0)[1] == 0
    (left,) = shm.iterdir()
    assert left.stat().st_size < 100
    plain = MIMICCXRDataset(own_tree, "test")
    first, second = (own_tree / plain.table.path[k].decode() for k in (0, 1))
    first.write_bytes(second.read_bytes())  # the image on disk changes
    again = MIMICCXRDataset(own_tree, "test", on_memory=True)
    assert again[0][0].tobytes() == plain[1][0].tobytes()


def test_memory_whose_filler_has_ended_serves_those_that_hold_it(tree, shm):
    """The second rank goes on when the first has ended; a third reads for itself."""
    first = MIMICCXRDataset(tree, "test", on_memory=True)
    second = MIMICCXRDataset(tree, "test", on_memory=True)
    first.store._file.close()  # as if its process had ended
    third = MIMICCXRDataset(tree, "test", on_memory=True)
    plain = MIMICCXRDataset(tree, "test")
    assert second[2][0].tobytes() == third[2][0].tobytes() == plain[2][0].tobytes()


def test_too_little_memory_is_said(tree, shm):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="DATA.IMG_ON_MEMORY: .* GB of shared memory .* do not hold the images"):
            MIMICCXRDataset(tree, "train", on_memory=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(shm.iterdir())


def python_objects(thing):
    """How many Python objects `thing` holds; an array counts as one, an array of objects is refused."""
    count, todo = 0, [thing]
    while todo:
        thing = todo.pop()
        count += 1
        if isinstance(thing, np.ndarray):
            assert not thing.dtype.hasobject
        elif isinstance(thing, dict):
            todo += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set)):
            todo += thing
        elif type(thing).__module__.startswith("dataset."):
            todo += vars(thing).values()
    return count


def test_a_dataset_holds_arrays_not_an_object_a_row(tmp_path, monkeypatch):
    """A worker writes a reference count into each object that it touches, and so copies its page: with an object a row
    its memory grows over an epoch by the whole table. (benchmarks/loading.py --table measures that memory.)"""
    monkeypatch.setattr(stores, "CHECKED_FILES", 1)
    counts = []
    for rows in (100, 5000):
        root = tmp_path / str(rows)
        root.mkdir()
        frame = pd.DataFrame({"path": [f"files/p10/{k}.jpg" for k in range(rows)], "split": "train"})
        frame[list(LABELS)] = 0.0
        frame.to_csv(root / "t.csv", index=False)
        (root / frame.path[0]).parent.mkdir(parents=True)
        (root / frame.path[0]).touch()
        with zipfile.ZipFile(root / "images.zip", "w") as archive:
            for path in frame.path:
                archive.writestr(path, b"")
        counts.append([python_objects(MIMICCXRDataset(root, "train", in_zip=in_zip)) for in_zip in (False, True)])
    assert counts[0] == counts[1]


# ---------------------------------------------------------------------------------- augmentation
@pytest.fixture
def transform(tiny):
    """transform(train, "AUG.SHIFT", 0.2, ...) -> the transform of X-rays, with all augmentations off but those given"""
    from argparse import Namespace

    from config import get_config
    from dataset.transforms import radiograph_transform

    plain = ["DATA.IMG_SIZE", 64, "DATA.INTERPOLATION", "bilinear", "AUG.COLOR_JITTER", 0, "AUG.REPROB", 0,
             "AUG.CROP_SCALE", [1.0, 1.0], "AUG.MEAN", [0.5, 0.4, 0.3], "AUG.STD", [0.2, 0.3, 0.1]]  # fmt: skip
    return lambda train, *opts: radiograph_transform(
        get_config(Namespace(cfg=tiny, opts=list(map(str, [*plain, *opts])))), train
    )


def test_padding_keeps_the_aspect(transform):
    """A square of 32 in an image of 128 x 64 stays one, between black margins."""
    image = np.full((128, 64), 100, np.uint8)
    image[48:80, 16:48] = 200
    out = transform(False, "DATA.RESIZE", "pad")(Image.fromarray(image))[0].numpy()
    assert out.shape == (64, 64) and (out[:, :15] == 0).all() and (out[:, 49:] == 0).all()
    bright = np.argwhere(out > 150)
    assert abs(np.ptp(bright[:, 0]) - np.ptp(bright[:, 1])) <= 1 and np.ptp(bright[:, 0]) in (15, 16, 17)
    squeezed = transform(False)(Image.fromarray(image))[0].numpy()
    assert squeezed.min() == 100 and np.ptp(np.argwhere(squeezed > 150)[:, 1]) >= 30


def test_augmentations_do_what_they_say(transform):
    image = np.zeros((74, 74), np.uint8)
    image[30:44, 30:44] = 128
    image = Image.fromarray(image)

    def center(out):
        return np.argwhere(out > 30).mean(0)

    torch.manual_seed(0)
    outs = [transform(True, "AUG.SHIFT", 0.2)(image)[0].numpy() for _ in range(20)]
    moved = np.array([center(o) for o in outs]) - center(transform(True)(image)[0].numpy())
    assert 4 < np.abs(moved).max() <= 0.2 * 64 + 1
    turned = [transform(True, "AUG.ROTATION", 20.0)(image)[0].numpy() for _ in range(10)]
    assert all(np.abs(center(o) - 31.5).max() < 1 for o in turned) and any(
        not np.array_equal(o, outs[0]) for o in turned
    )
    levels = np.array([transform(True, "AUG.GAMMA", 0.5)(image)[0].max().item() for _ in range(50)])
    lowest, highest = 255 * (128 / 255) ** 1.5, 255 * (128 / 255) ** (1 / 1.5)
    assert lowest - 2 <= levels.min() < 110 and 150 < levels.max() <= highest + 2


def test_erased_patches_have_the_noise_of_the_mean_and_the_rest_is_unchanged(transform):
    torch.manual_seed(0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (73, 73), np.uint8))
    plain = transform(True)(image)
    for mode in ("pixel", "const"):
        erased = transform(True, "AUG.REPROB", 1.0, "AUG.REMODE", mode)(image)
        changed = erased != plain
        assert erased.dtype == torch.uint8 and 0.01 < changed.float().mean() < 0.5, mode
        rows, columns = changed[0].any(1).nonzero(), changed[0].any(0).nonzero()
        patch = erased[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].float()
        mean, std = 255 * 0.4, 255 * 0.2 * (mode == "pixel")
        assert abs(patch.mean() - mean) < 12 and abs(patch.std() - std) < 12, mode


def test_a_batch_is_normalised_as_torchvision_does_it():
    from torchvision.transforms import v2

    from dataset.preparing import normalize

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = torch.randint(0, 256, (2, 1, 5, 7), dtype=torch.uint8)
    steps = v2.Compose([v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    torch.testing.assert_close(normalize(images, mean, std), torch.stack([steps(i) for i in images]), rtol=0, atol=2e-6)


def test_mirroring_is_warned_about(tree, tiny):
    from argparse import Namespace

    from config import get_config
    from dataset.mimic_cxr import build

    opts = ["DATA.DATA_PATH", str(tree), "AUG.HFLIP", "0.5"]
    train, test = build(get_config(Namespace(cfg=tiny, opts=opts)), "train", "test")
    assert train.warnings == ["AUG.HFLIP mirrors X-rays; the heart then lies on either side"] and test.warnings == []
    assert build(get_config(Namespace(cfg=tiny, opts=opts[:2])), "train")[0].warnings == []


# ------------------------------------------------------------------------------------ real X-rays
shared = pytest.mark.skipif(not (SHARED / "cxr_sample").is_dir(), reason="the real X-rays of ../shared are not here")


@shared
def test_real_sample_is_read():
    counts = [len(MIMICCXRDataset(SHARED / "cxr_sample", s)) for s in tables.SPLITS]
    assert counts == [660, 115, 100]
    image, target = MIMICCXRDataset(SHARED / "cxr_sample" / "files", "test")[0]
    assert min(image.size) == 320 and target.sum() > 0


@pytest.mark.parametrize("how, black", [("pad", 12), ("squeeze", 0)])
def test_a_crop_at_test_time_has_the_geometry_of_training(tiny, how, black):
    """A white portrait of 96 x 48, padded to 64 x 64 (16 columns black either side), of which 4 pixels a side go."""
    from config import get_config, parse_args
    from dataset.transforms import radiograph_transform

    opts = ["DATA.RESIZE", how, "TEST.CROP", "True", "DATA.IMG_SIZE", "56"]
    config = get_config(parse_args(["--cfg", str(tiny), "--opts", *opts]))
    image = radiograph_transform(config, train=False)(Image.new("L", (48, 96), 255))
    assert image.shape == (1, 56, 56)
    columns = (image[0] > 127).all(0)
    assert columns.tolist() == [False] * black + [True] * (56 - 2 * black) + [False] * black


@pytest.mark.parametrize("how", ["squeeze", "pad"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_square_is_that_of_torchvision(interpolation, how):
    from torchvision.transforms import v2

    from dataset.preparing import Square

    mode = v2.InterpolationMode(interpolation)
    rng = np.random.default_rng(0)
    for shape, side, size in [((90, 71), 64, 56), ((31, 130, 3), 73, 64), ((64, 64), 64, 64), ((40, 300), 57, 57)]:
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        whole = [v2.Resize((side, side), mode)]
        if how == "pad":
            whole = [v2.Resize(None, mode, max_size=side), v2.CenterCrop(side)]
        expected = v2.Compose([v2.PILToTensor(), *whole, v2.CenterCrop(size)])(image)
        assert torch.equal(Square(side, size, interpolation, how)(image), expected)
