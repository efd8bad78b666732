"""Several devices give what one gives: scores, plans, weights, and runs that survive a worker."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import distributed_job
import numpy as np
import pytest
from helpers import BACKEND

from keras_taylor.support import replicas

FOLDER = pathlib.Path(__file__).parent
pytestmark = pytest.mark.slow
only = {
    name: pytest.mark.skipif(name != BACKEND, reason=f"is about {engine}")
    for name, engine in {
        "jax": "keras.distribution",
        "tensorflow": "tf.distribute",
        "torch": "DistributedDataParallel",
    }.items()
}
# How many examples do not go round the devices of a job.
TOO_MANY = {"jax": 43, "tensorflow": 41}
# What jobs said that were started once more, for the summary.
SEGMENTATION_FAULTS = []


def free_ports(number=2):
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ",".join(ports)


def launch(engine, tasks, folder, **environment):
    """Runs a job in processes of its own; returns their exit codes and what they said."""
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "PORTS": free_ports(), **environment}
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])
    job = [str(FOLDER / "distributed_job.py"), engine, tasks, str(folder)]
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", *job]
    started = [
        subprocess.Popen(
            command,
            env={**environment, "PROCESS": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2 if engine == "processes" else 1)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


def found_by(engine, tasks, folder, **environment):
    """What each process of a job found, by task."""
    codes, said = launch(engine, tasks, folder, **environment)
    if -signal.SIGSEGV in codes:  # seen once with two replicas on TensorFlow, cause unknown
        done = sorted(path.name for path in folder.iterdir())
        SEGMENTATION_FAULTS.append(f"{engine} after {done}:\n{said[0]}")
        codes, said = launch(engine, tasks, folder, **environment)
    assert not any(codes), "\n".join(said)
    return {
        task: [dict(np.load(folder / f"{task}_{process}.npz")) for process in range(len(codes))]
        for task in tasks.split("+")
    }


class Alone:
    """What the tasks find on one device, in this process, each run once."""

    def __init__(self, folder):
        self._folder, self._found = folder, {}

    def __call__(self, task, **environment):
        key = (task, *environment.items())
        if key not in self._found:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                self._found[key] = distributed_job.TASKS[task](
                    distributed_job.Job("single", BACKEND, self._folder)
                )
        return self._found[key]


@pytest.fixture(scope="module", autouse=True)
def told_faults(request):
    """Says at the end which jobs had a segmentation fault."""
    yield
    for said in SEGMENTATION_FAULTS:
        request.config.pluginmanager.get_plugin("terminalreporter").write_line(
            f"\nstarted once more, since it had a segmentation fault: {said}"
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return Alone(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """Four JAX devices, or two replicas of MirroredStrategy, in one process."""
    folder, number = tmp_path_factory.mktemp("devices"), TOO_MANY[BACKEND]
    return found_by("devices", "scores+training+compress+refused", folder, NUM_EXAMPLES=str(number))


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Two JAX processes of two devices, or two workers of MultiWorkerMirroredStrategy."""
    tasks = {"jax": "scores+training", "tensorflow": "loop+refused", "torch": "ddp"}[BACKEND]
    return found_by("processes", tasks, tmp_path_factory.mktemp("processes"))


def assert_equal(found, expected, tolerance=1e-4):
    """All arrays within a relative tolerance of the largest value, all texts the same."""
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        if value.dtype.kind == "U":
            assert str(found[key]) == str(value), key
        else:
            scale = np.abs(value).max() if value.size else 0
            np.testing.assert_allclose(found[key], value, rtol=0, atol=tolerance * scale, err_msg=key)


# --- one process ----------------------------------------------------------------------------

in_one_process = pytest.mark.skipif(BACKEND == "torch", reason="Keras' trainer for PyTorch knows one device")


@in_one_process
@pytest.mark.parametrize("task", ["scores", "training", "compress"])
def test_several_devices_give_what_one_gives(task, devices, alone):
    assert_equal(devices[task][0], alone(task))


@in_one_process
def test_a_whole_run_reaches_the_goal(devices):
    found = devices["compress"][0]
    assert str(found["stop"]) == "goal reached" and len(json.loads(str(found["rounds"]))) == 2


@in_one_process
def test_batches_that_do_not_go_round_are_refused_before_any_work(devices):
    found, number = devices["refused"][0], TOO_MANY[BACKEND]
    size, parts, wanted = (
        (3, 4, "a multiple of 4 examples")
        if BACKEND == "jax"
        else (1, 2, "a multiple of 2 examples, or enough for the last device")
    )
    for call, what in (("score", "ds"), ("compress", "ds"), ("validation", "validation_data")):
        assert str(found[call]) == (
            f"A batch of {size} examples cannot be spread over {parts} devices. Expected in each batch, the "
            f"last one too, {wanted}: pass another `batch_size`, or leave out examples. Received: "
            f"{what} of {number} examples in batches of 8"
        )


@only["tensorflow"]
def test_shares_that_are_not_equal(tmp_path, alone):
    """Of the last seven examples four replicas get two, two, two and one."""
    found = found_by("devices", "uneven", tmp_path, NUM_DEVICES="4", NUM_EXAMPLES="47")
    assert_equal(found["uneven"][0], alone("uneven", NUM_EXAMPLES="47"))


@only["tensorflow"]
@pytest.mark.parametrize(
    ("size", "goes"), [(3, False), (4, True), (5, False), (6, False), (7, True), (9, False)]
)
def test_which_batches_leave_a_device_without_examples(size, goes, monkeypatch):
    monkeypatch.setattr(replicas, "num_replicas", lambda: 4)
    with (
        contextlib.nullcontext() if goes else pytest.raises(ValueError, match=f"A batch of {size} examples ")
    ):
        replicas.check_batches(16 + size if size < 8 else size, 8 if size < 8 else size)


@only["jax"]
def test_weights_that_are_spread_over_devices_stay_so(tmp_path, alone):
    """ModelParallel: two of a batch, two of a model."""
    found = found_by("sharded", "scores+layouts", tmp_path)
    assert_equal(found["scores"][0], alone("scores"))
    layouts = found["layouts"][0]
    spec = "P(None, None, None, 'model')"
    assert str(layouts["model: first/kernel"]) == f"{spec} (3, 3, 2, 3)"  # on each device
    for stage in ("pruned", "stripped"):
        assert str(layouts[f"{stage}: first/kernel"]) == f"{spec} (3, 3, 2, 2)"
    assert str(layouts["refused"]) == (
        "Weight 'first/kernel' is spread over devices by P(None, None, None, 'model') on {'batch': 2, "
        "'model': 2}, and what the plan leaves of it does not divide by their number. Expected multiples: "
        "make the plan with `round_to`, say, or lay this weight out otherwise in the `LayoutMap`. Received: "
        "plan that leaves the shape (3, 3, 2, 5) of (3, 3, 2, 6)"
    )


# --- several processes ----------------------------------------------------------------------


@only["jax"]
@pytest.mark.parametrize("task", ["scores", "training"])
def test_two_processes_give_what_one_device_gives(task, processes, alone):
    for found in processes[task]:
        assert_equal(found, alone(task))


@only["jax"]
def test_a_worker_that_dies_ends_the_job_and_the_same_call_goes_on(tmp_path, alone):
    codes, said = launch("processes", "survive", tmp_path, DIES="1")
    assert codes[0] not in (0, None) and codes[1] == -9, said  # `launch` waits for five minutes at most
    note = "had completed 1 of 2 rounds; the same call, with the same `backup_dir`, goes on from there."
    assert note in said[0]
    assert [path.name[:10] for path in (tmp_path / "backups_0").iterdir()] == ["round-0001"]
    assert not (tmp_path / "backups_1").exists()  # only the first process writes
    found = found_by("processes", "survive", tmp_path)["survive"]
    assert "resumed after round 1 of 2" in str(found[0].pop("said")) and str(found[1].pop("said")) == ""
    expected = dict(alone("survive"))
    assert "resumed" not in str(expected.pop("said"))
    for one in found:
        assert_equal(one, expected)


@only["tensorflow"]
def test_two_workers_give_what_one_device_gives(processes, alone):
    for found in processes["loop"]:
        assert_equal(found, alone("loop"))


@only["tensorflow"]
def test_what_keras_cannot_fit_is_refused(processes):
    for found in processes["refused"]:
        for call in ("score", "compress"):
            assert re.fullmatch(
                r"Keras' trainer cannot `fit` under MultiWorkerMirroredStrategy .* Received: a model made "
                "under MultiWorkerMirroredStrategy",
                str(found[call]),
            )


@only["torch"]
def test_workers_of_distributed_data_parallel_give_what_one_process_gives(processes, alone):
    for found in processes["ddp"]:
        assert_equal(found, alone("ddp"))
