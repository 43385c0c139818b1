"""model_card.md: data, split, policy, configuration, numbers with intervals, limits; nothing that they do not carry."""

from pathlib import Path

from analysis import tables
from config import units


def _lines(pairs):
    return "\n".join(f"- {name}: {value}" for name, value in pairs if value not in (None, "", {}))


def _weak(report):
    """Sentences about what the numbers are too few or too uncertain for."""
    for name, label in report["labels"].items():
        low = label["auroc"]["low"]
        if "left_out" in label:
            yield f"{name} has no result: {label['left_out']}."
        elif "warning" in label:
            rows = units(report["bootstrap"]["row"])
            yield f"{name} rests on {label['positives']:,} positive {rows}: {label['warning']}."
        elif low is not None and low <= 0.5:
            yield f"{name} cannot be distinguished from chance: the interval of its AUROC reaches {low:.3f}."


def model_card(report):
    """The card as Markdown."""
    about, b, flow = report["about"], report["bootstrap"], report["cohort"]
    parts = [f"# Model card: {about['model'] or about['name']}", tables.headline(report)]
    parts += ["## Model", _lines([
        ("name", about["model"]), ("architecture", about["architecture"]), ("parameters", about.get("parameters")),
        ("image size", about["image_size"]), ("checkpoint", about["checkpoint"] and Path(about["checkpoint"]).name),
        ("SHA-256", about["checkpoint_sha256"]),
        ("ensemble of", ", ".join(Path(given).name for given in about["ensemble"] or [])), ("seed", about["seed"]),
    ]) or "Not recorded: the report was made from a table of predictions alone."]  # fmt: skip
    splits = "; ".join(
        f"{tables.SPLIT_NAMES[s]} {found['images']:,} images"
        + (f" of {found['patients']:,} patients" if found.get("patients") is not None else "")
        for s, found in flow["splits"].items()
    )
    left_out = "; ".join(f"{n:,} {reason}" for reason, n in flow["left_out"].items() if n)
    parts += ["## Data", _lines([
        ("data set", about["dataset"]), ("image domain", about["domain"]), ("splits", splits), ("left out", left_out),
        ("label policy", tables.policy_text(report)),
    ])]  # fmt: skip
    wanted = ("frequency", "labels", "mapping", "study", "cohort")
    shown = [t for key, _, found, _ in tables.sections(report) if key in wanted for t in found]
    parts += ["## Results", tables.plain_markdown(tables.note(report))]
    parts += [tables.markdown(t, tables.note(report)) for t in shown]
    if "left_out" not in report["thresholds"]:
        parts.append("Operating points, calibration and subgroups: see summary.md.")
    others = ", ".join(about["trained_on"])
    external = others and not set(about["tested_on"]) & set(about["trained_on"])
    limits = [
        *_weak(report),
        f"An external test: trained on {others}, tested on {about['dataset']}."
        if external
        else "Tested on one test split; nothing here says how the model does on images of another hospital or scanner.",
        "Labels are those of the label file, not a reading of the images for this purpose.",
        "Research software, not a medical device.",
    ]
    if b["unit"] != "patient":
        rows = units(b["row"])
        limits.append(f"Patients are unknown: {rows} were treated as independent, and the intervals may be too narrow.")
    limits += [f"Not judged by {n}: {s['left_out']}." for n, s in report["groups"].items() if "left_out" in s]
    parts += ["## Limits", "\n".join(f"- {line}" for line in limits)]
    return "\n\n".join(parts) + "\n"
