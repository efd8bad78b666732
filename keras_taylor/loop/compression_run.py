"""From a model round by round down to its goals."""

import dataclasses
import gc
import warnings

import keras
import numpy as np

from keras_taylor.budget.costs import CostModel
from keras_taylor.budget.feasibility import describe_reach
from keras_taylor.budget.goals import parse_goals
from keras_taylor.budget.measured_costs import proxy_cost
from keras_taylor.budget.measuring import Measurements
from keras_taylor.budget.schedule import RoundTarget, schedule_rounds
from keras_taylor.cutting.refitting import refit
from keras_taylor.cutting.surgery import build_smaller_compiled, copy_model
from keras_taylor.loop import messages
from keras_taylor.loop.backups import Backups, capture, describe_call, draw_seed, restore_model
from keras_taylor.loop.distilling import check_trainable, distiller
from keras_taylor.loop.fine_tuning import Diverged, fine_tune, fine_tuning_rate, learning_rate_of
from keras_taylor.loop.measured_search import check_reachable, draft, fitting_units
from keras_taylor.loop.metric_limit import MetricLimit, parse_metric_limit
from keras_taylor.loop.round_scores import (
    RoundScorer,
    count_trained,
    default_criterion,
    prepare_score_data,
    share_of_trained,
)
from keras_taylor.loop.validating import Validation
from keras_taylor.plans.limits import Limits, check_round_to
from keras_taylor.plans.planning import kept_units, plan_of
from keras_taylor.plans.ranking import (
    RemovalOrder,
    RemovalRequest,
    choose_kept,
    flatten_scores,
    order_removals,
)
from keras_taylor.plans.selection import AUTO, Selection
from keras_taylor.reading import graph as graphs
from keras_taylor.reading.groups import as_name_patterns, label_model
from keras_taylor.reading.tracing import trainable_view
from keras_taylor.reading.walk import sample_inputs
from keras_taylor.reports.info import Info
from keras_taylor.reports.run_record import Round, repair_record
from keras_taylor.scores.scoring import check_compiled, check_labels, needs_data, uses_model_labels
from keras_taylor.support.console import Clock
from keras_taylor.support.datasets import Feed
from keras_taylor.support.optimizers import has_schedule

_REPAIR = 1 / 32, 128, 512  # examples of a repair: share of what a round trains on, least, most


class CompressionInterrupted(KeyboardInterrupt):
    """Ctrl-C during `compress`.

    Attributes:
        model: The model of the last complete round (the one given, if there is none).
        info: The `Info` of the rounds that were completed.
        models: Of several goals: the models of those that were reached.
    """

    def __init__(self, model, info, models=()):
        super().__init__(f"interrupted after {len(info.rounds)} complete rounds; see .model and .info")
        self.model = model
        self.info = info
        self.models = list(models)


class CompressionRun:
    """One call of `compress`: everything checked when it is made, then round by round.

    Args: as of `compress`.

    Attributes:
        info: The `Info` of the run.
    """

    def __init__(
        self, model, ds, goal, increment, criterion, score_ds, score_examples, include, exclude, exact,
        ratios, scope, rank, balance, round_to, min_channels, repair, labels, distill, learning_rate,
        max_drop, monitor, baseline, backup_dir, fit_kwargs, reporter,
    ):  # fmt: skip
        self._reporter = reporter
        model = trainable_view(model)
        check_compiled(model, "`compress`")
        self._original, self._given_goal, self._increment = model, goal, increment
        self._fit_kwargs = dict(fit_kwargs)
        self._include = as_name_patterns(model, include)
        self._exclude, self._exact = as_name_patterns(model, exclude), exact
        self._carry = not has_schedule(model.optimizer)
        labeled = label_model(model, self._include, self._exclude, exact)
        self._grouped = labeled.grouped_convolutions
        self._selection = Selection(scope, rank, balance, ratios, round_to, min_channels)
        first = dataclasses.replace(self._selection, round_to=1 if round_to == AUTO else round_to)
        self._limits = Limits.from_selection(first, labeled)
        self._whole = {group.name: group.num_units for group in labeled.groups}
        costs = CostModel(labeled)
        self._before = costs()
        least = self._removal_order_for(labeled)(costs).smallest_mask()
        as_far_as_it_goes = None if max_drop is None else costs(least)
        self._goals = parse_goals(goal, measurable=True, smallest=as_far_as_it_goes)
        for one in self._goals:
            one.check_countable(self._before)
        check_round_to(round_to, self._goals[-1].measured)
        self._measurements = None
        if not self._goals[-1].measured:
            self._set_out(labeled, least)
        self._feed = Feed(
            ds,
            model,
            self._fit_kwargs.pop("batch_size", None),
            self._fit_kwargs.pop("steps_per_epoch", None),
            self._fit_kwargs.pop("sample_weight", None),
            targets=check_labels(labels) == "data",
        )
        criterion = criterion or default_criterion(labeled, repair, uses_model_labels(self._feed, labels))
        self._selection = self._selection.for_criterion(criterion)
        self._trains = self._fit_kwargs.get("epochs", 1) != 0
        if self._trains:
            check_trainable(self._feed, self._fit_kwargs, distill)
        self._distill, self._teacher = distill, None
        self._repairs = repair
        self._rate = fine_tuning_rate(model.optimizer, learning_rate, repair) if self._trains else None
        if max_drop is None and (monitor, baseline) != (None, None):
            raise ValueError(
                "`monitor` and `baseline` belong to `max_drop`, which is not there. Expected a number, 0 for "
                f"a metric that may not fall. Received: monitor={monitor!r}, baseline={baseline!r}"
            )
        limit = parse_metric_limit(max_drop)
        if limit is not None and not isinstance(max_drop, MetricLimit):
            limit = MetricLimit(max_drop, monitor, baseline)
        self._validation, self._watched = Validation(self._fit_kwargs, self._feed.batch_size, limit), None
        self._score_data = prepare_score_data(
            *(model, self._feed, self._fit_kwargs),
            score_ds=score_ds, num_examples=score_examples, labels=labels,
        )  # fmt: skip
        if not needs_data(criterion, self._score_data.feed):
            self._score_data = None
        self._scorer = RoundScorer(
            *(model, self._read, self._score_data, criterion),
            *(proxy_cost(next(iter(self._goals[-1].targets))), self._fit_kwargs.get("class_weight")),
        )
        if self._goals[-1].measured:  # takes a while, so after all that may be wrong with the call
            self._measure(labeled)
            self._set_out(labeled, self._removal_order_for(labeled)(costs).smallest_mask())
        about = {"goal": self._goals[-1].targets, "criterion": criterion, "round_to": self._limits.round_to}
        self.info = Info.before_a_run(labeled, self._before, exact, **about)
        self._plans, self._inputs = [], None  # of the completed rounds; of repairs
        limits = {f.name: limit and getattr(limit, f.name) for f in dataclasses.fields(MetricLimit)}
        self._backups = None if backup_dir is None else self._open_backups(backup_dir, limits)

    def _removal_order_for(self, labeled):
        """A function of costs to what may go at all: how many units, whichever they are."""
        scores = np.zeros(labeled.num_units)
        return lambda costs: RemovalOrder(labeled, costs, scores, self._limits)

    def _measure(self, labeled):
        """Measures the original and the smallest model; refuses goals out of reach."""
        self._measurements = Measurements(labeled, self._goals[-1].measured, say=self._reporter.say)
        self._before = {**self._before, **self._measurements.before}
        if self._selection.round_to == AUTO:
            self._limits = dataclasses.replace(self._limits, round_to=self._measurements.best_multiple())
        request = RemovalRequest(self._goals[-1].ceilings(self._before), self._given_goal, self._limits)
        arguments = request, self._measurements, lambda mask: draft(labeled, mask)
        check_reachable(labeled, self._removal_order_for(labeled), *arguments)

    def _set_out(self, labeled, least):
        """Finds the steps to the goals; refuses goals out of reach."""
        last = RoundTarget(self._goals[-1].ceilings(self._before), goal_index=len(self._goals) - 1)
        self._steps = schedule_rounds(self._goals, self._before, self._increment)
        if not self._steps and self._limits.bounds(labeled).least.any():
            self._steps = [last]  # the ratios ask for more than the goals
        self._least = self._costs(labeled)(least)
        self._kept(labeled, np.zeros(labeled.num_units), last)

    def until_done(self):
        """Runs the rounds that are left.

        Returns:
            A list: the model of each goal that was reached, and the one where the run ended if it ended
            between two.
        """
        self._announce()
        current, models = self._so_far()
        try:
            while len(self._plans) < len(self._steps) and not self.info.stop_reason:
                small = self._round(current, len(self._plans) + 1)
                if small is None:
                    reason = self._watched.explain_undo(self.info.rounds[-1].metrics, len(self._plans) + 1)
                    self._stop(reason, expected=self._given_goal is None)
                else:
                    current = small
                    if self._steps[len(self._plans) - 1].goal_index is not None:
                        models.append(current)
                self._back_up(current)
        except Diverged as error:
            rate = self._rate or float(keras.ops.convert_to_numpy(self._original.optimizer.learning_rate))
            self._stop(messages.undone(error, len(self._plans), rate))
        except KeyboardInterrupt as interrupt:
            self.info.stop_reason = "interrupted"
            raise CompressionInterrupted(current, self.info, models) from interrupt
        except Exception as error:
            error.add_note(
                messages.what_is_kept(len(self._plans), len(self._steps), self._backups is not None)
            )
            raise
        return self._ended(current, models)

    def _ended(self, current, models):
        if not self.info.stop_reason:
            self.info.stop_reason = "goal reached" if self._steps else "the model keeps to the goal as it is"
        if self._backups is not None and self.info.stop_reason == "goal reached":
            self._backups.finish()
        if not models or (self._plans and models[-1] is not current):
            models.append(current if self._plans else copy_model(self._original))
        if self.info.metrics:
            held = [done.metrics for done in self.info.rounds if done.held]
            self.info.metrics["after"] = held[-1] if held else self.info.metrics["before"]
        return models

    def _stop(self, reason, expected=False):
        """Ends the run before its goal."""
        self.info.stop_reason = reason
        if not expected:
            warnings.warn(reason, stacklevel=4)
        self._reporter.say(f"stopped: {reason}")

    def _open_backups(self, directory, limit):
        """Looks for the state of a run of the same call; refuses that of another."""
        goals = [dict(goal.targets) for goal in self._goals]
        furthest = max(self._goals[-1].fractions_to_remove(self._before).values())
        schedule = [round(step.progress * furthest, 9) for step in self._steps]
        call = describe_call(
            self._original,
            goal=goals if goals[1:] else goals[0],
            schedule=None if self._measurements else schedule,
            increment=self._increment if self._measurements else None,
            criterion=self.info.criterion,
            include=self._include,
            exclude=self._exclude,
            exact=self._exact,
            **{**dataclasses.asdict(self._limits), "round_to": self._selection.round_to},
            **{name: getattr(self._selection, name) for name in ("scope", "rank", "balance")},
            **limit,
            repair=self._repairs,
            distill=self._distill is not False,
            labels="model" if self._score_data and self._score_data.uses_model_labels else "data",
            score_examples=self._score_data and self._score_data.num_examples,
            scores_apart=self._score_data is not None and self._score_data.is_separate,
            epochs=self._fit_kwargs.get("epochs", 1),
            batch_size=self._feed.batch_size,
            steps_per_epoch=self._feed.steps_per_epoch,
            validation_split=self._fit_kwargs.get("validation_split"),
            examples=self._feed.num_examples,
        )
        stops = {number for number, step in enumerate(self._steps, 1) if step.goal_index is not None}
        backups = Backups(directory, call, keep=stops)
        if backups.state is None:
            self._seed = draw_seed()
        else:
            self.info, self._seed = backups.state.info, backups.state.seed
            self._plans = list(backups.state.plans)
            if self._measurements:  # times are never the same again: what was measured then counts
                self._before = self.info.before
                self._limits = dataclasses.replace(self._limits, round_to=self.info.round_to)
                self._steps = schedule_rounds(self._goals, self._before, self._increment)
        return backups

    def _so_far(self):
        """The model that the next round starts from, and those of the goals that are reached already."""
        met = sum(goal.is_met(self._before, self._before) for goal in self._goals)
        models = [copy_model(self._original) for _ in range(met)]
        if not self._plans:
            return self._original, models
        state, self._backups.state = self._backups.state, None  # its arrays need not stay in memory
        self._reporter.say(f"resumed after round {len(self._plans)} of {len(self._steps)} from {state.path}")
        current = restore_model(self._original, state)
        for number, step in enumerate(self._steps[: len(self._plans)], 1):
            if step.goal_index is not None:
                last = number == len(self._plans)
                models.append(
                    current if last else restore_model(self._original, self._backups.of_round(number))
                )
        return current, models

    def _back_up(self, model):
        if self._backups is not None and self._plans:
            self._backups.write(capture(model, self._plans, self.info, self._seed))

    def _round(self, model, number):
        """One round; the smaller model, or `None` if its metric fell too far."""
        self._draw_anew(number)
        clock, step = Clock(), self._steps[number - 1]
        name = f"round {number}/{len(self._steps)}"
        with clock.phase("score"):
            labeled = self._read(model)
            scores = self._scorer.score(labeled, self._plans, self._reporter.callback(f"{name}: scoring"))
        self._draw_anew(number)  # whatever was made for the scores
        with clock.phase("prune"):
            flat = flatten_scores(labeled, scores)
            kept = self._fitting(labeled, flat, step)
            plan = plan_of(labeled, CostModel(labeled), kept, flat)
            total = self.info.plan.compose(plan)
            if not self._trains:  # the original says more than what was repaired before
                labeled = label_model(self._original, exact=self._exact)
                kept = kept_units(labeled, total)
            small = build_smaller_compiled(labeled, kept, compiled_as=self._original, carry=self._carry)
        with clock.phase("repair"):
            repairs = self._repair(labeled, kept, small) if self._repairs else []
        with clock.phase("fit"):
            history, step_losses = self._fine_tune(
                small, model, self._reporter.callback(f"{name}: fine-tuning")
            )
        judged = self._watched is not None or step.goal_index is not None
        measured = (
            self._measurements.measure(small) if self._measurements and step.goal_index is not None else {}
        )
        layers = {n: [p.width, len(p.kept)] for n, p in plan.layers.items()}
        done = Round(
            *(number, {**plan.after, **measured}, layers, history, step_losses, clock.seconds),
            repairs=[repair_record(one) for one in repairs],
            metrics=self._validation.evaluate(small) if judged else {},
        )
        done.held = self._watched is None or self._watched.allows(done.metrics)
        self.info.rounds.append(done)
        self._reporter.say(f"{name}: {messages.described(done, self._before)}")
        if done.held:
            self._accept(plan, total, step)
        gc.collect()  # models are full of cycles: their weights and compiled functions would wait long
        self._reporter.show(self.info)
        return small if done.held else None

    def _draw_anew(self, number):
        """A round depends on its number, not on what was drawn before, so it can be repeated."""
        if self._backups is not None:
            keras.utils.set_random_seed(self._seed + number)

    def _accept(self, plan, total, step):
        self._plans.append(plan)
        self.info.plan, self.info.after = total, dict(self.info.rounds[-1].costs)
        if step.goal_index is not None:
            goal, done = self._goals[step.goal_index], self.info.rounds[-1]
            self.info.stops.append(
                {
                    "goal": dict(goal.targets),
                    "round": done.number,
                    "costs": done.costs,
                    "metrics": done.metrics,
                }
            )

    def _read(self, model):
        return label_model(model, self._include, self._exclude, self._exact, self._grouped)

    def _costs(self, labeled):
        return self._measurements.costs(labeled) if self._measurements else CostModel(labeled)

    def _request(self, step):
        """The `RemovalRequest` of a step."""
        return RemovalRequest(
            *(step.ceilings, self._given_goal, self._limits, self._selection, self._whole, step.progress)
        )

    def _kept(self, labeled, flat, step):
        return choose_kept(labeled, self._costs(labeled), flat, self._request(step))

    def _fitting(self, labeled, flat, step):
        """The units that stay after a step; where a goal is reached, what is measured holds, too."""
        if self._measurements is None or step.goal_index is None:
            return self._kept(labeled, flat, step)

        def removal_order_for(costs):
            return order_removals(labeled, costs, flat, self._request(step))

        arguments = self._request(step), self._measurements, lambda mask: draft(labeled, mask)
        return fitting_units(labeled, removal_order_for, *arguments)[0]

    def _fine_tune(self, small, origin, callbacks):
        if not self._trains:
            return {}, []
        arguments = {**self._feed.fit_arguments(), **self._fit_kwargs}
        with learning_rate_of(small, self._rate):
            trainer = None
            if self._distill:
                self._teacher = self._teacher or copy_model(self._original)
                trainer = distiller(small, self._teacher, self._distill, self._feed.has_targets)
            return fine_tune(small, origin, arguments, callbacks, trainer)

    def _repair(self, labeled, kept, small):
        if self._inputs is None:  # taken from the data once
            num = share_of_trained(count_trained(self._feed, self._fit_kwargs), *_REPAIR)
            self._inputs = sample_inputs(self._feed, graphs.read_model(self._original), num)
        return refit(labeled, kept, small, self._inputs, thorough=not self._trains)

    def _announce(self):
        """Says what will be done, and evaluates the whole model."""
        lines = messages.opening(
            self._original,
            self.info,
            num_rounds=len(self._steps),
            scored=self._score_data and self._score_data.num_examples,
            draws=self._score_data is not None and self._score_data.uses_model_labels,
            repairs=self._repairs,
            carries=self._carry,
            rate=self._rate,
            epochs=self._fit_kwargs.get("epochs", 1),
        )
        for line in [*lines, *describe_reach(self._goals, self._before, self._least)]:
            self._reporter.say(line)
        if not self._plans:
            copy = copy_model(self._original)  # evaluating leaves traces
            metrics = self._validation.evaluate(copy)
            self.info.metrics = {"before": metrics} if metrics else {}
        before = self.info.metrics.get("before", {})
        self._watched = self._validation.watch(before)
        if self._watched is not None:
            self._reporter.say(self._watched.describe(before))
