"""Figures as lines of text, for the log and the terminal."""


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
    width = max(len(r[0]) for r in rows)
    lines = [r[0].ljust(width) + "".join(c.rjust(10) for c in r[1:]) for r in rows]
    return "\n".join([*lines, *undefined_note(metrics["auc"])])


def undefined_note(auc):
    """One line that names the labels without an AUROC, or none."""
    names = [name for name, value in auc.items() if value is None]
    return [f"no AUROC (one class only), left out of the mean: {', '.join(names)}"] if names else []
