"""What predict.py costs beside the forward passes alone; with --export, what the files of export.py cost and differ.

    python benchmarks/predicting.py [--images FOLDER] [--rounds 5]
    python benchmarks/predicting.py --export [--images FOLDER]

The models have drawn weights, under which every branch and offset counts. Rate: InternImage-T at 224 pixels on 100
images; in every round the forward passes alone, in the batches that predict.py takes, and predict.py on 1 and on 101
images, whose difference is what 100 images cost after the start.
"""

import argparse
import contextlib
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common.torchvision_shim  # noqa: F401, I001  (before torchvision)

import torch
import yaml

import config as config_module
import export
import predict
from predicting import trained
from dataset.synthetic import tree as synthetic
from dataset.labels import LABELS
from dataset.tools.listing import list_images
from models import build_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TINY = {"CHANNELS": 16, "DEPTHS": [1, 1, 3, 1], "GROUPS": [1, 2, 4, 8]}
H_HEAD = {"RES_POST_NORM": True, "DW_KERNEL_SIZE": 5, "USE_CLIP_PROJECTOR": True, "CENTER_FEATURE_SCALE": True,
          "LEVEL2_POST_NORM": True, "LEVEL2_POST_NORM_BLOCK_IDS": [1]}  # fmt: skip
# name -> (file of configs/, changes of MODEL.INTERN_IMAGE)
MODELS = {
    "InternImage-T": ("internimage_t_1k_224.yaml", {}),
    "InternImage-B": ("internimage_b_mimic_cxr_224.yaml", {}),
    "tiny, as H": ("internimage_b_mimic_cxr_224.yaml", {**TINY, **H_HEAD, "POST_NORM": False, "LAYER_SCALE": None}),
    "tiny, no centre, offset scale 2": (
        "internimage_b_mimic_cxr_224.yaml", {**TINY, "REMOVE_CENTER": True, "OFFSET_SCALE": 2.0},
    ),
}  # fmt: skip


def write_checkpoint(path, name):
    """A checkpoint of MODELS with drawn weights."""
    file, changes = MODELS[name]
    content = yaml.safe_load((CONFIGS / file).read_text())
    content["DATA"]["DATASET"], content["MODEL"]["NUM_CLASSES"] = "mimic_cxr", len(LABELS)
    content["MODEL"]["INTERN_IMAGE"] |= changes
    content["TEST"] = {"CROP": False}
    config = config_module.from_dict(content, file)
    torch.manual_seed(0)
    model = build_model(config)
    for key, value in model.state_dict().items():
        if value.dim() >= 2:  # of variance one behind every layer, offsets of a pixel or so
            value.normal_(0, (value.shape[0] / value.numel()) ** 0.5)
        elif key.endswith(("gamma1", "gamma2")):
            value.fill_(0.3)
    state = {"model": model.state_dict(), "label_names": list(LABELS), "config": config_module.to_dict(config)}
    torch.save(state | {"domain": "pictures"}, path)
    return path


def image_paths(folder, given, count):
    if given is None:
        synthetic.write_tree(folder / "drawn", patients=max(10, count // 4), progress=False)
        given = folder / "drawn"
    found = [str(image.file) for image in list_images([given])]
    if len(found) < count:
        sys.exit(f"{given}: {len(found)} images, {count} are needed")
    return found[:count]


def seconds(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def rate(folder, images, rounds):
    paths = image_paths(folder, images, 101)
    checkpoint = write_checkpoint(folder / "t.pth", "InternImage-T")
    model = trained.load(checkpoint)
    read = model.reader()
    tensors = torch.stack([read(Path(path).read_bytes(), path) for path in paths[1:]])
    batch = predict.batch_size(model.config, torch.device("cpu"), None)

    def forward():
        with torch.no_grad():
            for images in model.normalize(tensors).split(batch):
                model.model(images)

    def whole(count):
        output = folder / "predictions.csv"
        output.unlink(missing_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            predict.main([str(checkpoint), *paths[:count], "--output", str(output)])

    forward()
    times = {"forward": [], "start": [], "whole": []}
    threads = torch.get_num_threads()
    for _ in range(rounds):
        torch.set_num_threads(threads)
        times["forward"].append(seconds(forward))
        times["start"].append(seconds(lambda: whole(1)))
        times["whole"].append(seconds(lambda: whole(101)))
    ratios = [(w - s) / f for f, s, w in zip(*times.values())]
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"100 images, medians of {rounds} rounds: forward passes alone {middle['forward']:.1f} s (batches of {batch}), "
        f"predict.py {middle['whole'] - middle['start']:.1f} s after the start: "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def exports(folder, images):
    paths = image_paths(folder, images, 8)
    for name in MODELS:
        checkpoint = write_checkpoint(folder / "m.pth", name)
        print(f"\n{name}", flush=True)
        export.main([str(checkpoint), "--output", str(folder / "m.onnx"), "--images", *paths])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", help="a folder of them (drawn ones)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args(argv)
    print(
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"load {os.getloadavg()[0]:.1f} at the start, Python {platform.python_version()}, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if args.export:
            exports(Path(folder), args.images)
        else:
            rate(Path(folder), args.images, args.rounds)


if __name__ == "__main__":
    main()
