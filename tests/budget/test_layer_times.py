"""Tables of layer times: what is timed, what lies in between, what is kept; no test depends on a clock."""

import json

import keras
import numpy as np
import pytest
import zoo
from helpers import case

import keras_taylor
from keras_taylor.budget import measuring, time_table
from keras_taylor.budget.goals import parse_goal
from keras_taylor.budget.layer_grids import grid_sizes
from keras_taylor.budget.layer_times import LayerTimes
from keras_taylor.budget.measuring import Measurements
from keras_taylor.cutting.surgery import build_smaller
from keras_taylor.exports import timing
from keras_taylor.loop.route import check_reachable, search_measured
from keras_taylor.plans.ranking import RemovalOrder, RemovalRequest
from keras_taylor.reading.groups import label_model

pytestmark = pytest.mark.sweep(5)


def net(*widths):
    x = inputs = keras.Input((6, 6, 3))
    for number, width in enumerate(widths):
        x = keras.layers.Conv2D(width, 3, padding="same", name=f"conv{number}")(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    x = keras.layers.DepthwiseConv2D(3, name="depthwise")(x)
    return zoo.classified(inputs, x)


def numbers(point):
    """Channels that a point of the table reads, and makes."""
    config, read = point["layer"]["config"], point["shape"][-1]
    return read, config.get("filters") or config.get("units") or read


def bilinear(point):
    read, made = numbers(point)
    return 700 + 40 * read + 30 * made + 5 * read * made * ("depthwise" not in str(point).lower())


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """What was timed, one list for each job. Times follow a law that tests may change."""
    calls = []

    def time_layers(variant, layers, batch_size):
        calls.append(layers)
        return [clock.law(one) for one in layers]

    def clock():
        return [point for points in calls for point in points]

    clock.law, clock.calls, clock.folder = bilinear, calls, str(tmp_path)
    monkeypatch.setattr(time_table, "time_layers", time_layers)
    monkeypatch.setattr(measuring, "time_model", lambda model, batch_size: 10 * model.count_params())
    return clock


def some_kept(channels, seed=0):
    kept = np.random.default_rng(seed).random(channels.num_units) < 0.6
    for group in channels.groups:
        kept[group.start] = True
    return kept


def law_of(model):
    """The sum of the law over the layers of a model."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)):
            read = layer.input.shape[-1]
            product = (
                0 if isinstance(layer, keras.layers.DepthwiseConv2D) else 5 * read * layer.output.shape[-1]
            )
            total += 700 + 40 * read + 30 * layer.output.shape[-1] + product
    return total


@pytest.mark.parametrize("seed", range(3))
def test_between_its_widths_a_bilinear_law_is_met(clock, seed):
    channels = label_model(net(24, 40))
    kept = some_kept(channels, seed)
    times = LayerTimes(channels, "keras", cache_dir=clock.folder)
    small = build_smaller(channels, kept)[0]
    assert times(channels)(kept) == pytest.approx(law_of(small))
    smaller = label_model(small)
    assert times(smaller)(np.ones(smaller.num_units, bool)) == pytest.approx(law_of(small))


@pytest.mark.parametrize(
    "name", ["residual", "concat", "shared_layer", "flatten_dense", "lstm_tagger", "transformer"]
)
def test_less_never_takes_longer(clock, name):
    channels = label_model(case(name).model)
    total = LayerTimes(channels, "keras", cache_dir=clock.folder)(channels)
    kept = some_kept(channels)
    assert 0 < total(kept) <= total(np.ones(channels.num_units, bool))


@pytest.mark.parametrize(
    "name", ["nested_three_deep", "composite_layers", "attending", "siamese", "grouped", "encoder_decoder"]
)
def test_what_was_cut_is_the_same_network(clock, name):
    """The table of the whole model holds for the smaller one."""
    channels = label_model(case(name).model)
    times = LayerTimes(channels, "keras", cache_dir=clock.folder)
    kept = some_kept(channels)
    smaller = label_model(build_smaller(channels, kept)[0])
    assert times(smaller)(np.ones(smaller.num_units, bool)) == pytest.approx(times(channels)(kept))


@pytest.mark.parametrize(
    ("num", "grid"),
    [
        (0, [0]),
        (1, [1]),
        (3, [1, 2, 3]),
        (12, [3, 6, 12]),
        (16, [8, 16]),
        (40, [8, 16, 40]),
        (64, [16, 32, 64]),
    ],
)
def test_the_grid_is_of_round_widths(num, grid):
    assert grid_sizes(num) == grid


def test_equal_layers_are_timed_once(clock):
    LayerTimes(label_model(net(16, 16, 16)), "keras", cache_dir=clock.folder)
    found = [json.dumps(point, sort_keys=True) for point in clock()]
    assert len(found) == len(set(found)) == 2 + 4 + 2 + 2  # first, inner, depthwise, head


def test_what_was_timed_is_kept(clock):
    channels = label_model(net(8, 12))
    first = LayerTimes(channels, "keras", cache_dir=clock.folder)
    timed = len(clock.calls)
    again = LayerTimes(channels, "keras", cache_dir=clock.folder)
    assert len(clock.calls) == timed > 0
    kept = some_kept(channels)
    assert again(channels)(kept) == first(channels)(kept)
    LayerTimes(channels, "keras", batch_size=8, cache_dir=clock.folder)
    assert len(clock.calls) == 2 * timed


def test_a_table_that_cannot_be_read_is_measured_again(clock):
    channels = label_model(net(8))
    table = LayerTimes(channels, "keras", cache_dir=clock.folder).table
    timed = len(clock())
    table.path.write_text("{")
    LayerTimes(channels, "keras", cache_dir=clock.folder)
    assert len(clock()) == 2 * timed
    assert len(json.loads(table.path.read_text())["times"]) == timed


def test_keras_own_folder_holds_the_tables(clock, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", clock.folder)
    path = LayerTimes(label_model(net(8)), "keras").table.path
    assert path.is_file()
    assert str(path.parent) == f"{clock.folder}/keras_taylor"


def test_how_long_it_takes_is_said_once(clock):
    said = []
    LayerTimes(label_model(net(24, 40)), "keras", cache_dir=clock.folder, say=said.append)
    (text,) = said
    assert text.startswith(f"timing {len(clock())} layers for 'keras', once for this machine: about ")


def test_a_folder_that_cannot_be_written_to_is_no_failure(clock, tmp_path):
    said = []
    (tmp_path / "file").write_text("")
    LayerTimes(label_model(net(8)), "keras", cache_dir=tmp_path / "file", say=said.append)
    assert any(text.startswith("the times of layers cannot be saved") for text in said)


def test_what_cannot_be_timed_is_left_to_the_whole(clock):
    channels = label_model(net(24, 40))
    clock.law = lambda point: None if point["layer"]["class_name"] == "Dense" else bilinear(point)
    times = LayerTimes(channels, "keras", cache_dir=clock.folder)(channels)
    kept = some_kept(channels)
    small = build_smaller(channels, kept)[0]
    head = 700 + 40 * small.layers[-1].input.shape[-1] + 30 * 3 + 5 * 3 * small.layers[-1].input.shape[-1]
    assert times(kept) == pytest.approx(law_of(small) - head)


def test_a_network_without_a_layer_that_can_be_timed_is_refused(clock):
    clock.law = lambda point: None
    with pytest.raises(ValueError, match=r"None of the layers can be timed alone.*Ask for FLOPs") as error:
        LayerTimes(label_model(net(8)), "keras", cache_dir=clock.folder)
    assert str(error.value).endswith("as 'keras'")


def test_unknown_sizes_are_refused(clock):
    inputs = keras.Input((None, None, 3))
    model = zoo.classified(inputs, zoo.conv(inputs, 6, "conv1"))
    with pytest.raises(ValueError, match=r"axes of unknown size.*Received: goal for 'latency'"):
        Measurements(label_model(model), ["latency"], cache_dir=clock.folder)


@pytest.mark.parametrize("multiple", [1, 4, 8, 16])
def test_the_multiple_that_pays_is_found(clock, multiple):
    def law(point):
        read, made = (-(-n // multiple) * multiple for n in numbers(point))
        return 700 + 5 * read * made * ("depthwise" not in str(point).lower()) + 200 * read

    clock.law = law
    times = LayerTimes(label_model(net(64, 64)), "keras", cache_dir=clock.folder)
    assert times.best_multiple() == multiple


def eights(point):
    """The law of a processor that takes eight channels at a time."""
    read, made = (-(-number // 8) * 8 for number in numbers(point))
    return 700 + 5 * read * made


def test_narrow_layers_have_no_say_in_the_multiple(clock):
    clock.law = lambda point: 10**7 if max(numbers(point)) <= 16 else eights(point)
    times = LayerTimes(label_model(net(16, 16, 64, 64)), "keras", cache_dir=clock.folder)
    assert times.best_multiple() == 8


def test_noise_at_a_narrow_width_does_not_raise_wider_ones(clock):
    channels = label_model(net(16, 64, 64))
    whole = np.ones(channels.num_units, bool)
    expected = LayerTimes(channels, "keras", cache_dir=clock.folder)(channels)(whole)
    clock.law = lambda point: bilinear(point) * (50 if numbers(point) == (16, 16) else 1)
    noisy = LayerTimes(channels, "keras", cache_dir=f"{clock.folder}/noisy")(channels)
    assert noisy(whole) == expected
    assert noisy(some_kept(channels)) <= expected


def test_auto_keeps_to_the_multiple_that_pays(clock, monkeypatch, tmp_path):
    clock.law = eights
    monkeypatch.setenv("KERAS_HOME", clock.folder)
    model, x = net(40, 48, 64), np.random.default_rng(0).random((32, 6, 6, 3), "float32")
    model.compile("sgd", "sparse_categorical_crossentropy")
    arguments = {
        "selection": keras_taylor.Selection(round_to="auto"),
        "epochs": 0,
        "verbose": 0,
        "return_info": True,
    }
    arguments |= {"backup_dir": str(tmp_path / "state")}
    small, info = keras_taylor.compress(model, x, {"latency": 0.3}, **arguments)
    assert info.round_to == 8
    widths = [layer.filters for layer in small.layers if isinstance(layer, keras.layers.Conv2D)]
    assert all(width % 8 == 0 for width in widths) and sum(widths) < 40 + 48 + 64
    clock.law = bilinear  # another day the machine says something else: the run stays what it was
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "other"))
    assert keras_taylor.compress(model, x, {"latency": 0.3}, **arguments)[1].round_to == 8


@pytest.mark.parametrize("goal", [0.3, {"flops": 0.5, "bytes": 9000}])
def test_auto_needs_times(goal):
    model = net(24)
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError) as error:
        selection = keras_taylor.Selection(round_to="auto")
        keras_taylor.compress(model, np.zeros((4, 6, 6, 3)), goal, selection=selection, epochs=0)
    assert str(error.value) == (
        "With `round_to='auto'` the measured times of layers decide which multiple of channels to keep. "
        "Expected a goal for a 'latency', or a whole number. Received: round_to='auto'"
    )


def test_a_latency_is_met_by_measuring(clock):
    goal = {"latency": 0.4}
    model = net(24, 40)
    channels = label_model(model)
    wanted = parse_goal(goal, measurable=True)
    measurements = Measurements(channels, wanted.measured, cache_dir=clock.folder)
    assert measurements.before == {"latency": 10 * model.count_params()}
    flat = np.random.default_rng(0).random(channels.num_units)
    request = RemovalRequest(wanted.ceilings(measurements.before), goal)
    arguments = (
        *(channels, lambda costs: RemovalOrder(channels, costs, flat), request),
        *(measurements, lambda kept: build_smaller(channels, kept)[0]),
    )
    check_reachable(*arguments)
    kept, found = search_measured(*arguments)
    assert found == {"latency": 10 * build_smaller(channels, kept)[0].count_params()}
    assert (
        0.93 * 0.6 * measurements.before["latency"]
        <= found["latency"]
        <= 0.6 * measurements.before["latency"]
    )


def test_a_suspicious_time_is_measured_again(clock, monkeypatch):
    channels = label_model(net(24, 40))
    measurements = Measurements(channels, ["latency"], cache_dir=clock.folder)
    predicted = measurements.before["latency"]
    times = iter([2 * predicted, predicted + 7, predicted + 9])
    monkeypatch.setattr(measuring, "time_model", lambda model, batch_size: next(times))
    kept = np.ones(channels.num_units, bool)
    assert measurements.observe(channels, kept, channels.graph.model) == {"latency": predicted + 7}
    assert measurements.observe(channels, kept, channels.graph.model) == {"latency": predicted + 9}


class ScriptedRunner:
    """A runner whose calls take as long as the test says."""

    def __init__(self, monkeypatch, durations):
        self.now, self.durations, self.calls = 0, iter(durations), 0
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: self.now)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now / 1e9)

    def prepare(self, arrays):
        return arrays

    def run(self, prepared):
        self.calls += 1
        self.now += next(self.durations, 10**8)


def test_the_time_of_a_call_is_the_median_of_the_fastest_block(monkeypatch):
    warm_up, slow, calm = [10**9] * 2, [5 * 10**8] * 9, [10**8, 9 * 10**8, 10**8]
    runner = ScriptedRunner(monkeypatch, warm_up + slow + calm + [3 * 10**8] * 60)
    assert timing.min_block_median(runner, [], timing.TimeLimits(patience=3, total=60)) == 10**8
    assert runner.calls == 2 + 9 + 3 + 3 * timing.MIN_BLOCKS  # which take longer than the patience


def test_timing_on_a_busy_machine_ends(monkeypatch):
    faster = (10**9 * 0.98 ** (k // 3) for k in range(1000))
    runner = ScriptedRunner(monkeypatch, faster)
    timing.min_block_median(runner, [], timing.TimeLimits(patience=100, total=30))
    assert 30 <= runner.now / 1e9 < 40


def test_slow_models_are_called_a_few_times_anyway(monkeypatch):
    runner = ScriptedRunner(monkeypatch, [10**10] * 100)
    timing.min_block_median(runner, [], timing.TimeLimits(patience=1, total=2))
    assert runner.calls == 2 + timing.CALLS_PER_BLOCK * timing.MIN_BLOCKS


@pytest.mark.parametrize("variant", ["keras", "litert-int8", "onnx"])
@pytest.mark.slow
def test_layers_and_models_are_really_timed(tmp_path, variant):
    if variant != "keras":
        pytest.importorskip("tensorflow")
    if variant == "onnx":
        pytest.importorskip("tf2onnx")
    key, channels = f"latency:{variant}", label_model(net(6))
    measurements = Measurements(channels, [key], cache_dir=tmp_path)
    costs = measurements.costs(channels)
    assert 0 < measurements.before[key] == costs()[key]
    assert 0 < costs(some_kept(channels))[key] <= costs()[key]
    assert len(list(tmp_path.glob("layer-times-*.json"))) == 1
