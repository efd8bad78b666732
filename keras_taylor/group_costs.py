"""Parameters, FLOPs and activation memory from how many units each group keeps."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class GroupCosts:
    """Costs of a model as sums of products of widths; it needs no model, and can be saved.

    All units of a group stand at the same places, so a width is a fixed number and so many channels for
    each unit of each group.

    Attributes:
        widths: For each width its fixed part and a tuple of pairs: group, channels a unit.
        terms: "params" and "flops" -> a tuple of pairs: factor, and the widths that it is
            multiplied by (indices, one each time); `None` where a size is unknown.
        memory: What `activations.Lifetimes` knows, a tuple for each place in memory: bytes a channel, its
            width, first and last step; `None` where a size is unknown.
        num_groups: How many groups there are.
    """

    widths: tuple
    terms: Mapping
    memory: tuple | None
    num_groups: int

    def __call__(self, counts):
        """Costs with so many units left in each group.

        Args:
            counts: Array `(num_groups,)`.

        Returns:
            A dict with ints "params", "flops" and "activation_memory" (bytes); `None` where unknown.
        """
        fixed, channels = self._linear
        widths = fixed + channels @ np.asarray(counts, np.float64)
        counted = {what: _total(terms, widths) for what, terms in self.terms.items()}
        memory = None if self.memory is None else round(float(self._alive(widths).max()))
        return {**counted, "activation_memory": memory}

    def slopes(self, counts, what):
        """How much of a cost one unit of each group makes up: its derivative, `(num_groups,)`.

        Args:
            counts: Array `(num_groups,)`.
            what: A cost that is known.
        """
        fixed, channels = self._linear
        widths = fixed + channels @ np.asarray(counts, np.float64)
        by_width = np.zeros(widths.size)
        if what == "activation_memory":
            alive = self._alive(widths)
            worst = int(alive.argmax())
            for size, place, first, last in self.memory:
                by_width[place] += size * (first <= worst <= last)
            return by_width @ channels
        for factor, axes in self.terms[what]:
            for number, axis in enumerate(axes):
                others = [*axes[:number], *axes[number + 1 :]]
                by_width[axis] += factor * math.prod(widths[others])
        return by_width @ channels

    @functools.cached_property
    def _linear(self):
        fixed = np.array([one for one, _ in self.widths], np.float64)
        channels = np.zeros((len(self.widths), self.num_groups))
        for number, (_, parts) in enumerate(self.widths):
            for group, multiple in parts:
                channels[number, group] = multiple
        return fixed, channels

    def _alive(self, widths):
        """Bytes that are alive at each step."""
        sizes, places, first, last = np.array(self.memory, np.float64).reshape(-1, 4).T
        change = np.zeros(int(last.max(initial=0)) + 2)
        sizes = sizes * widths[places.astype(int)]
        np.add.at(change, first.astype(int), sizes)
        np.add.at(change, last.astype(int) + 1, -sizes)
        return np.cumsum(change)

    def to_dict(self):
        """The costs as dicts, lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content):
        """What `to_dict` made, also after a way through JSON."""
        return cls(**{name: _frozen(value) for name, value in content.items()})


def _frozen(value):
    """Lists as tuples, to any depth."""
    if isinstance(value, Mapping):
        return {key: _frozen(one) for key, one in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _total(terms, widths):
    if terms is None:
        return None
    return round(math.fsum(factor * math.prod(widths[list(axes)]) for factor, axes in terms))
