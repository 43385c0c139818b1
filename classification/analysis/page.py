"""report.html: the report's dictionary as one self-contained page, its curves drawn as inline SVG."""

import base64
import io
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from analysis import comparison_tables, tables
from analysis.evaluation import Evaluation
from analysis.metrics import METRICS
from common.errors import UserError
from dataset.files.images import SUFFIXES, ImageError, decode
from dataset.mimic_cxr import find_folders, image_stems

THUMBNAIL = 176  # pixels of the longer side
# Okabe and Ito's colours, which the colour-blind tell apart; lines differ in their dashes too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
DASHES = ("", "5 3", "2 2", "7 2 2 2")


# ----------------------------------------------------------------------------------------- charts
def chart(lines, *, size=(150, 150), x=(0, 1), y=(0, 1), band=None, diagonal=False, labels=("", ""), left=34, title=""):
    """A small SVG chart.

    lines: [(xs, ys)] or [(xs, ys, name)]; band: (xs, low, high); x, y: the axes' ends; left: room for the
    label and the ticks of y; title: for screen readers.
    """
    width, height = size
    right, top, bottom = width - 8, 8, height - 26

    def px(v):
        return left + (right - left) * (v - x[0]) / ((x[1] - x[0]) or 1)

    def py(v):
        return bottom - (bottom - top) * (v - y[0]) / ((y[1] - y[0]) or 1)

    def points(xs, ys):
        return " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(xs, ys) if b is not None)

    title, labels = escape(title), [escape(text) for text in labels]
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}"><title>{title}</title>']
    for k in range(3):
        at = [v[0] + (v[1] - v[0]) * k / 2 for v in (x, y)]
        parts.append(f'<path class="grid" d="M{left} {py(at[1]):.1f}H{right}M{px(at[0]):.1f} {top}V{bottom}"/>')
        anchor = ("start", "middle", "end")[k]
        parts.append(f'<text x="{px(at[0]):.1f}" y="{bottom + 11}" text-anchor="{anchor}">{at[0]:.2g}</text>')
        text = f"{at[1]:.2g}".replace("e-0", "e-")
        parts.append(f'<text x="{left - 4}" y="{py(at[1]) + 3:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 4}" text-anchor="middle">{labels[0]}</text>')
    parts.append(
        f'<text transform="translate(8 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">{labels[1]}</text>'
    )
    if diagonal:
        parts.append(f'<path class="chance" d="M{px(x[0])} {py(y[0])}L{px(x[1])} {py(y[1])}"/>')
    if band:
        xs, low, high = band
        parts.append(f'<polygon class="band" points="{points(xs, high)} {points(xs[::-1], low[::-1])}"/>')
    for k, (xs, ys, *name) in enumerate(lines):
        style = f'stroke="{COLORS[k]}" stroke-dasharray="{DASHES[k]}"'
        parts.append(f'<polyline class="line" {style} points="{points(xs, ys)}"/>')
        if len(xs) <= 12:
            parts += [
                f'<circle cx="{px(a):.1f}" cy="{py(b):.1f}" r="2" fill="{COLORS[k]}"/>'
                for a, b in zip(xs, ys)
                if b is not None
            ]
        if name:
            parts.append(f'<path class="line" {style} d="M{left + 6} {top + 6 + 11 * k}h16"/>')
            parts.append(f'<text x="{left + 26}" y="{top + 9 + 11 * k}">{name[0]}</text>')
    return Markup("".join(parts) + "</svg>")


def interval_bar(line, low=0.5, high=1.0):
    """An interval and its middle on a scale from `low` to `high`, cut at its ends."""

    def at(v):
        return 2 + 96 * (min(max(v, low), high) - low) / (high - low)

    value, a, b = (at(v) for v in line)
    return Markup(
        '<svg class="bar" viewBox="0 0 100 12" aria-hidden="true"><path class="axis" d="M2 6H98M2 3V9M98 3V9"/>'
        f'<path class="range" d="M{a:.1f} 6H{b:.1f}"/><path class="value" d="M{value:.1f} 1V11"/></svg>'
    )


def _curve_charts(report):
    """[(label, AUROC text, ROC chart, precision-recall chart)] of the labels that have curves."""
    grid, found = report["curves"]["grid"], []
    for name, c in report["curves"]["labels"].items():
        label = report["labels"][name]
        kinds = []
        for key, axes, diagonal, title in (
            ("roc", ("1 - specificity", "sensitivity"), True, f"ROC curve of {name}"),
            ("precision_recall", ("sensitivity", "precision"), False, f"precision-recall curve of {name}"),
        ):
            line = c[key]
            kinds.append(chart([(grid, line["value"])], band=(grid, line["low"], line["high"]), diagonal=diagonal,
                               labels=axes, title=title))  # fmt: skip
        found.append((name, tables.figure(label["auroc"]).text, tables.figure(label["auprc"]).text, *kinds))
    return found


def _reliability_charts(report):
    """[(label, chart)]: share of positives by mean probability, before and after Platt scaling."""
    stages, found = report["calibration"], []
    for name in report["label_names"]:
        lines = []
        for stage, title in (("before", "before"), ("platt", "Platt")):
            curve = stages.get(stage, {}).get("labels", {}).get(name, {}).get("curve")
            if curve:
                lines.append((curve["probability"], curve["rate"], title))
        if lines:
            ends = (0, max(max(xs + ys) for xs, ys, _ in lines) or 1)
            found.append((name, chart(lines, x=ends, y=ends, diagonal=True, labels=("probability", "positives"),
                                      title=f"reliability of {name}")))  # fmt: skip
    return found


def _training_charts(report):
    epochs = report["training"].get("epochs", [])
    if not epochs:
        return []
    x = [e["epoch"] for e in epochs]
    found = []
    for names, title, left in (
        ({"train_loss": "train", "val_loss": "validation"}, "loss", 34),
        *(({metric.key: "validation"}, f"mean {metric.column}", 34) for metric in METRICS),
        ({"lr": "rate"}, "learning rate", 46),
    ):
        values = [e[k] for e in epochs for k in names if e.get(k) is not None]
        if values:
            lines = [(x, [e.get(k) for e in epochs], name) for k, name in names.items()]
            span = (x[0], x[-1] if len(x) > 1 else x[0] + 1)
            ends = (min(values), max(values) if max(values) > min(values) else min(values) + 1e-6)
            found.append(chart(lines, size=(260, 170), x=span, y=ends, labels=("epoch", title), left=left, title=title))
    return found


# ------------------------------------------------------------------------------------- thumbnails
def _image_path(root, base, ids):
    """Where an image lies, told by its path or, in the official layout, by its ids; None where it is not there."""
    if ids.get("path"):
        return next((p for p in (base / ids["path"], root / ids["path"]) if p.is_file()), None)
    stem = image_stems(ids.to_frame().T).iloc[0]
    return next((base / (stem + s) for s in SUFFIXES if (base / (stem + s)).is_file()), None)


def thumbnails(evaluation: Evaluation, errors):
    """(row of the predictions -> data URI of a small JPEG; reason why there is none, or None)."""
    data = evaluation.config.get("DATA", {})
    root, ids = evaluation.metrics.get("root") or data.get("DATA_PATH"), evaluation.test.ids
    if not root:
        return {}, "the evaluation does not record where its images are"
    if not ("path" in ids or {"dicom_id", "study_id", "subject_id"} <= set(ids)):
        return {}, "the predictions name no paths"
    root = Path(root).expanduser()
    try:
        base, _ = find_folders(root)
    except UserError:
        return {}, f"the images are not at hand ({root} is not there)"
    found = {}
    for row in sorted({e["row"] for label in errors.values() for kind in label.values() for e in kind}):
        path = _image_path(root, base, ids.iloc[row])
        if path is None:
            continue
        try:
            decoding = {"recipe": data.get("DICOM_RECIPE", "window"), "window": data.get("DICOM_WINDOW", 0)}
            image = Image.fromarray(decode(path.read_bytes(), str(path), shrink_to=2 * THUMBNAIL, **decoding))
        except (ImageError, OSError):
            continue
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        image.convert("L").save(out, "JPEG", quality=80)
        found[row] = "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
    return found, None if found else f"none of the images was found in {root}"


# ------------------------------------------------------------------------------------------- page
def _facts(report):
    """What was evaluated, as [(name, text)]."""
    about, b = report["about"], report["bootstrap"]
    rows = [
        ("Model", " ".join(filter(None, [about["model"], about["architecture"] and f"({about['architecture']})"]))),
        ("Ensemble of", ", ".join(about["ensemble"] or [])),
        ("Data", about["dataset"]),
        ("Image domain", about["domain"]),
        ("Image size", about["image_size"] and f"{about['image_size']} px"),
        ("Checkpoint", about["checkpoint"]),
        ("SHA-256", about["checkpoint_sha256"]),
        ("Training seed", about["seed"]),
        ("Bootstrap", f"{b['resamples']:,} resamples of {b['units']:,} {b['unit']}s, seed {b['seed']}"),
        ("Label policy", tables.policy_text(report).removeprefix("Labels: ")),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _fill(template, **values):
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template(template).render(interval_bar=interval_bar, **values)


def render(report, pictures, no_pictures):
    """The page as text.

    pictures: row -> data URI, see :func:`thumbnails`; no_pictures: the reason where there are none.
    """
    largest = max((n for row in report["cooccurrence"]["counts"] for n in row), default=0)
    return _fill(
        "page.html.j2",
        report=report,
        title=report["about"]["name"],
        headline=tables.headline(report),
        mean=report["mean"]["auroc"],
        facts=_facts(report),
        note=tables.note(report),
        sections=tables.sections(report),
        curves=_curve_charts(report),
        reliability=_reliability_charts(report),
        training=_training_charts(report),
        largest=largest or 1,
        pictures=pictures,
        no_pictures=no_pictures,
        number=tables.number,
    )


def render_comparison(report, forest):
    """The page of several evaluations as text; forest: the SVG file of the figure."""
    drawn = "data:image/svg+xml;base64," + base64.b64encode(forest.read_bytes()).decode()
    return _fill(
        "comparison.html.j2",
        title=comparison_tables.title(report),
        headlines=comparison_tables.headline(report),
        facts=comparison_tables.facts(report),
        sections=comparison_tables.sections(report),
        forest=drawn,
    )
