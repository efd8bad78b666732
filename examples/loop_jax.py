"""Prune in a stateless JAX loop.

Run with `KERAS_BACKEND=jax python examples/loop_jax.py`.
"""

import jax
import keras
import numpy as np
from quickstart import digits, small_cnn

import keras_taylor


def main(epochs=6, batch_size=64):
    keras.utils.set_random_seed(0)
    x_train, x_test, y_train, y_test = digits()

    prunable = keras_taylor.PrunableModel(small_cnn())
    optimizer = keras.optimizers.Adam(2e-3)
    optimizer.build(prunable.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss_and_updates(trainable, non_trainable, x, y):
        y_pred, non_trainable = prunable.stateless_call(trainable, non_trainable, x, training=True)
        return loss_of(y, y_pred), non_trainable

    @jax.jit
    def step(trainable, non_trainable, slots, x, y):
        differentiate = jax.value_and_grad(loss_and_updates, has_aux=True)
        (loss, non_trainable), gradients = differentiate(trainable, non_trainable, x, y)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)  # updates the scores, too
        return loss, (trainable, non_trainable, slots)

    variables = prunable.trainable_variables, prunable.non_trainable_variables, optimizer.variables
    random = np.random.default_rng(0)
    for epoch in range(epochs):
        state = [[v.value for v in part] for part in variables]
        order = random.permutation(len(x_train))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            loss, state = step(*state, x_train[rows], y_train[rows])
        for part, values in zip(variables, state, strict=True):
            for variable, value in zip(part, values, strict=True):
                variable.assign(value)
        if epoch in (1, 2, 3):
            prunable.prune(
                0.1 * epoch
            )  # reads scores from the variables and writes masks to them, not to `state`
        print(f"epoch {epoch + 1}: loss {float(loss):.4f}, {prunable.cost()['params']:,} parameters")

    small = prunable.strip(optimizer=optimizer)
    accuracy = float((small.predict(x_test, verbose=0).argmax(1) == y_test).mean())
    print(f"accuracy {accuracy:.2%} with {small.count_params():,} parameters")
    return small, accuracy


if __name__ == "__main__":
    main()
