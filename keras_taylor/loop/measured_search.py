"""How many units go until what is measured holds, too."""

import contextlib
import dataclasses

import keras
import numpy as np

from keras_taylor.budget.measured_costs import format_amount, measured_cost_of
from keras_taylor.cutting.surgery import build_smaller
from keras_taylor.exports.artifacts import ExportError
from keras_taylor.plans.ranking import units_to_keep

TRIES = 8
_AIM = {"bytes": 1.0, "latency": 0.97}  # part of what may be left that is aimed at: times vary
_NEAR = {"bytes": 0.99, "latency": 0.93}  # from here on up no larger model is looked for


def fitting_units(labeled, removal_order_for, request, measurements, build):
    """The largest mask of kept units that is found whose model, built and measured, keeps to all ceilings.

    Widths are chosen by predictions, the model is built and measured, the predictions learn from
    it, and so on until what was measured holds and little more would.

    Args:
        labeled: `groups.LabeledModel`.
        removal_order_for: A function of costs (called like a `CostModel`) to a `ranking.RemovalOrder`.
        request: The `ranking.RemovalRequest`; its ceilings are of counted costs and of measured ones.
        measurements: `measuring.Measurements`.
        build: A function of a mask of kept units to the model that keeps them.

    Returns:
        The mask, a bool array `(num_units,)`, and what was measured of its model: key -> int.

    Raises:
        ValueError: if there is none, or none was found; it names `goal`, and what was reached.
    """
    costs, ceilings = measurements.costs(labeled), request.ceilings
    spare = dict.fromkeys(ceilings, 1.0)
    tried, best = [], None
    for _ in range(TRIES):
        removal_order = removal_order_for(costs)
        aims = _aims(ceilings, spare, costs(removal_order.smallest_mask()))
        kept = units_to_keep(labeled, costs, removal_order, dataclasses.replace(request, ceilings=aims))
        if any(np.array_equal(kept, other) for other in tried):
            break  # nothing larger is left to try
        tried.append(kept)
        found = measurements.observe(labeled, kept, build(kept))
        for key in measurements.keys:  # what came out too large once might come out too large again
            spare[key] = spare[key] * ceilings[key] / found[key] if found[key] > ceilings[key] else 1.0
        if all(found[key] <= ceilings[key] for key in measurements.keys):
            if best is None or kept.sum() > best[0].sum():
                best = kept, found
            if any(found[key] >= _part(_NEAR, key) * ceilings[key] for key in measurements.keys):
                break
    if best is None:
        raise _not_found(measurements.keys, found, ceilings, request.goal)
    return best


def check_reachable(labeled, removal_order_for, request, measurements, build):
    """Refuses a goal that no widths keep to: the smallest model is built and measured.

    Args:
        labeled, removal_order_for, request, measurements, build: As in `fitting_units`.

    Raises:
        ValueError: if it is out of reach; it names `goal`, and how much can go.
    """
    costs = measurements.costs(labeled)
    removal_order = removal_order_for(costs)
    least = removal_order.smallest_mask()
    if not least.all():
        with contextlib.suppress(ExportError):  # a runtime may not take layers that are that narrow
            measurements.observe(labeled, least, build(least))
    units_to_keep(labeled, costs, removal_order, request)


def draft(labeled, kept):
    """A model that keeps some units, to be measured only.

    Its weights are a little off, so that no two are equal: converters write equal ones, as biases
    that are zero until they are repaired or trained, into a file once.
    """
    small, _ = build_smaller(labeled, kept)
    random = np.random.default_rng(0)
    for weight in small.weights:
        if keras.backend.is_float_dtype(weight.dtype):
            value = keras.ops.convert_to_numpy(keras.ops.cast(weight, "float32"))
            weight.assign(value + 1e-3 * random.uniform(0.5, 1.5, value.shape))
    return small


def _aims(ceilings, spare, least):
    """What predictions have to keep to: less than what may be left, but no less than can be reached."""
    return {
        what: min(ceiling, max(ceiling * _part(_AIM, what) * spare[what], least[what]))
        for what, ceiling in ceilings.items()
    }


def _part(parts, what):
    quantity = measured_cost_of(what)
    return 1.0 if quantity is None else parts[quantity.kind]


def _not_found(keys, found, ceilings, goal):
    missed = [
        f"{format_amount(key, found[key])} were measured, "
        f"at most {format_amount(key, round(ceilings[key]))} asked"
        for key in keys
        if found[key] > ceilings[key]
    ]
    return ValueError(
        f"No widths were found that keep to the goal, in {TRIES} tries, each built and measured. The last "
        f"time {'; '.join(missed)}. Lower the goal, or leave the machine to this process where times are "
        f"measured. Received: goal={goal!r}"
    )
