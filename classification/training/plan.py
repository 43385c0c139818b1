"""What a configuration needs in GPU memory, before it starts: `main.py --throughput --plan`, on any machine."""

import contextlib
import copy
import weakref

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import build_model
from training import sharding
from training.step import freeze
from training.throughput import random_batch

CARDS = (40, 80)  # GB of an A100
USABLE = 0.9  # of a card: the rest is for CUDA itself, workspaces, communication and gaps between tensors


class Alive(TorchDispatchMode):
    """The bytes of all tensors that are made under it and exist; `peak`: the most at once."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        old = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known | old:
                self.known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, size):
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _step_dtype(config):
    """The precision of a training step on an A100."""
    if config.AMP_OPT_LEVEL == "O0":
        return torch.float32
    return torch.bfloat16 if config.AMP_DTYPE == "auto" else getattr(torch, config.AMP_DTYPE)


def placed(model, device, dtype=torch.float32):
    """`model`, which is on `meta`, on a device without its values. (Its own methods cannot where tensors are fake.)

    Layer norms are in float32 and take it, as under CUDA's autocast; a CPU's would leave them as they are.
    """
    for module in model.modules():
        norm = isinstance(module, nn.LayerNorm)
        if norm:
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    kind = dtype if old.is_floating_point() and not norm else old.dtype
                    new = torch.empty_like(old, device=device, dtype=kind)
                    tensors[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return model


def step_bytes(module, inputs, amp):
    """The most that a forward and a backward pass keep beside the parameters and their gradients."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Alive() as alive:
        with amp():
            loss = module(inputs).float().square().mean()
        loss.backward()
    return alive.peak


def check_block(config, device):
    """A line with the bytes of a step of the largest block, one image, float32: computed, and taken; "" without blocks.

    On a GPU its allocator counts, which sees what kernels take for themselves; on a CPU the tensors are counted.
    """
    with torch.device("meta"):
        model = build_model(config).eval()
    if not sharding.blocks(model):
        return ""
    block = max(sharding.blocks(model), key=lambda block: sum(p.numel() for p in block.parameters()))
    shapes, empty = [], copy.deepcopy(block).train()
    block.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        placed(model, torch.device("cpu"))(torch.empty(1, 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE))

    def step():
        module = placed(copy.deepcopy(empty), device)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        return module, torch.randn(shapes[0], device=device, requires_grad=True), contextlib.nullcontext

    with FakeTensorMode(allow_non_fake_inputs=True):
        computed = step_bytes(*step())
    module, inputs, exact = step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    taken = step_bytes(module, inputs, exact)
    if device.type == "cuda":
        taken = torch.cuda.max_memory_allocated(device) - before
    sizes = f"computed {computed / 1e9:.3f} GB, taken on {device.type} {taken / 1e9:.3f} GB"
    return f"\na step of the largest block on one image: {sizes}"


def measure(config):
    """Bytes: {weights, trained: of the parameters in float32, and of those that train; moments, ema; largest, rest: of
    the largest block and of what is in none; kept, kept_low: by a step of DATA.BATCH_SIZE and of twice as many, with
    weights in float32, as DDP has them, and in the precision of the step, as FSDP gathers them; low: bytes of a number
    in that precision}.
    """
    dtype = _step_dtype(config)
    with torch.device("meta"):
        model, low = (build_model(config).train() for _ in range(2))
    # Tensors of a shape and a type without memory: torch computes only the shapes.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for one, kind in ((model, torch.float32), (low, dtype)):
            freeze(placed(one, torch.device("cpu"), kind), config.TRAIN.FREEZE)
        batches = [random_batch(config, torch.device("cpu"), times) for times in (1, 2)]

        def amp():
            return torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)

        weights = 4 * sum(p.numel() for p in model.parameters())
        trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        blocks = [4 * sum(p.numel() for p in block.parameters()) for block in sharding.blocks(model)]
        optimizer = config.TRAIN.OPTIMIZER
        return {
            "weights": weights,
            "trained": trained,
            "moments": trained * (2 if optimizer.NAME == "adamw" else optimizer.MOMENTUM > 0),
            "ema": weights * config.TRAIN.EMA.ENABLE,
            "largest": max(blocks, default=0),
            "rest": weights - sum(blocks),
            "kept": [step_bytes(model, images, amp) for images in batches],
            "kept_low": [step_bytes(low, images, amp) for images in batches],
            "low": dtype.itemsize,
        }


def rows(m, offload=False):
    """(name, bytes of parameters, gradients, optimizer, EMA, gathered; `kept` of the activations) of DDP and of FSDP.

    DDP adds gradients in buffers that are the gradients, whatever the number of GPUs. FSDP has gathered: what is in no
    block, the block that computes and the next with its buffer, and of one block the gradients, as they are and in the
    float32 in which they are added.
    """
    state = (m["weights"], m["trained"], m["moments"], m["ema"])
    yield "DDP, 1 to 4", (*state, 0), m["kept"]
    share = m["low"] / 4
    gathered = share * (m["rest"] + 4 * m["largest"]) + m["largest"]
    for gpus in (1, 2, 3, 4):
        yield f"FSDP, {gpus}", (*(0 if offload else part / gpus for part in state), gathered), m["kept_low"]


def describe(config, device):
    """The plan as a text: a table of GB per GPU, the largest batch that each card holds, and :func:`check_block`."""
    m, batch = measure(config), config.DATA.BATCH_SIZE
    heads = ["GPUs", "parameters", "gradients", "optimizer", "EMA", "gathered", "activations", "all"]
    lines = [heads + [f"largest batch, {card} GB" for card in CARDS]]
    for name, fixed, (once, twice) in rows(m, config.TRAIN.FSDP_OFFLOAD):
        parts = (*fixed, once)
        fits = [batch + int((USABLE * card * 1e9 - sum(parts)) // ((twice - once) / batch)) for card in CARDS]
        lines.append([name, *(f"{part / 1e9:.1f}" for part in (*parts, sum(parts)))])
        lines[-1] += [f"{most:,}" if most > 0 else "none" for most in fits]
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)
    what = ", activations recomputed" if config.TRAIN.USE_CHECKPOINT else ""
    return (
        f"GB per GPU of {config.MODEL.NAME}: {m['weights'] / 4e6:,.1f} million parameters, {batch} images of "
        f"{config.DATA.IMG_SIZE} pixels per GPU{what}\n{table}\n{1 - USABLE:.0%} of a card is left for CUDA, "
        f"workspaces and communication{check_block(config, device)}"
    )
