"""The order in which units go where scores are held against what each unit saves."""

import numpy as np
from scipy.optimize import linprog

_STEPS = 30  # how often it is counted anew what units save, on the way to the goal
_MOST_VARIABLES = 1000  # of a linear program: one in so many units stands for its neighbors in score


class PricedOrder:
    """Units by score for what they save.

    The relaxed knapsack problem "the least sum of scores, so much saved at least" takes units in this
    order (Dantzig, Operations Research 5, 1957). Of several costs each counts as much as the dual
    variable of its constraint. What a unit saves depends on the widths of its neighbors, so it is
    counted anew on the way.

    Args:
        costs: `CostModel`.
        flat: Scores, float64 `(num_units,)`; infinite: never.
        ceilings: A dict: cost -> what may be left.
    """

    def __init__(self, costs, flat, ceilings):
        self._costs, self._flat, self._ceilings = costs.by_groups, flat, ceilings
        self._sizes = costs.counts()
        self._group_of = np.repeat(np.arange(self._sizes.size), self._sizes)

    def order(self, least, most):
        """When each unit goes, a float64 array `(num_units,)`; infinite: it stays.

        Args:
            least, most: How many units go of each group, int64 arrays `(num_groups,)`.
        """
        starts = np.cumsum(self._sizes) - self._sizes
        ranked = np.lexsort((self._flat, self._group_of))
        within = np.empty(ranked.size, np.int64)
        within[ranked] = np.arange(ranked.size) - starts[self._group_of]
        left = np.isfinite(self._flat) & (within < most[self._group_of])
        parts = [np.flatnonzero(left & (within < least[self._group_of]))]
        left[parts[0]] = False
        counts = self._sizes - np.bincount(self._group_of[parts[0]], minlength=self._sizes.size)
        step = {what: part / _STEPS for what, part in self._excess(counts).items()}
        while left.any():
            parts.append(self._next(np.flatnonzero(left), counts, step))
            left[parts[-1]] = False
            counts -= np.bincount(self._group_of[parts[-1]], minlength=counts.size)
        places = np.full(self._flat.size, np.inf)
        places[np.concatenate(parts)] = np.arange(sum(map(len, parts)))
        return places

    def _excess(self, counts):
        """How much of each cost is still too much."""
        now = self._costs(counts)
        return {what: now[what] - most for what, most in self._ceilings.items() if now[what] > most}

    def _next(self, units, counts, step):
        """Those of the units that are cheapest, until one step is saved; all where nothing is too much."""
        excess = self._excess(counts)
        if not excess:
            return units[np.argsort(self._flat[units], kind="stable")]
        savings = np.array([self._costs.slopes(counts, what) / excess[what] for what in excess])
        savings = savings[:, self._group_of[units]]
        scores = self._flat[units]
        saved = _duals(scores, savings) @ savings
        with np.errstate(divide="ignore", invalid="ignore"):
            prices = np.where(scores > 0, scores / saved, scores * saved)
        prices = np.where(saved > 0, prices, np.inf)
        order = np.lexsort((scores, prices))
        enough = [
            np.cumsum(row[order]) * excess[what] >= step[what]
            for what, row in zip(excess, savings, strict=True)
        ]
        reached = np.any(enough, axis=0)
        return units[order[: reached.argmax() + 1]] if reached.any() else units[order]


def _duals(scores, savings):
    """What a unit of each saving is worth, the constraint being that each row of savings sums to 1.

    Args:
        scores: `(num_units,)`.
        savings: `(num_costs, num_units)`.

    Returns:
        Non-negative weights `(num_costs,)`, not all of them 0.
    """
    even = np.ones(len(savings))
    scale = np.abs(scores).mean()
    if len(savings) == 1 or scale == 0:
        return even
    every = -(-scores.size // _MOST_VARIABLES)
    few = np.lexsort((scores, *savings))[every // 2 :: every]
    values = np.maximum(scores[few], 0) / scale
    found = linprog(every * values, -every * savings[:, few], -even, bounds=(0, 1), method="highs")
    if found.status != 0:  # out of reach by today's savings; they change on the way
        return even
    duals = np.maximum(-found.ineqlin.marginals, 0)
    return duals if duals.any() else even
