"""Groups of known networks, by hand."""

import re

import keras
import numpy as np
import pytest
import zoo
from helpers import NAMES, case
from keras import layers, ops

from keras_taylor.reading.groups import label_model

pytestmark = pytest.mark.once


def groups_of(name):
    return {g.name: (g.num_units, set(g.producers)) for g in label_model(case(name).model).groups}


def locked_of(channels):
    return {g.name: (g.num_units, g.reason) for g in channels.locked_groups}


def test_a_chain_has_a_group_a_layer_and_its_output_is_locked():
    channels = label_model(case("chain").model)
    assert groups_of("chain") == {"conv1": (6, {"conv1"}), "conv2": (8, {"conv2"})}
    assert locked_of(channels) == {"head": (3, "the model's output")}
    assert channels.unknown == []


def test_all_layers_on_a_residual_stream_are_one_group():
    assert groups_of("residual") == {
        "stem": (6, {"stem", "block0_b", "block1_b"}),
        "block0_a": (5, {"block0_a"}),
        "block1_a": (5, {"block1_a"}),
    }


def test_zero_padded_channels_leave_with_the_block_that_they_meet():
    groups = groups_of("zero_pad_shortcut")
    assert groups["stem"] == (4, {"stem", "block0_b", "block1_b"})
    padded = [(num, producers) for num, producers in groups.values() if "stem" not in producers]
    assert (4, {"pad", "block0_b", "block1_b"}) in padded
    assert (4, {"pad_1", "block1_b"}) in padded
    assert sum(num for num, _ in groups.values()) == 12 + 8 + 12


def test_concatenated_layers_stay_apart():
    assert groups_of("concat") == {
        "left": (4, {"left"}),
        "right": (5, {"right"}),
        "after": (6, {"after"}),
    }


def test_squeeze_and_excite_gates_live_with_what_they_gate():
    assert groups_of("squeeze_excite") == {
        "conv1": (6, {"conv1", "excite"}),
        "squeeze": (3, {"squeeze"}),
        "conv2": (5, {"conv2"}),
    }


def test_flattened_channels_are_one_unit_at_all_positions():
    channels = label_model(case("flatten_dense").model)
    (flat,) = [
        channels.units_of(e.weights["gamma"][0])
        for c, e in zip(channels.graph.calls, channels.effects, strict=True)
        if c.name == "flat_bn"
    ]
    np.testing.assert_array_equal(flat, np.tile(np.arange(4), 16))


def test_grouped_convolutions_lose_equal_positions_of_their_groups():
    assert groups_of("grouped") == {
        "conv1": (4, {"conv1"}),
        "grouped": (3, {"grouped"}),
        "conv2": (6, {"conv2"}),
    }


def test_a_channel_shuffle_keeps_what_is_kept_regular():
    assert {name: num for name, (num, _) in groups_of("channel_shuffle").items()} == {
        "conv1": 4,
        "grouped1": 2,
        "grouped2": 4,
        "conv2": 6,
    }


def test_a_depth_multiplier_repeats_channels():
    channels = label_model(case("depth_multiplier").model)
    (made,) = [
        channels.units_of(e.outputs[0]).reshape(-1)
        for c, e in zip(channels.graph.calls, channels.effects, strict=True)
        if c.name == "depthwise"
    ]
    np.testing.assert_array_equal(made, np.repeat(np.arange(4), 3))


def test_a_layer_used_thrice_is_one_group_with_what_feeds_it():
    assert groups_of("shared_layer") == {"conv1": (6, {"conv1", "shared"})}


def test_a_sub_model_used_twice_has_one_group_a_layer():
    assert groups_of("siamese") == {
        "encoder/conv1": (6, {"encoder/conv1"}),
        "encoder/embed": (5, {"encoder/embed"}),
    }


def test_a_tensor_that_is_an_output_is_locked_with_all_that_meet_it():
    channels = label_model(case("output_in_the_middle").model)
    assert [g.name for g in channels.groups] == ["conv1"]
    assert locked_of(channels)["features"] == (5, "the model's output")


def test_slices_split_a_layer_into_groups():
    channels = label_model(case("split_and_slice").model)
    assert [(g.name, g.num_units) for g in channels.groups[:3]] == [
        ("conv1", 3),
        ("conv1#2", 2),
        ("conv1#3", 1),
    ]


def test_what_is_normalized_over_channels_is_locked_with_a_reason():
    channels = label_model(case("layernorm").model)
    assert locked_of(channels)["conv1"] == (6, "normalized together ('norm'); `exact=False` opens it")
    assert [g.name for g in channels.groups] == ["expand"]


def test_an_operation_without_a_rule_locks_what_it_touches_and_is_named():
    channels = label_model(case("unknown_layer").model)
    assert channels.unknown == ["sorted/topk_0"]
    assert locked_of(channels)["conv2"] == (5, "read by TopK, which has no rule ('sorted/topk_0')")
    assert {g.name for g in channels.groups} == {"conv1", "conv3"}


@pytest.mark.parametrize(
    "end",
    [
        lambda x: layers.Dense(3, activation="softmax", name="head")(x),
        lambda x: layers.Softmax()(layers.Dense(3, name="head")(x)),
        lambda x: ops.log(ops.softmax(layers.Dense(3, name="head")(x))),
        lambda x: layers.Activation("log_softmax")(layers.Dense(3, activation="relu", name="head")(x)),
    ],
)
def test_a_layer_whose_outputs_are_the_models_stays_for_that_reason(end):
    inputs = keras.Input((4,))
    channels = label_model(keras.Model(inputs, end(layers.Dense(5, name="hidden")(inputs))))
    assert locked_of(channels) == {"head": (3, "the model's output")}


def test_augmentation_before_the_first_layer_locks_nothing_and_is_not_reported():
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Rescaling(1 / 255)(layers.RandomContrast(0.2)(layers.RandomFlip()(x)))
    x = layers.RandomBrightness(0.2, name="late")(layers.Conv2D(6, 3, name="conv")(x))
    channels = label_model(zoo.classified(inputs, layers.Conv2D(5, 3, name="conv2")(x)))
    assert channels.unknown == ["late"]
    assert set(locked_of(channels)) == {"conv", "head"}


def test_an_operation_without_a_rule_names_the_layer_that_has_one():
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", name="conv")(x)
    x = ops.conv_transpose(x, np.ones((2, 2, 4, 6), "float32"), strides=2)
    channels = label_model(zoo.classified(inputs, layers.Conv2D(5, 3, name="conv2")(x)))
    why = "read by ConvTranspose, which has no rule (`keras.layers.Conv2DTranspose` has one)"
    assert locked_of(channels)["conv"][1].startswith(why)


def test_a_subclass_of_a_known_layer_is_unknown():
    class Twisted(layers.Conv2D):
        pass

    x = inputs = keras.Input((8, 8, 3))
    x = Twisted(6, 3, name="twisted")(layers.Conv2D(5, 3, name="conv")(x))
    channels = label_model(zoo.classified(inputs, x))
    assert channels.groups == []
    assert channels.unknown == ["twisted"]


@pytest.mark.parametrize("name", NAMES)
def test_units_are_counted_group_by_group(name):
    channels = label_model(case(name).model)
    stops = np.cumsum([g.num_units for g in channels.groups])
    assert [g.start for g in channels.groups] == [0, *stops[:-1]]
    assert channels.num_units == stops[-1]
    assert len({g.name for g in channels.groups}) == len(channels.groups)
    assert all(g.prunable for g in channels.groups)
    assert all(g.reason for g in channels.locked_groups)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_never_have_units(name):
    channels = label_model(case(name).model)
    for index in channels.graph.outputs:
        assert (channels.units_of(channels.labels[index]) < 0).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.softmax(x, axis=-1),
        lambda x: layers.Softmax()(x),
        lambda x: ops.mean(x, axis=-1, keepdims=True),
        lambda x: ops.sort(x, axis=-1),
        lambda x: ops.cumsum(x, axis=-1),
        lambda x: layers.Activation("softmax")(x),
        lambda x: layers.UnitNormalization()(x),
        lambda x: layers.Permute((3, 1, 2))(layers.LayerNormalization(axis=[1, 2, 3])(x)),
        lambda x: ops.pad(x, [(0, 0), (0, 0), (0, 0), (1, 1)], mode="reflect"),
        lambda x: ops.pad(x, [(1, 0), (0, 0), (0, 0), (0, 0)]),
        lambda x: ops.max(x, axis=0, keepdims=True),
        lambda x: x[::2, :],
        lambda x: ops.split(x, 2, axis=0)[0],
        lambda x: ops.reshape(ops.transpose(x, (0, 3, 1, 2)), (-1, 36)),
        lambda x: x[0],
        lambda x: x[..., 0, :, :, :],
    ],
)
def test_what_mixes_channels_locks_them(function):
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, name="conv")(x)
    y = function(x)
    channels = label_model(keras.Model(inputs, [layers.Dense(2, name="head")(y)]))
    assert "conv" not in [g.name for g in channels.groups]


def test_a_channel_taken_out_alone_stays_and_those_that_nobody_reads_may_go():
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, name="conv")(x)[..., 2:3]
    channels = label_model(zoo.classified(inputs, x))
    assert [(g.name, g.num_units) for g in channels.groups] == [("conv", 5)]
    assert locked_of(channels)["conv"][0] == 1


def test_exclude_locks_by_name_expression_and_layer():
    model = case("residual").model
    for exclude in (["block0_a"], "block0_a", [model.get_layer("block0_a")], [re.escape("block0_a")]):
        names = [g.name for g in label_model(model, exclude=exclude).groups]
        assert names == ["stem", "block1_a"]
    assert [g.name for g in label_model(model, exclude="block._a").groups] == ["stem"]


def test_excluding_one_layer_of_a_stream_locks_the_stream():
    channels = label_model(case("residual").model, exclude="block1_b")
    assert [g.name for g in channels.groups] == ["block0_a", "block1_a"]
    assert locked_of(channels)["stem"] == (6, "excluded by the caller")


def test_include_locks_all_others():
    channels = label_model(case("residual").model, include=["block0_a", "block0_b"])
    assert [g.name for g in channels.groups] == ["block0_a"]
    assert locked_of(channels)["stem"] == (6, "not included by the caller")


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_names_that_match_nothing_are_refused(argument):
    with pytest.raises(ValueError) as error:
        label_model(case("chain").model, **{argument: ["conv9"]})
    assert str(error.value) == (
        f"`{argument}` names a layer that the model does not have. Expected layer names, regular "
        "expressions that match whole names, or layers of the model; it has conv1, conv1_bn, conv1_act, "
        f"down, conv2, drop, pool, head. Received: {argument}='conv9'"
    )


def test_a_layer_of_another_model_is_refused():
    other = layers.Dense(3, name="other")
    with pytest.raises(ValueError, match=r"Received: exclude=<Dense name=other, built=False>$"):
        label_model(case("chain").model, exclude=[other])


def test_a_sequential_model_that_is_not_built_is_refused():
    with pytest.raises(ValueError) as error:
        label_model(keras.Sequential([layers.Dense(3)], name="digits"))
    assert str(error.value) == (
        "Model 'digits' is not built: its weights do not exist yet. Give it a `keras.Input` as its first "
        "layer, or call it once on a batch of data. Received: model=<Sequential name=digits, built=False>"
    )


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"^Expected a `keras.Model`. Received: model=3 \(of type int\)$"):
        label_model(3)
