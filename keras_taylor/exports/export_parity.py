"""How far an artifact's outputs are from the Keras model's, and how far they may be."""

import keras
import numpy as np

from keras_taylor.exports.artifacts import ExportError

# Of an output's largest value, by what is quantized.
TOLERANCES = {None: 1e-4, "float16": 1e-2, "dynamic": 0.1, "int8": 0.1}
_DIFFERS = "The exported model differs from the Keras model"
_WAYS_OUT = (
    "Expected a difference within the tolerance; pass `samples` like the data that the model is made for, "
    "calibrate on more data, quantize less, or pass a larger `tolerance` or `max_drop`."
)


def compared(outputs, reference):
    """Differences of flattened outputs, as fields of an `Artifact`."""
    absolute, relative, same = 0.0, 0.0, []
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
            if (predicted != predicted.flat[0]).any():  # a constant is easily agreed with
                same.append(float((ours.argmax(-1) == predicted).mean()))
    agreement = min(same, default=None)
    return {"difference": absolute, "relative_difference": relative, "agreement": agreement}


def accuracy(targets, outputs):
    """Fraction of the predictions that are right, of one output with classes along its last axis."""
    (first, *more) = outputs
    labels = np.asarray(targets) if not more and not isinstance(targets, (list, tuple, dict)) else None
    if labels is not None and labels.shape == first.shape and first.shape[-1] > 1:
        labels = labels.argmax(-1)
    elif labels is not None and labels.shape == (*first.shape[:-1], 1):
        labels = labels[..., 0]
    if labels is None or labels.shape != first.shape[:-1] or first.shape[-1] < 2:
        shapes = [np.shape(y) for y in keras.tree.flatten(targets)]
        raise ValueError(
            "Accuracy is for one output with classes along its last axis, and integer labels or one-hot "
            "targets. Pass `metric`, a callable `(y, outputs)` to a number. Received: data with y of "
            f"shapes {shapes} for outputs of shapes {[y.shape for y in outputs]}"
        )
    return float((first.argmax(-1) == labels).mean())


def tolerance_violation(artifact, tolerance, max_drop):
    """What is wrong with it, `""` if nothing is."""
    relative, agreement = artifact.relative_difference, artifact.agreement
    error = relative
    if artifact.quantize in ("dynamic", "int8") and agreement is not None and np.isfinite(relative):
        error = min(relative, 1 - agreement)
    # not `>`: a NaN is never within
    if not error <= tolerance:
        classes = "" if agreement is None else f", and {1 - agreement:.1%} of the predictions are others"
        return (
            f"{_DIFFERS}: the largest difference is {artifact.difference:.3g}, {relative:.3g} of the "
            f"output's largest value{classes}; accepted is {tolerance:.3g}. {_WAYS_OUT}"
        )
    if artifact.metric is not None and not artifact.model_metric - artifact.metric <= max_drop:
        return (
            f"{_DIFFERS}: the metric falls from {artifact.model_metric:.4g} to {artifact.metric:.4g}; "
            f"accepted is a drop of {max_drop:.3g}. {_WAYS_OUT}"
        )
    return ""


def size_violation(artifact, max_bytes, max_arena_bytes):
    """What is too large about it, `""` if nothing is."""
    for what, size, limit in (
        ("file", artifact.num_bytes, max_bytes),
        ("tensor arena", artifact.arena_bytes, max_arena_bytes),
    ):
        if limit is not None and size > limit:
            return (
                f"The {what} takes {size:,} bytes; accepted are {limit:,.0f}. Expected less: prune more, "
                "quantize (int8), or allow more."
            )
    return ""
