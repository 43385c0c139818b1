"""Folders that results go to, tried before the work whose results they take."""

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
