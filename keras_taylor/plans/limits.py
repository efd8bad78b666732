"""How many units each group must lose, and may lose, whatever the scores are."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import keras
import numpy as np

from keras_taylor.budget.feasibility import RATIOS
from keras_taylor.budget.measured_costs import measured_cost_of
from keras_taylor.plans.selection import AUTO, Selection, check_num_channels, ratio_range
from keras_taylor.plans.ties import Ties, find_ties, tied_groups
from keras_taylor.reading.groups import LabeledModel, find_producers
from keras_taylor.support.types import IntArray


class RemovalBounds(NamedTuple):
    """How many units of each group leave, at least and at most: two int64 arrays `(num_groups,)`."""

    least: IntArray
    most: IntArray


@dataclasses.dataclass(frozen=True)
class Limits:
    """The part of a `Selection` that holds for every group, whatever the scores are.

    Attributes:
        round_to, min_channels: As in `Selection`, but a whole number.
        ratios: Group -> the least and the largest share of its original channels that leave, see
            `ratio_limits`.
        ties: Groups that are tied in number, and those that stay.
    """

    round_to: int = 1
    min_channels: int = 1
    ratios: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    ties: Ties = dataclasses.field(default_factory=Ties)

    def __post_init__(self) -> None:
        check_num_channels("round_to", self.round_to)
        check_num_channels("min_channels", self.min_channels)

    @classmethod
    def from_selection(cls, selection: Selection, labeled: LabeledModel) -> "Limits":
        """The limits that a selection sets for a model.

        Raises:
            ValueError: for `round_to="auto"`, ratios that the model or its ties do not allow.
        """
        ratios = ratio_limits(labeled, selection.ratios)
        ties = find_ties(labeled, selection.uniform)
        _check_tied_ratios(labeled, ties, ratios, selection)
        return cls(selection.round_to, selection.min_channels, ratios, ties)  # type: ignore[arg-type]  # checks itself

    def set_by_user(self) -> list[str]:
        """What may keep groups from leaving down to one unit, as texts."""
        numbers = {"round_to": self.round_to, "min_channels": self.min_channels}
        found = [f"`{name}={value}`" for name, value in numbers.items() if value > 1]
        return found + [RATIOS] * bool(self.ratios)

    def bounds(
        self, labeled: LabeledModel, original_widths: Mapping[str, int] | None = None, progress: float = 1.0
    ) -> RemovalBounds:
        """How many units of each group leave, at least and at most.

        Args:
            labeled: The model.
            original_widths: Group -> number of its units in the original, which the ratios are shares of;
                `None`: the model is the original.
            progress: How much of the way to the goal is behind after this removal, from 0 to 1. The same
                share of the least ratios holds.
        """
        least, most = [], []
        for group in labeled.groups:
            low, high = self.ratios.get(group.name, (0.0, 1.0))
            original = (original_widths or {}).get(group.name, group.num_units)
            first, last = _whole_numbers(low, high, original)
            gone = original - group.num_units
            floor = 0 if group.is_branch else self.min_channels
            most.append(max(min(last - gone, group.num_units - floor), 0))
            least.append(min(max(int(progress * first) - gone, 0), most[-1]))
        return self._tied_bounds(labeled, np.array(least, np.int64), np.array(most, np.int64))

    def _tied_bounds(self, labeled: LabeledModel, least: IntArray, most: IntArray) -> RemovalBounds:
        """Bounds in which tied groups lose the same number of steps, and groups that stay lose nothing."""
        for number, group in enumerate(labeled.groups):
            if group.name in self.ties.locked:
                least[number] = most[number] = 0
        for tied in tied_groups(labeled, self.ties):
            last = (most[tied.numbers] // tied.units).min()
            first = min((-(-least[tied.numbers] // tied.units)).max(), last)
            least[tied.numbers], most[tied.numbers] = first * tied.units, last * tied.units
        return RemovalBounds(least, most)


def check_round_to(round_to: int | str, measured: Iterable[str]) -> None:
    """Refuses "auto" if the goal asks for no latency: then no times are measured that could decide.

    Args:
        round_to: The value that the user passed.
        measured: The measured costs of the goal, as in `goals.Goal.measured`.

    Raises:
        ValueError: if it is "auto" and no latency is asked for.
    """
    kinds = [one.kind for one in map(measured_cost_of, measured) if one is not None]
    if round_to == AUTO and "latency" not in kinds:
        raise ValueError(
            "With `round_to='auto'` the measured times of layers decide which multiple of channels to keep. "
            "Expected a goal for a 'latency', or a whole number. Received: round_to='auto'"
        )


def ratio_limits(
    labeled: LabeledModel, ratios: Mapping[str | keras.Layer, float | tuple[float, float]] | None
) -> dict[str, tuple[float, float]]:
    """The shares of groups that leave, from the ratios that users write for layers.

    Args:
        labeled: The model.
        ratios: As in `Selection`.

    Returns:
        A dict: group -> the least and the largest share.

    Raises:
        ValueError: for a value that is no ratio, names that the model does not have, layers that must lose
            channels and cannot, and layers of one group that contradict each other.
    """
    limits: dict[str, tuple[float, float]] = {}
    origin: dict[str, str | keras.Layer] = {}
    names = [name for _, _, name in labeled.label_space.producers]
    for pattern, ratio in (ratios or {}).items():
        low, high = ratio_range(pattern, ratio)
        matched = {names[index] for index in find_producers([pattern], labeled.graph, names, "ratios")}
        hit = [group for group in labeled.groups if matched.intersection(group.producers)]
        if low > 0 and not hit:
            locked = [one for one in labeled.locked_groups if matched.intersection(one.producers)]
            reasons = "; ".join(f"{one.name}: {one.reason}" for one in locked[:3])
            raise ValueError(
                f"A ratio removes channels that cannot leave ({reasons or 'the layer makes none'}). "
                f"Expected layers with channels that can leave, or a ratio from 0 on. "
                f"Received: ratios={{{pattern!r}: {ratio!r}}}"
            )
        for group in hit:
            before = limits.get(group.name, (0.0, 1.0))
            limits[group.name] = max(before[0], low), min(before[1], high)
            if limits[group.name][0] > limits[group.name][1]:
                raise ValueError(
                    f"Ratios contradict each other for the channels of '{group.name}', which are made by "
                    f"{', '.join(group.producers)} and leave together: {before[0]:.4g} to {before[1]:.4g} by "
                    f"{origin[group.name]!r}. Expected ranges that overlap. "
                    f"Received: ratios={{{pattern!r}: {ratio!r}}}"
                )
            origin[group.name] = pattern
    return limits


def _check_tied_ratios(
    labeled: LabeledModel, ties: Ties, ratios: Mapping[str, tuple[float, float]], selection: Selection
) -> None:
    """Refuses ratios that contradict each other within a tie, or ask for channels that stay."""
    sizes = {group.name: group.num_units for group in labeled.groups}
    for tie in ties.ties:
        steps = {
            name: tuple(num / tie.units[name] for num in _whole_numbers(*ratios[name], sizes[name]))
            for name in tie.units
            if name in ratios
        }
        first = max(steps, key=lambda name: steps[name][0], default="")
        second = min(steps, key=lambda name: steps[name][1], default="")
        if steps and steps[first][0] > steps[second][1]:
            raise ValueError(
                f"`ratios` contradict `uniform`: '{first}' and '{second}' lose equally many units, but at "
                f"least {steps[first][0]:g} of the first and at most {steps[second][1]:g} of the second may "
                "leave. Expected ratios that overlap, or `uniform=False`. "
                f"Received: uniform={selection.uniform!r}, ratios={selection.ratios!r}"
            )
    for name, reason in ties.locked.items():
        if ratios.get(name, (0.0, 1.0))[0] > 0:
            raise ValueError(
                f"`ratios` contradict `uniform`: channels of '{name}' stay, since {reason}. Expected ratios "
                f"from 0 on, or `uniform=False`. "
                f"Received: uniform={selection.uniform!r}, ratios={selection.ratios!r}"
            )


def _whole_numbers(low: float, high: float, num: int) -> tuple[int, int]:
    """The least and the largest number of `num` units; the nearest one if there is none between."""
    least, most = int(np.ceil(low * num - 1e-9)), int(np.floor(high * num + 1e-9))
    if least > most:
        least = most = int(np.floor((low + high) / 2 * num + 0.5))
    return least, most
