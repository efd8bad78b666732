"""Comparison of an artifact's outputs with the Keras model's, and the differences that are accepted."""

from collections.abc import Sequence
from typing import Final, TypedDict

import keras
import numpy as np

from keras_taylor.exports.artifacts import Artifact, ExportError
from keras_taylor.support.types import Array, Shape, Tree

# By `quantize`: largest accepted difference, relative to an output's largest absolute value.
TOLERANCES: Final[dict[str | None, float]] = {None: 1e-4, "float16": 1e-2, "dynamic": 0.1, "int8": 0.1}
_DIFFERS = "The exported model differs from the Keras model"
_WAYS_OUT = (
    "Expected a difference within the tolerance. Pass `samples` that resemble the model's real inputs, "
    "calibrate on more data, quantize less, or pass a larger `tolerance` or `max_drop`."
)


class OutputDifferences(TypedDict):
    """Attributes of an `Artifact` that compare its outputs with the Keras model's."""

    difference: float
    relative_difference: float
    agreement: float | None


def compare_outputs(outputs: Sequence[Array], reference: Sequence[Array]) -> OutputDifferences:
    """Differences of flattened outputs from the Keras model's.

    Raises:
        ExportError: if the shapes differ.
    """
    absolute, relative, agreements = 0.0, 0.0, []
    for ours, theirs in zip(outputs, reference, strict=True):
        if ours.shape != theirs.shape:
            raise ExportError(
                "The exported model's outputs have other shapes than the Keras model's. Expected "
                f"{theirs.shape}. Received: an output of shape {ours.shape}"
            )
        difference = np.abs(ours.astype("float32") - theirs)
        worst = float(np.where(np.isfinite(difference), difference, np.inf).max(initial=0))
        absolute = max(absolute, worst)
        scale = float(np.abs(theirs).max(initial=0))
        relative = max(relative, worst / scale if scale else worst)
        if theirs.ndim > 1 and theirs.shape[-1] > 1:
            predicted = theirs.argmax(-1)
            if (predicted != predicted.flat[0]).any():  # agreement on a constant proves nothing
                agreements.append(float((ours.argmax(-1) == predicted).mean()))
    agreement = min(agreements, default=None)
    return {"difference": absolute, "relative_difference": relative, "agreement": agreement}


def accuracy(targets: Tree, outputs: Sequence[Array]) -> float:
    """Fraction of correct predictions, for one output with classes along its last axis.

    Args:
        targets: Integer labels or one-hot targets.
        outputs: A list with one array.

    Raises:
        ValueError: for other targets or outputs.
    """
    labels = labels_of_classes(targets, [output.shape for output in outputs])
    return float((outputs[0].argmax(-1) == labels).mean())


def labels_of_classes(targets: Tree, shapes: Sequence[Shape]) -> Array:
    """Targets as integers of the shape of the one output, without its last axis.

    Args:
        targets: As in `accuracy`.
        shapes: Shapes of the flattened outputs.

    Raises:
        ValueError: for other targets or outputs, and for labels beyond the classes.
    """
    (shape, *more) = shapes
    labels = np.asarray(targets) if not more and not isinstance(targets, (list, tuple, dict)) else None
    num_classes = shape[-1] or 0
    if labels is not None and labels.shape == shape and num_classes > 1:
        labels = labels.argmax(-1)
    elif labels is not None and labels.shape == (*shape[:-1], 1):
        labels = labels[..., 0]
    if labels is None or labels.shape != shape[:-1] or num_classes < 2:
        raise ValueError(
            "Accuracy is defined for one output with classes along its last axis, and integer labels or "
            "one-hot targets. Pass `metric`, a callable `(y, outputs)` that returns a number. Received: "
            f"data with y of shapes {[np.shape(y) for y in keras.tree.flatten(targets)]} for outputs of "
            f"shapes {list(shapes)}"
        )
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= num_classes:
        raise ValueError(
            f"Labels lie beyond the {num_classes} classes of the output. Received: data with y from "
            f"{labels.min()} to {labels.max()}"
        )
    return labels


def tolerance_violation(artifact: Artifact, tolerance: float, max_drop: float) -> str:
    """How an artifact's outputs or metric differ by more than is accepted, `""` if they do not."""
    relative, agreement = artifact.relative_difference, artifact.agreement
    error = relative
    if artifact.quantize in ("dynamic", "int8") and agreement is not None and np.isfinite(relative):
        error = min(relative, 1 - agreement)
    # `not <=` in place of `>`, so that NaN is a violation
    if not error <= tolerance:
        classes = "" if agreement is None else f", and {1 - agreement:.1%} of the predictions differ"
        return (
            f"{_DIFFERS}: the largest difference is {artifact.difference:.3g}, {relative:.3g} of the "
            f"output's largest value{classes}. The tolerance is {tolerance:.3g}. {_WAYS_OUT}"
        )
    before, after = artifact.model_metric, artifact.metric
    if before is not None and after is not None and not before - after <= max_drop:
        return (
            f"{_DIFFERS}: the metric falls from {before:.4g} to {after:.4g}. The largest accepted drop is "
            f"{max_drop:.3g}. {_WAYS_OUT}"
        )
    return ""


def size_violation(artifact: Artifact, max_bytes: float | None, max_arena_bytes: float | None) -> str:
    """How an artifact is larger than is accepted, `""` if it is not."""
    for name, size, limit in (
        ("file", artifact.num_bytes, max_bytes),
        ("tensor arena", artifact.arena_bytes, max_arena_bytes),
    ):
        if limit is not None and size is not None and size > limit:
            return (
                f"The {name} takes {size:,} bytes; the limit is {limit:,.0f}. Prune more, quantize (int8), "
                "or allow more."
            )
    return ""
