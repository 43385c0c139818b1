"""One update of the weights: what training takes, and what `throughput.py` and the benchmarks measure."""

import contextlib
import copy
import functools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from common import distributed
from common.errors import UserError, did_you_mean
from common.studies import size
from models.inference import autocast
from training import compiling, sharding
from training.optimizer import build_optimizer, set_lr


def unmarked():
    """Nothing is measured."""


class Ema:
    """The exponential moving average of a model, buffers included; decay: per update."""

    def __init__(self, model, decay):
        self.module, self.model, self.decay = copy.deepcopy(model).eval(), model, decay

    @functools.cached_property
    def pairs(self):
        """(EMA, value) of every tensor. Listed once, at the first update, when the model is on its device and in its
        shards: to walk through two models takes the CPU longer than the update of the EMA takes a GPU."""
        return [*zip(*((*module.parameters(), *module.buffers()) for module in (self.module, self.model)))]

    @torch.no_grad()
    def update(self):
        averages, values = zip(*(pair for pair in self.pairs if pair[0].is_floating_point()))
        torch._foreach_lerp_(sharding.local(averages), sharding.local(values), 1 - self.decay)
        for average, value in self.pairs:
            if not average.is_floating_point():
                average.copy_(value)


@dataclass
class Step:
    """Forward and backward passes over `accumulation` batches, then one step of the optimizer and of the EMA.

    model: what validation, the EMA and checkpoints use.
    trained: what is called, the same parameters, perhaps compiled and wrapped for several ranks.
    silent(): a context in which gradients do not cross the network.
    criterion(logits, targets) -> mean over the known terms.
    known(targets, batch_size) -> their share of those of a full batch.
    batch_size: of a full batch; a compiled model runs smaller ones uncompiled.
    clip: largest norm of the gradient, 0 for any.
    mix(images, targets) -> the same, mixed, or None.
    frozen: modules that stay in evaluation mode.
    """

    model: nn.Module
    trained: nn.Module
    criterion: nn.Module
    known: object
    optimizer: torch.optim.Optimizer
    ema: Ema
    amp: object
    dtype: torch.dtype
    world: distributed.World
    batch_size: int
    silent: object = contextlib.nullcontext
    accumulation: int = 1
    clip: float = 0.0
    compiled: bool = False
    mix: object = None
    frozen: list[nn.Module] = ()
    scaler: torch.amp.GradScaler = None

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.dtype == torch.float16)

    @functools.cached_property
    def parameters(self):
        return [*self.model.parameters(), *self.criterion.parameters()]

    def saved_bytes(self):
        """About what a checkpoint of it takes: weights, EMA, and AdamW's two moments of what trains."""
        weights = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        moments = sum(2 * p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return weights * (1 + (self.ema is not None)) + moments

    def train(self):
        """The model in training mode, but for what is frozen."""
        self.model.train()
        for module in self.frozen:
            module.eval()

    def __call__(self, batches, lr, mark=unmarked):
        """One update at rate `lr` over the next batches (images, targets, ...) of an iterator: (loss, norm), tensors.

        mark is called before it, after each forward and each backward pass, and at the end.
        """
        set_lr(self.optimizer, lr)
        total = known = 0.0  # of the update: its loss, and the share of its terms that are known
        mark()
        for k in range(self.accumulation):
            images, targets = next(batches)[:2]
            small = size(images) < self.batch_size  # to compile for each such size would take minutes
            if self.mix is not None:
                images, targets = self.mix(images, targets)
            share = self.known(targets, self.batch_size)
            # Gradients cross the network once per update, with the last forward pass.
            with self.silent() if k < self.accumulation - 1 else contextlib.nullcontext():
                with self.amp(), compiling.uncompiled(self.compiled and small):
                    loss = self.criterion(self.trained(images), targets)
                mark()
                self.scaler.scale(loss * share / self.accumulation).backward()
            mark()
            total, known = total + loss.detach().double() * share / self.accumulation, known + share
        distributed.average_gradients(self.criterion.parameters(), self.world)
        self.scaler.unscale_(self.optimizer)
        # The mean over the known terms of the whole update: all its batches on all ranks.
        whole = 1 / distributed.mean_tensor(known / self.accumulation, self.world).clamp(min=1e-12)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        sharding.multiply(sharding.local(gradients), whole)
        norm = sharding.total_norm(gradients, self.world)
        # As torch.nn.utils.clip_grad_norm_, which takes no shards beside whole gradients.
        sharding.multiply(sharding.local(gradients), ((self.clip or math.inf) / (norm + 1e-6)).clamp(max=1.0))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        if self.scaler.is_enabled():  # float16: the scaler skips updates of infinite norm, as it should
            norm = norm.where(norm.isfinite(), 0)
        mark()
        return total * whole, norm.double()


def freeze(model, names):
    """Keep the modules of these names as they are; returns them. Autograd ends before the first module that trains.

    UserError: the model has no such module, or nothing is left to train.
    """
    modules, known = dict(model.named_modules()), [name for name, _ in model.named_children()]
    for name in names:
        if name not in modules or not name:
            near = did_you_mean(name, modules)
            raise UserError(f"TRAIN.FREEZE: the model has no part {name!r}{near}; its parts are {', '.join(known)}")
        modules[name].requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"TRAIN.FREEZE {', '.join(names)} leaves nothing to train; leave out {model.classifier}")
    return [modules[name] for name in names]


def _data_parallel(model, world, *, gradient_dtype, static):
    """The model whose gradients are averaged over the ranks; static: each backward pass is followed by that."""
    ids = [world.device.index] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, static_graph=static)
    if gradient_dtype == torch.bfloat16:
        if world.device.type != "cuda":
            raise UserError("TRAIN.GRADIENT_DTYPE bfloat16 needs GPUs where TRAIN.FSDP is False; leave it float32")
        wrapped.register_comm_hook(dist.group.WORLD, bf16_compress_hook)
    return wrapped


def build_step(config, model, criterion, known, world, mix=None, mesh=None):
    """The step of a configuration over `model`, which moves to its device; mesh: over which it is sharded, if any."""
    t = config.TRAIN
    if t.COMPILE and config.DATA.UNIT == "study":
        raise UserError(
            "TRAIN.COMPILE True is for batches of one shape, and studies have different numbers of images (DATA.UNIT "
            "study); set TRAIN.COMPILE False"
        )
    frozen = freeze(model, t.FREEZE)
    amp, dtype = autocast(config, world.device)
    gradient_dtype, silent = getattr(torch, t.GRADIENT_DTYPE), contextlib.nullcontext
    if mesh is None:
        model.to(world.device)
    ema = Ema(model, t.EMA.DECAY) if t.EMA.ENABLE else None
    trained = compiling.compile_model(model, sharding.blocks(model) if mesh else ()) if t.COMPILE else model
    if mesh is not None:  # from CPU memory: no GPU ever holds the whole
        for module in (model, *([ema.module] if ema else [])):
            sharding.shard(module, mesh, dtype=dtype, gradient_dtype=gradient_dtype, offload=t.FSDP_OFFLOAD)
    elif world.size > 1:
        static = t.ACCUMULATION_STEPS == 1  # torch has no static graph with passes that average nothing
        trained = _data_parallel(trained, world, gradient_dtype=gradient_dtype, static=static)
        silent = trained.no_sync
    optimizer = build_optimizer(config, model, criterion)
    return Step(
        model, trained, criterion, known, optimizer, ema, amp, dtype, world, config.DATA.BATCH_SIZE, silent=silent,
        accumulation=t.ACCUMULATION_STEPS, clip=t.CLIP_GRAD, compiled=t.COMPILE, mix=mix, frozen=frozen,
    )  # fmt: skip
