"""Results a paper can print, from an evaluation or any table of predictions; no GPU, no model, no torch.

    python report.py results/mimic_cxr/evaluation_20260101_120000
    python report.py predictions.csv --validate predictions_validate.csv --groups patients.csv.gz --output report
    python report.py EVALUATION --against OTHER --seeds-of SEED_2 SEED_3
    python report.py A B C                   several in one report, into a folder comparison_<timestamp> or --output:
                                             models on the same images in pairs, other test sets side by side
    python report.py --runs OUTPUT           every training run below a folder: options that differ, scores, state

Writes report.html, report.json, per_label.csv, tables.tex, summary.md, model_card.md, checklist.md, calibration.json
(with predictions of the validation split) and figures/ beside the predictions, or into --output.
"""

from pathlib import Path

from analysis import classes, comparison, comparison_tables, tables
from analysis.card import read_about
from analysis.evaluation import check_apart, ensemble, new_evaluation, read_evaluation
from analysis.results import Options
from analysis.runs import write_runs
from analysis.writing import write_comparison, write_report
from common.errors import UserError, run_command
from config import Parser

FEWEST = 200  # resamples: five lie beyond each end of a 95% interval
# What belongs to the report of one evaluation -> what to do where several are given.
OF_ONE = {
    "against": "evaluations of the same images are compared with the first of them as they are; leave it out",
    "seeds_of": "make the report of the seeds from the first of them alone",
    "ensemble": "make the ensemble first, from one evaluation, and give its folder among the several",
    **dict.fromkeys(
        ["validate", "groups", "about", "study_by", "study_views", "sensitivity", "specificity", "no_images"],
        "make that evaluation's own report",
    ),
}


def parse_args(argv=None):
    parser = Parser(description="Tables, figures and one page of an evaluation.", allow_abbrev=False)
    add = parser.add_argument
    add(
        "evaluation",
        nargs="*",
        help="folder that main.py --eval wrote, or a CSV with subject_id, <label>_target, <label>_probability; several "
        "of the same images are compared in pairs, of other images set side by side",
    )
    add("--validate", metavar="CSV", help="predictions of the validation split, by which thresholds are chosen")
    add("--runs", metavar="OUTPUT", help="instead of evaluations: every training run below this folder at a glance")
    add("--output", metavar="FOLDER", help="where to write; otherwise beside the predictions, or into OUTPUT")
    add("--names", nargs="+", metavar="NAME", help="of several evaluations' models, in their order")
    add("--test-sets", nargs="+", metavar="NAME", help="of several evaluations' test sets, in their order")
    add("--against", nargs="+", default=[], metavar="OTHER", help="evaluations of the same images to compare with")
    add("--seeds-of", nargs="+", default=[], metavar="OTHER", help="evaluations of the same configuration, other seeds")
    add("--ensemble", nargs="+", default=[], metavar="OTHER", help="average with these into an evaluation of its own")
    add("--groups", nargs="+", default=[], metavar="CSV", help="tables by subject_id, study_id, dicom_id or path")
    add("--study-by", choices=["mean", "max"], default="mean", help="a study's probability from its images'")
    add("--study-views", choices=["all", "frontal"], default="all", help="which images of a study count")
    add("--sensitivity", type=float, default=0.9, help="of the operating point of fixed sensitivity")
    add("--specificity", type=float, default=0.9, help="of the operating point of fixed specificity")
    add("--resamples", type=int, default=2000, help="of the bootstrap")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--about", metavar="YAML", help="what only the authors know (analysis/reporting.yaml lists the keys)")
    add("--no-images", action="store_true", help="the worst errors, their images and ids, are left out")
    add("--share", action="store_true", help="a report to pass on: no images, ids or paths; by default into share/")
    args = parser.parse_args(argv)
    if args.resamples < FEWEST:
        raise UserError(f"--resamples is {args.resamples}; 95% intervals need at least {FEWEST}")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must be at least 0")
    for name in ("sensitivity", "specificity"):
        if not 0 < getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must lie between 0 and 1")
    given = len(args.evaluation)
    if (given > 0) == (args.runs is not None):
        both = "--runs OUTPUT lists runs and takes no evaluation" if given else "name an evaluation, or --runs OUTPUT"
        raise UserError(f"{given} evaluations are given: {both}")
    for name, value in vars(args).items() if args.runs is not None else ():
        if name not in ("evaluation", "runs", "output") and value != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} has no effect with --runs; leave it out")
    for name, remedy in OF_ONE.items():
        if given > 1 and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} is for one evaluation, and {given} are given; {remedy}")
    for flag, names in (("--names", args.names), ("--test-sets", args.test_sets)):
        if names and given == 1:
            raise UserError(f"{flag} is for several evaluations, and one is given; leave it out")
        if names and len(names) != given:
            raise UserError(f"{flag} has {len(names)} for {given} evaluations; give one for each")
        for path, name in zip(args.evaluation, names or ()):
            if not name.strip():
                raise UserError(f"{flag}: the name of {path} is blank")
    return args


def report_one(args, evaluation, folder, options):
    """The report of one evaluation, or of the ensemble it is part of."""
    if args.ensemble:
        others = [read_evaluation(path) for path in args.ensemble]
        check_apart("--ensemble", [evaluation, *others])
        folder = folder or new_evaluation(evaluation.folder.parent)
        _check_free(folder, [evaluation, *others], "the ensemble's evaluations")
        evaluation = ensemble([evaluation, *others], folder)
    against, seeds = ([read_evaluation(path) for path in paths] for paths in (args.against, args.seeds_of))
    folder = folder or evaluation.folder / ("share" if args.share else "")
    stated = read_about(args.about) if args.about else {}
    how = {"with_images": not args.no_images, "share": args.share, "stated": stated}
    report = write_report(evaluation, options, folder, against, seeds, **how)
    print(tables.headline(report))
    return folder


def report_several(args, evaluations, folder, options):
    """One report of several evaluations."""
    if folder:
        _check_free(folder, evaluations, "the evaluations")
    report = comparison.collect(evaluations, options, args.names, args.test_sets)
    folder = folder or new_evaluation(evaluations[0].path.resolve().parent, "comparison")
    write_comparison(report, folder, evaluations, args.share)
    print(comparison_tables.printed(report))
    return folder


def _check_free(folder, evaluations, what):
    if folder.resolve() in [e.folder.resolve() for e in evaluations]:
        raise UserError(f"--output {folder} is one of {what}; choose another folder")


def main(argv=None):
    args = parse_args(argv)
    if args.runs is not None:
        folder, text = write_runs(args.runs, args.output)
        print(f"{text}\nruns in {folder / 'runs.html'}")
        return
    folder = Path(args.output).expanduser() if args.output else None
    if len(args.evaluation) == 1 and classes.is_evaluation(args.evaluation[0]):
        print(classes.write_report(args.evaluation[0], folder))
        return
    evaluations = [read_evaluation(path, args.validate) for path in args.evaluation]
    options = Options(
        resamples=args.resamples, seed=args.seed, study_by=args.study_by, study_views=args.study_views,
        sensitivity=args.sensitivity, specificity=args.specificity, tables=tuple(args.groups),
    )  # fmt: skip
    if len(evaluations) > 1:
        folder = report_several(args, evaluations, folder, options)
    else:
        folder = report_one(args, evaluations[0], folder, options)
    print(f"report in {folder / 'report.html'}")


if __name__ == "__main__":
    run_command(main)
