"""A checkpoint as a file that runs without this project: ONNX of standard operators, or a torch.export program.

    python export.py output/.../best_ckpt.pth --output model.onnx
    python export.py output/.../best_ckpt.pth --output model.pt2 --format torch

Input: `images`, float32 [B, 3, S, S], the X-ray resized to S x S, as grey / 255 three times, less `mean`, by `std`.
Output: `probabilities`, float32 [B, labels]. Labels, size, mean and deviation stand in the file's metadata. The file is
compared with PyTorch, on images of yours with --images, before it gets its name.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import UserError, run_command
from config import Parser
from dataset.synthetic.drawing import draw
from dataset.tools.listing import list_images
from models.exporting import Probabilities, require, save_onnx, save_torch
from predicting import trained
from training.inference import device_name

TOLERANCE = 1e-4  # of a probability, against PyTorch


def parse_args(argv):
    parser = Parser(prog="export.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint of main.py")
    add("--output", required=True, metavar="FILE", help="the file to write, model.onnx say")
    add("--format", choices=["onnx", "torch"], default="onnx", help="torch: a program of torch.export")
    add("--opset", type=int, default=20, help="of ONNX, 19 or later (20)")
    add("--ema", action="store_true", help="the averaged weights that the checkpoint holds")
    add("--images", nargs="+", metavar="PATH", help="images to compare on: files, folders, a CSV (two drawn chests)")
    return parser.parse_args(argv)


def _images(model, names):
    """Normalised images to compare on, [N, 3, S, S]: the user's, 16 at most, or drawn ones."""
    read = model.reader()
    if names:
        found = [read(image.read(), image.path) for image in list_images(names)[:16]]
    else:
        drawn = (draw({"Cardiomegaly"}, view, np.random.default_rng(1)) for view in ("PA", "LATERAL"))
        found = [read.transform(Image.fromarray((picture * 255).astype(np.uint8))) for picture in drawn]
    return model.normalize(torch.stack(found))


def _latency(function, runs=5):
    """Median of so many runs after one to warm up, in milliseconds."""
    seconds = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return 1000 * sorted(seconds[1:])[runs // 2]


def _open_onnx(path):
    """Function NumPy images -> probabilities by onnxruntime, and a line of what the graph is made of."""
    onnx, onnxruntime = require("onnx", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class of their own
        reason = str(error).splitlines()[0]
        raise UserError(f"onnxruntime {onnxruntime.__version__} cannot run the graph: {reason}") from error
    nodes = [n.op_type for n in onnx.load(path, load_external_data=False).graph.node]
    counts = ", ".join(f"{name} {nodes.count(name)}" for name in sorted(set(nodes)))
    return lambda images: session.run(None, {"images": images})[0], f"{len(nodes)} nodes: {counts}"


def _open_torch(path):
    program = torch.export.load(path).module()
    return lambda images: program(torch.from_numpy(images)).numpy(), "a program of torch.export"


FORMATS = {"onnx": _open_onnx, "torch": _open_torch}


@torch.no_grad()
def export(args):
    """Write, compare and measure; prints a few lines."""
    model = trained.load(args.checkpoint, ema=args.ema)
    size, network = model.config.DATA.IMG_SIZE, Probabilities(model.model)
    images = _images(model, args.images)
    metadata = {
        "labels": json.dumps(model.label_names),
        "size": str(size),
        "mean": json.dumps(list(model.config.AUG.MEAN)),
        "std": json.dumps(list(model.config.AUG.STD)),
        "checkpoint_sha256": model.digest,
    }
    target = Path(args.output)
    if args.format == "torch" and target.suffix != ".pt2":
        raise UserError(f"--output {target}: torch.export opens only files that end in .pt2; name it so")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Under its own name, as weights beyond 2 GB lie beside it and are found by name; but elsewhere until checked.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export") as folder:
            path = Path(folder) / target.name
            if args.format == "onnx":
                save_onnx(network, size, path, metadata=metadata, opset=args.opset)
            else:
                save_torch(network, size, path, metadata=metadata)
            run, parts = FORMATS[args.format](path)
            print(parts)
            difference = _compare(network, run, images, path)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the graph that names them
                os.replace(file, target.parent / file.name)
    except OSError as error:
        raise UserError(f"--output {target} cannot be written ({error.strerror or error}); choose another") from error
    return difference


def _compare(network, run, images, path):
    """Largest difference of a probability between the file and PyTorch; a UserError where it is too large."""
    expected = network(images).numpy()
    got = np.concatenate([run(images[:1].numpy()), run(images[1:].numpy())]) if len(images) > 1 else run(images.numpy())
    difference = float(np.abs(got - expected).max())
    one = images[:1]
    ours, theirs = _latency(lambda: network(one)), _latency(lambda: run(one.numpy()))
    megabytes = sum(file.stat().st_size for file in path.parent.iterdir()) / 1e6
    print(
        f"largest difference from PyTorch {difference:.1e} on {len(images)} images; {megabytes:.1f} MB; "
        f"one image on {device_name(torch.device('cpu'))}: the file {theirs:.1f} ms, PyTorch {ours:.1f} ms"
    )
    if not difference <= TOLERANCE:  # NaN fails too
        raise UserError(
            f"the file differs from PyTorch by {difference:.1e} in a probability, more than {TOLERANCE:g}; nothing is "
            "written. Report it with the versions of torch, onnx and onnxruntime"
        )
    return difference


def main(argv=None):
    args = parse_args(argv)
    export(args)
    print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
