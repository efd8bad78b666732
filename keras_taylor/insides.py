"""Layers inside a layer that stays closed, and gates before them while it runs."""

import contextlib

import keras

from keras_taylor.attention import inner_layers


@contextlib.contextmanager
def gated_inside(layer, gates):
    """Within it, what inner layers read is gated.

    Args:
        layer: The outer layer.
        gates: For each inner layer that reads channels, by its number among `inner_layers(layer)`:
            a function from the tensor that it is called on to what it gets.
    """
    inner = inner_layers(layer) if gates else ()
    try:
        for number, gate in gates.items():
            vars(inner[number])["call"] = _gated(inner[number].call, gate)
        yield
    finally:
        for number in gates:
            vars(inner[number]).pop("call", None)


@contextlib.contextmanager
def recorded_inside(layer, number):
    """Within it, what an inner layer is called on and what it puts out goes into the two lists given."""
    inner, inputs, outputs = inner_layers(layer)[number], [], []

    def recorded(x):
        inputs.append(keras.ops.convert_to_numpy(x))
        return x

    call = _gated(inner.call, recorded)

    def recording(*args, **kwargs):
        y = call(*args, **kwargs)
        outputs.append(keras.ops.convert_to_numpy(y))
        return y

    vars(inner)["call"] = recording
    try:
        yield inputs, outputs
    finally:
        vars(inner).pop("call")


def _gated(call, gate):
    def gated(*args, **kwargs):
        if args:
            return call(gate(args[0]), *args[1:], **kwargs)
        name = next(iter(kwargs))
        return call(**{**kwargs, name: gate(kwargs[name])})

    return gated


@contextlib.contextmanager
def inlined(layer):
    """Within it, layers inside that Keras cannot call on symbolic tensors do what they do in plain sight.

    There are some that say less of their outputs than they put out, or whose parent class does.
    """
    inner = inner_layers(layer)
    try:
        for each in inner:
            vars(each)["symbolic_call"] = _in_plain_sight(each)
        yield
    finally:
        for each in inner:
            vars(each).pop("symbolic_call", None)


def _in_plain_sight(layer):
    symbolic_call = layer.symbolic_call

    def call(*args, **kwargs):
        try:
            return symbolic_call(*args, **kwargs)
        except Exception:
            return layer.call(*args, **kwargs)

    return call
