"""Loading: which images an epoch holds (DATA.SAMPLER), batches that cannot be read, signals, waits that never end."""

import os
import signal
import tempfile
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config as config_module
import predict
from common.distributed import Stopped, StopRequest, World
from common.errors import UserError
from conftest import epochs, signalled, write_checkpoint
from dataset import build
from dataset.build import build_datasets, build_loader, fingerprint
from dataset.samplers import SAMPLERS, TrainSampler, sampling_weights

WORLD = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))


# ------------------------------------------------------------------------------------------- samplers
def sampler(length=40, *, weights=None, rank=0, world=1, seed=3, groups=(), batch_size=4):
    return TrainSampler(length, batch_size=batch_size, accumulation=1, rank=rank, world_size=world, seed=seed,
                        groups=groups, weights=weights)  # fmt: skip


def batches(made, epoch=0, start=0):
    made.epoch, made.start_batch = epoch, start
    return [[index for _, index in batch] for batch in made]


TARGETS = np.zeros((40, 3), np.float32)  # 4 images with label 0, 10 with label 1 (2 of them with both), 28 with none
TARGETS[:4, 0] = 1
TARGETS[2:12, 1] = 1
TARGETS[12:, 2] = np.nan


@pytest.mark.parametrize("name, power", [("balanced", 1.0), ("sqrt", 0.5)])
def test_images_come_as_often_as_the_rarest_of_their_labels_says(name, power):
    share = np.array([4 / 40] * 4 + [10 / 40] * 8 + [28 / 40] * 28)
    weights = share**-power
    expected = 40 * weights / weights.sum()
    made = sampler(weights=sampling_weights(name, TARGETS))
    np.testing.assert_allclose(made.expected, expected)
    counts = []
    for epoch in range(400):
        drawn = sum(batches(made, epoch), [])
        assert len(drawn) == len(set(drawn)) == 40  # a repeat is an index of its own
        counts.append(np.bincount(np.array(drawn) % 40, minlength=40))
        assert sorted(drawn) == sorted(i + 40 * r for i, n in enumerate(counts[-1]) for r in range(n))
        assert (np.abs(counts[-1] - expected) < 1).all()
    # The mean of 400 epochs; its deviation is at most .5 / sqrt(400).
    assert np.abs(np.mean(counts, 0) - expected).max() < 5 * 0.5 / 20


def test_balanced_labels_of_one_each_are_about_as_frequent():
    targets = np.eye(3, dtype=np.float32)[[0] * 30 + [1] * 24 + [2] * 6]
    made = sampler(60, weights=sampling_weights("balanced", targets))
    drawn = np.array(sum((batches(made, epoch) for epoch in range(10)), [])).ravel() % 60
    np.testing.assert_allclose(np.bincount(targets.argmax(1)[drawn]), 200, atol=15)
    classes = sampling_weights("balanced", targets.argmax(1))  # the same as one class of many
    np.testing.assert_allclose(classes / classes.sum(), made.expected / 60)


def test_a_sampled_epoch_is_shared_by_ranks_and_resumes():
    weights = sampling_weights("balanced", TARGETS)
    whole = batches(sampler(weights=weights), epoch=2)
    assert whole == batches(sampler(weights=weights), epoch=2) != batches(sampler(weights=weights), epoch=3)
    assert batches(sampler(weights=weights), epoch=2, start=7) == whole[7:]
    ranks = [batches(sampler(weights=weights, rank=rank, world=2), epoch=2) for rank in range(2)]
    assert [batch for pair in zip(*ranks) for batch in pair] == whole


def test_sources_take_turns_and_are_sampled_each():
    groups = [np.arange(30), np.arange(30, 40)]
    weights = np.where(np.arange(40) % 10 == 0, 5.0, 1.0)
    made = sampler(weights=weights, groups=groups)
    for batch in batches(made):
        assert sum(index % 40 < 30 for index in batch) == 2
    assert made.expected[:30].sum() == pytest.approx(20) and made.expected[30] == pytest.approx(20 * 5 / 14)


def test_an_unknown_sampler_is_named():
    with pytest.raises(UserError, match="DATA.SAMPLER is 'balance'; .*uniform, balanced, sqrt .did you mean balanced"):
        sampling_weights("balance", TARGETS)


class Rows:
    targets = TARGETS

    def ids(self):
        return {"path": [str(k) for k in range(40)]}


def test_the_position_in_an_epoch_is_known_by_seed_and_sampler():
    others = [
        sampler(),
        sampler(seed=4),
        *(sampler(weights=sampling_weights(name, TARGETS)) for name in SAMPLERS if name != "uniform"),
        sampler(groups=[np.arange(20), np.arange(20, 40)]),
    ]
    assert len({fingerprint(Rows(), other) for other in [None, *others]}) == len(others) + 1
    assert fingerprint(Rows(), sampler()) == fingerprint(Rows(), sampler(weights=sampling_weights("uniform", TARGETS)))
    assert fingerprint(Rows(), sampler(rank=1, world=2)) == fingerprint(Rows(), sampler())


def test_a_run_with_a_sampler_resumes_within_an_epoch(trained_once, run_main, monkeypatch):
    whole = run_main(DATA__SAMPLER="balanced", TRAIN__EPOCHS=1)
    assert epochs(whole) != epochs(trained_once)
    signalled(monkeypatch, torch.optim.AdamW, "step", 3, signal.SIGUSR1)
    run_main(DATA__SAMPLER="balanced", TRAIN__EPOCHS=1, out="cut")
    assert epochs(run_main(DATA__SAMPLER="balanced", TRAIN__EPOCHS=1, out="cut")) == epochs(whole)


# --------------------------------------------------------------------------------------- the loader
@pytest.fixture
def loading(tiny, tree):
    """loading(train, KEY=value) -> (loader, dataset, warnings)."""

    def make(train, data=tree, **opts):
        opts = {"DATA__DATA_PATH": str(data), **opts}
        pairs = [str(x) for k, v in opts.items() for x in (k.replace("__", "."), v)]
        config = config_module.get_config(SimpleNamespace(cfg=str(tiny), opts=pairs))
        (dataset,) = build_datasets(config, "train" if train else "validate")
        warnings = []
        log = SimpleNamespace(warning=warnings.append)
        return build_loader(config, dataset, train=train, world=WORLD, log=log), dataset, warnings

    return make


def test_loading_leaves_the_random_numbers_of_a_gpu_alone(loading, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("the model's random numbers start again"))
    next(iter(loading(True)[0]))


def damage(dataset, rows):
    for row in rows:
        (dataset.root / dataset.table.path[row].decode()).write_bytes(b"no image")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_batch_without_a_readable_image_counts_for_nothing(loading, own_tree, workers):
    options = {"DATA__ON_BAD_IMAGE": "skip", "DATA__BATCH_SIZE": 4, "DATA__NUM_WORKERS": workers}
    loader, dataset, warnings = loading(True, own_tree, **options)
    first = [index for _, index in next(iter(loader.batch_sampler))]
    damage(dataset, first)
    found = list(loader)
    assert len(found) == len(loader) and len(warnings) == 4
    images, targets, rows = found[0]
    assert rows.tolist() == [-1] * 4 and targets.isnan().all() and images.shape == (4, 3, 32, 32)
    assert all((rows >= 0).all() for _, _, rows in found[1:])


def test_an_evaluation_leaves_out_a_last_batch_of_one_bad_image(loading, own_tree):
    _, dataset, _ = loading(False, own_tree)
    size = len(dataset) - 1
    damage(dataset, [size])
    loader, dataset, warnings = loading(False, own_tree, DATA__ON_BAD_IMAGE="skip", DATA__BATCH_SIZE=size)
    # And stands in for it: with a sharded model all ranks take as many batches.
    assert [rows.tolist() for _, _, rows in loader] == [list(range(size)), [-1]] and len(warnings) == 1
    loader, _, _ = loading(False, own_tree, DATA__BATCH_SIZE=size)
    with pytest.raises(UserError, match="cannot identify image"):
        list(loader)


def test_bad_batches_do_not_end_a_run(run_main, own_tree, loading):
    """Training with batches of one, and a validation batch of one, the last."""
    _, dataset, _ = loading(True, own_tree, DATA__LIMIT=24)
    damage(dataset, [0, 3])
    _, validation, _ = loading(False, own_tree, DATA__LIMIT=24)
    damage(validation, [len(validation) - 1])
    options = {"DATA__ON_BAD_IMAGE": "skip", "DATA__BATCH_SIZE": 1, "TRAIN__EPOCHS": 1, "DATA__IMG_SIZE": 64}
    (record,) = epochs(run_main(data=own_tree, DATA__LIMIT=24, **options))
    assert record["skipped"] == 2 and np.isfinite(record["train_loss"])


@pytest.mark.parametrize("number", sorted(build.STOPS))
def test_loading_processes_survive_what_the_main_process_handles(loading, number):
    """Signals sent to the whole group, before the first batch and after it."""
    received = []
    before = signal.signal(number, lambda *_: received.append(number))
    try:
        loader, _, _ = loading(True, DATA__NUM_WORKERS=2, DATA__BATCH_SIZE=4)
        batches = iter(loader)
        count = 1 + len([next(batches)])
        pids = [worker.pid for worker in loader._iterator._workers]
        for pid in pids:
            signaller = os.fork()  # not the parent: its own end is obeyed
            if not signaller:
                os.kill(pid, number)
                os._exit(0)
            os.waitpid(signaller, 0)
        os.kill(os.getpid(), number)
        assert sum(1 for _ in batches) + count - 1 == len(loader) and received == [number]
        assert pids == [worker.pid for worker in loader._iterator._workers]
        if number == signal.SIGTERM:  # the parent's own end is obeyed, at once
            for worker in loader._iterator._workers:
                worker.terminate()
                worker.join(5)
                assert worker.exitcode == 0
    finally:
        signal.signal(number, before)


@pytest.fixture
def hang(monkeypatch):
    """The first batch never comes; waits are short, torch's for the end of a loading process too."""
    for name, seconds in (("POLL", 0.2), ("WARN_AFTER", 0.4), ("LONGEST_WAIT", 0.8)):
        monkeypatch.setattr(build, name, seconds)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    real = build.SeededDataset.__getitem__

    def stuck(self, key):
        if key[1] == 1:
            threading.Event().wait()
        return real(self, key)

    monkeypatch.setattr(build.SeededDataset, "__getitem__", stuck)


def test_a_batch_that_never_comes_ends_with_its_reason(loading, hang, tree):
    loader, _, warnings = loading(False, DATA__NUM_WORKERS=1, DATA__BATCH_SIZE=4)
    with pytest.raises(UserError, match=f"no batch of images came for 0.8 s: .*in reading {tree}; DATA.NUM_WORKERS 0"):
        list(loader)
    assert warnings == ["no batch of images has come for 0.4 s: the data's file system is slow or hangs"]


def test_a_stop_is_seen_while_a_batch_is_waited_for(loading, hang):
    loader, _, _ = loading(False, DATA__NUM_WORKERS=1, DATA__BATCH_SIZE=4)

    def waiting(seconds):
        if seconds > 0.3:
            raise Stopped(signal.SIGTERM)

    loader.while_waiting = waiting
    with pytest.raises(Stopped):
        list(loader)


def test_a_dead_loading_process_is_a_stop_where_one_is_asked_for(loading, monkeypatch):
    monkeypatch.setattr(build, "POLL", 0.2)
    list(torch.utils.data.DataLoader(range(2), num_workers=1))  # leaves torch's handler of SIGCHLD behind
    for asked, error in ((True, Stopped), (False, RuntimeError)):
        loader, _, _ = loading(True, DATA__NUM_WORKERS=1, DATA__BATCH_SIZE=4)
        stop = StopRequest(World(0, 1, torch.device("cpu")))
        batches = iter(loader)
        next(batches)
        stop.received, loader.while_waiting = signal.SIGTERM * asked, stop.while_waiting
        os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
        time.sleep(0.3)  # nothing is raised in an update, only where a batch is waited for
        with pytest.raises(error):
            list(batches)


def test_a_long_tmpdir_is_named_at_start(loading, monkeypatch, tmp_path, tree):
    path, _ = write_checkpoint(tmp_path / "a.pth")
    for length, fits in ((75, True), (76, False)):
        folder = "/" + "t" * (length - 1)
        monkeypatch.setattr(tempfile, "gettempdir", lambda folder=folder: folder)
        if fits:
            loading(True, DATA__NUM_WORKERS=1)
        else:
            with pytest.raises(UserError, match=f"TMPDIR {folder} is too long .* 76 bytes, at most 75"):
                loading(True, DATA__NUM_WORKERS=1)
            loading(True, DATA__NUM_WORKERS=0)
            with pytest.raises(UserError, match="TMPDIR /t+ is too long .* or -j 0$"):
                predict.main([str(path), str(tree), "--output", str(tmp_path / "p.csv")])
            assert not (tmp_path / "p.csv").exists()
