"""In which order units leave, and how many of them until a goal is met."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy.optimize import linprog

from keras_taylor.budget.costs import CostFunction, known_cost
from keras_taylor.budget.feasibility import unreachable_goal_error
from keras_taylor.budget.measured_costs import proxy_ceilings
from keras_taylor.plans.limits import Limits, RemovalBounds
from keras_taylor.plans.selection import Selection
from keras_taylor.plans.ties import even_tied_scores, tied_groups
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.support.types import BoolArray, FloatArray, IntArray

_NUM_RECOUNTS = 30  # how often the savings of units are counted again on the way to the goal
MOST_VARIABLES = 1000  # of a linear program: beyond, one of several units stands for its neighbors in score


@dataclasses.dataclass(frozen=True)
class RemovalRequest:
    """What a removal of units has to reach, and what it must respect.

    Attributes:
        ceilings: Cost -> how much of it may be left.
        goal: The goal as the user wrote it, for messages.
        limits: How many units each group must and may lose.
        selection: Its `scope`, `rank` (`None`: "score") and `balance` count here.
        original_widths: Group -> number of its units in the original; `None`: the model is the original.
        progress: How much of the way to the last goal is behind after this removal, from 0 to 1; see
            `Limits.bounds`.
        num_closed: How many units of each group, those with the lowest scores, are gone in any case: an
            int64 array `(num_groups,)`; `None`: no unit.
    """

    ceilings: Mapping[str, float]
    goal: object
    limits: Limits = dataclasses.field(default_factory=Limits)
    selection: Selection = dataclasses.field(default_factory=Selection)
    original_widths: Mapping[str, int] | None = None
    progress: float = 1.0
    num_closed: IntArray | None = None

    def bounds(self, labeled: LabeledModel) -> RemovalBounds:
        """How many units of each group leave, those among them that are gone in any case."""
        bounds = self.limits.bounds(labeled, self.original_widths, self.progress)
        if self.num_closed is None:
            return bounds
        return RemovalBounds(*(np.maximum(bound, self.num_closed) for bound in bounds))


class RemovalOrder:
    """The units of a model in the order in which they leave, and the masks of kept units on the way.

    Within a group the unit with the lowest score leaves first.

    Args:
        labeled: The model.
        costs: Its costs.
        unit_scores: Float64 `(num_units,)`; units with an infinite score never leave.
        limits: What holds for every group.
        bounds: How many units of each group leave; `None`: as the limits say.
    """

    def __init__(
        self,
        labeled: LabeledModel,
        costs: CostFunction,
        unit_scores: FloatArray,
        limits: Limits | None = None,
        bounds: RemovalBounds | None = None,
    ) -> None:
        limits = limits or Limits()
        least, most = bounds or limits.bounds(labeled)
        self._ties = tied_groups(labeled, limits.ties)
        unit_scores = even_tied_scores(labeled, unit_scores, limits.ties)
        self._costs, self._round_to = costs, limits.round_to
        self._group_sizes = costs.units_per_group()
        self._group_of = np.repeat(np.arange(len(self._group_sizes)), self._group_sizes)
        self._ranked = np.lexsort((unit_scores, self._group_of))  # within each group, the lowest score first
        starts = np.array([group.start for group in labeled.groups], np.int64)
        self._place_in_group = np.arange(unit_scores.size) - starts[self._group_of]
        eligible, forced = np.zeros(unit_scores.size, bool), np.zeros(unit_scores.size, bool)
        eligible[self._ranked] = self._place_in_group < most[self._group_of]
        forced[self._ranked] = self._place_in_group < least[self._group_of]
        eligible &= np.isfinite(unit_scores)
        order = np.lexsort((unit_scores, ~forced))
        self._order = order[eligible[order]]
        self._is_forced = forced
        self._is_branch = np.array([group.is_branch for group in labeled.groups], bool)

    def mask_after(self, num: int) -> BoolArray:
        """The mask of kept units `(num_units,)` after the first `num` units of the order left."""
        return self._mask_without(self._order[:num])

    def _mask_without(self, units: IntArray) -> BoolArray:
        """The mask of kept units `(num_units,)` if groups lose as many units as these, in whole steps."""
        gone = np.bincount(self._group_of[units], minlength=len(self._group_sizes))
        kept = -(-(self._group_sizes - gone) // self._round_to) * self._round_to
        gone = self._group_sizes - np.minimum(kept, self._group_sizes)
        for numbers, units in self._ties:
            gone[numbers] = (gone[numbers] // units).min() * units
        mask = np.ones(self._group_of.size, bool)
        mask[self._ranked] = self._place_in_group >= gone[self._group_of]
        return mask

    def smallest_mask(self) -> BoolArray:
        """The mask of kept units after all units left that may."""
        return self.mask_after(self._order.size)

    def largest_mask_within(self, ceilings: Mapping[str, float]) -> BoolArray | None:
        """The first mask on the way whose costs are at most `ceilings`, by bisection; `None` if none is.

        A residual branch that leaves last may save much more than is missing. Then units that would have
        left before it stay.
        """
        leaving = self._first_within(ceilings, self._order)
        if leaving is None:
            return None
        last = self._branches_with(leaving[-1]) if leaving.size else leaving
        if last.size:
            others = leaving[~np.isin(leaving, last)]
            fewer = self._first_within(ceilings, others, last)
            leaving = leaving if fewer is None else fewer
        return self._mask_without(leaving)

    def _first_within(
        self, ceilings: Mapping[str, float], order: IntArray, gone: IntArray | None = None
    ) -> IntArray | None:
        """The first units of an order without which, and without `gone`, costs are at most `ceilings`."""
        gone = order[:0] if gone is None else gone
        low, high = int(self._is_forced[order].sum()), order.size

        def is_within(num: int) -> bool:
            costs = self._costs(self._mask_without(np.append(order[:num], gone)))
            return all(known_cost(costs, cost) <= ceiling for cost, ceiling in ceilings.items())

        if not is_within(high):
            return None
        while low < high:
            middle = (low + high) // 2
            if is_within(middle):
                high = middle
            else:
                low = middle + 1
        return np.append(order[:high], gone)

    def _branches_with(self, unit: int) -> IntArray:
        """The residual branches that leave with a unit: none unless it is one itself."""
        group = int(self._group_of[unit])
        if not self._is_branch[group]:
            return np.zeros(0, np.int64)
        tied = next((numbers for numbers, _ in self._ties if group in numbers), np.array([group]))
        return np.flatnonzero(np.isin(self._group_of, tied))


def choose_kept(
    labeled: LabeledModel, costs: CostFunction, unit_scores: FloatArray, request: RemovalRequest
) -> BoolArray:
    """The mask of kept units `(num_units,)` that scores lead to.

    Args:
        labeled: The model.
        costs: Its costs.
        unit_scores: Float64 `(num_units,)`; units with an infinite score never leave.
        request: What has to be reached.

    Raises:
        ValueError: if the goal is out of reach; it names the goal, and how much can leave.
    """
    order = order_removals(labeled, costs, unit_scores, request)
    return units_to_keep(labeled, costs, order, request)


def order_removals(
    labeled: LabeledModel, costs: CostFunction, unit_scores: FloatArray, request: RemovalRequest
) -> RemovalOrder:
    """The order in which units leave on the way to a goal; arguments and errors as in `choose_kept`."""
    limits, selection = request.limits, request.selection
    least, most = request.bounds(labeled)
    unit_scores = even_tied_scores(labeled, unit_scores, limits.ties)
    _check_scored(labeled, unit_scores, least)
    shares = _even_scores(labeled, unit_scores, request.original_widths)
    even_order = RemovalOrder(labeled, costs, shares, limits, RemovalBounds(least, most))
    even_mask = units_to_keep(labeled, costs, even_order, request)
    if selection.scope == "layer":
        return even_order
    # no floor is above the even cut: the goal stays in reach, and what is closed stays closed
    is_branch = np.array([group.is_branch for group in labeled.groups], bool)
    floors = np.ceil(selection.balance * costs.units_per_group(even_mask)).astype(np.int64) * ~is_branch
    most = np.minimum(most, costs.units_per_group() - floors)
    bounds = RemovalBounds(np.minimum(least, most), most)
    if selection.rank == "cost":
        ceilings = proxy_ceilings(request.ceilings, costs())
        unit_scores = _RelaxedKnapsack(costs, unit_scores, ceilings).places(bounds)
    return RemovalOrder(labeled, costs, unit_scores, limits, bounds)


def units_to_keep(
    labeled: LabeledModel, costs: CostFunction, order: RemovalOrder, request: RemovalRequest
) -> BoolArray:
    """The largest mask of kept units `(num_units,)` whose costs are at most the request's ceilings.

    Raises:
        ValueError: if there is none; it names the goal, and how much can leave.
    """
    kept = order.largest_mask_within(request.ceilings)
    if kept is None:
        raise unreachable_goal_error(
            *(labeled, costs, order.smallest_mask()),
            *(request.ceilings, request.goal, request.limits.set_by_user()),
        )
    return kept


def flatten_scores(labeled: LabeledModel, scores: Mapping[str, FloatArray]) -> FloatArray:
    """The scores of all units in one float64 array `(num_units,)`, infinite for groups without scores.

    Args:
        labeled: The model.
        scores: Group -> array `(num_units,)` of the group.

    Raises:
        ValueError: for groups that the model does not have, arrays of another shape, NaN.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(
            "Expected what `score` returns, or a dict from names of groups to arrays. "
            f"Received: scores={scores!r} (of type {type(scores).__name__})"
        )
    unit_scores = np.full(labeled.num_units, np.inf)
    groups = {group.name: group for group in labeled.groups}
    for name, values in scores.items():
        values = np.asarray(values, np.float64)
        group = groups.get(name)
        if group is None or values.shape != (group.num_units,) or np.isnan(values).any():
            expected = (
                "one of its groups that are prunable with these `include`, `exclude` and `exact`"
                if group is None
                else f"shape ({group.num_units},), no NaN"
            )
            raise ValueError(
                f"The scores do not fit the model at '{name}'. Expected {expected}. "
                f"Received: scores[{name!r}] of shape {values.shape}"
            )
        unit_scores[group.start : group.start + group.num_units] = values
    return unit_scores


def _even_scores(
    labeled: LabeledModel, unit_scores: FloatArray, original_widths: Mapping[str, int] | None
) -> FloatArray:
    """Scores `(num_units,)` by which every group loses the same share of its original units.

    The score of a unit is the share of its group that is gone after it left. Within a group the order stays.
    """
    shares = np.full(unit_scores.size, np.inf)
    for group in labeled.groups:
        part = slice(group.start, group.start + group.num_units)
        original = (original_widths or {}).get(group.name, group.num_units)
        ranks = np.argsort(np.argsort(unit_scores[part], kind="stable"))
        shares[part] = (original - group.num_units + ranks + 1) / original
    return np.where(np.isfinite(unit_scores), shares, np.inf)


def _check_scored(labeled: LabeledModel, unit_scores: FloatArray, least: IntArray) -> None:
    """Refuses groups that must lose units and have no scores."""
    for group, num in zip(labeled.groups, least, strict=True):
        if num > np.isfinite(unit_scores[group.start : group.start + group.num_units]).sum():
            raise ValueError(
                f"`ratios` ask for {num} of the {group.num_units} channels of '{group.name}', which have no "
                f"scores. Expected scores of each layer that must lose channels. Received: no scores of "
                f"{group.name!r}"
            )


class _RelaxedKnapsack:
    """The order in which units leave if scores are compared with what each unit saves.

    The relaxed knapsack problem is: minimize the sum of the scores of the units that leave, subject to
    "at least this much is saved", where a unit may leave in part. Its solution takes units by the ratio
    of score to savings (Dantzig, Operations Research 5, 1957). With several costs the savings of a unit
    are a weighted sum over the costs; the weight of a cost is the dual variable of its constraint. The
    savings of a unit depend on the widths of neighboring layers, so they are counted again on the way.

    Args:
        costs: The costs of the model.
        unit_scores: Float64 `(num_units,)`; units with an infinite score never leave.
        ceilings: Counted cost -> how much of it may be left.
    """

    def __init__(self, costs: CostFunction, unit_scores: FloatArray, ceilings: Mapping[str, float]) -> None:
        self._costs, self._unit_scores, self._ceilings = costs.group_costs, unit_scores, ceilings
        self._group_sizes = costs.units_per_group()
        self._group_of = np.repeat(np.arange(self._group_sizes.size), self._group_sizes)

    def places(self, bounds: RemovalBounds) -> FloatArray:
        """The place of each unit in the order, a float64 array `(num_units,)`; infinite: the unit stays."""
        starts = np.cumsum(self._group_sizes) - self._group_sizes
        ranked = np.lexsort((self._unit_scores, self._group_of))
        place_in_group = np.empty(ranked.size, np.int64)
        place_in_group[ranked] = np.arange(ranked.size) - starts[self._group_of]
        waiting = np.isfinite(self._unit_scores) & (place_in_group < bounds.most[self._group_of])
        parts: list[IntArray] = [np.flatnonzero(waiting & (place_in_group < bounds.least[self._group_of]))]
        waiting[parts[0]] = False
        counts = self._group_sizes - np.bincount(self._group_of[parts[0]], minlength=self._group_sizes.size)
        step = {cost: excess / _NUM_RECOUNTS for cost, excess in self._excess(counts).items()}
        while waiting.any():
            parts.append(self._next_units(np.flatnonzero(waiting), counts, step))
            waiting[parts[-1]] = False
            counts -= np.bincount(self._group_of[parts[-1]], minlength=counts.size)
        places = np.full(self._unit_scores.size, np.inf)
        places[np.concatenate(parts)] = np.arange(sum(map(len, parts)))
        return places

    def _excess(self, counts: IntArray) -> dict[str, float]:
        """How far costs are above their ceilings with these numbers of units left; others are left out."""
        now = self._costs(counts)
        excess = {cost: known_cost(now, cost) - ceiling for cost, ceiling in self._ceilings.items()}
        return {cost: amount for cost, amount in excess.items() if amount > 0}

    def _next_units(self, units: IntArray, counts: IntArray, step: Mapping[str, float]) -> IntArray:
        """The units with the lowest ratios that save one step; all units if no cost is above its ceiling."""
        excess = self._excess(counts)
        if not excess:
            return units[np.argsort(self._unit_scores[units], kind="stable")]
        per_group = np.array([self._costs.gradient(counts, cost) / excess[cost] for cost in excess])
        savings = per_group[:, self._group_of[units]]
        scores = self._unit_scores[units]
        saved = _dual_variables(scores, savings) @ savings
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(scores > 0, scores / saved, scores * saved)
        ratios = np.where(saved > 0, ratios, np.inf)
        order = np.lexsort((-saved, scores, ratios))  # of worthless units the largest goes first
        is_step = [
            np.cumsum(row[order]) * excess[cost] >= step[cost]
            for cost, row in zip(excess, savings, strict=True)
        ]
        reached = np.any(is_step, axis=0)
        return units[order[: reached.argmax() + 1]] if reached.any() else units[order]


def _dual_variables(scores: FloatArray, savings: FloatArray) -> FloatArray:
    """How much each cost's savings are worth: the dual variables of the relaxed knapsack's constraints.

    The linear program over the parts p of the units that leave, each from 0 to 1, is: minimize
    `scores @ p` subject to `savings @ p >= 1`, one row for each cost.

    Args:
        scores: `(num_units,)`.
        savings: `(num_costs, num_units)`, as parts of what each cost must still lose.

    Returns:
        Non-negative weights `(num_costs,)`, at least one of them positive.
    """
    even = np.ones(len(savings))
    scale = np.abs(scores).mean()
    if len(savings) == 1 or scale == 0:
        return even
    stride = -(-scores.size // MOST_VARIABLES)
    sample = np.lexsort((scores, *savings))[stride // 2 :: stride]
    values = np.maximum(scores[sample], 0) / scale
    solution = linprog(stride * values, -stride * savings[:, sample], -even, bounds=(0, 1), method="highs")
    if solution.status != 0:  # out of reach by the current savings; they change on the way
        return even
    duals = np.maximum(-solution.ineqlin.marginals, 0)
    return duals if duals.any() else even
