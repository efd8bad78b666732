"""Linear layers as matrix products: rows times matrix is the output of the layer."""

import keras
import numpy as np
import pytest
from helpers import BACKEND

from keras_taylor.reading.matmul_views import SampledPositions, matmul_view

layers = keras.layers
CASES = [
    (layers.Dense, (7,), {}, (5, 3)),
    (layers.Dense, (7,), {"activation": "relu"}, (3,)),
    (layers.Conv1D, (5, 4), {"padding": "causal"}, (12, 3)),
    (layers.Conv1D, (5, 3), {"strides": 3, "padding": "same", "use_bias": False}, (13, 3)),
    (layers.Conv2D, (5, 3), {"strides": 2, "padding": "same"}, (9, 10, 4)),
    (layers.Conv2D, (6, (3, 2)), {"groups": 2, "dilation_rate": 2}, (9, 10, 4)),
    (layers.Conv3D, (4, 2), {"padding": "same"}, (5, 6, 7, 3)),
    (layers.SeparableConv1D, (6, 3), {}, (8, 3)),
    (layers.SeparableConv2D, (6, 3), {"strides": 2, "padding": "same", "depth_multiplier": 2}, (8, 8, 3)),
    (layers.EinsumDense, ("abc,cde->abde", (None, 2, 5)), {"bias_axes": "de"}, (6, 4)),
    (layers.EinsumDense, ("abde,dec->abc", (None, 5)), {"bias_axes": "c", "activation": "relu"}, (6, 2, 3)),
    (layers.EinsumDense, ("abc,ecd->adbe", (5, None, 4)), {"bias_axes": "d"}, (6, 3)),
    (layers.EinsumDense, ("...x,xy->...y", (7,)), {"bias_axes": "y"}, (3, 2, 4)),
    (layers.Conv1DTranspose, (5, 2), {"strides": 3, "padding": "same"}, (6, 4)),
    (layers.Conv2DTranspose, (5, 3), {"strides": 2, "padding": "same"}, (6, 7, 4)),
    (layers.Conv2DTranspose, (5, 4), {"strides": 2}, (6, 7, 4)),
    (layers.Conv3DTranspose, (3, 2), {"strides": 2}, (3, 4, 3, 2)),
]
if BACKEND != "tensorflow":  # which runs these on GPUs only
    CASES += [
        (layers.Conv2D, (6, 3), {"padding": "same", "data_format": "channels_first"}, (4, 6, 7)),
        (layers.Conv2DTranspose, (5, 3), {"strides": 2, "data_format": "channels_first"}, (4, 5, 6)),
        (layers.Conv2DTranspose, (5, 3), {"padding": "same", "dilation_rate": 2}, (6, 7, 4)),
    ]


every_case = pytest.mark.parametrize(
    ("kind", "arguments", "options", "shape"),
    CASES,
    ids=[f"{c[0].__name__}-{i}" for i, c in enumerate(CASES)],
)


@every_case
def test_rows_times_matrix_is_the_output(kind, arguments, options, shape):
    layer = kind(*arguments, **options)
    random = np.random.default_rng(0)
    x = keras.ops.convert_to_tensor(random.normal(size=(3, *shape)).astype("float32"))
    y = layer(x)
    for weight in layer.weights:
        weight.assign(random.normal(size=weight.shape))
    y = layer(x)
    view = matmul_view(layer)
    places = random.integers(0, view.num_positions(x), 20)
    positions = SampledPositions(random.integers(0, 3, 20), places)
    blocks = zip(view.input_rows(x, positions), view.matrix(), strict=True)
    ours = np.concatenate([rows @ matrix for rows, matrix in blocks], axis=1)
    ours += view.bias()
    ours = keras.ops.convert_to_numpy(layer.activation(keras.ops.convert_to_tensor(ours)))
    np.testing.assert_allclose(ours, view.output_rows(y, positions), rtol=1e-4, atol=1e-4)


@every_case
def test_a_matrix_put_back_is_the_kernel(kind, arguments, options, shape):
    layer = kind(*arguments, **options)
    layer.build((None, *shape))
    view = matmul_view(layer)
    kernel, matrix = keras.ops.convert_to_numpy(view.kernel).copy(), view.matrix().copy()
    view.assign(2 * matrix)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(view.kernel), 2 * kernel)


def test_a_layer_that_does_not_mix_channels_has_no_view():
    assert matmul_view(layers.DepthwiseConv2D(3)) is None
    assert matmul_view(layers.BatchNormalization()) is None

    class Custom(layers.Conv2D):
        pass

    assert matmul_view(Custom(3, 3)) is None


@pytest.mark.parametrize(
    ("equation", "shape", "options"),
    [
        ("abc,bcd->abd", (6, 4), {}),
        ("abc,bd->abcd", (6, 4, 3), {}),
        ("abc,cd->abd", (6, 5), {"bias_axes": "b"}),
        ("ab,cd->abcd", (4, 3, 2), {}),
    ],
    ids=["each position its own matrix", "nothing summed over", "a bias for each position", "no shared axis"],
)
def test_an_einsum_that_is_not_a_matrix_product_has_no_view(equation, shape, options):
    layer = layers.EinsumDense(equation, shape, **options)
    layer.build((2, 6, 4) if "abc," in equation else (2, 4))
    assert matmul_view(layer) is None
