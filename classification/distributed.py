"""Ranks, launchers and signals: the one place that knows how the process was started.

plain python: one process. torchrun: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
srun with several tasks: SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS.
NCCL on GPUs, gloo on CPUs.
"""

import contextlib
import fcntl
import math
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from errors import UserError

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    group: object = None  # gloo, for numbers and flags: they never wait for a GPU

    @property
    def is_main(self):
        return self.rank == 0


def _launch():
    """(rank, local rank, world size) as the launcher says; sets what torch.distributed needs."""
    env = os.environ
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in env]
    if given:
        missing = [name for name in _TORCHRUN if name not in env]
        if missing:
            raise UserError(
                f"{given[0]} is set but {', '.join(missing)} is not; start with torchrun, or unset {', '.join(given)}"
            )
        return int(env["RANK"]), int(env["LOCAL_RANK"]), int(env["WORLD_SIZE"])
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID") if name not in env]
        if missing:
            raise UserError(f"SLURM_STEP_NUM_TASKS is set but {', '.join(missing)} is not; start with srun or torchrun")
        if "MASTER_ADDR" not in env:
            hosts = subprocess.run(
                ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]],
                capture_output=True,
                text=True,
                check=True,
            )
            env["MASTER_ADDR"] = hosts.stdout.split()[0]
        # A fixed port collides with other jobs on the node.
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
        return int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_STEP_NUM_TASKS"])
    return 0, 0, 1


@contextlib.contextmanager
def session():
    """The `World` of this process; ends the process group on the way out."""
    rank, local_rank, size = _launch()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size)
    try:
        yield World(rank, size, device, dist.new_group(backend="gloo") if size > 1 else None)
    finally:
        if size > 1:
            dist.destroy_process_group()


def gather(value, world):
    """The picklable `value` of every rank, as a list in rank order."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value, group=world.group)
    return values


def mean(value, world):
    """Mean of a number over the ranks."""
    return sum(gather(value, world)) / world.size


def share_buffers(module, world):
    """Rank 0's buffers to all: batch-norm statistics are each rank's own between forward passes."""
    if world.size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def _slurm_seconds_left():
    """Seconds to the time limit of the Slurm job this runs in; infinite without one."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return math.inf
    try:  # [days-][hours:]minutes:seconds, or a word such as UNLIMITED
        left = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, timeout=60
        ).stdout
        days, _, clock = left.strip().rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        seconds = sum(part * 60**i for i, part in enumerate(reversed(parts)))
        return seconds + 86400 * int(days or 0)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return math.inf


def report_outcome(world, text):
    """Tell the job script how training ended; True if there is one that asked (MIMIC_JOB_STATUS, a path).

    Exit codes do not pass through torchrun. text: "finished", or "interrupted EPOCH UPDATE".
    """
    path = os.environ.get("MIMIC_JOB_STATUS")
    if path and world.is_main:
        Path(path).write_text(text + "\n")
    return bool(path)


@contextlib.contextmanager
def only_run_in(folder, world):
    """Holds `folder` for this run, on all nodes that share the file system; the lock dies with its process.

    Raises:
        UserError: on all ranks, where another run holds it.
    """
    with open(Path(folder) / ".lock", "a+") if world.is_main else contextlib.nullcontext() as file:
        holder = None
        if file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}, job {os.environ.get('SLURM_JOB_ID')}")
                file.flush()
            except BlockingIOError:
                file.seek(0)
                holder = file.read()
        holder = gather(holder, world)[0]
        if holder is not None:
            raise UserError(f"another run is writing to {folder} ({holder}); wait for it, or use another --tag")
        yield


class StopRequest:
    """Asks training to stop after the current update: on SIGTERM, SIGUSR1, Ctrl-C, or near a job's time limit.

    A handler only sets a flag; `agreed()` makes all ranks see it at the same update. A second
    Ctrl-C stops at once. The time limit is watched too because a signal during the imports is lost:
    four minutes before it, or a fifth of the job's time where that is less, counts as SIGUSR1.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, world):
        self.world, self.received = world, 0
        left = _slurm_seconds_left()
        self.deadline = time.monotonic() + left - min(240, left / 5)

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _handle(self, number, _frame):
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self):
        """The signal's number if any rank has received one, else 0; all ranks must call it."""
        if not self.received and time.monotonic() > self.deadline:
            self.received = signal.SIGUSR1
        if self.world.size == 1:
            return self.received
        flag = torch.tensor(self.received)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.world.group)
        return int(flag)
