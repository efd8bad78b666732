"""Layers whose `get_config` is not what `__init__` takes, in a module that a fresh process can import."""

import keras
from keras import layers


class Scaled(layers.Layer):
    """A weight of its own, so that it stays closed."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], name="scale")

    def scaled(self, x, factor=1.0):
        return x * self.scale * factor


@keras.saving.register_keras_serializable("faulty_layers")
class Failing(Scaled):
    """As KerasHub's `LlamaTransformerDecoder`."""

    def __init__(self, factor, activation="relu", kernel_initializer="ones", **kwargs):
        super().__init__(**kwargs)
        self.factor, self.activation = factor, keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def call(self, x):
        return self.activation(self.scaled(x, self.factor))

    def get_config(self):
        return {**super().get_config(), "factor": self.rate}


@keras.saving.register_keras_serializable("faulty_layers")
class Telling(Scaled):
    """As KerasHub's `ViTPatchingAndEmbedding`: says too much, and less than it should."""

    def __init__(self, factor, shift=0.0, data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.factor, self.shift, self.half = factor, shift, factor / 2
        self.data_format = data_format or "channels_last"

    def call(self, x):
        return self.scaled(x, self.factor) + self.shift + self.half

    def get_config(self):
        return {**super().get_config(), "factor": self.factor, "half": self.half}


@keras.saving.register_keras_serializable("faulty_layers")
class Silent(Scaled):
    """Leaves out an argument of which Keras keeps no record, since it is a function."""

    def __init__(self, factor, activation="relu", padding="same", **kwargs):
        super().__init__(**kwargs)
        self.factor, self.activation = factor, keras.activations.get(activation)
        self.padding = 1 if padding == "same" else 0

    def call(self, x):
        return self.activation(self.scaled(x, self.factor))

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


class Shifted(Scaled):
    def __init__(self, factor, shift, **kwargs):
        super().__init__(**kwargs)
        self.factor, self.shift = factor, shift

    def call(self, x):
        return self.scaled(x, self.factor) + self.shift

    def get_config(self):
        return {**super().get_config(), "factor": self.factor, "shift": self.shift}


@keras.saving.register_keras_serializable("faulty_layers")
class Narrowed(Shifted):
    """As KerasHub's `LlamaRotaryEmbedding`: says what it sets itself."""

    def __init__(self, factor, **kwargs):
        super().__init__(factor, 0.25, **kwargs)


@keras.saving.register_keras_serializable("faulty_layers")
class Bare(Scaled):
    """As KerasHub's `SegFormerMultiheadAttention`: takes nothing that every layer takes."""

    def __init__(self, factor, shift):
        super().__init__()
        self.factor, self.shift = factor, shift

    def call(self, x):
        return self.scaled(x, self.factor) + self.shift


@keras.saving.register_keras_serializable("faulty_layers")
class Holding(Failing):
    """Holds a function as it is: nothing makes it again out of a file."""

    def __init__(self, factor, function, **kwargs):
        super().__init__(factor, **kwargs)
        self.function = function

    def call(self, x):
        return self.function(super().call(x))


@keras.saving.register_keras_serializable("faulty_layers")
class Wrapping(Scaled):
    """Another layer inside, which is no value."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return self.inner(self.scaled(x))

    def compute_output_shape(self, shape):
        return shape


@keras.saving.register_keras_serializable("faulty_layers")
class Parsing(Shifted):
    """Made from something else than its arguments, in its own way."""

    def get_config(self):
        return {**Scaled.get_config(self), "both": [self.factor, self.shift]}

    @classmethod
    def from_config(cls, config):
        factor, shift = config.pop("both")
        return cls(factor, shift, **config)
