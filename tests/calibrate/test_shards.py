"""One calibration over many workers: the bits of one process, for every engine, also after a worker was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bnport.calibrate import shards
from bnport.calibrate.pinned import open_workers
from bnport.calibrate.run import calibrate
from bnport.errors import InvalidValue, WorkerLost
from tests.calibrate import nets, work

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


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
@pytest.mark.parametrize("method", ["population", "precise"])
@pytest.mark.parametrize("batch_size", [7, 32])
def test_shards_give_the_bits_of_one_process(build, method, batch_size, rows, monkeypatch):
    monkeypatch.setattr(shards, "shard_size", lambda batches, workers: 4 if batches > 9 else 2)
    model = build()
    one, alone = statistics_of(model, rows, method=method, batch_size=batch_size)
    many, result = statistics_of(model, rows, method=method, batch_size=batch_size, engine="serial")
    assert many == one
    assert result.rounds == alone.rounds
    assert result.samples == 300


def test_a_layer_that_is_used_several_times_is_pooled_over_its_uses_and_the_shards(tmp_path):
    i = nets.keras.Input((6,))
    shared = nets.L.BatchNormalization(name="shared")
    model = nets.keras.Model(i, nets.L.Add()([shared(nets.L.Dense(4)(i)), shared(nets.L.Dense(4)(i))]))
    np.save(tmp_path / "x.npy", nets.data(n=90, shape=(6,)))
    path = str(tmp_path / "x.npy")
    one, _ = statistics_of(model, path, batch_size=8)
    many, result = statistics_of(model, path, batch_size=8, engine="serial")
    assert many == one
    assert result.layers[0].n == 180


def test_the_size_of_a_shard_is_a_power_of_two_and_gives_every_worker_work():
    for batches in range(1, 200):
        for workers in (1, 2, 3, 8):
            size = shards.shard_size(batches, workers)
            assert size & (size - 1) == 0
            assert size == 1 or -(-batches // size) >= 2 * workers


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (np.ones((40, 8, 8, 3), np.float32), {}, "data must be a path"),
        (None, {"method": "moving"}, "depends on the order"),
        (None, {"engine": "spark"}, "engine: expected one of"),
        (None, {"minimum": 1000}, "300 samples, at least 1000 needed"),
    ],
)  # fmt: skip
def test_what_cannot_run_on_an_engine_is_refused_and_the_model_is_as_it_was(data, options, message, rows):
    model = nets.branches()
    before = [w.tobytes() for w in model.get_weights()]
    with pytest.raises(InvalidValue, match=message):
        calibrate(model, rows if data is None else data, **{"engine": "serial", **options})
    assert [w.tobytes() for w in model.get_weights()] == before


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


@pytest.mark.parametrize("engine", ["local", "dask", pytest.param("ray", marks=pytest.mark.slow)])
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


SCRIPT = """
import json, sys
from bnport.calibrate import shards
from bnport.calibrate.run import calibrate
from tests.calibrate import nets, work

if __name__ == "__main__":
    engine, path = sys.argv[1:3]
    model = nets.branches()
    before = model.get_weights()
    found = {}
    for kind in ("alone", "killed"):
        model.set_weights(before)
        if kind == "killed":
            shards.work = work.shard_whose_worker_dies
        options = {} if kind == "alone" else {"engine": engine, "workers": 2}
        result = calibrate(model, path, batch_size=16, **options)
        found[kind] = [w.tobytes().hex() for w in model.get_weights()]
        found[kind + " notes"] = result.notes
    print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "dask", "ray"])
def test_two_processes_one_of_them_killed_between_two_rounds_give_the_bits_of_one_process(engine, rows, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "KERAS_BACKEND": "torch",  # no compilation: the cheapest for one short run in every worker
        "OMP_NUM_THREADS": "1",  # Dask and Ray set it in their workers, and torch's convolutions depend on it
        "CANARY": str(tmp_path / "died"),
        "PYTHONPATH": HERE,
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    done = subprocess.run(
        [sys.executable, str(script), engine, rows], env=environment, capture_output=True, text=True, timeout=500
    )
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert os.path.exists(tmp_path / "died")
    assert found["killed"] == found["alone"]
    assert any("worker had died" in note for note in found["killed notes"])


def test_the_command_writes_the_same_file_with_an_engine_as_without(rows, tmp_path, capsys):
    from bnport.cli import main

    nets.branches().save(tmp_path / "model.keras")
    for name, more in (("one.keras", []), ("many.keras", ["--engine", "serial"])):
        arguments = [str(tmp_path / "model.keras"), "--data", rows, "-o", str(tmp_path / name), *more]
        assert main(["calibrate", *arguments]) == 0
    assert (tmp_path / "one.keras").read_bytes() == (tmp_path / "many.keras").read_bytes()
    assert main(["calibrate", str(tmp_path / "model.keras"), "--data", rows, "-o", "x.keras", "--engine", "spark"]) == 2
    assert "engine: expected one of local, serial, dask, ray" in capsys.readouterr().err
