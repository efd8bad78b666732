"""Makes plans for a model and its scores, and finds the units that a plan keeps."""

import numpy as np

from keras_taylor.budget.costs import CostModel
from keras_taylor.budget.goals import parse_goal
from keras_taylor.plans.limits import Limits, ratio_limits
from keras_taylor.plans.plan import LayerPlan, Plan
from keras_taylor.plans.ranking import choose_kept, flat_scores
from keras_taylor.plans.structure import PlanStructure
from keras_taylor.reading.groups import label_model, mask_of
from keras_taylor.scores.criteria import rank_for


def make_plan(
    model,
    scores,
    goal=0.3,
    *,
    ratios=None,
    scope="global",
    rank=None,
    balance=0.5,
    round_to=1,
    min_channels=1,
    include=None,
    exclude=(),
    exact=True,
):
    """Chooses the units whose loss costs least for what they save, until the goal is met.

    Args:
        model: The model that was scored. It is not changed.
        scores: What `score` returned: group name -> array `(num_units,)`. Groups
            that are missing lose nothing.
        goal: Fraction of the parameters to remove, frozen ones and BatchNorm
            statistics counted (`model.count_params()`); or a dict of one or more of "params",
            "flops" (one example's forward pass, a multiply-add counted as two) and
            "activation_memory" (bytes, see `costs.CostModel`), which must all hold: a float is
            the fraction to remove, an int what may be left (`{"params": 200_000, "flops": 0.5}`).
        ratios: What single layers lose: `{"conv3": 0.5, "block.*": (0.1, 0.4)}` removes half of the
            channels of one layer, and of each layer that a pattern matches a tenth at least
            and four tenths at most. Layer names, regular expressions that match whole names, or
            layers. Layers that go together lose what all of their ratios allow. `round_to` and
            `min_channels` come first. At least these channels go, also where the goal asks for less.
        scope: "global": the least important units of the whole network. "layer": the least important
            of each group, the same share of all groups.
        rank: "score": units with the lowest scores go first. "cost": those with the lowest scores
            for what they save of the goal's cost; of several costs each counts as much as it is hard to
            meet. `None`: "cost" for scores by criteria that say what the loss grows by (`taylor`,
            `log_odds` and their kin, `oracle`), "score" for all others, and for scores of your own.
        balance: Every group keeps at least this share of what `scope="layer"` would leave it, so that
            no layer collapses where much goes. It never puts a goal out of reach. 0: no such floor.
        round_to: Every group keeps a multiple of this many channels.
        min_channels: Every group keeps at least so many channels.
        include, exclude, exact: As in `score`. The plan remembers `exact`.

    Returns:
        A `Plan` that removes the goal, or at most one unit (or one rounding step) more, unless
        `ratios` ask for more.

    Raises:
        ValueError: for a goal that is none, or that cannot be reached; the message
            says how much can be.
    """
    wanted = parse_goal(goal)
    labeled = label_model(model, include, exclude, exact)
    costs = CostModel(labeled)
    wanted.check(costs())
    flat = flat_scores(labeled, scores)
    limits = Limits(round_to, min_channels, ratio_limits(labeled, ratios))
    rank = rank or rank_for(getattr(scores, "criterion", None))
    choice = {"scope": scope, "rank": rank, "balance": balance}
    kept = choose_kept(labeled, costs, flat, wanted.ceilings(costs()), goal, limits, **choice)
    return plan_of(labeled, costs, kept, flat)


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
    for start, stop, name in labeled.space.producers:
        layers.setdefault(name, tuple(labeled.units(np.arange(start, stop)).tolist()))
    flat = np.full(labeled.num_units, np.inf) if flat is None else flat
    ranked = np.argsort(flat, kind="stable")[: np.isfinite(flat).sum()]
    groups = {group.name: group.num_units for group in labeled.groups}
    return PlanStructure(groups, layers, tuple(ranked.tolist()), costs.by_groups)


def kept_units(labeled, plan):
    """The mask of kept units that a plan asks of a model.

    Raises:
        ValueError: if the plan does not belong to this model; the first difference is named.
    """
    kept = np.ones(labeled.num_units, bool)
    producers = {}
    for start, stop, name in labeled.space.producers:
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
        units = labeled.units(producers[name][0])[gone]
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
        mask = mask_of(labeled, ranges[0], kept)
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
