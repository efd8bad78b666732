"""How far predictions diverge when a part of one group goes and the layers that read it are refitted."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from keras_taylor.budget.costs import CostModel
from keras_taylor.reading.graph import Call
from keras_taylor.reading.groups import Group, LabeledModel
from keras_taylor.reading.matmul_views import (
    MatmulView,
    find_bias_weight,
    matmul_view,
    normalization_gain,
    rows_per_example,
    sample_positions,
)
from keras_taylor.reading.walk import Walk, fixed_batch_size, sample_inputs, split_into_batches
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.scores.losses import mean_divergence
from keras_taylor.support.datasets import Feed
from keras_taylor.support.least_squares import Elimination, Moments
from keras_taylor.support.types import Array, BoolArray, FloatArray, IntArray, Tensor

# Examples that a sensitivity curve is measured with, at most; a quarter of them is held out.
_MAX_EXAMPLES = 1024
_NUM_CURVE_POINTS = 8
# Layers with more columns are not refitted here: their moments would not fit in memory.
_MAX_COLUMNS = 6000
_REFIT_RIDGE = 1e-3


class _CurvePoint(NamedTuple):
    """What a group saves, and how far predictions diverge, with `num_gone` units gone."""

    saved: float
    divergence: float
    num_gone: int


@dataclasses.dataclass(frozen=True, eq=False)
class SensitivityCurve:
    """The divergence of a model's predictions, and what is saved, as units of a group go in their order.

    Attributes:
        order: The group's units, an int array: the first one goes first.
        num_gone: How many units are gone at each point, an int array that starts with 0.
        divergence: Mean over held-out examples of the divergence of the predictions from the whole
            model's: Kullback-Leibler in nats for classes, relative squared difference for numbers.
        saved: What is saved, in parameters or FLOPs.
    """

    order: IntArray
    num_gone: IntArray
    divergence: FloatArray
    saved: Array

    def slopes(self) -> FloatArray:
        """Divergence for what is saved along the curve's lower convex hull, for each unit.

        The hull makes slopes grow with the number of units that are gone, so a greedy choice takes units in
        the group's order (as the convex hull of a rate-distortion curve does: Shoham and Gersho, Efficient
        bit allocation, 1988).
        """
        columns = self.saved.tolist(), self.divergence.tolist(), self.num_gone.tolist()
        slopes = np.zeros(len(self.order))
        for before, after in itertools.pairwise(_lower_hull(map(_CurvePoint, *columns))):
            growth = max(after.divergence - before.divergence, 0.0)
            slopes[before.num_gone : after.num_gone] = growth / max(after.saved - before.saved, 1)
        last = int(self.num_gone[-1])
        slopes[last:] = 10 * slopes[last - 1] if last else 1.0  # the last unit never goes
        rank = np.arange(len(slopes)) / max(len(slopes), 1)
        slopes_by_unit = np.zeros(len(slopes))
        slopes_by_unit[self.order] = slopes * (1 + 1e-3 * rank) + 1e-12 * rank  # ties go in order
        return slopes_by_unit


def _lower_hull(points: Iterable[_CurvePoint]) -> list[_CurvePoint]:
    """The points of a curve, in order, that lie on its lower convex hull."""
    hull: list[_CurvePoint] = []
    for point in points:
        while len(hull) > 1 and not _is_below_chord(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_below_chord(first: _CurvePoint, middle: _CurvePoint, last: _CurvePoint) -> bool:
    """Whether the middle one of three points lies below the line through the others."""
    rise = (middle.divergence - first.divergence) * (last.saved - first.saved)
    return rise < (last.divergence - first.divergence) * (middle.saved - first.saved)


def measure_sensitivity(
    labeled: LabeledModel,
    gated: GatedModel,
    feed: Feed,
    importance: Callable[[], FloatArray],
    cost: str = "params",
) -> dict[str, SensitivityCurve]:
    """A `SensitivityCurve` for each group, by name.

    One walk over the examples gathers the second moments of the inputs of every mixing layer. They order the
    units of a group: next goes the unit whose removal adds least to the squared error of the layers that
    read it, refitted without all units that have gone (`least_squares.Elimination`). For each of eight
    shares of the group the readers are then refitted in a copy, and the held-out examples go through it.

    Args:
        labeled: The labels of the model.
        gated: A frozen `GatedModel` of it: its own copies of the layers take the refitted kernels.
        feed: The data; its labels are not used.
        importance: A function without arguments that gives an array `(num_units,)`; it orders the units
            of groups whose readers cannot be refitted.
        cost: What units save: "params" or "flops".
    """
    return _SensitivityMeasurement(labeled, gated, feed, cost).curves(importance)


class _SensitivityMeasurement:
    """The data and the layers that all curves of a model are measured with; arguments as above."""

    def __init__(self, labeled: LabeledModel, gated: GatedModel, feed: Feed, cost: str) -> None:
        self._labeled, self._gated, self._cost = labeled, gated, cost
        inputs = sample_inputs(feed, labeled.graph, _MAX_EXAMPLES)
        num_held_out = max(len(inputs[0]) // 4, 1)
        self._held_out = [x[:num_held_out] for x in inputs]
        self._readers = self._gather_moments([x[num_held_out:] if len(x) > 1 else x for x in inputs])
        self._reference = gated.predict_arrays(self._held_out, fixed_batch_size(self._labeled.graph))
        self._costs = CostModel(labeled)

    def curves(self, importance: Callable[[], FloatArray]) -> dict[str, SensitivityCurve]:
        """A curve for each group, by name."""
        importance, found = functools.cache(importance), {}
        for group in self._labeled.groups:
            order = self._order(group)
            if order is None:
                part = importance()[group.start : group.start + group.num_units]
                order = np.argsort(part, kind="stable")
            found[group.name] = self._curve(group, order)
        return found

    def _order(self, group: Group) -> IntArray | None:
        """The group's units, in the order of least error of the readers; `None` if none can be refitted."""
        eliminations = [e for reader in self._readers for e in reader.eliminations(group)]
        if not eliminations:
            return None
        order, gone = [], np.zeros(group.num_units)
        for _ in range(group.num_units):
            costs = sum(e.costs() for e in eliminations) + gone
            order.append(int(np.argmin(costs)))
            gone[order[-1]] = np.inf
            for e in eliminations:
                e.remove(order[-1])
        return np.array(order)

    def _gather_moments(self, inputs: Sequence[Array]) -> "list[_RefittedReader]":
        """A `_RefittedReader` for each mixing layer that reads units, from one walk."""
        graph = self._labeled.graph
        walk = Walk(graph, split_into_batches(inputs, fixed_batch_size(graph)))
        readers, random = [], np.random.default_rng(0)
        for number, (call, effect) in enumerate(zip(graph.calls, self._labeled.effects, strict=True)):
            view = matmul_view(call.operation)
            axes = view and effect.weights.get(view.kernel_name)
            if view is not None and axes and graph.is_used_once(call.operation):
                reader = _RefittedReader(self._labeled, self._gated, call, view, axes)
                if (reader.units >= 0).any():
                    readers.append(reader)
                    reader.gather(walk.tensors[call.inputs[0]], random)
            walk.run(number)
            walk.free_after(number)
        return readers

    def _curve(self, group: Group, order: IntArray) -> SensitivityCurve:
        """The curve of a group whose units go in this order."""
        counts = [round(k * group.num_units / _NUM_CURVE_POINTS) for k in range(1, _NUM_CURVE_POINTS)]
        points = [_CurvePoint(0, 0.0, 0)]
        for num in np.unique([*counts, group.num_units - 1]).tolist():
            if num > 0:
                kept = np.ones(self._labeled.num_units, bool)
                kept[group.start + order[:num]] = False
                points.append(_CurvePoint(self._count() - self._count(kept), self._divergence(kept), num))
        saved, divergence, num_gone = map(np.array, zip(*points, strict=True))
        return SensitivityCurve(order, num_gone, divergence, saved)

    def _count(self, kept: BoolArray | None = None) -> int:
        """Parameters or FLOPs of the model with these units."""
        value = self._costs(kept)[self._cost]
        assert value is not None, "the caller checked that it can be counted"
        return value

    def _divergence(self, kept: BoolArray) -> float:
        """The divergence of the predictions without some units, with their readers refitted."""
        changed = [reader for reader in self._readers if reader.refit(kept)]
        self._gated.mask = kept
        try:
            predicted = self._gated.predict_arrays(self._held_out, fixed_batch_size(self._labeled.graph))
        finally:
            for reader in changed:
                reader.restore()
            self._gated.mask = np.ones_like(kept)
        return mean_divergence(self._labeled.graph.model, self._reference, predicted)


class _RefittedReader:
    """A mixing layer that reads units: the moments of its inputs, and its copy that is refitted.

    Args:
        labeled: The labels of the model.
        gated: The model whose copy of the layer is refitted.
        call: The layer's only call.
        view: The layer as a matrix product.
        axes: The labels along each axis of its kernel.

    Attributes:
        units: The unit that each column of a block of the kernel reads, -1 for none.
    """

    def __init__(
        self,
        labeled: LabeledModel,
        gated: GatedModel,
        call: Call,
        view: MatmulView,
        axes: Sequence[IntArray | None],
    ) -> None:
        self._labeled, self._axes, self._view = labeled, axes, view
        copied = matmul_view(gated.network.copy_of(call.operation))
        assert copied is not None, "the copy is a layer of the same class"
        self._copy = copied
        self._bias_weight = find_bias_weight(labeled.graph, call, view)
        self._bias_copy = self._bias_weight and gated.network.copy_of(self._bias_weight.layer)
        self._matrix = view.matrix()
        self._weights = np.square(normalization_gain(labeled.graph, call, view.num_outputs))
        self._added_bias: Array | None = None
        self._moments: list[Moments] | None = None
        self.units = view.units_of_columns([None if a is None else labeled.units_of(a) for a in axes])

    def gather(self, values: Sequence[Tensor], random: np.random.Generator) -> None:
        """Gathers the second moments of the layer's input, given by its values for each batch."""
        num_columns = self._matrix.shape[1]
        if num_columns > _MAX_COLUMNS:
            return
        take = rows_per_example(num_columns, sum(map(len, values)))
        self._moments = [Moments(num_columns) for _ in self._matrix]
        for x in values:
            positions = sample_positions(len(x), self._view.num_positions(x), take, random)
            for moments, rows in zip(self._moments, self._view.input_rows(x, positions), strict=True):
                moments.add(rows)

    def eliminations(self, group: Group) -> list[Elimination]:
        """An `Elimination` of the group's units for each block of the kernel; `[]` if it reads none."""
        if self._moments is None:
            return []
        columns = [np.flatnonzero(self.units == group.start + k) for k in range(group.num_units)]
        if len({len(of_unit) for of_unit in columns}) != 1 or not len(columns[0]):
            return []
        weights = np.split(self._weights, len(self._matrix))
        return [
            moments.elimination(matrix, np.stack(columns), _REFIT_RIDGE, self._bias_weight is not None, w)
            for moments, matrix, w in zip(self._moments, self._matrix, weights, strict=True)
        ]

    def refit(self, kept: BoolArray) -> bool:
        """Fits the copy to do without the other units; returns `False` if it reads none of them."""
        masks = [None if a is None else self._labeled.kept_mask(a, kept) for a in self._axes]
        columns, _ = self._view.matrix_masks(masks)
        if columns.all() or self._moments is None:
            return False
        centered = self._bias_weight is not None
        pairs = zip(self._moments, self._matrix, strict=True)
        fitted = np.stack([moments.restricted(m, columns, _REFIT_RIDGE, centered) for moments, m in pairs])
        self._copy.assign(fitted)
        if self._bias_weight is not None:
            means = [moments.mean for moments in self._moments]
            changes = zip(means, self._matrix - fitted, strict=True)
            self._added_bias = np.concatenate([mean @ change for mean, change in changes])
            self._bias_weight.add(self._added_bias, self._bias_copy)
        return True

    def restore(self) -> None:
        """Gives the copy its original kernel and constant again."""
        self._copy.assign(self._matrix)
        if self._added_bias is not None and self._bias_weight is not None:
            self._bias_weight.add(-self._added_bias, self._bias_copy)
            self._added_bias = None
