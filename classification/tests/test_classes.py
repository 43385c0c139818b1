"""Single-label photographs: their layouts, training, accuracy, and the report of an evaluation."""

import json
import logging
import shutil
import zipfile
from pathlib import Path

import common.torchvision_shim  # noqa: F401  (before timm)

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import export
import main
import predict
import report
from analysis import classes
from common.distributed import World
from common.errors import UserError
from config import get_config, parse_args
from conftest import TINY
from dataset.build import build_datasets, build_loader, own_values
from dataset.files.images import ImageError
from predicting import features, trained
from training import checkpoint
from training.tasks import TASKS

NAMES = ("cat", "dog", "emu")
WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """train/ with 12 and val/ with 4 images of each class, which differ in their colour; not to be changed."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for k, name in enumerate(NAMES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (40, 48, 3))
                pixels[..., k] += 160
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def own_photos(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "own")


def argv(tiny, root, *more, dataset="imagenet", **opts):
    opts = {"MODEL.NUM_CLASSES": 3, "DATA.BATCH_SIZE": 12, "TRAIN.LR_REFERENCE_BATCH": 12, **opts}
    return ["--cfg", str(tiny), "--dataset", dataset, "--data-path", str(root), *map(str, more), "--opts",
            *(str(x) for pair in opts.items() for x in pair)]  # fmt: skip


def datasets(tiny, root, *splits, **opts):
    config = get_config(parse_args(argv(tiny, root, **opts)), own_values)
    return build_datasets(config, *(splits or ("train", "validate")))


def write_lists(root, form="{}.txt", by_name=False, flat=False):
    """A list of each split beside its folder; flat: val without class folders, as ImageNet's is."""
    for split in ("train", "val"):
        lines = []
        for path in sorted((root / split).rglob("*.png")):
            name = path.relative_to(root / split)
            label = name.parts[0] if by_name else NAMES.index(name.parts[0])
            if flat and split == "val":
                name = path.rename(root / split / f"{name.parts[0]}_{name.name}").relative_to(root / split)
            lines.append(f"{name}\t{label}" if form == "{}_map.txt" else f"{name} {label}")
        file = root / form.format(split)
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("layout", ["list", "names", "flat", "zip", "memory", "test"])
def test_every_layout_gives_the_same_images(photos, own_photos, tiny, layout):
    """Pixels, classes and their names are those of the folders."""
    root, opts = own_photos, {}
    if layout in ("list", "names", "flat"):
        form = {"list": "{}.txt", "names": "{}_map.txt", "flat": "meta_data/{}.txt"}[layout]
        write_lists(root, form, layout == "names", layout == "flat")
    if layout == "zip":
        write_lists(root, "{}_map.txt")
        for split in ("train", "val"):
            with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
                for path in (root / split).rglob("*"):
                    archive.write(path, path.relative_to(root / split))
            shutil.rmtree(root / split)
        file = root / "val_map.txt"
        file.write_text(file.read_text().replace("cat/", "val.zip@/cat/"))  # as some lists write it
        opts["DATA.ZIP_MODE"] = True
    if layout == "memory":
        opts["DATA.IMG_ON_MEMORY"] = True
    if layout == "test":  # a test split of its own; without one, val
        (root / "val").rename(root / "test")
        shutil.copytree(photos / "train", root / "val")
    split = "test" if layout == "test" else "validate"
    train, held_out = datasets(tiny, root, "train", split, **opts)
    expected_train, expected = datasets(tiny, photos, "train", "validate")
    assert train.label_names == held_out.label_names == NAMES
    assert np.array_equal(train.targets, expected_train.targets) and not held_out.warnings
    for k in range(len(expected)):
        (image, target), (wanted, index) = held_out[k], expected[k]
        assert torch.equal(image, wanted) and target == index
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8


def test_mistakes_in_folders_and_lists_are_named(own_photos, tiny):
    shutil.rmtree(own_photos / "val" / "dog")
    _, val = datasets(tiny, own_photos)
    assert val.warnings == ["validate: no image of 1 of the classes: dog"] and val.label_names == NAMES
    (own_photos / "val" / "fox").mkdir()
    shutil.copy(own_photos / "val" / "cat" / "0.png", own_photos / "val" / "fox")
    with pytest.raises(UserError, match="val: fox/0.png is of the class fox, but .*/train does not have it"):
        datasets(tiny, own_photos)
    shutil.rmtree(own_photos / "val" / "fox")
    with pytest.raises(UserError, match="MODEL.NUM_CLASSES is 5, but the data has 3 labels .cat, dog, emu."):
        datasets(tiny, own_photos, **{"MODEL.NUM_CLASSES": 5})
    write_lists(own_photos)
    file = own_photos / "train.txt"
    lines = file.read_text()
    for text, message in (
        (lines + "emu/77.png 2\n", r"train.txt names images that are not in .*/train, such as emu/77.png \(1 of 37"),
        (lines + "emu/0.png 3\n", "train.txt: emu/0.png is of the class 3, but MODEL.NUM_CLASSES is 3"),
        (lines + "emu/0.png\n", "train.txt: line 37 is 'emu/0.png'; expected a path and its class"),
        ("", "train.txt has no images"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            datasets(tiny, own_photos)
    with pytest.raises(UserError, match="nowhere/val is not a folder; --data-path must hold train/ and val/"):
        datasets(tiny, own_photos / "nowhere")
    with pytest.raises(UserError, match="DATA.ZIP_MODE: no val.zip in"):
        datasets(tiny, own_photos, **{"DATA.ZIP_MODE": True})
    file.unlink()
    (own_photos / "train" / "cat" / "0.png").write_bytes(b"no image")
    train, _ = datasets(tiny, own_photos)
    with pytest.raises(ImageError, match="train/cat/0.png: cannot be read as an image"):
        train[0]


def test_inaturalist(photos, tiny, tmp_path):
    """Its JSON files name the same images; classes are in the order of its categories, whatever their ids."""
    for split, folder in (("train", "train"), ("val", "val")):
        files = sorted((photos / folder).rglob("*.png"))
        content = {
            "categories": [{"id": 30 - 10 * k, "name": name} for k, name in enumerate(NAMES)],
            "images": [{"id": 100 + k, "file_name": str(f.relative_to(photos))} for k, f in enumerate(files)],
            "annotations": [
                {"image_id": 100 + k, "category_id": 30 - 10 * NAMES.index(f.parent.name)} for k, f in enumerate(files)
            ][::-1],
        }
        (tmp_path / f"{split}2018.json").write_text(json.dumps(content))
    for folder in ("train", "val"):
        (tmp_path / folder).symlink_to(photos / folder)
    _, val = datasets(tiny, tmp_path, dataset="inat18")
    assert val.label_names == ("30", "20", "10") and val.targets.tolist() == [2] * 4 + [1] * 4 + [0] * 4
    assert val.names[0] == b"val/emu/3.png"
    (tmp_path / "val2018.json").write_text("{}")
    with pytest.raises(UserError, match="val2018.json is not an annotation file of iNaturalist"):
        datasets(tiny, tmp_path, dataset="inat18")
    (tmp_path / "val2018.json").unlink()
    with pytest.raises(UserError, match="val2018.json: No such file.*--data-path must hold"):
        datasets(tiny, tmp_path, dataset="inat18")


class Constant(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


@pytest.mark.parametrize(
    "logits, acc1", [([2.0, 2.0, 2.0], 1 / 3), ([5.0, 1.0, 1.0], 1 / 3), ([5.0, 5.0, 1.0], (0.5 + 0.5) / 3)]
)
def test_equal_logits_are_chance(photos, tiny, logits, acc1):
    config = get_config(parse_args(argv(tiny, photos)), own_values)
    _, val = build_datasets(config, "train", "validate")
    loader = build_loader(config, val, train=False, world=WORLD, log=logging.getLogger("test"))
    found = TASKS["single_label"].test(Constant(logits), loader, WORLD, torch.no_grad, label_names=val.label_names)
    assert found["acc1"] == pytest.approx(acc1) and found["acc5"] == 1
    expected = torch.nn.functional.cross_entropy(torch.tensor([logits] * 3), torch.arange(3))
    assert found["loss"] == pytest.approx(expected.item())


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A run of some epochs with every augmentation of photographs, and its evaluation."""
    root = tmp_path_factory.mktemp("finished")
    (root / "tiny.yaml").write_text(TINY)
    opts = {"OUTPUT": root / "o", "RESULTS": root / "r", "TRAIN.EPOCHS": 8, "AUG.MIXUP": 0.2, "AUG.CUTMIX": 0.5,
            "AUG.AUTO_AUGMENT": "rand-m3", "AUG.REPROB": 0.25, "TEST.REPORT": True}  # fmt: skip
    assert main.main(argv(root / "tiny.yaml", photos, **opts)) == 0
    assert main.main(argv(root / "tiny.yaml", photos, "--eval", **opts)) == 0
    return root, next((root / "r").glob("evaluation_*"))


def test_it_learns_and_the_evaluation_ends_with_a_report(finished, tmp_path):
    root, evaluation = finished
    metrics = json.loads((evaluation / "metrics.json").read_text())
    assert metrics["acc1"] >= 0.75 and metrics["acc5"] == 1 and metrics["images"] == 12
    table = pd.read_csv(evaluation / "predictions.csv")
    listed = [f"{part}_{k}" for k in (1, 2, 3) for part in ("prediction", "probability")]
    assert list(table) == ["path", "target", *listed, "acc1", "acc5"]
    assert (table["target"] == table["path"].str.split("/").str[0]).all()
    assert np.allclose(table[["probability_1", "probability_2", "probability_3"]].sum(axis=1), 1)
    assert ((table["target"] == table["prediction_1"]) == table["acc1"]).all()
    found = json.loads((evaluation / "report.json").read_text())
    assert found["accuracy"]["acc1"]["value"] == pytest.approx(metrics["acc1"])
    assert found["headline"] in (root / "o" / "tiny" / "default" / "log_rank0.txt").read_text()
    assert "Worst confusions" in (evaluation / "report.html").read_text()
    report.main([str(evaluation), "--output", str(tmp_path / "again")])
    assert json.loads((tmp_path / "again" / "report.json").read_text()) == found
    with pytest.raises(UserError, match="is not a whole evaluation"):
        (tmp_path / "again" / "metrics.json").write_text('{"acc1": 1}')
        report.main([str(tmp_path / "again")])


def test_the_report_counts(tmp_path):
    """Confusions by hand; the interval is Wilson's, checked against its formula; a class without images is named."""
    rows = [("a", "a")] * 90 + [("a", "b")] * 6 + [("a", "c")] * 4 + [("b", "b")] * 97 + [("b", "a")] * 3
    found = pd.DataFrame(rows, columns=["target", "prediction_1"])
    found["acc1"] = (found["target"] == found["prediction_1"]).astype(float)
    found["acc5"] = 1.0
    made = classes.collect({"absent": ["c"]}, found)
    assert [(c["target"], c["prediction"], c["images"], c["share"]) for c in made["confusions"]] == [
        ("a", "b", 6, 0.06), ("a", "c", 4, 0.04), ("b", "a", 3, 0.03),
    ]  # fmt: skip
    n, p = 200, 187 / 200
    from scipy.stats import t

    z = t.ppf(0.975, n - 1)
    centre, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)),
    )
    top1 = made["accuracy"]["acc1"]
    assert top1["value"] == pytest.approx(p)
    assert (top1["low"], top1["high"]) == pytest.approx((centre - half, centre + half), abs=2e-4)
    assert made["classes"]["a"]["value"] == 0.9 and made["classes"]["b"]["images"] == 100
    assert classes.headline(made).endswith("200 images; no image of 1 of the classes: c")


def test_published_weights_are_evaluated_by_resume(finished, photos, tmp_path):
    """As the published commands do: a file without our keys, and the classes in the data's order: the same scores."""
    root, evaluation = finished
    best = root / "o" / "tiny" / "default" / "best_ckpt.pth"
    torch.save({"model": checkpoint.read(best)["model"]}, tmp_path / "theirs.pth")
    opts = {"OUTPUT": tmp_path / "o", "RESULTS": tmp_path / "r"}
    main.main(argv(root / "tiny.yaml", photos, "--eval", "--resume", tmp_path / "theirs.pth", **opts))
    again = next((tmp_path / "r").glob("evaluation_*"))
    assert (again / "predictions.csv").read_text() == (evaluation / "predictions.csv").read_text()
    weights = checkpoint.read(best)["model"]
    del weights["head.weight"], weights["head.bias"]
    torch.save({"model": weights}, tmp_path / "headless.pth")
    with pytest.raises(UserError, match="headless.pth has no head for these 3 classes"):
        main.main(argv(root / "tiny.yaml", photos, "--eval", "--resume", tmp_path / "headless.pth", **opts))


# ------------------------------------------------------------------------------------- prediction
def predicted(*arguments, output):
    """(table, what is in the .npy beside it) of predict.py."""
    assert predict.main([*map(str, arguments), "--output", str(output), "-j", "0"]) == 0
    array = output.with_suffix(".npy")
    return pd.read_csv(output), np.load(array) if array.exists() else None


def test_photographs_are_predicted_as_they_are_evaluated(finished, photos, tmp_path):
    root, evaluation = finished
    best = root / "o" / "tiny" / "default" / "best_ckpt.pth"
    table, _ = predicted(best, photos / "val", output=tmp_path / "p.csv")
    truth = pd.read_csv(evaluation / "predictions.csv")
    assert np.allclose(table[list(NAMES)].sum(axis=1), 1)
    assert (table[list(NAMES)].idxmax(axis=1) == truth["prediction_1"]).all()
    assert np.allclose(table[list(NAMES)].max(axis=1), truth["probability_1"], atol=1e-6)
    with pytest.raises(UserError, match="--explain: the overlays are of X-rays"):
        predict.main([str(best), str(photos / "val"), "--output", str(tmp_path / "e.csv"), "--explain", str(tmp_path)])
    # Published weights with their configuration: the same numbers, under the classes' numbers.
    torch.save({"model": checkpoint.read(best)["model"]}, tmp_path / "theirs.pth")
    (tmp_path / "fork.yaml").write_text(TINY.replace("mimic_cxr", "imagenet").replace("14", "3"))
    theirs = (tmp_path / "theirs.pth", photos / "val", "--cfg", tmp_path / "fork.yaml")
    same, _ = predicted(*theirs, output=tmp_path / "t.csv")
    assert np.array_equal(same[["0", "1", "2"]], table[list(NAMES)])
    # Exported, it gives them too, and stays a model of classes.
    argv = ["--format", "weights", "--output", str(tmp_path / "shared.pth"), "--cfg", str(tmp_path / "fork.yaml")]
    assert export.main([str(tmp_path / "theirs.pth"), *argv]) == 0
    shared, _ = predicted(tmp_path / "shared.pth", photos / "val", output=tmp_path / "s.csv")
    assert np.array_equal(shared[["0", "1", "2"]], table[list(NAMES)])


@pytest.mark.parametrize("layer", [None, "levels.2.blocks.0.mlp.fc1", "levels.3.blocks.0", "head", "conv_head.0"])
def test_features_are_those_of_the_layer(finished, photos, tmp_path, layer):
    """Against a forward pass by hand; the default are what the classifier gets: its weights give the logits."""
    best = finished[0] / "o" / "tiny" / "default" / "best_ckpt.pth"
    flags = ["--features", *([layer] if layer else [])]
    table, found = predicted(best, photos / "val", *flags, output=tmp_path / "f.csv")
    model = trained.load(best)
    read = model.reader()
    images = model.normalize(torch.stack([read(Path(p).read_bytes(), p) for p in table["path"]]))
    kept = []
    if layer:
        model.model.get_submodule(layer).register_forward_hook(lambda m, i, output: kept.append(output))
    with torch.no_grad():
        logits = model.model(images)
        if layer is None:
            weights = model.model.head
            expected = logits.numpy()
            found_logits = found @ weights.weight.numpy().T + weights.bias.numpy()
            assert np.allclose(found_logits, expected, atol=1e-5)
        else:
            output = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
            channels_first = layer == "conv_head.0"
            pooled = output if output.ndim == 2 else output.mean((2, 3) if channels_first else (1, 2))
            assert np.allclose(found, pooled.numpy(), atol=1e-5)
    assert found.dtype == np.float32 and len(found) == 12
    assert table["features_row"].tolist() == list(range(12))


def test_features_resume_and_bad_images(finished, own_photos, tmp_path, monkeypatch):
    """Stopped after the first of three batches: resumed it is the same file; NaN where an image cannot be read."""
    best = finished[0] / "o" / "tiny" / "default" / "best_ckpt.pth"
    (own_photos / "val" / "cat" / "1.png").write_bytes(b"")
    whole, broken = tmp_path / "whole.csv", tmp_path / "broken.csv"
    command = [str(best), str(own_photos / "val"), "--features", "-b", "5", "-j", "0", "--output"]

    def run(output):
        with pytest.raises(SystemExit) as stopped:
            predict.main([*command, str(output)])
        assert stopped.value.code == 1

    run(whole)
    forward, calls = features.forward, []

    def stops(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return forward(*arguments)

    monkeypatch.setattr(features, "forward", stops)
    with pytest.raises(RuntimeError):
        predict.main([*command, str(broken)])
    run(broken)
    assert len(calls) == 2 + 2
    arrays = [np.load(path.with_suffix(".npy")) for path in (whole, broken)]
    assert np.array_equal(*arrays, equal_nan=True)
    assert np.isnan(arrays[0]).all(1).tolist() == [False, True] + [False] * 10
    assert whole.read_text() == broken.read_text()
    broken.with_suffix(".npy").unlink()
    with pytest.raises(UserError, match="broken.npy is not the file of .*broken.csv .*remove the table, too"):
        predict.main([*command, str(broken)])
    for flags, message in (
        (["--features", "levels.9"], r"has no layer 'levels.9' \(did you mean levels"),
        (["--features", "--output", str(tmp_path / "x.npy")], "x.npy is the table, and the features are in an .npy"),
        ([str(best), "--features"], "--features takes one checkpoint, a model of images"),
    ):
        with pytest.raises(UserError, match=message):
            predict.main([str(best), str(own_photos / "val"), "--output", str(tmp_path / "n.csv"), *flags])
