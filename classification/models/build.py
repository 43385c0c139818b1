"""Config -> model. A backbone is a file in this folder with a `build(config)`, found by MODEL.TYPE.

It returns an nn.Module from images [N, 3, S, S] to logits [N, MODEL.NUM_CLASSES], with these attributes:

    classifier    the name of its last nn.Linear, which weights of other classes leave as initialised
    uses          the config keys it uses, of MODEL.DROP_RATE, MODEL.DROP_PATH_RATE, TRAIN.USE_CHECKPOINT,
                  TRAIN.LR_LAYER_DECAY and TRAIN.OPTIMIZER.DCN_LR_MUL (the others give a warning), and those of
                  other backbones, such as MODEL.TIMM.NAME
    lr_scales(decay)    if it uses TRAIN.LR_LAYER_DECAY: prefix of parameter names -> factor on their rate
    undecayed     optional: names of parameters without weight decay, beside all norms and biases
    feature_maps(images), classify(maps)    optional, for predict.py --explain and MODEL.HEAD label_attention: the last
                  feature maps [N, C, H, W], and the logits of such maps
    blocks()    optional, for TRAIN.FSDP: the modules that are gathered one at a time; without it the whole model is
    fitted(weights)    optional: weights of a file -> the same in the shapes of this image size

The file may have beside `build`:

    own_values(config)    {config key: value}, the backbone's defaults that differ from those of `config.py`
    pretrained_file(config)    the path of the weights to start from if MODEL.PRETRAINED is empty; "" for none
"""

import torch
from torch import nn

from common import builders
from common.errors import UserError
from models.attention import Attended, Fused, LabelAttention, Pooled, StudyAttention
from models.classifier import Classifier


def _module(config, outside=True):
    return builders.find("models", config.MODEL.TYPE, "MODEL.TYPE", outside)


def own_values(config):
    """{config key: value} of what the backbone has as defaults, for `config.get_config`."""
    module = _module(config)
    return module.own_values(config) if hasattr(module, "own_values") else {}


def pretrained_file(config):
    """The file of weights to start from: MODEL.PRETRAINED, else what the backbone fetches; "" for none."""
    module = _module(config)
    if config.MODEL.PRETRAINED or not hasattr(module, "pretrained_file"):
        return config.MODEL.PRETRAINED
    return module.pretrained_file(config)


def build_model(config, outside=True):
    """The model of MODEL.TYPE, see above: images [N, 3, S, S] -> float32 logits [N, MODEL.NUM_CLASSES]; with MODEL.HEAD
    label_attention or DATA.UNIT study inside one of `models/attention.py`, as its `backbone`.

    outside: whether MODEL.TYPE may name a module outside this folder; not where the config comes from a checkpoint.

    UserError: no such backbone, one that lacks an attribute above, or MODEL.FUSION without studies.
    """
    model = _module(config, outside).build(config)
    if missing := [name for name in ("classifier", "uses") if not hasattr(model, name)]:
        raise UserError(f"MODEL.TYPE {config.MODEL.TYPE}: its build() returns a model without `{missing[0]}`")
    last = dict(model.named_modules()).get(model.classifier)
    if not isinstance(last, nn.Linear) or last.out_features != config.MODEL.NUM_CLASSES:
        raise UserError(
            f"MODEL.TYPE {config.MODEL.TYPE}: its classifier {model.classifier!r} is {last}; expected an nn.Linear "
            f"with {config.MODEL.NUM_CLASSES} outputs (MODEL.NUM_CLASSES)"
        )
    last.__class__ = Classifier  # the same parameters under the same names
    m, study = config.MODEL, config.DATA.UNIT == "study"
    if m.FUSION != "mean" and not study:
        raise UserError(
            f"MODEL.FUSION {m.FUSION} is of the images of a study, but DATA.UNIT is image; set DATA.UNIT study"
        )
    if "attention" in (m.FUSION, m.HEAD.removeprefix("label_")):
        features, used = _last_maps(config, outside)
        settings = dict(width=m.HEAD_WIDTH, drop=m.DROP_RATE)
    if m.HEAD == "label_attention":
        model = Attended(model, used, LabelAttention(features, m.NUM_CLASSES, **settings))
    if m.FUSION == "attention":
        model = Fused(model, StudyAttention(features, m.NUM_CLASSES, layers=m.FUSION_LAYERS, **settings))
    elif study:
        model = Pooled(model, m.FUSION)
    # Weights of convolutions in the memory format of their inputs: else every step would convert them.
    return model.to(memory_format=torch.channels_last)


def _last_maps(config, outside):
    """(channels of the backbone's last feature maps, names of the parameters that they depend on).

    UserError: it has no such maps.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes half a second

    with torch.device("meta"):  # a twin that takes neither time nor memory
        twin = _module(config, outside).build(config).eval()
    with torch.device("cpu"), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        twin.to_empty(device="cpu")
        if not hasattr(twin, "feature_maps"):
            raise UserError(
                f"MODEL.TYPE {config.MODEL.TYPE} has no feature_maps (models/build.py): neither MODEL.HEAD "
                "label_attention nor MODEL.FUSION attention is possible; leave them out, or choose another backbone"
            )
        maps = twin.feature_maps(torch.zeros(1, 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE))
    names, used, seen, nodes = {id(p): name for name, p in twin.named_parameters()}, set(), set(), [maps.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            if hasattr(node, "variable"):
                used.add(names[id(node.variable)])
    return maps.shape[1], used
