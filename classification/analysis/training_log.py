"""metrics.jsonl: one JSON object an epoch, as a file and as lines of the log."""

import contextlib
import json

from analysis.text import number, undefined_note


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
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    temporary.replace(path)


def epoch_lines(record, score):
    """An epoch for the log: one line, and the AUROC by label below it."""

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
    if "auc" in record:
        line += "\n" + "  ".join(f"{name} {number(value)}" for name, value in record["auc"].items())
        line += "".join("\n" + note for note in undefined_note(record["auc"]))
    return line
