"""Layers inside a layer that stays closed, and gates before them while it runs."""

import contextlib

import keras

from keras_taylor.rules.attention import inner_layers
from keras_taylor.rules.base import replaced


@contextlib.contextmanager
def gated_inside(layer, gates):
    """Within it, what inner layers read is gated.

    Args:
        layer: The outer layer.
        gates: For each inner layer that reads channels, by its number among `inner_layers(layer)`:
            a function from the tensor that it is called on to what it gets.
    """
    inner = inner_layers(layer) if gates else ()
    with contextlib.ExitStack() as stack:
        for number, gate in gates.items():
            stack.enter_context(replaced(inner[number], call=_gated(inner[number].call, gate)))
        yield


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

    with replaced(inner, call=recording):
        yield inputs, outputs


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
    with contextlib.ExitStack() as stack:
        for each in inner_layers(layer):
            stack.enter_context(replaced(each, symbolic_call=_in_plain_sight(each)))
        yield


def _in_plain_sight(layer):
    symbolic_call = layer.symbolic_call

    def call(*args, **kwargs):
        try:
            return symbolic_call(*args, **kwargs)
        except Exception:
            return layer.call(*args, **kwargs)

    return call
