"""A small network for handwritten digits, and a run of `compress` on it."""

import keras

import keras_taylor
from keras_taylor.budget.goals import GoalLike
from keras_taylor.cli.data_files import load_data


def small_network() -> keras.Sequential:
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


def compress_digits_network(goal: GoalLike | list[GoalLike] | None) -> keras_taylor.Info:
    """Trains the small network, makes it smaller, and returns what `compress` did."""
    keras.utils.set_random_seed(0)
    model = small_network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    split = load_data("digits", model)
    print(split.description)
    print("training a network on the digits")
    model.fit(*split.train, epochs=15, batch_size=64, verbose=0)
    _, info = keras_taylor.compress(
        model,
        split.train,
        goal,
        increment=0.1,
        epochs=2,
        batch_size=64,
        validation_data=split.validation,
        return_info=True,
    )
    return info
