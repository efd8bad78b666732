"""Layers in a module of their own, as users have them, for the tests of `export`."""

import os
import sys

import keras


@keras.saving.register_keras_serializable("exported_layers")
class Doubled(keras.layers.Layer):
    def call(self, x):
        return 2 * x


@keras.saving.register_keras_serializable("exported_layers")
class Crashing(Doubled):
    """Loads in the process that made it, and ends any other like a crash of native code."""

    @classmethod
    def from_config(cls, config):
        if sys.argv[0] == "-c":
            os.abort()
        return super().from_config(config)


@keras.saving.register_keras_serializable("exported_layers")
class Noisy(keras.layers.Layer):
    """Augments inside, and trains unless it is told not to, as Keras' own augmentation does."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.contrast = keras.layers.RandomContrast(0.5)

    def call(self, x, training=True):
        x = self.contrast(x)
        return 3 * x if training else x
