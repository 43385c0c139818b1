"""metrics.jsonl: one JSON object an epoch, as a file and as lines of the log."""

import contextlib
import json

from analysis.text import number, undefined_note
from common.files import write_whole


def read_metrics(path):
    """Epochs of metrics.jsonl; a line that an outage cut short is passed over."""
    epochs = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            epochs.append(json.loads(line))
    return epochs


def append_metrics(path, record):
    """Add an epoch's line to metrics.jsonl, in place of what an interrupted run wrote from it on."""
    lines = [json.dumps(e) for e in read_metrics(path) if e["epoch"] < record["epoch"]]
    write_whole(path, "\n".join([*lines, json.dumps(record)]) + "\n")


def chosen_by(epochs):
    """The metric that chose the best checkpoint, as TRAIN.BEST_BY names it; "" where the epochs do not have it."""
    return next((key.removeprefix("best_") for key in epochs[-1] if key.startswith("best_")), "")


def epoch_lines(record, metric):
    """An epoch for the log: one line, and the values per label of the metric that chooses the best below it."""
    score = metric.key
    line = (
        f"epoch {record['epoch']} done in {record['seconds']} s ({record['images_per_s']} images/s, "
        f"{record['waited']:.0%} of it waiting for data, peak memory {record['peak_memory_gb']} GB): "
        f"train loss {record['train_loss']:.4f}, val loss {record['val_loss']:.4f}, {score} {number(record[score])} "
        f"(best {number(record[f'best_{score}'])})"
    )
    if record["skipped"]:
        line += f", {record['skipped']} images skipped"
    if "ema" in record:
        line += f", EMA {score} {number(record['ema'][score])} (best {number(record['ema']['best'])})"
    if "by_source" in record:
        line += ", " + ", ".join(f"{name} {number(own[score])}" for name, own in record["by_source"].items())
    if isinstance(values := record[metric.name], dict):
        line += "\n" + "  ".join(f"{name} {number(value)}" for name, value in values.items())
        line += "".join("\n" + note for note in undefined_note(values, metric.column))
    return line
