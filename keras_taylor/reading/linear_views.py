"""Mixing layers as matrices: the rows that their kernel multiplies."""

import functools
import math

import keras
import numpy as np
from keras import ops

from keras_taylor.rules.einsum import parse_subscripts

# Rows for each column of a regression, and at least so many: more change little.
_ROWS, _FEW_ROWS = (20, 20_000), (10, 4000)
_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)


def linear_view(layer):
    """How a layer is a matrix product, `None` if it is none that is known here.

    Only layers that mix channels: `Conv`, transposed, separable, `Dense`, `EinsumDense`.
    """
    if type(layer) is keras.layers.EinsumDense and _letters(layer) is None:
        return None
    for classes, view in (
        (_CONVOLUTIONS, _Convolution),
        (_TRANSPOSED, _Transposed),
        (_SEPARABLE, _Separable),
        ((keras.layers.Dense,), _Dense),
        ((keras.layers.EinsumDense,), _Einsum),
    ):
        if type(layer) in classes and not getattr(layer, "quantization_mode", None):
            return view(layer)
    return None


class _Dense:
    """`y = x W`: a row is what the last axis holds."""

    weight = "kernel"
    num_blocks = 1

    def __init__(self, layer):
        self.layer = layer

    @property
    def kernel(self):
        """The weight, a Keras variable."""
        return getattr(self.layer, self.weight)

    @property
    def num_outputs(self):
        """How many outputs there are at each position."""
        blocks, _, outputs = self.matrix().shape
        return blocks * outputs

    def matrix(self):
        """The kernel as an array `(num_blocks, num_columns, num_outputs)`, float32."""
        return _to_numpy(self.kernel)[None]

    def assign(self, matrix):
        """Puts a matrix back into the kernel."""
        self.kernel.assign(matrix[0])

    def bias(self):
        """What is added to each output, a float32 array `(num_outputs,)` or 0."""
        bias = getattr(self.layer, "bias", None)
        return np.float32(0) if bias is None else _to_numpy(bias)

    def has_bias_for_each(self):
        """Whether each output has a bias of its own."""
        return getattr(self.layer, "bias", None) is not None

    def kept(self, masks):
        """Which columns and which outputs a cut left.

        Args:
            masks: For each axis of the kernel a bool array, or `None` for all.

        Returns:
            Bool arrays `(num_columns,)` (of each block) and `(num_outputs,)`, of the layer before the cut.
        """
        shape = tuple(self.kernel.shape)
        full = [np.ones(n, bool) if m is None else m for n, m in zip(shape, masks, strict=True)]
        *window, columns, outputs = self._in_order(full)
        return np.tile(columns, math.prod(map(len, window))), outputs

    def along_columns(self, axes):
        """Numbers along the kernel's input axis, spread over the columns of a block.

        Args:
            axes: For each axis of the kernel an int array, or `None`, which counts as -1.
        """
        full = [np.full(n, -1) if a is None else a for n, a in zip(self.kernel.shape, axes, strict=True)]
        *window, columns, _ = self._in_order(full)
        return np.tile(columns, math.prod(map(len, window)))

    def _in_order(self, axes):
        """The kernel's axes: window, inputs, outputs."""
        return axes

    def num_positions(self, x):
        """How many rows an example has."""
        return math.prod(self._output_shape(x)[1:-1])

    def _output_shape(self, x):
        return self.layer.compute_output_shape(tuple(x.shape))

    def rows(self, x, positions):
        """Rows at some positions.

        Args:
            x: The layer's input for a batch, a tensor.
            positions: Pair of int arrays: examples, and flattened positions of the output.

        Returns:
            A float32 array `(num_blocks, num_rows, num_columns)`.
        """
        x = _to_numpy(x)
        return x.reshape(len(x), -1, x.shape[-1])[positions][None]

    def at(self, y, positions):
        """Values of a tensor shaped like the layer's output at some positions, `(num_rows, num_outputs)`."""
        y = _to_numpy(y)
        return y.reshape(len(y), -1, y.shape[-1])[positions]


class _Einsum(_Dense):
    """A row is what the axes hold that are summed over; several may be, and several may be made."""

    def __init__(self, layer):
        super().__init__(layer)
        self._read, self._kernel_letters, self._made = _letters(layer)
        self._summed = [c for c in self._kernel_letters if c in self._read]
        self._out = [c for c in self._made if c in self._kernel_letters]
        self._order = [self._kernel_letters.index(c) for c in (*self._summed, *self._out)]

    def matrix(self):
        kernel = _to_numpy(self.kernel).transpose(self._order)
        return kernel.reshape(1, math.prod(kernel.shape[: len(self._summed)]), -1)

    def assign(self, matrix):
        shape = [self.kernel.shape[axis] for axis in self._order]
        self.kernel.assign(matrix[0].reshape(shape).transpose(np.argsort(self._order)))

    def bias(self):
        if self.layer.bias is None:
            return super().bias()
        bias = _to_numpy(self.layer.bias)  # from its first letter on it has all axes of what is made
        sizes = dict(zip(reversed(self._made), reversed(bias.shape), strict=False))
        sizes_made = [self.kernel.shape[self._kernel_letters.index(c)] for c in self._out]
        bias = bias.reshape([sizes.get(c, 1) for c in self._out])
        return np.broadcast_to(bias, sizes_made).reshape(-1)

    def has_bias_for_each(self):
        return self.layer.bias is not None and set(self.layer.bias_axes) == set(self._out)

    def kept(self, masks):
        shape = self.kernel.shape
        full = [np.ones(shape[a], bool) if masks[a] is None else masks[a] for a in self._order]
        num = len(self._summed)
        return tuple(_every_pair(np.logical_and, part) for part in (full[:num], full[num:]))

    def along_columns(self, axes):
        summed = self._order[: len(self._summed)]
        full = [np.full(self.kernel.shape[a], -1) if axes[a] is None else axes[a] for a in summed]
        return _every_pair(np.maximum, full)

    def num_positions(self, x):
        return math.prod(x.shape[self._read.index(c)] for c in self._places())

    def rows(self, x, positions):
        return self._flat(x, self._read, self._summed)[positions][None]

    def at(self, y, positions):
        return self._flat(y, self._made, self._out)[positions]

    def _places(self):
        """The axes that the kernel does not have, without that of the examples."""
        return [c for c in self._made[1:] if c in self._read]

    def _flat(self, x, letters, last):
        order = [letters.index(c) for c in (letters[0], *self._places(), *last)]
        x = _to_numpy(x).transpose(order)
        return x.reshape(len(x), -1, math.prod(x.shape[-len(last) :]))


class _Windowed(_Dense):
    """A row is what a window over the input holds."""

    def __init__(self, layer):
        super().__init__(layer)
        self._first = layer.data_format == "channels_first"

    def matrix(self):
        kernel = _to_numpy(self.kernel)
        return kernel.reshape(1, -1, kernel.shape[-1])

    def assign(self, matrix):
        self.kernel.assign(matrix[0].reshape(self.kernel.shape))

    def at(self, y, positions):
        return super().at(self._channels_last(_to_numpy(y)), positions)

    def _output_shape(self, x):
        shape = self.layer.compute_output_shape(tuple(x.shape))
        return (shape[0], *shape[2:], shape[1]) if self._first else shape

    def rows(self, x, positions):
        x = self._channels_last(_to_numpy(x))
        windows = self._windows(x)  # (examples, *space, channels, *window)
        num = windows.ndim // 2 - 1
        space = np.unravel_index(positions[1], windows.shape[1 : 1 + num])
        rows = windows[(positions[0], *space)]  # copied here, and only these
        return np.moveaxis(rows, 1, -1).reshape(1, len(rows), -1)

    def _channels_last(self, x):
        return np.moveaxis(x, 1, -1) if self._first else x

    def _windows(self, x):
        layer = self.layer
        sizes = tuple(1 + (k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True))
        pads = [self._pad(*args) for args in zip(x.shape[1:-1], sizes, layer.strides, strict=True)]
        x = np.pad(x, [(0, 0), *pads, (0, 0)])
        axes = tuple(range(1, x.ndim - 1))
        windows = np.lib.stride_tricks.sliding_window_view(x, sizes, axis=axes)
        steps = [slice(None, None, s) for s in layer.strides]
        taps = [slice(None, None, d) for d in layer.dilation_rate]
        return windows[(slice(None), *steps, slice(None), *taps)]

    def _pad(self, size, window, stride):
        if self.layer.padding == "valid":
            return 0, 0
        if self.layer.padding == "causal":
            return window - 1, 0
        total = max((-(-size // stride) - 1) * stride + window - size, 0)
        return total // 2, total - total // 2


class _Convolution(_Windowed):
    """Its groups are blocks: each maps its own channels to its own outputs."""

    def __init__(self, layer):
        super().__init__(layer)
        self.num_blocks = layer.groups

    def matrix(self):
        kernel = _to_numpy(self.kernel)
        blocks = np.split(kernel.reshape(-1, kernel.shape[-1]), self.num_blocks, axis=1)
        return np.stack(blocks)

    def assign(self, matrix):
        self.kernel.assign(np.concatenate(list(matrix), 1).reshape(self.kernel.shape))

    def rows(self, x, positions):
        rows = super().rows(x, positions)[0]
        blocks = rows.reshape(len(rows), -1, self.num_blocks, self.kernel.shape[-2])
        return np.moveaxis(blocks, 2, 0).reshape(self.num_blocks, len(rows), -1)


class _Separable(_Windowed):
    """Its pointwise kernel, which reads what the depthwise one makes."""

    weight = "pointwise_kernel"

    def rows(self, x, positions):
        layer = self.layer
        middle = ops.depthwise_conv(
            ops.convert_to_tensor(x),
            ops.convert_to_tensor(layer.depthwise_kernel),
            strides=layer.strides,
            padding=layer.padding,
            data_format=layer.data_format,
            dilation_rate=layer.dilation_rate,
        )
        return self.at(middle, positions)[None]


class _Transposed(_Windowed):
    """A convolution over the input with zeros between its values, the window turned around."""

    def matrix(self):
        kernel = _to_numpy(self.kernel)  # (*window, outputs, inputs)
        turned = np.flip(kernel, tuple(range(kernel.ndim - 2))).swapaxes(-1, -2)
        return turned.reshape(1, -1, turned.shape[-1])

    def assign(self, matrix):
        *window, outputs, inputs = self.kernel.shape
        turned = matrix[0].reshape(*window, inputs, outputs).swapaxes(-1, -2)
        self.kernel.assign(np.flip(turned, tuple(range(len(window)))))

    def _in_order(self, axes):
        *window, outputs, inputs = axes
        return [*window, inputs, outputs]

    def _windows(self, x):
        layer = self.layer
        spread = np.zeros((len(x), *_spread(x.shape[1:-1], layer.strides), x.shape[-1]), x.dtype)
        spread[(slice(None), *[slice(None, None, s) for s in layer.strides])] = x
        shape = (len(x), x.shape[-1], *x.shape[1:-1]) if self._first else x.shape
        outputs = self._output_shape(np.broadcast_to(0, shape))[1:-1]
        sizes = tuple(1 + (k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True))
        pads = []
        for size, out, window, stride in zip(spread.shape[1:-1], outputs, sizes, layer.strides, strict=True):
            before = window - 1 - self._pad(out, window, stride)[0]
            pads.append((before, max(out + window - 1 - size - before, 0)))
        spread = np.pad(spread, [(0, 0), *pads, (0, 0)])
        axes = tuple(range(1, x.ndim - 1))
        windows = np.lib.stride_tricks.sliding_window_view(spread, sizes, axis=axes)
        taps = [slice(None, None, d) for d in layer.dilation_rate]
        return windows[(slice(None), *[slice(out) for out in outputs], slice(None), *taps)]


def _letters(layer):
    """The letters of what an `EinsumDense` layer reads, of its kernel and of what it makes.

    `None` if that is no matrix product for each position of each example.
    """
    built_for = layer.get_build_config()["input_shape"]
    terms = parse_subscripts(layer.equation, (len(built_for), len(layer.kernel.shape)))
    if terms is None:
        return None
    read, kernel, made = (set(term) for term in terms)
    is_product = kernel <= read ^ made and read - kernel == made - kernel and terms[0][0] == terms[2][0]
    has_own = layer.bias is None or set(layer.bias_axes) <= kernel
    return terms if is_product and has_own and kernel & read and terms[0][0] not in kernel else None


def _every_pair(combine, axes):
    """Values of all combinations of positions along some axes, flattened."""
    return functools.reduce(lambda a, b: combine.outer(a, b).reshape(-1), axes)


def rows_an_example(num_columns, num_examples, thorough=True):
    """How many rows of each example a regression on so many columns takes, where there are as many."""
    per_column, least = _ROWS if thorough else _FEW_ROWS
    return -(-max(per_column * num_columns, least) // num_examples)


def some_positions(num_examples, num_positions, take, random):
    """Indices of so many random positions of each example: two int arrays, as `rows` wants them."""
    chosen = np.tile(np.arange(num_positions), (num_examples, 1))
    if take < num_positions:
        chosen = random.permuted(chosen, axis=1)[:, :take]
    return np.repeat(np.arange(num_examples), chosen.shape[1]), chosen.reshape(-1)


def _spread(shape, strides):
    return [(size - 1) * stride + 1 for size, stride in zip(shape, strides, strict=True)]


def _to_numpy(tensor):
    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))
