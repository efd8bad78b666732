"""Recurrent layers, and layers around another one."""

import dataclasses
import math

from keras_taylor.rules import elementwise
from keras_taylor.rules.base import Effect, Tensor, Work, is_keras_own, size

CELLS = ("LSTMCell", "GRUCell", "SimpleRNNCell", "ConvLSTMCell")


def recurrent(ctx):
    """Input channels can go; its own units feed back into itself and stay."""
    return _recurrent(ctx, {"": ctx.operation})


def bidirectional(ctx):
    """Two recurrent layers that read the same input."""
    layer = ctx.operation
    return _recurrent(ctx, {f"{side}.": getattr(layer, side) for side in ("forward_layer", "backward_layer")})


def time_distributed(ctx, rule):
    """What `rule`, that of its layer, does to one step."""
    tensor = ctx.inputs[0]
    if len(ctx.inputs) > 1 or tensor.rank < 3 or tensor.channel_axis == 1:
        return elementwise.locked(ctx)
    steps = math.nan if tensor.shape[1] is None else tensor.shape[1]
    inner = dataclasses.replace(
        ctx,
        operation=ctx.operation.layer,
        inputs=[Tensor(tensor.labels[:, 0], _without_time(tensor.shape))],
        output_shapes=[_without_time(shape) for shape in ctx.output_shapes],
    )
    effect = _of_inner(rule(inner))
    return dataclasses.replace(
        effect,
        outputs=[labels[:, None] for labels in effect.outputs],
        reads={number: axis + 1 for number, axis in effect.reads.items()},
        work=tuple(Work(steps * work.factor, work.axes) for work in effect.work),
    )


def spectral_normalization(ctx, rule):
    """What `rule`, that of its layer, does: at inference it is that layer."""
    layer = ctx.operation
    effect = rule(dataclasses.replace(ctx, operation=layer.layer))
    name = "kernel" if hasattr(layer.layer, "kernel") else "embeddings"
    if name not in effect.weights:
        return elementwise.unknown(ctx)
    inner = _of_inner(effect)
    weights = {**inner.weights, "vector_u": (None, effect.weights[name][-1])}
    return dataclasses.replace(inner, weights=weights)


def _of_inner(effect):
    """The effect of a layer as that of the wrapper around it."""
    ease, gated = effect.ease, effect.gated
    return dataclasses.replace(
        effect,
        weights={f"layer.{name}": axes for name, axes in effect.weights.items()},
        config={f"layer.config.{key}": edit for key, edit in effect.config.items()},
        ease=ease and (lambda layer: ease(layer.layer)),
        gated=gated and (lambda layer, x, gate: gated(layer.layer, x, gate)),
    )


def _without_time(shape):
    return (shape[0], *shape[2:])


def _recurrent(ctx, layers):
    """Rows of the kernels of these layers, by prefix of their attributes, can go."""
    if not all(_is_understood(layer) for layer in layers.values()) or not _is_first(ctx):
        return elementwise.unknown(ctx)
    tensor = ctx.inputs[0]
    first = getattr(next(iter(layers.values())).cell, "data_format", None) == "channels_first"
    from_end = tensor.rank - 2 if first else 1
    read = ctx.contracted(0, -from_end)
    for state in ctx.inputs[1:]:
        ctx.lock(state.labels, "the state of a recurrent layer")
    outputs = []
    for number, shape in enumerate(ctx.output_shapes):
        made = ctx.fresh(shape[-from_end])
        ctx.lock(made, "feeds back into itself")
        outputs.append(ctx.placed(made, -from_end, number))
    kernels = {f"{prefix}cell.kernel": layer.cell.kernel for prefix, layer in layers.items()}
    return Effect(
        outputs=outputs,
        weights={name: (None,) * (len(k.shape) - 2) + (read, None) for name, k in kernels.items()},
        reads={0: tensor.rank - from_end},
        work=tuple(w for layer in layers.values() for w in _work(ctx, layer, read, from_end)),
    )


def _is_understood(layer):
    cell = getattr(layer, "cell", None)
    types = [type(layer), type(cell)]
    own = all(map(is_keras_own, types)) and type(cell).__name__ in CELLS
    return own and cell.built and not layer.stateful and not getattr(cell, "quantization_mode", None)


def _is_first(ctx):
    """Whether the sequence is the first of the tensors, and not a list with the states."""
    return ctx.positions[0] == 0 and not isinstance(ctx.args[0], (list, tuple, dict))


def _work(ctx, layer, read, from_end):
    """Every step multiplies by the kernel and by the recurrent kernel, at every position."""
    shape = ctx.output_shapes[0]
    axis = len(shape) - from_end
    steps = ctx.inputs[0].shape[1]
    positions = size(shape, (axis, 1) if layer.return_sequences else (axis,))
    each = 2.0 * positions * (math.nan if steps is None else steps)
    *window, _, gates = layer.cell.kernel.shape
    return (
        Work(each * math.prod(window) * gates, (read,)),
        Work(each * math.prod(layer.cell.recurrent_kernel.shape)),
    )
