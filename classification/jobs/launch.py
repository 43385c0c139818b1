"""Starts a script on every GPU of a Slurm job: one `srun` task a node runs this, as slurm_job.sh does.

    srun --ntasks-per-node=1 python -m jobs.launch main.py --cfg ...

It is torchrun with two things added: the nodes agree on a port that is free (`distributed.meet`), and a process that
ends is one line of it, not a traceback.
"""

import logging
import os
import signal
import socket
import sys

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from common.errors import UserError
from training import distributed


def main(argv):
    """Run `argv`, a script and its arguments, once a GPU of this node; returns the exit status."""
    logging.disable(logging.ERROR)  # torchrun's own lines about a process that ends
    env = os.environ
    nodes = int(env["SLURM_STEP_NUM_NODES"])
    where = ["--standalone"]
    if nodes > 1:
        store = distributed.meet(int(env["SLURM_PROCID"]), nodes)  # the first node's lives as long as this process
        where = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-id {env['SLURM_JOB_ID']} --rdzv-conf is_host=0".split()
        where += ["--rdzv-endpoint", f"{store.host}:{store.port}"]
    try:
        run.main([*where, "--nproc-per-node", env.get("SLURM_GPUS_ON_NODE", "1"), *argv])
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        hint = ", most often for memory: give the job more (--mem), or DATA.NUM_WORKERS less"
        hint = hint if name == "SIGKILL" else ""
        raise UserError(f"the process of rank {rank} on {socket.gethostname()} was ended by {name}{hint}") from None
    except SignalException as error:
        return 128 + error.sigval
    except (RendezvousError, dist.DistError) as error:
        raise UserError(f"{socket.gethostname()} lost the other nodes ({str(error).splitlines()[0]})") from None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
