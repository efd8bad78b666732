"""Exported models run, compute the same, and nothing that does not is kept."""

import collections
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import os
import re
import sys

import exported_layers
import keras
import numpy as np
import pytest
from helpers import BACKEND, fingerprint, predict, random_plan

import keras_taylor
from keras_taylor.exports import conversion, export_worker, exporting, runners
from keras_taylor.exports.artifacts import Artifact, artifact_table, size_on_disk
from keras_taylor.exports.export_parity import (
    TOLERANCES,
    MetricValues,
    OutputError,
    accuracy,
    compare_output,
    explain_refusal,
    judge,
)
from keras_taylor.exports.export_worker import JobError, run_job
from keras_taylor.exports.formats import checked_format
from keras_taylor.support.console import render_table
from keras_taylor.support.files import installed_first

pytest.importorskip("tensorflow")
HAS_ONNX = all(map(pytest.importorskip, ("tf2onnx", "onnxruntime")))
VARIANTS = {
    "free": {"format": "saved_model"},
    "three": {"format": "saved_model", "batch_size": 3},
    "free.tflite": {},
    "one.tflite": {"batch_size": 1},
    "half.tflite": {"quantize": "float16"},
    "dynamic.tflite": {"quantize": "dynamic"},
    "int8.tflite": {"quantize": "int8", "batch_size": 1},
    "integers.tflite": {"quantize": "int8", "int8_io": True},
    "free.onnx": {},
    "two.onnx": {"batch_size": 2},
    "same.keras": {},
}

pytestmark = pytest.mark.sweep(8)


def two_headed():
    """Two inputs, two outputs by name, a residual sum; weights of more than 1024 values."""
    layers = keras.layers
    image, extra = keras.Input((8, 8, 3), name="image"), keras.Input((4,), name="extra")
    x = layers.Conv2D(16, 3, padding="same", name="stem")(image)
    y = layers.BatchNormalization(moving_variance_initializer="ones")(x)
    y = layers.Conv2D(16, 3, padding="same", activation="relu")(y)
    y = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
    y = layers.Concatenate()([y, extra])
    outputs = {"value": layers.Dense(1)(y), "class": layers.Dense(5, name="logits")(y)}
    return keras.Model([image, extra], outputs, name="two_headed")


def inputs_of(model, rows=40, seed=1):
    random = np.random.default_rng(seed)
    return [random.standard_normal((rows, *t.shape[1:])).astype("float32") for t in model.inputs]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The model, and a function from a variant to its artifact, each made once."""
    keras.backend.clear_session()  # names of layers are part of the files, and of their sizes
    keras.utils.set_random_seed(3)
    model = two_headed()
    folder = tmp_path_factory.mktemp("artifacts")

    @functools.cache
    def artifact(name):
        options = dict(VARIANTS[name])
        if options.get("quantize") == "int8":
            options["calibration"] = inputs_of(model)
        return keras_taylor.export(model, folder / name, **options)

    return collections.namedtuple("Made", "model artifact folder")(model, artifact, folder)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_format_runs_and_is_measured(made, name):
    artifact = made.artifact(name)
    options = VARIANTS[name]
    assert artifact.path == str(made.folder / name)
    assert artifact.format == checked_format(made.folder / name, options.get("format"))
    assert artifact.relative_difference <= TOLERANCES[artifact.quantize]
    assert artifact.agreement > 0.9
    assert list(artifact.inputs) == ["image", "extra"]
    batch = options.get("batch_size")
    assert artifact.inputs["image"]["shape"] == [batch, 8, 8, 3]
    assert artifact.latency_batch == (batch or 1)
    assert 0 < artifact.latency_ms <= artifact.latency_p90_ms
    assert artifact.num_bytes > 2000
    assert (artifact.peak_memory is None) == (sys.platform != "linux")
    assert (artifact.arena_bytes or 0) > 0 or artifact.format != "litert"
    assert [n for n in os.listdir(made.folder) if n.startswith(".")] == []


def test_names_of_outputs_are_kept(made):
    for name in ("free", "free.tflite", "free.onnx"):
        assert sorted(made.artifact(name).outputs) == ["class", "value"]


def test_quantized_files_are_smaller_and_less_exact(made):
    names = ("free.tflite", "half.tflite", "dynamic.tflite")
    sizes, differences = zip(*((a.num_bytes, a.difference) for a in map(made.artifact, names)), strict=True)
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * sizes[2]
    assert differences[0] < differences[1] < differences[2]


@pytest.mark.sweep(1)
def test_int8_reads_and_gives_what_was_asked_for(made):
    plain, integers = made.artifact("int8.tflite"), made.artifact("integers.tflite")
    assert plain.inputs["image"] == {"shape": [1, 8, 8, 3], "dtype": "float32"}
    for details in (*integers.inputs.values(), *integers.outputs.values()):
        assert details["dtype"] == "int8"
        assert details["scale"] > 0


def test_onnx_runtime_gives_the_outputs_of_the_model(made):
    """Not by the runner, which the check itself goes by."""
    import onnxruntime

    session = onnxruntime.InferenceSession(made.artifact("free.onnx").path)
    x = inputs_of(made.model, rows=5, seed=2)
    outputs = session.run(["class", "value"], dict(zip(("image", "extra"), x, strict=True)))
    for ours, theirs in zip(outputs, predict(made.model, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow is not imported beside another backend")
def test_tensorflow_serves_the_outputs_of_the_model(made):
    import tensorflow as tf

    x = inputs_of(made.model, rows=5, seed=2)
    served = tf.saved_model.load(made.artifact("free").path).signatures["serving_default"]
    interpreter = tf.lite.Interpreter(made.artifact("free.tflite").path)
    for outputs in (
        served(image=tf.constant(x[0]), extra=tf.constant(x[1])),
        interpreter.get_signature_runner()(image=x[0], extra=x[1]),
    ):
        for name, theirs in zip(("class", "value"), predict(made.model, x), strict=True):
            np.testing.assert_allclose(outputs[name], theirs, rtol=1e-4, atol=1e-5)


def test_a_keras_file_loads_without_the_optimizer(made, tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(64)])
    model.compile("adam", "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 64)), verbose=0)
    model.save(tmp_path / "trained.keras")
    artifact = keras_taylor.export(model, tmp_path / "small.keras")
    assert artifact.num_bytes < 0.7 * os.path.getsize(tmp_path / "trained.keras")
    loaded = keras.models.load_model(artifact.path)
    x = np.ones((3, 4), "float32")
    np.testing.assert_array_equal(predict(loaded, x)[0], predict(model, x)[0])


def conv1d():
    layers = [keras.layers.Conv1D(8, 3, activation="relu"), keras.layers.MaxPooling1D()]
    return keras.Sequential([keras.Input((16, 2)), *layers, keras.layers.Flatten(), keras.layers.Dense(3)])


def pruned():
    model = two_headed()
    return keras_taylor.prune(model, random_plan(model))


@pytest.mark.parametrize("build", [conv1d, pruned])
def test_architectures(build, tmp_path):
    model = build()
    model.compile("sgd", "mse")
    before = fingerprint(model)
    artifact = keras_taylor.export(model, tmp_path / "model.tflite")
    assert artifact.relative_difference <= 1e-5
    assert fingerprint(model) == before


def test_many_outputs_and_names_that_tensorflow_changes(tmp_path):
    first, second = keras.Input((4,), name="in-put.1"), keras.Input((4,), name="2nd")
    model = keras.Model([first, second], [keras.layers.Dense(2)(first - second) for _ in range(12)])
    for name in ("model", "model.tflite", "model.onnx"):
        artifact = keras_taylor.export(model, tmp_path / name)
        assert artifact.relative_difference < 1e-5
        assert len(artifact.outputs) == 12


@pytest.mark.once
def test_what_onnx_has_no_operation_for_says_so(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.ops.erfinv(keras.ops.tanh(inputs)))
    with pytest.raises(keras_taylor.ExportError, match="tf2onnx, which writes the file, lacks some"):
        keras_taylor.export(model, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


def test_recurrent_layers_in_lite_rt(tmp_path):
    model = keras.Sequential([keras.Input((5, 4)), keras.layers.LSTM(3)])
    with pytest.raises(keras_taylor.ExportError, match="try `batch_size=1`"):
        keras_taylor.export(model, tmp_path / "free.tflite")
    assert keras_taylor.export(model, tmp_path / "one.tflite", batch_size=1).relative_difference < 1e-5


def test_recurrent_layers_in_int8(tmp_path):
    model = keras.Sequential([keras.Input((16, 3)), keras.layers.GRU(4), keras.layers.Dense(2)])
    x = np.random.default_rng(0).normal(size=(8, 16, 3)).astype("float32")
    with pytest.raises(keras_taylor.ExportError, match=r"or make these layers with `unroll=True`") as failure:
        keras_taylor.export(model, tmp_path / "m.tflite", quantize="int8", calibration=x, batch_size=1)
    assert "oneDNN" not in str(failure.value)
    assert os.listdir(tmp_path) == []


def with_what_exporters_do_not_take():
    """Augmentation of integers, constants of both sizes, grouped convolutions, the exact GELU."""
    layers, ops = keras.layers, keras.ops
    inputs = keras.Input((8, 8, 4), dtype="uint8", name="image")
    x = keras.Sequential([layers.RandomTranslation(0.3, 0.3), layers.RandomFlip()], name="augment")(inputs)
    x = exported_layers.Noisy()(layers.Rescaling(1 / 255)(x))
    x = layers.Conv2D(8, 3, groups=2, padding="same")(x)
    x = ops.gelu(x, approximate=False) * ops.cast(ops.arange(8), x.dtype)
    x = x + ops.cast(ops.reshape(ops.arange(8 * 8 * 8) / 512, (8, 8, 8)), x.dtype)
    x = layers.Conv3D(4, 2, groups=2, dtype="float32")(ops.stack([x, -x], 1))
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling3D()(x))
    model = keras.Model({"image": inputs}, layers.Dense(3)(x), name="many_kinds")
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        *(("float32", name) for name in ("model.tflite", "model.onnx", "model", "model.keras")),
        *(("mixed_float16", name) for name in ("model.tflite", "model.onnx")),
        *(("mixed_bfloat16", name) for name in ("model.onnx", "model")),
    ],
)
def test_what_exporters_do_not_take_is_written_in_other_ways(policy, name, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = with_what_exporters_do_not_take()
    finally:
        keras.config.set_dtype_policy(before)
    x = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 4), dtype="uint8")
    unchanged = fingerprint(model)
    artifact = keras_taylor.export(model, tmp_path / name, samples={"image": x})
    assert fingerprint(model) == unchanged
    assert artifact.relative_difference < (1e-5 if policy == "float32" else 1e-2)
    assert list(artifact.inputs) == ["image"] and artifact.inputs["image"]["dtype"] == "uint8"
    (output,) = artifact.outputs.values()
    assert output["dtype"] == ("bfloat16" if (policy, name) == ("mixed_bfloat16", "model") else "float32")
    files = [tmp_path / name] if "." in name else (tmp_path / name).rglob("*")
    content = b"".join(file.read_bytes() for file in files if file.is_file())
    assert (b"andom" in content) == (name == "model.keras")  # a layer that is no graph keeps what is in it
    if name == "model.keras":
        kinds = {type(layer).__name__ for layer in keras.models.load_model(tmp_path / name).layers}
        assert kinds.isdisjoint({"Sequential", "RandomFlip", "Dropout"})


ARGUMENTS = {"RandomPosterization": (4,), "RandomTranslation": (0.3, 0.3)}
SHAPES = {"SpatialDropout1D": (2, 12, 3), "SpatialDropout3D": (2, 4, 4, 4, 3)}


@pytest.mark.once
@pytest.mark.parametrize("kind", conversion.TRAINING_LAYERS, ids=lambda kind: kind.__name__)
def test_layers_that_only_train_give_back_their_input(kind):
    takes_none = kind.__name__ in ("AugMix", "CutMix", "Equalization", "Identity", "MixUp", "RandAugment")
    layer = kind(*ARGUMENTS.get(kind.__name__, () if takes_none else (0.3,)))
    x = np.random.default_rng(0).uniform(0, 255, SHAPES.get(kind.__name__, (2, 12, 12, 3)))
    takes_flag = "training" in inspect.signature(layer.call).parameters
    outputs = layer(x.astype("float32"), **({"training": False} if takes_flag else {}))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(outputs), x.astype("float32"))


@pytest.mark.once
def test_all_random_layers_of_keras_are_known():
    random = {name for name in vars(keras.layers) if name.startswith("Random")} - {"RandomCrop"}
    assert random <= {kind.__name__ for kind in conversion.TRAINING_LAYERS}


def test_dropout_that_is_asked_for_at_inference_stays():
    inputs = keras.Input((64,))
    x = keras.layers.Dropout(0.5)(keras.layers.Dropout(0.5)(inputs), training=True)
    model = conversion.remove_training_layers(keras.Model(inputs, x))
    assert [type(layer).__name__ for layer in model.layers] == ["InputLayer", "Dropout"]
    assert 16 < (keras.ops.convert_to_numpy(model(np.ones((1, 64)))) == 0).sum() < 48


def test_a_chain_of_dense_layers_and_its_arena(tmp_path):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32), keras.layers.Dense(8)])
    artifact = keras_taylor.export(model, tmp_path / "chain.tflite", batch_size=1)
    assert artifact.arena_bytes == 4 * (64 + 32)  # the first product, input and output at once
    assert artifact.int8_io_arena_bytes is None
    assert list(artifact.outputs) == ["output_0"]


def sounds():
    """Most of its memory is the input."""
    layers = keras.layers
    inputs = keras.Input((64, 1))
    x = layers.Conv1D(4, 5, strides=4, activation="relu")(inputs)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling1D()(x)))


def mixed_outputs():
    """An input that is read twice, an output that other layers read."""
    inputs = keras.Input((32,))
    x = keras.layers.Dense(24, activation="relu", name="inner")(inputs)
    y = keras.layers.Dense(32)(x)
    return keras.Model(inputs, [x, keras.layers.Add()([inputs, y])])


@pytest.mark.parametrize("build", [sounds, mixed_outputs, two_headed])
def test_the_arena_with_integers_outside_is_told_without_a_second_file(build, tmp_path):
    model = build()
    options = {"quantize": "int8", "calibration": inputs_of(model), "batch_size": 1, "tolerance": 1.0}
    real = keras_taylor.export(model, tmp_path / "real.tflite", **options)
    integers = keras_taylor.export(model, tmp_path / "integers.tflite", int8_io=True, **options)
    assert real.int8_io_arena_bytes == integers.arena_bytes <= real.arena_bytes
    assert integers.arena_bytes < real.arena_bytes or build is two_headed  # where the middle is the widest
    assert integers.int8_io_arena_bytes is None
    assert keras_taylor.Artifact.from_json(real.to_json()) == real


def test_accuracy_on_data_and_a_metric_of_ones_own(made, tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    x = np.random.default_rng(0).standard_normal((50, 4)).astype("float32")
    y = predict(model, x)[0].argmax(-1)
    y[:10] = (y[:10] + 1) % 3
    artifact = keras_taylor.export(model, tmp_path / "a.onnx", data=(x, y))
    assert (artifact.metric, artifact.model_metric) == (0.8, 0.8)
    artifact = keras_taylor.export(
        model, tmp_path / "b.onnx", data=(x, y), metric=lambda y, outputs: len(y) + outputs.shape[1]
    )
    assert artifact.metric == 53


def small_object():
    """A U-Net's output: a mask of a small object; one pixel is wrong by far after int8."""
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    return keras.Model(
        inputs, keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid", name="mask")(x)
    )


@pytest.mark.once
@pytest.mark.slow
def test_int8_is_judged_by_the_compiled_metric_or_in_the_terms_of_the_output(tmp_path):
    keras.utils.set_random_seed(0)
    model = small_object()
    x = np.random.default_rng(0).standard_normal((40, 8, 8, 1)).astype("float32")
    y = (x > 1).astype("float32")
    options = {"quantize": "int8", "calibration": x, "overwrite": True}
    path = tmp_path / "mask.tflite"
    assert keras_taylor.export(model, path, **options).verdict.startswith("judged by its outputs: ")
    model.compile(
        keras.optimizers.Adam(0.05), "binary_crossentropy", metrics=[keras.metrics.BinaryIoU([1], name="iou")]
    )
    model.fit(x, y, epochs=5, verbose=0)
    artifact = keras_taylor.export(model, path, data=(x, y), **options)
    assert artifact.metric_name == "iou"
    assert artifact.model_metric == pytest.approx(model.evaluate(x, y, verbose=0)[1], abs=0.01)
    assert artifact.verdict.startswith("judged by 'iou': ") and artifact.verdict in str(artifact)
    with pytest.raises(keras_taylor.ExportError, match=r"of the mask agree, the error is .* of the spread"):
        keras_taylor.export(model, path, data=(x, y), tolerance=0, **options)
    with pytest.raises(keras_taylor.ExportError, match=r"'iou' falls from.*inputs, calibrate on more"):
        keras_taylor.export(model, path, data=(x, y), max_drop=-1, **options)


def test_the_loss_is_the_metric_of_targets_without_an_accuracy(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {"b": keras.layers.Dense(1, name="one")(inputs), "a": 2 * inputs})
    model.compile("sgd", {"a": "mse", "b": "mae"})
    x = np.random.default_rng(0).standard_normal((40, 4)).astype("float32")
    y = {"a": x, "b": x[:, :1]}
    artifact = keras_taylor.export(model, tmp_path / "a.onnx", data=(x, y))
    expected = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    assert (artifact.metric_name, artifact.metric) == ("loss", pytest.approx(expected, rel=1e-4))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    artifact = keras_taylor.export(model, tmp_path / "b.onnx", data=(x, x[:, :1]))
    assert (artifact.metric_name, artifact.metric) == ("mae", pytest.approx(artifact.model_metric, rel=1e-4))


def test_layers_of_the_users_own_module(tmp_path):
    model = keras.Sequential([keras.Input((4,)), exported_layers.Doubled(), keras.layers.Dense(3)])
    assert keras_taylor.export(model, tmp_path / "own.onnx").relative_difference < 1e-5


def test_a_crash_of_the_converter_is_an_error_and_the_next_export_works(tmp_path):
    model = keras.Sequential([keras.Input((4,)), exported_layers.Crashing()])
    with pytest.raises(keras_taylor.ExportError, match="ended by the signal SIGABRT") as caught:
        keras_taylor.export(model, tmp_path / "model")
    assert "Received: model=" in str(caught.value)
    assert os.listdir(tmp_path) == []
    assert keras_taylor.export(conv1d(), tmp_path / "model.onnx").num_bytes > 0


SCRIPT = """
import threading
import keras

FACTOR = 3

def scaled(x):
    return FACTOR * x

@keras.saving.register_keras_serializable("script")
class Base(keras.layers.Layer):
    def call(self, x):
        return scaled(x)

@keras.saving.register_keras_serializable("script")
class Registered(Base):
    def call(self, x):
        return super().call(x) + 1

@keras.saving.register_keras_serializable("script")
class NotInTheModel(Base):
    lock = threading.Lock()

class Plain(keras.layers.Layer):
    def call(self, x):
        return x * x
"""


def test_classes_of_a_script_or_notebook(tmp_path, monkeypatch):
    """By value, registered or not; another process cannot import them."""
    script = {"__name__": "__main__"}
    with keras.saving.custom_object_scope({}):
        exec(SCRIPT, script)
        model = keras.Sequential([keras.Input((4,)), script["Registered"](), script["Plain"]()])
        for name in ("own.onnx", "own.keras"):
            assert keras_taylor.export(model, tmp_path / name).relative_difference < 1e-5
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "cloudpickle" else find(name)
        )
        with pytest.raises(keras_taylor.ExportError, match="or install `cloudpickle`") as caught:
            keras_taylor.export(model, tmp_path / "model.tflite")
    assert "register_keras_serializable" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["own.keras", "own.onnx"]


def test_a_class_that_is_made_in_a_function(tmp_path):
    class Local(keras.layers.Layer):
        def call(self, x):
            return x + 1

    model = keras.Sequential([keras.Input((4,)), Local()])
    assert keras_taylor.export(model, tmp_path / "own.tflite").relative_difference < 1e-5


def test_what_lite_rt_has_no_operation_for_says_so(tmp_path):
    inputs = keras.Input((4, 4))
    model = keras.Model(inputs, keras.ops.linalg.det(inputs))
    with pytest.raises(keras_taylor.ExportError, match="that LiteRT's built-in operations cover") as caught:
        keras_taylor.export(model, tmp_path / "model.tflite")
    assert "MatrixDeterminant" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_difference_past_the_tolerance_is_moved_aside(made, tmp_path, monkeypatch):
    target = tmp_path / "half.tflite"
    target.write_text("what was there")
    monkeypatch.setitem(TOLERANCES, "float16", 1e-9)
    with pytest.raises(keras_taylor.ExportError, match="the largest difference is") as caught:
        keras_taylor.export(made.model, target, quantize="float16", overwrite=True)
    assert "half.tflite.rejected" in str(caught.value)
    assert "real inputs, quantize less, or pass a larger" in str(caught.value)  # nothing is calibrated here
    assert sorted(os.listdir(tmp_path)) == ["half.tflite", "half.tflite.rejected"]
    assert target.read_text() == "what was there"


def test_a_fall_of_the_metric_is_moved_aside(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    x = np.random.default_rng(0).standard_normal((20, 4)).astype("float32")
    falling = itertools.count(1, -1)  # the Keras model is asked first
    with pytest.raises(keras_taylor.ExportError, match="'<lambda>' falls from 1 to 0"):
        keras_taylor.export(
            model, tmp_path / "a.onnx", data=(x, x[:, 0]), metric=lambda y, outputs: next(falling)
        )
    assert os.listdir(tmp_path) == ["a.onnx.rejected"]


def test_overwrite_replaces_a_directory(made, tmp_path):
    target = tmp_path / "served"
    first = keras_taylor.export(made.model, target, batch_size=2)
    second = keras_taylor.export(conv1d(), target, overwrite=True)
    assert second.num_bytes != first.num_bytes
    assert os.listdir(tmp_path) == ["served"]
    assert size_on_disk(target) == second.num_bytes


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process")
@pytest.mark.slow
def test_a_full_disk_leaves_nothing(tmp_path):
    """The process may write no file of more than 2000 bytes."""
    import resource

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    keras_taylor.export(conv1d(), tmp_path / "first.tflite")  # starts the process
    process = export_worker.workers.worker_for("tensorflow").process
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        for name in ("model", "model.tflite", "model.onnx"):
            with pytest.raises(keras_taylor.ExportError, match="could not be converted"):
                keras_taylor.export(model, tmp_path / name)
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["first.tflite"]


@pytest.mark.once
@pytest.mark.slow
def test_artifacts_are_timed_in_turn(made):
    names = ("free.tflite", "int8.tflite", "free.onnx")
    measured = keras_taylor.measure_artifacts([made.artifact(n) for n in names], 4, repetitions=5)
    assert [one.latency_batch for one in measured] == [4, 1, 4]
    assert [
        dataclasses.replace(one, latency_ms=0, latency_p90_ms=0, latency_batch=1) for one in measured
    ] == [
        dataclasses.replace(made.artifact(n), latency_ms=0, latency_p90_ms=0, latency_batch=1) for n in names
    ]
    text = render_table(artifact_table(measured), width=140)
    assert all(name in text for name in names)
    with pytest.raises(ValueError, match="No such file: 'nowhere'"):
        keras_taylor.measure_artifacts([dataclasses.replace(measured[0], path="nowhere")])
    with pytest.raises(ValueError, match="nothing to measure"):
        keras_taylor.measure_artifacts([])
    with pytest.raises(TypeError, match=r"a Keras model becomes one by `keras_taylor.export\(.*Received: '"):
        keras_taylor.measure_artifacts([made.model])


@pytest.mark.once
@pytest.mark.slow
def test_budgets_of_bytes(made, tmp_path):
    path = tmp_path / "model.tflite"
    size = made.artifact("integers.tflite").num_bytes
    options = {"quantize": "int8", "int8_io": True, "calibration": inputs_of(made.model)}
    keras_taylor.export(made.model, path, max_bytes=size + 100, max_arena_bytes=1e6, **options)
    with pytest.raises(
        keras_taylor.ExportError, match=r"the limit is 1,000\..*Prune.* judged by its outputs: "
    ):
        keras_taylor.export(made.model, path, max_bytes=1000, overwrite=True, **options)
    assert path.stat().st_size == size and (tmp_path / "model.tflite.rejected").exists()
    with pytest.raises(ValueError, match="Only LiteRT files have a tensor arena"):
        keras_taylor.export(made.model, tmp_path / "model.onnx", max_arena_bytes=1)
    with pytest.raises(ValueError, match=r"larger than 0.*max_bytes=-1"):
        keras_taylor.export(made.model, tmp_path / "other.tflite", max_bytes=-1)


def test_an_artifact_as_text(made):
    artifact = made.artifact("integers.tflite")
    assert Artifact.from_json(artifact.to_json()) == artifact
    assert json.loads(artifact.to_json())["quantize"] == "int8"
    assert "integers.tflite" in str(artifact)
    assert "litert int8" in str(artifact)
    table = render_table(artifact_table([artifact, made.artifact("free.tflite")]), width=80)
    lines = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in table.splitlines() if line[0] in "│┃"]
    assert (
        lines[0] == ["file", "integers.tflite", "free.tflite"]
        and ["format", "litert int8", "litert"] in lines
    )
    rows = render_table(artifact_table([artifact] * 4), width=140)
    assert rows.count("litert int8") == 4 and "p90 ms" in rows.splitlines()[1]
    with pytest.raises(ValueError, match="is not an `Artifact`"):
        Artifact.from_json("{}")


REFUSED = {
    "format": ({"format": "caffe"}, "Unknown format.*Received: format='caffe'"),
    "ending": ({"path": "a.bin", "format": "litert"}, "'<name>.tflite'. Received: path="),
    "directory with an ending": ({"path": "a.onnx", "format": "saved_model"}, "says that it is a file"),
    "parent": ({"path": "no/where/a.onnx"}, "does not exist. Make it first. Received: path="),
    "quantize": ({"path": "a.tflite", "quantize": "int4"}, "Received: quantize='int4'"),
    "quantized onnx": ({"quantize": "float16"}, "Only LiteRT files are quantized.*format='onnx'"),
    "no calibration": ({"path": "a.tflite", "quantize": "int8"}, "Pass `calibration`.*calibration=None"),
    "calibration": ({"calibration": np.ones((2, 4))}, "are for quantize='int8' only.*calibration=ndarray"),
    "integers": ({"path": "a.tflite", "int8_io": True}, "for quantize='int8' only.*int8_io=True"),
    "batch size": ({"batch_size": 0}, "Expected a positive integer.*Received: batch_size=0"),
    "batch size of keras": ({"path": "a.keras", "batch_size": 2}, "the only choice for format='keras'"),
    "tolerance": ({"tolerance": -1}, "Received: tolerance=-1"),
    "existing": ({"path": "there.onnx"}, "exists. Pass overwrite=True"),
    "a directory": ({"path": "folder", "overwrite": True}, "is a directory, but not a SavedModel"),
    "samples": ({"samples": np.ones((3, 5))}, "does not fit the model's inputs.*Expected shapes"),
    "no numbers": ({"samples": np.full((3, 4), np.nan)}, "NaN or infinity"),
    "targets": ({"data": (np.ones((3, 4)), np.ones(3) > 0)}, "Pass `metric`"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_any_work(what, tmp_path, monkeypatch):
    (tmp_path / "there.onnx").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("precious")
    monkeypatch.setattr(exporting, "run_job", None)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    arguments, words = REFUSED[what]
    path = tmp_path / arguments.get("path", "a.onnx")
    with pytest.raises(ValueError, match=words):
        keras_taylor.export(model, path, **{k: v for k, v in arguments.items() if k != "path"})
    assert sorted(os.listdir(tmp_path)) == ["folder", "there.onnx"]
    assert (tmp_path / "there.onnx").read_text() == "precious"


def test_a_directory_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        keras_taylor.export(conv1d(), tmp_path / "a.onnx")


def test_models_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not built"):
        keras_taylor.export(keras.Sequential([keras.layers.Dense(2)]), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="pass what `strip\\(\\)` returns"):
        keras_taylor.export(keras_taylor.PrunableModel(conv1d()), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="Received: model='model' \\(of type str\\)"):
        keras_taylor.export("model", tmp_path / "a.onnx")


def test_outputs_that_say_nothing(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.ops.zeros_like(inputs) + 3)
    with pytest.warns(UserWarning, match="the same outputs for all samples"):
        artifact = keras_taylor.export(model, tmp_path / "a.onnx")
    assert artifact.agreement is None


def test_outputs_that_are_not_finite(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.ops.log(inputs))
    with pytest.raises(ValueError, match=r"own outputs are not finite.*Pass `samples`"):
        keras_taylor.export(model, tmp_path / "a.onnx")


@pytest.mark.parametrize("package", ["onnxruntime", *(["tensorflow"] if BACKEND != "tensorflow" else [])])
def test_a_missing_package_names_the_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"`{package}`: pip install .keras-taylor\[tensorflow,onnx\]"):
        keras_taylor.export(conv1d(), tmp_path / "a.onnx")


def compared(ours, theirs, kind="unknown"):
    return compare_output(np.array(ours, "float32"), np.array(theirs, "float32"), kind)


def off_by(amount):
    return compared([[1, 2 + amount], [4, 3]], [[1, 2], [4, 3]])


def test_differences_and_what_is_made_of_them():
    found = off_by(0.1)
    assert found.difference == pytest.approx(0.1)
    assert found.relative_difference == pytest.approx(0.025)
    assert found.relative_error == pytest.approx((0.01 / 4) ** 0.5 / (2.5 / 2) ** 0.5)
    assert found.agreement == 1 and off_by(-3).agreement == 0.5
    assert compared([[1, 2]], [[1, 2]]).agreement is None  # one class, no evidence
    assert compared([[1, 2], [4, 3]], [[1, 2], [4, 3]], "numbers").agreement is None
    assert off_by(np.nan).relative_difference == np.inf
    with pytest.raises(keras_taylor.ExportError, match="other shapes"):
        compared(np.ones((2, 3)), np.ones((2, 2)))


def test_an_empty_mask_agrees_with_half_of_a_small_object():
    theirs = np.zeros((1, 100))
    theirs[0, :2] = 0.9
    assert compared(theirs, theirs, "mask").agreement == 1
    assert compared(theirs * 0.5, theirs, "mask").agreement == 0.5
    assert compared(20 * theirs - 9, 20 * theirs - 8, "mask").agreement == 1  # logits


def test_what_is_accepted():
    one = OutputError("classes", 1.0, 0.2, 0.3, 0.95)
    assert not judge(None, [one], None, 0.1).is_accepted
    assert judge(None, [one], None, 0.2).is_accepted
    assert (
        judge("int8", [one], None, 0.1).text
        == "judged by its outputs: 95.0% of the classes agree (tolerance 0.1)"
    )
    half = one._replace(agreement=0.5, kind="mask")
    refused = judge("int8", [one, half], None, 0.1)
    assert (
        not refused.is_accepted and "50.0% of the mask agree, the error is 0.3 of the spread" in refused.text
    )
    assert judge("int8", [half._replace(relative_error=0.05)], None, 0.1).is_accepted
    numbers = one._replace(kind="numbers", agreement=None)
    assert not judge("int8", [one, numbers], None, 0.1).is_accepted  # each output on its own
    lost = one._replace(difference=np.inf)
    assert "not finite" in judge("int8", [lost], MetricValues("accuracy", True, 0.9, 0.9), np.inf).text


def test_a_metric_decides_about_what_is_quantized():
    far = [OutputError("mask", 1.0, 0.9, 0.9, 0.5)]
    falls = MetricValues("accuracy", True, 0.9, 0.8)
    refused = judge("int8", far, falls, np.inf, 0.05)
    assert not refused.is_accepted
    why = explain_refusal(refused, "int8")
    assert "'accuracy' falls from 0.9 to 0.8. The largest accepted drop is 0.05. Expected" in why
    accepted = judge("int8", far, falls, np.inf, 0.11)
    assert accepted == (True, "judged by 'accuracy': 0.8, at most 0.11 less than 0.9")
    assert not judge("int8", far, falls, 0.1, 0.11).is_accepted  # a tolerance was asked for
    assert not judge(None, far, falls, 0.1, 0.11).is_accepted
    assert (
        "'mae' grows from 100 to 111" in judge("int8", far, MetricValues("mae", False, 100, 111), np.inf).text
    )
    assert judge("int8", far, MetricValues("mae", False, 100, 109), np.inf).is_accepted
    assert not judge("int8", far, falls._replace(after=np.nan), np.inf).is_accepted


def test_accuracy_of_labels_and_of_one_hot_targets():
    outputs, labels = [np.eye(3)[[0, 1, 2, 2]]], np.array([0, 1, 2, 1])
    assert accuracy(labels, outputs) == accuracy(labels[:, None], outputs) == 0.75
    assert accuracy(np.eye(3)[labels], outputs) == 0.75
    for targets, wrong in ((labels, [*outputs, *outputs]), (labels[:3], outputs), ([labels], outputs)):
        with pytest.raises(ValueError, match="Pass `metric`"):
            accuracy(targets, wrong)


def test_order_and_names():
    assert runners.sort_outputs(["output_10", "output_2"]) == ["output_2", "output_10"]
    assert runners.sort_outputs(["b10", "b2", "a"]) == ["a", "b10", "b2"]
    assert runners.match_inputs(["x/1", "2y"], {"arg_2y": 0, "x_1": 0}) == ["x_1", "arg_2y"]
    with pytest.raises(ValueError, match="are not the model's"):
        runners.match_inputs(["x", "y"], {"x": 0, "z": 0})


def test_a_process_without_work_ends(monkeypatch):
    """Without a fork too, as on systems that have none."""
    monkeypatch.setattr(export_worker, "IDLE_SECONDS", 0.1)
    process = export_worker.workers.worker_for("numpy").process
    with pytest.raises(JobError, match="KeyError: 'no such job'"):
        run_job("numpy", "no such job")
    process.wait(timeout=20)
    code = {"modules": ["no_such_module"], "pickles": {}}
    request = {"path": sys.path, "folder": os.getcwd(), "code": code, "job": "convert"}
    assert export_worker.execute_job(request)["error"] == "ModuleNotFoundError"


def test_the_process_imports_nothing_of_the_working_directory(trapped_folder, monkeypatch):
    monkeypatch.syspath_prepend("")  # as in an interactive Python
    monkeypatch.setattr(export_worker, "workers", export_worker.WorkerPool())
    with pytest.raises(JobError, match="KeyError: 'no such job'"):
        run_job("numpy", "no such job")
    (trapped_folder / "own.py").write_text("raise ValueError('found')")
    with pytest.raises(JobError, match="ValueError: found"):
        run_job("numpy", "no such job", {"modules": ["own"], "pickles": {}})
    path = ["", "lib", str(trapped_folder), "/usr/lib"]
    expected = [str(trapped_folder / "lib"), "/usr/lib", str(trapped_folder)]
    assert installed_first(path, str(trapped_folder)) == expected
    export_worker.workers.close()


def test_the_first_export_says_at_once_what_it_does(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise keras_taylor.ExportError(capsys.readouterr().err)

    export_worker.workers.close()
    monkeypatch.setattr(exporting, "Reference", fail)
    with pytest.raises(keras_taylor.ExportError, match="starting a process with Keras on tensorflow"):
        keras_taylor.export(conv1d(), tmp_path / "a.onnx")
    with pytest.raises(keras_taylor.ExportError, match=r"^$"):
        keras_taylor.export(conv1d(), tmp_path / "a.onnx")


def test_arguments_are_documented():
    names = [n for n in inspect.signature(keras_taylor.export).parameters if n not in ("model", "path")]
    assert all(f"        {name}: " in keras_taylor.export.__doc__ for name in names)
