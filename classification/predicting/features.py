"""Features of a layer, for predict.py --features: an .npy of a row per image beside the table of predictions."""

from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from common.errors import UserError, did_you_mean

LAST = ""  # the last layer with positions
COLUMN = "features_row"  # of the table: the image's row of the .npy


def check(model, layer, name, table):
    """Raise a UserError unless the model in the file `name` has such a layer, and the path of the table leaves its .npy
    free."""
    if Path(table).suffix == ".npy":
        raise UserError(f"--output {table} is the table, and the features are in an .npy beside it; name it .csv, say")
    modules = dict(model.named_modules())
    if layer == LAST and not (hasattr(model, "feature_maps") and hasattr(model, "classify")):
        raise UserError(f"--features: the model of {name} has no features with positions; name one of its layers")
    if layer != LAST and layer not in modules:
        raise UserError(f"--features: the model of {name} has no layer {layer!r}{did_you_mean(layer, modules)}")


def forward(model, images, layer):
    """(logits [N, L], the features of a layer [N, F]) of images [N, 3, S, S].

    Positions are averaged, so that the features of the last layer with positions are what the classifier of InternImage
    T to XL gets.
    """
    if layer == LAST:
        maps = model.feature_maps(images)
        return model.classify(maps), maps.mean((2, 3))
    outputs = []
    hook = model.get_submodule(layer).register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        logits = model(images)
    finally:
        hook.remove()
    if not outputs:
        raise UserError(f"--features: the layer {layer} is not used; name another one")
    return logits, _pool(outputs[-1], layer)


def _pool(output, layer):
    """The output of a layer as one vector per image, [N, F]: the mean over positions, which are a square."""
    while isinstance(output, (tuple, list)):
        output = output[0]
    if output.ndim == 4:
        _, a, b, c = output.shape
        if a == b == c:
            raise UserError(
                f"--features: {layer} gives {a} x {b} x {c}, where no axis shows as the channels; name another"
            )
        return output.mean((1, 2) if a == b else (2, 3))
    return output.mean(1) if output.ndim == 3 else output.flatten(1)  # tokens [N, T, F]


class FeatureFile:
    """The .npy beside a table: float32 [images, F], a row of NaN for an image that cannot be read.

    Args:
        table: path of the table. count: of the images. resumed: whether rows of it are there already.

    UserError: the file cannot be written, or does not belong to the table.
    """

    def __init__(self, table, count, resumed):
        self.path, self.count, self.array = Path(table).with_suffix(".npy"), count, None
        if resumed:
            try:
                self.array = open_memmap(self.path, "r+")
            except (OSError, ValueError) as error:
                raise UserError(f"{self.path} is not the file of {table} ({error}); remove the table, too") from error

    def put(self, first, rows, features):
        """Store the features [K, F] of the images first + rows."""
        shape = (self.count, features.shape[1])
        try:
            if self.array is None:
                self.array = open_memmap(self.path, "w+", np.float32, shape)
                self.array[:] = np.nan
            if self.array.shape != shape:
                raise UserError(f"{self.path} is {self.array.shape}, expected {shape}; remove it and its table")
            self.array[[first + row for row in rows]] = features
            self.array.flush()  # before the table says that they are there
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror or error}); make room") from error
