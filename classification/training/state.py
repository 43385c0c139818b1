"""What a training run saves, part by part: each gives its keys of a checkpoint, and takes them back.

A new part is a class with these methods, added to the list in `training/run.py`; saving and resuming stay as they are:

    saved()    its keys of a checkpoint, a dictionary; called on every rank, so it may gather
    restore(state, path)    takes them back from the content of the file `path`; UserError where they do not fit
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import config as config_module
from analysis.metrics import Metric
from common import distributed
from common.errors import UserError
from dataset.files.domain import domain_warning
from dataset.patients import seen_by, together
from training import checkpoint, sharding


@dataclass
class Sums:
    """What an epoch adds up. loss, norm: float64 scalars on the device, so that adding does not wait for it.

    images: of all updates on this rank. skipped: those of this rank that could not be read. seconds: of all updates;
    waited: the part of them that waited for images.
    """

    loss: torch.Tensor
    norm: torch.Tensor
    updates: int = 0
    images: int = 0
    skipped: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, loss, norm):
        """The loss and the gradient's norm of one more update."""
        self.loss, self.norm, self.updates = self.loss + loss, self.norm + norm, self.updates + 1


def zero_sums(device):
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return Sums(zero, zero)


@dataclass
class Position:
    """The next update of a run, and what its epoch has added up so far.

    update == updates means: the epoch is trained but not validated. train: fingerprint of the training images and their
    order. saved_at: (epoch, update) of the newest checkpoint, or of the beginning.
    """

    world: distributed.World
    log: object
    train: str
    updates: int
    images_per_update: int
    epoch: int = 0
    update: int = 0
    sums: Sums = None
    saved_at: tuple = (0, 0)

    def __post_init__(self):
        self.sums = self.sums or zero_sums(self.world.device)

    def next_epoch(self):
        self.epoch, self.update, self.sums = self.epoch + 1, 0, zero_sums(self.world.device)

    def saved(self):
        own = {key: getattr(self, key) for key in ("epoch", "update", "updates", "images_per_update")}
        return own | {"sums": distributed.gather(vars(self.sums), self.world)}

    def restore(self, state, path):
        self.epoch, self.update, sums = state["epoch"], state["update"], state["sums"]
        if self.update and self.update == state.get("updates"):  # trained: no image is next
            self.update = self.updates
            self._take(sums)
        elif self.update:
            # The position counts updates: it means other images if an update takes others now.
            now, other = (self.images_per_update, self.world.size), None
            if state["data"]["train"] != self.train:
                other = "other training images or another order of them (SEED, DATA.SAMPLER)"
            elif (state["images_per_update"], len(sums)) != now:
                other = f"{state['images_per_update']} images per update on {len(sums)} processes"
            if other:
                self.log.warning(f"{path} was saved within epoch {self.epoch + 1} with {other}: that epoch restarts")
                self.update = 0
            else:
                self._take(sums)
        self.saved_at = self.epoch, self.update

    def _take(self, sums):
        """The sums of this rank from those of all ranks; of another number of ranks than now, the mean loss."""
        rank, same = self.world.rank, len(sums) == self.world.size
        own = sums[rank if same else 0]
        if not same:
            loss = sum(each["loss"] for each in sums) / len(sums)
            counts = {key: sum(each[key] for each in sums) * (rank == 0) for key in ("images", "skipped")}
            own = own | {"loss": loss} | counts
        own = {k: v for k, v in own.items() if k in vars(self.sums)}
        self.sums = Sums(**{k: v.to(self.world.device) if torch.is_tensor(v) else v for k, v in own.items()})


def _load(module, weights, path):
    """Load weights into a module; either may be in shards."""
    checkpoint.check_weights(module, weights, path)
    ours = module.state_dict()
    module.load_state_dict({key: sharding.like(value, ours[key]) for key, value in weights.items()})


@dataclass
class Weights:
    """The model, and its EMA beside it (None without TRAIN.EMA.ENABLE)."""

    model: nn.Module
    ema: object
    log: object

    def saved(self):
        ema = self.ema.module.state_dict() if self.ema is not None else None
        return {"model": self.model.state_dict(), "model_ema": ema, "weights": "model"}

    def restore(self, state, path):
        if state["weights"] != "model":
            raise UserError(f"{path} holds averaged weights: evaluate them or start from them (--pretrained)")
        _load(self.model, state["model"], path)
        if self.ema is not None:
            if state["model_ema"] is None:
                self.log.warning(f"{path} has no EMA weights (TRAIN.EMA.ENABLE was off): the EMA starts from the model")
            _load(self.ema.module, state["model_ema"] or state["model"], path)


@dataclass
class Loss:
    """The loss's own parameters, where it has some."""

    criterion: nn.Module
    log: object

    def saved(self):
        return {"loss": {self.criterion.name: self.criterion.state_dict()}}

    def restore(self, state, path):
        ours, theirs = self.criterion.state_dict(), state.get("loss", {}).get(self.criterion.name, {})
        if {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}:
            self.criterion.load_state_dict(theirs)
        else:
            self.log.warning(
                f"{path} has other parameters of TRAIN.LOSS {self.criterion.name}: they start from their initial values"
            )


@dataclass
class Moments:
    """The optimizer's state. Rates, decay and betas stay those of the present config: what the user changed counts."""

    optimizer: torch.optim.Optimizer
    log: object

    def saved(self):
        return {"optimizer": self.optimizer.state_dict()}

    def restore(self, state, path):
        # Moments belong to parameter names: the groups may differ now (DCN_LR_MUL changed, say).
        ours, saved = self.optimizer.state_dict()["param_groups"], state["optimizer"]
        index = {n: i for g in saved["param_groups"] for n, i in zip(g["names"], g["params"])}
        pairs = [(i, index[n]) for g in ours for n, i in zip(g["names"], g["params"]) if n in index]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            i: {name: sharding.like(moment, parameters[i]) for name, moment in saved["state"][k].items()}
            for i, k in pairs
            if k in saved["state"]
        }
        kept = {name for moment in moments.values() for name in moment}
        if not kept <= self._own_names():
            self.log.warning(f"{path} was trained by another TRAIN.OPTIMIZER.NAME: its moments restart at zero")
            moments = {}
        try:
            self.optimizer.load_state_dict({"state": moments, "param_groups": ours})
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: the optimizer's state does not fit ({error})") from error

    def _own_names(self):
        """Names of what this optimizer remembers of a parameter."""
        if isinstance(self.optimizer, torch.optim.SGD):
            return {"momentum_buffer"}
        return {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


@dataclass
class Rate:
    """The learning rate where training continues: a pure function of the update, kept to name a change of it."""

    schedule: object
    position: Position
    log: object

    def saved(self):
        update = self.position.epoch * self.position.updates + self.position.update
        return {"lr_scheduler": {"update": update, "lr": self.schedule(update)}}

    def restore(self, state, path):
        before = state["lr_scheduler"].get("lr")
        now = self.schedule(self.position.epoch * self.position.updates + self.position.update)
        if before is not None and abs(now - before) > 1e-6 * before:
            self.log.info(f"the learning rate continues at {now:.3e}; by the options of {path} it was {before:.3e}")


@dataclass
class Scaler:
    """The scale of float16 gradients; without float16 there is none."""

    scaler: torch.amp.GradScaler

    def saved(self):
        return {"amp": self.scaler.state_dict()}

    def restore(self, state, path):
        if state["amp"]:  # empty where the run was not in float16
            self.scaler.load_state_dict(state["amp"])


@dataclass
class RandomNumbers:
    """torch's random numbers on each rank: drop path, dropout and mixing take them."""

    world: distributed.World
    log: object

    def saved(self):
        cuda = torch.cuda.get_rng_state(self.world.device) if self.world.device.type == "cuda" else None
        return {"rng": distributed.gather({"cpu": torch.get_rng_state(), "cuda": cuda}, self.world)}

    def restore(self, state, path):
        if len(state["rng"]) != self.world.size:
            self.log.warning(
                f"{path} was saved by {len(state['rng'])} processes, now {self.world.size}: random numbers restart"
            )
            return
        own = state["rng"][self.world.rank]
        torch.set_rng_state(own["cpu"])
        if self.world.device.type == "cuda" and own["cuda"] is not None:
            torch.cuda.set_rng_state(own["cuda"], self.world.device)


@dataclass
class Best:
    """The best score so far of one set of weights on the validation split; None before there is one.

    key: of the checkpoint. metric: what is compared. validation: fingerprint of its images and labels. file: what holds
    those weights. epoch: how many were done at the best score.
    """

    key: str
    metric: Metric
    validation: str
    file: Path
    log: object
    value: float = None
    epoch: int = 0

    def take(self, value, epoch):
        """Keep the score of a finished epoch if it is better; whether it is. None (no label has a value) never is."""
        if value is None or self.value is None:
            better = value is not None
        else:
            better = value > self.value if self.metric.higher_is_better else value < self.value
        if better:
            self.value, self.epoch = value, epoch
        return better

    def saved(self):
        return {self.key: self.value, f"{self.key}_epoch": self.epoch, "best_by": self.metric.key}

    def restore(self, state, path):
        before = state[self.key]
        if before is None:
            return
        best_by = state.get("best_by", self.metric.key)
        if best_by != self.metric.key:
            why = f"chose its best by {best_by}, now TRAIN.BEST_BY is {self.metric.key}"
        elif state["data"]["validate"] != self.validation:
            why = "was validated on other images or labels than now: scores before and after cannot be compared"
        elif not self.file.exists():
            why = f"has its best beside it, and {self.file} does not exist"
        else:
            self.value, self.epoch = before, state.get(f"{self.key}_epoch", 0)
            return
        self.epoch = state["epoch"]  # TRAIN.STOP_AFTER counts from here
        self.log.warning(f"{path} {why}, so {self.file.name} restarts (best before: {best_by} {before:.4f})")


@dataclass
class Origin:
    """What a checkpoint tells of its training: task, labels, images, patients, config.

    data: fingerprints of the training and the validation images. patients: on whom it was trained or chosen, trained:
    on whom it was trained, see `dataset.patients`; a pretrained file, and what gave labels, add theirs. pseudo_labels:
    of each source what gave some of its labels, see `dataset.pseudo_labels`.
    """

    config: object
    task: str
    label_names: list
    data: dict
    domain: str
    log: object
    patients: dict = field(default_factory=dict)
    trained: dict = field(default_factory=dict)
    pseudo_labels: dict = field(default_factory=dict)

    def saved(self):
        return {
            "task": self.task,
            "label_names": list(self.label_names),
            "data": self.data,
            "domain": self.domain,
            "patients": self.patients,
            "trained": self.trained,
            "pseudo_labels": self.pseudo_labels,
            "config": config_module.to_dict(self.config),
        }

    def restore(self, state, path):
        checkpoint.check_origin(state, path, self.label_names, self.config)
        known, trained = seen_by(state)
        self.patients, self.trained = together(self.patients, known), together(self.trained, trained)
        if warning := domain_warning(state.get("domain"), self.domain):
            self.log.warning(warning)
        checkpoint.log_differences(state, path, self.config, self.log, warned=checkpoint.LEARNT)


def restore(parts, state, path):
    """Put every part back to where `state`, the content of the file `path`, was saved."""
    try:
        for part in parts:
            part.restore(state, path)
    except KeyError as error:
        raise UserError(f"{path} cannot be resumed: it holds no {error}; take its weights with --pretrained") from error


def collect(parts):
    """The keys of all parts, as a checkpoint holds them; every rank must call it."""
    return {key: value for part in parts for key, value in part.saved().items()}
