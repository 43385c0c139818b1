"""The kernels without torch, under AddressSanitizer; the CUDA ones run on the CPU by an imitation of CUDA.

Skipped where the compiler they need is not found. That no GPU is needed is the point: what these tests
show of the CUDA kernels is that indices, guards and sums are right, not that they run on a GPU.
"""

import ast
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import assert_same, compile_once, random_inputs
from dcnv3 import _extension, definition, kernels
from dcnv3.functional import output_size

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import count  # noqa: E402

IMITATION = HERE / "imitation"
SOURCES = HERE.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
RACES = ["-fsanitize=thread"]
SOURCES_OF = {
    "cpu": [*SOURCES.glob("cpu*"), *SOURCES.glob("dcnv3*")],
    "cuda": [*SOURCES.glob("cuda*"), *SOURCES.glob("dcnv3*"), *IMITATION.rglob("*.h"), *IMITATION.glob("*.cpp")],
}
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


# As built for a GPU, and as if tensors beyond 2000 elements were out of reach of 32-bit indices (a batch goes
# in parts, an image that alone is too large with 64 bits) and four floats were added at once (sm_90).
CUDA_FLAGS = {"cuda": [], "cuda sm_90, parts": ["-DDCNV3_TEST_REACH=2000", "-DDCNV3_TEST_ATOMIC_VECTOR=4"]}


@pytest.fixture(scope="session", params=["cpu", *CUDA_FLAGS])
def program(request):
    """(device, path) of the kernels of a device as a program."""
    return compile_program(request.param.split()[0], CUDA_FLAGS.get(request.param, []), SANITIZERS)


@pytest.fixture(scope="session")
def watched_program(tmp_path_factory):
    """The CUDA kernels under ThreadSanitizer, which reports threads of a block that meet in memory between barriers."""
    empty = tmp_path_factory.mktemp("races") / "empty"
    compiled = COMPILER and subprocess.run(
        [COMPILER, *RACES, "-x", "c++", "-", "-o", empty], input=b"int main() {}", capture_output=True
    )
    if not compiled or compiled.returncode or subprocess.run([empty], capture_output=True).returncode:
        pytest.skip("no C++ compiler with ThreadSanitizer, or it does not run here")
    return compile_program("cuda", ["-DDCNV3_TEST_ATOMIC_VECTOR=4"], RACES)


def compile_program(device, flags, sanitizers):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    if device == "cpu":
        sources, flags = sorted(SOURCES.glob("cpu*.cpp")), ["-O0"]
    else:  # the imitation runs longer than it takes to compile
        sources, flags = [IMITATION / "cuda_kernels.cpp"], ["-O1", "-DDCNV3_TEST_CUDA", *flags]
    sources.append(HERE / "kernels_alone.cpp")

    def make(folder):
        command = [COMPILER, "-std=c++17", "-I", SOURCES, "-I", IMITATION, *flags, *sources, "-o", folder / device]
        if subprocess.run([*command, *sanitizers], capture_output=True).returncode:
            subprocess.run(command, check=True)  # a compiler without the sanitizers

    return device, compile_once(make, COMPILER, [*sources, *SOURCES_OF[device]], *flags, *sanitizers) / device


BACKWARD_KERNELS = ["atomic", "tiled", "owning", "ordered"]
GOLDEN = np.load(HERE / "dcnv3_op.npz")
GOLDEN_CASES = json.loads(str(GOLDEN["cases"]))
CASES = {
    "fast": dict(h=5, w=7, group=3, width=16),
    "wide": dict(h=3, w=5, group=3, width=32),
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
    "one pixel": dict(h=1, w=1, group=2, width=16, softmax=True),
    "one row": dict(h=1, w=9, group=1, width=16, softmax=True),
    "one column": dict(h=9, w=1, group=2, width=5),
    "two columns": dict(h=6, w=2, group=4, width=16, softmax=True),
    "width 8": dict(h=5, w=7, group=6, width=8, softmax=True, dtype=torch.bfloat16),
    "strided": dict(h=5, w=7, group=3, width=16, softmax=True, extra=5),
    "seven groups": dict(h=4, w=6, group=7, width=16, softmax=True, dtype=torch.bfloat16),
    "two spans": dict(h=9, w=9, group=1, width=16, softmax=True, dtype=torch.bfloat16),
    "two tiles": dict(h=4, w=5, group=2, width=256, dtype=torch.bfloat16),
    "one tile": dict(h=4, w=5, group=1, width=512),
    "no tile": dict(h=4, w=5, group=1, width=1000),
    "three windows": dict(h=5, w=22, group=1, width=16, softmax=True, dtype=torch.bfloat16),
    "four pixels": dict(h=2, w=2, group=2, width=16, softmax=True, dtype=torch.float16),
    "full window": dict(h=16, w=16, group=1, width=16, softmax=True, dtype=torch.bfloat16),
    "far points": dict(h=10, w=21, group=1, width=32, scale=3.0, dtype=torch.bfloat16),
    "strides of 16 bits": dict(h=15, w=9, group=1, width=16, stride=(2, 1), dilation=(1, 3), dtype=torch.float16),
    "windows apart": dict(h=21, w=5, group=1, width=8, stride=(2, 1), dilation=(1, 3), padding=(1, 3)),
}  # fmt: skip
# The backward kernels that a case does not fit: more points or channels than the shared memory of a block holds.
UNFIT = {
    "two tiles": {"tiled"}, "one tile": {"tiled"}, "no tile": {"tiled", "owning"}, "large kernel": {"tiled"},
    "huge kernel": set(BACKWARD_KERNELS),
}  # fmt: skip


def run_alone(program, parameters, shape, inputs, grad, file, shift=0, extra=0):
    """[(kernel, why it does not fit or "", output and gradients)] of the program. parameters: some of the operator's,
    extra: numbers between one pixel's offsets or masks and the next one's."""
    device, path = program
    group, scale, remove_center, softmax = parameters
    (n, h, w, channels), out, dtype = inputs[0].shape, inputs[1].shape[1:3], grad.dtype
    spread = [torch.nn.functional.pad(t, (0, extra)) for t in inputs[1:]]
    header = [DTYPES[dtype], n, h, w, *out, group, channels // group, *(t.shape[-1] for t in spread)]
    header += [v for pair in shape.values() for v in pair]
    header += [remove_center, softmax, dtype.itemsize, shift, 0, 0]
    raw = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in (inputs[0], *spread, grad))
    file.write_bytes(struct.pack("24qd", *header, scale) + raw)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # seconds a run
    run = subprocess.run([path, file], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    memory, sets = file.read_bytes(), []
    for line in run.stdout.splitlines():
        kernel, missing = line.split("|")
        got = []
        for i, tensor in enumerate((grad, *inputs) if not missing else ()):
            sums = i == 1 and kernel in ("atomic", "tiled", "ordered")
            kind = torch.promote_types(dtype, torch.float32) if sums else dtype
            size = tensor.numel() * kind.itemsize
            got.append(torch.frombuffer(bytearray(memory[:size]), dtype=kind).view(tensor.shape).to(dtype))
            memory = memory[size:]
        sets.append((kernel, missing, got))
    assert not memory
    names = [kernel for kernel, *_ in sets]
    assert names[-1] == "baseline" if device == "cpu" else names == BACKWARD_KERNELS * 2
    return sets


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=[c["name"] for c in GOLDEN_CASES])
def test_golden_alone(program, case, tmp_path):
    names = ("input", "offset", "mask", "grad_output", "output", "grad_input", "grad_offset", "grad_mask")
    tensors = [torch.from_numpy(GOLDEN[f"{case['name']}.{name}"]) for name in names]
    parameters = (case["group"], case["offset_scale"], case["remove_center"], False)
    shape = {key: case[key] for key in ("kernel", "stride", "pad", "dilation")}
    for _, missing, got in run_alone(program, parameters, shape, tensors[:3], tensors[3], tmp_path / "problem"):
        assert not missing
        assert_same(got, tensors[4:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_kernels_alone(program, name, tmp_path):
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

    parameters = (group, *shape.values(), case["scale"], case["remove_center"], case["softmax"])
    expected = [
        definition.forward(*inputs, *parameters),
        *definition.backward(grad, *inputs, *parameters),
    ]
    exact = None
    if dtype.itemsize == 2:
        wide = [t.double() for t in inputs]
        exact = [definition.forward(*wide, *parameters), *definition.backward(grad.double(), *wide, *parameters)]
    eps, few = torch.finfo(dtype).eps, (group, case["scale"], case["remove_center"], case["softmax"])
    sets = run_alone(program, few, shape, inputs, grad, tmp_path / "problem", case["shift"], case["extra"])
    if program[0] == "cuda":
        assert {kernel for kernel, missing, _ in sets if missing} == UNFIT.get(name, set())
    for kernel, missing, got in sets:
        if not missing:
            most = max(1.0, max(t.abs().max().item() for t in expected))
            assert_same(got, expected, rtol=8 * eps, atol=8 * eps * most)
            for ours, theirs, e in zip(got, expected, exact or ()):  # as precise as the reference of as many bits
                errors = [(t.double() - e).abs().max() for t in (ours, theirs)]
                assert errors[0] <= 2 * errors[1] + 0.01 * eps * e.abs().max()
        else:
            assert ("fit in the shared memory" if kernel in ("tiled", "owning") else "too many points") in missing


@pytest.mark.parametrize("name", ["fast", "width 24", "two spans", "far points"])
def test_only_barriers_put_threads_in_order(watched_program, name, tmp_path):
    """Sparse kernels of both versions, dense ones with warps that have no row, several strips, and points outside."""
    test_kernels_alone(watched_program, name, tmp_path)


POISONED = {
    "one row": dict(h=1, w=8, padding=(4, 1)),  # takes the tiled kernel
    "long row": dict(h=1, w=80, padding=(1, 1), dtype=torch.bfloat16),
    "one column": dict(h=9, w=1, padding=(1, 4)),
    "one pixel": dict(h=1, w=1, padding=(4, 4), dtype=torch.bfloat16),
    "image": dict(h=6, w=7, padding=(1, 1)),
    "image of 16 bits": dict(h=6, w=7, padding=(1, 1), dtype=torch.bfloat16),
}


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", POISONED)
def test_corners_that_do_not_exist_are_never_touched(program, name, value, tmp_path):
    """Masks of NaN or infinity in one group of one image, beside offsets that are: no step leaves its memory, what the
    group's points touch is not finite, and all else is as if the masks were finite."""
    case = dict(kernel=(3, 3), stride=(1, 1), dilation=(1, 1), dtype=torch.float32)
    case.update(POISONED[name])
    h, w, dtype, group, width = case.pop("h"), case.pop("w"), case.pop("dtype"), 2, 16
    out = output_size(h, w, **case)
    inputs = [t.detach() for t in random_inputs(h=h, w=w, group=group, width=width, out=out, spread=0.4, dtype=dtype)]
    inputs[1][:, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), 0, float("-inf")])
    grad = torch.rand(2, *out, group * width, generator=torch.Generator().manual_seed(5)).to(dtype) + 0.5
    shape = {k: case[k] for k in ("kernel", "stride", "padding", "dilation")}
    parameters = (group, *shape.values(), 1.0, False, False)
    expected = [definition.forward(*inputs, *parameters), *definition.backward(grad, *inputs, *parameters)]
    touched = expected[1][0, ..., :width] != 0  # nothing cancels: masks and output gradients are positive

    inputs[2][0, ..., :9] = float(value)
    eps = torch.finfo(dtype).eps
    for _, missing, got in run_alone(program, (group, 1.0, False, False), shape, inputs, grad, tmp_path / "problem"):
        if missing:
            continue
        assert not got[0][0, ..., :width].isfinite().any() and not got[1][0, ..., :width][touched].isfinite().any()
        for result, finite in zip(got, expected):
            poisoned = finite.shape[-1] // group
            result[0, ..., :poisoned] = finite[0, ..., :poisoned]
        assert_same(got, expected, rtol=8 * eps, atol=8 * eps * max(t.abs().max().item() for t in expected))


@pytest.mark.parametrize("width", [16, 32])
def test_an_infinite_gradient_reaches_its_corners_only(program, width, tmp_path):
    """Without offsets a point is one pixel: around the pixel with the infinite output gradient the input's gradient is
    infinite in that channel, and everything else is that of a box filter."""
    inputs = [torch.zeros(1, 9, 10, width), torch.zeros(1, 9, 10, 18), torch.ones(1, 9, 10, 9)]
    grad = torch.ones(1, 9, 10, width)
    grad[0, 3, 4, 1] = float("inf")
    box = torch.nn.functional.avg_pool2d(torch.ones(1, 1, 9, 10), 3, 1, 1)[0, 0, ..., None] * 9
    expected = box.repeat(1, 1, 1, width)
    expected[0, 2:5, 3:6, 1] = float("inf")
    shape = dict(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    inputs, grad = [t.bfloat16() for t in inputs], grad.bfloat16()
    for _, _, got in run_alone(program, (1, 1.0, False, False), shape, inputs, grad, tmp_path / "problem"):
        torch.testing.assert_close(got[1], expected.bfloat16())


@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="no C++ compiler, or another processor")
def test_each_processor_gets_the_widest_vectors_it_has(tmp_path):
    command = [COMPILER, "-std=c++17", "-I", SOURCES, HERE / "processors.cpp", "-o", tmp_path / "processors"]
    subprocess.run(command, check=True)
    avx512 = ["avx512f", "avx512bw", "avx512dq", "avx512vl"]
    for features, kernels_, isa in (
        (["avx2", "fma", *avx512], "AVX-512", "avx512"),
        (["avx2", "fma", *avx512[:2]], "AVX2", "avx2"),  # Knights Landing and the like
        (["avx2"], "baseline", "baseline"),
        ([], "baseline", "baseline"),
    ):
        run = subprocess.run([tmp_path / "processors", *features], capture_output=True, text=True, check=True)
        assert run.stdout.split("\n") == [kernels_, f"{isa} forward", f"{isa} backward", ""]


BUILD = '''
import shutil, sys
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
(folder / "no_cpu.cpp").write_text("""#include "dcnv3.h"
namespace dcnv3 {
const CpuKernels* cpu_kernels(const char*) { static const CpuKernels none{"none", 0, 0}; return &none; }
int64_t cpu_forward_tasks(const Problem&) { return 0; }
int64_t cpu_backward_tasks(const Problem&) { return 0; }
}
""")
files = [folder / "binding.cpp", folder / "no_cpu.cpp", imitation / "cuda_kernels.cpp"]
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
shutil.rmtree(folder / "temp")
'''

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


@pytest.fixture(scope="session")
def over_the_binding(tmp_path_factory):
    """Runs Python where the operator on a CPU is the binding's CUDA half and the imitated CUDA kernels, under
    AddressSanitizer where the compiler has it: run(*arguments, **variables of the environment) -> what it printed."""
    if "cpu" not in kernels():
        pytest.skip("no compiler: no kernels were built")
    package = tmp_path_factory.mktemp("binding") / "dcnv3"
    # Into a process that began without it, the sanitizer has to be loaded first, and the library it looks into.
    found = [subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
             for name in ("libasan.so", "libstdc++.so")]  # fmt: skip
    sanitized = sys.platform == "linux" and all(Path(path).is_absolute() for path in found)
    preload = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"} if sanitized else {}

    def run(*arguments, **variables):
        environment = {**os.environ, "PYTHONPATH": str(package.parent), **variables}
        run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    flags = ["-fsanitize=address"] * sanitized
    built = compile_once(
        lambda folder: run("-c", BUILD, SOURCES, IMITATION, folder, *flags),
        COMPILER, [*SOURCES.iterdir(), *SOURCES_OF["cuda"]], *flags, BUILD, torch.__version__,
    )  # fmt: skip
    shutil.copytree(HERE.parent / "dcnv3", package, ignore=shutil.ignore_patterns("_C.so", "_build.json"))
    shutil.copy(built / "_C.so", package)
    record = {**_extension.describe_torch(), "kernels": ["cpu"], "architectures": "8.0;9.0+PTX"}
    (package / "_build.json").write_text(json.dumps({**record, "missing": {"cuda": "an imitation"}}))
    return lambda *arguments, **variables: run(*arguments, **{**preload, **variables})


def test_the_operator_over_the_binding_for_cuda(over_the_binding):
    """The tests of the operator once more: with the backward kernel that suits each shape (the owning one nearly
    always, as few blocks are enough for it here), and with the atomic one and threads in any order."""
    # Nothing of CUDA, or slow here (and the widths are among the cases above).
    left_out = "not reference and not threads and not compiles and not kernel4 and not any_width"
    files = [HERE / "test_operator.py", HERE / "test_torch.py"]
    pytest_ = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
    assert " passed" in over_the_binding(*pytest_, *files, "-k", left_out)
    assert " passed" in over_the_binding(
        *pytest_, files[0], "-k", left_out, DCNV3_BACKWARD="atomic", DCNV3_TEST_SHUFFLE="1"
    )


def test_a_gpu_that_the_kernels_have_no_image_for(over_the_binding):
    """The definition steps in, and says so once."""
    over_the_binding("-c", OLD_GPU, DCNV3_TEST_NO_IMAGE="1")


def test_the_check_of_the_first_hour_runs_dry(over_the_binding, tmp_path):
    """All five parts, over the imitation; a part behind one that stops still runs, and what there is is on disk."""
    said = over_the_binding("-c", CHECK, HERE.parent, tmp_path)
    written = json.loads((tmp_path / "dcnv3_check.json").read_text())
    (failure,) = written["failures"]
    assert failure.startswith("behaviour stopped: 'Check' object") and f"- Mend first: {failure}" in said
    assert len(written["seconds"]) == 5 and said.strip() == (tmp_path / "dcnv3_check.md").read_text().strip()
    # Every backward kernel fits these shapes, and has its time; the advice names one for each.
    kernels = {"forward", "by shape", *BACKWARD_KERNELS}
    assert [set(level["ms"]) for level in written["levels"]] == [kernels] * 4
    assert said.count("x3: ") == 2 and said.count("x4: ") == 2


CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import benchmark
benchmark.Check.behaviour = lambda self: self.levels_of_nothing
check = benchmark.Check(True, True, sys.argv[2])
check.kernels = benchmark.BACKWARD_KERNELS  # the imitation has them
assert check.run() == 1
"""

BY_NAME = """
import os, sys, torch, dcnv3
assert sys.argv[1] in dcnv3.__file__
def backward(name, size, width=16, deterministic=False):
    torch.use_deterministic_algorithms(deterministic)
    os.environ["DCNV3_BACKWARD"] = name
    inputs = [torch.zeros(1, size, size, n, requires_grad=True) for n in (width, 18, 9)]
    try:
        dcnv3.dcnv3(*inputs, group=1).sum().backward()
    except ValueError as error:
        return str(error)
for name in ("", "atomic", "tiled", "owning", "ordered"):
    assert backward(name, 5) is None
assert backward("ordered", 5, deterministic=True) is None and backward("owning", 5, deterministic=True) is None
for wrong, reason in (
    (backward("owning", 3, width=3000), "DCNV3_BACKWARD=owning does not fit an input of 3x3 pixels with 3000 channels"),
    (backward("owning", 3, width=3000), "does not fit in the shared memory"),
    (backward("tiled", 3, width=3000), "DCNV3_BACKWARD=tiled does not fit an input of 3x3 pixels with 3000 channels"),
    (backward("tiled", 3, width=3000), "8x8 output pixels of a group do not fit in the shared memory of a block"),
    (backward("fast", 5), "there is no such kernel; take atomic, tiled, owning or ordered, or leave it unset"),
    (backward("atomic", 5, deterministic=True), "in no fixed order, and torch.use_deterministic_algorithms"),
    (backward("tiled", 5, deterministic=True), "in no fixed order, and torch.use_deterministic_algorithms"),
):
    assert wrong and reason in wrong and "\\n" not in wrong.split("Exception raised")[0].strip(), wrong
"""


def test_a_backward_kernel_asked_for_by_name(over_the_binding):
    over_the_binding("-c", BY_NAME, "binding")


TARGETS = ("sm_75", "sm_80", "sm_90")  # 75: an older card, which users may name in TORCH_CUDA_ARCH_LIST


@pytest.fixture(scope="session")
def compiled():
    """(registers and spilled bytes of every kernel, folder of object files). That the sources compile without a warning
    for every target, and in PTX for later GPUs, takes no GPU and no CUDA build of torch."""
    if count.find_nvcc() is None:
        pytest.skip("no nvcc")

    def make(folder):
        (folder / "usage").write_text(repr(count.compile_kernels(TARGETS, folder, ptx=("90",))))

    files = [*SOURCES.glob("cuda*"), *SOURCES.glob("dcnv3*"), HERE.parent / "count.py"]
    folder = compile_once(make, count.find_nvcc(), files, TARGETS)
    return ast.literal_eval((folder / "usage").read_text()), folder


def test_no_kernel_spills_registers(compiled):
    usage, _ = compiled
    kernels = {name for _, name, _, _ in usage}
    assert kernels == {"forward", *BACKWARD_KERNELS, "dense tiled", "dense owning"}
    assert len(usage) == len(TARGETS) * ((4 * 2 + 1) * 4 + 2 * 2 * 2)  # two dtypes, of 16 and 32 channels, are dense
    assert {key: spilled for key, (_, spilled) in usage.items() if spilled and key[0] != "sm_75"} == {}


@pytest.mark.skipif(count.find_cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_forward_kernel_stays_within_its_instructions(architecture, compiled):
    """For an output pixel and group of 16 channels: two threads a pair before the barrier, 16 bytes of its channels a
    thread behind it; a warp issues for 32 threads at once."""
    _, folder = compiled
    counts = {}
    for (kernel, dtype, version), code in count.listings(folder, architecture).items():
        if kernel == "forward" and version == "3x3" and dtype in ("bfloat16", "float32"):
            barrier = next(i for i, line in enumerate(code) if "BAR.SYNC" in line)
            threads = 2 if dtype == "bfloat16" else 4
            counts[dtype] = barrier * 2 / 32 + (len(code) - barrier) * threads / 32
    print(architecture, counts)
    assert counts["bfloat16"] < 92 and counts["float32"] < 97


@pytest.fixture(scope="session")
def started_and_chosen(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return count.launches(tmp_path_factory.mktemp("launches"))


def test_the_kernel_is_chosen_by_shape(started_and_chosen):
    """As measured on an H200: owning by dense products, else tiled, else owning without them, else atomic."""
    _, _, chosen = started_and_chosen
    assert len(chosen) == 24  # what pays, fits
    for (fits, pays, tiled, owning_is_dense, deterministic), kernel in chosen.items():
        if deterministic:
            assert kernel == ("owning" if fits else "ordered")
        elif pays and owning_is_dense:
            assert kernel == "owning"
        else:
            assert kernel == ("tiled" if tiled else "owning" if pays else "atomic")


def test_blocks_and_additions_of_internimage_b(started_and_chosen):
    """Closed form: 7 groups of 9 pixels a block at the first two levels, 4 of 16 where 4 divide them; an owning block
    for every image and group; four tiles of float32 sums beside the points, as many as the kernels may take; a tiled
    block for every group of 8x8 pixels."""
    started, added, _ = started_and_chosen
    forward = {height: blocks for height, blocks, _ in started["forward", "bfloat16"]}
    assert forward[56] == -(-32 * 56**2 // 9) and forward[28] == 2 * -(-32 * 28**2 // 9)
    assert forward[14] == 7 * 32 * 14**2 // 16 and forward[7] == 14 * 32 * 7**2 // 16
    owning = {height: (blocks, shared) for height, blocks, shared in started["owning", "bfloat16"]}
    assert {height: blocks for height, (blocks, _) in owning.items()} == {28: 32 * 14, 14: 32 * 28, 7: 32 * 56}
    points = 9 * 65 * (16 + 4) + (9 * 65 + 1) * 4  # weights and places, masks
    assert owning[14][1] == 4 * 14 * 14 * 16 * 4 + points <= 65536 and owning[7][1] == 4 * 7 * 7 * 16 * 4 + points
    tiled = {height: (blocks, shared) for height, blocks, shared in started["tiled", "bfloat16"]}
    assert {height: blocks for height, (blocks, _) in tiled.items()} == {
        56: 32 * 7 * 49, 28: 32 * 14 * 16, 14: 32 * 28 * 4, 7: 32 * 56
    }  # fmt: skip
    lists = 64 * 16 * 4 + 16 * 16 * 4 + 64 * 36 * 2  # gradients, pixels, corners
    assert {shared for _, shared in tiled.values()} == {lists + points}
    assert (
        started["by shape", "bfloat16"] == started["dense tiled", "bfloat16"][:2] + started["dense owning", "bfloat16"]
    )
    assert started["by shape", "float32"] == started["tiled", "float32"]
    # By dense products: strips of 49 of 56 rows, of an odd number of eights of floats, beside gradients and points.
    dense = {height: shared for height, _, shared in started["dense owning", "bfloat16"]}
    assert dense == {14: 56 * 200 * 4 + 64 * 32 + 56 * 54, 7: 56 * 56 * 4 + 64 * 32 + 56 * 54}
    assert {shared for *_, shared in started["dense tiled", "bfloat16"]} == {64 * 200 * 4 + 64 * 32 + 64 * 54}
    # Three blocks of an A100, two where a multiprocessor has 100 KB; there the sparse one takes two tiles, not four.
    assert count.blocks_of("sm_80", 128, dense[14]) == 3 and 2 * (dense[14] + 1024) <= 100 * 1024
    few = {height: shared for height, _, shared in started["owning, 100 KB", "float32"]}
    assert few[14] == 2 * 14 * 14 * 16 * 4 + points
    # Without offsets a point is one pixel. A row of 56 pixels has 3 points each but 2 at its ends; its seven tiles
    # reach 10 pixels each but 9 at its ends. Of 28 pixels the last tile has four, and reaches five.
    assert added["atomic", 56, 0] == pytest.approx((3 * 56 - 2) ** 2 / 56**2, abs=1e-5)
    assert added["tiled", 56, 0] == pytest.approx((5 * 10 + 2 * 9) ** 2 / 56**2, abs=1e-5)
    assert added["tiled", 28, 0] == pytest.approx((9 + 10 + 10 + 5) ** 2 / 28**2, abs=1e-5)
    # With offsets, a pixel has 36 corners, few of them its own.
    assert 30 < added["atomic", 28, 1] < 36 and added["tiled", 56, 1] < 3 and added["tiled", 28, 2] < 4
    # Registers and shared memory by hand: 64 registers leave 8 blocks of 128 threads, 64 KB leave 2 and 3.
    assert count.blocks_of("sm_80", 64, points) == 8
    assert [count.blocks_of(a, 80, owning[14][1]) for a in ("sm_80", "sm_90")] == [2, 3]
