"""Builds the kernels of the operator with whatever is there: `pip install --no-build-isolation --no-deps ./ops_dcnv3`.

With a C++ compiler, the CPU kernels; with nvcc and a CUDA build of torch of the same major version,
the CUDA kernels too (no GPU needed); with neither, the package in plain Python. What is left out,
and why, is printed, recorded in `dcnv3/_build.json` and shown by `python -m dcnv3`.

DCNV3_BUILD      0: no kernels; cpu, cuda: these kernels or an error. Default: what is possible.
TORCH_CUDA_ARCH_LIST   architectures, by default A100, H100 and later ones: "8.0;9.0+PTX"
MAX_JOBS         compilers running at once
"""

import atexit
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).parent)
sys.path.insert(0, os.getcwd())
from nvcc import find_nvcc  # noqa: E402

os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
CPU_SOURCES = ["csrc/binding.cpp", "csrc/cpu.cpp", *sorted(map(str, Path("csrc").glob("cpu_*.cpp")))]
CUDA_SOURCES = sorted(map(str, Path("csrc").glob("cuda_*.cu")))
# No fast mathematics: NaN and infinity keep their meaning. But no code reads errno or floating-point
# exceptions, and loops vectorise only without them.
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-DAT_PER_OPERATOR_HEADERS"]
NVCC_FLAGS = ["-O3", "-DAT_PER_OPERATOR_HEADERS"]


def find_torch():
    """The torch of this environment, or None."""
    try:
        import torch
    except ImportError:
        # pip hides the environment's packages from an isolated build; the kernels need that very torch.
        site.addsitedir(sysconfig.get_path("platlib"))
        try:
            import torch
        except ImportError:
            return None
    return torch


def cpu_obstacle(torch):
    """What keeps the CPU kernels from being built, or None."""
    if torch is None:
        return "torch is not installed in this environment: install it first"
    if sys.platform == "win32":
        return "there are no kernels for Windows"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}): install one (g++ 9 or later, clang) or set CXX"
    return None


def cuda_obstacle(torch):
    """What keeps the CUDA kernels from being built, or None."""
    if torch is None or torch.version.cuda is None:
        return "this torch is built without CUDA: install a CUDA build of torch for kernels on a GPU"
    nvcc = find_nvcc()
    if nvcc is None:
        return f"no nvcc: load or install the CUDA toolkit {torch.version.cuda} and set CUDA_HOME to it"
    found = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = found.split("release ")[1].split(",")[0]
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"{nvcc} is of CUDA {version}, torch of CUDA {torch.version.cuda}: load the toolkit of the same major "
            "version and set CUDA_HOME to it"
        )
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(nvcc.parents[1])  # torch takes the folder above the nvcc on PATH
    return None


class BuildKernels(build_ext):
    """Tries the most complete set of kernels first, then less, and records what came out."""

    def run(self):
        wanted = os.environ.get("DCNV3_BUILD", "")
        if wanted not in ("", "0", "cpu", "cuda"):
            raise SystemExit(f"DCNV3_BUILD is {wanted!r}: expected 0, cpu or cuda, or leave it unset")
        package = Path("dcnv3") if self.inplace or self.editable_mode else Path(self.build_lib, "dcnv3")
        package.mkdir(parents=True, exist_ok=True)
        for name in ("_build.json", "_C.so"):  # an interrupted build must not look like the last one
            (package / name).unlink(missing_ok=True)

        torch = find_torch()
        kernels, missing = [], {}  # missing: device -> why there are no kernels for it
        if wanted == "0":
            missing = dict.fromkeys(("cpu", "cuda"), "DCNV3_BUILD=0 asked for none")
        else:
            missing["cpu"] = cpu_obstacle(torch)
            missing["cuda"] = "DCNV3_BUILD=cpu asked for none" if wanted == "cpu" else cuda_obstacle(torch)
            missing["cuda"] = missing["cpu"] or missing["cuda"]
            if missing.get(wanted):
                raise SystemExit(f"DCNV3_BUILD={wanted}: no {wanted} kernels: {missing[wanted]}")
            while not kernels and not missing["cpu"]:
                attempt = [device for device in ("cpu", "cuda") if not missing[device]]
                try:
                    self.compile(attempt, package)
                    kernels = attempt
                except Exception as error:
                    if wanted:
                        raise
                    missing[attempt[-1]] = f"the compiler failed on them ({_last_words(error)}; pip -v shows more)"

        record = {
            "torch": torch and torch.__version__,
            "cuda": torch and torch.version.cuda,
            "kernels": kernels,
            "architectures": os.environ["TORCH_CUDA_ARCH_LIST"] if "cuda" in kernels else "",
            "missing": {device: reason for device, reason in missing.items() if reason},
        }
        (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"dcnv3: kernels built for {' and '.join(kernels) or 'no device'}", file=sys.stderr)
        for device, reason in record["missing"].items():
            print(f"dcnv3: no {device} kernels: {reason}", file=sys.stderr)

    def compile(self, kernels, package):
        """Compiles into a fresh folder (nothing of an earlier torch survives) and moves the library in place."""
        from torch.utils import cpp_extension

        with tempfile.TemporaryDirectory() as folder:
            kinds = dict(sources=CPU_SOURCES, extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS})
            if "cuda" in kernels:
                kinds["sources"] = CPU_SOURCES + CUDA_SOURCES
                kinds["define_macros"] = [("DCNV3_WITH_CUDA", None)]
                extension = cpp_extension.CUDAExtension("_C", **kinds)
            else:
                extension = cpp_extension.CppExtension("_C", **kinds)
            # The library is opened by torch.ops.load_library: no Python in it, one file for all versions.
            extension.libraries = [name for name in extension.libraries if name != "torch_python"]
            distribution = Distribution({"name": "dcnv3", "ext_modules": [extension]})
            builder = cpp_extension.BuildExtension(distribution, no_python_abi_suffix=True)
            builder.build_lib, builder.build_temp = str(Path(folder, "lib")), str(Path(folder, "temp"))
            builder.ensure_finalized()
            builder.run()
            (built,) = Path(folder, "lib").glob("_C*.so")
            shutil.move(built, package / "_C.so")

    def get_outputs(self):
        return [str(Path(self.build_lib, "dcnv3", name)) for name in ("_C.so", "_build.json")]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(path) for path in Path("csrc").iterdir()]


def _last_words(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


# Everything setuptools makes on the way goes there: a build/ folder here would outlive its torch.
build_folder = tempfile.mkdtemp(prefix="dcnv3-build-")
atexit.register(shutil.rmtree, build_folder, ignore_errors=True)

setup(
    # Stands for the kernels, so that setuptools makes a platform wheel and runs the command.
    ext_modules=[Extension("dcnv3._C", sources=[])],
    cmdclass={"build_ext": BuildKernels},
    options={"build": {"build_base": build_folder}},
)
