"""What the command line says of examples that the model was not trained on."""

from collections.abc import Mapping

import keras
import numpy as np

from keras_taylor.cli.data_files import DataSplit, Examples
from keras_taylor.support.types import Array

_NUM_COMPARED = 1000  # examples
# A loss on held-out examples that is at most this share above the training part's is no larger.
_SAME_LOSS = 0.1


def print_notes(model: keras.Model, split: DataSplit) -> None:
    """Says so if the given model seems to know held-out examples, or is no better than chance on them."""
    parts = {"training": split.train, "validation": split.validation, "test": split.test}
    first = {name: (x[:_NUM_COMPARED], y[:_NUM_COMPARED]) for name, (x, y) in parts.items()}
    found = {name: _metrics(model, examples) for name, examples in first.items()}
    _print_if_known({name: metrics["loss"] for name, metrics in found.items()})
    _print_if_at_chance(found["validation"].get("accuracy"), first["validation"][1])


def _print_if_known(losses: Mapping[str, float]) -> None:
    """Takes the losses by part.

    A model knows held-out examples if its loss there is no larger than on the training examples. Accuracies
    on them are then too good, before and after.
    """
    known = losses["training"]
    found = [
        f"on the {name} part, {loss:.4g},"
        for name, loss in losses.items()
        if name != "training" and loss <= (1 + _SAME_LOSS) * known
    ]
    if found:
        print(
            f"note: the model's loss {' and '.join(found)} is no larger than on the training part, "
            f"{known:.4g}. If it was trained on all of them, what is measured there is too good."
        )


def _print_if_at_chance(share: float | None, y: Array) -> None:
    """Takes the accuracy on the validation part, and its labels. At chance, inputs may be scaled wrongly."""
    is_one_hot = y.ndim == 2 and bool((y.sum(-1) == 1).all())
    if share is None or not (y.ndim == 1 or is_one_hot):
        return
    counts = np.unique(y.argmax(-1) if is_one_hot else y, return_counts=True)[1]
    if len(counts) > 1 and round(share * len(y)) <= counts.max():
        print(
            f"note: the given model is right for {share:.0%} of the validation examples, no better than "
            "naming the most frequent class each time. Are the inputs scaled as in its training "
            "(--divide-by, --mean, --std)?"
        )


def measure_on_test_examples(
    original: keras.Model, small: keras.Model, test: Examples
) -> dict[str, dict[str, float]]:
    """The loss and the metrics of both models on the test examples, by "before" and "after"."""
    before, after = _metrics(original, test), _metrics(small, test)
    return {
        "before": {name: value for name, value in before.items() if name in after},
        "after": {name: value for name, value in after.items() if name in before},
    }


def print_test_metrics(metrics: Mapping[str, Mapping[str, float]], num_examples: int | None = None) -> None:
    """Prints what `measure_on_test_examples` found, if it did."""
    before, after = metrics.get("before", {}), metrics.get("after", {})
    shown = [f"{name} {value:.4g} -> {after[name]:.4g}" for name, value in before.items()]
    if shown:
        print(f"on the {'' if num_examples is None else f'{num_examples} '}test examples: {', '.join(shown)}")


def _metrics(model: keras.Model, examples: Examples) -> dict[str, float]:
    values = model.evaluate(*examples, batch_size=128, verbose=0, return_dict=True)
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
