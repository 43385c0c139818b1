"""A checkpoint as a file to use elsewhere: ONNX, a torch.export program, weights to share, or one file of its shards.

    python export.py output/.../best_ckpt.pth --output model.onnx
    python export.py output/.../best_ckpt.pth --output model.pt2 --format torch
    python export.py output/.../best_ckpt.pth --output shared.pth --format weights
    python export.py output/.../best_ckpt.pth --output whole.pth --format checkpoint
    python export.py output/.../best_ckpt.pth --page FOLDER --evaluation EVALUATION  # a page that asks it in a browser
    python export.py --serve FOLDER               # shows that page, for browsers that refuse files of a local disk

Input: `images`, float32 [B, 3, S, S], the X-ray resized to S x S, as gray / 255 three times, less `mean`, by `std`
(a photograph: as RGB / 255).
Output: `probabilities`, float32 [B, labels]. The file's metadata hold the labels and all of the preparation;
docs/onnx_reference.py prepares an X-ray by them. The file is compared with PyTorch, on images of yours with --images,
before it gets its name.
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
from dataset.files.domain import domain_warning
from dataset.synthetic.drawing import draw
from dataset.tools.listing import list_images
from models.exporting import Mapped, Probabilities, pools_linearly, require, save_onnx, save_torch, save_weights
from models.inference import device_name
from page import folder as page
from page.packages import take_packages
from predicting import explain, trained
from training import checkpoint

TOLERANCE = 1e-4  # of a probability, against PyTorch in float32
HALF_TOLERANCE = 2e-2


def parse_args(argv):
    parser = Parser(prog="export.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", help="a checkpoint of main.py")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", metavar="FILE", help="the file to write, model.onnx say")
    target.add_argument("--page", metavar="FOLDER", help="a new folder with a page that asks the model in a browser")
    target.add_argument("--serve", metavar="FOLDER", help="show such a page at http://127.0.0.1, to this machine alone")
    add("--evaluation", metavar="FOLDER", help="of report.py: AUROC, thresholds, calibration and limits for --page")
    add(
        "--runtime", nargs="+", metavar="PATH",
        help="folders or tarballs with the packages of --page, such as a node_modules (they are downloaded by npm)",
    )  # fmt: skip
    add("--port", type=int, default=8000, help="of --serve (8000); 0: a free one")
    add(
        "--format", choices=list(FORMATS), default="onnx",
        help="torch: a program of torch.export; weights: a checkpoint to share, without patients, paths and optimizer; "
        "checkpoint: all of a sharded one (TRAIN.FSDP) in one file",
    )  # fmt: skip
    add("--opset", type=int, default=20, help="of ONNX, 19 or later (20)")
    add("--decompose", action="store_true", help="ONNX without DeformConv, which OpenVINO lacks: GridSample instead")
    add("--half", action="store_true", help="ONNX or torch: compute in float16; images and probabilities stay float32")
    add("--cfg", metavar="FILE", help="published weights as CHECKPOINT: the configuration that they belong to")
    add("--ema", action="store_true", help="the EMA weights that the checkpoint holds")
    add(
        "--dicom-recipe",
        choices=["window", "mimic_jpg"],
        help="how DICOM is to become grayscale (that of the training)",
    )
    add("--images", nargs="+", metavar="PATH", help="images to compare on: files, folders, a CSV (two synthetic ones)")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.serve):
        parser.error("--serve takes no CHECKPOINT" if args.serve else "CHECKPOINT is missing")
    for flag, value in (("--evaluation", args.evaluation), ("--runtime", args.runtime)):
        if value and not args.page:
            parser.error(f"{flag} is an option of --page")
    return args


def _load(args):
    return trained.load(args.checkpoint, ema=args.ema, dicom_recipe=args.dicom_recipe, cfg=args.cfg)


def _images(model, names):
    """Normalised images to compare on, [N, 3, S, S]: the user's, 16 at most, or drawn ones."""
    read = model.reader()
    if names:
        found = [read(image.read(), image.path) for image in list_images(names)[:16]]
    else:
        drawn = (draw({"Cardiomegaly"}, view, np.random.default_rng(1)) for view in ("PA", "LATERAL"))
        mode = "RGB" if model.classes else "L"
        found = [read.transform(Image.fromarray((image * 255).astype(np.uint8)).convert(mode)) for image in drawn]
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


def _open_weights(path):
    loaded = trained.load(path)
    model = Probabilities(loaded.model, classes=loaded.classes)
    return lambda images: model(torch.from_numpy(images)).numpy(), "a checkpoint without patients, paths and optimizer"


def _open_checkpoint(path):
    return _open_weights(path)[0], "a checkpoint in one file"


FORMATS = {"onnx": _open_onnx, "torch": _open_torch, "weights": _open_weights, "checkpoint": _open_checkpoint}
ENDINGS = {"torch": ".pt2", "weights": ".pth", "checkpoint": ".pth"}  # by which these files are opened
# Formats that each flag goes with.
FLAGS = {"decompose": ("onnx",), "half": ("onnx", "torch"), "ema": ("onnx", "torch", "weights")}


def _preparation(model):
    """How an image becomes the input: name -> text. `docs/onnx_reference.py` prepares an X-ray by it."""
    reader, size, data = model.reader(), model.config.DATA.IMG_SIZE, model.config.DATA
    if model.classes:
        whole = f"to {size} x {size}" if not model.config.TEST.CROP else f"the short side to {size}, then the middle"
        return {
            "resize": whole,
            "interpolation": data.INTERPOLATION,
            "antialias": "true",
            "size": str(size),
            "input": "RGB / 255, less mean, by std; float32 [N, 3, size, size]",
        }
    square = reader.transform
    return {
        "grayscale": "ITU-R 601 luma of 8 bits, turned upright by EXIF; shrunk by whole factors to a short side of at "
        "least shrink_to: a JPG while it is decoded, then by means of blocks",
        "shrink_to": str(reader.decoding["shrink_to"]),
        "resize": square.resize,
        "side": str(square.side),
        "interpolation": square.interpolation,
        "antialias": "true",
        "crop": "the middle of size x size",
        "size": str(square.size),
        "input": "gray / 255 three times, less mean, by std; float32 [N, 3, size, size]",
        "dicom_recipe": data.DICOM_RECIPE,
        "dicom_window": str(data.DICOM_WINDOW),
    }


def _metadata(model, args):
    """All that whoever has the file alone needs: name -> text."""
    config = model.config
    return {
        "labels": json.dumps(model.label_names),
        **_preparation(model),
        "mean": json.dumps(list(config.AUG.MEAN)),
        "std": json.dumps(list(config.AUG.STD)),
        "domain": model.domain,
        "weights": "ema" if args.ema else "model",
        "precision": "float16" if args.half else "float32",
        "checkpoint_sha256": model.digest,
    }


@torch.no_grad()
def export(args, model=None, written=None):
    """Write, compare and measure; prints a few lines. model: loaded already; written: the network to write, if it is
    another than its probabilities."""
    for flag, formats in FLAGS.items():
        if getattr(args, flag) and args.format not in formats:
            raise UserError(f"--{flag} does not go with --format {args.format}; leave it out")
    target = Path(args.output)
    if target.suffix != (ending := ENDINGS.get(args.format, target.suffix)):
        raise UserError(f"--output {target}: a file of --format {args.format} must end in {ending}; name it so")
    model = model or _load(args)
    if model.config.DATA.UNIT == "study" and args.format not in ("weights", "checkpoint"):
        raise UserError(
            f"{args.checkpoint} is a model of studies (DATA.UNIT study); a file of --format {args.format} takes images "
            "one by one: export the model of images, or share the weights with --format weights"
        )
    size, network = model.config.DATA.IMG_SIZE, Probabilities(model.model, classes=model.classes)
    images, metadata = _images(model, args.images), _metadata(model, args)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Under its own name, as weights beyond 2 GB are beside it and are found by name; but elsewhere until checked.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export") as folder:
            path = Path(folder) / target.name
            half = Probabilities(model.model, half=True, classes=model.classes) if args.half else network
            written = written or half
            if args.format == "onnx":
                save_onnx(written, size, path, metadata=metadata, opset=args.opset, decompose=args.decompose)
            elif args.format == "torch":
                save_torch(written, size, path, metadata=metadata)
            elif args.format == "checkpoint":
                torch.save(checkpoint.read(args.checkpoint), path)
            else:
                save_weights(
                    model.model.state_dict(),
                    model.config,
                    model.label_names,
                    path,
                    domain=model.domain,
                    classes=model.classes,
                )
            run, parts = FORMATS[args.format](path)
            print(parts)
            difference = _compare(network, run, images, path, HALF_TOLERANCE if args.half else TOLERANCE)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the graph that names them
                os.replace(file, target.parent / file.name)
    except OSError as error:
        raise UserError(f"--output {target} cannot be written ({error.strerror or error}); choose another") from error
    return difference


def _compare(network, run, images, path, tolerance):
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
    if not difference <= tolerance:  # NaN fails too
        raise UserError(
            f"the file differs from PyTorch by {difference:.1e} in a probability, more than {tolerance:g}; nothing is "
            "written. Report it with the versions of torch, onnx and onnxruntime"
        )
    return difference


def export_page(args):
    """The folder of --page: what can be wrong is looked at first."""
    folder = Path(args.page)
    if args.half or args.format != "onnx":
        raise UserError("--page writes ONNX in float32, which browsers run; leave --half and --format out")
    page.check_folder(folder)
    packages, missing = take_packages(args.runtime)
    model = _load(args)
    if model.classes:
        raise UserError(f"--page shows X-rays; {args.checkpoint} is a model of photographs: leave --page out")
    network, size = model.model, model.config.DATA.IMG_SIZE
    if (weights := 4 * sum(p.numel() for p in network.parameters())) > page.LARGEST:
        raise UserError(
            f"--page: the weights take {weights / 1e9:.1f} GB, browsers can use 2 GB; choose a smaller model"
        )
    mapped = pools_linearly(network, size)
    first = explain.last_position(network, size) if mapped else None
    about = page.describe(model, missing, args.evaluation, ema=args.ema, mapped=mapped)
    args.output = str(folder / "model.onnx")
    export(args, model, Mapped(network) if mapped else None)
    try:
        whole, local = page.write_page(folder, about, packages, _metadata(model, args), first)
    except OSError as error:
        raise UserError(f"--page {folder} cannot be written ({error.strerror or error}); choose another") from error
    notes = about["limits"][: len(missing) + (not mapped)]
    if text := domain_warning(model.domain, f"dicom {model.config.DATA.DICOM_RECIPE}"):
        notes.append("DICOM: " + text.replace("DATA.DICOM_RECIPE", "--dicom-recipe"))
    for line in notes:
        print(f"note: {line}")
    print(
        f"{whole:.1f} MB; {local:.1f} MB of them are local/, for opening index.html from a disk, not for a web server"
    )


def serve(args):
    server = page.open_server(args.serve, args.port)
    print(f"http://127.0.0.1:{server.server_port}/ shows {args.serve} to this machine; Ctrl-C ends it", flush=True)
    with server:
        server.serve_forever()


def main(argv=None):
    args = parse_args(argv)
    if args.serve:
        return serve(args)
    if args.page:
        export_page(args)
        args.output = f"{args.page}; open index.html in it, or run export.py --serve {args.page}"
    else:
        export(args)
    print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
