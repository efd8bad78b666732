"""How much is gone after each round, and at each time of a training."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from keras_taylor.budget.costs import known_cost
from keras_taylor.budget.goals import Goal
from keras_taylor.support.types import Costs

# The fraction of the original that a round removes, or a function from the number of a round (from 1 on)
# to the fraction that is gone after it.
Increment: TypeAlias = float | Callable[[int], float]
# Where nothing else is said, a round that is trained removes as much; and one that is not, at most as much.
TRAINED_INCREMENT, UNTRAINED_INCREMENT = 0.05, 0.25


@dataclasses.dataclass(frozen=True)
class RoundTarget:
    """What a round of `compress` has to reach.

    Attributes:
        ceilings: Cost -> how much of it may be left after the round.
        goal_index: Number of the goal that the round reaches, from 0 on; `None` between two goals.
        progress: How much of the way to the last goal is behind after the round, from 0 to 1.
        trainings: How many trainings it takes where only goals are trained for: those of all rounds since the
            goal before.
    """

    ceilings: Mapping[str, float]
    goal_index: int | None = None
    progress: float = 1.0
    trainings: int = 1


class _Waypoint(NamedTuple):
    """The start, or a goal: the fraction of the leading cost that is gone there, and what may be left."""

    fraction: float
    ceilings: Mapping[str, float]


def schedule_rounds(
    goals: Sequence[Goal], original: Costs, increment: Increment | None = None
) -> list[RoundTarget]:
    """The targets of the rounds that lead to one goal after the other.

    The last goal removes a larger fraction of the leading cost than of any other. The leading cost falls
    by one increment in each round; the others fall in proportion between two goals.

    Args:
        goals: Goals about the same costs, each asking for more than the one before.
        original: Costs of the original model.
        increment: The fraction of the leading cost that a round removes, as in `removed_fractions`. `None`:
            rounds of equal size that remove `UNTRAINED_INCREMENT` at most. A goal takes as many trainings as
            if they were smaller, with the increment of rounds that are trained.

    Returns:
        One target for each round; no target if the original meets the last goal already.

    Raises:
        ValueError: for a value that is no increment, and for goals that do not ask for more and more.
    """
    fractions = [goal.fractions_to_remove(original) for goal in goals]
    lead = max(fractions[-1], key=lambda cost: fractions[-1][cost])
    for first, then in itertools.pairwise(fractions):
        if then[lead] <= first[lead] or any(then[cost] < first[cost] for cost in then):
            raise ValueError(
                "Several goals are reached one after the other. Expected each to ask for more than the one "
                f"before it. Received: goal={[dict(goal.targets) for goal in goals]!r}"
            )
    start = _Waypoint(0.0, {cost: float(known_cost(original, cost)) for cost in goals[0].targets})
    stops = [
        _Waypoint(one[lead], goal.ceilings(original)) for one, goal in zip(fractions, goals, strict=True)
    ]
    furthest = stops[-1].fraction
    of_trained = TRAINED_INCREMENT if increment is None else increment
    if not furthest:
        removed_fractions(0.5, of_trained)  # refuses a value that is no increment
        return []
    equal = furthest / math.ceil(furthest / UNTRAINED_INCREMENT - 1e-9)
    steps = _fractions_between(stops, equal if increment is None else increment)
    trained = _fractions_between(stops, of_trained)
    at_goals = [stop.fraction for stop in stops if stop.fraction]
    trainings = {
        then: 1 + sum(first < fraction < then for fraction in trained)
        for first, then in itertools.pairwise([0.0, *at_goals])
    }
    return [
        _target_at(fraction, [start, *stops], trainings.get(fraction, 0))
        for fraction in sorted([*steps, *at_goals])
    ]


def _fractions_between(stops: Sequence[_Waypoint], increment: Increment) -> list[float]:
    """What `removed_fractions` returns for the last stop, without fractions that are stops themselves."""
    return [
        fraction
        for fraction in removed_fractions(stops[-1].fraction, increment)
        if not any(math.isclose(fraction, stop.fraction, abs_tol=1e-9) for stop in stops)
    ]


def _target_at(fraction: float, waypoints: Sequence[_Waypoint], trainings: int) -> RoundTarget:
    """The target at a fraction of the leading cost; between two waypoints the ceilings are interpolated."""
    progress = fraction / waypoints[-1].fraction
    for index, goal in enumerate(waypoints[1:]):
        if goal.fraction == fraction:
            return RoundTarget(goal.ceilings, index, progress, trainings)
    last, following = next(pair for pair in itertools.pairwise(waypoints) if fraction < pair[1].fraction)
    part = (fraction - last.fraction) / (following.fraction - last.fraction)
    ceilings = {
        cost: last.ceilings[cost] + part * (ceiling - last.ceilings[cost])
        for cost, ceiling in following.ceilings.items()
    }
    return RoundTarget(ceilings, None, progress, trainings)


def removed_fractions(goal: float, increment: Increment) -> list[float]:
    """Fractions of the original that are gone after each round; the last one is the goal.

    Args:
        goal: Fraction to remove in the end, above 0 and below 1.
        increment: Fraction of the original that a round removes, above 0 and at most 1. Or a function from
            the number of a round (from 1 on) to the fraction that is gone after it; the rounds end when it
            reaches the goal.

    Returns:
        A list of floats, rising to `goal`.

    Raises:
        ValueError: for a value that is no increment, and for a function that does not rise.

    Example:

    >>> removed_fractions(0.3, 0.125)
    [0.125, 0.25, 0.3]
    """
    if callable(increment):
        return _follow_schedule(goal, increment)
    is_number = isinstance(increment, (int, float)) and not isinstance(increment, bool)
    if not is_number or not 0 < increment <= 1:
        raise ValueError(
            "`increment` is the fraction of the original that a round removes. Expected a number above 0 "
            f"and at most 1, or a function of the round's number. Received: increment={increment!r}"
        )
    num_rounds = math.ceil(goal / increment - 1e-9)
    return [increment * number for number in range(1, num_rounds)] + [goal]


def _follow_schedule(goal: float, schedule: Callable[[int], float]) -> list[float]:
    """What `removed_fractions` returns for a function."""
    fractions = [0.0]
    while fractions[-1] < goal:
        fraction = float(schedule(len(fractions)))
        if not fraction > fractions[-1]:
            raise ValueError(
                f"The schedule does not rise at round {len(fractions)}: {fractions[-1]} is followed by "
                f"{fraction}. Expected a function from the round's number to the fraction gone after it. "
                f"Received: increment={schedule!r}"
            )
        fractions.append(min(fraction, goal))
    return fractions[1:]


def removal_schedule(schedule: str | Callable[[float], float], goal: float) -> Callable[[float], float]:
    """The fraction that is gone as a function of time, for pruning while training.

    With t the part of the time that is over, from 0 to 1:

    | schedule | fraction gone | |
    |---|---|---|
    | "linear" | goal t | |
    | "cubic" | goal (1 - (1 - t)^3) | Zhu and Gupta 2017 (arXiv 1710.01878), eq. 1 |
    | "exponential" | 1 - (1 - goal)^t | each time the same share of what is left |
    | a function | goal schedule(t) | |

    Args:
        schedule: One of these.
        goal: Fraction that is gone at time 1.

    Returns:
        A function from a float to a float. It is `goal` at time 1, and never more.

    Raises:
        ValueError: for anything else.

    Example:

    >>> removal_schedule("linear", 0.3)(0.5)
    0.15
    """
    named: dict[str, Callable[[float], float]] = {
        "linear": lambda t: goal * t,
        "cubic": lambda t: goal * (1 - (1 - t) ** 3),
        "exponential": lambda t: 1 - (1 - goal) ** t,
    }
    if callable(schedule):
        own = schedule
        function: Callable[[float], float] = lambda t: goal * float(own(t))  # noqa: E731
    elif schedule in named:
        function = named[schedule]
    else:
        raise ValueError(
            f"Unknown schedule. Expected one of {', '.join(named)}, or a function from the part of the "
            f"time to the part of the goal. Received: schedule={schedule!r}"
        )
    return lambda t: goal if t > 1 - 1e-9 else min(goal, function(t))
