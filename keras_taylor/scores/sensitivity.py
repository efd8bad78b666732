"""What predictions lose when a part of one group goes and the layers that read it are refitted."""

import dataclasses
import functools
import itertools

import numpy as np

from keras_taylor.budget.costs import CostModel
from keras_taylor.reading.downstream import find_bias_weight, normalization_gain
from keras_taylor.reading.matmul_views import matmul_view, rows_per_example, sample_positions
from keras_taylor.reading.walk import Walk, sample_inputs, split_into_batches
from keras_taylor.scores.divergences import mean_divergence, predictions
from keras_taylor.support.least_squares import Moments

NUM_EXAMPLES = 1024
_NUM_POINTS = 8
# Layers with more columns are not refitted here: their moments would not fit in memory.
_MOST_COLUMNS = 6000
_RIDGE = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """What a group costs in predictions, and saves, as its units go in their order.

    Attributes:
        order: The group's units, an int array: the first goes first.
        num_gone: How many are gone at each point, from 0 on.
        divergence: Mean over held-out examples of the divergence of the predictions from the whole
            model's: Kullback-Leibler in nats for classes, relative squared difference for numbers.
        saved: What is saved, in parameters or FLOPs.
    """

    order: np.ndarray
    num_gone: np.ndarray
    divergence: np.ndarray
    saved: np.ndarray

    def slopes(self):
        """Divergence for what is saved, unit by unit, along the curve's lower convex hull."""
        points = list(zip(self.saved.tolist(), self.divergence.tolist(), self.num_gone.tolist(), strict=True))
        hull = []
        for point in points:
            while len(hull) > 1 and _turns_right(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        slopes = np.zeros(len(self.order))
        for (x0, y0, n0), (x1, y1, n1) in itertools.pairwise(hull):
            slopes[n0:n1] = max(y1 - y0, 0.0) / max(x1 - x0, 1)
        last = int(self.num_gone[-1])
        slopes[last:] = 10 * slopes[last - 1] if last else 1.0  # the last unit never goes
        rank = np.arange(len(slopes)) / max(len(slopes), 1)
        ranked = np.zeros(len(slopes))
        ranked[self.order] = slopes * (1 + 1e-3 * rank) + 1e-12 * rank  # ties go in order
        return ranked


def curves(labeled, gated, feed, importance, cost="params"):
    """A `Curve` for each group.

    One walk over the examples gathers the second moments of what every mixing layer reads. They order
    the units of a group: the next to go is the one that the layers which read it miss least, once they
    are refitted to do without all that have gone. For each of eight shares of the group the
    readers are then refitted in a copy, and the held-out examples go through it.

    Args:
        channels: `groups.LabeledModel`.
        gated: `gates.GatedModel` of it, frozen: its own copies of the layers take the refitted kernels.
        feed: `datasets.Feed`; labels are not used.
        importance: A function without arguments that gives an array `(num_units,)`; it orders the units
            of groups whose readers cannot be refitted.
        cost: What units save: "params" or "flops".

    Returns:
        A dict: group name -> `Curve`.
    """
    return _Curves(labeled, gated, feed, cost).all(importance)


class _Curves:
    def __init__(self, labeled, gated, feed, cost):
        self._labeled, self._gated, self._cost = labeled, gated, cost
        inputs = sample_inputs(feed, labeled.graph, NUM_EXAMPLES)
        num_held_out = max(len(inputs[0]) // 4, 1)
        self._held_out = [x[:num_held_out] for x in inputs]
        self._readers = self._gather([x[num_held_out:] if len(x) > 1 else x for x in inputs])
        self._wanted = self._predict()
        self._costs = CostModel(labeled)

    def all(self, importance):
        importance, found = functools.cache(importance), {}
        for group in self._labeled.groups:
            order = self._order(group)
            if order is None:
                order = np.argsort(importance()[group.start : group.start + group.num_units], kind="stable")
            found[group.name] = self._curve(group, order)
        return found

    def _order(self, group):
        """The group's units, those first that readers miss least; `None` where no reader can be refitted."""
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

    def _gather(self, inputs):
        """A `_Reader` for each mixing layer that reads units, from one walk."""
        walk, graph = Walk(self._labeled.graph, split_into_batches(inputs)), self._labeled.graph
        readers, random = [], np.random.default_rng(0)
        for number, (call, effect) in enumerate(zip(graph.calls, self._labeled.effects, strict=True)):
            view = matmul_view(call.operation)
            axes = view and effect.weights.get(view.kernel_name)
            if axes and graph.is_used_once(call.operation):
                reader = _Reader(self._labeled, self._gated, call, view, axes)
                if (reader.units >= 0).any():
                    readers.append(reader)
                    reader.gather(walk.tensors[call.inputs[0]], len(inputs[0]), random)
            walk.run(number)
            walk.free_after(number)
        return readers

    def _curve(self, group, order):
        counts = np.unique(
            [round(k * group.num_units / _NUM_POINTS) for k in range(1, _NUM_POINTS)] + [group.num_units - 1]
        )
        counts = counts[counts > 0]
        points = [(0, 0.0, 0)]
        for num in counts.tolist():
            kept = np.ones(self._labeled.num_units, bool)
            kept[group.start + order[:num]] = False
            saved = self._costs()[self._cost] - self._costs(kept)[self._cost]
            points.append((num, self._divergence(kept), saved))
        num_gone, divergence, saved = map(np.array, zip(*points, strict=True))
        return Curve(order, num_gone, divergence, saved)

    def _divergence(self, kept):
        """Of the predictions without some units, their readers refitted."""
        changed = [reader for reader in self._readers if reader.refit(kept)]
        self._gated.mask = kept
        try:
            predicted = self._predict()
        finally:
            for reader in changed:
                reader.restore()
            self._gated.mask = np.ones_like(kept)
        return mean_divergence(self._labeled.graph.model, self._wanted, predicted)

    def _predict(self):
        """Flattened outputs for the held-out examples."""
        return predictions(self._gated, self._labeled.graph, self._held_out)


class _Reader:
    """A mixing layer: the moments of what it reads, and its copy that is refitted."""

    def __init__(self, labeled, gated, call, view, axes):
        self._labeled, self._axes, self._view = labeled, axes, view
        self._copy = matmul_view(gated.network.copy_of(call.operation))
        self._place = find_bias_weight(labeled.graph, call, view)
        self._place_copy = self._place and gated.network.copy_of(self._place.layer)
        self._matrix = view.matrix()
        self._weights = np.square(normalization_gain(labeled.graph, call, view.num_outputs))
        self._constant = self._moments = None
        # the unit that each column of a block reads, -1 for none
        self.units = view.units_of_columns([None if a is None else labeled.units_of(a) for a in axes])

    def gather(self, column, num_examples, random):
        """Takes the second moments of what it reads: the values of a tensor for each batch."""
        num_columns = self._matrix.shape[1]
        if num_columns > _MOST_COLUMNS:
            return
        take = rows_per_example(num_columns, num_examples)
        self._moments = [Moments(num_columns) for _ in self._matrix]
        for x in column:
            positions = sample_positions(len(x), self._view.num_positions(x), take, random)
            for moments, rows in zip(self._moments, self._view.input_rows(x, positions), strict=True):
                moments.add(rows)

    def eliminations(self, group):
        """An `Elimination` of the units for each block of the kernel; none if it does not read them."""
        if self._moments is None:
            return []
        found = [np.flatnonzero(self.units == group.start + k) for k in range(group.num_units)]
        if len({len(columns) for columns in found}) != 1 or not len(found[0]):
            return []
        weights = np.split(self._weights, len(self._matrix))
        return [
            moments.elimination(matrix, np.stack(found), _RIDGE, self._place is not None, w)
            for moments, matrix, w in zip(self._moments, self._matrix, weights, strict=True)
        ]

    def refit(self, kept):
        """Fits the copy to do without some units, if it reads them; says whether it did."""
        masks = [None if a is None else self._labeled.kept_mask(a, kept) for a in self._axes]
        columns, _ = self._view.matrix_masks(masks)
        if columns.all() or self._moments is None:
            return False
        centered = self._place is not None
        pairs = zip(self._moments, self._matrix, strict=True)
        fitted = np.stack([moments.restricted(m, columns, _RIDGE, centered) for moments, m in pairs])
        self._copy.assign(fitted)
        if centered:
            means = [moments.mean for moments in self._moments]
            changes = zip(means, self._matrix - fitted, strict=True)
            self._constant = np.concatenate([mean @ change for mean, change in changes])
            self._place.add(self._constant, self._place_copy)
        return True

    def restore(self):
        """Puts the copy back."""
        self._copy.assign(self._matrix)
        if self._constant is not None:
            self._place.add(-self._constant, self._place_copy)
            self._constant = None


def _turns_right(first, second, third):
    """Whether the middle one of three points lies above the line through the others."""
    (x0, y0, _), (x1, y1, _), (x2, y2, _) = first, second, third
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)
