"""Runs that survive: kills, errors, full disks, broken files, losses that become NaN, early stopping."""

import errno
import hashlib
import io
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

import keras_taylor

pytestmark = pytest.mark.sweep(6)
STATE = re.compile(r"round-(\d+)-[0-9a-f]+\.npz")  # the name of a file that holds a state


def tiny_model(units=6, weight_seed=0, activation="relu", compiled=True, **compile_arguments):
    """Names and weights are the same at each call, as if it were loaded from a file."""
    layers = [
        keras.Input((8,)),
        keras.layers.Dense(units, activation=activation, name="first"),
        keras.layers.BatchNormalization(momentum=0.8, name="norm"),
        keras.layers.Dropout(0.2, name="drop"),
        keras.layers.Dense(10, activation="relu", name="second"),
        keras.layers.Dense(3, name="head"),
    ]
    model = keras.Sequential(layers, name="tiny")
    generator = np.random.default_rng(weight_seed)
    for layer in (model.get_layer(name) for name in ("first", "second", "head")):
        layer.kernel.assign(generator.normal(0, 0.5, layer.kernel.shape))
    if compiled:
        arguments = {
            "optimizer": keras.optimizers.Adam(0.01),
            "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "metrics": ["accuracy"],
        }
        model.compile(**{**arguments, **compile_arguments})
    return model


def data(num=40):
    generator = np.random.default_rng(1)
    y = np.arange(num) % 3
    return (generator.normal(0, 1, (num, 8)) + y[:, None]).astype("float32"), y


def run(model=None, ds=None, **arguments):
    """Model and `Info` of three rounds of two epochs each; no scoring pass, which takes long to compile."""
    arguments = {"goal": 0.45, "increment": 0.15, "epochs": 2, "batch_size": 16, **arguments}
    arguments = {"criterion": "magnitude", "verbose": 0, "return_info": True, **arguments}
    arguments = {"learning_rate": keras_taylor.FineTuning(every_round=True), **arguments}
    return keras_taylor.compress(model or tiny_model(), ds or data(), **arguments)


class Fail(keras.callbacks.Callback):
    """Raises in the last epoch of a round."""

    def __init__(self, in_round=2):
        super().__init__()
        self._rounds_to_come = in_round

    def on_train_begin(self, logs=None):
        self._rounds_to_come -= 1

    def on_epoch_end(self, epoch, logs=None):
        if self._rounds_to_come == 0 and epoch == 1:
            raise RuntimeError("out of memory")


class Fits(keras.callbacks.Callback):
    """Counts the rounds that are fine-tuned."""

    count = 0

    def on_train_begin(self, logs=None):
        self.count += 1


def interrupted(directory, in_round=2, **arguments):
    with pytest.raises(RuntimeError, match="out of memory"):
        run(callbacks=[Fail(in_round)], backup_dir=directory, **arguments)


def states(directory):
    """Names of the files in it, in order."""
    return sorted(path.name for path in pathlib.Path(directory).iterdir())


def rounds_in(directory):
    return [int(STATE.fullmatch(name).group(1)) for name in states(directory)]


def values(variables):
    return [np.array(keras.ops.convert_to_numpy(keras.ops.cast(v, "float32"))) for v in variables]


def assert_same(first, second):
    """Two results of `run` are equal to the bit, the times that rounds took excepted."""
    (model, info), (other, other_info) = first, second
    lasting = [[v for v in m.variables if v.path not in _paths_of_metrics(m)] for m in (model, other)]
    for a, b in zip(*map(values, lasting), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(values(model.optimizer.variables), values(other.optimizer.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    assert _without_times(info) == _without_times(other_info)


def _paths_of_metrics(model):
    return {v.path for v in model.metrics_variables}


def _without_times(info):
    content = json.loads(info.to_json())
    for one in content["rounds"]:
        del one["seconds"]
    # the runs differ in callbacks that fail, which the command shows at its end
    content["command"] = content["command"].split("callbacks=")[0].rstrip(", )")
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, from seed 7 on."""
    directory = tmp_path_factory.mktemp("whole")
    keras.utils.set_random_seed(7)
    return directory, run(backup_dir=directory)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The directory of a run, from seed 7 on, that an error ended in round 3."""
    directory = tmp_path_factory.mktemp("started")
    keras.utils.set_random_seed(7)
    interrupted(directory, in_round=3)
    return directory


@pytest.fixture
def copied(started, tmp_path):
    return shutil.copytree(started, tmp_path / "copy")


# --- going on -------------------------------------------------------------------------------


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, capsys):
    keras.utils.set_random_seed(7)
    whole = run(backup_dir=tmp_path / "whole", criterion="taylor")
    keras.utils.set_random_seed(7)
    interrupted(tmp_path / "broken", criterion="taylor")
    keras.utils.set_random_seed(123)  # another process starts from other seeds
    fits = Fits()
    resumed = run(backup_dir=tmp_path / "broken", criterion="taylor", callbacks=[fits], verbose=2)
    assert fits.count == 2
    assert [r.number for r in resumed[1].rounds] == [1, 2, 3]
    assert re.search(r"^resumed after round 1 of 3 from .*round-0001-[0-9a-f]{16}\.npz$", printed(capsys))
    assert_same(whole, resumed)
    assert resumed[0].count_params() <= 0.55 * tiny_model().count_params()


def printed(capsys):
    lines = capsys.readouterr().out.splitlines()
    return next((line for line in lines if line.startswith("resumed")), "nothing was resumed")


def test_resumed_before_the_last_round(whole, copied):
    keras.utils.set_random_seed(123)
    assert_same(whole[1], run(backup_dir=copied))


@pytest.mark.slow
def test_two_newest_states_are_kept_and_of_a_finished_run_one(tmp_path):
    interrupted(tmp_path, in_round=3, increment=0.1)
    assert rounds_in(tmp_path) == [1, 2]
    interrupted(tmp_path, in_round=2, increment=0.1)  # of this call, the fourth of the run
    assert rounds_in(tmp_path) == [2, 3]
    run(increment=0.1, backup_dir=tmp_path)
    assert rounds_in(tmp_path) == [5]


def test_a_finished_run_returns_at_once(whole, capsys):
    directory, whole = whole
    names, fits = states(directory), Fits()
    again = run(backup_dir=str(directory), callbacks=[fits], verbose=2)
    assert fits.count == 0 and states(directory) == names
    assert "resumed after round 3 of 3 from " in printed(capsys)
    assert_same(whole, again)
    assert again[1].rounds == whole[1].rounds  # and the times of then
    assert again[1].stop_reason == "goal reached"
    assert again[0].compiled and np.isfinite(again[0].evaluate(*data(), verbose=0)).all()


def test_killed_between_the_last_state_and_the_removal_of_the_others(copied, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(keras_taylor.loop.backups.Backups, "_remove_all_but", lambda self, paths: None)
        run(backup_dir=copied)
    assert rounds_in(copied) == [1, 2, 3]
    fits = Fits()
    run(backup_dir=copied, callbacks=[fits])
    assert fits.count == 0 and rounds_in(copied) == [3]


def test_the_directory_is_made_and_other_files_in_it_stay(tmp_path):
    interrupted(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "notes.txt").write_text("mine")
    run(backup_dir=tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "notes.txt").read_text() == "mine"
    assert len(states(tmp_path / "a" / "b")) == 2


def test_without_a_directory_nothing_is_seeded_or_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keras.utils, "set_random_seed", lambda seed: pytest.fail("seeded"))
    run()
    assert states(tmp_path) == []


def test_no_fine_tuning(tmp_path):
    whole = run(epochs=0, backup_dir=tmp_path)
    assert_same(whole, run(epochs=0, backup_dir=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "mixed_float16"])
def test_other_precisions(tmp_path, policy):
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(7)
        whole = run(backup_dir=tmp_path)
        again = run(backup_dir=tmp_path)
    finally:
        keras.config.set_dtype_policy("float32")
    assert whole[0].get_layer("first").kernel.dtype == again[0].get_layer("first").kernel.dtype
    assert_same(whole, again)


@pytest.mark.slow
def test_functional_model_with_a_branch_and_an_input_without_name(tmp_path):
    def model():
        inputs = keras.Input((8,))
        x = keras.layers.Dense(8, activation="relu", name="a")(inputs)
        x, y = (keras.layers.Dense(12, name=name)(x) for name in ("b", "c"))
        x = keras.layers.Add(name="sum")([x, y])
        made = keras.Model(inputs, keras.layers.Dense(3, name="d")(x))
        for number, weight in enumerate(made.weights):
            weight.assign(np.random.default_rng(number).normal(0, 0.3, weight.shape))
        made.compile(keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return made

    interrupted(tmp_path, model=model())
    fits = Fits()
    run(model(), backup_dir=tmp_path, callbacks=[fits])
    assert fits.count == 2


def test_a_model_saved_and_loaded_is_the_same(tmp_path):
    model = tiny_model()
    model.save(tmp_path / "model.keras")
    interrupted(tmp_path / "states", model=model)
    fits = Fits()
    run(keras.models.load_model(tmp_path / "model.keras"), backup_dir=tmp_path / "states", callbacks=[fits])
    assert fits.count == 2


# --- files that are broken ------------------------------------------------------------------


def newest(directory):
    return pathlib.Path(directory) / states(directory)[-1]


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path):
    path.write_bytes(b"")


def foreign(path):
    """An archive whose name fits its content, but not one of these."""
    path.unlink()
    with open(path.parent / "other", "wb") as file:
        np.savez(file, a=np.zeros(3))
    content = (path.parent / "other").read_bytes()
    digest = keras_taylor.loop.backups.hashlib.sha256(content).hexdigest()[:16]
    os.rename(path.parent / "other", path.parent / f"round-0002-{digest}.npz")


CHANGED = "its content is not what was written"


@pytest.mark.parametrize(
    ("broken", "why"), [(flipped, CHANGED), (truncated, CHANGED), (emptied, CHANGED), (foreign, ".*about.*")]
)
def test_of_a_broken_state_the_one_before_is_used(whole, copied, broken, why):
    broken(newest(copied))
    name = re.escape(str(newest(copied)))
    with pytest.warns(UserWarning, match=rf"'{name}' cannot be used \({why}\); the one before is used\.$"):
        resumed = run(backup_dir=copied)
    assert_same(whole[1], resumed)
    assert rounds_in(copied) == [3]


def test_with_no_state_left_the_run_starts_anew(copied):
    for path in copied.iterdir():
        truncated(path)
    words = r"round-0001-.* cannot be used .*; there is no other, so the run starts from the beginning\.$"
    with (
        pytest.warns(UserWarning, match=words),
        pytest.warns(UserWarning, match=r"round-0002-.*; the one before is used\.$"),
    ):
        interrupted(copied, in_round=2)
    assert rounds_in(copied) == [1]


def test_what_a_killed_run_left_half_written_is_removed(copied):
    (copied / "unfinished-12345.tmp").write_bytes(b"half of a state")
    interrupted(copied, in_round=1)
    assert rounds_in(copied) == [1, 2]


def foreign_state(content):
    """A file whose name says that it is a state and that this is its content."""
    return f"round-0002-{hashlib.sha256(content).hexdigest()[:16]}.npz"


def archive(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def about(**changes):
    values = {"format": 1, "call": {}, "plans": [], "seed": 1, **changes}
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


FOREIGN = {
    "empty": b"",
    "text": b"not an archive",
    "pickle": archive(about=np.array([{}], object)),
    "number": archive(about=np.float32(1)),
    "list": archive(about=np.frombuffer(b"[1]", np.uint8)),
    "format": archive(about=about(format=[1])),
    "seed": archive(about=about(seed="x", variables=0, optimizer=0)),
    "call": archive(about=about(call=None, variables=0, optimizer=0)),
    "plans": archive(about=about(plans=3, variables=0, optimizer=0)),
}


@pytest.mark.once
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_with_the_name_of_a_state_is_passed_over(tmp_path, name):
    (tmp_path / foreign_state(FOREIGN[name])).write_bytes(FOREIGN[name])
    with pytest.warns(UserWarning, match="cannot be used .*; there is no other, so the run starts"):
        _, info = run(backup_dir=tmp_path, epochs=0, goal=0.15)
    assert info.stop_reason == "goal reached"


HOLDER = """
import pathlib, sys
from keras_taylor.support.files import exclusive
with exclusive(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.once
@pytest.mark.skipif(sys.platform == "win32", reason="no locks of directories")
@pytest.mark.slow
def test_two_processes_at_once_in_one_directory(copied):
    """The second one is refused, and leaves alone what the first one writes."""
    (copied / "unfinished-12345.tmp").write_bytes(b"half of a state")
    names = states(copied)
    command = [sys.executable, "-c", HOLDER, str(copied)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            ValueError, match=r"another process runs `compress` with it now.*Received: backup_dir="
        ):
            run(backup_dir=copied)
        assert states(copied) == names
        other.kill()
    assert run(backup_dir=copied)[1].stop_reason == "goal reached"
    assert run(backup_dir=copied)[1].stop_reason == "goal reached"  # nothing is held after a run


# --- disks that are full --------------------------------------------------------------------


def full_disk(monkeypatch, times):
    """The first writes fail."""
    fsync, left = os.fsync, [times]

    def failing(handle):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)


def test_a_full_disk_stops_nothing(copied, monkeypatch):
    full_disk(monkeypatch, times=1)
    with pytest.warns(
        UserWarning,
        match=r"The state after round 3 could not be written \(\[Errno 28\] No space left on device\); "
        r"the state of round 2 stays\. The run continues\. .*Received: backup_dir='",
    ):
        _, info = run(backup_dir=copied)
    assert info.stop_reason == "goal reached" and rounds_in(copied) == [2]


def test_a_disk_that_was_full_for_the_first_round_only(tmp_path, monkeypatch):
    full_disk(monkeypatch, times=1)
    with pytest.warns(UserWarning, match=r"after round 1 could not be written .*; there is none yet\. "):
        _, info = run(backup_dir=tmp_path)
    assert info.stop_reason == "goal reached" and rounds_in(tmp_path) == [3]


# --- errors ---------------------------------------------------------------------------------


def test_an_error_in_a_round_says_what_is_kept(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        run(callbacks=[Fail()], backup_dir=tmp_path)
    assert str(caught.value) == "out of memory"
    assert caught.value.__notes__ == [
        "`compress` had completed 1 of 3 rounds; the same call, with the same `backup_dir`, "
        "goes on from there."
    ]
    with pytest.raises(RuntimeError) as caught:
        run(callbacks=[Fail()])
    (note,) = caught.value.__notes__
    assert note.startswith("`compress` had completed 1 of 3 rounds. With `backup_dir` they would be kept")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"goal": 0.5}, r"goal: \{'params': 0\.45\} there, \{'params': 0\.5\} here; schedule: \[.*\] here"),
        ({"goal": {"flops": 0.45}}, r"goal: \{'params': 0\.45\} there, \{'flops': 0\.45\} here"),
        ({"increment": 0.225}, r"schedule: \[0\.15, 0\.3, 0\.45\] there, \[0\.225, 0\.45\] here"),
        ({"criterion": "taylor"}, "criterion: 'magnitude' there, 'taylor' here"),
        ({"include": ["first", "second"]}, r"include: None there, \['first', 'second'\] here"),
        ({"exclude": "first"}, r"exclude: \[\] there, \['first'\] here"),
        ({"selection": keras_taylor.Selection(round_to=2)}, "round_to: 1 there, 2 here"),
        ({"selection": keras_taylor.Selection(min_channels=2)}, "min_channels: 1 there, 2 here"),
        (
            {"criterion": keras_taylor.Scoring("magnitude", num_examples=32)},
            "score_examples: 36 there, 32 here",
        ),
        ({"epochs": 3, "batch_size": 8}, "epochs: 2 there, 3 here; batch_size: 16 there, 8 here"),
        (
            {"validation_split": 0.1},
            "validation_split: None there, 0.1 here",
        ),
        ({"model": {"weight_seed": 1}}, "weights of the model differ"),
        ({"model": {"activation": "tanh"}}, "architecture of the model differs"),
        ({"model": {"units": 7}}, "architecture of the model differs; weights of the model differ"),
    ],
)
def test_the_state_of_another_call_is_refused(started, changes, words):
    changes = {**changes, "model": tiny_model(**changes.get("model", {}))}
    before = states(started)
    with pytest.raises(
        ValueError,
        match=rf"^`backup_dir` holds the state of another call: {words}.*\. Pass another directory, "
        rf"or delete the files round-\*\.npz in it\. Received: backup_dir='{re.escape(str(started))}'$",
    ):
        run(**changes, callbacks=[Fail(1)], backup_dir=started)
    assert states(started) == before


def test_other_names_of_layers_are_refused_with_the_way_out(started):
    model = tiny_model()
    model.get_layer("second").name = "second_1"
    words = r": names of layers: 'second' there, 'second_1' here \(call `keras\.utils\.clear_session\(\)` "
    with pytest.raises(ValueError, match=words):
        run(model, backup_dir=started)


def test_another_number_of_examples_is_refused(started):
    with pytest.raises(ValueError, match="examples: 40 there, 39 here"):
        run(ds=data(39), backup_dir=started)


def test_another_learning_rate_is_not_another_call(started):
    """So that a run that diverged can go on with a lower one."""
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tiny_model(optimizer=keras.optimizers.Adam(1e-4)), callbacks=[Fail(1)], backup_dir=started)


@pytest.mark.parametrize("name", ["SGD", "Adamax"])  # the state of Adamax has the shapes of that of Adam
def test_another_optimizer_starts_anew(copied, name):
    with pytest.warns(
        UserWarning,
        match=r"is not the one whose state is in '.*round-0002-.*'; it starts from the beginning\.$",
    ):
        _, info = run(tiny_model(optimizer=getattr(keras.optimizers, name)(0.01)), backup_dir=copied)
    assert info.stop_reason == "goal reached"


def test_a_directory_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    words = r"^`backup_dir` cannot be written to \(FileExistsError: .*Expected the path of a directory.*"
    with pytest.raises(ValueError, match=words + r"Received: backup_dir='.*file'$"):
        run(backup_dir=str(path), callbacks=[Fail(1)])
    with pytest.raises(
        ValueError, match=r"cannot be written to \(NotADirectoryError: .*Received: backup_dir="
    ):
        run(backup_dir=path / "below", callbacks=[Fail(1)])
    assert path.read_text() == "mine"


def test_a_directory_that_is_no_path():
    with pytest.raises(ValueError, match=r"cannot be written to \(TypeError: .*Received: backup_dir=3$"):
        run(backup_dir=3)


def test_a_directory_that_may_not_be_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to \(PermissionError: .*Received: backup_dir="):
        run(backup_dir=tmp_path, callbacks=[Fail(1)])


def test_a_refused_call_makes_no_directory(tmp_path):
    with pytest.raises(ValueError, match="The goal is out of reach"):
        run(goal=0.999, backup_dir=tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_info_goes_to_json_and_comes_back():
    _, info = run()
    again = keras_taylor.Info.from_json(info.to_json())
    assert again == info and str(again) == str(info)
    with pytest.raises(
        ValueError, match=r"This is not an `Info` that `Info\.to_json` wrote .*Received: text='\{\}'$"
    ):
        keras_taylor.Info.from_json("{}")


# --- losses that become NaN -----------------------------------------------------------------


class Spoil(keras.callbacks.Callback):
    """From a step of a round on, weights are NaN; `at_end`: only after the last step."""

    def __init__(self, in_round, step=1, value=np.nan, at_end=False):
        super().__init__()
        self._rounds_to_come, self._step, self._value, self._at_end = in_round, step, value, at_end
        self.steps = 0

    def on_train_begin(self, logs=None):
        self._rounds_to_come -= 1
        self.steps = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.steps += 1
        if self._rounds_to_come == 0 and self.steps == self._step and not self._at_end:
            self._spoil()

    def on_epoch_end(self, epoch, logs=None):
        if self._rounds_to_come == 0 and epoch == 1 and self._at_end:
            self._spoil()

    def _spoil(self):
        bias = self.model.get_layer("head").bias
        bias.assign(np.full(bias.shape, self._value))


def diverged(words, **arguments):
    with pytest.warns(UserWarning, match=words):
        model, info = run(
            learning_rate=keras_taylor.FineTuning(keep_best=False, every_round=True), **arguments
        )
    assert re.fullmatch(words, info.stop_reason)
    return model, info


def test_a_first_round_that_diverges_gives_an_unpruned_copy(capsys):
    model = tiny_model()
    before = values(model.weights)
    words = (
        r"the loss became NaN at fine-tuning step 3 in round 1: lower the learning rate \(0\.001 now\); "
        r"the result is an unpruned copy of the model"
    )
    spoil = Spoil(in_round=1, step=3)
    small, info = diverged(words, model=model, callbacks=[spoil], verbose=2)
    assert spoil.steps == 3  # of six
    assert small is not model and small.compiled and type(small) is keras.Sequential
    for a, b in zip(before, values(small.weights), strict=True):
        np.testing.assert_array_equal(a, b)
    assert small.optimizer is not model.optimizer and isinstance(small.optimizer, keras.optimizers.Adam)
    assert info.rounds == [] and info.after == info.before and info.pruned_layers == []
    assert re.search(rf"^stopped: {words}$", capsys.readouterr().out, re.MULTILINE)
    assert np.isfinite(small.evaluate(*data(), verbose=0)).all()


def test_a_later_round_that_diverges_gives_the_model_of_the_one_before(tmp_path):
    words = (
        r"the loss became NaN at fine-tuning step 5 in round 2: lower the learning rate \(0\.001 now\); "
        r"the result is that of round 1"
    )
    small, info = diverged(words, callbacks=[Spoil(in_round=2, step=5)], backup_dir=tmp_path)
    assert [r.number for r in info.rounds] == [1]
    assert info.after["params"] == info.rounds[0].params == small.count_params()
    assert rounds_in(tmp_path) == [1]
    good = np.load(newest(tmp_path))
    for number, value in enumerate(values(small.weights)):
        assert any(np.array_equal(value, good[k]) for k in good.files if k.startswith("variables-")), number
    last = keras_taylor.FineTuning(keep_best=False, every_round=True)
    _, info = run(backup_dir=tmp_path, learning_rate=last)  # as with a rate that does not diverge
    assert info.stop_reason == "goal reached" and len(info.rounds) == 3


def test_a_loss_that_becomes_infinite():
    words = r"the loss became infinite at fine-tuning step 2 in round 1: .*"
    sums = lambda y, x: keras.ops.sum(x, axis=-1)  # noqa: E731
    diverged(words, callbacks=[Spoil(1, step=2, value=np.inf)], model=tiny_model(loss=sums), goal=0.2)


def test_weights_that_the_last_step_spoils():
    words = r"the weights '.*bias' became NaN by the end of fine-tuning in round 2: .* is that of round 1"
    small, info = diverged(words, callbacks=[Spoil(in_round=2, at_end=True)])
    assert len(info.rounds) == 1 and np.isfinite(small.evaluate(*data(), verbose=0)).all()


def test_a_learning_rate_that_is_far_too_high():
    words = r"the loss became (NaN|infinite) at fine-tuning step \d in round 1: lower .*\(1e\+29 now\); .*"
    model = tiny_model(optimizer=keras.optimizers.SGD(1e30))
    before = values(model.weights)
    diverged(words, model=model)
    for a, b in zip(before, values(model.weights), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_weight_that_was_infinite_before_is_no_divergence():
    class Offset(keras.layers.Layer):
        def build(self, shape):
            self.limit = self.add_weight(shape=(), initializer="zeros", trainable=False, name="limit")

        def call(self, x):
            return keras.ops.minimum(x, self.limit)

    inputs = keras.Input((8,))
    x = keras.layers.Dense(8, activation="relu", name="a")(inputs)
    layer = Offset(name="offset")
    model = keras.Model(inputs, keras.layers.Dense(3, name="b")(layer(keras.layers.Dense(4, name="c")(x))))
    layer.limit.assign(np.inf)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    _, info = run(model, goal=0.2)
    assert info.stop_reason == "goal reached"


# --- callbacks that stop --------------------------------------------------------------------


class Recorded(keras.callbacks.EarlyStopping):
    """`EarlyStopping` that writes down what each fit starts with, and what it goes back to."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.at_start, self.restored = [], []

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.at_start.append((self.best, self.best_weights, self.wait, self.model.stop_training))

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        self.restored.append((self.best_epoch, [w.shape for w in self.best_weights or []]))


@pytest.mark.parametrize("restore", [False, True])
def test_early_stopping_ends_a_round_and_not_the_run(restore):
    # the loss falls in every round's first epochs, never by so much
    stop = Recorded(monitor="loss", min_delta=100.0, patience=2, restore_best_weights=restore)
    last = keras_taylor.FineTuning(keep_best=False, every_round=True)
    small, info = run(epochs=6, callbacks=[stop], learning_rate=last)
    assert [len(r.history["loss"]) for r in info.rounds] == [3, 3, 3]
    assert info.stop_reason == "goal reached"
    assert stop.at_start == [(None, None, 0, False)] * 3
    if restore:
        assert [epoch for epoch, _ in stop.restored] == [0, 0, 0]
        assert stop.restored[-1][1] == [tuple(w.shape) for w in small.weights]
        for a, b in zip(stop.best_weights, values(small.weights), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_callback_that_stops_in_an_epoch_ends_the_round():
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: setattr(stop.model, "stop_training", True)
    )
    _, info = run(epochs=4, callbacks=[stop])
    assert [len(r.step_losses) for r in info.rounds] == [1, 1, 1]
    assert info.stop_reason == "goal reached"


# --- kills ----------------------------------------------------------------------------------

SCRIPT = """
import sys, time
import conftest  # compiles as the tests' own process does: numbers are compared to the bit
import keras
from test_survival import run
class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.05)
keras.utils.set_random_seed(int(sys.argv[2]))
print("ready", flush=True)
model, info = run(backup_dir=sys.argv[1], callbacks=[Slow()])
model.save_weights(sys.argv[1] + "/done.weights.h5")
"""


def start(directory, seed):
    folder = pathlib.Path(__file__).parent
    path = os.pathsep.join([*map(str, [folder, *folder.parents[:2]]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), str(seed)],
        env={**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": keras.backend.backend()},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_a_process_that_is_killed_three_times(tmp_path, whole):
    """At random moments: a resumed run equals one that was never killed, also after kills."""
    generator = random.Random()  # not the seed of the tests: other moments each time
    for _ in range(3):
        process = start(tmp_path, seed=7)
        time.sleep(generator.uniform(0.1, 2))
        process.kill()
        process.wait()
        process.stdout.close()
    process = start(tmp_path, seed=7)
    assert process.wait(300) == 0
    process.stdout.close()
    small, info = run(backup_dir=tmp_path)
    assert info.stop_reason == "goal reached" and len(info.rounds) == 3
    assert rounds_in_states(tmp_path) == [3]
    for a, b in zip(values(whole[1][0].weights), values(small.weights), strict=True):
        np.testing.assert_array_equal(a, b)


def rounds_in_states(directory):
    return [int(m.group(1)) for m in map(STATE.fullmatch, states(directory)) if m]
