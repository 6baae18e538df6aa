"""map_blocks on real processes: the same bits with one worker, two, and after one was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from bnport.calibrate.executors import map_blocks
from bnport.calibrate.moments import merge_all
from bnport.errors import InvalidValue, WorkerLost
from tests.calibrate import work

BLOCKS = 24

# Ray's own start and stop cost about 10 s and a gigabyte of memory
ENGINES = ["local", "dask", pytest.param("ray", marks=pytest.mark.slow)]


def blocks(folder, deadly=None):
    folder.mkdir()
    return [(seed, 5000 + seed, str(folder), deadly) for seed in range(BLOCKS)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return merge_all(map_blocks(work.block_moments, blocks(tmp_path_factory.mktemp("s") / "x"), engine="serial"))


def started(folder):
    return [name.split("-")[1] for name in os.listdir(folder) if name.startswith("done-")]


@pytest.mark.parametrize("engine", ENGINES)
def test_one_worker_two_workers_and_a_killed_worker_give_the_same_bits(engine, tmp_path, expected):
    whole = merge_all(map_blocks(work.block_moments, blocks(tmp_path / "two"), engine=engine, workers=2))
    assert whole.same_bits(expected)
    pids = {name.split("-")[2] for name in os.listdir(tmp_path / "two")}
    assert str(os.getpid()) not in pids

    killed = merge_all(map_blocks(work.block_moments, blocks(tmp_path / "kill", 11), engine=engine, workers=2))
    assert os.path.exists(tmp_path / "kill" / "died-11")
    assert killed.same_bits(expected)
    dead = (tmp_path / "kill" / "died-11").read_text()
    done = [name.split("-")[1:3] for name in os.listdir(tmp_path / "kill") if name.startswith("done-")]
    counts = Counter(block for block, _ in done)  # the deadly block died before it was counted
    assert set(counts) == {str(block) for block in range(BLOCKS)}
    assert max(counts.values()) <= 2
    again = {block for block, count in counts.items() if count == 2}
    if engine == "dask":  # it also does again what the dead worker had done and still held
        assert again <= {block for block, pid in done if pid == dead}
    else:
        assert not again
    if engine == "local":  # the other process went on, with all that it had imported and opened
        names = [name for name in os.listdir(tmp_path / "kill") if name.startswith("done-")]
        assert len({name.split("-")[2] for name in names}) <= 3

    if engine == "local":
        one = merge_all(map_blocks(work.block_moments, blocks(tmp_path / "one"), engine=engine, workers=1))
        assert one.same_bits(expected)


def test_only_the_block_that_a_killed_worker_was_at_is_done_again(tmp_path):
    list(map_blocks(work.block_moments, blocks(tmp_path / "kill", 20), engine="local", workers=2))
    counts = [started(tmp_path / "kill").count(str(k)) for k in range(BLOCKS)]
    assert counts == [1] * BLOCKS  # block 20 died before it was counted


def test_a_dask_cluster_started_here_keeps_glibcs_own_rule_for_large_blocks_of_memory(monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    assert list(map_blocks(work.variable, ["MALLOC_TRIM_THRESHOLD_"], engine="dask", workers=1)) == [None]
    assert list(map_blocks(work.variable, ["OMP_NUM_THREADS"], engine="dask", workers=1)) == ["1"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_that_is_done_again_does_not_hold_up_the_blocks_after_it(engine, tmp_path):
    made = [(number, str(tmp_path)) for number in range(40)]
    assert all(map_blocks(work.first_waits_for_the_thirtieth, made, engine=engine, workers=2))
    assert os.path.exists(tmp_path / "died")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_that_kills_every_worker_ends_the_run_with_its_number(engine):
    with pytest.raises(WorkerLost, match="block 3: its worker process died 2 times" if engine == "local" else "lost"):
        list(map_blocks(work.always_dies, range(4), engine=engine, workers=1, retries=1))


@pytest.mark.parametrize("engine", ["serial", *ENGINES])
def test_what_the_function_raises_comes_through_and_results_before_it_in_order(engine):
    results = map_blocks(work.fails, range(9), engine=engine, workers=2)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(ValueError, match="block five is odd"):
        next(results)


def test_a_generator_of_blocks_is_read_a_bounded_number_ahead():
    taken = []

    def source():
        for k in range(1000):
            taken.append(k)
            yield k

    results = map_blocks(work.where, source(), engine="local", workers=1)
    assert next(results)[0] == 0
    results.close()
    assert len(taken) <= 8


def test_progress_is_told_after_every_block():
    told = []
    list(map_blocks(work.fails, [1, 2, 3], engine="serial", progress=lambda *a: told.append(a)))
    assert told == [(1, 3, "blocks"), (2, 3, "blocks"), (3, 3, "blocks")]


def test_an_existing_dask_client_is_used_and_left_open(expected, tmp_path):
    import distributed

    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        for number, address in enumerate((client, cluster.scheduler_address)):
            made = blocks(tmp_path / str(number))
            assert merge_all(map_blocks(work.block_moments, made, engine="dask", address=address)).same_bits(expected)
        assert client.submit(work.where, 1).result()[0] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "spark"}, "expected one of local, serial, dask, ray, got 'spark'"),
        ({"engine": "serial", "workers": 0}, "workers: expected 1"),
        ({"engine": "local", "address": "tcp://x:1"}, "has no address"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(InvalidValue, match=message):
        map_blocks(work.where, [1], **settings)


def test_no_blocks_give_no_results():
    assert list(map_blocks(work.where, [], workers=1)) == []


def test_a_script_without_a_main_guard_is_told_so_instead_of_running_for_ever(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom bnport.calibrate.executors import map_blocks\nlist(map_blocks(os.path.abspath, ['x'], workers=1))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode
    assert 'below if __name__ == "__main__"' in done.stderr
