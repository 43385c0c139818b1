"""Work on many images by all processors. Runs without torch."""

import functools
import multiprocessing
import os
import signal

from tqdm import tqdm

from dataset.files.images import note, take_warnings


def _quiet():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _with_warnings(function, item):
    return function(item), take_warnings()


def in_processes(function, items, workers=None):
    """function(item) of each item of a list, in order, by so many processes (all processors), with a progress bar.

    What they warn of is collected here, see :func:`dataset.files.images.take_warnings`.
    """
    workers = workers or len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(workers, initializer=_quiet) as pool:
        results = pool.imap(functools.partial(_with_warnings, function), items, chunksize=4)
        for result, odd in tqdm(results, total=len(items), unit="image", smoothing=0.05):
            for count, text, name in odd:
                note(text, name, count)
            yield result
