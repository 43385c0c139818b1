"""Folders tried before the work that needs them: those that results go to, and TMPDIR."""

import os
import tempfile
from pathlib import Path

from common.errors import UserError


def output_folder(path, option):
    """`path` as a folder that is there and takes files.

    option: the flag or key that named it.

    Raises:
        UserError: it cannot be made, or nothing can be written there: no rights, a full disk or quota.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror}); choose another folder") from error
    return Path(path)


LONGEST_TMPDIR = 75  # bytes: the address of a socket has 107, and its name in there takes 32


def check_tmpdir(workers, without):
    """Raises a UserError if TMPDIR is too long for so many loading processes of torch; without: the option for none."""
    folder = tempfile.gettempdir()
    if workers and (length := len(os.fsencode(folder))) > LONGEST_TMPDIR:
        raise UserError(
            f"TMPDIR {folder} is too long for the loading processes: it has {length} bytes, at most {LONGEST_TMPDIR} "
            f"leave room for the name of a socket; set TMPDIR to a shorter folder (export TMPDIR=/tmp), or {without}"
        )
