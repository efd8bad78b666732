"""What gates do to the odds of the true class: statistics for the criteria `log_odds`."""

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.tracing import compile_arguments
from keras_taylor.scores.gates import ROWS, GatedModel, Gates, batch_statistics
from keras_taylor.scores.losses import CLASSES, ExampleLoss, kind_of, losses_by_output
from keras_taylor.support.replicas import sum_over_replicas

# Rows of statistics after `gates.ROWS`: sums over examples, weighted as the examples are.
ODDS_ROWS = ("odds", "spread", "probe", "probe_square")
NUM_PROBES = 4
# By how much probes move every gate, up or down at random.
_STEP = 0.15
_FLOOR, _CLAMP = 1e-6, 50.0
_CROSS_ENTROPIES = CLASSES | {"categorical_crossentropy"}
_BINARY_CROSS_ENTROPIES = {"binary_crossentropy", "crossentropy", "ce"}
_NUM_SLOTS = 3  # what the loss tells of each example: q, the spread of the wrong classes, its weight


class OddsModel(GatedModel):
    """A frozen `GatedModel` that gathers, besides the others, the rows `ODDS_ROWS`.

    With l an example's cross-entropy, p = exp(-l) the probability of its class, q = 1 - p, and g the
    derivative of l with respect to a gate, d = -g / q is that of the log-odds log(p / q). If these were
    linear in the gate, the loss without the unit would be larger by exactly

        odds = log(p + q exp(d)),

    whose second order is -g + g² p / q / 2. The wrong classes may move apart as well: with r how they
    share q, s = sum(r²), and logits that move independently of each other, that adds

        spread = (1 - s) / (1 + s) g² / q / 2.

    Probes go through the network beside each example, all gates moved by 0.15 up or down at random
    (v = ±1): v (d' - d) / 0.15 is an unbiased estimate of the second derivative h of the log-odds
    (Hutchinson), bends of rectifiers included, and probe = -h q' / 2, with q' the probability of the wrong
    classes without the unit, takes the place of the spread.

    Args:
        channels: `groups.LabeledModel` of a model that is compiled.
        num_probes: Probes an example.

    Raises:
        ValueError: if the model has no single output of class probabilities and a cross-entropy.
    """

    def __init__(self, labeled, num_probes=0, **kwargs):
        self._binary = _check_loss(labeled)
        gates = OddsGates(labeled.num_units, num_probes, name="gates")
        super().__init__(labeled, gates=gates, **kwargs)
        self._copies = 1 + num_probes

    def call(self, inputs, training=None):
        """The outputs for each example, followed by those for its probes.

        So a batch that is sharded over devices is still sharded alike after it is repeated.
        """
        return super().call(_repeated(inputs, self._copies), training)

    def example_losses(self, loss, mean=False):
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

    def __init__(self, num_units, num_probes, **kwargs):
        super().__init__(num_units, rows=ROWS + ODDS_ROWS, **kwargs)
        self._copies = 1 + num_probes
        self._seed = keras.random.SeedGenerator(0)
        self._slots = None

    def call(self, like):
        """The carrier; like the batch, each example is followed by its probes."""
        rows = ops.shape(like)[0]
        examples = rows // self._copies
        signs = ops.zeros((examples, 1, self.num_units))
        if self._copies > 1:
            draws = keras.random.uniform((self._copies - 1, examples, self.num_units), seed=self._seed)
            draws = ops.transpose(ops.where(draws < 0.5, -1.0, 1.0), (1, 0, 2))
            signs = ops.concatenate([signs, draws], axis=1)
        signs = ops.reshape(signs, (rows, self.num_units))
        mask, statistics = ops.convert_to_tensor(self.mask), ops.convert_to_tensor(self.statistics)
        carrier = _carrier(self.num_units, self._copies)(mask, statistics, signs)
        self._slots = carrier[:, self.num_units :]
        return ops.concatenate([carrier, ops.ones((rows, 1), carrier.dtype)], axis=1)

    def take_slots(self):
        """The columns `(rows, 3)` of the carrier that was made last, once."""
        slots, self._slots = self._slots, None
        return slots


class _OddsLoss(ExampleLoss):
    """An `ExampleLoss` whose gradient brings the gates what they need to know of each example."""

    def __init__(self, loss, gates, copies, binary):
        super().__init__(loss)
        self._gates, self._copies, self._binary = gates, copies, binary
        self._from_logits = kind_of(loss)[1]

    def __call__(self, y_true, y_pred, sample_weight=None):
        """The sum over examples and probes of each one's weighted loss; the slots are zeros."""
        y_true, sample_weight = (_repeated(y, self._copies) for y in (y_true, sample_weight))
        slots = self._gates.take_slots()
        total = super().__call__(y_true, y_pred, sample_weight)
        if slots is None:  # there is no gradient
            return total
        y_true = ops.convert_to_tensor(y_true, dtype="float32")
        y_pred = ops.convert_to_tensor(y_pred, dtype="float32")
        values = ops.reshape(self._values(y_true, y_pred), (-1,))
        ones = ops.ones_like(values)
        weight = ones if sample_weight is None else ops.reshape(ops.cast(sample_weight, values.dtype), (-1,))
        q = ops.clip(-ops.expm1(-values), _FLOOR, 1 - 1e-7)
        spread = 0 * ones if self._binary else self._spread(y_true, y_pred)
        told = ops.stack([q, spread, weight * ones], axis=1)
        return total + ops.sum(slots * ops.stop_gradient(told))

    def _spread(self, y_true, y_pred):
        """(1 - s) / (1 + s), with s the sum of the squared shares that the wrong classes have in theirs."""
        classes = y_pred.shape[-1]
        one_hot = len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == classes
        label = ops.argmax(y_true, -1) if one_hot else ops.reshape(ops.cast(y_true, "int32"), (-1,))
        logits = y_pred if self._from_logits else ops.log(ops.maximum(y_pred, 1e-30))
        wrong = ops.softmax(logits - 1e9 * ops.one_hot(label, classes))
        s = ops.sum(ops.square(wrong), -1)
        return (1 - s) / (1 + s)


def _carrier(num_units, copies):
    @ops.custom_gradient
    def carry(mask, statistics, signs):
        def backward(*arguments, upstream=None):
            arrived = arguments[0] if upstream is None else upstream
            update = _statistics(arrived, signs, num_units, copies)
            return ops.zeros_like(mask), statistics + update, ops.zeros_like(signs)

        slots = ops.zeros((ops.shape(signs)[0], _NUM_SLOTS))
        return ops.concatenate([mask + _STEP * signs, slots], axis=1), backward

    return carry


def _statistics(arrived, signs, num_units, copies):
    """All rows for one batch, out of the derivatives of examples and probes and what the loss told."""
    arrived = ops.reshape(arrived, (-1, copies, num_units + _NUM_SLOTS))
    derivative = arrived[..., :num_units]
    q, spread, weight = (arrived[..., num_units + k : num_units + k + 1] for k in range(_NUM_SLOTS))
    g = ops.where(weight > 0, derivative / ops.maximum(weight, 1e-30), 0.0)
    d = ops.clip(-g / ops.maximum(q, _FLOOR), -_CLAMP, _CLAMP)
    first = slice(0, 1)  # of each example, before its probes
    weight, q0, d0 = weight[:, first], ops.maximum(q[:, first], _FLOOR), d[:, first]
    odds = ops.logaddexp(ops.log1p(-q0), ops.log(q0) + d0)
    spread = spread[:, first] * ops.square(g[:, first]) / q0 / 2
    rows = [ops.sum(weight * odds, (0, 1)), ops.sum(weight * spread, (0, 1))]
    if copies > 1:
        signs = ops.reshape(signs, (-1, copies, num_units))[:, 1:]
        gone = ops.exp(ops.log(q0) + d0 - odds)
        probe = -weight * gone * signs * (d[:, 1:] - d0) / _STEP / 2
        rows += [ops.sum(ops.mean(probe, 1), 0), ops.sum(ops.mean(ops.square(probe), 1), 0)]
    else:
        rows += [ops.zeros_like(rows[0])] * 2
    examples = ops.shape(derivative)[0]
    return ops.concatenate(
        [batch_statistics(derivative[:, 0], examples, num_units), sum_over_replicas(ops.stack(rows))]
    )


def _repeated(values, copies):
    """Each row so many times, one after the other."""
    if copies == 1:
        return values
    return keras.tree.map_structure(
        lambda x: x if x is None else ops.repeat(ops.convert_to_tensor(x), copies, axis=0), values
    )


def has_odds(labeled):
    """Whether a model tells one class out of several, and is trained with a cross-entropy."""
    return _kind(labeled)[0] is not None


def _check_loss(labeled):
    """Refuses what has no odds; says whether there are but two classes."""
    kind, name = _kind(labeled)
    if kind is None:
        shapes = [tuple(labeled.graph.shapes[i]) for i in labeled.graph.outputs]
        raise ValueError(
            "The log-odds criteria are about one class out of several. Expected a model with one output of "
            "shape (batch, classes), compiled with a cross-entropy without a weight of its own; 'taylor2' "
            "takes any loss. "
            f"Received: loss={name!r}, outputs of shapes {shapes}"
        )
    return kind == "binary"


def _kind(labeled):
    """ "binary", "classes", or `None` where there are no odds; and the loss' name."""
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


def shrunk(correction, noise, size):
    """A correction of scores that was measured with noise, made as much smaller as the noise demands.

    Args:
        correction: Array `(num_units,)`, the mean over probes.
        noise: The variance of that mean.
        size: How large the scores are: noise must be small beside the correction, as it is and in relation.
    """
    size = np.maximum(np.abs(size), 0.1 * np.median(np.abs(size)) + 1e-30)
    factors = []
    for scale in (np.ones_like(size), np.square(size)):
        signal = (np.square(correction) / scale).mean()
        factors.append(1 - (noise / scale).mean() / max(signal, 1e-30))
    return max(min(factors), 0.0) * correction
