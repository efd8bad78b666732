"""Which calls and tensors of a smaller model stand where which ones of the original stood."""

import dataclasses
import functools
import itertools

from keras_taylor.reading.graph import Call, Graph
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.reading.tracing import origin_of
from keras_taylor.support.types import BoolArray


@dataclasses.dataclass(frozen=True, eq=False)
class Counterparts:
    """The calls of an original that are left in its smaller version.

    Attributes:
        old, new: The graphs of the original and of the smaller model.
        numbers: For each call of the smaller model the number of its counterpart in the original.
    """

    old: Graph
    new: Graph
    numbers: tuple[int, ...]

    def old_call(self, call: Call) -> Call:
        """The counterpart of a call of the smaller model."""
        return self.old.calls[self.numbers[call.number]]

    @functools.cached_property
    def old_tensors(self) -> dict[int, int]:
        """Number of each tensor of the smaller model -> number of its counterpart."""
        pairs = list(zip(self.new.inputs, self.old.inputs, strict=True))
        for call in self.new.calls:
            pairs += zip(call.outputs, self.old_call(call).outputs, strict=True)
        return dict(pairs)

    def reads_past_branch(self, call: Call) -> bool:
        """Whether a call of the smaller model reads a trunk where the original read a sum with a branch."""
        read = [self.old_tensors[index] for index in call.inputs]
        return read != list(self.old_call(call).inputs)

    @functools.cached_property
    def first_needed(self) -> list[int]:
        """The first call of the original that each call of the smaller model, or a later one, stands for.

        One entry more says that all calls are done.
        """
        return [*list(itertools.accumulate(reversed(self.numbers), min))[::-1], len(self.old.calls)]


def is_left(labeled: LabeledModel, kept: BoolArray, call: Call) -> bool:
    """Whether a call of the original is in none of the branches that leave; a sum is in its branch."""
    return bool(kept[labeled.branch_units_of_call(call.number)].all())


def find_counterparts(labeled: LabeledModel, kept: BoolArray, new: Graph) -> Counterparts | None:
    """The counterparts in a smaller model, `None` if it has not the calls that are left.

    Calls are known by their names. A task that was made again with fewer blocks numbers them anew: there the
    order counts.

    Args:
        labeled: The original.
        kept: Bool array `(num_units,)`: the units of the smaller model.
        new: The graph of the smaller model.
    """
    old = labeled.graph
    bypassed = labeled.bypassed_sums(kept)
    if not bypassed:
        fits = len(old.calls) == len(new.calls)
        return Counterparts(old, new, tuple(range(len(old.calls)))) if fits else None
    calls_left = [call for call in old.calls if is_left(labeled, kept, call)]
    by_name: dict[str, list[int]] = {}
    for call in calls_left:
        by_name.setdefault(call.name, []).append(call.number)
    numbers = [by_name[call.name].pop(0) for call in new.calls if by_name.get(call.name)]
    needed = {call.number for call in old.needed_calls}
    missing = needed.intersection(itertools.chain.from_iterable(by_name.values()))
    if len(numbers) == len(new.calls) and not missing:
        return Counterparts(old, new, tuple(numbers))
    if origin_of(old.model) is None:
        return None
    in_order = [call for call in calls_left if call.number in needed]
    kinds = [[type(call.operation) for call in calls] for calls in (in_order, new.needed_calls)]
    fits = kinds[0] == kinds[1] and len(in_order) == len(new.calls)
    return Counterparts(old, new, tuple(call.number for call in in_order)) if fits else None
