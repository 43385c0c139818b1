"""Config -> model. A backbone is a file in this folder with a `build(config)`, found by MODEL.TYPE.

What it returns, an nn.Module from images [N, 3, S, S] to logits [N, MODEL.NUM_CLASSES], says of itself:

    classifier    the name of its last nn.Linear, which weights of other classes leave as initialised
    uses          the config keys it uses, of MODEL.DROP_RATE, MODEL.DROP_PATH_RATE, TRAIN.USE_CHECKPOINT,
                  TRAIN.LR_LAYER_DECAY and TRAIN.OPTIMIZER.DCN_LR_MUL; a warning says that the others do nothing
    lr_scales(decay)    where it uses TRAIN.LR_LAYER_DECAY: prefix of parameter names -> factor on their rate
    undecayed     where it has them: names of parameters without weight decay, beside all norms and biases
    feature_maps(images), classify(maps)    where it has them: the last features with places, [N, C, H, W], and the
                  logits that follow from them (what predict.py --explain needs)
    fitted(weights)    where it needs it: weights of a file -> the same in the shapes of this image size

The file may have beside `build`:

    own_values(config)    {config key: value}, the backbone's defaults where they are not those of `config.py`
    pretrained_file(config)    the path of the weights to start from where MODEL.PRETRAINED names none; "" for none
"""

import torch
from torch import nn

from common import builders
from common.errors import UserError
from models.classifier import Classifier


def _module(config):
    return builders.find("models", config.MODEL.TYPE, "MODEL.TYPE")


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


def build_model(config):
    """The model of MODEL.TYPE, see above: images [N, 3, S, S] -> float32 logits [N, MODEL.NUM_CLASSES].

    Raises:
        UserError: no such backbone, or one that does not say what it must.
    """
    model = _module(config).build(config)
    missing = [name for name in ("classifier", "uses") if not hasattr(model, name)]
    if missing:
        raise UserError(f"MODEL.TYPE {config.MODEL.TYPE}: its build() returns a model without `{missing[0]}`")
    last = dict(model.named_modules()).get(model.classifier)
    if not isinstance(last, nn.Linear) or last.out_features != config.MODEL.NUM_CLASSES:
        raise UserError(
            f"MODEL.TYPE {config.MODEL.TYPE}: its classifier {model.classifier!r} is {last}; expected an nn.Linear "
            f"with {config.MODEL.NUM_CLASSES} outputs (MODEL.NUM_CLASSES)"
        )
    last.__class__ = Classifier  # the same parameters under the same names
    # The weights of convolutions lie in memory as their inputs do, or every step would copy them into that order.
    return model.to(memory_format=torch.channels_last)
