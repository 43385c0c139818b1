"""setup.py and the toolkit it finds, without a compiler."""

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent


@pytest.fixture
def script(monkeypatch):
    """The names of setup.py, which has built nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local")
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    return runpy.run_path(str(HERE.parent / "setup.py"))


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A toolkit of CUDA 13.0 whose nvcc is reached by a wrapper in another folder, the only one on PATH."""
    nvcc, wrapper = tmp_path / "cuda-13.0" / "bin" / "nvcc", tmp_path / "bin" / "nvcc"
    dryrun = f"[ $1 != --dryrun ] || {{ echo '#$ _HERE_=x' >&2; echo '#$ TOP={nvcc.parent}/..' >&2; }}"
    for path, text in (
        (nvcc, f"{dryrun}\necho Cuda compilation tools, release 13.0, V13.0.1"),
        (wrapper, f'exec {nvcc} "$@"'),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.defpath}")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return nvcc.parents[1]


def torch_of(cuda):
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), __version__="9.9")


def test_a_wrapper_of_nvcc_names_its_toolkit(script, toolkit, monkeypatch):
    assert script["cuda_obstacle"](torch_of("13.2")) is None
    assert cpp_extension.CUDA_HOME == str(toolkit)  # torch would have taken the folder above the wrapper
    for folder in (toolkit, toolkit.parent):  # the toolkit's own nvcc, and the wrapper
        monkeypatch.setenv("CUDA_HOME", str(folder))
        assert script["find_nvcc"]() == toolkit / "bin" / "nvcc"
    assert "nvcc is of CUDA 13.0, torch of CUDA 12.6" in script["cuda_obstacle"](torch_of("12.6"))


@pytest.mark.parametrize("cuda, reason", [("13.0", "no nvcc"), (None, "this torch is built without CUDA")])
def test_kernels_that_were_asked_for_or_an_error(script, tmp_path, monkeypatch, cuda, reason):
    """Before anything is compiled."""
    monkeypatch.setenv("DCNV3_BUILD", "cuda")
    build = script["BuildKernels"](setuptools.Distribution({"name": "dcnv3"}))
    build.build_lib, build.inplace, build.editable_mode = str(tmp_path), False, False
    names = build.run.__globals__
    monkeypatch.setitem(names, "find_torch", lambda: torch_of(cuda))
    monkeypatch.setitem(names, "find_nvcc", lambda: None)
    monkeypatch.setattr(script["BuildKernels"], "compile", lambda *_: pytest.fail("compiled all the same"))
    with pytest.raises(SystemExit, match=f"DCNV3_BUILD=cuda: no cuda kernels: {reason}"):
        build.run()
    assert not (tmp_path / "dcnv3" / "_build.json").exists()
