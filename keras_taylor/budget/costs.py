"""Parameters, FLOPs and activation memory at any set of widths."""

import math
from typing import Protocol

import numpy as np

from keras_taylor.budget.group_costs import GroupCosts
from keras_taylor.budget.tensor_lifetimes import Lifetimes
from keras_taylor.rules.base import weight_of
from keras_taylor.support.types import BoolArray, Costs, IntArray

COSTS = ("params", "flops", "activation_memory")
_NAMES = {"flops": "FLOPs are", "activation_memory": "Activation memory is"}


class CostFunction(Protocol):
    """The costs of a model with any of its units gone: a `CostModel`, or one that also predicts costs."""

    @property
    def by_groups(self) -> GroupCosts:
        """The counted costs as a function of the number of units that each group keeps."""

    def __call__(self, kept: BoolArray | None = None) -> Costs:
        """Costs with only the units kept whose entry in `kept` `(num_units,)` is true; `None`: all."""

    def counts(self, kept: BoolArray | None = None) -> IntArray:
        """How many units each group keeps, an int64 array `(num_groups,)`."""


class CostModel:
    """Counts parameters, floating point operations and memory of a model with some units gone.

    Parameters and FLOPs are sums of terms `factor x width x width ...`; a width is the number
    of positions kept along an axis. Parameters are `model.count_params()`; FLOPs are
    those of one example's forward pass at inference, a multiply-add counted as two. Activation memory is
    the most bytes of tensors that are alive at one time in such a pass, in the order of the model's
    operations, four bytes a number: see `tensor_lifetimes.Lifetimes`. (An int8 model needs a quarter.)

    Args:
        channels: `groups.LabeledModel` of the model.
    """

    def __init__(self, labeled):
        self._labeled = labeled
        self._starts = [group.start for group in labeled.groups]
        self.num_units = labeled.num_units
        self._widths = [(1, ())]  # fixed part; pairs of group and channels a unit
        self._index, self._seen = {}, {}
        terms = {"params": self._params(), "flops": self._flops()}
        memory = self._memory()
        self.by_groups = GroupCosts(tuple(self._widths), terms, memory, len(self._starts))

    def __call__(self, kept=None):
        """Costs with only some units kept.

        Args:
            kept: Bool array `(num_units,)`; `None`: all.

        Returns:
            A dict with ints "params", "flops" and "activation_memory" (bytes); `None` for the last two
            where the model's input has an unknown size.
        """
        return self.by_groups(self.counts(kept))

    def counts(self, kept=None):
        """How many units each group keeps, an int64 array."""
        kept = np.ones(self.num_units, bool) if kept is None else kept
        return np.diff(np.append(0, np.cumsum(kept))[[*self._starts, self.num_units]])

    def each_alone(self, gone=None):
        """Costs when one group loses channels and all others are whole: a list of dicts, one a group.

        Args:
            gone: How many units it loses; `None`: all but one.
        """
        whole = self.counts()
        alone = np.minimum(whole, 1) if gone is None else whole - gone
        return self.by_groups.each_alone(whole, alone)

    def _params(self):
        terms = {}
        for _, factor, axes in weights_of(self._labeled):
            self._add(terms, factor, axes)
        return _known(terms)

    def _flops(self):
        terms = {}
        for effect in self._labeled.effects:
            for work in effect.work:
                self._add(terms, work.factor, work.labels)
        return _known(terms)

    def _memory(self):
        lifetimes = Lifetimes(self._labeled)
        if any(math.isnan(size) for size, _ in lifetimes.places):
            return None
        return tuple(
            (size, 0 if labels is None else self._width(labels), first, last)
            for (size, labels), first, last in zip(
                lifetimes.places, lifetimes.first, lifetimes.last, strict=True
            )
        )

    def _add(self, terms, factor, axes):
        key = tuple(sorted(self._width(vector) for vector in axes))
        terms[key] = terms.get(key, 0.0) + factor

    def _width(self, labels):
        """The number of a width: how many of these positions are kept."""
        if id(labels) not in self._seen:  # the weights of a layer often have the same array
            self._seen[id(labels)] = self._width_of(labels), labels
        return self._seen[id(labels)][0]

    def _width_of(self, labels):
        units = self._labeled.units_of(labels).reshape(-1)
        groups = np.searchsorted(self._starts, units[units >= 0], "right") - 1
        numbers, counts = np.unique(groups, return_counts=True)
        parts = tuple(
            (number, count // self._labeled.groups[number].num_units)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        )
        width = (int((units < 0).sum()), parts)
        if width not in self._index:
            self._index[width] = len(self._widths)
            self._widths.append(width)
        return self._index[width]


def weights_of(labeled):
    """Each weight of a model once, the product of the axes that stay whole, and labels along the others."""
    seen = set()
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        if id(call.operation) in seen or not hasattr(call.operation, "weights"):
            continue
        seen.add(id(call.operation))
        cut = {id(weight_of(call.operation, name)): axes for name, axes in effect.weights.items()}
        for weight in call.operation.weights:
            axes = cut.get(id(weight), (None,) * len(weight.shape))
            factor = math.prod(d for d, a in zip(weight.shape, axes, strict=True) if a is None)
            yield weight, factor, [a for a in axes if a is not None]


def unit_savings(labeled, what):
    """What each unit saves if it goes alone, of one cost, at least 1: a float64 array `(num_units,)`."""
    costs, savings = CostModel(labeled), np.ones(labeled.num_units)
    whole = costs()[what]
    for group, alone in zip(labeled.groups, costs.each_alone(gone=1), strict=True):
        savings[group.start : group.start + group.num_units] = max(whole - alone[what], 1)
    return savings


def known_cost(costs: Costs, cost: str) -> int:
    """The amount of a cost that is known, because `check_countable` passed."""
    amount = costs[cost]
    assert amount is not None, f"{cost} is unknown"
    return amount


def check_countable(costs, what, wanted):
    """Refuses a cost where it is unknown; `wanted` is the argument that asks for it."""
    if costs[what] is None:
        raise ValueError(
            f"{_NAMES[what]} unknown because the model's input has axes of unknown size. Expected a "
            f"model made with a fixed input shape, or parameters in their place. Received: {wanted}"
        )


def _known(terms):
    """Pairs of factor and widths, `None` if a factor is not known."""
    if any(math.isnan(factor) for factor in terms.values()):
        return None
    return tuple((factor, widths) for widths, factor in terms.items())
