"""Layers with kernels (dense, convolutions of all kinds), embeddings, pooling, padding."""

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_taylor.rules.base import (
    Context,
    Effect,
    WeightLabels,
    Work,
    count_kept,
    elementwise_work,
    layer_channel_axis,
    lock_batch_operation,
    lock_inputs,
    num_elements,
)
from keras_taylor.rules.elementwise import cut_constant, lock_unless_elementwise
from keras_taylor.support.types import IntArray, Tensor


def dense(ctx: Context) -> Effect:
    """Units can leave. The layer reads the last axis; channels on another axis go through."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    last = tensor.rank - 1
    read = tensor.labels_along(last)
    if ctx.passes_channels((last,)):
        return _beside_channels(ctx, read.size)
    units = ctx.new_labels(layer.units)
    lock_unless_elementwise(ctx, units)
    return Effect(
        outputs=[ctx.output_labels(units, last)],
        weights={"kernel": (read, units), "bias": (units,)},
        config={"units": count_kept(units)},
        reads={0: last},
        work=(Work(2.0 * num_elements(tensor.shape, (last,)), (read, units)),),
    )


def _beside_channels(ctx: Context, num_inputs: int) -> Effect:
    """The effect of a dense layer whose input has channels on another axis: they go through, its units stay.

    Args:
        ctx: The call.
        num_inputs: Size of the last axis of the input.
    """
    labels = ctx.inputs[0].labels
    lock_unless_elementwise(ctx, labels)
    work = elementwise_work(labels, ctx.output_shapes[0], 2.0 * num_inputs)
    return Effect(outputs=[labels], work=work)


def embedding(ctx: Context) -> Effect:
    """Dimensions of the vectors can leave. The inputs are numbers, not channels."""
    return _look_up(ctx, reverse_weights=())


def reversible_embedding(ctx: Context) -> Effect:
    """As Embedding. In reverse, it reads the dimensions and makes one output for each number."""
    reverse_weights = () if ctx.operation.tie_weights else ("reverse_embeddings",)
    if not ctx.argument(1, "reverse", False):
        return _look_up(ctx, reverse_weights)
    last = ctx.inputs[0].rank - 1
    read = ctx.input_labels(0, last)
    return Effect(
        outputs=[ctx.fixed_labels()],
        weights=_embedding_weights(read, reverse_weights),
        config={"output_dim": count_kept(read)},
        reads={0: last},
        work=(Work(2.0 * num_elements(ctx.output_shapes[0]), (read,)),),
    )


def _look_up(ctx: Context, reverse_weights: Sequence[str]) -> Effect:
    """The effect of an embedding that looks up one vector for each number."""
    ctx.lock(ctx.inputs[0].labels, "read as indices of an embedding")
    dimensions = ctx.new_labels(ctx.operation.output_dim)
    return Effect(
        outputs=[ctx.output_labels(dimensions, -1)],
        weights=_embedding_weights(dimensions, reverse_weights),
        config={"output_dim": count_kept(dimensions)},
    )


def _embedding_weights(dimensions: IntArray, reverse_weights: Sequence[str]) -> dict[str, WeightLabels]:
    """The labels of an embedding's weights: the table, and the transposed tables for the way back."""
    return {"embeddings": (None, dimensions), **dict.fromkeys(reverse_weights, (dimensions, None))}


def conv(ctx: Context) -> Effect:
    """Filters can leave, with any stride, dilation and number of groups."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    axis = layer_channel_axis(layer, tensor)
    read = ctx.input_labels(0, axis)
    has_one_channel_per_group = layer.groups == read.size > 1 and layer.filters % read.size == 0
    if has_one_channel_per_group and ctx.name not in ctx.space.grouped:
        return _channelwise_conv(ctx, read, axis)
    # All groups lose the same channels, so that they stay of equal size.
    groups = read.reshape(layer.groups, -1)
    ctx.union(groups, groups[:1])
    read_by_each = groups.max(0)
    filters = np.tile(_new_filters(ctx, layer.filters // layer.groups), layer.groups)
    kernel = (None,) * (tensor.rank - 2) + (read_by_each, filters)
    return Effect(
        outputs=[ctx.output_labels(filters, axis)],
        weights={"kernel": kernel, "bias": (filters,)},
        config={"filters": count_kept(filters)},
        reads={0: axis},
        work=_conv_work(ctx, axis, layer.kernel_size, read_by_each, filters),
        accelerate=_use_matrix_product if _is_pointwise(layer) else None,
    )


def conv_transpose(ctx: Context) -> Effect:
    """Filters can leave."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    axis = layer_channel_axis(layer, tensor)
    read = ctx.input_labels(0, axis)
    filters = _new_filters(ctx, layer.filters)
    positions = num_elements(tensor.shape, (axis,))
    return Effect(
        outputs=[ctx.output_labels(filters, axis)],
        weights={"kernel": (None,) * (tensor.rank - 2) + (filters, read), "bias": (filters,)},
        config={"filters": count_kept(filters)},
        reads={0: axis},
        work=(Work(2 * positions * np.prod(layer.kernel_size), (read, filters)),),
    )


def depthwise(ctx: Context) -> Effect:
    """Channels go through one by one, each `depth_multiplier` times."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    axis = layer_channel_axis(layer, tensor)
    read = ctx.input_labels(0, axis)
    filters = np.repeat(read, layer.depth_multiplier)
    lock_unless_elementwise(ctx, filters)
    return Effect(
        outputs=[ctx.output_labels(filters, axis)],
        weights={"kernel": (None,) * (tensor.rank - 2) + (read, None), "bias": (filters,)},
        work=_conv_work(ctx, axis, layer.kernel_size, filters),
    )


def separable(ctx: Context) -> Effect:
    """Filters can leave: a depthwise convolution, then a pointwise one."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    axis = layer_channel_axis(layer, tensor)
    read = ctx.input_labels(0, axis)
    depthwise_filters = np.repeat(read, layer.depth_multiplier)
    filters = _new_filters(ctx, layer.filters)
    window = (None,) * (tensor.rank - 2)
    depthwise_work = _conv_work(ctx, axis, layer.kernel_size, depthwise_filters)
    return Effect(
        outputs=[ctx.output_labels(filters, axis)],
        weights={
            "depthwise_kernel": (*window, read, None),
            "pointwise_kernel": (*window, depthwise_filters, filters),
            "bias": (filters,),
        },
        config={"filters": count_kept(filters)},
        reads={0: axis},
        work=depthwise_work + _conv_work(ctx, axis, (1,), depthwise_filters, filters),
    )


def pool_or_resize(ctx: Context) -> Effect:
    """Channels go through one by one; the sizes of the spatial axes may change."""
    layer, tensor, shape = ctx.operation, ctx.inputs[0], ctx.output_shapes[0]
    axis = layer_channel_axis(layer, tensor)
    channels = ctx.input_labels(0, axis)
    if len(shape) == tensor.rank:
        labels = ctx.output_labels(channels, axis)
        window = float(np.prod(np.broadcast_to(getattr(layer, "pool_size", 1), tensor.rank - 2)))
        return Effect(outputs=[labels], work=elementwise_work(labels, shape, window))
    # Global pooling leaves the axes (batch, channels), and reads each element once.
    labels = ctx.output_labels(channels, 1)
    return Effect(outputs=[labels], work=elementwise_work(tensor.labels, tensor.shape))


def pad_or_crop(ctx: Context) -> Effect:
    """Channels go through; the sizes of the spatial axes change."""
    return dataclasses.replace(pool_or_resize(ctx), work=())


def resize_images(ctx: Context) -> Effect:
    """Channels go through one by one; the sizes of the spatial axes may change."""
    return pool_or_resize(ctx) if ctx.inputs[0].rank == 4 else lock_batch_operation(ctx)


def pad_images(ctx: Context) -> Effect:
    """Channels go through; the sizes of the spatial axes change."""
    return dataclasses.replace(resize_images(ctx), work=())


def convolve(ctx: Context) -> Effect:
    """Channels that a constant kernel reads can leave. They go through a depthwise convolution."""
    tensor, operation, kernel = ctx.inputs[0], ctx.operation, ctx.argument(1, "kernel")
    if ctx.input_positions != [0] or isinstance(kernel, keras.Variable):
        return lock_inputs(ctx, "convolved with a kernel that is no constant")
    axis = layer_channel_axis(operation, tensor)
    read = ctx.input_labels(0, axis)
    *window, _, num_made = kernel.shape
    arguments = {1: cut_constant(kernel, -2, read)}
    if type(operation).__name__ == "DepthwiseConv":
        filters = np.repeat(read, num_made)
        work = _conv_work(ctx, axis, window, filters)
        return Effect(outputs=[ctx.output_labels(filters, axis)], arguments=arguments, work=work)
    work = _conv_work(ctx, axis, (*window, num_made), read)
    return Effect(outputs=[ctx.fixed_labels()], arguments=arguments, reads={0: axis}, work=work)


def _channelwise_conv(ctx: Context, read: IntArray, axis: int) -> Effect:
    """The effect of a convolution with one channel in each group, which is a depthwise one."""
    layer = ctx.operation
    filters = np.repeat(read, layer.filters // read.size)
    lock_unless_elementwise(ctx, filters)
    return Effect(
        outputs=[ctx.output_labels(filters, axis)],
        weights={"kernel": (None,) * (ctx.inputs[0].rank - 1) + (filters,), "bias": (filters,)},
        config={"filters": count_kept(filters), "groups": count_kept(read)},
        work=_conv_work(ctx, axis, layer.kernel_size, filters),
    )


def _is_pointwise(layer: keras.Layer) -> bool:
    """Whether a convolution is a product with one matrix at each position."""
    return set(layer.kernel_size) == {1} and layer.groups == 1 and layer.data_format == "channels_last"


def _use_matrix_product(layer: keras.Layer) -> None:
    """Makes a 1x1 convolution compute a matrix product.

    The derivative is a matrix product, too. It takes up to six times less time than the derivative of a
    convolution of a small feature map.
    """
    strides = (slice(None), *(slice(None, None, stride) for stride in layer.strides))

    def convolution_op(inputs: Tensor, kernel: Tensor) -> Tensor:
        inputs = inputs[strides]
        shape = ops.shape(inputs)
        matrix = ops.reshape(kernel, kernel.shape[-2:])
        outputs = ops.matmul(ops.reshape(inputs, (-1, shape[-1])), matrix)
        return ops.reshape(outputs, (*shape[:-1], matrix.shape[-1]))

    vars(layer)["convolution_op"] = convolution_op


def _new_filters(ctx: Context, num: int) -> IntArray:
    """Labels of new filters, `(num,)`, locked if the activation may mix them."""
    filters = ctx.new_labels(num)
    lock_unless_elementwise(ctx, filters)
    return filters


def _conv_work(ctx: Context, axis: int, kernel_size: Sequence[int], *labels: IntArray) -> tuple[Work, ...]:
    """A multiplication and an addition for each kernel value at each output position.

    Args:
        ctx: The call.
        axis: The channel axis of the output.
        kernel_size: Spatial sizes of the kernel.
        labels: Labels along the other axes of the kernel.
    """
    positions = num_elements(ctx.output_shapes[0], (axis,))
    return (Work(2.0 * positions * float(np.prod(kernel_size)), labels),)
