"""What `exact=False` opens in a small vision transformer, and what is left after a repair without training.

    python benchmarks/inexact.py [--model trained.keras]

Trains a transformer (two blocks, four heads, a stream of 32 channels) on 1,438 handwritten digits,
unless it is given one, and cuts it once for each goal, by several criteria, with and without its
residual stream. Accuracy is that on the 359 other digits; repair reads the training images, without
labels. Prints a table.
"""

import argparse

import keras
from keras import layers

import keras_taylor
from keras_taylor.cli.data_files import load_data

CRITERIA = ("magnitude", "log_odds", "fisher")
GOALS = (0.5, 0.75)


def transformer():
    """Patches of 2 x 2 pixels, two blocks, and a head that sees every position."""
    x = inputs = keras.Input((8, 8, 1))
    x = layers.Reshape((16, 32))(layers.Conv2D(32, 2, strides=2, name="patches")(x))
    for k in range(2):
        y = layers.LayerNormalization(name=f"norm{k}_a")(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 8, name=f"attention{k}")(y, y)])
        y = layers.LayerNormalization(name=f"norm{k}_b")(x)
        y = layers.Dense(32, name=f"down{k}")(layers.Dense(64, "gelu", name=f"up{k}")(y))
        x = layers.Add()([x, y])
    x = layers.Flatten()(layers.LayerNormalization(name="last")(x))
    return keras.Model(inputs, layers.Dense(10, name="head")(x))


def trained():
    """The transformer after ten epochs."""
    keras.utils.set_random_seed(0)
    model = transformer()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    train, _ = load_data("digits", model)
    model.fit(*train, epochs=10, batch_size=64, verbose=0)
    return model


def row(model, train, test, goal, criterion, exact):
    """Cells of one cut."""
    scores = keras_taylor.score(model, train, criterion=criterion, exact=exact, batch_size=128)
    try:
        plan = keras_taylor.make_plan(model, scores, goal, exact=exact)
    except ValueError:  # out of reach
        return goal, exact, criterion, "out of reach", "", ""
    small = keras_taylor.prune(model, plan)
    repaired = keras_taylor.repair(small, model, plan, train[0])
    stream = small.get_layer("patches").filters
    return goal, exact, criterion, stream, f"{accuracy(small, test):.1%}", f"{accuracy(repaired, test):.1%}"


def accuracy(model, test):
    """The share of test images that are told."""
    return model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a transformer that was trained before")
    path = parser.parse_args().model
    model = keras.models.load_model(path) if path else trained()
    train, test = load_data("digits", model)
    backend, before = keras.backend.backend(), accuracy(model, test)
    print(f"{model.count_params():,} parameters, accuracy {before:.1%}; {backend}")
    for exact in (True, False):
        reachable = keras_taylor.analyze(model, exact=exact).reachable["params"]
        print(f"exact={exact}: up to {reachable:.1%} of the parameters can go")
    print("\n| goal | exact | criterion | stream | cut only | repaired |\n|---|---|---|---|---|---|")
    for goal in GOALS:
        for exact in (True, False):
            for criterion in CRITERIA:
                cells = row(model, train, test, goal, criterion, exact)
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
