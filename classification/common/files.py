"""Files that are whole or not there, on any file system."""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import tempfile
from pathlib import Path

from common.errors import UserError

REFUSED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF)  # what a file system does not offer


@functools.cache
def warn_once(text):
    """One line of the log, once a process."""
    logging.getLogger("internimage").warning(text)


def rename(temporary, path):
    """Give a written file its name at once, and for good: rename, then flush the folder's entry."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        warn_once(f"{path.parent}: this file system cannot flush a folder; a power cut may cost the newest file in it")
    finally:
        os.close(folder)


@contextlib.contextmanager
def replacing(path):
    """A path to write to, which becomes `path` when the block ends; where that fails, nothing of it is left."""
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path, text):
    """Write a text file; a reader sees the old file or the whole new one. A UserError where it cannot be written."""
    path = Path(path)
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}); make room, or choose another folder"
        ) from error


@contextlib.contextmanager
def reserved(folder, size):
    """Keeps `size` bytes of the disk free in a new folder for what is written there afterwards.

    They are those of a file without a name: free again however this process ends. If the work meanwhile fails, the
    folder is removed: nothing is in it.

    Raises:
        UserError: there is no room for them.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise UserError(
                        f"{folder} has no room for about {size / 1e6:.0f} MB ({error.strerror}); make room, or choose "
                        "another folder"
                    ) from error
            yield
    except BaseException:
        os.rmdir(folder)
        raise


def sha256(file):
    """SHA-256 of an open binary file from where it is read next, in hex."""
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()
