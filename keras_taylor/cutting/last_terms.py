"""Which layer inside of a closed layer makes the last term of its output."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_taylor.reading.graph import Call
from keras_taylor.reading.matmul_views import matmul_view
from keras_taylor.reading.rule_checks import equivalence_tolerance, inputs_with_masks, run_like_call
from keras_taylor.rules.base import override_attributes
from keras_taylor.support.keras_internals import layers_inside
from keras_taylor.support.types import Array, Shape, Tensor


def find_last_term(call: Call, shapes: Sequence[Shape]) -> int | None:
    """Which of the layers inside of a layer makes the last term of a sum that is the layer's output.

    Its output is added to what does not depend on it, as at the end of a residual layer.

    Args:
        call: The call of the layer.
        shapes: Shape of every tensor of its graph.

    Returns:
        Its number among `layers_inside`; `None` if there is none that is a matrix product.
    """
    inner, inputs = layers_inside(call.operation), inputs_with_masks(call, shapes)
    tolerance = equivalence_tolerance(call.operation.compute_dtype)
    for number in reversed(range(len(inner))):
        if matmul_view(inner[number]) is None:
            continue
        shift = np.random.default_rng(0).uniform(1, 2, shapes[call.outputs[0]][-1]).astype("float32")
        try:
            before = run_like_call(call, call.operation, inputs)
            with override_attributes(inner[number], call=_call_shifted(inner[number].call, shift)):
                after = run_like_call(call, call.operation, inputs)
            differences = [now - then - shift for now, then in zip(after, before, strict=True)]
        except Exception:  # a layer may raise anything, and this one may have other outputs
            continue
        if max(np.abs(one).max() for one in differences) <= tolerance:
            return number
    return None


def _call_shifted(call: Callable[..., Tensor], shift: Array) -> Callable[..., Tensor]:
    def call_shifted(*args: Any, **kwargs: Any) -> Tensor:
        y = call(*args, **kwargs)
        return y + ops.convert_to_tensor(shift, y.dtype)

    return call_shifted
