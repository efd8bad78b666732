"""The way to the goals: what each round leaves, and which units stay. Measured goals are searched for."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import keras
import numpy as np

from keras_taylor.budget.costs import CostFunction, CostModel, known_cost
from keras_taylor.budget.goals import Goal, GoalLike, parse_goals
from keras_taylor.budget.measured_costs import format_amount, measured_cost_of
from keras_taylor.budget.measuring import Measurements
from keras_taylor.budget.schedule import Increment, RoundTarget, schedule_rounds
from keras_taylor.cutting.surgery import build_smaller
from keras_taylor.exports.artifacts import ExportError
from keras_taylor.plans.limits import Limits, check_round_to
from keras_taylor.plans.ranking import (
    RemovalOrder,
    RemovalRequest,
    choose_kept,
    order_removals,
    units_to_keep,
)
from keras_taylor.plans.selection import AUTO, Selection
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.scores.criteria import Criterion
from keras_taylor.support.types import BoolArray, Costs, FloatArray

MAX_TRIES = 8
_MEASURED_AGAIN = 2  # times, before a goal is said to be missed
# Part of a ceiling that predictions aim at. Times vary, so they aim lower.
_AIMED_PART = {"bytes": 1.0, "latency": 0.97}
# From this part of a ceiling on, no larger model is looked for.
_SUFFICIENT_PART = {"bytes": 0.99, "latency": 0.93}

# A function from costs to an order of removals.
OrderFunction: TypeAlias = Callable[[CostFunction], RemovalOrder]


@dataclasses.dataclass(frozen=True, eq=False)
class CheckedGoals:
    """The goals of a run, and what every group must lose or keep, checked for one model.

    Attributes:
        labeled: The original model.
        stops: The goals, each asking for more than the one before.
        given_goal: The goal as the user wrote it.
        increment: As in `schedule_rounds`.
        selection: As in `compress`.
        limits: The part of the selection that holds for every group. While a `round_to` of "auto" is not
            measured, it counts as 1.
    """

    labeled: LabeledModel
    stops: Sequence[Goal]
    given_goal: object
    increment: Increment | None
    selection: Selection
    limits: Limits

    @property
    def measured(self) -> tuple[str, ...]:
        """The costs of the goals that are measured."""
        return self.last.measured

    @property
    def last(self) -> Goal:
        """The goal where the run ends."""
        return self.stops[-1]

    def smallest_mask(self, costs: CostFunction) -> BoolArray:
        """Returns the units that stay if all units leave that may."""
        return self.removals(costs).smallest_mask()

    def removals(self, costs: CostFunction) -> RemovalOrder:
        """Returns an order of all removals that the limits allow, for the number of units in it only."""
        return RemovalOrder(self.labeled, costs, np.zeros(self.labeled.num_units), self.limits)


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """The rounds that lead to the goals.

    Attributes:
        goals: The goals. Their selection has a `rank` once the criterion is known.
        before: Costs of the original, counted and measured.
        smallest: Costs with all units gone that may leave, predicted if they are measured.
        rounds: What each round has to reach; empty if the original meets the goals.
        measurements: Measures and predicts costs; `None`: all costs of the goals are counted.
    """

    goals: CheckedGoals
    before: Costs
    smallest: Costs
    rounds: Sequence[RoundTarget]
    measurements: Measurements | None = None

    @property
    def num_rounds(self) -> int:
        """How many rounds lead to the last goal."""
        return len(self.rounds)

    @property
    def trainings_for_each_round(self) -> float:
        """How many trainings there are for each round, where only goals are trained for."""
        return sum(target.trainings for target in self.rounds) / max(self.num_rounds, 1)

    def for_criterion(self, criterion: Criterion) -> "Route":
        """Returns the same route with the `rank` that suits scores by a criterion."""
        selection = self.goals.selection.for_criterion(criterion)
        return dataclasses.replace(self, goals=dataclasses.replace(self.goals, selection=selection))

    def costs(self, labeled: LabeledModel) -> CostFunction:
        """Returns the costs of a model at any widths, counted and predicted."""
        return self.measurements.costs(labeled) if self.measurements else CostModel(labeled)

    def request(self, target: RoundTarget) -> RemovalRequest:
        """Returns what the removal of a round has to reach."""
        return RemovalRequest(
            target.ceilings,
            self.goals.given_goal,
            self.goals.limits,
            self.goals.selection,
            original_widths={group.name: group.num_units for group in self.goals.labeled.groups},
            progress=target.progress,
        )

    def choose_units(self, labeled: LabeledModel, unit_scores: FloatArray, target: RoundTarget) -> BoolArray:
        """Returns the mask of units `(num_units,)` that stay after a round.

        A round that reaches a goal also keeps to the measured costs: its model is built and measured.

        Args:
            labeled: The model before the round.
            unit_scores: Float64 `(num_units,)`, infinite for units that never leave.
            target: What the round has to reach.

        Raises:
            ValueError: If the goal is out of reach.
        """
        request = self.request(target)
        if self.measurements is None or target.goal_index is None:
            return choose_kept(labeled, self.costs(labeled), unit_scores, request)
        return search_measured(
            labeled,
            lambda costs: order_removals(labeled, costs, unit_scores, request),
            request,
            self.measurements,
        )[0]


def measure_reached(
    model: keras.Model, target: RoundTarget, measurements: Measurements
) -> tuple[dict[str, int], list[str]]:
    """Measures the model of a round that reaches a goal, and compares it with the goal.

    Times that are too long are measured again, since something else may have kept the machine busy.

    Returns:
        The measured costs, and by how much each of them misses the goal, in words.
    """
    found = measurements.measure(model)
    for _ in range(_MEASURED_AGAIN):
        if not any(found[key] > target.ceilings[key] for key in measurements.keys):
            break
        again = measurements.measure(model)
        found = {key: min(amount, again[key]) for key, amount in found.items()}
    return found, _describe_excess(measurements.keys, found, target.ceilings)


def check_goals(
    labeled: LabeledModel,
    goal: GoalLike | Sequence[GoalLike] | None,
    increment: Increment | None,
    selection: Selection,
    has_limit: bool,
) -> CheckedGoals:
    """Returns the goals of a run, checked.

    Args:
        labeled: The original model.
        goal, selection: As in `compress`.
        increment: As in `schedule_rounds`.
        has_limit: Whether a metric can end the run. Without it there must be a goal.

    Raises:
        ValueError: For goals or ratios that cannot hold, and goals whose cost is unknown.
    """
    counted = dataclasses.replace(selection, round_to=1) if selection.round_to == AUTO else selection
    limits = Limits.from_selection(counted, labeled)
    costs = CostModel(labeled)
    smallest = RemovalOrder(labeled, costs, np.zeros(labeled.num_units), limits).smallest_mask()
    goals = parse_goals(goal, measurable=True, smallest=costs(smallest) if has_limit else None)
    for one in goals:
        one.check_countable(costs())
    check_round_to(selection.round_to, goals[-1].measured)
    return CheckedGoals(labeled, goals, goal, increment, selection, limits)


def plan_route(goals: CheckedGoals, measurements: Measurements | None = None) -> Route:
    """Returns the route to the goals.

    Args:
        goals: The goals.
        measurements: Measurements of the original; `None`: all costs of the goals are counted.

    Raises:
        ValueError: If a goal is out of reach; for an increment that is not one.
    """
    labeled, limits = goals.labeled, goals.limits
    before: Costs = CostModel(labeled)()
    if measurements is not None:
        before = {**before, **measurements.before}
        if goals.selection.round_to == AUTO:
            limits = dataclasses.replace(limits, round_to=measurements.best_multiple())
    goals = dataclasses.replace(goals, limits=limits)
    if measurements is not None:
        request = RemovalRequest(goals.last.ceilings(before), goals.given_goal, limits)
        check_reachable(labeled, goals.removals, request, measurements)
    route = _follow(goals, before, measurements)
    last = RoundTarget(goals.last.ceilings(before), goal_index=len(goals.stops) - 1)
    choose_kept(labeled, route.costs(labeled), np.zeros(labeled.num_units), route.request(last))
    return route


def resume_route(route: Route, before: Costs, round_to: int) -> Route:
    """Returns the route of a run that goes on, with the costs and the rounding that it was begun with.

    Times are never the same again, so that a new measurement would lead to other rounds.
    """
    limits = dataclasses.replace(route.goals.limits, round_to=round_to)
    return _follow(dataclasses.replace(route.goals, limits=limits), before, route.measurements)


def _follow(goals: CheckedGoals, before: Costs, measurements: Measurements | None) -> Route:
    """The route from given costs of the original."""
    labeled = goals.labeled
    rounds = schedule_rounds(goals.stops, before, goals.increment)
    if not rounds and goals.limits.bounds(labeled).least.any():  # ratios ask for more than the goals
        rounds = [RoundTarget(goals.last.ceilings(before), goal_index=len(goals.stops) - 1)]
    costs = measurements.costs(labeled) if measurements else CostModel(labeled)
    smallest = costs(goals.smallest_mask(CostModel(labeled)))
    return Route(goals, before, smallest, rounds, measurements)


def search_measured(
    labeled: LabeledModel,
    orders: OrderFunction,
    request: RemovalRequest,
    measurements: Measurements,
    build: Callable[[BoolArray], keras.Model] | None = None,
) -> tuple[BoolArray, dict[str, int]]:
    """Returns the largest mask of kept units that was found whose model keeps to all ceilings.

    Predictions choose the widths, the model is built and measured, and the predictions learn from the
    measurement. This repeats until the model keeps to the ceilings and is hardly smaller than it must be.

    Args:
        labeled: The model to cut.
        orders: A function from costs to an order of removals.
        request: What has to be reached; its ceilings are of counted and of measured costs.
        measurements: Measures models, and predicts costs.
        build: A function from a mask of kept units to the model to measure; `None`: `build_candidate`.

    Returns:
        The mask, `(num_units,)`, and the measured costs of its model.

    Raises:
        ValueError: If no such mask was found; the message says what was reached.
    """
    build = build or (lambda kept: build_candidate(labeled, kept))
    costs, ceilings = measurements.costs(labeled), request.ceilings
    correction = dict.fromkeys(ceilings, 1.0)
    tried: list[BoolArray] = []
    found: dict[str, int] = {}
    best: tuple[BoolArray, dict[str, int]] | None = None
    for _ in range(MAX_TRIES):
        order = orders(costs)
        aims = _aim_below(ceilings, correction, costs(order.smallest_mask()))
        kept = units_to_keep(labeled, costs, order, dataclasses.replace(request, ceilings=aims))
        if any(np.array_equal(kept, other) for other in tried):
            break  # nothing larger is left to try
        tried.append(kept)
        found = measurements.observe(labeled, kept, build(kept))
        for key in measurements.keys:  # a model that came out too large once may do so again
            is_too_large = found[key] > ceilings[key]
            correction[key] = correction[key] * ceilings[key] / found[key] if is_too_large else 1.0
        if all(found[key] <= ceilings[key] for key in measurements.keys):
            if best is None or kept.sum() > best[0].sum():
                best = kept, found
            if any(
                found[key] >= _part_of(_SUFFICIENT_PART, key) * ceilings[key] for key in measurements.keys
            ):
                break
    if best is None:
        raise _search_failure(measurements.keys, found, ceilings, request.goal)
    return best


def check_reachable(
    labeled: LabeledModel,
    orders: OrderFunction,
    request: RemovalRequest,
    measurements: Measurements,
    build: Callable[[BoolArray], keras.Model] | None = None,
) -> None:
    """Refuses a goal that no widths keep to: the smallest model is built and measured.

    Args:
        labeled, orders, request, measurements, build: As in `search_measured`.

    Raises:
        ValueError: If the goal is out of reach; the message says how much can leave.
    """
    build = build or (lambda kept: build_candidate(labeled, kept))
    costs = measurements.costs(labeled)
    order = orders(costs)
    smallest = order.smallest_mask()
    if not smallest.all():
        with contextlib.suppress(ExportError):  # a runtime may refuse layers that are so narrow
            measurements.observe(labeled, smallest, build(smallest))
    units_to_keep(labeled, costs, order, request)


def build_candidate(labeled: LabeledModel, kept: BoolArray) -> keras.Model:
    """Returns a model that keeps some units, to be measured only.

    Its weights are a little off, so that no two are equal. Converters write equal weights into a file
    once, and biases that are zero would be equal until they are repaired or trained.
    """
    small, _ = build_smaller(labeled, kept)
    random = np.random.default_rng(0)
    for weight in small.weights:
        if keras.backend.is_float_dtype(weight.dtype):
            value = keras.ops.convert_to_numpy(keras.ops.cast(weight, "float32"))
            weight.assign(value + 1e-3 * random.uniform(0.5, 1.5, value.shape))
    return small


def _aim_below(
    ceilings: Mapping[str, float], correction: Mapping[str, float], smallest: Costs
) -> dict[str, float]:
    """Returns the ceilings of predictions: lower than what may be left, but not below what is possible."""
    aims = {cost: ceiling * _part_of(_AIMED_PART, cost) for cost, ceiling in ceilings.items()}
    return {
        cost: min(ceiling, max(aims[cost] * correction[cost], known_cost(smallest, cost)))
        for cost, ceiling in ceilings.items()
    }


def _part_of(parts: Mapping[str, float], cost: str) -> float:
    measured = measured_cost_of(cost)
    return 1.0 if measured is None else parts[measured.kind]


def _search_failure(
    keys: Sequence[str], found: Mapping[str, int], ceilings: Mapping[str, float], goal: object
) -> ValueError:
    missed = _describe_excess(keys, found, ceilings)
    return ValueError(
        f"No widths were found that keep to the goal, in {MAX_TRIES} tries, each built and measured. The "
        f"last time {'; '.join(missed)}. Lower the goal, or leave the machine to this process where times "
        f"are measured. Received: goal={goal!r}"
    )


def _describe_excess(
    keys: Sequence[str], found: Mapping[str, int], ceilings: Mapping[str, float]
) -> list[str]:
    """For each measured cost that is too high a text that says by how much."""
    return [
        f"{format_amount(key, found[key])} were measured, at most "
        f"{format_amount(key, round(ceilings[key]))} asked ({found[key] / ceilings[key] - 1:.1%} more)"
        for key in keys
        if found[key] > ceilings[key]
    ]
