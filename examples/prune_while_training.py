"""Prune a network while `fit` trains it, on real handwritten digits.

Run with `python examples/prune_while_training.py`. KERAS_BACKEND chooses the backend.
"""

import keras
from quickstart import digits, small_cnn

import keras_taylor


def main(epochs=12):
    keras.utils.set_random_seed(0)
    x_train, x_test, y_train, y_test = digits()
    prunable = keras_taylor.PrunableModel(small_cnn())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    prunable.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])

    callback = keras_taylor.TaylorPruning(goal=0.3, start_epoch=2, max_drop=0.01, verbose=1)
    history = prunable.fit(
        x_train,
        y_train,
        batch_size=64,
        epochs=epochs,
        validation_data=(x_test, y_test),
        callbacks=[callback],
        verbose=0,
    ).history
    for epoch, (params, accuracy) in enumerate(
        zip(history["params"], history["val_accuracy"], strict=True), 1
    ):
        print(f"epoch {epoch:2}: {params:,} parameters, accuracy {accuracy:.2%}")

    small = prunable.strip()
    accuracy = small.evaluate(x_test, y_test, verbose=0, return_dict=True)["accuracy"]
    print(f"accuracy {accuracy:.2%} with {small.count_params():,} parameters")
    return small, accuracy


if __name__ == "__main__":
    main()
