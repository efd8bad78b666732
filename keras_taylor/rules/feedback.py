"""Recurrent layers whose kernels read what the layer put out a step before times a gate."""

import contextlib

from keras import ops

from keras_taylor.rules.base import replaced


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
            stack.enter_context(replaced(layer.cell, call=step(layer.cell, gate)))
            if hasattr(layer, "use_cudnn"):
                stack.enter_context(replaced(layer, use_cudnn=False))
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
