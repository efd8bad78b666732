"""What a goal asks, what can be reached, and what blocks the rest."""

import math

import numpy as np

from keras_taylor.budget.measured_costs import format_amount
from keras_taylor.rules.base import weight_of


def reach(goals, before, least):
    """A line for each part of the goals: what is there, what is asked, and what can be reached.

    Args:
        goals: `goals.Goal`s about the same costs.
        before: Costs of the whole model.
        least: Costs with all gone that may go.
    """
    ceilings = [goal.ceilings(before) for goal in goals]
    for what in ceilings[0]:
        asked = ", then ".join(format_amount(what, math.floor(one[what]), named=False) for one in ceilings)
        now, reached = (format_amount(what, costs[what], named=False) for costs in (before, least))
        yield (
            f"{what}: {now} now, at most {asked} asked for, {reached} "
            f"({1 - least[what] / before[what]:.1%} less) can be reached"
        )


def unreachable(labeled, costs, least, ceilings, goal, has_ratios=False):
    """The error for a goal out of reach.

    Args:
        channels: `groups.LabeledModel`.
        costs: Its `CostModel`.
        least: The mask of kept units with all gone that may go.
        ceilings: What may be left of each cost.
        goal: What the user wrote.
        has_ratios: Whether there are ratios, which can be in the way.
    """
    before, after = costs(), costs(least)
    parts = [
        f"at most {1 - after[what] / before[what]:.1%} of the {format_amount(what, before[what])} can be "
        f"removed, which leaves {format_amount(what, after[what], named=False)}"
        for what, ceiling in ceilings.items()
        if after[what] > ceiling
    ]
    return ValueError(
        f"The goal is out of reach: {'; '.join(parts)}. What stays: {blockers(labeled, least)}. Lower the "
        f"goal, or widen what may go (`include`, `exclude`, {'`ratios`, ' * has_ratios}`round_to`, "
        f"`min_channels`). "
        f"Received: goal={goal!r}"
    )


def blockers(labeled, least):
    """The three things that keep most parameters from leaving, as text.

    Each parameter that is left when all has gone that may go counts for every locked layer whose
    channels it makes or reads.
    """
    held = _held(labeled, least)
    locked = {group.name: group for group in labeled.locked_groups}
    names = sorted((name for name in held if name in locked), key=lambda name: -held[name])[:3]
    text = "; ".join(
        f"'{n}' ({locked[n].num_units} channels: {locked[n].reason}; {held[n]:,} parameters)" for n in names
    )
    return text or "the smallest width of every layer"


def _held(labeled, least):
    """Parameters that make or read locked channels, by the layer that makes these."""
    kept = np.append(least, True)
    held, seen = {}, set()
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        for name, axes in effect.weights.items():
            weight = weight_of(call.operation, name)
            if weight is None or id(weight) in seen:
                continue
            seen.add(id(weight))
            units = [None if a is None else labeled.units_of(a) for a in axes]
            size = math.prod(
                d if u is None else int(kept[u].sum()) for d, u in zip(weight.shape, units, strict=True)
            )
            stays = [a[u < 0] for a, u in zip(axes, units, strict=True) if u is not None]
            for maker in set().union(*map(labeled.producers_of, stays)):
                held[maker] = held.get(maker, 0) + size
    return held
