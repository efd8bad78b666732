"""Passes of the data through a model with gates."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.closed_layers import gate_inside
from keras_taylor.reading.graph import Call
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.reading.walk import Walk
from keras_taylor.rules.base import Effect, weight_of
from keras_taylor.rules.labels import FIXED
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.support.datasets import Feed, input_batches
from keras_taylor.support.identity import IdentityMap, IdentitySet
from keras_taylor.support.keras_internals import compile_arguments
from keras_taylor.support.replicas import from_first_process
from keras_taylor.support.types import Array, BoolArray, FloatArray, IntArray, Masks, Tensor

# What `measure_activations` takes the mean of, for each property of `GroupStatistics`.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_activation": lambda x: x,
    "mean_absolute_activation": ops.abs,
    "mean_square_activation": ops.square,
    "zero_share": lambda x: ops.cast(x == 0, "float32"),
}
# Steps between two transfers of the float32 statistics to float64 on the host.
_STEPS_PER_TRANSFER = 256


def gather_statistics(
    gated: GatedModel,
    labeled: LabeledModel,
    feed: Feed,
    num_examples: int | None = None,
    class_weight: Mapping[int, float] | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> FloatArray:
    """Sums over one pass of the data, under plain `fit`; a model that had a pass is not compiled again.

    Returns:
        A float64 array `(num_rows, num_units)`, rows as in `gates.GATE_ROWS` and perhaps more, such as
        those of `log_odds.ODDS_ROWS`.
    """
    if not gated.compiled:
        compile_for_scoring(gated, labeled.graph.model)
    transfer = _StatisticsTransfer(gated)
    arguments = feed.fit_arguments(num_examples)
    with warnings.catch_warnings():
        # Keras warns of every iterable that ends before it says how long it is
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        history = gated.fit(
            **arguments,
            class_weight=class_weight,
            epochs=1,
            verbose=0,
            shuffle=False,
            callbacks=[transfer, *callbacks, *feed.callbacks(num_examples)],
        )
    if not (np.isfinite(transfer.totals).all() and np.isfinite(history.history["loss"]).all()):
        raise ValueError(explain_nonfinite(gated, feed, num_examples))
    return transfer.totals


def compile_for_scoring(gated: GatedModel, model: keras.Model, mean: bool = False) -> None:
    """Compiles so that `fit` collects statistics: each example's own loss, a step that moves nothing.

    With `mean`, `evaluate` gives the mean loss of the examples.
    """
    gated.compile(
        keras.optimizers.SGD(0.0),
        loss=gated.example_losses(model.loss, mean),
        loss_weights=compile_arguments(model).get("loss_weights"),
        jit_compile=model.jit_compile,
        run_eagerly=model.run_eagerly,
        auto_scale_loss=False,
    )


class _StatisticsTransfer(keras.callbacks.Callback):
    """Moves the float32 statistics into float64 after every 256 steps."""

    def __init__(self, gated: GatedModel) -> None:
        super().__init__()
        self.totals = np.zeros(gated.statistics.shape)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if batch % _STEPS_PER_TRANSFER == _STEPS_PER_TRANSFER - 1:
            self.totals += self.model.pop_statistics()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.totals += self.model.pop_statistics()


class RepeatedPasses:
    """Passes with several models through one model with gates, which is compiled once.

    A closed gate has the effect of a cut. So the model with gates and the weights of a smaller model has the
    same outputs and the same derivatives as that one.

    Args:
        labeled: The model whose gates these are. The others are like it, perhaps without some units.
        gated: Its model with gates.
    """

    def __init__(self, labeled: LabeledModel, gated: GatedModel) -> None:
        self._labeled, self._gated = labeled, gated
        weights = IdentitySet(gated.weights)
        seeds = [variable for variable in gated.variables if variable not in weights]
        self._seeds = [(variable, np.array(ops.convert_to_numpy(variable))) for variable in seeds]

    def statistics(
        self,
        small: LabeledModel,
        kept: BoolArray,
        feed: Feed,
        num_examples: int | None = None,
        class_weight: Mapping[int, float] | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> FloatArray | None:
        """Returns what `gather_statistics` returns for a model that keeps some of the units.

        Args:
            small: The model.
            kept: Bool array `(num_units,)`: its units among those that have gates.
            feed, num_examples, class_weight, callbacks: As in `gather_statistics`.

        Returns:
            A float64 array `(num_rows, small.num_units)`; `None` if the model has not exactly these units.
        """
        if not self._can_represent(small, kept):
            return None
        self._copy_weights(small, kept)
        for variable, value in self._seeds:  # random numbers of a pass do not depend on earlier passes
            variable.assign(value)
        self._gated.mask = kept
        self._gated.pop_statistics()  # those of a pass that was interrupted
        arguments = self._labeled, feed, num_examples, class_weight, callbacks
        return gather_statistics(self._gated, *arguments)[:, kept]

    def _can_represent(self, small: LabeledModel, kept: BoolArray) -> bool:
        """Whether the small model has the same calls, and the groups that the kept units form."""
        names, small_names = ([call.name for call in one.graph.calls] for one in (self._labeled, small))
        left = {g.name: int(kept[g.start :][: g.num_units].sum()) for g in self._labeled.groups}
        return names == small_names and left == {g.name: g.num_units for g in small.groups}

    def _copy_weights(self, small: LabeledModel, kept: BoolArray) -> None:
        """Puts the small model's weights where the kept units are; weights behind closed gates stay."""
        done = set()
        base = self._labeled
        for call, effect, other in zip(base.graph.calls, base.effects, small.graph.calls, strict=True):
            if call.operation in done or not isinstance(call.operation, keras.Layer):
                continue
            done.add(call.operation)
            axes = IdentityMap(
                (weight_of(call.operation, name), labels) for name, labels in effect.weights.items()
            )
            copy = self._gated.network.copy_of(call.operation)
            weights = zip(call.operation.weights, other.operation.weights, copy.weights, strict=True)
            for weight, source, target in weights:
                masks = [
                    None if labels is None else base.kept_mask(labels, kept).reshape(-1)
                    for labels in axes.get(weight, ())
                ]
                target.assign(_scatter(source, target, masks))


def refuse_class_weight(class_weight: Mapping[int, float] | None) -> None:
    """Refuses class weights for the measured loss change."""
    if class_weight is not None:
        raise ValueError(
            "The criterion 'oracle' evaluates the loss, which knows no class weights. Pass weights of the "
            f"examples instead: `ds=(x, y, sample_weight)`. Received: class_weight={class_weight!r}"
        )


def measure_loss_changes(
    gated: GatedModel, labeled: LabeledModel, feed: Feed, num_examples: int | None
) -> FloatArray:
    """Change of the mean loss when one unit's gate is closed, measured unit by unit, `(num_units,)`."""
    compile_for_scoring(gated, labeled.graph.model, mean=True)

    def loss_with(mask: FloatArray) -> float:
        gated.mask = mask
        arguments = feed.fit_arguments(num_examples)
        if "steps_per_epoch" in arguments:
            arguments["steps"] = arguments.pop("steps_per_epoch")
        callbacks = feed.callbacks(num_examples)
        return gated.evaluate(**arguments, callbacks=callbacks, verbose=0, return_dict=True)["loss"]

    all_open = np.ones(labeled.num_units)
    base = loss_with(all_open)
    if not np.isfinite(base):
        raise ValueError(explain_nonfinite(gated, feed, num_examples))
    changes = np.zeros(labeled.num_units)
    for unit in range(labeled.num_units):
        mask = all_open.copy()
        mask[unit] = 0
        changes[unit] = loss_with(mask) - base
    return changes


def measure_activations(
    labeled: LabeledModel, feed: Feed, num_examples: int | None = None
) -> dict[str, FloatArray]:
    """Means of the values that layers read of each unit, over one pass of the data at inference.

    These are the values that have a gate in other passes. A tensor counts once, however many layers read it.

    Returns:
        For each of the activations of `GroupStatistics` a float64 array `(num_units,)`; units that no layer
        reads count as zeros. All processes get those of the first one.
    """
    graph, read = labeled.graph, _ActivationSums(labeled)
    for batch in input_batches(feed, graph.model, num_examples):
        walk, seen = Walk(graph, [batch]), set[int]()
        for number, (call, effect) in enumerate(zip(graph.calls, labeled.effects, strict=True)):
            for index in _tensors_read(call, effect, labeled) - seen:
                seen.add(index)
                read.add(labeled.labels[index], walk.tensors[index][0])
            inside = {
                r.layer_number: functools.partial(read.add, r.labels)
                for r in effect.internal_reads
                if r.layer_number is not None
            }
            with gate_inside(call.operation, inside):
                (walk.run_alone if inside else walk.run)(number)
            walk.free_after(number)
    if not np.isfinite(read.totals).all():
        raise ValueError(explain_nonfinite(GatedModel(labeled), feed, num_examples))
    means = dict(zip(_ACTIVATIONS, from_first_process(read.totals / np.maximum(read.counts, 1)), strict=True))
    means["zero_share"] = np.where(read.counts > 0, means["zero_share"], 1)
    return means


def _tensors_read(call: Call, effect: Effect, labeled: LabeledModel) -> set[int]:
    """Numbers of the tensors whose channels a call reads.

    Some operations read inputs inside of themselves: attention its query and key, a recurrent layer its
    initial state.
    """
    inside = [read.labels.reshape(-1) for read in effect.internal_reads if read.layer_number is None]
    units = labeled.units_of(np.concatenate([*inside, [FIXED]]))
    return {call.inputs[number] for number in effect.reads} | {
        index
        for index in call.inputs
        if np.isin(labeled.units_of(labeled.labels[index]), units[units >= 0]).any()
    }


class _ActivationSums:
    """Sums of `_ACTIVATIONS` over examples and over the tensors that layers read.

    Attributes:
        totals: The sums of each unit's mean over its positions in a tensor, `(statistic, num_units)`.
        counts: How many examples, of how many tensors, were added, `(num_units,)`.
    """

    def __init__(self, labeled: LabeledModel) -> None:
        self._labeled = labeled
        self.totals = np.zeros((len(_ACTIVATIONS), labeled.num_units))
        self.counts = np.zeros(labeled.num_units)

    def add(self, labels: IntArray, x: Tensor) -> Tensor:
        """Adds the values of a tensor with these labels; returns it unchanged."""
        units = self._labeled.units_of(labels)
        if (units < 0).all():
            return x
        values, others = ops.cast(x, "float32"), [k for k in range(units.ndim) if k != np.argmax(units.shape)]
        means = ops.stack([ops.mean(function(values), others) for function in _ACTIVATIONS.values()])
        units, positions = np.unique(units.reshape(-1), return_inverse=True)
        for total, value in zip(self.totals, ops.convert_to_numpy(means), strict=True):
            of_unit = np.bincount(positions, value) / np.bincount(positions)
            total[units[units >= 0]] += len(x) * of_unit[units >= 0]
        self.counts[units[units >= 0]] += len(x)
        return x


def explain_nonfinite(gated: GatedModel, feed: Feed, num_examples: int | None = None) -> str:
    """The message for a loss on the data that is NaN or infinite: it names the batch or the layer."""
    for number, (x, _, _) in enumerate(feed.batches(num_examples)):
        for part in keras.tree.flatten(x):
            if not np.isfinite(keras.ops.convert_to_numpy(part)).all():
                return f"The data holds NaN or infinity. Received: ds with the first in batch {number}"
        layer = gated.network.find_nonfinite(x)
        if layer is not None:
            return (
                f"The output of layer '{layer}' is NaN or infinite: its weights are, or its values "
                "overflow. The model was not changed. "
                f"Received: ds, whose batch {number} shows it first"
            )
    return (
        "The loss or its gradient is NaN or infinite although every layer's output is finite: the "
        "targets do not suit the loss. The model was not changed. Received: ds"
    )


def _scatter(source: Tensor, target: Tensor, masks: Masks) -> Array:
    """Returns the target's values as a new array, with those of the source where all masks are true."""
    value = np.array(ops.convert_to_numpy(target))
    masks = masks or [None] * value.ndim
    places = [
        np.arange(n) if mask is None else np.flatnonzero(mask)
        for n, mask in zip(value.shape, masks, strict=True)
    ]
    value[np.ix_(*places)] = ops.convert_to_numpy(source)
    return value
