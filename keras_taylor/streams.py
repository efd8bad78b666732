"""Where a layer's output goes next: into a normalisation, into a residual sum."""

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


def constant_place(graph, call):
    """Where a constant can be added to a layer's output before its activation.

    Args:
        graph: `graph.Graph`.
        call: The layer's call in it; the only one.

    Returns:
        A function that adds an array `(num_outputs,)` in place: to the layer's bias, or to the one
        BatchNormalization that reads the output. `None` if there is neither.
    """
    layer = call.operation
    if getattr(layer, "bias", None) is not None:
        return lambda constant: layer.bias.assign(_array(layer.bias) + constant)
    reader = _only_reader(graph, call.outputs[0])
    if reader is None or not isinstance(reader.operation, keras.layers.BatchNormalization):
        return None
    normalization = reader.operation
    if not _is_linear(layer) or sum(other.operation is normalization for other in graph.calls) > 1:
        return None
    mean = normalization.moving_mean
    return lambda constant: mean.assign(_array(mean) - constant)


class Shortfall:
    """What the other terms of the sum that a layer's output goes into have lost.

    Between the layer and the sum there may be normalisations at inference, scales, and what is
    nothing at inference; terms that are not computed yet do their own part later.

    Args:
        old, new: `Walk`s of the original and of the repaired model, both before the sum.
        call: The layer's call in the new one's graph.
        old_view, view: `linear_views` of the layer in both.
        outputs: Bool array: which of the original's outputs were kept.
    """

    def __init__(self, old, new, call, old_view, view, outputs):
        self._old, self._new, self._outputs = old, new, outputs
        self._old_view, self._view = old_view, view
        self._terms, self._gain = [], 1.0
        if not _is_linear(call.operation):
            return
        index, scale = call.outputs[0], np.ones(1)
        while True:
            reader = _only_reader(new.graph, index)
            if reader is None:
                return
            if type(reader.operation).__name__ == "Add":
                break
            factor = _scale_of(reader.operation)
            if factor is None:
                return
            index, scale = reader.outputs[0], scale * factor
        others = [i for i in reader.inputs if i != index]
        shape = new.graph.shapes[index]
        alive = all(i in old.tensors and i in new.tensors for i in others)
        if (
            alive
            and len(others) + 1 == len(reader.inputs)
            and all(new.graph.shapes[i] == shape for i in others)
        ):
            self._terms = others
            self._gain = scale / (np.square(scale) + _DAMPING * np.square(scale).mean())

    def at(self, batch, positions):
        """What to add to the layer's output at some positions, `(num_rows, num_outputs)`, or 0."""
        lost = 0.0
        for index in self._terms:
            lost += self._old_view.at(self._old.tensors[index][batch], positions)[:, self._outputs]
            lost -= self._view.at(self._new.tensors[index][batch], positions)
        return np.float32(lost * self._gain)


def _only_reader(graph, index):
    readers = [call for call in graph.calls if index in call.inputs]
    return readers[0] if len(readers) == 1 and index not in graph.outputs else None


def _is_linear(layer):
    return getattr(layer, "activation", None) in (None, keras.activations.linear)


def _scale_of(operation):
    """By what an operation multiplies each channel at inference, `None` where it does more than that."""
    if isinstance(operation, keras.layers.BatchNormalization):
        gamma = _array(operation.gamma) if operation.scale else 1.0
        return gamma / np.sqrt(_array(operation.moving_variance) + operation.epsilon)
    return np.ones(1) if isinstance(operation, _PASSED_ON) else None


def _array(weight):
    return np.asarray(ops.convert_to_numpy(weight), np.float64)
