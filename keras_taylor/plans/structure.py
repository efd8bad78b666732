"""What a plan knows of the model that it was made for."""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from keras_taylor.budget.group_costs import GroupCosts


@dataclasses.dataclass(frozen=True)
class PlanStructure:
    """Which channels live and die together, in which order they go, and what they cost.

    Attributes:
        groups: Group -> number of its units, which are numbered through from group to group.
        layers: Layer -> the unit of each of its channels, -1 for one that stays; in the network's order.
        order: The units that had scores, the least important first.
        costs: `GroupCosts`.
    """

    groups: Mapping[str, int]
    layers: Mapping[str, tuple]
    order: tuple
    costs: GroupCosts

    def mask(self, kept):
        """Which units stay where layers keep these channels.

        Args:
            kept: Layer -> indices of the channels that it keeps, for those that lose some.

        Returns:
            A bool array `(num_units,)`.
        """
        mask = np.ones(sum(self.groups.values()), bool)
        for name, indices in kept.items():
            units = np.delete(self.layers[name], list(indices))
            mask[units[units >= 0]] = False
        return mask

    def kept(self, mask):
        """The indices of the channels that layers keep: the inverse of `mask`."""
        stays = {name: np.append(mask, True)[list(units)] for name, units in self.layers.items()}
        return {name: tuple(np.flatnonzero(one).tolist()) for name, one in stays.items() if not one.all()}

    def cost(self, mask):
        """Costs with these units kept, as `CostModel` gives them."""
        return self.costs(np.bincount(self._group_of()[mask], minlength=len(self.groups)))

    def whole_cost(self):
        """Costs with all units kept."""
        return self.costs(list(self.groups.values()))

    def with_most_important(self, mask, name, num):
        """`mask` with `num` channels kept of a layer, those that would go last.

        Raises:
            ValueError: if whole units make no such number, or had no scores.
        """
        units = np.array(self.layers[name])
        sizes = dict(zip(*np.unique(units[units >= 0], return_counts=True), strict=True))
        ranked = [unit for unit in self.order if unit in sizes]
        if len(ranked) < len(sizes):
            raise ValueError(
                f"The plan does not know which channels of layer '{name}' matter most: they had no "
                f"scores. Expected indices in place of a number. Received: channels={num!r}"
            )
        group_of, left = self._group_of(), {}
        for unit in ranked:
            left[group_of[unit]] = left.get(group_of[unit], 0) + 1
        width, possible, gone = units.size, [units.size], []
        for unit in ranked:
            if width <= num:
                break
            if left[group_of[unit]] > 1:
                left[group_of[unit]] -= 1
                width -= sizes[unit]
                gone.append(unit)
                possible.append(int(width))
        if width != num:
            nearest = " or ".join(map(str, sorted(possible[-2:])))
            raise ValueError(
                f"Layer '{name}' of {units.size} channels cannot keep {num}: they leave in whole units, and "
                f"one of each group stays. Expected {nearest}, say. Received: channels={num!r}"
            )
        mask = mask.copy()
        mask[list(sizes)] = True
        mask[gone] = False
        return mask

    def with_channels(self, mask, name, indices):
        """`mask` with exactly these channels kept of a layer.

        Raises:
            ValueError: if channels are missing that stay, or that live with others that are kept.
        """
        units = np.array(self.layers[name])
        stays = np.zeros(units.size, bool)
        stays[indices] = True
        torn = (units < 0) | np.isin(units, units[stays])
        if not np.array_equal(torn, stays):
            raise ValueError(
                f"Channel {int(np.flatnonzero(torn & ~stays)[0])} of layer '{name}' stays, or lives and dies "
                f"with another one that is kept. Expected it among the channels. "
                f"Received: channels={indices!r}"
            )
        mask = mask.copy()
        mask[units[units >= 0]] = False
        mask[units[stays & (units >= 0)]] = True
        return mask

    def empty_group(self, mask):
        """The name of a group that keeps no unit, or `None`."""
        counts = np.bincount(self._group_of()[mask], minlength=len(self.groups))
        return next((name for name, count in zip(self.groups, counts, strict=True) if not count), None)

    def followed_by(self, later, kept):
        """This structure with the order of what went first, and then that of a later one.

        Args:
            later: The `PlanStructure` of the model in which layers keep only the channels `kept`.
            kept: As in `mask`.
        """
        unit_of = {}
        for name, units in later.layers.items():
            own = np.array(self.layers[name])[list(kept.get(name, range(len(self.layers[name]))))]
            unit_of.update(zip(units, own.tolist(), strict=True))
        mask = self.mask(kept)
        first = [unit for unit in self.order if not mask[unit]]
        then = [unit_of[unit] for unit in later.order]
        known = {*first, *then}
        last = [unit for unit in self.order if unit not in known]
        return dataclasses.replace(self, order=(*first, *then, *last))

    def difference(self, layers):
        """Where a model's layers are others, as text; `None` if they are the same.

        Args:
            layers: Layer -> how many channels it makes, in the network's order.
        """
        own = [(name, len(units)) for name, units in self.layers.items()]
        for number, (expected, found) in enumerate(itertools.zip_longest(own, layers.items()), 1):
            if expected != found:
                there, here = (
                    "no layer" if one is None else f"'{one[0]}' with {one[1]} channels"
                    for one in (found, expected)
                )
                return (
                    f"Expected as layer {number} of those that make channels: {here}; the model has: {there}"
                )
        return None

    def _group_of(self):
        return np.repeat(np.arange(len(self.groups)), list(self.groups.values()))

    def to_dict(self):
        """The structure as dicts, lists and numbers."""
        return {**dataclasses.asdict(self), "costs": self.costs.to_dict()}

    @classmethod
    def from_dict(cls, content):
        """What `to_dict` made, also after a way through JSON."""
        return cls(
            {name: int(num) for name, num in content["groups"].items()},
            {name: tuple(map(int, units)) for name, units in content["layers"].items()},
            tuple(map(int, content["order"])),
            GroupCosts.from_dict(content["costs"]),
        )
