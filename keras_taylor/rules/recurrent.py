"""Recurrent layers, whose kernels can read their past through a gate, and layers around another layer."""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_taylor.rules.base import (
    Context,
    Effect,
    InternalRead,
    LabeledTensor,
    Rule,
    WeightLabels,
    Work,
    count_kept,
    is_from_keras,
    lock_inputs,
    num_elements,
    override_attributes,
    size_product,
    unknown_operation,
)
from keras_taylor.rules.elementwise import is_elementwise
from keras_taylor.support.identity import IdentityMap
from keras_taylor.support.types import IntArray, Shape, Tensor

# A step of a cell: from inputs and states to an output and new states.
CellStep: TypeAlias = Callable[..., tuple[Tensor, list[Tensor]]]

_KNOWN_CELLS = ("LSTMCell", "GRUCell", "SimpleRNNCell", "ConvLSTMCell")
# Where the configuration of a recurrent layer is, by the prefix of the attribute that holds the layer.
_CONFIG_PREFIXES = {"": "", "forward_layer.": "layer.config.", "backward_layer.": "backward_layer.config."}


def recurrent(ctx: Context) -> Effect:
    """Units can leave with all of their gates. In the next step, the other units no longer read them."""
    return _recurrent_effect(ctx, {"": ctx.operation})


def bidirectional(ctx: Context) -> Effect:
    """Units at the same place of both directions leave together."""
    layer = ctx.operation
    sides = ("forward_layer", "backward_layer")
    return _recurrent_effect(ctx, {f"{side}.": getattr(layer, side) for side in sides})


def apply_to_each_step(ctx: Context, rule: Rule) -> Effect:
    """The effect of `TimeDistributed`: the effect of the inner layer on one step.

    Args:
        ctx: The call of the wrapper.
        rule: The rule of the inner layer.
    """
    tensor = ctx.inputs[0]
    if len(ctx.inputs) > 1 or tensor.rank < 3:
        return lock_inputs(ctx)
    if tensor.channel_axis == 1:
        ctx.lock(tensor.labels, "read step by step")
    labels = tensor.labels[:, 0] * (tensor.channel_axis != 1)
    num_steps = size_product(tensor.shape[1:2])
    inner = dataclasses.replace(
        ctx,
        operation=ctx.operation.layer,
        inputs=[LabeledTensor(labels, _without_time(tensor.shape), tensor.batch)],
        output_shapes=[_without_time(shape) for shape in ctx.output_shapes],
    )
    effect = _effect_of_wrapper(rule(inner))
    return dataclasses.replace(
        effect,
        outputs=[labels[:, None] for labels in effect.outputs],
        reads={number: axis + 1 for number, axis in effect.reads.items()},
        work=tuple(Work(num_steps * work.factor, work.labels) for work in effect.work),
    )


def apply_to_inner_layer(ctx: Context, rule: Rule) -> Effect:
    """The effect of `SpectralNormalization`: at inference, it is the inner layer.

    Args:
        ctx: The call of the wrapper.
        rule: The rule of the inner layer.
    """
    layer = ctx.operation
    effect = rule(dataclasses.replace(ctx, operation=layer.layer))
    name = "kernel" if hasattr(layer.layer, "kernel") else "embeddings"
    if name not in effect.weights:
        return unknown_operation(ctx)
    wrapper = _effect_of_wrapper(effect)
    weights = {**wrapper.weights, "vector_u": (None, effect.weights[name][-1])}
    return dataclasses.replace(wrapper, weights=weights)


def _effect_of_wrapper(effect: Effect) -> Effect:
    """Returns the effect of an inner layer as that of the wrapper, which holds it as `layer`."""
    accelerate, call_with_gate = effect.accelerate, effect.call_with_gate
    return dataclasses.replace(
        effect,
        weights={f"layer.{name}": axes for name, axes in effect.weights.items()},
        config={f"layer.config.{key}": edit for key, edit in effect.config.items()},
        internal_reads=tuple(InternalRead(r.labels, _gate_inner_layer(r)) for r in effect.internal_reads),
        accelerate=accelerate and (lambda layer: accelerate(layer.layer)),
        call_with_gate=call_with_gate and (lambda layer, x, gate: call_with_gate(layer.layer, x, gate)),
    )


def _gate_inner_layer(
    read: InternalRead,
) -> Callable[[keras.Layer, Tensor], contextlib.AbstractContextManager[None]]:
    """The `apply_gate` of a wrapper whose inner layer has this read."""
    return lambda layer, gate: read.apply_gate(layer.layer, gate)


def _without_time(shape: Shape) -> Shape:
    """The shape of one step."""
    return (shape[0], *shape[2:])


def _recurrent_effect(ctx: Context, layers: Mapping[str, keras.Layer]) -> Effect:
    """The effect of one or two recurrent layers that read the same sequence.

    Args:
        ctx: The call.
        layers: The recurrent layers, by the prefix of their attributes: `""` or `"forward_layer."`.
    """
    if not all(_has_known_cell(layer) for layer in layers.values()) or not _has_sequence_first(ctx):
        return unknown_operation(ctx)
    tensor = ctx.inputs[0]
    is_first = getattr(next(iter(layers.values())).cell, "data_format", None) == "channels_first"
    axis = 2 - tensor.rank if is_first else -1  # of channels, counted from the end: in sequences and states
    read = ctx.input_labels(0, axis)
    units = _new_units(ctx, layers.values())
    _join_initial_states(ctx, units, axis)
    state_shape = [1] * (tensor.rank - 1)
    state_shape[axis] = -1
    prefixes = list(layers)

    def apply_gate(layer: keras.Layer, gate: Tensor) -> contextlib.AbstractContextManager[None]:
        found = [operator.attrgetter(prefix[:-1])(layer) if prefix else layer for prefix in prefixes]
        return gate_recurrence(found, gate)

    weights = (w for prefix, layer in layers.items() for w in _cell_weights(prefix, layer, read, units))
    config = {_CONFIG_PREFIXES[p] + _units_key(layer): count_kept(units) for p, layer in layers.items()}
    return Effect(
        outputs=[
            ctx.output_labels(_repeat_units(units, shape[axis]), axis, number)
            for number, shape in enumerate(ctx.output_shapes)
        ],
        weights=dict(weights),
        config=config,
        reads={0: tensor.rank + axis},
        internal_reads=(InternalRead(units.reshape(state_shape), apply_gate),),
        work=tuple(w for layer in layers.values() for w in _recurrent_work(ctx, layer, read, units, axis)),
    )


def _new_units(ctx: Context, layers: Iterable[keras.Layer]) -> IntArray:
    """Labels of the units, which both directions share, `(num_units,)`."""
    nums = [_num_units(layer) for layer in layers]
    units = ctx.new_labels(nums[0])
    if len(set(nums)) > 1:
        ctx.lock(units, "the two directions have different numbers of units")
    if any(_may_mix_units(layer.cell) for layer in layers):
        ctx.lock(units, "goes through an activation that may mix channels")
    return units


def _repeat_units(units: IntArray, num_channels: int | None) -> IntArray:
    """Labels of an output with this number of channels: the units of each direction, one after the other."""
    assert num_channels is not None  # every recurrent layer knows its number of units
    return np.tile(units, num_channels // units.size)


def _num_units(layer: keras.Layer) -> int:
    """Number of units of one direction."""
    return layer.cell.recurrent_kernel.shape[-2]


def _may_mix_units(cell: keras.Layer) -> bool:
    """Whether an activation of the cell may compute one unit from others."""
    activations = [cell.activation, getattr(cell, "recurrent_activation", cell.activation)]
    return not all(is_elementwise(f) and is_from_keras(f) for f in activations)


def _join_initial_states(ctx: Context, units: IntArray, axis: int) -> None:
    """Makes channels of given initial states one with the units that read them as their past.

    Args:
        ctx: The call.
        units: Labels of the units.
        axis: The channel axis, counted from the end.
    """
    states = [s for s in keras.tree.flatten(ctx.argument(1, "initial_state")) if s is not None]
    flat = keras.tree.flatten((ctx.args, ctx.kwargs))
    pairs = ((flat[position], number) for number, position in enumerate(ctx.input_positions))
    input_numbers: IdentityMap[Any, int] = IdentityMap(pairs)
    for state in states:
        number = input_numbers.pop(state, None)
        if number is None or ctx.inputs[number].shape[axis] != units.size:
            ctx.lock(units, "its initial state is not made of channels")
        else:
            ctx.union(ctx.input_labels(number, axis), units)
    for number in input_numbers.values():
        if number:
            ctx.lock(ctx.inputs[number].labels, "read by a recurrent layer in addition to its sequence")


def _cell_weights(
    prefix: str, layer: keras.Layer, read: IntArray, units: IntArray
) -> Iterator[tuple[str, WeightLabels]]:
    """Yields path and labels of each weight of a cell. Kernels have a block of columns for each gate."""
    cell, num = layer.cell, _num_units(layer)
    units = units if units.size == num else np.zeros(num, units.dtype)  # directions differ: all units stay
    window = (None,) * (len(cell.kernel.shape) - 2)
    columns = np.tile(units, cell.kernel.shape[-1] // num)
    yield f"{prefix}cell.kernel", (*window, read, columns)
    yield f"{prefix}cell.recurrent_kernel", (*window, units, columns)
    if getattr(cell, "bias", None) is not None:
        yield f"{prefix}cell.bias", (*(None,) * (len(cell.bias.shape) - 1), columns)


def _units_key(layer: keras.Layer) -> str:
    """The key of the configuration value that counts the units."""
    prefix = "cell.config." if type(layer) is keras.layers.RNN else ""
    return prefix + ("filters" if hasattr(layer.cell, "filters") else "units")


def _has_known_cell(layer: keras.Layer) -> bool:
    """Whether a recurrent layer and its cell are Keras' own, built, stateless and not quantized."""
    cell = getattr(layer, "cell", None)
    types = [type(layer), type(cell)]
    if cell is None or not all(map(is_from_keras, types)) or type(cell).__name__ not in _KNOWN_CELLS:
        return False
    return cell.built and not layer.stateful and not getattr(cell, "quantization_mode", None)


def _has_sequence_first(ctx: Context) -> bool:
    """Whether the first argument is the sequence, not a list of the sequence and the states."""
    return ctx.input_positions[0] == 0 and not isinstance(ctx.args[0], (list, tuple, dict))


def _recurrent_work(
    ctx: Context, layer: keras.Layer, read: IntArray, units: IntArray, axis: int
) -> tuple[Work, Work]:
    """The products with kernel and recurrent kernel, in each step at each position."""
    shape = ctx.output_shapes[0]
    channel_axis = len(shape) + axis
    positions = num_elements(shape, (channel_axis, 1) if layer.return_sequences else (channel_axis,))
    num_steps = size_product(ctx.inputs[0].shape[1:2])
    *window, num_units, num_columns = layer.cell.recurrent_kernel.shape
    factor = 2.0 * positions * num_steps * math.prod(window) * (num_columns // num_units)
    return Work(factor, (read, units)), Work(factor, (units, units))


@contextlib.contextmanager
def gate_recurrence(layers: Sequence[keras.Layer], gate: Tensor) -> Iterator[None]:
    """Within this context, recurrent layers read their own past through a gate.

    The gate multiplies the past where the recurrent kernel reads it, and nowhere else. What a unit keeps for
    itself (the carry of an LSTM, the share of the past that the update gate of a GRU passes on) is no edge
    between units. Fused kernels know no gates, so the layers compute step by step.

    Args:
        layers: Recurrent layers with one of Keras' own cells.
        gate: A tensor that broadcasts to the first state.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            gated_step = _gated_gru_step if type(layer.cell).__name__ == "GRUCell" else _gated_step
            stack.enter_context(override_attributes(layer.cell, call=gated_step(layer.cell, gate)))
            if hasattr(layer, "use_cudnn"):
                stack.enter_context(override_attributes(layer, use_cudnn=False))
        yield


def _gated_step(cell: keras.Layer, gate: Tensor) -> CellStep:
    """The step of a cell in which only the recurrent kernel reads the first state."""
    call = cell.call

    def step(inputs: Tensor, states: Sequence[Tensor], **options: Any) -> tuple[Tensor, list[Tensor]]:
        past, *rest = states
        return call(inputs, [past * ops.cast(gate, past.dtype), *rest], **options)

    return step


def _gated_gru_step(cell: keras.layers.GRUCell, gate: Tensor) -> CellStep:
    """The step of a GRU. The kernel reads the state through the gate; the update gate passes all of it on.

    The equations are those of Cho et al. 2014 (`reset_after=False`) and of cuDNN (`reset_after=True`).
    """

    def step(
        inputs: Tensor, states: Sequence[Tensor], training: bool | None = False
    ) -> tuple[Tensor, list[Tensor]]:
        (past,) = states
        read = past * ops.cast(gate, past.dtype)
        x_rate, h_rate = (cell.dropout, cell.recurrent_dropout) if training else (0.0, 0.0)
        x_masks = _gru_dropout_masks(cell.get_dropout_mask, inputs, x_rate)
        x = _gru_products(inputs, cell.kernel, x_masks)
        h_masks = _gru_dropout_masks(cell.get_recurrent_dropout_mask, past, h_rate)
        h = _gru_products(read, cell.recurrent_kernel, h_masks)
        x_biases, h_biases = _gru_biases(cell)
        x = [product + bias for product, bias in zip(x, x_biases, strict=True)]
        h = [product + bias for product, bias in zip(h, h_biases, strict=True)]
        update = cell.recurrent_activation(x[0] + h[0])
        reset = cell.recurrent_activation(x[1] + h[1])
        if cell.reset_after:
            candidate = reset * h[2]
        else:
            kernel = ops.split(ops.convert_to_tensor(cell.recurrent_kernel), 3, axis=1)[2]
            candidate = ops.matmul(reset * (read if h_masks is None else read * h_masks[2]), kernel)
        new = update * past + (1 - update) * cell.activation(x[2] + candidate)
        return new, [new]

    return step


def _gru_products(x: Tensor, kernel: keras.Variable, masks: Sequence[Tensor] | None) -> list[Tensor]:
    """The products of `x`, `(batch, num)`, with each of a GRU's three kernels, after dropout."""
    matrix = ops.convert_to_tensor(kernel)
    if masks is None:
        return ops.split(ops.matmul(x, matrix), 3, axis=-1)
    pairs = zip(masks, ops.split(matrix, 3, axis=1), strict=True)
    return [ops.matmul(x * mask, block) for mask, block in pairs]


def _gru_dropout_masks(mask_of: Callable[[Tensor], Any], x: Tensor, rate: float) -> Sequence[Tensor] | None:
    """A GRU's dropout masks for `x`, one for each of its three kernels; `None` without dropout."""
    if not 0.0 < rate < 1.0:
        return None
    masks = mask_of(x)
    return masks if isinstance(masks, (list, tuple)) else [masks] * 3


def _gru_biases(cell: keras.layers.GRUCell) -> tuple[list[Any], list[Any]]:
    """The biases of the three products with the inputs, and of the three with the past."""
    if not cell.use_bias:
        return [0.0] * 3, [0.0] * 3
    bias = ops.convert_to_tensor(cell.bias)
    if not cell.reset_after:
        return ops.split(bias, 3), [0.0] * 3
    return ops.split(bias[0], 3), ops.split(bias[1], 3)
