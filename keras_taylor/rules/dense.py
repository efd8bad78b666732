"""Dense layers."""

from keras_taylor.rules.base import Effect, Work, count, is_elementwise, size


def dense(ctx):
    """Units can go; it reads the last axis, channels on another axis go through."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    last = tensor.rank - 1
    read = tensor.along(last)
    if tensor.channel_axis not in (None, last):
        return _beside_channels(ctx, read)
    made = ctx.fresh(layer.units)
    if not is_elementwise(layer.activation):
        ctx.lock(made, "goes through an activation that may mix channels")
    return Effect(
        outputs=[ctx.placed(made, last)],
        weights={"kernel": (read, made), "bias": (made,)},
        config={"units": count(made)},
        reads={0: last},
        work=(Work(2.0 * size(tensor.shape, (last,)), (read, made)),),
    )


def _beside_channels(ctx, read):
    """The channels lie on another axis: the layer treats each by itself, its own units stay."""
    tensor = ctx.inputs[0]
    axis = tensor.channel_axis
    channels = tensor.along(axis)
    if not is_elementwise(ctx.operation.activation):
        ctx.lock(channels, "goes through an activation that may mix channels")
    rest = size(tensor.shape, (axis, tensor.rank - 1))
    return Effect(
        outputs=[ctx.placed(channels, axis)],
        work=(Work(2.0 * rest * read.size * ctx.operation.units, (channels,)),),
    )
