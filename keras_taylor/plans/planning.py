"""Makes plans for a model and its scores, and finds the units that a plan keeps."""

from collections.abc import Mapping

import keras
import numpy as np

from keras_taylor.budget.costs import CostModel
from keras_taylor.budget.goals import parse_goal
from keras_taylor.plans.limits import Limits
from keras_taylor.plans.plan import LayerPlan, Plan
from keras_taylor.plans.ranking import RemovalRequest, choose_kept, flatten_scores
from keras_taylor.plans.selection import Selection, refuse_old_arguments
from keras_taylor.plans.structure import PlanStructure
from keras_taylor.reading.groups import label_model
from keras_taylor.scores.criteria import warn_without_criterion
from keras_taylor.support.types import FloatArray, LayerPatterns


def make_plan(
    model: keras.Model,
    scores: Mapping[str, FloatArray],
    goal: float | Mapping[str, float | int] = 0.3,
    *,
    selection: Selection | None = None,
    include: LayerPatterns | None = None,
    exclude: LayerPatterns = (),
    exact: bool = True,
    **old_arguments: object,
) -> Plan:
    """Selects the units whose loss matters least for what they save, until a goal is met.

    Args:
        model: The model that was scored. It is not changed.
        scores: The scores that `score` returned: group name -> array `(num_units,)`. Groups without scores
            lose nothing. A plain dict does not say which criterion made it: `rank="score"` applies then,
            with a warning unless the selection names a rank.
        goal: Fraction of the parameters to remove, a float above 0 and below 1; frozen ones and BatchNorm
            statistics count (`model.count_params()`). Or a dict of one or more of "params", "flops" (of
            one example's forward pass, 2 per multiply-add) and "activation_memory" (bytes, see
            `keras_taylor.budget.costs.CostModel`), which must all hold: a float is the fraction to
            remove, an int is how much may be left (`{"params": 200_000, "flops": 0.5}`).
        selection: A `keras_taylor.Selection`: how the units that leave are selected, and what every layer
            keeps. `None` (the default) means `Selection()`.
        include: Layer names, regular expressions that match whole names, or layers: only the channels
            that these make may leave. `None` (the default): all. As in `score`.
        exclude: The same: none of the channels that these make leave. As in `score`.
        exact: Whether channels that are normalized together stay (see `analyze`), `True` by default. As
            in `score`; the plan remembers it.
        **old_arguments: Refused: arguments of earlier versions, which are part of `selection` now.

    Returns:
        A `Plan` that reaches the goal. It removes at most one unit (or one rounding step) more than
        needed, unless `ratios` ask for more.

    Raises:
        ValueError: for a value that is no goal, and for a goal that cannot be reached; the message says how
            much can.
        TypeError: for other keyword arguments.

    Example:

    >>> scores = keras_taylor.score(model, (x, y))
    >>> plan = keras_taylor.make_plan(model, scores, 0.3)
    >>> plan = keras_taylor.make_plan(model, scores, {"params": 0.3, "flops": 0.4})
    >>> selection = keras_taylor.Selection(rank="score", min_channels=2)
    >>> plan = keras_taylor.make_plan(model, scores, 0.3, selection=selection)
    >>> small = keras_taylor.prune(model, plan)
    """
    refuse_old_arguments("make_plan", old_arguments)
    wanted = parse_goal(goal)
    selection = selection or Selection()
    if selection.rank is None and selection.scope == "global":
        warn_without_criterion(scores)
    selection = selection.for_criterion(getattr(scores, "criterion", None))
    labeled = label_model(model, include, exclude, exact)
    costs = CostModel(labeled)
    wanted.check_countable(costs())
    unit_scores = flatten_scores(labeled, scores)
    limits = Limits.from_selection(selection, labeled)
    request = RemovalRequest(wanted.ceilings(costs()), goal, limits, selection)
    return plan_of(labeled, costs, choose_kept(labeled, costs, unit_scores, request), unit_scores)


def plan_of(labeled, costs, kept, flat=None):
    """The `Plan` of a mask of kept units.

    Args:
        channels: `groups.LabeledModel`.
        costs: Its `CostModel`.
        kept: Bool array `(num_units,)`.
        flat: The scores that led to it, `(num_units,)`, infinite where there are none; `None`: none.
    """
    structure = structure_of(labeled, costs, flat)
    layers = {n: LayerPlan(len(structure.layers[n]), k) for n, k in structure.kept(kept).items()}
    return Plan(layers, costs(), costs(kept), labeled.exact, structure)


def structure_of(labeled, costs, flat=None):
    """What a plan must know of a model; arguments as in `plan_of`."""
    layers = {}
    for start, stop, name in labeled.label_space.producers:
        layers.setdefault(name, tuple(labeled.units_of(np.arange(start, stop)).tolist()))
    flat = np.full(labeled.num_units, np.inf) if flat is None else flat
    ranked = np.argsort(flat, kind="stable")[: np.isfinite(flat).sum()]
    groups = {group.name: group.num_units for group in labeled.groups}
    return PlanStructure(groups, layers, tuple(ranked.tolist()), costs.group_costs)


def kept_units(labeled, plan):
    """The mask of kept units that a plan asks of a model.

    Raises:
        ValueError: if the plan does not belong to this model; the first difference is named.
    """
    kept = np.ones(labeled.num_units, bool)
    producers = {}
    for start, stop, name in labeled.label_space.producers:
        producers.setdefault(name, []).append(np.arange(start, stop))
    _check_structure(labeled, plan, producers)
    for name, layer in plan.layers.items():
        if name not in producers or producers[name][0].size != layer.width:
            width = producers[name][0].size if name in producers else "no such layer"
            raise ValueError(
                f"The plan was made for another model. Expected at layer '{name}': {layer.width} "
                f"channels; the model has: {width}. Received: plan.layers[{name!r}]"
            )
        _check_indices(name, layer)
        gone = np.ones(layer.width, bool)
        gone[list(layer.kept)] = False
        units = labeled.units_of(producers[name][0])[gone]
        if (units < 0).any():
            raise ValueError(
                f"The plan removes channels of layer '{name}' that cannot leave. "
                f"Received: plan.layers[{name!r}], channel {int(np.flatnonzero(gone)[units < 0][0])}"
            )
        kept[units] = False
    _check_agreement(labeled, plan, producers, kept)
    return kept


def _check_structure(labeled, plan, producers):
    """Refuses a model whose layers are others than those that the plan was made for."""
    if plan.structure is None:
        return
    difference = plan.structure.difference({name: ranges[0].size for name, ranges in producers.items()})
    if difference is None:
        expected, found = plan.structure.whole_cost()["params"], CostModel(labeled)()["params"]
        if expected == found:
            return
        difference = f"Expected {expected:,} parameters in layers of these widths; the model has: {found:,}"
    raise ValueError(f"The plan was made for another model. {difference}. Received: plan={_short(plan)}")


def _short(plan):
    return f"<Plan of {len(plan.layers)} layers>"


def _check_indices(name, layer):
    outside = [index for index in layer.kept if not 0 <= index < layer.width]
    if outside:
        raise ValueError(
            f"The plan keeps a channel that layer '{name}' does not have. Expected indices from 0 to "
            f"{layer.width - 1}. Received: plan.layers[{name!r}] with kept index {outside[0]}"
        )


def _check_agreement(labeled, plan, producers, kept):
    for name, ranges in producers.items():
        mask = labeled.kept_mask(ranges[0], kept)
        planned = plan.layers.get(name)
        stays = np.flatnonzero(mask)
        wanted = np.arange(mask.size) if planned is None else np.unique(planned.kept)
        if not np.array_equal(stays, wanted):
            other = sorted(set(wanted.tolist()) ^ set(stays.tolist()))[0]
            raise ValueError(
                f"The plan is not consistent: channel {other} of layer '{name}' lives and dies with "
                "channels of other layers, and the plan treats them differently. "
                f"Received: plan.layers[{name!r}]"
            )
        if not mask.any():
            raise ValueError(f"The plan leaves no channel to layer '{name}'. Received: plan.layers[{name!r}]")
