"""Work on many images by all processors. Runs without torch."""

import contextlib
import functools
import multiprocessing
import os
import signal

from tqdm import tqdm

from common.errors import UserError
from dataset.files.images import note, take_warnings


def _with_warnings(function, items):
    return [function(item) for item in items], take_warnings()


def _next(results, processes):
    """The next of the results, which would never come where one of the processes was killed."""
    while True:
        with contextlib.suppress(multiprocessing.TimeoutError):
            return results.next(timeout=2)
        if not all(process.is_alive() for process in processes):
            raise UserError(
                "a process that reads images was killed, most likely for want of memory; use fewer --workers, or ask "
                "for more memory for the job (sbatch --mem)"
            )


def in_processes(function, items, workers=None):
    """function(item) of each item of a list, in order, by so many processes (all processors), with a progress bar.

    What they warn of is collected here, see :func:`dataset.files.images.take_warnings`.

    UserError: one of the processes was killed.
    """
    workers = workers or len(os.sched_getaffinity(0))
    parts = [items[k : k + 4] for k in range(0, len(items), 4)]
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with multiprocessing.get_context("fork").Pool(workers, signal.signal, ignore) as pool:
        started = multiprocessing.active_children()
        results = pool.imap(functools.partial(_with_warnings, function), parts)
        with tqdm(total=len(items), unit="image", smoothing=0.05) as bar:
            for part in parts:
                found, odd = _next(results, started)
                for count, text, name in odd:
                    note(text, name, count)
                yield from found
                bar.update(len(part))
