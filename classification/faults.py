"""Faults of the machine, known by the exceptions they raise: one line that says what to do."""

import re


def _memory(config, world):
    return (
        f"the memory of {world.device} does not hold a batch of {config.DATA.BATCH_SIZE} images of "
        f"{config.DATA.IMG_SIZE} pixels; use a smaller --batch-size (with --accumulation-steps the update keeps its "
        "size), or --use-checkpoint, which recomputes activations instead of keeping them"
    )


def _worker(config, world):
    return (
        "a process that loads images was killed, most likely for want of memory; use a smaller DATA.NUM_WORKERS "
        f"(now {config.DATA.NUM_WORKERS}), or ask for more memory for the job (sbatch --mem)"
    )


def _shared_memory(config, world):
    return (
        "the processes that load images have no room in shared memory (/dev/shm) for their batches; use a smaller "
        f"DATA.NUM_WORKERS (now {config.DATA.NUM_WORKERS}; 0 needs none), a smaller --batch-size, or give the "
        "container more (docker run --shm-size)"
    )


def _one_value(config, world):
    return (
        f"batch normalisation cannot train on one value: a batch of {config.DATA.BATCH_SIZE} images of "
        f"{config.DATA.IMG_SIZE} pixels leaves one at the end of the model; use a larger --batch-size or DATA.IMG_SIZE"
    )


def _files(config, world):
    return (
        f"too many open files, most likely by the {config.DATA.NUM_WORKERS} loading processes (DATA.NUM_WORKERS); "
        "use fewer, or raise the limit (ulimit -n 65536)"
    )


# What the exception's class and text match, in this order -> what it means. A worker's exception quotes its own.
FAULTS = (
    (r"shared memory|/dev/shm|Bus error", _shared_memory),
    (r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory|^MemoryError", _memory),
    (r"DataLoader worker .*(exited unexpectedly|killed by signal)", _worker),
    (r"Expected more than 1 value per channel", _one_value),
    (r"Too many open files|received 0 items of ancdata", _files),
)


def explain(error, config, world):
    """The fault behind an exception in one line, or None where it is not known."""
    text = f"{type(error).__name__}: {error}"
    return next((say(config, world) for pattern, say in FAULTS if re.search(pattern, text)), None)
