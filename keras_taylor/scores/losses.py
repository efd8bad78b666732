"""Losses whose gradient is each example's own derivative."""

import keras
from keras import ops

from keras_taylor.support.replicas import num_replicas

_BY_SHAPE = ("crossentropy", "ce")
# Names of Keras' losses by what they say of a target: a class, one of several marked, yes or no, a number.
CLASSES = {"sparse_categorical_crossentropy", *_BY_SHAPE}
ONE_HOT = {"categorical_crossentropy", "kl_divergence", "categorical_focal_crossentropy"}
BINARY = {"binary_crossentropy", "binary_focal_crossentropy"}
REAL = {
    "mean_squared_error",
    "mean_absolute_error",
    "mean_absolute_percentage_error",
    "mean_squared_logarithmic_error",
    "huber",
    "log_cosh",
}


class ExampleLoss(keras.losses.Loss):
    """Any Keras loss, summed over examples (or averaged), whatever its reduction.

    Each example's loss is the mean of its values (over time steps or pixels),
    weighted by its sample weights. With the sum, the gradient that arrives at an
    example's activations is that example's own, at every batch size.

    Args:
        loss: What `compile` takes for one output: a name, a function or a `Loss`.
        mean: Average over the examples of a batch instead of adding them up.
    """

    def __init__(self, loss, mean=False):
        super().__init__(name="example_loss", reduction="sum")
        self.loss = loss
        self.mean = mean

    def __call__(self, y_true, y_pred, sample_weight=None):
        """The sum (or mean) over examples of each one's weighted loss, a float32 scalar."""
        mask = getattr(y_pred, "_keras_mask", None)
        y_pred = ops.convert_to_tensor(y_pred, dtype="float32")
        values = self._values(ops.convert_to_tensor(y_true, dtype="float32"), y_pred)
        for weight in (mask, sample_weight):
            if weight is not None:
                values = _weighted(values, ops.cast(ops.convert_to_tensor(weight), values.dtype))
        total = ops.sum(ops.mean(values, tuple(range(1, len(values.shape)))))
        if not self.mean:
            return total
        return total / ops.cast(ops.shape(values)[0] * num_replicas(), total.dtype)  # as Keras' own means

    def _values(self, y_true, y_pred):
        """Values of shape `(batch, ...)`."""
        function = self._function(y_true, y_pred)
        if not isinstance(self.loss, keras.losses.Loss):
            y_true, y_pred = _same_rank(y_true, y_pred)
        values = ops.convert_to_tensor(function(y_true, y_pred))
        if len(values.shape):
            return values
        return _spread(function, values, y_true, y_pred)

    def _function(self, y_true, y_pred):
        if isinstance(self.loss, str) and self.loss.lower() in _BY_SHAPE:
            return keras.losses.get(_crossentropy_for(y_true, y_pred))
        loss = keras.losses.get(self.loss)
        if not isinstance(loss, keras.losses.Loss):
            return loss
        return loss.call


def _same_rank(first, second):
    """As `compile` does for functions: a last axis of size 1 may be missing in one of them."""
    if len(first.shape) < len(second.shape):
        return _same_rank(second, first)[::-1]
    if len(first.shape) == len(second.shape) + 1 and first.shape[-1] == 1:
        if len(second.shape) == 1:
            return first, ops.expand_dims(second, -1)
        return ops.squeeze(first, -1), second
    return first, second


def _spread(function, value, y_true, y_pred):
    """A loss that reduces its batch itself, as one equal share for each example.

    Doubling the batch tells a mean (the same value) from a sum (twice as much).
    """
    doubled = function(ops.concatenate([y_true, y_true]), ops.concatenate([y_pred, y_pred]))
    ratio = ops.stop_gradient(ops.convert_to_tensor(doubled) / (value + keras.config.epsilon() ** 3))
    batch = ops.shape(y_pred)[0]
    share = ops.where(ratio > 1.5, 1.0 / ops.cast(batch, value.dtype), ops.ones_like(value))
    return ops.broadcast_to(value * share, (batch,))


def _weighted(values, weight):
    if len(weight.shape) == len(values.shape) + 1 and weight.shape[-1] == 1:
        weight = ops.squeeze(weight, -1)
    while len(weight.shape) < len(values.shape):
        weight = ops.expand_dims(weight, -1)
    return values * weight


def _crossentropy_for(y_true, y_pred):
    """Which cross-entropy "crossentropy" means, by the shapes, as `compile` decides."""
    if y_pred.shape[-1] == 1:
        return "binary_crossentropy"
    same_rank = len(y_true.shape) == len(y_pred.shape)
    if len(y_true.shape) < len(y_pred.shape) or (same_rank and y_true.shape[-1] == 1):
        return "sparse_categorical_crossentropy"
    return "categorical_crossentropy"


def example_losses(loss, mean=False):
    """The same structure of losses as given to `compile`, each an `ExampleLoss`."""
    return keras.tree.map_structure(lambda one: None if one is None else ExampleLoss(one, mean), loss)


def averages_examples(loss):
    """Whether compiled losses average over the examples of a batch (as Keras' do unless told otherwise).

    Raises:
        ValueError: if some average and others add up.
    """
    flat = [keras.losses.get(one) for one in keras.tree.flatten(loss) if one is not None]
    adds = {getattr(one, "reduction", None) == "sum" for one in flat}
    if len(adds) > 1:
        raise ValueError(
            "Some losses add up the examples of a batch, others average them, so the examples' own "
            "derivatives cannot be told apart. Expected losses of one reduction, or "
            f'`loss_reduction="mean"` or "sum" for the one that weighs more. Received: loss={loss!r}'
        )
    return adds != {True}


def losses_by_output(model, num_outputs):
    """The compiled loss of each flattened output, `None` where there is none."""
    loss = getattr(model, "loss", None)
    if isinstance(loss, dict):
        structure = getattr(model, "_outputs_struct", None)
        names = sorted(structure) if isinstance(structure, dict) else model.output_names
        return [loss.get(name) for name in names]
    flat = list(loss) if isinstance(loss, (list, tuple)) else [loss]
    return flat * num_outputs if len(flat) == 1 else flat


def kind_of(loss):
    """The name of a loss function in Keras, and whether it takes logits."""
    if isinstance(loss, str):
        if loss.lower() in _BY_SHAPE:
            return loss.lower(), False
        loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        function = getattr(loss, "fn", None)  # of what wraps a function, as Keras' own do
        return getattr(function, "__name__", type(loss).__name__), bool(getattr(loss, "from_logits", False))
    return getattr(loss, "__name__", repr(loss)), False
