"""Config -> model. A backbone is a file in this folder with a `build(config)`, found by MODEL.TYPE."""

import builders


def build_model(config):
    """The model of MODEL.TYPE: images [N, 3, S, S] -> logits [N, MODEL.NUM_CLASSES]."""
    return builders.find("models", config.MODEL.TYPE, "MODEL.TYPE")(config)
