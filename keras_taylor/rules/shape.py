"""Operations that only move elements, and those along an axis: reductions, repeats, running sums, stacks."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
from keras_taylor.rules.indexing import edit_index, edit_slice
from keras_taylor.rules.labels import FIRST_AXIS, FIXED, BatchAxis
from keras_taylor.rules.probing import ChannelMap
from keras_taylor.support.types import BoolArray, IntArray, Shape

# The axis of operations that have no `axis`, for tensors with more than two axes.
_ACTING_AXES = {"Vstack": 0, "Hstack": 1, "Dstack": 2, "Vsplit": 0, "Hsplit": 1, "Dsplit": 2}
_ANY_NUM_EXAMPLES = 1_000_003  # a prime number that is larger than other sizes


def concatenate(ctx: Context) -> Effect:
    """Channels go through side by side. Along another axis, channels that meet become one unit."""
    rank = len(ctx.output_shapes[0])
    axis = _acting_axis(ctx, rank)
    if axis is None:
        return lock_batch_operation(ctx)
    if any(t.batch_axis == axis for t in ctx.inputs):
        return _concatenate_batches(ctx)
    if all(t.channel_axis != axis for t in ctx.inputs):
        return Effect(outputs=[broadcast_labels(ctx, ctx.inputs, rank)])
    for tensor in ctx.inputs:
        if tensor.channel_axis not in (None, axis):
            ctx.lock(tensor.labels, "concatenated with channels on another axis")
    if any(t.shape[axis] is None for t in ctx.inputs):
        return lock_inputs(ctx, "concatenated with an unknown number of channels")
    channels = np.concatenate([t.labels_along(axis) for t in ctx.inputs])
    if channels.size != ctx.output_shapes[0][axis]:
        return lock_inputs(ctx, "concatenated with constants")
    return Effect(outputs=[ctx.output_labels(channels, axis)])


def flatten(ctx: Context) -> Effect:
    """Elements keep their order. With `channels_first`, the channel axis moves to the end first."""
    tensor = ctx.inputs[0]
    if ctx.operation.data_format == "channels_first" and tensor.rank > 1:
        axes = (0, *range(2, tensor.rank), 1)
        labels = np.transpose(tensor.labels, axes)
        tensor = LabeledTensor(labels, tuple(tensor.shape[k] for k in axes), tensor.batch)
    return Effect(outputs=[_reshape_labels(ctx, tensor, ctx.output_shapes[0], tensor.batch)])


def reshape(ctx: Context) -> Effect:
    """Elements keep their order. Where channels are split, those of one slice become one unit."""
    tensor, (before, shape) = ctx.inputs[0], ctx.recorded_shapes
    batch = tensor.batch
    is_layer = hasattr(ctx.operation, "target_shape")  # which leaves the first axis as it is
    if batch is not None and before != shape and not (is_layer and batch.axis == 0):
        batch = batch.after_reshape(before, shape)
    if batch is None:
        return lock_batch_operation(ctx)
    labels = _reshape_labels(ctx, tensor, shape, batch)
    result = LabeledTensor(labels, shape)
    axis = result.channel_axis
    config: dict[str, Edit] = {}
    if axis is not None:
        channels = result.labels_along(axis)
        if hasattr(ctx.operation, "target_shape"):
            config["target_shape"] = _target_shape_edit(ctx.operation.target_shape, axis - 1, channels)
        elif hasattr(ctx.operation, "newshape"):
            config["newshape"] = _target_shape_edit(ctx.operation.newshape, axis, channels)
    return Effect(outputs=[labels], config=config, batches=[batch])


def permute(ctx: Context) -> Effect:
    """Channels go through; axes change places."""
    return _transpose_effect(ctx, (0, *ctx.operation.dims))


def transpose(ctx: Context) -> Effect:
    """Channels go through; axes change places."""
    rank = ctx.inputs[0].rank
    return _transpose_effect(ctx, ctx.operation.axes or tuple(reversed(range(rank))))


def swapaxes(ctx: Context) -> Effect:
    """Channels go through; two axes change places."""
    axes = list(range(ctx.inputs[0].rank))
    first, second = ctx.operation.axis1, ctx.operation.axis2
    axes[first], axes[second] = axes[second], axes[first]
    return _transpose_effect(ctx, axes)


def moveaxis(ctx: Context) -> Effect:
    """Channels go through; axes change places."""
    rank = ctx.inputs[0].rank
    pairs = zip(ctx.operation.destination, ctx.operation.source, strict=True)
    moved = sorted((destination % rank, source % rank) for destination, source in pairs)
    axes = [k for k in range(rank) if all(k != source for _, source in moved)]
    for destination, source in moved:
        axes.insert(destination, source)
    return _transpose_effect(ctx, axes)


def broadcast_to(ctx: Context) -> Effect:
    """Channels go through; other axes get larger."""
    tensor, shape = ctx.inputs[0], ctx.operation.shape
    if len(ctx.output_shapes[0]) != tensor.rank:
        return lock_batch_operation(ctx)
    axis = tensor.channel_axis
    edits = {} if axis is None else {"shape": _target_shape_edit(shape, axis, tensor.labels_along(axis))}
    return Effect(outputs=[tensor.labels], config=edits)


def expand_dims(ctx: Context) -> Effect:
    """Channels go through; new axes have size 1."""
    rank = len(ctx.output_shapes[0])
    axes = tuple(int(k) % rank for k in np.atleast_1d(ctx.operation.axis))
    batches = [batch_after(ctx, lambda array: np.expand_dims(array, axes))]
    return Effect(outputs=[np.expand_dims(ctx.inputs[0].labels, axes)], batches=batches)


def squeeze(ctx: Context) -> Effect:
    """Channels go through; axes of size 1 are removed."""
    tensor, axis = ctx.inputs[0], ctx.operation.axis
    ones = [k for k, size in enumerate(tensor.shape) if size == 1 and k != tensor.batch_axis]
    axes = ones if axis is None else np.mod(np.atleast_1d(axis), tensor.rank).tolist()
    if tensor.batch_axis in axes or tensor.rank - len(axes) != len(ctx.output_shapes[0]):
        return lock_batch_operation(ctx)
    batches = [batch_after(ctx, lambda array: np.squeeze(array, tuple(axes)))]
    return Effect(outputs=[np.squeeze(tensor.labels, tuple(axes))], batches=batches)


def repeat_vector(ctx: Context) -> Effect:
    """Channels go through, to each position of a new axis."""
    return Effect(outputs=[np.expand_dims(ctx.inputs[0].labels, 1)])


def reduce(ctx: Context) -> Effect:
    """Channels go through if the reduction is over other axes."""
    tensor, operation = ctx.inputs[0], ctx.operation
    axis = operation.axes if hasattr(operation, "axes") else operation.axis
    given = range(tensor.rank) if axis is None else np.atleast_1d(axis)
    axes = tuple(int(k) % tensor.rank for k in given)
    if tensor.batch_axis in axes:
        return lock_batch_operation(ctx)

    def move(array: IntArray) -> IntArray:
        return array if operation.keepdims else np.squeeze(array, axes)

    num_outputs = len(ctx.output_shapes)
    batches = [batch_after(ctx, move)] * num_outputs
    work = elementwise_work(tensor.labels, tensor.shape)
    if tensor.channel_axis in axes:
        return dataclasses.replace(lock_inputs(ctx, work=work), batches=batches)
    return Effect(outputs=[move(tensor.labels)] * num_outputs, work=work, batches=batches)


def pad(ctx: Context) -> Effect:
    """Channels go through. Zeros that are padded beside channels are channels that may leave, too."""
    tensor, operation = ctx.inputs[0], ctx.operation
    widths = [tuple(w) for w in operation.pad_width]
    widths = widths * tensor.rank if len(widths) == 1 else widths
    axis = tensor.channel_axis
    if tensor.batch_axis is not None and widths[tensor.batch_axis] != (0, 0):
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
    tensor = ctx.inputs[0]
    axis = _acting_axis(ctx, tensor.rank)
    num_parts = len(ctx.output_shapes)
    if axis is None:
        return lock_batch_operation(ctx)
    if tensor.batch is not None and tensor.batch.axis == axis:
        return _split_batches(ctx, tensor.batch)
    if tensor.channel_axis != axis:
        return Effect(outputs=[tensor.labels] * num_parts)
    channels = tensor.labels_along(axis)
    if type(ctx.operation).__name__ == "ArraySplit":
        return _split_evenly(ctx, channels, axis)
    stops = np.cumsum([shape[axis] for shape in ctx.output_shapes])
    parts = np.split(channels, stops[:-1])
    edit = Edit((channels,), lambda kept: [int(kept[:stop].sum()) for stop in stops[:-1]])
    outputs = [ctx.merge_to_one_axis(ctx.output_labels(part, axis, k)) for k, part in enumerate(parts)]
    for part, labels in zip(parts, outputs, strict=True):
        if labels.size == 1:
            ctx.lock(part, "the only channel on its axis")
    return Effect(outputs=outputs, config={"indices_or_sections": edit})


def get_item(ctx: Context) -> Effect:
    """Channels go through an index of integers, slices, `...` and `None`. One that is picked alone stays."""
    tensor = ctx.inputs[0]
    key = ctx.argument(1, "key")
    entries = list(key) if isinstance(key, (tuple, list)) else [key]
    if not all(e is None or e is Ellipsis or isinstance(e, (int, slice)) for e in entries):
        return lock_batch_operation(ctx)
    axes = _indexed_axes(entries, tensor.rank)
    pairs = list(zip(entries, axes, strict=True))
    if any(axis is not None and axis == tensor.batch_axis and e != slice(None) for e, axis in pairs):
        return lock_batch_operation(ctx)
    move = tuple(e if axis is None else 0 if isinstance(e, int) else slice(None) for e, axis in pairs)
    batches = [batch_after(ctx, lambda array: array[move])]
    index = tuple(_index_of_labels(e, axis, tensor) for e, axis in pairs)
    labels = tensor.labels[index]
    channel_axis = tensor.channel_axis
    if channel_axis is None or channel_axis not in axes:
        return Effect(outputs=[labels], batches=batches)
    entry_number = axes.index(channel_axis)
    entry, channels = entries[entry_number], tensor.labels_along(channel_axis)
    if entry == slice(None):
        return Effect(outputs=[labels], batches=batches)
    is_slice = isinstance(entry, slice)
    edit = edit_slice(ctx, channels, entry) if is_slice else edit_index(channels, np.asarray(entry))
    first_constant = next(i for i in range(len(ctx.constants)) if i not in ctx.input_positions)
    labels = ctx.merge_to_one_axis(labels)
    return Effect(outputs=[labels], arguments={first_constant + entry_number: edit}, batches=batches)


def repeat(ctx: Context) -> Effect:
    """Channels go through several times, side by side. The copies of a channel are one unit."""
    tensor, operation = ctx.inputs[0], ctx.operation
    axis = None if operation.axis is None else operation.axis % tensor.rank
    is_same_number = np.size(operation.repeats) == 1
    if axis is None or (axis == tensor.batch_axis and not is_same_number):
        return lock_batch_operation(ctx)
    if axis == tensor.batch_axis and tensor.batch is not None:
        batch = dataclasses.replace(tensor.batch, inner=tensor.batch.inner * int(operation.repeats))
        return Effect(outputs=[tensor.labels], batches=[batch])
    if tensor.channel_axis != axis:
        return Effect(outputs=[tensor.labels])
    if not is_same_number:
        return lock_inputs(ctx)
    channels = np.repeat(tensor.labels_along(axis), operation.repeats)
    return Effect(outputs=[ctx.output_labels(channels, axis)])


def tile(ctx: Context) -> Effect:
    """Channels go through several times, one after another. The copies of a channel are one unit."""
    tensor = ctx.inputs[0]
    repeats = [int(n) for n in np.atleast_1d(ctx.operation.repeats)]
    repeats = [1] * (tensor.rank - len(repeats)) + repeats
    if len(repeats) > tensor.rank:
        return lock_batch_operation(ctx)
    batch, axis = tensor.batch, tensor.channel_axis
    if batch is not None:
        batch = dataclasses.replace(batch, outer=batch.outer * repeats[batch.axis])
    if axis is None:
        return Effect(outputs=[ctx.fixed_labels()], batches=[batch])
    channels = np.tile(tensor.labels_along(axis), repeats[axis])
    return Effect(outputs=[ctx.output_labels(channels, axis)], batches=[batch])


def along_axis(ctx: Context) -> Effect:
    """Channels go through if the operation acts along another axis."""
    tensor, axis = ctx.inputs[0], ctx.operation.axis
    axes = () if axis is None else tuple(k % tensor.rank for k in np.atleast_1d(axis))
    if tensor.batch_axis in axes or not axes:
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
    if any(tensor.batch != ctx.inputs[0].batch for tensor in ctx.inputs):
        return lock_batch_operation(ctx)
    labels = broadcast_labels(ctx, ctx.inputs, ctx.inputs[0].rank)
    batches = [batch_after(ctx, lambda array: np.expand_dims(array, axis))]
    return Effect(outputs=[np.expand_dims(labels, axis)], batches=batches)


def unstack(ctx: Context) -> Effect:
    """Channels go through. The positions of another axis become tensors."""
    tensor = ctx.inputs[0]
    axis = ctx.operation.axis % tensor.rank
    if axis == tensor.batch_axis:
        return lock_batch_operation(ctx)
    batches = [batch_after(ctx, lambda array: np.squeeze(array, axis))] * len(ctx.output_shapes)
    if tensor.channel_axis == axis:
        return dataclasses.replace(lock_inputs(ctx), batches=batches)
    return Effect(outputs=[np.squeeze(tensor.labels, axis)] * len(ctx.output_shapes), batches=batches)


def batch_after(ctx: Context, move: Callable[[IntArray], IntArray]) -> BatchAxis | None:
    """Where the examples of the first input are after an operation that moves, adds or removes axes.

    Args:
        ctx: The call.
        move: Does the same to an array of the input's rank.
    """
    tensor = ctx.inputs[0]
    return None if tensor.batch is None else tensor.batch.after(move, tensor.rank)


def follow_channel_map(ctx: Context, channel_map: ChannelMap) -> Effect:
    """Channels go through as they did on random inputs. Those that make one together become one unit.

    Args:
        ctx: The call.
        channel_map: What was found.
    """
    units = np.full(channel_map.units.max() + 1, FIXED)
    inputs = [t.labels_along(t.channel_axis) for t in ctx.inputs if t.channel_axis is not None]
    for channels in inputs:
        np.maximum.at(units, channel_map.units, channels)
    for channels in inputs:
        ctx.union(channels, units[channel_map.units])
    outputs = [
        ctx.output_labels(units[output.units], output.channel_axis, k)
        for k, output in enumerate(channel_map.outputs)
    ]
    return Effect(outputs=outputs)


def _acting_axis(ctx: Context, rank: int) -> int | None:
    """The axis along which an operation splits or joins tensors of this rank; `None` if it flattens them."""
    name = type(ctx.operation).__name__
    axis = _ACTING_AXES.get(name, getattr(ctx.operation, "axis", None))
    return None if axis is None or axis >= rank else axis % rank


def _split_evenly(ctx: Context, channels: IntArray, axis: int) -> Effect:
    """The effect of `array_split`, which takes no sizes: all parts lose the same channels.

    Args:
        ctx: The call.
        channels: Labels along the axis.
        axis: The axis.
    """
    num_parts = len(ctx.output_shapes)
    if channels.size % num_parts:
        return lock_inputs(ctx, "divided into parts of different sizes")
    parts = channels.reshape(num_parts, -1)
    ctx.union(parts, parts[:1])
    return Effect(outputs=[ctx.output_labels(parts.max(0), axis, k) for k in range(num_parts)])


def _concatenate_batches(ctx: Context) -> Effect:
    """The effect of a concatenation along the batch axis: the parts are one behind the other."""
    first = ctx.inputs[0].batch
    batches = [tensor.batch for tensor in ctx.inputs if tensor.batch is not None]
    has_constants = len(batches) < len(ctx.inputs) or any(hasattr(x, "shape") for x in ctx.constants)
    if first is None or has_constants or any((b.axis, b.inner) != (first.axis, first.inner) for b in batches):
        return lock_batch_operation(ctx)
    batch = dataclasses.replace(first, outer=sum(each.outer for each in batches))
    labels = broadcast_labels(ctx, ctx.inputs, len(ctx.output_shapes[0]))
    return Effect(outputs=[labels], batches=[batch])


def _split_batches(ctx: Context, batch: BatchAxis) -> Effect:
    """The effect of a split along the batch axis, into parts that hold the whole batch."""
    num_parts = ctx.operation.indices_or_sections
    if not isinstance(num_parts, int) or batch.outer % num_parts:
        return lock_batch_operation(ctx)
    part = dataclasses.replace(batch, outer=batch.outer // num_parts)
    return Effect(outputs=[ctx.inputs[0].labels] * num_parts, batches=[part] * num_parts)


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

    def move(array: IntArray) -> IntArray:
        return np.transpose(array, axes)

    return Effect(outputs=[move(ctx.inputs[0].labels)], batches=[batch_after(ctx, move)])


def _target_shape_edit(shape: Sequence[int], axis: int, channels: IntArray) -> Edit:
    """The edit of a target shape whose entry `axis` is the number of these channels, or -1."""

    def new_shape(kept: BoolArray) -> list[int]:
        new = list(shape)
        new[axis] = -1 if shape[axis] == -1 else int(kept.sum())
        return new

    return Edit((channels,), new_shape)


def _reshape_labels(ctx: Context, tensor: LabeledTensor, shape: Shape, batch: BatchAxis | None) -> IntArray:
    """Labels after a reshape to this shape, an array of its rank.

    Labels are repeated only along the axes that share elements with the channel axis, so that the array stays
    small. A batch axis counts as three: of the repeated batches, of the examples, and of each one's rows.

    Args:
        ctx: The call.
        tensor: What is reshaped.
        shape: The new shape.
        batch: Where the examples are in it.
    """
    axis, start, end = tensor.channel_axis, tensor.batch or FIRST_AXIS, batch or FIRST_AXIS
    if axis is None:
        return np.full((1,) * len(shape), FIXED)
    before, after = _divided_shape(tensor.shape, start), _divided_shape(shape, end)
    labels = np.expand_dims(tensor.labels, (start.axis, start.axis + 1))
    axis += 2 if axis > start.axis else 0
    axes_in, axes_out = next(pair for pair in _blocks_of_axes(before, after) if axis in pair[0])
    sizes_in = [size for k in axes_in if (size := before[k]) is not None]
    sizes_out = [size for k in axes_out if (size := after[k]) is not None]
    if len(sizes_in) < len(axes_in) or len(sizes_out) < len(axes_out):
        ctx.lock(tensor.labels, "reshaped together with an axis of unknown size")
        return np.full((1,) * len(shape), FIXED)
    if _ANY_NUM_EXAMPLES not in sizes_in and math.prod(sizes_in) == math.prod(sizes_out):
        labels = np.broadcast_to(labels.reshape([labels.shape[k] for k in axes_in]), sizes_in)
        whole = [1] * len(after)
        whole[axes_out[0] : axes_out[-1] + 1] = sizes_out
        labels = ctx.merge_to_one_axis(labels.reshape(whole))
        rows = labels.shape[end.axis], labels.shape[end.axis + 2]
        if rows == (1, 1):
            return np.squeeze(labels, (end.axis, end.axis + 1))
    ctx.lock(tensor.labels, "read by an operation on the batch axis")
    return np.full((1,) * len(shape), FIXED)


def _divided_shape(shape: Shape, batch: BatchAxis) -> Shape:
    """The shape with three entries in the place of the batch axis."""
    entries = batch.outer, _ANY_NUM_EXAMPLES, batch.inner
    return (*shape[: batch.axis], *entries, *shape[batch.axis + 1 :])


def _blocks_of_axes(before: Shape, after: Shape) -> Iterator[tuple[range, range]]:
    """Yields pairs of axis ranges that hold the same elements, from the last axis on.

    From an axis of unknown size on, all axes are one block.
    """
    i, j = len(before), len(after)
    while i and j:
        start_i, start_j = i - 1, j - 1
        product_in, product_out = before[start_i], after[start_j]
        while product_in != product_out:
            if product_in is None or product_out is None:
                start_i = start_j = 0
                break
            if product_in < product_out and start_i:
                start_i -= 1
                product_in = _multiply(product_in, before[start_i])
            elif start_j:
                start_j -= 1
                product_out = _multiply(product_out, after[start_j])
            else:
                start_i = start_j = 0
                break
        yield range(start_i, i), range(start_j, j)
        i, j = start_i, start_j


def _multiply(product: int, size: int | None) -> int | None:
    """The product of known sizes and one more, `None` if it is unknown."""
    return None if size is None else product * size
