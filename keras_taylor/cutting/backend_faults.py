"""Faults of backends, and how models keep out of them, or what is said of them."""

import warnings
from collections.abc import Iterable

import keras

from keras_taylor.support.types import Tensor

_REGISTER_WIDTH = 16  # numbers of 4 bytes that the largest register of a CPU holds


def avoid_faults(layers: Iterable[keras.Layer]) -> None:
    """Makes layers compute in another way where the backend would end the process; warns of wrong values.

    On PyTorch (2.13, oneDNN 3.12, on a CPU), the derivative of a 1x1 convolution by its kernel writes beyond
    its memory, if the convolution has a stride and fewer input channels than a register holds. Pruned
    shortcuts get such widths. These layers drop the positions that they skip before the convolution, which
    then has no stride. The values are the same to the bit.

    On TensorFlow, Keras (3.15) takes a bias of one axis for one of the last axis, if both axes are as long.

    Args:
        layers: Layers that a model was built from. They are changed in place. A file holds nothing of this.
    """
    guard = {"tensorflow": _warn_of_bias_axis, "torch": _avoid_narrow_strides}.get(keras.backend.backend())
    if guard is not None:
        for layer in layers:
            guard(layer)


def _avoid_narrow_strides(layer: keras.Layer) -> None:
    """Makes a 1x1 convolution with a stride run without it, where it is narrow."""
    is_plain = isinstance(layer, keras.layers.Conv2D) and not _overrides_convolution(layer)
    if is_plain and set(layer.kernel_size) == {1} != set(layer.strides) and layer.groups == 1:
        _skip_positions_first(layer)


def _warn_of_bias_axis(layer: keras.Layer) -> None:
    """Warns if Keras' `ops.add` on TensorFlow takes a bias for one of the last axis."""
    if not isinstance(layer, keras.layers.EinsumDense) or layer.bias is None:
        return
    sizes = [size for size in layer.bias.shape if size > 1]
    if len(sizes) == 1 and layer.bias.shape[-1] == 1 and layer.partial_output_shape[-1] == sizes[0]:
        warnings.warn(
            f"Keras on TensorFlow adds the bias of '{layer.name}' along the last axis, which is as long as "
            f"the axis that it is for ({sizes[0]}). Its values are wrong there, not on other backends: keep "
            "another number of its channels.",
            stacklevel=2,
        )


def _overrides_convolution(layer: keras.Layer) -> bool:
    return type(layer).convolution_op is not keras.layers.Conv2D.convolution_op


def _skip_positions_first(layer: keras.layers.Conv2D) -> None:
    """Makes a 1x1 convolution of few channels run without its stride, on the positions that it reads."""
    space = [slice(None, None, stride) for stride in layer.strides]
    is_first = layer.data_format == "channels_first"
    positions = (slice(None), slice(None), *space) if is_first else (slice(None), *space)
    original = layer.convolution_op

    def convolution_op(inputs: Tensor, kernel: Tensor) -> Tensor:
        if kernel.shape[-2] >= _REGISTER_WIDTH:
            return original(inputs, kernel)
        return keras.ops.conv(inputs[positions], kernel, padding=layer.padding, data_format=layer.data_format)

    vars(layer)["convolution_op"] = convolution_op  # Keras' own tracking of attributes does not see it
