"""Looks a tree of X-rays over, and makes the small copy that training reads fast. Runs without torch.

python prepare_mimic.py audit --data-path TREE --output FOLDER     # what is wrong with it, in one table
python prepare_mimic.py build --data-path TREE --output CACHE      # short side 512, grey; --zip for few large files
python prepare_mimic.py labels --data-path TREE                    # what training learns of it by default
"""

import argparse
import os
import sys
from pathlib import Path

from common.errors import UserError
from config import Parser
from dataset.files.dicom import RECIPES
from dataset.files.images import ENDINGS
from dataset.tools import audit as auditing
from dataset.tools import cache
from dataset.tools.readers import find_reader


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    audit = commands.add_parser("audit", help="compare the images with the CSV files and read every one")
    build = commands.add_parser("build", help="make, or go on making, the small copy")
    labels = commands.add_parser("labels", help="print the labels that training learns by default, one a line")
    for command in (audit, build, labels):
        command.add_argument("--data-path", required=True, help="the folder that holds files/ and the CSV files")
        command.add_argument("--dataset", default="mimic_cxr", help="a file in dataset/, as DATA.DATASET (mimic_cxr)")
        command.add_argument("--csv", default="", help="a table of your own instead of the official ones, as DATA.CSV")
        command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all CPUs)")
    for command in (audit, build):
        images = {"default": argparse.SUPPRESS, "help": "of CXR-LT, if not beside its tables: as DATA.IMAGES"}
        command.add_argument("--images", metavar="FOLDER", **images)
        command.add_argument("--image-format", choices=("auto", *ENDINGS), default="auto", help="as DATA.IMAGE_FORMAT")
    audit.add_argument("--output", default="audit", help="folder for audit.csv and audit.txt (audit)")
    build.add_argument("--output", required=True, help="folder of the copy")
    build.add_argument("--size", type=int, default=512, help="short side in pixels (512)")
    build.add_argument("--quality", type=int, default=95, help="JPEG quality, 1 to 100 (95)")
    build.add_argument("--zip", dest="in_zip", action="store_true", help="uncompressed zip files, for main.py --zip")
    build.add_argument("--dicom-recipe", choices=RECIPES, default="window", help="as DATA.DICOM_RECIPE (window)")
    build.add_argument("--allow-missing", action="store_true", help="copy the images that are there of a partial tree")
    build.add_argument("--skip-bad", action="store_true", help="finish without the images that cannot be read")
    return parser.parse_args(argv)


def main(argv=None):
    """Run one command line; returns the exit status: 1 where something is wrong with the tree."""
    args = parse_args(argv)
    if args.command == "labels":
        print(*find_reader(args.dataset).learned_labels(args.data_path, args.csv), sep="\n")
        return 0
    for name, least, most in (("workers", 1, 1024), ("size", 8, 100_000), ("quality", 1, 100)):
        if not least <= getattr(args, name, least) <= most:
            raise UserError(f"--{name} is {getattr(args, name)}; it must lie between {least} and {most}")
    options = {key: value for key, value in vars(args).items() if key not in ("command", "data_path", "output")}
    if "images" in options and "images" not in find_reader(args.dataset).options:
        raise UserError(f"--images is for --dataset cxr_lt; the images of {args.dataset} are looked for in --data-path")
    try:
        if args.command == "audit":
            return 1 if len(auditing.audit(args.data_path, args.output, **options)) else 0
        faults = cache.make_copy(args.data_path, args.output, **options)
    except OSError as error:  # of a disk that is full, say, while the work goes on
        raise UserError(f"{error.filename or args.output}: {error.strerror}; mend it and run again") from error
    if faults:
        path, fault = next(iter(faults.items()))
        print(f"{len(faults)} images cannot be read, all in {Path(args.output) / cache.BAD}; the first: {fault}")
        print("replace them and run again; or run with --skip-bad, and train with DATA.ALLOW_MISSING True")
    return 1 if faults and not args.skip_bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
