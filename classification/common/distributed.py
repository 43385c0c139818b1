"""Ranks, launchers and signals: the one place that knows how the process was started.

plain python: one process. torchrun: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
srun with several tasks: SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS; they find each other by `meet`.
NCCL on GPUs, gloo on CPUs.
"""

import contextlib
import ctypes
import fcntl
import math
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common.errors import UserError
from common.files import REFUSED, warn_once

# What rank 0 says where another rank has ended.
LOSS_OF_PEER = (
    "another process of this run has ended, and this one with it; why is said by that one, here or in its "
    "log_rank*.txt. If it says nothing it was killed, most often for memory: give the job more (--mem), or "
    "DATA.NUM_WORKERS less"
)
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
    if given := [name for name in _TORCHRUN[:3] if name in env]:
        if missing := [name for name in _TORCHRUN if name not in env]:
            raise UserError(
                f"{given[0]} is set but {', '.join(missing)} is not; start with torchrun, or unset {', '.join(given)}"
            )
        return int(env["RANK"]), int(env["LOCAL_RANK"]), int(env["WORLD_SIZE"])
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if missing := [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID") if name not in env]:
            raise UserError(f"SLURM_STEP_NUM_TASKS is set but {', '.join(missing)} is not; start with srun or torchrun")
        return int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_STEP_NUM_TASKS"])
    return 0, 0, 1


def _first_host():
    """Name of the host of rank 0 of this Slurm step."""
    env = os.environ
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    if env.get("SLURM_STEP_NUM_NODES") == "1":
        return "localhost"
    command = ["scontrol", "show", "hostnames", env.get("SLURM_STEP_NODELIST", "")]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"{' '.join(command)} does not tell the first node of this job ({error}), as in a container; set "
            "MASTER_ADDR to that node's name, outside of it: export MASTER_ADDR=$(hostname) in the job script"
        ) from error


def meet(rank, size):
    """The TCPStore of this Slurm step, served by its rank 0 and shared by all `size` tasks.

    Its port is MASTER_PORT, or one that is free on the first node, below those of outgoing connections, and held from
    its choice on. The others try the same candidates, and pass over what is not of this step: job numbers repeat where
    two clusters share a machine, the address at which srun listens does not.

    UserError: no such port is free, or rank 0 is not found within ten minutes.
    """
    env = os.environ
    names = ("JOB_ID", "RESTART_COUNT", "STEP_ID", "SRUN_COMM_HOST", "SRUN_COMM_PORT")
    step = " ".join(env.get(f"SLURM_{name}", "") for name in names)
    host = _first_host()
    fixed = env.get("MASTER_PORT")
    ports = [int(fixed)] if fixed else random.Random(step).sample(range(5000, 32768), 64)
    if rank == 0:
        return _serve(host, ports, step, size)
    deadline, asked = time.monotonic() + 600, {}
    while time.monotonic() < deadline:
        for port in ports:
            if port not in asked:
                try:
                    socket.create_connection((host, port), timeout=5).close()
                except OSError:  # nobody listens yet
                    continue
                # In a thread: torch waits without end where a listener says nothing.
                asked[port] = queue.Queue()
                arguments = (asked[port], host, port, rank, step)
                threading.Thread(target=_ask, args=arguments, daemon=True).start()
            try:
                store = asked[port].get(timeout=1)
            except queue.Empty:
                continue
            if store is not None:
                return store
            del asked[port]
        time.sleep(0.2)
    raise UserError(
        f"rank {rank} did not find rank 0 of this job on {host} within ten minutes; if it has not ended, set "
        "MASTER_ADDR to a name of its node that the others can reach, or MASTER_PORT to a port that is open"
    )


def _ask(answer, host, port, rank, step):
    """Puts into the queue `answer` the store at `port` if it is this step's, else None."""
    found = None
    with contextlib.suppress(RuntimeError):  # no store listens there
        store = dist.TCPStore(host, port, timeout=timedelta(seconds=10), wait_for_workers=False)
        # Each rank is taken once: another's of the same name would be its second.
        if store.check(["step"]) and store.get("step") == step.encode() and store.add(f"rank {rank}", 1) == 1:
            store.set_timeout(timedelta(minutes=30))
            found = store
    answer.put(found)


def _outgoing():
    """The first port that this machine gives to outgoing connections."""
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def _serve(host, ports, step, size):
    """Rank 0's end of `meet`."""
    tried = f"MASTER_PORT {ports[0]} is taken"
    if "MASTER_PORT" not in os.environ:
        outgoing = _outgoing()
        ports = [port for port in ports if port < outgoing]
        tried = f"outgoing connections begin at {outgoing}, {len(ports)} ports below were tried"
    for port in ports:
        try:
            listener = socket.create_server(("localhost" if host == "localhost" else "", port))
        except OSError:  # taken
            continue
        store = dist.TCPStore(
            host, port, size, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=30),
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        store.set("step", step)
        return store
    raise UserError(
        f"no port of {socket.gethostname()} is free for the processes of this job to meet ({tried}); "
        "set MASTER_PORT to one that is"
    )


@contextlib.contextmanager
def session():
    """The `World` of this process; ends the process group on the way out.

    UserError: on rank 0, where another process has ended; the others end without a word, as it is not theirs.
    """
    rank, local_rank, size = _launch()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    elif local_rank == 0:
        warn_of_missing_gpus(int(os.environ.get("SLURM_GPUS_ON_NODE", 0)))
    launched = size > 1 or "RANK" in os.environ  # torchrun may start one process: TRAIN.FSDP_OFFLOAD on one GPU
    if launched:
        store = None if "RANK" in os.environ else meet(rank, size)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, device, dist.new_group(backend="gloo") if launched else None)
    except RuntimeError as error:
        if not is_loss_of_peer(error):
            raise
        time.sleep(3)  # the cause speaks first, and the launcher, which may end this process, sees who ended first
        if rank != 0:
            raise SystemExit(1) from None
        raise UserError(LOSS_OF_PEER) from None
    finally:
        if launched:
            dist.destroy_process_group()


def warn_of_missing_gpus(given):
    """One line if torch sees fewer GPUs than Slurm has given to this node."""
    seen = torch.cuda.device_count()
    if seen < given:
        what = "training runs on the CPU" if seen == 0 else "several processes share a GPU"
        print(
            f"warning: SLURM_GPUS_ON_NODE is {given} on {socket.gethostname()}, but torch {torch.__version__} sees "
            f"{seen} GPUs: {what}. Try nvidia-smi there, and run setup_mimic_env.sh in such a job",
            file=sys.stderr,
            flush=True,
        )


def is_loss_of_peer(error):
    """Whether a collective failed because another process is gone; the texts are gloo's and NCCL's."""
    text = str(error)
    return ("gloo/transport" in text and ("peer" in text or "pipe" in text)) or "remote process exit" in text


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


def mean_tensor(tensor, world):
    """Mean of a tensor over the ranks; the CPU does not wait for it."""
    if world.size > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= world.size
    return tensor


def average_gradients(parameters, world):
    """Over the ranks, of parameters that are in no DistributedDataParallel."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = mean_tensor(parameter.grad, world)


def share_buffers(module, world):
    """Rank 0's buffers to all: batch-norm statistics are each rank's own between forward passes."""
    if world.size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def _slurm_seconds_left():
    """Seconds to the time limit of the Slurm job this runs in; infinite without one."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return math.inf
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:  # the number of an array's last task means the whole array
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    try:  # [days-][hours:]minutes:seconds, or a word such as UNLIMITED
        command = ["squeue", "-h", "-j", job, "-o", "%L"]
        left = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
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

    UserError: on all ranks, where another run holds it.
    """
    path = Path(folder) / ".lock"
    with open(path, "a+") if world.is_main else contextlib.nullcontext() as file:
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
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                warn_once(f"{path}: this file system has no locks; start no second run in this folder")
        holder = gather(holder, world)[0]
        if holder is not None:
            raise UserError(
                f"another run is writing to {folder} ({holder}); wait for it, or use another --tag. Where that process "
                f"has ended and this line stays, the file system keeps its lock: delete {path} then"
            )
        yield


class Stopped(BaseException):
    """Training was asked to stop; `number` is the signal's. No `except Exception` on the way holds it up."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Asks training to stop: on SIGTERM, SIGUSR1, SIGHUP, Ctrl-C, or near a job's time limit.

    A handler only sets a flag; `agreed()` makes all ranks see it at the same point, `check()` raises Stopped there.
    `at_once` is for long work that loses nothing: a signal raises Stopped wherever it arrives. A second Ctrl-C ends the
    process. The time limit is watched too because a signal during the imports is lost: four minutes before it, or a
    fifth of the job's time where that is less, counts as SIGUSR1.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self, world):
        self.world, self.received, self._immediate = world, 0, False
        left = _slurm_seconds_left()
        self.deadline = time.monotonic() + left - min(240, left / 5)

    def __enter__(self):
        # nohup has the process ignore SIGHUP, and that stays.
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        handled = [s for s in self.SIGNALS if s != signal.SIGHUP or not ignored]
        self._previous = {s: signal.signal(s, self._handle) for s in handled}
        _follow_the_launcher()
        return self

    def __exit__(self, *_):
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _handle(self, number, _frame):
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self._immediate:
            raise Stopped(number)

    @contextlib.contextmanager
    def at_once(self):
        """While this lasts, a signal raises Stopped where it arrives, and one that has arrived does at the start."""
        self.check()
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False

    def agreed(self):
        """The signal's number if any rank has received one, else 0; all ranks must call it."""
        if not self.received and time.monotonic() > self.deadline:
            self.received = signal.SIGUSR1
        if self.world.size > 1:
            flag = torch.tensor(self.received)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.world.group)
            self.received = int(flag)
        return self.received

    def while_waiting(self, seconds):
        """Raise Stopped if a signal came and this process has waited so long for images.

        With several ranks that costs the updates since the last checkpoint: only shortly before a launcher kills, 30 s
        after its signal.
        """
        if self.received and (self.world.size == 1 or seconds > 20):
            raise Stopped(self.received)

    def check(self):
        """Raise Stopped if any rank has received a signal; all ranks must call it."""
        if self.agreed():
            raise Stopped(self.received)


def _follow_the_launcher():
    """Under torchrun: SIGTERM where the launcher ends. It dies of SIGUSR1, and the ranks would train on without it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
