"""Does this environment compute correctly? `python -m jobs.self_test`: the operator against its definition, one step.

It runs on every device of this machine. Kernels that do not fit a GPU have been known to give garbage without an error:
this finds it before a night of training. It also prints if the operator runs without its kernels.
"""

import argparse
import sys
import warnings
from pathlib import Path

import common.torchvision_shim  # noqa: F401  (before torchvision)

import timm
import torch
import torchvision

import config as config_module
from dcnv3 import dcnv3, reference
from training.throughput import RandomStep


def check_operator(device):
    """Output and gradients of the operator, float32, against its definition in float64; raises SystemExit."""
    torch.manual_seed(0)
    sizes = {"input": (2, 9, 8, 32), "offset": (2, 9, 8, 36), "mask": (2, 9, 8, 18)}
    exact = {name: torch.randn(size, dtype=torch.float64, requires_grad=True) for name, size in sizes.items()}
    ours = {name: t.detach().float().to(device).requires_grad_() for name, t in exact.items()}
    results = []
    for function, given in ((reference, exact), (dcnv3, ours)):
        output = function(*given.values(), group=2)
        results.append([output, *torch.autograd.grad(output.square().sum(), list(given.values()))])
    for name, wanted, got in zip(("output", *(f"gradient of {n}" for n in sizes)), *results):
        difference = (got.double().cpu() - wanted).abs().max() / wanted.abs().max()
        if not difference < 1e-4:
            sys.exit(f"error: DCNv3 is wrong on {device}: {name} is off by {difference:.1e} of the largest")


def check_step(device):
    """One training step of a tiny model; raises SystemExit where the loss is not finite."""
    demo = argparse.Namespace(cfg=str(Path(__file__).parents[1] / "configs" / "internimage_tiny_synthetic.yaml"))
    config = config_module.get_config(demo)
    step = RandomStep(config, torch.device(device))
    step()
    if not all(p.isfinite().all() for p in step.step.model.parameters()):
        sys.exit(f"error: a training step on {device} leaves weights that are not finite")


def main():
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_operator(device)
        # Kernels that do not run on this GPU are noticed at the first call only.
        slow = [str(w.message) for w in caught if "plain PyTorch" in str(w.message)]
        check_step(device)
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        for message in slow:
            print(f"setup: {message}")
        how = "PyTorch code (slow)" if slow else "its kernels"
        print(f"setup: self-test on {name}: the operator, by {how}, equals its definition; a training step works")
    print(f"setup: torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}")


if __name__ == "__main__":
    main()
