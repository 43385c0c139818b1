"""The job scripts as shipped, on a real Slurm of four nodes (tests/slurm/cluster.sh).

Nearly all of the time is waiting, so the tests wait side by side: each is a scenario in a thread of its own, and what
disturbs others (a dead node, a preempting partition) has a node of its own.

Runs where the daemons are installed and the user is root:
apt-get install --no-install-recommends munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from conftest import ROOT, TINY
from dataset.synthetic.tree import write_tree

missing = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"no Slurm here: {', '.join(missing)} not found"),
    pytest.mark.skipif(os.geteuid() != 0, reason="starting a Slurm of its own needs root"),
]

SCRIPT = str(ROOT / "tests" / "slurm" / "cluster.sh")
GPU = "--gpus=a100:1"
YAML = TINY + "PRINT_FREQ: 1\nRESULTS: results/mimic_cxr\n"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")  # NODE_FAIL is passed through on the way to a requeue


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Starts Slurm; the folder of its configuration is in the environment while it runs."""
    lab = tmp_path_factory.mktemp("slurm")
    for parent in (lab, *lab.parents[:2]):  # munge refuses a socket that others cannot reach
        parent.chmod(0o755)
    with open(lab / "up.log", "w") as log:  # a pipe would stay open in the daemons
        done = subprocess.run(["bash", SCRIPT, "up", lab], stdout=log, stderr=log)
    assert done.returncode == 0, (lab / "up.log").read_text()
    os.environ["SLURM_CONF"] = str(lab / "etc" / "slurm.conf")
    yield lab
    subprocess.run(["bash", SCRIPT, "down", lab])
    del os.environ["SLURM_CONF"]


PATIENCE = 600  # seconds: a dozen jobs start at once, on a machine that others may use


def side_by_side(scenario):
    """Makes a test of scenario(house): the scenarios of all selected tests run at once."""

    def test(running):
        running[scenario].result()

    test.scenario, test.__doc__ = scenario, scenario.__doc__
    return test


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A tree of three updates an epoch: what counts here is that the runs last, and that they leave room for others."""
    root = tmp_path_factory.mktemp("few")
    write_tree(root, patients=14, size=64, progress=False)
    return root


@pytest.fixture(scope="module")
def running(request, cluster, few, tmp_path_factory):
    """{scenario: its future} of the selected tests."""
    items = [item.function for item in request.session.items if hasattr(item.function, "scenario")]
    with ThreadPoolExecutor(8) as pool:
        folders = [tmp_path_factory.mktemp(f"house{k}") for k in range(len(items))]
        yield {
            item.scenario: pool.submit(lambda item, folder: item.scenario(House(folder, few)), item, folder)
            for item, folder in zip(items, folders)
        }


class House:
    """A copy of classification/ with the settings that the set-up would write; jobs are submitted from it."""

    def __init__(self, folder, tree):
        self.home, self.tree = folder, tree
        self.folder = folder / "classification"
        self.run = self.folder / "output" / "tiny" / "default"
        skip = shutil.ignore_patterns("tests", "ops_dcnv3", "output", "results", "logs", "data")
        shutil.copytree(ROOT, self.folder, ignore=skip)
        (self.folder / "logs").mkdir()
        self.use_data(tree)
        (self.folder / "tiny.yaml").write_text(YAML)

    def use_data(self, folder):
        """Writes the settings."""
        (self.folder / "mimic_settings.sh").write_text(
            f"MIMIC_PYTHON='{sys.executable}'\nMIMIC_DATA_PATH='{folder}'\nMIMIC_CONFIG=tiny.yaml\n"
        )

    def own_tree(self):
        """A copy of the tree that may be damaged."""
        shutil.copytree(self.tree, self.home / "tree")
        return self.home / "tree"

    def submit(self, script, *arguments, options=(GPU,), cwd=None, **environment):
        """Job id of a submitted script."""
        command = ["sbatch", "--parsable", *options, script, *map(str, arguments)]
        environment = os.environ | environment
        done = subprocess.run(command, cwd=cwd or self.folder, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def processes(self, **variables):
        """Ids of the processes of this house's jobs, with these variables in their environment."""
        wanted = {f"{k}={v}".encode() for k, v in {"SLURM_SUBMIT_DIR": self.folder, **variables}.items()}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted <= set(path.read_bytes().split(b"\0")):
                    found.append(int(path.parent.name))
            except OSError:  # it has ended
                pass
        return found

    def log(self, job, kind="train"):
        path = self.folder / "logs" / f"{kind}_{job}.out"
        return path.read_text() if path.exists() else ""

    def until(self, condition, what, job, seconds=PATIENCE, kind="train"):
        """Waits for condition(); a requeued job is let in at once instead of after Slurm's two minutes."""
        waiting = 0
        for _ in range(seconds * 2):
            now = state(job)  # before the condition: what a finished job wrote is then there
            if condition():
                return
            if now in ENDED:
                break
            waiting = waiting + 1 if now == "PENDING" else 0
            # Not at once: a node refuses a job in the second in which it ended its turn before.
            if waiting == 6:
                subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)
            time.sleep(0.5)
        raise AssertionError(f"{what} did not happen (job {state(job)}); the log:\n{self.log(job, kind)}")

    def wait(self, job, seconds=PATIENCE, kind="train"):
        """The state in which the job ends."""
        self.until(lambda: state(job) in ENDED, "the end", job, seconds, kind)
        return state(job)


def shown(job):
    """What Slurm shows of a job, as a dictionary of texts."""
    text = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    return dict(re.findall(r"(\S+?)=(\S*)", text))


def state(job):
    return shown(job)["JobState"]


def interrupt(house, job, turn):
    """Signals the job as its time limit would, as soon as its turn number `turn` trains."""
    house.until(lambda: house.log(job).count("images per epoch") >= turn, f"turn {turn}", job)
    time.sleep(1)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    house.until(lambda: house.log(job).count("in the queue again") >= turn, f"requeue {turn}", job)


def weights_at(path):
    return torch.load(path, weights_only=True)


def weights(folder):
    return weights_at(folder / "last_ckpt.pth")


def assert_same(one, other):
    one, other = weights(one), weights(other)
    assert (one["epoch"], one["update"]) == (other["epoch"], other["update"])
    for part in ("model", "model_ema"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())


@side_by_side
def test_the_time_limit_passes_unnoticed(house):
    """Slurm's own signal, at most a minute early, in a turn of three minutes; two epochs later the run ends."""

    def train_to(epochs):
        (house.folder / "tiny.yaml").write_text(YAML.replace("EPOCHS: 2\n", f"EPOCHS: {epochs}\n", 1))

    train_to(5000)
    job = house.submit("train_mimic.sbatch", options=(GPU, "-t", "3", "--signal=B:USR1@60"))
    house.until(lambda: "images per epoch" in house.log(job), "training", job)
    for process in house.processes(SLURM_JOB_ID=job):  # until the signal comes, others may have the processors
        os.setpriority(os.PRIO_PROCESS, process, 19)
    house.until(lambda: "in the queue again" in house.log(job), "the limit", job)
    epoch = int(re.search(r"interrupted (\d+) \d+; the job is in the queue again", house.log(job))[1])
    train_to(epoch + 2)
    # What follows is no matter of time: on a busy machine the start alone may take the whole of a short turn.
    subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=30"], check=True)
    assert house.wait(job) == "COMPLETED", house.log(job)
    log = house.log(job)
    assert log.count("in the queue again") == 1 and "finished: best" in log and weights(house.run)["epoch"] == epoch + 2


@side_by_side
def test_two_requeues_end_as_an_uninterrupted_run_and_evaluate(house):
    epochs = ("--opts", "TRAIN.EPOCHS", 14)
    whole = house.submit("train_mimic.sbatch", *epochs, "--tag", "whole")
    job = house.submit("train_mimic.sbatch", *epochs)
    test = house.submit("eval_mimic.sbatch", *epochs, options=(GPU, f"--dependency=afterok:{job}"))
    interrupt(house, job, 1)
    interrupt(house, job, 2)
    assert house.wait(job) == "COMPLETED", house.log(job)
    log = house.log(job)
    assert log.count("stopped by SIGUSR1") == 2 and log.count("resumed from") == 2 and "finished: best" in log
    again = house.submit("train_mimic.sbatch", *epochs)
    assert house.wait(test, kind="eval") == "COMPLETED", house.log(test, "eval")
    assert "Atelectasis" in house.log(test, "eval")
    assert list(house.folder.glob("results/mimic_cxr/evaluation_*/metrics.json"))

    assert house.wait(whole) == "COMPLETED", house.log(whole)
    assert "stopped by" not in house.log(whole)
    assert_same(house.run, house.run.with_name("whole"))

    assert house.wait(again) == "COMPLETED" and "already finished" in house.log(again)


@side_by_side
def test_two_nodes_train_as_one_and_a_second_job_is_refused(house):
    nodes = ("--nodes=2", "--gpus=a100:2")
    job = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 60, options=nodes)
    house.until(lambda: "images per epoch" in house.log(job), "training", job)
    second = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 60)
    assert house.wait(second) == "FAILED"
    assert "another run is writing to" in house.log(second) and f"job {job}" in house.log(second)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    assert house.wait(job) == "COMPLETED", house.log(job)
    assert "on 2 x cpu" in house.log(job) and house.log(job).count("resumed from") == 1


@side_by_side
def test_where_requeue_is_refused_a_successor_takes_over(house):
    """Of a job with --no-requeue: another id, the same options, and what waits for the first waits for it."""
    asked = "-p htc -t 1:30:00 -c 3 --mem=7000M -A lab -C big -x n2 -L mimic:1 --nice=3 --mincpus=5 --contiguous"
    options = (GPU, "--no-requeue", *asked.split(), "-J", "my run", "--comment=two words", "-o", "logs/own%j_%x.txt")
    job = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 14, options=options)
    log = house.folder / "logs" / f"own{job}_my run.txt"
    test = house.submit("eval_mimic.sbatch", options=(GPU, f"--dependency=afterok:{job}"))
    house.until(lambda: log.exists() and "images per epoch" in log.read_text(), "training", job)
    time.sleep(1)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    assert house.wait(job) == "FAILED", log.read_text()  # not finished: nothing may take it for success
    assert "a successor is submitted" in log.read_text()
    successor = re.search(r"Submitted batch job (\d+)", log.read_text())[1]
    log = house.folder / "logs" / f"own{successor}_my run.txt"
    assert state(test) == "PENDING" and shown(test)["Dependency"] == f"afterok:{successor}(unfulfilled)"

    assert house.wait(successor) == "COMPLETED", log.read_text()
    assert "resumed from" in log.read_text() and "finished: best" in log.read_text()
    its_own = "JobId|Priority|JobState|Reason|(Derived)?ExitCode|Std(Out|Err)|.*(Time|Sched|AllocNode).*"
    first, second = ({k: v for k, v in shown(j).items() if not re.fullmatch(its_own, k)} for j in (job, successor))
    assert first == second
    assert first["Account"] == "lab" and first["MinMemoryNode"] == "7000M" and first["CPUs/Task"] == "3"
    assert shown(successor)["TimeLimit"] == "01:30:00"
    assert house.wait(test, kind="eval") == "COMPLETED", house.log(test, "eval")


@side_by_side
def test_seeds_of_an_array_are_runs_of_their_own(house):
    """Task 1, whose number is the array's own, is interrupted: it alone is requeued."""
    epochs = ("--opts", "TRAIN.EPOCHS", 12)
    named = ("--array=0-1", "--output=logs/train_%A_%a.out")
    # The variable is what the settings give to the shell that submits.
    job = house.submit("train_mimic.sbatch", *epochs, options=(GPU, *named), SBATCH_ACCOUNT="lab")
    assert shown(job)["Account"] == "lab"
    test = house.submit("eval_mimic.sbatch", *epochs, options=(GPU, "--array=0-1", f"--dependency=aftercorr:{job}"))
    interrupt(house, f"{job}_1", 1)
    for k in (1, 0):
        assert house.wait(f"{job}_{k}") == "COMPLETED", house.log(f"{job}_{k}")
        assert house.log(f"{job}_{k}").count("resumed from") == k
        assert weights(house.run.with_name(f"seed{k}"))["config"]["SEED"] == k
    for k in (0, 1):
        assert house.wait(f"{test}_{k}") == "COMPLETED"
    assert len(list(house.folder.glob("results/mimic_cxr/evaluation_*/metrics.json"))) == 2


@side_by_side
def test_a_preempted_job_gives_way_and_goes_on(house):
    """A partition of higher priority wants its node: the job saves its place, makes room, and continues afterwards."""
    job = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 24, options=(GPU, "-p", "lent"))
    house.until(lambda: "images per epoch" in house.log(job), "training", job)
    time.sleep(1)
    command = ["sbatch", "--parsable", "-p", "owners", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"]
    other = subprocess.run(command, cwd=house.folder, capture_output=True, text=True, check=True).stdout.strip()
    house.until(lambda: state(other) == "COMPLETED", "the other job", job)
    assert house.wait(job) == "COMPLETED", house.log(job)
    log = house.log(job)
    assert log.count("stopped by") == 1 and log.count("resumed from") == 1 and "finished: best" in log
    assert weights(house.run)["epoch"] == 24


@side_by_side
def test_a_killed_node_costs_no_more_than_its_epoch(house):
    """slurmd and the job's processes killed: Slurm requeues the job, which goes on from the last checkpoint."""
    job = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 14, options=(GPU, "-p", "frail"))
    house.until(lambda: (house.run / "last_ckpt.pth").exists(), "a checkpoint", job)
    lab = Path(os.environ["SLURM_CONF"]).parents[1]
    pid = int((lab / "slurmd.n3.pid").read_text())
    try:
        os.kill(pid, signal.SIGKILL)
        # All that a node takes with it. Slurm's stepds first: they would still report that the script has failed.
        its = house.processes(SLURM_JOB_ID=job)
        parents = {int(Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[1]) for p in its}
        stepds = [p for p in parents if b"slurmstepd" in Path(f"/proc/{p}/cmdline").read_bytes()]
        assert stepds
        for process in (*stepds, *its):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        subprocess.run(["scontrol", "update", "NodeName=n3", "State=DOWN", "Reason=killed"], check=True)
        house.until(lambda: "start 2" in house.log(job) or state(job) == "PENDING", "a requeue", job)
    finally:
        subprocess.run(["slurmd", "-N", "n3"], check=True)  # it registers, and its node is up again
    assert house.wait(job) == "COMPLETED", house.log(job)
    log = house.log(job)
    assert log.count("resumed from") == 1 and "finished: best" in log and weights(house.run)["epoch"] == 14


@side_by_side
def test_a_full_disk_leaves_the_last_checkpoint_whole(house):
    """Room for two checkpoints and a half: the error names the disk; with more room the run goes on."""
    disk = house.folder / "output"
    disk.mkdir()
    opts = ("--opts", "TRAIN.EPOCHS", 4, "TRAIN.EMA.ENABLE", False, "SAVE_FREQ", 1)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", disk], check=True)
    try:
        measure = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 1, "--tag", "measure")
        assert house.wait(measure) == "COMPLETED", house.log(measure)
        size = (house.run.with_name("measure") / "last_ckpt.pth").stat().st_size
        shutil.rmtree(house.run.with_name("measure"))
        subprocess.run(["mount", "-o", f"remount,size={int(4.5 * size) // 4096 * 4}K", "tmpfs", disk], check=True)
        job = house.submit("train_mimic.sbatch", *opts)
        assert house.wait(job) == "FAILED", house.log(job)
        assert "the checkpoint could not be written" in house.log(job), house.log(job)
        done = max(weights_at(path)["epoch"] for path in house.run.glob("*_ckpt*.pth"))
        assert done >= 1
        subprocess.run(["mount", "-o", "remount,size=64M", "tmpfs", disk], check=True)
        again = house.submit("train_mimic.sbatch", *opts)
        assert house.wait(again) == "COMPLETED", house.log(again)
        assert "resumed from" in house.log(again) and weights(house.run)["epoch"] == 4
    finally:
        subprocess.run(["umount", "-l", disk])


@side_by_side
def test_a_truncated_checkpoint_falls_back_to_the_one_before(house):
    job = house.submit("train_mimic.sbatch")
    assert house.wait(job) == "COMPLETED", house.log(job)
    with open(house.run / "last_ckpt.pth", "r+b") as file:
        file.truncate(1000)
    again = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 3)
    assert house.wait(again) == "COMPLETED", house.log(again)
    log = house.log(again)
    assert "falling back to the one before" in log and "resumed from" in log and weights(house.run)["epoch"] == 3


@side_by_side
def test_a_turn_without_progress_is_the_last(house):
    """The place at which the turn before stopped is reached again and not left: the job ends with the reason."""
    job = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 14)
    interrupt(house, job, 1)
    status = house.folder / "logs" / f"train_{job}.status"
    place = status.read_text()
    # A main.py that is stopped before its first update, whatever it is asked.
    (house.folder / "main.py").write_text(f"open({str(status)!r}, 'w').write({place!r})")
    assert house.wait(job) == "FAILED", house.log(job)
    assert "two turns ended at the same position" in house.log(job) and "sbatch -t" in house.log(job)


@side_by_side
def test_data_can_be_staged_and_other_data_evaluated(house):
    node = house.home / "node"
    node.mkdir()
    house.use_data(house.tree / "files")  # the tables are beside it
    with open(house.folder / "mimic_settings.sh", "a") as file:
        file.write("MIMIC_PRETRAINED=/of/tiny.pth\n")
    own = ("--opts", "MODEL.INTERN_IMAGE.CHANNELS", 32)
    job = house.submit("train_mimic.sbatch", *own, MIMIC_STAGE="1", TMPDIR=str(node))
    assert house.wait(job) == "COMPLETED", house.log(job)
    assert f"copying {house.tree}/files to {node}/mimic_{job}" in house.log(job)
    assert "/of/tiny.pth is not passed on: it is for the model of tiny.yaml" in house.log(job)
    blind = torch.cuda.device_count() == 0
    assert blind == ("warning: SLURM_GPUS_ON_NODE is 1" in house.log(job)), house.log(job)
    assert f"data in {node}/mimic_{job}" in house.log(job)
    assert not list(node.glob("mimic_*"))  # the disk is given back

    house.use_data("/gone")
    other = house.home / "nih"
    write_tree(other, patients=14, size=64, layout="nih", progress=False)
    command = ("eval_mimic.sbatch", house.run / "ckpt_epoch_2.pth", "--dataset", "nih", "--data-path", other, *own)
    test = house.submit(*command)
    assert house.wait(test, kind="eval") == "COMPLETED", house.log(test, "eval")
    log = house.log(test, "eval")
    assert f"data in {other}" in log and "evaluating" in log and "ckpt_epoch_2.pth" in log
    (metrics,) = house.folder.glob("results/*/evaluation_*/metrics.json")
    assert json.loads(metrics.read_text())["dataset"] == "nih"


@side_by_side
def test_a_rank_that_dies_ends_the_job_with_its_message(house):
    """One bad image, on one of two ranks: the other does not wait for it, and says no more than a line."""
    tree = house.own_tree()
    house.use_data(tree)
    bad = sorted(tree.rglob("*.jpg"))
    for path in bad[::8]:
        path.write_bytes(b"no image")
    job = house.submit("train_mimic.sbatch", options=("--nodes=2", "--gpus=a100:2"))
    assert house.wait(job) == "FAILED", house.log(job)
    log = house.log(job)
    assert re.search(r"error: \S+\.jpg: cannot be read as an image", log), log
    assert "error" in log and log.index("error") == log.index("error: " + str(tree)), log
    assert "Traceback" not in log and "frame #" not in log, log


@side_by_side
def test_a_killed_rank_is_named(house):
    """Two GPUs of one node, one process killed as for want of memory; and the same of ranks that srun started."""
    flags = f"--cfg tiny.yaml --data-path {house.tree} --tag plain --opts TRAIN.EPOCHS 5000"
    wrap = f"srun {sys.executable} -u main.py {flags}"
    plain = house.submit("--wrap", wrap, options=("--ntasks=2", "--output=logs/train_%j.out"))
    job = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 5000, options=("--gpus=a100:2",))
    house.until(lambda: "update" in house.log(job), "training", job)
    assert "on 2 x cpu" in house.log(job)
    (its,) = house.processes(SLURM_JOB_ID=job, RANK="1")
    os.kill(its, signal.SIGKILL)
    assert house.wait(job) == "FAILED"
    log = house.log(job)
    assert re.search(r"error: the process of rank 1 on \S+ was ended by SIGKILL, most often for memory", log), log
    assert "Traceback" not in log and "frame #" not in log, log

    house.until(lambda: "update" in house.log(plain), "training", plain)
    (its,) = house.processes(SLURM_JOB_ID=plain, SLURM_PROCID="1")
    os.kill(its, signal.SIGKILL)
    assert house.wait(plain) == "FAILED"
    log = house.log(plain)
    assert "task 1: Killed" in log and "Traceback" not in log, log
    for text in (log, (house.run.with_name("plain") / "log_rank0.txt").read_text()):
        assert text.count("error: another process of this run has ended") == 1, text


@side_by_side
def test_srun_may_start_the_ranks_itself(house):
    """Without torchrun: two tasks on two nodes, and two on one, told apart by SLURM_*."""
    wrap = f"srun {sys.executable} main.py --cfg tiny.yaml --data-path {house.tree} --tag $SLURM_JOB_ID"
    for options in (("-N", "2", "--ntasks-per-node=1"), ("-N", "1", "--ntasks=2")):
        job = house.submit("--wrap", wrap, options=(*options, "--output=logs/train_%j.out"))
        assert house.wait(job) == "COMPLETED", house.log(job)
        assert "on 2 x cpu" in house.log(job) and "finished: best" in house.log(job)


@side_by_side
def test_mistakes_are_named(house):
    settings = house.folder / "mimic_settings.sh"
    settings.rename(house.folder / "away.sh")
    job = house.submit("train_mimic.sbatch")
    assert house.wait(job) == "FAILED" and "run bash setup_mimic_env.sh first" in house.log(job)
    house.use_data("/does/not/exist")
    job = house.submit("train_mimic.sbatch")
    assert house.wait(job) == "FAILED" and "'/does/not/exist', does not exist" in house.log(job)
    job = house.submit("eval_mimic.sbatch", "--data-path=/nor/this")
    assert house.wait(job, kind="eval") == "FAILED"
    assert "--data-path /nor/this is not a folder" in house.log(job, "eval")
    elsewhere = house.folder / "elsewhere"
    (elsewhere / "logs").mkdir(parents=True)
    job = house.submit("../train_mimic.sbatch", cwd=elsewhere)
    assert house.wait(job) == "FAILED"
    assert "change to the folder classification/" in (elsewhere / "logs" / f"train_{job}.out").read_text()
