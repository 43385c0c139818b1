"""Work on many images by all processors. Runs without torch."""

import multiprocessing
import os
import signal

from tqdm import tqdm


def _quiet():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def in_processes(function, items, workers=None):
    """function(item) of each item of a list, in order, by so many processes (all processors), with a progress bar."""
    workers = workers or len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(workers, initializer=_quiet) as pool:
        yield from tqdm(pool.imap(function, items, chunksize=4), total=len(items), unit="image", smoothing=0.05)
