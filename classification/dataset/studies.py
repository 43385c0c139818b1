"""A split of images as a split of studies (DATA.UNIT study): an item is a study with its images, and has one target."""

import numpy as np
import torch

from common.errors import UserError
from common.studies import VIEWS, Studies, view_numbers
from dataset.files.images import ImageError
from dataset.labels import UNKNOWN

PREFERRED = ("PA", "AP", "lateral", "")  # the order of the images of a study in evaluation, one of each view first
# Of the labels of a study's images, as in the label file, the last of these counts.
BY_CERTAINTY = (UNKNOWN, np.nan, 0.0, -1.0, 1.0)
_unreadable = []  # of this process: errors of images whose study has others


def take_unreadable():
    """Errors, since the last call, of images whose study has others that can be read."""
    taken = _unreadable[:]
    _unreadable.clear()
    return taken


class StudyDataset:
    """The studies of a split of images, as `dataset.build.Dataset` but for its items: (Studies of one, target).

    images: a multi-label :class:`dataset.build.Dataset`; of one without study ids, each image is a study.
    most: images of a study at most. Of more, training samples anew each time; evaluation takes them by PREFERRED.
    skip: an unreadable image is left out if its study has others (see :func:`take_unreadable`), not an error.

    A label is positive if it is for any of the images.
    """

    def __init__(self, images, *, most, train, skip):
        if images.task != "multilabel":
            raise UserError(f"DATA.UNIT study is for X-rays; these data are {images.task}: set DATA.UNIT image")
        self.of_images, self.most, self.train, self.skip = images, most, train, skip
        carried = (
            "domain root cohort label_mapping label_groups primary_metric population patients pseudo_labels uses parts"
        )
        for name in carried.split():
            if hasattr(images, name):
                setattr(self, name, getattr(images, name))
        self.task, self.label_names, self.warnings = images.task, images.label_names, images.warnings
        described, ids = getattr(images, "descriptions", dict)(), images.ids()
        self.view = view_numbers(described.get("view", [""] * len(images)))
        names, blank = next(iter(ids.values())), [""] * len(images)
        numbers, codes = {}, np.empty(len(images), int)
        for k, key in enumerate(zip(ids.get("subject_id", blank), ids.get("study_id", blank), names)):
            codes[k] = numbers.setdefault(key[:2] if key[1] else key, len(numbers))
        self.order = preferred_order(self.view, codes)
        self.starts = np.searchsorted(codes[self.order], np.arange(len(numbers) + 1))
        first = self.order[self.starts[:-1]]
        self.targets = np.fmax.reduceat(np.asarray(images.targets)[self.order], self.starts[:-1])
        if hasattr(images, "labels"):
            self.labels = _joined(np.asarray(images.labels)[self.order], self.starts[:-1])
        if hasattr(images, "sources"):
            self.sources = images.sources[first]
            self.rows_of_sources = [np.flatnonzero(self.sources == name) for name in images.parts]
        kept = [self._rows(k) if train else self._rows(k)[:most] for k in range(len(first))]

        def listed(values):
            return [";".join(values[k] for k in rows) for rows in kept]

        subjects, studies = ([ids.get(name, blank)[k] for k in first] for name in ("subject_id", "study_id"))
        studies = [study or names[k] for study, k in zip(studies, first)]
        self._ids = {"study_id": studies, "subject_id": subjects, "images": listed(names)}
        views = {"views": listed(described["view"])} if "view" in described else {}
        self._descriptions = views | {c: [described[c][k] for k in first] for c in ("source", "path") if c in described}
        sizes = np.diff(self.starts)
        self.summary = (
            f"{images.summary}\nDATA.UNIT study: this split has {len(first):,} studies of {len(images):,} images; "
            f"{int((sizes > most).sum()):,} have more than DATA.MAX_VIEWS {most}"
        )

    def _rows(self, index):
        return self.order[self.starts[index] : self.starts[index + 1]]

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, index):
        rows = self._rows(index)
        if self.train and len(rows) > self.most:
            rows = rows[torch.randperm(len(rows))[: self.most].sort()[0].numpy()]
        images, read, errors = [], [], []
        for row in rows[: self.most]:
            try:
                images.append(self.of_images[row][0])
                read.append(row)
            except ImageError as error:
                if not self.skip:
                    raise
                errors.append(error)
        if not images:
            name, first = self._ids["study_id"][index], errors[0]
            raise ImageError(f"study {name}: none of its {len(errors)} images can be read, such as {first}")
        _unreadable.extend(errors)
        view = torch.from_numpy(self.view[read])
        return Studies(torch.stack(images), view, torch.arange(len(read))[None]), torch.from_numpy(self.targets[index])

    def ids(self):
        """study_id, subject_id, and `images`: what identifies its images, in evaluation those that are taken."""
        return self._ids

    def descriptions(self):
        """`views` of the images in their order, and of the first one its path, and its source."""
        return self._descriptions


def preferred_order(view, study):
    """The images by study, in it one of each view first, by PREFERRED: indices [N].

    view, study: numbers [N] of VIEWS and of studies.
    """
    count = np.arange(len(view))
    by_view = np.lexsort((count, view, study))
    same = (np.diff(study[by_view], prepend=-1) == 0) & (np.diff(view[by_view], prepend=-1) == 0)
    nth = np.empty_like(count)  # of its view in its study
    nth[by_view] = count - np.maximum.accumulate(np.where(same, 0, count))
    preference = np.array([PREFERRED.index(name) for name in VIEWS])
    return np.lexsort((count, preference[view], nth, study))


def _joined(labels, starts):
    """Of labels [N, L] of images, by study: the last of BY_CERTAINTY that any of its images has."""
    rank = np.select([labels == value for value in BY_CERTAINTY], range(len(BY_CERTAINTY)), 1)
    return np.array(BY_CERTAINTY, labels.dtype)[np.maximum.reduceat(rank, starts)]
