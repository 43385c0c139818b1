"""Several checkpoints -> one with the mean of their weights, a model soup (Wortsman et al. 2022), for the cost of one.

    python average.py a/best_ckpt.pth b/best_ckpt.pth --output soup.pth
    python average.py a/best_ckpt.pth b/best_ckpt.pth c/best_ckpt.pth --output soup.pth --greedy --data-path FOLDER

The checkpoints are of one architecture, labels and preparation of the images, and began from the same weights: runs
from one --pretrained file, or epochs of one run. The mean of runs from different random weights is no model.
--greedy adds them in the order of their scores on the validation split (TRAIN.BEST_BY), each if no score is lost.
The statistics of BatchNorm are averaged like weights. The file is tested, used and exported like any checkpoint, and
records what went in.
"""

import argparse
import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

import config as config_module
from common import distributed
from common.errors import UserError, run_command
from dataset.build import build_datasets, build_loader, fingerprint
from dataset.build import own_values as data_values
from dataset.patients import patients_of, refuse_known, seen_by, together
from models import build_model, own_values
from models.inference import autocast, set_up_device
from training import checkpoint
from training.tasks import TASKS

# Options of MODEL that change nothing of a trained model.
FREE = {f"MODEL.{name}" for name in "NAME PRETRAINED RESUME DROP_RATE DROP_PATH_RATE LABEL_SMOOTHING".split()}
FREE |= {"MODEL.TIMM.DOWNLOAD"}


def parse_args(argv=None):
    parser = config_module.Parser(
        prog="average.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="of main.py, at least two")
    add("--output", required=True, metavar="FILE", help="the checkpoint to write")
    add("--ema", action="store_true", help="the EMA weights that the checkpoints hold")
    add("--greedy", action="store_true", help="only what improves the score on the validation split")
    add("--dataset", help="with --greedy: DATA.DATASET, if not that of the first checkpoint")
    add("--data-path", help="with --greedy: DATA.DATA_PATH, if not that of the first checkpoint")
    add("--opts", nargs="+", metavar="KEY VALUE", help="with --greedy: config keys to change")
    args = parser.parse_args(argv)
    if len(args.checkpoints) < 2:
        raise UserError(f"{args.checkpoints[0]} is one checkpoint; give at least two to average")
    if not args.greedy and (args.dataset or args.data_path or args.opts):
        raise UserError("--dataset, --data-path and --opts say on which images --greedy validates: give --greedy too")
    if Path(args.output).resolve() in [Path(path).resolve() for path in args.checkpoints]:
        raise UserError(f"--output {args.output} is one of the checkpoints to average; choose another file")
    return args


@dataclass
class Member:
    """One checkpoint: weights {name: tensor}, and the rest of its content."""

    path: Path
    sha256: str
    weights: dict
    state: dict
    score: float | None = None
    used: bool = True


def read_members(args):
    """The checkpoints as :class:`Member`, and the model of the first.

    UserError: not a checkpoint of main.py, one twice, or one of another model, other labels or another preparation.
    """
    saved = checkpoint.read_config(args.checkpoints[0])
    config = config_module.from_dict(saved, args.checkpoints[0])
    model, members = build_model(config, outside=False), []
    for path in map(Path, args.checkpoints):
        state, sha256 = checkpoint.read_with_digest(path)
        first = members[0] if members else Member(path, "", {}, state)
        if any(member.sha256 == sha256 for member in members):
            raise UserError(f"{path} is the same checkpoint as one before it; name each once")
        checkpoint.check_labels(state, path, first.state.get("label_names", ()), f"{first.path} has")
        changed = config_module.differences(first.state["config"], state["config"])
        for key, (ours, theirs) in changed.items():
            if key in (*checkpoint.SEEN, "DATA.UNIT") or (key.startswith("MODEL.") and key not in FREE):
                raise UserError(f"{path} was trained with {key} {theirs}, {first.path} with {ours}: these have no mean")
        weights = state["model_ema" if args.ema else "model"]
        if weights is None:
            raise UserError(f"--ema: {path} holds no EMA weights; it was trained with TRAIN.EMA.ENABLE False")
        checkpoint.check_weights(model, weights, path)
        rest = {k: v for k, v in state.items() if k not in ("model", "model_ema", "optimizer")}
        members.append(Member(path, sha256, weights, rest))
    return members, model


def mean_weights(members):
    """{name: tensor}, the mean of the members' weights; what is not floating (counts of BatchNorm) is the first's."""
    return {
        name: torch.stack([m.weights[name].double() for m in members]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in members[0].weights.items()
    }


def choose_greedily(members, score, sign):
    """Set the members' `score` and `used`; score(members) -> that of their mean; sign: 1, or -1 if lower is better."""
    for member in members:
        member.score, member.used = score([member]), False
    kept, best = [], None
    for member in sorted(members, key=lambda member: -sign * member.score):
        value = score([*kept, member])
        if best is None or sign * value >= sign * best:
            member.used, best = True, value
            kept.append(member)
        print(f"{member.path}: {member.score:.4f} alone, {value:.4f} {'with' if kept[1:] else 'as'} the chosen: "
              f"{'taken' if member.used else 'left out'}")  # fmt: skip


def validation_score(args, members, model, world):
    """(function(members) -> score of their mean on the validation split, row of the metric, that split's patients)."""
    given = argparse.Namespace(cfg=None, opts=args.opts, dataset=args.dataset, data_path=args.data_path)
    first = members[0]
    saved = first.state["config"], first.path
    config = config_module.get_config(given, data_values, own_values, saved=saved)
    set_up_device(config, world.device)
    (dataset,) = build_datasets(config, "validate")
    task, metric = TASKS[dataset.task], TASKS[dataset.task].best_metric(config.TRAIN.BEST_BY)
    checkpoint.check_labels(first.state | {"model": first.weights}, first.path, dataset.label_names)
    for member in members:
        if member.state.get("data", {}).get("validate") != fingerprint(dataset):  # not the split that it was chosen by
            refuse_known(seen_by(member.state)[0], dataset, config, member.path, "validation")
    loader = build_loader(config, dataset, train=False, world=world, log=logging.getLogger("average"))
    amp, _ = autocast(config, world.device)
    model.to(world.device)

    def score(chosen):
        model.load_state_dict(mean_weights(chosen))
        names, sources = dataset.label_names, getattr(dataset, "sources", None)
        found = task.validate(model, loader, world, amp, label_names=names, metric=metric, sources=sources)
        if found.score is None:
            raise UserError("--greedy: no label has both classes in the validation split; average without it")
        return found.score

    return score, metric, patients_of(dataset, config)


def main(argv=None):
    args = parse_args(argv)
    members, model = read_members(args)
    score, validated = None, {}
    if args.greedy:
        with distributed.session() as world:
            score_of, metric, validated = validation_score(args, members, model, world)
            choose_greedily(members, score_of, 1 if metric.higher_is_better else -1)
            score = {"best_by": metric.key, "score": score_of([m for m in members if m.used])}
    used, output = [member for member in members if member.used], Path(args.output)
    first, config = members[0].state, copy.deepcopy(members[0].state["config"])
    config["TAG"] = output.stem  # an evaluation's own folder, and its name beside the others
    domains = {kind for m in used for kind in (m.state.get("domain") or "").split(" and ")}
    state = {
        "model": mean_weights(used),
        "model_ema": None,
        "weights": "average",
        "task": first.get("task", "multilabel"),
        "label_names": first["label_names"],
        "config": config,
        "domain": " and ".join(sorted(domains - {""})),
        "patients": together(validated, *(seen_by(m.state)[0] for m in used)),
        "trained": together(*(seen_by(m.state)[1] for m in used)),
        "averaged": {
            "how": "greedy" if args.greedy else "uniform",
            "ema": args.ema,
            **(score or {}),
            "members": [
                {
                    "path": str(m.path),
                    "sha256": m.sha256,
                    "epoch": m.state.get("epoch"),
                    "score": m.score,
                    "used": m.used,
                }
                for m in members
            ],
        },
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); choose another file") from error
    checkpoint.save(state, output.parent, [output.name])
    scored = f", {score['best_by']} {score['score']:.4f} on the validation split" if score else ""
    print(f"{output}: the mean of {len(used)} of {len(members)} checkpoints{scored}")


if __name__ == "__main__":
    run_command(main)
