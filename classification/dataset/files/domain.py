"""The image source: images from another source than in training cost a model much of its score.

    pictures            JPG, PNG, ... as they are stored, such as the JPG release of MIMIC-CXR
    dicom window        DICOM as displayed (DATA.DICOM_RECIPE window)
    dicom mimic_jpg     DICOM converted as the JPG release was made (DATA.DICOM_RECIPE mimic_jpg)

Runs without torch.
"""

import json
from pathlib import Path

import numpy as np

from dataset.files.images import SUFFIXES, ImageError, sniff

SAMPLE = 8  # images that are looked at
COPY_RECIPE = "recipe.json"  # in a copy of prepare_mimic.py: pictures, but with the image source that they were made of


def copied_name(path):
    """Path of an image in such a copy: its own, with .jpg instead of the suffix of an image if it has one."""
    path = Path(path)
    return (path.with_suffix(".jpg") if path.suffix in SUFFIXES[:-1] else Path(f"{path}.jpg")).as_posix()


def image_domain(store, paths, recipe):
    """The domain of the images `paths` (bytes or text) of a store, by the content of a sample; several by "and".

    recipe: DATA.DICOM_RECIPE.
    """
    copied = store.root / COPY_RECIPE
    if copied.is_file() and (domain := json.loads(copied.read_text()).get("domain")):
        return domain
    found = set()
    for k in np.linspace(0, len(paths) - 1, min(len(paths), SAMPLE)).astype(int):
        path = paths[k].decode() if isinstance(paths[k], bytes) else paths[k]
        try:
            found.add(f"dicom {recipe}" if sniff(store.read(path)) == "dcm" else "pictures")
        except ImageError:
            pass  # the loader reports it
    return " and ".join(sorted(found))


def kinds(domain):
    """The image sources in a domain; those that a model cannot distinguish count as one."""
    alike = {"dicom mimic_jpg": "pictures"}  # which that recipe makes
    return {alike.get(kind, kind) for kind in domain.split(" and ")} if domain else set()


def domain_warning(trained, here):
    """One line for the user if images are from another source (`here`) than a model was `trained` on; else empty."""
    if not trained or kinds(here) <= kinds(trained):
        return ""
    text = f"the model was trained on {trained}, these images are {here}: its scores are lower on another kind of image"
    if here.startswith("dicom ") and " and " not in trained:
        return f"{text}; use DATA.DICOM_RECIPE {'window' if trained == 'dicom window' else 'mimic_jpg'}"
    return f"{text}, and no DATA.DICOM_RECIPE makes pictures into DICOM; train on the kind that is to be read"
