"""Calibrations on real workers that are killed by SIGKILL on the way, one of them or the run as a whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.calibrate import nets

METHODS = ["population", "precise", "average", "moving"]
HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def rows(tmp_path):
    np.save(tmp_path / "x.npy", nets.data(n=300))
    return str(tmp_path / "x.npy")


SCRIPT = """
import contextlib, json, sys
from bnport.calibrate import shards
from bnport.calibrate.run import calibrate
from tests.calibrate import nets, work


@contextlib.contextmanager
def cluster(engine):
    if engine == "dask":
        import dask, distributed
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"})  # this machine may be busy
        with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
            yield client
    elif engine == "ray":
        import ray
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield None
        ray.shutdown()
    else:
        yield None


if __name__ == "__main__":
    engine, path = sys.argv[1:3]
    model = nets.branches()
    before = model.get_weights()
    found = {}
    with cluster(engine) as address:
        for kind in ("alone", "killed"):
            for method in ("population", "precise", "average", "moving"):
                model.set_weights(before)
                if kind == "killed":
                    shards.work, shards.work_once = work.shard_whose_worker_dies, work.part_whose_worker_dies
                options = {} if kind == "alone" else {"engine": engine, "workers": 2, "address": address}
                result = calibrate(model, path, batch_size=16, method=method, **options)
                found[f"{method} {kind}"] = [w.tobytes().hex() for w in model.get_weights()]
                found[f"{method} {kind} notes"] = result.notes
    print(json.dumps(found))
"""


def environment(tmp_path):
    return {
        **os.environ,
        "KERAS_BACKEND": "torch",  # no compilation: the cheapest for one short run in every worker
        "OMP_NUM_THREADS": "1",  # Dask and Ray set it in their workers, and torch's convolutions depend on it
        "CANARY": str(tmp_path / "died"),
        "PYTHONPATH": HERE,
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "dask", "ray"])
def test_two_processes_one_of_them_killed_on_the_way_give_the_bits_of_one_process(engine, rows, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), engine, rows],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for method in METHODS:
        assert os.path.exists(tmp_path / f"died-{method}")
        assert found[f"{method} killed"] == found[f"{method} alone"]
    assert any("worker had died" in note for note in found["population killed notes"])


KILLED = """
import multiprocessing, os, signal, sys
from bnport.calibrate import checkpoint, run
from bnport.cli import main

if __name__ == "__main__":
    saves, save = [], checkpoint.Checkpoint.save

    def save_and_die(self, state):
        save(self, state)
        saves.append(state)
        if len(saves) == 2:
            pids = [str(child.pid) for child in multiprocessing.active_children()]
            open(os.environ["CANARY"], "w").write(" ".join(pids))
            os.kill(os.getpid(), signal.SIGKILL)

    run.SAVE_EVERY = 0.0
    if not os.path.exists(os.environ["CANARY"]):
        checkpoint.Checkpoint.save = save_and_die
    sys.exit(main(sys.argv[1:]))
"""


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "method"), [("local", "population"), ("local", "moving"), ("dask", "population")])
def test_a_run_that_was_killed_as_a_whole_resumes_to_the_same_file_and_leaves_no_worker_behind(
    engine, method, rows, tmp_path
):
    nets.branches().save(tmp_path / "model.keras")
    (tmp_path / "script.py").write_text(KILLED)

    def command(out, *more):
        arguments = [str(tmp_path / "model.keras"), "--data", rows, "--batch-size", "16", "--method", method, "-o", out]
        return subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), "calibrate", *arguments, *more],
            env=environment(tmp_path), capture_output=True, text=True, timeout=300, cwd=tmp_path,
        )  # fmt: skip

    shared = ["--engine", engine, "--workers", "2", "--resume", "run.npz"]
    killed = command("many.keras", *shared)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "many.keras").exists()
    assert (tmp_path / "run.npz").exists()
    pids = (tmp_path / "died").read_text().split()
    assert len(pids) >= 2
    deadline = time.monotonic() + 60
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(lives, pids))
    resumed = command("many.keras", *shared)
    assert not resumed.returncode, resumed.stderr[-2000:]
    assert "resumed" in resumed.stdout
    assert not command("one.keras").returncode
    assert (tmp_path / "many.keras").read_bytes() == (tmp_path / "one.keras").read_bytes()
