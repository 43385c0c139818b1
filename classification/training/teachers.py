"""The models whose probabilities a run learns as labels (DATA.PSEUDO_LABELS): which they are, whom they have seen."""

from common.errors import UserError
from dataset.patients import known_among, seen_by, together
from dataset.sources import parts_of, population
from training import checkpoint


def check_teachers(dataset, config):
    """({source: what gave its labels}, for checkpoints; the patients the models have seen; those they were trained on).

    dataset: the train split.

    UserError: a checkpoint that is gone, has changed or does not say whom it was trained on; one that was trained
    on patients of the validation split, or trained or chosen on those of the test split, of any source.
    """
    parts, record, seen, trained = parts_of(dataset, config), {}, [], []
    for name, (one, part) in parts.items():
        if not (given := getattr(part, "pseudo_labels", None)):
            continue
        record[name], table = given, one.DATA.PSEUDO_LABELS
        for path, digest in zip(given["checkpoints"], given["checkpoints_sha256"]):
            state, sha256 = checkpoint.read_with_digest(path)
            if sha256 != digest:
                raise UserError(f"DATA.PSEUDO_LABELS {table}: {path} has changed since; predict the labels again")
            if not isinstance(state.get("patients"), dict):
                raise UserError(
                    f"DATA.PSEUDO_LABELS {table}: {path} does not say on whom it was trained (a shared file has no "
                    "patients); predict the labels with the checkpoint that main.py wrote"
                )
            known = seen_by(state)
            for split, patients in zip(("test", "validate"), known):
                _refuse(patients, parts, split, f"DATA.PSEUDO_LABELS {table}: its model {path}")
            seen.append(known[0])
            trained.append(known[1])
    return record, together(*seen), together(*trained)


def _refuse(known, parts, split, model):
    for name, (one, part) in parts.items():
        names = [text.decode() for text in getattr(part, "patients", {}).get(split, ())]
        if shared := known_among(names, known.get(population(one, part))):
            raise UserError(
                f"{model} has seen {len(shared):,} of the {len(names):,} patients of the {split} split of {name}, such "
                f"as {shared[0]}: the score would measure its memory. Use labels of a model that was trained without "
                "them"
            )
