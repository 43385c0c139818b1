"""report.html: the report's dictionary as one self-contained page, its curves drawn as inline SVG."""

import base64
import io
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from analysis import comparison_tables, tables
from analysis.evaluation import Evaluation
from analysis.metrics import METRICS
from analysis.templates import fill
from analysis.training_log import chosen_by
from common.errors import UserError
from dataset.files.images import SUFFIXES, ImageError, decode
from dataset.mimic_cxr import find_folder, image_stems

THUMBNAIL = 176  # pixels of the longer side


# ----------------------------------------------------------------------------------------- charts
def chart(lines, *, size=(150, 150), x=(0, 1), y=(0, 1), band=None, chance=None, labels=("", ""), left=34, title="",
          marks=True):  # fmt: skip
    """A small SVG chart.

    lines: [(xs, ys)] or [(xs, ys, low, high)], which draws the interval of each point; band: (xs, low, high);
    chance: (y at the left end, y at the right end) of a dashed line; x, y: the axes' ends; left: room for the label and
    the ticks of y; title: for screen readers; marks: whether few points are marked.
    """
    width, height = size
    right, top, bottom = width - 8, 8, height - 26

    def px(v):
        return f"{left + (right - left) * (v - x[0]) / ((x[1] - x[0]) or 1):.1f}"

    def py(v, below=0):
        return f"{bottom - (bottom - top) * (min(max(v, y[0]), y[1]) - y[0]) / ((y[1] - y[0]) or 1) + below:.1f}"

    def points(xs, ys):
        return " ".join(f"{px(a)},{py(b)}" for a, b in zip(xs, ys) if b is not None)

    ticks = [[end + (other - end) * k / 2 for end, other in (x, y)] for k in range(3)]
    ends = {"width": width, "height": height, "left": left, "right": right, "top": top, "bottom": bottom}
    shown = {"lines": lines, "band": band, "chance": chance, "labels": labels, "title": title, "marks": marks}
    return Markup(fill("chart.svg.j2", px=px, py=py, points=points, ticks=ticks, **ends, **shown))


def _reliability_charts(report):
    """[(label, chart)]: share of positives by mean probability, as predicted and as --calibrated applies it."""
    stages, found = [report["calibration"].get(stage, {}).get("labels", {}) for stage in ("before", "calibrated")], []
    for name in report["label_names"]:
        curves = [labels[name]["curve"] for labels in stages if "curve" in labels.get(name, {})]
        lines = [[curve[k] for k in ("probability", "rate", "low", "high")] for curve in curves]
        if lines:
            end = max(max(xs + ys) for xs, ys, *_ in lines) or 1
            axes = {"x": (0, end), "y": (0, end), "chance": (0, end), "labels": ("probability", "positives")}
            found.append((name, chart(lines, **axes, title=f"reliability of {name}")))
    return found


def _decision_charts(report):
    """[(label, chart)]: net benefit by the probability at which somebody acts."""
    x, found = report["decisions"]["thresholds"], []
    for name, lines in report["decisions"]["labels"].items():
        rate = report["labels"][name]["prevalence"]
        end = min(1, max(0.1, 3 * rate))
        shown = sum(t <= end for t in x)
        ends = (-rate / 4, rate)
        kept = [lines[k][:shown] for k in ("before", "all", "calibrated") if k in lines]
        kept = [[v if v >= ends[0] else None for v in ys] for ys in kept]
        found.append((name, chart([(x[:shown], ys) for ys in kept], x=(0, end), y=ends, chance=(0, 0), marks=False,
                                  labels=("threshold", "net benefit"), title=f"decision curve of {name}")))  # fmt: skip
    return found


def _training_charts(report):
    """[(names of the lines, chart)] of the epochs."""
    epochs = report["training"].get("epochs", [])
    if not epochs:
        return []
    x, best_by = [e["epoch"] for e in epochs], chosen_by(epochs)
    span, found = (x[0], x[-1] if len(x) > 1 else x[0] + 1), []
    for names, title, left in (
        ({"train_loss": "train loss", "val_loss": "validation loss"}, "loss", 34),
        *(
            ({m.key: f"validation mean {m.column}" + ", chooses the best" * (m.key == best_by)}, f"mean {m.column}", 34)
            for m in METRICS
        ),
        ({"lr": "learning rate"}, "learning rate", 46),
    ):
        values = [e[k] for e in epochs for k in names if e.get(k) is not None]
        if values:
            lines = [(x, [e.get(k) for e in epochs]) for k in names]
            ends = (min(values), max(values) if max(values) > min(values) else min(values) + 1e-6)
            drawn = chart(lines, size=(260, 170), x=span, y=ends, labels=("epoch", title), left=left, title=title)
            found.append((list(names.values()), drawn))
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
        base = find_folder(root).root
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
def render(report, pictures, no_pictures):
    """The page as text.

    pictures: row -> data URI, see :func:`thumbnails`; no_pictures: the reason where there are none.
    """
    largest = max((n for row in report["cooccurrence"]["counts"] for n in row), default=0)
    charts = {"reliability": _reliability_charts, "decision": _decision_charts, "training": _training_charts}
    primary = report["about"]["primary"]
    charts = {key: drawn_from(report) for key, drawn_from in charts.items()}
    shown = {"curves": report["curves"]["labels"], "calibration": charts["reliability"], "together": True, **charts}
    shown["errors"] = report["errors"]
    return fill(
        "page.html.j2", **charts, report=report, title=tables.title(report), headline=tables.headline(report),
        listed={e["row"] for label in report["errors"].values() for kind in label.values() for e in kind},
        mean=report["mean"][primary], note=tables.note(report),
        sections=tables.sections(report), charts=[key for key, found in shown.items() if found], largest=largest or 1,
        pictures=pictures, no_pictures=no_pictures, number=tables.number, figure=tables.figure, chart=chart,
        primary=tables.METRIC_NAMES[primary], least={"auroc": 0.5, "auprc": 0}[primary],
    )  # fmt: skip


def embedded(path):
    """An SVG file as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


def render_comparison(report, forest):
    """The page of several evaluations as text; forest: the SVG file of the figure."""
    sections, of = comparison_tables.sections(report), comparison_tables
    return fill(
        "comparison.html.j2", title=of.title(report), headlines=of.headline(report), facts=of.facts(report),
        sections=sections, shared=tables.shared_note(sections), drawn=embedded(forest),
        drawn_alt="AUROC with its 95% interval per label and evaluation, the numbers of the tables",
        drawn_note="AUROC and 95% interval. Last the mean over the common labels.", numbers="report.json",
    )  # fmt: skip


def render_classes(title, headlines, facts, sections):
    """The page of an evaluation of classes as text; sections: as of :func:`analysis.tables.sections`."""
    return fill(
        "comparison.html.j2", title=title, headlines=headlines, facts=facts, shared="", drawn="",
        sections=sections, numbers="report.json",
    )  # fmt: skip


def render_runs(title, headline, shown, curves):
    """The page of several training runs as text; shown: [Table]; curves: the SVG file of the figure."""
    return fill(
        "comparison.html.j2", title=title, headlines=[headline], facts=[], shared="", drawn=embedded(curves),
        sections=[(t.key, t.title, [t], None) for t in shown],
        drawn_alt="the validation score of every run over the epochs", numbers="runs.csv",
        drawn_note="The validation score over the epochs; runs of one configuration have one colour.",
    )  # fmt: skip
