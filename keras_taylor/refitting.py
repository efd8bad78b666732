"""Layers that lost inputs, fitted anew to what the original put out."""

import dataclasses

import numpy as np
from keras import ops

from keras_taylor import graph as graphs
from keras_taylor.least_squares import Regression
from keras_taylor.linear_views import linear_view
from keras_taylor.plan import mask_of
from keras_taylor.streams import Shortfall, constant_place
from keras_taylor.walk import Walk, outputs_of

# Rows for each column of a regression, and at least so many, if there are: more change little.
_ROWS_PER_COLUMN, _ROWS = 20, 20_000
_NUM_BATCHES, _NUM_HELD_OUT = 8, 2


@dataclasses.dataclass(frozen=True)
class LayerRepair:
    """What became of one layer that lost inputs.

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


def refit(channels, kept, small, inputs):
    """Refits, in place, the layers of a cut model that lost inputs, from the input to the output.

    Each kernel is fitted by least squares: from what the layer reads in the model as it is repaired so
    far, to what it put out in the original; before a residual sum also to what the other terms lack.

    Args:
        channels: `groups.Channels` of the original model.
        kept: Bool array `(num_units,)`, what was kept.
        small: The model that was cut by it.
        inputs: Flattened inputs as arrays, batch first, in random order.

    Returns:
        A list of `LayerRepair`.
    """
    batches = in_batches(inputs)
    num_held_out = min(_NUM_HELD_OUT, len(batches) - 1)
    before = list(zip(*outputs_of(graphs.read(small), batches[-num_held_out:]), strict=True))
    weights = [np.array(ops.convert_to_numpy(w)) for w in small.weights]
    side_by_side = _SideBySide(channels, kept, small, batches, num_held_out)
    repairs = side_by_side.run()
    wanted, after = side_by_side.held_out_outputs()
    if any(one.ridge is not None for one in repairs) and not _distance(after, wanted) < _distance(
        before, wanted
    ):
        for weight, value in zip(small.weights, weights, strict=True):
            weight.assign(value)
        reason = "the model's held-out outputs were nearer to the original's without"
        return [LayerRepair(one.name, reason=one.reason or reason) for one in repairs]
    return repairs


def in_batches(inputs):
    """Flattened inputs as a list of batches, each a list of arrays."""
    size = -(-len(inputs[0]) // _NUM_BATCHES)
    return [[x[k : k + size] for x in inputs] for k in range(0, len(inputs[0]), size)]


class _SideBySide:
    """Both models, call by call, the original one step ahead."""

    def __init__(self, channels, kept, small, batches, num_held_out):
        self._channels, self._kept = channels, kept
        self._num_examples = sum(len(batch[0]) for batch in batches)
        self._num_fit = len(batches) - num_held_out
        self._old, self._new = Walk(channels.graph, batches), Walk(graphs.read(small), batches)
        self._random = np.random.default_rng(0)

    def run(self):
        repairs = {}
        for number, call in enumerate(self._new.graph.calls):
            self._old.run(number)
            if self._lost_inputs(number) and call.name not in repairs:
                repairs[call.name] = self._refit(number, call)
            self._new.run(number)
            for walk in (self._old, self._new):
                walk.forget(number)
        return list(repairs.values())

    def held_out_outputs(self):
        """Outputs of the original and of the repaired model on the held-out batches."""
        return [[column[self._num_fit :] for column in walk.outputs()] for walk in (self._old, self._new)]

    def _masks(self, number):
        """Which columns and which outputs of a mixing layer stay; `None` if it is no such layer."""
        view = linear_view(self._old.graph.calls[number].operation)
        axes = view and self._channels.effects[number].weights.get(view.weight)
        if not axes:
            return None
        return view.kept([None if a is None else mask_of(self._channels, a, self._kept) for a in axes])

    def _lost_inputs(self, number):
        masks = self._masks(number)
        return masks is not None and not masks[0].all()

    def _refit(self, number, call):
        if sum(other.operation is call.operation for other in self._new.graph.calls) > 1:
            return LayerRepair(call.name, reason="it is used at several places")
        layer, (_, outputs) = call.operation, self._masks(number)
        old_view, view = linear_view(self._old.graph.calls[number].operation), linear_view(layer)
        place = constant_place(self._new.graph, call)
        shortfall = Shortfall(self._old, self._new, call, old_view, view, outputs)
        take = self._rows_an_example(view, self._new.tensors[call.inputs[0]][0])
        regressions = [Regression(m, place is not None, take * self._num_examples) for m in view.matrix()]
        power = []
        for batch in range(len(self._old.tensors[call.inputs[0]])):
            positions = self._positions(view, self._new.tensors[call.inputs[0]][batch], take)
            y = self._original_output(number, old_view, batch, positions)
            if y is None:
                return LayerRepair(call.name, reason="its output is not its kernel times its input")
            y = y[:, outputs] - _bias(layer) + shortfall.at(batch, positions)
            held_out = batch >= self._num_fit
            power += [float(np.square(y).sum(1).mean())] * held_out
            x = view.rows(self._new.tensors[call.inputs[0]][batch], positions)
            for regression, rows, part in zip(
                regressions, x, np.split(y, len(regressions), axis=1), strict=True
            ):
                regression.add(rows, part, held_out)
        return self._applied(call, view, place, [r.solve() for r in regressions], np.mean(power))

    def _applied(self, call, view, place, solutions, power):
        before, after = (
            sum(getattr(s, name) for s in solutions) / max(power, np.finfo(np.float32).tiny)
            for name in ("error_before", "error_after")
        )
        if all(s.ridge is None for s in solutions):
            return LayerRepair(call.name, before, before, None, "the fit was no better on held-out examples")
        view.assign(view.matrix() + np.stack([s.change for s in solutions]))
        if place is not None:
            place(np.concatenate([s.constant for s in solutions]))
        return LayerRepair(call.name, before, after, max(s.ridge for s in solutions if s.ridge is not None))

    def _original_output(self, number, view, batch, positions):
        """What the original layer made before its activation; `None` if that does not explain its output."""
        call = self._old.graph.calls[number]
        rows = view.rows(self._old.tensors[call.inputs[0]][batch], positions)
        y = np.concatenate([x @ m for x, m in zip(rows, view.matrix(), strict=True)], axis=1)
        y += _bias(call.operation)
        if batch == 0:
            output = view.at(self._old.tensors[call.outputs[0]][batch], positions)
            ours = ops.convert_to_numpy(call.operation.activation(ops.convert_to_tensor(y)))
            exact = call.operation.compute_dtype == "float32"
            if np.abs(ours - output).max() > (1e-3 if exact else 3e-2) * np.abs(output).max():
                return None
        return y

    def _rows_an_example(self, view, x):
        """How many positions of an example take part."""
        columns = view.matrix().shape[1]
        wanted = max(_ROWS_PER_COLUMN * columns, _ROWS)
        return min(view.num_positions(x), -(-wanted // self._num_examples))

    def _positions(self, view, x, take):
        num, places = len(x), view.num_positions(x)
        chosen = np.tile(np.arange(places), (num, 1))
        if take < places:
            chosen = self._random.permuted(chosen, axis=1)[:, :take]
        return np.repeat(np.arange(num), take), chosen.reshape(-1)


def _bias(layer):
    bias = getattr(layer, "bias", None)
    return 0.0 if bias is None else np.asarray(ops.convert_to_numpy(bias), np.float32)


def _distance(outputs, wanted):
    """Mean over outputs of the mean squared difference, divided by the mean square of what is wanted."""
    distances = []
    for ours, theirs in zip(outputs, wanted, strict=True):
        ours, theirs = (
            np.concatenate([ops.convert_to_numpy(ops.cast(y, "float32")) for y in column])
            for column in (ours, theirs)
        )
        power = np.square(theirs, dtype=np.float64).mean()
        distances.append(np.square(ours - theirs, dtype=np.float64).mean() / max(power, 1e-30))
    return float(np.mean(distances))
