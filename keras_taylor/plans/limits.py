"""How many units each group must lose, and may lose, whatever the scores are."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import keras
import numpy as np

from keras_taylor.budget.measured_costs import measured_cost_of
from keras_taylor.plans.selection import AUTO, Selection, check_num_channels, ratio_range
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
    """

    round_to: int = 1
    min_channels: int = 1
    ratios: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_num_channels("round_to", self.round_to)
        check_num_channels("min_channels", self.min_channels)

    @classmethod
    def from_selection(cls, selection: Selection, labeled: LabeledModel) -> "Limits":
        """The limits that a selection sets for a model.

        Raises:
            ValueError: for `round_to="auto"`, ratios that the model does not allow.
        """
        ratios = ratio_limits(labeled, selection.ratios)
        return cls(selection.round_to, selection.min_channels, ratios)  # type: ignore[arg-type]  # checks itself

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
            most.append(max(min(last - gone, group.num_units - min(self.min_channels, group.num_units)), 0))
            least.append(min(max(int(progress * first) - gone, 0), most[-1]))
        return RemovalBounds(np.array(least, np.int64), np.array(most, np.int64))


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


def _whole_numbers(low: float, high: float, num: int) -> tuple[int, int]:
    """The least and the largest number of `num` units; the nearest one if there is none between."""
    least, most = int(np.ceil(low * num - 1e-9)), int(np.floor(high * num + 1e-9))
    if least > most:
        least = most = int(np.floor((low + high) / 2 * num + 0.5))
    return least, most
