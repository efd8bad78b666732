"""A model that scores and prunes its channels while it trains."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Self, TypeAlias

import keras
import numpy as np

from keras_taylor.budget.costs import CostModel
from keras_taylor.budget.goals import parse_goal
from keras_taylor.cutting.remade_tasks import as_task
from keras_taylor.cutting.surgery import build_smaller, build_smaller_compiled
from keras_taylor.loop.judging import BestEpochs
from keras_taylor.plans.limits import Limits
from keras_taylor.plans.plan import Plan
from keras_taylor.plans.planning import plan_of
from keras_taylor.plans.ranking import RemovalOrder, RemovalRequest, choose_kept, flatten_scores
from keras_taylor.plans.selection import MOVED_TO_SELECTION, Selection, parse_selection
from keras_taylor.reading.cloning import compile_settings
from keras_taylor.reading.groups import LabeledModel, as_name_patterns, label_model
from keras_taylor.reading.tracing import functional_view, overridden_training_method
from keras_taylor.scores import criteria
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.scores.gates import GATE_ROWS
from keras_taylor.scores.losses import averages_examples
from keras_taylor.scores.scoring import compute_scores
from keras_taylor.scores.statistics_optimizer import StatisticsOptimizer, add_batch
from keras_taylor.support.arguments import format_value, refuse_moved_arguments
from keras_taylor.support.optimizers import carry_exclusions, carry_state, fresh_optimizer
from keras_taylor.support.replicas import strategy_scope
from keras_taylor.support.types import BoolArray, FloatArray, LayerPatterns, Tensor

PruneGoal: TypeAlias = float | Mapping[str, float | int]

# Criteria that need a pass of their own over the data.
_NEED_OWN_PASS = (
    *("oracle", "sensitivity", "fisher", "log_odds", "log_odds_probed"),
    *criteria.ACTIVATION_CRITERIA,
)


@keras.saving.register_keras_serializable("keras_taylor")
class PrunableModel(GatedModel):
    """A copy of a model with gates that scores its channels while it trains.

    It computes what the model computes, and compiles, fits, saves and loads like any Keras model. Each
    backward pass adds the Taylor terms of its examples to the scores (Molchanov et al., *Importance
    Estimation for Neural Network Pruning*, CVPR 2019). `prune` closes the gates of the least important
    units; nothing is compiled again. `strip` returns the plain smaller model. To change the training,
    override `train_step` or `compute_loss` in a subclass.

    A unit that was pruned stays so, whatever restores weights (`set_weights`, `load_weights`, callbacks):
    weights of an earlier, larger mask are restored without the units that have left since, and a warning
    says so. Only an assignment to `mask` opens gates again.

    Args:
        model: A built Keras model. It is neither changed nor trained. If it is compiled, the wrapper is
            compiled alike, with a new optimizer that continues from the state of the model's own.
        criterion: What makes a channel important: a name or a function, see `keras_taylor.criteria`.
            Criteria that need a pass of their own are refused ("oracle", "sensitivity", "fisher",
            "log_odds", "log_odds_probed", "activation", "apoz").
        include: Layer names, regular expressions that match whole names, or layers: only the channels
            that these layers make may leave. `None` (the default): all.
        exclude: The same: the channels that these layers make stay. Empty by default.
        exact: As in `keras_taylor.analyze`, `True` by default. With `False`, normalizations take their
            means and variances over the open channels, so `strip` does not change the outputs here either.
        selection: A `keras_taylor.Selection`: how the units that leave are selected. A goal that is a
            number of units takes the units with the lowest scores, whatever they save. `None`:
            `Selection()`.
        loss_reduction: How the loss of a batch comes from the losses of its examples: "mean", "sum", or
            "auto" (the default), which asks the compiled losses and takes "mean" if there are none. The
            size of the scores depends on it.
        name: Name of the wrapper; `None`: "prunable_" and the name of the model.

    Raises:
        ValueError: if the model is not built or its class overrides `train_step` or a similar method; if
            the criterion cannot be gathered while training.
        TypeError: if an argument is not one of the above.
        UnsupportedModelError: if a layer of the model cannot be read, or made again.

    Example:

    >>> prunable = keras_taylor.PrunableModel(model)
    >>> history = prunable.fit(x, y, verbose=0)
    >>> num_pruned = prunable.prune(0.3)
    >>> history = prunable.fit(x, y, verbose=0)
    >>> small = prunable.strip()
    """

    _best_epochs: BestEpochs | None = None  # of the callbacks, while `fit` runs
    optimizer: Any  # a Keras optimizer, or `None`; the trainers of all backends assign it

    def __init__(
        self,
        model: keras.Model,
        *,
        criterion: criteria.Criterion = "taylor",
        include: LayerPatterns | None = None,
        exclude: LayerPatterns = (),
        exact: bool = True,
        selection: Selection | None = None,
        loss_reduction: str = "auto",
        name: str | None = None,
        **others: Any,
    ) -> None:
        refuse_moved_arguments("PrunableModel", others, MOVED_TO_SELECTION)
        _check_arguments(model, criterion, loss_reduction)
        selection = parse_selection(selection)
        with strategy_scope(model):
            model = functional_view(model)
            original = label_model(model)
            own, weights = build_smaller(original, np.ones(original.num_units, bool))
            include, exclude = as_name_patterns(model, include), as_name_patterns(model, exclude)
            selection = _by_layer_name(selection, model)
            labeled = label_model(own, include, exclude, exact, with_branches=selection.branches)
            super().__init__(labeled, frozen=False, name=name or f"prunable_{model.name}")
            self._arguments: dict[str, Any] = {
                "criterion": criterion,
                "include": include,
                "exclude": exclude,
                "exact": exact,
                "selection": _config_of(selection),
                "loss_reduction": loss_reduction,
            }
            self._pruning = _Pruning(labeled, selection.for_criterion(criterion))
            self.network.gates.averaged = loss_reduction != "sum"
            self.built = True
            settings = compile_settings(model)
            if settings is not None:
                self.compile(**settings)
                if self.optimizer is not None:
                    carry_exclusions(model.optimizer, self.optimizer, self.trainable_variables, weights)
                    carry_state(model.optimizer, self.optimizer, self.trainable_variables, weights)

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, **arguments: Any) -> None:
        """Compiles the model as `keras.Model.compile` does; the optimizer is wrapped and skips the scores.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: As in `keras.Model.compile`.
            **arguments: As in `keras.Model.compile`.
        """
        if self._arguments["loss_reduction"] == "auto":
            self.network.gates.averaged = averages_examples(loss)
        with strategy_scope(self):
            super().compile(optimizer=getattr(optimizer, "wrapped", optimizer), loss=loss, **arguments)
            if self.optimizer is not None:
                gates = self.network.gates
                self.optimizer = StatisticsOptimizer(self.optimizer, lambda v: v is gates.statistics)

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """Trains the model as `keras.Model.fit` does.

        Callbacks that remember the best epoch begin anew whenever the mask changes.

        Args:
            *args: As in `keras.Model.fit`.
            **kwargs: As in `keras.Model.fit`.
        """
        arguments = inspect.signature(super().fit).bind(*args, **kwargs).arguments
        self._best_epochs = BestEpochs(arguments.get("callbacks"))
        try:
            return super().fit(*args, **kwargs)
        finally:
            self._best_epochs = None

    def _forget_best_epochs(self) -> None:
        """Lets callbacks that remember the best epoch begin anew."""
        if self._best_epochs is not None:
            self._best_epochs.forget()

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as a configuration says. Keras calls it when it loads a file."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    @property
    def scores(self) -> criteria.Scores:
        """The scores since the last pruning: group name -> float32 array `(num_units,)`.

        Pruned units have a score of 0.

        Raises:
            ValueError: if there has been no backward pass yet, or an optimizer trained the scores as weights.
        """
        criterion = self._arguments["criterion"]
        num_examples = self.statistics[GATE_ROWS["examples"]]
        if (num_examples < 0).any():  # every step down a gradient that is positive ends there
            raise ValueError(
                "An optimizer has trained `score_variable` as if it was a weight, so there are no scores. "
                "Leave it out, the last of `trainable_variables`, and call `update_scores()` after each "
                f"backward pass; or use a Keras optimizer. Received: model={self.name!r}"
            )
        totals = self.statistics if num_examples.any() else None
        if criterion not in criteria.DATA_FREE_CRITERIA and totals is None:
            raise ValueError(
                "There are no scores yet: they come from backward passes. Call `fit`, or run a training "
                f"loop that updates the scores, before you ask for them. Received: model={self.name!r}"
            )
        labeled = self._pruning.labeled
        scores = compute_scores(labeled, criterion, totals)
        kept = self.mask > 0
        open_only = {
            group.name: np.where(kept[group.start :][: group.num_units], scores[group.name], 0)
            for group in labeled.groups
            if group.name in scores
        }
        return criteria.Scores(open_only, criterion)

    @property
    def score_variable(self) -> keras.Variable:
        """The last of `trainable_variables`. Its gradient is its value plus the statistics of a batch."""
        return self.network.gates.statistics

    def update_scores(self, gradient: Tensor | None = None, loss_scale: float = 1.0) -> None:
        """Adds a batch to the scores, in training loops whose optimizer does not do it.

        A Keras optimizer that gets the gradients of all `trainable_variables` updates the scores itself.
        Other optimizers must not get the last gradient: pass it to this method. If gradients are averaged
        over workers (DistributedDataParallel), the mean of their parts is added. Scores are means over
        examples, so they are then the scores of all examples together.

        Args:
            gradient: The gradient with respect to `score_variable`, a float32 tensor of its shape. `None`
                (PyTorch only): the gradient that `loss.backward()` stored, which is then cleared.
            loss_scale: The factor that the loss was multiplied by before its gradient was taken, 1 by
                default.

        Raises:
            ValueError: if there is no gradient.
        """
        variable = self.score_variable
        if gradient is None:
            gradient, variable.value.grad = getattr(variable.value, "grad", None), None
        if gradient is None:
            raise ValueError(
                "There is no gradient of the scores. Run `loss.backward()` before, or pass the gradient "
                "with respect to `score_variable`. Received: gradient=None"
            )
        variable.assign(add_batch(keras.ops.convert_to_tensor(variable), gradient, loss_scale))

    @property
    def prunable(self) -> int:
        """The number of units that can still be pruned."""
        return self._pruning.num_left(self.mask > 0)

    def prune(self, goal: PruneGoal, momentum: float = 0.0) -> int:
        """Closes the gates of the least important units. Nothing is compiled again.

        Args:
            goal: An int: this number of units leaves, or all that can if there are fewer. A float or a
                dict of costs, as in `make_plan`: the goal that is met afterwards, counted from the model
                before any pruning.
            momentum: The weight that statistics gathered so far keep in later scores, from 0 (the
                default: none) to below 1. The code of the 2019 paper uses 0.9.

        Returns:
            The number of units that left.

        Raises:
            ValueError: if there are no scores yet; if the goal is not a goal, or out of reach.

        Example:

        >>> prunable = keras_taylor.PrunableModel(model)
        >>> history = prunable.fit(x, y, verbose=0)
        >>> prunable.prune(2)
        2
        """
        check_momentum(momentum)
        kept = self.mask > 0
        if self.check_goal(goal) == 0:
            return 0
        left = self._pruning.after(goal, flatten_scores(self._pruning.labeled, self.scores), kept)
        self.mask = left
        self.statistics = momentum * self.statistics
        return int(kept.sum() - left.sum())

    def check_goal(self, goal: PruneGoal) -> int:
        """Refuses a goal that `prune` could not meet, whatever the scores are.

        Args:
            goal: As in `prune`.

        Returns:
            About how many units would leave; 0 only if the goal is met already.

        Raises:
            ValueError: if the goal is not a goal, or out of reach.
        """
        kept = self.mask > 0
        return int(kept.sum() - self._pruning.after(goal, np.zeros(kept.size), kept).sum())

    def cost(self) -> dict[str, int | None]:
        """The costs of the open units as a dict.

        Returns:
            "params", "flops" (of one example, two for each multiply-add) and "activation_memory" (bytes) ->
            an int, `None` where a cost is unknown.
        """
        return self._pruning.costs(self.mask > 0)

    @property
    def plan(self) -> Plan:
        """The units that have left so far, as a `Plan` for the wrapped model."""
        return plan_of(self._pruning.labeled, self._pruning.costs, self.mask > 0)

    def strip(self, optimizer: keras.optimizers.Optimizer | None = None) -> keras.Model:
        """Returns the plain smaller model: no gates, pruned units cut out, weights copied.

        Args:
            optimizer: An optimizer that trained this model in a loop of your own. The optimizer of the
                smaller model takes over its momentum and moments. `None`: the compiled optimizer.

        Returns:
            A plain Keras model like the wrapped one, but smaller. It is compiled as this model is, and its
            optimizer is at the same step, in the same state, cut like the weights. If this model is not
            compiled and no optimizer is given, the smaller one is not compiled either.

        Raises:
            TypeError: if the optimizer is none of Keras', which alone have a state that can be cut.
            ValueError: if the optimizer was built for other weights.
        """
        if not isinstance(optimizer, (keras.optimizers.Optimizer, type(None))):
            raise TypeError(
                "Expected a Keras optimizer, or `None`; the state of another one cannot be cut: make a new "
                f"one for the smaller model. Received: optimizer={format_value(optimizer)}"
            )
        with strategy_scope(self):
            labeled, kept = self._pruning.labeled, self.mask > 0
            if optimizer is None:
                return as_task(
                    build_smaller_compiled(
                        labeled, kept, compiled_as=self, optimizer=getattr(self, "optimizer", None)
                    )
                )
            optimizer = getattr(optimizer, "wrapped", optimizer)
            small, weights = build_smaller(labeled, kept)
            settings = compile_settings(self) or {}
            small.compile(**{**settings, "optimizer": fresh_optimizer(optimizer)})
            carry_exclusions(optimizer, small.optimizer, small.trainable_variables, weights)
            if not carry_state(optimizer, small.optimizer, small.trainable_variables, weights):
                raise ValueError(
                    "The optimizer's state does not belong to this model. Expected a Keras optimizer that "
                    f"was built with `trainable_variables` of it. Received: optimizer={optimizer!r}"
                )
            return as_task(small)

    def get_config(self) -> dict[str, Any]:
        """The configuration from which `from_config` makes the same wrapper, without weights and masks."""
        config = dict(self._arguments)
        if not isinstance(config["criterion"], str):
            config["criterion"] = keras.saving.serialize_keras_object(config["criterion"])
        model = keras.saving.serialize_keras_object(self.network.model)
        return {"model": model, "name": self.name, **config}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        """The wrapper that a configuration describes, with new weights."""
        config = dict(config)
        for key in ("model", "criterion"):
            if isinstance(config.get(key), dict):
                config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects)
        return cls(**{**config, "selection": Selection(**config["selection"])})


class _Pruning:
    """Selects the units that leave next; it knows nothing of Keras variables.

    Attributes:
        labeled: The wrapped copy.
        costs: Its costs.
    """

    def __init__(self, labeled: LabeledModel, selection: Selection) -> None:
        self.labeled, self.costs = labeled, CostModel(labeled)
        self._limits, self._selection = Limits.from_selection(selection, labeled), selection

    def num_left(self, kept: BoolArray) -> int:
        """The number of units among the kept ones that can leave."""
        least = self._removal_order(np.zeros(kept.size), kept).smallest_mask()
        return int(kept.sum() - least.sum())

    def after(self, goal: PruneGoal, unit_scores: FloatArray, kept: BoolArray) -> BoolArray:
        """The units kept when the goal is met, a bool array `(num_units,)`."""
        if isinstance(goal, (int, np.integer)) and not isinstance(goal, bool):
            _check_num_units(int(goal))
            return self._removal_order(unit_scores, kept).mask_after(int((~kept).sum()) + goal)
        wanted, before = parse_goal(goal), self.costs()
        wanted.check_countable(before)
        if wanted.is_met(self.costs(kept), before):
            return kept
        closed = self.costs.units_per_group() - self.costs.units_per_group(kept)
        request = RemovalRequest(
            *(wanted.ceilings(before), goal, self._limits, self._selection), num_closed=closed
        )
        return choose_kept(self.labeled, self.costs, _closed_first(unit_scores, kept), request)

    def _removal_order(self, unit_scores: FloatArray, kept: BoolArray) -> RemovalOrder:
        return RemovalOrder(self.labeled, self.costs, _closed_first(unit_scores, kept), self._limits)


def _closed_first(unit_scores: FloatArray, kept: BoolArray) -> FloatArray:
    """Scores in which closed units are lower than all others, so that they leave first."""
    finite = unit_scores[np.isfinite(unit_scores)]
    return np.where(kept, unit_scores, (finite.min() if finite.size else 0) - 1)


def _by_layer_name(selection: Selection, model: keras.Model) -> Selection:
    """The selection with names in the place of layers, which the copy of the model does not share."""
    if not selection.ratios:
        return selection
    names = as_name_patterns(model, list(selection.ratios))
    return dataclasses.replace(selection, ratios=dict(zip(names, selection.ratios.values(), strict=True)))


def _config_of(selection: Selection) -> dict[str, Any]:
    """The selection as values that a file can hold: lists in the place of tuples."""
    config = dataclasses.asdict(selection)
    if selection.ratios:
        config["ratios"] = {
            name: list(ratio) if isinstance(ratio, tuple) else ratio
            for name, ratio in selection.ratios.items()
        }
    return config


def check_momentum(momentum: float) -> None:
    """Refuses a weight of older scores that is not a number from 0 on and below 1."""
    if isinstance(momentum, bool) or not 0 <= momentum < 1:
        raise ValueError(f"`momentum` is from 0 on and below 1. Received: momentum={momentum!r}")


def _check_num_units(goal: int) -> None:
    if goal < 1:
        raise ValueError(
            "A whole number is the number of units that leave now. Expected 1 or more, or a fraction of the "
            f"parameters. Received: goal={goal!r}"
        )


def _check_arguments(
    model: keras.Model,
    criterion: criteria.Criterion,
    loss_reduction: str,
) -> None:
    criteria.get(criterion)
    if criterion in _NEED_OWN_PASS:
        raise ValueError(
            f"The scores '{criterion}' cannot be gathered while training. Use another criterion, or "
            f"`keras_taylor.score(model, ds, criterion={criterion!r})`. Received: criterion={criterion!r}"
        )
    if loss_reduction not in ("auto", "mean", "sum"):
        raise ValueError(
            'Expected "auto", "mean" or "sum": how the losses of its examples make the loss of a batch. '
            f"Received: loss_reduction={loss_reduction!r}"
        )
    if isinstance(model, GatedModel):
        raise ValueError(f"The model is wrapped already. Received: model={model.name!r}, a PrunableModel")
    name = overridden_training_method(model)
    if name is not None:
        raise ValueError(
            f"The model's class overrides `{name}`, which a wrapper does not run. Override it in a "
            f"subclass of PrunableModel: `class Prunable(keras_taylor.PrunableModel): {name} = "
            f"{type(model).__name__}.{name}`, and wrap a plain model: `Prunable(keras.Model("
            f"model.inputs, model.outputs))`. Received: model={model.name!r} of class "
            f"`{type(model).__name__}`"
        )
