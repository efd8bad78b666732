"""A small network for handwritten digits."""

import keras


def small_network():
    """A CNN of 66,474 parameters for 8x8 images in ten classes, neither compiled nor trained."""
    layers = [keras.Input((8, 8, 1))]
    for filters in (32, 64, 64):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
        ]
        if filters == 32:
            layers.append(keras.layers.MaxPooling2D())
    layers += [keras.layers.Flatten(), keras.layers.Dropout(0.3), keras.layers.Dense(10)]
    return keras.Sequential(layers, name="digits_cnn")
