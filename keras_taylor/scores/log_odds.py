"""What gates do to the odds of the true class: statistics for the criteria `log_odds`."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.cloning import losses_by_output
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.scores.gates import GATE_ROWS, Gates, batch_statistics
from keras_taylor.scores.losses import CLASS_LOSSES, ExampleLoss, kind_of
from keras_taylor.support.keras_internals import compile_arguments
from keras_taylor.support.replicas import sum_over_replicas
from keras_taylor.support.types import FloatArray, Tensor, Tree

NUM_PROBES = 4
# The rows of the statistics by name: those of gates, then sums over examples, weighted as the examples are.
# The last two are there with probes only.
ODDS_ROWS = {name: row for row, name in enumerate((*GATE_ROWS, "odds", "spread", "probe", "probe_square"))}
# By how much probes move every gate, up or down at random.
_PROBE_STEP = 0.15
_MIN_PROBABILITY, _MAX_SLOPE = 1e-6, 50.0
_CROSS_ENTROPIES = CLASS_LOSSES | {"categorical_crossentropy"}
_BINARY_CROSS_ENTROPIES = {"binary_crossentropy", "crossentropy", "ce"}
# Columns by which the loss tells of each example: q, the spread of the wrong classes, its weight.
_NUM_SLOTS = 3


class OddsModel(GatedModel):
    """A frozen `GatedModel` that also gathers the statistics of log-odds (`ODDS_ROWS`).

    With l an example's cross-entropy, p = exp(-l) the probability of its class, q = 1 - p, and g the
    derivative of l with respect to a gate, d = -g / q is that of the log-odds log(p / q). If these were
    linear in the gate, the loss without the unit would be larger by exactly

        odds = log(p + q exp(d)),

    whose second order is -g + g² p / q / 2. The wrong classes may move apart as well: with r their shares
    of q, s = sum(r²), and logits that move independently of each other, that adds

        spread = (1 - s) / (1 + s) g² / q / 2.

    Probes go through the network beside each example, all gates moved by 0.15 up or down at random
    (v = ±1). With d' the derivative at the moved gates, v (d' - d) / 0.15 is an unbiased estimate of the
    diagonal h of the log-odds' second derivative (Hutchinson, 1990), bends of rectifiers included. With q'
    the probability of the wrong classes without the unit, probe = -h q' / 2 takes the place of the spread.

    Args:
        labeled: The labels of a model that is compiled.
        num_probes: Probes an example.

    Raises:
        ValueError: if the model has no single output of class probabilities and a cross-entropy.
    """

    def __init__(self, labeled: LabeledModel, num_probes: int = 0, **kwargs: Any) -> None:
        self._binary = _check_has_odds(labeled)
        gates = OddsGates(labeled.num_units, num_probes, name="gates")
        super().__init__(labeled, gates=gates, **kwargs)
        self._copies = 1 + num_probes

    def call(self, inputs: Tree, training: bool | None = None) -> Tree:
        """The outputs; those for an example are followed by those for its probes.

        So a batch that is sharded over devices is sharded the same way after it is repeated.
        """
        return super().call(_repeat_rows(inputs, self._copies), training)

    def example_losses(self, loss: Tree, mean: bool = False) -> Tree:
        """The losses to compile with; if they add up, they tell the gates of each example."""
        if mean:
            return super().example_losses(loss, mean)
        gates, copies, binary = self.network.gates, self._copies, self._binary
        return keras.tree.map_structure(lambda one: _OddsLoss(one, gates, copies, binary), loss)


class OddsGates(Gates):
    """Gates with probes, and with columns through which the loss tells of each example.

    Args:
        num_units: Number of gates.
        num_probes: Probes an example.
    """

    def __init__(self, num_units: int, num_probes: int, **kwargs: Any) -> None:
        num_rows = len(ODDS_ROWS) if num_probes else ODDS_ROWS["probe"]
        super().__init__(num_units, num_rows=num_rows, **kwargs)
        self._copies = 1 + num_probes
        self._seed = keras.random.SeedGenerator(0)
        self._slots: Tensor | None = None

    def call(self, like: Tensor) -> Tensor:
        """The carrier; as in the batch, each example is followed by its probes."""
        carrier = super().call(like)
        self._slots = carrier[:, self.num_units : self.num_units + _NUM_SLOTS]
        return carrier

    def pop_slots(self) -> Tensor | None:
        """The columns `(rows, 3)` of the latest carrier; `None` if they were asked for before."""
        slots, self._slots = self._slots, None
        return slots

    def draw(self, batch_size: int | Tensor) -> tuple[Tensor, ...]:
        """How each gate moves, `(rows, num_units)`: 0 for an example, -1 or 1 for a probe."""
        num_examples = batch_size // self._copies
        signs = ops.zeros((num_examples, 1, self.num_units))
        if self._copies > 1:
            shape = (self._copies - 1, num_examples, self.num_units)
            draws = keras.random.uniform(shape, seed=self._seed)
            draws = ops.transpose(ops.where(draws < 0.5, -1.0, 1.0), (1, 0, 2))
            signs = ops.concatenate([signs, draws], axis=1)
        return (ops.reshape(signs, (batch_size, self.num_units)),)

    def carrier_values(self, mask: Tensor, batch_size: int | Tensor, *draws: Tensor) -> Tensor:
        """The mask, moved for probes, and the columns for the loss, `(rows, num_units + 3)`."""
        return ops.concatenate([mask + _PROBE_STEP * draws[0], ops.zeros((batch_size, _NUM_SLOTS))], axis=1)

    def batch_rows(self, derivative: Tensor, statistics: Tensor, *draws: Tensor) -> Tensor:
        """The rows of `ODDS_ROWS`, from derivatives of examples and probes and the columns of the loss."""
        num_units, copies = self.num_units, self._copies
        derivative = ops.reshape(derivative, (-1, copies, num_units + _NUM_SLOTS))
        slots = (derivative[..., num_units + k : num_units + k + 1] for k in range(_NUM_SLOTS))
        q, spread, weight = slots
        derivative = derivative[..., :num_units]
        g = ops.where(weight > 0, derivative / ops.maximum(weight, 1e-30), 0.0)
        d = ops.clip(-g / ops.maximum(q, _MIN_PROBABILITY), -_MAX_SLOPE, _MAX_SLOPE)
        first = slice(0, 1)  # of each example, before its probes
        weight, q0, d0 = weight[:, first], ops.maximum(q[:, first], _MIN_PROBABILITY), d[:, first]
        odds = ops.logaddexp(ops.log1p(-q0), ops.log(q0) + d0)
        spread = spread[:, first] * ops.square(g[:, first]) / q0 / 2
        rows = [ops.sum(weight * odds, (0, 1)), ops.sum(weight * spread, (0, 1))]
        if copies > 1:
            signs = ops.reshape(draws[0], (-1, copies, num_units))[:, 1:]
            q_without = ops.exp(ops.log(q0) + d0 - odds)
            probe = -weight * q_without * signs * (d[:, 1:] - d0) / _PROBE_STEP / 2
            rows += [ops.sum(ops.mean(probe, 1), 0), ops.sum(ops.mean(ops.square(probe), 1), 0)]
        return ops.concatenate(
            [batch_statistics(derivative[:, 0], num_units), sum_over_replicas(ops.stack(rows))]
        )


class _OddsLoss(ExampleLoss):
    """An `ExampleLoss` whose gradient tells the gates of each example: q, the spread factor, the weight.

    Args:
        loss: As in `ExampleLoss`.
        gates: The gates that it tells.
        copies: Rows of each example: itself and its probes.
        binary: Whether there are two classes, so that only one is wrong.
    """

    def __init__(self, loss: Any, gates: OddsGates, copies: int, binary: bool) -> None:
        super().__init__(loss)
        self._gates, self._copies, self._binary = gates, copies, binary
        self._from_logits = kind_of(loss)[1]

    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The sum over examples and probes of each one's weighted loss; the columns add zero to it."""
        y_true, sample_weight = (_repeat_rows(y, self._copies) for y in (y_true, sample_weight))
        slots = self._gates.pop_slots()
        total = super().__call__(y_true, y_pred, sample_weight)
        if slots is None:  # there is no gradient
            return total
        y_true = ops.convert_to_tensor(y_true, dtype="float32")
        y_pred = ops.convert_to_tensor(y_pred, dtype="float32")
        values = ops.reshape(self._values(y_true, y_pred), (-1,))
        ones = ops.ones_like(values)
        weight = ones if sample_weight is None else ops.reshape(ops.cast(sample_weight, values.dtype), (-1,))
        q = ops.clip(-ops.expm1(-values), _MIN_PROBABILITY, 1 - 1e-7)
        spread = 0 * ones if self._binary else self._spread_factor(y_true, y_pred)
        slot_gradients = ops.stack([q, spread, weight * ones], axis=1)
        return total + ops.sum(slots * ops.stop_gradient(slot_gradients))

    def _spread_factor(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """(1 - s) / (1 + s), with s the sum of the squared shares of the wrong classes in their total."""
        num_classes = y_pred.shape[-1]
        one_hot = len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == num_classes
        label = ops.argmax(y_true, -1) if one_hot else ops.reshape(ops.cast(y_true, "int32"), (-1,))
        logits = y_pred if self._from_logits else ops.log(ops.maximum(y_pred, 1e-30))
        wrong = ops.softmax(logits - 1e9 * ops.one_hot(label, num_classes))
        s = ops.sum(ops.square(wrong), -1)
        return (1 - s) / (1 + s)


def _repeat_rows(values: Tree, copies: int) -> Tree:
    """Each row `copies` times, one after the other."""
    if copies == 1:
        return values
    return keras.tree.map_structure(
        lambda x: x if x is None else ops.repeat(ops.convert_to_tensor(x), copies, axis=0), values
    )


def has_odds(labeled: LabeledModel) -> bool:
    """Whether a model tells one class out of several, and is trained with a cross-entropy."""
    return _odds_kind(labeled)[0] is not None


def _check_has_odds(labeled: LabeledModel) -> bool:
    """Refuses a model without odds; returns whether there are only two classes."""
    kind, name = _odds_kind(labeled)
    if kind is None:
        shapes = [tuple(labeled.graph.shapes[i]) for i in labeled.graph.outputs]
        raise ValueError(
            "The log-odds criteria are about one class out of several. Expected a model with one output of "
            "shape (batch, classes), compiled with a cross-entropy without a weight of its own; 'taylor2' "
            "takes any loss. "
            f"Received: loss={name!r}, outputs of shapes {shapes}"
        )
    return kind == "binary"


def _odds_kind(labeled: LabeledModel) -> tuple[str | None, str]:
    """The kind of odds ("binary", "classes", or `None` for no odds), and the name of the loss."""
    graph = labeled.graph
    losses = losses_by_output(graph.model, len(graph.outputs))
    shape = graph.shapes[graph.outputs[0]]
    name = kind_of(losses[0])[0] if losses[0] is not None else "None"
    weighted = compile_arguments(graph.model).get("loss_weights") is not None
    if len(graph.outputs) != 1 or len(shape) != 2 or weighted:
        return None, name
    if shape[-1] == 1:
        return ("binary" if name in _BINARY_CROSS_ENTROPIES else None), name
    return ("classes" if name in _CROSS_ENTROPIES else None), name


def shrink_to_noise(correction: FloatArray, noise: FloatArray, scores: FloatArray) -> FloatArray:
    """A correction of scores that was measured with noise, times 1 - noise / signal, at least 0.

    This is the shrinkage of James and Stein (Estimation with quadratic loss, 1961), with one factor for all
    units: the smaller one of two that compare means over units of noise and signal, the first as they are,
    the second relative to the squares of the scores.

    Args:
        correction: The mean over probes, `(num_units,)`.
        noise: The variance of that mean, `(num_units,)`.
        scores: The scores to correct, `(num_units,)`.
    """
    size = np.maximum(np.abs(scores), 0.1 * np.median(np.abs(scores)) + 1e-30)
    factors = []
    for scale in (np.ones_like(size), np.square(size)):
        signal = (np.square(correction) / scale).mean()
        factors.append(1 - (noise / scale).mean() / max(signal, 1e-30))
    return max(min(factors), 0.0) * correction
