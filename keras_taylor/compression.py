"""The whole loop (`compress`)."""

import dataclasses
import warnings
from collections.abc import Iterator

import keras
import numpy as np

from keras_taylor import graph as graphs
from keras_taylor import wording
from keras_taylor.backups import Backups, capture, describe_call, rebuild
from keras_taylor.costs import CostModel, check_countable
from keras_taylor.datasets import Feed
from keras_taylor.distilling import check_trainable, distiller
from keras_taylor.fine_tuning import (
    Diverged,
    check_fit_arguments,
    evaluate,
    fine_tune,
    fine_tuning_rate,
    learning_rate_of,
)
from keras_taylor.groups import layer_names, read_channels
from keras_taylor.opening import view_to_train
from keras_taylor.optimizers import has_schedule
from keras_taylor.plan import (
    Plan,
    Removable,
    flat_scores,
    kept_units,
    parse_goal,
    plan_of,
    units_to_keep,
)
from keras_taylor.progress import Clock, Reporter
from keras_taylor.refitting import refit
from keras_taylor.report import Info, Round
from keras_taylor.round_scores import RoundScores, default_criterion
from keras_taylor.schedule import fractions
from keras_taylor.scoring import check_compiled, check_labels, draws_labels
from keras_taylor.surgery import cut, whole_copy
from keras_taylor.walk import example_inputs


class CompressionInterrupted(KeyboardInterrupt):
    """Ctrl-C during `compress`.

    Attributes:
        model: The model of the last complete round (the one given, if there is none).
        info: The `Info` of the rounds that were completed.
    """

    def __init__(self, model, info):
        super().__init__(f"interrupted after {len(info.rounds)} complete rounds; see .model and .info")
        self.model = model
        self.info = info


def compress(
    model,
    ds,
    goal=0.3,
    *,
    increment=0.05,
    criterion=None,
    score_ds=None,
    score_examples=None,
    include=None,
    exclude=(),
    exact=True,
    round_to=1,
    min_channels=1,
    repair=True,
    labels=None,
    distill=False,
    learning_rate=None,
    backup_dir=None,
    return_info=False,
    verbose="auto",
    **fit_kwargs,
):
    """Makes a trained model smaller: score every channel, prune the least important, fine-tune; again.

    Args:
        model: A built and compiled Sequential or Functional Keras model. It is not changed.
        ds: Training data, whatever `model.fit` takes: `(x, y)` or `(x, y, sample_weight)`
            arrays, a tf.data.Dataset, a PyDataset, a DataLoader, or an endless generator
            with `steps_per_epoch`. With `epochs=0` inputs without labels will do.
        goal: Fraction of the parameters to remove (0.3 is 30 % of `model.count_params()`,
            frozen ones and BatchNorm statistics counted); or `{"params": 0.3}`, or
            `{"flops": 0.5}`.
        increment: Fraction of the original removed a round, or a function from the
            round's number to the fraction gone after it.
        criterion: What makes a channel important, see `keras_taylor.criteria`. `None`: "log_odds" for
            a classifier with one output, a cross-entropy and labels, where `repair` is on; else "taylor".
        score_ds: Other data for the scores, in any form that `ds` may have: examples that the model
            was not trained on, say, where those of `ds` are known by heart and tell little.
        score_examples: Examples a scoring pass; `None`: all, at most 10,000.
        include, exclude: Layer names, regular expressions that match whole names, or
            layers: prune only the channels that these make / none of them.
        exact: `False`: channels that are normalised together may leave, too, as the residual stream of
            a transformer or a ConvNeXt (see `analyze`).
        round_to: Every group of channels keeps a multiple of this many.
        min_channels: Every group keeps at least so many.
        repair: Refit the layers that lost inputs by least squares on at most 512 examples after each
            cut (see `keras_taylor.repair`): with `epochs=0` to the original, else, before
            fine-tuning, to the model of the round before.
        labels: What scores take for labels: "data" those of `ds`, "model" ones drawn from the model's
            own predictions in each round, `None` those of `ds` if it has some.
        distill: Fine-tune with the given model as the teacher (`keras.distillation.Distiller`): `True`
            for its outputs, or a `keras.distillation.DistillationLoss` or a list of such (features).
            Half of the loss is the compiled one on the labels, all of it the teacher's where `ds`
            has none. Weights of examples and classes are then refused: the distiller ignores them.
        learning_rate: A float: that of the fine-tuning. `None`: the compiled one where `repair` is off,
            a tenth of it after a repair, which leaves less to learn and more to lose. A schedule that
            the optimizer was compiled with is kept; callbacks of yours that set the rate (cycles,
            rewinding) have the last word. The result is compiled as `model`.
        backup_dir: Directory, made if missing, that keeps the state of the run after each
            round: the same call after a crash, a kill or Ctrl-C goes on with the round that
            was not completed, and after the last one returns the finished model at once.
            Each round then starts with `keras.utils.set_random_seed` of a number drawn at
            the start of the run from NumPy's global state, so a run that was resumed takes
            the same random numbers as one that was not: shuffling of arrays, dropout, what
            callbacks draw from global generators. Not so generators of the caller's own,
            the order in a data set that shuffles by itself, and the state of callbacks:
            data and callbacks are not kept. One run at a time may use a directory. `None`:
            nothing is kept, nothing is seeded.
        return_info: Also return an `Info`.
        verbose: 0 is silent, 1 a live bar (in a notebook the table and plot of the rounds too), 2 lines
            only, "auto" whichever suits the output.
        **fit_kwargs: What `model.fit` takes: `epochs` (a round; 0: no fine-tuning),
            `batch_size`, `validation_data`, `callbacks`, `class_weight`, ... Each round
            starts with the same learning rate, and with the momentum and moments of the channels
            that stayed. With a learning rate schedule both start anew: they count the same steps.

    Returns:
        A plain, smaller Keras model, fine-tuned, compiled as `model`; with
        `return_info=True` a tuple of it and an `Info`. If the loss, or a weight, becomes
        NaN or infinite in fine-tuning, that round is undone, a warning says so, and the
        model is that of the round before (an unpruned copy, if there is none); with
        `backup_dir` the same call for a model that is compiled with a lower learning
        rate goes on from there.

    Raises:
        ValueError: before any work, for a goal that cannot be reached, data that does
            not fit, a model that is not compiled, a `backup_dir` that cannot be written
            to or holds the state of another call. The given model is untouched.
        TypeError: for keyword arguments that neither `compress` nor `fit` has.
        CompressionInterrupted: on Ctrl-C, with the last complete round's model.

    Example:

    >>> small = keras_taylor.compress(model, (x, y), goal=0.3, epochs=2)
    """
    check_fit_arguments(fit_kwargs)
    run = _Run(
        model, ds, goal, increment, criterion, score_ds, score_examples, include, exclude, exact,
        round_to, min_channels, repair, labels, distill, learning_rate, backup_dir, fit_kwargs,
    )  # fmt: skip
    run.info.command = wording.as_call(
        goal=goal, increment=increment, criterion=run.info.criterion, include=include, exclude=exclude,
        exact=exact, round_to=round_to, min_channels=min_channels, repair=repair,
        distill=distill is not False, learning_rate=learning_rate, **fit_kwargs,
    )  # fmt: skip
    with Reporter(verbose) as reporter:
        small = run.until_done(reporter)
    return (small, run.info) if return_info else small


class _Run:
    """One call of `compress`: everything checked when it is made, then round by round."""

    def __init__(
        self, model, ds, goal, increment, criterion, score_ds, score_examples, include, exclude, exact,
        round_to, min_channels, repair, labels, distill, learning_rate, backup_dir, fit_kwargs,
    ):  # fmt: skip
        what, fraction = parse_goal(goal)
        model = view_to_train(model)
        check_compiled(model, "`compress`")
        self._original, self._goal, self._what = model, goal, what
        self._fit_kwargs = dict(fit_kwargs)
        self._include = layer_names(model, include)
        self._exclude, self._exact = layer_names(model, exclude), exact
        self._limits = {"round_to": round_to, "min_channels": min_channels}
        self._carry = not has_schedule(model.optimizer)
        channels = self._read(model)
        costs = CostModel(channels)
        self._before = costs()
        check_countable(self._before, what, f"goal={goal!r}")
        self._fractions = fractions(fraction, increment)
        self._ceilings = [self._before[what] * (1 - f) for f in self._fractions]
        # refused now if out of reach: which units go does not matter, how many can does
        self._kept(channels, costs, np.zeros(channels.num_units), self._ceilings[-1])
        self._feed = Feed(
            ds,
            model,
            self._fit_kwargs.pop("batch_size", None),
            self._fit_kwargs.pop("steps_per_epoch", None),
            self._fit_kwargs.pop("sample_weight", None),
            targets=check_labels(labels) == "data",
        )
        criterion = criterion or default_criterion(channels, repair, draws_labels(self._feed, labels))
        self._trains = self._fit_kwargs.get("epochs", 1) != 0
        if self._trains:
            check_trainable(self._feed, self._fit_kwargs, distill)
        self._distill, self._teacher = distill, None
        self._repairs = repair
        self._rate = fine_tuning_rate(model.optimizer, learning_rate, repair) if self._trains else None
        self._scores = RoundScores(
            model, self._feed, score_ds, criterion, labels, score_examples, what, self._fit_kwargs
        )
        name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", repr(criterion))
        self.info = Info(
            goal={what: fraction},
            criterion=name,
            before=self._before,
            after=self._before,
            plan=Plan(before=self._before, after=self._before, exact=exact),
            locked={g.name: {"channels": g.num_units, "reason": g.reason} for g in channels.locked},
            inexact={
                g.name: {"channels": g.num_units, "changes": list(g.normalised_by)}
                for g in channels.groups
                if g.normalised_by
            },
            unknown=tuple(channels.unknown),
            name=model.name,
            layers={name: stop - start for start, stop, name in channels.space.producers},
        )
        self._plans = []  # of the completed rounds
        self._inputs = None
        self._backups = None if backup_dir is None else self._open_backups(backup_dir)

    def until_done(self, reporter):
        """Runs the rounds that are left; returns the last one's model."""
        self._announce(reporter)
        if not self._plans:
            self._measure("before", self._original)
        current = self._model_so_far(reporter)
        try:
            for number in range(len(self._plans) + 1, len(self._ceilings) + 1):
                current = self._round(current, number, reporter)
                self._back_up(current)
        except Diverged as error:
            return self._undone(current, error, reporter)
        except KeyboardInterrupt as interrupt:
            self.info.stop_reason = "interrupted"
            raise CompressionInterrupted(current, self.info) from interrupt
        except Exception as error:
            error.add_note(
                wording.what_is_kept(len(self._plans), len(self._ceilings), self._backups is not None)
            )
            raise
        self.info.stop_reason = "goal reached"
        self._measure("after", current)
        if self._backups is not None:
            self._backups.finish()
        return current

    def _measure(self, when, model):
        """Loss and metrics on the validation data, unless they can be read only once."""
        data = self._fit_kwargs.get("validation_data")
        if data is not None and not isinstance(data, Iterator):
            # evaluating leaves traces
            copy = whole_copy(self._original) if model is self._original else model
            size = self._fit_kwargs.get("validation_batch_size") or self._feed.batch_size
            self.info.metrics[when] = evaluate(copy, data, size, self._fit_kwargs.get("validation_steps"))

    def _open_backups(self, directory):
        """Looks for the state of a run of the same call; refuses that of another."""
        call = describe_call(
            self._original,
            goal=self.info.goal,
            schedule=self._fractions,
            criterion=self.info.criterion,
            include=self._include,
            exclude=self._exclude,
            exact=self._exact,
            **self._limits,
            repair=self._repairs,
            distill=self._distill is not False,
            labels="model" if self._scores.draws else "data",
            score_examples=self._scores.num_examples,
            scores_apart=self._scores.apart,
            epochs=self._fit_kwargs.get("epochs", 1),
            batch_size=self._feed.batch_size,
            steps_per_epoch=self._feed.steps_per_epoch,
            validation_split=self._fit_kwargs.get("validation_split"),
            examples=self._feed.num_examples,
        )
        backups = Backups(directory, call)
        if backups.state is None:
            self._seed = int(np.random.randint(2**31 - 1))
        else:
            self.info, self._seed = backups.state.info, backups.state.seed
            self._plans = list(backups.state.plans)
        return backups

    def _model_so_far(self, reporter):
        if not self._plans:
            return self._original
        state, self._backups.state = self._backups.state, None  # its arrays need not stay in memory
        reporter.say(f"resumed after round {len(self._plans)} of {len(self._ceilings)} from {state.path}")
        return rebuild(self._original, state)

    def _back_up(self, model):
        if self._backups is not None:
            self._backups.write(capture(model, self._plans, self.info, self._seed))

    def _undone(self, last_good, error, reporter):
        """The result where fine-tuning diverged: that of the round before."""
        rate = self._rate or float(keras.ops.convert_to_numpy(self._original.optimizer.learning_rate))
        self.info.stop_reason = wording.undone(error, len(self._plans), rate)
        warnings.warn(self.info.stop_reason, stacklevel=4)
        reporter.say(f"stopped: {self.info.stop_reason}")
        if self._plans:
            return last_good
        return whole_copy(self._original)

    def _round(self, model, number, reporter):
        if self._backups is not None:
            # a round depends on its number, not on what was drawn before, so it can be repeated
            keras.utils.set_random_seed(self._seed + number)
        clock = Clock()
        name = f"round {number}/{len(self._ceilings)}"
        with clock.phase("score"):
            channels = self._read(model)
            scores = self._scores(channels, len(self._plans), reporter.callback(f"{name}: scoring"))
        with clock.phase("prune"):
            costs = CostModel(channels)
            kept = self._kept(channels, costs, flat_scores(channels, scores), self._ceilings[number - 1])
            plan = plan_of(channels, costs, kept)
            total = self.info.plan.compose(plan)
            if not self._trains:  # the original says more than what was repaired before
                channels = read_channels(self._original, exact=self._exact)
                kept = kept_units(channels, total)
            small = cut(channels, kept, compiled_as=self._original, carry=self._carry)
        with clock.phase("repair"):
            repairs = refit(channels, kept, small, self._examples()) if self._repairs else []
        with clock.phase("fit"):
            history, step_losses = self._fine_tune(small, model, reporter.callback(f"{name}: fine-tuning"))
        self._plans.append(plan)
        self.info.plan = total
        self.info.after = dict(plan.after)
        layers = {n: [p.width, len(p.kept)] for n, p in plan.layers.items()}
        done = Round(
            *(number, plan.after["params"], plan.after["flops"], layers, history, step_losses, clock.seconds),
            repairs=[dataclasses.asdict(one) for one in repairs],
        )
        self.info.rounds.append(done)
        reporter.say(f"{name}: {wording.described(done, self._before)}")
        reporter.show(self.info)
        return small

    def _read(self, model):
        return read_channels(model, self._include, self._exclude, self._exact)

    def _kept(self, channels, costs, flat, ceiling):
        removable = Removable(channels, costs, flat, **self._limits)
        return units_to_keep(channels, costs, removable, self._what, ceiling, self._goal)

    def _fine_tune(self, small, origin, callbacks):
        if not self._trains:
            return {}, []
        arguments = {**self._feed.fit_arguments(), **self._fit_kwargs}
        with learning_rate_of(small, self._rate):
            trainer = None
            if self._distill:
                self._teacher = self._teacher or whole_copy(self._original)
                trainer = distiller(small, self._teacher, self._distill, self._feed.has_targets)
            return fine_tune(small, origin, arguments, callbacks, trainer)

    def _examples(self):
        """What layers are refitted on; taken from the data once."""
        if self._inputs is None:
            self._inputs = example_inputs(self._feed, graphs.read(self._original))
        return self._inputs

    def _announce(self, reporter):
        lines = wording.opening(
            self._original,
            self.info,
            num_rounds=len(self._ceilings),
            scored=self._scores.num_examples if self._scores.needs_data else None,
            draws=self._scores.draws,
            repairs=self._repairs,
            carries=self._carry,
            rate=self._rate,
            epochs=self._fit_kwargs.get("epochs", 1),
        )
        for line in lines:
            reporter.say(line)
