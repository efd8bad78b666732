"""From the arguments of `compress` to everything that its rounds need: all is checked, nothing is trained."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_taylor.budget.goals import GoalLike
from keras_taylor.budget.measured_costs import proxy_cost
from keras_taylor.budget.measuring import Measurements
from keras_taylor.budget.schedule import TRAINED_INCREMENT, Increment
from keras_taylor.loop.backups import Backups, describe_call, draw_seed
from keras_taylor.loop.fine_tuning import (
    Distill,
    FineTuner,
    FineTuning,
    check_distill,
    check_fit_arguments,
    flat_callbacks,
)
from keras_taylor.loop.judging import judge_training
from keras_taylor.loop.learning_rates import RateSearch, choose_learning_rate
from keras_taylor.loop.metric_limits import MetricLimit, Validation, describe_limits
from keras_taylor.loop.round_scores import (
    RoundScorer,
    ScoreData,
    default_criterion,
    prepare_score_data,
)
from keras_taylor.loop.route import Route, check_goals, plan_route, resume_route
from keras_taylor.plans.plan import Plan
from keras_taylor.plans.selection import Selection, parse_selection
from keras_taylor.reading import graph as graphs
from keras_taylor.reading.groups import LabeledModel, as_name_patterns, label_model
from keras_taylor.reading.tracing import trainable_view
from keras_taylor.reading.walk import NUM_EXAMPLES, sample_inputs
from keras_taylor.reports.info import Info
from keras_taylor.rules.labels import SizeChoices
from keras_taylor.scores.losses import check_targets
from keras_taylor.scores.scoring import Scoring, check_compiled, needs_data, uses_model_labels
from keras_taylor.support.console import Reporter
from keras_taylor.support.datasets import Batch, Feed
from keras_taylor.support.hub_tasks import is_from_hub, preprocessed
from keras_taylor.support.optimizers import has_schedule
from keras_taylor.support.replicas import num_processes
from keras_taylor.support.types import Data, LayerPatterns, Tree

_DATA_ARGUMENTS = ("batch_size", "steps_per_epoch", "sample_weight")


@dataclasses.dataclass(frozen=True, eq=False)
class CompressionSettings:
    """The arguments of a call of `compress`, beside the model and the data.

    Attributes:
        goal, increment, include, exclude, exact, repair, distill, backup_dir: As in `compress`.
        scoring: How channels are scored.
        selection: How the channels that leave are selected.
        tuning: How rounds are fine-tuned.
        limits: How much worse metrics may become; none: any amount.
        fit_kwargs: Arguments of `fit`.

    Raises:
        TypeError: For arguments that `fit` does not have, values of another type.
    """

    goal: GoalLike | Sequence[GoalLike] | None
    increment: Increment | None = None
    scoring: Scoring = dataclasses.field(default_factory=Scoring)
    include: LayerPatterns | None = None
    exclude: LayerPatterns = ()
    exact: bool = True
    selection: Selection = dataclasses.field(default_factory=Selection)
    repair: bool = True
    distill: Distill = False
    tuning: FineTuning = dataclasses.field(default_factory=FineTuning)
    limits: tuple[MetricLimit, ...] = ()
    backup_dir: str | os.PathLike[str] | None = None
    fit_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fit_arguments(self.fit_kwargs)
        check_distill(self.distill)
        for name in ("exact", "repair"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise TypeError(f"Expected `True` or `False`. Received: {name}={getattr(self, name)!r}")
        parse_selection(self.selection)  # refuses another value

    def trains_every_round(self, model: keras.Model) -> bool:
        """Whether rounds on the way to a goal are trained, too."""
        wanted = self.tuning.every_round
        if wanted is None:
            # a schedule is made for the steps of a round
            return not self.repair or bool(self.limits) or has_schedule(model.optimizer)
        return wanted


@dataclasses.dataclass(frozen=True)
class ModelReader:
    """Reads the model of each round in the same way; arguments as of `label_model`."""

    include: Sequence[str | keras.Layer] | None
    exclude: Sequence[str | keras.Layer]
    exact: bool
    choices: SizeChoices
    with_branches: bool = False

    def read(self, model: keras.Model, plan: Plan | None = None) -> LabeledModel:
        """Returns the labels of a model; `plan` is the one that led to it, if it is smaller."""
        choices = self.choices
        if self.with_branches and plan is not None and plan.structure is not None:
            channels = {name: layer.kept for name, layer in plan.layers.items()}
            choices = dataclasses.replace(choices, units=plan.structure.units_left(channels))
        return label_model(model, self.include, self.exclude, self.exact, choices, self.with_branches)


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedRun:
    """All that the rounds of a run need.

    Attributes:
        original: The model before pruning.
        settings: The arguments of the call.
        reader: Reads the model of each round.
        route: What each round leaves.
        score_data: The data of the scores.
        scorer: Scores the model of each round.
        tuner: Trains the model of each round.
        validation: Evaluates the model of each round.
        num_examples: Examples of the training data, those that are held out among them; `None`: unknown.
        info: The `Info` of the run, as it begins or goes on.
        plans: The plans of the rounds that are done already, by an earlier call.
        backups: Keeps the state after each round; `None`: nothing is kept.
        seed: The random seeds of all rounds come from it; `None`: nothing is seeded.
        reporter: Tells the user.
    """

    original: keras.Model
    settings: CompressionSettings
    reader: ModelReader
    route: Route
    score_data: ScoreData
    scorer: RoundScorer
    tuner: FineTuner
    validation: Validation
    num_examples: int | None
    info: Info
    plans: Sequence[Plan]
    backups: Backups | None
    seed: int | None
    reporter: Reporter

    @property
    def carries_optimizer(self) -> bool:
        """Whether the optimizer's state goes on from round to round."""
        return not has_schedule(self.original.optimizer)

    @functools.cached_property
    def repair_inputs(self) -> Tree:
        """The inputs of all repairs, read once: from other data of the scores, if that is large enough."""
        feed, scored = self.tuner.feed, self.score_data.feed
        enough = min(NUM_EXAMPLES, feed.num_examples or NUM_EXAMPLES)
        if self.score_data.is_separate and (scored.num_examples or 0) >= enough:
            feed = scored
        return sample_inputs(feed, graphs.read_model(self.original))

    @property
    def trains_every_round(self) -> bool:
        """Whether rounds on the way to a goal are trained, too."""
        return self.settings.trains_every_round(self.original)

    def num_trained(self, number: int) -> int:
        """How many rounds' epochs round `number`, from 1 on, is trained for; 0: it is not trained.

        Where only goals are trained for, a goal takes the epochs of all rounds since the goal before.
        """
        if not self.tuner.trains:
            return 0
        return 1 if self.trains_every_round else self.route.rounds[number - 1].trainings

    def seed_round(self, number: int) -> None:
        """Sets the random seed of a round to a function of its number, so that it can be repeated."""
        if self.seed is not None:
            keras.utils.set_random_seed(self.seed + number)


def prepare_run(
    model: keras.Model, ds: Data, settings: CompressionSettings, reporter: Reporter
) -> PreparedRun:
    """Checks a call of `compress` against its model and data, and prepares its rounds.

    Costs are measured last, since that takes a while.

    Args:
        model: The model to prune.
        ds: The training data.
        settings: The other arguments.
        reporter: Tells the user.

    Raises:
        ValueError: If anything in the call is wrong.
    """
    ds, settings = _preprocess_data(model, ds, settings)
    model = trainable_view(model)
    check_compiled(model, "`compress`")
    include, exclude = (
        as_name_patterns(model, settings.include),
        as_name_patterns(model, settings.exclude or ()),
    )
    branches = settings.selection.branches
    labeled = label_model(model, include, exclude, settings.exact, with_branches=branches)
    reader = ModelReader(include, exclude, settings.exact, labeled.size_choices, branches)
    increment = settings.increment
    if increment is None and settings.trains_every_round(model):
        increment = TRAINED_INCREMENT
    goals = check_goals(
        labeled, settings.goal, increment, settings.selection, has_limit=bool(settings.limits)
    )
    route = None if goals.measured else plan_route(goals)
    feed, fit_kwargs = _split_fit_arguments(model, ds, settings)
    validation = Validation(fit_kwargs, feed.batch_size, settings.limits)
    tuner = _prepare_tuner(model, feed, fit_kwargs, settings, validation)
    feed, num_examples = tuner.feed, feed.num_examples
    criterion = settings.scoring.criterion or default_criterion(
        labeled, settings.repair, uses_model_labels(feed, settings.scoring.labels)
    )
    trainings = 1 if route is None else route.trainings_for_each_round
    score_data = prepare_score_data(model, feed, fit_kwargs, settings.scoring, trainings)
    check_targets(model, *feed.known_targets)
    check_targets(model, *score_data.feed.known_targets, argument="criterion")
    if isinstance(fit_kwargs.get("validation_data"), tuple):
        _, y, weights = keras.utils.unpack_x_y_sample_weight(fit_kwargs["validation_data"])
        check_targets(model, y, weights, "validation_data")
    scored = score_data if needs_data(criterion, score_data.feed) else None
    cost = proxy_cost(next(iter(goals.last.targets)))
    scorer = RoundScorer(model, reader.read, scored, criterion, cost, fit_kwargs.get("class_weight"))
    if route is None:
        route = plan_route(goals, Measurements(labeled, goals.measured, say=reporter.say))
    route = route.for_criterion(criterion)
    run = PreparedRun(
        original=model,
        settings=settings,
        reader=reader,
        route=route,
        score_data=score_data,
        scorer=scorer,
        tuner=tuner,
        validation=validation,
        num_examples=num_examples,
        info=Info.before_a_run(
            labeled,
            route.before,
            settings.exact,
            goal=dict(goals.last.targets),
            criterion=criterion,
            round_to=route.goals.limits.round_to,
        ),
        plans=(),
        backups=None,
        seed=None,
        reporter=reporter,
    )
    return run if settings.backup_dir is None else _with_backups(run, settings.backup_dir)


def _preprocess_data(
    model: keras.Model, ds: Data, settings: CompressionSettings
) -> tuple[Data, CompressionSettings]:
    """The data of a call as the layers of a task read it; that of other models stays as it is."""
    if not is_from_hub(model):
        return ds, settings
    fit_kwargs, scoring = dict(settings.fit_kwargs), settings.scoring
    batch_size, weights = fit_kwargs.get("batch_size"), fit_kwargs.pop("sample_weight", None)
    if weights is not None:
        x, y = (*(ds if isinstance(ds, tuple) else (ds,)), None)[:2]
        ds = x, y, weights
    if "validation_data" in fit_kwargs:
        validation_data = fit_kwargs["validation_data"]
        fit_kwargs["validation_data"] = preprocessed(model, validation_data, batch_size, "validation_data")
    scoring = dataclasses.replace(scoring, ds=preprocessed(model, scoring.ds, batch_size, "criterion"))
    ds = preprocessed(model, ds, batch_size)
    return ds, dataclasses.replace(settings, fit_kwargs=fit_kwargs, scoring=scoring)


def _split_fit_arguments(
    model: keras.Model, ds: Data, settings: CompressionSettings
) -> tuple[Feed, dict[str, Any]]:
    """The training data, and the arguments of `fit` that are not about the data."""
    fit_kwargs = dict(settings.fit_kwargs)
    batch_size, steps_per_epoch, weights = (fit_kwargs.pop(name, None) for name in _DATA_ARGUMENTS)
    needs_targets = settings.scoring.labels == "data"
    feed = Feed(ds, model, batch_size, steps_per_epoch, weights, targets=needs_targets)
    split = fit_kwargs.pop("validation_split", None)
    if split and fit_kwargs.get("validation_data") is None:
        feed, fit_kwargs["validation_data"] = _split_for_validation(feed, split)
    return feed, fit_kwargs


def _split_for_validation(feed: Feed, share: float) -> tuple[Feed, Batch]:
    """The first examples to train on, and the last ones as validation data, parted as `fit` does.

    Raises:
        ValueError: If one of the parts has no examples.
    """
    total = feed.num_examples if feed.holds_arrays else None
    num_trained = 0 if total is None or not 0 < share < 1 else math.floor(total * (1.0 - share))
    if total is None or num_trained in (0, total):
        raise ValueError(
            "`validation_split` is the share of arrays, above 0 and below 1, that is left for validation. "
            "Expected arrays, and an example at least in each part; or `validation_data`. Received: "
            f"validation_split={share!r}, ds with {total or 'an unknown number of'} examples"
        )
    rest, held_out = feed.split(np.arange(num_trained, total))
    return rest, held_out.as_arrays()


def _prepare_tuner(
    model: keras.Model,
    feed: Feed,
    fit_kwargs: Mapping[str, Any],
    settings: CompressionSettings,
    validation: Validation,
) -> FineTuner:
    rate = None
    if fit_kwargs.get("epochs", 1) != 0:
        rate = choose_learning_rate(model.optimizer, settings.tuning.learning_rate, settings.repair)
    tuner = FineTuner(model, feed, fit_kwargs, settings.distill, rate)
    if not (tuner.trains and settings.tuning.keep_best):
        return tuner
    judged = judge_training(model, feed, validation)
    # a model that is cut and not repaired has much to learn, even from a few examples
    obstacle = judged.obstacle if settings.repair else ""
    tuner = dataclasses.replace(tuner, feed=judged.feed, judge=judged.judge, obstacle=obstacle)
    return dataclasses.replace(tuner, search=_prepare_search(tuner, settings))


def _prepare_search(tuner: FineTuner, settings: CompressionSettings) -> RateSearch | None:
    """The trials of learning rates that each round begins with, if there are any."""
    callbacks = flat_callbacks(tuner.fit_kwargs.get("callbacks"))
    is_set = settings.tuning.learning_rate is not None or tuner.learning_rate is None
    is_set |= any(isinstance(one, keras.callbacks.LearningRateScheduler) for one in callbacks)
    if is_set or not settings.repair or tuner.judge is None or num_processes() > 1:
        return None
    class_weight = tuner.fit_kwargs.get("class_weight")
    return RateSearch(tuner.judge, tuner.feed, class_weight)


def _with_backups(run: PreparedRun, directory: str | os.PathLike[str]) -> PreparedRun:
    """The run with its backups, as an earlier call left it if there was one.

    Raises:
        ValueError: If the directory cannot be written to, or holds the state of another call.
    """
    route = run.route
    stops = [number for number, target in enumerate(route.rounds, 1) if target.goal_index is not None]
    backups = Backups(directory, _describe_run_settings(run), keep=stops)
    state = backups.state
    if state is None:
        return dataclasses.replace(run, backups=backups, seed=draw_seed())
    if route.measurements is not None:
        route = resume_route(route, state.info.before, state.info.round_to)
    return dataclasses.replace(
        run, route=route, info=state.info, plans=tuple(state.plans), backups=backups, seed=state.seed
    )


def _describe_run_settings(run: PreparedRun) -> dict[str, Any]:
    """What two calls must have in common so that one can go on where the other ended."""
    settings, route, data, tuner = run.settings, run.route, run.score_data, run.tuner
    goals = [dict(goal.targets) for goal in route.goals.stops]
    is_measured = route.measurements is not None
    furthest = max(route.goals.last.fractions_to_remove(route.before).values())
    schedule = [round(target.progress * furthest, 9) for target in route.rounds]
    selection = {
        field.name: getattr(route.goals.selection, field.name)
        for field in dataclasses.fields(Selection)
        if field.name != "ratios"
    }
    return describe_call(
        run.original,
        goal=goals if goals[1:] else goals[0],
        schedule=None if is_measured else schedule,
        increment=settings.increment if is_measured else None,
        criterion=run.info.criterion,
        include=run.reader.include,
        exclude=run.reader.exclude,
        exact=settings.exact,
        **selection,
        ratios=dict(route.goals.limits.ratios),
        **describe_limits(settings.limits),
        repair=settings.repair,
        distill=settings.distill is not False,
        labels="model" if run.scorer.draws_labels else "data",
        score_examples=data.num_examples,
        scores_apart=data.is_separate,
        epochs=tuner.epochs,
        batch_size=tuner.feed.batch_size,
        steps_per_epoch=tuner.feed.steps_per_epoch,
        validation_split=settings.fit_kwargs.get("validation_split"),
        keep_best=settings.tuning.keep_best,
        every_round=run.trains_every_round,
        trainings=None if is_measured else [target.trainings for target in route.rounds],
        examples=run.num_examples,
    )
