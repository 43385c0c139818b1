"""Probabilities of JPG and PNG X-rays by a file of export.py, with onnxruntime, numpy and Pillow alone.

python onnx_reference.py model.onnx image.jpg ...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(path, about):
    """An X-ray -> float32 [1, 3, S, S], as `about`, the metadata of the ONNX file, describes it."""
    side, size, shrink = (int(about[key]) for key in ("side", "size", "shrink_to"))
    image = Image.open(path)
    if (factor := min(image.size) / shrink) >= 2:  # a JPG is decoded smaller
        image.draft("L", (int(image.width / factor), int(image.height / factor)))
    image = ImageOps.exif_transpose(image).convert("L")
    if (factor := min(image.size) // shrink) >= 2:
        image = image.reduce(factor)
    width = height = side
    if about["resize"] == "pad":  # the aspect is kept, black beside it
        width, height = (max(1, int(side * n / max(image.size))) for n in image.size)
    square = Image.new("L", (side, side))
    resized = image.resize((width, height), Image.Resampling[about["interpolation"].upper()])
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    first = round((side - size) / 2)
    gray = np.asarray(square.crop((first, first, first + size, first + size)), np.float32) / 255
    mean, std = (np.array(json.loads(about[key]), np.float32)[:, None, None] for key in ("mean", "std"))
    return ((gray - mean) / std)[None]


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    for path in sys.argv[2:]:
        found = session.run(None, {"images": prepare(path, about)})[0][0]
        print(path, *(f"{name} {p:.4f}" for name, p in zip(json.loads(about["labels"]), found)), sep="\n  ")
