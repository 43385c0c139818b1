"""Parameter groups and the optimizer."""

import torch


def _lr_scale(name, config, layer_scales, uses):
    scale = next((factor for prefix, factor in reversed(layer_scales.items()) if name.startswith(prefix)), 1.0)
    if name.startswith("backbone.") and "TRAIN.BACKBONE_LR_SCALE" in uses:
        scale *= config.TRAIN.BACKBONE_LR_SCALE
    dcn_mul = config.TRAIN.OPTIMIZER.DCN_LR_MUL
    if dcn_mul is not None and (".dcn.offset." in name or ".dcn.center_feature_scale_proj" in name):
        scale *= dcn_mul
    return scale


def parameter_groups(model, config, criterion=None):
    """Groups {params, names, weight_decay, lr_scale}: no decay for norms and biases (1-D parameters) and
    what the model says. Parameters of the criterion have no decay either.

    A group's learning rate is the schedule's times its `lr_scale`.
    """
    decayed = config.TRAIN.LR_LAYER_DECAY and "TRAIN.LR_LAYER_DECAY" in model.uses
    layer_scales = model.lr_scales(config.TRAIN.LR_LAYER_DECAY_RATIO) if decayed else {}
    undecayed = getattr(model, "undecayed", ())
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # frozen
            continue
        plain = parameter.ndim <= 1 or name.endswith("bias") or name in undecayed
        decay = 0.0 if plain else config.TRAIN.WEIGHT_DECAY
        scale = _lr_scale(name, config, layer_scales, model.uses)
        group = groups.setdefault((decay, scale), {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    if own := dict(criterion.named_parameters(prefix=criterion.name)) if criterion is not None else {}:
        groups["loss"] = {"params": [*own.values()], "names": [*own], "weight_decay": 0.0, "lr_scale": 1.0}
    return list(groups.values())


def build_optimizer(config, model, criterion=None):
    """AdamW or SGD with Nesterov momentum over :func:`parameter_groups`."""
    o, groups = config.TRAIN.OPTIMIZER, parameter_groups(model, config, criterion)
    if o.NAME == "sgd":
        return torch.optim.SGD(groups, lr=config.TRAIN.BASE_LR, momentum=o.MOMENTUM, nesterov=o.MOMENTUM > 0)
    # One pass over the parameters of a group instead of one for each operation of the update.
    return torch.optim.AdamW(groups, lr=config.TRAIN.BASE_LR, betas=tuple(o.BETAS), eps=o.EPS, fused=True)


def set_lr(optimizer, lr):
    """Set the rate of every group to lr x its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def ema_decay(config, step):
    """Decay of the EMA at an update, counted from 0: TRAIN.EMA.DECAY, with WARMUP rising to it from 0 as in timm."""
    ema = config.TRAIN.EMA
    return min(ema.DECAY, 1 - (1 + step) ** (-2 / 3)) if ema.WARMUP else ema.DECAY
