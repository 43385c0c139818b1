"""The training step of InternImage beside timm's backbones of like size, and beside naive settings.

    python benchmarks/train_step.py [--size T] [--batch 8] [--compiled] [--grid-sample] [--threads 2] [--quick]
    python benchmarks/train_step.py --studies        # what MODEL.HEAD and MODEL.FUSION cost, four images to a study

Each row is a configuration's own step (`training/step.py`): mixed precision where the device has it, channels last,
fused AdamW, the average of the weights by one call. Naive: float32, NCHW, an average and an optimizer that go parameter
by parameter. All rows take turns in one run, so that a ratio is of the same minutes. Random images of 224 pixels.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops_dcnv3"))

import common.torchvision_shim  # noqa: F401, I001  (before timm)

import torch
from timm.utils import ModelEmaV2

import benchmark as operator_benchmark  # takes its own folder off the path again: the installed dcnv3 is meant
from training import compiling
import config as config_module
import dcnv3
from training import throughput
from models.inference import device_name, set_up_device
from models import own_values

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"T": ("convnext_tiny", "swin_tiny_patch4_window7_224"), "B": ("convnext_base", "swin_base_patch4_window7_224")}


def build(device, size, batch, *opts):
    """The step of configs/internimage_<size>_mimic_cxr_224.yaml with --opts."""
    cfg = ROOT / "configs" / f"internimage_{size.lower()}_mimic_cxr_224.yaml"
    opts = ["DATA.BATCH_SIZE", str(batch), "DATA.IMG_SIZE", "224", *opts]
    config = config_module.get_config(Namespace(cfg=str(cfg), opts=opts), own_values)
    set_up_device(config, device)
    step = throughput.RandomStep(config, device)
    for name, parameter in step.step.model.named_parameters():  # a fresh InternImage samples whole pixels only
        if name.endswith("dcn.offset.weight"):
            torch.nn.init.normal_(parameter, std=0.05)
    return step


def naive(step):
    """The same step without what the configuration and the optimizer do for speed (it was built without AMP)."""
    parts = step.step
    parts.model.to(memory_format=torch.contiguous_format)
    keys = ("params", "weight_decay", "lr_scale")
    groups = [{key: group[key] for key in keys} for group in parts.optimizer.param_groups]
    parts.optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=False, foreach=False)
    parts.ema = ModelEmaV2(parts.model, decay=0.9999)  # parameter by parameter
    return step


def by_grid_sample(step):
    """The same step with the operator as most write it in PyTorch."""
    trained = step.step.trained

    def slow(input, offset, mask, *, group, mask_is_logits=False, **_):
        if mask_is_logits:
            mask = mask.unflatten(-1, (group, 9)).softmax(-1).flatten(-2)
        return operator_benchmark.grid_sample_reference(input, offset.contiguous(), mask.contiguous(), group)

    def run(images):
        ours, dcnv3.module.dcnv3 = dcnv3.module.dcnv3, slow
        try:
            return trained(images)
        finally:
            dcnv3.module.dcnv3 = ours

    step.step.trained = run
    return step


def operator_share(step):
    """The part of a step's time that the operator's calls, forward and backward, take; None without any."""
    from torch.profiler import ProfilerActivity, profile

    gpu = step.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as recorded:
        step()
        if gpu:
            torch.cuda.synchronize()
    operator = total = 0
    for event in recorded.key_averages():
        if not gpu:
            total += event.self_cpu_time_total
        # Kernels only: the calls that started them have the same time once more.
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            total += event.self_device_time_total
        # Outermost calls, with all that they call; autograd's own names hold the same once more.
        if event.key in ("dcnv3::forward", "dcnv3::backward"):
            operator += event.device_time_total if gpu else event.cpu_time_total
    return operator / total if operator else None


def weighed(make, device):
    """(the step that `make` builds, GB on the GPU while it runs, with weights, moments and average; None on a CPU)."""
    if device.type == "cpu":
        return make(), None
    before, step = torch.cuda.memory_allocated(device), make()
    step()  # the first one tries convolutions out, and some of them take more
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return step, (torch.cuda.max_memory_allocated(device) - before) / 1e9


def studies_of(size, batch):
    """{name: --opts}: as many images in each row, four to a study."""
    fused = ["DATA.UNIT", "study", "DATA.BATCH_SIZE", str(batch // 4), "MODEL.FUSION"]
    return {
        f"InternImage-{size}": [],
        "MODEL.HEAD label_attention": ["MODEL.HEAD", "label_attention"],
        "studies, MODEL.FUSION mean": [*fused, "mean"],
        "studies, MODEL.FUSION attention": [*fused, "attention"],
        "the same, TRAIN.FREEZE [backbone]": [*fused, "attention", "TRAIN.FREEZE", "[backbone]"],
    }


def rows_of(size, device, arguments):
    """{name: (RandomStep, its GB)}."""
    ours, convnext = f"InternImage-{size}", PEERS[size][0]
    wanted = {ours: [], **{peer: ["MODEL.TYPE", "timm", "MODEL.TIMM.NAME", peer] for peer in PEERS[size]}}
    if arguments.studies:
        wanted = studies_of(size, arguments.batch)
    if arguments.compiled:
        wanted |= {f"{row}, compiled": [*wanted[row], "TRAIN.COMPILE", "True"] for row in (ours, convnext)}
    makers = {row: lambda opts=opts: build(device, size, arguments.batch, *opts) for row, opts in wanted.items()}
    if not arguments.studies:
        makers[f"{ours}, naive"] = lambda: naive(build(device, size, arguments.batch, "AMP_OPT_LEVEL", "O0"))
    if arguments.grid_sample:
        makers[f"{ours}, grid_sample"] = lambda: by_grid_sample(build(device, size, arguments.batch))
    return {row: weighed(make, device) for row, make in makers.items()}


def table(size, device, arguments):
    rows = rows_of(size, device, arguments)
    steps = {row: step for row, (step, _) in rows.items()}
    dtypes = {step.step.dtype for step in steps.values()}
    products = {dtype: throughput.Product(device, dtype) for dtype in dtypes}
    seconds = throughput.step_seconds(steps | products, arguments.rounds)
    rates = {dtype: product.rate(*seconds[dtype]) for dtype, product in products.items()}
    said = ", ".join(f"{str(d).removeprefix('torch.')} {rate / 1e12:.3f} TFLOP/s" for d, rate in rates.items())
    print(f"\nbatch {arguments.batch}, 224 pixels; matrix products: {said}\n")
    base = f"InternImage-{size}" if arguments.studies else PEERS[size][0]
    head = ["", "images/s", f"of {base}", *throughput.PARTS, "operator", "peak GB", "GMACs", "of matrix rate"]
    reference = sum(seconds[base])

    def cells():  # a row at a time: the profiler takes a while
        for row, (step, memory) in rows.items():
            whole, operator = sum(seconds[row]), operator_share(step)
            speed = arguments.batch / whole
            part = throughput.share_of(rates[step.step.dtype], step.gmacs, speed)
            yield [
                *(row, f"{speed:.2f}", f"{reference / whole:.2f}", *(f"{1e3 * s:.0f}" for s in seconds[row])),
                *("" if operator is None else f"{operator:.0%}", "" if memory is None else f"{memory:.1f}"),
                *(f"{step.gmacs:.2f}", f"{part:.0%}"),
            ]

    operator_benchmark.table(head, cells())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=PEERS, help="of the models (default: both)")
    parser.add_argument("--batch", type=int, default=32 if gpu else 8)
    parser.add_argument("--rounds", type=int, default=20 if gpu else 7)
    parser.add_argument("--compiled", action="store_true", help="these rows too: minutes of compiling before the first")
    parser.add_argument("--grid-sample", action="store_true", help="a row with `grid_sample` in the operator's place")
    parser.add_argument("--studies", action="store_true", help="the rows of MODEL.HEAD and MODEL.FUSION instead")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU (default 2)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, by its CPU time: for a machine in use")
    parser.add_argument("--quick", action="store_true", help="one round of four images: whether it runs, not how fast")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.batch, arguments.rounds = 4, 1
    device = torch.device("cuda" if gpu else "cpu")
    if arguments.cpu_time:
        arguments.threads, throughput.Marks.clock = 1, time.process_time
    if not gpu:
        torch.set_num_threads(arguments.threads)
    if arguments.compiled:
        compiling.prepare(ROOT / "output" / "compile_cache", device)
    timm = importlib.metadata.version("timm")
    print(
        f"{device_name(device)}, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, timm {timm}; medians of {arguments.rounds} rounds, "
        f"ms{' of CPU time' if arguments.cpu_time else ''}"
    )
    for size in [arguments.size] if arguments.size else PEERS:
        table(size, device, arguments)


if __name__ == "__main__":
    main()
