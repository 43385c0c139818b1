"""The job scripts as shipped, on a real Slurm of two nodes (tests/slurm/cluster.sh).

Runs where the daemons are installed and the user is root:
apt-get install --no-install-recommends munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins
"""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, TINY

missing = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"no Slurm here: {', '.join(missing)} not found"),
    pytest.mark.skipif(os.geteuid() != 0, reason="starting a Slurm of its own needs root"),
]

SCRIPT = str(ROOT / "tests" / "slurm" / "cluster.sh")
GPU = "--gpus=a100:1"
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


@pytest.fixture
def house(cluster, tree, tmp_path):
    """A copy of classification/ with the settings that the set-up would write; jobs are submitted from it."""
    folder = tmp_path / "classification"
    skip = shutil.ignore_patterns("tests", "ops_dcnv3", "__pycache__", "output", "results", "logs", "data")
    shutil.copytree(ROOT, folder, ignore=skip)
    (folder / "logs").mkdir()
    (folder / "mimic_settings.sh").write_text(
        f"MIMIC_PYTHON='{sys.executable}'\nMIMIC_DATA_PATH='{tree}'\nMIMIC_CONFIG=tiny.yaml\n"
    )
    (folder / "tiny.yaml").write_text(TINY + "PRINT_FREQ: 1\nRESULTS: results/mimic_cxr\n")
    return House(folder)


class House:
    def __init__(self, folder):
        self.folder = folder
        self.run = folder / "output" / "tiny" / "default"

    def submit(self, script, *arguments, options=(GPU,)):
        """Job id of a submitted script."""
        command = ["sbatch", "--parsable", *options, script, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def log(self, job, kind="train"):
        path = self.folder / "logs" / f"{kind}_{job}.out"
        return path.read_text() if path.exists() else ""

    def until(self, condition, what, job, seconds=240, kind="train"):
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

    def wait(self, job, seconds=240, kind="train"):
        """The state in which the job ends."""
        self.until(lambda: state(job) in ENDED, "the end", job, seconds, kind)
        return state(job)


def state(job):
    text = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    return re.search(r"JobState=(\w+)", text)[1]


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


def test_two_requeues_end_as_an_uninterrupted_run_and_evaluate(house):
    epochs = ("--opts", "TRAIN.EPOCHS", 40)
    job = house.submit("train_mimic.sbatch", *epochs)
    test = house.submit("eval_mimic.sbatch", *epochs, options=(GPU, f"--dependency=afterok:{job}"))
    interrupt(house, job, 1)
    interrupt(house, job, 2)
    assert house.wait(job) == "COMPLETED", house.log(job)
    log = house.log(job)
    assert log.count("stopped by SIGUSR1") == 2 and log.count("resumed from") == 2 and "finished: best" in log
    assert house.wait(test, kind="eval") == "COMPLETED", house.log(test, "eval")
    assert "Atelectasis" in house.log(test, "eval")
    assert list(house.folder.glob("results/mimic_cxr/evaluation_*/metrics.json"))

    whole = house.submit("train_mimic.sbatch", *epochs, "--tag", "whole")
    assert house.wait(whole) == "COMPLETED", house.log(whole)
    assert "stopped by" not in house.log(whole)
    assert_same(house.run, house.run.with_name("whole"))

    again = house.submit("train_mimic.sbatch", *epochs)
    assert house.wait(again) == "COMPLETED" and "already finished" in house.log(again)


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


def test_a_truncated_checkpoint_falls_back_to_the_one_before(house):
    job = house.submit("train_mimic.sbatch")
    assert house.wait(job) == "COMPLETED", house.log(job)
    with open(house.run / "last_ckpt.pth", "r+b") as file:
        file.truncate(1000)
    again = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 3)
    assert house.wait(again) == "COMPLETED", house.log(again)
    log = house.log(again)
    assert "falling back to the one before" in log and "resumed from" in log and weights(house.run)["epoch"] == 3


def test_mistakes_are_named(house):
    (house.folder / "mimic_settings.sh").rename(house.folder / "away.sh")
    job = house.submit("train_mimic.sbatch")
    assert house.wait(job) == "FAILED" and "run bash setup_mimic_env.sh first" in house.log(job)
    settings = (house.folder / "away.sh").read_text()
    settings = re.sub(r"MIMIC_DATA_PATH=.*", "MIMIC_DATA_PATH=/does/not/exist", settings)
    (house.folder / "mimic_settings.sh").write_text(settings)
    job = house.submit("train_mimic.sbatch")
    assert house.wait(job) == "FAILED" and "'/does/not/exist', is not there" in house.log(job)
    (house.folder / "elsewhere" / "logs").mkdir(parents=True)
    command = ["sbatch", "--parsable", GPU, "../train_mimic.sbatch"]
    done = subprocess.run(command, cwd=house.folder / "elsewhere", capture_output=True, text=True, check=True)
    job = done.stdout.strip()
    assert house.wait(job) == "FAILED"
    assert "change to the folder classification/" in (house.folder / "elsewhere/logs" / f"train_{job}.out").read_text()


def test_the_time_limit_passes_unnoticed(house):
    """Slurm's own signal, at most a minute early, in jobs of two minutes."""
    job = house.submit(
        "train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 200, options=(GPU, "-t", "2", "--signal=B:USR1@45")
    )
    assert house.wait(job, 600) == "COMPLETED", house.log(job)
    log = house.log(job)
    assert log.count("in the queue again") >= 1 and "finished: best" in log


def test_a_killed_node_costs_no_more_than_its_epoch(house, cluster):
    """slurmd and the job's processes killed: Slurm requeues the job, which goes on from the last checkpoint."""
    options = (GPU, "--nodelist=n1")
    job = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 60, options=options)
    house.until(lambda: (house.run / "last_ckpt.pth").exists(), "a checkpoint", job)
    pid = (cluster / "slurmd.n1.pid").read_text().strip()
    try:
        subprocess.run(["kill", "-9", pid], check=True)
        # All that a node takes with it. Slurm's stepds first: they would still report that the script has failed.
        for its in (f"slurmstepd: .{job}[.]", f"{cluster}/spool.n1/job", f"rdzv-id {job}-", "--cfg tiny.yaml"):
            subprocess.run(["pkill", "-9", "-f", "--", its])
        subprocess.run(["scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=killed"], check=True)
        house.until(lambda: "start 2" in house.log(job) or state(job) == "PENDING", "a requeue", job)
    finally:
        subprocess.run(["slurmd", "-N", "n1"], check=True)  # it registers, and its node is up again
    assert house.wait(job) == "COMPLETED", house.log(job)
    log = house.log(job)
    assert log.count("resumed from") == 1 and "finished: best" in log and weights(house.run)["epoch"] == 60


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


def test_where_requeue_is_refused_a_successor_is_submitted(house):
    """A job submitted with --no-requeue: the second job has another id, and continues to the last epoch."""
    options = (GPU, "--no-requeue")
    job = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 60, options=options)
    house.until(lambda: "images per epoch" in house.log(job), "training", job)
    time.sleep(1)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    assert house.wait(job) == "COMPLETED", house.log(job)
    assert "a successor is submitted" in house.log(job)
    successor = re.search(r"Submitted batch job (\d+)", house.log(job))[1]
    assert house.wait(successor) == "COMPLETED", house.log(successor)
    assert "resumed from" in house.log(successor) and "finished: best" in house.log(successor)


def test_a_turn_without_progress_is_the_last(house):
    """The place at which the turn before stopped is reached again and not left: the job ends with the reason."""
    job = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 60)
    interrupt(house, job, 1)
    status = house.folder / "logs" / f"train_{job}.status"
    place = status.read_text()
    # A main.py that is stopped before its first update, whatever it is asked.
    (house.folder / "main.py").write_text(f"open({str(status)!r}, 'w').write({place!r})")
    assert house.wait(job) == "FAILED", house.log(job)
    assert "two turns ended at the same place" in house.log(job) and "sbatch -t" in house.log(job)


def test_data_can_be_staged(house, tree, tmp_path, monkeypatch):
    monkeypatch.setenv("MIMIC_STAGE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    job = house.submit("train_mimic.sbatch")
    assert house.wait(job) == "COMPLETED", house.log(job)
    assert f"copying {tree} to {tmp_path}/node/mimic_{job}" in house.log(job)
    assert f"data in {tmp_path}/node/mimic_{job}" in house.log(job)
    assert not list((tmp_path / "node").glob("mimic_*"))  # the disk is given back


def test_a_preempted_job_gives_way_and_goes_on(house):
    """A partition of higher priority wants its node: the job saves its place, makes room, and continues afterwards."""
    job = house.submit("train_mimic.sbatch", "--opts", "TRAIN.EPOCHS", 60, options=(GPU, "--nodelist=n1"))
    house.until(lambda: "images per epoch" in house.log(job), "training", job)
    time.sleep(1)
    command = ["sbatch", "--parsable", "-p", "owners", "--nodelist=n1", "--exclusive", "--output=/dev/null"]
    wrap = ["--wrap", "sleep 3"]
    other = subprocess.run(
        [*command, *wrap], cwd=house.folder, capture_output=True, text=True, check=True
    ).stdout.strip()
    house.until(lambda: state(other) == "COMPLETED", "the other job", job)
    assert house.wait(job) == "COMPLETED", house.log(job)
    log = house.log(job)
    assert log.count("stopped by") == 1 and log.count("resumed from") == 1 and "finished: best" in log
    assert weights(house.run)["epoch"] == 60


def test_srun_may_start_the_ranks_itself(house, tree):
    """Without torchrun: two tasks on two nodes, told apart by SLURM_*."""
    wrap = f"srun {sys.executable} main.py --cfg tiny.yaml --data-path {tree}"
    options = ("-N", "2", "--ntasks-per-node=1", "--output=logs/train_%j.out", "--wrap", wrap)
    done = subprocess.run(["sbatch", "--parsable", *options], cwd=house.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    assert house.wait(job) == "COMPLETED", house.log(job)
    assert "on 2 x cpu" in house.log(job) and "finished: best" in house.log(job)


def test_a_rank_that_dies_ends_the_job_with_its_message(house, own_tree):
    """One bad image, on one of two ranks: the other does not wait for it."""
    settings = house.folder / "mimic_settings.sh"
    settings.write_text(re.sub(r"MIMIC_DATA_PATH=.*", f"MIMIC_DATA_PATH='{own_tree}'", settings.read_text()))
    bad = sorted(own_tree.rglob("*.jpg"))
    for path in bad[:5]:
        path.write_bytes(b"no image")
    job = house.submit("train_mimic.sbatch", options=("--nodes=2", "--gpus=a100:2"))
    assert house.wait(job, 120) == "FAILED", house.log(job)
    assert re.search(r"error: \S+\.jpg: cannot be read as an image", house.log(job)), house.log(job)
