"""Parameters, FLOPs and activation memory of a model with any of its units gone.

These are the counted costs: they follow from the widths of layers alone, so a plan knows them without a
model. To add another one, "reads" for example:

1. Add its name at the end of `COSTS`, whose order is that of printed lines. Goals accept it then, and
   plans, JSON files and the headlines of reports show it. Older files still load: a plan shows the costs that
   it has. Tables have fixed columns for parameters and FLOPs: a further column goes into
   `keras_taylor.reports.run_tables`, a card into `keras_taylor.reports.pages`.
2. Count it. A sum of products of widths needs a method that returns terms and an entry in the `terms` of
   `CostModel.__init__`; `GroupCosts` then evaluates, differentiates and saves it. `_flop_terms` sums over the
   work of all calls, `_parameter_terms` over all weights, each once however often its layer is called (select
   them by `weight.name`: "kernel", "bias", ...). A cost of another form needs what `activation_memory` has: a
   field of `GroupCosts`, and a branch in its `__call__`, `with_one_group_cut`, `gradient`, `to_dict` and
   `from_dict`.
3. If inputs of unknown size make it unknown, give it a subject in `_UNKNOWN_COSTS`, for the message.
4. Give it a unit in `_UNIT_NAMES` of `keras_taylor.reports.messages` (for "remove 30 % of ...") and name it
   in the message of `measured_costs.refuse_measured`, which cannot import `COSTS`.
5. Hold it against a count by hand in `tests/budget/test_costs.py`, add it to
   `test_the_gradient_is_the_derivative_of_the_cost` in `tests/plans/test_ranking.py`, and to the words and
   sets that `tests/plans/test_plan.py` and `tests/budget/test_measured_goals.py` hold.
6. `grep -rn activation_memory` finds what is left: the docstrings and pages that list all costs.

A cost that has to be measured on a model that was built, like a latency, is a
`measured_costs.MeasuredCost` instead.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import keras
import numpy as np

from keras_taylor.budget.group_costs import Buffer, GroupCosts, Term, Width, WidthPart
from keras_taylor.budget.tensor_lifetimes import find_memory_places
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.rules.base import weight_of
from keras_taylor.support.identity import IdentityMap
from keras_taylor.support.types import BoolArray, Costs, FloatArray, IntArray

COSTS = ("params", "flops", "activation_memory")
_UNKNOWN_COSTS = {"flops": "FLOPs are", "activation_memory": "Activation memory is"}


class CostFunction(Protocol):
    """The costs of a model with any of its units gone: a `CostModel`, or one that also predicts costs."""

    @property
    def group_costs(self) -> GroupCosts:
        """The counted costs as a function of the number of units that each group keeps."""

    def __call__(self, kept: BoolArray | None = None) -> Costs:
        """Costs with only the units kept whose entry in `kept` `(num_units,)` is true; `None`: all."""

    def units_per_group(self, kept: BoolArray | None = None) -> IntArray:
        """How many units each group keeps, an int64 array `(num_groups,)`."""


class CostModel:
    """Counts parameters, floating point operations and activation memory with some units gone.

    Parameters are `model.count_params()`: frozen weights and BatchNorm statistics count. FLOPs are those
    of the forward pass of one example at inference; a multiply-add counts as two. Both are sums of
    products of widths, where a width is the number of positions that are kept along an axis.

    Activation memory is the largest number of bytes of tensors that are alive at the same time in such a
    pass, in the order of the model's operations, with four bytes per number (see
    `tensor_lifetimes.find_memory_places`). An int8 model needs a quarter of it.

    Args:
        labeled: The model.

    Attributes:
        num_units: How many units the model has.
        group_costs: The same costs as a function of the number of units that each group keeps.
    """

    def __init__(self, labeled: LabeledModel) -> None:
        self._labeled = labeled
        self._group_starts = [group.start for group in labeled.groups]
        self.num_units = labeled.num_units
        self._widths = [Width(1, ())]  # the constant 1
        self._number_of_width: dict[Width, int] = {}
        self._number_of_labels: IdentityMap[IntArray, int] = IdentityMap()
        terms = {"params": self._parameter_terms(), "flops": self._flop_terms()}
        buffers = self._activation_buffers()
        self.group_costs = GroupCosts(tuple(self._widths), terms, buffers, len(labeled.groups))

    def __call__(self, kept: BoolArray | None = None) -> dict[str, int | None]:
        """Costs with only some units kept.

        Args:
            kept: Which units are kept, `(num_units,)`; `None`: all.

        Returns:
            A dict of ints: "params" (numbers), "flops" (2 per multiply-add) and "activation_memory"
            (bytes). The last two are `None` if the model's input has an unknown size.
        """
        return self.group_costs(self.units_per_group(kept))

    def units_per_group(self, kept: BoolArray | None = None) -> IntArray:
        """How many units each group keeps, an int64 array `(num_groups,)`."""
        kept = np.ones(self.num_units, bool) if kept is None else kept
        return np.diff(np.append(0, np.cumsum(kept))[[*self._group_starts, self.num_units]])

    def with_one_group_cut(self, num_removed: int | None = None) -> list[dict[str, int | None]]:
        """Costs with one group cut and all others whole, for each group.

        Args:
            num_removed: How many units the group loses; `None`: all but one, or the branch that it is.

        Returns:
            A list of dicts as `__call__` returns them, one for each group.
        """
        num_units = self.units_per_group()
        least = [0 if group.is_branch else 1 for group in self._labeled.groups]
        num_left = np.minimum(num_units, least) if num_removed is None else num_units - num_removed
        return self.group_costs.with_one_group_cut(num_units, num_left)

    def _parameter_terms(self) -> tuple[Term, ...] | None:
        return self._sum_terms(
            (weight.fixed_size, weight.labels, weight.branches) for weight in counted_weights(self._labeled)
        )

    def _flop_terms(self) -> tuple[Term, ...] | None:
        numbers = [call.number for call in self._labeled.graph.needed_calls]
        return self._sum_terms(
            (work.factor, work.labels, self._labeled.branch_units_of_call(number))
            for number in numbers
            for work in self._labeled.effects[number].work
        )

    def _sum_terms(
        self, products: Iterable[tuple[float, Sequence[IntArray], IntArray]]
    ) -> tuple[Term, ...] | None:
        """Terms for factors, labels along axes, and branches; those with the same widths are added.

        `None`: a size is unknown.
        """
        factors: dict[tuple[int, ...], float] = {}
        for factor, axes, branches in products:
            numbers = [self._width_number(labels) for labels in axes]
            if branches.size:
                numbers.append(self._number_with_branches(0, branches))
            widths = tuple(sorted(numbers))
            factors[widths] = factors.get(widths, 0.0) + factor
        if any(math.isnan(factor) for factor in factors.values()):
            return None
        return tuple(Term(factor, widths) for widths, factor in factors.items())

    def _activation_buffers(self) -> tuple[Buffer, ...] | None:
        places = find_memory_places(self._labeled)
        if any(math.isnan(place.bytes_per_channel) for place in places):
            return None
        return tuple(
            Buffer(
                place.bytes_per_channel,
                self._number_with_branches(
                    0 if place.labels is None else self._width_number(place.labels), place.branches
                ),
                place.first,
                place.last,
            )
            for place in places
        )

    def _width_number(self, labels: IntArray) -> int:
        """The number of the width that counts the kept positions among `labels`."""
        if labels not in self._number_of_labels:  # the weights of a layer often share an array
            self._number_of_labels[labels] = self._number_of(self._width_of(labels))
        return self._number_of_labels[labels]

    def _number_with_branches(self, number: int, units: IntArray) -> int:
        """The number of the width that is zero once one of these branches left, and else as another one."""
        if not units.size:
            return number
        groups = np.searchsorted(self._group_starts, np.unique(units), "right") - 1
        return self._number_of(self._widths[number]._replace(branches=tuple(groups.tolist())))

    def _number_of(self, width: Width) -> int:
        if width not in self._number_of_width:
            self._number_of_width[width] = len(self._widths)
            self._widths.append(width)
        return self._number_of_width[width]

    def _width_of(self, labels: IntArray) -> Width:
        units = self._labeled.units_of(labels).reshape(-1)
        groups = np.searchsorted(self._group_starts, units[units >= 0], "right") - 1
        numbers, num_channels = np.unique(groups, return_counts=True)
        parts = tuple(
            WidthPart(number, num // self._labeled.groups[number].num_units)
            for number, num in zip(numbers.tolist(), num_channels.tolist(), strict=True)
        )
        return Width(int((units < 0).sum()), parts)


class CountedWeight(NamedTuple):
    """A weight, the product of the sizes of its axes that stay whole, and the labels along the others.

    It leaves with each of some branches, which are given by their units.
    """

    weight: keras.Variable
    fixed_size: int
    labels: list[IntArray]
    branches: IntArray


def counted_weights(labeled: LabeledModel) -> Iterator[CountedWeight]:
    """Each weight of a model once."""
    seen = set()
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        if call.operation in seen or not hasattr(call.operation, "weights"):
            continue
        seen.add(call.operation)
        labels_of = IdentityMap(
            (weight_of(call.operation, path), axes) for path, axes in effect.weights.items()
        )
        branches = labeled.branch_units_of_operation(call.operation)
        for weight in call.operation.weights:
            axes = labels_of.get(weight, (None,) * len(weight.shape))
            fixed = math.prod(size for size, labels in zip(weight.shape, axes, strict=True) if labels is None)
            along = [labels for labels in axes if labels is not None]
            yield CountedWeight(weight, fixed, along, branches)


def unit_savings(labeled: LabeledModel, cost: str) -> FloatArray:
    """How much of a cost each unit saves if it leaves alone, at least 1: a float64 array `(num_units,)`."""
    costs, savings = CostModel(labeled), np.ones(labeled.num_units)
    total = known_cost(costs(), cost)
    for group, left in zip(labeled.groups, costs.with_one_group_cut(num_removed=1), strict=True):
        savings[group.start : group.start + group.num_units] = max(total - known_cost(left, cost), 1)
    return savings


def known_cost(costs: Costs, cost: str) -> int:
    """The amount of a cost that is known; `check_countable` refuses unknown ones before."""
    amount = costs[cost]
    assert amount is not None, f"{cost} is unknown"
    return amount


def check_countable(costs: Costs, cost: str, request: str) -> None:
    """Refuses a cost that is unknown; `request` is the argument that asks for it, as text."""
    if costs[cost] is None:
        raise ValueError(
            f"{_UNKNOWN_COSTS[cost]} unknown because the model's input has axes of unknown size. Expected a "
            f"model made with a fixed input shape, or parameters in their place. Received: {request}"
        )
