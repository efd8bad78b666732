"""What a plan knows about the model that it was made for."""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from keras_taylor.budget.group_costs import GroupCosts
from keras_taylor.support.types import BoolArray, IntArray

# Layer -> indices of the channels that it keeps, for the layers that lose some.
KeptChannels: TypeAlias = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class PlanStructure:
    """Which channels of a model leave together, in which order they leave, and what they cost.

    Units are numbered from group to group, as in the model that the plan was made for.

    Attributes:
        group_sizes: Group -> number of its units.
        layer_units: Layer -> the unit of each of its channels, -1 for a channel that stays; in the order
            of the network.
        removal_order: The units that had scores, the least important one first.
        group_costs: The costs as a function of the number of units that each group keeps.
        branches: Group that is a residual branch -> names of the layers that leave with it. Such a group
            may keep no unit.
        ties: Groups that lose units together: how many of each leave in one step.
    """

    group_sizes: Mapping[str, int]
    layer_units: Mapping[str, tuple[int, ...]]
    removal_order: tuple[int, ...]
    group_costs: GroupCosts
    branches: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    ties: tuple[Mapping[str, int], ...] = ()

    def mask_of_channels(self, channels: KeptChannels) -> BoolArray:
        """The mask of kept units `(num_units,)` if layers keep only these channels."""
        mask = np.ones(sum(self.group_sizes.values()), bool)
        for layer, indices in channels.items():
            units = np.delete(self.layer_units[layer], list(indices))
            mask[units[units >= 0]] = False
        return mask

    def channels_of_mask(self, mask: BoolArray) -> dict[str, tuple[int, ...]]:
        """The channels that layers keep with these units: the inverse of `mask_of_channels`.

        Layers that leave with a branch are not named; only the branch is.
        """
        kept = {layer: np.append(mask, True)[list(units)] for layer, units in self.layer_units.items()}
        gone = self.layers_gone({name: np.flatnonzero(kept[name]).tolist() for name in self.branches})
        return {
            layer: tuple(np.flatnonzero(one).tolist())
            for layer, one in kept.items()
            if not one.all() and layer not in gone
        }

    def layers_gone(self, channels: KeptChannels) -> set[str]:
        """The layers that leave with branches, if sums keep only these channels."""
        gone = [name for name in self.branches if name in channels and not len(channels[name])]
        return {layer for name in gone for layer in self.branches[name]}

    def units_left(self, channels: KeptChannels) -> dict[str, tuple[int, ...]]:
        """Layer -> the unit of each channel that it keeps, -1 for one that always stays."""
        return {
            layer: tuple(units[index] for index in channels.get(layer, range(len(units))))
            for layer, units in self.layer_units.items()
        }

    def costs_of_mask(self, mask: BoolArray) -> dict[str, int | None]:
        """Costs with only these units kept, as `CostModel` returns them."""
        return self.group_costs(self._units_per_group(mask))

    def original_costs(self) -> dict[str, int | None]:
        """Costs with all units kept."""
        return self.group_costs(list(self.group_sizes.values()))

    def keep_most_important(self, mask: BoolArray, layer: str, num: int) -> BoolArray:
        """`mask` with `num` channels of a layer kept: those that would leave last.

        Raises:
            ValueError: if whole units do not add up to this number, or have no scores.
        """
        units = np.array(self.layer_units[layer])
        num_channels = dict(
            zip(
                *(column.tolist() for column in np.unique(units[units >= 0], return_counts=True)), strict=True
            )
        )
        ranked = [unit for unit in self.removal_order if unit in num_channels]
        if len(ranked) < len(num_channels):
            raise ValueError(
                f"The plan does not know which channels of layer '{layer}' matter most: they had no "
                f"scores. Expected indices instead of a number. Received: channels={num!r}"
            )
        group_of = self._group_of_units()
        num_left = collections.Counter(int(group_of[unit]) for unit in ranked)
        width, possible_widths, removed = units.size, [units.size], []
        for unit in ranked:
            if width <= num:
                break
            if num_left[group_of[unit]] > 1:
                num_left[group_of[unit]] -= 1
                width -= num_channels[unit]
                removed.append(unit)
                possible_widths.append(width)
        if num < width == units.size:
            raise ValueError(
                f"None of the {units.size} channels of layer '{layer}' can leave. "
                f"`print(keras_taylor.analyze(model))` says why. Received: channels={num!r}"
            )
        if width != num:
            nearest = " or ".join(map(str, sorted(possible_widths[-2:])))
            raise ValueError(
                f"Layer '{layer}' of {units.size} channels cannot keep {num}: its channels leave in whole "
                f"units, and one unit of each group stays. Expected {nearest}, for example. "
                f"Received: channels={num!r}"
            )
        mask = mask.copy()
        mask[list(num_channels)] = True
        mask[removed] = False
        return mask

    def keep_channels(self, mask: BoolArray, layer: str, channels: Sequence[int]) -> BoolArray:
        """`mask` with exactly these channels of a layer kept.

        Raises:
            ValueError: if a channel is missing that cannot leave, or that leaves only with kept ones.
        """
        units = np.array(self.layer_units[layer])
        asked = np.zeros(units.size, bool)
        asked[list(channels)] = True
        required = (units < 0) | np.isin(units, units[asked])
        if not np.array_equal(required, asked):
            raise ValueError(
                f"Channel {int(np.flatnonzero(required & ~asked)[0])} of layer '{layer}' cannot leave, or "
                f"leaves only together with a channel that is kept. Expected it among the channels. "
                f"Received: channels={channels!r}"
            )
        mask = mask.copy()
        mask[units[units >= 0]] = False
        mask[units[asked & (units >= 0)]] = True
        return mask

    def keep_ties(self, mask: BoolArray, layer: str) -> BoolArray:
        """`mask` with what is tied to the groups of a layer: as many steps of it leave.

        Raises:
            ValueError: if the groups of the layer lose no whole steps, or the others have no scores.
        """
        numbers, group_of = {name: k for k, name in enumerate(self.group_sizes)}, self._group_of_units()
        units = np.array(self.layer_units[layer])
        own = {int(number) for number in np.unique(group_of[units[units >= 0]])}
        mask = mask.copy()
        for tie in self.ties:
            leading = next((name for name in tie if numbers[name] in own), None)
            if leading is None:
                continue
            lost = int((~mask[group_of == numbers[leading]]).sum())
            num_steps, rest = divmod(lost, tie[leading])
            if rest:
                raise ValueError(
                    f"The units of '{leading}' leave {tie[leading]} at a time, together with those of "
                    f"{', '.join(repr(name) for name in tie if name != leading)}. Expected channels that "
                    f"make whole steps. Received: layer={layer!r}, of which {lost} units would leave"
                )
            for name, num in tie.items():
                if numbers[name] not in own:
                    mask[group_of == numbers[name]] = True
                    mask[self._least_important(numbers[name], num_steps * num)] = False
        return mask

    def _least_important(self, group: int, num: int) -> list[int]:
        """So many units of a group, those that leave first."""
        group_of = self._group_of_units()
        ranked = [unit for unit in self.removal_order if group_of[unit] == group]
        name, size = list(self.group_sizes.items())[group]
        if num >= size and name not in self.branches:
            raise ValueError(
                f"The {size} units of '{name}' leave with as many others, and one has to stay. Expected more "
                f"channels that are kept. Received: channels without which {num} of these would leave"
            )
        if len(ranked) < num:
            raise ValueError(
                f"The plan does not know which units of '{name}' matter most: they had no scores. Expected a "
                f"plan with scores for them, since they are tied to others. Received: {num} units to leave"
            )
        return ranked[:num]

    def find_empty_group(self, mask: BoolArray) -> str | None:
        """The name of a group of channels that keeps no unit; `None` if there is none."""
        counts = self._units_per_group(mask)
        empty = (name for name, num in zip(self.group_sizes, counts, strict=True) if not num)
        return next((name for name in empty if name not in self.branches), None)

    def followed_by(self, later: "PlanStructure", channels: KeptChannels) -> "PlanStructure":
        """This structure, its order continued by that of a later plan.

        Args:
            later: The structure of the model in which layers keep only `channels`.
            channels: The channels that this plan keeps.
        """
        own_unit: dict[int, int] = {}
        for layer, later_units in later.layer_units.items():
            units = self.layer_units[layer]
            own_unit.update(
                zip(later_units, (units[i] for i in channels.get(layer, range(len(units)))), strict=True)
            )
        mask = self.mask_of_channels(channels)
        first = [unit for unit in self.removal_order if not mask[unit]]
        then = [own_unit[unit] for unit in later.removal_order]
        known = {*first, *then}
        last = [unit for unit in self.removal_order if unit not in known]
        return dataclasses.replace(self, removal_order=(*first, *then, *last))

    def describe_difference(self, widths: Mapping[str, int]) -> str | None:
        """The first difference to the layers of a model, as text; `None` if they are the same.

        Args:
            widths: Layer -> number of channels that it makes, in the order of the network.
        """
        own = [(layer, len(units)) for layer, units in self.layer_units.items()]
        for number, (expected, found) in enumerate(itertools.zip_longest(own, widths.items()), 1):
            if expected != found:
                there, here = (
                    "no layer" if one is None else f"'{one[0]}' with {one[1]} channels"
                    for one in (found, expected)
                )
                return (
                    f"Expected as layer {number} of those that make channels: {here}; the model has: {there}"
                )
        return None

    def _group_of_units(self) -> IntArray:
        """The number of the group of each unit `(num_units,)`."""
        return np.repeat(np.arange(len(self.group_sizes)), list(self.group_sizes.values()))

    def _units_per_group(self, mask: BoolArray) -> IntArray:
        """How many units each group keeps `(num_groups,)`."""
        return np.bincount(self._group_of_units()[mask], minlength=len(self.group_sizes))

    def to_dict(self) -> dict[str, Any]:
        """The structure as dicts, tuples and numbers, which JSON can hold."""
        return {
            "groups": dict(self.group_sizes),
            "layers": dict(self.layer_units),
            "order": self.removal_order,
            "costs": self.group_costs.to_dict(),
            "branches": dict(self.branches),
            "ties": [dict(tie) for tie in self.ties],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PlanStructure":
        """The structure that `to_dict` returned, also after a way through JSON."""
        return cls(
            {name: int(num) for name, num in content["groups"].items()},
            {name: tuple(map(int, units)) for name, units in content["layers"].items()},
            tuple(map(int, content["order"])),
            GroupCosts.from_dict(content["costs"]),
            {name: tuple(layers) for name, layers in content.get("branches", {}).items()},
            tuple(dict(tie) for tie in content.get("ties", ())),
        )
