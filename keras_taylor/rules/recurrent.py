"""Recurrent layers, whose kernels may read the past through a gate, and layers around another one."""

import contextlib
import dataclasses
import math
import operator

import keras
import numpy as np
from keras import ops

from keras_taylor.rules.base import (
    Effect,
    InternalRead,
    LabeledTensor,
    Work,
    count_kept,
    is_elementwise,
    is_from_keras,
    lock_inputs,
    num_elements,
    override_attributes,
    unknown_operation,
)

CELLS = ("LSTMCell", "GRUCell", "SimpleRNNCell", "ConvLSTMCell")
# Where the configuration of a layer is in that of its wrapper, by the attribute that holds it.
_CONFIGS = {"": "", "forward_layer.": "layer.config.", "backward_layer.": "backward_layer.config."}


def recurrent(ctx):
    """Units can go, with all of their gates; in the next step the others no longer read them."""
    return _recurrent(ctx, {"": ctx.operation})


def bidirectional(ctx):
    """Two recurrent layers that read the same input: units at the same place of both leave together."""
    layer = ctx.operation
    return _recurrent(ctx, {f"{side}.": getattr(layer, side) for side in ("forward_layer", "backward_layer")})


def time_distributed(ctx, rule):
    """What `rule`, that of its layer, does to one step."""
    tensor = ctx.inputs[0]
    if len(ctx.inputs) > 1 or tensor.rank < 3 or tensor.channel_axis == 1:
        return lock_inputs(ctx)
    steps = math.nan if tensor.shape[1] is None else tensor.shape[1]
    inner = dataclasses.replace(
        ctx,
        operation=ctx.operation.layer,
        inputs=[LabeledTensor(tensor.labels[:, 0], _without_time(tensor.shape))],
        output_shapes=[_without_time(shape) for shape in ctx.output_shapes],
    )
    effect = _of_inner(rule(inner))
    return dataclasses.replace(
        effect,
        outputs=[labels[:, None] for labels in effect.outputs],
        reads={number: axis + 1 for number, axis in effect.reads.items()},
        work=tuple(Work(steps * work.factor, work.labels) for work in effect.work),
    )


def spectral_normalization(ctx, rule):
    """What `rule`, that of its layer, does: at inference it is that layer."""
    layer = ctx.operation
    effect = rule(dataclasses.replace(ctx, operation=layer.layer))
    name = "kernel" if hasattr(layer.layer, "kernel") else "embeddings"
    if name not in effect.weights:
        return unknown_operation(ctx)
    inner = _of_inner(effect)
    weights = {**inner.weights, "vector_u": (None, effect.weights[name][-1])}
    return dataclasses.replace(inner, weights=weights)


def _of_inner(effect):
    """The effect of a layer as that of the wrapper around it."""
    accelerate, call_with_gate = effect.accelerate, effect.call_with_gate
    return dataclasses.replace(
        effect,
        weights={f"layer.{name}": axes for name, axes in effect.weights.items()},
        config={f"layer.config.{key}": edit for key, edit in effect.config.items()},
        internal_reads=tuple(InternalRead(each.labels, _inner_gated(each)) for each in effect.internal_reads),
        accelerate=accelerate and (lambda layer: accelerate(layer.layer)),
        call_with_gate=call_with_gate and (lambda layer, x, gate: call_with_gate(layer.layer, x, gate)),
    )


def _inner_gated(within):
    return lambda layer, gate: within.apply_gate(layer.layer, gate)


def _without_time(shape):
    return (shape[0], *shape[2:])


def _recurrent(ctx, layers):
    """Units of these layers, by prefix of their attributes, and rows of their kernels can go."""
    if not all(_is_understood(layer) for layer in layers.values()) or not _is_first(ctx):
        return unknown_operation(ctx)
    tensor = ctx.inputs[0]
    first = getattr(next(iter(layers.values())).cell, "data_format", None) == "channels_first"
    from_end = tensor.rank - 2 if first else 1
    read = ctx.input_labels(0, -from_end)
    made = _made(ctx, layers.values())
    _join_states(ctx, made, from_end)
    past = made.reshape([-1 if k == tensor.rank - 1 - from_end else 1 for k in range(tensor.rank - 1)])
    return Effect(
        outputs=[
            ctx.output_labels(np.tile(made, shape[-from_end] // made.size), -from_end, number)
            for number, shape in enumerate(ctx.output_shapes)
        ],
        weights={k: v for prefix, layer in layers.items() for k, v in _weights(prefix, layer, read, made)},
        config={_CONFIGS[prefix] + _units_key(layer): count_kept(made) for prefix, layer in layers.items()},
        reads={0: tensor.rank - from_end},
        internal_reads=(InternalRead(past, lambda layer, gate: gated(_inside(layer, layers), gate)),),
        work=tuple(w for layer in layers.values() for w in _work(ctx, layer, read, made, from_end)),
    )


def _inside(layer, prefixes):
    """The recurrent layers in a layer, or in a copy of it."""
    return [operator.attrgetter(prefix[:-1])(layer) if prefix else layer for prefix in prefixes]


def _made(ctx, layers):
    """Labels of the units: the same for both directions."""
    nums = [_num_units(layer) for layer in layers]
    made = ctx.new_labels(nums[0])
    if len(set(nums)) > 1:
        ctx.lock(made, "the two directions have different numbers of units")
    if any(_mixes(layer.cell) for layer in layers):
        ctx.lock(made, "goes through an activation that may mix channels")
    return made


def _num_units(layer):
    return layer.cell.recurrent_kernel.shape[-2]


def _mixes(cell):
    """Whether a unit may see others in an activation."""
    functions = [cell.activation, getattr(cell, "recurrent_activation", cell.activation)]
    return not all(is_elementwise(f) and is_from_keras(f) for f in functions)


def _join_states(ctx, made, from_end):
    """Channels of states that are given are those of the units, whose past they are."""
    given = [s for s in keras.tree.flatten(ctx.argument(1, "initial_state")) if s is not None]
    flat = keras.tree.flatten((ctx.args, ctx.kwargs))
    numbers = {id(flat[position]): number for number, position in enumerate(ctx.input_positions)}
    for state in given:
        number = numbers.pop(id(state), None)
        axis = None if number is None else ctx.inputs[number].rank - from_end
        if number is None or ctx.inputs[number].shape[axis] != made.size:
            ctx.lock(made, "begins with values that are no channels")
        else:
            ctx.union(ctx.input_labels(number, axis), made)
    for number in numbers.values():
        if number:
            ctx.lock(ctx.inputs[number].labels, "read by a recurrent layer beside its sequence")


def _weights(prefix, layer, read, made):
    """Pairs of a weight and the labels along its axes: one block of columns for each gate."""
    cell, num = layer.cell, _num_units(layer)
    made = made if made.size == num else np.zeros(num, made.dtype)  # all of them stay
    window = (None,) * (len(cell.kernel.shape) - 2)
    blocks = np.tile(made, cell.kernel.shape[-1] // num)
    yield f"{prefix}cell.kernel", (*window, read, blocks)
    yield f"{prefix}cell.recurrent_kernel", (*window, made, blocks)
    if getattr(cell, "bias", None) is not None:
        yield f"{prefix}cell.bias", (*(None,) * (len(cell.bias.shape) - 1), blocks)


def _units_key(layer):
    """The configuration value that says how many units there are."""
    inside = "cell.config." if type(layer) is keras.layers.RNN else ""
    return inside + ("filters" if hasattr(layer.cell, "filters") else "units")


def _is_understood(layer):
    cell = getattr(layer, "cell", None)
    types = [type(layer), type(cell)]
    own = all(map(is_from_keras, types)) and type(cell).__name__ in CELLS
    return own and cell.built and not layer.stateful and not getattr(cell, "quantization_mode", None)


def _is_first(ctx):
    """Whether the sequence is the first of the tensors, and not a list with the states."""
    return ctx.input_positions[0] == 0 and not isinstance(ctx.args[0], (list, tuple, dict))


def _work(ctx, layer, read, made, from_end):
    """Every step multiplies by the kernel and by the recurrent kernel, at every position."""
    shape = ctx.output_shapes[0]
    axis = len(shape) - from_end
    steps = ctx.inputs[0].shape[1]
    positions = num_elements(shape, (axis, 1) if layer.return_sequences else (axis,))
    each = 2.0 * positions * (math.nan if steps is None else steps)
    *window, units, columns = layer.cell.recurrent_kernel.shape
    each *= math.prod(window) * (columns // units)
    return Work(each, (read, made)), Work(each, (made, made))


@contextlib.contextmanager
def gated(layers, gate):
    """Within it, calls of recurrent layers read their own past through a gate.

    The gate sits where the recurrent kernel reads the past, and nowhere else: what a unit keeps for itself
    (an LSTM's carry, the share of its own past that a GRU passes on) is no edge between units.
    Fused kernels know no gates, so a layer takes its steps one by one.

    Args:
        layers: Layers with a cell of Keras' own.
        gate: A tensor that broadcasts to their first state.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            step = _STEPS.get(type(layer.cell).__name__, _step)
            stack.enter_context(override_attributes(layer.cell, call=step(layer.cell, gate)))
            if hasattr(layer, "use_cudnn"):
                stack.enter_context(override_attributes(layer, use_cudnn=False))
        yield


def _step(cell, gate):
    """The step of a cell whose kernel is all that reads the first state."""
    call = cell.call

    def step(inputs, states, **options):
        past, *rest = states
        return call(inputs, [past * ops.cast(gate, past.dtype), *rest], **options)

    return step


def _gru_step(cell, gate):
    """The step of a GRU: its first state is read by the kernel, and passed on by the update gate."""

    def step(inputs, states, training=False):
        (past,) = states
        read = past * ops.cast(gate, past.dtype)
        x = _blocks(inputs, cell.kernel, _dropout(cell.get_dropout_mask, inputs, training and cell.dropout))
        masks = _dropout(cell.get_recurrent_dropout_mask, past, training and cell.recurrent_dropout)
        h = _blocks(read, cell.recurrent_kernel, masks)
        x_bias, h_bias = _gru_biases(cell)
        x = [block + bias for block, bias in zip(x, x_bias, strict=True)]
        h = [block + bias for block, bias in zip(h, h_bias, strict=True)]
        update = cell.recurrent_activation(x[0] + h[0])
        reset = cell.recurrent_activation(x[1] + h[1])
        if cell.reset_after:
            candidate = reset * h[2]
        else:
            kernel = ops.split(ops.convert_to_tensor(cell.recurrent_kernel), 3, axis=1)[2]
            candidate = ops.matmul(reset * (read if masks is None else read * masks[2]), kernel)
        new = update * past + (1 - update) * cell.activation(x[2] + candidate)
        return new, [new]

    return step


def _blocks(x, kernel, masks):
    """`x` times each of a GRU's three kernels, perhaps with some values of `x` dropped for each."""
    kernel = ops.convert_to_tensor(kernel)
    if masks is None:
        return ops.split(ops.matmul(x, kernel), 3, axis=-1)
    pairs = zip(masks, ops.split(kernel, 3, axis=1), strict=True)
    return [ops.matmul(x * mask, block) for mask, block in pairs]


def _dropout(mask_of, x, rate):
    """A GRU's dropout masks, one for each of its three kernels; `None` for no dropout."""
    if not 0.0 < rate < 1.0:
        return None
    masks = mask_of(x)
    return masks if isinstance(masks, (list, tuple)) else [masks] * 3


def _gru_biases(cell):
    """Biases of the three products with the input, and of those with the past."""
    if not cell.use_bias:
        return [0.0] * 3, [0.0] * 3
    bias = ops.convert_to_tensor(cell.bias)
    if not cell.reset_after:
        return ops.split(bias, 3), [0.0] * 3
    return ops.split(bias[0], 3), ops.split(bias[1], 3)


_STEPS = {"GRUCell": _gru_step}
