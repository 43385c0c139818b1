"""Images/s from file to normalised tensor [3, 224, 224], beside the naive path, in one run.

    python benchmarks/loading.py [--images 24] [--workers 2]

The images are made up (synthetic chests enlarged to 2544 x 3056 with noise of a detector), as full-size JPG (quality
95), as DICOM (12 of 16 bits, uncompressed, one window), and as copies of prepare_mimic.py with short side 512.
Naive: the whole file decoded, float64 arithmetic, Pillow's resize of the full image, tensors one by one.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torchvision_shim  # noqa: F401, I001  (before torchvision)

import numpy as np
import pandas as pd
import PIL
import pydicom
import torch
from PIL import Image
from pydicom.pixels import apply_voi_lut

from dataset import cache, synthetic
from dataset.labels import LABELS
from dataset.mimic_cxr import MIMICCXRDataset
from dataset.transforms import radiograph_transform

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
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", pydicom.uid.generate_uid()
    ds.PhotometricInterpretation, ds.SamplesPerPixel = "MONOCHROME2", 1
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth, ds.PixelData = 2000, 3600, pixels.tobytes()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


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


def ours(folder, kind, in_zip=False):
    from config import get_config

    args = argparse.Namespace(cfg=str(Path(__file__).parents[1] / "configs/internimage_b_mimic_cxr_224.yaml"))
    transform = radiograph_transform(get_config(args), train=False)
    return MIMICCXRDataset(folder / kind, "test", transform, mode="L", in_zip=in_zip, shrink_to=512)


def rate(dataset, workers, repeats=5):
    """Median images/s of whole passes after one to warm up."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=8,
        num_workers=workers,
        persistent_workers=workers > 0,
        sampler=list(range(len(dataset))) * 2,
    )
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for _ in loader:
            pass
        seconds.append(time.perf_counter() - started)
    return 2 * len(dataset) / statistics.median(seconds[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "")
    print(f"{name or platform.processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, "
          f"Python {platform.python_version()}, torch {torch.__version__}, pillow {PIL.__version__}, "
          f"pydicom {pydicom.__version__}; {args.images} images of 2544 x 3056, medians of 5\n")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_trees(folder, args.images)
        naive_jpg, naive_dicom = Naive(folder, "jpg"), Naive(folder, "dcm")
        rows = (
            ("full-size JPG", ours(folder, "jpg"), naive_jpg),
            ("full-size DICOM", ours(folder, "dcm"), naive_dicom),
            ("copy of 512 pixels, files", ours(folder, "copy"), naive_jpg),
            ("copy of 512 pixels, zip", ours(folder, "zip", in_zip=True), naive_jpg),
        )
        for index, (what, dataset, naive) in enumerate(rows[:2]):
            difference = (dataset[0][0] - naive[0]).abs().mean() * 0.226 * 255
            print(f"{what}: mean difference from the naive path {difference:.2f} of 255" + "\n" * index)
        print("| images/s | naive, 1 process | ours, 1 process | ratio | ours, "
              f"{args.workers} workers | naive |\n| --- | --- | --- | --- | --- | --- |")  # fmt: skip
        for what, dataset, naive in rows:
            slow, fast = rate(naive, 0), rate(dataset, 0)
            many, naive_many = rate(dataset, args.workers), rate(naive, args.workers)
            print(
                f"| {what} | {slow:.1f} | {fast:.1f} | {fast / slow:.1f} | {many:.1f} | {naive_many:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
