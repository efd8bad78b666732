"""How much of a goal can be reached, and what blocks the rest, as text."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from keras_taylor.budget.costs import CostFunction, known_cost
from keras_taylor.budget.goals import Goal
from keras_taylor.budget.measured_costs import format_amount
from keras_taylor.reading.branches import find_branches
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.rules.base import weight_of
from keras_taylor.support.identity import IdentitySet
from keras_taylor.support.types import BoolArray, Costs

RATIOS = "`ratios`"  # among the limits that a user sets


def describe_reach(goals: Sequence[Goal], original: Costs, smallest: Costs) -> Iterator[str]:
    """A line for each cost of the goals: its amount now, what is asked for, and what can be reached.

    Args:
        goals: Goals about the same costs.
        original: Costs of the original model.
        smallest: Costs with all units gone that may leave.
    """
    ceilings = [goal.ceilings(original) for goal in goals]
    for cost in ceilings[0]:
        before, least = known_cost(original, cost), known_cost(smallest, cost)
        asked = ", then ".join(format_amount(cost, math.floor(one[cost]), named=False) for one in ceilings)
        now, reached = (format_amount(cost, amount, named=False) for amount in (before, least))
        yield (
            f"{cost}: {now} now, at most {asked} asked for, {reached} "
            f"({1 - least / before:.1%} less) can be reached"
        )


def unreachable_goal_error(
    labeled: LabeledModel,
    costs: CostFunction,
    smallest_mask: BoolArray,
    ceilings: Mapping[str, float],
    goal: object,
    limits: Sequence[str] = (),
) -> ValueError:
    """The error for a goal out of reach.

    Args:
        labeled: The model.
        costs: Its costs.
        smallest_mask: Which units are kept after all left that may, `(num_units,)`.
        ceilings: Cost -> how much of it may be left.
        goal: The goal as the user wrote it.
        limits: What the user set that may keep groups from leaving down to one unit, as texts.
    """
    original, smallest = costs(), costs(smallest_mask)
    parts = []
    for cost, ceiling in ceilings.items():
        before, least = known_cost(original, cost), known_cost(smallest, cost)
        if least > ceiling:
            parts.append(
                f"at most {1 - least / before:.1%} of the {format_amount(cost, before)} can be "
                f"removed, which leaves {format_amount(cost, least, named=False)}"
            )
    blockers = describe_blockers(labeled, smallest_mask)
    if any(smallest_mask[group.start :][: group.num_units].sum() > 1 for group in labeled.groups):
        blockers = "; ".join([*limits, blockers])
    has_ratios = RATIOS in limits
    return ValueError(
        f"The goal is out of reach: {'; '.join(parts)}. It is blocked by {blockers}. Lower the goal, or let "
        f"more channels leave (`include`, `exclude`, {'`ratios`, ' * has_ratios}`round_to`, `min_channels`). "
        f"{_branches_hint(labeled, ceilings)}{_percent_hint(goal)}Received: goal={goal!r}"
    )


def _branches_hint(labeled: LabeledModel, ceilings: Mapping[str, float]) -> str:
    """What to pass where channels are not all: for a latency, and for closed layers that may leave whole."""
    if labeled.with_branches:
        return ""
    free = [one for one in find_branches(labeled.graph).branches if one.reason is None]
    is_slow = any(cost.startswith("latency") for cost in ceilings)
    if free and (is_slow or any(one.is_layer for one in free)):
        return "Whole residual branches leave with `selection=Selection(branches=True)`. "
    return ""


def _percent_hint(goal: object) -> str:
    """What to pass where an amount that may be left looks like a percentage to remove."""
    for cost, amount in goal.items() if isinstance(goal, Mapping) else ():
        if isinstance(amount, int) and 0 < amount < 100 and not cost.startswith("latency"):
            return f"{amount} is what may be left; to remove {amount} % pass {{{cost!r}: {amount / 100}}}. "
    return ""


def describe_blockers(labeled: LabeledModel, smallest_mask: BoolArray) -> str:
    """The three locked layers that keep most parameters from leaving, as text.

    Each parameter that is left after all units left that may counts for every locked layer whose channels
    it makes or reads.
    """
    blocked = _blocked_parameters(labeled, smallest_mask)
    locked = {group.name: group for group in labeled.locked_groups}
    names = sorted((name for name in blocked if name in locked), key=lambda name: -blocked[name])[:3]
    text = "; ".join(
        f"'{n}' ({locked[n].num_units} channels: {locked[n].reason}; {blocked[n]:,} parameters)"
        for n in names
    )
    return text or "the smallest width of every layer"


def _blocked_parameters(labeled: LabeledModel, smallest_mask: BoolArray) -> dict[str, int]:
    """How many parameters make or read locked channels, by the layer that makes these channels."""
    kept = np.append(smallest_mask, True)  # unit -1 is a channel that stays
    blocked: dict[str, int] = {}
    seen = IdentitySet()
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        if not kept[labeled.branch_units_of_operation(call.operation)].all():
            continue
        for path, axes in effect.weights.items():
            weight = weight_of(call.operation, path)
            if weight is None or weight in seen:
                continue
            seen.add(weight)
            units = [None if labels is None else labeled.units_of(labels) for labels in axes]
            num_left = math.prod(
                size if along is None else int(kept[along].sum())
                for size, along in zip(weight.shape, units, strict=True)
            )
            locked = [labels[labeled.units_of(labels) < 0] for labels in axes if labels is not None]
            for layer in set().union(*map(labeled.producers_of, locked)):
                blocked[layer] = blocked.get(layer, 0) + num_left
    return blocked
