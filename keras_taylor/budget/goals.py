"""What a goal asks for: how much of which costs may be left."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from keras_taylor.budget.costs import COSTS, check_countable, known_cost
from keras_taylor.budget.measured_costs import (
    describe_measured_costs,
    measured_cost_of,
    parse_amount,
    refuse_measured,
)
from keras_taylor.support.types import Costs

# A goal as users write it: the fraction of the parameters to remove, or a dict from costs to fractions to
# remove (floats), amounts that may be left (ints), or amounts with a unit ("256 KiB").
GoalLike: TypeAlias = float | Mapping[str, float | int | str]


@dataclasses.dataclass(frozen=True)
class Goal:
    """One or more costs that must come down; all targets must be met.

    Attributes:
        targets: Cost -> a float, the fraction to remove, or an int, the amount that may be left at most:
            parameters, FLOPs (2 per multiply-add of one example), bytes, or nanoseconds of a latency.
    """

    targets: Mapping[str, float | int]

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of those costs that are measured (`measured_costs.MeasuredCost`), not counted."""
        return tuple(cost for cost in self.targets if measured_cost_of(cost) is not None)

    def check_countable(self, original: Costs) -> None:
        """Refuses targets whose cost is unknown; `original` are the costs of the original model."""
        for cost in self.targets:
            if cost not in self.measured:
                check_countable(original, cost, f"goal={dict(self.targets)!r}")

    def fractions_to_remove(self, original: Costs) -> dict[str, float]:
        """The fraction of each cost to remove, 0 if the original meets the target."""
        return {
            cost: target if isinstance(target, float) else max(1 - target / known_cost(original, cost), 0.0)
            for cost, target in self.targets.items()
        }

    def ceilings(self, original: Costs) -> dict[str, float]:
        """How much of each cost may be left; `original` are the costs of the original model."""
        ceilings = {}
        for cost, target in self.targets.items():
            amount = known_cost(original, cost)
            ceilings[cost] = (
                amount * (1 - target) if isinstance(target, float) else float(min(target, amount))
            )
        return ceilings

    def is_met(self, costs: Costs, original: Costs) -> bool:
        """Whether these costs meet all targets."""
        return all(known_cost(costs, cost) <= ceiling for cost, ceiling in self.ceilings(original).items())

    def describe_misses(self, costs: Costs, original: Costs) -> list[str]:
        """By how much these costs miss targets: one text for each target that is not met."""
        fractions = self.fractions_to_remove(original)
        return [
            f"{1 - known_cost(costs, cost) / known_cost(original, cost):.1%} of {cost} removed, "
            f"not {fractions[cost]:.1%}"
            for cost, ceiling in self.ceilings(original).items()
            if known_cost(costs, cost) > ceiling
        ]


def parse_goal(goal: GoalLike, measurable: bool = False) -> Goal:
    """The `Goal` that a user wrote.

    Args:
        goal: A float above 0 and below 1, the fraction of the parameters to remove. Or a dict of one
            or more costs, each with such a fraction, or with an int, the amount that may be left. Measured
            costs ("bytes", "latency:onnx", see `measured_costs.measured_cost_of`) may have amounts with a
            unit: "256 KiB", "2.5 ms"; without one, latencies are in milliseconds.
        measurable: Whether measured costs are accepted.

    Raises:
        ValueError: for anything else.
    """
    is_dict = isinstance(goal, Mapping)
    targets: dict[str, Any] = dict(goal) if isinstance(goal, Mapping) else {"params": goal}
    if not targets or not all(_is_target(cost, value, is_dict) for cost, value in targets.items()):
        raise ValueError(
            "`goal` says how much to remove. Expected a number above 0 and below 1 (0.3 removes 30 % of the "
            f"parameters), or a dict of one or more of {', '.join(map(repr, COSTS))}, each with such a "
            'fraction to remove, or with a whole number that may be left, as {"params": 200_000}. '
            f"`keras_taylor.compress` also takes {describe_measured_costs()}. Received: goal={goal!r}"
        )
    if not measurable:
        refuse_measured(targets, f"goal={goal!r}")
    return Goal({cost: _parse_target(cost, value) for cost, value in targets.items()})


def parse_goals(
    goal: GoalLike | Sequence[GoalLike] | None, measurable: bool = False, smallest: Costs | None = None
) -> list[Goal]:
    """The goals that a user wrote: one, or those of a list.

    Args:
        goal: As in `parse_goal`; a list of such; or `None`: as far as possible.
        measurable: As in `parse_goal`.
        smallest: The costs of the smallest model; `None`: `goal` may not be `None`.

    Raises:
        ValueError: for a value that is no goal, and for goals about different costs.
    """
    if goal is None and smallest is not None:
        return [Goal({"params": known_cost(smallest, "params")})]
    if not isinstance(goal, (list, tuple)):
        return [parse_goal(goal, measurable)]  # type: ignore[arg-type]  # it refuses anything else
    goals = [parse_goal(one, measurable) for one in goal]
    if not goals or any(set(one.targets) != set(goals[0].targets) for one in goals):
        raise ValueError(
            "Several goals are reached one after the other. Expected one or more, about the same costs. "
            f"Received: goal={goal!r}"
        )
    return goals


def goals_from_texts(texts: Sequence[str]) -> GoalLike | list[GoalLike] | None:
    """The goals of a command line: "0.3" or "30%", or targets like "params=200000" and "flops=0.5".

    Args:
        texts: Texts about different costs. Values with commas between them ("0.2,0.4,0.6") are several
            goals, the same number in each text. "none" alone: no goal.

    Returns:
        A value that `parse_goals` accepts, or `None`.

    Raises:
        ValueError: for a text that is no goal, two texts about the same cost, and texts with different
            numbers of goals.
    """
    if [text.lower() for text in texts] == ["none"]:
        return None
    parts = [text.rpartition("=") for text in texts]
    if len({cost or "params" for cost, _, _ in parts}) < len(parts):
        raise ValueError(f"Two parts of the goal are about the same cost. Received: {' '.join(texts)}")
    values = {
        cost or "params": [_parse_value(cost, value, text) for value in listed.split(",")]
        for (cost, _, listed), text in zip(parts, texts, strict=True)
    }
    if len({len(listed) for listed in values.values()}) > 1:
        raise ValueError(
            f"With several goals, each part has one value for each goal. Received: {' '.join(texts)}"
        )
    goals: list[GoalLike] = [
        dict(zip(values, stop, strict=True)) for stop in zip(*values.values(), strict=True)
    ]
    return goals if goals[1:] else goals[0]


def number_of_text(text: str) -> float:
    """The number of a text like "0.3" or "30%"."""
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def _parse_value(cost: str, value: str, text: str) -> float | int | str:
    """A number, or for a measured cost an amount with its unit."""
    if value.isdecimal():
        if not cost:
            raise ValueError(
                "A whole number is what may be left of a cost. Expected its name before it, as in "
                "params=200000, or the part of the parameters to remove, as in 0.3 or 30%. "
                f"Received: {text}"
            )
        return int(value)
    try:
        number = number_of_text(value)
    except ValueError as error:
        if measured_cost_of(cost) is not None:
            return value
        raise ValueError(
            "A goal is the part to remove, as in 0.3, 30% or flops=0.5, or what may be left, as in "
            f"params=200000. Received: {text}"
        ) from error
    if not 0 < number < 1 and measured_cost_of(cost) is None:
        raise ValueError(
            "The part to remove is above 0 and below 1, as in 0.3, or above 0% and below 100%. "
            f"Received: {text}"
        )
    return number


def _parse_target(cost: str, value: Any) -> float | int:
    if _is_fraction(value):
        return float(value)
    return int(value) if measured_cost_of(cost) is None else parse_amount(cost, value)


def _is_target(cost: object, value: object, is_dict: bool) -> bool:
    if isinstance(cost, str) and measured_cost_of(cost) is not None:
        return True  # `parse_amount` says what is wrong with the value
    return cost in COSTS and (_is_fraction(value) or (is_dict and _is_amount(value)))


def _is_fraction(value: object) -> bool:
    return isinstance(value, (float, np.floating)) and bool(0 < value < 1)


def _is_amount(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value > 0)
