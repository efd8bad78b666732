"""Units that feed back into themselves, against NumPy in float64 and smaller models made by hand."""

import keras
import numpy as np
import pytest
import zoo
from helpers import EAGER, predict, relative_difference
from keras import layers, ops

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.plans.plan import LayerPlan
from keras_taylor.reading.groups import label_model
from keras_taylor.rules.recurrent import gate_recurrence
from keras_taylor.scores.gated_model import GatedModel

NUM, STEPS, UNITS, OUTPUTS = 6, 5, 4, 3

pytestmark = pytest.mark.sweep(3)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_step(x, states, gate, kernel, recurrent, bias):
    h, c = states
    i, f, new, o = np.split(x @ kernel + (h * gate) @ recurrent + bias, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
    return sigmoid(o) * np.tanh(c), c


def gru_step(x, states, gate, kernel, recurrent, bias):
    """Both kinds; a bias with two rows says that the reset gate comes after."""
    (h,) = states
    after = bias.ndim == 2
    xz, xr, xn = np.split(x @ kernel + (bias[0] if after else bias), 3, axis=-1)
    hz, hr, hn = np.split((h * gate) @ recurrent + (bias[1] if after else 0), 3, axis=-1)
    z, r = sigmoid(xz + hz), sigmoid(xr + hr)
    n = r * hn if after else (r * h * gate) @ recurrent[:, -h.shape[-1] :]
    return (z * h + (1 - z) * np.tanh(xn + n),)  # the share of h is the unit's own


def simple_step(x, states, gate, kernel, recurrent, bias):
    return (np.tanh(x @ kernel + (states[0] * gate) @ recurrent + bias),)


def run(layer, x, gate, mask):
    """Sequence of outputs, and the last states, of a recurrent layer in float64."""
    step = {"LSTM": lstm_step, "GRU": gru_step, "SimpleRNN": simple_step}[type(layer).__name__]
    weights = [ops.convert_to_numpy(w).astype(np.float64) for w in layer.weights]
    states = [np.zeros((len(x), layer.units))] * (2 if step is lstm_step else 1)
    outputs, output = [], states[0]
    for k in range(x.shape[1])[:: -1 if layer.go_backwards else 1]:
        here = mask[:, k, None]
        new = step(x[:, k], states, gate, *weights)
        states = [np.where(here, after, before) for after, before in zip(new, states, strict=True)]
        output = np.where(here, new[0], np.zeros_like(output) if layer.zero_output_for_mask else output)
        outputs.append(output)
    return np.stack(outputs, 1), states


class Case:
    """A recurrent layer, or two, behind a mask and before a dense one; the loss by the gates, in NumPy."""

    def __init__(self, make, masked=False, seed=3):
        random = np.random.default_rng(seed)
        self.x = random.normal(size=(NUM, STEPS, 3)).astype("float32")
        self.mask = np.ones((NUM, STEPS), bool)
        if masked:
            self.mask = random.random((NUM, STEPS)) < 0.6
            self.x *= self.mask[..., None]
        inputs = keras.Input((STEPS, 3))
        self.layer = make()
        made = keras.tree.flatten(self.layer(layers.Masking()(inputs) if masked else inputs))
        y = layers.Concatenate()(made) if len(made) > 1 else made[0]
        self.model = zoo.randomized(keras.Model(inputs, layers.Dense(OUTPUTS, name="head")(y)), seed)
        self.y = random.normal(size=(NUM, *self.model.output_shape[1:])).astype("float32")

    def losses(self, gate):
        """Mean squared error of each example, with gates `(UNITS,)` on all that reads the units."""
        y = np.concatenate([part * gate for part in self.outputs(gate)], axis=-1)
        kernel, bias = (
            ops.convert_to_numpy(w).astype(np.float64) for w in self.model.get_layer("head").weights
        )
        error = np.square(y @ kernel + bias - self.y)
        if error.ndim > 2:  # masked steps have no part in the loss
            error = error * self.mask[..., None]
        return error.reshape(NUM, -1).mean(1)

    def outputs(self, gate):
        layer = self.layer
        if isinstance(layer, layers.Bidirectional):
            (forward, _), (backward, _) = (
                run(part, self.x, gate, self.mask) for part in (layer.forward_layer, layer.backward_layer)
            )
            if layer.return_sequences:
                return [forward, backward[:, ::-1]]
            return [forward[:, -1], backward[:, -1]]
        sequence, states = run(layer, self.x, gate, self.mask)
        parts = [sequence if layer.return_sequences else sequence[:, -1]]
        return parts + (states if layer.return_state else [])

    def derivatives(self, step=1e-5):
        """The derivative of each example's loss by each gate, `(NUM, UNITS)`, by central differences."""
        moved = step * np.eye(UNITS)
        return np.stack([(self.losses(1 + m) - self.losses(1 - m)) / (2 * step) for m in moved], axis=1)


CASES = {
    "lstm": lambda: Case(lambda: layers.LSTM(UNITS)),
    "lstm, sequence": lambda: Case(lambda: layers.LSTM(UNITS, return_sequences=True, go_backwards=True)),
    "lstm, masked": lambda: Case(lambda: layers.LSTM(UNITS), masked=True),
    "lstm, states": lambda: Case(lambda: layers.LSTM(UNITS, return_state=True, unroll=True)),
    "gru": lambda: Case(lambda: layers.GRU(UNITS, return_sequences=True)),
    "gru, reset before": lambda: Case(lambda: layers.GRU(UNITS, reset_after=False), masked=True),
    "gru, backwards": lambda: Case(lambda: layers.GRU(UNITS, go_backwards=True, implementation=1)),
    "simple": lambda: Case(lambda: layers.SimpleRNN(UNITS, return_state=True)),
    "both ways": lambda: Case(lambda: layers.Bidirectional(layers.GRU(UNITS, return_sequences=True))),
    "both ways, masked": lambda: Case(lambda: layers.Bidirectional(layers.LSTM(UNITS)), masked=True),
}


def moments(model, x, y):
    """Means over examples of g, |g| and g² for the gates of a model with one group."""
    found = []
    model.compile("sgd", "mse", run_eagerly=EAGER)
    keras_taylor.score(model, (x, y), criterion=lambda s: found.append(s) or s.mean_square, batch_size=4)
    (group,) = found
    return np.stack([group.mean, group.mean_absolute, group.mean_square])


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_a_gate_at_every_place_where_a_unit_is_read(name):
    case = CASES[name]()
    g = case.derivatives()
    wanted = np.stack([g.mean(0), np.abs(g).mean(0), np.square(g).mean(0)])
    np.testing.assert_allclose(moments(case.model, case.x, case.y), wanted, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_closed_gates_are_removal(name):
    """Of the gated model, the smaller one and NumPy, each knows nothing of the others."""
    case = CASES[name]()
    channels = label_model(case.model)
    small = keras_taylor.prune(case.model, keras_taylor.Plan({case.layer.name: LayerPlan(UNITS, (0, 2))}))
    network = GatedModel(channels)
    network.mask = gate = np.array([1, 0, 1, 0], "float32")
    assert relative_difference(predict(small, case.x), predict(network, case.x)) <= 1e-5
    losses = np.square(predict(small, case.x)[0] - case.y)
    losses = losses * case.mask[..., None] if losses.ndim > 2 else losses
    np.testing.assert_allclose(losses.reshape(NUM, -1).mean(1), case.losses(gate), rtol=1e-5)


def sliced(weight, keep, axes):
    """A weight with these units in each block along some axes, by hand."""
    value = ops.convert_to_numpy(weight)
    for axis in axes:
        blocks = np.split(value, value.shape[axis] // UNITS, axis)
        value = np.concatenate([np.take(block, keep, axis) for block in blocks], axis)
    return value


@pytest.mark.parametrize(
    "make",
    [
        lambda units: layers.LSTM(units, name="layer"),
        lambda units: layers.GRU(units, name="layer"),
        lambda units: layers.GRU(units, reset_after=False, use_bias=False, name="layer"),
        lambda units: layers.SimpleRNN(units, name="layer"),
        lambda units: layers.RNN(layers.GRUCell(units), name="layer"),
        lambda units: layers.ConvLSTM1D(units, 2, name="layer"),
        lambda units: layers.Bidirectional(layers.LSTM(units), name="layer"),
    ],
)
def test_what_is_left_is_what_one_would_make_by_hand(make):
    def model_of(units):
        space = (STEPS, 5, 3) if isinstance(make(1), layers.ConvLSTM1D) else (STEPS, 3)
        inputs = keras.Input(space)
        y = make(units)(inputs)
        y = layers.GlobalAveragePooling1D()(y) if len(y.shape) == 3 else y
        return keras.Model(inputs, layers.Dense(2, name="head")(y))

    model, keep = zoo.randomized(model_of(UNITS)), [1, 3]
    small = keras_taylor.prune(model, keras_taylor.Plan({"layer": LayerPlan(UNITS, tuple(keep))}))
    by_hand = model_of(len(keep))
    own = model.get_layer("layer").weights
    axes = {"kernel": [-1], "recurrent_kernel": [-2, -1], "bias": [-1]}
    values = [sliced(w, keep, axes[w.name]) for w in own]
    head, bias = model.get_layer("head").weights
    by_hand.set_weights([*values, sliced(head, keep, [0]), ops.convert_to_numpy(bias)])
    for new, wanted in zip(small.weights, by_hand.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(new), ops.convert_to_numpy(wanted), new.path)
    x = zoo.inputs_of(model)
    np.testing.assert_array_equal(predict(small, x)[0], predict(by_hand, x)[0])
    assert small.count_params() == by_hand.count_params()
    assert CostModel(label_model(small))() == CostModel(label_model(by_hand))()
    kept = np.isin(np.arange(UNITS), keep)
    assert CostModel(label_model(model))(kept) == CostModel(label_model(by_hand))()


def test_convolutional_ones_have_the_derivative_of_their_own_gates():
    inputs = keras.Input((3, 4, 2))
    x = layers.ConvLSTM1D(UNITS, 2, padding="same", return_sequences=True)(inputs)
    x = layers.ConvLSTM1D(3, 2)(x)
    model = zoo.randomized(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))
    x, y = zoo.inputs_of(model), np.ones((4, 2), "float32")
    model.compile("sgd", "mse", run_eagerly=EAGER)
    found = []
    keras_taylor.score(model, (x, y), criterion=lambda s: found.append(s.mean) or s.mean_square)
    network = GatedModel(label_model(model))

    def loss(mask):
        network.mask = mask
        return np.square(predict(network, x)[0].astype("float64") - y).mean()

    moved = 2e-2 * np.eye(UNITS + 3)
    wanted = [(loss(1 + m) - loss(1 - m)) / 4e-2 for m in moved]
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"implementation": 2},
        {"implementation": 1, "recurrent_dropout": 0.4},
        {"recurrent_dropout": 0.4, "reset_after": False},
        {"implementation": 2, "use_bias": False, "dropout": 0.0},
    ],
)
def test_open_gates_leave_a_gru_in_training_as_it_is(options):
    layer = layers.GRU(UNITS, **{"dropout": 0.3, "seed": 7, "return_sequences": True, **options})
    x = np.random.default_rng(0).normal(size=(NUM, STEPS, 3)).astype("float32")
    layer.build(x.shape)
    seed = layer.cell.seed_generator.state
    before = ops.convert_to_numpy(seed)
    attributes = sorted(vars(layer)), sorted(vars(layer.cell)), layer.use_cudnn
    wanted = ops.convert_to_numpy(layer(x, training=True))
    seed.assign(before)
    with gate_recurrence([layer], ops.ones((NUM, UNITS))):
        ours = ops.convert_to_numpy(layer(x, training=True))
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)
    inference = ops.convert_to_numpy(layer(x))
    assert options.get("dropout") == 0 or np.abs(wanted - inference).max() > 1e-2
    assert (
        {*attributes[1]}
        <= {*vars(layer.cell)}
        <= {*attributes[1], "_dropout_mask", "_recurrent_dropout_mask"}
    )
    assert layer.use_cudnn == attributes[2] and sorted(vars(layer)) == attributes[0]


def test_magnitude_is_the_mean_norm_of_a_units_filters():
    """One filter for each gate, over what it reads at this step and over what it reads of the last one."""
    inputs = keras.Input((STEPS, 3))
    both = layers.Bidirectional(layers.LSTM(UNITS, name="lstm"), name="both")
    model = zoo.randomized(keras.Model(inputs, layers.Dense(2)(both(inputs))))
    scores = keras_taylor.score(model, criterion="magnitude")["both"]
    kernels = [ops.convert_to_numpy(w) for w in both.weights if w.name.endswith("kernel")]
    norms = [np.linalg.norm(k, axis=0).reshape(4, UNITS) for k in kernels]
    expected = np.mean(norms, axis=(0, 1))
    np.testing.assert_allclose(scores, expected / expected.mean(), rtol=1e-5)


def tagger(**options):
    """Steps of zeros are masked; three classes for each sequence."""
    inputs = keras.Input((STEPS,), dtype="int32")
    x = layers.Embedding(9, 6, mask_zero=True, name="words")(inputs)
    x = layers.Bidirectional(layers.LSTM(5, return_sequences=True, **options), name="both")(x)
    x = layers.GRU(6, name="gru", **options)(x)
    model = zoo.randomized(keras.Model(inputs, layers.Dense(3, activation="softmax", name="head")(x)))
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    random = np.random.default_rng(1)
    x = random.integers(1, 9, (64, STEPS)) * (np.arange(STEPS) < random.integers(2, STEPS + 1, (64, 1)))
    return model, x.astype("int32"), random.integers(0, 3, 64)


@pytest.mark.parametrize("criterion", ["log_odds", "log_odds_probed", "fisher", "sensitivity"])
def test_every_way_to_score_knows_their_units(criterion):
    model, x, y = tagger()
    scores = keras_taylor.score(model, (x, y), criterion=criterion)
    assert {name: values.shape for name, values in scores.items()} == {
        "words": (6,),
        "both": (5,),
        "gru": (6,),
    }
    assert all(np.unique(values).size == values.size for values in scores.values())


def test_the_true_loss_change_is_that_of_the_smaller_model():
    model, x, y = tagger()
    scores = keras_taylor.score(model, (x, y), criterion="oracle", batch_size=64)
    for name, num in (("both", 5), ("gru", 6)):
        small = keras_taylor.prune(model, keras_taylor.Plan({name: LayerPlan(num, tuple(range(1, num)))}))
        change = small.evaluate(x, y, verbose=0) - model.evaluate(x, y, verbose=0)
        np.testing.assert_allclose(scores[name][0], change, rtol=1e-3, atol=1e-5)


def test_compress_from_words_to_classes():
    model, x, y = tagger()
    small = keras_taylor.compress(model, (x, y), goal=0.5, increment=0.25, epochs=1, batch_size=16, verbose=0)
    assert small.count_params() <= 0.5 * model.count_params()
    assert small.get_layer("gru").units < 6
    both = small.get_layer("both")
    assert both.forward_layer.units == both.backward_layer.units < 5
    assert predict(small, x)[0].shape == (64, 3)


def test_units_go_while_a_model_with_dropout_trains():
    model, x, y = tagger(dropout=0.2, recurrent_dropout=0.2)
    prunable = keras_taylor.PrunableModel(model)
    prunable.fit(x, y, batch_size=16, epochs=1, verbose=0)
    assert all(values.any() for values in prunable.scores.values())
    prunable.prune(0.4)
    prunable.fit(x, y, batch_size=16, epochs=1, verbose=0)
    small = prunable.strip()
    assert small.count_params() <= 0.6 * model.count_params()
    assert relative_difference(predict(small, x), predict(prunable, x)) <= 1e-5


def test_what_reads_units_makes_up_for_those_that_others_did_twice():
    """The last unit is a copy of the first, and no unit reads it."""
    inputs = keras.Input((STEPS, 3))
    layer = layers.GRU(UNITS, reset_after=False, use_bias=False, return_sequences=True, name="gru")
    model = zoo.randomized(keras.Model(inputs, layers.Dense(2, name="head")(layer(inputs))))
    kernel, recurrent = (ops.convert_to_numpy(w).copy() for w in layer.weights)
    for weight in (kernel, recurrent):
        weight.reshape(-1, 3, UNITS)[..., -1] = weight.reshape(-1, 3, UNITS)[..., 0]
    recurrent[-1] = 0
    layer.set_weights([kernel, recurrent])
    plan = keras_taylor.Plan({"gru": LayerPlan(UNITS, tuple(range(UNITS - 1)))})
    x = np.random.default_rng(0).normal(size=(128, STEPS, 3)).astype("float32")
    small = keras_taylor.prune(model, plan)
    assert relative_difference(predict(small, x), predict(model, x)) > 1e-2
    repaired, repairs = keras_taylor.repair(small, model, plan, x, return_repairs=True)
    assert [one.name for one in repairs] == ["head"]
    assert relative_difference(predict(repaired, x), predict(model, x)) < 1e-3
    for before, after in zip(small.weights[:2], repaired.weights[:2], strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(after), ops.convert_to_numpy(before))


def test_layers_behind_one_that_lost_inputs_are_refitted_too():
    """What a recurrent layer puts out is other than it was, though all of its units are there."""
    inputs = keras.Input((STEPS, 3))
    x = layers.Dense(8, activation="tanh", name="before")(inputs)
    x = layers.LSTM(UNITS, return_sequences=True, name="lstm")(x)
    x = layers.Dense(6, activation="tanh", name="behind")(x)
    model = zoo.randomized(keras.Model(inputs, layers.Dense(2, name="head")(x)))
    plan = keras_taylor.Plan({"before": LayerPlan(8, tuple(range(7)))})
    small = keras_taylor.prune(model, plan)
    _, repairs = keras_taylor.repair(small, model, plan, zoo.inputs_of(model, 64), return_repairs=True)
    assert [one.name for one in repairs] == ["behind"]
