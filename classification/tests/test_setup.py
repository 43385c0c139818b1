"""The set-up script's options and mistakes; what it installs is shown by these tests running at all."""

import atexit
import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from common.errors import UserError
from conftest import ROOT
from download_weights import download
from jobs import weights


@functools.cache
def script():
    """A copy of the script in a folder of its own, without the answers that this checkout's set-up has remembered."""
    folder = tempfile.mkdtemp(prefix="setup-")
    atexit.register(shutil.rmtree, folder)
    shutil.copy(ROOT / "requirements_mimic.txt", folder)
    return shutil.copy(ROOT / "setup_mimic_env.sh", folder)


def setup(*options, **environment):
    command = ["bash", str(script()), *map(str, options)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)


@pytest.fixture
def machine(tmp_path):
    """machine(tool="what it prints", ...) -> environment in which these commands, and few others, are found."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in (
        "bash cat cut sed awk head grep df dirname basename readlink timeout tr find sort xargs sha256sum"
    ).split():
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").symlink_to(sys.executable)

    def make(modules=(), **prints):
        """modules: {name: {tool: what it prints}} that `module load` brings; without any there is no module system."""

        def write(folder, commands):
            folder.mkdir(exist_ok=True)
            for command, text in commands.items():
                path = folder / command
                path.write_text(f"#!{tools}/bash\necho '{text}'\n")
                path.chmod(0o755)

        write(tools, prints)
        cases = "".join(f'{name}) PATH="{tmp_path}/{k}:$PATH" ;; ' for k, name in enumerate(modules))
        for k, name in enumerate(modules):
            write(tmp_path / str(k), modules[name])
        environment = {"PATH": str(tools), "CXX": "", "CUDA_HOME": "", "MIMIC_ENV_DIR": ""}
        if modules:
            environment["BASH_FUNC_module%%"] = f'() {{ case "$2" in {cases} *) return 1 ;; esac; }}'
        return environment

    return make


def check(environment, *options):
    done = setup("--check", *options, **environment)
    assert done.returncode == 0, done.stderr
    return re.sub(r" +", " ", done.stdout)


def nvcc(version):
    return f"Cuda compilation tools, release {version}, V{version}.1"


def test_without_gpu_and_compiler(machine):
    out = check(machine())
    assert "GPUs: none" in out and "PyTorch: 2.13.0, build cpu" in out
    assert "kernels: none: no g++ from 9 to 99 (no module system here); the operator is then PyTorch code" in out


@pytest.mark.parametrize(
    "release, build, compilers, chosen",
    [
        ("11.8", "2.7.1, build cu118", {"g++": "12", "g++-11": "11.2.0"}, "g++-11 (11)"),
        ("12.1", "2.13.0, build cu126", {"g++": "13", "g++-12": "12"}, "g++-12 (12)"),
        ("12.6", "2.13.0, build cu126", {"g++": "8.5.0", "g++-13": "13.1"}, "g++-13 (13)"),
        ("12.9", "2.13.0, build cu126", {"g++": "14"}, "g++ (14)"),
        ("13.0", "2.13.0, build cu130", {"g++": "15.1.0"}, "g++ (15)"),
        ("11.8", "2.7.1, build cu118", {"g++": "12"}, "none"),
    ],
)
def test_pytorch_and_compiler_follow_the_toolkit(machine, release, build, compilers, chosen):
    out = check(machine(**{"nvidia-smi": "NVIDIA A100", "nvcc": nvcc(release)}, **compilers))
    assert f"CUDA toolkit: {release} in" in out and f"PyTorch: {build}" in out
    assert re.search(rf"C\+\+ compiler: \S*{re.escape(chosen)}", out), out
    assert ("none: no g++ from 9 to 11" in out) == (chosen == "none")


def test_modules_are_tried_in_turn(machine):
    """A cluster: no GPU on this node, GPUs on others; conda, CUDA and gcc come from modules."""
    modules = {
        "mamba/latest": {"mamba": "1.5"},
        "cuda-11.8.0-gcc-12.1.0": {"nvcc": nvcc("11.8")},
        "gcc-12.1.0-gcc-11.2.0": {"g++": "12.1.0"},
        "gcc-11.2.0-gcc-11.2.0": {"g++": "11.2.0"},
    }
    out = check(machine(modules, sinfo="gpu:a100:4", sbatch="", **{"g++": "8.5.0"}))
    assert "GPUs: on nodes of this cluster" in out and "CUDA toolkit: 11.8 in" in out and "Slurm: yes" in out
    for name in ("mamba/latest", "cuda-11.8.0-gcc-12.1.0", "gcc-11.2.0-gcc-11.2.0"):
        assert f"module {name} loaded" in out
    assert "g++ (11)" in out and "environment: internimage-mimic, by" in out and "sbatch -p lightwork" in out


def test_what_no_module_brings_is_named(machine):
    environment = machine({"something/else": {}}, **{"nvidia-smi": "NVIDIA A100", "g++": "11"})
    out = check(environment)
    assert re.search(r"CUDA toolkit: tried the modules cuda-12.6.1-gcc-12.1.0 cuda-12.8.1\S* .* cuda/11.8", out)
    assert "none for the GPU: load or install a CUDA toolkit and set CUDA_HOME; until then the operator is" in out
    (Path(environment["PATH"]) / "python3").unlink()
    done = setup("--check", **environment)
    assert done.returncode == 2
    assert "no Python 3.10 to 3.13 found (tried the modules mamba/latest anaconda3 " in done.stderr


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the weights' host as a download asks."""

    content, digest = b"weights" * 1000, None

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("X-Linked-Etag", f'"{self.digest}"')
        self.send_header("X-Linked-Size", str(len(self.content)))
        self.send_header("ETag", f'"{self.digest}"')
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


def test_weights_are_checked(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def fetch(digest, port=server.server_port):
        Hub.digest = digest
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, str(ROOT / "download_weights.py"), str(tmp_path / "w"), "b.pth"]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    good = hashlib.sha256(Hub.content).hexdigest()
    done = fetch("1" * 64)
    assert done.returncode == 2 and f"has the checksum {good}, expected 1111" in done.stderr
    assert not (tmp_path / "w" / "b.pth").exists()
    done = fetch(good)
    assert done.returncode == 0 and (tmp_path / "w" / "b.pth").read_bytes() == Hub.content, done.stderr
    server.shutdown()
    server.server_close()
    done = fetch(good, port=9)
    assert done.returncode == 2 and "cannot be downloaded" in done.stderr and "with a network" in done.stderr


def test_answers_are_kept_and_a_missing_file_is_named(tmp_path):
    done = setup("--check", "--weights", "/does/not/exist")
    assert done.returncode == 2 and "the weights /does/not/exist do not exist" in done.stderr
    (tmp_path / "b.pth").touch()
    done = setup("--check", "--weights", tmp_path / "b.pth", "--data-path", tmp_path)
    assert re.search(rf"weights: +{tmp_path}/b.pth", done.stdout) and re.search(rf"data: +{tmp_path}\n", done.stdout)


@pytest.fixture
def set_up(tmp_path):
    """set_up(*options) -> (what the set-up prints, its settings): with a python that agrees to everything."""
    home = tmp_path / "classification"
    (home / "ops_dcnv3").mkdir(parents=True)
    for name in ("setup_mimic_env.sh", "requirements_mimic.txt"):
        shutil.copy(ROOT / name, home)
    for path in ("csrc", "dcnv3"):
        (home / "ops_dcnv3" / path).mkdir()
    for name in ("setup.py", "pyproject.toml"):
        (home / "ops_dcnv3" / name).touch()
    python = tmp_path / "python"
    make = f'mkdir -p "$3/bin" && cp "{python}" "$3/bin/python"'
    log = f'echo "DCNV3_BUILD=$DCNV3_BUILD $*" >>"{tmp_path}/called"'
    python.write_text(f'#!/bin/sh\n{log}\n[ "$1" != -c ] || echo True\n[ "$2" != venv ] || {{ {make}; }}\n')
    python.chmod(0o755)

    def run(*options):
        first = [] if (home / "mimic_settings.sh").exists() else ["--python", python]
        weights = [] if "--weights" in options else ["--no-weights"]
        command = ["bash", home / "setup_mimic_env.sh", "--yes", *first, *weights, *options]
        environment = {k: v for k, v in os.environ.items() if k != "MIMIC_ENV_DIR"}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout, (home / "mimic_settings.sh").read_text()

    return run


def test_every_answer_is_remembered(set_up, tmp_path):
    """The next run needs no option."""
    home, env, python = tmp_path / "classification", tmp_path / "my env", tmp_path / "python"
    _, settings = set_up("--env-dir", "my env", "--account", "lab", "--data-path", home, "--email", "a@b.c")
    assert "MIMIC_ACCOUNT=lab\n" in settings and f"MIMIC_VENV_PYTHON={python}\n" in settings
    shell = ". ./mimic_settings.sh; env | grep SBATCH; echo $MIMIC_ENV_DIR"
    done = subprocess.run(["bash", "-c", shell], cwd=home, capture_output=True, text=True)
    assert done.stdout == f"SBATCH_ACCOUNT=lab\n{env}\n"
    shutil.rmtree(env)
    again, same = set_up()
    assert same == settings and f"making a venv in {env}" in again


def test_what_follows_the_set_up_names_the_weights(set_up, tmp_path):
    said, settings = set_up("--env-dir", tmp_path / "e")
    assert "no weights: training starts from random ones" in said
    (tmp_path / "b.pth").touch()
    said, settings = set_up("--weights", tmp_path / "b.pth")
    assert f"MIMIC_PRETRAINED={tmp_path}/b.pth\n" in settings and "no weights" not in said
    assert re.search(rf"main.py --cfg \S+ --data-path FOLDER --pretrained {tmp_path}/b.pth", said)


def test_a_cuda_build_of_pytorch_asks_for_kernels_for_gpus(set_up, machine, tmp_path, monkeypatch):
    """Of the toolkit that nvcc names: it may be a wrapper elsewhere. Without a toolkit nothing is installed."""
    set_up("--env-dir", tmp_path / "e")
    assert re.search(r"^DCNV3_BUILD= .*ops_dcnv3$", (tmp_path / "called").read_text(), re.MULTILINE)
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    for name, text in {"nvidia-smi": "NVIDIA A100", "nvcc": f"{nvcc('12.6')}\n#$ TOP={tmp_path}/cuda/bin/.."}.items():
        path = tmp_path / "wrappers" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/wrappers:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    said, _ = set_up()
    assert re.search(rf"CUDA toolkit: +12.6 in {tmp_path}/cuda\n", said)
    assert re.search(r"^DCNV3_BUILD=cuda .*ops_dcnv3$", (tmp_path / "called").read_text(), re.MULTILINE)
    done = setup("--yes", "--no-weights", **machine(**{"nvidia-smi": "NVIDIA A100", "g++": "12"}))
    assert done.returncode == 2 and "no CUDA toolkit for the GPUs (here: NVIDIA A100): load or install" in done.stderr
    assert "set DCNV3_BUILD=cpu to do without" in done.stderr and "installing" not in done.stdout


def test_downloading_without_a_folder_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "download_weights.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: the following arguments are required: folder")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the folder .*/file/w cannot be made .Not a directory"):
        download(tmp_path / "file" / "w")


STAGE = ROOT / "jobs" / "stage.sh"


def test_staged_data_have_their_tables(tmp_path):
    """--data-path may be files/: the tables beside it, and one folder higher, come along."""
    release = tmp_path / "lab" / "mimic"
    (release / "files" / "p10").mkdir(parents=True)
    (release / "other").mkdir()
    for name in (
        "mimic/files/p10/a.jpg",
        "mimic/mimic-cxr-x-split.csv.gz",
        "mimic/recipe.json",
        "above.csv",
        "big.zip",
    ):
        (tmp_path / "lab" / name).write_text(name)
    done = subprocess.run(["bash", STAGE, release / "files", tmp_path / "node"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    copied = sorted(str(p.relative_to(tmp_path / "node")) for p in (tmp_path / "node").rglob("*") if p.is_file())
    assert copied == ["above.csv", "mimic/files/p10/a.jpg", "mimic/mimic-cxr-x-split.csv.gz", "mimic/recipe.json"]


@pytest.mark.parametrize("full", ["a.jpg", "t.csv"])
def test_a_node_that_is_full_keeps_no_part(tmp_path, full):
    data, tools = tmp_path / "mimic" / "files", tmp_path / "tools"
    data.mkdir(parents=True)
    tools.mkdir()
    (data / "a.jpg").touch()
    (data.parent / "t.csv").touch()
    fails = f'case "$*" in *{full}*) exit 1 ;; esac\n' if full == "t.csv" else "exit 1\n"
    (tools / "cp").write_text(f'#!/bin/sh\n{shutil.which("cp")} "$@"\n{fails}')
    (tools / "cp").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", STAGE, data, tmp_path / "node"], env=environment)
    assert done.returncode == 1 and not (tmp_path / "node").exists()


@pytest.mark.parametrize(
    "arguments, passed_on",
    [
        ([], True),
        (["--cfg", "internimage_b_mimic_cxr_512"], True),
        (["--opts", "TRAIN.EPOCHS", "3", "DATA.IMG_SIZE", "256"], True),
        (["--cfg", "densenet121_mimic_cxr_224"], False),
        (["--cfg", "internimage_s_mimic_cxr_224"], False),
        (["--opts", "MODEL.TYPE", "timm", "MODEL.TIMM.NAME", "resnet50"], False),
        (["--opts", "MODEL.INTERN_IMAGE.CHANNELS", "64"], False),
        (["--pretrained", "own.pth"], False),
    ],
)
def test_weights_go_with_their_model(arguments, passed_on, capsys):
    config = f"{ROOT}/configs/internimage_b_mimic_cxr_224.yaml"
    arguments = [f"{ROOT}/configs/{a}.yaml" if a.endswith(("_224", "_512")) else a for a in arguments]
    try:
        status = weights.main(["b.pth", config, "--cfg", config, *arguments])
    except SystemExit as error:
        status = error.code
    assert bool(status) != passed_on
    said = capsys.readouterr().out
    assert ("b.pth is not passed on: it is for the model of" in said) == (not passed_on and "own.pth" not in arguments)


def test_help_names_every_option():
    cases = re.findall(r"^ +((?:--[a-z-]+(?: \| )?)+)\)", (ROOT / "setup_mimic_env.sh").read_text(), re.MULTILINE)
    options = {option for case in cases for option in case.split(" | ")}
    assert {"--yes", "--data-path"} <= options
    done = setup("--help")
    assert done.returncode == 0 and all(option in done.stdout for option in options)


def test_mistakes_are_named():
    for options, message in (
        (["--nonsense"], "unknown option --nonsense"),
        (["--env-name"], "--env-name needs a value"),
        (["--data-path", "/does/not/exist"], "--data-path /does/not/exist is not a folder"),
        (["--check", "--python", "/bin/true"], "--python /bin/true is not a Python 3.10 to 3.13"),
        (["--check", "--python", "perl"], "--python perl is not a Python 3.10 to 3.13"),
        (["--python", "/does/not/exist"], "--python /does/not/exist does not exist"),
    ):
        done = setup(*options)
        assert done.returncode == 2 and message in done.stderr, (options, done.stderr)


def test_too_little_room_is_said_before_anything_is_fetched(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "df").write_text("#!/bin/sh\nprintf 'x\\nfs 9 9 1048576 9%% /\\n'\n")
    (tmp_path / "tools" / "df").chmod(0o755)
    python = tmp_path / "e" / "bin" / "python"  # agrees to everything: making a real one takes seconds
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$1" != -c ] || echo True\n')
    python.chmod(0o755)
    path = f"{tmp_path}/tools:{os.environ['PATH']}"
    done = setup("--yes", "--no-weights", "--python", sys.executable, "--env-dir", tmp_path / "e", PATH=path)
    assert done.returncode == 2 and f"{tmp_path}/e has 1 GB free, the packages take about 3" in done.stderr, done.stderr
