"""Prune a model that has its own training step: a penalty on confident predictions (arXiv 1701.06548).

Run with `KERAS_BACKEND=... python examples/custom_train_step.py`. `fit`, callbacks and
pruning are the same on all backends. Only the body of `train_step` differs.
"""

import keras
from quickstart import digits, small_cnn

import keras_taylor


class Penalized(keras_taylor.PrunableModel):
    """The loss is the compiled loss minus a tenth of the entropy of the predictions."""

    def penalized_loss(self, y, logits):
        probabilities = keras.ops.softmax(logits)
        entropy = -keras.ops.sum(probabilities * keras.ops.log_softmax(logits), axis=-1)
        return self.compute_loss(y=y, y_pred=logits) - 0.1 * keras.ops.mean(entropy)

    def train_step(self, *arguments):
        return getattr(self, f"step_{keras.backend.backend()}")(*arguments)

    def step_tensorflow(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            logits = self(x, training=True)
            loss = self.penalized_loss(y, logits)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}

    def step_torch(self, data):
        import torch

        x, y = data
        self.zero_grad()
        logits = self(x, training=True)
        loss = self.penalized_loss(y, logits)
        self.optimizer.scale_loss(loss).backward()
        with torch.no_grad():
            gradients = [v.value.grad for v in self.trainable_variables]
            self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}

    def step_jax(self, state, data):
        import jax

        x, y = data
        trainable, non_trainable, slots, metrics = state

        def loss_and_updates(trainable, non_trainable):
            logits, non_trainable = self.stateless_call(trainable, non_trainable, x, training=True)
            return self.penalized_loss(y, logits), non_trainable

        differentiate = jax.value_and_grad(loss_and_updates, has_aux=True)
        (loss, non_trainable), gradients = differentiate(trainable, non_trainable)
        trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
        return {"loss": loss}, (trainable, non_trainable, slots, metrics)


def main(epochs=6):
    keras.utils.set_random_seed(0)
    x_train, x_test, y_train, y_test = digits()
    prunable = Penalized(small_cnn())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    prunable.compile(keras.optimizers.Adam(2e-3), loss)
    callback = keras_taylor.TaylorPruning(goal=0.3, start_epoch=1, verbose=1)
    prunable.fit(x_train, y_train, batch_size=64, epochs=epochs, verbose=0, callbacks=[callback])

    small = prunable.strip()
    accuracy = float((small.predict(x_test, verbose=0).argmax(1) == y_test).mean())
    print(f"accuracy {accuracy:.2%} with {small.count_params():,} parameters")
    return small, accuracy


if __name__ == "__main__":
    main()
