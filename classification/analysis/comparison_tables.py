"""The dictionary of analysis.comparison as tables: of models on a test set, and of labels by test set."""

from dataclasses import replace
from math import floor, log10

from analysis import tables
from analysis.tables import DASH, Cell, count, figure, make, p_value, policy_text, signed, unit_text
from analysis.templates import fill, md
from config import units

APPROXIMATE = "†"
PRINTED = ("overview", "models", "labels")  # sections that the terminal shows; the page has all


def columns(report):
    """Every evaluation as (test set, model, its section), test set by test set."""
    return [(s, m, found) for s, part in report["sets"].items() for m, found in part["models"].items()]


def by_label_groups(report):
    """What is set side by side: [(model, columns)], a model on its test sets; ("", all) where no model has several."""
    everything = columns(report)
    of_model = [(m, [c for c in everything if c[1] == m]) for m in report["models"]]
    if max(len(found) for _, found in of_model) > 1:
        return of_model
    return [("", everything)]


def headings(report, chosen):
    """What tells columns apart: --names, else the test sets, else the models, else both."""
    sets, models = ([c[k] for c in chosen] for k in (0, 1))
    for names, wanted in ((models, report["named"]), (sets, True), (models, True)):
        if wanted and len(set(names)) == len(chosen):
            return names
    return [f"{s}, {m}" for s, m in zip(sets, models)]


# ------------------------------------------------------------------------------------------ notes
def _listed(pairs):
    """'a, b: text; c: other text' of (name, text), or nothing."""
    said = {}
    for name, text in pairs:
        if text:
            said.setdefault(text, {})[name] = None
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in said.items())


def approximate(found):
    """The labels of one evaluation that are another data set's nearest."""
    return {n: kind for n, kind in found["label_mapping"].items() if kind.get("kind") == "approximate"}


def _marked(names, sections):
    """Names of labels, with a dagger those that are approximate in any of the sections."""
    marked = {n for found in sections for n in approximate(found)}
    return ", ".join(n + APPROXIMATE * (n in marked) for n in names)


def _approximate_remark(names, sections, labels):
    """'† approximate label: nih: Lung Lesion from Mass or Nodule', or nothing."""

    def sources(found):
        kinds = approximate(found).items()
        return ", ".join(f"{n} from {' or '.join(kind.get('from', []))}" for n, kind in kinds if n in labels)

    said = _listed((name, sources(found)) for name, found in zip(names, sections))
    return f"{APPROXIMATE} approximate label: {said}" if said else ""


def _note(sections):
    """Label policy and intervals, as far as they are the same for all."""
    policies, units = ({text(found) for found in sections} for text in (policy_text, unit_text))
    if len(units) > 1:
        resamples = sections[0]["bootstrap"]["resamples"]
        units = [f"95% intervals: bootstrap over the patients of each test set, {resamples:,} resamples."]
    return " ".join([*policies, *units] if len(policies) == 1 else units)


def _remarks(names, sections, labels):
    """What has to be said of single columns or rows, some of it empty; labels: those that the table shows."""

    def each(text):
        return _listed((name, text(found)) for name, found in zip(names, sections))

    def unlike(what, text):
        values = [text(found) for found in sections]
        if len(set(values)) == 1:
            return ""
        shown = _listed((name, value or "not recorded") for name, value in zip(names, values))
        return f"{what} {'differs' if all(values) else 'not known of all'}: {shown}"

    def without_patients(found):
        drawn = found["bootstrap"]
        text = f"no subject_id: {units(drawn['row'])} were drawn, too narrow where a patient has several"
        return text * (drawn["unit"] != "patient")

    def policy(found):
        return found["policy"] and policy_text(found).removeprefix("Labels: ").removesuffix(".")

    def external(found):
        trained, tested = found["about"]["trained_on"], found["about"]["tested_on"]
        known = trained and tested != [None] and not set(tested) & set(trained)
        return f"external, the model was trained on {', '.join(trained)}" if known else ""

    def unknown(found):
        return ", ".join(n for n, label in found["labels"].items() if not label["images"])

    def label_remarks(found):
        return "; ".join(tables.label_remarks({n: f for n, f in found["labels"].items() if f["images"]}))

    return [
        unlike("label policy", policy),
        unlike("image domain", lambda found: found["about"]["domain"]),
        unlike("image size", lambda found: found["about"]["image_size"] and f"{found['about']['image_size']} px"),
        _approximate_remark(names, sections, labels),
        each(external),
        (listed := each(unknown)) and f"not known: {listed}",
        each(label_remarks),
        each(without_patients) if len({unit_text(found) for found in sections}) > 1 else "",
        each(lambda found: found["bootstrap"].get("warning", "")),
        (warned := each(lambda found: ", ".join(found["about"]["warnings"]))) and f"Warning: {warned}",
    ]


# ----------------------------------------------------------------------------------------- tables
def significant(value, unit=1):
    """Three significant digits: 97.5, 0.0123, 1,204."""
    if not value:
        return Cell(DASH if value is None else "0", value)
    shown = value / unit
    return Cell(f"{shown:,.{max(0, 2 - floor(log10(abs(shown))))}f}", value)


def _by_precision(sections):
    """Whether the average precision is the primary metric of one of them."""
    return any(found["about"]["primary"] == "auprc" for found in sections)


def _models(name, part, k):
    """The table of a paper: the models on one test set, and their differences to the first."""
    rows, several = [], len(part["differences"]) > 1
    precise = _by_precision(part["models"].values())
    for model, found in part["models"].items():
        cost = found["cost"]
        cells = [
            Cell(model, model), Cell(cost["backbone"] or DASH, cost["backbone"]),
            significant(cost["parameters"], 1e6), significant(cost["gmacs"]), significant(cost["images_per_s"]),
            figure(found["mean"]["auroc"], line=True),
        ]  # fmt: skip
        d = part["differences"].get(model, {}).get("mean")
        cells += [signed(d), p_value(d["p"])] if d else [Cell(DASH), Cell(DASH)]
        cells += [p_value(d["p_holm"]) if d else Cell(DASH)] * several
        cells += [figure(found["mean"]["auprc"], line=True)] * precise
        rows.append(cells)
    names, sections = list(part["models"]), list(part["models"].values())
    labels = [n for n, found in sections[0]["labels"].items() if found["auroc"]["value"] is not None]
    values = {
        "images": part["images"], "count": len(labels), "labels": _marked(labels, sections) or "none has both classes",
        "first": part["first"], "units": units(sections[0]["bootstrap"]["unit"]),
        "row": sections[0]["bootstrap"]["row"],
        "adjusted": ", then adjusted by Holm over the models" * several,
    }  # fmt: skip
    speeds = [(m, f["cost"]["device"] or "device not recorded") for m, f in part["models"].items()
              if f["cost"]["images_per_s"] is not None]  # fmt: skip
    rates = f"images/s: {speeds[0][1]}" if speeds else ""
    if len({device for _, device in speeds}) > 1:
        rates = f"Warning: images/s do not compare, they were not measured alike: {_listed(speeds)}"
    lacking = _listed((m, ", ".join(found)) for m, found in part["left_out_labels"].items())
    lacking = lacking and f"left out, since not every model has them: {lacking}"
    remarks = [rates, *_remarks(names, sections, labels), lacking]
    more = ["p (Holm)"] * several + ["mean AUPRC (95% CI)"] * precise
    return make("models", _note(sections), rows, remarks, key=f"models-{k}", more=more, name=name, **values)


def _by_label(report, model, chosen, k):
    """Labels by test set (or model), and the mean over the labels that all evaluations of the report know."""
    names, sections, common = headings(report, chosen), [c[2] for c in chosen], report["common_labels"]

    def cell(found, label):
        if label not in found["labels"] or not found["labels"][label]["images"]:
            return Cell(DASH)
        c = figure(found["labels"][label]["auroc"], line=True)
        return c._replace(text=c.text + APPROXIMATE * (label in approximate(found)))

    labels = list(dict.fromkeys(n for found in sections for n in found["labels"]))
    rows = [[Cell(n, n), *(cell(found, n) for found in sections)] for n in labels]
    total = [[Cell(f"mean of the {len(common)} common"), *(figure(f["mean_common"]["auroc"], line=True)
                                                          for f in sections)]]  # fmt: skip
    if any(found["mean"].get("labels", 0) != len(common) for found in sections):
        own = [(figure(found["mean"]["auroc"]).text, found["mean"].get("labels", 0)) for found in sections]
        total.append([Cell("mean of its own [labels]"), *(Cell(f"{text} [{n}]") for text, n in own)])
    total.append([Cell("images"), *(count(found["bootstrap"]["images"]) for found in sections)])
    patients = [f["bootstrap"]["units"] if f["bootstrap"]["unit"] == "patient" else None for f in sections]
    total.append([Cell("patients"), *(count(n) for n in patients)])
    everything = [c[2] for c in columns(report)]
    values = {
        "title": f"AUROC of {model} by label" if model else "AUROC by label",
        "of_all": " of this report" * (len(chosen) < len(everything)), "common": _marked(common, everything) or "none",
    }  # fmt: skip
    remarks, sets, models = _remarks(names, sections, labels), *([c[k] for c in chosen] for k in (0, 1))
    absent = _listed((name, ", ".join(n for n in labels if n not in f["labels"])) for name, f in zip(names, sections))
    remarks.append(absent and f"not among its labels: {absent}")
    if len(set(models)) > 1 and names != models:
        remarks.append(f"the models differ: {_listed(zip(names, models))}")
    if len(set(sets)) > 1 and names == models:
        remarks.append(f"test sets: {_listed(zip(names, sets))}")
    key = f"labels-{k}"
    return make("of-models", _note(sections), rows + total, remarks, key=key, more=names, total=len(total), **values)


def _overview(report):
    """Models by test sets: the mean over the common labels."""
    sets, everything = list(report["sets"]), columns(report)
    found = {(s, m): part["mean_common"]["auroc"] for s, m, part in everything}
    rows = [
        [Cell(m, m), *(figure(found[s, m], line=True) if (s, m) in found else Cell(DASH) for s in sets)]
        for m in report["models"]
    ]
    sections, common = [c[2] for c in everything], report["common_labels"]
    remark = _approximate_remark([c[0] for c in everything], sections, common)
    values = {"count": len(common), "common": _marked(common, sections) or "none"}
    return make("overview", _note(sections), rows, [remark], more=sets, **values)


def _differences(part, k):
    """Of every model after the first, by label."""
    for j, (model, other) in enumerate(part["differences"].items()):
        title = f"{model} compared with {part['first']}"
        yield replace(tables.against(part["models"][model], 1, other), key=f"against-{k}-{j + 1}", title=title)


def panels(report):
    """For figures.write_forest: the columns of the tables by label."""
    return [
        (model, list(zip(headings(report, chosen), (found for _, _, found in chosen))))
        for model, chosen in by_label_groups(report)
    ]


def sections(report):
    """[(anchor, title, [Table], None)], as tables.sections."""
    parts = [(k + 1, s, part) for k, (s, part) in enumerate(report["sets"].items()) if part["differences"]]
    groups = enumerate(by_label_groups(report))
    found = [
        ("overview", "Overview", [_overview(report)] if len(report["models"]) > 1 and len(report["sets"]) > 1 else []),
        ("models", "Models on the same images", [_models(s, part, k) for k, s, part in parts]),
        ("labels", "By label", [_by_label(report, *group, k + 1) for k, group in groups]),
        ("against", "Differences by label", [t for k, _, part in parts for t in _differences(part, k)]),
    ]
    return [(*section, None) for section in found if section[2]]


def headline(report):
    """Sentences: each model's means over the common labels, and the differences on each test set."""
    common = len(report["common_labels"])
    said = []
    for model in report["models"]:
        own = [(s, part["models"][model]) for s, part in report["sets"].items() if model in part["models"]]
        for key in ["auprc"] * _by_precision(found for _, found in own) + ["auroc"]:
            means = ", ".join(f"{figure(found['mean_common'][key]).text} on {s}" for s, found in own)
            said.append(f"{model}: mean {tables.METRIC_NAMES[key]} over {common} common labels {means}.")
    for s, part in report["sets"].items():
        for model, d in part["differences"].items():
            p, holm = (f"= {p_value(d['mean'].get(key)).text}".replace("= <", "<") for key in ("p", "p_holm"))
            holm = f", by Holm {holm}" * (len(part["differences"]) > 1)
            said.append(f"On {s}, {model} minus {part['first']}: {signed(d['mean']).text}, p {p}{holm}.")
    return said


def printed(report):
    """For the terminal."""
    shown = [t for key, _, found, _ in sections(report) if key in PRINTED for t in found]
    return "\n\n".join(tables.plain_text(t) for t in shown)


def summary(report):
    """summary.md."""
    found, lead = sections(report), "\n".join(f"- {md(line)}" for line in headline(report))
    values = {"title": title(report), "lead": lead, "shared": tables.shared_note(found), "sections": found}
    return fill("summary.md.j2", **values)


def title(report):
    models, sets = list(report["models"]), list(report["sets"])
    named = ", ".join(models) if len(models) < 4 else f"{len(models)} models"
    return f"{named} on {', '.join(sets) if len(sets) < 4 else f'{len(sets)} test sets'}"


def per_label(report):
    """Rows of per_label.csv, its head first: those of single reports with test set and model before them."""
    rows = [("set", "model", *tables.CSV_COLUMNS)]
    for s, m, found in columns(report):
        rows += [[s, m, *row] for row in tables.per_label(found)]
    return rows


def facts(report):
    """What was evaluated, as [(name, text)]."""
    rows = []
    for s, part in report["sets"].items():
        drawn = next(iter(part["models"].values()))["bootstrap"]
        patients = f" of {drawn['units']:,} patients" if drawn["unit"] == "patient" else ""
        rows.append((s, f"{part['images']:,} test {units(drawn['row'])}{patients}"))
    for m, found in report["models"].items():
        rows.append((m, ", ".join([*found["given"], *filter(None, [found["checkpoint"]])])))
    rows.append(("Common labels", _marked(report["common_labels"], [c[2] for c in columns(report)]) or "none"))
    rows.append(("Bootstrap", f"{report['resamples']:,} resamples, seed {report['seed']}"))
    return rows
