"""How long a start on NIH ChestX-ray14 takes at its full size, with made-up rows and empty files as images.

python benchmarks/full_nih.py           112,120 rows, images in twelve folders as they are downloaded
python benchmarks/full_nih.py --one     images in one folder
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataset import nih
from dataset.files import stores
from dataset.xrays import RadiographDataset

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
# Of the release: (patients, images) of train_val_list.txt and of test_list.txt, none of them in both.
TRAIN, TEST = (28_008, 86_524), (2_797, 25_596)


def write_tables(root, seed=0):
    """The three tables of a release of that size, made up; returns the names of its images."""
    rng = np.random.default_rng(seed)
    patients = rng.permutation(np.arange(1, TRAIN[0] + TEST[0] + 1))
    names, lines = {}, []
    for split, some, count in (("train", patients[: TRAIN[0]], TRAIN[1]), ("test", patients[TRAIN[0] :], TEST[1])):
        more = rng.multinomial(count - len(some), rng.dirichlet(np.full(len(some), 0.5)))
        rows = [(patient, k) for patient, n in zip(some.tolist(), more.tolist()) for k in range(n + 1)]
        names[split] = [f"{patient:08d}_{k:03d}.png" for patient, k in rows]
        found = [[] for _ in rows]
        for row, column in np.argwhere(rng.random((count, len(nih.FINDINGS))) < 0.06).tolist():
            found[row].append(nih.FINDINGS[column])
        for (patient, k), name, here in zip(rows, names[split], found):
            person = f"{patient},{20 + k % 60},{'FM'[k % 2]},{('PA', 'AP')[k % 2]}"
            lines.append(f"{name},{'|'.join(here) or nih.NORMAL},{k},{person},2500,2048,0.1,0.1")
    (root / "Data_Entry_2017.csv").write_text("\n".join([HEADER, *sorted(lines)]) + "\n")
    (root / "train_val_list.txt").write_text("\n".join(names["train"]))
    (root / "test_list.txt").write_text("\n".join(names["test"]))
    return sorted(names["train"] + names["test"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", action="store_true", help="one folder instead of twelve")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = write_tables(root)
        for k, part in enumerate([images] if args.one else np.array_split(images, 12)):
            place = root / ("images" if args.one else f"images_{k + 1:03d}/images")
            place.mkdir(parents=True)
            for name in part:
                (place / name).touch()
        looked, missing = [0], stores.FileStore.missing

        def counted(store, paths):
            looked[0] += len(paths)
            return missing(store, paths)

        stores.FileStore.missing = counted
        started, cpu = time.perf_counter(), time.process_time()
        table = nih.load_table(root)
        read = time.perf_counter() - started
        datasets = [RadiographDataset(table, split) for split in ("train", "validate", "test")]
        whole = time.perf_counter() - started
        print(datasets[0].summary)
        print(
            f"tables read and checked in {read:.1f} s, {looked[0]:,} files looked for; datasets there after "
            f"{whole:.1f} s, {time.process_time() - cpu:.1f} s of them computing"
        )


if __name__ == "__main__":
    main()
