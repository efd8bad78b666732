"""Faults of backends that end the process, and how models keep out of them."""

from collections.abc import Iterable

import keras

from keras_taylor.support.types import Tensor

_REGISTER_WIDTH = 16  # numbers of 4 bytes that the largest register of a CPU holds


def avoid_faults(layers: Iterable[keras.Layer]) -> None:
    """Makes layers compute the same in another way where the backend would end the process.

    On PyTorch (2.13, oneDNN 3.12, on a CPU), the derivative of a 1x1 convolution by its kernel writes beyond
    its memory, if the convolution has a stride and fewer input channels than a register holds. Pruned
    shortcuts get such widths. These layers drop the positions that they skip before the convolution, which
    then has no stride. The values are the same to the bit.

    Args:
        layers: Layers that a model was built from. They are changed in place. A file holds nothing of this.
    """
    if keras.backend.backend() != "torch":
        return
    for layer in layers:
        is_plain = isinstance(layer, keras.layers.Conv2D) and not _overrides_convolution(layer)
        if is_plain and set(layer.kernel_size) == {1} != set(layer.strides) and layer.groups == 1:
            _skip_positions_first(layer)


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
