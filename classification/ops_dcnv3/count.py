"""What the compiler made of the CUDA kernels, and what the backward ones add to memory, as two tables:
`python ops_dcnv3/count.py`. No GPU and no torch needed.

Instructions (of the whole kernel, with its branches and unrolled loops), registers and spilled bytes come from nvcc and
cuobjdump; shared memory and the number of blocks from the kernels' own source, compiled for the CPU; blocks a
multiprocessor follow from those by arithmetic. Additions are counted while the kernels run on the CPU, with drawn
offsets. Needs nvcc and a C++ compiler, and for instructions cuobjdump.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nvcc import find_nvcc

HERE = Path(__file__).parent
SOURCES = HERE / "csrc"
IMITATION = HERE / "tests" / "imitation"
DTYPES = {"d": "float64", "f": "float32", "Float16": "float16", "BFloat16": "bfloat16"}
# KiB of shared memory of a multiprocessor. All have 65536 registers, 2048 threads, and keep 1 KiB of each block.
SHARED = {"sm_80": 164, "sm_90": 228}


def find_cuobjdump():
    """The disassembler: of the CUDA toolkit, or of the Triton that PyTorch's CUDA wheels bring."""
    nvcc, triton = find_nvcc(), importlib.util.find_spec("triton")
    places = [nvcc.parent] if nvcc else []
    places += [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton else []
    return shutil.which("cuobjdump") or next((p for p in (place / "cuobjdump" for place in places) if p.exists()), None)


def kernel_of(symbol):
    """(kernel, dtype, version) of a mangled name: version "3x3", "any", or "" where there is one only; of dense
    kernels the channels."""
    name, dtype, number, owns = re.search(
        r"(forward|atomic|tiled|owning|ordered|dense)_kernelI(d|f|N.*?\d(?:B?Float16)E)(?:Li(\d+))?(?:ELb(\d))?", symbol
    ).groups()
    dtype = DTYPES[dtype if len(dtype) == 1 else re.search(r"B?Float16", dtype)[0]]
    if name == "dense":
        return f"dense {'owning' if owns == '1' else 'tiled'}", dtype, number
    return name, dtype, {"9": "3x3", "0": "any", None: ""}[number]


def compile_kernels(architectures, folder, ptx=()):
    """Compiles all CUDA sources, warnings being errors: {(architecture, kernel, dtype, version): (registers, spilled
    bytes)}. The object files are left in `folder`. Raises RuntimeError with the compiler's words."""
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (a.removeprefix("sm_") for a in architectures)]
    targets += [f"-gencode=arch=compute_{n},code=compute_{n}" for n in ptx]
    found = {}

    def compile_source(source):
        command = [find_nvcc(), "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", *targets]
        command += ["-c", source, "-o", Path(folder, source.stem + ".o")]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(compile_source, sorted(SOURCES.glob("*.cu"))))
    for run in runs:
        if run.returncode:
            raise RuntimeError(run.stderr)
        pattern = r"entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        for symbol, architecture, spilled, registers in re.findall(pattern, run.stderr, re.S):
            found[(architecture, *kernel_of(symbol))] = int(registers), int(spilled)
    return found


def listings(folder, architecture):
    """{(kernel, dtype, version): its machine code, a line an instruction} of the object files in `folder`."""
    code = {}
    for file in sorted(Path(folder).glob("*.o")):
        command = [find_cuobjdump(), "-sass", "-arch", architecture, file]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for function in listing.split("Function : ")[1:]:
            symbol, *lines = function.splitlines()
            lines = [line for line in lines if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+[^/]", line)]
            while lines and re.search(r"\b(NOP|BRA `\(\.L|BRA 0x)", lines[-1]):  # what fills the last line of memory
                lines.pop()
            code[kernel_of(symbol)] = lines
    return code


def launches(folder):
    """({(kernel, dtype): [(height, blocks, shared bytes), ...]} of the levels of InternImage-B, batch 32,
    {(kernel, height, spread of the offsets): what tests/imitation/launches.cpp counted},
    {(owning fits, owning pays, tiled pays, owning is dense, deterministic): kernel})."""
    program = Path(folder, "launches")
    compiler = os.environ.get("CXX", "c++").split()
    command = [*compiler, "-std=c++17", "-w", "-I", SOURCES, "-I", IMITATION, IMITATION / "launches.cpp", "-o", program]
    subprocess.run(command, check=True)
    started, added, chosen = {}, {}, {}
    for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        kernel, *rest = line.split("|")
        if len(rest) == 5:
            chosen[tuple(flag == "1" for flag in (kernel, *rest[:-1]))] = rest[-1]
        elif len(rest) == 4:
            dtype, height, blocks, shared = rest
            started.setdefault((kernel, dtype), []).append((int(height), int(blocks), int(shared)))
        else:
            height, spread, rows = rest
            added[kernel, int(height), float(spread)] = float(rows)
    return started, added, chosen


def blocks_of(architecture, registers, shared, threads=128):
    """Blocks of a multiprocessor at once. Registers go to warps by 256, shared memory to blocks by 128 bytes."""
    of_a_warp = (registers * 32 + 255) // 256 * 256
    by_registers = 65536 // of_a_warp // (threads // 32)
    by_shared = SHARED[architecture] * 1024 // ((shared + 1024 + 127) // 128 * 128)
    return min(2048 // threads, by_registers, by_shared)


def rows(started):
    """The first table: one row a kernel, dtype and shape of shared memory, both architectures in each."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_kernels(SHARED, folder)
        code = {a: listings(folder, a) for a in SHARED} if find_cuobjdump() else {a: {} for a in SHARED}
    for kernel, dtype, version in sorted({key[1:] for key in compiled}):
        usage = {a: compiled[a, kernel, dtype, version] for a in SHARED}
        length = {a: len(code[a].get((kernel, dtype, version), ())) or "?" for a in SHARED}
        # Shared memory as in InternImage-B; levels with the same of it share a row. float16 is as bfloat16.
        shapes = (
            started.get((kernel, "bfloat16" if dtype == "float16" else dtype), []) if version in ("3x3", "16") else []
        )
        levels = {}
        for height, _, shared in shapes:
            levels.setdefault(shared, []).append(f"{height}x{height}")
        both = [" / ".join(str(what[a]) for a in SHARED) for what in (length,)]
        both += [" / ".join(str(usage[a][i]) for a in SHARED) for i in range(2)]
        for shared, names in levels.items() or [("", [""])]:
            held = " / ".join(str(blocks_of(a, usage[a][0], shared)) for a in SHARED) if shared else ""
            yield [kernel, version, dtype, ", ".join(names), *both, str(shared), held]


def table(header, body):
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for row in body:
        print("| " + " | ".join(row) + " |", flush=True)


def main():
    if find_nvcc() is None:
        raise SystemExit("count.py: no nvcc: install the CUDA toolkit, or set CUDA_HOME to it")
    version = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True).stdout
    print(f"nvcc {re.search(r'release ([0-9.]+)', version)[1]}; {' / '.join(SHARED)}; ", end="")
    print("shared memory of the levels of InternImage-B at 224 pixels\n")
    header = ["kernel", "points", "dtype", "level", "instructions", "registers", "spilled bytes", "shared bytes"]
    header += ["blocks a multiprocessor"]
    with tempfile.TemporaryDirectory() as folder:
        started, added, _ = launches(folder)
    table(header, rows(started))
    print("\nRows of channels added to memory for an output pixel and group, by the spread of the offsets in pixels\n")
    spreads = sorted({spread for *_, spread in added})
    shapes = dict.fromkeys(key[:2] for key in added)
    body = [[kernel, f"{n}x{n}", *(f"{added[kernel, n, s]:.1f}" for s in spreads)] for kernel, n in shapes]
    table(["kernel", "level", *(f"{spread:g}" for spread in spreads)], body)


if __name__ == "__main__":
    main()
