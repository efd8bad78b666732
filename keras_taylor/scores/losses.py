"""Losses: each example's own, what kind a loss is of, and how far predictions diverge under it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.cloning import losses_by_output
from keras_taylor.support.keras_internals import compile_arguments, mask_of_tensor, output_structure
from keras_taylor.support.replicas import num_replicas
from keras_taylor.support.types import Array, BoolArray, FloatArray, Tensor, Tree

# What `compile` takes for one output: a name, a function or a `keras.losses.Loss`.
OutputLoss: TypeAlias = Any

_LOSSES_BY_SHAPE = ("crossentropy", "ce")
# Names of Keras' losses by the kind of the target: a class, a marked class, yes or no, a real number.
CLASS_LOSSES = {"sparse_categorical_crossentropy", *_LOSSES_BY_SHAPE}
ONE_HOT_LOSSES = {"categorical_crossentropy", "kl_divergence", "categorical_focal_crossentropy"}
BINARY_LOSSES = {"binary_crossentropy", "binary_focal_crossentropy"}
REGRESSION_LOSSES = {
    "mean_squared_error",
    "mean_absolute_error",
    "mean_absolute_percentage_error",
    "mean_squared_logarithmic_error",
    "huber",
    "log_cosh",
}


class LossKind(NamedTuple):
    """The name of a loss function in Keras, and whether it takes logits."""

    name: str
    from_logits: bool = False


class ExampleLoss(keras.losses.Loss):
    """Any Keras loss, summed over examples (or averaged), whatever its reduction.

    Each example's loss is the mean of its values (over time steps or pixels), weighted by its sample
    weights. With the sum, the gradient that arrives at an example's activations is that example's own, at
    every batch size.

    Args:
        loss: What `compile` takes for one output: a name, a function or a `Loss`.
        mean: Average over the examples of a batch instead of adding them up.
    """

    def __init__(self, loss: OutputLoss, mean: bool = False) -> None:
        super().__init__(name="example_loss", reduction="sum")
        self.loss = loss
        self.mean = mean

    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The sum (or mean) over examples of each one's weighted loss, a float32 scalar."""
        values = self.of_examples(y_true, y_pred, sample_weight)
        total = ops.sum(values)
        if not self.mean:
            return total
        return total / ops.cast(ops.shape(values)[0] * num_replicas(), total.dtype)  # as Keras' own means

    def of_examples(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The weighted loss of each example, float32 `(batch,)`."""
        mask = mask_of_tensor(y_pred)
        y_pred = ops.convert_to_tensor(y_pred, dtype="float32")
        values = self._values(ops.convert_to_tensor(y_true, dtype="float32"), y_pred)
        for weight in (mask, sample_weight):
            if weight is not None:
                values = _multiply_weights(values, ops.cast(ops.convert_to_tensor(weight), values.dtype))
        return ops.mean(values, tuple(range(1, len(values.shape))))

    def _values(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Values of shape `(batch, ...)`."""
        function = self._function(y_true, y_pred)
        if not isinstance(self.loss, keras.losses.Loss):
            y_true, y_pred = _match_ranks(y_true, y_pred)
        values = ops.convert_to_tensor(function(y_true, y_pred))
        if len(values.shape):
            return values
        return _divide_among_examples(function, values, y_true, y_pred)

    def _function(self, y_true: Tensor, y_pred: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        if isinstance(self.loss, str) and self.loss.lower() in _LOSSES_BY_SHAPE:
            return keras.losses.get(_crossentropy_for(y_true, y_pred))
        loss = keras.losses.get(self.loss)
        if not isinstance(loss, keras.losses.Loss):
            return loss
        return loss.call


def _match_ranks(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """As `compile` does for functions: a last axis of size 1 may be missing in one of them."""
    if len(first.shape) < len(second.shape):
        second, first = _match_ranks(second, first)
        return first, second
    if len(first.shape) == len(second.shape) + 1 and first.shape[-1] == 1:
        if len(second.shape) == 1:
            return first, ops.expand_dims(second, -1)
        return ops.squeeze(first, -1), second
    return first, second


def _divide_among_examples(
    function: Callable[[Tensor, Tensor], Tensor], value: Tensor, y_true: Tensor, y_pred: Tensor
) -> Tensor:
    """The value of a loss that reduces its batch itself, as one equal share for each example.

    Doubling the batch tells a mean (the same value) from a sum (twice as much).
    """
    doubled = function(ops.concatenate([y_true, y_true]), ops.concatenate([y_pred, y_pred]))
    ratio = ops.stop_gradient(ops.convert_to_tensor(doubled) / (value + keras.config.epsilon() ** 3))
    batch = ops.shape(y_pred)[0]
    share = ops.where(ratio > 1.5, 1.0 / ops.cast(batch, value.dtype), ops.ones_like(value))
    return ops.broadcast_to(value * share, (batch,))


def _multiply_weights(values: Tensor, weight: Tensor) -> Tensor:
    """Values times weights that may lack their last axes, or have one of size 1 too many."""
    if len(weight.shape) == len(values.shape) + 1 and weight.shape[-1] == 1:
        weight = ops.squeeze(weight, -1)
    while len(weight.shape) < len(values.shape):
        weight = ops.expand_dims(weight, -1)
    return values * weight


def _crossentropy_for(y_true: Tensor, y_pred: Tensor) -> str:
    """Which cross-entropy "crossentropy" means, by the shapes, as `compile` decides."""
    if y_pred.shape[-1] == 1:
        return "binary_crossentropy"
    same_rank = len(y_true.shape) == len(y_pred.shape)
    if len(y_true.shape) < len(y_pred.shape) or (same_rank and y_true.shape[-1] == 1):
        return "sparse_categorical_crossentropy"
    return "categorical_crossentropy"


def example_losses(loss: Tree, mean: bool = False) -> Tree:
    """The same structure of losses as given to `compile`, each an `ExampleLoss`."""
    return keras.tree.map_structure(lambda one: None if one is None else ExampleLoss(one, mean), loss)


def averages_examples(loss: Tree) -> bool:
    """Whether compiled losses average over the examples of a batch (as Keras' do unless told otherwise).

    Raises:
        ValueError: if some average and others add up.
    """
    flat = [keras.losses.get(one) for one in keras.tree.flatten(loss) if one is not None]
    adds_up = {getattr(one, "reduction", None) == "sum" for one in flat}
    if len(adds_up) > 1:
        raise ValueError(
            "Some losses add up the examples of a batch, others average them, so the examples' own "
            "derivatives cannot be told apart. Expected losses of one reduction, or "
            f'`loss_reduction="mean"` or "sum" for the one that weighs more. Received: loss={loss!r}'
        )
    return adds_up != {True}


def _by_output(model: keras.Model, values: Tree, num_outputs: int, shared: bool = False) -> list[Any]:
    """The targets, weights or factors of each flattened output; `None` where there are none.

    Args:
        model: The model.
        values: One for the only output, or a structure as `fit` and `compile` take it.
        num_outputs: The number of flattened outputs.
        shared: Whether one is for all outputs.
    """
    if isinstance(values, dict) and not isinstance(output_structure(model), dict):
        return [values.get(name) for name in model.output_names]
    flat = keras.tree.flatten(values)
    if shared and len(flat) == 1:
        return flat * num_outputs
    return flat if len(flat) == num_outputs else [None] * num_outputs


def loss_factors(model: keras.Model, num_outputs: int) -> list[float]:
    """The `loss_weights` that a model is compiled with, one for each flattened output; 1 without any."""
    factors = compile_arguments(model).get("loss_weights") if model.compiled else None
    found = _by_output(model, factors, num_outputs, shared=True)
    return [1.0 if factor is None else float(factor) for factor in found]


class OutputLabels:
    """The labels of some examples, and how well outputs fit them.

    Args:
        model: A compiled model.
        y, weights: Labels and weights of the examples as `fit` takes them; `None`: there are none.
        num_outputs: The number of the model's flattened outputs.
    """

    def __init__(self, model: keras.Model, y: Tree, weights: Tree, num_outputs: int) -> None:
        columns = (
            losses_by_output(model, num_outputs),
            _by_output(model, y, num_outputs),
            _by_output(model, weights, num_outputs, shared=True),
            loss_factors(model, num_outputs),
        )
        self._labeled = [
            (number, ExampleLoss(loss), target, weight, factor)
            for number, (loss, target, weight, factor) in enumerate(zip(*columns, strict=True))
            if loss is not None and target is not None
        ]

    def losses(self, outputs: Sequence[Array]) -> FloatArray:
        """The weighted loss of each example, added up over the outputs; float64 `(num_examples,)`."""
        total = np.zeros(len(outputs[0]))
        for number, loss, target, weight, factor in self._labeled:
            total += factor * ops.convert_to_numpy(loss.of_examples(target, outputs[number], weight))
        return total


def kind_of(loss: OutputLoss | None) -> LossKind:
    """The kind of one output's loss; the name is "None" for an output without a loss."""
    if isinstance(loss, str):
        if loss.lower() in _LOSSES_BY_SHAPE:
            return LossKind(loss.lower())
        loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        function = getattr(loss, "fn", None)  # of losses that wrap a function, as Keras' own do
        name = getattr(function, "__name__", type(loss).__name__)
        return LossKind(name, bool(getattr(loss, "from_logits", False)))
    return LossKind(getattr(loss, "__name__", repr(loss)))


def check_targets(model: keras.Model, targets: Tree, weights: Tree = None, argument: str = "ds") -> None:
    """Refuses targets that do not fit the compiled losses of classes: other backends' messages are obscure.

    Args:
        model: The model, compiled.
        targets: Targets in the structure of the model's outputs; others are not checked.
        weights: Weights of the examples, or of all values. What has no weight may be anything.
        argument: Name of the argument that holds them, for messages.

    Raises:
        ValueError: for labels beyond the classes, one-hot targets in place of labels and the reverse, texts.
    """
    structure = output_structure(model)
    is_dict = isinstance(targets, dict)
    if targets is None or (is_dict and not (isinstance(structure, dict) and set(structure) == set(targets))):
        return
    flat, outputs = keras.tree.flatten(targets), model.outputs
    losses = losses_by_output(model, len(outputs))
    if len(flat) != len(outputs):
        return
    for target, output, loss in zip(flat, outputs, losses, strict=True):
        if target is not None and loss is not None:
            labels = target if isinstance(target, np.ndarray) else ops.convert_to_numpy(target)
            _check_labels(labels, output, loss, weights if len(flat) == 1 else None, argument)


def _check_labels(
    labels: Array, output: keras.KerasTensor, loss: OutputLoss, weights: Array | None, argument: str
) -> None:
    name, num_classes = kind_of(loss).name, output.shape[-1]
    received = f"Received: {argument} with y of shape {labels.shape} and dtype {labels.dtype}"
    if labels.dtype.kind in "OSU":
        raise ValueError(f"The targets are no numbers. Expected labels from 0 on for classes. {received}")
    is_sparse = name == "sparse_categorical_crossentropy"
    if not (is_sparse or name in ONE_HOT_LOSSES) or not num_classes or getattr(loss, "axis", -1) != -1:
        return
    is_one_hot = labels.ndim == len(output.shape) and labels.shape[-1] == num_classes
    if is_sparse and is_one_hot and num_classes > 1:
        raise ValueError(
            f"The loss `{name}` takes the number of a class, and these targets are as wide as the outputs. "
            "Expected `y.argmax(-1)`, or a model that is compiled with `categorical_crossentropy`. "
            f"{received}"
        )
    if not is_sparse and not is_one_hot:
        raise ValueError(
            f"The loss `{name}` takes one number for each of {num_classes} classes. Expected one-hot "
            "targets, `keras.utils.to_categorical(y)`, or a model that is compiled with "
            f"`sparse_categorical_crossentropy`. {received}"
        )
    if is_sparse:
        counted = labels.reshape(-1)[_counted(labels, loss, weights)]
        beyond = counted[(counted < 0) | (counted >= num_classes)]
        if beyond.size:
            raise ValueError(
                f"Labels lie beyond the {num_classes} classes of the model's output. Expected numbers from 0 "
                f"to {num_classes - 1}. {received}, and {beyond[0]} in it"
            )


def _counted(labels: Array, loss: OutputLoss, weights: Array | None) -> BoolArray:
    """Which of the flattened labels a loss counts: not those of `ignore_class`, nor those without weight."""
    flat = labels.reshape(-1)
    counted = np.ones(flat.shape, bool)
    if getattr(loss, "ignore_class", None) is not None:
        counted &= flat != loss.ignore_class
    if weights is not None:
        weights = np.asarray(weights if isinstance(weights, np.ndarray) else ops.convert_to_numpy(weights))
        if len(weights) and flat.size % weights.size == 0:
            counted &= np.repeat(weights.reshape(-1) != 0, flat.size // weights.size)
    return counted


def mean_divergence(model: keras.Model, reference: Sequence[Array], predicted: Sequence[Array]) -> float:
    """Mean over examples, and over a model's flattened outputs, of the divergence from a reference."""
    return float(example_divergences(model, reference, predicted).mean())


def example_divergences(
    model: keras.Model, reference: Sequence[Array], predicted: Sequence[Array]
) -> FloatArray:
    """The mean `divergence` of each example over a model's flattened outputs, by their `loss_weights`.

    Args:
        model: The model, compiled: its losses tell classes from numbers.
        reference, predicted: For each output an array `(num_examples, ...)`.

    Returns:
        A float64 array `(num_examples,)`.
    """
    losses = losses_by_output(model, len(predicted))
    columns = [divergence(*one) for one in zip(losses, reference, predicted, strict=True)]
    means = [column.reshape(len(column), -1).mean(1) for column in columns]
    factors = loss_factors(model, len(predicted))
    return np.asarray(np.average(means, axis=0, weights=factors if sum(factors) > 0 else None))


def divergence(loss: OutputLoss | None, reference: Array, predicted: Array) -> FloatArray:
    """How far predictions of one output are from a reference, float64 `(num_examples, ...)`.

    For classes, with p the reference and q the predicted probabilities, the Kullback-Leibler divergence
    sum(p log(p / q)) in nats; for numbers (predicted - reference)^2 / mean(reference^2).

    Args:
        loss: The loss that the output was compiled with; `None` counts as a loss of numbers.
        reference, predicted: Outputs `(num_examples, ...)`.
    """
    name, from_logits = kind_of(loss)
    reference, predicted = reference.astype(np.float64), predicted.astype(np.float64)
    if name in BINARY_LOSSES:
        p, q = ((1 / (1 + np.exp(-y)) if from_logits else y) for y in (reference, predicted))
        return _relative_entropy(p, q) + _relative_entropy(1 - p, 1 - q)
    if name in CLASS_LOSSES | ONE_HOT_LOSSES and reference.shape[-1] > 1:
        p, q = ((_softmax(y) if from_logits else y) for y in (reference, predicted))
        return _relative_entropy(p, q).sum(-1)
    return np.square(predicted - reference) / max(np.square(reference).mean(), 1e-30)


def _relative_entropy(p: FloatArray, q: FloatArray) -> FloatArray:
    """p log(p / q), elementwise."""
    return p * np.log(np.maximum(p, 1e-12) / np.maximum(q, 1e-12))


def _softmax(logits: FloatArray) -> FloatArray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
