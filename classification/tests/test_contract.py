"""A dataset and an augmentation of one's own, in a file outside the project; what a dataset must be is checked."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from conftest import ROOT, epochs

# Squares on the left or on the right: label by column. The whole of a dataset in one file.
OWN = """
import numpy as np, torch

class Squares:
    task = "multilabel"
    label_names = ("left", "right")
    summary = "squares"
    warnings = ["made up"]

    def __init__(self, count):
        self.targets = np.random.default_rng(count).integers(0, 2, (count, 2)).astype(np.float32)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = torch.full((1, 32, 32), 40, dtype=torch.uint8)
        for k in (0, 1):
            if self.targets[index, k]:
                image[:, 8:24, 4 + 14 * k : 14 + 14 * k] = 200
        return image, torch.from_numpy(self.targets[index])

    def ids(self):
        return {"number": np.arange(len(self))}

def build(config, *splits):
    return [Squares({"train": 160, "validate": 40, "test": 50}[split]) for split in splits]
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """outside(name, text): a module of the package `dataset`, in a folder of its own."""
    import dataset

    monkeypatch.setattr(dataset, "__path__", [*dataset.__path__, str(tmp_path / "outside")])
    (tmp_path / "outside").mkdir()

    def write(name, text):
        (tmp_path / "outside" / f"{name}.py").write_text(text)

    yield write
    for path in (tmp_path / "outside").glob("*.py"):
        sys.modules.pop(f"dataset.{path.stem}", None)
        sys.modules.pop(path.stem, None)


def test_a_dataset_from_outside_trains_and_is_evaluated(outside, run_main, tmp_path):
    outside("squares", OWN)
    own = {"DATA__DATASET": "squares", "MODEL__NUM_CLASSES": 2, "TRAIN__EPOCHS": 3, "TRAIN__BASE_LR": 0.01}
    folder = run_main(**own)
    assert epochs(folder)[-1]["mean_auc"] > 0.95
    assert "WARNING made up" in (folder / "log_rank0.txt").read_text()
    run_main("--eval", **own)
    (result,) = (tmp_path / "out" / "results").iterdir()
    header, *lines = (result / "predictions.csv").read_text().splitlines()
    assert header == "number,left_target,left_probability,left_logit,right_target,right_probability,right_logit"
    assert [line.split(",")[0] for line in lines] == [str(k) for k in range(50)]


def test_a_module_outside_the_package_is_found_by_its_name(outside, run_main, tmp_path, monkeypatch):
    outside("squares", OWN)
    (tmp_path / "outside" / "squares.py").rename(tmp_path / "my_squares.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(epochs(run_main(DATA__DATASET="my_squares", MODEL__NUM_CLASSES=2, TRAIN__EPOCHS=1))) == 1


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("dtype=torch.uint8)", "dtype=torch.float32)", r"gives images that are torch.float32 \(1, 32, 32\); expected"),
        ("(1, 32, 32)", "(1, 32, 40)", r"gives images that are torch.uint8 \(1, 32, 40\); expected torch.uint8"),
        ("(1, 32, 32)", "(2, 32, 32)", "gives images of 2 channels; expected 1 or 3"),
        ("return image, torch", "return image.numpy(), torch", "gives images that are ndarray; expected torch.uint8"),
        ("    summary =", "    other =", "the train split has no summary"),
        ("    warnings =", "    others =", "the train split has no warnings"),
        ("def ids", "def rows", "the train split has no ids"),
        ("self.targets =", "self.labels =", "the train split has no targets"),
        ('["made up"]', '"made up"', "must have lists of texts as label_names and warnings"),
        ('"multilabel"', '"multi"', "has the task 'multi'; it must be multilabel or single_label"),
        ("np.arange(len(self))", "[1, 2]", r"has 160 images, but ids\(\) has 2 values in number"),
        ("(0, 2, (count, 2))", "(0, 2, (count, 3))", r"has targets float32 \(160, 3\); expected float32 \(160, 2\)"),
        ("(0, 2, (count, 2))", "(-1, 2, (count, 2))", "has targets from -1.0 to 1.0; expected 0 to 1"),
        ("astype(np.float32)", "astype(np.int64)", "has targets int64"),
        ('"multilabel"', '"single_label"', "expected 160 integers from 0 to 1"),
        ("torch.from_numpy(", "1 - torch.from_numpy(", "gives item 0 the target"),
        ("return len(self.targets)", "return 0", "has no images"),
        ("for split in splits]", "for split in splits[:1]]", "must return a list of 2"),
        ("def build", "def built", "DATA.DATASET is 'squares'; choose one of brax, chexpert, cxr_lt, imagenet"),
        ("import numpy", "import no_such_package, numpy", "squares cannot be imported: No module named 'no_such_pack"),
    ],
)  # fmt: skip
def test_what_a_dataset_lacks_is_one_clear_error(outside, run_main, old, new, message):
    assert old in OWN
    outside("squares", OWN.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        run_main(DATA__DATASET="squares", MODEL__NUM_CLASSES=2)


@pytest.mark.parametrize("name", ["mimic-cxr", "mimic_cxr_", "", "../mimic_cxr", "json", "a.b.c", "mimic_cxr."])
def test_a_name_that_is_no_dataset(run_main, name):
    with pytest.raises(
        UserError, match="DATA.DATASET is .*; choose one of brax, chexpert, cxr_lt, imagenet, inat18, mimic_cxr"
    ):
        run_main(DATA__DATASET=name)


def test_the_splits_must_agree_on_the_labels(outside, run_main):
    outside("squares", OWN.replace("(self, count):", "(self, count):\n        self.label_names = (str(count), 'b')"))
    with pytest.raises(UserError, match="the splits train and validate have different labels"):
        run_main(DATA__DATASET="squares", MODEL__NUM_CLASSES=2)


def test_an_augmentation_of_ones_own(trained_once, run_main, monkeypatch):
    """A row of the list is all: it acts on each training image, in its place, and on no other."""
    from dataset import transforms

    seen = []

    def invert(config):
        assert config.DATA.IMG_SIZE == 32

        def step(image):
            seen.append(image)
            return 255 - image

        return step

    (plain,) = epochs(trained_once)
    monkeypatch.setattr(transforms, "RADIOGRAPH_AUGMENTATIONS", [*transforms.RADIOGRAPH_AUGMENTATIONS, invert])
    inverted = epochs(run_main(TRAIN__EPOCHS=1, out="inverted"))[0]
    assert inverted["train_loss"] != plain["train_loss"]
    assert len(seen) % 16 in (0, 1)  # whole batches, and the one image that the dataset is checked by
    assert all(image.dtype == torch.uint8 and image.shape == (1, 32, 32) for image in seen)


def test_any_table_becomes_a_dataset(tree):
    """A table made by hand, with the pictures of the tree."""
    from dataset.tables import Table, check_table
    from dataset.xrays import RadiographDataset

    paths = sorted(p.relative_to(tree) for p in tree.rglob("*.jpg"))[:3]
    table = Table(
        root=tree,
        sources=(Path("none.csv"),),
        label_names=("a", "b"),
        path=np.array([str(p).encode() for p in paths]),
        dicom_id=np.array([b"x", b"y", b"z"]),
        study=np.array([b"1", b"2", b"3"]),
        subject=np.array([b"1", b"1", b"2"]),
        split=np.array([0, 0, 2], np.int8),
        labels=np.array([[1, np.nan], [-1, 0], [0, 1]], np.float32),
    )
    train = RadiographDataset(check_table(table), "train")
    assert train.ids()["dicom_id"] == ["x", "y"] and train.targets.tolist() == [[1, 0], [0, 0]]
    assert train.warnings == ["b cannot be learnt: the train split has 0 positives and 2 negatives of it; "
                              "see DATA.UNCERTAIN and DATA.MISSING"]  # fmt: skip
    assert RadiographDataset(table.with_targets("ones"), "train").targets.tolist() == [[1, 0], [1, 0]]
    with pytest.raises(UserError, match="the split 'validate' has no image"):
        RadiographDataset(table, "validate")
    table.subject[2] = 1
    with pytest.raises(UserError, match="more than one split, such as subject_id 1 in train, test"):
        check_table(table)


def test_tables_are_read_without_torch():
    code = (
        "import sys; from dataset import MIMICCXRDataset as a; from dataset.mimic_cxr import MIMICCXRDataset as b\n"
        "import dataset.tables, dataset.tools.audit, dataset.tools.cache, prepare_mimic\n"
        "assert a is b and 'torch' not in sys.modules and 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# TIFF files with JSON lines, in one file and without SIGNS.
LINES = """
import json
from pathlib import Path
import numpy as np
from dataset.tables import SPLITS, Table, check_table, to_bytes
from dataset.xrays import build_radiographs

def build(config, *splits):
    root = Path(config.DATA.DATA_PATH)
    rows = [json.loads(line) for line in (root / "images.jsonl").read_text().splitlines()]
    table = Table(
        root=root, sources=(root / "images.jsonl",), label_names=("a", "b"),
        path=to_bytes(row["file"] for row in rows), dicom_id=to_bytes(row["file"] for row in rows),
        study=np.full(len(rows), b""), subject=to_bytes(row["patient"] for row in rows),
        split=np.array([SPLITS.index(row["split"]) for row in rows], np.int8),
        labels=np.array([row["labels"] for row in rows], np.float32),
    )
    return build_radiographs(config, check_table(table), splits)
"""


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".bmp"])
def test_a_dataset_of_one_file_works_in_every_tool(outside, run_main, tmp_path, capsys, suffix):
    import json

    from PIL import Image

    import prepare_mimic
    from dataset import tables
    from dataset.tools.listing import list_images

    outside("lines", LINES)
    root, draw = tmp_path / "tiffs", np.random.default_rng(5)
    root.mkdir()
    rows = []
    for k in range(64):
        name = f"{k:02}{suffix}"
        Image.fromarray(draw.integers(0, 256, (40, 40), np.uint8)).save(root / name)
        split = ("train", "train", "validate", "test")[k % 4]
        labels = [k // 4 % 2, [1, 0, None][k // 4 % 3]]
        rows.append({"file": name, "patient": f"p{k}", "split": split, "labels": labels})
    (root / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["--dataset", "lines", "--data-path", str(root)]
    assert prepare_mimic.main(["labels", *own]) == 0 and capsys.readouterr().out == "a\nb\n"
    assert len(list_images([root])) == 64
    (root / f"more{suffix}").write_bytes((root / f"00{suffix}").read_bytes())
    assert prepare_mimic.main(["audit", *own, "--workers", "1", "--output", str(tmp_path / "audit")]) == 1
    found = tables.read_csv(tmp_path / "audit/audit.csv", ())
    assert found["problem"].tolist() == ["extra", "duplicate pixels"] and set(found["path"]) == {f"more{suffix}"}
    assert prepare_mimic.main(["build", *own, "--workers", "1", "--output", str(tmp_path / "copy")]) == 0
    assert "--dataset mimic_cxr" in capsys.readouterr().out
    copied = tables.read_csv(tmp_path / "copy/images.csv", ("path", "subject_id", "split", "a", "b"))
    order = sorted(range(64), key=lambda k: (max(k % 4, 1), k))  # split by split
    assert copied["path"].tolist() == [f"{k:02}.jpg" for k in order]
    assert copied["b"].tolist() == [["1.0", "0.0", ""][int(path[:2]) // 4 % 3] for path in copied["path"]]
    run_main(data=root, DATA__DATASET="lines", MODEL__NUM_CLASSES=2, TRAIN__EPOCHS=1)
    run_main(data=tmp_path / "copy", out="copied", MODEL__NUM_CLASSES=2, TRAIN__EPOCHS=1)
    with pytest.raises(UserError, match="holds no tables of nih"):  # looks for other releases without this one's SIGNS
        run_main(data=root, DATA__DATASET="nih")


def test_tools_name_what_a_dataset_lacks(outside, tmp_path):
    import prepare_mimic

    outside("squares", OWN)
    with pytest.raises(UserError, match=r"--dataset squares: no path in ids\(\) or descriptions\(\)"):
        prepare_mimic.main(["audit", "--dataset", "squares", "--data-path", str(tmp_path)])
    with pytest.raises(UserError, match="--dataset is 'squars'; choose one of .*did you mean squares"):
        prepare_mimic.main(["audit", "--dataset", "squars", "--data-path", str(tmp_path)])
