"""Images/s from file to normalised tensor [3, 224, 224], beside the naive path, in one run.

    python benchmarks/loading.py [--images 24] [--workers 2]

The images are made up (synthetic chests enlarged to 2544 x 3056 with noise of a detector), as full-size JPG (quality
95), as DICOM (12 of 16 bits, uncompressed, one window), and as copies of prepare_mimic.py with short side 512.
With --table, instead: seconds to read a made-up table of 377,110 rows, and the memory that three epochs of it add to a
worker. With --nih: seconds to start on NIH ChestX-ray14, 112,120 made-up rows and empty files in twelve folders.
Naive: the whole file decoded, float64 arithmetic, Pillow's resize of the full image, tensors one by one.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common.torchvision_shim  # noqa: F401, I001  (before torchvision)

import numpy as np
import pandas as pd
import PIL
import pydicom
import torch
from PIL import Image
from pydicom.pixels import apply_voi_lut

from dataset.tools import cache
from dataset.files import stores
from dataset import nih, xrays
from dataset.synthetic import tree as synthetic
from dataset.synthetic.files import header, put_pixels
from dataset.labels import LABELS
from dataset.mimic_cxr import MIMICCXRDataset, load_table, image_stems
from dataset.preparing import normalize
from dataset.transforms import radiograph_transform
from models.inference import device_name

SIDE, MEAN, STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_trees(folder, count):
    """The same images as full-size JPG and DICOM trees with tables of their own, and as small copies."""
    synthetic.write_tree(folder / "drawn", patients=12, size=320, progress=False)
    drawn = sorted((folder / "drawn").rglob("*.jpg"))
    rng = np.random.default_rng(0)
    for kind in ("jpg", "dcm"):
        (folder / kind).mkdir()
        table = pd.DataFrame({"path": [f"{k}.{kind}" for k in range(count)], "split": "test"})
        table[list(LABELS)] = 0
        table.to_csv(folder / kind / "images.csv", index=False)
    for k in range(count):
        with Image.open(drawn[k % len(drawn)]) as image:
            large = np.asarray(image.convert("L").resize((2544, 3056), Image.Resampling.BICUBIC), np.float32)
        large = (large * 14 + 200 + rng.normal(0, 12, large.shape)).clip(0, 4095).astype(np.uint16)
        Image.fromarray((large // 16).astype(np.uint8)).save(folder / "jpg" / f"{k}.jpg", quality=95)
        write_dicom(folder / "dcm" / f"{k}.dcm", large)
    for name, in_zip in (("copy", False), ("zip", True)):
        cache.make_copy(folder / "jpg", folder / name, in_zip=in_zip, log=lambda _: None)


def write_dicom(path, pixels):
    ds = header(path.stem, path.stem)
    ds.WindowCenter, ds.WindowWidth = 2000, 3600
    put_pixels(ds, pixels, inverse=False, bits=12)
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.save_as(path, enforce_file_format=True)


class Naive(torch.utils.data.Dataset):
    """What a first script does."""

    def __init__(self, folder, kind):
        self.paths = sorted((folder / kind).glob(f"*.{kind}"), key=lambda p: int(p.stem))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        if self.paths[index].suffix == ".dcm":
            ds = pydicom.dcmread(self.paths[index])
            values = apply_voi_lut(ds.pixel_array, ds)
            grey = ((values - values.min()) / (values.max() - values.min()) * 255).astype(np.uint8)
            image = Image.fromarray(grey).convert("RGB")
        else:
            image = Image.open(self.paths[index]).convert("RGB")
        values = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64) / 255
        return torch.from_numpy((values - MEAN) / STD).permute(2, 0, 1).float()


def ours(folder, kind, **store):
    from config import get_config

    args = argparse.Namespace(cfg=str(Path(__file__).parents[1] / "configs/internimage_b_mimic_cxr_224.yaml"))
    transform = radiograph_transform(get_config(args), train=False)
    return MIMICCXRDataset(folder / kind, "test", transform, mode="L", shrink_to=512, **store)


def rate(dataset, workers, repeats=5):
    """Median images/s of whole passes after one to warm up."""
    twice = list(range(len(dataset))) * 2
    loader = torch.utils.data.DataLoader(dataset, 8, sampler=twice, num_workers=workers, persistent_workers=workers > 0)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for batch in loader:
            if isinstance(batch, list):  # ours: uint8 until the batch is normalised, as main.py does on the device
                normalize(batch[0], MEAN, STD)
        seconds.append(time.perf_counter() - started)
    return 2 * len(dataset) / statistics.median(seconds[1:])


def measure_table(folder):
    """Start-up and a worker's memory with a table as large as MIMIC-CXR's; few of its images are there."""
    rng = np.random.default_rng(0)
    count, studies = 377_110, 227_835
    study = np.sort(rng.integers(0, studies, count))
    patient = np.arange(studies) * 65_379 // studies
    frame = pd.DataFrame({"subject_id": 10_000_000 + patient[study], "study_id": 50_000_000 + study})
    digits = rng.integers(0, 16**8, (count, 5))
    frame["dicom_id"] = ["-".join(f"{d:08x}" for d in row) for row in digits]
    validate, test = frame["subject_id"] % 130 == 0, frame["subject_id"] % 200 == 1
    frame["split"] = np.select([validate, test], ["validate", "test"], "train")
    frame.to_csv(folder / "mimic-cxr-2.0.0-split.csv.gz", index=False)
    labels = pd.DataFrame({"subject_id": 10_000_000 + patient, "study_id": 50_000_000 + np.arange(studies)})
    for name in LABELS:
        labels[name] = rng.choice([1, 0, -1, np.nan], studies, p=[0.1, 0.1, 0.02, 0.78])
    labels.to_csv(folder / "mimic-cxr-2.0.0-chexpert.csv.gz", index=False)
    step = np.unique(np.concatenate([np.linspace(0, count - 1, n).astype(int) for n in (20, stores.CHECKED_FILES)]))
    for stem in image_stems(frame.iloc[step]):
        path = folder / f"{stem}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    started = time.perf_counter()
    table = load_table(folder).with_targets()
    train, validate = (xrays.RadiographDataset(table, split) for split in ("train", "validate"))
    seconds = time.perf_counter() - started
    print(f"{len(train):,} and {len(validate):,} images: tables read and checked in {seconds:.1f} s")
    train.store.read = lambda path: b""
    xrays.decode = lambda data, name, **options: np.zeros((1, 1), np.uint8)
    train.transform = lambda image: None
    growth = multiprocessing.get_context("fork").SimpleQueue()
    worker = multiprocessing.get_context("fork").Process(target=read_epochs, args=(train, growth))
    worker.start()
    sizes = ", ".join(f"{kb / 1e3:.1f}" for kb in growth.get())
    print(f"memory of a worker's own after each of three epochs: {sizes} MB")
    worker.join()


# Of NIH ChestX-ray14: (patients, images) of train_val_list.txt and of test_list.txt, none of them in both.
NIH = {"train": (28_008, 86_524), "test": (2_797, 25_596)}


def write_nih_tables(root):
    """The three tables of NIH ChestX-ray14 at its full size, made up; returns the paths of its images."""
    rng, parts, first = np.random.default_rng(0), [], 1
    for split, (patients, images) in NIH.items():
        counts = 1 + rng.multinomial(images - patients, rng.dirichlet(np.full(patients, 0.5)))
        parts.append(pd.DataFrame({"patient": np.repeat(np.arange(patients) + first, counts), "split": split}))
        first += patients
    rows = pd.concat(parts, ignore_index=True).assign(view="PA", age=50, sex="F", Rows=2048, Columns=2500)
    rows = rows.assign(study_seed=rows.index, **{label: rng.random(len(rows)) < 0.06 for label in LABELS})
    rows, written = synthetic.LAYOUTS["nih"].write(rows, "png")
    for name, table in written.items():
        synthetic.write_table(root / name, table)
    return rows["file"]


def measure_nih(folder):
    """Start-up on NIH ChestX-ray14, its images in twelve folders as they are downloaded."""
    for path in map(folder.joinpath, write_nih_tables(folder)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    looked, missing = [], stores.FileStore.missing
    stores.FileStore.missing = lambda store, paths: looked.append(len(paths)) or missing(store, paths)
    started = time.perf_counter()
    table = nih.load_table(folder)
    read = time.perf_counter() - started
    datasets = [xrays.RadiographDataset(table, split) for split in ("train", "validate", "test")]
    whole = time.perf_counter() - started
    print(
        f"{datasets[0].summary}\ntables read and checked in {read:.1f} s, {sum(looked):,} files looked for; datasets "
        f"of the three splits there after {whole:.1f} s"
    )


def read_epochs(dataset, growth):
    sizes = []
    for _ in range(3):
        for k in np.random.permutation(len(dataset)):
            dataset[k]
        with open("/proc/self/smaps_rollup") as file:
            sizes.append(sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty")))
    growth.put(sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="measure the table instead")
    parser.add_argument("--nih", action="store_true", help="measure the start on NIH ChestX-ray14 instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, "
          f"Python {platform.python_version()}, torch {torch.__version__}, pillow {PIL.__version__}, "
          f"pydicom {pydicom.__version__}; {args.images} images of 2544 x 3056, medians of 5\n")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.table or args.nih:
            return measure_table(folder) if args.table else measure_nih(folder)
        make_trees(folder, args.images)
        naive_jpg, naive_dicom = Naive(folder, "jpg"), Naive(folder, "dcm")
        rows = (
            ("full-size JPG", ours(folder, "jpg"), naive_jpg),
            ("full-size DICOM", ours(folder, "dcm"), naive_dicom),
            ("copy of 512 pixels, files", ours(folder, "copy"), naive_jpg),
            ("copy of 512 pixels, zip", ours(folder, "zip", in_zip=True), naive_jpg),
            ("copy of 512 pixels, memory", ours(folder, "copy", on_memory=True), naive_jpg),
        )
        for index, (what, dataset, naive) in enumerate(rows[:2]):
            difference = (normalize(dataset[0][0][None], MEAN, STD)[0] - naive[0]).abs().mean() * 0.226 * 255
            print(f"{what}: mean difference from the naive path {difference:.2f} of 255" + "\n" * index)
        print("| images/s | naive, 1 process | ours, 1 process | ratio | ours, "
              f"{args.workers} workers | naive |\n| --- | --- | --- | --- | --- | --- |")  # fmt: skip
        for what, dataset, naive in rows:
            slow, fast = rate(naive, 0), rate(dataset, 0)
            cells = slow, fast, fast / slow, rate(dataset, args.workers), rate(naive, args.workers)
            print(f"| {what} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
