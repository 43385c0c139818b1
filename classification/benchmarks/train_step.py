"""InternImage end to end: forward pass and training step with the operator, beside others in the operator's place.

    python benchmarks/train_step.py [--quick] [--threads 2]

On a CPU InternImage-T, batch 2, float32, beside `grid_sample`; on a GPU InternImage-B, batch 32, bfloat16, eager and
compiled. 224 pixels, AdamW, no data loading; medians.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops_dcnv3"))

import torchvision_shim  # noqa: F401, I001  (before timm)

import torch

import benchmark as operator_benchmark  # takes its own folder off the path again: the installed dcnv3 is meant
import dcnv3
from models.intern_image import InternImage


def model_table(device, dtype, batch, variant, modes, repeats):
    """InternImage end to end with the operator, and with others in its place."""
    channels, groups, depths = operator_benchmark.VARIANTS[variant]
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
        return operator_benchmark.grid_sample_reference(input, offset.contiguous(), mask.contiguous(), group)

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
        inference = operator_benchmark.milliseconds(infer, device, repeats)
        model.train()
        training = operator_benchmark.milliseconds(step, device, repeats)
        share = "" if mode == "grid_sample" else f"{operator_share(step, device):.0%}"
        rows.append([mode, f"{inference:.1f}", f"{training:.1f}", share])
    dcnv3.module.dcnv3 = dcnv3.dcnv3
    print(f"InternImage-{variant}, 224 pixels, batch {batch}, {str(dtype).removeprefix('torch.')}, ms\n")
    operator_benchmark.table(["", "forward", "training step (AdamW)", "of which the operator"], rows)


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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats: whether it runs, not how fast")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU (default 2)")
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    operator_benchmark.describe(device)
    if device == "cuda":
        model_table("cuda", torch.bfloat16, 32, "B", ("dcnv3", "compiled"), 5 if arguments.quick else 50)
    else:
        torch.set_num_threads(arguments.threads)
        model_table("cpu", torch.float32, 2, "T", ("grid_sample", "dcnv3"), 1 if arguments.quick else 15)


if __name__ == "__main__":
    main()
