"""Attention layers: those with heads, which are opened and closed again, and those without projections."""

import contextlib
import math

import keras
from keras import ops

from keras_taylor.rules.base import Effect, InternalRead, Work, lock_inputs, override_attributes
from keras_taylor.support.keras_internals import layers_inside

_COUNTS = {
    "MultiHeadAttention": {"num_heads": "query_dense"},
    "GroupedQueryAttention": {"num_query_heads": "query_dense", "num_key_value_heads": "key_dense"},
}


def is_attention(operation):
    """Whether this is one of Keras' own attention layers with heads."""
    return type(operation) in (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


def head_counts(layer):
    """Inner projections, by the configuration value that counts their heads."""
    return {key: getattr(layer, f"_{name}") for key, name in _COUNTS[type(layer).__name__].items()}


def inner_layers(layer):
    """The layers inside an attention layer, in the order in which they were made."""
    return layers_inside(layer)


def attention(ctx):
    """Channels of the value go through; those of query and key, which it sums over, leave together."""
    given = ctx.argument(0, "inputs")
    tensors, others = ctx.inputs[: len(given)], ctx.inputs[len(given) :]
    known = len(ctx.input_positions) >= len(given) and ctx.input_positions[: len(given)] == [
        *range(len(given))
    ]
    if not known or any(t.channel_axis not in (None, t.rank - 1) for t in tensors):
        return lock_inputs(ctx)
    for mask in others:
        ctx.lock(mask.labels, "masks what others attend to")
    query, value, key = tensors[0], tensors[1], tensors[-1]
    read, goes_through = query.labels_along(-1), value.labels_along(-1)
    ctx.union(read, key.labels_along(-1))
    sizes = (*query.shape[1:-1], *key.shape[1:-1])
    factor = math.nan if None in sizes else 2.0 * math.prod(sizes)
    fixed = [ctx.fixed_labels(k) for k in range(1, len(ctx.output_shapes))]
    return Effect(
        outputs=[ctx.output_labels(goes_through, -1), *fixed],
        weights={"scale": (read,)} if len(getattr(ctx.operation.scale, "shape", ())) else {},
        internal_reads=(InternalRead(query.labels, _gated),),
        work=(Work(factor, (read,)), Work(factor, (goes_through,))),
    )


@contextlib.contextmanager
def _gated(layer, gate):
    """Within it scores are those of gated queries, and of gated keys where the two are added.

    The value is not gated, though it may be the same tensor: what reads the output gates it. In a
    product of query and key one gate is enough, two would be derived twice.
    """
    call, adds = layer.call, layer.score_mode == "concat" or type(layer).__name__ == "AdditiveAttention"

    def gated(inputs, *args, **kwargs):
        query, value = inputs[:2]
        key = inputs[-1]
        query = query * ops.cast(gate, query.dtype)
        key = key * ops.cast(gate, key.dtype) if adds else key
        return call([query, value, key], *args, **kwargs)

    with override_attributes(layer, call=gated):
        yield
