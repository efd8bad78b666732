"""How much must be gone after each round."""

import dataclasses
import itertools
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Step:
    """What a round leads to.

    Attributes:
        ceilings: What may be left of each cost after it.
        stop: Number of the goal that it completes, from 0 on; `None` on the way.
        share: How much of the way to the last goal is gone after it, from 0 to 1.
    """

    ceilings: Mapping[str, float]
    stop: int | None = None
    share: float = 1.0


def steps(goals, before, increment):
    """The rounds that lead to one goal after the other.

    Args:
        goals: `goals.Goal`s with the same parts, each asking for more than the one before.
        before: Costs of the whole model.
        increment: As in `fractions`, of the cost of which most must go.

    Returns:
        A list of `Step`s, empty for a goal that is met already.

    Raises:
        ValueError: for an increment that is none, for goals that do not rise.
    """
    wanted = [goal.fractions(before) for goal in goals]
    lead = max(wanted[-1], key=wanted[-1].get)
    stops = [fraction[lead] for fraction in wanted]
    for first, then in itertools.pairwise(wanted):
        if then[lead] <= first[lead] or any(then[what] < first[what] for what in then):
            raise ValueError(
                "Several goals are stops on one way down. Expected each to ask for more than the one before "
                f"it. Received: goal={[dict(goal.parts) for goal in goals]!r}"
            )
    if not stops[-1]:
        fractions(0.5, increment)  # refuses what is none
        return []
    on_the_way = [
        point
        for point in fractions(stops[-1], increment)
        if not any(math.isclose(point, stop, abs_tol=1e-9) for stop in stops)
    ]
    bounds = list(itertools.pairwise([(0.0, before), *zip(stops, goals, strict=True)]))
    return [_step(point, stops, bounds, before) for point in sorted([*on_the_way, *filter(None, stops)])]


def _step(point, stops, bounds, before):
    """The step at a fraction gone of the leading cost, straight between the goals around it."""
    if point in stops:
        number = stops.index(point)
        return Step(bounds[number][1][1].ceilings(before), number, point / stops[-1])
    (start, since), (stop, goal) = next(pair for pair in bounds if point < pair[1][0])
    part, ends = (point - start) / (stop - start), goal.ceilings(before)
    starts = since if since is before else since.ceilings(before)
    ceilings = {what: starts[what] + part * (end - starts[what]) for what, end in ends.items()}
    return Step(ceilings, share=point / stops[-1])


def fractions(goal, increment):
    """Fractions of the original to be gone after each round, the last one the goal.

    Args:
        goal: Fraction to remove in the end, above 0 and below 1.
        increment: Fraction of the original removed a round; or a schedule, a function
            from the round's number (from 1 on) to the fraction gone after it, which
            ends the run when it reaches the goal.

    Returns:
        A list of floats, rising to `goal`.

    Raises:
        ValueError: for an increment that is no such number, a schedule that does not rise.

    Example:

    >>> fractions(0.3, 0.125)
    [0.125, 0.25, 0.3]
    """
    if callable(increment):
        return _from_schedule(goal, increment)
    number = isinstance(increment, (int, float)) and not isinstance(increment, bool)
    if not number or not 0 < increment <= 1:
        raise ValueError(
            "`increment` is the fraction of the original removed a round. Expected a number above 0 "
            f"and at most 1, or a function of the round's number. Received: increment={increment!r}"
        )
    num_rounds = math.ceil(goal / increment - 1e-9)
    return [increment * number for number in range(1, num_rounds)] + [goal]


def removed_at(schedule, goal):
    """The fraction to be gone as a function of time, for pruning while training.

    With t the part of the time that is over, from 0 to 1:

    | schedule | fraction gone | |
    |---|---|---|
    | "linear" | goal t | |
    | "cubic" | goal (1 - (1 - t)^3) | Zhu and Gupta 2017 (arXiv 1710.01878), eq. 1 |
    | "exponential" | 1 - (1 - goal)^t | the same share of what is left each time |
    | a function | goal schedule(t) | |

    Args:
        schedule: One of these.
        goal: Fraction to be gone at time 1.

    Returns:
        A function from a float to a float, which is `goal` at 1.

    Raises:
        ValueError: for anything else.
    """
    named = {
        "linear": lambda t: goal * t,
        "cubic": lambda t: goal * (1 - (1 - t) ** 3),
        "exponential": lambda t: 1 - (1 - goal) ** t,
    }
    if not callable(schedule) and schedule not in named:
        raise ValueError(
            f"Unknown schedule. Expected one of {', '.join(named)}, or a function from the part of the "
            f"time to the part of the goal. Received: schedule={schedule!r}"
        )
    function = named[schedule] if not callable(schedule) else lambda t: goal * float(schedule(t))
    return lambda t: goal if t > 1 - 1e-9 else min(goal, function(t))


def _from_schedule(goal, schedule):
    steps = [0.0]
    while steps[-1] < goal:
        step = float(schedule(len(steps)))
        if not step > steps[-1]:
            raise ValueError(
                f"The schedule does not rise at round {len(steps)}: {steps[-1]} is followed by {step}. "
                "Expected a function from the round's number to the fraction gone after it. "
                f"Received: increment={schedule!r}"
            )
        steps.append(min(step, goal))
    return steps[1:]
