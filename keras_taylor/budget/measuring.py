"""Measurements of models at several widths, from which predictions for other widths learn."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np

from keras_taylor.budget.cost_predictions import CalibrationCurve, PredictedCosts, WeightBytes
from keras_taylor.budget.costs import known_cost
from keras_taylor.budget.layer_times import LayerTimes
from keras_taylor.budget.measured_costs import MeasuredCost, measured_cost_of
from keras_taylor.exports.artifacts import ExportError, size_on_disk
from keras_taylor.exports.export_worker import JobError, run_job
from keras_taylor.exports.exporting import convert_model
from keras_taylor.exports.formats import VARIANTS, ExportSettings, check_installed
from keras_taylor.exports.timing import time_model
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.support.files import scratch_folder
from keras_taylor.support.keras_internals import layers_inside
from keras_taylor.support.replicas import num_processes
from keras_taylor.support.types import BoolArray, Costs

_SUSPICIOUS_RATIO = 1.05  # a time that is longer than predicted by this factor is measured twice


class Measurements:
    """Measures the costs that a goal asks for, for one network at several widths.

    Every measurement improves the predictions. A prediction is a piecewise linear function through all
    measurements. Its argument is the number of bytes of all weights (`WeightBytes`), or the sum of the
    layers' own times (`LayerTimes`).

    Args:
        labeled: The whole model.
        keys: Measured parts of a goal, as in `goals.Goal.measured`.
        batch_size: Number of examples in a call, where times are measured.
        cache_dir, say: As in `layer_times.LayerTimes`.

    Attributes:
        keys: The measured parts.
        before: Measured part -> amount of the whole model, an int in bytes or nanoseconds.

    Raises:
        ValueError: if the goal asks for the latency of a model with inputs of unknown size.
        ImportError: if a format needs a package that is missing.
        ExportError: if the model cannot be exported.
    """

    def __init__(
        self,
        labeled: LabeledModel,
        keys: Sequence[str],
        batch_size: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._batch_size = batch_size
        self.keys = tuple(keys)
        found = {key: measured_cost_of(key) for key in self.keys}
        self._costs = {key: cost for key, cost in found.items() if cost is not None}
        for cost in self._costs.values():
            check_installed(VARIANTS[cost.variant].format)
        self._curves = {key: CalibrationCurve() for key in self.keys}
        self._layer_times: dict[str, LayerTimes] = {}
        for key, cost in self._costs.items():
            if cost.kind == "latency":
                _check_single_process(key)
                _check_input_sizes(labeled.graph.model, key)
                self._layer_times[key] = LayerTimes(labeled, cost.variant, batch_size, cache_dir, say)
        self.before: dict[str, int] = {}
        self.before = self.observe(labeled, np.ones(labeled.num_units, bool), labeled.graph.model)

    def costs(self, labeled: LabeledModel) -> PredictedCosts:
        """The counted costs of a model, and predictions of the measured ones."""
        surrogates = {
            key: self._layer_times[key](labeled)
            if key in self._layer_times
            else WeightBytes(labeled, cost.variant)
            for key, cost in self._costs.items()
        }
        return PredictedCosts(labeled, surrogates, self._curves)

    def best_multiple(self) -> int:
        """The best multiple of channels where times are measured, see `LayerTimes.best_multiple`; else 1."""
        return max((times.best_multiple() for times in self._layer_times.values()), default=1)

    def measure(self, model: keras.Model) -> dict[str, int]:
        """Exports a model and measures it: measured part -> bytes or nanoseconds."""
        with scratch_folder() as folder:
            return {key: self._measure_cost(model, folder, self._costs[key]) for key in self.keys}

    def _measure_cost(self, model: keras.Model, folder: str, cost: MeasuredCost) -> int:
        if cost.kind == "bytes":
            return size_on_disk(
                _export_file(model, folder, cost.variant, _batch_size_of_file(model, cost.variant))
            )
        if cost.variant == "keras":
            return time_model(model, self._batch_size)
        path = _export_file(model, folder, cost.variant, self._batch_size)
        return _time_exported(path, model, cost.variant, self._batch_size)

    def observe(self, labeled: LabeledModel, kept: BoolArray, model: keras.Model) -> dict[str, int]:
        """Measures a smaller model and lets the predictions learn from it.

        Args:
            labeled: The model that it was cut from.
            kept: The units that it kept, a bool array `(num_units,)`.
            model: The smaller model.

        Returns:
            Measured part -> bytes or nanoseconds.
        """
        amounts = self.measure(model)
        costs = self.costs(labeled)
        if self.before and self._has_suspicious_time(amounts, costs(kept)):
            again = self.measure(model)  # something else may have kept the machine busy
            amounts = {key: min(amount, again[key]) for key, amount in amounts.items()}
        surrogates = costs.surrogates(kept)
        for key, amount in amounts.items():
            self._curves[key].learn(surrogates[key], amount)
        return amounts

    def _has_suspicious_time(self, amounts: Mapping[str, int], predicted: Costs) -> bool:
        """Whether any time is much longer than predicted."""
        return any(amounts[key] > _SUSPICIOUS_RATIO * known_cost(predicted, key) for key in self._layer_times)


def _batch_size_of_file(model: keras.Model, variant: str) -> int | None:
    """The batch size of a file whose bytes count: `None`, any, but where LiteRT takes recurrent layers."""
    is_recurrent = any(isinstance(layer, keras.layers.RNN) for layer in layers_inside(model))
    return 1 if is_recurrent and VARIANTS[variant].format == "litert" else None


def _export_file(
    model: keras.Model, folder: str, variant: str, batch_size: int | None = None
) -> pathlib.Path:
    """Writes the file that `export` writes, into a folder; returns its path.

    Args:
        model: A built Sequential or Functional model.
        folder: A directory.
        variant: Key of `formats.VARIANTS`.
        batch_size: Number of examples that a call takes; `None` for any number.
    """
    found = VARIANTS[variant]
    path = pathlib.Path(folder) / f"{variant}-{batch_size}{found.suffix}"
    convert_model(model, path, ExportSettings(found.format, found.quantize, batch_size=batch_size))
    return path


def _time_exported(path: pathlib.Path, model: keras.Model, variant: str, batch_size: int) -> int:
    """Nanoseconds of one call of a file that `_export_file` wrote.

    Raises:
        ExportError: if the file does not run.
    """
    names = [tensor.name for tensor in model.inputs]
    try:
        nanoseconds: int = run_job(
            "tensorflow", "time_file", variant=variant, path=str(path), names=names, batch_size=batch_size
        )
    except JobError as error:
        raise ExportError(f"The exported model does not run ({error}). Received: model={model!r}") from error
    return nanoseconds


def _check_single_process(key: str) -> None:
    """Raises a ValueError if several processes would make plans by their own measured times."""
    if num_processes() > 1:
        raise ValueError(
            "Each process would measure different times and make a different plan. Expected one process, "
            f"or a goal without a latency. Received: goal for {key!r} in {num_processes()} processes"
        )


def _check_input_sizes(model: keras.Model, key: str) -> None:
    """Raises a ValueError if an input of the model has an axis of unknown size."""
    if any(size is None for tensor in model.inputs for size in tensor.shape[1:]):
        raise ValueError(
            "The latency is unknown because the model's input has axes of unknown size. Expected a model "
            f"with a fixed input shape, or a goal for parameters instead. Received: goal for {key!r}"
        )
