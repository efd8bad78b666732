"""Tasks of KerasHub go in with the data that their `fit` takes, and come back as tasks."""

import os
import subprocess
import sys
import warnings

import hub_tasks
import keras
import numpy as np
import pytest
from hub_tasks import LABELS, TEXTS

import keras_taylor

pytestmark = pytest.mark.sweep(1)

pytest.importorskip("keras_hub")
FEED_FORWARD = "feedforward_intermediate_dense"


def feed_forward_widths(plan):
    return [len(layer.kept) for name, layer in plan.layers.items() if name.endswith(FEED_FORWARD)]


def test_a_task_without_a_branch_comes_back_and_says_that_its_backbone_is_functional():
    task = hub_tasks.bert_classifier()
    groups = keras_taylor.analyze(task, branches=True).groups
    first, *_, last = [group.name for group in groups if group.is_branch and group.prunable]
    plan = keras_taylor.Plan({name: keras_taylor.LayerPlan(1, ()) for name in (first, last)}, branches=True)
    with pytest.warns(UserWarning, match="Functional model: no numbers .* to layers without these branches"):
        small = keras_taylor.prune(task, plan)
    assert type(small) is type(task) and len(small.weights) < len(task.weights)
    repaired = keras_taylor.repair(small, task, plan, TEXTS)
    whole, cut, mended = (one.predict(TEXTS, verbose=0) for one in (task, small, repaired))
    assert np.abs(mended - whole).mean() < np.abs(cut - whole).mean()
    assert small.fit(TEXTS, LABELS, verbose=0).history["loss"][0] > 0


def test_whole_blocks_leave_and_the_number_of_layers_follows():
    from keras_hub import models

    backbone = models.ViTBackbone(
        image_shape=(8, 8, 3), patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=12
    )
    task = hub_tasks.settled(models.ViTImageClassifier(backbone, num_classes=2, preprocessor=None))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    task.compile("sgd", loss, run_eagerly=keras.backend.backend() != "jax")
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype("float32")
    scores = keras_taylor.score(task, (x, np.arange(16) % 2), branches=True)
    selection = keras_taylor.Selection(branches=True, min_channels=6)
    plan = keras_taylor.make_plan(task, scores, {"flops": 0.6}, selection=selection)
    sums = [name for name, layer in plan.layers.items() if not layer.kept]
    blocks = {name.rpartition("/")[0] for name in sums}
    assert blocks and len(sums) == 2 * len(blocks)  # attention and feed-forward leave together
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        small = keras_taylor.prune(task, plan)
    config = small.backbone.get_config()
    assert type(small) is type(task) and small.count_params() == plan.after["params"]
    assert config["num_layers"] == 3 - len(blocks)
    widths = {len(layer.kept) for layer in plan.layers.values() if layer.kept}
    assert {config["mlp_dim"]} == (widths or {12})
    half = keras_taylor.Plan({sums[0]: keras_taylor.LayerPlan(1, ())}, branches=True)
    with pytest.warns(UserWarning, match="to layers without these branches"):
        assert isinstance(keras_taylor.prune(task, half), keras.Model)


def plan_for(task, goal=0.15, **arguments):
    return keras_taylor.make_plan(task, keras_taylor.score(task, criterion="magnitude"), goal, **arguments)


def test_a_text_classifier_is_compressed_on_strings_and_comes_back_as_one():
    task = hub_tasks.bert_classifier()
    before = [np.array(keras.ops.convert_to_numpy(w)) for w in task.weights]
    small, info = keras_taylor.compress(
        task,
        (TEXTS, LABELS),
        0.2,
        increment=0.2,
        verbose=0,
        return_info=True,
        validation_data=(TEXTS, LABELS),
    )
    assert type(small) is type(task) and small.preprocessor is task.preprocessor
    assert small.count_params() <= 0.8 * task.count_params()
    width = small.backbone.get_config()["intermediate_dim"]
    assert width < 32 and feed_forward_widths(info.plan) == [width, width]
    assert small.predict(TEXTS, verbose=0).shape == (len(TEXTS), 2)
    assert small.fit(TEXTS, LABELS, verbose=0).history["loss"][0] > 0
    for old, weight in zip(before, task.weights, strict=True):
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(weight))


@pytest.mark.once
@pytest.mark.slow
def test_scores_come_from_raw_data_and_from_what_the_preprocessor_makes_of_it_alike():
    task = hub_tasks.bert_classifier()
    x, y = task.preprocessor(TEXTS, y=LABELS)
    scores = keras_taylor.score(task, (TEXTS, LABELS))
    task.preprocessor = None
    tokens = keras.tree.map_structure(keras.ops.convert_to_numpy, (x, y))
    tensors = keras.tree.map_structure(keras.ops.convert_to_tensor, tokens)
    for found in (keras_taylor.score(task, tokens), keras_taylor.score(task, tensors)):
        for name, values in found.items():
            np.testing.assert_allclose(scores[name], values, rtol=1e-5)


@pytest.mark.once
@pytest.mark.slow
def test_the_preprocessor_runs_once_over_arrays():
    task, seen = hub_tasks.gpt2_lm(), []
    preprocess = task.preprocessor.call

    def call(x, *args, **kwargs):
        seen.append(len(x))
        return preprocess(x, *args, **kwargs)

    task.preprocessor.call = call
    keras_taylor.compress(task, TEXTS, 0.1, increment=0.05, epochs=2, verbose=0)
    assert sum(seen) <= len(TEXTS) + 2 * 8  # a few are read twice, to see whether chance is in it


def test_a_language_model_generates_what_the_original_without_the_units_does():
    task = hub_tasks.gpt2_lm()
    plan = plan_for(task, 0.2)
    small, masked = keras_taylor.prune(task, plan), keras_taylor.prune(task, keras_taylor.Plan())
    for name, layer in plan.layers.items():
        number = int(name.split("/")[1][-1])
        dense = masked.backbone.transformer_layers[number]._feedforward_intermediate_dense
        open_units = np.isin(np.arange(layer.width), layer.kept)
        for weight in dense.weights:
            weight.assign(keras.ops.convert_to_numpy(weight) * open_units)
    prompts = ["the c", "a", "dog"]
    for max_length in (8, 20):
        made = [m.generate(prompts, max_length=max_length, stop_token_ids=None) for m in (small, masked)]
        assert made[0] == made[1] and all(
            len(text) > len(prompt) for text, prompt in zip(made[0], prompts, strict=True)
        )
    small.preprocessor = None
    tokens = np.random.default_rng(0).integers(1, 28, (3, 12))
    prompt = {"token_ids": tokens, "padding_mask": np.arange(12) < np.full((3, 1), 4)}
    with_cache = small.generate(prompt, stop_token_ids=None)["token_ids"]
    for length in range(4, 12):  # without a cache: one pass for each token
        given = {"token_ids": with_cache[:, :length], "padding_mask": np.ones((3, length), bool)}
        logits = keras.ops.convert_to_numpy(small(given, training=False))
        np.testing.assert_array_equal(logits[:, -1].argmax(-1), with_cache[:, length])


@pytest.mark.once
@pytest.mark.parametrize("make", [hub_tasks.bert_classifier, hub_tasks.gpt2_lm])
@pytest.mark.slow
def test_an_empty_plan_changes_nothing_and_the_optimizer_goes_on(make):
    task = make()
    task.fit(TEXTS, LABELS if make is hub_tasks.bert_classifier else None, verbose=0)
    same = keras_taylor.prune(task, keras_taylor.Plan())
    np.testing.assert_array_equal(task.predict(TEXTS, verbose=0), same.predict(TEXTS, verbose=0))
    assert type(same.optimizer).__name__ == type(task.optimizer).__name__
    assert len(same.optimizer.variables) == len(task.optimizer.variables)
    for old, new in zip(task.optimizer.variables, same.optimizer.variables, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (old, new)))


@pytest.mark.slow
def test_presets_load_in_a_process_without_this_package(tmp_path):
    task = hub_tasks.gpt2_lm()
    small = keras_taylor.prune(task, plan_for(task))
    small.save_to_preset(str(tmp_path / "preset"))
    small.save(tmp_path / "small.keras")
    np.save(tmp_path / "wanted.npy", small.predict(TEXTS[:2], verbose=0))
    code = (
        "import sys, keras, keras_hub, numpy as np; folder = sys.argv[1]\n"
        "wanted = np.load(folder + '/wanted.npy')\n"
        "task = keras_hub.models.CausalLM.from_preset(folder + '/preset')\n"
        "for one in (task, keras.models.load_model(folder + '/small.keras')):\n"
        "    assert type(one).__name__ == 'GPT2CausalLM'\n"
        f"    np.testing.assert_allclose(one.predict({TEXTS[:2]}, verbose=0), wanted, rtol=1e-5, atol=1e-5)\n"
        "assert 'keras_taylor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.once
@pytest.mark.slow
def test_the_result_can_be_quantized_and_tuned_with_lora():
    task = hub_tasks.gpt2_lm()
    small = keras_taylor.prune(task, plan_for(task))
    small.backbone.enable_lora(2)
    assert small.fit(TEXTS, verbose=0).history["loss"][0] > 0
    small = keras_taylor.prune(task, plan_for(task))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small.quantize("int8")
    assert small.predict(TEXTS[:2], verbose=0).shape[0] == 2


@pytest.mark.once
def test_what_the_configuration_cannot_say_stays_and_analyze_tells_why():
    task = hub_tasks.bert_classifier()
    analysis = keras_taylor.analyze(task)
    reasons = {group.name: group.reason for group in analysis.groups}
    free = [name for name, reason in reasons.items() if reason is None]
    assert len(free) == 2 and all(name.endswith(FEED_FORWARD) for name in free)
    heads = next(reason for name, reason in reasons.items() if name.endswith("query"))
    assert heads == "no numbers in the configuration of BertTextClassifier count these channels alone"
    plan = plan_for(task, 0.9 * analysis.reachable["params"])
    assert set(plan.layers) == set(free)


def test_an_edited_plan_keeps_the_layers_of_a_task_alike():
    task = hub_tasks.bert_classifier()
    plan = plan_for(task)
    name = next(name for name in plan.layers if name.endswith(FEED_FORWARD))
    edited = plan.keep(name, 20)
    assert feed_forward_widths(edited) == [20, 20]
    small = keras_taylor.prune(task, edited)
    assert type(small) is type(task) and small.backbone.get_config()["intermediate_dim"] == 20


@pytest.mark.once
@pytest.mark.slow
def test_free_widths_come_back_functional_and_preprocess():
    free = keras_taylor.Selection(uniform=False, rank="score")
    task = hub_tasks.bert_classifier()
    with pytest.warns(
        UserWarning, match="The backbone of the smaller .* is a plain Functional model: no numbers"
    ):
        small = keras_taylor.prune(task, plan_for(task, 0.3, selection=free))
    assert type(small) is type(task)
    assert small.predict(TEXTS, verbose=0).shape == (len(TEXTS), 2)
    task = hub_tasks.gpt2_lm()
    with pytest.warns(
        UserWarning, match="is a plain Functional model that preprocesses its data: no numbers"
    ):
        small = keras_taylor.prune(task, plan_for(task, 0.2, selection=free))
    assert small.predict(TEXTS, verbose=0).shape[:2] == (len(TEXTS), 24)
    repaired = keras_taylor.repair(small, task, plan_for(task, 0.2, selection=free), TEXTS)
    whole, cut, better = (m.predict(TEXTS, verbose=0) for m in (task, small, repaired))
    assert np.abs(better - whole).mean() < np.abs(cut - whole).mean()
    again = keras_taylor.prune(small, plan_for(small, 0.1))
    assert again.count_params() < small.count_params() and len(again.predict(TEXTS, verbose=0)) == len(TEXTS)
    assert small.fit(TEXTS, verbose=0).history["loss"][0] > 0


@pytest.mark.once
def test_backbones_come_back_as_backbones():
    backbone = hub_tasks.gpt2_lm().backbone
    small = keras_taylor.prune(backbone, plan_for(backbone))
    assert type(small) is type(backbone) and small.intermediate_dim < 32


@pytest.mark.once
@pytest.mark.slow
def test_repair_takes_raw_data_and_returns_a_task():
    task = hub_tasks.gpt2_lm()
    plan = plan_for(task, 0.2)
    small = keras_taylor.prune(task, plan)
    repaired = keras_taylor.repair(small, task, plan, TEXTS)
    assert type(repaired) is type(task)
    whole, cut, better = (m.predict(TEXTS, verbose=0) for m in (task, small, repaired))
    assert np.abs(better - whole).mean() < np.abs(cut - whole).mean()


@pytest.mark.once
def test_a_wrapped_task_is_stripped_to_a_task():
    task = hub_tasks.bert_classifier()
    prunable = keras_taylor.PrunableModel(task, criterion="magnitude")
    prunable.prune(0.15)
    small = prunable.strip()
    assert type(small) is type(task) and small.count_params() <= 0.85 * task.count_params()


@pytest.mark.once
def test_texts_without_a_preprocessor_are_refused():
    task = hub_tasks.bert_classifier()
    task.preprocessor = None
    with pytest.raises(ValueError) as error:
        keras_taylor.compress(task, (TEXTS, LABELS), 0.1)
    assert "has no preprocessor, and the data holds texts. Expected a task with its preprocessor" in str(
        error.value
    )
    assert str(error.value).endswith("Received: ds with texts, preprocessor=None")


@pytest.mark.once
def test_ratios_that_contradict_the_ties_of_a_task_are_refused():
    task = hub_tasks.bert_classifier()
    query = keras_taylor.Selection(ratios={".*query": 0.5})
    with pytest.raises(
        ValueError, match=r"`ratios` contradict `uniform`: channels of .*query' stay, since no numbers"
    ):
        plan_for(task, 0.1, selection=query)
    one = keras_taylor.Selection(ratios={f".*0/{FEED_FORWARD}": 0.5, f".*1/{FEED_FORWARD}": 0.25})
    with pytest.raises(
        ValueError, match="lose equally many units, but at least 16 of the first and at most 8 of"
    ):
        plan_for(task, 0.1, selection=one)


@pytest.mark.once
@pytest.mark.slow
def test_keras_hub_is_not_imported():
    code = "import sys, keras_taylor; assert 'keras_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.mark.once
@pytest.mark.slow
def test_data_sets_are_preprocessed_in_each_pass():
    tf = pytest.importorskip("tensorflow")
    task = hub_tasks.bert_classifier()
    ds = tf.data.Dataset.from_tensor_slices((TEXTS, LABELS)).batch(8)
    from_arrays = keras_taylor.score(task, (TEXTS, LABELS), criterion="taylor")
    for name, values in keras_taylor.score(task, ds, criterion="taylor").items():
        np.testing.assert_allclose(values, from_arrays[name], rtol=1e-4)
    batches = [(TEXTS[i : i + 8], LABELS[i : i + 8]) for i in range(0, 32, 8)]
    for name, values in keras_taylor.score(task, batches, criterion="taylor").items():
        np.testing.assert_allclose(values, from_arrays[name], rtol=1e-4)
