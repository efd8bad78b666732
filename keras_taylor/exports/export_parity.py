"""Comparison of an artifact's outputs with the Keras model's, and the differences that are accepted."""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, TypeAlias, TypedDict

import keras
import numpy as np

from keras_taylor.exports.artifacts import Artifact, ExportError
from keras_taylor.support.types import Array, FloatArray, Shape, Tree

# What an output says: one of several classes, yes or no, numbers; or nobody knows.
OutputKind: TypeAlias = Literal["classes", "mask", "numbers", "unknown"]

# By `quantize`: largest accepted error.
TOLERANCES: Final[dict[str | None, float]] = {None: 1e-4, "float16": 1e-2, "dynamic": 0.1, "int8": 0.1}
_MAX_DROP = 0.02  # of a metric that is better the larger it is
_MAX_GROWTH = 0.1  # of another one, as a share of its value
LOSSY: Final = ("dynamic", "int8")  # precisions whose outputs are judged by what they say
_DIFFERS = "The exported model differs from the Keras model"


class OutputError(NamedTuple):
    """How far one output is from the Keras model's.

    Attributes:
        kind: What the output says.
        difference: Largest absolute difference.
        relative_difference: The same, divided by the output's largest absolute value.
        relative_error: Root mean square of the differences, divided by the output's spread.
        agreement: Share of predictions that are the Keras model's; `None` if there are none.
    """

    kind: OutputKind
    difference: float
    relative_difference: float
    relative_error: float
    agreement: float | None


class OutputDifferences(TypedDict):
    """Attributes of an `Artifact`: the largest ones of its outputs, of agreements the smallest."""

    difference: float
    relative_difference: float
    relative_error: float
    agreement: float | None


class MetricValues(NamedTuple):
    """A metric of the Keras model and of the artifact."""

    name: str
    larger_is_better: bool
    before: float
    after: float


class Verdict(NamedTuple):
    """Whether an artifact is accepted, and in one line by what, or why not."""

    is_accepted: bool
    text: str


def compare_output(ours: Array, theirs: Array, kind: OutputKind = "unknown") -> OutputError:
    """How far one output is from the Keras model's.

    Raises:
        ExportError: if the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ExportError(
            "The exported model's outputs have other shapes than the Keras model's. Expected "
            f"{theirs.shape}. Received: an output of shape {ours.shape}"
        )
    difference = np.abs(ours.astype("float64") - theirs)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    worst, scale = float(difference.max(initial=0)), float(np.abs(theirs).max(initial=0))
    relative_error = _root_mean_square(difference) / (_spread(theirs) or 1.0)
    return OutputError(kind, worst, worst / (scale or 1.0), relative_error, _agreement(ours, theirs, kind))


def summarize_errors(errors: Sequence[OutputError]) -> OutputDifferences:
    """The errors of several outputs as attributes of an `Artifact`."""
    return {
        "difference": max((error.difference for error in errors), default=0.0),
        "relative_difference": max((error.relative_difference for error in errors), default=0.0),
        "relative_error": max((error.relative_error for error in errors), default=0.0),
        "agreement": min((e.agreement for e in errors if e.agreement is not None), default=None),
    }


def _agreement(ours: Array, theirs: Array, kind: OutputKind) -> float | None:
    """The share of predictions that are the Keras model's. Each class that it predicts weighs the same.

    Else an empty mask would agree with nearly all of a small object's. `None` without predictions, and where
    they are the same everywhere, which proves nothing.
    """
    if kind == "mask":
        middle = 0.5 if theirs.min(initial=0) >= 0 and theirs.max(initial=0) <= 1 else 0.0  # else logits
        predicted, found = ((y > middle).ravel().astype(int) for y in (theirs, ours))
    elif kind != "numbers" and theirs.ndim > 1 and theirs.shape[-1] > 1:
        predicted, found = (y.argmax(-1).ravel() for y in (theirs, ours))
    else:
        return None
    classes, indices = np.unique(predicted, return_inverse=True)
    if len(classes) < 2:
        return None
    hits = np.bincount(indices, weights=predicted == found)
    return float((hits / np.bincount(indices)).mean())


def _spread(output: FloatArray) -> float:
    """The standard deviation of an output around the means of its channels; of a constant one its size."""
    channels = output.astype("float64").reshape(-1, output.shape[-1] if output.ndim > 1 else 1)
    size, spread = _root_mean_square(channels), _root_mean_square(channels - channels.mean(0))
    return spread if spread > 1e-5 * size else size


def _root_mean_square(values: FloatArray) -> float:
    return float(np.sqrt(np.square(values).mean()))


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


def judge(
    quantize: str | None,
    errors: Sequence[OutputError],
    metric: MetricValues | None,
    tolerance: float,
    max_drop: float | None = None,
) -> Verdict:
    """Whether an exported model is as good as the Keras model.

    What is quantized to int8 is judged by its metric if there is one, else by what its outputs say. In
    floating point every value counts, too.

    Args:
        quantize: The precision.
        errors: How far each output is from the Keras model's.
        metric: The metric on the user's data, `None` without data.
        tolerance: Largest error to accept; `inf`: any, if a metric decides.
        max_drop: How much worse the metric may be; `None`: 0.02, or a tenth of its value if it is better
            the smaller it is.
    """
    if not all(np.isfinite(error.difference) for error in errors):
        return Verdict(False, f"{_DIFFERS}: its outputs are not finite, or far too large")
    verdicts = [_judge_output(error, tolerance, quantize in LOSSY) for error in errors]
    worst = min(verdicts, key=lambda verdict: verdict.is_accepted)
    if metric is None or not worst.is_accepted:
        return worst
    by_metric = _judge_metric(metric, max_drop)
    return by_metric if quantize in LOSSY or not by_metric.is_accepted else worst


def _judge_metric(metric: MetricValues, max_drop: float | None) -> Verdict:
    name, is_larger_better, before, after = metric
    if max_drop is None:
        max_drop = _MAX_DROP if is_larger_better else _MAX_GROWTH * abs(before)
    worse = before - after if is_larger_better else after - before
    if not worse <= max_drop:  # in place of `>`, so that NaN is a violation
        return Verdict(
            False,
            f"{_DIFFERS}: '{name}' {'falls' if is_larger_better else 'grows'} from {before:.4g} to "
            f"{after:.4g}. The largest accepted drop is {max_drop:.3g}",
        )
    less = "less" if is_larger_better else "more"
    return Verdict(True, f"judged by '{name}': {after:.4g}, at most {max_drop:.3g} {less} than {before:.4g}")


def _judge_output(error: OutputError, tolerance: float, is_lossy: bool) -> Verdict:
    """By the values of an output; if it is lossy, in its own terms as well."""
    worst, spread = error.relative_difference, error.relative_error
    found = {f"the largest difference is {worst:.3g} of the largest value": worst}
    if is_lossy:
        found = {f"the error is {spread:.3g} of the spread of the values": spread, **found}
        if error.agreement is not None:
            what = "of the mask" if error.kind == "mask" else "of the classes"
            found = {f"{error.agreement:.1%} {what} agree": 1 - error.agreement, **found}
    accepted = [text for text, value in found.items() if value <= tolerance]
    if accepted:
        return Verdict(True, f"judged by its outputs: {accepted[0]} (tolerance {tolerance:.3g})")
    return Verdict(False, f"{_DIFFERS}: {', '.join(found)}. The tolerance is {tolerance:.3g}")


def explain_refusal(verdict: Verdict, quantize: str | None) -> str:
    """Why an artifact's outputs are not accepted, and what helps."""
    ways = ["Pass `samples` that resemble the model's real inputs"]
    ways += ["calibrate on more data"] if quantize == "int8" else []
    ways += ["quantize less"] if quantize else []
    return (
        f"{verdict.text}. Expected a difference within the tolerance. {', '.join(ways)}, or pass a larger "
        "`tolerance` or `max_drop`."
    )


def size_violation(artifact: Artifact, max_bytes: float | None, max_arena_bytes: float | None) -> str:
    """How an artifact is larger than is accepted, and what its outputs are like; `""` if it is not."""
    for name, size, limit in (
        ("file", artifact.num_bytes, max_bytes),
        ("tensor arena", artifact.arena_bytes, max_arena_bytes),
    ):
        if limit is not None and size is not None and size > limit:
            return (
                f"The {name} takes {size:,} bytes; the limit is {limit:,.0f}. Prune more, quantize (int8), "
                f"or allow more. All else is accepted, {artifact.verdict}."
            )
    return ""
