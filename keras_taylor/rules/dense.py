"""Dense layers, and embeddings: a table whose rows are looked up by number."""

from collections.abc import Sequence

from keras_taylor.rules.base import Context, Effect, WeightLabels, Work, count_kept, lock_inputs, num_elements
from keras_taylor.rules.elementwise import lock_unless_elementwise
from keras_taylor.support.types import IntArray


def dense(ctx: Context) -> Effect:
    """Units can leave. The layer reads the last axis; channels on another axis go through."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    last = tensor.rank - 1
    read = tensor.labels_along(last)
    if tensor.channel_axis not in (None, last):
        return _beside_channels(ctx, tensor.channel_axis, read.size)
    units = ctx.new_labels(layer.units)
    lock_unless_elementwise(ctx, units)
    return Effect(
        outputs=[ctx.output_labels(units, last)],
        weights={"kernel": (read, units), "bias": (units,)},
        config={"units": count_kept(units)},
        reads={0: last},
        work=(Work(2.0 * num_elements(tensor.shape, (last,)), (read, units)),),
    )


def _beside_channels(ctx: Context, axis: int, num_inputs: int) -> Effect:
    """The effect of a dense layer whose input has channels on another axis: they go through, its units stay.

    Args:
        ctx: The call.
        axis: The channel axis of the input.
        num_inputs: Size of the last axis of the input.
    """
    tensor = ctx.inputs[0]
    channels = tensor.labels_along(axis)
    lock_unless_elementwise(ctx, channels)
    positions = num_elements(tensor.shape, (axis, tensor.rank - 1))
    return Effect(
        outputs=[ctx.output_labels(channels, axis)],
        work=(Work(2.0 * positions * num_inputs * ctx.operation.units, (channels,)),),
    )


def embedding(ctx: Context) -> Effect:
    """Dimensions of the vectors can leave. The inputs are numbers, not channels."""
    return _look_up(ctx, reverse_weights=())


def reversible_embedding(ctx: Context) -> Effect:
    """As Embedding. In reverse, it reads the dimensions and makes one output for each number."""
    reverse_weights = () if ctx.operation.tie_weights else ("reverse_embeddings",)
    if not ctx.argument(1, "reverse", False):
        return _look_up(ctx, reverse_weights)
    tensor = ctx.inputs[0]
    last = tensor.rank - 1
    if tensor.channel_axis not in (None, last):
        return lock_inputs(ctx)
    read = tensor.labels_along(last)
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
