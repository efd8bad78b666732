"""Tasks of many families of KerasHub come back as tasks, equal to the original without the units."""

import pathlib
import sys

import pytest

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


def test_all_tasks_of_the_benchmark_are_tested():
    assert set(NAMES) == set(hub.tasks())
