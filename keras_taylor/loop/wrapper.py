"""A model that scores and prunes its channels while it trains."""

import keras
import numpy as np

from keras_taylor.budget.costs import CostModel
from keras_taylor.budget.goals import parse_goal
from keras_taylor.cutting.surgery import cut, rebuild
from keras_taylor.plans.limits import Limits
from keras_taylor.plans.planning import plan_of
from keras_taylor.plans.ranking import RemovalOrder, RemovalRequest, choose_kept, flatten_scores
from keras_taylor.plans.selection import Selection
from keras_taylor.reading.cloning import compile_settings
from keras_taylor.reading.groups import label_model, layer_names
from keras_taylor.reading.tracing import functional_view, own_training
from keras_taylor.scores import criteria
from keras_taylor.scores.gates import ROWS, GatedModel
from keras_taylor.scores.losses import averages_examples
from keras_taylor.scores.scoring import scores_of
from keras_taylor.support.optimizers import StatisticsOptimizer, carry_state, fresh_optimizer, with_batch
from keras_taylor.support.replicas import strategy_scope

# Criteria that need passes of their own.
_APART = ("oracle", "sensitivity", "fisher", "log_odds", "log_odds_probed")


@keras.saving.register_keras_serializable("keras_taylor")
class PrunableModel(GatedModel):
    """A copy of a model with gates, which scores its channels while it trains.

    Same outputs as the model; compiles, fits, saves and loads like any other.
    Each backward pass adds the Taylor terms of its examples to the scores; `prune`
    closes the gates of the least important units (nothing is compiled anew);
    `strip` returns the plain smaller model. Override `train_step` or `compute_loss`
    in a subclass, as of any Keras model.

    Args:
        model: A built Keras model. It is not changed, and not
            trained. If it is compiled, so is the wrapper, with a new optimizer that
            goes on where its own stands.
        criterion: What makes a channel important, see `keras_taylor.scores.criteria`; those that
            need no passes of their own.
        include, exclude: Layer names, regular expressions that match whole names, or
            layers: prune only the channels that these make / none of them.
        exact: As in `keras_taylor.analyze`. With `False` normalizations take their means and variances
            over the channels that are open, so that `strip` changes nothing here either.
        rank, balance: As in `make_plan`; a goal that is a number of units takes those with the lowest
            scores, whatever they save.
        round_to: Every group of channels keeps a multiple of this many.
        min_channels: Every group keeps at least so many.
        loss_reduction: Whether the loss of a batch is the "mean" or the "sum" of its
            examples', which the size of the scores depends on; "auto" asks the
            compiled losses, and takes "mean" where there are none.
        name: Name of the wrapper.

    Raises:
        ValueError: for a model that is not built, whose class overrides `train_step` or
            the like, a criterion that cannot be gathered while training.
        UnsupportedModelError: for a model whose layers cannot be seen or made again.

    Example:

    >>> prunable = keras_taylor.PrunableModel(model)
    >>> prunable.fit(x, y)
    >>> prunable.prune(0.3)
    >>> prunable.fit(x, y)
    >>> small = prunable.strip()
    """

    def __init__(
        self,
        model,
        *,
        criterion="taylor",
        include=None,
        exclude=(),
        rank=None,
        balance=0.5,
        round_to=1,
        min_channels=1,
        loss_reduction="auto",
        exact=True,
        name=None,
    ):
        _check_arguments(model, criterion, loss_reduction)
        with strategy_scope(model):
            model = functional_view(model)
            original = label_model(model)
            own, weights = rebuild(original, np.ones(original.num_units, bool))
            include, exclude = layer_names(model, include), layer_names(model, exclude)
            labeled = label_model(own, include, exclude, exact)
            super().__init__(labeled, frozen=False, name=name or f"prunable_{model.name}")
            self._arguments = {
                "criterion": criterion,
                "include": include,
                "exclude": exclude,
                "rank": rank,
                "balance": balance,
                "round_to": round_to,
                "min_channels": min_channels,
                "loss_reduction": loss_reduction,
                "exact": exact,
            }
            selection = Selection(rank=rank, balance=balance, round_to=round_to, min_channels=min_channels)
            self._pruning = _Pruning(labeled, selection.for_criterion(criterion))
            self.network.gates.averaged = loss_reduction != "sum"
            self.built = True
            settings = compile_settings(model)
            if settings is not None:
                self.compile(**settings)
                if self.optimizer is not None:
                    carry_state(model.optimizer, self.optimizer, self.trainable_variables, weights)

    def compile(self, optimizer="rmsprop", loss=None, **arguments):
        """As `keras.Model.compile`; the optimizer is wrapped so that it leaves the scores alone.

        Args:
            optimizer, loss, **arguments: As in `keras.Model.compile`.
        """
        if self._arguments["loss_reduction"] == "auto":
            self.network.gates.averaged = averages_examples(loss)
        with strategy_scope(self):
            super().compile(optimizer=getattr(optimizer, "wrapped", optimizer), loss=loss, **arguments)
            if self.optimizer is not None:
                gates = self.network.gates
                self.optimizer = StatisticsOptimizer(self.optimizer, lambda v: v is gates.statistics)

    def compile_from_config(self, config):
        """Compiles as the configuration says, when a file is loaded."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    @property
    def scores(self):
        """Scores since the last pruning: group name -> float32 array `(num_units,)`.

        Units that were pruned have 0.

        Raises:
            ValueError: if no backward pass was seen yet.
        """
        criterion = self._arguments["criterion"]
        totals = self.statistics if self.statistics[ROWS.index("examples")].any() else None
        if criterion not in criteria.LABEL_FREE and totals is None:
            raise ValueError(
                "There are no scores yet: they come from backward passes. Call `fit`, or run a training "
                f"loop that updates the scores, before you ask for them. Received: model={self.name!r}"
            )
        labeled = self._pruning.labeled
        scores = scores_of(labeled, criterion, totals)
        kept = self.mask > 0
        return {
            group.name: np.where(kept[group.start :][: group.num_units], scores[group.name], 0)
            for group in labeled.groups
            if group.name in scores
        }

    @property
    def score_variable(self):
        """The last of `trainable_variables`: its gradient is its value plus a batch's statistics."""
        return self.network.gates.statistics

    def update_scores(self, gradient=None, loss_scale=1.0):
        """Adds a batch to the scores, in training loops whose optimizer does not.

        Where gradients are averaged over workers (DistributedDataParallel), what is added is the mean of
        their parts: scores, which are means over examples, are those of all examples together.

        A Keras optimizer that gets the gradients of all `trainable_variables` does it by
        itself. Other optimizers must not get the last one: hand it to this method.

        Args:
            gradient: The gradient with respect to `score_variable`, a float32 tensor of
                its shape; `None`: the one that `loss.backward()` has left in PyTorch,
                which is cleared.
            loss_scale: By what the loss was multiplied before its gradient was taken.

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
        variable.assign(with_batch(keras.ops.convert_to_tensor(variable), gradient, loss_scale))

    @property
    def prunable(self):
        """How many units can still be pruned, an int."""
        return self._pruning.num_left(self.mask > 0)

    def prune(self, goal, momentum=0.0):
        """Closes the gates of the least important units; nothing is compiled anew.

        Args:
            goal: A whole number: so many units more go (or all that can, if there are
                fewer). Otherwise the goal that is met afterwards, counted from the
                model without any pruning: a fraction of the parameters, or a dict of costs,
                as in `make_plan`.
            momentum: The weight that what was gathered so far keeps in later scores
                (0.9 in the 2019 paper's code, 0 starts anew).

        Returns:
            The number of units that went.

        Raises:
            ValueError: without scores, for a goal that is none or out of reach.
        """
        check_momentum(momentum)
        kept = self.mask > 0
        if self.check_goal(goal) == 0:
            return 0
        left = self._pruning.after(goal, flatten_scores(self._pruning.labeled, self.scores), kept)
        self.mask = left
        self.statistics = momentum * self.statistics
        return int(kept.sum() - left.sum())

    def check_goal(self, goal):
        """Refuses what `prune` could not do, whatever the scores.

        Returns:
            About how many units would go: 0 only if the goal is met.

        Raises:
            ValueError: for a goal that is none or out of reach.
        """
        kept = self.mask > 0
        return int(kept.sum() - self._pruning.after(goal, np.zeros(kept.size), kept).sum())

    def cost(self):
        """The "params", "flops" and "activation_memory" of what is left: ints, `None` where unknown."""
        return self._pruning.costs(self.mask > 0)

    @property
    def plan(self):
        """What has gone so far, as a `Plan` for the model that was wrapped."""
        return plan_of(self._pruning.labeled, self._pruning.costs, self.mask > 0)

    def strip(self, optimizer=None):
        """The plain smaller model: no gates, pruned units cut out, weights copied.

        Args:
            optimizer: An optimizer that trained this model in a loop of your own, whose
                momentum and moments go over to the smaller model's; `None`: the one
                that the model is compiled with.

        Returns:
            A plain Keras model like the one that was wrapped, but smaller. Compiled as
            this one is, its optimizer at the same step and in the same state, cut; not
            compiled if this one is not and no optimizer was given.

        Raises:
            ValueError: for an optimizer that was built for other weights.
        """
        with strategy_scope(self):
            labeled, kept = self._pruning.labeled, self.mask > 0
            if optimizer is None:
                return cut(labeled, kept, compiled_as=self, optimizer=getattr(self, "optimizer", None))
            optimizer = getattr(optimizer, "wrapped", optimizer)
            small, weights = rebuild(labeled, kept)
            settings = compile_settings(self) or {}
            small.compile(**{**settings, "optimizer": fresh_optimizer(optimizer)})
            if not carry_state(optimizer, small.optimizer, small.trainable_variables, weights):
                raise ValueError(
                    "The optimizer's state does not belong to this model. Expected a Keras optimizer that "
                    f"was built with `trainable_variables` of it. Received: optimizer={optimizer!r}"
                )
            return small

    def get_config(self):
        """What `from_config` makes the same wrapper from; weights, masks and scores are not in it."""
        config = dict(self._arguments)
        if not isinstance(config["criterion"], str):
            config["criterion"] = keras.saving.serialize_keras_object(config["criterion"])
        model = keras.saving.serialize_keras_object(self.network.model)
        return {"model": model, "name": self.name, **config}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The wrapper that `get_config` describes, with new weights."""
        config = dict(config)
        for key in ("model", "criterion"):
            if isinstance(config.get(key), dict):
                config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects)
        return cls(**config)


class _Pruning:
    """Which units can go next; knows nothing of Keras variables."""

    def __init__(self, labeled, selection):
        self.labeled, self.costs = labeled, CostModel(labeled)
        self._limits, self._selection = Limits.from_selection(selection, labeled), selection

    def num_left(self, kept):
        """How many more units can go."""
        least = self._removal_order(np.zeros(kept.size), kept).smallest_mask()
        return int(kept.sum() - least.sum())

    def after(self, goal, flat, kept):
        """The units kept when the goal is met, a bool array `(num_units,)`."""
        if isinstance(goal, (int, np.integer)) and not isinstance(goal, bool):
            _check_number(goal)
            return self._removal_order(flat, kept).mask_after(int((~kept).sum()) + goal)
        wanted, before = parse_goal(goal), self.costs()
        wanted.check(before)
        if wanted.is_met(self.costs(kept), before):
            return kept
        closed = self.costs.counts() - self.costs.counts(kept)
        request = RemovalRequest(
            *(wanted.ceilings(before), goal, self._limits, self._selection), num_closed=closed
        )
        return choose_kept(self.labeled, self.costs, _closed_first(flat, kept), request)

    def _removal_order(self, flat, kept):
        return RemovalOrder(self.labeled, self.costs, _closed_first(flat, kept), self._limits)


def _closed_first(flat, kept):
    """Scores by which what is gone goes first."""
    finite = flat[np.isfinite(flat)]
    return np.where(kept, flat, (finite.min() if finite.size else 0) - 1)


def check_momentum(momentum):
    """Refuses a weight of older scores that is none."""
    if isinstance(momentum, bool) or not 0 <= momentum < 1:
        raise ValueError(f"`momentum` is from 0 on and below 1. Received: momentum={momentum!r}")


def _check_number(goal):
    if goal < 1:
        raise ValueError(
            "A whole number is how many units go now. Expected 1 or more, or a fraction of the "
            f"parameters. Received: goal={goal!r}"
        )


def _check_arguments(model, criterion, loss_reduction):
    criteria.get(criterion)
    if criterion in _APART:
        raise ValueError(
            f"The scores '{criterion}' cannot be gathered while training. Use another criterion, or "
            f"`keras_taylor.score(model, ds, criterion={criterion!r})`. Received: criterion={criterion!r}"
        )
    if loss_reduction not in ("auto", "mean", "sum"):
        raise ValueError(
            'Expected "auto", "mean" or "sum": how the loss of a batch comes from its examples\'. '
            f"Received: loss_reduction={loss_reduction!r}"
        )
    if isinstance(model, GatedModel):
        raise ValueError(f"The model is wrapped already. Received: model={model.name!r}, a PrunableModel")
    name = own_training(model)
    if name is not None:
        raise ValueError(
            f"The model's class overrides `{name}`, which a wrapper does not run. Override it in a "
            f"subclass of PrunableModel: `class Prunable(keras_taylor.PrunableModel): {name} = "
            f"{type(model).__name__}.{name}`, and wrap a plain model: `Prunable(keras.Model("
            f"model.inputs, model.outputs))`. Received: model={model.name!r} of class "
            f"`{type(model).__name__}`"
        )
