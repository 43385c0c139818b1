"""The step: compiled or not, deterministic, without waiting for the device, and what the log says of it."""

import json
import os
import re
import types
from functools import partial

import pandas as pd
import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

import config as config_module
import main
from common import distributed
from common.errors import UserError
from conftest import TINY, epochs
from dataset.build import Loader, build_datasets, build_loader, taken_ahead
from models.intern_image import InternImage
from training import checkpoint, compiling, faults, plan, run, throughput
from training.step import Step
from utils_multilabel import LOSSES, build_loss

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
STILL = dict(TRAIN__EPOCHS=1, MODEL__DROP_PATH_RATE=0.0)  # without random numbers in the model


# --------------------------------------------------------------------------------------- compiled
@pytest.fixture
def traced(monkeypatch):
    """TRAIN.COMPILE without a compiler: the graphs that torch.compile takes, run operator by operator; a list of them.

    Making code of them is torch's own business, and takes minutes.
    """
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "as it was")
    yield graphs
    torch._dynamo.reset()


def test_a_compiled_run_is_the_run_and_its_checkpoints_are_the_same(run_main, traced, tmp_path):
    plain = run_main(**STILL)
    folder = run_main(**STILL, TRAIN__COMPILE=True, out="compiled")
    assert len(traced) == 1  # one graph for every update; validation and the average need none
    a, b = (checkpoint.read(f / checkpoint.LAST) for f in (plain, folder))
    assert list(a["model"]) == list(b["model"]) and list(a["model_ema"]) == list(b["model_ema"])
    for key in ("train_loss", "grad_norm", "val_loss"):
        assert epochs(folder)[0][key] == pytest.approx(epochs(plain)[0][key], rel=1e-4), key
    log = (folder / "log_rank0.txt").read_text()
    assert log.count(f"What is made is kept in {tmp_path / 'compiled' / 'compile_cache'}\n") == 1
    assert log.count("compiled: the first update took") == 1
    run_main(**STILL | {"TRAIN__EPOCHS": 2}, out="compiled")  # goes on without it
    assert [line["epoch"] for line in epochs(folder)] == [1, 2] and len(traced) == 1


def test_a_smaller_batch_is_not_compiled_anew(own_tree, run_main, traced):
    split = pd.read_csv(next(own_tree.glob("*-split.csv.gz")))
    row = split[split.split == "train"].iloc[3]
    next(own_tree.rglob(f"{row.dicom_id}.jpg")).write_bytes(b"no picture")
    folder = run_main(data=own_tree, TRAIN__COMPILE=True, DATA__ON_BAD_IMAGE="skip", **STILL)
    assert epochs(folder)[0]["skipped"] == 1 and len(traced) == 1


@pytest.mark.parametrize(
    "options",
    [
        dict(use_checkpoint=True, drop_path_rate=0.2),
        dict(layer_scale=1e-5, post_norm=True, offset_scale=2.0),
        dict(res_post_norm=True, dw_kernel_size=5, center_feature_scale=True, use_clip_projector=True,
             level2_post_norm_block_ids=(0,)),
    ],
    ids=["recomputing", "as B and L", "as H and G"],
)  # fmt: skip
def test_every_kind_of_internimage_is_one_graph(traced, options):
    """fullgraph: a break would be an error. In mixed precision, forward and backward."""
    options = {"num_classes": 3, "channels": 16, "depths": (1, 1, 1, 1), "groups": (1, 2, 4, 8), **options}
    if options.get("use_clip_projector"):
        InternImage.CLIP_DIM, before = 64, InternImage.CLIP_DIM
    model = InternImage(**options)
    if options.get("use_clip_projector"):
        InternImage.CLIP_DIM = before
    with torch.autocast("cpu", torch.bfloat16):
        compiling.compile_model(model)(torch.randn(2, 3, 64, 64)).sum().backward()
    assert len(traced) == 1 and all(p.grad is not None for p in model.parameters())


def test_what_compiling_needs_is_looked_for_at_start(run_main, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="COMPILE True needs a compiler, and no-such-compiler is not there; .*COMPILE"):
        run_main(TRAIN__COMPILE=True)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"needs a compiler, and g\+\+ is not there"):
        run_main(TRAIN__COMPILE=True)


def test_runs_of_one_output_share_what_was_compiled(tmp_path, monkeypatch):
    """Whatever torch has chosen before, when its compiler was imported."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_user")
    monkeypatch.chdir(tmp_path)
    compiling.prepare("output/cache", torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "output" / "cache")


def test_a_model_that_breaks_the_graph_is_named(run_main, traced, monkeypatch):
    def classify(self, maps):
        torch._dynamo.graph_break()
        return self.head(maps.mean((2, 3)))

    monkeypatch.setattr(InternImage, "classify", classify)
    with pytest.raises(UserError, match="^TRAIN.COMPILE True: torch cannot compile intern_image .*; set TRAIN.COMPILE"):
        run_main(TRAIN__COMPILE=True)


# ---------------------------------------------------------------------------------- deterministic
def test_deterministic_reaches_torch_and_ends_with_the_run(run_main, monkeypatch):
    seen = []

    def loss(logits, targets, pos_weight=None):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        if torch.are_deterministic_algorithms_enabled():
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return logits.square().mean()

    monkeypatch.setitem(LOSSES, "own", loss)
    with pytest.raises(UserError, match="^DETERMINISTIC True: put_ has no deterministic form on cpu; set"):
        run_main(TRAIN__LOSS="own", DETERMINISTIC=True)
    run_main(TRAIN__LOSS="own", TRAIN__EPOCHS=1)
    assert seen[0] == (True, False) and set(seen[1:]) == {(False, True)}


def test_a_deterministic_run_on_a_cpu_is_the_run(trained_once, run_main):
    assert epochs(trained_once) == epochs(run_main(TRAIN__EPOCHS=1, DETERMINISTIC=True, out="d"))


@GPU
def test_two_deterministic_runs_on_a_gpu_are_equal(run_main):
    a, b = (run_main(TRAIN__EPOCHS=1, DETERMINISTIC=True, out=out) for out in "ab")
    x, y = (checkpoint.read(f / checkpoint.LAST)["model"] for f in (a, b))
    assert all(torch.equal(x[name], y[name]) for name in x) and epochs(a) == epochs(b)


# -------------------------------------------------------------------------------- without waiting
class Waits(TorchDispatchMode):
    """Remembers the operators whose result the CPU needs, or whose size depends on values: a GPU is waited for."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "index.bool"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            name = "index.bool"
        if name in self.WAITING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_an_update_does_not_wait_for_the_device(run_main, monkeypatch):
    """Loading, done before, is the CPU's own business; so are the numbers that mixing draws."""
    update, batches, found = Step.__call__, run.Run.batches, []

    def watched(*arguments):
        with Waits() as waits:
            result = update(*arguments)
        found.append(waits.found)
        return result

    monkeypatch.setattr(Step, "__call__", watched)
    monkeypatch.setattr(run.Run, "batches", lambda own: iter(list(batches(own))))
    run_main(TRAIN__EPOCHS=1)
    assert len(found) > 3 and not any(found), found


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_wait_for_the_device(name):
    logits, targets = torch.randn(4, 3, requires_grad=True), torch.tensor([[0.0, 1.0, torch.nan]] * 4)
    with Waits() as waits:
        build_loss(name, {}, pos_weight=torch.ones(3))(logits, targets).backward()
    assert waits.found == []
    with Waits() as waits:
        logits[~targets.isnan()].sum().item()
    assert waits.found == ["index.bool", "_local_scalar_dense"]  # so it does see them


@GPU
def test_an_update_does_not_wait_for_the_gpu(run_main, monkeypatch):
    """By torch's own mode, which makes an error of it; the first update may."""
    update, updates = Step.__call__, []

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error" if updates else "default")
        result = update(*arguments)
        torch.cuda.set_sync_debug_mode("default")
        updates.append(0)
        return result

    monkeypatch.setattr(Step, "__call__", watched)
    run_main("--amp-opt-level", "O1", TRAIN__EPOCHS=1, AUG__MIXUP=0.5)
    assert len(updates) > 3


# ----------------------------------------------------------------------------- waiting for the data
def test_batches_are_taken_ahead():
    taken, given = [], []
    for item in taken_ahead((taken.append(k) or k for k in range(5)), 2):
        given.append(item)
        assert len(taken) == min(item + 3, 5)
    assert given == [0, 1, 2, 3, 4]
    assert list(taken_ahead(iter("ab"), 0)) == list(taken_ahead(iter("ab"), 7)) == ["a", "b"]


@GPU
def test_batches_that_crossed_ahead_are_the_same(tree):
    device, batches = torch.device("cuda"), []
    for ahead in (0, 2):
        content = {**config_module.yaml.safe_load(TINY)}
        content["DATA"] |= {"PREFETCH": ahead, "DATA_PATH": str(tree)}
        config = config_module.from_dict(content, "test")
        (split,) = build_datasets(config, "validate")
        world = distributed.World(0, 1, device)
        batches.append(list(build_loader(config, split, train=False, world=world, log=None)))
    for one, other in zip(*batches):
        assert all(map(torch.equal, one, other))


def test_the_share_of_time_that_waits_for_data_is_said(run_main, monkeypatch):
    """By a clock that loading moves by 3 and a step by 1."""
    clock, read, step = [0.0], Loader.__iter__, torch.optim.AdamW.step

    def loads(loader):
        for batch in read(loader):
            clock[0] += 3
            yield batch

    def steps(*arguments, **options):
        clock[0] += 1
        return step(*arguments, **options)

    monkeypatch.setattr(Loader, "__iter__", loads)
    monkeypatch.setattr(torch.optim.AdamW, "step", steps)
    for module in (main, run):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(time=lambda: clock[0]))
    folder = run_main(TRAIN__EPOCHS=1, PRINT_FREQ=2)
    (line,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    updates = checkpoint.read(folder / checkpoint.LAST)["lr_scheduler"]["update"]
    assert (line["waited"], line["seconds"]) == (0.75, 4 * updates)
    assert 0.01 < line["peak_memory_gb"] < 100
    log = (folder / "log_rank0.txt").read_text()
    assert log.count(" images/s, 75% waiting for data, peak memory ") == -(-updates // 2)
    assert "75% of it waiting for data" in log


# ------------------------------------------------------------------------------------------ faults
def test_a_kernel_asked_for_by_name_is_told_in_its_own_words(tiny):
    """Whatever it says of the machine's memory."""
    text = (
        "dcnv3: DCNV3_BACKWARD=owning does not fit an input of 56x56 pixels with 16 channels a group: a group of one "
        "image does not fit in the shared memory of a block; take atomic, ordered or owning, or leave it unset"
    )
    config = config_module.get_config(config_module.parse_args(["--cfg", str(tiny)]))
    error = ValueError(text + "\nException raised from backward_kernel at binding.cpp:173")
    assert faults.explain(error, config, distributed.World(0, 1, torch.device("cpu"))) == text


# ------------------------------------------------------------------------------------------- plan
def test_a_plan_counts_what_a_step_holds(tiny):
    def config(*opts):
        given = types.SimpleNamespace(cfg=str(tiny), opts=["AMP_OPT_LEVEL", "O0", "DATA.BATCH_SIZE", "4", *opts])
        return config_module.get_config(given)

    computed = plan.measure(config("TRAIN.FREEZE", "[patch_embed]"))
    step = throughput.RandomStep(config("TRAIN.FREEZE", "[patch_embed]"), torch.device("cpu"))
    step()
    model, states = step.step.model, step.step.optimizer.state.values()
    weights = sum(p.nbytes for p in model.parameters())
    assert computed["weights"] == computed["ema"] == weights
    assert computed["trained"] == sum(p.nbytes for p in model.parameters() if p.requires_grad) < weights
    assert computed["moments"] == sum(t.nbytes for state in states for key, t in state.items() if key != "step")

    # The activations by torch's own tracker of memory, of real tensors.
    for parameter in model.parameters():
        parameter.requires_grad_(True).register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        model(step.images).square().mean().backward()
    taken = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    kept, twice = plan.measure(config())["kept"]
    buffers = sum(b.nbytes for b in model.buffers())
    assert kept == pytest.approx(taken["Total"] - weights - buffers, rel=0.02)
    assert twice == pytest.approx(plan.measure(config("DATA.BATCH_SIZE", "8"))["kept"][0])
    deep = ("MODEL.INTERN_IMAGE.DEPTHS", "[4, 1, 1, 1]", "AMP_OPT_LEVEL", "O1", "DATA.BATCH_SIZE", "16")
    whole, again = (plan.measure(config(*deep, "TRAIN.USE_CHECKPOINT", use))["kept"][0] for use in ("False", "True"))
    assert again < 0.6 * whole


def test_a_plan_says_which_card_holds_which_batch(run_main, capsys):
    run_main("--throughput", "--plan", TRAIN__EMA__ENABLE=False)
    lines = capsys.readouterr().out.splitlines()
    table = [re.split(r"\s{2,}", line.strip()) for line in lines if re.match(r" *(GPUs  |DDP, |FSDP, )", line)]
    assert [row[0] for row in table] == ["GPUs", "DDP, 1 to 4", *(f"FSDP, {n}" for n in (1, 2, 3, 4))]
    assert all(
        len(row) == 10 and int(row[-1].replace(",", "")) > int(row[-2].replace(",", "")) > 0 for row in table[1:]
    )
    assert any(line.startswith("a step of the largest block on one image: computed 0.00") for line in lines)
    # H on four A100, by hand: 1.09 billion numbers of 4 bytes four times (weights, gradients, two moments of Adam).
    state = {"weights": 4 * 1.09e9, "trained": 4 * 1.09e9, "moments": 8 * 1.09e9, "ema": 0, "low": 2}
    found = plan.rows(state | {"largest": 4 * 71e6, "rest": 4 * 20e6, "kept": 0, "kept_low": 0})
    found = {name: sum(parts) for name, parts, _ in found}
    assert found["DDP, 1 to 4"] == pytest.approx(17.44e9)
    assert found["FSDP, 4"] == pytest.approx(17.44e9 / 4 + 2 * 20e6 + 8 * 71e6 + 4 * 71e6)
