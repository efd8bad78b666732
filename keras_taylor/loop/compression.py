"""The public verb `compress`."""

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import keras

from keras_taylor.budget.goals import GoalLike
from keras_taylor.budget.schedule import Increment
from keras_taylor.cutting.remade_tasks import as_task
from keras_taylor.loop.compression_run import complete_run
from keras_taylor.loop.fine_tuning import Distill, FineTuning, parse_fine_tuning
from keras_taylor.loop.metric_limits import MOVED_TO_LIMIT, MaxDrop, parse_metric_limits
from keras_taylor.loop.preparation import CompressionSettings, PreparedRun, prepare_run
from keras_taylor.plans.selection import MOVED_TO_SELECTION, Selection
from keras_taylor.reports import messages
from keras_taylor.reports.info import Info
from keras_taylor.scores.criteria import Criterion
from keras_taylor.scores.scoring import Scoring
from keras_taylor.support.arguments import MovedArgument, refuse_moved_arguments, takes_data_as_one
from keras_taylor.support.console import Reporter, expected_tracing
from keras_taylor.support.replicas import is_first_process, strategy_scope
from keras_taylor.support.types import Data, LayerPatterns

# A model, or a list of them for a list of goals; with `return_info` a tuple of that and the `Info`.
CompressionResult: TypeAlias = keras.Model | list[keras.Model] | tuple[keras.Model | list[keras.Model], Info]

# Arguments of earlier versions that are fields of a `Selection`, a `Scoring` or a `MetricLimit` now.
_MOVED = {
    **MOVED_TO_SELECTION,
    **MOVED_TO_LIMIT,
    "score_ds": MovedArgument("criterion", Scoring, "ds"),
    "score_examples": MovedArgument("criterion", Scoring, "num_examples"),
    "labels": MovedArgument("criterion", Scoring, "labels"),
}


@takes_data_as_one
def compress(
    model: keras.Model,
    ds: Data,
    goal: GoalLike | Sequence[GoalLike] | None = 0.3,
    *,
    increment: Increment | None = None,
    criterion: Criterion | Scoring | None = None,
    include: LayerPatterns | None = None,
    exclude: LayerPatterns = (),
    exact: bool = True,
    selection: Selection | None = None,
    repair: bool = True,
    distill: Distill = False,
    learning_rate: float | FineTuning | None = None,
    max_drop: MaxDrop | None = None,
    backup_dir: str | os.PathLike[str] | None = None,
    return_info: bool = False,
    **fit_kwargs: Any,
) -> CompressionResult:
    """Makes a trained model smaller, round by round, and fine-tunes it.

    Every round scores the channels, removes the least important ones, and refits the layers that read them.
    The model is trained where a goal is reached, with the epochs of all rounds that led to it; with
    `max_drop`, a schedule, or without repair, in every round, see `keras_taylor.FineTuning`. Iterative
    pruning with fine-tuning is from Molchanov et al., Pruning Convolutional Neural Networks for Resource
    Efficient Inference, 2017 (arXiv 1611.06440); the default scores extend Molchanov et al., Importance
    Estimation for Neural Network Pruning, 2019 (arXiv 1906.10771), see `keras_taylor.criteria`.

    A round keeps the best state of its model: the one before training, or that after one of the epochs, with
    the optimizer's state of that time. States are compared on `validation_data`, by the metric of `max_drop`,
    or else the loss; with limits on several metrics by the loss, of those that keep to all of them. Without
    `validation_data` a part of `ds` is held out for it, from scores and repair too.
    Of arrays these are random rows, the same ones for the same data: a twentieth, but at least 128, at most
    1024, and never more than a tenth of all. Of data sets it is a copy of the first batches, with as many
    examples, which are trained on as well. There the loss counts, and a gain over the state before training
    has to be larger than half of its standard error. If labels fit the given model's predictions no better
    than chance, or there are none, it is how far predictions are from the given model's. With fewer than 20
    examples and no `validation_data` a repaired model is not trained; a line and `info` say so. A model that
    knows `ds` by heart is judged by what it remembers, so that its best state is a cautious one: pass
    `validation_data`. `learning_rate=FineTuning(keep_best=False)` turns all of this off.

    Args: Start with these
        model: The trained model, a built and compiled Sequential or Functional `keras.Model`. It does not
            change.
        ds: The training data, whatever `model.fit` takes: `(x, y)` or `(x, y, sample_weight)` arrays, a
            tf.data.Dataset, a PyDataset, a DataLoader, or an endless generator with `steps_per_epoch`. With
            `distill` or `epochs=0` inputs without labels are enough.
        goal: How much to remove. A float above 0 and below 1 is the fraction of the
            parameters: 0.3 removes 30 % of `model.count_params()`, frozen parameters and BatchNorm
            statistics included. A dict names one or more costs, and all must hold: "params", "flops" (one
            example's forward pass, a multiply-add counts as two), "activation_memory" (bytes). Some costs
            are measured, on models that are built on the way: "bytes" of the LiteRT file that `export`
            writes ("bytes:litert-int8", "bytes:onnx", ...: of another variant), "latency" of one call with
            one example on this machine ("latency:litert", ...: of an exported file). A float is the
            fraction to remove, an int the most that may be left (latencies in milliseconds); measured
            amounts may have a unit: `{"params": 200_000, "flops": 0.5}`, `{"bytes:litert-int8": "256 KiB",
            "latency": "2.5 ms"}`. A list of goals makes stops on one way down; each must ask for more than
            the one before. `None`: as far as `max_drop` allows. Default 0.3.
        **fit_kwargs: Arguments of `model.fit`: `epochs` (a round, default 1; 0: no fine-tuning; the epochs of
            all rounds that lead to a goal are trained there), `batch_size`, `validation_data`, `callbacks`,
            `class_weight`, ... Each training starts with the same learning rate, and with the momentum and
            moments of the channels that stayed. If the optimizer follows a schedule, it starts again in each
            training, its momentum too: both count the same steps. `verbose` is 0 (silent), 1 (a live bar; in
            a notebook also the table and plot of the rounds), 2 (lines only) or "auto" (whichever suits the
            output, the default).
        increment: The fraction of the original to remove in a round, of the cost that has most to lose, a
            float above 0 and at most 1; or a function from the round's number (from 1 on) to the fraction
            that is gone after it. `None` (the default): 0.05 where every round is trained. Else rounds of
            equal size that remove at most 0.25, since smaller ones take longer and keep no more; a goal is
            trained for with the epochs of rounds of 0.05.
        max_drop: How much worse a metric on `validation_data` may become, a float of 0 or more, or a
            `MetricLimit`. A dict sets a limit for each metric that it names: `{"digit_accuracy": 0.01,
            "speaker_accuracy": 0.02}`. After each round metrics are compared with those of the given model.
            A round that goes too far in one of them is undone and ends the run. `None` (the default): no
            limit.
        exclude: Layers whose channels stay: layer names, regular expressions that match whole names, or
            layers. Default `()`.
        backup_dir: Directory, made if it is missing, that keeps the state of the run after each round. The
            same call after a crash, a kill or Ctrl-C goes on with the round that was not completed, and
            after the last round it returns the finished model at once. Each round starts with
            `keras.utils.set_random_seed` of a number that is drawn at the start of the run from NumPy's
            global state. So a resumed run draws the same random numbers as one that was never stopped: for
            shuffling arrays, dropout, callbacks that draw from global generators. That does not hold for
            your own generators, for data sets that shuffle themselves, and for the state of callbacks: data
            and callbacks are not kept. Only one run at a time may use a directory; of several processes of
            a run only the first one uses it. `None` (the default): nothing is kept, nothing is seeded.
        return_info: Whether to return an `Info` too. Default `False`.

    Args: Rarely needed
        criterion: What makes a channel important: a name of the table in
            `keras_taylor.criteria`, a function from a `GroupStatistics` to an array `(num_units,)`,
            or a `Scoring`, which also says from which examples and labels. `None` (the default): "log_odds"
            for a classifier with one output, a cross-entropy and labels, if `repair` is on; else "taylor".
        selection: A `Selection`: how scores lead to a choice, what single layers lose, multiples of
            channels. `selection=keras_taylor.Selection(round_to=8)` keeps a multiple of 8 channels in every
            group. `None` (the default): `Selection()`.
        include: Prune only the channels that these layers make, in the same form as `exclude`. `None` (the
            default): all.
        exact: `False`: channels that are normalized together may leave too, such as the residual stream of
            a transformer or a ConvNeXt, although the others change then (see `analyze`). Default `True`.
        repair: Whether to refit the layers that lost inputs, by least squares, after each cut (see
            `keras_taylor.repair`), on at most 1024 examples. They are fitted to the original, or to the model
            of the round before once training has changed it. Default `True`.
        distill: Fine-tune with the given model as the teacher (`keras.distillation.Distiller`). `True`: the
            student imitates the outputs (Hinton et al., 2015, arXiv 1503.02531). A
            `keras.distillation.DistillationLoss` or a list of them: it imitates what these say, features
            for instance. The compiled loss on the labels makes up half of the loss, or none of it if `ds`
            has no labels; weights of examples and classes count in that half. Default `False`.
        learning_rate: Learning rate that training begins with, a float above 0, or a `FineTuning`, which
            also says which rounds are trained, and whether the best state is kept. Within the round it falls
            to zero by a cosine. `None`
            (the default): the compiled rate if `repair` is off. Otherwise a tenth of it, since a repaired
            model has less to learn and more to lose; in rounds of 240 steps or more, short trials on the same
            batches find a higher one: up to five rates, each three times the one before, in at most a tenth
            of the round's steps. The highest one that does no harm is taken, at most the one above the best
            trial's (after Smith, Cyclical Learning Rates, 2017, arXiv 1506.01186). A schedule
            that the optimizer was compiled with is kept. Your own callbacks that set the rate (cycles,
            rewinding) have the last word. The result has the compiled rate again.

    Returns:
        A plain, smaller `keras.Model`, fine-tuned and compiled as `model` is. With `return_info=True` a
        tuple of it and an `Info`. For a list of goals a list of models instead: one for each goal that was
        reached, and that of the last round if the run ended between two goals. If the loss or a weight
        becomes NaN or infinite in fine-tuning, a warning says so, and the round keeps the best state before
        that. With `FineTuning(keep_best=False)` that round is undone and ends the run: the model is that of
        the round before (an unpruned copy if there is none). With `backup_dir` the same call for a model that
        is compiled with a lower learning rate goes on from there.

    Raises:
        ValueError: Before any work, for a goal that cannot be reached, data that does not fit, a model that
            is not compiled, a `backup_dir` that cannot be written to or holds the state of another call.
        TypeError: For keyword arguments that neither `compress` nor `fit` has.
        CompressionInterrupted: On Ctrl-C, with the last complete round's model.

    Example:

    >>> small = keras_taylor.compress(model, (x, y), goal=0.3, epochs=2)
    >>> models = keras_taylor.compress(model, (x, y), goal=[0.2, 0.4, 0.6], epochs=2)
    >>> validation = {"max_drop": 0.01, "validation_data": (x_val, y_val)}
    >>> small = keras_taylor.compress(model, (x, y), goal=None, increment=0.3, **validation)
    """
    given = {"criterion": criterion, "max_drop": max_drop}
    refuse_moved_arguments("compress", fit_kwargs, _MOVED, given, takes_others=True)
    verbose = fit_kwargs.pop("verbose", "auto")
    settings = CompressionSettings(
        goal=goal,
        increment=increment,
        scoring=criterion if isinstance(criterion, Scoring) else Scoring(criterion),
        include=include,
        exclude=exclude,
        exact=exact,
        selection=Selection() if selection is None else selection,
        repair=repair,
        distill=distill,
        tuning=parse_fine_tuning(learning_rate),
        limits=parse_metric_limits(max_drop),
        backup_dir=backup_dir,
        fit_kwargs=fit_kwargs,
    )
    reporting = Reporter(verbose if is_first_process() else 0)
    with strategy_scope(model), expected_tracing(), reporting as reporter:
        run = prepare_run(model, ds, settings, reporter)
        run.info.command = messages.format_call(_arguments_to_repeat(run, learning_rate, max_drop))
        with contextlib.nullcontext() if run.backups is None else run.backups.held():
            state = complete_run(run)
        models = [as_task(one) for one in state.models]
    result = models if isinstance(goal, (list, tuple)) else models[-1]
    return (result, state.info) if return_info else result


def _arguments_to_repeat(
    run: PreparedRun, learning_rate: float | FineTuning | None, max_drop: MaxDrop | None
) -> Mapping[str, Any]:
    """The arguments of a call that repeats a run; those that have their default value are left out.

    The criterion is the one that was chosen. Layers are written as name patterns. `backup_dir` and
    `verbose` do not change the result.
    """
    settings = run.settings
    scoring = settings.scoring
    is_plain = scoring.ds is None and scoring.num_examples is None and scoring.labels is None
    given = {
        "increment": settings.increment,
        "include": run.reader.include,
        "exclude": run.reader.exclude,
        "exact": settings.exact,
        "selection": settings.selection,
        "repair": settings.repair,
        "distill": settings.distill,
        "learning_rate": learning_rate,
        "max_drop": max_drop,
    }
    defaults = {name: one.default for name, one in inspect.signature(compress).parameters.items()}
    defaults.update(exclude=[], selection=Selection())
    changed = {name: value for name, value in given.items() if value != defaults[name]}
    criterion = (
        run.scorer.criterion if is_plain else dataclasses.replace(scoring, criterion=run.scorer.criterion)
    )
    return {"goal": settings.goal, "criterion": criterion, **changed, **settings.fit_kwargs}
