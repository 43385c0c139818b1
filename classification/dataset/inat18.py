"""iNaturalist 2018 (DATA.DATASET inat18): `train2018.json` and `val2018.json` beside the folders of the images."""

import json
from pathlib import Path

from common.errors import UserError
from dataset.files.stores import FileStore
from dataset.imagenet import PhotoDataset
from dataset.transforms import photo_transform

TASK = "single_label"
DEFAULTS = {"MODEL.NUM_CLASSES": 8142}


def build(config, *splits):
    """The datasets of `splits`; the test labels are not public, so test is val."""
    store, found = FileStore(Path(config.DATA.DATA_PATH).expanduser()), []
    for split in splits:
        path = store.root / f"{'train' if split == 'train' else 'val'}2018.json"
        try:
            content = json.loads(path.read_text())
            classes = {category["id"]: k for k, category in enumerate(content["categories"])}
            files = {image["id"]: image["file_name"] for image in content["images"]}
            rows = [(files[row["image_id"]], classes[row["category_id"]]) for row in content["annotations"]]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; --data-path must hold the files of iNaturalist 2018") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not an annotation file of iNaturalist: {error!r}") from error
        names, targets = zip(*rows)
        transform = photo_transform(config, train=split == "train")
        found.append(
            PhotoDataset(store, path, split, names, targets, map(str, classes), transform, config.DATA.IMG_ON_MEMORY)
        )
    return found
