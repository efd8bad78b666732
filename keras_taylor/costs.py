"""Parameters and FLOPs at any set of widths."""

import math

import numpy as np

from keras_taylor.rules.base import weight_of

COSTS = ("params", "flops")


class CostModel:
    """Counts parameters and floating point operations of a model with some units gone.

    Every cost is a sum of terms `factor x width x width ...`; a width is the number
    of positions kept along an axis. Parameters are `model.count_params()`; FLOPs are
    those of one example's forward pass at inference, a multiply-add counted as two.

    Args:
        channels: `groups.Channels` of the model.
    """

    def __init__(self, channels):
        self.num_units = channels.num_units
        self._axes = []  # unit of each position, -1 for what stays
        self._index = {}
        self._channels = channels
        self._terms = {"params": self._params(), "flops": self._flops()}

    def __call__(self, kept=None):
        """Costs with only some units kept.

        Args:
            kept: Bool array `(num_units,)`; `None`: all.

        Returns:
            A dict with ints "params" and "flops"; `None` for FLOPs where the model's
            input has an unknown size.
        """
        kept = np.ones(self.num_units, bool) if kept is None else kept
        extended = np.append(kept, True)  # the -1 of what stays
        widths = np.array([extended[axis].sum() for axis in self._axes] + [1], np.float64)
        return {what: _total(terms, widths) for what, terms in self._terms.items()}

    def _params(self):
        terms = {}
        seen = set()
        calls, effects = self._channels.graph.calls, self._channels.effects
        for call, effect in zip(calls, effects, strict=True):
            if id(call.operation) in seen or not hasattr(call.operation, "weights"):
                continue
            seen.add(id(call.operation))
            cut = {id(weight_of(call.operation, name)): axes for name, axes in effect.weights.items()}
            for weight in call.operation.weights:
                axes = cut.get(id(weight), (None,) * len(weight.shape))
                factor = math.prod(d for d, a in zip(weight.shape, axes, strict=True) if a is None)
                self._add(terms, factor, [a for a in axes if a is not None])
        return terms

    def _flops(self):
        terms = {}
        for effect in self._channels.effects:
            for work in effect.work:
                self._add(terms, work.factor, work.axes)
        return terms

    def _add(self, terms, factor, axes):
        key = tuple(sorted(self._axis(vector) for vector in axes))
        terms[key] = terms.get(key, 0.0) + factor

    def _axis(self, vector):
        units = self._channels.units(vector)
        key = (units.size, hash(units.tobytes()))
        if key not in self._index:
            self._index[key] = len(self._axes)
            self._axes.append(units)
        return self._index[key]


def unit_savings(channels, what):
    """What each unit saves if it goes alone, of "params" or "flops": a float64 array `(num_units,)`."""
    costs, savings = CostModel(channels), np.ones(channels.num_units)
    whole = costs()[what]
    for group in channels.groups:
        kept = np.ones(channels.num_units, bool)
        kept[group.start] = False
        savings[group.start : group.start + group.num_units] = max(whole - costs(kept)[what], 1)
    return savings


def check_countable(costs, what, wanted):
    """Refuses FLOPs where they are unknown; `wanted` is the argument that asks for them."""
    if costs[what] is None:
        raise ValueError(
            "FLOPs are unknown because the model's input has axes of unknown size. Expected a model "
            "made with a fixed input shape, or parameters in their place. "
            f"Received: {wanted}"
        )


def _total(terms, widths):
    total = math.fsum(factor * math.prod(widths[list(key)]) for key, factor in terms.items())
    return None if math.isnan(total) else round(total)
