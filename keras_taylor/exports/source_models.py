"""The Keras model that is exported: its layers, the modules that define them, its outputs on examples."""

import base64
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import pickle
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self, TypedDict

import keras
import numpy as np

from keras_taylor.exports.export_parity import (
    LOSSY,
    TOLERANCES,
    MetricValues,
    OutputError,
    OutputKind,
    accuracy,
    compare_output,
    labels_of_classes,
)
from keras_taylor.reading.cloning import compile_settings, losses_by_output, output_names
from keras_taylor.reading.walk import calls_without_trace
from keras_taylor.support.arguments import larger_is_better
from keras_taylor.support.arrays import as_float32, as_number, outputs_in_batches, random_inputs
from keras_taylor.support.datasets import Feed, flat_inputs, inputs_and_targets
from keras_taylor.support.keras_internals import layers_inside, output_structure, producer
from keras_taylor.support.types import Array, Data, FloatArray, Tree

_NUM_SAMPLES = 32
_MAX_CALIBRATION = 200
_NOT_OWN: Final = ("keras", "keras_taylor", "builtins")  # packages whose classes are not the user's
_EITHER_LOSS = ("crossentropy", "ce")
# Parts of the names of losses and activations, by what their output says.
_WORDS: Final[dict[OutputKind, tuple[str, ...]]] = {
    "classes": ("categorical", "kl_div", "softmax"),
    "mask": ("binary", "sigmoid"),
    "numbers": ("mean_", "squared", "absolute", "huber", "log_cosh"),
}

Metric = Callable[[Any, Any], float]


def has_half_precision(model: keras.Model) -> bool:
    """Whether any layer computes in float16 or bfloat16."""
    return any(layer.compute_dtype in ("float16", "bfloat16") for layer in layers_inside(model))


def accepted_error(model: keras.Model, quantize: str | None, has_metric: bool) -> float:
    """The tolerance for a precision; any error where a metric decides.

    A model that computes in half precision is no more accurate itself.
    """
    if has_metric and quantize in LOSSY:
        return math.inf
    return TOLERANCES["float16" if quantize is None and has_half_precision(model) else quantize]


class UserCode(TypedDict):
    """What another process needs to load a model with classes and functions of the user's own.

    Attributes:
        modules: Names of the modules that register them when they are imported.
        pickles: Those that no import brings, by the name under which Keras looks for them, as pickles in
            base64.
    """

    modules: list[str]
    pickles: dict[str, str]


def find_user_code(model: keras.Model | None = None) -> UserCode:
    """The user's classes and functions that Keras knows, and those of a model's layers.

    Classes of a script or notebook are pickled by value, those that are not registered by reference. Without
    the package `cloudpickle` there are only modules. What cannot be pickled is left out.
    """
    registered = keras.saving.get_custom_objects()
    types = [] if model is None else [type(each) for each in (model, *layers_inside(model))]
    known = {**{keras.saving.get_registered_name(each): each for each in types}, **registered}
    own = {name: value for name, value in known.items() if _root_module(value) not in _NOT_OWN}
    modules = {value.__module__ for value in own.values() if _root_module(value) != "__main__"}
    pickles = {}
    if importlib.util.find_spec("cloudpickle") is not None:
        import cloudpickle

        needed = None if model is None else json.dumps(model.get_config(), default=str)
        for name, value in own.items():
            if (name not in registered or _is_made_here(value)) and (needed is None or name in needed):
                with contextlib.suppress(Exception):  # anything can be in a class
                    pickles[name] = base64.b64encode(cloudpickle.dumps(value)).decode()
    return {"modules": sorted(modules), "pickles": pickles}


def load_user_code(code: UserCode) -> None:
    """Makes Keras know what `find_user_code` found in another process, the user's own.

    A pickle that does not load is left out: a model that needs it does not load either.
    """
    for name in code["modules"]:
        importlib.import_module(name)
    for name, text in code["pickles"].items():
        try:
            value = pickle.loads(base64.b64decode(text))
        except Exception:
            traceback.print_exc()
            continue
        package, is_registered, short = name.rpartition(">")
        if is_registered:
            keras.saving.register_keras_serializable(package, short)(value)
        else:
            keras.saving.get_custom_objects()[name] = value


def _is_made_here(value: Any) -> bool:
    """Whether a class or function is none that an import makes."""
    return _root_module(value) == "__main__" or "<locals>" in getattr(value, "__qualname__", "")


def _root_module(value: Any) -> str:
    return (getattr(value, "__module__", None) or "builtins").split(".")[0]


@dataclasses.dataclass(frozen=True)
class ExportExamples:
    """The examples that go with an export, as flat lists of arrays in the order of the model's inputs.

    Attributes:
        samples: Inputs to compare outputs on.
        calibration: Inputs to calibrate on, `None` where there are none.
        data: Inputs to compute the metric on, `None` where there are none.
        targets: Targets for `data`.
    """

    samples: list[Array]
    calibration: list[Array] | None = None
    data: list[Array] | None = None
    targets: Tree = None

    @classmethod
    def collect(
        cls, model: keras.Model, samples: Data = None, calibration: Data = None, data: Data = None
    ) -> Self:
        """Reads what users pass to `export`; samples are made where there are none."""
        calibrated = flat_data = targets = None
        if calibration is not None:
            calibrated = flat_inputs(Feed(calibration, model, targets=False), model, _MAX_CALIBRATION)
        if data is not None:
            flat_data, targets = inputs_and_targets(Feed(data, model), model)
        if samples is not None:
            flat = flat_inputs(Feed(samples, model, targets=False), model)
        elif calibrated is not None:
            flat = calibrated
        elif flat_data is not None:
            flat = [array[:_NUM_SAMPLES] for array in flat_data]
        else:
            flat = random_inputs(model.inputs, _NUM_SAMPLES)
        return cls(flat, calibrated, flat_data, targets)


class ExportMetric:
    """The metric of outputs for the user's data.

    It is a callable of the user's, else the first compiled metric, else the accuracy. For targets that
    have no accuracy it is the compiled loss.

    Args:
        model: The model that is exported.
        examples: The examples, with data.
        metric: A callable `(y, outputs)`, or `None`.

    Raises:
        ValueError: for targets that have no accuracy, if the model is not compiled.
    """

    def __init__(self, model: keras.Model, examples: ExportExamples, metric: Metric | None = None) -> None:
        self._targets, self._metric = examples.targets, metric
        self._compiled: keras.Model | None = None
        if metric is not None:
            return
        settings = compile_settings(model) or {"loss": None, "metrics": None, "weighted_metrics": None}
        has_metrics = _has_metrics(settings)
        try:
            _check_accuracy_is_defined(model, examples)
        except ValueError:
            # metrics of labels beyond the classes would be wrong without a word
            if _takes_labels(settings["loss"]) or not (has_metrics or settings["loss"] is not None):
                raise
            self._compiled = _model_of_outputs(model, settings)
        else:
            self._compiled = _model_of_outputs(model, settings) if has_metrics else None

    def score(self, outputs: Sequence[Array]) -> tuple[str, float]:
        """Name and value of the metric for flattened outputs."""
        if self._compiled is not None:
            values = self._compiled.evaluate(list(outputs), self._targets, verbose=0, return_dict=True)
            name = next((name for name in values if not name.endswith("loss")), "loss")
            return name, as_number(values[name])
        if self._metric is None:
            return "accuracy", accuracy(self._targets, outputs)
        name = getattr(self._metric, "__name__", "metric")
        return name, float(self._metric(self._targets, outputs[0] if len(outputs) == 1 else outputs))

    def larger_is_better(self, name: str) -> bool:
        """Whether a metric of this name is better the larger it is: the user's own are."""
        return self._compiled is None or larger_is_better(name)


def _has_metrics(settings: Mapping[str, Any]) -> bool:
    found = [settings["metrics"], settings["weighted_metrics"]]
    return any(one is not None for one in keras.tree.flatten(found))


def _takes_labels(loss: Any) -> bool:
    """Whether a loss takes the number of a class for each example or pixel."""
    loss = keras.losses.get(loss) if isinstance(loss, str) and loss not in _EITHER_LOSS else loss
    name = _name_of(getattr(loss, "fn", loss))
    return name == "sparse_categorical_crossentropy" and getattr(loss, "ignore_class", None) is None


def _check_accuracy_is_defined(model: keras.Model, examples: ExportExamples) -> None:
    """Refuses targets that have no accuracy, as far as the shapes of the model's outputs are known."""
    shapes = [tuple(output.shape[1:]) for output in model.outputs]
    if examples.data is not None and not any(None in shape for shape in shapes):
        labels_of_classes(examples.targets, [(len(examples.data[0]), *shape) for shape in shapes])


def _model_of_outputs(model: keras.Model, settings: Mapping[str, Any]) -> keras.Model:
    """A model from outputs to the same outputs, compiled as another one is: it evaluates those of a file."""
    inputs = [keras.Input(output.shape[1:]) for output in model.outputs]
    named = zip(inputs, output_names(model), strict=True)
    outputs = [keras.layers.Identity(name=name, dtype="float32")(x) for x, name in named]
    structure = output_structure(model)
    packed = outputs[0] if structure is None else keras.tree.pack_sequence_as(structure, outputs)
    result = keras.Model(inputs, packed)
    result.compile(**{**settings, "optimizer": "sgd", "run_eagerly": True, "jit_compile": False})
    return result


class FlatModels:
    """For each Keras model that is alive, a model of the same layers with a flat list of outputs.

    The user's model gets no predict function: the other one runs. It is kept for further exports of the
    same model, since JAX takes long to compile it.
    """

    def __init__(self) -> None:
        self._models: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def model_for(self, model: keras.Model) -> keras.Model:
        """The other model, which is made on the first call."""
        if model not in self._models:
            self._models[model] = keras.Model(model.inputs, model.outputs)
        return self._models[model]


_flat_models = FlatModels()


class Reference:
    """The Keras model's own outputs and metric, which an artifact's are compared with.

    Args:
        model: The model that is exported.
        examples: The examples to run it on.
        metric: The metric on `examples.data`; `None` without data.

    Attributes:
        examples: The examples.
        outputs: Flattened outputs for `examples.samples`.

    Raises:
        ValueError: if outputs are not finite.
    """

    def __init__(
        self, model: keras.Model, examples: ExportExamples, metric: ExportMetric | None = None
    ) -> None:
        self.examples, self._metric = examples, metric
        self.outputs = _predict(model, examples.samples)
        if not all(np.isfinite(output).all() for output in self.outputs):
            raise ValueError(
                "The Keras model's own outputs are not finite, so there is nothing to compare with. Pass "
                f"`samples` that give finite outputs. Received: model={model!r}"
            )
        if len(examples.samples[0]) > 1 and not any(_varies(output) for output in self.outputs):
            warnings.warn(
                "The Keras model gives the same outputs for all samples, so a comparison says little. "
                "Pass `samples` that resemble the model's real inputs.",
                stacklevel=3,
            )
        self._kinds = _kinds_of_outputs(model, self.outputs)
        self._before = metric.score(_predict(model, examples.data or ())) if metric else ("", 0.0)

    def compare(self, outputs: Sequence[Array]) -> list[OutputError]:
        """How far each of an artifact's outputs for `examples.samples` is from the model's."""
        return [compare_output(*one) for one in zip(outputs, self.outputs, self._kinds, strict=True)]

    def metric_values(self, outputs: Sequence[Array]) -> MetricValues | None:
        """The metric of the model and of an artifact that has these outputs for `examples.data`."""
        if self._metric is None:
            return None
        (name, before), (_, after) = self._before, self._metric.score(outputs)
        return MetricValues(name, self._metric.larger_is_better(name), before, after)


def _kinds_of_outputs(model: keras.Model, outputs: Sequence[FloatArray]) -> list[OutputKind]:
    """What each output says, by its compiled loss, else by its activation, else by its values."""
    losses = losses_by_output(model, len(outputs))
    if len(losses) != len(outputs):
        losses = [None] * len(outputs)
    return [_kind_of_output(*one) for one in zip(losses, model.outputs, outputs, strict=True)]


def _kind_of_output(loss: Any, tensor: keras.KerasTensor, output: FloatArray) -> OutputKind:
    if isinstance(loss, str) and loss not in _EITHER_LOSS:
        loss = keras.losses.get(loss)
    loss = loss if isinstance(loss, str) else getattr(loss, "fn", loss)
    layer = producer(tensor)
    activation = getattr(layer, "activation", layer)
    for name in (loss if isinstance(loss, str) else _name_of(loss), _name_of(activation)):
        if name in _EITHER_LOSS:
            return "classes" if output.shape[-1] > 1 else "mask"
        for kind, words in _WORDS.items():
            if any(word in name.lower() for word in words):
                return kind
    is_distribution = output.ndim > 1 and output.shape[-1] > 1 and output.min(initial=0) >= 0
    return "classes" if is_distribution and np.allclose(output.sum(-1), 1, atol=1e-3) else "unknown"


def _name_of(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))


def _predict(model: keras.Model, arrays: Sequence[Array]) -> list[FloatArray]:
    """A model's flattened outputs on its own backend."""
    flat = _flat_models.model_for(model)
    size = model.inputs[0].shape[0] or _NUM_SAMPLES
    with calls_without_trace(model):
        return outputs_in_batches(lambda batch: as_float32(flat.predict_on_batch(batch)), arrays, size)


def _varies(outputs: FloatArray) -> bool:
    """Whether outputs differ between examples by more than rounding."""
    return bool(np.ptp(outputs, axis=0).max(initial=0) > 1e-5 * np.abs(outputs).max(initial=0))
