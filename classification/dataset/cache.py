"""A small copy of a MIMIC-CXR tree: grey JPEGs that decode forty times faster. Runs without torch.

The copy reads as a MIMIC-CXR-JPG release, by any tool. It can be stopped at any point and built again:
an image, or with zip a shard, gets its name only when it is whole, and the same tree always gives the
same bytes.
"""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pandas as pd
import PIL
from PIL import Image
from tqdm import tqdm

from dataset import tables
from dataset.images import ImageError, decode
from dataset.stores import FileStore
from errors import UserError

SHARD_IMAGES = 10_000  # about 600 MB at 512 pixels: 38 shards for the whole of MIMIC-CXR
RECIPE, BAD = "recipe.json", "bad_images.csv"


def small_jpeg(data, name, *, size, quality, dicom_recipe):
    """Bytes of an image file -> bytes of a grey JPEG whose short side is at most `size` pixels.

    Raises:
        ImageError: the image cannot be read.
    """
    image = Image.fromarray(decode(data, name, recipe=dicom_recipe))
    scale = size / min(image.size)
    if scale < 1:  # never made larger
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _replace(path, write):
    """`path` as `write(temporary path)` makes it: there at once and whole, or not at all."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _encode(path, root, options):
    """(path, JPEG or None, fault)."""
    try:
        return path, small_jpeg(FileStore(root).read(path), str(root / path), **options), None
    except ImageError as error:
        return path, None, str(error)


def _encode_to_file(path, root, target, options):
    path, jpeg, fault = _encode(path, root, options)
    if fault is None:
        _replace(target / _jpg(path), lambda temporary: temporary.write_bytes(jpeg))
    return path, None, fault


def _jpg(path):
    return Path(path).with_suffix(".jpg").as_posix()


def _quiet():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _same_recipe(out, recipe):
    """Records the recipe of a new copy; raises where the folder holds one of another recipe, or other files."""
    path = out / RECIPE
    if path.exists():
        there = json.loads(path.read_text())
        other = [f"{key} {there.get(key)!r}, now {recipe[key]!r}" for key in recipe if there.get(key) != recipe[key]]
        if other:
            raise UserError(f"{path}: the copy there was made with {'; '.join(other)}; use another --output")
    elif any(out.iterdir()):
        raise UserError(f"--output {out} is not empty and holds no {RECIPE}; choose a new folder")
    else:
        _replace(path, lambda temporary: temporary.write_text(json.dumps(recipe, indent=2) + "\n"))


def _copy_tables(root, table, out):
    """The CSV files beside the images; a table of the user's own with its paths as they are in the copy."""
    _, folders = tables.find_folders(Path(root).absolute())
    if table.sources[0].startswith("mimic-cxr-"):
        for folder in folders:
            for source in sorted(folder.glob("mimic-cxr-*.csv*")):
                if not (out / source.name).exists():
                    _replace(out / source.name, functools.partial(shutil.copyfile, source))
        return
    frame = pd.read_csv(table.root / table.sources[0], dtype=object, encoding="utf-8-sig")
    frame["path"] = frame["path"].map(_jpg)
    _replace(out / "images.csv", lambda temporary: frame.to_csv(temporary, index=False))


def _write_shard(path, images, skip_bad):
    """A zip of (path, JPEG, fault) triples, stored uncompressed; not written where an image is bad, unless skip_bad."""
    temporary = path.with_name(path.name + ".part")  # not .zip: a reader must not take it for a shard
    faults = {}
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, jpeg, fault in images:
            if fault:
                faults[name] = fault
            else:  # ZipInfo's own date, 1980: the same tree gives the same bytes
                archive.writestr(zipfile.ZipInfo(_jpg(name)), jpeg)
    if faults and not skip_bad:
        temporary.unlink()
    else:
        _replace(path, lambda _: None)
    return faults


def make_copy(
    root, out, *, size=512, quality=95, in_zip=False, dicom_recipe="window", skip_bad=False, workers=None, log=print
):
    """Makes or completes the copy of the tree `root` in `out`; returns {path: fault} of its bad images.

    Args:
        size: short side in pixels; smaller images keep theirs.
        quality: of the JPEGs, 1 to 100.
        in_zip: a few uncompressed zip files instead of a file an image, for `main.py --zip`.
        dicom_recipe: see :data:`dataset.dicom.RECIPES`.
        skip_bad: finish shards without the images that cannot be read.

    Raises:
        UserError: bad tables, or `out` holds something else.
    """
    out = Path(out).absolute()
    table = tables.load_table(root)
    if out == table.root or table.root in out.parents or out in table.root.parents:
        raise UserError(f"--output {out} and the data in {table.root} lie in each other; choose a folder apart")
    paths = sorted(p.decode() for p in table.path)
    outside = [p for p in paths if Path(p).is_absolute() or ".." in Path(p).parts]
    if outside:
        raise UserError(f"{table.sources[0]}: {outside[0]} leads out of {table.root}; only a tree of its own is copied")
    out.mkdir(parents=True, exist_ok=True)
    recipe = {
        "source": str(table.root),
        "size": size,
        "quality": quality,
        "zip": in_zip,
        "dicom_recipe": dicom_recipe,
        "images": len(paths),
        "pillow": PIL.__version__,
    }
    _same_recipe(out, recipe)
    options = {"size": size, "quality": quality, "dicom_recipe": dicom_recipe}
    started, done, faults = time.time(), 0, {}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(multiprocessing.get_context("fork").Pool(workers, initializer=_quiet))
        bar = stack.enter_context(tqdm(total=len(paths), unit="image", smoothing=0.05))

        def counted(results):
            nonlocal done
            for result in results:
                done += 1
                bar.update()
                yield result

        if in_zip:
            encode = functools.partial(_encode, root=table.root, options=options)
            for start in range(0, len(paths), SHARD_IMAGES):
                shard = out / f"images_{start // SHARD_IMAGES:04d}.zip"
                part = paths[start : start + SHARD_IMAGES]
                if shard.exists():
                    bar.update(len(part))
                    continue
                faults |= _write_shard(shard, counted(pool.imap(encode, part, chunksize=4)), skip_bad)
        else:
            todo = [p for p in paths if not (out / _jpg(p)).exists()]
            bar.update(len(paths) - len(todo))
            for folder in sorted({(out / p).parent for p in todo}):
                folder.mkdir(parents=True, exist_ok=True)
            encode = functools.partial(_encode_to_file, root=table.root, target=out, options=options)
            faults = {
                path: fault for path, _, fault in counted(pool.imap_unordered(encode, todo, chunksize=4)) if fault
            }
    _copy_tables(root, table, out)
    seconds = time.time() - started
    log(f"{done:,} images in {seconds:.1f} s ({done / seconds:.1f} images/s), {len(paths) - done:,} were there; {out}")
    (out / BAD).unlink(missing_ok=True)
    if faults:
        pd.DataFrame(sorted(faults.items()), columns=["path", "fault"]).to_csv(out / BAD, index=False)
    return faults
