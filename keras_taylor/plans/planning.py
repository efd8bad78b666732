"""Plans from scores (`make_plan`), plans from masks of kept units, and masks from plans."""

from collections.abc import Collection, Mapping

import keras
import numpy as np

from keras_taylor.budget.costs import CostFunction, CostModel
from keras_taylor.budget.goals import parse_goal
from keras_taylor.plans.limits import Limits
from keras_taylor.plans.plan import LayerPlan, Plan, layer_plans
from keras_taylor.plans.ranking import RemovalRequest, choose_kept, flatten_scores
from keras_taylor.plans.selection import MOVED_TO_SELECTION, Selection, parse_selection
from keras_taylor.plans.structure import PlanStructure
from keras_taylor.plans.ties import UNTIED, Ties
from keras_taylor.reading.groups import LabeledModel, label_model
from keras_taylor.scores.criteria import warn_without_criterion
from keras_taylor.support.arguments import refuse_moved_arguments
from keras_taylor.support.types import BoolArray, FloatArray, IntArray, LayerPatterns


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
            one example's forward pass, 2 per multiply-add) and "activation_memory" (bytes: the most that
            the tensors of such a pass take at once, with four bytes a number), which must all hold: a float
            is the fraction to remove, an int is how much may be left (`{"params": 200_000, "flops": 0.5}`).
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
        TypeError: for a `selection` that is not a `Selection`, and for other keyword arguments.

    Example:

    >>> scores = keras_taylor.score(model, (x, y))
    >>> plan = keras_taylor.make_plan(model, scores, 0.3)
    >>> plan = keras_taylor.make_plan(model, scores, {"params": 0.3, "flops": 0.4})
    >>> selection = keras_taylor.Selection(rank="score", min_channels=2)
    >>> plan = keras_taylor.make_plan(model, scores, 0.3, selection=selection)
    >>> small = keras_taylor.prune(model, plan)
    """
    refuse_moved_arguments("make_plan", old_arguments, MOVED_TO_SELECTION)
    wanted = parse_goal(goal)
    selection = parse_selection(selection)
    if selection.rank is None and selection.scope == "global":
        warn_without_criterion(scores)
    selection = selection.for_criterion(getattr(scores, "criterion", None))
    labeled = label_model(model, include, exclude, exact, with_branches=selection.branches)
    costs = CostModel(labeled)
    wanted.check_countable(costs())
    unit_scores = flatten_scores(labeled, scores)
    limits = Limits.from_selection(selection, labeled)
    request = RemovalRequest(wanted.ceilings(costs()), goal, limits, selection)
    kept = choose_kept(labeled, costs, unit_scores, request)
    return plan_of(labeled, costs, kept, unit_scores, limits.ties)


def plan_of(
    labeled: LabeledModel,
    costs: CostFunction,
    kept: BoolArray,
    unit_scores: FloatArray | None = None,
    ties: Ties = UNTIED,
) -> Plan:
    """The `Plan` of a mask of kept units.

    Args:
        labeled: The model.
        costs: Its costs.
        kept: Which units are kept, `(num_units,)`.
        unit_scores: The scores that led to the mask, `(num_units,)`, infinite for units without a score;
            `None`: no unit has a score.
        ties: The ties that it was made with.
    """
    structure = _structure_for(labeled, costs, unit_scores, ties)
    layers, exact, branches = layer_plans(structure, kept), labeled.exact, labeled.with_branches
    return Plan(layers, costs(), costs(kept), exact, structure, branches)


def _structure_for(
    labeled: LabeledModel, costs: CostFunction, unit_scores: FloatArray | None, ties: Ties
) -> PlanStructure:
    layer_units: dict[str, tuple[int, ...]] = {}
    for start, stop, name in labeled.label_space.producers:
        layer_units.setdefault(name, tuple(labeled.units_of(np.arange(start, stop)).tolist()))
    scores = np.full(labeled.num_units, np.inf) if unit_scores is None else unit_scores
    ranked = np.argsort(scores, kind="stable")[: np.isfinite(scores).sum()]
    group_sizes = {group.name: group.num_units for group in labeled.groups}
    makers = labeled.makers_in_branches
    branches = {g.name: tuple(makers.get(g.name, ())) for g in labeled.groups if g.is_branch}
    # ties may be those of an original, some of whose groups left with a branch
    known = tuple({name: num for name, num in tie.units.items() if name in group_sizes} for tie in ties.ties)
    return PlanStructure(group_sizes, layer_units, tuple(ranked.tolist()), costs.group_costs, branches, known)


def label_as_planned(model: keras.Model, plan: Plan) -> LabeledModel:
    """Reads a model with the units that a plan may remove."""
    return label_model(model, exact=plan.exact, with_branches=plan.branches)


def kept_units(labeled: LabeledModel, plan: Plan) -> BoolArray:
    """The mask of kept units `(num_units,)` that a plan asks of a model that was read as planned.

    Raises:
        ValueError: if the plan does not belong to this model; the message names the first difference.
    """
    kept = np.ones(labeled.num_units, bool)
    labels_of: dict[str, IntArray] = {}  # of the channels of each layer
    for start, stop, name in labeled.label_space.producers:
        labels_of.setdefault(name, np.arange(start, stop))
    widths = {name: labels.size for name, labels in labels_of.items()}
    _check_same_model(labeled, plan, widths)
    for name, layer in plan.layers.items():
        if widths.get(name) != layer.width:
            raise ValueError(
                f"The plan was made for another model. Expected at layer '{name}': {layer.width} "
                f"channels; the model has: {widths.get(name, 'no such layer')}. "
                f"Received: plan.layers[{name!r}]"
            )
        _check_kept_indices(name, layer)
        removed = np.ones(layer.width, bool)
        removed[list(layer.kept)] = False
        units = labeled.units_of(labels_of[name])[removed]
        if (units < 0).any():
            raise ValueError(
                f"The plan removes channels of layer '{name}' that cannot leave. "
                f"Received: plan.layers[{name!r}], channel {int(np.flatnonzero(removed)[units < 0][0])}"
            )
        kept[units] = False
    masks = {name: labeled.kept_mask(labels, kept) for name, labels in labels_of.items()}
    branches = {group.name: bool(kept[group.start]) for group in labeled.groups if group.is_branch}
    gone = {
        maker
        for name, is_kept in branches.items()
        if not is_kept
        for maker in labeled.makers_in_branches.get(name, ())
    }
    _check_consistent(plan, {name: mask for name, mask in masks.items() if name not in gone}, branches)
    return kept


def _check_same_model(labeled: LabeledModel, plan: Plan, widths: Mapping[str, int]) -> None:
    """Refuses a model whose layers or parameters differ from those that the plan was made for."""
    if plan.structure is None:
        return
    difference = plan.structure.describe_difference(widths)
    if difference is None:
        expected, found = plan.structure.original_costs()["params"], CostModel(labeled)()["params"]
        if expected == found:
            return
        difference = f"Expected {expected:,} parameters in layers of these widths; the model has: {found:,}"
    received = f"plan=<Plan of {len(plan.layers)} layers>"
    raise ValueError(f"The plan was made for another model. {difference}. Received: {received}")


def _check_kept_indices(name: str, layer: LayerPlan) -> None:
    outside = [index for index in layer.kept if not 0 <= index < layer.width]
    if outside:
        raise ValueError(
            f"The plan keeps a channel that layer '{name}' does not have. Expected indices from 0 to "
            f"{layer.width - 1}. Received: plan.layers[{name!r}] with kept index {outside[0]}"
        )


def _check_consistent(plan: Plan, masks: Mapping[str, BoolArray], branches: Collection[str]) -> None:
    """Refuses a plan that separates channels which leave together, or empties a layer.

    Args:
        plan: The plan.
        masks: Layer -> which of its channels stay, `(width,)`, after the units left that the plan removes.
        branches: Names of sums, whose only unit is a residual branch.
    """
    for name, mask in masks.items():
        layer = plan.layers.get(name)
        stays = np.flatnonzero(mask)
        planned = np.arange(mask.size) if layer is None else np.unique(layer.kept)
        if not np.array_equal(stays, planned):
            first = min(set(planned.tolist()) ^ set(stays.tolist()))
            raise ValueError(
                f"The plan is not consistent: channel {first} of layer '{name}' leaves only together with "
                "channels of other layers, and the plan treats them differently. "
                f"Received: plan.layers[{name!r}]"
            )
        if not mask.any() and name not in branches:
            raise ValueError(f"The plan keeps no channel of layer '{name}'. Received: plan.layers[{name!r}]")
