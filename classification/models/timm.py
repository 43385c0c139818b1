"""Any backbone of timm (MODEL.TYPE timm, MODEL.TIMM.NAME), to compare InternImage with under the same protocol."""

import contextlib
import sys

import common.torchvision_shim  # noqa: F401  (before timm, which imports torchvision)

import huggingface_hub
import timm
import torch
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import nn

from common.errors import UserError, did_you_mean, reason


class TimmBackbone(nn.Module):
    """One of timm's models as a backbone (see `models/build.py`): [N, 3, S, S] -> logits [N, classes].

    Args:
        network: as `timm.create_model` returns it. Its parameters are called `backbone.` and timm's name here.
        uses: the config keys that it was built by.
    """

    def __init__(self, network, uses):
        super().__init__()
        self.backbone, self.uses = network, frozenset(uses)
        name = network.pretrained_cfg["classifier"]
        head = dict(network.named_modules()).get(name) if isinstance(name, str) else None
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"MODEL.TIMM.NAME: {network.pretrained_cfg['architecture']} does not end in one linear layer "
                f"(timm names {name!r}); choose another backbone"
            )
        self.classifier = f"backbone.{name}"

    def forward(self, images):
        return self.backbone(images)

    # -------------------------------------------------------------------------------- optimisation
    def _timm_groups(self, decay=1.0):
        """timm's own groups, of parameters: {params, lr_scale, weight_decay (0 or 1)}."""
        kept = getattr(self.backbone, "no_weight_decay", set)()
        return param_groups_layer_decay(self.backbone, weight_decay=1.0, no_weight_decay_list=kept, layer_decay=decay)

    def _names(self, parameters):
        """Those of named_parameters()."""
        wanted = {id(parameter) for parameter in parameters}
        return [name for name, parameter in self.named_parameters() if id(parameter) in wanted]

    def lr_scales(self, decay):
        """Layer-wise decay by timm's grouping: name of a parameter -> factor."""
        return {name: g["lr_scale"] for g in self._timm_groups(decay) for name in self._names(g["params"])}

    @property
    def undecayed(self):
        """Names of parameters that timm does not decay: position tables and tokens, beside norms and biases."""
        return {n for g in self._timm_groups() if g["weight_decay"] == 0 for n in self._names(g["params"])}

    # -------------------------------------------------------------------------------- explanations
    @property
    def _channels_last(self):
        return getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"

    def feature_maps(self, images):
        """The last feature maps: [N, 3, S, S] -> [N, C, h, w]. UserError: its last features are tokens."""
        features = self.backbone.forward_features(images)
        if not torch.is_tensor(features) or features.ndim != 4:
            raise UserError(
                f"MODEL.TIMM.NAME {self.backbone.pretrained_cfg['architecture']}: its last features are tokens, not "
                "feature maps, which --explain, MODEL.HEAD label_attention and MODEL.FUSION attention need; leave them "
                "out, or choose a backbone such as convnext_tiny"
            )
        return features.permute(0, 3, 1, 2) if self._channels_last else features

    def classify(self, maps):
        """Logits of :meth:`feature_maps`: [N, C, h, w] -> [N, classes]."""
        return self.backbone.forward_head(maps.permute(0, 2, 3, 1) if self._channels_last else maps)

    # -------------------------------------------------------------------------- pretrained weights
    def fitted(self, weights):
        """Weights of a file under timm's names, position tables resampled to this image size by timm's own filter."""
        adapt = getattr(sys.modules[type(self.backbone).__module__], "checkpoint_filter_fn", None)
        try:
            adapted = adapt(dict(weights), self.backbone) if adapt else weights
        except Exception:  # of another architecture: the caller reports it
            return weights
        # It would resample the patches of another architecture as well.
        return {k: weights[k] if k in weights and "pos" not in k else v for k, v in adapted.items()}


# ----------------------------------------------------------------------------------------- builders
def _pretrained_cfg(config):
    """timm's configuration of the weights of MODEL.TIMM.NAME.

    UserError: no name, or none of timm's; the nearest is named.
    """
    name = config.MODEL.TIMM.NAME
    if not name:
        raise UserError("MODEL.TYPE timm needs MODEL.TIMM.NAME, such as densenet121")
    tagged = timm.list_models(pretrained=True)
    if not timm.is_model(name) or ("." in name and name not in tagged):
        known = [*timm.list_models(), *tagged]
        raise UserError(
            f"MODEL.TIMM.NAME is {name!r}: timm {timm.__version__} has no such model{did_you_mean(name, known)}; "
            "timm.list_models('*part*') lists them"
        )
    return timm.get_pretrained_cfg(name)


def own_values(config):
    """Image size and normalisation of the weights of MODEL.TIMM.NAME, by timm's data config."""
    cfg = _pretrained_cfg(config)
    data = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
    return {"DATA.IMG_SIZE": data["input_size"][-1], "AUG.MEAN": data["mean"], "AUG.STD": data["std"]}


def pretrained_file(config):
    """With MODEL.TIMM.DOWNLOAD the path of the weights of MODEL.TIMM.NAME, downloaded from the hub or already present.

    UserError: the hub has none, or cannot be reached.
    """
    if not config.MODEL.TIMM.DOWNLOAD:
        return ""
    cfg, name = _pretrained_cfg(config), config.MODEL.TIMM.NAME
    if not cfg.hf_hub_id:
        raise UserError(
            f"MODEL.TIMM.DOWNLOAD: timm names no weights of {name} on the Hugging Face hub; "
            f"set it to False{f', and fetch {cfg.url} for --pretrained' if cfg.url else ''}"
        )
    file = cfg.hf_hub_filename or "model.safetensors"
    try:
        return huggingface_hub.hf_hub_download(cfg.hf_hub_id, file)
    except Exception as error:  # of the network, of HTTP, of the disk: one remedy for all
        url = huggingface_hub.hf_hub_url(cfg.hf_hub_id, file)
        raise UserError(
            f"MODEL.TIMM.DOWNLOAD: {url} cannot be downloaded ({reason(error)}); fetch it on a machine with a network "
            "and name it with --pretrained"
        ) from error


def _create(name, wanted):
    """The model with as many of the wanted arguments as its architecture takes, and those."""
    taken = dict(wanted)
    while True:
        try:
            return timm.create_model(name, **taken), taken
        except TypeError as error:  # raised before anything is built
            refused = next((key for key in taken if f"'{key}'" in str(error)), None)
            if refused is None or "unexpected keyword" not in str(error):
                raise
            del taken[refused]


def build(config):
    """The model that `config` describes (MODEL.TYPE timm), with random weights.

    UserError: a name that is none of timm's, an image size that the backbone does not take, a head of another kind.
    """
    cfg, name, size = _pretrained_cfg(config), config.MODEL.TIMM.NAME, config.DATA.IMG_SIZE
    wanted = {key: config.MODEL[key.upper()] for key in ("num_classes", "drop_rate", "drop_path_rate")}
    if cfg.fixed_input_size:
        wanted["img_size"] = size
    try:
        network, taken = _create(name, wanted)
        with torch.no_grad():  # many refuse a size only here
            network.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"MODEL.TIMM.NAME {name} does not take images of DATA.IMG_SIZE {size} ({reason(error)}); "
            f"its own size is {cfg.input_size[-1]}"
        ) from error
    uses = {"TRAIN.LR_LAYER_DECAY"} | ({"MODEL.DROP_RATE"} if "drop_rate" in taken else set())
    if any(isinstance(module, DropPath) for module in network.modules()):
        uses.add("MODEL.DROP_PATH_RATE")
    if config.TRAIN.USE_CHECKPOINT:
        with contextlib.suppress(AssertionError, AttributeError):  # the backbone does not support it
            network.set_grad_checkpointing(True)
            uses.add("TRAIN.USE_CHECKPOINT")
    return TimmBackbone(network.train(), uses)
