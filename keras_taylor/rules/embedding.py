"""Embeddings: a table that is read by number."""

from keras_taylor.rules.base import Effect, Work, count, size
from keras_taylor.rules.elementwise import locked


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
        return locked(ctx)
    read = tensor.along(last)
    return Effect(
        outputs=[ctx.fixed()],
        weights=_tables(read, names),
        config={"output_dim": count(read)},
        reads={0: last},
        work=(Work(2.0 * size(ctx.output_shapes[0]), (read,)),),
    )


def _looked_up(ctx, names):
    ctx.lock(ctx.inputs[0].labels, "read as numbers of an embedding")
    made = ctx.fresh(ctx.operation.output_dim)
    return Effect(
        outputs=[ctx.placed(made, -1)],
        weights=_tables(made, names),
        config={"output_dim": count(made)},
    )


def _tables(labels, names):
    return {"embeddings": (None, labels), **dict.fromkeys(names, (labels, None))}
