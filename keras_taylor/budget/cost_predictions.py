"""Predictions of measured costs at any set of widths, from counted ones."""

from collections.abc import Callable, Mapping

import numpy as np

from keras_taylor.budget.costs import CostModel, counted_weights
from keras_taylor.budget.group_costs import GroupCosts
from keras_taylor.exports.formats import VARIANTS
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.support.types import BoolArray, Costs, IntArray

# By `quantize`: bytes of a value in a matrix. All other values are float32.
_BYTES_PER_VALUE = {None: 4, "float16": 2, "dynamic": 1, "int8": 1}
_MIN_DYNAMIC_SIZE = 1024  # "dynamic" does not quantize smaller matrices

# Maps a mask of kept units to a number that grows with a measured cost.
Surrogate = Callable[[BoolArray], float]


class WeightBytes:
    """Bytes of all weights at any set of widths, in the precision of a format.

    The size of a file is nearly an affine function of it. The rest of the file does not depend on widths,
    or grows with the number of channels as the small vectors do.

    Args:
        labeled: The model.
        variant: Key of `formats.VARIANTS`.
    """

    def __init__(self, labeled: LabeledModel, variant: str) -> None:
        self._quantize = VARIANTS[variant].quantize
        self._weights = [
            (
                len(found.weight.shape) > 1,
                found.fixed_size,
                [labeled.units_of(axis) for axis in found.labels],
                found.branches,
            )
            for found in counted_weights(labeled)
        ]

    def __call__(self, kept: BoolArray) -> int:
        """Bytes if only the units in the mask `kept` `(num_units,)` stay."""
        kept = np.append(kept, True)  # -1, the unit of positions that always stay, finds this
        total = 0
        for is_matrix, factor, axes, branches in self._weights:
            if not kept[branches].all():
                continue
            size = factor * int(np.prod([kept[axis].sum() for axis in axes], dtype=np.int64))
            too_small = self._quantize == "dynamic" and size < _MIN_DYNAMIC_SIZE
            total += size * (_BYTES_PER_VALUE[self._quantize] if is_matrix and not too_small else 4)
        return total


class CalibrationCurve:
    """A rising function through measured points, linear between neighbors.

    A single point makes it the line through that point and zero. Several points make it go on in a
    straight line before the first and after the last.
    """

    def __init__(self) -> None:
        self._points: dict[float, float] = {}

    def learn(self, surrogate: float, measured: float) -> None:
        """Adds a point, or replaces the one at the same place."""
        self._points[float(surrogate)] = float(measured)

    def __call__(self, surrogate: float) -> float:
        """Predicts a measurement."""
        x = np.array(sorted(self._points))
        y = np.maximum.accumulate([self._points[value] for value in x])
        if len(x) == 1:
            return float(y[0] * surrogate / x[0])
        k = np.clip(np.searchsorted(x, surrogate) - 1, 0, len(x) - 2)
        return float(y[k] + (surrogate - x[k]) * (y[k + 1] - y[k]) / (x[k + 1] - x[k]))


class PredictedCosts:
    """Counted and predicted costs at any set of widths, a `costs.CostFunction`.

    Args:
        labeled: The model.
        surrogates: Measured cost -> the `Surrogate` that it is predicted from.
        curves: Measured cost -> the `CalibrationCurve` from the surrogate's number to an amount.
    """

    def __init__(
        self,
        labeled: LabeledModel,
        surrogates: Mapping[str, Surrogate],
        curves: Mapping[str, CalibrationCurve],
    ) -> None:
        self._counted, self._num_units = CostModel(labeled), labeled.num_units
        self._surrogates, self._curves = surrogates, curves

    def surrogates(self, kept: BoolArray) -> dict[str, float]:
        """Measured cost -> the number that it is predicted from, with only some units kept."""
        return {cost: surrogate(kept) for cost, surrogate in self._surrogates.items()}

    @property
    def group_costs(self) -> GroupCosts:
        """The counted costs as a function of the number of units that each group keeps."""
        return self._counted.group_costs

    def units_per_group(self, kept: BoolArray | None = None) -> IntArray:
        """How many units each group keeps, an int64 array `(num_groups,)`."""
        return self._counted.units_per_group(kept)

    def __call__(self, kept: BoolArray | None = None) -> Costs:
        """Costs with only the units kept whose entry in `kept` `(num_units,)` is true; `None`: all."""
        kept = np.ones(self._num_units, bool) if kept is None else kept
        predicted = {
            cost: round(self._curves[cost](number)) for cost, number in self.surrogates(kept).items()
        }
        return {**self._counted(kept), **predicted}
