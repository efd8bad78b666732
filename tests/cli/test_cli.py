"""The command line, as a user types it."""

import functools
import html
import importlib.util
import inspect
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from command_line import COMPRESS, refused
from stripes import small_model, stripes

import keras_taylor
from keras_taylor.cli import commands, model_files
from keras_taylor.cli.options import PruningOptions, parse_goal_texts
from keras_taylor.support.datasets import BATCH_SIZE

pytestmark = pytest.mark.sweep(3)


def test_compress_writes_model_state_and_report(run):
    code, out, _ = run(
        *COMPRESS, "--report", "report.html", "--epochs", "2", "--exclude", "first", "--repair"
    )
    assert code == 0 and "goal reached" in out
    small = keras.models.load_model("small.keras")
    full = keras.models.load_model("model.keras").count_params()
    assert small.count_params() <= 0.6 * full and small.get_layer("first").filters == 8
    info = keras_taylor.Info.from_json(pathlib.Path("small.json").read_text())
    assert info.metrics.keys() == info.test_metrics.keys() == {"before", "after"}
    assert f"accuracy {info.test_metrics['before']['accuracy']:.4g} -> " in out
    assert len(info.rounds) == 2 and len(info.rounds[-1].history["loss"]) == 2 * 8
    page = pathlib.Path("report.html").read_text()
    assert "keras-taylor compress model.keras" in page and "second" in page and "<svg" in page
    assert "Repair in the last round" in page and "accuracy, validation" in page and "accuracy, test" in page
    assert sorted(os.listdir()) == ["data.npz", "model.keras", "report.html", "small.json", "small.keras"]
    code, out, _ = run("report", "small.json")
    assert code == 0 and "removed from" in out and "on the test examples: accuracy " in out
    assert "is not the .json file that `compress` wrote. Try 'small.json'" in refused(
        run, "report", "small.keras"
    )
    code, out, _ = run("report", "small.json", "-o", "again.html")
    assert code == 0 and pathlib.Path("again.html").read_text() == page


@pytest.mark.slow
@pytest.mark.once
def test_several_goals_write_a_model_each(run):
    words = (*COMPRESS[:-1], "20%,0.4", "--goal", "flops=0.1,0.3", "--epochs", "0", "--report", "report.html")
    code, out, _ = run(*words)
    assert code == 0 and "small-1.keras, small.keras, small.json, report.html" in " ".join(out.split())
    full = keras.models.load_model("model.keras").count_params()
    params = [keras.models.load_model(name).count_params() for name in ("small-1.keras", "small.keras")]
    assert 0.6 * full < params[0] <= 0.8 * full and params[1] <= 0.6 * full
    info = keras_taylor.Info.from_json(pathlib.Path("small.json").read_text())
    assert [stop["goal"] for stop in info.stops] == [
        {"params": 0.2, "flops": 0.1},
        {"params": 0.4, "flops": 0.3},
    ]
    assert "What is left at each goal" in pathlib.Path("report.html").read_text()
    os.remove("small.keras")
    assert "'small-1.keras' already exists" in refused(run, *words[:-2])


@pytest.mark.once
def test_a_file_under_its_size_by_words(run):
    code, out, _ = run(*COMPRESS[:-1], "bytes=14KiB", "--epochs", "0", "--json")
    assert code == 0 and json.loads(out)["after"]["bytes"] <= 14 * 1024
    assert run("export", "small.keras", "-o", "small.tflite", "--json", "--max-kib", "14")[0] == 0


@pytest.mark.slow
def test_original_and_result_are_exported_and_measured_together(run):
    code, out, _ = run(*COMPRESS, "--epochs", "0", "--export", "litert-dynamic", "--report", "report.html")
    names = "original-small-litert-dynamic.tflite, small-litert-dynamic.tflite, report.html"
    assert code == 0 and f"written: small.keras, small.json, {names}" in " ".join(out.split())
    info = keras_taylor.Info.from_json(pathlib.Path("small.json").read_text())
    ((before, after),) = info.exported()
    assert before.num_bytes > after.num_bytes > 0 and after.quantize == "dynamic"
    assert before.latency_batch == after.latency_batch == 1
    page = pathlib.Path("report.html").read_text()
    assert "litert dynamic, latency" in page and "small-litert-dynamic.tflite" in page


@pytest.mark.once
def test_integers_outside_are_offered_where_they_save_memory(run):
    layers = [keras.layers.Conv1D(4, 5, strides=4), keras.layers.GlobalAveragePooling1D()]
    sound = keras.Sequential([keras.Input((80, 1)), *layers, keras.layers.Dense(3)])
    sound.compile("sgd", "mse")
    sound.save("sound.keras")
    np.savez("sounds.npz", x=np.random.default_rng(0).normal(size=(40, 80, 1)), y=np.zeros((40, 3)))
    words = ("--format", "litert-int8", "-o", "tiny.tflite", "--force", "--data")
    code, out, _ = run("export", "sound.keras", *words, "sounds.npz")
    (line,) = [line for line in out.splitlines() if "--int8-io" in line]
    offer = (
        r"tiny\.tflite: its tensor arena takes (.*) KiB, or (.*) KiB with `keras-taylor export --int8-io`: .*"
    )
    before, after = map(float, re.fullmatch(offer, line).groups())
    code, out, _ = run("export", "sound.keras", *words, "sounds.npz", "--int8-io")
    assert code == 0 and "--int8-io" not in out and after < before and f"{after} KiB" in out
    code, out, _ = run("export", "model.keras", *words, "data.npz")
    assert code == 0 and "--int8-io" not in out  # its convolutions need more
    words = ("--data", "sounds.npz", "-o", "small.keras", "--epochs", "0", "--increment", "0.3")
    code, out, _ = run("compress", "sound.keras", *words, "--export", "litert-int8", "--export", "litert")
    (line,) = [line for line in out.splitlines() if "--int8-io" in line]
    assert line.startswith("small-litert-int8.tflite: ")


@pytest.mark.once
@pytest.mark.slow
def test_a_file_for_a_microcontroller(run):
    words = ("export", "model.keras", "-o", "tiny.tflite", "--format", "litert-int8", "--data", "data.npz")
    words = (*words, "--batch-size", "1", "--int8-io")
    code, out, _ = run(*words, "--json", "--max-kib", "64", "--max-arena-kib", "64")
    artifact = keras_taylor.Artifact.from_json(out)
    assert code == 0 and 0 < artifact.arena_bytes < 64 * 1024 and artifact.batch_size == 1
    assert next(iter(artifact.inputs.values()))["dtype"] == "int8"
    os.remove("tiny.tflite")
    code, out, err = run(*words, "--max-arena-kib", "0.1")
    assert code == 1 and "The tensor arena takes" in err and "the limit is 102" in err
    assert "tiny.tflite.rejected" in err and not os.path.exists("tiny.tflite")


def strict_json(text):
    """JSON as other languages read it, without NaN and infinity; nothing stands beside it."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.once
def test_json_stays_json_when_something_goes_wrong(run):
    code, out, err = run(*COMPRESS, "--json", "--learning-rate", "1e30")
    assert err.startswith("note: ") and "lower the learning rate" in err
    assert code == 0 and "null" in json.dumps(strict_json(out)["rounds"])  # what became NaN


@pytest.mark.once
def test_json_for_machines(run):
    code, out, _ = run(*COMPRESS, "--json", "--epochs", "0", "--goal", "flops=100000")
    assert code == 0 and json.loads(out)["goal"] == {"params": 0.4, "flops": 100000}
    code, out, _ = run("analyze", "model.keras", "--json", "--exclude", "first")
    content = json.loads(out)
    assert content["costs"]["params"] > 0
    assert [g["reason"] for g in content["groups"] if g["name"] == "first"] == ["excluded by the caller"]


def test_a_metric_that_may_not_fall_ends_the_run(run):
    code, out, _ = run(
        *COMPRESS, "--json", "--epochs", "0", "--increment", "0.4", "--no-repair", "--max-drop", "0"
    )
    info = json.loads(out)
    accuracies = [info["metrics"][when]["accuracy"] for when in ("before", "after")]
    assert code == 0 and accuracies[1] >= accuracies[0]
    assert [one["held"] for one in info["rounds"]] == [info["after"] != info["before"]]


def test_each_metric_has_a_limit_of_its_own(run):
    words = ("--json", "--epochs", "0", "--increment", "0.4", "--no-repair")
    code, out, _ = run(*COMPRESS, *words, "--max-drop", "accuracy=1", "--max-drop", "loss=0")
    info = json.loads(out)
    held = info["rounds"][0]["metrics"]["loss"] <= info["metrics"]["before"]["loss"]
    assert code == (0 if held else 3) and [one["held"] for one in info["rounds"]] == [held]
    assert ("'loss' is" in info["stop_reason"]) == (not held) and "'accuracy' is" not in info["stop_reason"]
    code, out, _ = run(*COMPRESS, *words, "--force", "--max-drop", "loss=1e9", "--max-drop", "accuracy=1")
    assert code == 0 and [one["held"] for one in json.loads(out)["rounds"]] == [True]
    assert "There is no metric 'f1'" in refused(run, *COMPRESS, *words, "--force", "--max-drop", "f1=0.1")
    assert "or the name of a metric and a number, such as accuracy=0.01. Received: loss=little" in refused(
        run, *COMPRESS, "--max-drop", "loss=little"
    )
    assert "may become, 0 or more. Received: -1" in refused(run, *COMPRESS, "--max-drop=-1")
    for texts in (("0.1", "loss=0.1"), ("loss=0.1", "loss=0.2")):
        given = [word for text in texts for word in ("--max-drop", text)]
        said = refused(run, *COMPRESS, *given)
        assert f"one limit for each metric, by its name: accuracy=0.01. Received: {' '.join(texts)}" in said


@pytest.mark.parametrize("goal", ["0.4", "none"])
def test_a_run_that_ends_before_its_goal_says_so_and_writes_what_it_has(run, goal):
    limit = ("--max-drop", "loss=0", "--epochs", "0", "--increment", "0.2", "--no-repair")
    code, out, err = run(*COMPRESS[:-1], goal, *limit)
    assert pathlib.Path("small.keras").exists() and "stopped: after round" in out
    assert code == (3 if goal == "0.4" else 0)
    said = "keras-taylor: the goal was not reached: after round"
    assert (said in err) == (goal == "0.4") and "Warning" not in err


def test_no_goal_needs_a_limit(run):
    said = refused(run, *COMPRESS[:-1], "none")
    assert "--goal none goes as far as --max-drop allows. Expected --max-drop 0.01, say." in said


@pytest.mark.slow
@pytest.mark.once
def test_inexact_opens_what_is_normalized_together(run):
    x = inputs = keras.Input((4, 4))
    x = keras.layers.LayerNormalization()(keras.layers.Dense(6, name="stem")(x))
    x = keras.layers.Dense(2, name="head")(keras.layers.Flatten()(x))
    keras.Model(inputs, keras.layers.Softmax()(x)).save("normed.keras")
    assert json.loads(run("analyze", "normed.keras", "--json")[1])["reachable"]["params"] == 0
    code, out, _ = run("analyze", "normed.keras", "--json", "--inexact")
    assert code == 0
    group = next(g for g in json.loads(out)["groups"] if g["name"] == "stem")
    assert group["reason"] is None
    assert len(group["normalized_by"]) == 1
    random = np.random.default_rng(0)
    np.savez("normed.npz", x=random.normal(size=(32, 4, 4)), y=random.integers(0, 2, 32))
    command = ("compress", "normed.keras", "--data", "normed.npz", "--goal", "0.4", "--epochs", "0")
    assert "out of reach" in refused(run, *command, "-o", "stays.keras")
    assert run(*command, "-o", "smaller.keras", "--inexact")[0] == 0
    small = keras.models.load_model("smaller.keras")
    assert small.get_layer("stem").units < 6


@pytest.mark.once
def test_branches_leave_as_a_whole(run):
    x = inputs = keras.Input((4,))
    for k in range(2):
        inner = keras.layers.Dense(8, "relu", name=f"inner{k}")(x)
        x = keras.layers.Add(name=f"sum{k}")([x, keras.layers.Dense(4, name=f"outer{k}")(inner)])
    keras.Model(inputs, keras.layers.Dense(2, "softmax", name="head")(x)).save("residual.keras")
    random = np.random.default_rng(0)
    np.savez("residual.npz", x=random.normal(size=(32, 4)), y=random.integers(0, 2, 32))
    listed = json.loads(run("analyze", "residual.keras", "--json", "--branches")[1])["groups"]
    assert {group["name"] for group in listed if group["is_branch"]} == {"sum0", "sum1"}
    command = ("compress", "residual.keras", "--data", "residual.npz", "--goal", "0.9", "--epochs", "0")
    assert "out of reach" in refused(run, *command, "-o", "stays.keras")
    assert run(*command, "-o", "smaller.keras", "--branches")[0] == 0
    small = keras.models.load_model("smaller.keras")
    assert [layer.name for layer in small.layers if layer.weights] == ["head"]


def test_analyze_prints_a_table(run):
    code, out, _ = run("analyze", "model.keras")
    assert code == 0 and "channels can leave" in out and "the model's output" in out


@pytest.mark.once
def test_distillation_without_repair(run):
    code, out, _ = run(*COMPRESS, "--json", "--epochs", "1", "--distill", "--no-repair")
    (one,) = {len(r["repairs"]) for r in json.loads(out)["rounds"]}
    assert code == 0 and one == 0 and "distillation_loss" in json.loads(out)["rounds"][0]["history"]


def test_a_killed_run_continues(run, monkeypatch):
    real, calls = keras.Model.fit, []

    @functools.wraps(real)
    def killed(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:  # the second round: each one scores, then trains
            raise OSError("out of memory")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "fit", killed)
    words = (*COMPRESS, "--increment", "0.2", "--resume", "state")
    code, _, err = run(*words)
    assert code == 1 and "out of memory" in err and not os.path.exists("small.keras")
    code, out, _ = run(*words)
    assert code == 0 and "resumed after round 1 of 2" in out
    other = refused(run, *words, "--epochs", "3", "--force")
    assert "--resume holds the state of another call: epochs: " in other and "Received: --resume '" in other


@pytest.mark.once
def test_ctrl_c_says_how_to_go_on(run, monkeypatch):
    @functools.wraps(keras.Model.fit)
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "fit", interrupt)
    code, _, err = run(*COMPRESS)
    said = "keras-taylor: interrupted after 0 complete rounds; "
    assert (code, err) == (130, f"{said}with --resume it could be continued.\n")
    code, _, err = run(*COMPRESS, "--resume", "state")
    assert (code, err) == (130, f"{said}the same command continues.\n")
    assert not os.path.exists("small.keras")


@pytest.mark.once
def test_outputs_are_not_overwritten_without_force(run):
    pathlib.Path("small.keras").write_text("precious")
    assert "'small.keras' already exists. Pass --force" in refused(run, *COMPRESS)
    assert pathlib.Path("small.keras").read_text() == "precious"
    os.symlink("nowhere", "link.keras")
    assert "'link.keras' already exists. Pass --force" in refused(run, *COMPRESS, "-o", "link.keras")
    assert run(*COMPRESS, "--epochs", "0", "--force")[0] == 0


@pytest.mark.once
def test_a_disk_that_is_full_leaves_nothing_half_written(run, monkeypatch):
    def full(self, path, *args, **kwargs):
        pathlib.Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keras.Model, "save", full)
    code, _, err = run(*COMPRESS, "--epochs", "0")
    assert code == 1 and "No space left on device" in err
    assert sorted(os.listdir()) == ["data.npz", "model.keras"]


def test_a_directory_that_is_read_only(run, monkeypatch):
    os.mkdir("locked")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "locked")  # tests may run as root
    assert "'locked' cannot be written to" in refused(run, *COMPRESS[:-3], "locked/small.keras")


def with_lambda():
    layers = [keras.Input((8, 8, 1)), keras.layers.Lambda(lambda x: 2 * x), keras.layers.Flatten()]
    return keras.Sequential([*layers, keras.layers.Dense(3)])


def test_files_that_cannot_be_used(run):
    assert "There is no file 'no.keras'" in refused(run, "analyze", "no.keras")
    assert "is not a model file" in refused(run, "analyze", "data.npz")
    pathlib.Path("broken.keras").write_bytes(pathlib.Path("model.keras").read_bytes()[:2000])
    assert "'broken.keras' is damaged" in refused(run, "analyze", "broken.keras")
    with_lambda().save("code.keras")
    assert "holds Python code (a Lambda layer)" in refused(run, "analyze", "code.keras")
    assert run("analyze", "code.keras", "--trust")[0] == 0
    assert "cannot be imported" in refused(run, "analyze", "model.keras", "--import", "no_such_module")
    pathlib.Path("old.h5").write_text("no HDF5")
    assert "'old.h5' cannot be loaded" in refused(run, "analyze", "old.h5")


FOREIGN = {
    "own.layers.Net": {"module": "own.layers", "class_name": "Net", "registered_name": "own>Net"},
    "os.system": {"activation": {"module": "os", "class_name": "function", "config": "system"}},
}


@pytest.mark.once
@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_with_foreign_code_is_no_invitation_to_import_it(name, run):
    with zipfile.ZipFile("model.keras") as file:
        content = {entry: file.read(entry) for entry in file.namelist()}
    config = json.loads(content["config.json"])
    layer = next(one for one in config["config"]["layers"] if one["class_name"] == "Conv2D")
    (layer["config"] if "activation" in FOREIGN[name] else layer).update(FOREIGN[name])
    with zipfile.ZipFile("foreign.keras", "w") as file:
        for entry, data in {**content, "config.json": json.dumps(config)}.items():
            file.writestr(entry, data)
    message = refused(run, "analyze", "foreign.keras")
    assert f"it needs '{name}', which Keras does not have" in message
    assert "never import code that came with it" in message


def test_data_that_cannot_be_used(run):
    def compress(data):
        return refused(run, "compress", "model.keras", "--data", data, "-o", "small.keras")

    assert "There is no data 'nothing'" in compress("nothing")
    np.savez("pickled.npz", x=np.array([{}], object), y=np.zeros(1))
    assert "pickled objects, which could run any code" in compress("pickled.npz")
    np.savez("names.npz", a=np.zeros(1))
    assert "no arrays x_train and y_train, or x and y. It has: a." in compress("names.npz")
    np.savez("shape.npz", x=np.zeros((4, 5, 5, 1)), y=np.zeros(4, int))
    assert "has shape (5, 5, 1), expected (8, 8, 1)" in compress("shape.npz")
    pathlib.Path("broken.npz").write_bytes(pathlib.Path("data.npz").read_bytes()[:300])
    assert "'broken.npz' is damaged or not an .npz file" in compress("broken.npz")
    os.symlink("gone.npz", "link.npz")
    assert "There is no data 'link.npz'" in compress("link.npz")
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe.npz")  # nobody writes to it
        assert "There is no data 'pipe.npz'" in compress("pipe.npz")
    with zipfile.ZipFile("notes.npz", "w") as file:
        file.writestr("x.npy", "no array")
        file.writestr("y.npy", "no array")
    assert "'notes.npz' holds something else than arrays" in compress("notes.npz")
    np.savez("single.npz", x=np.float32(1), y=np.int64(0))
    assert "one row for each example. These are of shapes () and ()" in compress("single.npz")
    x, y = stripes()
    np.savez("beyond.npz", x=x, y=y + 5)
    assert "Labels lie beyond the 3 classes" in compress("beyond.npz")
    export = ("export", "model.keras", "-o", "model.tflite", "--data", "beyond.npz")
    assert "Labels lie beyond the 3 classes of the output" in refused(run, *export)
    np.savez("texts.npz", x=x, y=y.astype(str))
    assert "The targets are no numbers" in compress("texts.npz")
    small_model(loss="categorical_crossentropy").save("model.keras")
    assert "no whole numbers from 0 to 2" in compress("beyond.npz")
    os.mkdir("empty")
    assert "has no directories. Expected one directory of images for each class" in compress("empty")
    os.makedirs("images/cat")
    assert "has no images in its directories cat" in compress("images")
    os.makedirs("above/images/cat")
    assert "one directory of images for each class: is 'above/images' the one that" in compress("above")
    pathlib.Path("images/cat/1.png").write_text("no image")
    assert "is not an image that can be read (UnidentifiedImageError)" in compress("images")


def test_arguments_that_cannot_be_used(run):
    for share in ("2.5", "1.0", "0.0", "100%", "flops=-0.5"):
        message = refused(run, *COMPRESS[:-1], share)
        assert "The part to remove is above 0 and below 1, as in 0.3" in message and share in message
    assert "as in params=200000, or the part of" in refused(run, *COMPRESS[:-1], "2")
    assert "Received: half%" in refused(run, *COMPRESS[:-1], "half%")
    assert "Received: params=few" in refused(run, *COMPRESS[:-1], "params=few")
    assert "such as 0.01 or 1%, or the name" in refused(run, *COMPRESS, "--max-drop", "few")
    assert "are about the same cost. Received: 0.4 params=9" in refused(run, *COMPRESS, "--goal", "params=9")
    assert "each part has one value for each goal. Received: 0.2,0.4 flops=0.5" in refused(
        run, *COMPRESS[:-1], "0.2,0.4", "--goal", "flops=0.5"
    )
    assert "whole number of bytes, or a text with a unit" in refused(run, *COMPRESS[:-1], "bytes=small")
    assert "Expected a goal for a 'latency'" in refused(run, *COMPRESS, "--round-to", "auto")
    assert "--round-to takes a whole number, 1 or larger" in refused(run, *COMPRESS, "--round-to", "x")
    assert "--round-to takes a whole number, 1 or larger" in refused(run, *COMPRESS, "--round-to", "0")
    assert "Unknown criterion" in refused(run, *COMPRESS, "--criterion", "best")
    assert "`exclude` has a text that is neither" in refused(run, *COMPRESS, "--exclude", "[")
    assert "Received: learning_rate=0.0" in refused(run, *COMPRESS, "--learning-rate", "0", "--epochs", "0")
    assert "Received: epochs=-1" in refused(run, *COMPRESS, "--epochs", "-1")
    assert "Received: batch_size=0" in refused(run, *COMPRESS, "--batch-size", "0")
    assert "Expected numbers other than 0" in refused(run, *COMPRESS, "--std", "1,0")
    assert "--mean has 3 numbers. Expected one, or" in refused(run, *COMPRESS, "--mean", "1,2,3")
    assert "There is no format 'gif'" in refused(run, *COMPRESS, "--export", "gif")
    assert "does not end in '.html'" in refused(run, *COMPRESS, "--report", "report.txt")
    assert "There is no directory 'nowhere'" in refused(run, *COMPRESS, "-o", "nowhere/small.keras")
    assert "is neither a number nor a list of numbers" in refused(run, *COMPRESS, "--mean", "a,b")
    assert "pass --data" in refused(run, "export", "model.keras", "-o", "x.tflite", "--format", "litert-int8")
    assert "There is no backend 'theano'" in refused(
        run, "analyze", "model.keras", "--backend", "theano", code=2
    )
    assert run("compress", "model.keras")[0] == 2  # typer's own message: --data is missing


def test_defaults_are_those_of_compress():
    options = inspect.signature(commands.compress_command).parameters
    given = {name: option.default for name, option in options.items()}
    arguments = inspect.signature(keras_taylor.compress).parameters
    shared = given.keys() & arguments.keys()
    assert shared > {"goal", "increment", "criterion", "exclude", "repair", "max_drop", "learning_rate"}
    in_python = {name: given[name] for name in shared}
    in_python["goal"] = parse_goal_texts(given["goal"])["params"]
    in_python["exclude"] = given["exclude"] or ()
    assert PruningOptions(round_to=given["round_to"]).selection() == keras_taylor.Selection()
    assert in_python == {name: arguments[name].default for name in shared}
    assert given["inexact"] is not arguments["exact"].default
    assert (given["resume"] or None) is arguments["backup_dir"].default
    fit = inspect.signature(keras.Model.fit).parameters
    assert given["epochs"] == fit["epochs"].default and given["batch_size"] == BATCH_SIZE


def test_defaults_are_those_of_analyze_and_export():
    for command, verb, adapt in (
        (commands.analyze_command, keras_taylor.analyze, {"exclude": lambda given: given or ()}),
        (
            commands.export_command,
            keras_taylor.export,
            {name: lambda given: given or None for name in ("batch_size", "data")},
        ),
    ):
        options, arguments = (inspect.signature(one).parameters for one in (command, verb))
        shared = (options.keys() & arguments.keys()) - {"model", "format"}
        for name in shared:
            given = adapt.get(name, lambda given: given)(options[name].default)
            assert given == arguments[name].default, name


def test_help_names_every_option_and_its_default(run):
    code, out, _ = run("compress", "--help")
    words = " ".join(out.replace("│", " ").split())
    assert code == 0 and "Default: 0.05 if each is fine-tuned" in words and "[default: 0.3]" in words
    names = """
        model --trust --import --data --divide-by --mean --std --exclude --inexact --branches --goal
        --increment --criterion --round-to --no-repair --max-drop --epochs --batch-size --learning-rate
        --distill --seed --output --export --report --resume --force --json --backend
    """
    assert [name for name in names.split() if name not in words] == []


@pytest.mark.once
def test_the_command_in_the_report_can_be_pasted_into_a_shell(run):
    os.rename("data.npz", "my data.npz")
    words = list(COMPRESS)
    words[3] = "my data.npz"
    words += ["--epochs", "0", "--exclude", "head|first", "--report", "report.html"]
    assert run(*words)[0] == 0
    info = keras_taylor.Info.from_json(pathlib.Path("small.json").read_text())
    assert shlex.split(info.command) == ["keras-taylor", *words]
    page = pathlib.Path("report.html").read_text()
    assert f"<pre>{html.escape(info.command)}</pre>".replace("&#x27;", "&#39;") in page


@pytest.mark.once
def test_extras_that_are_missing_are_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run(*COMPRESS, "--epochs", "0")[0] == 0
    code, _, err = run("report", "small.json", "-o", "report.html")
    assert code == 1 and 'pip install "keras-taylor[report]"' in err and not os.path.exists("report.html")


def test_a_model_that_is_not_compiled_gets_the_loss_that_its_outputs_want():
    logits = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    probabilities = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, activation="softmax")])
    assert model_files.compile_for_targets(logits, np.arange(3)).loss.get_config()["from_logits"]
    assert not model_files.compile_for_targets(probabilities, np.arange(3)).loss.get_config()["from_logits"]
    with pytest.raises(model_files.FileError, match="do not tell its loss"):
        fresh = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        model_files.compile_for_targets(fresh, np.zeros((3, 7)))


def other_backend():
    """A backend that is installed, and not the one of this process."""
    for name in ("torch", "jax", "tensorflow"):
        if name != keras.backend.backend() and importlib.util.find_spec(name):
            return name
    pytest.skip("only one backend is installed")


def test_another_backend_is_the_one_that_keras_loads(trapped_folder):
    """Nothing in the working directory is imported, but what `--import` names."""
    (trapped_folder / "own.py").write_text("import sys, keras; print(sys.path[-1], keras.backend.backend())")
    model = trapped_folder / "model.keras"
    small_model().save(model)
    # -P: the command `keras-taylor` has its own folder on the path, not the working directory
    start = "import sys; sys.argv[0] = 'keras-taylor'; from keras_taylor.cli.commands import main; main()"
    command = [sys.executable, "-P", "-c", start, "analyze", str(model), "--backend", other_backend()]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(keras_taylor.__file__).parent.parent)}
    command += ["--import", "own"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith(f"{trapped_folder} {other_backend()}\n")
    assert "channels can leave" in done.stdout
    assert done.stderr == ""  # TensorFlow, too, says nothing while it is loaded


def test_keras_that_is_loaded_keeps_its_backend(run):
    message = refused(run, "analyze", "model.keras", "--backend", other_backend())
    assert "Keras was imported before the command, and runs on another backend than" in message


@pytest.mark.once
def test_help_and_files_that_are_missing_need_no_keras(tmp_path, monkeypatch):
    """Which takes seconds to load; to replace it by nothing makes every import of it an error."""
    monkeypatch.chdir(tmp_path)
    small_model().save("model.keras")
    start = (
        "import sys; sys.argv[0] = 'keras-taylor'; sys.modules['keras'] = None; "
        "from keras_taylor.cli.commands import main; main()"
    )
    command = [sys.executable, "-c", start]
    for words, code, said in (
        (["--help"], 0, "analyze"),
        (["compress", "--help"], 0, "--goal"),
        (["analyze", "absent.keras"], 1, "There is no file 'absent.keras'"),
        (["compress", "model.keras", "--data", "absent", "-o", "s.keras"], 1, "There is no data 'absent'"),
        (["export", "model.keras", "-o", "absent/s.tflite"], 1, "There is no directory 'absent'"),
        (["report", "absent.json"], 1, "There is no file 'absent.json'"),
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr


@pytest.mark.once
@pytest.mark.slow
def test_python_m_imports_nothing_of_the_working_directory(trapped_folder):
    package = os.path.dirname(os.path.dirname(keras_taylor.__file__))
    command = [sys.executable, "-m", "keras_taylor", "--help"]
    environment = {**os.environ, "PYTHONPATH": package}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "analyze" in done.stdout, done.stderr


@pytest.mark.once
def test_python_m_closes_the_working_directory_too(run, monkeypatch):
    for entry in ("", os.getcwd()):
        monkeypatch.syspath_prepend(entry)
    assert run("analyze", "model.keras")[0] == 0
    assert "" not in sys.path and os.getcwd() not in sys.path


def test_a_backend_that_is_not_installed_is_refused(run, monkeypatch):
    other = next(name for name in ("torch", "jax") if name != keras.backend.backend())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refused(run, "analyze", "model.keras", "--backend", other)
    assert f'{other} is not installed: pip install "keras-taylor[{other}]"' in message


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_the_page_opens_in_a_browser(run, tmp_path):
    run(*COMPRESS, "--epochs", "1", "--report", "report.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command = ["chromium", *flags, f"--user-data-dir={tmp_path}/browser", "--dump-dom", "report.html"]
    command[-1] = f"file://{tmp_path}/report.html"
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "channels of each layer" in page.stdout.lower() and "CONSOLE" not in page.stderr
    assert not re.search(r"(src|href)=.http|@import|url\(http", page.stdout)  # nothing comes from elsewhere
