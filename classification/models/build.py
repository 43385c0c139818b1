"""Config -> model. A backbone is a file in this folder with a `build(config)`, found by MODEL.TYPE."""

import torch

import builders


def build_model(config):
    """The model of MODEL.TYPE: images [N, 3, S, S] -> logits [N, MODEL.NUM_CLASSES]."""
    model = builders.find("models", config.MODEL.TYPE, "MODEL.TYPE")(config)
    # The weights of convolutions lie in memory as their inputs do, or every step would copy them into that order.
    return model.to(memory_format=torch.channels_last)
