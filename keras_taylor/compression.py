"""The whole loop (`compress`)."""

import contextlib
import inspect
import time

import keras
import numpy as np

from keras_taylor import criteria
from keras_taylor.costs import CostModel
from keras_taylor.datasets import Feed
from keras_taylor.groups import layer_names, read_channels
from keras_taylor.plan import (
    Plan,
    Removable,
    check_countable,
    flat_scores,
    parse_goal,
    plan_of,
    units_to_keep,
)
from keras_taylor.progress import Reporter
from keras_taylor.report import Info, Round
from keras_taylor.schedule import fractions
from keras_taylor.scoring import check_compiled, needs_data, score_channels
from keras_taylor.surgery import cut

# Examples of a scoring pass where the caller does not say: more hardly move the ranking.
_SCORE_EXAMPLES = 10_000


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
    criterion="taylor",
    score_examples=None,
    include=None,
    exclude=(),
    round_to=1,
    min_channels=1,
    return_info=False,
    verbose="auto",
    **fit_kwargs,
):
    """Makes a trained model smaller: score every channel, prune the least important, fine-tune; again.

    Args:
        model: A built and compiled Sequential or Functional Keras model. It is not changed.
        ds: Training data, whatever `model.fit` takes: `(x, y)` or `(x, y, sample_weight)`
            arrays, a tf.data.Dataset, a PyDataset, a DataLoader, or an endless generator
            with `steps_per_epoch`.
        goal: Fraction of the parameters to remove (0.3 is 30 % of `model.count_params()`,
            frozen ones and BatchNorm statistics counted); or `{"params": 0.3}`, or
            `{"flops": 0.5}`.
        increment: Fraction of the original removed a round, or a function from the
            round's number to the fraction gone after it.
        criterion: What makes a channel important, see `keras_taylor.criteria`.
        score_examples: Examples a scoring pass; `None`: all, at most 10,000.
        include, exclude: Layer names, regular expressions that match whole names, or
            layers: prune only the channels that these make / none of them.
        round_to: Every group of channels keeps a multiple of this many.
        min_channels: Every group keeps at least so many.
        return_info: Also return an `Info`.
        verbose: 0 is silent, 1 a live bar, 2 lines only, "auto" whichever suits the output.
        **fit_kwargs: What `model.fit` takes: `epochs` (a round; 0: no fine-tuning),
            `batch_size`, `validation_data`, `callbacks`, `class_weight`, ... Each round
            starts with a new optimizer of the configuration that `model` was compiled with.

    Returns:
        A plain, smaller Keras model, fine-tuned, compiled as `model`; with
        `return_info=True` a tuple of it and an `Info`.

    Raises:
        ValueError: before any work, for a goal that cannot be reached, data that does
            not fit, a model that is not compiled; later, if the loss becomes NaN. The
            given model is untouched.
        TypeError: for keyword arguments that neither `compress` nor `fit` has.
        CompressionInterrupted: on Ctrl-C, with the last complete round's model.

    Example:

    >>> small = keras_taylor.compress(model, (x, y), goal=0.3, epochs=2)
    """
    _check_fit_arguments(fit_kwargs)
    run = _Run(
        model, ds, goal, increment, criterion, score_examples,
        include, exclude, round_to, min_channels, fit_kwargs,
    )  # fmt: skip
    with Reporter(verbose) as reporter:
        small = run.until_done(reporter)
    return (small, run.info) if return_info else small


class _Run:
    """One call of `compress`: everything checked when it is made, then round by round."""

    def __init__(
        self, model, ds, goal, increment, criterion, score_examples,
        include, exclude, round_to, min_channels, fit_kwargs,
    ):  # fmt: skip
        what, fraction = parse_goal(goal)
        criteria.get(criterion)
        check_compiled(model, "`compress`")
        self._original, self._goal, self._what = model, goal, what
        self._criterion, self._fit_kwargs = criterion, dict(fit_kwargs)
        self._include = layer_names(model, include)
        self._exclude = layer_names(model, exclude)
        self._limits = {"round_to": round_to, "min_channels": min_channels}
        channels = self._read(model)
        costs = CostModel(channels)
        self._before = costs()
        check_countable(self._before, what, goal)
        self._ceilings = [self._before[what] * (1 - f) for f in fractions(fraction, increment)]
        # refused now if out of reach: which units go does not matter, how many can does
        self._kept(channels, costs, np.zeros(channels.num_units), self._ceilings[-1])
        self._feed = Feed(
            ds,
            model,
            self._fit_kwargs.pop("batch_size", None),
            self._fit_kwargs.pop("steps_per_epoch", None),
            self._fit_kwargs.pop("sample_weight", None),
        )
        self._score_examples = self._num_scored(score_examples)
        name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", repr(criterion))
        self.info = Info(
            goal={what: fraction},
            criterion=name,
            before=self._before,
            after=self._before,
            plan=Plan(before=self._before, after=self._before),
            locked={g.name: {"channels": g.num_units, "reason": g.reason} for g in channels.locked},
            unknown=tuple(channels.unknown),
        )

    def until_done(self, reporter):
        """Runs the rounds; returns the last one's model."""
        current = self._original
        self._announce(reporter)
        try:
            for number, ceiling in enumerate(self._ceilings, 1):
                current = self._round(current, number, ceiling, reporter)
        except KeyboardInterrupt as interrupt:
            self.info.stop_reason = "interrupted"
            raise CompressionInterrupted(current, self.info) from interrupt
        self.info.stop_reason = "goal reached"
        return current

    def _round(self, model, number, ceiling, reporter):
        clock = _Clock()
        name = f"round {number}/{len(self._ceilings)}"
        with clock.phase("score"):
            channels = self._read(model)
            scores = self._scores(channels, reporter.callback(f"{name}: scoring"))
        with clock.phase("prune"):
            costs = CostModel(channels)
            kept = self._kept(channels, costs, flat_scores(channels, scores), ceiling)
            plan = plan_of(channels, costs, kept)
            small = cut(channels, kept, compiled_as=self._original)
        with clock.phase("fit"):
            history, step_losses = self._fine_tune(small, reporter.callback(f"{name}: fine-tuning"), number)
        self.info.plan = self.info.plan.compose(plan)
        self.info.after = dict(plan.after)
        layers = {n: [p.width, len(p.kept)] for n, p in plan.layers.items()}
        done = Round(
            number, plan.after["params"], plan.after["flops"], layers, history, step_losses, clock.seconds
        )
        self.info.rounds.append(done)
        reporter.say(f"{name}: {_described(done, self._before)}")
        return small

    def _read(self, model):
        return read_channels(model, self._include, self._exclude)

    def _scores(self, channels, callbacks):
        feed = self._feed if needs_data(self._criterion, self._feed) else None
        class_weight = self._fit_kwargs.get("class_weight")
        return score_channels(channels, feed, self._criterion, self._score_examples, class_weight, callbacks)

    def _kept(self, channels, costs, flat, ceiling):
        removable = Removable(channels, costs, flat, **self._limits)
        return units_to_keep(channels, costs, removable, self._what, ceiling, self._goal)

    def _fine_tune(self, small, callbacks, number):
        losses = _StepLosses()
        arguments = {**self._feed.fit_arguments(), **self._fit_kwargs}
        if arguments.get("epochs", 1) == 0:
            return {}, []
        arguments["callbacks"] = [*(self._fit_kwargs.get("callbacks") or []), *callbacks, losses]
        history = small.fit(**arguments, verbose=0).history
        if not np.isfinite(losses.values).all():
            step = int(np.argmin(np.isfinite(losses.values)))
            raise ValueError(
                f"The loss became NaN or infinite in round {number}, at fine-tuning step {step}. Lower "
                "the learning rate with which the model is compiled, or look for NaN in the data. The "
                f"model that was given is untouched. Received: losses={losses.values[: step + 1][-3:]}"
            )
        return {key: [float(v) for v in values] for key, values in history.items()}, losses.values

    def _num_scored(self, score_examples):
        if score_examples is not None:
            return score_examples
        available = self._feed.num_examples or _SCORE_EXAMPLES
        return min(_SCORE_EXAMPLES, int(available * (1 - (self._fit_kwargs.get("validation_split") or 0))))

    def _announce(self, reporter):
        before, what = self._before, self._what
        goal, unit = self.info.goal[what], {"params": "parameters", "flops": "FLOPs"}[what]
        trainable = sum(int(np.prod(w.shape)) for w in self._original.trainable_weights)
        detail = f" ({trainable:,} trainable)" if what == "params" else ""
        reporter.say(
            f"remove {100 * goal:.4g} % of {before[what]:,} {unit}{detail}; rounds: {len(self._ceilings)}; "
            f"in each: '{self.info.criterion}' scores{self._source_of_scores()}, then fine-tuning with a "
            f"new optimizer, epochs: {self._fit_kwargs.get('epochs', 1)}"
        )
        frozen = [layer.name for layer in self._original.layers if layer.weights and not layer.trainable]
        if frozen:
            names = ", ".join(frozen[:5]) + (", ..." if len(frozen) > 5 else "")
            reporter.say(f"frozen, so pruned but not fine-tuned: {len(frozen)} layers ({names})")
        if self.info.unknown:
            reporter.say(f"without a rule, so what they read stays: {', '.join(self.info.unknown)}")

    def _source_of_scores(self):
        if not needs_data(self._criterion, self._feed):
            return " without data"
        return f" from at most {self._score_examples:,} examples"


class _StepLosses(keras.callbacks.Callback):
    """The loss of every training step, out of the running mean that Keras keeps."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_epoch_begin(self, epoch, logs=None):
        self._total = self._count = 0.0

    def on_train_batch_end(self, batch, logs=None):
        tracker = self.model.metrics[0]
        total, count = (float(keras.ops.convert_to_numpy(v)) for v in (tracker.total, tracker.count))
        steps = count - self._count
        self.values.append((total - self._total) / steps if steps else float("nan"))
        self._total, self._count = total, count


class _Clock:
    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def phase(self, name):
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _described(done, before):
    parts = [f"{done.params:,} parameters left ({1 - done.params / before['params']:.1%} gone)"]
    if done.flops is not None:
        parts.append(f"{1 - done.flops / before['flops']:.1%} of FLOPs gone")
    parts += [f"{name} {values[-1]:.4g}" for name, values in done.history.items() if values]
    return ", ".join(parts) + f", {sum(done.seconds.values()):.1f} s"


def _check_fit_arguments(fit_kwargs):
    known = set(inspect.signature(keras.Model.fit).parameters) - {"self", "x", "y", "verbose"}
    unknown = sorted(set(fit_kwargs) - known)
    if unknown:
        raise TypeError(
            f"`compress` has no argument {unknown[0]!r}, nor has `model.fit`. Expected arguments of "
            f"`compress`, or of `fit`: {', '.join(sorted(known))}. "
            f"Received: {unknown[0]}={fit_kwargs[unknown[0]]!r}"
        )
