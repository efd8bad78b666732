"""Operations that only move elements, and those along an axis: reductions, repeats, running sums, stacks."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_taylor.rules.base import (
    Context,
    Edit,
    Effect,
    LabeledTensor,
    elementwise_work,
    lock_batch_operation,
    lock_inputs,
)
from keras_taylor.rules.elementwise import broadcast_labels
from keras_taylor.rules.labels import FIXED
from keras_taylor.support.types import BoolArray, IntArray, Shape


def concatenate(ctx: Context) -> Effect:
    """Channels go through side by side. Along another axis, channels that meet become one unit."""
    rank = len(ctx.output_shapes[0])
    axis = ctx.operation.axis % rank
    if axis == 0:
        return lock_batch_operation(ctx)
    if all(t.channel_axis != axis for t in ctx.inputs):
        return Effect(outputs=[broadcast_labels(ctx, ctx.inputs, rank)])
    for tensor in ctx.inputs:
        if tensor.channel_axis not in (None, axis):
            ctx.lock(tensor.labels, "concatenated with channels on another axis")
    if any(t.shape[axis] is None for t in ctx.inputs):
        return lock_inputs(ctx, "concatenated with an unknown number of channels")
    channels = np.concatenate([t.labels_along(axis) for t in ctx.inputs])
    return Effect(outputs=[ctx.output_labels(channels, axis)])


def flatten(ctx: Context) -> Effect:
    """Elements keep their order. With `channels_first`, the channel axis moves to the end first."""
    tensor = ctx.inputs[0]
    if ctx.operation.data_format == "channels_first" and tensor.rank > 1:
        axes = (0, *range(2, tensor.rank), 1)
        tensor = LabeledTensor(np.transpose(tensor.labels, axes), tuple(tensor.shape[k] for k in axes))
    return Effect(outputs=[_reshape_labels(ctx, tensor, ctx.output_shapes[0])])


def reshape(ctx: Context) -> Effect:
    """Elements keep their order. Where channels are split, those of one slice become one unit."""
    tensor, shape = ctx.inputs[0], ctx.output_shapes[0]
    if not _keeps_batch_axis(ctx.operation, tensor.shape, shape):
        return lock_batch_operation(ctx)
    labels = _reshape_labels(ctx, tensor, shape)
    result = LabeledTensor(labels, shape)
    axis = result.channel_axis
    config: dict[str, Edit] = {}
    if axis is not None:
        channels = result.labels_along(axis)
        if hasattr(ctx.operation, "target_shape"):
            config["target_shape"] = _target_shape_edit(ctx.operation.target_shape, axis - 1, channels)
        elif hasattr(ctx.operation, "newshape"):
            config["newshape"] = _target_shape_edit(ctx.operation.newshape, axis, channels)
    return Effect(outputs=[labels], config=config)


def permute(ctx: Context) -> Effect:
    """Channels go through; axes change places."""
    return _transpose_effect(ctx, (0, *ctx.operation.dims))


def transpose(ctx: Context) -> Effect:
    """Channels go through; axes change places. The batch axis must stay first."""
    rank = ctx.inputs[0].rank
    return _transpose_effect(ctx, ctx.operation.axes or tuple(reversed(range(rank))))


def swapaxes(ctx: Context) -> Effect:
    """Channels go through; two axes change places."""
    axes = list(range(ctx.inputs[0].rank))
    first, second = ctx.operation.axis1, ctx.operation.axis2
    axes[first], axes[second] = axes[second], axes[first]
    return _transpose_effect(ctx, axes)


def expand_dims(ctx: Context) -> Effect:
    """Channels go through; new axes have size 1."""
    rank = len(ctx.output_shapes[0])
    axes = tuple(int(k) % rank for k in np.atleast_1d(ctx.operation.axis))
    if 0 in axes:
        return lock_batch_operation(ctx)
    return Effect(outputs=[np.expand_dims(ctx.inputs[0].labels, axes)])


def squeeze(ctx: Context) -> Effect:
    """Channels go through; axes of size 1 are removed."""
    tensor, axis = ctx.inputs[0], ctx.operation.axis
    axes = [k for k, d in enumerate(tensor.shape) if d == 1] if axis is None else np.atleast_1d(axis)
    if 0 in np.mod(axes, tensor.rank):
        return lock_batch_operation(ctx)
    return Effect(outputs=[np.squeeze(tensor.labels, tuple(axes))])


def repeat_vector(ctx: Context) -> Effect:
    """Channels go through, to each position of a new axis."""
    return Effect(outputs=[np.expand_dims(ctx.inputs[0].labels, 1)])


def reduce(ctx: Context) -> Effect:
    """Channels go through if the reduction is over other axes."""
    tensor, operation = ctx.inputs[0], ctx.operation
    given = range(tensor.rank) if operation.axis is None else np.atleast_1d(operation.axis)
    axes = tuple(int(k) % tensor.rank for k in given)
    if tensor.channel_axis in axes or 0 in axes:
        return lock_inputs(ctx)
    labels = tensor.labels if operation.keepdims else np.squeeze(tensor.labels, axes)
    return Effect(outputs=[labels], work=elementwise_work(tensor.labels, tensor.shape))


def pad(ctx: Context) -> Effect:
    """Channels go through. Zeros that are padded beside channels are channels that may leave, too."""
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
    num_before, num_after = widths[axis]
    padded = ctx.new_labels(num_before + num_after)
    before, after = padded[:num_before], padded[num_before:]
    channels = np.concatenate([before, tensor.labels_along(axis), after])

    def new_widths(kept_before: BoolArray, kept_after: BoolArray) -> list[list[int]]:
        new = [list(w) for w in widths]
        new[axis] = [int(kept_before.sum()), int(kept_after.sum())]
        return new

    edit = Edit((before, after), new_widths)
    return Effect(outputs=[ctx.output_labels(channels, axis)], config={"pad_width": edit})


def split(ctx: Context) -> Effect:
    """Channels go through to the parts. Where channels leave, the next part starts earlier."""
    tensor, operation = ctx.inputs[0], ctx.operation
    axis = operation.axis % tensor.rank
    num_parts = len(ctx.output_shapes)
    if axis == 0:
        return lock_batch_operation(ctx)
    if tensor.channel_axis != axis:
        return Effect(outputs=[tensor.labels] * num_parts)
    channels = tensor.labels_along(axis)
    stops = np.cumsum([shape[axis] for shape in ctx.output_shapes])
    parts = np.split(channels, stops[:-1])
    edit = Edit((channels,), lambda kept: [int(kept[:stop].sum()) for stop in stops[:-1]])
    outputs = [ctx.merge_to_one_axis(ctx.output_labels(part, axis, k)) for k, part in enumerate(parts)]
    for part, labels in zip(parts, outputs, strict=True):
        if labels.size == 1:
            ctx.lock(part, "the only channel on its axis")
    return Effect(outputs=outputs, config={"indices_or_sections": edit})


def get_item(ctx: Context) -> Effect:
    """Channels go through an index of integers, slices of step 1, `...` and `None`."""
    tensor = ctx.inputs[0]
    key = ctx.argument(1, "key")
    entries = list(key) if isinstance(key, (tuple, list)) else [key]
    if not all(e is None or e is Ellipsis or isinstance(e, (int, slice)) for e in entries):
        return lock_inputs(ctx)
    if entries[0] not in (slice(None), Ellipsis):
        return lock_batch_operation(ctx)
    axes = _indexed_axes(entries, tensor.rank)
    index = tuple(_index_of_labels(e, a, tensor) for e, a in zip(entries, axes, strict=True))
    labels = tensor.labels[index]
    channel_axis = tensor.channel_axis
    if channel_axis is None or channel_axis not in axes:
        return Effect(outputs=[labels])
    entry_number = axes.index(channel_axis)
    entry, channels = entries[entry_number], tensor.labels_along(channel_axis)
    if entry == slice(None):
        return Effect(outputs=[labels])
    if not isinstance(entry, slice) or entry.step not in (None, 1):
        return lock_inputs(ctx)
    start, stop, _ = entry.indices(channels.size)
    edit = Edit((channels,), lambda kept: slice(int(kept[:start].sum()), int(kept[:stop].sum())))
    first_constant = next(i for i in range(len(ctx.constants)) if i not in ctx.input_positions)
    return Effect(outputs=[ctx.merge_to_one_axis(labels)], arguments={first_constant + entry_number: edit})


def repeat(ctx: Context) -> Effect:
    """Channels go through several times, side by side. The copies of a channel are one unit."""
    tensor, operation = ctx.inputs[0], ctx.operation
    axis = None if operation.axis is None else operation.axis % tensor.rank
    if axis is None or axis == 0:
        return lock_batch_operation(ctx)
    if tensor.channel_axis != axis:
        return Effect(outputs=[tensor.labels])
    if np.size(operation.repeats) != 1:
        return lock_inputs(ctx)
    channels = np.repeat(tensor.labels_along(axis), operation.repeats)
    return Effect(outputs=[ctx.output_labels(channels, axis)])


def tile(ctx: Context) -> Effect:
    """Channels go through several times, one after another. The copies of a channel are one unit."""
    tensor = ctx.inputs[0]
    repeats = [int(n) for n in np.atleast_1d(ctx.operation.repeats)]
    repeats = [1] * (tensor.rank - len(repeats)) + repeats
    if len(repeats) > tensor.rank or repeats[0] != 1:
        return lock_batch_operation(ctx)
    axis = tensor.channel_axis
    if axis is None:
        return Effect(outputs=[ctx.fixed_labels()])
    return Effect(outputs=[ctx.output_labels(np.tile(tensor.labels_along(axis), repeats[axis]), axis)])


def along_axis(ctx: Context) -> Effect:
    """Channels go through if the operation acts along another axis."""
    tensor, axis = ctx.inputs[0], ctx.operation.axis
    axes = () if axis is None else tuple(k % tensor.rank for k in np.atleast_1d(axis))
    if 0 in axes or not axes:
        return lock_batch_operation(ctx)
    return lock_inputs(ctx) if tensor.channel_axis in axes else Effect(outputs=[tensor.labels])


def triangle(ctx: Context) -> Effect:
    """Channels go through if they lie before the last two axes."""
    tensor = ctx.inputs[0]
    axis = tensor.channel_axis
    is_mixed = axis is not None and axis >= tensor.rank - 2
    return lock_inputs(ctx) if is_mixed or tensor.rank < 3 else Effect(outputs=[tensor.labels])


def stack(ctx: Context) -> Effect:
    """Channels go through, beside a new axis. Those at the same place become one unit."""
    axis = ctx.operation.axis % len(ctx.output_shapes[0])
    if axis == 0:
        return lock_batch_operation(ctx)
    labels = broadcast_labels(ctx, ctx.inputs, ctx.inputs[0].rank)
    return Effect(outputs=[np.expand_dims(labels, axis)])


def unstack(ctx: Context) -> Effect:
    """Channels go through. The positions of another axis become tensors."""
    tensor = ctx.inputs[0]
    axis = ctx.operation.axis % tensor.rank
    if axis == 0:
        return lock_batch_operation(ctx)
    if tensor.channel_axis == axis:
        return lock_inputs(ctx)
    return Effect(outputs=[np.squeeze(tensor.labels, axis)] * len(ctx.output_shapes))


def _keeps_batch_axis(operation: keras.Operation, shape_in: Shape, shape_out: Shape) -> bool:
    """Whether a reshape keeps the batch axis, as the layer always does."""
    rest_in, rest_out = shape_in[1:], shape_out[1:]
    sizes = [size for size in rest_in + rest_out if size is not None]
    are_known = len(sizes) == len(rest_in + rest_out)
    is_equal = are_known and math.prod(sizes[: len(rest_in)]) == math.prod(sizes[len(rest_in) :])
    return is_equal or hasattr(operation, "target_shape")


def _indexed_axes(entries: Sequence[Any], rank: int) -> list[int | None]:
    """The axis on which each entry of an index acts, `None` for `...` and new axes."""
    num_used = sum(e is not None and e is not Ellipsis for e in entries)
    axes: list[int | None] = []
    axis = 0
    for entry in entries:
        if entry is Ellipsis:
            axes.append(None)
            axis += rank - num_used
        elif entry is None:
            axes.append(None)
        else:
            axes.append(axis)
            axis += 1
    return axes


def _index_of_labels(entry: Any, axis: int | None, tensor: LabeledTensor) -> Any:
    """The entry of an index for the label array, which has size 1 along all axes but the channels'."""
    if axis is None or axis == tensor.channel_axis:
        return entry
    return 0 if isinstance(entry, int) else slice(None)


def _transpose_effect(ctx: Context, axes: Sequence[int]) -> Effect:
    """The effect of an operation that brings axes into this order."""
    if axes[0] != 0:
        return lock_batch_operation(ctx)
    return Effect(outputs=[np.transpose(ctx.inputs[0].labels, axes)])


def _target_shape_edit(shape: Sequence[int], axis: int, channels: IntArray) -> Edit:
    """The edit of a target shape whose entry `axis` is the number of these channels, or -1."""

    def new_shape(kept: BoolArray) -> list[int]:
        new = list(shape)
        new[axis] = -1 if shape[axis] == -1 else int(kept.sum())
        return new

    return Edit((channels,), new_shape)


def _reshape_labels(ctx: Context, tensor: LabeledTensor, shape: Shape) -> IntArray:
    """Labels after a reshape to this shape, an array of its rank.

    Labels are repeated only along the axes that share elements with the channel axis, so that the array stays
    small.
    """
    axis = tensor.channel_axis
    if axis is None:
        return np.full((1,) * len(shape), FIXED)
    for axes_in, axes_out in _blocks_of_axes(tensor.shape, shape):
        if axis in axes_in:
            sizes_in = [size for k in axes_in if (size := tensor.shape[k]) is not None]
            sizes_out = [size for k in axes_out if (size := shape[k]) is not None]
            if len(sizes_in) < len(axes_in) or len(sizes_out) < len(axes_out):
                break  # a size is unknown
            labels = tensor.labels.reshape([tensor.labels.shape[k] for k in axes_in])
            labels = np.broadcast_to(labels, sizes_in).reshape(sizes_out)
            whole = [1] * len(shape)
            whole[axes_out[0] : axes_out[-1] + 1] = sizes_out
            return ctx.merge_to_one_axis(labels.reshape(whole))
    ctx.lock(tensor.labels, "reshaped together with an axis of unknown size")
    return np.full((1,) * len(shape), FIXED)


def _blocks_of_axes(shape_in: Shape, shape_out: Shape) -> Iterator[tuple[range, range]]:
    """Yields pairs of axis ranges that hold the same elements, from the last axis on.

    The batch axis is left out. From an axis of unknown size on, all axes are one block.
    """
    i, j = len(shape_in), len(shape_out)
    first = 1  # behind the batch axis
    while i > first and j > first:
        start_i, start_j = i - 1, j - 1
        product_in, product_out = shape_in[start_i], shape_out[start_j]
        while product_in != product_out:
            if product_in is None or product_out is None:
                start_i = start_j = first
                break
            if product_in < product_out and start_i > first:
                start_i -= 1
                product_in = _multiply(product_in, shape_in[start_i])
            elif start_j > first:
                start_j -= 1
                product_out = _multiply(product_out, shape_out[start_j])
            else:
                start_i = start_j = first
                break
        yield range(start_i, i), range(start_j, j)
        i, j = start_i, start_j


def _multiply(product: int, size: int | None) -> int | None:
    """The product of known sizes and one more, `None` if it is unknown."""
    return None if size is None else product * size
