"""The folder of an evaluation: metrics.json, predictions.csv and what is drawn from them."""

import contextlib
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.figures import plot_evaluation
from errors import UserError


def _new_folder(parent, name):
    """A new folder; two evaluations within one second get two."""
    for suffix in ["", *(f"_{k}" for k in range(2, 100))]:
        with contextlib.suppress(FileExistsError):
            (parent / (name + suffix)).mkdir(parents=True)
            return parent / (name + suffix)
    raise UserError(f"{parent}: too many evaluations named {name}")


def new_evaluation(parent):
    """A new folder `evaluation_<timestamp>` in `parent`, made before the work whose results it takes."""
    try:
        return _new_folder(Path(parent), datetime.now().strftime("evaluation_%Y%m%d_%H%M%S"))
    except OSError as error:
        raise UserError(f"RESULTS {parent} cannot be written ({error.strerror}); choose another folder") from error


def write_evaluation(folder, metrics, dataset):
    """metrics.json, predictions.csv and roc.png.

    metrics: of a task's `test`; its arrays go to predictions.csv.
    """
    figures = {k: v for k, v in metrics.items() if not isinstance(v, np.ndarray)}
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    arrays = dataset.label_names, metrics["targets"], metrics["probabilities"]
    read = {name: np.asarray(column)[metrics["rows"]] for name, column in dataset.ids().items()}
    write_predictions(folder / "predictions.csv", read, *arrays)
    plot_evaluation(folder, metrics, *arrays)


def write_predictions(path, rows, label_names, targets, probabilities):
    """predictions.csv: identifiers, then `<label>_target` and `<label>_probability` of every label.

    rows: column name -> values [N]; targets, probabilities: [N, L]; unknown targets stay empty.
    """
    columns = dict(rows)
    for k, name in enumerate(label_names):
        columns[f"{name}_target"] = targets[:, k]
        columns[f"{name}_probability"] = probabilities[:, k]
    pd.DataFrame(columns).to_csv(path, index=False, float_format="%.8g")
