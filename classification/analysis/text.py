"""Figures as lines of text, for the log and the terminal."""


def number(value):
    """Four decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"


def auc_table(metrics):
    """Lines of label, AUROC, average precision and counts; a dash where one class is missing."""
    rows = [("label", "AUROC", "AP", "positive", "negative")]
    rows += [
        (name, number(auc), number(metrics["average_precision"][name]),
         f"{metrics['positives'][name]:,}", f"{metrics['negatives'][name]:,}")
        for name, auc in metrics["auc"].items()
    ]  # fmt: skip
    rows.append(("mean", number(metrics["mean_auc"]), number(metrics["mean_average_precision"]), "", ""))
    width = max(len(r[0]) for r in rows)
    lines = [r[0].ljust(width) + "".join(c.rjust(10) for c in r[1:]) for r in rows]
    return "\n".join([*lines, *undefined_note(metrics["auc"])])


def undefined_note(auc):
    """One line that names the labels without an AUROC, or none."""
    names = [name for name, value in auc.items() if value is None]
    return [f"no AUROC (one class only), left out of the mean: {', '.join(names)}"] if names else []
