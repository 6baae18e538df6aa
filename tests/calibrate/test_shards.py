"""One calibration over many workers: the bits of one process, for every engine, also after a worker was killed."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest

from bnport.calibrate import data, run, shards, worker
from bnport.calibrate.models import LiveModel
from bnport.calibrate.pinned import open_workers
from bnport.calibrate.run import calibrate
from bnport.errors import InvalidValue, WorkerLost
from tests.calibrate import nets, work

ENGINES = ["local", "dask", pytest.param("ray", marks=pytest.mark.slow)]  # Ray takes ten seconds to start and stop
METHODS = ["population", "precise", "average", "moving"]


@pytest.fixture
def rows(tmp_path):
    np.save(tmp_path / "x.npy", nets.data(n=300))
    return str(tmp_path / "x.npy")


def statistics_of(model, *args, **options):
    """The statistics as bytes after a calibration, and its result; the model is as it was afterwards."""
    before = model.get_weights()
    result = calibrate(model, *args, **options)
    found = [w.tobytes() for w in model.get_weights()]
    model.set_weights(before)
    return found, result


@pytest.mark.parametrize("build", [nets.branches, nets.nested])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [7, 32])
def test_shards_give_the_bits_of_one_process(build, method, batch_size, rows, monkeypatch):
    model = build()
    one, alone = statistics_of(model, rows, method=method, batch_size=batch_size, unbiased=batch_size == 7)
    for size in (1, 4):
        monkeypatch.setattr(shards, "shard_size", lambda *_, size=size: size)
        many, result = statistics_of(
            model, rows, method=method, batch_size=batch_size, unbiased=batch_size == 7, engine="serial"
        )
        assert many == one
        assert (result.rounds, result.batches, result.samples) == (alone.rounds, alone.batches, 300)
        assert [layer.n for layer in result.layers] == [layer.n for layer in alone.layers]


@pytest.mark.parametrize("method", METHODS)
def test_masks_that_recurrent_layers_draw_and_do_not_use_are_no_obstacle(method, tmp_path):
    i = nets.keras.Input((5, 3))
    x = nets.L.LSTM(4, dropout=0.3, return_sequences=True)(nets.L.BatchNormalization()(i))
    model = nets.stir(nets.keras.Model(i, nets.L.BatchNormalization()(nets.L.GRU(4, dropout=0.3)(x))))
    np.save(tmp_path / "x.npy", nets.data(n=90, shape=(5, 3)))
    path = str(tmp_path / "x.npy")
    one, _ = statistics_of(model, path, batch_size=8, method=method)
    many, _ = statistics_of(model, path, batch_size=8, method=method, engine="serial")
    assert many == one


def test_a_model_that_cannot_be_saved_is_refused_in_words(rows):
    class Own(nets.L.Layer):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def call(self, x):
            return self.function(x)

    i = nets.keras.Input((8, 8, 3))
    model = nets.keras.Model(i, nets.L.BatchNormalization()(Own(abs)(i)))
    with pytest.raises(InvalidValue, match=r"workers of an engine load the model.*cannot be saved: .*leave engine out"):
        calibrate(model, rows, engine="serial")


def test_an_engine_in_this_process_leaves_the_random_state_alone(rows):
    model = nets.branches()
    before = random.getstate()
    calibrate(model, rows, engine="serial")
    assert random.getstate() == before


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_random_numbers_that_change_what_a_layer_sees_are_told_from_those_that_do_not(rate):
    class Drawing(nets.L.Layer):
        def __init__(self):
            super().__init__()
            self.drop = nets.L.Dropout(0.5)

        def call(self, x):
            return x + rate * self.drop(x, training=True)

    i = nets.keras.Input((4,))
    model = nets.keras.Model(i, nets.L.BatchNormalization()(Drawing()(i)))
    live, x = LiveModel(model), nets.data(n=32, shape=(4,))
    model.layers[-1].moving_mean.assign([np.nan] * 4)  # destroyed: what it hands on shows nothing
    before = nets.held(model)
    with live.running():
        live.call(x)
        moved = live.states.moved()
        assert len(moved) == 1
        after = moved[0].now()
        assert worker._in_vain(live, moved, x) == (rate == 0)
        assert (np.asarray(moved[0].now()) == np.asarray(after)).all()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, nets.held(model), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_used_several_times_counts_every_use_over_the_shards(method, tmp_path):
    i = nets.keras.Input((6,))
    shared = nets.L.BatchNormalization(name="shared")
    model = nets.keras.Model(i, nets.L.Add()([shared(nets.L.Dense(4)(i)) for _ in range(3)]))
    np.save(tmp_path / "x.npy", nets.data(n=90, shape=(6,)))
    path = str(tmp_path / "x.npy")
    one, _ = statistics_of(model, path, batch_size=8, method=method)
    many, result = statistics_of(model, path, batch_size=8, method=method, engine="serial")
    assert many == one
    assert result.layers[0].n == 270


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_frozen_or_not_asked_for_are_in_shards_what_they_are_in_one_process(method, rows):
    model = nets.branches()
    model.get_layer("left").trainable = False
    one, _ = statistics_of(model, rows, method=method, batch_size=16, layers=["left", "right", "f*"])
    many, result = statistics_of(
        model, rows, method=method, batch_size=16, layers=["left", "right", "f*"], engine="serial"
    )
    assert many == one
    assert [layer.name for layer in result.layers] == ["right", "fine"]


@pytest.mark.parametrize("method", METHODS)
def test_shards_in_which_a_layer_sees_nothing_because_of_a_mask_give_the_bits_of_one_process(method, tmp_path):
    i = nets.keras.Input((5, 3))
    x = nets.L.BatchNormalization(name="first")(nets.L.Masking()(i))
    model = nets.stir(
        nets.keras.Model(i, nets.L.BatchNormalization(name="second")(nets.L.Dense(4)(nets.L.Flatten()(x))))
    )
    x = nets.data(n=90, shape=(5, 3))
    x[16:48] = 0
    np.save(tmp_path / "x.npy", x)
    path = str(tmp_path / "x.npy")
    one, _ = statistics_of(model, path, batch_size=8, method=method)
    many, result = statistics_of(model, path, batch_size=8, method=method, engine="serial")
    assert many == one
    assert result.layers[0].n == 5 * 58


@pytest.mark.parametrize("method", ["population", "moving"])
@pytest.mark.parametrize("count", [33, 70, 250])
def test_an_engine_takes_batches_by_number_from_an_object_and_divides_any_number_of_them(count, method):
    model = nets.branches()
    one, _ = statistics_of(model, work.Elevens(count), method=method)
    many, result = statistics_of(model, work.Elevens(count), method=method, engine="serial")
    assert many == one
    assert (result.samples, result.batches) == (count, -(-count // 11))


def test_the_size_of_a_shard_is_a_power_of_two_and_gives_every_worker_work():
    for batches in range(1, 200):
        for workers in (1, 2, 3, 8):
            size = shards.shard_size(batches, workers)
            assert size & (size - 1) == 0
            assert size == 1 or -(-batches // size) >= 2 * workers


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (np.ones((40, 8, 8, 3), np.float32), {}, "data must be a path"),
        (lambda: [np.ones((40, 8, 8, 3), np.float32)], {}, "data must be a path"),
        (None, {"engine": "spark"}, "engine: expected one of"),
        (None, {"minimum": 1000}, "300 samples, at least 1000 needed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["population", "moving"])
def test_what_cannot_run_on_an_engine_is_refused_and_the_model_is_as_it_was(given, options, message, method, rows):
    model = nets.branches()
    before = [w.tobytes() for w in model.get_weights()]
    with pytest.raises(InvalidValue, match=message):
        calibrate(model, rows if given is None else given, **{"engine": "serial", "method": method, **options})
    assert [w.tobytes() for w in model.get_weights()] == before


def remembers():
    """A recurrent layer that goes on from the last batch's state."""
    i = nets.keras.Input(batch_shape=(10, 4, 3))
    return nets.keras.Model(i, nets.L.BatchNormalization()(nets.L.LSTM(5, stateful=True)(i)))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_whose_batches_depend_on_each_other_is_refused_on_an_engine(method, tmp_path):
    np.save(tmp_path / "x.npy", nets.data(n=80, shape=(4, 3)))
    model = remembers()
    before = [w.tobytes() for w in model.get_weights()]
    with pytest.raises(InvalidValue, match=r"depends on the batches before it .* leave engine out"):
        calibrate(model, str(tmp_path / "x.npy"), method=method, batch_size=10, engine="serial")
    assert [w.tobytes() for w in model.get_weights()] == before
    assert calibrate(model, str(tmp_path / "x.npy"), method=method, batch_size=10).samples == 80


def test_a_run_on_an_engine_resumes_from_its_checkpoint_to_the_same_bits(rows, tmp_path, monkeypatch):
    model = nets.branches()
    one, _ = statistics_of(model, rows)
    checkpoint = str(tmp_path / "run.npz")
    work, rounds = shards.work, []

    def interrupted(task):
        rounds.append(task)
        if len({len(t.new) + (t.known is None) for t in rounds}) > 1 and task.shard == 1:
            raise KeyboardInterrupt
        return work(task)

    monkeypatch.setattr(shards, "work", interrupted)
    with pytest.raises(KeyboardInterrupt):
        statistics_of(model, rows, engine="serial", resume=checkpoint)
    monkeypatch.setattr(shards, "work", work)
    many, result = statistics_of(model, rows, engine="serial", resume=checkpoint)
    assert many == one
    assert any("resumed" in note for note in result.notes)
    assert not os.path.exists(checkpoint)


@pytest.mark.parametrize("method", ["precise", "average", "moving"])
@pytest.mark.parametrize("engines", [("serial", "serial"), ("serial", None), (None, "serial")])
def test_one_pass_that_was_interrupted_goes_on_with_or_without_an_engine_to_the_same_bits(
    method, engines, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(shards, "shard_size", lambda *_: 4)
    model, checkpoint = nets.branches(), str(tmp_path / "run.npz")
    one, _ = statistics_of(model, rows, method=method, batch_size=13)

    def interrupt(done, total, what):
        assert total == 24
        if done >= 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        statistics_of(
            model, rows, method=method, batch_size=13, engine=engines[0], resume=checkpoint, progress=interrupt
        )
    again, told = [], []
    monkeypatch.setattr(shards, "work_once", lambda part, work=shards.work_once: again.append(part) or work(part))
    many, result = statistics_of(
        model,
        rows,
        method=method,
        batch_size=13,
        engine=engines[1],
        resume=checkpoint,
        progress=lambda *a: told.append(a),
    )
    assert many == one
    assert (result.samples, result.batches) == (300, 24)
    assert "resumed after 8 batches" in result.notes
    assert told[0][0] == (12 if engines[1] else 9)
    assert told[-1] == (24, 24, "batch 24")
    assert [part.first for part in again] == ([8, 12, 16, 20] if engines[1] else [])
    assert not os.path.exists(checkpoint)


def test_data_that_end_earlier_than_they_said_are_refused(rows, monkeypatch):
    iterate = data.Batches.iterate
    monkeypatch.setattr(
        data.Batches, "iterate", lambda self, skip=0: itertools.islice(iterate(self, skip), max(0, 3 - skip))
    )
    for method in METHODS:
        with pytest.raises(InvalidValue, match="ends after 3 batches; there were more"):
            calibrate(nets.branches(), rows, method=method, batch_size=32, engine="serial", workers=1)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_meets_the_process_that_it_met_before_and_a_new_one_after_a_kill(engine, tmp_path):
    workers = open_workers(engine, 2)
    try:
        assert workers.count == 2
        rounds = [workers.map(work.counted, [(k, None) for k in range(4)]) for _ in range(6)]
        homes = [pid for pid, _ in rounds[0]]
        assert len(set(homes)) == 2
        assert homes[:2] == homes[2:]
        for number, results in enumerate(rounds, 1):
            assert results == [(pid, number) for pid in homes]  # every call found what the last one had left
        killed = workers.map(work.counted, [(k, str(tmp_path / "died")) for k in range(4)])
        assert [killed[k] for k in (0, 2)] == [(homes[0], 7)] * 2
        assert killed[1] == (killed[1][0], 1)
        assert killed[1][0] not in homes
        after = workers.map(work.counted, [(k, None) for k in range(4)])
        assert [pid for pid, _ in after] == [killed[k % 2][0] for k in range(4)]
    finally:
        workers.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_that_starts_from_nothing_is_given_again_what_it_needs_and_no_other_is(engine, tmp_path):
    workers, asked = open_workers(engine, 2), []

    def again(block):
        asked.append(block[1])
        return ("tell", block[1], "told again")

    try:
        workers.map(work.remembered, [("tell", k, "told") for k in range(4)])
        found = workers.map(work.remembered, [("ask", k, str(tmp_path / "died")) for k in range(4)], again)
        assert found == ["told", "told again", "told", "told again"]
        assert sorted(asked) == [1, 3]
        assert workers.map(work.remembered, [("ask", k, None) for k in range(4)], again) == found
        assert len(asked) == 2
    finally:
        workers.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_dead_worker_was_at_is_done_again_while_the_others_are_still_at_work(engine, tmp_path):
    workers = open_workers(engine, 2)
    try:
        assert workers.map(work.waits_for_the_other, [(k, str(tmp_path)) for k in range(2)]) == [True, True]
    finally:
        workers.close()


def test_workers_raise_what_the_function_raises():
    for engine in ("serial", "local"):
        workers = open_workers(engine, 1)
        with pytest.raises(ValueError, match="block five is odd"):
            workers.map(work.fails, [4, 5, 6])
        workers.close()


def test_a_worker_that_dies_every_time_is_given_up():
    workers = open_workers("local", 1, retries=1)
    with pytest.raises(WorkerLost, match="block 1: its worker process died 2 times"):
        workers.map(work.always_dies, [1, 3])
    workers.close()


def test_the_command_writes_the_same_file_with_an_engine_as_without(rows, tmp_path, capsys):
    from bnport.cli import main

    nets.branches().save(tmp_path / "model.keras")
    for name, more in (("one.keras", []), ("many.keras", ["--engine", "serial"])):
        arguments = [str(tmp_path / "model.keras"), "--data", rows, "-o", str(tmp_path / name), *more]
        assert main(["calibrate", *arguments]) == 0
    assert (tmp_path / "one.keras").read_bytes() == (tmp_path / "many.keras").read_bytes()
    assert main(["calibrate", str(tmp_path / "model.keras"), "--data", rows, "-o", "x.keras", "--engine", "spark"]) == 2
    assert "engine: expected one of local, serial, dask, ray" in capsys.readouterr().err
