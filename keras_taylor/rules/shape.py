"""Operations that only move elements, and those along an axis: reductions, repeats, running sums, stacks."""

import math

import numpy as np

from keras_taylor.rules.base import Edit, Effect, LabeledTensor, elementwise_work, lock_inputs
from keras_taylor.rules.elementwise import broadcast_labels
from keras_taylor.rules.labels import FIXED


def concatenate(ctx):
    """Channels side by side, or other axes end to end."""
    rank = len(ctx.output_shapes[0])
    axis = ctx.operation.axis % rank
    if axis == 0:
        return lock_batch_operation(ctx)
    if all(t.channel_axis != axis for t in ctx.inputs):
        return Effect(outputs=[broadcast_labels(ctx, ctx.inputs, rank)])
    for tensor in ctx.inputs:
        if tensor.channel_axis not in (None, axis):
            ctx.lock(tensor.labels, "beside channels on another axis")
    vector = np.concatenate(
        [
            t.labels_along(axis) if t.channel_axis == axis else np.full(t.shape[axis], FIXED)
            for t in ctx.inputs
        ]
    )
    return Effect(outputs=[ctx.output_labels(vector, axis)])


def flatten(ctx):
    """The elements keep their order; with channels first they are moved to the end before."""
    tensor = ctx.inputs[0]
    if ctx.operation.data_format == "channels_first" and tensor.rank > 1:
        axes = (0, *range(2, tensor.rank), 1)
        tensor = LabeledTensor(np.transpose(tensor.labels, axes), tuple(tensor.shape[k] for k in axes))
    return Effect(outputs=[_reshaped(ctx, tensor, ctx.output_shapes[0])])


def _keeps_batch(operation, shape_in, shape_out):
    """Whether a reshape leaves the batch axis alone, as the layer always does."""
    rest_in, rest_out = shape_in[1:], shape_out[1:]
    known = None not in rest_in + rest_out and math.prod(rest_in) == math.prod(rest_out)
    return known or hasattr(operation, "target_shape")


def reshape(ctx):
    """The elements keep their order; where it splits channels, those of one slice become one unit."""
    tensor, shape = ctx.inputs[0], ctx.output_shapes[0]
    if not _keeps_batch(ctx.operation, tensor.shape, shape):
        return lock_batch_operation(ctx)
    labels = _reshaped(ctx, tensor, shape)
    out = LabeledTensor(labels, shape)
    axis = out.channel_axis
    config = {}
    if axis is not None:
        vector = out.labels_along(axis)
        if hasattr(ctx.operation, "target_shape"):
            config["target_shape"] = _sized(ctx.operation.target_shape, axis - 1, vector)
        elif hasattr(ctx.operation, "newshape"):
            config["newshape"] = _sized(ctx.operation.newshape, axis, vector)
    return Effect(outputs=[labels], config=config)


def permute(ctx):
    """Axes change places."""
    return _transposed(ctx, (0, *ctx.operation.dims))


def transpose(ctx):
    """Axes change places, the batch's excepted."""
    rank = ctx.inputs[0].rank
    return _transposed(ctx, ctx.operation.axes or tuple(reversed(range(rank))))


def swapaxes(ctx):
    """Two axes change places."""
    axes = list(range(ctx.inputs[0].rank))
    first, second = ctx.operation.axis1, ctx.operation.axis2
    axes[first], axes[second] = axes[second], axes[first]
    return _transposed(ctx, axes)


def expand_dims(ctx):
    """New axes of size 1."""
    axes = tuple(np.atleast_1d(ctx.operation.axis) % len(ctx.output_shapes[0]))
    if 0 in axes:
        return lock_batch_operation(ctx)
    return Effect(outputs=[np.expand_dims(ctx.inputs[0].labels, axes)])


def squeeze(ctx):
    """Axes of size 1 leave."""
    tensor, axis = ctx.inputs[0], ctx.operation.axis
    axes = [k for k, d in enumerate(tensor.shape) if d == 1] if axis is None else np.atleast_1d(axis)
    if 0 in np.mod(axes, tensor.rank):
        return lock_batch_operation(ctx)
    return Effect(outputs=[np.squeeze(tensor.labels, tuple(axes))])


def repeat_vector(ctx):
    """A new axis, which all channels share."""
    return Effect(outputs=[np.expand_dims(ctx.inputs[0].labels, 1)])


def reduce(ctx):
    """Free over axes that are not the channels'."""
    tensor, operation = ctx.inputs[0], ctx.operation
    axes = range(tensor.rank) if operation.axis is None else np.atleast_1d(operation.axis)
    axes = tuple(int(k) % tensor.rank for k in axes)
    if tensor.channel_axis in axes or 0 in axes:
        return lock_inputs(ctx)
    labels = tensor.labels if operation.keepdims else np.squeeze(tensor.labels, axes)
    return Effect(outputs=[labels], work=elementwise_work(tensor.labels, tensor.shape))


def pad(ctx):
    """Padding; zeros beside channels are channels of their own, which may leave too."""
    tensor, operation = ctx.inputs[0], ctx.operation
    widths = [tuple(w) for w in operation.pad_width]
    widths = widths * tensor.rank if len(widths) == 1 else widths
    axis = tensor.channel_axis
    if widths[0] != (0, 0):
        return lock_batch_operation(ctx)
    if axis is None or widths[axis] == (0, 0):
        return Effect(outputs=[tensor.labels])
    if operation.mode != "constant":
        return lock_inputs(ctx)
    before, after = widths[axis]
    added = ctx.space.new_labels(before + after, ctx.name)
    left, right = added[:before], added[before:]
    vector = np.concatenate([left, tensor.labels_along(axis), right])

    def value(kept_left, kept_right):
        new = [list(w) for w in widths]
        new[axis] = [int(kept_left.sum()), int(kept_right.sum())]
        return new

    edit = Edit((left, right), value)
    return Effect(outputs=[ctx.output_labels(vector, axis)], config={"pad_width": edit})


def split(ctx):
    """A cut part tells where the next one starts."""
    tensor, operation = ctx.inputs[0], ctx.operation
    axis = operation.axis % tensor.rank
    num = len(ctx.output_shapes)
    if axis == 0:
        return lock_batch_operation(ctx)
    if tensor.channel_axis != axis:
        return Effect(outputs=[tensor.labels] * num)
    stops = np.cumsum([shape[axis] for shape in ctx.output_shapes])
    vector = tensor.labels_along(axis)
    parts = np.split(vector, stops[:-1])
    edit = Edit((vector,), lambda kept: [int(kept[:stop].sum()) for stop in stops[:-1]])
    outputs = [ctx.merge_to_one_axis(ctx.output_labels(part, axis, k)) for k, part in enumerate(parts)]
    for part, labels in zip(parts, outputs, strict=True):
        if labels.size == 1:
            ctx.lock(part, "stands alone on its axis")
    return Effect(outputs=outputs, config={"indices_or_sections": edit})


def get_item(ctx):
    """Indexing with integers, slices of step 1, `...` and `None`."""
    tensor = ctx.inputs[0]
    key = ctx.argument(1, "key")
    entries = list(key) if isinstance(key, (tuple, list)) else [key]
    if not all(e is None or e is Ellipsis or isinstance(e, (int, slice)) for e in entries):
        return lock_inputs(ctx)
    if entries[0] not in (slice(None), Ellipsis):
        return lock_batch_operation(ctx)
    axes = _axes_of(entries, tensor.rank)
    labels = tensor.labels[tuple(_on_labels(e, a, tensor) for e, a in zip(entries, axes, strict=True))]
    mine = next((i for i, a in enumerate(axes) if a is not None and a == tensor.channel_axis), None)
    if mine is None:
        return Effect(outputs=[labels])
    entry, vector = entries[mine], tensor.labels_along(axes[mine])
    if entry == slice(None):
        return Effect(outputs=[labels])
    if not isinstance(entry, slice) or entry.step not in (None, 1):
        return lock_inputs(ctx)
    start, stop, _ = entry.indices(vector.size)
    edit = Edit((vector,), lambda kept: slice(int(kept[:start].sum()), int(kept[:stop].sum())))
    return Effect(outputs=[ctx.merge_to_one_axis(labels)], arguments={_position(ctx, mine): edit})


def lock_batch_operation(ctx):
    """What adds, removes or moves examples: a gate must know the example of each row."""
    return lock_inputs(ctx, f"read by an operation on the batch axis ('{ctx.name}')")


def _position(ctx, entry):
    """Where an entry of the key stands among the flattened arguments."""
    first = next(i for i in range(len(ctx.constants)) if i not in ctx.input_positions)
    return first + entry


def _axes_of(entries, rank):
    """The axis that each entry of an index acts on, `None` for `...` and new axes."""
    used = sum(e is not None and e is not Ellipsis for e in entries)
    axes, axis = [], 0
    for entry in entries:
        if entry is Ellipsis:
            axes.append(None)
            axis += rank - used
        elif entry is None:
            axes.append(None)
        else:
            axes.append(axis)
            axis += 1
    return axes


def _on_labels(entry, axis, tensor):
    """The same entry for the label array, whose other axes have size 1."""
    if axis is None or axis == tensor.channel_axis:
        return entry
    return 0 if isinstance(entry, int) else slice(None)


def _transposed(ctx, axes):
    if axes[0] != 0:
        return lock_batch_operation(ctx)
    return Effect(outputs=[np.transpose(ctx.inputs[0].labels, axes)])


def _sized(shape, axis, vector):
    """A target shape whose entry at `axis` is the number of kept channels."""
    shape = list(shape)

    def value(kept):
        new = list(shape)
        new[axis] = -1 if shape[axis] == -1 else int(kept.sum())
        return new

    return Edit((vector,), value)


def _reshaped(ctx, tensor, shape):
    """Labels after a reshape; only the axes that share elements with the channels expand."""
    axis = tensor.channel_axis
    if axis is None:
        return np.full((1,) * len(shape), FIXED)
    for axes_in, axes_out in _blocks(tensor.shape, shape):
        if axis in axes_in:
            dims_in = [tensor.shape[k] for k in axes_in]
            dims_out = [shape[k] for k in axes_out]
            if None in dims_in + dims_out:
                break
            inner = [tensor.labels.shape[k] for k in axes_in]
            labels = np.broadcast_to(tensor.labels.reshape(inner), dims_in).reshape(dims_out)
            whole = [1] * len(shape)
            whole[axes_out[0] : axes_out[-1] + 1] = dims_out
            return ctx.merge_to_one_axis(labels.reshape(whole))
    ctx.lock(tensor.labels, "reshaped together with an axis of unknown size")
    return np.full((1,) * len(shape), FIXED)


def _blocks(shape_in, shape_out):
    """Pairs of axis ranges that hold the same elements, found from the last axis on."""
    i, j = len(shape_in), len(shape_out)
    stop_i = stop_j = 1  # the batch axis goes through
    while i > stop_i and j > stop_j:
        start_i, start_j = i - 1, j - 1
        product_in, product_out = shape_in[start_i], shape_out[start_j]
        while product_in != product_out:
            if product_in is None or product_out is None:
                start_i, start_j = stop_i, stop_j
                break
            if product_in < product_out and start_i > stop_i:
                start_i -= 1
                product_in = _times(product_in, shape_in[start_i])
            elif start_j > stop_j:
                start_j -= 1
                product_out = _times(product_out, shape_out[start_j])
            else:
                start_i, start_j = stop_i, stop_j
                break
        yield list(range(start_i, i)), list(range(start_j, j))
        i, j = start_i, start_j


def _times(product, dim):
    return None if dim is None else product * dim


def repeat(ctx):
    """Each channel several times, side by side: the copies are one unit."""
    tensor, operation = ctx.inputs[0], ctx.operation
    if operation.axis is None:
        return lock_batch_operation(ctx)
    axis = operation.axis % tensor.rank
    if axis == 0:
        return lock_batch_operation(ctx)
    if tensor.channel_axis != axis:
        return Effect(outputs=[tensor.labels])
    if np.size(operation.repeats) != 1:
        return lock_inputs(ctx)
    return Effect(outputs=[ctx.output_labels(np.repeat(tensor.labels_along(axis), operation.repeats), axis)])


def tile(ctx):
    """All channels several times, one after another: the copies are one unit."""
    tensor = ctx.inputs[0]
    repeats = [int(n) for n in np.atleast_1d(ctx.operation.repeats)]
    repeats = [1] * (tensor.rank - len(repeats)) + repeats
    if len(repeats) > tensor.rank or repeats[0] != 1:
        return lock_batch_operation(ctx)
    axis = tensor.channel_axis
    if axis is None:
        return Effect(outputs=[ctx.fixed_labels()])
    return Effect(outputs=[ctx.output_labels(np.tile(tensor.labels_along(axis), repeats[axis]), axis)])


def along_axis(ctx):
    """Acts along axes; channels on another one go through."""
    tensor, axis = ctx.inputs[0], ctx.operation.axis
    axes = () if axis is None else tuple(k % tensor.rank for k in np.atleast_1d(axis))
    if 0 in axes or not axes:
        return lock_batch_operation(ctx)
    return lock_inputs(ctx) if tensor.channel_axis in axes else Effect(outputs=[tensor.labels])


def triangle(ctx):
    """Zeros above or below the diagonal of the last two axes."""
    tensor = ctx.inputs[0]
    axis = tensor.channel_axis
    mixed = axis is not None and axis >= tensor.rank - 2
    return lock_inputs(ctx) if mixed or tensor.rank < 3 else Effect(outputs=[tensor.labels])


def stack(ctx):
    """A new axis; channels at the same place meet."""
    axis = ctx.operation.axis % len(ctx.output_shapes[0])
    if axis == 0:
        return lock_batch_operation(ctx)
    return Effect(outputs=[np.expand_dims(broadcast_labels(ctx, ctx.inputs, ctx.inputs[0].rank), axis)])


def unstack(ctx):
    """An axis leaves, and its positions become tensors."""
    tensor = ctx.inputs[0]
    axis = ctx.operation.axis % tensor.rank
    if axis == 0:
        return lock_batch_operation(ctx)
    if tensor.channel_axis == axis:
        return lock_inputs(ctx)
    return Effect(outputs=[np.squeeze(tensor.labels, axis)] * len(ctx.output_shapes))
