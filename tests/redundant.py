"""Networks whose last channels the others can replace."""

import keras
import numpy as np
from zoo import inputs_of

layers = keras.layers


def inputs_for(model, num=256, seed=3):
    return inputs_of(model, num, seed)


def redundant(final="dense"):
    """The last two of eight filters are linear combinations of the others, without an activation."""
    x = inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(8, 3, name="conv1")(x)
    if final == "dense":
        x = layers.Conv2D(5, 3, activation="relu", name="conv2")(x)
        x = layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))
    else:
        x = layers.Conv2D(5, 3, use_bias=False, name="conv2")(x)
        x = layers.BatchNormalization(name="normalized")(x)
        x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    model = keras.Model(inputs, x)
    random = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(random.uniform(0.1, 1, weight.shape) - 0.3 * (len(weight.shape) > 1))
    conv1 = model.get_layer("conv1")
    kernel = keras.ops.convert_to_numpy(conv1.kernel).copy()
    kernel[..., 6:] = kernel[..., :6] @ random.normal(size=(6, 2))
    conv1.kernel.assign(kernel)  # the biases are not combinations, so that a constant is needed, too
    return model
