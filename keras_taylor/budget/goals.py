"""What a goal asks for: how much of which costs may be left."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from keras_taylor.budget.costs import COSTS, check_countable
from keras_taylor.budget.measured_costs import (
    describe_measured_costs,
    measured_cost_of,
    parse_amount,
    refuse_measured,
)


@dataclasses.dataclass(frozen=True)
class Goal:
    """One or more costs that must come down; all parts must hold.

    Attributes:
        parts: Cost -> a float, the fraction to remove, or an int, what may be left at most (of
            latencies in nanoseconds).
    """

    parts: Mapping[str, float | int]

    @property
    def measured(self):
        """The parts that are measured (`measured_costs.MeasuredCost`), not counted: a tuple of keys."""
        return tuple(what for what in self.parts if measured_cost_of(what) is not None)

    def check(self, before):
        """Refuses parts whose cost is unknown: `before` are the costs of the whole model."""
        for what in self.parts:
            if what not in self.measured:
                check_countable(before, what, f"goal={dict(self.parts)!r}")

    def fractions(self, before):
        """The fraction of each cost to remove, 0 where it is met already: a dict of floats."""
        return {
            what: value if isinstance(value, float) else max(1 - value / before[what], 0.0)
            for what, value in self.parts.items()
        }

    def ceilings(self, before):
        """What may be left of each cost; `before` are the costs of the whole model.

        Returns:
            A dict: cost -> float.
        """
        return {
            what: before[what] * (1 - value) if isinstance(value, float) else float(min(value, before[what]))
            for what, value in self.parts.items()
        }

    def is_met(self, costs, before):
        """Whether these costs keep to the goal."""
        return all(costs[what] <= ceiling for what, ceiling in self.ceilings(before).items())

    def missed(self, plan):
        """By how much a `Plan` misses parts of the goal: a list of texts, empty if it keeps to all."""
        before, after = plan.before, plan.after
        fractions = self.fractions(before)
        return [
            f"{1 - after[what] / before[what]:.1%} of {what} removed, not {fractions[what]:.1%}"
            for what, ceiling in self.ceilings(before).items()
            if after[what] > ceiling
        ]


def parse_goal(goal, measurable=False):
    """A `Goal` out of what users write.

    Args:
        goal: A float above 0 and below 1, the fraction of the parameters to remove; or a dict of one
            or more costs, each with such a fraction, or with an int: what may be left. What is
            measured ("bytes", "latency:onnx", see `measured_costs.measured_cost_of`) may come with a unit:
            "256 KiB", "2.5 ms"; without one, latencies are in milliseconds.
        measurable: Whether measured costs are taken.

    Raises:
        ValueError: for anything else.
    """
    several = isinstance(goal, Mapping)
    parts = dict(goal) if several else {"params": goal}
    if not parts or not all(_is_sound(what, value, several) for what, value in parts.items()):
        raise ValueError(
            "`goal` says how much to remove. Expected a number above 0 and below 1 (0.3 removes 30 % of the "
            f"parameters), or a dict of one or more of {', '.join(map(repr, COSTS))}, each with such a "
            'fraction to remove, or with a whole number that may be left, as {"params": 200_000}. '
            f"{_of_measured(parts)}Received: goal={goal!r}"
        )
    if not measurable:
        refuse_measured(parts, f"goal={goal!r}")
    return Goal({what: _parsed(what, value) for what, value in parts.items()})


def _is_sound(what, value, several):
    if measured_cost_of(what) is not None:
        return True  # `parse_amount` says what is wrong with the value
    return what in COSTS and (_is_fraction(value) or (several and _is_ceiling(value)))


def _of_measured(parts):
    asked = any(isinstance(what, str) and what.startswith(("bytes", "latency")) for what in parts)
    return f"`keras_taylor.compress` also takes {describe_measured_costs()}. " if asked else ""


def _parsed(what, value):
    if _is_fraction(value):
        return float(value)
    return int(value) if measured_cost_of(what) is None else parse_amount(what, value)


def _is_fraction(value):
    return isinstance(value, (float, np.floating)) and 0 < value < 1


def _is_ceiling(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0


def parse_goals(goal, measurable=False, furthest=None):
    """A list of `Goal`s: one, or those of a list that users write.

    Args:
        goal: As in `parse_goal`, a list of such, or `None`: as far as it goes.
        measurable: As in `parse_goal`.
        furthest: The costs of the smallest model, where `None` is a goal.

    Raises:
        ValueError: for a goal that is none, for goals about different costs.
    """
    if goal is None and furthest is not None:
        return [Goal({"params": furthest["params"]})]
    if not isinstance(goal, (list, tuple)):
        return [parse_goal(goal, measurable)]
    goals = [parse_goal(one, measurable) for one in goal]
    if not goals or any(set(one.parts) != set(goals[0].parts) for one in goals):
        raise ValueError(
            "Several goals are stops on one way down. Expected one or more, about the same costs. "
            f"Received: goal={goal!r}"
        )
    return goals


def goal_of_texts(texts):
    """What users write on a command line: "0.3", or parts like "params=200000" and "flops=0.5".

    Args:
        texts: A list of such, all about other costs. Values with commas between them ("0.2,0.4,0.6")
            are several goals, as many in each part.

    Returns:
        What `parse_goals` takes.

    Raises:
        ValueError: for a text that is no goal, parts about one cost, parts of unlike numbers of goals.
    """
    parts = [text.rpartition("=") for text in texts]
    if len({what or "params" for what, _, _ in parts}) < len(parts):
        raise ValueError(f"Each part of a goal is about another cost. Received: {' '.join(texts)}")
    values = {
        what or "params": [_value(what, value, text) for value in listed.split(",")]
        for (what, _, listed), text in zip(parts, texts, strict=True)
    }
    if len({len(listed) for listed in values.values()}) > 1:
        raise ValueError(
            f"Every part of several goals has a value for each of them. Received: {' '.join(texts)}"
        )
    goals = [dict(zip(values, stop, strict=True)) for stop in zip(*values.values(), strict=True)]
    return goals if goals[1:] else goals[0]


def _value(what, value, text):
    """A number, or an amount with its unit where it is measured."""
    if value.isdecimal():
        if not what:
            raise ValueError(
                "A whole number is what may be left of a cost. Expected its name before it, as in "
                f"params=200000, or a fraction of the parameters to remove, as in 0.3. Received: {text}"
            )
        return int(value)
    try:
        return float(value)
    except ValueError as error:
        if measured_cost_of(what) is not None:
            return value
        raise ValueError(
            "A goal is the fraction to remove, as in 0.3 or flops=0.5, or what may be left, as in "
            f"params=200000. Received: {text}"
        ) from error
