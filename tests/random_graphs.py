"""Random Functional models for the laws, out of some fifty kinds of steps.

A model is made from a description: a list of steps, each the name of a function of this file and numbers.
The function reads its choices from the numbers, one after the other: the tensor it takes, a width, a stride.
So any list of steps describes a model, a part of it too, and what Hypothesis shrinks stays valid:

>>> model = build([("image", (0,) * 12), ("conv", (0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0))])
"""

import itertools
import math

import keras
import numpy as np
import zoo
from hypothesis import strategies as st
from keras import layers, ops

NUM_CHOICES = 12  # numbers of a step; what reads more gets zeros
MOST_CHANNELS, MOST_ELEMENTS = 16, 1500
MOST_OUTPUTS = 3
STEPS = {}


class DoesNotFit(Exception):
    """A step cannot be applied to the tensor that it chose: it is left out."""


def step(function):
    STEPS[function.__name__] = function
    return function


class Choices:
    """The choices of one step.

    Args:
        tensors: The tensors made so far.
        inputs: Inputs of the model; a step may add one.
        numbers: What the choices are read from.
    """

    def __init__(self, tensors, inputs, numbers):
        self.tensors, self.inputs, self.numbers = tensors, inputs, iter(numbers)

    def of(self, options):
        """One of several; the first for the number 0."""
        options = list(options)
        return options[next(self.numbers, 0) % len(options)]

    def flag(self):
        return self.of((False, True))

    def width(self):
        return self.of(range(4, 9))

    def activation(self):
        return self.of(("linear", "relu", "sigmoid", "tanh", "gelu", "silu", "softplus", "elu"))

    def tensor(self, *ranks):
        """A tensor, the last one for the number 0; reshaped if none has such a rank."""
        fitting = [x for x in reversed(self.tensors) if not ranks or x.ndim in ranks]
        return self.of(fitting) if fitting else with_rank(self.of(reversed(self.tensors)), ranks[0])

    def channels(self, x, groups=1):
        """Number of the tensor's channels; refuses what cannot be divided."""
        if x.shape[-1] % groups or x.shape[-1] // groups < 1:
            raise DoesNotFit
        return x.shape[-1]

    def kernel(self, x, most=3):
        """A size of a window that fits into the spatial axes."""
        return self.of(range(1, 1 + min(most, *x.shape[1:-1])))

    def alike(self, x, axis=None):
        """A tensor of the shape of `x`, but for one axis: another one, or else a projection."""

        def is_alike(y):
            same = [k for k in range(x.ndim) if axis is None or k != axis % x.ndim]
            return y is not x and y.ndim == x.ndim and all(x.shape[k] == y.shape[k] for k in same)

        found = [y for y in reversed(self.tensors) if is_alike(y)]
        projected = self.flag() or not found
        return layers.Dense(x.shape[-1])(x) if projected else self.of(found)

    def new_input(self, shape, dtype=None):
        tensor = keras.Input(shape, dtype=dtype, name=f"input{len(self.inputs)}")
        self.inputs.append(tensor)
        return tensor


def with_rank(x, rank):
    """A tensor's values with another number of axes."""
    if x.ndim == rank:
        return x
    if x.ndim < rank:
        x = layers.RepeatVector(4)(x) if x.ndim == 2 else layers.Reshape((*x.shape[1:-1], 1, x.shape[-1]))(x)
    else:
        x = layers.Reshape((x.shape[1] * x.shape[2], *x.shape[3:]))(x) if x.ndim > 3 else ops.max(x, 1)
    return with_rank(x, rank)


def of_rank(x, name):
    """The layer class for this number of spatial axes, such as `Conv2D`; refuses where there is none."""
    cls = getattr(layers, name.format(x.ndim - 2), None)
    if cls is None:
        raise DoesNotFit
    return cls


# Inputs


@step
def image(choose):
    return choose.new_input(choose.of(((6, 6, 3), (8, 8, 3), (6, 7, 4))))


@step
def sequence(choose):
    return choose.new_input(choose.of(((6, 4), (7, 3))))


@step
def vector(choose):
    return choose.new_input((choose.of((5, 6)),))


@step
def volume(choose):
    return choose.new_input(choose.of(((4, 4, 4, 2), (3, 5, 4, 2))))


@step
def tokens(choose):
    indices = choose.new_input((choose.of((6, 5)),), "int32")
    if choose.flag():
        tied, masked = choose.flag(), choose.flag()
        return layers.ReversibleEmbedding(zoo.VOCABULARY, choose.width(), tied, mask_zero=masked)(indices)
    return layers.Embedding(zoo.VOCABULARY, choose.width(), mask_zero=choose.flag())(indices)


# Convolutions and what moves a window


@step
def conv(choose):
    x = choose.tensor(4, 3, 5)
    groups = choose.of((1, 1, 2, 4, x.shape[-1]))
    choose.channels(x, groups)
    filters = groups * choose.of((1, 2, 3)) if groups > 2 else 2 * choose.of((3, 2, 4))
    size, stride, dilation = choose.kernel(x), choose.of((1, 1, 2)), choose.of((1, 1, 2))
    padding = choose.of(("same", "valid", "causal" if x.ndim == 3 else "same"))
    if stride > 1 < dilation or (padding == "valid" and dilation * (size - 1) >= min(x.shape[1:-1])):
        dilation = 1
    return of_rank(x, "Conv{}D")(
        filters,
        size,
        stride,
        padding,
        dilation_rate=dilation,
        groups=groups,
        activation=choose.activation(),
        use_bias=not choose.flag(),
    )(x)


@step
def conv_norm(choose):
    x = choose.tensor(4, 3, 5)
    x = of_rank(x, "Conv{}D")(choose.width(), choose.kernel(x), padding="same", use_bias=False)(x)
    return layers.Activation(choose.activation())(layers.BatchNormalization()(x))


@step
def conv_transpose(choose):
    x = choose.tensor(4, 3, 5)
    size, stride, padding = choose.kernel(x), choose.of((1, 2)), choose.of(("same", "valid"))
    return of_rank(x, "Conv{}DTranspose")(
        choose.width(), max(size, stride), stride, padding, activation=choose.activation()
    )(x)


def depth_by_depth(choose, x, name, *filters):
    """A convolution of each channel by itself; with a number of filters, a pointwise one follows."""
    return of_rank(x, name)(
        *filters,
        choose.kernel(x),
        choose.of((1, 2)),
        choose.of(("same", "valid")),
        depth_multiplier=choose.of((1, 2)),
        activation=choose.activation(),
    )(x)


@step
def depthwise(choose):
    x = choose.tensor(4, 3)
    return depth_by_depth(choose, x, "DepthwiseConv{}D")


@step
def separable(choose):
    x = choose.tensor(4, 3)
    return depth_by_depth(choose, x, "SeparableConv{}D", choose.width())


@step
def pooling(choose):
    x = choose.tensor(4, 3, 5)
    name = choose.of(("MaxPooling{}D", "AveragePooling{}D"))
    return of_rank(x, name)(choose.kernel(x, 2), choose.of((None, 1, 2)), choose.of(("valid", "same")))(x)


@step
def global_pooling(choose):
    x = choose.tensor(4, 3, 5)
    name = choose.of(("GlobalAveragePooling{}D", "GlobalMaxPooling{}D"))
    return of_rank(x, name)(keepdims=choose.flag())(x)


@step
def adaptive_pooling(choose):
    x = choose.tensor(4, 3, 5)  # the average only: on TensorFlow, Keras' largest value may end the process
    return of_rank(x, "AdaptiveAveragePooling{}D")(choose.of((2, 1)))(x)


@step
def upsampling(choose):
    x = choose.tensor(4, 3, 5)
    if x.ndim == 4 and choose.flag():
        return layers.UpSampling2D(2, interpolation="bilinear")(x)
    return of_rank(x, "UpSampling{}D")(2)(x)


@step
def zero_padding(choose):
    x = choose.tensor(4, 3, 5)
    return of_rank(x, "ZeroPadding{}D")(choose.of((1, 2)))(x)


@step
def cropping(choose):
    x = choose.tensor(4, 3, 5)
    if min(x.shape[1:-1]) < 3:
        raise DoesNotFit
    return of_rank(x, "Cropping{}D")(1)(x)


# What reads sequences


def recurrent_layer(choose, **arguments):
    cls = choose.of((layers.LSTM, layers.GRU, layers.SimpleRNN))
    more = {"reset_after": choose.flag()} if cls is layers.GRU else {}
    activation = choose.of(("tanh", "relu", "sigmoid"))
    return cls(choose.of((4, 3, 5)), activation, return_sequences=not choose.flag(), **more, **arguments)


@step
def recurrent(choose):
    return recurrent_layer(choose, go_backwards=choose.flag())(choose.tensor(3))


@step
def bidirectional(choose):
    mode = choose.of(("concat", "sum", "ave", "mul"))
    return layers.Bidirectional(recurrent_layer(choose), merge_mode=mode)(choose.tensor(3))


@step
def encoder_decoder(choose):
    cls, units = choose.of((layers.GRU, layers.LSTM)), choose.of((4, 3))
    _, *states = cls(units, return_state=True)(choose.tensor(3))
    return cls(units, return_sequences=True)(choose.tensor(3), initial_state=states)


@step
def cells(choose):
    cls = choose.of((layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell))
    return layers.RNN(cls(choose.of((4, 5))), return_sequences=choose.flag())(choose.tensor(3))


@step
def conv_lstm(choose):
    x = choose.tensor(5, 4)
    layer = layers.ConvLSTM2D if x.ndim == 5 else layers.ConvLSTM1D
    size, padding = choose.of((1, 2)), choose.of(("same", "valid"))
    if size > min(x.shape[2:-1]):
        raise DoesNotFit
    return layer(choose.of((3, 4)), size, padding=padding, return_sequences=choose.flag())(x)


@step
def time_distributed(choose):
    x = choose.tensor(3, 4, 5)
    if x.ndim == 5 and choose.flag():
        return layers.TimeDistributed(layers.Conv2D(choose.width(), 1, activation=choose.activation()))(x)
    layer = choose.of((layers.BatchNormalization, lambda: layers.Dense(5, activation="relu")))
    return layers.TimeDistributed(layer())(x)


@step
def multi_head_attention(choose):
    x = choose.tensor(3)
    y = choose.tensor(3) if choose.flag() else x
    layer = layers.MultiHeadAttention(
        choose.of((2, 3, 4)),
        choose.of((2, 3)),
        value_dim=choose.of((None, 2)),
        use_bias=not choose.flag(),
        dropout=choose.of((0.0, 0.1)),
        output_shape=choose.of((None, 5, 4)),
        use_gate=choose.flag(),
    )
    more = {"use_causal_mask": True} if choose.flag() else {}
    return residual(choose, x, layer(x, y, **more))


@step
def group_query_attention(choose):
    x = choose.tensor(3)
    y = choose.alike(x, 1) if choose.flag() else x
    num_heads, num_keys = choose.of(((4, 2), (2, 2), (3, 1), (6, 3)))
    layer = layers.GroupQueryAttention(2, num_heads, num_keys, use_gate=choose.flag())
    more = {"use_causal_mask": True} if choose.flag() else {}
    return residual(choose, x, layer(x, y, **more))


@step
def attention(choose):
    x = choose.tensor(3)
    y = choose.alike(x, 1)
    if choose.flag():
        return layers.AdditiveAttention()([x, y])
    return layers.Attention(use_scale=choose.flag(), score_mode=choose.of(("dot", "concat")))([x, y])


@step
def attention_parts(choose):
    x, num = choose.tensor(3), choose.of((2, 3))
    q, k, v = ops.split(layers.Dense(6 * num)(x), 3, axis=-1)
    q, k, v = (ops.transpose(layers.Reshape((x.shape[1], num, 2))(t), (0, 2, 1, 3)) for t in (q, k, v))
    scores = ops.softmax(ops.matmul(q, ops.swapaxes(k, -1, -2)))
    y = layers.Reshape((x.shape[1], 2 * num))(ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3)))
    return residual(choose, x, layers.Dense(x.shape[-1])(y))


@step
def fused_attention(choose):
    x, num = choose.tensor(3), choose.of((3, 4))
    q, k, v = (layers.EinsumDense("abc,cde->abde", (x.shape[1], num, 2), bias_axes="de")(x) for _ in range(3))
    y = ops.dot_product_attention(q, k, v, is_causal=choose.flag())
    return layers.EinsumDense("abcd,cde->abe", (x.shape[1], choose.width()), bias_axes="e")(y)


@step
def masking(choose):
    return layers.Masking()(choose.tensor(3))


# Matrices


@step
def dense(choose):
    return layers.Dense(choose.width(), choose.activation(), use_bias=not choose.flag())(choose.tensor())


@step
def einsum_dense(choose):
    x = choose.tensor(3, 4)
    width, size = choose.width(), choose.of((2, 3))
    if x.ndim == 4:
        first, second, channels = x.shape[1:]
        equations = (
            ("...x,xy->...y", width),
            ("abcd,de->abce", (first, second, width)),
            ("abcd,ce->abed", (first, width, channels)),
        )
        return layers.EinsumDense(*choose.of(equations))(x)
    equation, shape, bias = choose.of(
        (
            ("abc,cd->abd", (x.shape[1], width), "d"),
            ("abc,cde->abde", (x.shape[1], width, size), "de"),
            ("abc,bcd->abd", (x.shape[1], width), None),
            ("abc,bd->adc", (width, x.shape[-1]), None),  # no bias: see `backend_faults`
        )
    )
    return layers.EinsumDense(equation, shape, activation=choose.activation(), bias_axes=bias)(x)


@step
def einsum(choose):
    x = choose.tensor(3)
    y = choose.alike(x)
    return ops.einsum(choose.of(("abc,abc->abc", "abc,adc->abd", "abc,abd->acd", "abc,abc->ac")), x, y)


@step
def matmul(choose):
    x = choose.tensor(3, 4)
    axes = (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2)
    y = ops.transpose(choose.alike(x), axes)
    return ops.matmul(x, y) if choose.flag() else ops.matmul(y, x)


@step
def dot(choose):
    x = choose.tensor(3)
    return layers.Dot(choose.of((2, 1)))([x, choose.alike(x)])


# Elementwise


@step
def activation(choose):
    x = choose.tensor()
    layer = choose.of(
        (layers.ReLU, layers.LeakyReLU, lambda: layers.Activation(choose.activation()), layers.PReLU)
    )
    return layer()(x)


@step
def shared_prelu(choose):
    x = choose.tensor(3, 4, 5)
    return layers.PReLU(shared_axes=list(range(1, x.ndim - choose.of((1, 0)))))(x)


@step
def softmax(choose):
    x = choose.tensor(3, 4)
    if getattr(x, "_keras_mask", None) is not None:
        raise DoesNotFit  # Keras' `Softmax` takes masks of its input's shape only
    return layers.Softmax(choose.of((1, -1)))(x)


@step
def dropout(choose):
    layer = choose.of((layers.Dropout, layers.GaussianNoise, layers.AlphaDropout, layers.GaussianDropout))
    return layer(0.3)(choose.tensor())


@step
def arithmetic(choose):
    x = choose.tensor()
    random = np.random.default_rng(choose.of(range(9)))
    constant = random.uniform(0.5, 1.5, x.shape[-1]).astype("float32")
    everywhere = random.uniform(0.5, 1.5, x.shape[1:]).astype("float32")
    return choose.of(
        (
            lambda: x * constant,
            lambda: ops.subtract(constant, x),
            lambda: x + everywhere,
            lambda: ops.maximum(x, everywhere),
            lambda: ops.clip(2 * x, -1, 1) / 2,
            lambda: ops.where(x > 0, x, 0.3 * x),
            lambda: ops.sqrt(ops.square(x) + 1),
            lambda: 1 - ops.sigmoid(x),
        )
    )()


@step
def merge(choose):
    x = choose.tensor()
    y = choose.alike(x)
    if choose.flag() and x.ndim > 2:
        y = ops.mean(y, axis=choose.of(range(1, x.ndim - 1)), keepdims=True)
    layer = choose.of(
        (layers.Add, layers.Multiply, layers.Maximum, layers.Subtract, layers.Average, layers.Minimum)
    )
    return layer()([x, y])


def residual(choose, x, y):
    """The sum of the two if their shapes agree and the step wants it."""
    return layers.Add()([x, y]) if choose.flag() and x.shape == y.shape else y


@step
def heat(choose):
    """All channels times one."""
    x = choose.tensor()
    return x * layers.Dense(1, "sigmoid")(x)


@step
def squeeze_excite(choose):
    x = choose.tensor(4, 3)
    s = ops.mean(x, axis=tuple(range(1, x.ndim - 1)))
    s = layers.Dense(x.shape[-1], "sigmoid")(layers.Dense(choose.width(), "relu")(s))
    return layers.Multiply()([x, layers.Reshape((*(1,) * (x.ndim - 2), x.shape[-1]))(s)])


# Normalization


@step
def batch_norm(choose):
    x = choose.tensor()
    axis = choose.of((-1, -1, *range(1, x.ndim)))
    return layers.BatchNormalization(axis, scale=not choose.flag(), center=not choose.flag())(x)


@step
def layer_norm(choose):
    x = choose.tensor()
    cls = choose.of((layers.LayerNormalization, layers.RMSNormalization, layers.UnitNormalization))
    axes = (-1, 1) if cls is layers.UnitNormalization else (-1, [-2, -1] if x.ndim > 2 else -1)
    return cls(axis=choose.of(axes))(x)


@step
def group_norm(choose):
    x = choose.tensor(4, 3)
    groups = choose.of((2, 1, -1, 4))
    choose.channels(x, abs(groups))
    return layers.GroupNormalization(groups)(x)


@step
def rescaling(choose):
    return layers.Rescaling(0.5, choose.of((0.0, 0.1)))(choose.tensor())


@step
def spectral_normalization(choose):
    return layers.SpectralNormalization(layers.Dense(choose.width()))(choose.tensor())


# Shapes


@step
def reshape(choose):
    x = choose.tensor()
    *sizes, channels = x.shape[1:]
    half = [(*sizes, 2, channels // 2), (*sizes, channels // 2, 2)] if channels % 2 == 0 else []
    merged = [(*sizes[:-1], sizes[-1] * channels), (math.prod(sizes), channels)] if sizes else []
    return layers.Reshape(choose.of([(*sizes, 1, channels), *merged, *half]))(x)


@step
def flatten(choose):
    return layers.Dense(choose.width(), choose.activation())(layers.Flatten()(choose.tensor(3, 4, 5)))


@step
def permute(choose):
    x = choose.tensor(3, 4, 5)
    orders = list(itertools.permutations(range(1, x.ndim)))[1:]
    return layers.Permute(choose.of(orders))(x)


@step
def repeat_vector(choose):
    return layers.RepeatVector(choose.of((3, 4)))(choose.tensor(2))


@step
def concatenate(choose):
    x = choose.tensor()
    axis = choose.of((-1, -1, 1))
    return layers.Concatenate(axis)([x, choose.alike(x, axis)])


@step
def split(choose):
    x = choose.tensor()
    a, b = ops.split(x, 2 if x.shape[-1] % 2 == 0 else [1], axis=-1)
    if a.shape == b.shape and choose.flag():
        return a * ops.sigmoid(b)
    return ops.concatenate([b, a] if choose.flag() else [a, b, a], axis=-1)


@step
def parts(choose):
    """Slices of equal size, in another order."""
    x = choose.tensor()
    size = x.shape[-1] // 2
    if not size:
        raise DoesNotFit
    first, last = x[..., :size], x[..., -size:]
    return choose.of(
        (
            lambda: first + last,
            lambda: ops.stack([first, last], axis=-1),
            lambda: layers.Concatenate()([last, x]),
            lambda: first,
            lambda: x[:, 1:] if x.ndim > 2 and x.shape[1] > 1 else last,
            lambda: x[:, 0] if x.ndim > 2 else first,
        )
    )()


@step
def pad(choose):
    x = choose.tensor()
    widths = [(0, 0)] * x.ndim
    widths[choose.of((x.ndim - 1, 1))] = choose.of(((1, 1), (0, 2), (2, 0)))
    return ops.pad(x, widths)


@step
def tile(choose):
    x = choose.tensor()
    axis = choose.of((x.ndim - 1, 1))
    if choose.flag():
        return ops.repeat(x, 2, axis=axis)
    return ops.tile(x, [2 if k == axis else 1 for k in range(x.ndim)])


@step
def roll(choose):
    x = choose.tensor()
    axis = choose.of((1, -1)) if x.ndim > 2 else -1
    function = choose.of((ops.flip, lambda x, axis: ops.roll(x, 1, axis=axis), ops.cumsum))
    return function(x, axis=axis)


@step
def channel_shuffle(choose):
    x = choose.tensor(4, 3)
    channels, sizes = choose.channels(x, 2), x.shape[1:-1]
    x = layers.Reshape((*sizes, 2, channels // 2))(x)
    x = layers.Permute((*range(1, len(sizes) + 1), len(sizes) + 2, len(sizes) + 1))(x)
    return layers.Reshape((*sizes, channels))(x)


@step
def reduce(choose):
    x = choose.tensor(3, 4, 5)
    function = choose.of((ops.mean, ops.max, ops.sum, ops.std))
    return function(x, axis=choose.of(range(1, x.ndim)), keepdims=choose.flag())


# Several layers as one, and layers at several places


@step
def shared(choose):
    x = choose.tensor()
    layer = layers.Dense(x.shape[-1], choose.activation())
    return layer(layer(x)) if choose.flag() else layers.Subtract()([layer(x), layer(choose.alike(x))])


@step
def shared_conv(choose):
    x = choose.tensor(4, 3)
    layer = of_rank(x, "Conv{}D")(x.shape[-1], choose.kernel(x), padding="same")
    norm = layers.BatchNormalization()
    return norm(layer(norm(layer(x))))


def unmasked(x):
    """The tensor, refused if it has a mask: sub-models beside attention, the last test of `test_masks.py`."""
    if getattr(x, "_keras_mask", None) is not None:
        raise DoesNotFit
    return x


@step
def nested(choose):
    x = unmasked(choose.tensor())
    y = inner = keras.Input(x.shape[1:])
    y = layers.Dense(choose.width(), choose.activation())(y)
    y = layers.Dense(x.shape[-1])(layers.BatchNormalization()(y))
    model = keras.Model(inner, residual(choose, inner, y))
    return model(model(x)) if choose.flag() else model(x)


@step
def nested_sequential(choose):
    x = unmasked(choose.tensor())
    inner = [layers.Dense(choose.width(), "relu"), layers.Dropout(0.1), layers.Dense(choose.width())]
    return keras.Sequential([keras.Input(x.shape[1:]), *inner])(x)


@step
def two_heads(choose):
    """A sub-model with two inputs and two outputs."""
    x = unmasked(choose.tensor())
    first, second = keras.Input(x.shape[1:]), keras.Input(x.shape[1:])
    y = layers.Dense(choose.width(), "relu")(layers.Add()([first, second]))
    model = keras.Model(
        [first, second], [y, layers.Dense(choose.width())(layers.Multiply()([first, second]))]
    )
    return layers.Concatenate()(model([x, unmasked(choose.alike(x))]))


@step
def block(choose):
    x = choose.tensor(4)
    if choose.flag():
        return zoo.Block(choose.width(), project=True)(x)
    layer = zoo.Block(x.shape[-1])
    return layer(layer(x)) if choose.flag() else layer(x)


@step
def unknown(choose):
    return zoo.Sorted()(choose.tensor())


@step
def custom_normalization(choose):
    return zoo.Normalized()(choose.tensor(4))


@step
def own_function(choose):
    x = choose.tensor()
    return layers.Lambda(zoo.doubled)(x) if choose.flag() else layers.Dense(6, activation=zoo.doubled)(x)


@step
def reduced_attention(choose):
    x = choose.tensor(4)
    size = min(x.shape[1:3]) // 2
    x = layers.Conv2D(4, size, size, activation="relu")(x) if size else x
    if x.shape[1:] != (2, 2, 4):
        raise DoesNotFit
    x = layers.Reshape((4, 4))(x)
    return layers.Add()([x, zoo.ReducedAttention(2, 4)(x)])


INPUTS = ("image", "sequence", "tokens", "vector", "volume")


def descriptions():
    """A strategy: lists of steps, of which the first makes an input."""
    numbers = st.tuples(*[st.integers(0, 59)] * NUM_CHOICES)
    first = st.tuples(st.sampled_from(INPUTS), numbers)
    others = st.lists(st.tuples(st.sampled_from(list(STEPS)), numbers), min_size=1, max_size=9)
    return st.builds(lambda one, more: [one, *more], first, others)


def build(description):
    """The model of a description, with random weights and statistics."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    tensors, inputs = [], []
    with zoo.without_initializers():
        for name, numbers in description:
            known = len(inputs)
            try:
                made = STEPS[name](Choices(tensors, inputs, numbers))
            except DoesNotFit:
                continue
            if made.shape[-1] <= MOST_CHANNELS and math.prod(made.shape[1:]) <= MOST_ELEMENTS:
                tensors.append(made)
            else:
                del inputs[known:]
        choose = Choices(tensors, inputs, description[-1][1][::-1])
        outputs = [_headed(x, choose) for x in _unread(tensors)[-MOST_OUTPUTS:]]
        network = _model_of(inputs, outputs, choose)
    return zoo.randomized(network)


def _unread(tensors):
    """The tensors that no later one is made from."""
    read = set()
    for x in tensors:
        _collect_ancestors(x, read)
    return [x for x in tensors if id(x) not in read]


def _collect_ancestors(x, found):
    history = x._keras_history
    for parent in history.operation._inbound_nodes[history.node_index].input_tensors:
        if id(parent) not in found:
            found.add(id(parent))
            _collect_ancestors(parent, found)


def _headed(x, choose):
    """An output: what was made, or what a head makes of it."""
    head = choose.of(("mean", "flatten", "dense", "none"))
    if head == "mean" and x.ndim > 2:
        x = ops.mean(x, axis=tuple(range(1, x.ndim - 1)))
    elif head == "flatten":
        x = layers.Flatten()(x)
    return x if head == "none" else layers.Dense(choose.of((3, 2)))(x)


def _model_of(inputs, outputs, choose):
    """The model, with dicts, lists or single tensors; inputs that no output needs are left out."""
    needed = set()
    for y in outputs:
        needed.add(id(y))
        _collect_ancestors(y, needed)
    inputs = [x for x in inputs if id(x) in needed]
    if choose.flag():
        inputs = {x.name: x for x in inputs}
    elif len(inputs) == 1:
        (inputs,) = inputs
    if choose.flag():
        outputs = {f"output{k}": y for k, y in enumerate(outputs)}
    elif len(outputs) == 1:
        (outputs,) = outputs
    return keras.Model(inputs, outputs)
