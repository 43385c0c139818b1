"""Runs command lines of main.py, one after the other, each on several gloo ranks: python ranks.py JOBS.json.

A job: {copy: [folder, new folder]}, or {ranks, argv, out (a file), signal: [update, rank, number]}. `out` gets
[loss, norm] of each update, JOBS.json the exit status of each rank. Ranks are forked from one process that has imported
everything: a start costs nothing.
"""

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import torch

import dataset.mimic_cxr  # noqa: F401  (imported once here, not by each rank)
import dataset.transforms  # noqa: F401
import main
import models.intern_image
import models.timm  # noqa: F401
from common import distributed
from common.errors import run_command
from training.step import Step


def run_rank(job, rank, port):
    """One rank of a job, to its end."""
    torch.set_num_threads(1)
    os.dup2(os.open(f"{job['out']}.rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if rank is not None:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
        os.environ.update({key: str(value) for key, value in here.items()}, MASTER_ADDR="localhost", MASTER_PORT=port)
    step, updates = Step.__call__, []

    def recorded(self, *arguments, **options):
        at, of_rank, number = job.get("signal", (None, None, None))
        if (len(updates) + 1, self.world.rank) == (at, of_rank):
            os.kill(os.getpid(), number)
        loss, norm = step(self, *arguments, **options)
        updates.append((distributed.mean(loss.item(), self.world), norm.item()))
        if self.world.is_main:
            Path(job["out"]).write_text(json.dumps(updates))
        return loss, norm

    Step.__call__ = recorded
    main.plot_training = os.fsync = lambda *_: None  # take longer than the training
    run_command(main.main, job["argv"])


def run_job(job):
    """The exit status of each rank, negative for a signal."""
    if "copy" in job:
        shutil.copytree(*job["copy"])
        return []
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    children = []
    for rank in range(job["ranks"]):
        if not (child := os.fork()):
            try:
                run_rank(job, None if job["ranks"] == 1 else rank, port)
            except SystemExit as ended:
                sys.stderr.flush()
                os._exit(ended.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(99)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    signal.alarm(900)  # ranks that wait for each other for good
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[1]).write_text(json.dumps([run_job(job) for job in jobs]))
