"""Starts a script on every GPU of a machine; in a Slurm job one `srun` task a node runs this, as slurm_job.sh does.

    srun --ntasks-per-node=1 python -m jobs.launch main.py --cfg ...
    python -m jobs.launch main.py --cfg ...                               without Slurm

It is torchrun with three things added: the nodes agree on a port that is free (`distributed.meet`), a signal reaches
the training processes and the launcher waits until they have saved, and a process that ends is one line, not a
traceback.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from common import distributed
from common.errors import UserError, reason, run_command

# A signal to the launcher -> what the training processes get. Slurm signals them too: TERM may arrive twice, a second
# INT would end them at once.
FORWARDED = {
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


def main(argv):
    """Run `argv`, a script and its arguments, once a GPU of this node; returns the signal that stopped it, or 0.

    UserError: a process was killed, or another node is lost.
    SystemExit: a process ended by itself; its message is above.
    """
    logging.disable(logging.ERROR)  # torchrun's own lines about a process that ends
    env = os.environ
    nodes = int(env.get("SLURM_STEP_NUM_NODES", 1))
    where = ["--standalone"]
    if nodes > 1:
        store = distributed.meet(int(env["SLURM_PROCID"]), nodes)  # the first node's lives as long as this process
        where = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-id {env['SLURM_JOB_ID']} --rdzv-conf is_host=0".split()
        where += ["--rdzv-endpoint", f"{store.host}:{store.port}"]
    given = int(env.pop("SLURM_GPUS_ON_NODE", 0))  # else each process would warn as well
    distributed.warn_of_missing_gpus(given)
    processes = str(given or max(1, torch.cuda.device_count()))
    with tempfile.TemporaryDirectory() as folder:
        # Asked for in a file, a training that was stopped ends with 0, and torchrun ends no other process that saves.
        ours = Path(folder) / "status"
        env.setdefault("MIMIC_JOB_STATUS", str(ours))
        received, error = _run([*where, "--nproc-per-node", processes, *argv])
        interrupted = ours.exists() and ours.read_text().startswith("interrupted")
    if interrupted or (received and error):
        return received[0] if received else signal.SIGUSR1  # none: near the time limit of a job
    if isinstance(error, ChildFailedError):
        _explain(*error.get_first_failure())
    if isinstance(error, (RendezvousError, dist.DistError)):
        raise UserError(f"{socket.gethostname()} lost the other nodes ({reason(error)})") from None
    if error:
        raise error
    return 0


def _run(arguments):
    """(signals that were received, exception or None) of torchrun with these arguments.

    It runs in a thread, where it leaves the signals to this function: its own handlers end the training processes after
    30 seconds, and it has none for USR1.
    """
    received, errors = [], []

    def work():
        try:
            run.main(arguments)
        except BaseException as error:
            errors.append(error)

    def forward(number, _frame):
        again = number == signal.SIGINT in received  # Ctrl-C twice: at once
        received.append(number)
        processes = list(_children())
        if not processes:  # none has started, as where other nodes are waited for: there is nothing to save
            os._exit(128 + number)
        for process in processes:
            os.kill(process, signal.SIGKILL if again else FORWARDED[number])

    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:  # by nohup, or by slurm_job.sh, whose USR1 reaches all processes
            signal.signal(number, forward)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return received, errors[0] if errors else None


def _children():
    """Ids of the processes that this one has started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(state[1]) == os.getpid():
            yield int(path.parent.name)


def _explain(rank, failure):
    """End as the process of `rank` did, whose own message is above, or raise a UserError for a killed one."""
    if failure.exitcode > 0:
        sys.exit(failure.exitcode)
    name = signal.Signals(-failure.exitcode).name
    hint = ", most often for memory: give the job more (--mem), or DATA.NUM_WORKERS less" if name == "SIGKILL" else ""
    raise UserError(f"the process of rank {rank} on {socket.gethostname()} was ended by {name}{hint}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
