"""How the processes of a Slurm step find each other, and what a successor is asked for: without a Slurm."""

import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch

from common import distributed
from common.errors import UserError
from conftest import ROOT
from jobs import successor

FORK = multiprocessing.get_context("fork")
PATIENCE = 600  # seconds: a machine may have much else to do


def task(whose, rank, port, answers):
    """One of two tasks of a step of job 7, as srun at `port` starts it; answers with what its rank 0 wrote."""
    os.environ |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_SRUN_COMM_PORT": str(port)}
    store = distributed.meet(*distributed._launch()[::2])
    if rank == 0:
        store.set("whose", whose)
    answers.put((whose, store.get("whose").decode(), store.port))
    store.add("done", 1)
    while rank == 0 and store.add("done", 0) < 2:  # the store is rank 0's
        pass


def test_two_jobs_of_one_number_keep_apart(monkeypatch):
    """On one machine, as two clusters may: srun's own address tells them apart, although they try the same ports."""
    silent = socket.create_server(("localhost", 0))  # takes connections and never answers
    ports = [silent.getsockname()[1], *random.Random(7).sample(range(5000, 32768), 8)]
    monkeypatch.setattr(distributed, "_outgoing", lambda: 65536)
    monkeypatch.setattr(distributed.random.Random, "sample", lambda *_: ports)
    answers = FORK.Queue()
    tasks = [FORK.Process(target=task, args=(f"run {k}", rank, 40001 + k, answers)) for rank in (1, 0) for k in (0, 1)]
    for process in tasks:
        process.start()
    said = [answers.get(timeout=PATIENCE) for _ in tasks]
    for process in tasks:
        process.join()
    assert sorted(found for _, found, _ in said) == ["run 0", "run 0", "run 1", "run 1"]
    assert all(whose == found for whose, found, _ in said)
    used = {(found, port) for _, found, port in said}
    assert len(used) == 2 and {port for _, port in used} < set(ports)


def test_a_taken_port_is_passed_over(monkeypatch):
    for name, value in {"JOB_ID": "8", "STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    first = distributed.meet(0, 2)
    with socket.create_server(("localhost", 0)) as stranger:  # it takes connections and never answers
        ports = [stranger.getsockname()[1], first.port, 9999]
        monkeypatch.setattr(distributed.random.Random, "sample", lambda *_: ports)
        monkeypatch.setattr(distributed, "_outgoing", lambda: 65536)
        monkeypatch.setenv("SLURM_STEP_ID", "1")
        second = distributed.meet(0, 2)
        assert second.port == 9999 and second.get("step") != first.get("step")


@pytest.mark.parametrize("variables", [{"MASTER_PORT": "taken"}, {}])
def test_no_free_port_is_said(monkeypatch, variables):
    with socket.create_server(("localhost", 0)) as stranger:
        taken = stranger.getsockname()[1]
        monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
        if variables:
            monkeypatch.setenv("MASTER_PORT", str(taken))
        monkeypatch.setattr(distributed, "_outgoing", lambda: 1024)
        said = f"MASTER_PORT {taken} is taken" if variables else "begin at 1024.*set MASTER_PORT"
        with pytest.raises(UserError, match=said):
            distributed.meet(0, 2)


def lone(rank, answers):
    """One of two ranks of which the second ends without a word."""
    os.environ |= {"SLURM_JOB_ID": "9", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    distributed.time.sleep = lambda _: None
    try:
        with distributed.session() as world:
            distributed.gather(rank, world)
            if rank == 1:
                os._exit(9)
            distributed.gather(rank, world)
    except Exception as error:
        answers.put((type(error).__name__, str(error)))


def test_the_end_of_another_rank_is_one_line():
    answers = FORK.Queue()
    ranks = [FORK.Process(target=lone, args=(rank, answers)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    assert answers.get(timeout=PATIENCE) == ("UserError", distributed.LOSS_OF_PEER)
    for process in ranks:
        process.join()


RANK = """
import os, signal, sys, time
got = []
for name in ("SIGUSR1", "SIGTERM"):
    signal.signal(getattr(signal, name), lambda number, _: got.append(signal.Signals(number).name))
os.write(1, b"ready\\n")  # whole lines, although two processes write
for _ in range(60000):
    if got:
        break
    time.sleep(0.01)
if os.environ["RANK"] == "0":  # the others do not wait for what it saves
    time.sleep(0.5)
    with open(os.environ["MIMIC_JOB_STATUS"], "w") as file:
        file.write("interrupted 1 2")
os.write(1, f"saved after {' '.join(got)}\\n".encode())
"""


def test_a_signal_to_the_launcher_lets_the_processes_save(tmp_path):
    """As a closed terminal, Ctrl-C or a time limit send it; the exit status is that of a shell, 128 + its number."""
    (tmp_path / "rank.py").write_text(RANK)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MIMIC"))}
    command = [sys.executable, "-m", "jobs.launch", str(tmp_path / "rank.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    sent = {signal.SIGUSR1: "SIGUSR1", signal.SIGHUP: "SIGTERM", signal.SIGINT: "SIGTERM"}

    def restore():  # a shell's background job ignores INT
        for number in sent:
            signal.signal(number, signal.SIG_DFL)

    given = {"env": environment | {"SLURM_GPUS_ON_NODE": "2"}, "cwd": ROOT, "preexec_fn": restore}
    launchers = {number: subprocess.Popen(command, **pipes, **given) for number in sent}
    for number, launcher in launchers.items():
        assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        launcher.send_signal(number)
    for number, launcher in launchers.items():
        said, errors = launcher.communicate(timeout=PATIENCE)
        assert (launcher.returncode, said) == (128 + number, f"saved after {sent[number]}\n" * 2), errors
        assert "Traceback" not in errors
        seen = torch.cuda.device_count()
        warned = re.search(rf"^warning: SLURM_GPUS_ON_NODE is 2 on \S+, but torch \S+ sees {seen} GPUs: ", errors, re.M)
        assert bool(warned) == (seen < 2)


def test_a_launcher_that_waits_for_other_nodes_ends_at_once(tmp_path):
    """Of two nodes the second does not come."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MIMIC"))}
    environment |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "MASTER_ADDR": "localhost"}
    code = f"""
import os, signal, sys, threading
from jobs import launch
launch.run.main = lambda _: (os.kill(os.getpid(), signal.SIGTERM), threading.Event().wait())
launch.main([{str(tmp_path)!r}])
"""
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, timeout=PATIENCE).returncode == 128 + 15
    )


def test_a_process_that_fails_is_not_buried(tmp_path):
    """Its own line is the last, and its status that of the launcher."""
    (tmp_path / "rank.py").write_text("import sys\nprint('error: why', file=sys.stderr)\nsys.exit(2)\n")
    command = [sys.executable, "-m", "jobs.launch", str(tmp_path / "rank.py")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MIMIC"))}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, set(done.stderr.splitlines())) == (2, {"error: why"})


def test_a_container_without_scontrol_is_told_of_master_addr(monkeypatch):
    for name, value in {"STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "2", "STEP_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"scontrol show hostnames n\[1-2\].*export MASTER_ADDR=\$\(hostname\)"):
        distributed.meet(1, 2)


SHOWN = """JobId=12 JobName=my run 1
   Priority=42 Nice=0 Account=lab QOS=class WCKey=*
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:09 TimeLimit=1-02:00:00 TimeMin=N/A
   Partition=public AllocNode:Sid=login:2971
   ReqNodeList=(null) ExcNodeList=n[7-9]
   NumNodes=2 NumCPUs=96 NumTasks=2 CPUs/Task=8 ReqB:S:C:T=0:0:*:1
   Socks/Node=* NtasksPerN:B:S:C=1:0:*:* CoreSpec=*
   MinCPUsNode=8 MinMemoryNode=64G MinTmpDiskNode=0
   Features=a100_80 DelayBoot=00:00:00
   OverSubscribe=NO Contiguous=0 Licenses=(null) Network=(null)
   Command=/home/me/train_mimic.sbatch
   WorkDir=/home/me/job 12
   Comment=mean = .8
   StdErr=/home/me/12/logs/train_12.out
   StdOut=/home/me/12/logs/train_12.out
   TresPerJob={job}
   TresPerTask={task}
   MailUser=me MailType=END,FAIL
"""


@pytest.mark.parametrize("job, task", [("gres:gpu:a100:4", ""), ("gres/gpu:a100:4", "cpu=8")])
def test_a_successor_asks_for_what_the_job_had(job, task):
    """The text of Slurm 22.05, and what newer ones write otherwise."""
    assert sorted(successor.options(SHOWN.format(job=job, task=task), "12")) == sorted(
        [
            "--job-name=my run 1", "--account=lab", "--qos=class", "--no-requeue", "--time=1-02:00:00",
            "--partition=public", "--exclude=n[7-9]", "--nodes=2", "--ntasks=2", "--cpus-per-task=8",
            "--extra-node-info=*:*:1", "--ntasks-per-node=1", "--mincpus=8", "--mem=64G", "--constraint=a100_80",
            "--exclusive", "--chdir=/home/me/job 12", "--comment=mean = .8", "--output=/home/me/12/logs/train_%j.out",
            "--gpus=a100:4", "--mail-user=me", "--mail-type=END,FAIL",
        ]
    )  # fmt: skip


def test_what_excludes_each_other_is_not_asked_for_together():
    shown = "NumTasks=4 CPUs/Task=1 MinMemoryNode=0 CpusPerTres=gres:gpu:3 MemPerTres=gres:gpu:4096 TresPerJob=gres:gpu"
    asked = ["--cpus-per-gpu=3", "--gpus=1", "--mail-type=NONE", "--mem-per-gpu=4096", "--ntasks=4"]
    assert sorted(successor.options(shown, "1")) == asked
