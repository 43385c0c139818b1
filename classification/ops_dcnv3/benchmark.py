"""Times the operator against others that do the same: `python ops_dcnv3/benchmark.py [--check] [--quick]`.

On a CPU: the levels of InternImage-T and B at 224 pixels, batch 2, float32. On a GPU: batch 32, bfloat16 and float32,
summed over all 33 blocks of InternImage-B, every backward kernel that fits, beside the bytes that must move. Medians of
one run, as Markdown. Columns whose package does not load are left out, and it says why.

--check   all that the first hour on a GPU is for, in five parts, most important first: correctness; capture, streams,
          determinism; atomic adds; times; what to do next. A part that fails stops no other, and after each all that
          there is so far is in dcnv3_check.md and dcnv3_check.json. Figures of an operator that failed part 1 are
          figures of a wrong operator: the last part says so. Without kernels it stops at once.
--only    one of the parts, in dcnv3_<part>.md and .json; or the last one, which --check leaves out: memory and races of
          each kernel by compute-sanitizer, 12 to 36 minutes
--dry     with --check: tiny shapes on a CPU, to try the command itself where no GPU is
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# The installed package, not the sources beside this file: those hold no compiled kernels.
from nvcc import find_nvcc

sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
import dcnv3  # noqa: E402

HERE = Path(__file__).parent
SIZES = (56, 28, 14, 7)
BACKWARD_KERNELS = ("atomic", "tiled", "owning", "ordered")  # what DCNV3_BACKWARD takes
VARIANTS = {"T": (64, 4, (4, 4, 18, 4)), "B": (112, 7, (4, 4, 21, 4))}  # channels, groups, depths


def grid_sample_reference(input, offset, mask, group):
    """DCNv3 as most write it in PyTorch: all points at once through `grid_sample`; 3x3, padding 1."""
    n, h, w, channels = input.shape
    images = input.view(n, h * w, group, -1).permute(0, 2, 3, 1).reshape(n * group, channels // group, h, w)
    point = torch.arange(9, device=input.device, dtype=input.dtype)
    x = torch.arange(w, device=input.device, dtype=input.dtype).view(-1, 1, 1) + point // 3 - 1
    y = torch.arange(h, device=input.device, dtype=input.dtype).view(-1, 1, 1, 1) + point % 3 - 1
    offset = offset.view(n, h, w, group, 9, 2)
    grid = torch.stack([(2 * (offset[..., 0] + x) + 1) / w - 1, (2 * (offset[..., 1] + y) + 1) / h - 1], -1)
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(n * group, h * w, 9, 2)
    samples = F.grid_sample(images, grid, align_corners=False)  # [N*G, D, H*W, 9]
    weights = mask.view(n, h * w, group, 9).permute(0, 2, 1, 3).reshape(n * group, 1, h * w, 9)
    return (samples * weights).sum(-1).view(n, channels, h, w).permute(0, 2, 3, 1)


def torchvision_sampling():
    """The same samples by torchvision: nine copies of every channel, added up by a depthwise kernel of ones. It has no
    bfloat16: 16 bits go through float32, as they do there under autocast."""
    from torchvision.ops import deform_conv2d

    def run(input, offset, mask, group):
        n, h, w, channels = input.shape
        # Theirs: channels first, points by row then column, (y, x), kernel centre in the middle.
        offset = offset.view(n, h, w, group, 3, 3, 2).permute(0, 3, 5, 4, 6, 1, 2).flip(4).reshape(n, -1, h, w)
        mask = mask.view(n, h, w, group, 3, 3).permute(0, 3, 5, 4, 1, 2).reshape(n, -1, h, w)
        image, offset, mask = (t.float() for t in (input.permute(0, 3, 1, 2), offset, mask))
        output = deform_conv2d(image, offset, image.new_ones(channels, 1, 3, 3), padding=1, mask=mask)
        return output.permute(0, 2, 3, 1).to(input.dtype)

    return as_they_are, run


def deformops_sampling():
    """DCNv3 of PyPI's deformops. It takes (x, y, mask) of every point packed in one tensor."""
    from deformops.registry import attn

    def pack(input, offset, mask):
        packed = torch.cat([offset.unflatten(-1, (-1, 2)), mask.unsqueeze(-1)], -1).flatten(-2)
        return [input, packed.detach().requires_grad_()]

    def run(input, packed, group):
        return attn(input, packed, groups=group, group_dims=input.shape[-1] // group)

    return pack, run


def as_they_are(*tensors):
    return list(tensors)


def contestants(device, dtype):
    """Column -> (what makes its tensors, function(*tensors, group)), and column -> why it is missing.

    A peer takes part if it loads and its result is the reference's."""
    columns, missing = {}, {}
    columns["grid_sample"] = as_they_are, grid_sample_reference
    columns["dcnv3.reference"] = as_they_are, lambda *t: dcnv3.reference(*t[:3], group=t[3])
    peers = {"torchvision": torchvision_sampling, **({"deformops": deformops_sampling} if device == "cuda" else {})}
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for name, load in peers.items():
        try:
            prepare, run = load()
            sample = level_tensors(1, 5, 6, 2, 16, dtype, device)
            tensors = prepare(*sample)
            output = run(*tensors, 2)
            torch.testing.assert_close(output, dcnv3.reference(*sample, group=2), rtol=tolerance, atol=tolerance)
            torch.autograd.grad(output.sum(), tensors)
            columns[name] = prepare, run
        except Exception as error:  # whatever it is that keeps a package of others from running
            missing[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    if device in dcnv3.kernels():
        columns["dcnv3"] = as_they_are, lambda *t: dcnv3.dcnv3(*t[:3], group=t[3])
        columns["dcnv3, logits"] = (
            as_they_are,
            lambda *t: dcnv3.dcnv3(*t[:3], group=t[3], mask_is_logits=True),
        )
    else:
        missing["dcnv3"] = "no kernels are loaded, see `python -m dcnv3`"
    return columns, missing


def level_tensors(batch, height, width, group, channels, dtype, device, seed=0):
    """Input, offsets drawn N(0, 1), and softmaxed masks."""
    g = torch.Generator(device).manual_seed(seed)
    input = torch.randn(batch, height, width, group * channels, generator=g, device=device)
    offset = torch.randn(batch, height, width, group * 18, generator=g, device=device)
    mask = torch.randn(batch, height, width, group, 9, generator=g, device=device).softmax(-1).flatten(-2)
    return [t.to(dtype).requires_grad_() for t in (input, offset, mask)]


def milliseconds(function, device, repeats):
    """Median time of a call. On a GPU by events, without waiting for each call; slow ones are called less often."""
    for _ in range(3 if device == "cuda" else 1):
        function()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)

    def timed(count):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        torch.cuda.synchronize()
        for start, end in events:
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    return timed(max(3, min(repeats, int(1000 / timed(1)))))


def recorded(function):
    """(a CUDA graph of the current stream that calls `function` some times, how often): a kernel of 10 microseconds is
    over before Python has started the next one, and it is kernels that are to be timed. What cannot be recorded is
    called as it is, and a line says so."""
    times = max(1, min(10, int(2 / milliseconds(function, "cuda", 3))))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(times):
                function()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"Not recorded as a graph, so with Python's own time: {str(error).splitlines()[0]}\n")
        return function, 1
    return graph.replay, times


def forward_and_backward_times(run, sets, group, device, repeats):
    """Milliseconds of (forward without a graph, forward and backward, backward: on a GPU only).

    sets: the tensors, several times over: on a GPU every call works on others, so that they come from memory."""
    outputs = [run(*tensors, group) for tensors in sets]
    grad = torch.randn_like(outputs[0])

    def forward():
        with torch.no_grad():
            for tensors in sets:
                run(*tensors, group)

    def both():
        for tensors in sets:
            torch.autograd.grad(run(*tensors, group), tensors, grad)

    def backward():
        for tensors, output in zip(sets, outputs):
            torch.autograd.grad(output, tensors, grad, retain_graph=True)

    if device == "cpu":
        return tuple(milliseconds(f, device, repeats) / len(sets) for f in (forward, both))
    graphs = [recorded(f) for f in (forward, both, backward)]
    return tuple(milliseconds(replay, device, repeats) / times / len(sets) for replay, times in graphs)


def table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def levels_table(device, dtype, batch, variants, repeats):
    columns, missing = contestants(device, dtype)
    for name, reason in missing.items():
        print(f"No column {name}: {reason}\n")
    best = "dcnv3" if "dcnv3" in columns else "dcnv3.reference"
    header = ["level", *columns, f"grid_sample : {best}"]
    titles = ("forward", "forward + backward", "backward")[: 3 if device == "cuda" else 2]
    tables, totals = [[] for _ in titles], {}
    for variant in variants:
        channels, groups, depths = VARIANTS[variant]
        for level, size in enumerate(SIZES):
            group = groups << level
            shapes = batch, size, size, group, channels // groups, dtype, device
            # Four sets on a GPU: more than its second-level cache holds, but for the last level.
            sets = [level_tensors(*shapes, seed=i) for i in range(4 if device == "cuda" else 1)]
            times = {}
            for name, (prepare, run) in reversed(columns.items()):  # ours first: a peer that fails may leave a mess
                prepared = [prepare(*tensors) for tensors in sets]
                times[name] = forward_and_backward_times(run, prepared, group, device, repeats)
            shape = f"{variant} {size}x{size}x{channels << level} G {group}"
            for which, rows in enumerate(tables):
                for name in columns:
                    key = variant, name, which
                    totals[key] = totals.get(key, 0) + times[name][which] * depths[level]
                ratio = times["grid_sample"][which] / times[best][which]
                rows.append([shape, *(f"{times[name][which]:.3f}" for name in columns), f"{ratio:.1f}"])
        for which, rows in enumerate(tables):
            total = {name: totals[variant, name, which] for name in columns}
            ratio = total["grid_sample"] / total[best]
            title = f"{variant}, all {sum(depths)} blocks"
            rows.append([title, *(f"{total[name]:.2f}" for name in columns), f"{ratio:.1f}"])
    for title, rows in zip(titles, tables):
        print(f"{title}, ms, {str(dtype).removeprefix('torch.')}, batch {batch}\n")
        table(header, rows)
    return totals


def copy_rate(repeats):
    """Bytes a second that a device-to-device copy reads and writes."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), "cuda", repeats) * 1e3


def bytes_table(rate, dtype, batch, totals):
    """What InternImage-B must move, beside the time it took, and the fraction of the rate of a copy that makes."""
    channels, groups, depths = VARIANTS["B"]
    forward = backward = 0
    for level, depth in enumerate(depths):
        pixels, c, g = batch * SIZES[level] ** 2, channels << level, groups << level
        forward += depth * pixels * (2 * c + 27 * g) * dtype.itemsize
        backward += depth * pixels * (3 * c + 54 * g) * dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    print(f"InternImage-B, all 33 blocks, {name}, batch {batch}; a copy moves {rate / 1e12:.2f} TB/s here\n")
    rows = []
    for title, moved, which in (("forward", forward, 0), ("backward", backward, 2)):
        took, least = totals["B", "dcnv3, logits", which], moved / rate * 1e3
        rows.append([title, f"{moved / 1e9:.2f}", f"{least:.2f}", f"{took:.2f}", f"{least / took:.0%}"])
    table(["", "GB that must move", "ms at the rate of a copy", "ms taken", "fraction of the rate"], rows)


def atomics_table(batch):
    """What the float32 adds of a backward pass cost by themselves: a program of its own, atomics.cu."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("Atomic adds are not timed: no nvcc, set CUDA_HOME\n")
        return
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "atomics")
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", HERE / "atomics.cu", "-o", program]
        for step in (command, [program]):
            run = subprocess.run(step, capture_output=True, text=True)
            if run.returncode:
                print(f"Atomic adds are not timed: {run.stderr.strip().splitlines()[-1]}\n")
                return
        lines = run.stdout.splitlines()
    _, groups, depths = VARIANTS["B"]
    pairs = sum(depth * batch * SIZES[level] ** 2 * (groups << level) for level, depth in enumerate(depths))
    millions = pairs * 9 * 4 / 1e6
    print(
        f"Adding rows of 16 float32 to 16 MiB at random places, scaled to the {millions:.0f} million rows "
        f"of a backward pass (InternImage-B, 33 blocks, batch {batch}): it can be no faster than the fastest\n"
    )
    table(
        ["how the threads share a row", "ms"],
        [[name, f"{float(ms) * millions:.2f}"] for name, ms in (line.split("|") for line in lines)],
    )


def memory_table(dtype, batch):
    """Peaks of forward plus backward at InternImage-B's levels, beside what must be held."""
    columns, rows = contestants("cuda", dtype)[0], []
    for level, size in enumerate(SIZES):
        row, group = [], 7 << level
        for prepare, run in columns.values():
            tensors = prepare(*level_tensors(batch, size, size, group, 16, dtype, "cuda"))
            grad = torch.randn_like(tensors[0])
            held = 2 * (sum(t.nbytes for t in tensors) + grad.nbytes) + tensors[0].numel() * 4
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() - grad.nbytes - sum(t.nbytes for t in tensors)
            torch.autograd.grad(run(*tensors, group), tensors, grad)
            row.append(f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}")
        rows.append([f"{size}x{size} G {group}", *row, f"{held / 2**20:.0f}"])
    print(f"Peak memory of forward and backward, MiB, {str(dtype).removeprefix('torch.')}, batch {batch}\n")
    table(["level", *columns, "inputs, outputs, gradients, one float32 sum"], rows)


def describe(device):
    print(f"Command: `{' '.join(['python', *sys.argv])}`")
    if device == "cuda":
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    else:
        listed = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [line.split(":")[1].strip() for line in listed.splitlines() if line.startswith("model name")]
        cpu = names[0] if names else platform.processor()
        load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
        print(f"\n{cpu}, {torch.get_num_threads()} threads{load}, torch {torch.__version__}")
    print(f"dcnv3 {importlib.metadata.version('dcnv3')}, kernels for {', '.join(dcnv3.kernels()) or 'no device'}\n")


@contextlib.contextmanager
def backward_kernel(name):
    """On a GPU, the backward kernel of that name; "": what suits the shape."""
    before = os.environ.get("DCNV3_BACKWARD", "")
    os.environ["DCNV3_BACKWARD"] = name
    try:
        yield
    finally:
        os.environ["DCNV3_BACKWARD"] = before


def with_gradients(function, inputs, grad_output, **settings):
    """[output, and the gradients of input, offset and mask]."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves, **settings)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


# The parts of --check, most important first; the last by itself only: 12 to 36 minutes.
PARTS = {
    "correctness": "Correctness",
    "behaviour": "Capture, streams, determinism, a second device, 64-bit indices",
    "atomics": "Atomic adds",
    "levels": "Forward and backward by level",
    "advice": "What to do next",
    "sanitizers": "Sanitizers",
}


class Check:
    """The parts of --check. `figures` is what dcnv3_check.json holds; `dry`: tiny, on a CPU."""

    def __init__(self, dry, quick, folder):
        self.device, self.dry, self.folder = "cpu" if dry else "cuda", dry, Path(folder)
        self.repeats = 1 if dry else 5 if quick else 50
        self.kernels = () if dry else BACKWARD_KERNELS  # of a GPU
        self.figures = {"failures": [], "levels": [], "seconds": {}}

    def run(self, only=None):
        """Every part, whatever becomes of the others, or only one and advice. Returns how many reported a failure."""
        written, name = io.StringIO(), f"dcnv3_{only or 'check'}"
        parts = [only, "advice"] if only else [part for part in PARTS if part != "sanitizers"]
        with contextlib.redirect_stdout(Tee(sys.stdout, written)):
            describe(self.device)
            for part in parts:
                print(f"## {PARTS[part]}\n", flush=True)
                start = time.perf_counter()
                try:
                    getattr(self, part)()
                except Exception as error:  # the other parts do not depend on this one
                    self.fail(f"{part} stopped: {last_line(error)}")
                    traceback.print_exc()
                self.figures["seconds"][part] = round(time.perf_counter() - start, 1)
                print(flush=True)
                (self.folder / f"{name}.md").write_text(written.getvalue())
                (self.folder / f"{name}.json").write_text(json.dumps(self.figures, indent=1) + "\n")
        return len(self.figures["failures"])

    def fail(self, what):
        self.figures["failures"].append(what)
        print(f"FAILED: {what}\n", flush=True)

    def correctness(self):
        """Golden values; then InternImage-B's shapes and odd ones by backward kernel, precision and layout, against the
        definition in float64."""
        golden, worst = np.load(HERE / "tests" / "dcnv3_op.npz"), 0.0
        for case in json.loads(str(golden["cases"])):
            names = ("input", "offset", "mask", "grad_output", "output", "grad_input", "grad_offset", "grad_mask")
            t = [torch.from_numpy(golden[f"{case['name']}.{name}"]).to(self.device) for name in names]
            shape = {key: tuple(case[key]) for key in ("kernel", "stride", "dilation")}
            rest = {key: case[key] for key in ("group", "offset_scale", "remove_center")}
            got = with_gradients(dcnv3.dcnv3, t[:3], t[3], **shape, padding=tuple(case["pad"]), **rest)
            worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(got, t[4:])))
        print(f"Golden cases: largest difference {worst:.1e}\n")
        if not worst <= 1e-10:  # NaN too
            self.fail(f"golden cases differ by {worst:.1e}")
        levels = (
            [] if self.dry else [(2, size, 7 << i, "dense") for i, size in enumerate(SIZES)] + [(32, 14, 28, "dense")]
        )
        rows = []
        for batch, size, group, layout in [
            *levels,
            (3, 13, 4, "dense"),
            (2, 5, 7, "slices"),
            (2, 6, 7, "off any border"),
        ]:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                what = f"{batch}x{size}x{size} G {group}, {str(dtype).removeprefix('torch.')}, {layout}"
                rows.append([what, *self.errors(what, batch, size, group, layout, dtype)])
        table(["shape, dtype, layout", "definition", "by shape", *self.kernels], rows)
        print("Largest error of output and gradients, of the largest value of each\n")

    def errors(self, what, batch, size, group, layout, dtype):
        """A row: the error of the definition in this precision, then of every backward kernel: allowed are twice it and
        one rounding. Output gradients are random, and memory is NaN before a kernel writes to it."""
        sample = [t.detach() for t in level_tensors(batch, size, size, group, 16, dtype, self.device, seed=size)]
        # Their positions are exact in float32. One rounded across a pixel's border would have another gradient.
        sample[1] = sample[1].mul(1024).round().div(1024)
        grad = level_tensors(batch, size, size, group, 16, dtype, self.device, seed=size + 1)[0].detach()
        if layout == "slices":
            wide = torch.cat([*sample[1:], sample[2]], -1)
            sample[1:] = wide.split([t.shape[-1] for t in (*sample[1:], sample[2])], -1)[:2]
        elif layout == "off any border":
            *sample, grad = (torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in (*sample, grad))
        settings = {"group": group, "mask_is_logits": True}
        exact = with_gradients(dcnv3.reference, [t.double() for t in sample], grad.double(), **settings)

        def error_of(got):
            found = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, exact)]
            return max(found, key=lambda error: float("inf") if error != error else error)

        allowed = error_of(with_gradients(dcnv3.reference, sample, grad, **settings))
        yield f"{allowed:.1e}"
        allowed = 2 * allowed + torch.finfo(dtype).eps
        for kernel in ("", *self.kernels):
            poison = [torch.full_like(t, float("nan"), dtype=kind) for t in exact for kind in (dtype, torch.float32)]
            del poison  # the allocator hands this memory out again
            try:
                with backward_kernel(kernel):
                    error = error_of(with_gradients(dcnv3.dcnv3, sample, grad, **settings))
            except ValueError as unfit:  # this kernel does not fit this shape
                yield last_line(unfit).partition("a group: ")[2].partition(";")[0] or last_line(unfit)
                continue
            yield f"{error:.1e}"
            if not error <= allowed:  # NaN too
                self.fail(f"{what}, backward {kernel or 'by shape'}: error {error:.1e}, allowed are {allowed:.1e}")

    def command(self, what, command, seconds, **variables):
        """Runs a program of tests and prints its last lines."""
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, env={**os.environ, **variables}
            )
        except subprocess.TimeoutExpired:
            self.fail(f"{what}: not over after {seconds} s")
            return
        print("\n".join(f"    {line}" for line in (run.stdout + run.stderr).strip().splitlines()[-12:]) + "\n")
        if run.returncode:
            self.fail(f"{what}: exit status {run.returncode}")

    def behaviour(self):
        which = "capture or deterministic_mode or current_one or beyond_2_to or one_accumulator or weight_0"
        tests = [HERE / "tests" / name for name in ("test_torch.py", "test_operator.py")]
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *tests, "-k", which]
        self.command("tests of behaviour", command, 300)

    def atomics(self):
        if self.device == "cuda":
            atomics_table(32)
        else:
            print("Not on a CPU.\n")

    def levels(self):
        """Forward and backward of InternImage-B's levels, backward by every kernel that fits; then the others."""
        shapes = [(1, 4, 2), (1, 3, 4)] if self.dry else [(32, size, 7 << i) for i, size in enumerate(SIZES)]
        for dtype in (torch.bfloat16, torch.float32):
            name, rows = str(dtype).removeprefix("torch."), []
            for batch, size, group in shapes:
                sets = [
                    level_tensors(batch, size, size, group, 16, dtype, self.device, i)
                    for i in range(1 if self.dry else 4)
                ]
                times = {}
                for kernel in ("", *self.kernels):
                    try:
                        with backward_kernel(kernel), self.stream():
                            taken = forward_and_backward_times(logits, sets, group, self.device, self.repeats)
                    except ValueError:  # this kernel does not fit this shape
                        continue
                    times["forward"] = min(taken[0], times.get("forward", taken[0]))
                    times[kernel or "by shape"] = taken[-1]  # on a CPU with the forward pass
                self.figures["levels"].append({"dtype": name, "size": size, "ms": times})
                columns = ("forward", "by shape", *self.kernels)
                rows.append([f"{size}x{size} G {group}", *(f"{times[c]:.3f}" if c in times else "" for c in columns)])
            print(f"ms, {name}, batch {shapes[0][0]}\n")
            table(["level", "forward", "backward by shape", *self.kernels], rows)
        if self.dry:
            return
        rate = copy_rate(self.repeats)
        for dtype in (torch.bfloat16, torch.float32):
            with self.stream():
                totals = levels_table("cuda", dtype, 32, ("B",), self.repeats)
            bytes_table(rate, dtype, 32, totals)
            memory_table(dtype, 32)

    def stream(self):
        """Graphs are recorded on a stream of their own, and gradients run on the stream of their forward pass."""
        return torch.cuda.stream(torch.cuda.Stream()) if self.device == "cuda" else contextlib.nullcontext()

    def sanitizers(self):
        sanitizer = shutil.which("compute-sanitizer")
        if self.device == "cpu" or not sanitizer:
            print("compute-sanitizer is not found: memory and races on the GPU are not checked\n")
            return
        tests = "cuda and (any_kernel or (any_width and (16 or 7)) or low_precision or views)"
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
            command += ["-p", "no:cacheprovider", HERE / "tests" / "test_operator.py", "-k", tests]
            for kernel in ("atomic", "tiled", "owning"):  # all of them fit the shapes of these tests
                variables = {"DCNV3_BACKWARD": kernel, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor its memory
                self.command(f"{tool}, backward kernel {kernel}", command, 600, **variables)

    def advice(self):
        for failure in self.figures["failures"]:
            print(f"- Mend first: {failure}")
        for level in self.figures["levels"]:
            ms = level["ms"]
            named = {name: ms[name] for name in BACKWARD_KERNELS if name in ms and name != "ordered"}
            if not named or "by shape" not in ms:
                continue
            best = min(named, key=named.get)
            kept = ms["by shape"] <= 1.05 * named[best]
            verdict = (
                "the dispatch takes it" if kept else f"the dispatch takes {ms['by shape']:.3f}: let it take this one"
            )
            print(f"- {level['dtype']}, {level['size']}x{level['size']}: {best}, {named[best]:.3f} ms; {verdict}")
        print()


class Tee:
    """Writes to several files at once."""

    def __init__(self, *files):
        self.files = files

    def write(self, text):
        for file in self.files:
            file.write(text)

    def flush(self):
        for file in self.files:
            file.flush()


def logits(input, offset, mask, group):
    return dcnv3.dcnv3(input, offset, mask, group=group, mask_is_logits=True)


def last_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="all that the first hour on a GPU is for, in five parts")
    parser.add_argument("--only", choices=PARTS, help="this part of --check; sanitizers takes 12 to 36 minutes")
    parser.add_argument("--dry", action="store_true", help="with --check: tiny shapes on a CPU")
    parser.add_argument("--output", default=".", help="folder for dcnv3_check.md and .json (default: here)")
    parser.add_argument("--quick", action="store_true", help="few repeats: whether it runs, not how fast")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU; 1 is steadier on a busy machine (default 2)")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*plain PyTorch.*")
    if arguments.check:
        if not arguments.dry and not torch.cuda.is_available():
            sys.exit("benchmark: --check is for a GPU, and torch finds none; --check --dry tries the command on a CPU")
        check = Check(arguments.dry, arguments.quick, arguments.output)
        if check.device not in dcnv3.kernels():
            sys.exit(f"benchmark: there are no kernels for {check.device} to check: `python -m dcnv3` says why")
        sys.exit(1 if check.run(arguments.only) else 0)
    if torch.cuda.is_available():
        repeats = 5 if arguments.quick else 50
        describe("cuda")
        rate = copy_rate(repeats)
        # Graphs are recorded on a stream of their own, and gradients run on the stream of their forward pass.
        with torch.cuda.stream(torch.cuda.Stream()):
            for dtype in (torch.bfloat16, torch.float32):
                totals = levels_table("cuda", dtype, 32, ("T", "B"), repeats)
                if "cuda" in dcnv3.kernels():
                    bytes_table(rate, dtype, 32, totals)
    else:
        repeats = 3 if arguments.quick else 15
        torch.set_num_threads(arguments.threads)
        describe("cpu")
        levels_table("cpu", torch.float32, 2, ("T", "B"), repeats)


if __name__ == "__main__":
    main()
