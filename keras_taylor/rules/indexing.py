"""Operations that pick positions of an axis or reorder them: indices, slices, flips, rolls."""

import dataclasses

import numpy as np
from keras import ops

from keras_taylor.rules.base import Context, Edit, Effect, lock_batch_operation, lock_inputs
from keras_taylor.support.types import BoolArray, IntArray


def edit_index(channels: IntArray, index: IntArray) -> Edit:
    """The edit of an index or of an array of indices into channels.

    Args:
        channels: Labels along the axis.
        index: Where, negative to count from the end.
    """
    positions = np.mod(index, channels.size)

    def new_index(kept: BoolArray) -> int | IntArray:
        new = np.cumsum(kept) - 1
        return new[positions[kept[positions]]] if positions.ndim else int(new[positions])

    return Edit((channels,), new_index)


def edit_slice(ctx: Context, channels: IntArray, entry: slice) -> Edit:
    """The edit of a slice of channels. With a step, those within a step become one unit, so that it stays.

    Args:
        ctx: The call.
        channels: Labels along the axis.
        entry: The slice.
    """
    picked = np.arange(channels.size)[entry]
    if not picked.size:
        return Edit((), lambda: entry)
    step = entry.indices(channels.size)[2]
    size, first, last = abs(step), int(picked.min()), int(picked.max())
    offset = first % size
    base = first - offset  # steps start at multiples of their size, as those of other slices do
    steps = channels[base : last - offset + size]
    ctx.union(steps, steps[np.arange(steps.size) // size * size])

    def new_slice(kept: BoolArray) -> slice:
        start = int(kept[:base].sum()) + offset
        end = start + size * (int(kept[picked].sum()) - 1)
        if step < 0:
            return slice(end, start - 1 if start else None, step)
        return slice(start, end + 1, step if step > 1 else None)

    return Edit((channels,), new_slice)


def take(ctx: Context) -> Effect:
    """Channels that are picked go through. Along another axis, all do."""
    tensor, axis = ctx.inputs[0], ctx.operation.axis
    if ctx.input_positions != [0]:
        return lock_inputs(ctx, "picked by indices that are computed")
    if axis is None or axis % tensor.rank == tensor.batch_axis:
        return lock_batch_operation(ctx)
    axis %= tensor.rank
    given = ctx.argument(1, "indices")
    index = np.asarray(ops.convert_to_numpy(given))
    new_axes = tuple(range(axis, axis + index.ndim))

    def move(array: IntArray) -> IntArray:
        return np.expand_dims(np.squeeze(array, axis), new_axes)

    batches = [None if tensor.batch is None else tensor.batch.after(move, tensor.rank)]
    if tensor.channel_axis != axis:
        return Effect(outputs=[move(tensor.labels)], batches=batches)
    channels = tensor.labels_along(axis)
    is_outside = index.max() >= channels.size or index.min() < -channels.size
    if index.ndim > 1 or is_outside or isinstance(given, tuple):
        return dataclasses.replace(lock_inputs(ctx), batches=batches)
    labels = ctx.output_labels(channels[index], axis) if index.ndim else ctx.fixed_labels()
    if labels.size == 1:
        ctx.lock(channels[index], "the only channel on its axis")
    edit = edit_index(channels, index)
    if isinstance(given, list):
        edit = Edit(edit.labels, lambda kept: edit_index(channels, index).new_value(kept).tolist())
    return Effect(outputs=[labels], arguments={1: edit}, batches=batches)


def flip(ctx: Context) -> Effect:
    """Channels go through, in reverse order if their axis is flipped."""
    tensor, axis = ctx.inputs[0], ctx.operation.axis
    axes = () if axis is None else tuple(int(k) % tensor.rank for k in np.atleast_1d(axis))
    if tensor.batch_axis in axes or not axes:
        return lock_batch_operation(ctx)
    return Effect(outputs=[np.flip(tensor.labels, axes)])


def roll(ctx: Context) -> Effect:
    """Channels go through. Along their axis, the rest is rolled by fewer places."""
    tensor, operation = ctx.inputs[0], ctx.operation
    axes = [] if operation.axis is None else [int(k) % tensor.rank for k in np.atleast_1d(operation.axis)]
    if tensor.batch_axis in axes or not axes:
        return lock_batch_operation(ctx)
    if tensor.channel_axis not in axes:
        return Effect(outputs=[tensor.labels])
    if np.ndim(operation.shift) or np.ndim(operation.axis):
        return lock_inputs(ctx)
    channels = tensor.labels_along(axes[0])
    first = -operation.shift % channels.size  # the channel that comes to the front
    edit = Edit((channels,), lambda kept: int(kept[first:].sum()))
    return Effect(outputs=[ctx.output_labels(np.roll(channels, -first), axes[0])], config={"shift": edit})
