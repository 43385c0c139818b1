"""Whom a model was trained on, in a form that a checkpoint can hold: no test on the same patients goes unnoticed."""

import hashlib

import numpy as np
import torch

from common.errors import UserError
from dataset.sources import parts_of, population


def _names(dataset):
    """Names of the patients of a dataset; of its images where patients are unknown, none where it has no such ids."""
    ids = dataset.ids()
    if "subject_id" not in ids:
        return []
    return sorted({*(ids["subject_id"] if all(ids["subject_id"]) else next(iter(ids.values())))})


def _digests(names):
    """int64 [N]: eight bytes of a hash of each name."""
    hashes = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(hashes, np.int64)


def patients_of(dataset, config):
    """{population: digests of its patients, int64 [N], sorted}, of each of several sources; MIMIC-CXR's take half a
    megabyte."""
    found = []
    for one, part in parts_of(dataset, config).values():
        digests = np.sort(_digests(_names(part)))
        found += [{population(one, part): torch.from_numpy(digests)}] if len(digests) else []
    return together(*found)


def together(*known):
    """The union of several such dictionaries."""
    names = sorted({name for one in known for name in one})
    return {name: torch.unique(torch.cat([one[name] for one in known if name in one])) for name in names}


def seen_by(content):
    """(the patients that a model was trained or chosen on, those it was trained on) by the content of its checkpoint.

    {} where it does not say; a file without `trained` is older than that key.
    """
    known = content.get("patients")
    known = known if isinstance(known, dict) else {}
    return known, content.get("trained", known)


def known_among(names, known):
    """Those of `names` whose digests are among `known`, int64 [N] or None."""
    if known is None or not len(names):
        return []
    return np.array(names)[np.isin(_digests(names), known.numpy())].tolist()


def refuse_known(known, dataset, config, path, split="test"):
    """Raises a UserError where patients of `dataset`, a split, are among those `known`, on whom the model of `path` was
    trained or chosen."""
    for one, part in parts_of(dataset, config).values():
        names, name = _names(part), population(one, part)
        if shared := known_among(names, known.get(name)):
            raise UserError(
                f"{path} was trained or chosen on {len(shared):,} of the {len(names):,} patients of this {split} split "
                f"of {name}, such as {shared[0]}: the score would measure memory. Test it on the split that its "
                "training left out; where these are others of the same name, name them otherwise in the table"
            )
