"""Attention layers, which are opened to see their heads and closed again around fewer."""

import keras

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
    return layer._flatten_layers(include_self=False)  # there is no public way to ask
