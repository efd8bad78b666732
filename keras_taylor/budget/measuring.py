"""Bytes of files and times of calls: measured, and predicted in between for any widths."""

import pathlib
import tempfile

import keras
import numpy as np

from keras_taylor.budget.costs import CostModel, counted_weights
from keras_taylor.budget.layer_times import LayerTimes
from keras_taylor.budget.measured_costs import measured_cost_of
from keras_taylor.exports.artifacts import ExportError, size_on_disk
from keras_taylor.exports.export_worker import JobError, run_job
from keras_taylor.exports.exporting import convert_model
from keras_taylor.exports.formats import VARIANTS, ExportSettings, check_installed
from keras_taylor.exports.timing import time_model
from keras_taylor.support.replicas import num_processes

_BYTES_A_NUMBER = {None: 4, "float16": 2, "dynamic": 1, "int8": 1}  # of matrices; all else is float32
_NOT_QUANTIZED = 1024  # "dynamic" leaves smaller matrices as they are
_DOUBTED = 1.05  # a time so many times the predicted one is measured twice


class Measurements:
    """What goals ask of a network that has to be measured, for one network at several widths.

    Every measurement teaches the predictions: between two of them they run straight, in the bytes of
    the weights (`WeightBytes`) or in the sum of the layers' own times (`LayerTimes`), and they go
    through each.

    Args:
        channels: `groups.LabeledModel` of the whole model.
        keys: Measured parts of a goal, as in `goals.Goal.measured`.
        batch_size: Examples a call, where times are measured.
        cache_dir, say: As in `layer_times.LayerTimes`.

    Attributes:
        keys: The parts.
        before: What was measured of the whole model: key -> int, bytes or nanoseconds.

    Raises:
        ValueError: if the latency of a model with inputs of unknown size is asked for.
        ImportError: if a format needs a package that is missing.
        ExportError: if the model cannot be exported.
    """

    def __init__(self, labeled, keys, batch_size=1, cache_dir=None, say=None):
        self._batch_size = batch_size
        self.keys = tuple(keys)
        self._quantities = {key: measured_cost_of(key) for key in self.keys}
        for quantity in self._quantities.values():
            check_installed(VARIANTS[quantity.variant].format)
        self._calibrations = {key: Calibration() for key in self.keys}
        self._tables = {}
        for key, quantity in self._quantities.items():
            if quantity.kind == "latency":
                _check_alone(key)
                _check_sizes(labeled.graph.model, key)
                self._tables[key] = LayerTimes(labeled, quantity.variant, batch_size, cache_dir, say)
        self.before = {}
        self.before = self.observe(labeled, np.ones(labeled.num_units, bool), labeled.graph.model)

    def costs(self, labeled):
        """What a `CostModel` counts of these channels, and a prediction of each measured part."""
        surrogates = {
            key: self._tables[key](labeled) if key in self._tables else WeightBytes(labeled, quantity.variant)
            for key, quantity in self._quantities.items()
        }
        return PredictedCosts(labeled, surrogates, self._calibrations)

    def best_multiple(self):
        """The multiple of channels that is worth keeping to where times count, see `LayerTimes`; else 1."""
        return max((table.best_multiple() for table in self._tables.values()), default=1)

    def measure(self, model):
        """Exports a model and measures it: key -> int, bytes or nanoseconds."""
        with tempfile.TemporaryDirectory() as folder:
            return {key: self._measured(model, folder, self._quantities[key]) for key in self.keys}

    def _measured(self, model, folder, quantity):
        if quantity.kind == "bytes":
            return size_on_disk(export_file(model, folder, quantity.variant))
        if quantity.variant == "keras":
            return time_model(model, self._batch_size)
        path = export_file(model, folder, quantity.variant, self._batch_size)
        return time_exported(path, model, quantity.variant, self._batch_size)

    def observe(self, labeled, kept, model):
        """Measures a model and lets the predictions learn from it.

        Args:
            channels: `groups.LabeledModel` that it was cut from.
            kept: The units that it kept, a bool array `(num_units,)`.
            model: It.

        Returns:
            What was measured: key -> int, bytes or nanoseconds.
        """
        found = self.measure(model)
        costs = self.costs(labeled)
        if any(key in self.before and found[key] > _DOUBTED * costs(kept)[key] for key in self._tables):
            again = self.measure(model)  # something else may have kept the machine busy
            found = {key: min(value, again[key]) for key, value in found.items()}
        counted = costs.surrogates(kept)
        for key, value in found.items():
            self._calibrations[key].learn(counted[key], value)
        return found


class PredictedCosts:
    """Counted costs and predicted ones at any set of widths, called like a `CostModel`.

    Args:
        channels: `groups.LabeledModel`.
        surrogates: For each key a function of a mask of kept units to a number that grows with
            what is measured.
        calibrations: For each key the `Calibration` from that number.
    """

    def __init__(self, labeled, surrogates, calibrations):
        self.counted, self.num_units = CostModel(labeled), labeled.num_units
        self._surrogates, self._calibrations = surrogates, calibrations

    def surrogates(self, kept):
        """The numbers that the predictions are made from, by key."""
        return {key: surrogate(kept) for key, surrogate in self._surrogates.items()}

    @property
    def group_costs(self):
        """Counted costs from how many units each group keeps, as of a `CostModel`."""
        return self.counted.group_costs

    def units_per_group(self, kept=None):
        """How many units each group keeps, an int64 array."""
        return self.counted.units_per_group(kept)

    def __call__(self, kept=None):
        """Costs with only some units kept (`None`: all): a dict of ints."""
        kept = np.ones(self.num_units, bool) if kept is None else kept
        predicted = {key: self._calibrations[key](value) for key, value in self.surrogates(kept).items()}
        return {**self.counted(kept), **{key: round(value) for key, value in predicted.items()}}


class Calibration:
    """A rising function through what was measured, straight in between.

    With one measurement it is the line through zero, beyond the first and the last of several
    the line goes on.
    """

    def __init__(self):
        self._points = {}

    def learn(self, counted, measured):
        """Takes note of a measurement; of several of the same the last one counts."""
        self._points[float(counted)] = float(measured)

    def __call__(self, counted):
        """What will be measured, a float."""
        x = np.array(sorted(self._points))
        y = np.maximum.accumulate([self._points[value] for value in x])
        if len(x) == 1:
            return y[0] * counted / x[0]
        k = np.clip(np.searchsorted(x, counted) - 1, 0, len(x) - 2)
        return y[k] + (counted - x[k]) * (y[k + 1] - y[k]) / (x[k + 1] - x[k])


class WeightBytes:
    """Bytes of all weights at any set of widths, in a format's precision: what files consist of.

    A file's size is nearly affine in it: what else is in there does not depend on widths, or goes
    with the channels as the small vectors do.

    Args:
        channels: `groups.LabeledModel`.
        form: Key of `formats.VARIANTS`.
    """

    def __init__(self, labeled, variant):
        self._quantize = VARIANTS[variant].quantize
        self._weights = [
            (len(weight.shape) > 1, factor, [labeled.units_of(axis) for axis in axes])
            for weight, factor, axes in counted_weights(labeled)
        ]

    def __call__(self, kept):
        """Bytes with only some units kept, an int."""
        kept = np.append(kept, True)  # the -1 of what stays
        total = 0
        for is_matrix, factor, axes in self._weights:
            size = factor * int(np.prod([kept[axis].sum() for axis in axes], dtype=np.int64))
            quantized = is_matrix and not (self._quantize == "dynamic" and size < _NOT_QUANTIZED)
            total += size * (_BYTES_A_NUMBER[self._quantize] if quantized else 4)
        return total


def export_file(model: keras.Model, folder: str, variant: str, batch_size: int | None = None) -> pathlib.Path:
    """Writes the file that `export` writes, into a folder; returns its path.

    Args:
        model: A built Sequential or Functional model.
        folder: A directory.
        variant: Key of `formats.VARIANTS`.
        batch_size: Number of examples that a call takes; `None` for any number.
    """
    kind = VARIANTS[variant]
    path = pathlib.Path(folder) / f"{variant}-{batch_size}{kind.suffix}"
    convert_model(model, path, ExportSettings(kind.format, kind.quantize, batch_size=batch_size))
    return path


def time_exported(path, model, variant, batch_size):
    """Nanoseconds of one call of what was exported of a model.

    Args:
        path: What `exported` returned.
        model: The model that was exported.
        form, batch_size: As there.

    Raises:
        ExportError: if it does not run.
    """
    names = [t.name for t in model.inputs]
    try:
        return run_job(
            "tensorflow", "time_file", variant=variant, path=str(path), names=names, batch_size=batch_size
        )
    except JobError as error:
        raise ExportError(f"The exported model does not run ({error}). Received: model={model!r}") from error


def _check_alone(key):
    """Refuses times where each process would measure its own, and cut by them."""
    if num_processes() > 1:
        raise ValueError(
            "Every process would measure other times, and make another plan by them. Expected one process, "
            f"or a goal that is no latency. Received: goal for {key!r} in {num_processes()} processes"
        )


def _check_sizes(model, key):
    if any(size is None for tensor in model.inputs for size in tensor.shape[1:]):
        raise ValueError(
            "How long a call takes is unknown because the model's input has axes of unknown size. Expected a "
            f"model made with a fixed input shape, or parameters in their place. Received: goal for {key!r}"
        )
