"""The algorithm of `compress`, round by round: score, prune, repair, fine-tune, judge, back up."""

import dataclasses
import functools
import gc
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import keras

from keras_taylor.budget.costs import CostModel
from keras_taylor.budget.feasibility import describe_reach
from keras_taylor.budget.schedule import RoundTarget
from keras_taylor.cutting.layer_fits import LayerRepair
from keras_taylor.cutting.refitting import refit
from keras_taylor.cutting.remade_tasks import as_task
from keras_taylor.cutting.surgery import build_smaller_compiled, copy_model
from keras_taylor.loop.backups import capture, restore_model
from keras_taylor.loop.fine_tuning import DivergenceError, FitResult
from keras_taylor.loop.learning_rates import plan_trials
from keras_taylor.loop.metric_limits import WatchedMetrics
from keras_taylor.loop.preparation import PreparedRun
from keras_taylor.loop.route import measure_reached
from keras_taylor.plans.plan import Plan
from keras_taylor.plans.planning import kept_units, label_as_planned, plan_of
from keras_taylor.plans.ranking import flatten_scores
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.reports import messages
from keras_taylor.reports.info import Info
from keras_taylor.reports.run_record import GOAL_REACHED, NOTHING_TO_DO, Round, repair_record
from keras_taylor.support.console import Clock
from keras_taylor.support.types import BoolArray, FloatArray


class CompressionInterrupted(KeyboardInterrupt):
    """Raised by `compress` on Ctrl-C; it holds the model of the last complete round.

    Args:
        model: The model of the last complete round.
        info: The `Info` of the rounds that were completed.
        models: The models of the goals that were reached.

    Attributes:
        model: A compiled `keras.Model`: that of the last complete round, or the given one if no round was
            completed.
        info: The `Info` of the rounds that were completed.
        models: A list of models: if there are several goals, one for each that was reached.

    Example:

    >>> try:
    ...     small = keras_taylor.compress(model, (x, y), goal=0.3, verbose=0)
    ... except keras_taylor.CompressionInterrupted as interruption:
    ...     small = interruption.model
    """

    def __init__(self, model: keras.Model, info: Info, models: Sequence[keras.Model] = ()) -> None:
        super().__init__(f"interrupted after {len(info.rounds)} complete rounds; see .model and .info")
        self.model = model
        self.info = info
        self.models = list(models)


@dataclasses.dataclass
class RunState:
    """What the rounds of a run change.

    Attributes:
        model: The model that the next round starts from.
        info: The `Info` so far.
        plans: The plan of each completed round.
        models: The models of the goals that were reached.
    """

    model: keras.Model
    info: Info
    plans: list[Plan]
    models: list[keras.Model]

    @property
    def is_trained(self) -> bool:
        """Whether the model has been fine-tuned since the original."""
        return any(one.held and one.kept_epoch > 0 for one in self.info.rounds)


@dataclasses.dataclass(frozen=True, eq=False)
class PrunedModel:
    """A model after a cut.

    Attributes:
        model: The smaller model.
        source: The model that it was cut from.
        kept: The units of the source that it keeps, a mask `(num_units,)`.
        plan: The plan of this round.
        total_plan: The plan from the original to this model.
    """

    model: keras.Model
    source: LabeledModel
    kept: BoolArray
    plan: Plan
    total_plan: Plan


class Judgment(NamedTuple):
    """The costs and the metrics after a round.

    Attributes:
        missed: By how much the model misses the goal that the round was to reach, in words.
        is_good_enough: Whether its metrics keep to their limits.
    """

    costs: dict[str, int | None]
    metrics: dict[str, float]
    missed: list[str]
    is_good_enough: bool


def complete_run(run: PreparedRun) -> RunState:
    """Runs all rounds that are left.

    Returns:
        The last state. Its models are those of the goals that were reached, and the last one if the run
        ended between two goals.

    Raises:
        CompressionInterrupted: On Ctrl-C.
    """
    announce_run(run)
    state = start_run(run)
    watched = watch_metrics(run, state)
    num_rounds = run.route.num_rounds
    try:
        while len(state.plans) < num_rounds and not state.info.stop_reason:
            done = run_round(run, state, watched)
            if not done.held:
                reason = watched.explain_undo(done.metrics, done.number)
                stop_run(run, state, reason, is_expected=run.settings.goal is None)
            back_up(run, state)
    except DivergenceError as error:
        reason = messages.explain_divergence(error, len(state.plans), run.tuner.current_rate)
        stop_run(run, state, reason)
    except KeyboardInterrupt as interrupt:
        state.info.stop_reason = "interrupted"
        models = [as_task(one) for one in state.models]
        raise CompressionInterrupted(as_task(state.model), state.info, models) from interrupt
    except Exception as error:
        has_backups = run.backups is not None
        error.add_note(messages.describe_kept_rounds(len(state.plans), num_rounds, has_backups))
        raise
    finish_run(run, state)
    return state


def run_round(run: PreparedRun, state: RunState, watched: WatchedMetrics) -> Round:
    """Runs one round: score, prune, repair, fine-tune, judge. The state is then that after the round.

    Args:
        run: The run.
        state: Its state, which changes. A round that is undone leaves the model as it was.
        watched: The metrics that must keep to their limits.

    Returns:
        What happened in the round.

    Raises:
        DivergenceError: If fine-tuning diverges; nothing has changed then.
    """
    number, clock = len(state.plans) + 1, Clock()
    target = run.route.rounds[number - 1]
    name = f"round {number}/{run.route.num_rounds}"
    run.seed_round(number)
    with clock.phase("score"):
        labeled, unit_scores = score_round(run, state, f"{name}: scoring")
    run.seed_round(number)  # scoring may have drawn random numbers
    with clock.phase("prune"):
        pruned = prune_round(run, state, labeled, unit_scores, target)
    with clock.phase("repair"):
        cut = run.tuner.assess_cut(pruned.model) if run.settings.repair else {}
        repairs = repair_round(run, state, pruned, f"{name}: repair")
    with clock.phase("fit"):
        fitted = train_round(run, state, pruned, f"{name}: fine-tuning")
    judgment = judge_round(run, pruned, target, watched)
    if fitted.failure:
        rate = run.tuner.current_rate if fitted.rate is None else fitted.rate["peak"]
        warnings.warn(messages.explain_failure(fitted.failure, number, rate), stacklevel=4)
    done = Round(
        number=number,
        costs=judgment.costs,
        layers={name: [layer.width, len(layer.kept)] for name, layer in pruned.plan.layers.items()},
        epochs=fitted.epochs,
        history=fitted.history,
        step_losses=fitted.step_losses,
        seconds=clock.seconds,
        repairs=[repair_record(one) for one in repairs],
        metrics=judgment.metrics,
        judged=fitted.judged and {**fitted.judged, "cut": cut},
        learning_rate=fitted.rate,
        held=judgment.is_good_enough,
    )
    run.reporter.say(f"{name}: {messages.describe_round(done, run.route.before)}")
    state.info.rounds.append(done)
    if done.held:
        accept_round(run, state, pruned, done, judgment.missed)
    gc.collect()  # models are full of cycles: their weights and compiled functions would stay for long
    run.reporter.show(state.info)
    return done


def score_round(run: PreparedRun, state: RunState, phase: str) -> tuple[LabeledModel, FloatArray]:
    """Returns the labels of the model, and the scores of its units `(num_units,)`; infinite: never leave."""
    labeled = run.reader.read(state.model, state.info.plan)
    scores = run.scorer.score(labeled, state.plans, run.reporter.callback(phase))
    return labeled, flatten_scores(labeled, scores)


def prune_round(
    run: PreparedRun, state: RunState, labeled: LabeledModel, unit_scores: FloatArray, target: RoundTarget
) -> PrunedModel:
    """Cuts the units that leave in this round.

    As long as no training was kept, the original is cut: a repair to it is better than a repair of repairs.
    """
    kept = run.route.choose_units(labeled, unit_scores, target)
    plan = plan_of(labeled, CostModel(labeled), kept, unit_scores, run.route.goals.limits.ties)
    total_plan = state.info.plan.compose(plan)
    if not state.is_trained:
        labeled = label_as_planned(run.original, total_plan)
        kept = kept_units(labeled, total_plan)
    small = build_smaller_compiled(labeled, kept, compiled_as=run.original, carry=run.carries_optimizer)
    return PrunedModel(small, labeled, kept, plan, total_plan)


def repair_round(run: PreparedRun, state: RunState, pruned: PrunedModel, phase: str) -> list[LayerRepair]:
    """Refits the layers that lost inputs, and those behind them as long as no training was kept."""
    if not run.settings.repair:
        return []
    track = functools.partial(run.reporter.track, phase=phase)
    training = run.num_trained(len(state.plans) + 1) > 0
    arguments = pruned.source, pruned.kept, pruned.model, run.repair_inputs
    return refit(*arguments, not state.is_trained, training, track)


def train_round(run: PreparedRun, state: RunState, pruned: PrunedModel, phase: str) -> FitResult:
    """Trains the model of a round, or only judges it on the way to a goal.

    Repair keeps more than the training of every round does: in a few steps each, most of it goes into models
    that are cut again.
    """
    num_rounds = run.num_trained(len(state.plans) + 1)
    if not num_rounds:
        return run.tuner.assess(pruned.model)
    return run.tuner.train(pruned.model, state.model, run.reporter.callback(phase), num_rounds)


def judge_round(
    run: PreparedRun, pruned: PrunedModel, target: RoundTarget, watched: WatchedMetrics
) -> Judgment:
    """Measures and evaluates a model where that is needed: at a goal, and for metrics with a limit."""
    costs, metrics, missed = dict(pruned.plan.after), {}, list[str]()
    reaches_goal = target.goal_index is not None
    if reaches_goal and run.route.measurements is not None:
        measured, missed = measure_reached(pruned.model, target, run.route.measurements)
        costs.update(measured)
    if reaches_goal or watched:
        metrics = run.validation.evaluate(pruned.model)
    return Judgment(costs, metrics, missed, not watched.broken(metrics))


def accept_round(
    run: PreparedRun, state: RunState, pruned: PrunedModel, done: Round, missed: Sequence[str]
) -> None:
    """Makes the model of a round the one that the next round starts from."""
    stop = run.route.rounds[done.number - 1].goal_index
    state.model = pruned.model
    state.plans.append(pruned.plan)
    state.info.plan, state.info.after = pruned.total_plan, dict(done.costs)
    if stop is not None:
        goal = dict(run.route.goals.stops[stop].targets)
        state.models.append(pruned.model)
        state.info.stops.append(
            {
                "goal": goal,
                "round": done.number,
                "costs": done.costs,
                "metrics": done.metrics,
                "missed": list(missed),
            }
        )


def back_up(run: PreparedRun, state: RunState) -> None:
    """Writes the state after a round."""
    if run.backups is not None and run.seed is not None and state.plans:
        run.backups.write(capture(state.model, state.plans, state.info, run.seed))


def announce_run(run: PreparedRun) -> None:
    """Says what will be done, and how far the model can be pruned."""
    data = run.score_data
    rounds = [run.num_trained(number) for number in range(1, run.route.num_rounds + 1)] or [0]
    outline = messages.RoundOutline(
        num_rounds=run.route.num_rounds,
        num_scored=data.num_examples if run.scorer.needs_data else None,
        draws_labels=run.scorer.draws_labels,
        repairs=run.settings.repair,
        carries_optimizer=run.carries_optimizer,
        learning_rate=run.tuner.learning_rate,
        tries_rates=run.tuner.search is not None and plan_trials(run.tuner.num_steps(max(rounds)))[0] > 0,
        epochs=[run.tuner.num_epochs(num) for num in rounds if num],
        judged_on=run.tuner.judge.examples if run.tuner.judge is not None else "",
    )
    goals, route = run.route.goals.stops, run.route
    for line in messages.describe_run(run.original, run.info, outline):
        run.reporter.say(line)
    if run.tuner.obstacle:
        run.reporter.say(messages.explain_no_training(run.tuner.obstacle))
    for line in describe_reach(goals, route.before, route.smallest):
        run.reporter.say(line)


def start_run(run: PreparedRun) -> RunState:
    """Returns the state before the next round: that of the original, or that of an earlier call."""
    before = run.route.before
    num_met = sum(goal.is_met(before, before) for goal in run.route.goals.stops)
    state = RunState(
        run.original, run.info, list(run.plans), [copy_model(run.original) for _ in range(num_met)]
    )
    if run.backups is None or run.backups.state is None:
        return state
    num_done = len(state.plans)
    backup, run.backups.state = run.backups.state, None  # its arrays need not stay in memory
    run.reporter.say(f"resumed after round {num_done} of {run.route.num_rounds} from {backup.path}")
    state.model = restore_model(run.original, backup)
    for number, target in enumerate(run.route.rounds[:num_done], 1):
        if target.goal_index is not None:
            is_last = number == num_done
            state.models.append(
                state.model if is_last else restore_model(run.original, run.backups.of_round(number))
            )
    return state


def watch_metrics(run: PreparedRun, state: RunState) -> WatchedMetrics:
    """Evaluates the original, and returns the metrics that must keep to their limits."""
    if not state.plans:
        metrics = run.validation.evaluate(copy_model(run.original))  # evaluating the original leaves traces
        state.info.metrics = {"before": metrics} if metrics else {}
    before = state.info.metrics.get("before", {})
    watched = run.validation.watch(before)
    if watched:
        run.reporter.say(watched.describe(before))
    return watched


def stop_run(run: PreparedRun, state: RunState, reason: str, is_expected: bool = False) -> None:
    """Ends the run before its goal; warns if there was a goal to reach."""
    state.info.stop_reason = reason
    if not is_expected:
        warnings.warn(reason, stacklevel=4)
    run.reporter.say(f"stopped: {reason}")


def finish_run(run: PreparedRun, state: RunState) -> None:
    """Completes the `Info`, the models of the goals, and the backups."""
    info = state.info
    if not info.stop_reason:
        reason = GOAL_REACHED if run.route.rounds else NOTHING_TO_DO
        info.stop_reason = messages.describe_missed_goals(info.stops) or reason
        if run.backups is not None:
            run.backups.finish()
        if info.stop_reason != reason:
            stop_run(run, state, info.stop_reason)
    if lag := messages.describe_lag(info):
        run.reporter.say(lag)
    if not state.models or (state.plans and state.models[-1] is not state.model):
        state.models.append(state.model if state.plans else copy_model(run.original))
    if info.metrics:
        held = [done.metrics for done in info.rounds if done.held]
        info.metrics["after"] = held[-1] if held else info.metrics["before"]
