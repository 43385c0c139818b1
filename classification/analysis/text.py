"""Figures as lines of text, for the log and the terminal."""

from dataset.tables import aligned


def number(value):
    """Four decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"


def label_table(metrics, columns):
    """Lines of label, figures and counts; a dash where one class is missing.

    metrics: for each name of `columns` (name -> heading) the values by label and `mean_<name>`; positives, negatives.
    """
    rows = [("label", *columns.values(), "positive", "negative")]
    for label, positives in metrics["positives"].items():
        figures = [number(metrics[name][label]) for name in columns]
        rows.append((label, *figures, f"{positives:,}", f"{metrics['negatives'][label]:,}"))
    rows.append(("mean", *(number(metrics[f"mean_{name}"]) for name in columns), "", ""))
    name, column = next(iter(columns.items()))
    return "\n".join([aligned(rows), *undefined_note(metrics[name], column)])


def undefined_note(values, column):
    """One line that names the labels without a value of a metric, or none; column: its heading."""
    names = [name for name, value in values.items() if value is None]
    return [f"no {column} (one class only), left out of the mean: {', '.join(names)}"] if names else []


def short_names(names):
    """Names of runs or folders without the parts, between slashes, that all begin or all end with."""
    parts = [name.split("/") for name in names]
    for end in (0, -1):
        while len(set(names)) > 1 and all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1:
            parts = [p[1:] if end == 0 else p[:-1] for p in parts]
    return ["/".join(p) for p in parts]
