"""A small copy of a release: grey JPEGs, of which many times more a second are read. Runs without torch.

The copy reads as the release itself (of MIMIC-CXR as MIMIC-CXR-JPG, by any tool). It can be stopped at any point and
built again: an image, or with zip a shard, gets its name only when it is whole, and the same tree always gives the
same bytes.
"""

import contextlib
import functools
import io
import itertools
import json
import shutil
import time
import zipfile
from pathlib import Path

import pandas as pd
import PIL
from PIL import Image

from common.errors import UserError
from common.files import replacing, write_whole
from common.folders import output_folder
from dataset.files.domain import COPY_RECIPE, copied_name, image_domain
from dataset.files.images import ImageError, decode, take_warnings
from dataset.files.stores import FileStore
from dataset.tools.processes import in_processes
from dataset.tools.readers import find_reader

SHARD_IMAGES = 10_000  # about 600 MB at 512 pixels: 38 shards for the whole of MIMIC-CXR
BAD = "bad_images.csv"


def small_jpeg(data, name, *, size, quality, dicom_recipe):
    """Bytes of an image file -> bytes of a grey JPEG whose short side is at most `size` pixels.

    ImageError: the image cannot be read.
    """
    image = Image.fromarray(decode(data, name, recipe=dicom_recipe))
    scale = size / min(image.size)
    if scale < 1:  # never made larger
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _encode(path, root, options):
    """(path, JPEG or None, fault or None)."""
    try:
        return path, small_jpeg(FileStore(root).read(path), str(root / path), **options), None
    except ImageError as error:
        return path, None, str(error)


def _encode_to_file(path, root, target, options):
    """(path, fault or None)."""
    path, jpeg, fault = _encode(path, root, options)
    if fault is None:
        with replacing(target / copied_name(path)) as temporary:
            temporary.write_bytes(jpeg)
    return path, fault


def _same_recipe(out, recipe):
    """Records the recipe of a new copy; raises where the folder holds one of another recipe, or other files."""
    path = out / COPY_RECIPE
    if path.exists():
        there = json.loads(path.read_text())
        unlike = {key: value for key, value in recipe.items() if there.get(key, value) != value}
        if other := [f"{key} {there[key]!r}, now {value!r}" for key, value in unlike.items()]:
            raise UserError(f"{path}: the copy there was made with {'; '.join(other)}; use another --output")
    elif any(out.iterdir()):
        raise UserError(f"--output {out} is not empty and holds no {COPY_RECIPE}; choose a new folder")
    else:
        write_whole(path, json.dumps(recipe, indent=2) + "\n")


def _copy_tables(sources, out):
    """The tables beside the images, {path in the copy: file, or a frame whose paths become those of the copy}."""
    for name, source in sources.items():
        if isinstance(source, pd.DataFrame):
            frame = source.assign(path=source["path"].str.strip().map(copied_name))
            write_whole(out / name, frame.to_csv(index=False))
        elif not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            with replacing(out / name) as temporary:
                shutil.copyfile(source, temporary)


class _Incomplete(Exception):
    """A shard with bad images is not kept."""


def _write_shard(path, images, skip_bad):
    """A zip, stored uncompressed, of what :func:`_encode` returns. If some images are bad: without them, or not at all.

    Returns (path, fault or None) of each image.
    """
    faults = {}
    with contextlib.suppress(_Incomplete), replacing(path) as temporary:  # not .zip: a reader must not take it for one
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name, jpeg, fault in images:
                faults[name] = fault
                if not fault:  # ZipInfo's own date, 1980: the same tree gives the same bytes
                    archive.writestr(zipfile.ZipInfo(copied_name(name)), jpeg)
        if any(faults.values()) and not skip_bad:
            raise _Incomplete
    return faults.items()


def _check_places(table, out):
    """Paths of the images, sorted; a UserError where one would be overwritten, or is not below the data folder."""
    if out == table.root or table.root in out.parents or out in table.root.parents:
        raise UserError(f"--output {out} and the data in {table.root} lie in each other; choose a folder apart")
    paths, sources = sorted(p.decode() for p in table.path), {}
    for path in paths:
        if Path(path).is_absolute():
            raise UserError(f"{table.sources[0]}: {path} is no path within {table.root}; only such can be copied")
        copied = copied_name(path)
        if (first := sources.setdefault(copied, path)) != path:
            raise UserError(
                f"{table.sources[0]}: {first} and {path} would both become {copied}; give one of them another name"
            )
    return paths


def _copy_to_files(paths, root, out, options, workers):
    """Makes a JPEG of each image whose JPEG is not there yet; yields (path, fault or None) of those."""
    todo = [p for p in paths if not (out / copied_name(p)).exists()]
    for folder in sorted({(out / p).parent for p in todo}):
        folder.mkdir(parents=True, exist_ok=True)
    yield from in_processes(functools.partial(_encode_to_file, root=root, target=out, options=options), todo, workers)


def _copy_to_shards(paths, root, out, options, workers, skip_bad):
    """Makes a zip file of SHARD_IMAGES images each, where it is not there yet; yields as :func:`_copy_to_files`."""
    parts = [paths[start : start + SHARD_IMAGES] for start in range(0, len(paths), SHARD_IMAGES)]
    shards = {out / f"images_{number:04d}.zip": part for number, part in enumerate(parts)}
    todo = {shard: part for shard, part in shards.items() if not shard.exists()}
    encode = functools.partial(_encode, root=root, options=options)
    images = in_processes(encode, [path for part in todo.values() for path in part], workers)
    for shard, part in todo.items():
        yield from _write_shard(shard, itertools.islice(images, len(part)), skip_bad)


def make_copy(
    root,
    out,
    *,
    dataset="mimic_cxr",
    csv="",
    size=512,
    quality=95,
    in_zip=False,
    dicom_recipe="window",
    skip_bad=False,
    workers=None,
    log=print,
    **which,
):
    """Makes or completes the copy of the tree `root` in `out`; returns {path: fault} of its bad images.

    The keywords are the options of prepare_mimic.py; size: short side in pixels, smaller images keep theirs; which:
    keywords of :meth:`dataset.releases.Release.load_table`. UserError: bad tables, or `out` holds something else.
    """
    out = Path(out).expanduser().absolute()
    reader = find_reader(dataset)
    table = reader.whole_table(root, csv=csv, **which)
    paths = _check_places(table, out)
    output_folder(out, "--output")
    options = {"size": size, "quality": quality, "dicom_recipe": dicom_recipe}
    recipe = {"source": str(table.root), "zip": in_zip, "pillow": PIL.__version__}
    if in_zip:  # a shard holds a part of them all; single files can become more
        recipe["images"] = len(paths)
    recipe["domain"] = image_domain(FileStore(table.root), paths, dicom_recipe)
    _same_recipe(out, options | recipe)
    copy = functools.partial(_copy_to_shards, skip_bad=skip_bad) if in_zip else _copy_to_files
    started = time.time()
    done = list(copy(paths, table.root, out, options, workers))
    faults = {path: fault for path, fault in done if fault}
    copied = reader.tables_to_copy(root, table, csv)
    _copy_tables(copied, out)
    if "images.csv" in copied and dataset != "mimic_cxr":
        log(f"read the copy with --dataset mimic_cxr ({out / 'images.csv'}; if labels are blank: DATA.MISSING ignore)")
    seconds = time.time() - started
    log(f"{len(done):,} images in {seconds:.1f} s ({len(done) / seconds:.1f} images/s), "
        f"{len(paths) - len(done):,} were there; {out}")  # fmt: skip
    for reason, count in table.left_out.items():
        if count:
            log(f"left out: {count:,} {reason}")
    for count, text, name in take_warnings():
        log(f"{count:,} images are odd: {text}; first: {name}")
    (out / BAD).unlink(missing_ok=True)
    if faults:
        pd.DataFrame(sorted(faults.items()), columns=["path", "fault"]).to_csv(out / BAD, index=False)
    return faults
