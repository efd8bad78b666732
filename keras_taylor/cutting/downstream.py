"""What follows a layer's output: normalizations, residual sums, rectifiers."""

import dataclasses
from collections.abc import Callable, Sequence

import keras
import numpy as np

from keras_taylor.reading.graph import Call, Graph
from keras_taylor.reading.matmul_views import (
    CONVOLUTIONS,
    Affine,
    MatmulView,
    SampledPositions,
    affine_at_inference,
    has_no_activation,
    sole_reader,
)
from keras_taylor.reading.walk import ComputedTensors
from keras_taylor.rules.base import is_from_keras
from keras_taylor.support.arrays import assign_rounded, to_float64
from keras_taylor.support.types import BoolArray, FloatArray

# Layers through which a positive factor of a channel goes unchanged, beside rectifiers.
_KEEP_FACTORS = (
    *(keras.layers.Dropout, keras.layers.SpatialDropout1D, keras.layers.SpatialDropout2D),
    *(keras.layers.SpatialDropout3D, keras.layers.Identity, keras.layers.LeakyReLU, keras.layers.PReLU),
    *(keras.layers.MaxPooling1D, keras.layers.MaxPooling2D, keras.layers.MaxPooling3D),
    *(keras.layers.AveragePooling1D, keras.layers.AveragePooling2D, keras.layers.AveragePooling3D),
    *(keras.layers.ZeroPadding1D, keras.layers.ZeroPadding2D, keras.layers.ZeroPadding3D),
    *(keras.layers.Cropping1D, keras.layers.Cropping2D, keras.layers.Cropping3D),
)
_GLOBAL_POOLING = (
    *(keras.layers.GlobalMaxPooling1D, keras.layers.GlobalMaxPooling2D, keras.layers.GlobalMaxPooling3D),
    *(keras.layers.GlobalAveragePooling1D, keras.layers.GlobalAveragePooling2D),
    keras.layers.GlobalAveragePooling3D,
)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
# Dividing by a gain that is small beside the root mean square of all gains would amplify noise. This share
# of the mean squared gain is added to the denominator.
_GAIN_DAMPING = 1e-3


class DownstreamPath:
    """The path from a layer's output on: normalizations at inference, a residual sum, a rectifier.

    Along the path, z = gain * y + offset + the residual terms, where y is the layer's output before its
    activation. A rectifier then passes z on where it is positive. Only residual terms that were computed
    before the layer count. Terms that are computed later can make up for their own changes.

    Args:
        old, new: Tensors of the original and of the repaired model: everything that is computed before the
            layer is used.
        call: The layer's call in the graph of the repaired model.
        old_view, view: The layer of both models as a matrix product.
        outputs: Bool array over the original's outputs: which were kept.
        old_inputs: Maps a call of the repaired model to what its counterpart in the original reads.

    Attributes:
        has_rectifier: Whether a ReLU ends the path.
    """

    def __init__(
        self,
        old: ComputedTensors,
        new: ComputedTensors,
        call: Call,
        old_view: MatmulView,
        view: MatmulView,
        outputs: BoolArray,
        old_inputs: Callable[[Call], Sequence[int]],
    ) -> None:
        self._old, self._new, self._outputs, self._old_inputs = old, new, outputs, old_inputs
        self._old_view, self._view = old_view, view
        self._residual_terms: list[int] = []  # numbers of tensors of the repaired model
        self._old_terms: list[int] = []  # and of the original
        self._affine = Affine(np.ones(1), np.zeros(1))
        self.has_rectifier = _is_rectifier(getattr(call.operation, "activation", None))
        if has_no_activation(call.operation):
            self._follow(call.outputs[0])

    def error_weights(self, num_outputs: int) -> FloatArray:
        """The factor `(num_outputs,)` by which each output's squared error grows along the path."""
        return np.broadcast_to(np.square(self._affine.gain), num_outputs)

    def residual_correction(self, batch: int, positions: SampledPositions) -> FloatArray:
        """The change of y that makes up for what the residual terms have lost.

        Args:
            batch: Number of the batch.
            positions: Positions of the layer's output.

        Returns:
            A float32 array `(num_rows, num_outputs)`, or a float32 zero if there are no residual terms.
        """
        if not self._residual_terms:
            return np.zeros((), np.float32)
        before = self._sum_old_terms(batch, positions)
        lost = before[:, self._outputs] - self._sum_residual_terms(batch, positions)
        gain = self._affine.gain
        damped = np.square(gain) + _GAIN_DAMPING * np.square(gain).mean()
        return lost * (gain / damped).astype(np.float32)

    def relax_targets(
        self, targets: FloatArray, predicted: FloatArray, batch: int, positions: SampledPositions
    ) -> FloatArray:
        """Targets for y that use the slack of the rectifier.

        Where the target for z is negative, the rectifier puts out zero, and any negative z is as good. There
        the target becomes the prediction if it makes z negative too, and otherwise the y that makes z zero.

        Args:
            targets: Wanted values of y, `(num_rows, num_outputs)`.
            predicted: What the fit so far gives for y, of the same shape.
            batch: Number of the batch.
            positions: Positions of the layer's output.

        Returns:
            A float32 array `(num_rows, num_outputs)`.
        """
        gain, offset = (value.astype(np.float32) for value in self._affine)
        rest = offset + self._sum_residual_terms(batch, positions)
        is_cut_off = gain * targets + rest <= 0
        nonzero_gain = np.where(np.abs(gain) > 1e-6, gain, np.inf)
        relaxed = np.where(gain * predicted + rest <= 0, predicted, -rest / nonzero_gain)
        return np.where(is_cut_off, relaxed, targets)

    def _sum_residual_terms(self, batch: int, positions: SampledPositions) -> FloatArray:
        """The sum of the residual terms in the repaired model; a zero if there are none."""
        values = (self._new.tensors[i][batch] for i in self._residual_terms)
        return sum((self._view.output_rows(y, positions) for y in values), start=np.zeros((), np.float32))

    def _sum_old_terms(self, batch: int, positions: SampledPositions) -> FloatArray:
        """The sum of the residual terms in the original."""
        values = (self._old.tensors[i][batch] for i in self._old_terms)
        return sum((self._old_view.output_rows(y, positions) for y in values), start=np.zeros((), np.float32))

    def _follow(self, index: int) -> None:
        """Follows the path from a tensor until something else than an affine map or a sum reads it."""
        graph = self._new.graph
        while (reader := sole_reader(graph, index)) is not None:
            operation = reader.operation
            if type(operation).__name__ == "Add":
                if self._residual_terms or not self._take_residual_terms(reader, index):
                    return
            elif _is_rectifier(operation):
                self.has_rectifier = True
                return
            else:
                affine = affine_at_inference(operation, self._view.num_outputs)
                if affine is None or self._residual_terms:
                    return
                gain, offset = self._affine
                self._affine = Affine(gain * affine.gain, offset * affine.gain + affine.offset)
            index = reader.outputs[0]

    def _take_residual_terms(self, reader: Call, index: int) -> bool:
        """Notes the other terms of a sum if they have been computed and have the same shape; says whether."""
        shapes = self._new.graph.shapes
        others = [i for i in reader.inputs if i != index]
        pairs = zip(reader.inputs, self._old_inputs(reader), strict=True)
        old = [before for now, before in pairs if now != index]
        is_computed = all(i in self._new.tensors for i in others) and all(i in self._old.tensors for i in old)
        fits = len(others) + 1 == len(reader.inputs) and all(shapes[i] == shapes[index] for i in others)
        if is_computed and fits:
            self._residual_terms, self._old_terms = others, old
        return is_computed and fits


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelReader:
    """A linear layer that can take over positive factors of channels that it reads.

    Attributes:
        layer: The layer.
        start: Number of the first of these channels among all that it reads.
    """

    layer: keras.Layer
    start: int

    def multiply(self, factors: FloatArray) -> None:
        """Multiplies what the layer makes of these channels, in place, by an array `(num_channels,)`."""
        kernel = to_float64(self.layer.kernel)
        groups = getattr(self.layer, "groups", 1) if isinstance(self.layer, CONVOLUTIONS) else 1
        all_factors = np.ones(groups * kernel.shape[-2])
        all_factors[self.start : self.start + len(factors)] = factors
        by_group = all_factors.reshape(groups, -1).T
        by_output = np.repeat(by_group, kernel.shape[-1] // groups, axis=1)
        assign_rounded(self.layer.kernel, kernel * by_output)


def find_channel_readers(graph: Graph, index: int, axis: int, start: int = 0) -> list[ChannelReader] | None:
    """The linear layers that read the channels of a tensor, if they alone do.

    Rectifiers, pooling and concatenations may come before them: a positive factor goes through these.

    Args:
        graph: The graph of the model.
        index: The number of the tensor.
        axis: The axis of its channels, counted from the start.
        start: Number of the first of the channels in question along it.
    """
    readers: list[ChannelReader] = []
    for call in (call for call in graph.calls if index in call.inputs):
        layer, shape = call.operation, graph.shapes[index]
        further: list[ChannelReader] | None
        if _is_plain_linear(layer, axis, len(shape)) and graph.is_used_once(layer):
            further = [ChannelReader(layer, start)]
        elif isinstance(layer, keras.layers.Concatenate) and layer.axis % len(shape) == axis:
            before = call.inputs[: call.inputs.index(index)]
            offset = start + sum(graph.shapes[i][axis] or 0 for i in before)
            is_once = call.inputs.count(index) == 1
            further = find_channel_readers(graph, call.outputs[0], axis, offset) if is_once else None
        elif _keeps_factors(layer) and _channel_axis(layer, axis, len(shape)) == axis:
            to = 1 if isinstance(layer, _GLOBAL_POOLING) and not layer.keepdims else axis
            further = find_channel_readers(graph, call.outputs[0], to, start)
        else:
            further = None
        if further is None:
            return None
        readers += further
    return None if index in graph.outputs else readers


def _is_plain_linear(layer: keras.Operation, axis: int, rank: int) -> bool:
    """Whether a layer multiplies the channels along an axis by a float32 kernel, without a constraint."""
    is_linear = isinstance(layer, (keras.layers.Dense, *CONVOLUTIONS, *_DEPTHWISE))
    if not is_linear or not is_from_keras(type(layer)):
        return False
    constraints = [getattr(layer, f"{name}_constraint", None) for name in ("kernel", "depthwise")]
    is_free = constraints == [None, None] and layer.kernel.dtype == "float32"
    return is_free and _channel_axis(layer, rank - 1, rank) == axis


def _channel_axis(layer: keras.Operation, default: int, rank: int) -> int:
    """The axis of the channels of a layer with a data format; of others `default`."""
    data_format = getattr(layer, "data_format", None)
    return default if data_format is None else 1 if data_format == "channels_first" else rank - 1


def _keeps_factors(operation: keras.Operation) -> bool:
    """Whether a positive factor of a channel before an operation is the same one after it."""
    if not is_from_keras(type(operation)):
        return False
    if isinstance(operation, keras.layers.ReLU):
        return operation.max_value is None and not operation.threshold
    function = operation.activation if isinstance(operation, keras.layers.Activation) else operation
    name = getattr(function, "__name__", type(function).__name__)
    return name in ("relu", "Relu", "leaky_relu") or isinstance(operation, (*_KEEP_FACTORS, *_GLOBAL_POOLING))


def _is_rectifier(operation: object) -> bool:
    """Whether a function, a layer or an operation puts out positive values, and zero for negative ones."""
    if isinstance(operation, keras.layers.Activation):
        operation = operation.activation
    if isinstance(operation, keras.layers.ReLU):
        return not operation.negative_slope and not operation.threshold
    names = ("relu", "relu6", "Relu", "Relu6")
    return getattr(operation, "__name__", type(operation).__name__) in names
