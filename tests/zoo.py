"""Small models, each a trap by name; every law is tested on all of them.

The file imports Keras only, so that a fresh process can load the custom layer
of a saved model without the package under test.
"""

import contextlib
from unittest import mock

import keras
import numpy as np
from keras import layers, ops

BUILDERS = {}
SIZE = (8, 8, 3)
VOCABULARY = 11


def model(builder):
    BUILDERS[builder.__name__] = builder
    return builder


@contextlib.contextmanager
def without_initializers():
    """Within it new weights are zero: they are overwritten, and JAX compiles an initializer a shape."""
    add_weight = layers.Layer.add_weight

    def add_zeros(layer, shape=None, initializer=None, **arguments):
        return add_weight(layer, shape, lambda shape, dtype=None: np.zeros(shape, "float32"), **arguments)

    with mock.patch.object(layers.Layer, "add_weight", add_zeros):
        yield


def build(name, seed=0):
    """A model of the zoo with random weights and BatchNormalization statistics."""
    with without_initializers():
        network = BUILDERS[name]()
    return randomized(network, seed)


def randomized(network, seed=0):
    """Gives every weight a random value, so that nothing is trivially equal."""
    random = np.random.default_rng(seed)
    for weight in network.weights:
        if "int" in weight.dtype:
            continue
        if weight.name in ("gamma", "moving_variance", "variance"):
            value = random.uniform(0.5, 1.5, weight.shape)
        else:
            fan_in = max(1, int(np.prod(weight.shape[:-1])))
            value = random.normal(0, 1, weight.shape) * (0.5 if fan_in == 1 else fan_in**-0.5)
        weight.assign(value.astype("float32"))
    return network


def inputs_of(network, num=4, seed=1):
    """Random inputs in the model's own structure; numbers below the vocabulary where it embeds them."""
    random = np.random.default_rng(seed)

    def shape_of(tensor):
        return (num, *(7 if size is None else size for size in tensor.shape[1:]))

    def array(tensor):
        if "int" in tensor.dtype:
            return random.integers(0, VOCABULARY, shape_of(tensor)).astype(tensor.dtype)
        return random.normal(size=shape_of(tensor)).astype("float32")

    if not hasattr(network, "inputs"):
        return random.normal(size=(num, *SIZE)).astype("float32")
    return keras.tree.map_structure(array, getattr(network, "_inputs_struct", network.inputs[0]))


def conv(x, filters, name, kernel=3, activation="relu", **arguments):
    """Convolution, BatchNormalization, activation."""
    x = layers.Conv2D(filters, kernel, padding="same", use_bias=False, name=name, **arguments)(x)
    x = layers.BatchNormalization(name=name + "_bn")(x)
    return layers.Activation(activation, name=name + "_act")(x) if activation else x


def classified(inputs, x):
    """The model with a pooled and dense head."""
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


@model
def chain():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "conv1")
    x = layers.MaxPooling2D(name="down")(x)
    x = layers.Conv2D(8, 3, activation="sigmoid", name="conv2", kernel_regularizer="l2")(x)
    return classified(inputs, layers.Dropout(0.3, name="drop")(x))


@model
def residual():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "stem")
    for k in range(2):
        y = conv(x, 5, f"block{k}_a")
        y = conv(y, 6, f"block{k}_b", activation=None)
        x = layers.ReLU(name=f"block{k}_out")(layers.Add(name=f"block{k}_add")([x, y]))
    return classified(inputs, x)


@model
def bottleneck():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 8, "stem")
    y = conv(x, 4, "reduce", kernel=1)
    y = conv(y, 4, "middle", strides=2)
    y = conv(y, 12, "expand", kernel=1, activation=None)
    shortcut = conv(x, 12, "shortcut", kernel=1, strides=2, activation=None)
    return classified(inputs, ops.relu(y + shortcut))


@model
def zero_pad_shortcut():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 4, "stem")
    for k, width in enumerate((8, 12)):
        y = conv(x, width, f"block{k}_a", strides=2)
        y = conv(y, width, f"block{k}_b", activation=None)
        x = ops.pad(x[:, ::2, ::2], [(0, 0), (0, 0), (0, 0), (2, 2)])
        x = layers.ReLU(name=f"block{k}_out")(layers.Add(name=f"block{k}_add")([x, y]))
    return classified(inputs, x)


@model
def concat():
    x = inputs = keras.Input(SIZE)
    a, b = conv(x, 4, "left"), conv(x, 5, "right", kernel=1)
    x = layers.Concatenate(name="join")([a, b, x])
    return classified(inputs, conv(x, 6, "after"))


@model
def dense_block():
    x = inputs = keras.Input(SIZE)
    x = layers.Conv2D(4, 3, padding="same", name="stem")(x)
    for k in range(3):
        y = layers.ReLU()(layers.BatchNormalization(name=f"norm{k}")(x))
        y = layers.Conv2D(3, 3, padding="same", name=f"grow{k}")(y)
        x = layers.Concatenate(name=f"concat{k}")([x, y])
    return classified(inputs, conv(x, 6, "transition", kernel=1))


@model
def squeeze_excite():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "conv1")
    s = layers.GlobalAveragePooling2D()(x)
    s = layers.Reshape((1, 1, 6), name="reshape")(s)
    s = layers.Conv2D(3, 1, activation="relu", name="squeeze")(s)
    s = layers.Conv2D(6, 1, activation="sigmoid", name="excite")(s)
    x = layers.Multiply(name="scale")([x, s])
    return classified(inputs, conv(x, 5, "conv2"))


@model
def inverted_residual():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 4, "stem")
    y = conv(x, 8, "expand", kernel=1, activation="relu6")
    y = layers.ZeroPadding2D(1, name="border")(y)
    y = layers.DepthwiseConv2D(3, use_bias=False, name="depthwise")(y)
    y = layers.Activation("silu")(layers.BatchNormalization(name="depthwise_bn")(y))
    y = conv(y, 4, "project", kernel=1, activation=None)
    return classified(inputs, layers.Add()([x, y]))


@model
def depthwise():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "conv1", activation="sigmoid")
    x = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(x)
    return classified(inputs, conv(x, 5, "conv2", kernel=1))


@model
def depth_multiplier():
    x = inputs = keras.Input(SIZE)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="of_inputs")(x)
    x = conv(x, 4, "conv1")
    x = layers.DepthwiseConv2D(3, depth_multiplier=3, name="depthwise")(x)
    return classified(inputs, conv(x, 5, "conv2", kernel=1))


@model
def separable():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "conv1")
    x = layers.SeparableConv2D(8, 3, depth_multiplier=2, name="separable1")(x)
    x = layers.SeparableConv2D(5, 3, activation="relu", use_bias=False, name="separable2")(x)
    return classified(inputs, x)


@model
def grouped():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 16, "conv1")
    x = conv(x, 12, "grouped", groups=4)
    x = layers.Conv2D(24, 3, groups=12, activation="relu", name="one_channel_groups")(x)
    return classified(inputs, conv(x, 6, "conv2", kernel=1))


@model
def dilated():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "conv1", dilation_rate=2)
    x = layers.Conv2D(5, 3, dilation_rate=2, name="conv2", activation="tanh")(x)
    return classified(inputs, layers.AveragePooling2D(2)(x))


@model
def channel_shuffle():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 8, "conv1")
    x = conv(x, 8, "grouped1", kernel=1, groups=2)
    x = layers.Reshape((8, 8, 2, 4))(x)
    x = layers.Permute((1, 2, 4, 3))(x)
    x = layers.Reshape((8, 8, 8))(x)
    x = conv(x, 8, "grouped2", groups=2)
    return classified(inputs, conv(x, 6, "conv2"))


@model
def shared_layer():
    x = inputs = keras.Input(SIZE)
    shared = layers.Conv2D(6, 3, padding="same", activation="relu", name="shared")
    norm = layers.BatchNormalization(name="shared_bn")
    x = conv(x, 6, "conv1")
    for _ in range(3):
        x = norm(shared(x))
    return classified(inputs, x)


@model
def siamese():
    left, right = keras.Input(SIZE, name="left"), keras.Input(SIZE, name="right")
    x = inner = keras.Input(SIZE)
    x = conv(x, 6, "conv1")
    x = layers.Dense(5, name="embed")(layers.GlobalMaxPooling2D()(x))
    encoder = keras.Model(inner, x, name="encoder")
    x = layers.Subtract(name="difference")([encoder(left), encoder(right)])
    return keras.Model([left, right], layers.Dense(2, name="head")(ops.absolute(x)))


@model
def two_inputs():
    image, numbers = keras.Input(SIZE, name="image"), keras.Input((5,), name="numbers")
    x = conv(image, 6, "conv1")
    y = layers.Dense(6, activation="relu", name="dense1")(numbers)
    x = layers.Multiply()([x, layers.Reshape((1, 1, 6))(y)])
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), y])
    return keras.Model([image, numbers], layers.Dense(2, name="head")(x))


@model
def two_outputs():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "conv1")
    mask = layers.Conv2D(2, 1, name="mask")(conv(x, 4, "conv2"))
    label = layers.Dense(3, name="label")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, [mask, label])


@model
def output_in_the_middle():
    x = inputs = keras.Input(SIZE)
    features = conv(x, 5, "features")
    x = conv(conv(features, 6, "conv1"), 5, "conv2")
    pooled = layers.GlobalAveragePooling2D()(layers.Add()([x, features]))
    return keras.Model(inputs, [features, layers.Dense(3, name="head")(pooled)])


@model
def nested_backbone():
    x = inner = keras.Input(SIZE)
    x = conv(x, 6, "conv1")
    backbone = keras.Model(inner, conv(x, 8, "conv2", strides=2), name="backbone")
    inputs = keras.Input(SIZE)
    x = backbone(inputs, training=False)
    return classified(inputs, conv(x, 5, "neck"))


@model
def nested_three_deep():
    block = keras.Sequential([keras.Input((8, 8, 6)), layers.Conv2D(6, 3, padding="same", name="conv")])
    block.name = "block"
    x = inner = keras.Input((8, 8, 6))
    x = layers.Add()([block(x), x])
    stage = keras.Model(inner, conv(block(x), 6, "after"), name="stage")
    x = inner = keras.Input(SIZE)
    backbone = keras.Model(inner, stage(stage(conv(x, 6, "stem"))), name="backbone")
    inputs = keras.Input(SIZE)
    return classified(inputs, backbone(inputs))


@model
def sequential():
    return keras.Sequential(
        [
            keras.Input(SIZE),
            layers.Rescaling(0.5, name="rescale"),
            layers.Conv2D(6, 3, activation="relu", name="conv1"),
            layers.BatchNormalization(name="norm"),
            layers.Flatten(name="flatten"),
            layers.Dense(7, activation="relu", name="dense"),
            layers.Dense(3, activation="softmax", name="head"),
        ],
        name="digits",
    )


@model
def nested_sequential():
    stem = keras.Sequential([layers.Conv2D(6, 3, name="conv1"), layers.ReLU()], name="stem")
    x = inner = keras.Input((6, 6, 6))
    block = keras.Model(inner, layers.Add()([x, conv(x, 6, "conv2")]), name="block")
    head = [layers.GlobalAveragePooling2D(), layers.Dense(3, name="head")]
    return keras.Sequential([keras.Input(SIZE), stem, block, *head])


@model
def flatten_dense():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 4, "conv1", strides=2)
    x = layers.Flatten(name="flatten")(x)
    x = layers.BatchNormalization(name="flat_bn")(x)
    x = layers.Dense(10, activation="gelu", name="dense1")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


@model
def conv1d():
    x = inputs = keras.Input((12, 3))
    x = layers.Conv1D(6, 3, padding="causal", activation="relu", name="conv1")(x)
    x = layers.ZeroPadding1D(1)(x)
    x = layers.DepthwiseConv1D(3, name="depthwise")(x)
    x = layers.SeparableConv1D(5, 3, activation="relu", name="separable")(x)
    x = layers.Conv1DTranspose(4, 3, strides=2, name="up")(layers.AveragePooling1D(2)(x))
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.GlobalMaxPooling1D()(x)))


@model
def conv3d():
    x = inputs = keras.Input((4, 4, 4, 2))
    x = layers.Conv3D(4, 3, padding="same", activation="relu", name="conv1")(x)
    x = layers.BatchNormalization(name="norm")(layers.MaxPooling3D(2)(x))
    x = layers.Conv3D(5, 2, activation="relu", name="conv2")(layers.UpSampling3D(2)(x))
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.GlobalAveragePooling3D()(x)))


@model
def transposed_unet():
    x = inputs = keras.Input(SIZE)
    skip = conv(x, 5, "down")
    x = conv(skip, 6, "bottom", strides=2)
    x = layers.Conv2DTranspose(4, 2, strides=2, activation="relu", name="up")(x)
    x = layers.Concatenate()([layers.Cropping2D(1)(skip), layers.Cropping2D(1)(x)])
    return keras.Model(inputs, layers.Conv2D(2, 1, activation="softmax", name="mask")(conv(x, 5, "fuse")))


@model
def channels_first():
    first = {"data_format": "channels_first"}
    x = inputs = keras.Input((3, 8, 8))
    x = layers.Conv2D(6, 3, name="conv1", **first)(x)
    x = layers.ReLU()(layers.BatchNormalization(axis=1, name="norm")(x))
    x = layers.Conv2D(5, 2, activation="relu", name="conv2", **first)(layers.MaxPooling2D(**first)(x))
    x = layers.Dense(4, activation="relu", name="dense1")(layers.Flatten(**first)(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


@model
def permute():
    x = inputs = keras.Input((3, 8, 8))
    x = conv(layers.Permute((2, 3, 1))(x), 6, "conv1")
    x = layers.Permute((3, 1, 2))(x)
    x = ops.transpose(ops.relu(x), (0, 2, 3, 1))
    x = layers.Permute((3, 1, 2))(conv(x, 5, "conv2"))
    return keras.Model(inputs, layers.Dense(3, name="head")(ops.mean(x, axis=(2, 3))))


@model
def dense_beside_channels():
    x = inputs = keras.Input((3, 8, 8))
    x = conv(layers.Permute((2, 3, 1))(x), 6, "conv1")
    x = layers.Dense(4, activation="relu", name="over_space")(layers.Permute((3, 1, 2))(x))
    x = layers.Permute((2, 3, 1))(x)
    return classified(inputs, conv(x, 5, "conv2"))


@model
def layernorm():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "conv1")
    x = layers.LayerNormalization(name="norm")(x)
    y = layers.Dense(9, activation="gelu", name="expand")(x)
    y = layers.Dense(6, name="project")(y)
    return classified(inputs, layers.Add()([x, y]))


@model
def groupnorm():
    x = inputs = keras.Input(SIZE)
    x = layers.Conv2D(6, 3, name="conv1")(x)
    x = layers.ReLU()(layers.GroupNormalization(-1, name="instance_norm")(x))
    x = layers.Conv2D(8, 3, name="conv2")(x)
    x = layers.ReLU()(layers.GroupNormalization(2, name="group_norm")(x))
    return classified(inputs, conv(x, 5, "conv3", kernel=1))


@model
def prelu():
    x = inputs = keras.Input(SIZE)
    x = layers.PReLU(name="every_position")(layers.Conv2D(6, 3, name="conv1")(x))
    x = layers.PReLU(shared_axes=[1, 2], name="shared")(layers.Conv2D(5, 3, name="conv2")(x))
    return classified(inputs, layers.LeakyReLU()(layers.Conv2D(4, 3, name="conv3")(x)))


@model
def ops_arithmetic():
    random = np.random.default_rng(5)
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "conv1") * random.uniform(0.5, 1.5, 6).astype("float32")
    x = ops.maximum(x - random.normal(size=(8, 1, 6)).astype("float32"), 0.1 * x) / 2
    y = 1 - ops.sigmoid(layers.Conv2D(6, 1, name="conv2")(x))
    x = ops.clip(x * y + random.normal(size=(1, 1, 1, 6)).astype("float32"), -3, 3)
    return classified(inputs, conv(x**2, 5, "conv3"))


@model
def split_and_slice():
    x = inputs = keras.Input(SIZE)
    a, b, c = ops.split(conv(x, 9, "conv1"), 3, axis=-1)
    x = layers.Concatenate()([a * ops.sigmoid(b), c[..., :2], a])
    x = conv(x, 7, "conv2")
    x = ops.concatenate([x[:, 1:, :, 2:], x[:, :-1, :, :3]], axis=-1)
    return classified(inputs, conv(x, 5, "conv3"))


@model
def reordered():
    """Channels are picked, rolled, flipped, divided into pairs, and made into pixels."""
    x = inputs = keras.Input(SIZE)
    x = ops.take(conv(x, 10, "conv1"), [9, 1, 2, 3, 0, 5], axis=-1)
    x = ops.flip(ops.roll(x, 2, axis=-1), axis=-1)
    x = conv(ops.moveaxis(ops.moveaxis(x, -1, 1), 1, -1), 8, "conv2")
    x = ops.concatenate([x[..., ::2] * x[..., 1::2], ops.glu(conv(x, 6, "conv3"))], axis=-1)
    x = ops.depth_to_space(conv(x, 16, "conv4"), 2)
    return classified(inputs, ops.max_pool(ops.image.resize(x, (9, 9)), 2, 2))


@model
def repeat_vector():
    x = inputs = keras.Input((5,))
    x = layers.Dense(6, activation="relu", name="dense1")(x)
    x = layers.RepeatVector(4)(x)
    x = layers.Conv1D(5, 2, activation="relu", name="conv1")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(ops.max(x, axis=1)))


@model
def upsampling():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "conv1", strides=2)
    x = layers.UpSampling2D(2, interpolation="bilinear")(x)
    x = conv(x, 5, "conv2", strides=2)
    return classified(inputs, layers.UpSampling2D(2)(x))


@model
def multiply_gate():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "conv1")
    heat = layers.Conv2D(1, 1, activation="sigmoid", name="heat")(x)
    x = layers.Multiply()([x, heat]) + layers.Conv2D(6, 1, name="other")(x)
    return classified(inputs, layers.Activation("sigmoid")(x))


@model
def frozen():
    built = nested_backbone()
    built.get_layer("backbone").get_layer("conv1").trainable = False
    built.get_layer("neck_bn").trainable = False
    return built


@model
def mixed_dtype():
    x = inputs = keras.Input(SIZE)
    x = layers.Conv2D(6, 3, activation="relu", name="conv1")(x)
    x = layers.Conv2D(5, 3, activation="relu", name="conv2", dtype="mixed_bfloat16")(x)
    x = layers.GlobalAveragePooling2D(dtype="mixed_bfloat16")(x)
    return keras.Model(inputs, layers.Dense(3, name="head", dtype="float32")(x))


@model
def dictionaries():
    inputs = {"image": keras.Input(SIZE, name="image"), "numbers": keras.Input((4,), name="numbers")}
    x = layers.GlobalAveragePooling2D()(conv(inputs["image"], 6, "conv1"))
    y = layers.Dense(5, activation="relu", name="dense1")(inputs["numbers"])
    x = layers.Concatenate()([y, x])
    outputs = {"label": layers.Dense(3, name="label")(x), "age": layers.Dense(1, name="age")(x)}
    return keras.Model(inputs, outputs)


@model
def lstm_tagger():
    x = inputs = keras.Input((6, 4))
    x = x * np.array([1, 1, 1, 0, 1, 0], "float32")[:, None]  # steps of zeros, which are masked
    x = layers.Masking(name="masking")(x)
    x = layers.Dense(6, activation="tanh", name="embed")(x)
    lstm = layers.LSTM(3, return_sequences=True, name="lstm")
    x = layers.Bidirectional(lstm, name="both_ways")(x)
    x = layers.Dense(5, activation="relu", name="hidden")(x)
    last, state = layers.GRU(4, return_state=True, go_backwards=True, name="gru")(x)
    x = layers.TimeDistributed(layers.Dense(4, activation="relu"), name="each_step")(x)
    x = layers.Concatenate(name="join")([x, layers.RepeatVector(6)(last * state)])
    return keras.Model(inputs, layers.Dense(3, name="tags")(x))


@model
def conv_lstm():
    x = inputs = keras.Input((3, 6, 6, 2))
    x = layers.TimeDistributed(layers.Conv2D(5, 3, activation="relu"), name="frames")(x)
    x = layers.TimeDistributed(layers.BatchNormalization(), name="frames_bn")(x)
    x = layers.ConvLSTM2D(3, 2, return_sequences=True, padding="same", name="video")(x)
    x = layers.TimeDistributed(layers.Conv2D(4, 1), name="again")(x)
    x = layers.ConvLSTM2D(4, 2, strides=2, name="last")(x)
    return classified(inputs, conv(x, 5, "conv"))


@model
def gru_after_conv1d():
    x = inputs = keras.Input((8, 3))
    x = layers.Conv1D(6, 3, activation="relu", name="conv")(x)
    x = layers.MaxPooling1D(2, name="down")(x)
    x = layers.GRU(4, return_sequences=True, dropout=0.2, name="gru")(x)
    x = layers.SimpleRNN(5, name="simple")(layers.Dense(6, name="between")(x))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


@model
def encoder_decoder():
    inputs = [keras.Input((4, 3), name="source"), keras.Input((3, 2), name="target")]
    _, *states = layers.LSTM(5, return_state=True, name="encoder")(inputs[0])
    x = layers.LSTM(5, return_sequences=True, name="decoder")(inputs[1], initial_state=states)
    around = layers.GRU(4, return_sequences=True, reset_after=False, activation="relu", name="gru")
    x = layers.Bidirectional(around, merge_mode="sum", name="around")(x)
    x = layers.RNN(layers.SimpleRNNCell(6, name="cell"), name="loop")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def heads(x, num, name, length=None, **arguments):
    """Projection to heads of size 3; Keras' own layers leave the sequence's length open too."""
    return layers.EinsumDense("abc,cde->abde", (length, num, 3), bias_axes="de", name=name, **arguments)(x)


@model
def attention_parts():
    x = inputs = keras.Input((5, 8))
    q, k, v = (heads(x, 4, name) for name in ("query", "key", "value"))
    scores = ops.einsum("aecd,abcd->acbe", k, q * 0.6)
    scores = layers.Dropout(0.1)(layers.Softmax((3,))(scores))
    y = ops.einsum("acbe,aecd->abcd", scores, v)
    y = layers.EinsumDense("abcd,cde->abe", (None, 8), bias_axes="e", name="output")(y)
    x = layers.LayerNormalization(name="norm")(layers.Add()([x, y]))
    y = layers.EinsumDense("...x,xy->...y", 7, bias_axes="y", activation="gelu", name="expand")(x)
    x = layers.Add()([x, layers.Dense(8, name="project")(y)])
    return keras.Model(inputs, layers.Dense(3, name="head")(x[:, 0]))


@model
def grouped_query_parts():
    inputs = keras.Input((5, 4))
    x = layers.Dense(8, name="stem")(inputs)
    q, k, v = heads(x, 6, "query"), heads(x, 3, "key"), heads(x, 3, "value", activation="tanh")
    k, v = ops.repeat(k, 2, axis=2), ops.repeat(v, 2, axis=2)
    causal = np.tril(np.ones((1, 1, 5, 5), "bool"))
    scores = layers.Softmax()(ops.einsum("bquh,bkuh->buqk", q, k) / 1.7, mask=causal)
    y = ops.einsum("buqk,bkuh->bquh", scores, v) * ops.sigmoid(heads(x, 6, "gate"))
    y = layers.EinsumDense("bquh,uhm->bqm", (None, 8), name="output")(y)
    return keras.Model(inputs, layers.Dense(3, name="head")(ops.max(x + y, axis=1)))


@model
def fused_attention():
    x = inputs = keras.Input((5, 8))
    y = ops.dot_product_attention(heads(x, 8, "query"), heads(x, 4, "key"), heads(x, 4, "value"))
    y = layers.EinsumDense("abcd,cde->abe", (None, 8), name="output")(y)
    y = heads(layers.LayerNormalization(name="norm")(x + y), 4, "again", length=5)
    y = ops.dot_product_attention(y, y, y, is_causal=True)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(y)))


@model
def transformer():
    x = inputs = keras.Input((5, 8))
    y = layers.LayerNormalization(name="norm1")(x)
    y, scores = layers.MultiHeadAttention(4, 3, dropout=0.1, name="attention")(
        y, y, return_attention_scores=True
    )
    x = layers.Add()([x, y])
    y = layers.Dense(9, "gelu", name="expand")(layers.LayerNormalization(name="norm2")(x))
    x = layers.Add()([x, layers.Dense(8, name="project")(y)])
    heat = ops.mean(scores, axis=(1, 2))
    return keras.Model(inputs, [layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x)), heat])


@model
def attending():
    """Attention of sequences to each other and to themselves, in all of its ways."""
    first, second = keras.Input((5, 4)), keras.Input((6, 4))
    query = layers.Dense(8, name="query")(first)
    key, value = layers.Dense(8, "relu", name="key")(second), layers.Dense(7, name="value")(second)
    x = layers.Attention(use_scale=True, name="dot")([query, value, key])
    y, scores = layers.AdditiveAttention(name="additive")([query, key], return_attention_scores=True)
    x = layers.Concatenate()([x, y])
    x = layers.Attention(name="self")([x, x], use_causal_mask=True)
    y = layers.Attention(score_mode="concat", name="concat")([layers.Dense(6, name="down")(x)] * 2)
    x = layers.Concatenate()([x, y])
    heat = ops.mean(scores, axis=-1)
    return keras.Model([first, second], [layers.Dense(3, name="head")(x), heat])


@model
def causal_transformer():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(VOCABULARY, 8, name="tokens")(inputs)
    for k in range(2):
        y = layers.RMSNormalization(name=f"norm{k}")(x)
        attention = layers.GroupQueryAttention(3, 4, 2, name=f"attention{k}")
        x = x + attention(y, y, use_causal_mask=True)
        y = layers.Dense(10, "silu", name=f"up{k}")(x) * layers.Dense(10, name=f"gate{k}")(x)
        x = x + layers.Dense(8, name=f"down{k}")(y)
    return keras.Model(inputs, layers.Dense(VOCABULARY, name="head")(x))


@model
def detector():
    x = inputs = keras.Input((16, 16, 3))
    low = conv(x, 5, "stage1", strides=2)
    middle = conv(low, 6, "stage2", strides=2)
    high = conv(middle, 7, "stage3", strides=2)
    levels = [layers.Conv2D(6, 1, name=f"lateral{k}")(x) for k, x in enumerate((low, middle, high))]
    for k in (1, 0):
        levels[k] = layers.Add()([levels[k], layers.UpSampling2D(2)(levels[k + 1])])
    tower = [layers.Conv2D(5, 3, padding="same", activation="relu", name="tower"), layers.Conv2D(4, 1)]
    boxes = [layers.Reshape((-1, 4))(tower[1](tower[0](level))) for level in reversed(levels)]
    classes = layers.Conv2D(3, 1, name="classes")(conv(levels[0], 6, "class_tower"))
    counts = layers.Dense(2, name="counts")(layers.GlobalMaxPooling2D()(levels[2]))
    return keras.Model(inputs, {"boxes": ops.concatenate(boxes, 1), "classes": classes, "counts": counts})


@model
def embedding():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(VOCABULARY, 8, mask_zero=True, name="tokens")(inputs)
    x = layers.Add()([x, layers.Dense(8, name="project")(layers.Dense(5, "relu", name="expand")(x))])
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


@model
def mlp_mixer():
    x = inputs = keras.Input((6, 4))
    x = layers.Dense(7, name="stem")(x)
    y = layers.Dense(9, "gelu", name="tokens1")(layers.Permute((2, 1))(layers.LayerNormalization()(x)))
    x = layers.Add()([x, layers.Permute((2, 1))(layers.Dense(6, name="tokens2")(y))])
    y = layers.Dense(8, "gelu", name="channels1")(x)
    x = layers.Add()([x, layers.Dense(7, name="channels2")(y)])
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x)))


@model
def vit_parts():
    x = inputs = keras.Input(SIZE)
    x = layers.Reshape((4, 8))(layers.Conv2D(8, 4, strides=4, name="patches")(x))
    qkv = layers.Reshape((4, 3, 2, 4))(layers.Dense(24, name="qkv")(layers.LayerNormalization()(x)))
    q, k, v = ops.unstack(ops.transpose(qkv, (0, 2, 3, 1, 4)), axis=1)
    scores = ops.softmax(ops.matmul(q, ops.swapaxes(k, -1, -2)) * 0.5)
    y = layers.Reshape((4, 8))(ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3)))
    x = layers.Add()([x, layers.Dense(8, name="output")(y)])
    y = layers.Dense(9, "gelu", name="expand")(layers.LayerNormalization()(x))
    x = layers.Add()([x, layers.Dense(8, name="project")(y)])
    return keras.Model(inputs, layers.Dense(3, name="head")(ops.mean(x, axis=1)))


def folded_windows(x, size):
    """Windows of `size` x `size` positions, each a row of its own."""
    _, height, width, channels = x.shape
    x = ops.reshape(x, (-1, height // size, size, width // size, size, channels))
    return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, size**2, channels))


def unfolded_windows(x, size, height, width):
    x = ops.reshape(x, (-1, height // size, width // size, size, size, x.shape[-1]))
    return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, height, width, x.shape[-1]))


@model
def swin():
    """Attention within windows in the batch axis, shifted in the second block; then patches merge."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 2, strides=2, name="patches")(inputs)
    shifted = np.zeros((4, 1, 4, 4), "float32")
    shifted[1:, :, 2:, :2] = shifted[1:, :, :2, 2:] = -9.0
    for k, shift in enumerate((0, 1)):
        y = folded_windows(
            ops.roll(layers.LayerNormalization(name=f"norm{k}")(x), (-shift, -shift), (1, 2)), 2
        )
        q, key, v = (
            ops.transpose(layers.Reshape((4, 6, 2))(layers.Dense(12, name=f"{name}{k}")(y)), (0, 2, 1, 3))
            for name in ("query", "key", "value")
        )
        scores = ops.matmul(q * 0.6, ops.swapaxes(key, -1, -2))
        if shift:
            scores = ops.reshape(ops.reshape(scores, (-1, 4, 6, 4, 4)) + shifted, (-1, 6, 4, 4))
        y = ops.matmul(ops.softmax(scores), v)
        y = layers.Dense(8, name=f"output{k}")(layers.Reshape((4, 12))(ops.transpose(y, (0, 2, 1, 3))))
        x = x + ops.roll(unfolded_windows(y, 2, 4, 4), (shift, shift), (1, 2))
        y = layers.Dense(9, "gelu", name=f"expand{k}")(layers.LayerNormalization()(x))
        x = x + layers.Dense(8, name=f"project{k}")(y)
    x = layers.Dense(10, name="merge")(ops.reshape(folded_windows(x, 2), (-1, 2, 2, 32)))
    return classified(inputs, layers.ReLU()(x))


@model
def video():
    """Frames in the batch axis for convolutions; then time first, and a layer that sees all frames."""
    inputs = keras.Input((3, *SIZE))
    x = conv(ops.reshape(inputs, (-1, *SIZE)), 6, "conv1")
    x = layers.GlobalAveragePooling2D()(conv(layers.MaxPooling2D()(x), 5, "conv2"))
    x = layers.LSTM(6, return_sequences=True, name="lstm")(ops.reshape(x, (-1, 3, 5)))
    x = layers.Dense(7, "relu", name="frames")(ops.transpose(x, (1, 0, 2)))
    x = ops.concatenate([x[0], ops.max(x, axis=0)], axis=-1)
    both = layers.Dense(5, "relu", name="both")(ops.concatenate([x, -x], axis=0))
    return keras.Model(inputs, layers.Dense(3, name="head")(ops.concatenate(ops.split(both, 2, axis=0), -1)))


@keras.saving.register_keras_serializable("zoo")
class Sorted(layers.Layer):
    """Something that no rule knows: the channels of each pixel, the largest first."""

    def call(self, x):
        return ops.top_k(x, x.shape[-1])[0]


@keras.saving.register_keras_serializable("zoo")
def doubled(x):
    return 2 * ops.relu(x) - 0.5


@model
def lambda_layer():
    x = inputs = keras.Input(SIZE)
    x = layers.Lambda(doubled, name="doubled")(conv(x, 6, "conv1"))
    x = layers.Conv2D(5, 3, activation=doubled, name="conv2")(x)
    return classified(inputs, layers.Activation(doubled, name="again")(x))


@keras.saving.register_keras_serializable("zoo")
class Normalized(layers.Layer):
    """Something that no rule knows: each channel divided by its mean size."""

    def call(self, x):
        return x / (1 + ops.mean(ops.abs(x), axis=(1, 2), keepdims=True))


@model
def custom_elementwise():
    x = inputs = keras.Input(SIZE)
    x = Normalized(name="normalized")(conv(conv(x, 6, "conv1"), 5, "conv2"))
    return classified(inputs, conv(x, 6, "conv3"))


@model
def unknown_layer():
    x = inputs = keras.Input(SIZE)
    x = conv(conv(x, 6, "conv1"), 5, "conv2")
    x = Sorted(name="sorted")(x)
    return classified(inputs, conv(x, 6, "conv3"))


@keras.saving.register_keras_serializable("zoo")
class Block(layers.Layer):
    """A residual block; where widths differ, with a convolution on the shortcut."""

    def __init__(self, filters, strides=1, project=False, **kwargs):
        super().__init__(**kwargs)
        self.filters, self.strides, self.project = filters, strides, project
        self.first = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False, name="first")
        self.norm = layers.BatchNormalization(name="norm")
        self.drop = layers.Dropout(0.2, name="drop")
        self.second = layers.Conv2D(filters, 3, padding="same", name="second")
        self.shortcut = layers.Conv2D(filters, 1, strides, name="shortcut") if project else None

    def build(self, shape):
        self.first.build(shape)
        inner = self.first.compute_output_shape(shape)
        self.norm.build(inner)
        self.second.build(inner)
        if self.project:
            self.shortcut.build(shape)

    def call(self, x, training=None, scale=1.0):
        y = self.drop(ops.relu(self.norm(self.first(x), training=training)), training=training)
        return ops.relu(self.second(y) * scale + (self.shortcut(x) if self.project else x))

    def get_config(self):
        own = {"filters": self.filters, "strides": self.strides, "project": self.project}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("zoo")
class Subclassed(keras.Model):
    """A model that is known by its `call` only."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.stem = layers.Conv2D(6, 3, padding="same", name="stem")
        self.blocks = [Block(6, name="block0"), Block(8, 2, True, name="block1")]
        self.head = layers.Dense(3, name="head")

    def call(self, x, training=None):
        x = ops.relu(self.stem(x))
        for block in self.blocks:
            x = block(x, training=training)
        return {"logits": self.head(ops.mean(x, (1, 2))), "features": ops.max(x, (1, 2, 3))}


@model
def subclassed():
    network = Subclassed(name="subclassed")
    network.build((None, *SIZE))
    return network


@model
def composite_layers():
    x = inputs = keras.Input(SIZE)
    x = conv(x, 6, "conv1")
    twice = Block(6, name="twice")
    x = twice(layers.MaxPooling2D(name="down2")(twice(twice(x, scale=0.5), scale=0.5)), scale=0.5)
    x = Block(8, 2, True, name="down")(x)
    return classified(inputs, conv(x, 5, "conv2"))


@keras.saving.register_keras_serializable("zoo")
class ReducedAttention(layers.Layer):
    """Heads that read fewer positions, as SegFormer's: reshapes that ask for sizes, and leave one open."""

    def __init__(self, num_heads, width, **kwargs):
        super().__init__(**kwargs)
        self.num_heads, self.width = num_heads, width
        self.reduce = layers.Conv2D(width, 2, strides=2, name="reduce")
        self.key, self.query, self.value, self.merge = (
            layers.Dense(width, name=name) for name in ("key", "query", "value", "merge")
        )

    def build(self, shape):
        self.reduce.build((shape[0], None, None, shape[-1]))
        for part in (self.key, self.query, self.value, self.merge):
            part.build((*shape[:-1], self.width))

    def call(self, x):
        batch, length, width = ops.shape(x)
        side = int(length**0.5)
        fewer = self.reduce(ops.reshape(x, (batch, side, side, width)))
        fewer = ops.reshape(fewer, (batch, -1, width))

        def divided(y):
            y = ops.reshape(y, (batch, -1, self.num_heads, width // self.num_heads))
            return ops.transpose(y, (0, 2, 1, 3))

        q, k, v = divided(self.query(x)), divided(self.key(fewer)), divided(self.value(fewer))
        read = ops.matmul(ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2)))), v)
        return self.merge(ops.reshape(ops.transpose(read, (0, 2, 1, 3)), (batch, length, width)))

    def get_config(self):
        return {**super().get_config(), "num_heads": self.num_heads, "width": self.width}


@model
def reduced_attention():
    inputs = keras.Input(SIZE)
    x = layers.Reshape((16, 8))(layers.Conv2D(8, 2, strides=2, name="patches")(inputs))
    x = layers.Add()([x, ReducedAttention(2, 8, name="attention")(layers.LayerNormalization()(x))])
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x)))


@keras.saving.register_keras_serializable("zoo")
class Branching(layers.Layer):
    """Takes a way that depends on values: nobody can see it without them."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.inner = layers.Conv2D(filters, 1, name="inner")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return ops.cond(ops.mean(x) > 0, lambda: self.inner(x), lambda: 2 * self.inner(x))

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


@model
def branching():
    x = inputs = keras.Input(SIZE)
    x = conv(conv(x, 6, "conv1"), 5, "conv2")
    x = Branching(5, name="branching")(x)
    return classified(inputs, conv(x, 6, "conv3"))


@keras.saving.register_keras_serializable("zoo")
class Decoder(layers.Layer):
    """A decoder block that asks for the batch's size and the length of the sequences, as KerasHub's do."""

    def __init__(self, num_heads, num_groups, size, width, **kwargs):
        super().__init__(**kwargs)
        self.num_heads, self.num_groups, self.size, self.width = num_heads, num_groups, size, width

    def build(self, shape):
        parts = {"query": self.num_heads, "key": self.num_groups, "value": self.num_groups}
        for name, num in parts.items():
            part = layers.EinsumDense("btd,dnh->btnh", (None, num, self.size), name=name)
            part.build(shape)
            setattr(self, name, part)
        self.merge = layers.EinsumDense("btnh,nhd->btd", (None, shape[-1]), bias_axes="d", name="merge")
        self.merge.build((*shape[:2], self.num_heads, self.size))
        self.up = [layers.Dense(self.width // 2, name=f"up{k}") for k in range(2)]
        self.down = layers.Dense(shape[-1], name="down")
        for part in self.up:
            part.build(shape)
        self.down.build((*shape[:2], self.width // 2))

    def call(self, x, padding_mask=None):
        batch, length = ops.shape(x)[:2]
        causal = ops.arange(length)[:, None] >= ops.arange(length)
        mask = ops.broadcast_to(causal, (batch, length, length))
        if padding_mask is not None:
            mask = ops.logical_and(mask, ops.cast(padding_mask[:, None], "bool"))
        shape = (batch, length, self.num_groups, self.num_heads // self.num_groups, self.size)
        scores = ops.einsum("btkgh,bskh->bkgts", ops.reshape(self.query(x), shape), self.key(x))
        scores = ops.softmax(ops.where(mask[:, None, None], scores, -1e9))
        read = ops.einsum("bkgts,bskh->btkgh", scores, self.value(x))
        x = x + self.merge(ops.reshape(read, (batch, length, self.num_heads, self.size)))
        return x + self.down(ops.silu(self.up[0](x)) * self.up[1](x))

    def get_config(self):
        names = ("num_heads", "num_groups", "size", "width")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@model
def open_decoder():
    inputs = {key: keras.Input((None,), dtype="int32", name=key) for key in ("tokens", "mask")}
    x = layers.Embedding(VOCABULARY, 8, name="embed")(inputs["tokens"])
    twice = Decoder(4, 2, 3, 18, name="twice")
    x = Decoder(3, 1, 4, 20, name="first")(x, padding_mask=inputs["mask"])
    x = twice(twice(x))
    return keras.Model(inputs, layers.Dense(VOCABULARY, name="head")(x))


@model
def tied_embedding():
    inputs = keras.Input((6,), dtype="int32")
    tokens = layers.ReversibleEmbedding(VOCABULARY, 8, tie_weights=True, name="tokens")
    x = tokens(inputs)
    x = x + layers.Dense(8, name="project")(layers.Dense(5, "relu", name="expand")(x))
    return keras.Model(inputs, tokens(x, reverse=True))
