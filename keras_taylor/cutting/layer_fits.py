"""One layer fitted to what the original layer put out."""

import dataclasses

import numpy as np
from keras import ops

from keras_taylor.reading.downstream import Downstream, constant_place, is_linear
from keras_taylor.reading.linear_views import linear_view, rows_an_example, some_positions
from keras_taylor.support.least_squares import Regression, limit_blas_threads

# How often targets are relaxed where a rectifier hides them: twice was no better on held-out images.
_NUM_EXCUSED = 1


@dataclasses.dataclass(frozen=True)
class LayerRepair:
    """What became of one layer in a repair.

    Attributes:
        name: The layer's name.
        error_before, error_after: Mean squared error of its output on held-out rows, divided by the mean
            square of what it should be; `None` where nothing was fitted.
        ridge: The ridge that was chosen; `None` if the layer was left alone.
        reason: Why it was left alone, `None` otherwise.
    """

    name: str
    error_before: float | None = None
    error_after: float | None = None
    ridge: float | None = None
    reason: str | None = None


class LayerFit:
    """Fits a mixing layer's kernel and constant, in place.

    Args:
        old, new: `Walk`s of both models: the old one has run the layer, the new one has not.
        old_call, call: The layer's calls in them.
        outputs: Bool array: which of the original's outputs were kept.
        num_fit: Batches to fit on; the others are held out.
    """

    def __init__(self, old, new, old_call, call, outputs, num_fit):
        self._name, self._layer, self._old_layer = call.name, call.operation, old_call.operation
        self._old_view, self._view = linear_view(old_call.operation), linear_view(call.operation)
        self._outputs, self._num_fit = outputs, num_fit
        self._old_inputs, self._inputs = old.tensors[old_call.inputs[0]], new.tensors[call.inputs[0]]
        self._old_outputs = old.tensors[old_call.outputs[0]]
        self._sequel = Downstream(old, new, call, self._old_view, self._view, outputs)
        self._place = constant_place(new.graph, call, self._view)

    def run(self, num_examples, random, thorough=True):
        """Fits on some positions of so many examples; a `LayerRepair`.

        With `thorough=False` targets are asked for in full, also where a rectifier hides them.
        """
        num_columns = self._view.matrix().shape[1]
        num_positions = rows_an_example(num_columns, num_examples, thorough)
        with limit_blas_threads(num_positions * num_examples, num_columns):
            if not self._is_understood():
                return LayerRepair(self._name, reason="its output is not its kernel times its input")
            return self._fitted(num_positions, random, thorough)

    def _is_understood(self):
        """Whether the original's output is its activation of rows times matrix plus bias."""
        x = self._old_inputs[0]
        places = np.arange(min(self._old_view.num_positions(x), 64))
        positions = np.zeros_like(places), places
        ours = self._computed(0, positions)
        ours = ops.convert_to_numpy(self._old_layer.activation(ops.convert_to_tensor(ours)))
        output = self._old_view.at(self._old_outputs[0], positions)
        exact = self._old_layer.compute_dtype == "float32"
        return np.abs(ours - output).max() <= (1e-3 if exact else 3e-2) * np.abs(output).max()

    def _fitted(self, num_positions, random, thorough):
        positions = [
            some_positions(len(x), self._view.num_positions(x), num_positions, random) for x in self._inputs
        ]
        targets = [self._target(batch, where) for batch, where in enumerate(positions)]
        num_rows = sum(map(len, targets))
        weights = self._sequel.weights(targets[0].shape[1])
        regressions = [
            Regression(m, self._place is not None, num_rows, w)
            for m, w in zip(self._view.matrix(), np.split(weights, self._view.num_blocks), strict=True)
        ]
        for batch, blocks in self._rows(positions):
            for regression, x, y in zip(regressions, blocks, self._split(targets[batch]), strict=True):
                regression.add(x, y, batch >= self._num_fit)
        solutions = [regression.solve() for regression in regressions]
        power = np.mean([(np.square(y) @ weights).mean() for y in targets[self._num_fit :]])
        before, after = (
            float(sum(getattr(s, name) for s in solutions) / max(power, np.finfo(np.float32).tiny))
            for name in ("error_before", "error_after")
        )
        if all(s.ridge is None for s in solutions):
            return LayerRepair(self._name, before, before, None, "the fit was no better on held-out examples")
        found = [(s.change, s.constant) for s in solutions]
        for _ in range(_NUM_EXCUSED if self._sequel.rectified and thorough else 0):
            found = self._relaxed(regressions, solutions, found, positions, targets)
        self._view.assign(self._view.matrix() + np.stack([change for change, _ in found]))
        if self._place is not None:
            self._place.add(np.concatenate([constant for _, constant in found]))
        return LayerRepair(self._name, before, after, max(s.ridge for s in solutions if s.ridge is not None))

    def _relaxed(self, regressions, solutions, found, positions, targets):
        """Solutions for targets that ask for no more than a rectifier shows."""
        matrix, bias = self._view.matrix(), self._view.bias()
        new = [regression.repeated() for regression in regressions]
        for batch, blocks in self._rows(positions):
            given = [x @ (m + c) + k for x, m, (c, k) in zip(blocks, matrix, found, strict=True)]
            given = np.concatenate(given, axis=1)
            y = self._sequel.excused(targets[batch] + bias, given + bias, batch, positions[batch]) - bias
            for regression, x, part in zip(new, blocks, self._split(y), strict=True):
                regression.add(x, part)
        return [
            old if s.ridge is None else regression.solve(s.ridge)
            for regression, s, old in zip(new, solutions, found, strict=True)
        ]

    def _target(self, batch, positions):
        """What the layer should put out before its bias, `(num_rows, num_outputs)`."""
        if is_linear(self._old_layer) and self._old_layer.compute_dtype == "float32":
            y = self._old_view.at(self._old_outputs[batch], positions)
        else:
            y = self._computed(batch, positions)
        return y[:, self._outputs] - self._view.bias() + self._sequel.lost(batch, positions)

    def _computed(self, batch, positions):
        """What the original puts out before its activation."""
        view = self._old_view
        rows = view.rows(self._old_inputs[batch], positions)
        y = np.concatenate([x @ m for x, m in zip(rows, view.matrix(), strict=True)], axis=1)
        return y + view.bias()

    def _rows(self, positions):
        for batch, where in enumerate(positions):
            yield batch, self._view.rows(self._inputs[batch], where)

    def _split(self, y):
        return np.split(y, self._view.num_blocks, axis=1)
