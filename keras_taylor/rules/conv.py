"""Convolutions (plain, grouped, depthwise, separable, transposed), pooling, padding."""

import dataclasses

import numpy as np
from keras import ops

from keras_taylor.rules.base import (
    Effect,
    Work,
    count_kept,
    elementwise_work,
    is_elementwise,
    layer_channel_axis,
    num_elements,
)


def conv(ctx):
    """Filters can go; any stride, dilation and number of groups."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    axis = layer_channel_axis(layer, tensor)
    read = ctx.input_labels(0, axis)
    if layer.groups == read.size > 1 and layer.filters % read.size == 0 and ctx.name not in ctx.space.grouped:
        return _one_group_a_channel(ctx, read, axis)
    blocks = read.reshape(layer.groups, -1)
    ctx.union(blocks, blocks[:1])
    block = blocks.max(0)
    made = np.tile(_made(ctx, layer.filters // layer.groups), layer.groups)
    kernel = (None,) * (tensor.rank - 2) + (block, made)
    return Effect(
        outputs=[ctx.output_labels(made, axis)],
        weights={"kernel": kernel, "bias": (made,)},
        config={"filters": count_kept(made)},
        reads={0: axis},
        work=_work(ctx, axis, layer.kernel_size, block, made),
        accelerate=_multiply_matrices if _is_pointwise(layer) else None,
    )


def conv_transpose(ctx):
    """Filters can go."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    axis = layer_channel_axis(layer, tensor)
    read = ctx.input_labels(0, axis)
    made = _made(ctx, layer.filters)
    positions = num_elements(tensor.shape, (axis,))
    return Effect(
        outputs=[ctx.output_labels(made, axis)],
        weights={"kernel": (None,) * (tensor.rank - 2) + (made, read), "bias": (made,)},
        config={"filters": count_kept(made)},
        reads={0: axis},
        work=(Work(2 * positions * np.prod(layer.kernel_size), (read, made)),),
    )


def depthwise(ctx):
    """Every channel goes through by itself, `depth_multiplier` times."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    axis = layer_channel_axis(layer, tensor)
    read = ctx.input_labels(0, axis)
    made = np.repeat(read, layer.depth_multiplier)
    _lock_unless_elementwise(ctx, made)
    return Effect(
        outputs=[ctx.output_labels(made, axis)],
        weights={"kernel": (None,) * (tensor.rank - 2) + (read, None), "bias": (made,)},
        work=_work(ctx, axis, layer.kernel_size, made),
    )


def separable(ctx):
    """Filters can go: a depthwise, then a pointwise convolution."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    axis = layer_channel_axis(layer, tensor)
    read = ctx.input_labels(0, axis)
    middle = np.repeat(read, layer.depth_multiplier)
    made = _made(ctx, layer.filters)
    spatial = (None,) * (tensor.rank - 2)
    return Effect(
        outputs=[ctx.output_labels(made, axis)],
        weights={
            "depthwise_kernel": (*spatial, read, None),
            "pointwise_kernel": (*spatial, middle, made),
            "bias": (made,),
        },
        config={"filters": count_kept(made)},
        reads={0: axis},
        work=_work(ctx, axis, layer.kernel_size, middle) + _work(ctx, axis, (1,), middle, made),
    )


def pool_or_resize(ctx):
    """Channels go through, each by itself; space may change its size."""
    tensor = ctx.inputs[0]
    axis = layer_channel_axis(ctx.operation, tensor)
    vector = ctx.input_labels(0, axis)
    out_rank = len(ctx.output_shapes[0])
    out_axis = axis if out_rank == tensor.rank else 1  # a global pooling leaves (batch, channels)
    window = getattr(ctx.operation, "pool_size", 1)
    factor = float(np.prod(window)) if out_rank == tensor.rank else 1.0
    labels = ctx.output_labels(vector, out_axis)
    shape = ctx.output_shapes[0] if out_rank == tensor.rank else tensor.shape
    work_labels = labels if out_rank == tensor.rank else tensor.labels
    return Effect(outputs=[labels], work=elementwise_work(work_labels, shape, factor))


def pad_or_crop(ctx):
    """Channels go through; space changes its size."""
    return dataclasses.replace(pool_or_resize(ctx), work=())


def _one_group_a_channel(ctx, read, axis):
    """A grouped convolution with as many groups as channels is a depthwise one."""
    layer = ctx.operation
    made = np.repeat(read, layer.filters // read.size)
    _lock_unless_elementwise(ctx, made)
    return Effect(
        outputs=[ctx.output_labels(made, axis)],
        weights={"kernel": (None,) * (ctx.inputs[0].rank - 1) + (made,), "bias": (made,)},
        config={"filters": count_kept(made), "groups": count_kept(read)},
        work=_work(ctx, axis, layer.kernel_size, made),
    )


def _is_pointwise(layer):
    return set(layer.kernel_size) == {1} and layer.groups == 1 and layer.data_format == "channels_last"


def _multiply_matrices(layer):
    """A 1x1 convolution as what it is, a matrix product.

    Its derivative is then one too, which is up to six times as fast as that of a
    convolution of a small feature map.
    """
    strides = (slice(None), *(slice(None, None, stride) for stride in layer.strides))

    def convolution_op(inputs, kernel):
        inputs = inputs[strides]
        shape = ops.shape(inputs)
        matrix = ops.reshape(kernel, kernel.shape[-2:])
        outputs = ops.matmul(ops.reshape(inputs, (-1, shape[-1])), matrix)
        return ops.reshape(outputs, (*shape[:-1], matrix.shape[-1]))

    vars(layer)["convolution_op"] = convolution_op


def _made(ctx, num):
    made = ctx.new_labels(num)
    _lock_unless_elementwise(ctx, made)
    return made


def _lock_unless_elementwise(ctx, labels):
    if not is_elementwise(ctx.operation.activation):
        ctx.lock(labels, "goes through an activation that may mix channels")


def _work(ctx, axis, kernel_size, *axes):
    positions = num_elements(ctx.output_shapes[0], (axis,))
    return (Work(2.0 * positions * float(np.prod(kernel_size)), axes),)
