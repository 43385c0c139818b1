"""The report's dictionary as tables of text: the page, tables.tex, summary.md and the model card print the same."""

from dataclasses import dataclass, field
from typing import NamedTuple

from analysis import statistics

STAGES = {"before": "as predicted", "temperature": "after temperature scaling", "platt": "after Platt scaling"}
SPLIT_NAMES = {"train": "train", "validate": "validation", "test": "test"}
COUNTED = {
    "zeros": "counted as negative", "ones": "counted as positive", "ignore": "left out", "smooth": "left out",
}  # fmt: skip
DASH = "–"


class Cell(NamedTuple):
    """text; what it sorts by; (value, low, high) where the page draws the interval as a line."""

    text: str
    sort: float | str | None = None
    line: tuple | None = None


@dataclass
class Table:
    """key: its anchor; note: what holds for all of it; remarks: of single rows; total: the last rows stay the last."""

    key: str
    title: str
    note: str
    columns: list
    rows: list
    remarks: list = field(default_factory=list)
    total: int = 0


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
    """'0.812 (0.790–0.830)'."""
    value, low, high = found["value"], found["low"], found["high"]
    if value is None:
        return Cell(DASH, None)
    return Cell(
        number(value, digits) + _between(low, high, digits),
        value,
        (value, low, high) if line and low is not None else None,
    )


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


def unit_text(report):
    b = report["bootstrap"]
    if b["unit"] == "patient":
        return f"95% intervals: bootstrap over {b['units']:,} patients, {b['resamples']:,} resamples."
    return (
        f"95% intervals: bootstrap over {b['units']:,} images, {b['resamples']:,} resamples; the predictions have no "
        "subject_id, and where a patient has several images these intervals are too narrow."
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
    rows = []
    for label in report["label_names"]:
        m, images = mapping[label], report["labels"][label]["images"]
        rows.append([Cell(label), Cell(", ".join(m["from"]) or DASH), Cell(KINDS[m["kind"]]), count(images)])
    exact = sum(m["kind"] == "exact" for m in mapping.values())
    text = f"{exact} of {len(rows)} labels are the same in {report['about']['dataset']}. {policy_text(report)}"
    return Table("mapping", "Labels of the model in these data", text, ["label", "from", "meaning", "known"], rows)


def label_remarks(labels):
    """'Fracture: one class only' of every label that has something to be said."""
    said = {}
    for name, found in labels.items():
        for key in ("left_out", "warning"):
            if key in found:
                said.setdefault(found[key], []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in said.items()]


# ----------------------------------------------------------------------------------------- tables
def _by_label(report, key, title, section):
    """AUROC and average precision by label, of the report itself and of its level of studies."""
    unit = report["bootstrap"]["unit"]
    columns = ["label", "AUROC (95% CI)", "SE", "AUPRC (95% CI)", "positive", "of known", "prevalence"]
    columns += ["positive patients"] * (unit == "patient")
    columns += ["resamples without"]

    def row(name, found, counts):
        undefined = found["auroc"]["undefined_resamples"] if found["auroc"]["value"] is not None else None
        return [
            Cell(name, name), figure(found["auroc"], line=True), plain(found["auroc"].get("se"), 4),
            figure(found["auprc"]), *counts, count(undefined),
        ]  # fmt: skip

    rows = []
    for name, found in section["labels"].items():
        counts = [count(found["positives"]), count(found["images"]), share(found["prevalence"])]
        counts += [count(found["positive_patients"])] * (unit == "patient")
        rows.append(row(name, found, counts))
    if section["mean"]["auroc"]["value"] is not None:
        rows.append(row(f"mean of {section['mean']['labels']}", section["mean"], [Cell("")] * (len(columns) - 5)))
    return Table(key, title, note(report), columns, rows, label_remarks(section["labels"]), total=1)


def against(report, k, other):
    columns = ["label", "this", "other", "difference (95% CI)", "p", "p (Holm)"]
    rows = []
    for name, d in other["labels"].items():
        this = report["labels"][name]["auroc"]["value"]
        rows.append(
            [Cell(name, name), plain(this), plain(d.get("other")), signed(d), p_value(d["p"]), p_value(d["p_holm"])]
        )
    mean = other["mean"]
    theirs = mean["other"]["value"] if "other" in mean else None
    rows.append([
        Cell("mean AUROC (the primary test)"), plain(report["mean"]["auroc"]["value"]), plain(theirs), signed(mean),
        p_value(mean["p"]), Cell(""),
    ])  # fmt: skip
    text = (
        f"{note(report)} Difference: this evaluation minus {other['name']}, on the same images. By label: p of "
        "Obuchowski's paired test clustered by patient, and Holm's adjustment over the labels; of the mean: p of the "
        "paired bootstrap."
    )
    return Table(
        f"against-{k}", f"Compared with {other['name']}", text, columns, rows, label_remarks(other["labels"]), total=1
    )


def _seeds(report):
    seeds = report["seeds"]
    runs = [[Cell(r["name"], r["name"]), plain(r["seed"], 0), figure(r["auroc"], line=True)] for r in seeds["runs"]]

    def spread(found):
        return [plain(found["mean"]), plain(found["sd"], 4)]

    labels = [
        [Cell(n, n), *spread(found), figure(report["labels"][n]["auroc"], line=True)]
        for n, found in seeds["labels"].items()
    ]
    labels.append([Cell("mean AUROC"), *spread(seeds["mean"]), figure(report["mean"]["auroc"], line=True)])
    text = (
        f"{note(report)} The deviation between the {len(runs)} runs is that of training alone; the interval within one "
        "is that of the test patients."
    )
    return [
        Table("seeds", "Runs of the same configuration", text, ["run", "seed", "mean AUROC (95% CI)"], runs),
        Table(
            "seeds-labels", "Between the runs and within one", text,
            ["label", "mean of the runs", "SD between runs", "this run (95% CI)"], labels, total=1,
        ),
    ]  # fmt: skip


def _group(report, name, section):
    groups, gap = section["groups"], section["gap"]
    columns = ["label"]
    for g, found in groups.items():
        people = f", {found['patients']:,} patients" if found["patients"] is not None else ""
        columns.append(f"{g} ({found['images']:,} images{people})")
    columns.append("largest gap (95% CI)")

    def gap_cell(found):
        if found["value"] is None:
            return Cell(DASH, None)
        cell = figure(found)
        return Cell(f"{cell.text} {found['best']} over {found['worst']}", found["value"])

    def cell(found):
        """AUROC, and how many positive images and patients it rests on; marked where they are too few."""
        if found["auroc"]["value"] is None:
            return Cell(DASH, None)
        patients = found["positive_patients"]
        rests = f" [{found['positives']:,}" + (f"/{patients:,}]" if patients is not None else "]")
        return Cell(figure(found["auroc"]).text + rests + (" *" if "warning" in found else ""), found["auroc"]["value"])

    rows = [
        [Cell(n, n), *(cell(found["labels"][n]) for found in groups.values()), gap_cell(gap["labels"][n])]
        for n in report["label_names"]
    ]
    if section["mean_of"]:
        rows.append([
            Cell(f"mean of {len(section['mean_of'])}"), *(figure(found["mean"]["auroc"]) for found in groups.values()),
            gap_cell(gap["mean"]),
        ])  # fmt: skip
    unit = report["bootstrap"]["unit"]
    text = (
        f"{note(report)} AUROC; in brackets the positive images{' and patients' if unit == 'patient' else ''}. The gap "
        "is that of the two groups found furthest apart, so its interval says how sure their difference is, not that "
        f"the choice was made beforehand. * fewer than {statistics.FEW} {unit}s of a class: too few to judge, and not "
        "counted in the gap."
    )
    remarks = [f"{g}: {found['warning']}" for g, found in groups.items() if "warning" in found]
    if section["unknown"]:
        remarks.append(f"{section['unknown']:,} images of unknown {name} are in no group")
    if section["mean_of"]:
        remarks.append(f"the mean is over the labels that every group can judge: {', '.join(section['mean_of'])}")
    return Table(
        f"group-{name.replace(' ', '-')}", f"By {name}", text, columns, rows, remarks, int(bool(section["mean_of"]))
    )


def _thresholds(report, rule, section):
    columns = ["label", "threshold", "TP", "FP", "FN", "TN", "sensitivity", "specificity", "PPV", "NPV"]
    rows = []
    for name, t in section["labels"].items():
        if t["threshold"] is None:
            rows.append([Cell(name, name), *[Cell(DASH)] * 9])
            continue
        rates = [figure(t[rate]) for rate in ("sensitivity", "specificity", "ppv", "npv")]
        rows.append(
            [Cell(name, name), plain(t["threshold"], 4), *(count(t[k]) for k in ("tp", "fp", "fn", "tn")), *rates]
        )
    text = (
        f"{note(report)} Thresholds chosen on the validation split ({section['rule']}) and applied to the test split."
    )
    remarks = label_remarks(section["labels"])
    return Table(f"threshold-{rule}", f"Operating points: {section['rule']}", text, columns, rows, remarks)


def _calibration(report, stage, section):
    columns = ["label", "slope (95% CI)", "intercept (95% CI)", "Brier (95% CI)", "ECE"]

    def maybe(found):
        return Cell(DASH) if found is None else figure(found)

    rows = []
    for name, c in section["labels"].items():
        if "ece" in c:
            cells = [maybe(c["slope"]), maybe(c["intercept"]), figure(c["brier"], 4), plain(c["ece"], 4)]
        else:
            cells = [Cell(DASH)] * 4
        rows.append([Cell(name, name), *cells])
    mean = section["mean"]
    rows.append([Cell(f"mean of {mean['labels']}"), Cell(""), Cell(""), plain(mean["brier"], 4), plain(mean["ece"], 4)])
    text = (
        f"{note(report)} Slope 1 and intercept 0 are right: a slope below 1 means probabilities too extreme, an "
        "intercept below 0 too high (slope held at 1). Their intervals are clustered by the same unit. ECE: 15 bins of "
        "equal width."
    )
    return Table(
        f"calibration-{stage}", f"Calibration {STAGES[stage]}", text, columns, rows, label_remarks(section["labels"]), 1
    )


def _policy_name(p):
    uncertain, missing = (COUNTED[p[key]].removeprefix("counted as ") for key in ("uncertain", "missing"))
    return f"uncertain {uncertain}, blank {missing}"


def _sensitivity(report):
    policies = report["sensitivity"]["policies"]
    used = {True: " (as used)", False: ""}
    whole = [
        [
            Cell(_policy_name(p) + used[p["as_used"]]),
            figure(p["mean"]["auroc"], line=True),
            figure(p["mean"]["auprc"]),
            count(p["mean"].get("labels")),
        ]
        for p in policies
    ]
    rows = [[Cell(n, n), *(figure(p["labels"][n]["auroc"]) for p in policies)] for n in report["label_names"]]
    text = (
        f"The same test under other readings of uncertain and blank labels; the rest of this report: "
        f"{policy_text(report)} {unit_text(report)}"
    )
    return [
        Table("policies", "Other label policies", text,
              ["policy", "mean AUROC (95% CI)", "mean AUPRC (95% CI)", "labels in the mean"], whole),
        Table("policies-labels", "Other label policies by label: AUROC", text,
              ["label", *(_policy_name(p) + used[p["as_used"]] for p in policies)], rows),
    ]  # fmt: skip


def _flow(report):
    splits = report["cohort"]["splits"]
    columns = ["", *(SPLIT_NAMES[s] for s in splits)]
    rows = [
        [Cell(what), *(count(found.get(what)) for found in splits.values())]
        for what in ("patients", "studies", "images")
    ]
    variables = dict.fromkeys(v for found in splits.values() for v in found.get("groups", {}))
    for v in variables:
        for g in dict.fromkeys(g for found in splits.values() for g in found.get("groups", {}).get(v, {})):
            cells = []
            for found in splits.values():
                groups = found.get("groups", {}).get(v)
                if groups is None:
                    cells.append(Cell(DASH))
                else:
                    n = groups.get(g, {"images": 0, "share": 0.0})
                    cells.append(Cell(f"{n['images']:,} ({n['share']:.1%})", n["images"]))
            rows.append([Cell(f"{v}: {g or 'unknown'}"), *cells])
    left_out = [f"{n:,} left out: {reason}" for reason, n in report["cohort"]["left_out"].items() if n]
    if report["cohort"]["skipped"]:
        left_out.append(f"{report['cohort']['skipped']:,} test images could not be read and do not count")
    if "note" in report["cohort"]:
        left_out.append(report["cohort"]["note"])
    text = f"{policy_text(report)} View, sex and age count images."
    return Table("flow", "Patients, studies, images", text, columns, rows, left_out or ["nothing was left out"])


def _prevalence(report):
    splits = {s: found for s, found in report["cohort"]["splits"].items() if "labels" in found}
    rows = []
    for name in report["label_names"]:
        cells = []
        for found in splits.values():
            c = found["labels"].get(name)
            rate = c["prevalence"] if c else None
            cells.append(Cell(DASH if rate is None else f"{c['positives']:,} of {c['known']:,} ({rate:.1%})", rate))
        rows.append([Cell(name, name), *cells])
    return Table(
        "prevalence",
        "Positive images by split",
        policy_text(report),
        ["label", *(SPLIT_NAMES[s] for s in splits)],
        rows,
    )


def sections(report):
    """[(anchor, title, [Table], reason where a part is left out or None)] in the order of the report."""
    found = [("labels", "Results by label", [_by_label(report, "labels", "Test split, by image", report)], None)]
    if mapping := _mapping(report):
        found.append(("mapping", "Labels compared", [mapping], None))
    if "against" in report:
        others = [against(report, k + 1, other) for k, other in enumerate(report["against"].values())]
        found.append(("against", "Comparison", others, None))
    if "seeds" in report:
        found.append(("seeds", "Seeds", _seeds(report), None))
    study = report["study"]
    if "left_out" in study:
        found.append(("study", "By study", [], study["left_out"]))
    else:
        frontal = ", frontal images only" if study["views"] == "frontal" else ""
        how = {"mean": "mean", "max": "largest"}[study["by"]]
        title = f"Test split, by study ({study['studies']:,}; {how} of its images{frontal})"
        found.append(("study", "By study", [_by_label(report, "study-labels", title, study)], None))
    tables = [_group(report, n, s) for n, s in report["groups"].items() if "left_out" not in s]
    reasons = [f"{n}: {s['left_out']}" for n, s in report["groups"].items() if "left_out" in s]
    found.append(("groups", "Subgroups", tables, "; ".join(reasons) or None))
    points = report["thresholds"]
    tables = [] if "left_out" in points else [_thresholds(report, r, s) for r, s in points.items()]
    found.append(("thresholds", "Operating points", tables, points.get("left_out")))
    stages = report["calibration"]
    tables = [_calibration(report, s, stages[s]) for s in STAGES if s in stages and "left_out" not in stages[s]]
    reason = stages.get("left_out") and f"after scaling: {stages['left_out']}"
    if "left_out" in stages.get("temperature", {}):
        reason = f"temperature scaling: {stages['temperature']['left_out']}"
    found.append(("calibration", "Calibration", tables, reason))
    other = report["sensitivity"]
    found.append(
        (
            "sensitivity",
            "Other label policies",
            [] if "left_out" in other else _sensitivity(report),
            other.get("left_out"),
        )
    )
    found.append(("cohort", "Flow and cohort", [_flow(report), _prevalence(report)], None))
    return found


# ------------------------------------------------------------------------------------ LaTeX, Markdown
_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        DASH: "--", "†": r"$^\dagger$"}  # fmt: skip


def tex(text):
    return "".join(_TEX.get(c, c) for c in text)


def latex(tables):
    """All tables for a paper, none wider than its text; needs \\usepackage{booktabs,adjustbox}."""
    parts = ["% Made by report.py. In the preamble: \\usepackage{booktabs,adjustbox}"]
    for t in tables:
        body = [" & ".join(tex(c.text) for c in row) + r" \\" for row in t.rows]
        if t.total:
            body.insert(len(body) - t.total, r"\midrule")
        remarks = "".join(" " + tex(r) + "." for r in t.remarks)
        parts.append("\n".join([
            r"\begin{table}", r"\centering\small", rf"\caption{{{tex(t.title)}. {tex(t.note)}{remarks}}}",
            rf"\label{{tab:{t.key}}}", r"\begin{adjustbox}{max width=\linewidth}",
            rf"\begin{{tabular}}{{l{'r' * (len(t.columns) - 1)}}}", r"\toprule",
            " & ".join(tex(c) for c in t.columns) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
            r"\end{adjustbox}", r"\end{table}",
        ]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def markdown(table):
    def line(cells):
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = "|---" + "|---:" * (len(table.columns) - 1) + "|"
    rows = [line(c.text for c in row) for row in table.rows]
    remarks = [f"- {r}" for r in table.remarks]
    return "\n".join(
        [
            f"### {table.title}",
            "",
            line(table.columns),
            rule,
            *rows,
            "",
            table.note,
            *([""] if remarks else []),
            *remarks,
        ]
    )


def plain_text(table):
    """For the terminal: the title, the table in columns, and what is said of it."""
    lines = [table.columns, *([c.text for c in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    shown = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([table.title, *shown, table.note, *(f"- {r}" for r in table.remarks)])


def headline(report):
    """The mean AUROC in one sentence."""
    mean, unit = report["mean"]["auroc"], report["bootstrap"]
    if mean["value"] is None:
        return f"No label has both classes among the {unit['images']:,} test images: there is no AUROC."
    units = "" if unit["unit"] == "image" else f" of {unit['units']:,} patients"
    return (
        f"Mean AUROC {number(mean['value'])} (95% CI {number(mean['low'])} to {number(mean['high'])}) over "
        f"{report['mean']['labels']} labels on {unit['images']:,} test images{units}."
    )


def summary(report):
    """summary.md."""
    parts = [f"# {report['about']['name']}", headline(report)]
    for _, title, tables, reason in sections(report):
        parts.append(f"## {title}")
        parts += [f"Left out: {reason}."] if reason else []
        parts += [markdown(t) for t in tables]
    return "\n\n".join(parts) + "\n"


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
