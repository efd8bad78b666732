"""Tasks of many families of KerasHub come back as tasks, equal to the original without the units."""

import pathlib
import sys
import warnings

import keras
import numpy as np
import pytest
from helpers import predict, relative_difference
from hub_tasks import settled

import keras_taylor
from keras_taylor.plans.planning import kept_units, label_as_planned
from keras_taylor.scores.gated_model import GatedModel

pytest.importorskip("keras_hub")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import hub

# Backbones without whole numbers that count their channels: widths are products with fractions.
FUNCTIONAL = {"EfficientNetImageClassifier", "DenseNetImageClassifier"}
NAMES = [
    *("ResNetImageClassifier", "MobileNetImageClassifier", "EfficientNetImageClassifier"),
    *("ViTImageClassifier", "CSPNetImageClassifier", "DenseNetImageClassifier", "DeepLabV3ImageSegmenter"),
    *("BertTextClassifier", "RobertaTextClassifier", "DistilBertTextClassifier", "GPT2CausalLM"),
    *("LlamaCausalLM", "GemmaCausalLM", "MistralCausalLM", "BartSeq2SeqLM"),
]


@pytest.mark.sweep(8)
@pytest.mark.filterwarnings("ignore:The `get_config` of class")
@pytest.mark.parametrize("name", NAMES)
def test_tasks_come_back_as_tasks(name):
    cells = dict(zip(hub.HEADER, hub.row(name, hub.tasks()[name]), strict=True))
    assert cells["comes back as"] == (f"{name} over Functional" if name in FUNCTIONAL else name)
    removed, reachable = (float(cells[key].rstrip("%")) for key in ("removed", "can go"))
    assert removed >= min(100 * hub.GOAL, 0.9 * reachable) - 0.1
    assert float(cells["masked"]) <= 1e-5 and float(cells["preset"]) <= 1e-5
    assert cells["generates"] == ("equal" if name.endswith("LM") else "")


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ["GPT2CausalLM", "LlamaCausalLM", "GemmaCausalLM", "MistralCausalLM"])
def test_whole_decoders_leave_and_the_smaller_task_generates(name):
    task, texts = hub.tasks()[name]()
    settled(task)
    groups = {g.name: g for g in keras_taylor.analyze(task, branches=True).groups if g.is_branch}
    decoders = [name for name, group in groups.items() if group.prunable]
    assert len(decoders) == task.backbone.num_layers
    plan = keras_taylor.Plan({decoders[0]: keras_taylor.LayerPlan(1, ())}, branches=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        small = keras_taylor.prune(task, plan)
    assert type(small) is type(task) and small.backbone.num_layers == task.backbone.num_layers - 1
    labeled = label_as_planned(task, plan)
    gated = GatedModel(labeled)
    gated.mask = kept_units(labeled, plan)
    tokens, *_ = task.preprocessor(texts)
    tokens = {key: keras.ops.convert_to_numpy(value) for key, value in tokens.items()}
    assert relative_difference(predict(small, tokens), predict(gated, tokens)) <= 1e-5
    assert relative_difference(predict(task, tokens), predict(gated, tokens)) > 1e-3
    assert small.generate("the cat", max_length=8).startswith("the cat")
    repaired = keras_taylor.repair(small, task, plan, texts)  # whose layers have other numbers now
    whole, cut, mended = (predict(one, tokens)[0] for one in (task, small, repaired))
    assert type(repaired) is type(task) and np.square(mended - whole).mean() < np.square(cut - whole).mean()


def test_all_tasks_of_the_benchmark_are_tested():
    assert set(NAMES) == set(hub.tasks())
