"""Attention layers: those with heads, which are opened and closed again, and those without projections."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from keras_taylor.rules.base import (
    Context,
    Effect,
    InternalRead,
    Work,
    lock_inputs,
    override_attributes,
    size_product,
)
from keras_taylor.support.keras_internals import layers_inside
from keras_taylor.support.types import Tensor

# For each class the configuration values that count heads, and the inner projection that has these heads.
_HEAD_COUNTS = {
    "MultiHeadAttention": {"num_heads": "query_dense"},
    "GroupedQueryAttention": {"num_query_heads": "query_dense", "num_key_value_heads": "key_dense"},
}
_HEAD_AXIS = 1  # of the kernels of the projections to heads: (channels, heads, size of a head)


def is_attention(operation: keras.Operation) -> bool:
    """Whether this is one of Keras' own attention layers with heads."""
    return type(operation) in (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


def attention_config(
    layer: keras.Layer, kernel_shape: Callable[[keras.Layer], tuple[int, ...]]
) -> dict[str, Any]:
    """Configuration values of the smaller version of an attention layer.

    By default, a `MultiHeadAttention` has outputs as wide as its query. In the smaller version the widths may
    differ, so it gets an `output_shape` then.

    Args:
        layer: The attention layer.
        kernel_shape: Gives the shape that the kernel of an inner projection keeps.
    """
    counts = _HEAD_COUNTS[type(layer).__name__]
    config: dict[str, Any] = {
        key: kernel_shape(getattr(layer, f"_{name}"))[_HEAD_AXIS] for key, name in counts.items()
    }
    if type(layer) is keras.layers.MultiHeadAttention:
        output_shape = kernel_shape(layer._output_dense)[2:]
        by_default = kernel_shape(layer._query_dense)[:1]
        is_given = layer.get_config()["output_shape"] is not None
        if is_given or output_shape != by_default:
            config["output_shape"] = output_shape
    return config


def equally_wide_parts(layer: keras.Layer) -> tuple[list[keras.Layer], list[keras.Layer]]:
    """Inner projections that read, and those that make, tensors which the class wants to be equally wide."""
    if type(layer) is not keras.layers.GroupQueryAttention:
        return [], []
    return [layer._query_dense, layer._value_dense], [layer._output_dense]


def inner_layers(layer: keras.Layer) -> list[keras.Layer]:
    """All layers inside a layer, in the order in which they were made."""
    return layers_inside(layer)


def attention(ctx: Context) -> Effect:
    """Channels of the value go through. Channels of query and key are summed over, and leave together."""
    given = ctx.argument(0, "inputs")
    tensors, masks = ctx.inputs[: len(given)], ctx.inputs[len(given) :]
    are_all_tensors = list(ctx.input_positions[: len(given)]) == [*range(len(given))]
    if not are_all_tensors:
        return lock_inputs(ctx)
    for mask in masks:
        ctx.lock(mask.labels, "used as an attention mask")
    query, key = tensors[0], tensors[-1]
    read, channels, others = (ctx.input_labels(number, -1) for number in (0, 1, len(tensors) - 1))
    ctx.union(read, others)
    factor = 2.0 * size_product((*query.shape[1:-1], *key.shape[1:-1]))
    scores = [ctx.fixed_labels(k) for k in range(1, len(ctx.output_shapes))]
    return Effect(
        outputs=[ctx.output_labels(channels, -1), *scores],
        weights={"scale": (read,)} if len(getattr(ctx.operation.scale, "shape", ())) else {},
        internal_reads=(InternalRead(read.reshape([1] * (query.rank - 1) + [-1]), _gate_query),),
        work=(Work(factor, (read,)), Work(factor, (channels,))),
    )


@contextlib.contextmanager
def _gate_query(layer: keras.Layer, gate: Tensor) -> Iterator[None]:
    """Within this context, the layer computes its scores from queries times a gate.

    The value has no gate here, although it may be the same tensor: the reader of the output has one. Where
    scores are sums of query and key, the key gets the gate, too. Where they are products, one gate is enough,
    and two would count the derivative twice.

    Args:
        layer: An `Attention` or `AdditiveAttention` layer.
        gate: A tensor that broadcasts to the query.
    """
    call = layer.call
    adds_key = layer.score_mode == "concat" or type(layer).__name__ == "AdditiveAttention"

    def gated(inputs: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        query, value = inputs[:2]
        key = inputs[-1]
        query = query * ops.cast(gate, query.dtype)
        key = key * ops.cast(gate, key.dtype) if adds_key else key
        return call([query, value, key], *args, **kwargs)

    with override_attributes(layer, call=gated):
        yield
