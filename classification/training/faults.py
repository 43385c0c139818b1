"""Faults of the machine, known by the exceptions they raise: one line that says what to do."""

import re

_COMPILATION = (
    "TRAIN.COMPILE True: torch cannot compile {config.MODEL.TYPE} ({found[1]}; more in log_rank0.txt); set "
    "TRAIN.COMPILE False"
)
# What the exception's class and text match, in this order -> what it means: a template with `found` (the match),
# `config` and `world`. A worker's exception quotes its own.
FAULTS = {
    r"(dcnv3: DCNV3_[A-Z]+=.*)": "{found[1]}",  # a kernel asked for by name
    r"(out of resource: .*)": _COMPILATION,  # Triton's: a GPU's shared memory, not /dev/shm
    r"shared memory|</torch_|/dev/shm|Bus error":  # where "no space" is no disk's either
        "the processes that load images have no room in shared memory (/dev/shm) for their batches; use a smaller "
        "DATA.NUM_WORKERS (now {config.DATA.NUM_WORKERS}; 0 needs none), a smaller --batch-size, or give the "
        "container more (docker run --shm-size)",
    r"(?:No space left on device|Disk quota exceeded)(?:: .*)?":
        "no space is left ({found[0]}); make room, or choose another --output and RESULTS. Checkpoints are intact",
    r"(\S+) does not have a deterministic implementation":
        "DETERMINISTIC True: {found[1]} has no deterministic form on {world.device}; set DETERMINISTIC False, or "
        "leave out the option that needs it (its place is in log_rank0.txt)",
    r"^torch\._(?:dynamo|inductor)\S*: (.*)": _COMPILATION,
    r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory|^builtins.MemoryError":
        "the memory of {world.device} does not hold a batch of {config.DATA.BATCH_SIZE} images of "
        "{config.DATA.IMG_SIZE} pixels; use a smaller --batch-size (with --accumulation-steps the update keeps its "
        "size), or --use-checkpoint, which recomputes activations instead of keeping them",
    r"DataLoader worker .*(exited unexpectedly|killed by signal)":
        "a process that loads images was killed, most likely for want of memory; use a smaller DATA.NUM_WORKERS "
        "(now {config.DATA.NUM_WORKERS}), or ask for more memory for the job (sbatch --mem)",
    r"Expected more than 1 value per channel":
        "batch normalisation cannot train on one value: a batch of {config.DATA.BATCH_SIZE} images of "
        "{config.DATA.IMG_SIZE} pixels leaves one at the end of the model; use a larger --batch-size or DATA.IMG_SIZE",
    r"Too many open files|received 0 items of ancdata":
        "too many open files, most likely by the {config.DATA.NUM_WORKERS} loading processes (DATA.NUM_WORKERS); "
        "use fewer, or raise the limit (ulimit -n 65536)",
}  # fmt: skip


def explain(error, config, world):
    """The fault behind an exception in one line, or None where it is not known."""
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    matches = ((re.search(pattern, text), meaning) for pattern, meaning in FAULTS.items())
    return next((meaning.format(found=found, config=config, world=world) for found, meaning in matches if found), None)
