"""Results a paper can print, from an evaluation or any table of predictions; no GPU, no model, no torch.

    python report.py results/mimic_cxr/evaluation_20260101_120000
    python report.py predictions.csv --validate predictions_validate.csv --groups patients.csv.gz --output report
    python report.py EVALUATION --against OTHER --seeds-of SEED_2 SEED_3

Writes report.html, report.json, per_label.csv, tables.tex, summary.md, model_card.md, calibration.json (with
predictions of the validation split) and figures/ beside the predictions, or into --output.
"""

from pathlib import Path

from analysis import tables
from analysis.evaluation import ensemble, new_evaluation, read_evaluation
from analysis.results import Options
from analysis.writing import write_report
from config import Parser
from errors import UserError, run_command


def parse_args(argv=None):
    parser = Parser(description="Tables, figures and one page of an evaluation.", allow_abbrev=False)
    add = parser.add_argument
    add(
        "evaluation",
        help="folder that main.py --eval wrote, or a CSV with subject_id, <label>_target, <label>_probability",
    )
    add("--validate", metavar="CSV", help="predictions of the validation split, by which thresholds are chosen")
    add("--output", metavar="FOLDER", help="where to write; otherwise beside the predictions")
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
    add("--no-images", action="store_true", help="no thumbnails in the page")
    args = parser.parse_args(argv)
    if args.resamples < 1:
        raise UserError(f"--resamples is {args.resamples}; it must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must be at least 0")
    for name in ("sensitivity", "specificity"):
        if not 0 < getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must lie between 0 and 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    evaluation = read_evaluation(args.evaluation, args.validate)
    folder = Path(args.output).expanduser() if args.output else None
    if args.ensemble:
        others = [read_evaluation(path) for path in args.ensemble]
        folder = folder or new_evaluation(evaluation.folder.parent)
        if folder.resolve() in [e.folder.resolve() for e in (evaluation, *others)]:
            raise UserError(f"--output {folder} is one of the ensemble's evaluations; choose another folder")
        evaluation = ensemble([evaluation, *others], folder)
    options = Options(
        resamples=args.resamples, seed=args.seed, study_by=args.study_by, study_views=args.study_views,
        sensitivity=args.sensitivity, specificity=args.specificity, tables=tuple(args.groups),
    )  # fmt: skip
    against, seeds = ([read_evaluation(path) for path in paths] for paths in (args.against, args.seeds_of))
    folder = folder or evaluation.folder
    report = write_report(evaluation, options, folder, against, seeds, not args.no_images)
    print(tables.headline(report))
    print(f"report in {folder / 'report.html'}")


if __name__ == "__main__":
    run_command(main)
