"""Files that are whole or not there, on any file system."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

import yaml

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
        _flush(folder, f"{path.parent}: this file system cannot flush a folder; a power cut may cost its newest file")
    finally:
        os.close(folder)


def _flush(descriptor, warning):
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        warn_once(warning)


def read_json(path, what):
    """The dictionary in a JSON file; a UserError where it is none, and so not `what`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not {what}")
    return content


def read_yaml(path, name, loader=yaml.SafeLoader, remedy=""):
    """The dictionary in a YAML file, which errors call `name`; a UserError where it cannot be read or has no keys."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), loader)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} has no keys{remedy}")
    return content


@contextlib.contextmanager
def replacing(path):
    """A path to write to, which becomes `path` when the block ends; where that fails, nothing of it is left."""
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            _flush(
                file.fileno(), f"{path.parent}: this file system cannot flush files; a power cut may cost the newest"
            )
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
