"""What follows on a layer's output: normalizations, residual sums, rectifiers."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

_PASSED_ON = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.Identity,
    keras.layers.ActivityRegularization,
)
# A scale below this share of the largest ones' says little about what comes before it.
_DAMPING = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class ConstantPlace:
    """Where a constant can be added to a layer's output before its activation.

    Attributes:
        operation: The layer whose weight takes it: the layer itself, or the normalization that follows.
        attribute: The weight's name.
        sign: 1 where the constant is added to the weight, -1 where it is subtracted.
    """

    operation: Any
    attribute: str
    sign: int

    def add(self, constant, operation=None):
        """Adds an array `(num_outputs,)` in place, to the layer or to a copy of it."""
        weight = getattr(operation or self.operation, self.attribute)
        weight.assign(_array(weight) + self.sign * np.reshape(constant, weight.shape))


def constant_place(graph, call, view):
    """The layer's bias, or the mean of the one BatchNormalization that reads its output.

    Args:
        graph: `graph.Graph`.
        call: The layer's call in it; the only one.
        view: The layer's `linear_views`.

    Returns:
        A `ConstantPlace`, or `None` if there is neither.
    """
    layer = call.operation
    if getattr(layer, "bias", None) is not None:
        return ConstantPlace(layer, "bias", 1) if view.has_bias_for_each() else None
    reader = _only_reader(graph, call.outputs[0])
    if reader is None or not isinstance(reader.operation, keras.layers.BatchNormalization):
        return None
    fits = reader.operation.moving_mean.shape == (view.num_outputs,)
    if not (fits and is_linear(layer) and graph.is_used_once(reader.operation)):
        return None
    return ConstantPlace(reader.operation, "moving_mean", -1)


def gain_of(graph, call, num_outputs):
    """By what the normalization that reads a layer's output multiplies each channel; ones if none does."""
    reader = _only_reader(graph, call.outputs[0])
    is_read = reader is not None and is_linear(call.operation)
    affine = _affine(reader.operation, num_outputs) if is_read else None
    return np.broadcast_to(np.ones(1) if affine is None else affine[0], num_outputs)


class Downstream:
    """What follows on a layer's output: normalizations at inference, a residual sum, a rectifier.

    What is looked at is z = gain * y + offset + terms, with y the layer's output before its
    activation and the terms those that are added in a residual sum; a rectifier passes z on if it
    is positive. Terms that are not computed yet do their own part later: then there are none here.

    Args:
        old, new: `Walk`s of the original and of the repaired model, both before the layer's output is used.
        call: The layer's call in the new one's graph.
        old_view, view: `linear_views` of the layer in both.
        outputs: Bool array: which of the original's outputs were kept.

    Attributes:
        rectified: Whether a ReLU comes next.
    """

    def __init__(self, old, new, call, old_view, view, outputs):
        self._old, self._new, self._outputs = old, new, outputs
        self._old_view, self._view = old_view, view
        self._terms, self._gain, self._offset = [], np.ones(1), np.zeros(1)
        self.rectified = _is_relu(getattr(call.operation, "activation", None))
        if is_linear(call.operation):
            self._follow(call.outputs[0])

    def weights(self, num_outputs):
        """What a squared error of each output counts: the square of its gain."""
        return np.broadcast_to(np.square(self._gain), num_outputs)

    def lost(self, batch, positions):
        """What the terms have lost, as something to add to y at some positions, or 0."""
        if not self._terms:
            return np.float32(0)
        there = sum(self._old_view.at(self._old.tensors[i][batch], positions) for i in self._terms)
        lost = there[:, self._outputs] - self._terms_at(batch, positions)
        gain = self._gain
        return np.float32(lost * gain / (np.square(gain) + _DAMPING * np.square(gain).mean()))

    def excused(self, wanted, given, batch, positions):
        """Targets for y that ask for no more than the rectifier shows.

        Where z is wanted negative, anything negative is as good: what is given, if it is, else 0.
        """
        rest = self._offset + self._terms_at(batch, positions)
        off = self._gain * wanted + rest <= 0
        safe = np.where(np.abs(self._gain) > 1e-6, self._gain, np.inf)
        least = np.where(self._gain * given + rest <= 0, given, -rest / safe)
        return np.float32(np.where(off, least, wanted))

    def _terms_at(self, batch, positions):
        return sum(self._view.at(self._new.tensors[i][batch], positions) for i in self._terms)

    def _follow(self, index):
        graph = self._new.graph
        while (reader := _only_reader(graph, index)) is not None:
            operation = reader.operation
            if type(operation).__name__ == "Add":
                if self._terms or not self._take_terms(reader, index):
                    return
            elif _is_relu(operation):
                self.rectified = True
                return
            else:
                affine = _affine(operation, self._view.num_outputs)
                if affine is None or self._terms:
                    return
                self._gain, self._offset = self._gain * affine[0], self._offset * affine[0] + affine[1]
            index = reader.outputs[0]

    def _take_terms(self, reader, index):
        """Notes the other terms of a sum, if they are there already and as large; says whether."""
        shapes = self._new.graph.shapes
        others = [i for i in reader.inputs if i != index]
        there = all(i in self._old.tensors and i in self._new.tensors for i in others)
        fits = len(others) + 1 == len(reader.inputs) and all(shapes[i] == shapes[index] for i in others)
        if there and fits:
            self._terms = others
        return there and fits


def _only_reader(graph, index):
    readers = [call for call in graph.calls if index in call.inputs]
    return readers[0] if len(readers) == 1 and index not in graph.outputs else None


def is_linear(layer):
    """Whether a layer puts out its kernel's product as it is."""
    return getattr(layer, "activation", None) in (None, keras.activations.linear)


def _is_relu(operation):
    """Whether it passes on what is positive, and nothing else: a function, a layer or an operation."""
    if isinstance(operation, keras.layers.Activation):
        operation = operation.activation
    if isinstance(operation, keras.layers.ReLU):
        return not operation.negative_slope and not operation.threshold
    names = ("relu", "relu6", "Relu", "Relu6")
    return getattr(operation, "__name__", type(operation).__name__) in names


def _affine(operation, num_outputs):
    """Gain and offset of each output at inference, `None` where it does more than that."""
    if isinstance(operation, keras.layers.BatchNormalization):
        if operation.moving_mean.shape != (num_outputs,):
            return None
        gamma = _array(operation.gamma) if operation.scale else 1.0
        beta = _array(operation.beta) if operation.center else 0.0
        gain = gamma / np.sqrt(_array(operation.moving_variance) + operation.epsilon)
        return gain, beta - gain * _array(operation.moving_mean)
    return (np.ones(1), np.zeros(1)) if isinstance(operation, _PASSED_ON) else None


def _array(weight):
    return np.asarray(ops.convert_to_numpy(weight), np.float64)
