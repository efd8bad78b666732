"""Prune in a `tf.GradientTape` loop.

Run with `KERAS_BACKEND=tensorflow python examples/loop_tensorflow.py`.
"""

import keras
import tensorflow as tf
from quickstart import digits, small_cnn

import keras_taylor


def main(epochs=6):
    keras.utils.set_random_seed(0)
    x_train, x_test, y_train, y_test = digits()
    batches = tf.data.Dataset.from_tensor_slices((x_train, y_train)).shuffle(2000).batch(64)

    prunable = keras_taylor.PrunableModel(small_cnn())
    optimizer = keras.optimizers.Adam(2e-3)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, prunable(x, training=True))
        gradients = tape.gradient(loss, prunable.trainable_variables)
        optimizer.apply(gradients, prunable.trainable_variables)  # updates the scores, too
        return loss

    for epoch in range(epochs):
        for x, y in batches:
            loss = step(x, y)
        if epoch in (1, 2, 3):
            prunable.prune(0.1 * epoch)
        print(f"epoch {epoch + 1}: loss {float(loss):.4f}, {prunable.cost()['params']:,} parameters")

    small = prunable.strip(optimizer=optimizer)
    accuracy = float((small.predict(x_test, verbose=0).argmax(1) == y_test).mean())
    print(f"accuracy {accuracy:.2%} with {small.count_params():,} parameters")
    return small, accuracy


if __name__ == "__main__":
    main()
