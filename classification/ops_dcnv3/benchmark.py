"""Times the operator against others that do the same: `python ops_dcnv3/benchmark.py [--check] [--quick]`.

On a CPU: the levels of InternImage-T and B at 224 pixels, batch 2, float32, and InternImage-T end to
end. On a GPU: batch 32, bfloat16 and float32, summed over all 33 blocks of InternImage-B, beside the
bytes that must move. Medians of one run, as Markdown. Columns whose package does not load are left out,
and it says why.

--check   first the operator tests, on a GPU also compute-sanitizer where it is found
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

# The installed package, not the sources beside this file: those hold no compiled kernels.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
import dcnv3  # noqa: E402

HERE = Path(__file__).parent
SIZES = (56, 28, 14, 7)
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
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = CUDA_HOME and Path(CUDA_HOME) / "bin" / "nvcc"
    if not nvcc or not nvcc.exists():
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


def memory_line():
    """Peak of forward plus backward at the first level of B against what it must hold."""
    tensors = level_tensors(32, 56, 56, 7, 16, torch.bfloat16, "cuda")
    grad = torch.randn_like(tensors[0])
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(dcnv3.dcnv3(*tensors, group=7), tensors, grad)
    held = sum(t.numel() for t in tensors) * 2 * 2 + grad.numel() * 2 * 2 + tensors[0].numel() * 4
    peak = torch.cuda.max_memory_allocated()
    print(
        f"Peak memory {peak / 2**20:.0f} MiB; inputs, outputs, gradients and one accumulator {held / 2**20:.0f} MiB.\n"
    )


def model_table(device, dtype, batch, variant, modes, repeats):
    """InternImage end to end with the operator, and with others in its place."""
    sys.path.insert(0, str(HERE.parent))
    try:
        import torchvision_shim  # noqa: F401  (before timm)

        from models.intern_image import InternImage
    except ImportError as error:
        print(f"InternImage-{variant} is not timed: {error}\n")
        return

    channels, groups, depths = VARIANTS[variant]
    torch.manual_seed(0)
    model = InternImage(
        num_classes=14,
        channels=channels,
        groups=tuple(groups << i for i in range(4)),
        depths=depths,
        layer_scale=None if variant == "T" else 1e-5,
        post_norm=variant != "T",
    ).to(device, memory_format=torch.channels_last)
    for name, parameter in model.named_parameters():  # a fresh model has no offsets
        if ".dcn.offset.weight" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(batch, 3, 224, 224, device=device)

    def slow(input, offset, mask, *, group, mask_is_logits=False, **_):
        if mask_is_logits:
            mask = mask.unflatten(-1, (group, 9)).softmax(-1).flatten(-2)
        return grid_sample_reference(input, offset.contiguous(), mask.contiguous(), group)

    rows = []
    for mode in modes:
        dcnv3.module.dcnv3 = slow if mode == "grid_sample" else dcnv3.dcnv3
        model.eval()
        run = torch.compile(model) if mode == "compiled" else model

        def infer(run=run):
            with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
                run(x)

        def step(run=run):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = run(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        inference = milliseconds(infer, device, repeats)
        model.train()
        training = milliseconds(step, device, repeats)
        share = "" if mode == "grid_sample" else f"{operator_share(step, device):.0%}"
        rows.append([mode, f"{inference:.1f}", f"{training:.1f}", share])
    dcnv3.module.dcnv3 = dcnv3.dcnv3
    print(f"InternImage-{variant}, 224 pixels, batch {batch}, {str(dtype).removeprefix('torch.')}, ms\n")
    table(["", "forward", "training step (AdamW)", "of which the operator"], rows)


def operator_share(step, device):
    """The part of a step's time that the operator's calls, forward and backward, take."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as recorded:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    operator = total = 0
    for event in recorded.key_averages():
        if device == "cpu":
            total += event.self_cpu_time_total
        # Kernels only: the calls that started them have the same time once more.
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            total += event.self_device_time_total
        # Outermost calls, with all that they call; autograd's own names hold the same once more.
        if event.key in ("dcnv3::forward", "dcnv3::backward"):
            operator += event.device_time_total if device == "cuda" else event.cpu_time_total
    return operator / total


def check():
    """The tests, and compute-sanitizer where it is found. Ends the run where something fails."""
    command = [sys.executable, "-m", "pytest", "-q", str(HERE / "tests")]
    if subprocess.run(command).returncode:
        sys.exit("benchmark: the operator tests fail: no figures for an operator that is wrong")
    sanitizer = shutil.which("compute-sanitizer")
    if torch.cuda.is_available() and sanitizer:
        script = HERE / "tests" / "test_operator.py"
        # Without torch's cache every tensor is memory of its own, and a step beyond it is seen.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tool in ("memcheck", "racecheck", "initcheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
            tests = "cuda and (any_kernel or (any_width and (16 or 7)) or low_precision or views)"
            if subprocess.run([*command, str(script), "-k", tests], env=environment).returncode:
                sys.exit(f"benchmark: compute-sanitizer {tool} reports errors")
    elif torch.cuda.is_available():
        print("compute-sanitizer is not found: memory and races on the GPU are not checked\n")


def describe(device):
    print(f"Command: `{' '.join(['python', 'ops_dcnv3/benchmark.py', *sys.argv[1:]])}`")
    if device == "cuda":
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    else:
        listed = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [line.split(":")[1].strip() for line in listed.splitlines() if line.startswith("model name")]
        cpu = names[0] if names else platform.processor()
        load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
        print(f"\n{cpu}, {torch.get_num_threads()} threads{load}, torch {torch.__version__}")
    print(f"dcnv3 {importlib.metadata.version('dcnv3')}, kernels for {', '.join(dcnv3.kernels()) or 'no device'}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run the tests first")
    parser.add_argument("--quick", action="store_true", help="few repeats: whether it runs, not how fast")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU; 1 is steadier on a busy machine (default 2)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*plain PyTorch.*")
    if arguments.check:
        check()
    if torch.cuda.is_available():
        repeats = 5 if arguments.quick else 50
        describe("cuda")
        atomics_table(32)
        rate = copy_rate(repeats)
        # Graphs are recorded on a stream of their own, and gradients run on the stream of their forward pass.
        with torch.cuda.stream(torch.cuda.Stream()):
            for dtype in (torch.bfloat16, torch.float32):
                totals = levels_table("cuda", dtype, 32, ("T", "B"), repeats)
                if "cuda" in dcnv3.kernels():
                    bytes_table(rate, dtype, 32, totals)
        if "cuda" in dcnv3.kernels():
            memory_line()
        model_table("cuda", torch.bfloat16, 32, "B", ("dcnv3", "compiled"), repeats)
    else:
        repeats = 3 if arguments.quick else 15
        torch.set_num_threads(arguments.threads)
        describe("cpu")
        levels_table("cpu", torch.float32, 2, ("T", "B"), repeats)
        model_table("cpu", torch.float32, 2, "T", ("grid_sample", "dcnv3"), repeats)


if __name__ == "__main__":
    main()
