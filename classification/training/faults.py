"""Faults of the machine, known by the exceptions they raise: one line that says what to do."""

import re


def _memory(found, config, world):
    return (
        f"the memory of {world.device} does not hold a batch of {config.DATA.BATCH_SIZE} images of "
        f"{config.DATA.IMG_SIZE} pixels; use a smaller --batch-size (with --accumulation-steps the update keeps its "
        "size), or --use-checkpoint, which recomputes activations instead of keeping them"
    )


def _worker(found, config, world):
    return (
        "a process that loads images was killed, most likely for want of memory; use a smaller DATA.NUM_WORKERS "
        f"(now {config.DATA.NUM_WORKERS}), or ask for more memory for the job (sbatch --mem)"
    )


def _shared_memory(found, config, world):
    return (
        "the processes that load images have no room in shared memory (/dev/shm) for their batches; use a smaller "
        f"DATA.NUM_WORKERS (now {config.DATA.NUM_WORKERS}; 0 needs none), a smaller --batch-size, or give the "
        "container more (docker run --shm-size)"
    )


def _one_value(found, config, world):
    return (
        f"batch normalisation cannot train on one value: a batch of {config.DATA.BATCH_SIZE} images of "
        f"{config.DATA.IMG_SIZE} pixels leaves one at the end of the model; use a larger --batch-size or DATA.IMG_SIZE"
    )


def _files(found, config, world):
    return (
        f"too many open files, most likely by the {config.DATA.NUM_WORKERS} loading processes (DATA.NUM_WORKERS); "
        "use fewer, or raise the limit (ulimit -n 65536)"
    )


def _not_deterministic(found, config, world):
    return (
        f"DETERMINISTIC True: {found[1]} has no deterministic form on {world.device}; set DETERMINISTIC False, or "
        "leave out the option that needs it (its place is in log_rank0.txt)"
    )


def _kernel(found, config, world):
    return found[1]


def _compilation(found, config, world):
    return (
        f"TRAIN.COMPILE True: torch cannot compile {config.MODEL.TYPE} ({found[1]}; more in log_rank0.txt); set "
        "TRAIN.COMPILE False"
    )


def _full(found, config, world):
    return f"no space is left ({found[0]}); make room, or choose another --output and RESULTS. Checkpoints are intact"


# What the exception's class and text match, in this order -> what it means. A worker's exception quotes its own.
FAULTS = (
    (r"(out of resource: .*)", _compilation),  # Triton's: a GPU's shared memory, not /dev/shm
    (r"shared memory|</torch_|/dev/shm|Bus error", _shared_memory),  # where "no space" is no disk's either
    (r"(?:No space left on device|Disk quota exceeded)(?:: .*)?", _full),
    (r"(\S+) does not have a deterministic implementation", _not_deterministic),
    (r"(dcnv3: DCNV3_[A-Z]+=.*)", _kernel),  # one asked for by name
    (r"^torch\._(?:dynamo|inductor)\S*: (.*)", _compilation),
    (r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory|^builtins.MemoryError", _memory),
    (r"DataLoader worker .*(exited unexpectedly|killed by signal)", _worker),
    (r"Expected more than 1 value per channel", _one_value),
    (r"Too many open files|received 0 items of ancdata", _files),
)


def explain(error, config, world):
    """The fault behind an exception in one line, or None where it is not known."""
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    matches = ((re.search(pattern, text), say) for pattern, say in FAULTS)
    return next((say(found, config, world) for found, say in matches if found), None)
