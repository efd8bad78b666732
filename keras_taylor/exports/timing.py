"""Times of calls, of files and of single layers, as they are while the machine is calm."""

import os
import tempfile
import time

import keras
import numpy as np

from keras_taylor.exports.conversion import convert
from keras_taylor.exports.formats import VARIANTS
from keras_taylor.exports.runners import RUNNERS, random_arrays, start_runtime, write_arrays

CALLS, BLOCKS = 3, 5  # calls a block; blocks without a faster one, at least
OF_MODELS, OF_LAYERS = (0.7, 6.0), (0.03, 0.3)  # seconds without a faster block, and in all


class Called:
    """A model as it runs on this process's backend: `predict_on_batch` of one of the same layers."""

    def __init__(self, model):
        self._model = keras.Model(model.inputs, model.outputs)  # the given one gains no function
        shapes = [tuple(t.shape) for t in model.inputs]
        self.details = [
            (s, keras.backend.standardize_dtype(t.dtype)) for s, t in zip(shapes, model.inputs, strict=True)
        ]

    def prepare(self, arrays):
        """Arrays as the model wants them."""
        return arrays

    def run(self, prepared):
        """One call."""
        return self._model.predict_on_batch(prepared)


def calm_time(runner, arrays, patience, most):
    """Nanoseconds of one call: the least of the medians of many short blocks of calls.

    What else the machine does makes blocks slower, never faster, so the fastest one is what
    there is to know of the runner itself; on a calm machine it is about the median of all calls.

    Args:
        runner: An object with `prepare` and `run`, as in `runners`.
        arrays: What it is called with.
        patience: Seconds without a faster block after which it is enough (and after five blocks).
        most: Seconds in all, if five blocks do not take longer.

    Returns:
        An int.
    """
    prepared = runner.prepare(arrays)
    for _ in range(2):  # compiles, allocates
        runner.run(prepared)
    best, slower, number = float("inf"), 0, 0
    found = now = start = time.perf_counter()
    while number < BLOCKS or ((now - found < patience or slower < BLOCKS) and now - start < most):
        block, now = _block(runner, prepared), time.perf_counter()
        number, slower = number + 1, slower + 1
        if block < 0.995 * best:
            found, slower = now, 0
        best = min(best, block)
    return int(best)


def _block(runner, prepared):
    times = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        runner.run(prepared)
        times.append(time.perf_counter_ns() - start)
    return float(np.median(times))


def time_model(model, batch_size):
    """Nanoseconds of one call of a model on this process's backend."""
    runner = Called(model)
    return calm_time(runner, _random(runner.details, batch_size), *OF_MODELS)


def time_file(variant, path, names, batch_size):
    """Nanoseconds of one call of an exported model, in the runtime of its format.

    Args:
        form: Key of `formats.VARIANTS`.
        path: The file.
        names: Names of the Keras model's flattened inputs.
        batch_size: Examples a call.
    """
    runner = _runner(variant, path, names)
    return calm_time(runner, _random(_details(runner), batch_size), *OF_MODELS)


def time_layers(variant, layers, batch_size):
    """Nanoseconds of one call of each of several layers alone.

    Args:
        form: Key of `formats.VARIANTS`; "keras": this process's backend.
        layers: Dicts with "layer" (a serialized layer), "shape" (of its input, without the batch's axis) and
            "dtype".
        batch_size: Examples a call.

    Returns:
        A list of ints, `None` for a layer that cannot be converted or run alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        return [
            _layer_time(variant, one, batch_size, os.path.join(folder, str(k)))
            for k, one in enumerate(layers)
        ]


def _layer_time(variant, one, batch_size, place):
    try:
        model = _model_of(one)
        runner = Called(model) if variant == "keras" else _converted(variant, one, model, batch_size, place)
        return calm_time(runner, _random(_details(runner), batch_size), *OF_LAYERS)
    except Exception:  # whatever converters raise: what cannot be timed alone is left to the whole
        return None


def _converted(variant, one, model, batch_size, place):
    os.mkdir(place)
    kind = VARIANTS[variant]
    source, target = os.path.join(place, "layer.keras"), os.path.join(place, f"layer{kind.suffix}")
    model.save(source)
    calibration = None
    if kind.quantize == "int8":
        calibration = os.path.join(place, "calibration.npz")
        write_arrays(calibration, random_arrays([(None, *one["shape"])], [one["dtype"]], 4))
    convert(source, target, kind.format, batch_size, kind.quantize, calibration=calibration)
    return _runner(variant, target, [t.name for t in model.inputs])


def _model_of(one):
    layer = keras.saving.deserialize_keras_object(one["layer"], safe_mode=False)
    model = keras.Sequential([keras.Input(one["shape"], dtype=one["dtype"]), layer])
    random = np.random.default_rng(0)
    for weight in model.weights:
        if "float" in weight.dtype:  # zeros may be optimized away
            weight.assign(random.uniform(0.01, 0.1, weight.shape).astype("float32"))
    return model


def _runner(variant, path, names):
    format = VARIANTS[variant].format
    start_runtime(format)
    return RUNNERS[format](str(path), list(names))


def _details(runner):
    if isinstance(runner, Called):
        return runner.details
    return [(tuple(d["shape"]), d["dtype"]) for d in runner.inputs.values()]


def _random(details, batch_size):
    shapes, dtypes = zip(*details, strict=True)
    return random_arrays(shapes, dtypes, batch_size)
