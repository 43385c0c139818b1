"""The report's dictionary as tables of text: the page, tables.tex, summary.md and the model card print the same."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from analysis import statistics
from analysis.templates import fill, md
from config import units
from dataset.tables import aligned

# ASKED: what guidelines ask for, and what only the authors can state. TEXTS: title, note and columns of every table.
ASKED, TEXTS = (
    yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    for name in ("reporting.yaml", "tables.yaml")
)
NO_CLASSES = "no label has both classes"
STAGES = {"before": "as predicted", "calibrated": "as --calibrated applies it",
          "temperature": "after temperature scaling", "platt": "after Platt scaling"}  # fmt: skip
SPLIT_NAMES = {"train": "train", "validate": "validation", "test": "test"}
COUNTED = {
    "zeros": "counted as negative", "ones": "counted as positive", "ignore": "left out", "smooth": "left out",
}  # fmt: skip
METRIC_NAMES = {"auroc": "AUROC", "auprc": "average precision"}
DASH = "–"


class Cell(NamedTuple):
    """text; what it sorts by; (value, low, high) where the page draws the interval as a line; wide: a sentence."""

    text: str
    sort: float | str | None = None
    line: tuple | None = None
    wide: bool = False


@dataclass
class Table:
    """key: its anchor; note: what holds for all of it; remarks: of single rows; total: the last rows stay the last.

    common: the part of the note that tables share: printed once on a page, and below every table of a paper.
    folded: closed on the page until somebody opens it.
    """

    key: str
    title: str
    common: str
    note: str
    columns: list
    rows: list
    remarks: list = field(default_factory=list)
    total: int = 0
    folded: bool = False


def slug(text):
    """An anchor of the page and a label of LaTeX."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def shared_note(sections):
    """The common note of all tables of a page where it is the same for all, else an empty text."""
    notes = {t.common for _, _, found, _ in sections for t in found}
    return notes.pop() if len(notes) == 1 else ""


# ------------------------------------------------------------------------------------------ cells
def number(value, digits=3):
    return DASH if value is None else f"{value:.{digits}f}"


def count(value):
    return Cell(DASH if value is None else f"{value:,}", value)


def share(value):
    return Cell(DASH if value is None else f"{value:.1%}", value)


def plain(value, digits=3):
    return Cell(number(value, digits), value)


def _between(low, high, digits, sign=""):
    """' (0.790–0.830)', with 'to' where a minus would meet the dash; empty where there is no interval."""
    if low is None:
        return ""
    dash = DASH if low >= 0 and not sign else " to "
    return f" ({low:{sign}.{digits}f}{dash}{high:{sign}.{digits}f})"


def figure(found, digits=3, line=False):
    """'0.812 (0.790–0.830)'; of a one-sided bound '1.000 (≥ 0.861)'."""
    value, low, high = found["value"], found["low"], found["high"]
    if value is None:
        return Cell(DASH, None)
    between = _between(low, high, digits)
    if found.get("one_sided"):
        between = f" (≥ {low:.{digits}f})" if value == high else f" (≤ {high:.{digits}f})"
    return Cell(number(value, digits) + between, value, (value, low, high) if line and low is not None else None)


def signed(found):
    """'+0.012 (+0.004 to +0.020)', of a difference."""
    value = found["difference"]
    return Cell(DASH if value is None else f"{value:+.3f}" + _between(found["low"], found["high"], 3, "+"), value)


def p_value(p):
    return Cell(DASH if p is None else "<0.001" if p < 0.001 else f"{p:.3f}", p)


# ------------------------------------------------------------------------------------------ notes
def policy_text(report):
    """The label policy as a sentence: it belongs beside every number."""
    policy = report["policy"]
    if policy is None:
        return "Label policy for uncertain and blank labels: not recorded."

    def one(choice):
        if isinstance(choice, dict):
            rest = COUNTED[choice.get("default", "zeros")]
            return f"{rest} (" + ", ".join(f"{n} {COUNTED[c]}" for n, c in choice.items() if n != "default") + ")"
        return COUNTED[choice]

    read = " Test labels read by a radiologist." if report["about"]["test_labeler"] == "radiologist" else ""
    return f"Labels: uncertain (-1) {one(policy['uncertain'])}, blank {one(policy['missing'])}.{read}"


OTHER_INTERVALS = (
    " (AUPRC: jackknife, corrected for its bias; rates: Wilson's; slope and intercept: clustered standard errors)"
)


def unit_text(report):
    b = report["bootstrap"]
    drawn = f"{b['units']:,} {units(b['unit'])}, {b['resamples']:,} resamples"
    text = f"95% intervals: bootstrap over {drawn}{OTHER_INTERVALS}"
    if b["unit"] == "patient":
        return text + "."
    return (
        f"{text}; the predictions have no subject_id, and where a patient has several {units(b['row'])} these "
        "intervals are too narrow."
    )


def note(report):
    warning = report["bootstrap"].get("warning")
    return f"{policy_text(report)} {unit_text(report)}" + (f" Warning: {warning}." if warning else "")


KINDS = {"exact": "the same", "approximate": "nearly the same", "unknown": "not comparable: unknown to the data"}


def _mapping(report):
    """Which of the model's labels the data have, and from what; None where each is simply itself."""
    mapping = report["label_mapping"]
    if all(m["kind"] == "exact" and m["from"] == [label] for label, m in mapping.items()):
        return None
    found = [(n, mapping[n], report["labels"][n]["images"]) for n in report["label_names"]]
    rows = [[Cell(n), Cell(", ".join(m["from"]) or DASH), Cell(KINDS[m["kind"]]), count(k)] for n, m, k in found]
    exact = sum(m["kind"] == "exact" for m in mapping.values())
    values = {"exact": exact, "labels": len(rows), "dataset": report["about"]["dataset"]}
    return make("mapping", policy_text(report), rows, **values)


def label_remarks(labels):
    """'Fracture: one class only' of every label that has something to be said."""
    said = {}
    for name, found in labels.items():
        for key in ("left_out", "warning", "remark"):
            if key in found:
                said.setdefault(found[key], []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in said.items()]


# ----------------------------------------------------------------------------------------- tables
def make(kind, common, rows, remarks=(), /, *, key="", more=(), total=0, folded=False, row="image", **values):
    """The :class:`Table` of a kind of tables.yaml, None without rows, without its empty remarks.

    more: columns for `...`; row and values: for the {} of its texts.
    """
    if not rows:
        return None
    texts = TEXTS[kind]
    columns = [c for column in texts["columns"] for c in (more if column == "..." else [column])]
    title, said = (texts.get(part, "").format(row=row, rows=units(row), **values) for part in ("title", "note"))
    return Table(key or kind, title, common, said, columns, rows, list(filter(None, remarks)), total, folded)


def _by_label(report, kind, section, **values):
    """AUROC and average precision by label, of the report itself and of its level of studies."""
    of_patients = ["positive patients"] * (report["bootstrap"]["unit"] == "patient")

    def row(name, found, counts):
        auroc, auprc = figure(found["auroc"], line=True), figure(found["auprc"])
        return [Cell(name, name), auroc, plain(found["auroc"].get("se"), 4), auprc, *counts]

    rows = []
    for name, found in section["labels"].items():
        counts = [count(found["positives"]), count(found["images"]), share(found["prevalence"])]
        rows.append(row(name, found, [*counts, *(count(found["positive_patients"]) for _ in of_patients)]))
    if section["mean"]["auroc"]["value"] is not None:
        rows.append(row(f"mean of {section['mean']['labels']}", section["mean"], [Cell("")] * (3 + len(of_patients))))
    mean, resamples = section["mean"], report["bootstrap"]["resamples"]
    remarks = label_remarks(section["labels"] | {"mean": mean, "mean AUPRC": mean["auprc"]})
    defined = {n: f["auroc"] for n, f in section["labels"].items() if f["auroc"]["value"] is not None}
    few = ", ".join(f"{n} in {k:,}" for n, auroc in defined.items() if (k := auroc.get("undefined_resamples")))
    remarks.append(few and f"resamples (of {resamples:,}) with one class only, which do not count: {few}")
    return make(kind, note(report), rows, remarks, more=of_patients, total=1, row=report["bootstrap"]["row"], **values)


def _frequency(report):
    section, rows, order = report["frequency"], [], list(report["frequency"]["groups"])

    def cells(figures, f1):
        return [figure(figures["auprc"], line=True), figure(figures["auroc"]), plain(f1["half"]), plain(f1["chosen"])]

    labels = sorted(section["labels"].items(), key=lambda item: (order.index(item[1]["group"]), -item[1]["share"]))
    for name, own in labels:
        figures = cells(report["labels"][name], own["f1"])
        rows.append([Cell(name, name), Cell(own["group"], own["group"]), share(own["share"]), *figures])
    totals = {f"mean of {g}": found for g, found in section["groups"].items()} | {"mean of all": section["all"]}
    for title, found in totals.items():
        name = Cell(f"{title} ({found['mean'].get('labels', 0)})")
        rows.append([name, Cell(""), Cell(""), *cells(found["mean"], found["f1"])])
    least = [f"{g} from {found['least']:.0%}" for g, found in section["groups"].items()]
    remarks = label_remarks(report["labels"] | {title: found["mean"]["auprc"] for title, found in totals.items()})
    return make("frequency", note(report), rows, remarks, total=len(totals), groups=", ".join(least))


def _further_metrics(report):
    found = report["metrics"].values()
    rows = [[Cell(n, n), *(plain(metric["labels"][n]) for metric in found)] for n in report["label_names"]]
    rows.append([Cell("mean"), *(plain(metric["mean"]) for metric in found)])
    more = [f"{metric['column']} ({metric['direction']})" for metric in found]
    return make("metrics", f"{policy_text(report)} No intervals.", rows if found else [], more=more, total=1)


def against(report, k, other):
    rows = []
    for name, d in other["labels"].items():
        values = [plain(report["labels"][name]["auroc"]["value"]), plain(d.get("other")), signed(d)]
        rows.append([Cell(name, name), *values, p_value(d["p"]), p_value(d["p_holm"])])
    mean = other["mean"]
    values = [plain(report["mean"]["auroc"]["value"]), plain(mean.get("other", {}).get("value")), signed(mean)]
    rows.append([Cell("mean AUROC (the primary test)"), *values, p_value(mean["p"]), Cell("")])
    remarks = label_remarks(other["labels"])
    return make("against", note(report), rows, remarks, key=f"against-{k}", total=1, name=other["name"],
                row=report["bootstrap"]["row"])  # fmt: skip


def _seeds(report):
    seeds = report["seeds"]
    runs = [[Cell(r["name"], r["name"]), plain(r["seed"], 0), figure(r["auroc"], line=True)] for r in seeds["runs"]]
    labels = [(Cell(n, n), found, report["labels"][n]) for n, found in seeds["labels"].items()]
    labels.append((Cell("mean AUROC"), seeds["mean"], report["mean"]))
    rows = [[name, plain(f["mean"]), plain(f["sd"], 4), figure(own["auroc"], line=True)] for name, f, own in labels]
    unchecked = f" Not checked: {seeds['remark']}." if seeds["remark"] else ""
    return [
        make("seeds", note(report), runs),
        make("seeds-labels", note(report), rows, total=1, runs=len(runs), unchecked=unchecked),
    ]


def _on(found):
    """'[40/12]': positive images, and patients where they are known."""
    patients = found["positive_patients"]
    return f"[{found['positives']:,}" + (f"/{patients:,}]" if patients is not None else "]")


def _group(report, k, name, section):
    groups, gap, row = section["groups"], section["gap"], report["bootstrap"]["row"]
    more = []
    for g, found in groups.items():
        people = f", {found['patients']:,} patients" if found["patients"] is not None else ""
        more.append(f"{g} ({found['images']:,} {units(row)}{people})")

    def gap_cells(found):
        ps = [p_value(found["p"]), p_value(found.get("p_holm"))]
        if found["value"] is None:
            return [Cell(DASH, None), *ps]
        return [Cell(f"{figure(found).text} {found['best']} over {found['worst']}", found["value"]), *ps]

    def cell(found):
        """AUROC, and how many positive images and patients it rests on; marked where they are too few."""
        auroc = figure(found["auroc"])
        rests = "" if auroc.sort is None else f" {_on(found)}" + " *" * ("warning" in found)
        return Cell(auroc.text + rests, auroc.sort)

    rows = [
        [Cell(n, n), *(cell(found["labels"][n]) for found in groups.values()), *gap_cells(gap["labels"][n])]
        for n in report["label_names"]
    ]
    remarks = [f"{g}: {found['warning']}" for g, found in groups.items() if "warning" in found]
    remarks.append(section["unknown"] and f"{section['unknown']:,} {units(row)} of unknown {name} are in no group")
    if section["mean_of"]:
        means = {g: found["mean"]["auroc"] for g, found in groups.items()}
        cells = [Cell(f"{DASH} *") if mean["value"] is None else figure(mean) for mean in means.values()]
        rows.append([Cell(f"mean of {len(section['mean_of'])}"), *cells, *gap_cells(gap["mean"])])
        remarks.append(f"the mean is over the labels that every group can judge: {', '.join(section['mean_of'])}")
        remarks += [f"{g} * has no mean: it {m['left_out']}" for g, m in means.items() if m["value"] is None]
    remarks.append(section.get("remark"))
    unit = report["bootstrap"]["unit"]
    values = {"units": units(unit), "and_patients": " and patients" * (unit == "patient"), "few": statistics.FEW}
    return make("group", note(report), rows, remarks, key=slug(f"group-{k}-{name}"), more=more,
                total=int(bool(section["mean_of"])), name=name, row=row, **values)  # fmt: skip


def _rates(report, k, name, labels):
    """Sensitivity, specificity and calibration of each group."""
    keys = ("sensitivity", "specificity", "slope", "intercept")
    rows = [
        [Cell(n, n), Cell(g, g), count(f["images"]), count(f["positives"]),
         *(figure(f[key]) if f.get(key) else Cell(DASH) for key in keys), plain(f["ece"])]
        for n, found in labels.items() for g, f in found.items() if "left_out" not in f
    ]  # fmt: skip
    return make("rates", note(report), rows, key=slug(f"rates-{k}-{name}"), folded=True, name=name)


def _thresholds(report, rule, section):
    rows, missed = [], []
    for name, t in section["labels"].items():
        on = t["fitted_on"]
        if t["threshold"] is None:
            rows.append([Cell(name, name), *[Cell(DASH)] * 9, Cell(_on(on))])
            continue
        rates = [figure(t[rate]) for rate in ("sensitivity", "specificity", "ppv", "npv")]
        reached = Cell(f"{number(on['sensitivity'])}, {number(on['specificity'])} {_on(on)}", on["sensitivity"])
        counts = [count(t[k]) for k in ("tp", "fp", "fn", "tn")]
        rows.append([Cell(name, name), plain(t["threshold"], 4), *counts, *rates, reached])
        missed += [f"{name} ({number(t[rule]['value'])})"] if t["missed"] else []
    patients = next((t["fitted_on"]["patients"] for t in section["labels"].values()), None)
    people = "" if patients is None else f" of {patients:,} patients"
    remarks = label_remarks(section["labels"])
    remarks.append(missed and f"missed in the test split ({section['rule']}): {', '.join(missed)}")
    values = {"rule": section["rule"], "people": people, "and_patients": "/patients" * bool(people)}
    key, row = f"threshold-{rule}", report["bootstrap"]["row"]
    return make("threshold", note(report), rows, remarks, key=key, folded=rule == "f1", row=row, **values)


def _chosen(report):
    """What --calibrated applies to each label, and why."""
    fitted, rows = report["calibration"]["fitted"], []
    for name, found in fitted["chosen"].items():
        losses = [plain(found["log_loss"][method], 4) for method in ("none", "temperature", "platt")]
        rows.append([Cell(name, name), Cell(found["method"]), Cell(_on(fitted["labels"][name])), *losses,
                     Cell(found["why"], wide=True)])  # fmt: skip
    return make("calibration-chosen", note(report), rows, images=fitted["images"], row=report["bootstrap"]["row"])


def _calibration(report, stage, section):
    def maybe(found, right):
        return Cell(DASH) if found is None else figure(found)._replace(sort=abs(found["value"] - right))

    rows = []
    for name, c in section["labels"].items():
        cells = [Cell(DASH)] * 4
        if "ece" in c:
            cells = [maybe(c["slope"], 1), maybe(c["intercept"], 0), figure(c["brier"], 4), plain(c["ece"], 4)]
        rows.append([Cell(name, name), *cells])
    mean = section["mean"]
    rows.append([Cell(f"mean of {mean['labels']}"), Cell(""), Cell(""), plain(mean["brier"], 4), plain(mean["ece"], 4)])
    remarks, folded = label_remarks(section["labels"]), stage in ("temperature", "platt")
    key = f"calibration-{stage}"
    return make("calibration", note(report), rows, remarks, key=key, total=1, folded=folded, stage=STAGES[stage])


def _sensitivity(report):
    policies, names, whole = report["sensitivity"]["policies"], [], []
    for p in policies:
        uncertain, missing = (COUNTED[p[key]].removeprefix("counted as ") for key in ("uncertain", "missing"))
        names.append(f"uncertain {uncertain}, blank {missing}" + " (as used)" * p["as_used"])
        mean = p["mean"]
        means = [figure(mean["auroc"], line=True), figure(mean["auprc"]), count(mean.get("labels"))]
        whole.append([Cell(names[-1]), *means])
    rows = [[Cell(n, n), *(figure(p["labels"][n]["auroc"]) for p in policies)] for n in report["label_names"]]
    return [
        make("policies", note(report), whole, folded=True),
        make("policies-labels", note(report), rows, more=names, folded=True),
    ]


def _flow(report):
    cohort, splits = report["cohort"], report["cohort"]["splits"]
    rows = [[Cell(what), *(count(f.get(what)) for f in splits.values())] for what in ("patients", "studies", "images")]
    grouped = [found.get("groups", {}) for found in splits.values()]
    for v in dict.fromkeys(v for groups in grouped for v in groups):
        for g in dict.fromkeys(g for groups in grouped for g in groups.get(v, {})):
            found = [groups[v].get(g, {"images": 0, "share": 0.0}) if v in groups else None for groups in grouped]
            cells = [Cell(f"{n['images']:,} ({n['share']:.1%})", n["images"]) if n else Cell(DASH) for n in found]
            rows.append([Cell(f"{v}: {g or 'unknown'}"), *cells])
    left_out = [f"{n:,} left out: {reason}" for reason, n in cohort["left_out"].items() if n]
    rows_of = units(report["bootstrap"]["row"])
    left_out.append(cohort["skipped"] and f"{cohort['skipped']:,} test {rows_of} could not be read and do not count")
    left_out.append(cohort.get("note") or (not any(left_out) and "nothing was left out"))
    return make("flow", policy_text(report), rows, left_out, more=[SPLIT_NAMES[s] for s in splits])


def _prevalence(report):
    splits = {s: found["labels"] for s, found in report["cohort"]["splits"].items() if "labels" in found}

    def cell(c):
        rate = c["prevalence"] if c else None
        return Cell(DASH if rate is None else f"{c['positives']:,} of {c['known']:,} ({rate:.1%})", rate)

    rows = [[Cell(n, n), *(cell(found.get(n)) for found in splits.values())] for n in report["label_names"]]
    return make("prevalence", policy_text(report), rows, more=[SPLIT_NAMES[s] for s in splits])


def _label_values(report):
    """Uncertain and blank labels of each split, as in the label file; None where they are not recorded."""
    splits = {s: f.get("labels", {}) for s, f in report["cohort"]["splits"].items()}
    splits = {s: f for s, f in splits.items() if any("uncertain" in c for c in f.values())}
    rows = [
        [Cell(n, n), *(count(f.get(n, {}).get(kind)) for f in splits.values() for kind in ("uncertain", "blank"))]
        for n in report["label_names"]
        if splits
    ]
    more = [f"{SPLIT_NAMES[s]}: {kind}" for s in splits for kind in ("-1", "blank")]
    return make("label-values", policy_text(report), rows, more=more)


def _stated(report):
    """What only the authors know; what they did not state is a line to fill in."""
    stated = report["stated"]
    rows = [
        [Cell(what, what), Cell(stated.get(key, f"to fill in: {key} in report.py --about FILE.yaml"), wide=True)]
        for key, what in ASKED["about"].items()
    ]
    return make("stated", "", rows, folded=not stated, stated=len(stated), asked=len(rows))


def _study(report):
    """The table by study; None where that would repeat the one by image."""
    study = report["study"]
    if study["views"] == "all" and study["studies"] == report["bootstrap"]["images"]:
        return None
    frontal = ", frontal images only" * (study["views"] == "frontal")
    how = {"mean": "mean", "max": "largest"}[study["by"]]
    return _by_label(report, "study-labels", study, studies=study["studies"], how=how, frontal=frontal)


def sections(report):
    """[(anchor, title, [Table], reason where a part is left out or None)] in the order of the page.

    Those without tables and reason are charts of the page alone.
    """
    labels = [_by_label(report, "labels", report), _further_metrics(report), _mapping(report)]
    frequency = []
    if by_frequency := report["frequency"]:
        reason = by_frequency.get("left_out")
        frequency = [("frequency", "Labels by frequency", [] if reason else [_frequency(report)], reason)]
    found = [
        ("cohort", "Patients and images", [_flow(report), _prevalence(report), _label_values(report)], None),
        *frequency,
        ("labels", "Results per label", labels, None),
        ("curves", "Curves", [], None if report["curves"]["labels"] else NO_CLASSES),
    ]
    if "against" in report:
        others = [against(report, k + 1, other) for k, other in enumerate(report["against"].values())]
        found.append(("against", "Comparison", others, None))
    if "seeds" in report:
        found.append(("seeds", "Seeds", _seeds(report), None))
    points = report["thresholds"]
    tables = [] if "left_out" in points else [_thresholds(report, r, s) for r, s in points.items()]
    found.append(("thresholds", "Operating points", tables, points.get("left_out")))
    stages = report["calibration"]
    tables = [_chosen(report)] if "fitted" in stages else []
    tables += [_calibration(report, s, stages[s]) for s in STAGES if s in stages and "left_out" not in stages[s]]
    reason = stages.get("left_out") and f"after scaling: {stages['left_out']}"
    if "left_out" in stages.get("temperature", {}):
        reason = f"temperature scaling: {stages['temperature']['left_out']}"
    found.append(("calibration", "Calibration", tables, reason))
    found.append(("decision", "Decision curves", [], None if report["decisions"]["labels"] else NO_CLASSES))
    tables = [_group(report, k + 1, n, s) for k, (n, s) in enumerate(report["groups"].items()) if "left_out" not in s]
    tables += [_rates(report, k + 1, n, labels) for k, (n, labels) in enumerate(report["rates"].items())]
    reasons = [f"{n}: {s['left_out']}" for n, s in report["groups"].items() if "left_out" in s]
    found.append(("groups", "Subgroups", tables, "; ".join(reasons) or None))
    if "left_out" in report["study"]:
        found.append(("study", "By study", [], report["study"]["left_out"]))
    elif table := _study(report):
        found.append(("study", "By study", [table], None))
    other = report["sensitivity"]
    policies = [] if "left_out" in other else _sensitivity(report)
    methods = [[Cell(r["what"], r["what"]), Cell(r["text"], wide=True)] for r in report["methods"]]
    training = None if report["training"].get("epochs") else report["training"].get("left_out", "no epochs recorded")
    found += [
        ("sensitivity", "Other label policies", policies, other.get("left_out")),
        ("methods", "Methods", [make("methods", "", methods), _stated(report)], None),
        ("training", "Training", [], training),
        ("together", "Labels together", [], None),
        ("errors", "Worst errors", [], None if report["errors"] else "--no-images and --share list no images"),
    ]
    return [(key, title, [t for t in tables if t], reason) for key, title, tables, reason in found]


# ----------------------------------------------------------------------------------------- texts
def plain_text(table):
    """For the terminal: the title, the table in columns, and what is said of it."""
    shown = aligned([table.columns, *([c.text for c in row] for row in table.rows)], "  ")
    note = " ".join(filter(None, [table.common, table.note]))
    return "\n".join([table.title, shown, note, *(f"- {r}" for r in table.remarks)])


def headline(report):
    """The mean of the primary metric in one sentence; of average precision with the mean AUROC and F1 beside it."""
    primary, drawn = report["about"]["primary"], report["bootstrap"]
    mean = report["mean"][primary]
    tested = f"{drawn['images']:,} test {units(drawn['row'])}"
    if mean["value"] is None:
        return f"No label has both classes among the {tested}: there is no AUROC."
    patients = f" of {drawn['units']:,} patients" if drawn["unit"] == "patient" else ""
    between = f"95% CI {number(mean['low'])} to {number(mean['high'])}"
    between = mean.get("left_out", between)  # why there is none
    said = f"Mean {METRIC_NAMES[primary]} {number(mean['value'])} ({between}) over {report['mean']['labels']} labels"
    said += f" on {tested}{patients}"
    if primary == "auprc":
        f1 = ((report["frequency"] or {}).get("all") or {"f1": {"half": None}})["f1"]["half"]
        said += f"; mean AUROC {figure(report['mean']['auroc']).text}, mean F1 at 0.5 {number(f1)}"
    return f"{said}."


def title(report):
    """The model and the data."""
    about = report["about"]
    model = about["model"] or ("ensemble" if about["ensemble"] else about["name"])
    return f"{model} on {about['dataset']}" if about["dataset"] else model


def summary(report):
    """summary.md."""
    lead = md(headline(report))
    return fill("summary.md.j2", title=title(report), lead=lead, shared=note(report), sections=sections(report))


CSV_COLUMNS = ("label", "images", "positives", "positive_patients", "prevalence", "auroc", "auroc_low", "auroc_high",
               "auroc_se", "auroc_undefined_resamples", "auprc", "auprc_low", "auprc_high")  # fmt: skip


def per_label(report):
    """Rows of per_label.csv, in full precision; the last is the mean."""
    rows = []
    for name, found in [*report["labels"].items(), ("mean", report["mean"])]:
        a, p = found["auroc"], found["auprc"]
        counts = [found.get(c) for c in CSV_COLUMNS[1:5]]
        auroc = [a["value"], a["low"], a["high"], a.get("se"), a.get("undefined_resamples")]
        rows.append([name, *counts, *auroc, p["value"], p["low"], p["high"]])
    return rows
