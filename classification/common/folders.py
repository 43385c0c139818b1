"""Folders tried before the work that needs them: those that results go to, and TMPDIR."""

import os
import tempfile
from pathlib import Path

from common.errors import UserError


def output_folder(path, option):
    """`path` as a folder that is there and takes files.

    option: the flag or key that named it.

    UserError: it cannot be made, or nothing can be written there: no rights, a full disk or quota.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror}); choose another folder") from error
    return Path(path)


def cannot_be_read(error):
    """Raises the UserError of a folder whose listing failed with this OSError."""
    raise UserError(f"{error.filename}: the folder cannot be read ({error.strerror})") from error


def walk(folder):
    """os.walk in order, through links too, but not twice into a folder; one that cannot be read is a UserError."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=cannot_be_read):
        status = os.stat(where)
        if (here := (status.st_dev, status.st_ino)) in seen:  # a link to where the search has been: a circle, perhaps
            folders.clear()
            continue
        seen.add(here)
        folders.sort()
        yield where, folders, sorted(names)


LONGEST_TMPDIR = 75  # bytes: the address of a socket has 107, and its name in there takes 32


def check_tmpdir(workers, without):
    """Raises a UserError if TMPDIR is too long for so many loading processes of torch; without: the option for none."""
    folder = tempfile.gettempdir()
    if workers and (length := len(os.fsencode(folder))) > LONGEST_TMPDIR:
        raise UserError(
            f"TMPDIR {folder} is too long for the loading processes: it has {length} bytes, at most {LONGEST_TMPDIR} "
            f"leave room for the name of a socket; set TMPDIR to a shorter folder (export TMPDIR=/tmp), or {without}"
        )
