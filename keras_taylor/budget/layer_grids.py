"""One layer at several widths: the layers to time, and the times of all widths in between."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import keras
import numpy as np
from scipy.interpolate import RegularGridInterpolator

from keras_taylor.exports.timing import IsolatedLayer
from keras_taylor.reading.cloning import clone_operation
from keras_taylor.reading.graph import Call
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.reading.tracing import UnsupportedModelError
from keras_taylor.rules.base import Effect
from keras_taylor.support.types import BoolArray, FloatArray, IntArray

COARSEST_MULTIPLE = 16
_GRID_FRACTIONS: Final = (0.25, 0.5, 1.0)  # of a layer's units, at its input and at its output
_GRID_MULTIPLE = 8  # wide layers are timed at multiples of it


class Widths(NamedTuple):
    """Numbers of channels that a layer reads and makes."""

    inputs: int
    outputs: int


# Maps widths to nanoseconds.
WidthTimes = Callable[[Widths], float]


class CallKey(NamedTuple):
    """A call of a layer: the layer's path, and the number of the call among those of the layer, from 1."""

    name: str
    number: int


class KernelCall:
    """A call of a layer with a kernel, with one input and one output.

    Args:
        labeled: The model.
        call: The call.
        effect: The call's effect on labels.

    Attributes:
        num_units: Number of units of the model.
        input_units, output_units: The unit of each channel that it reads and makes, int64 arrays; -1 for
            channels that always stay.
    """

    def __init__(self, labeled: LabeledModel, call: Call, effect: Effect) -> None:
        self._labeled, self._call, self._effect = labeled, call, effect
        self.num_units: int = labeled.num_units
        is_first = getattr(call.operation, "data_format", None) == "channels_first"
        axis = 1 if is_first else -1
        source, target = call.inputs[0], call.outputs[0]
        shapes = labeled.graph.shapes
        self.input_units = self._channel_units(labeled.labels[source], shapes[source][axis])
        self.output_units = self._channel_units(effect.outputs[0], shapes[target][axis])

    def _channel_units(self, labels: IntArray, size: int | None) -> IntArray:
        units: IntArray = self._labeled.units_of(labels.reshape(-1))
        # labels that are all the same are stored once
        return np.repeat(units, size or 1) if units.size == 1 else units

    def widths(self, kept: BoolArray) -> Widths:
        """Widths if only the units in the mask `kept` `(num_units,)` stay."""
        kept = np.append(kept, True)  # -1, the unit of channels that always stay, finds this
        return Widths(int(kept[self.input_units].sum()), int(kept[self.output_units].sum()))

    def stays(self, kept: BoolArray) -> bool:
        """Whether all residual branches that it is in are among the units that stay."""
        return bool(kept[self._labeled.branch_units_of_call(self._call.number)].all())

    def isolate(self, kept: BoolArray) -> IsolatedLayer:
        """The layer alone, with only the units in the mask `kept` `(num_units,)`."""
        call = self._call
        kept_labels = self._labeled.kept_labels(kept)
        changes = kept_labels.changes(self._effect.config)
        layer = clone_operation(call.operation, call.name, changes)
        dtype = next(x.dtype for x in call.site.flat if isinstance(x, keras.KerasTensor))
        num_rows, *shape = self._labeled.shape_of_example(call.inputs[0])
        for axis, size in enumerate(self._labeled.labels[call.inputs[0]].shape):
            if size > 1:
                shape[axis - 1] = self.widths(kept).inputs
        isolated: IsolatedLayer = {
            "layer": _serialize_for_timing(layer),
            "shape": shape,
            "dtype": keras.backend.standardize_dtype(dtype),
        }
        return isolated if num_rows == 1 else {**isolated, "num_rows": num_rows or 1}


class WidthGrid:
    """The widths at which a layer is timed alone.

    Args:
        call: A call of the layer.
    """

    def __init__(self, call: KernelCall) -> None:
        self.call = call
        inputs, outputs = (np.unique(units[units >= 0]) for units in (call.input_units, call.output_units))
        self._all_units = np.union1d(inputs, outputs)
        # where input and output share units (depthwise, recurrent), both widths change together
        self._is_tied = bool(np.intersect1d(inputs, outputs).size)
        self._units = [self._all_units] if self._is_tied else [inputs, outputs]
        self._axes = [[units[:num] for num in grid_sizes(units.size)] for units in self._units]

    def layers(self) -> list[IsolatedLayer]:
        """The layer at all places of the grid, the last axis changing fastest."""
        return [self.call.isolate(kept) for kept in self._masks()]

    def mask_below_half(self, offset: int) -> BoolArray:
        """Kept units for widths of `offset` less than half, at the input and the output where they are wide.

        Half is rounded up to a coarse multiple. A bool array `(num_units,)`, all true for a narrow layer.
        """
        kept = np.ones(self.call.num_units, bool)
        for units in self._units:
            if units.size >= 2 * COARSEST_MULTIPLE:
                half = -(-units.size // (2 * COARSEST_MULTIPLE)) * COARSEST_MULTIPLE
                kept[units[half - offset :]] = False
        return kept

    def interpolate(self, times: list[int]) -> WidthTimes:
        """A function through the times of `layers()`, bilinear in between.

        A narrower layer takes no longer, and noise only adds to times. So no time is larger than that of a
        wider layer.
        """
        widths = np.array([self.call.widths(kept) for kept in self._masks()])
        columns = [0, 1]
        if self._is_tied:
            columns = [0] if np.ptp(widths[:, 0]) else [1]
        places = [np.unique(widths[:, column]) for column in columns]
        values = np.array(times, float).reshape([len(axis) for axis in self._axes])
        values = np.squeeze(values, tuple(axis for axis, place in enumerate(places) if len(place) == 1))
        for axis in range(values.ndim):
            values = np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)
        varying = [(column, place) for column, place in zip(columns, places, strict=True) if len(place) > 1]
        if not varying:
            constant = float(values)
            return lambda widths: constant
        return _interpolator([column for column, _ in varying], [place for _, place in varying], values)

    def _masks(self) -> Iterator[BoolArray]:
        """Kept units at all places of the grid."""
        first, *second = self._axes
        for units in first:
            for others in second[0] if second else [first[0][:0]]:
                kept = np.ones(self.call.num_units, bool)
                kept[self._all_units] = False
                kept[units] = kept[others] = True
                yield kept


def _interpolator(columns: list[int], places: list[IntArray], values: FloatArray) -> WidthTimes:
    """Interpolates values on a grid over these columns of `Widths`."""
    interpolator = RegularGridInterpolator(places, values, bounds_error=False, fill_value=None)
    return lambda widths: float(interpolator([[widths[column] for column in columns]])[0])


def grid_sizes(num: int) -> list[int]:
    """Rising numbers of units at which a layer with `num` units is timed, large ones multiples of eight."""
    if not num:
        return [0]
    step = _GRID_MULTIPLE if num >= 2 * _GRID_MULTIPLE else 1
    rounded = {min(num, max(step, round(num * fraction / step) * step)) for fraction in _GRID_FRACTIONS}
    return sorted(rounded | {num})


def find_kernel_calls(labeled: LabeledModel) -> dict[CallKey, KernelCall]:
    """Calls of layers with kernels, with one input and one output.

    Layers that only have vectors, as BatchNormalization, are mostly fused into these.
    """
    found: dict[CallKey, KernelCall] = {}
    seen: dict[str, int] = {}
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        has_kernel = any(len(axes) > 1 for axes in effect.weights.values())
        if not isinstance(call.operation, keras.Layer) or not effect.work or not has_kernel:
            continue
        number = seen[call.name] = seen.get(call.name, 0) + 1
        if len(call.inputs) == len(call.outputs) == 1 and _can_be_cloned(call):
            found[CallKey(call.name, number)] = KernelCall(labeled, call, effect)
    return found


def _can_be_cloned(call: Call) -> bool:
    try:
        clone_operation(call.operation, call.name)
    except UnsupportedModelError:
        return False
    return True


def _serialize_for_timing(layer: keras.Layer) -> dict[str, Any]:
    """A serialized layer without settings that do not change its speed. Its weights begin as zeros."""
    content: dict[str, Any] = keras.saving.serialize_keras_object(layer)
    content.pop("build_config", None)
    config: Mapping[str, Any] = content["config"]
    content["config"] = {
        key: "zeros" if key.endswith("_initializer") else value
        for key, value in config.items()
        if key not in ("name", "trainable") and not key.endswith(("_regularizer", "_constraint"))
    }
    return content
