"""Searches for the largest model whose measured costs keep to a goal."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import keras
import numpy as np

from keras_taylor.budget.costs import CostFunction, known_cost
from keras_taylor.budget.measured_costs import format_amount, measured_cost_of
from keras_taylor.budget.measuring import Measurements
from keras_taylor.cutting.surgery import build_smaller
from keras_taylor.exports.artifacts import ExportError
from keras_taylor.plans.ranking import RemovalOrder, RemovalRequest, units_to_keep
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.support.types import BoolArray, Costs

MAX_TRIES = 8
# Part of a ceiling that predictions aim at. Times vary, so they aim lower.
_AIMED_PART = {"bytes": 1.0, "latency": 0.97}
# From this part of a ceiling on, no larger model is looked for.
_SUFFICIENT_PART = {"bytes": 0.99, "latency": 0.93}

# A function from costs to an order of removals.
OrderFunction: TypeAlias = Callable[[CostFunction], RemovalOrder]


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
    missed = [
        f"{format_amount(key, found[key])} were measured, "
        f"at most {format_amount(key, round(ceilings[key]))} asked"
        for key in keys
        if found[key] > ceilings[key]
    ]
    return ValueError(
        f"No widths were found that keep to the goal, in {MAX_TRIES} tries, each built and measured. The "
        f"last time {'; '.join(missed)}. Lower the goal, or leave the machine to this process where times "
        f"are measured. Received: goal={goal!r}"
    )
