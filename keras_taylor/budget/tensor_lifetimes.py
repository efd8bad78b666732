"""Tensors that are alive at the same time while a model runs."""

import dataclasses
import math

import numpy as np

from keras_taylor.reading.graph import Call
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.rules.base import Effect
from keras_taylor.support.types import IntArray, Shape

_FLOAT32_BYTES = 4  # float32


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryPlace:
    """The memory of a tensor, and of those that take its place.

    Attributes:
        bytes_a_channel: Bytes of each channel as float32, or of the whole tensor if it has no channels; NaN
            where a size is unknown.
        labels: Labels of its channels, an int array `(num_channels,)`; `None` if it has none.
        first, last: Numbers of the first and the last call during which it is alive.
        branches: Units of the residual branches that it leaves with.
    """

    bytes_per_channel: float
    labels: IntArray | None
    first: int
    last: int
    branches: IntArray


def find_memory_places(labeled: LabeledModel) -> list[MemoryPlace]:
    """Finds when each tensor of a model's graph is made and read last.

    A tensor is alive from the call that makes it (a model input from the start) to the last one that
    reads it (a model output to the end). Where a residual branch has left, the trunk takes the place of the
    sum. A tensor that lives longer because a branch reads it is counted as if the branch were there, so the
    count without branches may be too high, and never too low. A call without a kernel, such as an
    activation or a normalization, may compute each value from the value at the same position. If nothing
    reads its input later, its output takes the input's place, since runtimes fuse such calls. So do reshapes.
    """
    graph = labeled.graph
    last_reads = _last_reads(labeled)
    places: list[MemoryPlace] = []
    place_of: dict[int, int] = {}  # tensor -> index of its place

    sums = {branch.site for branch in labeled.branches.branches}

    def add(tensor: int, call: Call | None = None) -> None:
        size, labels = _measure(labeled.shape_of_example(tensor), labeled.labels[tensor])
        step = 0 if call is None else call.number
        branches = labeled.branch_units_of_call(-1 if call is None else step)
        if call is not None and call.site in sums and branches.size:
            outer = _branches_around_sum(labeled, call)
            places.append(MemoryPlace(size, labels, step, step, branches))
            step, branches = step + 1, outer
        place_of[tensor] = len(places)
        places.append(MemoryPlace(size, labels, step, last_reads[tensor], branches))

    for tensor in graph.inputs:
        if tensor not in place_of:
            add(tensor)
    for call in graph.needed_calls:
        step, effect = call.number, labeled.effects[call.number]
        source = call.inputs[0] if call.inputs else None
        if source in place_of and last_reads[source] == step and _runs_in_place(call, effect, labeled):
            (output,) = call.outputs
            number = place_of[output] = place_of[source]
            places[number] = dataclasses.replace(places[number], last=last_reads[output])
            continue
        for tensor in call.outputs:
            add(tensor, call)
    return places


def _branches_around_sum(labeled: LabeledModel, call: Call) -> IntArray:
    """Units of the branches that the output of a sum leaves with: not those that end in the sum."""
    ends = [
        unit
        for branch, unit in zip(labeled.branches.branches, labeled.branch_units.tolist(), strict=True)
        if branch.site is call.site
    ]
    return np.setdiff1d(labeled.branch_units_of_call(call.number), ends)


def _last_reads(labeled: LabeledModel) -> dict[int, int]:
    """Tensor -> number of the last call that makes or reads it."""
    graph = labeled.graph
    last = dict.fromkeys(graph.inputs, -1)
    for call in graph.needed_calls:
        last.update(dict.fromkeys((*call.inputs, *call.outputs), call.number))
    last.update(dict.fromkeys(graph.outputs, len(graph.calls)))
    return last


def _runs_in_place(call: Call, effect: Effect, labeled: LabeledModel) -> bool:
    """Whether a call may write each output value to where the input value was."""
    if len(call.inputs) != 1 or len(call.outputs) != 1 or effect.reads or not effect.has_rule:
        return False
    if any(len(axes) > 1 for axes in effect.weights.values()):
        return False
    shapes = (labeled.shape_of_example(tensor) for tensor in (call.inputs[0], call.outputs[0]))
    before, after = map(_num_values, shapes)
    return before is not None and before == after


def _num_values(shape: Shape) -> int | None:
    """Number of values of a tensor, `None` if a size is unknown."""
    sizes = [size for size in shape if size is not None]
    return math.prod(sizes) if len(sizes) == len(shape) else None


def _measure(shape: Shape, labels: IntArray) -> tuple[float, IntArray | None]:
    """Bytes of each channel (or of all values where there are no channels), and the channels' labels."""
    has_channels = labels.size > 1
    sizes = [size for axis, size in enumerate(shape) if not (has_channels and labels.shape[axis] > 1)]
    num = math.nan if None in sizes else float(math.prod(size for size in sizes if size is not None))
    return _FLOAT32_BYTES * num, labels.reshape(-1) if has_channels else None
