"""Subclassed models and composite layers: opened where that can be done, else closed with the reason."""

import collections
import inspect
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import zoo
from helpers import case, fingerprint, predict
from keras import layers, ops

import keras_taylor
from keras_taylor.reading.groups import label_model

IMAGES = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype("float32")

pytestmark = pytest.mark.sweep(2)


def around(layer):
    """A model with a layer between two convolutions."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", name="before")(x)
    return zoo.classified(inputs, layers.Conv2D(5, 3, name="after")(layer(x)))


class Inner(layers.Layer):
    """A layer with a layer inside; `run` is its `call`."""

    def __init__(self, run, **kwargs):
        super().__init__(name="inner", **kwargs)
        self.run = run
        self.conv = layers.Conv2D(6, 1, name="conv")

    def build(self, shape):
        self.conv.build(shape)
        self.scale = self.add_weight(shape=(6,), name="scale") if self.run is scaled else None

    def call(self, x, training=None):
        return self.run(self, x, training)

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        return {**super().get_config(), "run": self.run.__name__}


def scaled(layer, x, training):
    return layer.conv(x) * layer.scale


def with_branch(layer, x, training):
    return layer.conv(x) if ops.sum(x) > 0 else x


def with_own_training(layer, x, training):
    return layer.conv(2 * x if training else x)


def with_loss(layer, x, training):
    layer.add_loss(ops.mean(x))
    return layer.conv(x)


def with_constant(layer, x, training):
    return layer.conv(ops.concatenate([x[:, :4], x[:, 4:]], axis=1)) + ops.ones((6,))


REASONS = {
    scaled: "it has weights of its own ('scale')",
    with_branch: "TypeError: ",
    with_own_training: "its `call` takes another way while training. Call a layer there that does nothing at "
    "inference, as Dropout does, or go the same way in both",
    with_loss: "ValueError: `add_loss()` can only be called",
}


@pytest.mark.parametrize("run", REASONS, ids=lambda f: f.__name__)
def test_what_cannot_be_seen_stays_closed_and_says_why(run):
    model = around(Inner(run))
    model.compile("sgd", "mse")
    before = fingerprint(model)
    analysis = keras_taylor.analyze(model)
    assert fingerprint(model) == before
    assert analysis.unknown == ("inner",)
    assert "FLOPs not counted, no rule: inner" in " ".join(str(analysis).split())
    (locked,) = (g for g in analysis.groups if g.name == "before")
    assert locked.reason.startswith(f"read by Inner, which stays closed: {REASONS[run]}")
    assert locked.reason.endswith("('inner')")
    assert not model.get_layer("inner").losses or run is with_loss


def test_control_flow_stays_closed():
    channels = label_model(case("branching").model)
    assert channels.unknown == ["branching"]
    (locked,) = (g for g in channels.locked_groups if g.name == "conv2")
    # JAX runs the functions with symbolic inputs and fails before it can be told
    why = ("its `call` branches or loops by functions, whose insides are not seen", "ValueError: ")
    assert locked.reason.startswith(tuple(f"read by Branching, which stays closed: {one}" for one in why))
    assert [g.name for g in channels.groups] == ["conv1", "conv3"]


def test_what_can_be_seen_is_pruned_inside():
    model = around(Inner(with_constant))
    channels = label_model(model)
    assert [g.name for g in channels.groups] == ["before", "inner/conv", "after"]
    plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.3)
    small = keras_taylor.prune(model, plan)
    assert small.count_params() <= 0.7 * model.count_params()
    assert isinstance(small.get_layer("inner"), keras.Model)
    assert small.get_layer("inner").get_layer("conv").filters < 6


@keras.saving.register_keras_serializable("test")
class Wobbling(layers.Layer):
    """The user's own noise, which is not there at inference."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(0)

    def call(self, x, training=None):
        return x * keras.random.uniform((x.shape[-1],), seed=self.seed) if training else x


class Regularized(keras.Model):
    """Asks whether it trains wherever it drops something; `change` may do something else then."""

    def __init__(self, change=None):
        super().__init__(name="regularized")
        self.change = change
        self.flip = layers.RandomFlip(name="flip")
        self.conv = layers.Conv2D(6, 3, padding="same", name="conv")
        self.norm = layers.BatchNormalization(name="norm")
        self.drops = [layers.Dropout(0.5, name="drop"), Wobbling(name="wobble")]
        self.left, self.right = layers.Dense(5, "relu", name="left"), layers.Dense(5, name="right")
        self.head = layers.Dense(3, name="head")

    def call(self, x, training=None):
        if training:
            x = self.flip(x, training=True)
        x = ops.mean(self.norm(self.conv(x), training=training), (1, 2))
        left = self.left(self.drops[0](x)) if training else self.left(x)
        right = self.right(x)
        if training:
            right = self.drops[1](right, training=training)
            right = right if self.change is None else self.change(right)
        return self.head(left + right)


def test_layers_that_are_called_while_training_only_and_do_nothing_at_inference():
    model = Regularized()
    expected = keras.ops.convert_to_numpy(model(IMAGES))
    model.compile("sgd", "mse")
    assert [group.name for group in label_model(model).groups] == ["conv", "right"]
    same = keras_taylor.prune(model, keras_taylor.Plan())
    assert {"flip", "drop", "wobble"} <= {layer.name for layer in same.layers}
    # called alone, no layer trains; told to train, all of them do
    for found in (same(IMAGES), same(IMAGES, training=False), same.predict(IMAGES, verbose=0)):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(found), expected, rtol=1e-5, atol=1e-6)
    trained = [keras.ops.convert_to_numpy(same(IMAGES, training=True)) for _ in range(2)]
    assert np.abs(trained[0] - trained[1]).max() > 1e-3
    small = keras_taylor.compress(model, (IMAGES, np.ones((16, 3))), 0.3, increment=0.3, epochs=1, verbose=0)
    assert small.count_params() <= 0.7 * model.count_params()


def test_another_way_while_training_is_refused_with_its_lines():
    model = Regularized(change=lambda x: 2 * x)
    model(IMAGES)
    first = inspect.getsourcelines(Regularized.call)[1]
    lines = ", ".join(str(first + line) for line in (1, 4, 6))
    with pytest.raises(keras_taylor.UnsupportedModelError) as error:
        keras_taylor.analyze(model)
    assert (
        f"cannot be opened: its `call` takes another way while training (line {lines} of test_tracing.py). "
        "Call a layer there that does nothing at inference, as Dropout does, or go the same way in both. "
    ) in str(error.value)


class Windowed(keras.Model):
    """Folds windows into the batch axis; `unfold` undoes that, given the numbers of examples and windows."""

    def __init__(self, unfold):
        super().__init__(name="windowed")
        self.unfold = unfold
        self.conv = layers.Conv2D(6, 3, padding="same", name="conv")
        self.expand, self.project = layers.Dense(7, "relu", name="expand"), layers.Dense(6, name="project")
        self.head = layers.Dense(3, name="head")

    def call(self, x):
        x = self.conv(x)
        windows = ops.reshape(x, (-1, 16, 6))
        y = self.project(self.expand(windows))
        return self.head(ops.mean(self.unfold(y, ops.shape(x)[0], ops.shape(windows)[0]), 1))


@pytest.mark.parametrize(
    "unfold",
    [
        lambda y, batch, num_windows: ops.reshape(y, (batch, 64, 6)),
        lambda y, batch, num_windows: ops.reshape(y, (batch, -1, 6)),
        lambda y, batch, num_windows: ops.reshape(ops.reshape(y, (num_windows, 4, -1)), (batch, 64, 6)),
        lambda y, batch, num_windows: ops.reshape(ops.reshape(y, (batch * 2, 32, 6)), (batch, 64, -1)),
    ],
)
def test_what_is_computed_from_the_number_of_examples_is_the_same_for_all_numbers(unfold):
    model = Windowed(unfold)
    expected = keras.ops.convert_to_numpy(model(IMAGES))
    model.compile("sgd", "mse")
    assert [group.name for group in label_model(model).groups] == ["conv", "expand", "project"]
    same = keras_taylor.prune(model, keras_taylor.Plan())
    np.testing.assert_allclose(same.predict(IMAGES, verbose=0), expected, rtol=1e-5, atol=1e-6)
    assert keras_taylor.score(model, (IMAGES, np.ones((16, 3))))["expand"].size == 7


def test_a_layer_that_is_called_in_several_ways_stays_closed():
    x = inputs = keras.Input((8, 8, 3))
    block = zoo.Block(3, name="block")
    model = zoo.classified(inputs, block(block(x), scale=0.5))
    analysis = keras_taylor.analyze(model)
    assert analysis.unknown == ("block",)


def test_a_layer_on_maps_of_several_sizes_is_one_sub_model():
    small = case("composite_layers").small
    assert [layer.name for layer in small.layers].count("twice") == 1
    assert small.get_layer("twice").input_shape == (None, None, None, 4)


def test_a_pruned_subclassed_model_loads_without_its_classes(tmp_path):
    small, x = case("subclassed").small, case("subclassed").x
    small.save(tmp_path / "small.keras")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, keras, numpy as np; folder = sys.argv[1]; "
        "model = keras.models.load_model(folder + '/small.keras'); "
        "outputs = model.predict(np.load(folder + '/x.npy'), verbose=0); "
        "np.savez(folder + '/y.npz', **outputs); assert 'zoo' not in sys.modules"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    found = np.load(tmp_path / "y.npz")
    ours = small.predict(x, verbose=0)
    for key in ("logits", "features"):
        np.testing.assert_allclose(found[key], ours[key], rtol=1e-5, atol=1e-6)


class Classifier(keras.Model):
    """A subclassed model as users write it."""

    def __init__(self):
        super().__init__(name="classifier")
        self.blocks = [layers.Conv2D(8, 3, activation="relu"), layers.Conv2D(6, 3, activation="relu")]
        self.pool, self.head = layers.GlobalAveragePooling2D(), layers.Dense(3)

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x))


class OwnStep(Classifier):
    """The same, trained in its own way."""

    def compute_loss(self, *arguments, **named):
        return 2 * super().compute_loss(*arguments, **named)


def trained(model):
    labels = np.arange(16) % 3
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(IMAGES, labels, verbose=0)
    return model, labels


@pytest.mark.slow
def test_compress_a_subclassed_model():
    model, labels = trained(Classifier())
    weights = [np.array(w) for w in model.get_weights()]
    last = keras_taylor.FineTuning(keep_best=False)
    small, info = keras_taylor.compress(
        model, (IMAGES, labels), 0.4, learning_rate=last, return_info=True, verbose=0
    )
    assert type(small).__name__ == "Functional" and small.name == "classifier"
    assert small.count_params() <= 0.6 * model.count_params() == 0.6 * info.before["params"]
    assert small.optimizer is not model.optimizer
    assert int(small.optimizer.iterations) > int(model.optimizer.iterations)  # goes on where that stood
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(after, before)
    assert small.evaluate(IMAGES, labels, verbose=0, return_dict=True).keys() == {"accuracy", "loss"}


def test_a_wrapper_around_a_subclassed_model():
    model, labels = trained(Classifier())
    prunable = keras_taylor.PrunableModel(model)
    np.testing.assert_allclose(predict(prunable, IMAGES)[0], predict(model, IMAGES)[0], atol=1e-5)
    prunable.fit(IMAGES, labels, verbose=0)
    prunable.prune(0.4)
    assert prunable.strip().count_params() <= 0.6 * model.count_params()


def test_own_training_would_be_lost():
    model, labels = trained(OwnStep())
    with pytest.raises(ValueError) as error:
        keras_taylor.compress(model, (IMAGES, labels), 0.4)
    assert str(error.value) == (
        "The model's class overrides `compute_loss`, and the smaller model is a plain Functional one, which "
        "would be trained without it. Prune with `score`, `make_plan` and `prune`, and train the result in "
        "your own loop. Received: model='classifier' of class `OwnStep`"
    )


def test_a_model_that_is_not_built_is_refused():
    with pytest.raises(ValueError) as error:
        keras_taylor.analyze(Classifier())
    assert str(error.value) == (
        "Model 'classifier' is not built: its weights do not exist yet. Call it once on a batch of data. "
        "Received: model=<Classifier name=classifier, built=False>"
    )


def test_a_model_that_cannot_be_opened_is_refused_with_the_reason():
    class Mine(Classifier):
        def call(self, x):
            return super().call(x if ops.max(x) > 0 else -x)

    model = Mine()
    model(IMAGES)
    with pytest.raises(keras_taylor.UnsupportedModelError) as error:
        keras_taylor.analyze(model)
    text = str(error.value)
    start = "Model 'classifier' is a subclassed model (class `Mine`) that cannot be opened: "
    assert text.startswith((start + "TypeError: ", start + "Keras has no input shapes on record"))
    assert "Build it with the functional API: `x = keras.Input(shape); keras.Model(x, " in text
    assert text.endswith("Received: classifier=<Mine name=classifier, built=True>")


def test_tokens_and_several_inputs_of_a_subclassed_model():
    class Pair(keras.Model):
        def __init__(self):
            super().__init__(name="pair")
            self.embed, self.mix = layers.Embedding(20, 6), layers.Dense(8, activation="relu")
            self.head = layers.Dense(2)

        def call(self, inputs):
            text = ops.mean(self.embed(inputs["text"]), axis=1)
            return {"out": self.head(self.mix(ops.concatenate([text, inputs["numbers"]], axis=-1)))}

    data = {"text": np.arange(40).reshape(8, 5) % 20, "numbers": IMAGES.reshape(16, -1)[:8, :4]}
    model = Pair()
    model(data)
    plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.2)
    small = keras_taylor.prune(model, plan)
    assert {t.name for t in small.inputs} == {"text", "numbers"}
    assert predict(small, data)[0].shape == (8, 2)
    same = keras_taylor.prune(model, keras_taylor.Plan())
    np.testing.assert_array_equal(predict(same, data)[0], predict(model, data)[0])


def with_dense():
    x = inputs = keras.Input((4,))
    first, second = layers.Dense(4, name="first"), layers.Dense(4, name="second")
    return keras.Model(inputs, second(first(x))), first, second


def quantized(first, second):
    first.quantize("int8")


def low_rank(first, second):
    second.enable_lora(2)


def shared(first, second):
    second._tracker.unlock()  # as if `build` had done it
    second.bias = first.bias
    second._tracker.lock()


@pytest.mark.parametrize(
    ("change", "start", "end"),
    [
        (
            quantized,
            "Layer 'first' is quantized. Prune the model as it was before, and quantize the smaller one. ",
            "with quantization_mode='int8'",
        ),
        (
            low_rank,
            "Layer 'second' has LoRA weights. Merge them first: `save_weights` ",
            "with lora_enabled=True",
        ),
        (
            shared,
            "Layers 'first' and 'second' share the weight 'bias', and the smaller ",
            "Received: second=<Dense name=second, built=True>",
        ),
    ],
)
def test_weights_that_are_not_plain_are_refused_with_what_to_do_first(change, start, end):
    model, *both = with_dense()
    change(*both)
    with pytest.raises(keras_taylor.UnsupportedModelError) as error:
        keras_taylor.analyze(model)
    assert str(error.value).startswith(start) and str(error.value).endswith(end)


def test_the_analysis_says_what_each_group_saves():
    model, _, _ = with_dense()
    analysis = keras_taylor.analyze(model)
    params, flops = 3 * (4 + 1 + 4), 3 * (2 * 4 + 2 * 4)
    # in bytes, for one example: `first` gives three of its four float32 away
    assert analysis.savings == {"first": {"params": params, "flops": flops, "activation_memory": 3 * 4}}
    assert "27" in str(analysis).split("first", 1)[1]


class Returned(dict):
    """What some libraries return in the place of a plain dict."""


STRUCTURES = {
    "dict": lambda a, b: {"z": a, "b": b},
    "ordered": lambda a, b: collections.OrderedDict([("z", a), ("b", b)]),
    "own": lambda a, b: Returned(z=a, b=b),
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "nested": lambda a, b: {"z": {"q": a, "p": b}, "b": b},
}
PLAIN = {**STRUCTURES, "ordered": STRUCTURES["dict"], "own": STRUCTURES["dict"]}


class Structured(keras.Model):
    """A dict goes in, with a key that is a layer's name; one of several structures comes out."""

    def __init__(self, structure):
        super().__init__()
        self.structure = structure
        self.hidden = keras.layers.Dense(8, activation="relu", name="right")
        self.first, self.second = keras.layers.Dense(3, name="first"), keras.layers.Dense(2, name="second")

    def call(self, inputs):
        x = self.hidden(keras.ops.concatenate([inputs["right"], inputs["left"]], -1))
        return STRUCTURES[self.structure](self.first(x), self.second(x))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.sweep(3)
def test_inputs_and_outputs_keep_their_structure(structure):
    x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    data = {"right": x[:, :3], "left": x[:, 3:]}
    if structure == "own" and keras.backend.backend() == "jax":
        pytest.skip("JAX traces no function that returns such a dict")
    model = Structured(structure)
    model(data)
    first, second = np.zeros((6, 3), "float32"), np.zeros((6, 2), "float32")
    y = PLAIN[structure](first, second)
    model.compile("sgd", keras.tree.map_structure(lambda _: "mse", y))
    prunable = keras_taylor.PrunableModel(model)
    arguments = {"increment": 0.2, "epochs": 1, "verbose": 0}
    smaller = [keras_taylor.compress(model, (data, y), 0.2, **arguments), prunable, prunable.strip()]
    reordered = collections.OrderedDict(data)
    smaller.append(keras_taylor.compress(model, (reordered, y), 0.2, **arguments))
    for one in smaller:
        keras.tree.assert_same_structure(y, one.predict(data, verbose=0))
        keras.tree.assert_same_structure(y, one(data))
