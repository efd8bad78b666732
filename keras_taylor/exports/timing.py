"""Times of calls: of models, of files and of single layers."""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any, Final, NotRequired, TypedDict

import keras
import numpy as np

from keras_taylor.exports.conversion import save_and_convert
from keras_taylor.exports.formats import VARIANTS, ExportSettings, Variant
from keras_taylor.exports.runners import KerasRunner, Runner, load_runner, random_examples, start_runtime
from keras_taylor.reading.walk import calls_without_trace
from keras_taylor.support.files import scratch_folder
from keras_taylor.support.types import Array

_NUM_WARM_UP_CALLS = 5
_SECONDS_PER_RUNNER = 3.0
CALLS_PER_BLOCK = 3
MIN_BLOCKS = 5


class Latency(TypedDict):
    """Attributes of an `Artifact` that say how long a call takes."""

    latency_ms: float
    latency_p90_ms: float
    latency_batch: int


class ExportedFile(TypedDict):
    """A file as another process is told of it.

    Attributes:
        format: Key of `formats.SUFFIXES`.
        path: The file.
        names: Names of the Keras model's flattened inputs.
        batch_size: Number of examples that a call takes; `None` for any number.
    """

    format: str
    path: str
    names: list[str]
    batch_size: int | None


class IsolatedLayer(TypedDict):
    """A layer that is timed alone.

    Attributes:
        layer: The layer as `keras.saving.serialize_keras_object` returns it.
        shape: Shape of its input without the batch axis.
        dtype: Dtype of its input.
        num_rows: How many rows of the batch axis belong to one example, if not one.
    """

    layer: dict[str, Any]
    shape: list[int | None]
    dtype: str
    num_rows: NotRequired[int]


@dataclasses.dataclass(frozen=True)
class TimeLimits:
    """When to stop timing.

    Attributes:
        patience: Seconds without a faster block of calls after which it ends.
        total: Seconds after which it ends anyway.
    """

    patience: float
    total: float


MODEL_LIMITS: Final = TimeLimits(patience=0.7, total=6.0)
LAYER_LIMITS: Final = TimeLimits(patience=0.03, total=0.3)


def time_in_turn(
    runners: Sequence[Runner], arrays: Sequence[Sequence[Array]], repetitions: int
) -> list[list[float]]:
    """Seconds of each call of each runner, one call of each in turn.

    A phase in which the machine is slow affects all of them alike.

    Args:
        runners: The models.
        arrays: The inputs of each.
        repetitions: Number of timed calls of each, at most. It ends earlier after three seconds a runner.
    """
    prepared = [runner.prepare(inputs) for runner, inputs in zip(runners, arrays, strict=True)]
    times: list[list[float]] = [[] for _ in runners]
    end: float | None = None
    for repetition in range(-_NUM_WARM_UP_CALLS, repetitions):
        for runner, inputs, seconds in zip(runners, prepared, times, strict=True):
            start = time.perf_counter()
            runner.run(inputs)
            if repetition >= 0:
                seconds.append(time.perf_counter() - start)
        end = end or time.perf_counter() + _SECONDS_PER_RUNNER * len(runners)
        if time.perf_counter() > end and repetition >= 0:
            break
    return times


def summarize_latency(seconds: Sequence[float], batch_size: int) -> Latency:
    """Percentiles of the times of calls with `batch_size` examples each."""
    median, p90 = np.percentile(seconds, (50, 90)) * 1000
    return {"latency_ms": float(median), "latency_p90_ms": float(p90), "latency_batch": batch_size}


def time_files(files: Sequence[ExportedFile], batch_size: int, repetitions: int) -> list[Latency]:
    """Times exported files in one process, one call of each in turn.

    Args:
        files: The files.
        batch_size: Number of examples in a call, for files that take any number.
        repetitions: Number of timed calls of each, at most.
    """
    for format in {file["format"] for file in files}:
        start_runtime(format)  # all of them before any model is loaded
    runners = [load_runner(file["format"], file["path"], file["names"]) for file in files]
    sizes = [file["batch_size"] or batch_size for file in files]
    arrays = [random_examples(runner, size) for runner, size in zip(runners, sizes, strict=True)]
    times = time_in_turn(runners, arrays, repetitions)
    return [summarize_latency(seconds, size) for seconds, size in zip(times, sizes, strict=True)]


def min_block_median(runner: Runner, arrays: Sequence[Array], limits: TimeLimits) -> int:
    """Nanoseconds of one call: the smallest median over many short blocks of calls.

    Other work on the machine makes blocks slower but never faster, so the fastest block says most about
    the model itself. On a quiet machine it is close to the median of all calls.

    Args:
        runner: The model.
        arrays: Its inputs.
        limits: When to stop. At least `MIN_BLOCKS` blocks are timed. Unless `limits.total` has
            passed, at least `MIN_BLOCKS` blocks follow the fastest one.
    """
    prepared = runner.prepare(arrays)
    for _ in range(2):  # compiles, allocates
        runner.run(prepared)
    best, num_since_best, num = float("inf"), 0, 0
    best_at = now = start = time.perf_counter()
    while num < MIN_BLOCKS or (
        (now - best_at < limits.patience or num_since_best < MIN_BLOCKS) and now - start < limits.total
    ):
        median, now = _block_median(runner, prepared), time.perf_counter()
        num, num_since_best = num + 1, num_since_best + 1
        if median < 0.995 * best:
            best_at, num_since_best = now, 0
        best = min(best, median)
    return int(best)


def _block_median(runner: Runner, prepared: Any) -> float:
    """Median time of a few calls, in nanoseconds."""
    times = []
    for _ in range(CALLS_PER_BLOCK):
        start = time.perf_counter_ns()
        runner.run(prepared)
        times.append(time.perf_counter_ns() - start)
    return float(np.median(times))


def time_model(model: keras.Model, batch_size: int) -> int:
    """Nanoseconds of one call with `batch_size` examples, on this process's backend."""
    runner = KerasRunner(model)
    with calls_without_trace(model):
        return min_block_median(runner, random_examples(runner, batch_size), MODEL_LIMITS)


def time_file(variant: str, path: str, names: Sequence[str], batch_size: int) -> int:
    """Nanoseconds of one call of an exported file.

    Args:
        variant: Key of `formats.VARIANTS`.
        path: The file.
        names: Names of the Keras model's flattened inputs.
        batch_size: Number of examples in a call.
    """
    runner = load_runner(VARIANTS[variant].format, path, names)
    return min_block_median(runner, random_examples(runner, batch_size), MODEL_LIMITS)


def time_layers(variant: str, layers: Sequence[IsolatedLayer], batch_size: int) -> list[int | None]:
    """Nanoseconds of one call of each of several layers alone.

    Args:
        variant: Key of `formats.VARIANTS`. "keras" is this process's backend, without a file.
        layers: The layers.
        batch_size: Number of examples in a call.

    Returns:
        A list with an int for each layer, `None` for one that cannot be converted or run alone.
    """
    return [_time_layer(VARIANTS[variant], layer, batch_size) for layer in layers]


def _time_layer(variant: Variant, layer: IsolatedLayer, batch_size: int) -> int | None:
    batch_size *= layer.get("num_rows", 1)
    try:
        model = _build_model(layer)
        with scratch_folder() as folder:
            runner = (
                KerasRunner(model)
                if variant.format == "keras"
                else _convert_and_load(variant, model, batch_size, folder)
            )
            return min_block_median(runner, random_examples(runner, batch_size), LAYER_LIMITS)
    except Exception:  # converters raise errors of any class
        return None


def _convert_and_load(variant: Variant, model: keras.Model, batch_size: int, folder: str) -> Runner:
    path = os.path.join(folder, f"layer{variant.suffix}")
    save_and_convert(model, path, ExportSettings(variant.format, variant.quantize, batch_size=batch_size))
    return load_runner(variant.format, path, [tensor.name for tensor in model.inputs])


def _build_model(isolated: IsolatedLayer) -> keras.Model:
    """A model of one layer, with small random weights."""
    layer = keras.saving.deserialize_keras_object(isolated["layer"], safe_mode=False)
    model = keras.Sequential([keras.Input(isolated["shape"], dtype=isolated["dtype"]), layer])
    random = np.random.default_rng(0)
    for weight in model.weights:
        if "float" in weight.dtype:  # converters may remove computation with zeros
            weight.assign(random.uniform(0.01, 0.1, weight.shape).astype("float32"))
    return model
