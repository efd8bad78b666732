"""The whole loop (`compress`)."""

from keras_taylor.loop import messages
from keras_taylor.loop.compression_run import CompressionRun
from keras_taylor.loop.fine_tuning import check_fit_arguments
from keras_taylor.support.console import Reporter
from keras_taylor.support.replicas import is_first_process, strategy_scope


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
    ratios=None,
    scope="global",
    rank=None,
    balance=0.5,
    round_to=1,
    min_channels=1,
    repair=True,
    labels=None,
    distill=False,
    learning_rate=None,
    max_drop=None,
    monitor=None,
    baseline=None,
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
            frozen ones and BatchNorm statistics counted); or a dict of one or more costs, which must all
            hold: "params", "flops" (one example's forward pass, a multiply-add counted as two),
            "activation_memory" (bytes, see `costs.CostModel`); and what is measured of models that are
            built on the way: "bytes" of the LiteRT file that `export` writes ("bytes:litert-int8",
            "bytes:onnx", ...: of another one) and "latency" of one call for one example on this machine
            ("latency:litert", ...: of an exported file). A float is the fraction to remove, an int what
            may be left (of latencies in milliseconds); amounts that are measured may have a unit:
            `{"params": 200_000, "flops": 0.5}`, `{"bytes:litert-int8": "256 KiB", "latency": "2.5 ms"}`.
            A list of goals, each asking for more than the one before, makes stops on one way down.
            `None`: as far as `max_drop` allows.
        increment: Fraction of the original removed a round (of the cost of which most must go), or a
            function from the round's number to the fraction gone after it.
        criterion: What makes a channel important, see `keras_taylor.scores.criteria`. `None`: "log_odds" for
            a classifier with one output, a cross-entropy and labels, where `repair` is on; else "taylor".
        score_ds: Other data for the scores, in any form that `ds` may have: examples that the model
            was not trained on, say, where those of `ds` are known by heart and tell little.
        score_examples: Examples a scoring pass; `None`: an eighth of those that a round trains on (one
            counted once an epoch), at least 512; of `score_ds`, and with `epochs=0`, all; at most 10,000.
        include, exclude: Layer names, regular expressions that match whole names, or
            layers: prune only the channels that these make / none of them.
        exact: `False`: channels that are normalized together may leave, too, as the residual stream of
            a transformer or a ConvNeXt (see `analyze`).
        round_to: Every group of channels keeps a multiple of this many. With a goal for a latency also
            "auto": 1, 4, 8 or 16, the least multiple that other widths of this network's layers are at most
            5 % slower than, as measured on this machine; `info.round_to` says which.
        min_channels: Every group keeps at least so many.
        repair: Refit the layers that lost inputs by least squares after each cut (see
            `keras_taylor.repair`): with `epochs=0` to the original, on at most 512 examples; else, before
            fine-tuning, to the model of the round before, on one in 32 of those that a round trains on,
            128 to 512, and with less care for what training does as well.
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
        max_drop: How much worse a metric on `validation_data` may become: after each round it is compared
            with that of the given model. A round that goes too far is undone and ends the run.
        monitor: Its name, "accuracy" or "val_accuracy"; `None`: the first metric that the model is compiled
            with, else the loss. Accuracies, AUC, precision, recall and F-scores fall, others rise.
        baseline: What to compare with instead: `max_drop=0, baseline=0.9` is a floor.
        backup_dir: Directory, made if missing, that keeps the state of the run after each
            round: the same call after a crash, a kill or Ctrl-C goes on with the round that
            was not completed, and after the last one returns the finished model at once.
            Each round then starts with `keras.utils.set_random_seed` of a number drawn at
            the start of the run from NumPy's global state, so a run that was resumed takes
            the same random numbers as one that was not: shuffling of arrays, dropout, what
            callbacks draw from global generators. Not so generators of the caller's own,
            the order in a data set that shuffles by itself, and the state of callbacks:
            data and callbacks are not kept. One run at a time may use a directory; of several
            processes of a run only the first one does. `None`: nothing is kept, nothing is seeded.
        return_info: Also return an `Info`.
        verbose: 0 is silent, 1 a live bar (in a notebook the table and plot of the rounds too), 2 lines
            only, "auto" whichever suits the output.
        **fit_kwargs: What `model.fit` takes: `epochs` (a round; 0: no fine-tuning),
            `batch_size`, `validation_data`, `callbacks`, `class_weight`, ... Each round
            starts with the same learning rate, and with the momentum and moments of the channels
            that stayed. With a learning rate schedule both start anew: they count the same steps.

    Returns:
        A plain, smaller Keras model, fine-tuned, compiled as `model`; with
        `return_info=True` a tuple of it and an `Info`. For a list of goals a list of models: one for each
        goal that was reached, and that of the last round if the run ended between two. If the loss,
        or a weight, becomes NaN or infinite in fine-tuning, that round is undone, a warning says so, and
        the model is that of the round before (an unpruned copy, if there is none); with
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
    >>> models = keras_taylor.compress(model, (x, y), goal=[0.2, 0.4, 0.6], epochs=2)
    >>> small = keras_taylor.compress(model, (x, y), None, max_drop=0.01, validation_data=(x_val, y_val))
    """
    check_fit_arguments(fit_kwargs)
    with strategy_scope(model), Reporter(verbose if is_first_process() else 0) as reporter:
        run = CompressionRun(
            model, ds, goal, increment, criterion, score_ds, score_examples, include, exclude, exact,
            ratios, scope, rank, balance, round_to, min_channels, repair, labels, distill, learning_rate,
            max_drop, monitor, baseline, backup_dir, fit_kwargs, reporter,
        )  # fmt: skip
        run.info.command = messages.as_call(
            goal=goal, increment=increment, criterion=run.info.criterion, include=include, exclude=exclude,
            exact=exact, ratios=ratios, scope=scope, rank=rank, balance=balance, round_to=round_to,
            min_channels=min_channels, repair=repair, distill=distill is not False,
            learning_rate=learning_rate, max_drop=max_drop, monitor=monitor, baseline=baseline,
            **fit_kwargs,
        )  # fmt: skip
        models = run.until_done()
    result = models if isinstance(goal, (list, tuple)) else models[-1]
    return (result, run.info) if return_info else result
