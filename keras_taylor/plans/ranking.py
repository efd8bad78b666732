"""Which units go first, and how many until a goal is met."""

import numpy as np

from keras_taylor.budget.feasibility import unreachable
from keras_taylor.budget.measured_costs import proxy_ceilings
from keras_taylor.plans.limits import Limits
from keras_taylor.plans.prices import PricedOrder

SCOPES = ("global", "layer")
RANKS = ("score", "cost")


def choose_kept(labeled, costs, flat, ceilings, goal, limits=None, **how):
    """The mask of kept units that a goal, limits and scores lead to.

    Args:
        channels: `groups.LabeledModel`.
        costs: Its `CostModel`.
        flat: Scores, float64 `(num_units,)`; infinite: never.
        ceilings: A dict: cost -> what may be left.
        goal: What the user wrote.
        limits: `limits.Limits`; `None`: none.
        **how: As in `order_removals`.

    Raises:
        ValueError: if the goal is out of reach; it names `goal`, and how much can go.
    """
    limits = limits or Limits()
    removal_order = order_removals(labeled, costs, flat, ceilings, goal, limits, **how)
    return units_to_keep(labeled, costs, removal_order, ceilings, goal, bool(limits.ratios))


def order_removals(
    labeled,
    costs,
    flat,
    ceilings,
    goal,
    limits,
    *,
    scope="global",
    rank="score",
    balance=0.0,
    whole=None,
    share=1.0,
    closed=None,
):
    """The `RemovalOrder` units on the way to a goal.

    Args:
        channels, costs, flat, ceilings, goal, limits: As in `choose_kept`.
        scope, rank, balance: As in `make_plan`.
        whole: Group -> how many units it had in the original, where some are gone already.
        share: How much of the way to the goal is gone after this, see `Limits.bounds`.
        closed: How many units of each group are gone in any case, those with the lowest scores, an
            int64 array `(num_groups,)`; `None`: none.

    Raises:
        ValueError: if the goal is out of reach, for a choice that is none.
    """
    check_choices(scope, rank, balance)
    closed = np.zeros(len(labeled.groups), np.int64) if closed is None else closed
    least, most = (np.maximum(bound, closed) for bound in limits.bounds(labeled, whole, share))
    _check_scored(labeled, flat, least)
    shares = by_share(labeled, flat, whole)
    evenly = RemovalOrder(labeled, costs, shares, limits.round_to, bounds=(least, most))
    even = units_to_keep(labeled, costs, evenly, ceilings, goal, bool(limits.ratios))
    if scope == "layer":
        return evenly
    # never more than what an even cut takes, so that the goal stays in reach
    floors = np.ceil(balance * costs.counts(even)).astype(np.int64)
    most = np.maximum(np.minimum(most, costs.counts() - floors), closed)
    least = np.minimum(least, most)
    if rank == "cost":
        flat = PricedOrder(costs, flat, proxy_ceilings(ceilings, costs())).order(least, most)
    return RemovalOrder(labeled, costs, flat, limits.round_to, bounds=(least, most))


def units_to_keep(labeled, costs, removal_order, ceilings, goal, has_ratios=False):
    """The largest mask of kept units whose costs are at most `ceilings`.

    Args:
        channels: `groups.LabeledModel`.
        costs: Its `CostModel`.
        removable: Its `RemovalOrder`.
        ceilings: A dict: cost -> what may be left.
        goal: What the user wrote.
        has_ratios: Whether there are ratios, which can be in the way.

    Raises:
        ValueError: if there is none; it names `goal`, and how much can go.
    """
    kept = removal_order.until(ceilings)
    if kept is None:
        raise unreachable(labeled, costs, removal_order.least(), ceilings, goal, has_ratios)
    return kept


def flat_scores(labeled, scores):
    """Scores of all units in one float64 array `(num_units,)`, infinite where there are none."""
    flat = np.full(labeled.num_units, np.inf)
    names = {group.name: group for group in labeled.groups}
    for name, values in scores.items():
        values = np.asarray(values, np.float64)
        group = names.get(name)
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
        flat[group.start : group.start + group.num_units] = values
    return flat


def by_share(labeled, flat, whole=None):
    """Scores that take the same share of every group: the share of it that is gone with the unit.

    Args:
        channels: `groups.LabeledModel`.
        flat: Scores, float64 `(num_units,)`; within a group the lowest goes first.
        whole: Group -> how many units it had in the original, where some are gone already.
    """
    shares = np.full(flat.size, np.inf)
    for group in labeled.groups:
        part = slice(group.start, group.start + group.num_units)
        original = (whole or {}).get(group.name, group.num_units)
        ranks = np.argsort(np.argsort(flat[part], kind="stable"))
        shares[part] = (original - group.num_units + ranks + 1) / original
    return np.where(np.isfinite(flat), shares, np.inf)


class RemovalOrder:
    """Units in the order in which they go, and the masks that this leads to.

    Args:
        channels: `groups.LabeledModel`.
        costs: Its `CostModel`.
        flat: Scores, float64 `(num_units,)`; infinite: never.
        round_to, min_channels: As in `make_plan`.
        bounds: How many units go of each group, at least and at most; `None`: as `min_channels` says.
    """

    def __init__(self, labeled, costs, flat, round_to=1, min_channels=1, bounds=None):
        least, most = bounds or Limits(round_to, min_channels).bounds(labeled)
        self._costs, self._round_to = costs, round_to
        self._sizes = costs.counts()
        self._starts = np.array([g.start for g in labeled.groups], np.int64)
        self._group_of = np.repeat(np.arange(len(self._sizes)), self._sizes)
        self._ranked = np.lexsort((flat, self._group_of))  # within each group, worst first
        self._within = np.arange(flat.size) - self._starts[self._group_of] if flat.size else np.zeros(0, int)
        eligible, forced = np.zeros(flat.size, bool), np.zeros(flat.size, bool)
        eligible[self._ranked] = self._within < most[self._group_of]
        forced[self._ranked] = self._within < least[self._group_of]
        eligible &= np.isfinite(flat)
        order = np.lexsort((flat, ~forced))
        self._order = order[eligible[order]]
        self._num_forced = int((forced & eligible).sum())

    def mask(self, num):
        """Units kept after the first `num` went, a bool array `(num_units,)`."""
        gone = np.bincount(self._group_of[self._order[:num]], minlength=len(self._sizes))
        kept = -(-(self._sizes - gone) // self._round_to) * self._round_to
        gone = self._sizes - np.minimum(kept, self._sizes)
        mask = np.ones(self._group_of.size, bool)
        mask[self._ranked] = self._within >= gone[self._group_of]
        return mask

    def least(self):
        """The mask with all gone that may go."""
        return self.mask(self._order.size)

    def until(self, ceilings):
        """The largest mask whose costs are at most `ceilings`, `None` if there is none."""
        low, high = self._num_forced, self._order.size
        if not self._holds(high, ceilings):
            return None
        while low < high:
            middle = (low + high) // 2
            if self._holds(middle, ceilings):
                high = middle
            else:
                low = middle + 1
        return self.mask(high)

    def _holds(self, num, ceilings):
        costs = self._costs(self.mask(num))
        return all(costs[what] <= ceiling for what, ceiling in ceilings.items())


def _check_scored(labeled, flat, least):
    """Refuses groups that must lose units and have no scores."""
    for group, num in zip(labeled.groups, least, strict=True):
        if num > np.isfinite(flat[group.start : group.start + group.num_units]).sum():
            raise ValueError(
                f"`ratios` ask for {num} of the {group.num_units} channels of '{group.name}', which have no "
                f"scores. Expected scores of each layer that must lose channels. Received: no scores of "
                f"{group.name!r}"
            )


def check_choices(scope, rank, balance):
    """Refuses what is no `scope`, `rank` or `balance` of `make_plan`."""
    for name, value, known in (("scope", scope, SCOPES), ("rank", rank, RANKS)):
        if value not in known:
            raise ValueError(f"Expected one of {', '.join(map(repr, known))}. Received: {name}={value!r}")
    if isinstance(balance, bool) or not isinstance(balance, (int, float)) or not 0 <= balance <= 1:
        raise ValueError(
            "`balance` is the share of an even cut's channels that every group keeps. Expected a number "
            f"from 0 to 1. Received: balance={balance!r}"
        )
