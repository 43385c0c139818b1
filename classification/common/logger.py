"""One logger: lines on the terminal, with the level if it is not INFO, and all of it in `log_rank<r>.txt`."""

import contextlib
import logging
import sys
from pathlib import Path

from termcolor import colored


class _Short(logging.Formatter):
    """Without the level of plain information."""

    def formatMessage(self, record):
        record.level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        return super().formatMessage(record)


class _File(logging.FileHandler):
    """On a full disk, one line on the terminal instead of a traceback for every line of the log."""

    full = False

    def handleError(self, record):
        if not self.full:
            self.full = True
            print(f"warning: {self.baseFilename} cannot be written ({sys.exc_info()[1]})", file=sys.stderr)

    def close(self):
        with contextlib.suppress(OSError):
            super().close()


def build_logger(folder, rank=0):
    """Logger of this rank; rank 0 also writes to the terminal. The file is appended to."""
    logger = logging.getLogger("internimage")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    close(logger)
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        stamp = colored("%(asctime)s", "green") if sys.stdout.isatty() else "%(asctime)s"
        console.setFormatter(_Short(f"{stamp} %(level)s%(message)s", "%H:%M:%S"))
        logger.addHandler(console)
    file = _File(Path(folder) / f"log_rank{rank}.txt")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    return logger


def to_file(logger, text):
    """Write an error to the log file alone."""
    record = logger.makeRecord(logger.name, logging.ERROR, "", 0, text, None, None)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def close(logger):
    """Close the handlers: a second run in one process starts with its own files."""
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
