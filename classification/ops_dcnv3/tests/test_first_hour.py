"""The first hour on a GPU, dry: the order and the limits of its steps, and what its checks can see."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import dcnv3

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "first_hour")]
import kernels  # noqa: E402

import benchmark  # noqa: E402

TOOLS = {
    "timeout": 'echo "$3 ${*:4}" >>$CALLS; exec "${@:4}"',  # timeout -k 5 LIMIT COMMAND...
    "python3": 'case "$*" in *dcnv3) echo "cuda: ${LOADED:-no nvcc}" ;; *correctness*) echo FAILED: it; exit 1 ;; esac',
    **dict.fromkeys(("nvidia-smi", "nvcc", "ncu", "compute-sanitizer"), "echo $0"),
}


@pytest.fixture
def run(tmp_path):
    """run(number, **environment) -> (what run.sh prints, [(limit, command), ...]), with tools that do nothing."""
    for name, text in TOOLS.items():
        tool = tmp_path / "tools" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/bash\n{text}\n")
        tool.chmod(0o755)

    def run(number, **environment):
        environment |= {"PATH": f"{tmp_path}/tools:{os.environ['PATH']}", "CALLS": str(tmp_path / number)}
        command = ["bash", HERE.parent / "first_hour" / "run.sh", number]
        environment = {**os.environ, **environment, "OUT": str(tmp_path / "out")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        calls = [line.split(" ", 1) for line in (tmp_path / number).read_text().splitlines()]
        return done.stdout, [(int(limit), command) for limit, command in calls]

    return run


@pytest.mark.parametrize("number, minutes", [("1", 6), ("2", 9)])
def test_every_step_has_its_turn_within_the_minutes(run, tmp_path, number, minutes):
    said, calls = run(number, LOADED="kernels loaded (9.0)")
    assert sum(limit for limit, command in calls if command != "bash -c cpu") <= 60 * minutes - 10  # cpu runs beside
    names = re.findall(r"== (\w+): exit status", said)
    assert len(names) == len(calls) and {path.stem for path in (tmp_path / "out").glob("*.md")} == set(names)
    if number == "1":
        assert names == [
            "environment", "correctness", "behaviour", "levels", "ncu", "ncu_metrics", "atomics", "cpu"
        ]  # fmt: skip
        environment = (tmp_path / "out" / "environment.md").read_text()
        assert "nvidia-smi" in environment and "cuda: kernels loaded (9.0)" in environment
        assert "== FAILED, see" in said  # a failing step stops no other
        assert "environment build" not in run("1")[0] and "build" in [c.split()[-1] for _, c in run("1")[1]]


def test_what_the_steps_run_runs(run, tmp_path, capsys):
    """Each command of Python, in this process and dry."""
    for _, command in run("1", LOADED="kernels loaded (9.0)")[1] + run("2")[1]:
        words = command.split()
        if "ops_dcnv3/benchmark.py" in words and "behaviour" not in words:  # tests of their own
            with pytest.raises(SystemExit) as end:
                benchmark.main([*words[2:], "--dry"])
            assert end.value.code == 0
        elif "ops_dcnv3/first_hour/kernels.py" in words:
            kernels.main([*words[words.index("ops_dcnv3/first_hour/kernels.py") + 1 :], "--small", "--cpu"])
    assert "FAILED" not in capsys.readouterr().out
    for part in ("correctness", "levels", "atomics"):
        assert json.loads((tmp_path / "out" / "figures" / f"dcnv3_{part}.json").read_text())["failures"] == []


def rolled(input, *rest, **settings):
    """The operator with the gradient of its input a pixel off."""
    input = input.clone()
    input.register_hook(lambda grad: grad.roll(1, 2))
    return dcnv3.dcnv3(input, *rest, **settings)


def test_the_check_sees_a_gradient_that_is_a_pixel_off(tmp_path, monkeypatch):
    names = {"dcnv3": rolled, "reference": dcnv3.reference, "kernels": lambda: ("cpu",)}
    monkeypatch.setattr(benchmark, "dcnv3", SimpleNamespace(**names))
    assert benchmark.Check(True, True, tmp_path).run("correctness") > 9
    failures = json.loads((tmp_path / "dcnv3_correctness.json").read_text())["failures"]
    assert "golden cases differ" in failures[0] and "backward by shape: error" in " ".join(failures)


def test_the_check_names_tests_of_behaviour_that_exist(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(benchmark.Check, "command", lambda self, what, command, *_: called.append(command))
    assert benchmark.Check(True, True, tmp_path).run("behaviour") == 0
    (command,) = called
    tests = "".join(path.read_text() for path in command if isinstance(path, Path))
    for word in command[-1].split(" or "):
        assert re.search(rf"def test_\w*{word}", tests), word


def test_the_check_stops_without_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.dcnv3, "kernels", lambda: ())
    with pytest.raises(SystemExit, match="there are no kernels for cpu to check: `python -m dcnv3` says why"):
        benchmark.main(["--check", "--dry", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
