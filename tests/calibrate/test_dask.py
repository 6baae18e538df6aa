"""Dask clusters that lose their workers, get them late, or run what raises TimeoutError: never waited for without end."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import dask
import distributed
import pytest

from bnport.calibrate import clusters
from bnport.calibrate.executors import map_blocks
from bnport.calibrate.moments import merge_all
from bnport.calibrate.pinned import open_workers
from bnport.errors import WorkerLost
from tests.calibrate import work


@pytest.fixture
def cluster():
    with distributed.LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None) as made:
        yield made


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(clusters, "NOBODY", 1.0)
    monkeypatch.setattr(clusters, "LOOK", 0.1)


def test_a_cluster_that_has_no_worker_is_given_up(cluster, impatient):
    with pytest.raises(WorkerLost, match="no worker for 1 seconds"):
        list(map_blocks(work.where, range(9), engine="dask", address=cluster.scheduler_address))
    with pytest.raises(WorkerLost, match="no worker for 1 seconds"):
        open_workers("dask", address=cluster.scheduler_address)


def test_a_cluster_that_loses_its_last_worker_is_given_up(cluster, monkeypatch):
    cluster.scale(1)
    results = map_blocks(work.slow_unless_first, range(9), engine="dask", address=cluster.scheduler_address)
    assert next(results) == 0
    monkeypatch.setattr(clusters, "NOBODY", 1.0)
    monkeypatch.setattr(clusters, "LOOK", 0.1)
    cluster.scale(0)
    with pytest.raises(WorkerLost, match="nobody is left"):
        list(results)


def test_workers_that_keep_what_they_computed_are_given_up_when_the_last_is_gone(cluster, monkeypatch):
    cluster.scale(1)
    workers = open_workers("dask", address=cluster.scheduler_address)
    try:
        monkeypatch.setattr(clusters, "NOBODY", 1.0)
        timer = threading.Timer(0.5, cluster.scale, [0])
        timer.start()
        with pytest.raises(WorkerLost, match="nobody is left"):
            workers.map(work.slow_unless_first, [1])
        timer.join()
    finally:
        workers.close()


def test_a_cluster_whose_workers_come_late_is_waited_for(cluster):
    timer = threading.Timer(1.0, cluster.scale, [2])
    timer.start()
    workers = open_workers("dask", address=cluster.scheduler_address)
    try:
        assert workers.map(work.fails, [1, 2, 3]) == [1, 4, 9]
    finally:
        workers.close()
        timer.join()


def test_a_worker_that_takes_long_to_restart_is_not_given_up_in_a_cluster_started_here(tmp_path):
    blocks = [(seed, 500, str(tmp_path), 3) for seed in range(6)]
    expected = merge_all(map_blocks(work.block_moments, [(*block[:3], None) for block in blocks], engine="serial"))
    name = "distributed.deploy.lost-worker-timeout"
    with dask.config.set({name: "1ms"}):  # by then no process has been started again
        killed = merge_all(map_blocks(work.block_moments, blocks, engine="dask", workers=1))
        assert dask.config.get(name) == "1ms"
    assert (tmp_path / "died-3").exists()
    assert killed.same_bits(expected)


@pytest.mark.parametrize("engine", ["serial", "local", "dask"])
def test_a_function_that_raises_timeout_error_ends_the_run_with_it(engine):
    with pytest.raises(TimeoutError, match="the disk is slow"):
        list(map_blocks(work.times_out, range(3), engine=engine, workers=1))
    workers = open_workers(engine, workers=1)
    try:
        with pytest.raises(TimeoutError, match="the disk is slow"):
            workers.map(work.times_out, range(3))
    finally:
        workers.close()


@pytest.mark.parametrize(
    ("own", "error", "words"),
    [
        (ZeroDivisionError("its own"), ZeroDivisionError, "its own"),
        (
            distributed.KilledWorker("block", SimpleNamespace(address="tcp://127.0.0.1:1"), 3),
            WorkerLost,
            "again and again",
        ),
    ],
    ids=["its own", "killed"],
)
def test_an_error_that_comes_when_the_waiting_ends_is_what_it_is(own, error, words):
    class Future:
        status = "error"

        def result(self, timeout=None):
            raise distributed.TimeoutError if timeout else own

    with pytest.raises(error, match=words):
        clusters.dask_result(Future(), 0.1)
