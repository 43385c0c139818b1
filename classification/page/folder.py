"""The folder of `export.py --page`: a page that asks the model in the visitor's own browser; and its server.

index.html, style.css, page.js     the page; about.js: what it shows of the model and its evaluation
pictures.js ... worker.js          reads and prepares a picture, asks the model
model.onnx                         the model; its outputs are probabilities and, where they are exact, maps
runtime/                           packages of npm with their licences
local/                             the same files as scripts, for a page from a local disk; a server needs none
"""

import base64
import functools
import json
import shutil
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from analysis import applied, card, tables
from analysis.calibration import logit, sigmoid
from common.errors import UserError, reason
from dataset.files.domain import domain_warning
from page.packages import PACKAGES

HERE = Path(__file__).parent
NO_DEVICE = "Research software, not a medical device."
LARGEST = 2_000_000_000  # bytes of a model: WebAssembly has 4 GB, and loading takes two copies
CHUNK = 6 << 20  # bytes of a file in a script; divisible by 3, so that Base64 has no padding between
RUNTIME = ["runtime/onnxruntime-web/ort.wasm.min.js"]
SCRIPTS = [*RUNTIME, "preparing.js", "pictures.js", "dicom.js", "worker.js"]  # the worker, in this order
PAGE = ["index.html", "style.css", "page.js", *SCRIPTS[1:]]


def check_folder(folder):
    """Raises a UserError for a folder that has something else than such a page."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) and not (folder / "about.js").exists()):
        raise UserError(f"--page {folder} exists and is no page of export.py; choose a new folder")


def write_page(folder, about, packages, metadata, first):
    """Write the page around `model.onnx`, which is in the folder already; returns (its size, that of local/) in MB.

    about: of :func:`describe`. packages: of `take_packages`. metadata: of the ONNX file. first: the first position of
    the maps as a part of the image's side, None without maps.
    """
    for old in ("local", "runtime"):
        shutil.rmtree(folder / old, ignore_errors=True)
    for name in PAGE:
        shutil.copyfile(HERE / name, folder / name)
    for name, data in packages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    code = [name for name in packages if name.endswith((".js", ".mjs", ".wasm"))]
    files = {name: _write_local(folder, name) for name in ("model.onnx", *SCRIPTS[1:], *code)}
    numbers = {
        key: json.loads(metadata[key]) for key in ("side", "size", "shrink_to", "dicom_window", "mean", "std", "labels")
    }
    texts = {key: metadata[key] for key in ("resize", "interpolation", "dicom_recipe")}
    about = {**about, **numbers, **texts, "files": files, "scripts": SCRIPTS, "first": first}
    (folder / "about.js").write_text(f"const ABOUT = {json.dumps(about, indent=1)};\n", encoding="utf-8")
    return [sum(p.stat().st_size for p in part.rglob("*") if p.is_file()) / 1e6 for part in (folder, folder / "local")]


def _write_local(folder, name):
    """A file as scripts of a call with Base64: {"size", "chunks"}."""
    data = (folder / name).read_bytes()
    for k, start in enumerate(range(0, len(data), CHUNK)):
        path = folder / "local" / f"{name}.{k}.js"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'receive("{name}", "{base64.b64encode(data[start : start + CHUNK]).decode()}");\n')
    return {"size": len(data), "chunks": -(-len(data) // CHUNK)}


def _bullets(text, section):
    """The bullets of a section of a Markdown text."""
    lines = text.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    return [line[2:] for line in lines if line.startswith("- ")]


def describe(model, missing, evaluation, *, ema, mapped):
    """What the page shows of the model: title, facts, limits, and of each label what its evaluation found.

    model: a `trained.Trained`. missing: packages. evaluation: a folder of report.py, or None. mapped: with maps or not.

    Raises:
        UserError: an evaluation without a report, or of other labels.
    """
    data = model.config.DATA
    facts = [
        ("trained on images", model.domain or "not recorded"),
        ("image size", f"{data.IMG_SIZE} x {data.IMG_SIZE}, {data.RESIZE}"),
        ("DICOM recipe", data.DICOM_RECIPE),
        ("weights", "EMA" if ema else "model"),
        ("SHA-256 of the checkpoint", model.digest),
    ]
    sources = {"dicom": f"dicom {data.DICOM_RECIPE}", "pictures": "pictures"}
    sources = {kind: domain_warning(model.domain, source).partition(";")[0] for kind, source in sources.items()}
    shown = {"title": f"{model.config.MODEL.NAME}: {len(model.label_names)} labels of a chest X-ray"}
    shown["source_notes"] = {kind: note and f"{note[0].upper()}{note[1:]}." for kind, note in sources.items()}
    limits = [f"Without the package {name} this page reads no {PACKAGES[name][2]}." for name in missing]
    limits += [] if mapped else ["There is no map: this model does not take the mean of its last features."]
    if evaluation is None:
        answers = "Probabilities, not calibrated: the page was made without an evaluation of the model."
        limits += ["How good this model is, this page does not show: it was made without an evaluation.", NO_DEVICE]
        return {**shown, "facts": facts, "limits": limits, "answers": answers, "evaluation": None}
    path, report = applied.read_content(evaluation, "report.json")
    names = model.label_names
    try:
        results = {name: report["labels"][name] for name in names}
        about = card.model_card(report)
        facts = [("evaluation", tables.headline(report)), *(b.split(": ", 1) for b in _bullets(about, "Data")), *facts]
        images, known = report["bootstrap"]["images"], _bullets(about, "Limits")
    except KeyError as error:
        raise UserError(
            f"{path} has no {error}: it is of a model with other labels, or of an older report.py"
        ) from error
    cuts, fitted_for = dict.fromkeys(names), None
    if "left_out" not in report["thresholds"]:
        cuts, fitted_for = applied.read_thresholds(evaluation, "youden", names)
    scaling = lambda p: p  # noqa: E731
    if calibrated := (path.parent / "calibration.json").exists():
        scaling, fitted_for = applied.read_calibration(evaluation, names)
    here = {"checkpoints_sha256": [model.digest], "ema": ema, "tta": False, "dicom_recipe": None}
    notes = applied.differences("the evaluation", path.parent.name, fitted_for, **here) if fitted_for else []
    # Every method is a line of the logit: its value at 0 and at 1 give it.
    at = [logit(scaling(np.full((1, len(names)), p)))[0] for p in (0.5, sigmoid(1.0))]
    cut_at = scaling(np.array([[np.nan if cuts[name] is None else cuts[name] for name in names]]))[0]
    labels = [
        {
            "auroc": [results[name]["auroc"][key] for key in ("value", "low", "high")],
            "threshold": None if np.isnan(cut) else float(cut),
            "scaling": [float(one - zero), float(zero)] if calibrated else [1, 0],
        }
        for name, cut, zero, one in zip(names, cut_at, *at)
    ]
    state = "Calibrated probabilities" if calibrated else "Probabilities, not calibrated"
    answers = f"{state}. Thresholds (Youden's) are chosen on the validation split; AUROC on {images:,} test images."
    limits += [*(note[0].upper() + note[1:] + "." for note in notes), *known]
    return {**shown, "facts": facts, "limits": limits, "answers": answers, "evaluation": labels}


# ---------------------------------------------------------------------------------------- server
class _Handler(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}

    def end_headers(self):
        # Isolated from other pages, the page may use several threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def list_directory(self, path):
        self.send_error(404)

    def log_message(self, *_):
        pass


def open_server(folder, port):
    """A server of the folder, to this machine alone; `serve_forever()` starts it.

    Raises:
        UserError: no page, or a port in use.
    """
    if not (Path(folder) / "about.js").is_file():
        raise UserError(f"--serve {folder} is no page of export.py; make one with export.py CHECKPOINT --page {folder}")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--port {port} cannot be used ({reason(error)}); choose another, or 0 for a free one"
        ) from error
