"""Linear layers as matrix products: the im2col rows that their kernel multiplies, and where a bias goes."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.graph import Call, Graph
from keras_taylor.rules.einsum import parse_subscripts
from keras_taylor.support.arrays import assign_rounded, to_float32, to_float64, view_float32
from keras_taylor.support.types import Array, BoolArray, FloatArray, IntArray, Masks, Tensor

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_IDENTITY_AT_INFERENCE = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.Identity,
    keras.layers.ActivityRegularization,
)


class _SampleSize(NamedTuple):
    """How many rows a regression uses."""

    rows_per_column: int
    min_rows: int


# More rows than these change the solution little.
_THOROUGH_SAMPLE = _SampleSize(rows_per_column=20, min_rows=20_000)
_QUICK_SAMPLE = _SampleSize(rows_per_column=10, min_rows=4000)


class SampledPositions(NamedTuple):
    """Positions of a layer's output, as two int arrays `(num_rows,)` that index together.

    Attributes:
        examples: Number of the example within the batch.
        places: Flattened position within the example, such as `row * width + column` of a feature map.
    """

    examples: IntArray
    places: IntArray


class MatrixMasks(NamedTuple):
    """Which parts of a layer's matrix stay when units leave.

    Attributes:
        columns: Bool array `(num_columns,)` over the columns of the rows, the same for each block.
        outputs: Bool array `(num_outputs,)`, for all blocks together.
    """

    columns: BoolArray
    outputs: BoolArray


class MatmulView:
    """A linear layer as `y = activation(x W + b)`, with one row `x` for each position of its output.

    `W` is block-diagonal: a convolution of several groups has one block for each, other layers have one
    block. This class is the view of a `Dense` layer, in which a row is what the last axis of the input
    holds. Subclasses say how other layers differ.

    Args:
        layer: The layer, built.
    """

    kernel_name = "kernel"
    num_blocks = 1

    def __init__(self, layer: keras.Layer) -> None:
        self.layer = layer

    @property
    def kernel(self) -> keras.Variable:
        """The weight that holds the matrix."""
        return getattr(self.layer, self.kernel_name)

    @property
    def num_outputs(self) -> int:
        """Number of outputs at each position."""
        blocks, _, outputs = self.matrix().shape
        return blocks * outputs

    def matrix(self) -> FloatArray:
        """The kernel as a float32 array `(num_blocks, num_columns, num_outputs / num_blocks)`."""
        return to_float32(self.kernel)[None]

    def assign(self, matrix: FloatArray) -> None:
        """Writes an array of the shape of `matrix()` into the kernel."""
        self.kernel.assign(matrix[0])

    def bias(self) -> FloatArray:
        """The bias as a float32 array `(num_outputs,)`, or a float32 zero where there is none."""
        bias = getattr(self.layer, "bias", None)
        return np.zeros((), np.float32) if bias is None else to_float32(bias)

    def has_full_bias(self) -> bool:
        """Whether each output has a bias of its own."""
        return getattr(self.layer, "bias", None) is not None

    def matrix_masks(self, masks: Masks) -> MatrixMasks:
        """Translates masks along the axes of the kernel into masks of the matrix.

        Args:
            masks: For each axis of the kernel a bool array, or `None` for an axis that stays whole.
        """
        shape = tuple(self.kernel.shape)
        full = [np.ones(n, bool) if m is None else m for n, m in zip(shape, masks, strict=True)]
        *window, columns, outputs = self._order_axes(full)
        return MatrixMasks(np.tile(columns, math.prod(map(len, window))), outputs)

    def units_of_columns(self, units: Sequence[IntArray | None]) -> IntArray:
        """The unit that each column of a block reads, an int array `(num_columns,)`; -1 for no unit.

        Args:
            units: For each axis of the kernel the unit of each entry, or `None` for an axis without units.
        """
        full = [np.full(n, -1) if a is None else a for n, a in zip(self.kernel.shape, units, strict=True)]
        *window, columns, _ = self._order_axes(full)
        return np.tile(columns, math.prod(map(len, window)))

    def _order_axes(self, axes: list[Array]) -> list[Array]:
        """Arrays along the axes of the kernel in the order: window axes, inputs, outputs."""
        return axes

    def num_positions(self, x: Tensor) -> int:
        """Number of output positions of one example of the layer's input `x`."""
        return math.prod(self._output_shape(tuple(x.shape))[1:-1])

    def _output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the output, the channel axis last."""
        return self.layer.compute_output_shape(input_shape)

    def input_rows(self, x: Tensor, positions: SampledPositions) -> FloatArray:
        """The rows that the matrix multiplies, at some positions.

        Args:
            x: The layer's input for a batch.
            positions: Positions of the layer's output.

        Returns:
            A float32 array `(num_blocks, num_rows, num_columns)`.
        """
        return _rows_at(view_float32(x), positions)[None]

    def output_rows(self, y: Tensor, positions: SampledPositions) -> FloatArray:
        """Values of a tensor of the output's shape at some positions, float32 `(num_rows, num_outputs)`."""
        return _rows_at(view_float32(y), positions)


class _EinsumTerms(NamedTuple):
    """The axis letters of an einsum equation."""

    read: str
    kernel: str
    made: str


class _EinsumView(MatmulView):
    """An `EinsumDense` layer: columns are the axes that are summed, outputs the kernel's other axes."""

    def __init__(self, layer: keras.Layer, terms: _EinsumTerms) -> None:
        super().__init__(layer)
        self._terms = terms
        self._summed = [c for c in terms.kernel if c in terms.read]
        self._made = [c for c in terms.made if c in terms.kernel]
        self._order = [terms.kernel.index(c) for c in (*self._summed, *self._made)]

    def matrix(self) -> FloatArray:
        kernel = to_float32(self.kernel).transpose(self._order)
        return kernel.reshape(1, math.prod(kernel.shape[: len(self._summed)]), -1)

    def assign(self, matrix: FloatArray) -> None:
        shape = [self.kernel.shape[axis] for axis in self._order]
        self.kernel.assign(matrix[0].reshape(shape).transpose(np.argsort(self._order)))

    def bias(self) -> FloatArray:
        if self.layer.bias is None:
            return super().bias()
        # The bias has all axes of the output from its first letter on, with size 1 where it does not vary.
        bias = to_float32(self.layer.bias)
        sizes = dict(zip(reversed(self._terms.made), reversed(bias.shape), strict=False))
        sizes_made = [self.kernel.shape[self._terms.kernel.index(c)] for c in self._made]
        bias = bias.reshape([sizes.get(c, 1) for c in self._made])
        return np.broadcast_to(bias, sizes_made).reshape(-1)

    def has_full_bias(self) -> bool:
        return self.layer.bias is not None and set(self.layer.bias_axes) == set(self._made)

    def matrix_masks(self, masks: Masks) -> MatrixMasks:
        full = []
        for axis in self._order:
            mask = masks[axis]
            full.append(np.ones(self.kernel.shape[axis], bool) if mask is None else mask)
        num = len(self._summed)
        return MatrixMasks(*(_outer(np.logical_and, part) for part in (full[:num], full[num:])))

    def units_of_columns(self, units: Sequence[IntArray | None]) -> IntArray:
        full = []
        for axis in self._order[: len(self._summed)]:
            along = units[axis]
            full.append(np.full(self.kernel.shape[axis], -1) if along is None else along)
        return _outer(np.maximum, full)

    def num_positions(self, x: Tensor) -> int:
        return math.prod(x.shape[self._terms.read.index(c)] for c in self._position_letters())

    def input_rows(self, x: Tensor, positions: SampledPositions) -> FloatArray:
        return self._flatten(x, self._terms.read, self._summed)[positions][None]

    def output_rows(self, y: Tensor, positions: SampledPositions) -> FloatArray:
        return self._flatten(y, self._terms.made, self._made)[positions]

    def _position_letters(self) -> list[str]:
        """The axes of the output that the kernel does not have, without the batch axis."""
        return [c for c in self._terms.made[1:] if c in self._terms.read]

    def _flatten(self, tensor: Tensor, letters: str, last: list[str]) -> FloatArray:
        """A tensor as `(num_examples, num_positions, size)`, where `size` covers the axes in `last`."""
        order = [letters.index(c) for c in (letters[0], *self._position_letters(), *last)]
        values = view_float32(tensor).transpose(order)
        return values.reshape(len(values), -1, math.prod(values.shape[-len(last) :]))


class _WindowView(MatmulView):
    """A layer with a sliding window: a row is the window's content, channels fastest (im2col)."""

    def __init__(self, layer: keras.Layer) -> None:
        super().__init__(layer)
        self._channels_first = layer.data_format == "channels_first"
        pairs = zip(layer.kernel_size, layer.dilation_rate, strict=True)
        self._window_sizes = tuple(1 + (size - 1) * dilation for size, dilation in pairs)

    def matrix(self) -> FloatArray:
        kernel = to_float32(self.kernel)
        return kernel.reshape(1, -1, kernel.shape[-1])

    def assign(self, matrix: FloatArray) -> None:
        self.kernel.assign(matrix[0].reshape(self.kernel.shape))

    def output_rows(self, y: Tensor, positions: SampledPositions) -> FloatArray:
        return super().output_rows(self._channels_last(view_float32(y)), positions)

    def _output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        shape = super()._output_shape(input_shape)
        return (shape[0], *shape[2:], shape[1]) if self._channels_first else shape

    def input_rows(self, x: Tensor, positions: SampledPositions) -> FloatArray:
        values = self._channels_last(view_float32(x))
        space = np.unravel_index(positions.places, self._output_shape(tuple(x.shape))[1:-1])
        first = [
            place * stride - self._padding(size, window, stride)[0]
            for place, size, window, stride in zip(
                space, values.shape[1:-1], self._window_sizes, self.layer.strides, strict=True
            )
        ]
        return self._gather(values, positions.examples, first)

    def _channels_last(self, values: FloatArray) -> FloatArray:
        return np.moveaxis(values, 1, -1) if self._channels_first else values

    def _gather(self, values: FloatArray, examples: IntArray, first: Sequence[IntArray]) -> FloatArray:
        """The windows that begin at some positions, `(1, num_rows, num_columns)`; zeros beside the input.

        Args:
            values: The input, channels last.
            examples: The example of each window.
            first: Where it begins along each axis of the window.
        """
        taps = list(itertools.product(*map(range, self.layer.kernel_size)))
        rows = np.empty((len(examples), len(taps), values.shape[-1]), np.float32)
        for number, tap in enumerate(taps):
            offsets = zip(tap, self.layer.dilation_rate, strict=True)
            at = [start + step * dilation for start, (step, dilation) in zip(first, offsets, strict=True)]
            is_beside = np.zeros(len(examples), bool)
            for place, size in zip(at, values.shape[1:-1], strict=True):
                is_beside |= (place < 0) | (place >= size)
                place.clip(0, size - 1, out=place)
            rows[:, number] = values[(examples, *at)]
            rows[is_beside, number] = 0
        return rows.reshape(1, len(rows), -1)

    def _padding(self, size: int, window: int, stride: int) -> tuple[int, int]:
        """Zeros before and after the input along one axis."""
        if self.layer.padding == "valid":
            return 0, 0
        if self.layer.padding == "causal":
            return window - 1, 0
        total = max((-(-size // stride) - 1) * stride + window - size, 0)
        return total // 2, total - total // 2


class _ConvolutionView(_WindowView):
    """A convolution: each of its groups is a block, from its own input channels to its own outputs."""

    def __init__(self, layer: keras.Layer) -> None:
        super().__init__(layer)
        self.num_blocks = layer.groups

    def matrix(self) -> FloatArray:
        kernel = to_float32(self.kernel)
        blocks = np.split(kernel.reshape(-1, kernel.shape[-1]), self.num_blocks, axis=1)
        return np.stack(blocks)

    def assign(self, matrix: FloatArray) -> None:
        self.kernel.assign(np.concatenate(list(matrix), 1).reshape(self.kernel.shape))

    def input_rows(self, x: Tensor, positions: SampledPositions) -> FloatArray:
        rows = super().input_rows(x, positions)[0]
        blocks = rows.reshape(len(rows), -1, self.num_blocks, self.kernel.shape[-2])
        return np.moveaxis(blocks, 2, 0).reshape(self.num_blocks, len(rows), -1)


class _SeparableView(_WindowView):
    """A separable convolution: its pointwise kernel multiplies the output of its depthwise kernel."""

    kernel_name = "pointwise_kernel"

    def input_rows(self, x: Tensor, positions: SampledPositions) -> FloatArray:
        layer = self.layer
        depthwise_output = ops.depthwise_conv(
            ops.convert_to_tensor(x),
            ops.convert_to_tensor(layer.depthwise_kernel),
            strides=layer.strides,
            padding=layer.padding,
            data_format=layer.data_format,
            dilation_rate=layer.dilation_rate,
        )
        return self.output_rows(depthwise_output, positions)[None]


class _TransposedView(_WindowView):
    """A transposed convolution: a convolution over the dilated input, with the window flipped."""

    def matrix(self) -> FloatArray:
        kernel = to_float32(self.kernel)  # (*window, outputs, inputs)
        flipped = np.flip(kernel, tuple(range(kernel.ndim - 2))).swapaxes(-1, -2)
        return flipped.reshape(1, -1, flipped.shape[-1])

    def assign(self, matrix: FloatArray) -> None:
        *window, outputs, inputs = self.kernel.shape
        flipped = matrix[0].reshape(*window, inputs, outputs).swapaxes(-1, -2)
        self.kernel.assign(np.flip(flipped, tuple(range(len(window)))))

    def _order_axes(self, axes: list[Array]) -> list[Array]:
        *window, outputs, inputs = axes
        return [*window, inputs, outputs]

    def input_rows(self, x: Tensor, positions: SampledPositions) -> FloatArray:
        values, strides = self._channels_last(view_float32(x)), self.layer.strides
        sizes = [(size - 1) * stride + 1 for size, stride in zip(values.shape[1:-1], strides, strict=True)]
        spread = np.zeros((len(values), *sizes, values.shape[-1]), np.float32)
        spread[(slice(None), *[slice(None, None, stride) for stride in strides])] = values
        outputs = self._output_shape(tuple(x.shape))[1:-1]
        space = np.unravel_index(positions.places, outputs)
        first = [
            place - (window - 1 - self._padding(out, window, stride)[0])
            for place, out, window, stride in zip(space, outputs, self._window_sizes, strides, strict=True)
        ]
        return self._gather(spread, positions.examples, first)


def matmul_view(layer: keras.Operation) -> MatmulView | None:
    """A layer as a matrix product, `None` where it is not one of the linear layers known here.

    These are `Dense`, `EinsumDense`, and the convolutions: plain, transposed and separable. Depthwise
    convolutions are not among them, since they do not mix channels.
    """
    if getattr(layer, "quantization_mode", None):
        return None
    if type(layer) is keras.layers.EinsumDense:
        terms = _matmul_terms(layer)
        return None if terms is None else _EinsumView(layer, terms)
    views: tuple[tuple[tuple[type, ...], type[MatmulView]], ...] = (
        (CONVOLUTIONS, _ConvolutionView),
        (_TRANSPOSED, _TransposedView),
        (_SEPARABLE, _SeparableView),
        ((keras.layers.Dense,), MatmulView),
    )
    return next((view(layer) for classes, view in views if type(layer) in classes), None)


def _matmul_terms(layer: keras.Layer) -> _EinsumTerms | None:
    """The letters of an `EinsumDense` layer; `None` if it is not one matrix product for all positions."""
    built_for = layer.get_build_config()["input_shape"]
    terms = parse_subscripts(layer.equation, (len(built_for), len(layer.kernel.shape)))
    if terms is None:
        return None
    read, kernel, made = (set(term) for term in terms)
    batch = terms[0][0]
    is_product = kernel <= read ^ made and read - kernel == made - kernel and batch == terms[2][0]
    has_own_bias = layer.bias is None or set(layer.bias_axes) <= kernel
    is_known = is_product and has_own_bias and kernel & read and batch not in kernel
    return _EinsumTerms(*terms) if is_known else None


def _rows_at(values: FloatArray, positions: SampledPositions) -> FloatArray:
    """The channels of an array at some positions, `(num_rows, num_channels)`, whatever its strides."""
    sizes = values.shape[1:-1]
    space = np.unravel_index(positions.places, sizes) if sizes else ()
    return values[(positions.examples, *space)]


def _outer(combine: np.ufunc, axes: Sequence[Array]) -> Array:
    """Combined values of all pairs of positions along some axes, flattened."""
    return functools.reduce(lambda first, second: combine.outer(first, second).reshape(-1), axes)


def rows_per_example(num_columns: int, num_examples: int, thorough: bool = True) -> int:
    """Number of rows to sample from each example for a regression on `num_columns` columns.

    Args:
        num_columns: Columns of a block of the matrix.
        num_examples: Number of all examples.
        thorough: `False` takes fewer rows.
    """
    size = _THOROUGH_SAMPLE if thorough else _QUICK_SAMPLE
    return -(-max(size.rows_per_column * num_columns, size.min_rows) // num_examples)


def sample_positions(
    num_examples: int, num_positions: int, num_rows: int, random: np.random.Generator
) -> SampledPositions:
    """Draws positions without replacement: `num_rows` of each example, all if there are not more."""
    chosen = np.tile(np.arange(num_positions), (num_examples, 1))
    if num_rows < num_positions:
        chosen = random.permuted(chosen, axis=1)[:, :num_rows]
    return SampledPositions(np.repeat(np.arange(num_examples), chosen.shape[1]), chosen.reshape(-1))


@dataclasses.dataclass(frozen=True, eq=False)
class BiasWeight:
    """The weight through which a constant can be added to a layer's output before its activation.

    Attributes:
        layer: The layer that owns the weight: the linear layer itself, or the normalization that follows it.
        attribute: Name of the weight.
        sign: 1 where the constant is added to the weight, -1 where it is subtracted from it.
    """

    layer: keras.Layer
    attribute: str
    sign: int

    def add(self, constant: FloatArray, layer: keras.Layer | None = None) -> None:
        """Adds an array `(num_outputs,)` in place, to the layer or to `layer`, a copy of it."""
        weight = getattr(layer or self.layer, self.attribute)
        assign_rounded(weight, to_float64(weight) + self.sign * np.reshape(constant, weight.shape))


def find_bias_weight(graph: Graph, call: Call, view: MatmulView) -> BiasWeight | None:
    """The layer's bias, or the moving mean of the BatchNormalization that alone reads its output.

    Args:
        graph: The graph of the model.
        call: The layer's only call in it.
        view: The layer as a matrix product.

    Returns:
        `None` if there is neither, or if the layer has a bias that several outputs share.
    """
    layer = call.operation
    if getattr(layer, "bias", None) is not None:
        return BiasWeight(layer, "bias", 1) if view.has_full_bias() else None
    reader = sole_reader(graph, call.outputs[0])
    if reader is None or not isinstance(reader.operation, keras.layers.BatchNormalization):
        return None
    fits = reader.operation.moving_mean.shape == (view.num_outputs,)
    if not (fits and has_no_activation(layer) and graph.is_used_once(reader.operation)):
        return None
    return BiasWeight(reader.operation, "moving_mean", -1)


def normalization_gain(graph: Graph, call: Call, num_outputs: int) -> FloatArray:
    """The factor `(num_outputs,)` of the normalization that reads a layer's output; ones if there is none."""
    reader = sole_reader(graph, call.outputs[0])
    is_read = reader is not None and has_no_activation(call.operation)
    affine = affine_at_inference(reader.operation, num_outputs) if reader is not None and is_read else None
    return np.broadcast_to(np.ones(1) if affine is None else affine.gain, num_outputs)


class Affine(NamedTuple):
    """`gain * y + offset`, float64 arrays `(num_outputs,)` or `(1,)`."""

    gain: FloatArray
    offset: FloatArray


def sole_reader(graph: Graph, index: int) -> Call | None:
    """The call that reads a tensor, `None` if several calls or the model's outputs do."""
    readers = [call for call in graph.calls if index in call.inputs]
    return readers[0] if len(readers) == 1 and index not in graph.outputs else None


def has_no_activation(layer: keras.Operation) -> bool:
    """Whether a layer puts out the product of its kernel, plus a bias, unchanged."""
    return getattr(layer, "activation", None) in (None, keras.activations.linear)


def affine_at_inference(operation: keras.Operation, num_outputs: int) -> Affine | None:
    """The affine map that an operation is at inference, `None` if it is not one for each output alone."""
    if isinstance(operation, keras.layers.BatchNormalization):
        if operation.moving_mean.shape != (num_outputs,):
            return None
        gamma = to_float64(operation.gamma) if operation.scale else 1.0
        beta = to_float64(operation.beta) if operation.center else 0.0
        gain = gamma / np.sqrt(to_float64(operation.moving_variance) + operation.epsilon)
        return Affine(gain, beta - gain * to_float64(operation.moving_mean))
    return Affine(np.ones(1), np.zeros(1)) if isinstance(operation, _IDENTITY_AT_INFERENCE) else None
