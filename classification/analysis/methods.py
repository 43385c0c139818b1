"""How the data were prepared and the model was trained: what a checkpoint and a config record, as lines of a paper."""

import platform
import re
import subprocess
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path

from analysis.templates import fill

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "pydicom", "scikit-learn")


def describe_checkpoint(state, path):
    """What metrics.json keeps of a checkpoint's training: {"config", "epoch", ...}; `state` is its content."""
    kept = ("config", "epoch", "update", "weights", "best_by", "max_accuracy", "max_ema_accuracy", "images_per_update",
            "averaged", "pseudo_labels")  # fmt: skip
    found = {key: state[key] for key in kept if key in state}
    with suppress(OSError):
        found["written"] = datetime.fromtimestamp(Path(path).stat().st_mtime).isoformat(" ", "minutes")
    return found


def describe_software():
    """Versions, the processor's kind, the date and the version of this code, at the time of the call."""
    found = {"date": datetime.now().isoformat(" ", "minutes"), "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["system"] = f"{platform.system()} {platform.machine()}"
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        found["code"] = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return found


def collect(evaluation, about, epochs):
    """[{"what", "text"}] for report.json, see methods.txt.j2.

    about: as in the report; epochs: of metrics.jsonl.
    """
    m = evaluation.metrics
    record = m.get("training", {})
    text = fill(
        "methods.txt.j2", about=about, epochs=epochs, m=m, record=record, config=record.get("config", {}),
        evaluated=evaluation.config, software=m.get("software", {}), test=evaluation.test,
        held_out=evaluation.validate,
    )  # fmt: skip
    rows = (row.partition(":")[::2] for row in re.split(r"\n(?=\S)", text.strip()))
    return [{"what": what, "text": " ".join(said.split())} for what, said in rows if said.strip()]
