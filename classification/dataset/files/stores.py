"""Where the bytes of images come from: files, uncompressed zip files, or memory. Runs without torch.

What a store knows of its images is held in arrays: a worker that only reads them shares their memory
with its parent, while a dictionary's reference counts would be copied page by page.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
import tempfile
import weakref
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from dataset.files.images import ImageError

CHECKED_FILES = 500


class FileStore:
    """Images as files under a folder."""

    place = "as files"

    def __init__(self, root):
        self.root = Path(root)

    def names(self):
        """Every file below the folder, sorted."""
        found = os.walk(self.root, followlinks=True)
        return sorted(os.path.relpath(os.path.join(folder, name), self.root) for folder, _, n in found for name in n)

    def missing(self, paths):
        """Which of an array of paths are no files."""
        return np.array([not os.path.isfile(os.path.join(self.root, path.decode())) for path in paths], bool)

    def rows_to_check(self, count):
        """An even sample: to touch all 377,110 files takes minutes on a parallel file system."""
        return np.unique(np.linspace(0, count - 1, min(count, CHECKED_FILES)).astype(int))

    def read(self, path):
        """Bytes of the file at `path`, relative to the folder."""
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise ImageError(f"{self.root / path}: {error.strerror or error}") from error


class _Index:
    """Row of a path among `paths` (bytes, any order)."""

    def __init__(self, paths):
        self.order = np.argsort(paths)
        self.paths = paths[self.order]

    def find(self, paths):
        """Rows of an array of paths; -1 where one is not there."""
        k = np.searchsorted(self.paths, paths).clip(max=len(self.paths) - 1)
        return np.where(self.paths[k] == paths, self.order[k], -1)


class ZipStore:
    """Images in the uncompressed zip files of a folder that `pattern` names, read by offset.

    Member names are the paths of the release (`files/p10/...`). A parallel file system then sees a
    few large files instead of 377,110 small ones.
    """

    place = "in the zip files"

    def __init__(self, root, pattern="*.zip"):
        self.root = Path(root)
        self.shards = sorted(self.root.glob(pattern))
        if not self.shards:
            raise UserError(
                f"DATA.ZIP_MODE: no {pattern} in {root}; pack the images uncompressed (zip -0 -r images.zip files)"
            )
        names, places = [], []  # (shard, offset of the local header, size)
        for k, shard in enumerate(self.shards):
            try:
                with zipfile.ZipFile(shard) as archive:
                    for info in archive.infolist():
                        if info.compress_type != zipfile.ZIP_STORED:
                            raise UserError(f"{shard}: {info.filename} is compressed; pack with zip -0")
                        names.append(info.filename.encode())
                        places.append((k, info.header_offset, info.file_size))
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{shard}: not a whole zip file ({error})") from error
        self.index, self.places = _Index(np.array(names)), np.array(places)
        self._files = {}

    def names(self):
        """The members, sorted."""
        return [name.decode() for name in self.index.paths.tolist()]

    def missing(self, paths):
        """Which of an array of paths have no member."""
        return self.index.find(paths) < 0

    def rows_to_check(self, count):
        """All of them: the index is at hand."""
        return np.arange(count)

    def read(self, path):
        """Bytes of the member `path`."""
        row = self.index.find(path.encode())
        if row < 0:
            raise ImageError(f"{path}: not in the zip files of {self.root}")
        shard, offset, size = self.places[row].tolist()
        if shard not in self._files:
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        # pread has no file position, so forked workers may share the descriptor.
        header = os.pread(self._files[shard], 30, offset)
        start = offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return os.pread(self._files[shard], size, start)


class MemoryStore:
    """The encoded images of another store in shared memory: once a machine, for all its ranks and workers.

    The first process that asks reads them all into a file in /dev/shm that has no name and is its user's alone; the
    others find it by a small file named after the images, wait until it is whole, and map it. The memory is free once
    the last of them has ended, however it ends. What an earlier run read is never served again.

    Args:
        store: where to read.
        paths: array of bytes, the images.

    UserError: not enough shared memory.
    ImageError: an image cannot be opened.
    """

    FOLDER = Path("/dev/shm")

    def __init__(self, store, paths):
        self.root, self.index = store.root, _Index(paths)
        name = hashlib.sha256(str(store.root).encode() + self.index.paths.tobytes()).hexdigest()[:24]
        path = self.FOLDER / f"internimage-{os.getuid()}-{name}"
        self._file, holder = None, os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds the images
            try:
                self._fill(store)
            except BaseException:
                path.unlink()
                raise
            holder.truncate(0)
            holder.write(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
            holder.flush()
        except BlockingIOError:
            pass  # another process fills it, or holds it whole
        fcntl.flock(holder, fcntl.LOCK_SH)  # waits for the one that fills; held while this process lives
        if self._file is None:
            with contextlib.suppress(OSError):  # the one that filled it has ended
                self._file = open(holder.read() or os.devnull, "rb", buffering=0)
            if self._file is None or self._ends(len(paths)) is None:
                self._fill(store)  # for this process alone
        self.ends = self._ends(len(paths))
        self._bytes = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        weakref.finalize(self, _leave, holder, self._file, path)

    def _fill(self, store):
        self._file = tempfile.TemporaryFile(dir=self.FOLDER, buffering=0)
        try:
            self._write_all(store)
        except OSError as error:
            free = shutil.disk_usage(self.FOLDER).free + os.fstat(self._file.fileno()).st_size
            raise UserError(
                f"DATA.IMG_ON_MEMORY: {free / 1e9:.1f} GB of shared memory ({self.FOLDER}) do not hold the images "
                f"({error.strerror}); use a small copy (prepare_mimic.py build), or turn it off"
            ) from error

    def _write_all(self, store):
        """All images one after the other, in the order of the index; their ends; a mark that the file is whole."""
        ends, names = [0], [p.decode() for p in self.index.paths]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:  # reading waits for the disk, not for a processor
            for start in tqdm(range(0, len(names), 1024), desc="images to memory", unit="1024 images"):
                for data in pool.map(store.read, names[start : start + 1024]):
                    self._write(data)
                    ends.append(ends[-1] + len(data))
        self._write(np.array(ends).tobytes() + self._mark(len(names)))

    def _write(self, data):
        while data:  # near the end of the memory only a part may be written, and then an error says so
            data = data[self._file.write(data) :]

    @staticmethod
    def _mark(count):
        return b"whole%11d" % count

    def _ends(self, count):
        """Offsets [count + 1] of the images in the file; None where it is not whole."""
        size, table = os.fstat(self._file.fileno()).st_size, 8 * (count + 1)
        tail = os.pread(self._file.fileno(), table + 16, max(0, size - table - 16))
        return np.frombuffer(tail[:-16], np.int64) if tail[-16:] == self._mark(count) else None

    def read(self, path):
        """Bytes of the image `path`."""
        k = np.searchsorted(self.index.paths, path.encode())
        return self._bytes[self.ends[k] : self.ends[k + 1]]


def _leave(holder, file, path):
    """Closes the images, and removes the small file unless another process still holds it."""
    file.close()
    with contextlib.suppress(OSError):
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    holder.close()
