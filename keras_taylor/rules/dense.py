"""Dense layers, and embeddings: a table that is read by number."""

from keras_taylor.rules.base import Effect, Work, count_kept, is_elementwise, lock_inputs, num_elements


def dense(ctx):
    """Units can go; it reads the last axis, channels on another axis go through."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    last = tensor.rank - 1
    read = tensor.labels_along(last)
    if tensor.channel_axis not in (None, last):
        return _beside_channels(ctx, read)
    made = ctx.new_labels(layer.units)
    if not is_elementwise(layer.activation):
        ctx.lock(made, "goes through an activation that may mix channels")
    return Effect(
        outputs=[ctx.output_labels(made, last)],
        weights={"kernel": (read, made), "bias": (made,)},
        config={"units": count_kept(made)},
        reads={0: last},
        work=(Work(2.0 * num_elements(tensor.shape, (last,)), (read, made)),),
    )


def _beside_channels(ctx, read):
    """The channels lie on another axis: the layer treats each by itself, its own units stay."""
    tensor = ctx.inputs[0]
    axis = tensor.channel_axis
    channels = tensor.labels_along(axis)
    if not is_elementwise(ctx.operation.activation):
        ctx.lock(channels, "goes through an activation that may mix channels")
    rest = num_elements(tensor.shape, (axis, tensor.rank - 1))
    return Effect(
        outputs=[ctx.output_labels(channels, axis)],
        work=(Work(2.0 * rest * read.size * ctx.operation.units, (channels,)),),
    )


def embedding(ctx):
    """Dimensions can go; what it reads are numbers."""
    return _looked_up(ctx, ())


def reversible_embedding(ctx):
    """As an embedding; in reverse it reads the dimensions, and makes one output for each number."""
    names = () if ctx.operation.tie_weights else ("reverse_embeddings",)
    if not ctx.argument(1, "reverse", False):
        return _looked_up(ctx, names)
    tensor = ctx.inputs[0]
    last = tensor.rank - 1
    if tensor.channel_axis not in (None, last):
        return lock_inputs(ctx)
    read = tensor.labels_along(last)
    return Effect(
        outputs=[ctx.fixed_labels()],
        weights=_tables(read, names),
        config={"output_dim": count_kept(read)},
        reads={0: last},
        work=(Work(2.0 * num_elements(ctx.output_shapes[0]), (read,)),),
    )


def _looked_up(ctx, names):
    ctx.lock(ctx.inputs[0].labels, "read as numbers of an embedding")
    made = ctx.new_labels(ctx.operation.output_dim)
    return Effect(
        outputs=[ctx.output_labels(made, -1)],
        weights=_tables(made, names),
        config={"output_dim": count_kept(made)},
    )


def _tables(labels, names):
    return {"embeddings": (None, labels), **dict.fromkeys(names, (labels, None))}
