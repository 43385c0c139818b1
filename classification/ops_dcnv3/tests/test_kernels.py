"""The kernels without torch, under AddressSanitizer; the CUDA ones run on the CPU by an imitation of CUDA.

Skipped where the compiler they need is not found. That no GPU is needed is the point: what these tests
show of the CUDA kernels is that indices, guards and sums are right, not that they run on a GPU.
"""

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import assert_same, random_inputs

from dcnv3 import definition, kernels
from dcnv3.functional import output_size

HERE = Path(__file__).parent
IMITATION = HERE / "imitation"
SOURCES = HERE.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
NVCC = shutil.which("nvcc")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


# As built for a GPU, and as if tensors beyond 2000 elements were out of reach of 32-bit indices (a batch goes
# in parts, an image that alone is too large with 64 bits) and four floats were added at once (sm_90).
CUDA_FLAGS = {"cuda": [], "cuda sm_90, parts": ["-DDCNV3_TEST_REACH=2000", "-DDCNV3_TEST_ATOMIC_VECTOR=4"]}


@pytest.fixture(scope="session", params=["cpu", *CUDA_FLAGS])
def program(request, tmp_path_factory):
    """(device, path) of the kernels of a device as a program."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    device = request.param.split()[0]
    path = tmp_path_factory.mktemp("kernels") / device
    if device == "cpu":
        sources, flags = [SOURCES / "cpu_baseline.cpp", SOURCES / "cpu_avx2.cpp"], ["-O0"]
    else:  # the imitation runs longer than it takes to compile
        sources, flags = [IMITATION / "cuda_kernels.cpp"], ["-O1", "-DDCNV3_TEST_CUDA", *CUDA_FLAGS[request.param]]
    sources.append(HERE / "kernels_alone.cpp")
    command = [COMPILER, "-std=c++17", "-I", SOURCES, "-I", IMITATION, *flags, *sources, "-o", path]
    if subprocess.run([*command, *SANITIZERS], capture_output=True).returncode:
        subprocess.run(command, check=True)  # a compiler without the sanitizers
    return device, path


CASES = {
    "fast": dict(h=5, w=7, group=3, width=16),
    "wide": dict(h=3, w=5, group=9, width=32),
    "logits": dict(h=5, w=7, group=7, width=16, softmax=True),
    "half": dict(h=5, w=7, group=3, width=16, softmax=True, dtype=torch.float16),
    "bfloat": dict(h=5, w=7, group=3, width=32, softmax=True, dtype=torch.bfloat16),
    "double": dict(h=5, w=7, group=3, width=4, softmax=True, dtype=torch.float64),
    "misaligned": dict(h=5, w=7, group=3, width=16, shift=1),
    "width 24": dict(h=5, w=4, group=2, width=24, softmax=True, kernel=(1, 2), padding=(0, 1)),
    "width 7": dict(h=5, w=7, group=10, width=7, softmax=True, kernel=(2, 2)),
    "width 1": dict(h=5, w=7, group=2, width=1),
    "width 40": dict(h=3, w=5, group=1, width=40, softmax=True, kernel=(2, 1), dtype=torch.bfloat16),
    "1x1": dict(h=5, w=7, group=3, width=16, kernel=(1, 1), padding=(0, 0)),
    "any kernel": dict(
        h=11, w=8, group=2, width=5, kernel=(3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1), scale=1.5,
        remove_center=True, softmax=True,
    ),
    "large kernel": dict(h=5, w=4, group=3, width=4, kernel=(7, 7), padding=(3, 3), softmax=True),
    "huge kernel": dict(h=2, w=3, group=1, width=2, kernel=(41, 41), padding=(20, 20), dtype=torch.float64),
    "one pixel": dict(h=1, w=1, group=5, width=16, softmax=True),
    "one row": dict(h=1, w=9, group=4, width=16, softmax=True),
    "one column": dict(h=9, w=1, group=2, width=5),
    "two columns": dict(h=6, w=2, group=4, width=16, softmax=True),
    "width 8": dict(h=5, w=7, group=6, width=8, softmax=True, dtype=torch.bfloat16),
    "strided": dict(h=5, w=7, group=3, width=16, softmax=True, extra=5),
    "seven groups": dict(h=4, w=6, group=7, width=16, softmax=True, dtype=torch.bfloat16),
    "two spans": dict(h=9, w=9, group=1, width=16, softmax=True, dtype=torch.bfloat16),
    "two tiles": dict(h=4, w=5, group=2, width=256, dtype=torch.bfloat16),
    "one tile": dict(h=4, w=5, group=1, width=512),
    "no tile": dict(h=4, w=5, group=1, width=1000),
}  # fmt: skip


BESIDE_OWNING = ("no tile",)  # a group of an image is too large


@pytest.mark.parametrize("name", CASES)
def test_kernels_alone(program, name, tmp_path):
    device, path = program
    case = dict(
        kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), scale=1.0, remove_center=False, softmax=False,
        dtype=torch.float32, shift=0, extra=0,
    )  # fmt: skip
    case.update(CASES[name])
    h, w, group, width, dtype = (case[k] for k in ("h", "w", "group", "width", "dtype"))
    shape = {k: case[k] for k in ("kernel", "stride", "padding", "dilation")}
    points = case["kernel"][0] * case["kernel"][1] - case["remove_center"]
    out = output_size(h, w, **shape)
    inputs = [
        t.detach()
        for t in random_inputs(n=2, h=h, w=w, group=group, width=width, points=points, out=out, spread=2.5, dtype=dtype)
    ]
    inputs[1][0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    grad = torch.randn(2, *out, group * width, generator=torch.Generator().manual_seed(5)).to(dtype)

    spread = [torch.nn.functional.pad(t, (0, case["extra"])) for t in inputs[1:]]
    header = [DTYPES[dtype], 2, h, w, *out, group, width, *(t.shape[-1] for t in spread)]
    header += [v for pair in shape.values() for v in pair]
    header += [case["remove_center"], case["softmax"], dtype.itemsize, case["shift"], 0, 0]
    tensors = [inputs[0], *spread, grad]
    file = tmp_path / "problem"
    raw = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    file.write_bytes(struct.pack("24qd", *header, case["scale"]) + raw)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # seconds a run
    run = subprocess.run([path, file], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr

    parameters = (group, *shape.values(), case["scale"], case["remove_center"], case["softmax"])
    expected = [
        definition.forward(*inputs, *parameters),
        *definition.backward(grad, *inputs, *parameters),
    ]
    memory, eps = file.read_bytes(), torch.finfo(dtype).eps
    sets = [line.split("|") for line in run.stdout.splitlines()]
    assert [name for name, _ in sets] == (["cpu"] if device == "cpu" else ["atomic", "owning", "ordered"] * 2)
    for kernel, missing in sets:
        if missing:
            if kernel == "owning" and name in BESIDE_OWNING:
                assert "does not fit in the shared memory" in missing
            else:  # more points than the shared memory of a block holds
                assert points > 1500 and ("too many points" in missing or kernel == "owning")
            continue
        got = []
        for i, tensor in enumerate(expected):
            kind = torch.promote_types(dtype, torch.float32) if kernel in ("atomic", "ordered") and i == 1 else dtype
            size = tensor.numel() * kind.itemsize
            got.append(torch.frombuffer(bytearray(memory[:size]), dtype=kind).view(tensor.shape).to(dtype))
            memory = memory[size:]
        assert_same(got, expected, rtol=8 * eps, atol=8 * eps * max(1.0, max(t.abs().max().item() for t in expected)))
    assert not memory


BUILD = """
import json, shutil, sys, torch
from pathlib import Path
from setuptools import Distribution
from torch.utils.cpp_extension import BuildExtension, CppExtension
sources, imitation, folder = map(Path, sys.argv[1:4])
flags = sys.argv[4:]
text = (sources / "binding.cpp").read_text()
for old, new in (
    ("(dcnv3, CPU,", "(dcnv3, XPU,"), ("(dcnv3, CUDA,", "(dcnv3, CPU,"), ("input.get_device()", "0"),
):
    assert old in text
    text = text.replace(old, new)
(folder / "binding.cpp").write_text(text)
files = [folder / "binding.cpp", imitation / "cuda_kernels.cpp", sources / "cpu_baseline.cpp", sources / "cpu_avx2.cpp"]
extension = CppExtension(
    "_C", [str(file) for file in files], include_dirs=[str(imitation), str(sources)],
    # The owning kernel wherever it fits: tests are small.
    define_macros=[("DCNV3_WITH_CUDA", None), ("DCNV3_TEST_OWNING_BLOCKS", "1")],
    extra_compile_args=["-O1", "-g0", "-DAT_PER_OPERATOR_HEADERS", *flags], extra_link_args=flags,
)
extension.libraries = [name for name in extension.libraries if name != "torch_python"]
builder = BuildExtension(Distribution({"ext_modules": [extension]}), no_python_abi_suffix=True, use_ninja=False)
builder.build_lib, builder.build_temp = str(folder), str(folder / "temp")
builder.ensure_finalized()
builder.run()
shutil.copytree(sources.parent / "dcnv3", folder / "dcnv3", ignore=shutil.ignore_patterns("_C.so", "_build.json"))
shutil.move(folder / "_C.so", folder / "dcnv3" / "_C.so")
record = {"torch": torch.__version__, "cuda": torch.version.cuda, "kernels": ["cpu"], "architectures": "8.0;9.0+PTX"}
(folder / "dcnv3" / "_build.json").write_text(json.dumps({**record, "missing": {"cuda": "an imitation"}}))
"""

OLD_GPU = """
import warnings, torch, dcnv3
torch.cuda.get_device_capability = lambda device: (7, 5)
inputs = [torch.randn(1, 3, 4, n, requires_grad=True) for n in (8, 36, 18)]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        output = dcnv3.dcnv3(*inputs, group=2)
        got = torch.autograd.grad(output.sum(), inputs)
expected = dcnv3.reference(*inputs, group=2)
torch.testing.assert_close(output, expected, rtol=0, atol=0)
torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), inputs), rtol=0, atol=0)
(message,) = [str(w.message) for w in said if "dcnv3" in str(w.message)]
assert "compute capability 8.0;9.0+PTX, and this one has 7.5 (an emulated error)" in message, message
assert "TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX;7.5' pip install" in message, message
"""


@pytest.mark.skipif("cpu" not in kernels(), reason="no compiler: no kernels were built")
def test_the_operator_over_the_binding_for_cuda(tmp_path):
    """The tests of the operator once more, through the binding's CUDA half and the CUDA kernels, for tensors on a CPU.
    Then on a GPU that the kernels have no image for: the definition steps in, and says so once."""

    def run(*arguments, **variables):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), **variables}
        run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    run("-c", BUILD, SOURCES, IMITATION, tmp_path)
    assert str(tmp_path) in run("-c", "import dcnv3; print(dcnv3.__file__)")
    # Nothing of CUDA, or slow here (and the widths are among the cases above).
    left_out = "not reference and not threads and not compiles and not kernel4 and not any_width"
    files = [HERE / "test_operator.py", HERE / "test_torch.py"]
    assert " passed" in run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", left_out)
    run("-c", OLD_GPU, DCNV3_TEST_NO_IMAGE="1")


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_cuda_sources_compile_for_every_target(tmp_path):
    """No GPU and no CUDA build of torch needed: the sources include no torch header."""
    # And for an older card, which users may name in TORCH_CUDA_ARCH_LIST.
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (75, 80, 90)] + [
        "-gencode=arch=compute_90,code=compute_90"
    ]
    for source in sorted(SOURCES.glob("*.cu")):
        command = [NVCC, "-std=c++17", "-O3", "-Werror", "all-warnings", *targets, "-c", source]
        run = subprocess.run([*command, "-o", tmp_path / "object"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def find_cuobjdump():
    """The disassembler: of the CUDA toolkit, or of the Triton that PyTorch's CUDA wheels bring."""
    places = [Path(NVCC).resolve().parent] if NVCC else []
    triton = importlib.util.find_spec("triton")
    places += [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton else []
    return shutil.which("cuobjdump") or next((p for p in (place / "cuobjdump" for place in places) if p.exists()), None)


@pytest.mark.skipif(NVCC is None or find_cuobjdump() is None, reason="no nvcc, or no cuobjdump")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_forward_kernel_stays_within_its_instructions(architecture, tmp_path):
    """What bounds it is how many instructions it issues for an output pixel and group of 16 channels. One thread a
    pair before the barrier, 16 bytes of its channels a thread behind it; a warp issues for 32 threads at once."""
    command = [NVCC, "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", SOURCES / "cuda_forward.cu"]
    subprocess.run([*command, "-o", tmp_path / "kernels"], check=True)
    command = [find_cuobjdump(), "-sass", tmp_path / "kernels"]
    listing, counts = subprocess.run(command, capture_output=True, text=True, check=True).stdout, {}
    for function in listing.split("Function : ")[1:]:
        name, *lines = function.splitlines()
        code = [line for line in lines if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+[^/]", line)]
        barrier = next(i for i, line in enumerate(code) if "BAR.SYNC" in line)
        for dtype, threads in (("BFloat16", 2), ("f", 4)):
            if re.search(rf"forward_kernelI(N.*{dtype}E|{dtype})Li9", name):  # 9 points, unrolled
                counts[dtype] = barrier / 32 + (len(code) - barrier) * threads / 32
                assert not any("LDL" in line or "STL" in line for line in code), "registers are spilled"
    print(architecture, counts)
    assert counts["BFloat16"] < 75 and counts["f"] < 70
