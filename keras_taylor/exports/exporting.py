"""SavedModel, LiteRT, ONNX and Keras files, from any backend, checked and measured."""

import dataclasses
import os
import pathlib
import tempfile
import warnings
import weakref

import keras
import numpy as np

from keras_taylor.exports.artifacts import Artifact, ExportError, size_of
from keras_taylor.exports.export_checks import check_budgets, check_model, check_options, check_target
from keras_taylor.exports.export_parity import (
    TOLERANCES,
    accuracy,
    compared,
    size_violation,
    tolerance_violation,
)
from keras_taylor.exports.export_worker import JobError, ask
from keras_taylor.exports.formats import check_installed, checked_format
from keras_taylor.exports.runners import random_arrays, read_arrays, write_arrays
from keras_taylor.support.atomic_files import AtomicFile
from keras_taylor.support.datasets import Feed, flat_inputs, inputs_and_targets

NUM_SAMPLES, NUM_CALIBRATION, REPETITIONS = 32, 200, 100

_flat_models: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def export(
    model,
    path,
    format=None,
    quantize=None,
    calibration=None,
    int8_io=False,
    batch_size=None,
    samples=None,
    data=None,
    metric=None,
    tolerance=None,
    max_drop=0.02,
    max_bytes=None,
    max_arena_bytes=None,
    overwrite=False,
):
    """Writes a model for inference elsewhere, runs what was written, and measures it.

    Works the same on every backend: another process, which runs Keras on TensorFlow, loads
    a copy of the model and converts it. What comes out is run there and its outputs are compared
    with the model's on its own backend; only then is it moved to `path`. Layers of your own must
    be registered (`keras.saving.register_keras_serializable`) in a module that can be imported.

    Args:
        model: A built Sequential or Functional model; it is not changed. A `PrunableModel` gives
            one by `strip()`.
        path: The file to write; for "saved_model" a directory. Its parent must exist.
        format: "saved_model" (signature `serving_default`, names as Keras' own export gives
            them), "litert" (`.tflite`, built-in operations only), "onnx" (`.onnx`) or "keras"
            (`.keras`, without the optimizer). `None`: what the ending of `path` says.
        quantize: LiteRT only. `None`: float32. "float16": weights. "dynamic": weights
            of 1024 values or more as int8, activations float32. "int8": weights and activations.
        calibration: "int8" only, and needed there: what the ranges of activations are taken from;
            inputs as `model.fit` takes them (arrays, `(x, y)`, a tf.data.Dataset, a PyDataset,
            ...). At most 200 examples are used: of arrays evenly spread ones, else the first.
        int8_io: "int8" only: whether inputs and outputs are int8 too, by the "scale" and
            "zero_point" in the result; if not, they are float32.
        batch_size: Examples a call takes; `None` leaves it free. Microcontrollers, and some
            recurrent layers in LiteRT, need a fixed one. ("keras": `None` only.)
        samples: Inputs to compare outputs on; in the structure and with the shapes that the model
            takes, batch first. `None`: those of `calibration`, else of `data` (at most 32), else
            32 random ones: standard normal reals, integers 0 and 1.
        data: `(x, y)`, or batches of such, to compute `metric` on for both.
        metric: A callable `(y, outputs)` with arrays (lists of them for a model with several
            outputs) to a number, the larger the better. `None`: accuracy, for integer labels or
            one-hot `y`, of a single output with classes along its last axis.
        tolerance: Largest relative difference to accept; `None`: 1e-4 for float32, 1e-2 for
            "float16", 0.1 for "dynamic" and "int8". For the last two it is enough that no
            larger fraction of the predicted classes differs.
        max_drop: Largest drop of the metric to accept.
        max_bytes: Largest size to accept, in bytes; `None`: any.
        max_arena_bytes: LiteRT only: largest `Artifact.arena_bytes` to accept; `None`: any. With
            `max_bytes` (flash) that is what a microcontroller asks (RAM); leave it some slack.
        overwrite: Whether to replace what is at `path`; only what has the same format is.

    Returns:
        An `Artifact`: sizes in bytes, differences, latency in milliseconds.

    Raises:
        ValueError: for arguments that do not go together, before anything is written.
        ImportError: if a package is missing; it names the extra.
        ExportError: if the model cannot be converted, or what was written does not run, differs by
            more than `tolerance` or `max_drop`, or is larger than `max_bytes` or `max_arena_bytes`; it
            lies beside the target as `<name>.rejected` then. At `path` nothing has changed.

    Example:

    >>> artifact = keras_taylor.export(small, "small.tflite", quantize="int8", calibration=x_train)
    >>> print(artifact)
    """
    target = pathlib.Path(path)
    format = checked_format(target, format)
    check_model(model)
    check_options(format, quantize, calibration, int8_io, batch_size, tolerance)
    check_budgets(format, max_bytes, max_arena_bytes)
    check_target(target, format, overwrite)
    check_installed(format)
    order = {"format": format, "quantize": quantize, "int8_io": int8_io, "batch_size": batch_size}
    with tempfile.TemporaryDirectory() as folder, AtomicFile(target) as draft:
        case = _Case(model, pathlib.Path(folder), samples, calibration, data, metric)
        case.convert(draft.path, order)
        artifact = case.inspect(draft.path, order)
        accepted = _default_tolerance(model, quantize) if tolerance is None else tolerance
        reason = tolerance_violation(artifact, accepted, max_drop) or size_violation(
            artifact, max_bytes, max_arena_bytes
        )
        if reason:
            rejected = draft.move_to(target.with_name(target.name + ".rejected"))
            raise ExportError(f"{reason} It lies at '{rejected}'. Received: path={os.fspath(path)!r}")
        draft.move_to(target)
    return dataclasses.replace(artifact, path=str(target))


def measure_artifacts(artifacts, batch_size=1, repetitions=REPETITIONS):
    """Times artifacts against each other: one call of each in turn, in one process.

    Args:
        artifacts: `Artifact`s, say of the original and of the pruned model. Artifacts of the
            "keras" format run on this process's backend.
        batch_size: Examples a call, where an artifact leaves it free.
        repetitions: Timed calls of each, at most; stops after three seconds for each.

    Returns:
        A list of `Artifact`s with new latencies; `artifacts.artifact_table` makes a table of it.

    Raises:
        ValueError: for an empty list, or an artifact that is not there.
        ExportError: if one does not run.

    Example:

    >>> before, after = keras_taylor.measure_artifacts([big_artifact, small_artifact])
    """
    artifacts = list(artifacts)
    missing = [one.path for one in artifacts if not os.path.exists(one.path)]
    if missing or not artifacts:
        what = f"No such file: '{missing[0]}'" if missing else "There is nothing to measure"
        paths = [one.path for one in artifacts]
        raise ValueError(
            f"{what}. Expected `Artifact`s whose files are there. Received: artifacts with paths {paths}"
        )
    backend = keras.backend.backend() if any(one.format == "keras" for one in artifacts) else "tensorflow"
    fields = ("format", "path", "inputs", "batch_size")
    orders = [{name: getattr(one, name) for name in fields} for one in artifacts]
    for order in orders:
        order["path"] = os.path.abspath(order["path"])
    try:
        measured = ask(
            backend,
            "time_in_turn",
            modules=_user_modules(),
            artifacts=orders,
            batch_size=batch_size,
            repetitions=repetitions,
        )
    except JobError as error:
        raise ExportError(
            f"An artifact does not run ({_short(error)}). "
            f"Received: artifacts with paths {[one.path for one in artifacts]}"
        ) from error
    return [dataclasses.replace(one, **new) for one, new in zip(artifacts, measured, strict=True)]


def convert_model(model, folder, target, order, calibration=None):
    """Writes what `export` writes, without a look at it.

    Args:
        model: A built Sequential or Functional model.
        folder: A directory for what lies in between.
        target: The file or directory to write.
        order: A dict with "format", "quantize", "int8_io" and "batch_size", as of `export`.
        calibration: An `.npz` file with examples ("int8").

    Raises:
        ExportError: if the model cannot be converted.
    """
    source = str(pathlib.Path(folder) / "model.keras")
    try:
        model.save(source)
        arguments = {"source": source, "target": str(target), "calibration": calibration, **order}
        ask(_backend_for(order["format"]), "convert", _user_modules(model), **arguments)
    except (JobError, OSError) as error:
        raise ExportError(_conversion_message(error, model, order)) from error


def _varies(outputs):
    """Whether outputs differ between examples, by more than rounding."""
    return np.ptp(outputs, axis=0).max(initial=0) > 1e-5 * np.abs(outputs).max(initial=0)


def _default_tolerance(model, quantize):
    """That of the format; a model that computes in half precision is itself no more exact than that."""
    half = quantize is None and any(_is_half(layer) for layer in _all_layers(model))
    return TOLERANCES["float16" if half else quantize]


def _is_half(layer):
    return layer.compute_dtype in ("float16", "bfloat16")


class _Case:
    """A model to export, with the examples that go with it as files for the process."""

    def __init__(self, model, folder, samples, calibration, data, metric):
        self._model, self._folder, self._metric = model, folder, metric
        self._names = [t.name for t in model.inputs]
        calibrated = None
        self.calibration = None
        if calibration is not None:
            calibrated = flat_inputs(Feed(calibration, model, targets=False), model, NUM_CALIBRATION)
            self.calibration = self._write("calibration", calibrated)
        self._data = self._targets = None
        if data is not None:
            self._data, self._targets = inputs_and_targets(Feed(data, model), model)
        if samples is not None:
            self._samples = flat_inputs(Feed(samples, model, targets=False), model)
        elif calibrated is not None:
            self._samples = calibrated
        elif self._data is not None:
            self._samples = [a[:NUM_SAMPLES] for a in self._data]
        else:
            dtypes = [keras.backend.standardize_dtype(t.dtype) for t in model.inputs]
            self._samples = random_arrays([t.shape for t in model.inputs], dtypes, NUM_SAMPLES)
        self._reference = self._outputs(self._samples)
        if not all(np.isfinite(y).all() for y in self._reference):
            raise ValueError(
                "The Keras model's own outputs are not finite, so there is nothing to compare with. Pass "
                f"`samples` that it can take. Received: model={model!r}"
            )
        if len(self._samples[0]) > 1 and not any(_varies(y) for y in self._reference):
            warnings.warn(
                "The Keras model gives the same outputs for all samples, so little is learnt from comparing "
                "them. Pass `samples` like the data that the model is made for.",
                stacklevel=3,
            )
        if self._data is not None:
            self._reference_metric = self._score(self._outputs(self._data))

    def convert(self, target, order):
        """Has the artifact written."""
        convert_model(self._model, self._folder, target, order, self.calibration)

    def inspect(self, path, order):
        """Has the artifact run and measured; an `Artifact`."""
        tables = [(self._write("samples", self._samples), str(self._folder / "sampled.npz"))]
        if self._data is not None:
            tables.append((self._write("data", self._data), str(self._folder / "evaluated.npz")))
        try:
            found = ask(
                _backend_for(order["format"]),
                "inspect",
                _user_modules(self._model),
                format=order["format"],
                path=str(path),
                names=self._names,
                batch_size=order["batch_size"],
                tables=tables,
                repetitions=REPETITIONS,
            )
        except JobError as error:
            raise ExportError(
                f"The exported model does not run ({_short(error)}). Nothing is kept of it. "
                f"{_run_hint(order)}Received: model={self._model!r}, {_received(order)}"
            ) from error
        outputs = [read_arrays(target) for _, target in tables]
        return Artifact(
            path=str(path),
            format=order["format"],
            quantize=order["quantize"],
            batch_size=order["batch_size"],
            num_bytes=size_of(path),
            **compared(outputs[0], self._reference),
            metric=None if self._data is None else self._score(outputs[1]),
            model_metric=None if self._data is None else self._reference_metric,
            **found,
        )

    def _write(self, name, arrays):
        path = str(self._folder / f"{name}.npz")
        write_arrays(path, arrays)
        return path

    def _outputs(self, arrays):
        """The model's flattened outputs on its own backend.

        The user's model gets no `predict_function`: another model of the same layers runs. It
        is kept for further exports of the same model, since JAX compiles it for long.
        """
        if self._model not in _flat_models:
            _flat_models[self._model] = keras.Model(self._model.inputs, self._model.outputs)
        flat = _flat_models[self._model]
        parts, size = [], self._model.inputs[0].shape[0] or NUM_SAMPLES
        for start in range(0, len(arrays[0]), size):
            rows = np.arange(start, start + size) % len(arrays[0])  # one shape: compiled once
            outputs = keras.tree.flatten(flat.predict_on_batch([a[rows] for a in arrays]))
            stop = len(arrays[0]) - start
            parts.append([_to_float(y)[:stop] for y in outputs])
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def _score(self, outputs):
        if self._metric is not None:
            single = len(outputs) == 1
            return float(self._metric(self._targets, outputs[0] if single else outputs))
        return accuracy(self._targets, outputs)


def _to_float(y):
    return keras.ops.convert_to_numpy(keras.ops.cast(y, "float32"))


def _backend_for(format):
    return keras.backend.backend() if format == "keras" else "tensorflow"


def _user_modules(model=None):
    """Modules whose import registers the user's classes and functions."""
    objects = list(keras.saving.get_custom_objects().values())
    objects += [] if model is None else [type(layer) for layer in _all_layers(model)]
    modules = {getattr(one, "__module__", None) for one in objects}
    own = ("keras", "keras_taylor", "builtins", "__main__")
    return sorted(m for m in modules if m and m.split(".")[0] not in own)


def _all_layers(model):
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from _all_layers(layer)


def _conversion_message(error, model, order):
    hint = _hint(getattr(error, "kind", type(error).__name__), model, order)
    received = f"model={model!r}, {_received(order)}"
    return (
        f"The model could not be converted ({_short(error)}). Nothing was written. {hint}Received: {received}"
    )


def _hint(kind, model, order):
    """What may help against a conversion that failed with such an error; a sentence, or none."""
    if kind in ("LoadingError", "ModuleNotFoundError"):
        return (
            "It does not load in the process that converts it, where Keras runs on TensorFlow. Classes of "
            "your own must be registered (`keras.saving.register_keras_serializable`) in a module that can "
            "be imported, not in a script or notebook; a layer made of another backend's own "
            "functions cannot be exported to this format. "
        )
    if kind != "ConverterError":
        return ""
    if any(_is_half(layer) for layer in _all_layers(model)):
        return "LiteRT has no convolutions in half precision: make the model with the policy 'float32'. "
    hint = "Expected a model that LiteRT's built-in operations cover. "
    if order["batch_size"] is None:
        hint += "Recurrent layers need a fixed number of examples: try `batch_size=1`. "
    return hint


def _run_hint(order):
    if order["format"] == "onnx":
        return (
            "tf2onnx, which writes it, lacks some operations; known ones are grouped convolutions and "
            "the exact GELU. "
        )
    return "Try `batch_size=1`. " if order["batch_size"] is None and order["format"] != "keras" else ""


def _short(error):
    """TensorFlow's messages run to pages; what happened stands at the beginning."""
    text = " ".join(str(error).split())
    return text if len(text) <= 1000 else text[:1000] + " ..."


def _received(order):
    return ", ".join(f"{key}={value!r}" for key, value in order.items())
