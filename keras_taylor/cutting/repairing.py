"""What is left takes over the work of what has gone (`repair`), and its statistics (`recalibrate`)."""

import keras
import numpy as np
from keras import ops

from keras_taylor.cutting.refitting import refit
from keras_taylor.cutting.surgery import copy_model
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading import graph as graphs
from keras_taylor.reading.groups import label_model
from keras_taylor.reading.tracing import functional_view
from keras_taylor.reading.walk import Walk, example_inputs, in_batches
from keras_taylor.support.datasets import Feed
from keras_taylor.support.replicas import strategy_scope


def repair(small, model, plan, ds, *, num_examples=512, batch_size=None, return_repairs=False):
    """Makes up for pruning without training: the layers that lost inputs learn to do without them.

    A channel that has gone is often nearly a linear mixture of those that stay. So, from the input to
    the output, each layer that lost inputs gets a new kernel by ridge regression: from what it reads in
    the pruned model, as repaired so far, to what it put out in `model`; where its output goes into a
    residual sum, to what the other terms have lost, too. A quarter of the examples is held out: they
    choose the ridge, and a layer, or the whole, for which nothing is won on them stays as it was.

    Args:
        small: What `prune(model, plan)` gave, perhaps trained since. It is not changed.
        model: The model that was pruned. It is not changed.
        plan: The `Plan`.
        ds: Inputs: arrays, or whatever `model.fit` takes; targets in it are not used.
        num_examples: Use so many examples, evenly spread over arrays, the first ones of an iterable;
            fewer where 1 GiB does not hold what the layers put out for them.
        batch_size: Examples a batch, for arrays.
        return_repairs: Also return what was done to each layer.

    Returns:
        A repaired copy of `small`, compiled as it is; with `return_repairs=True` a tuple of it and a list
        of `LayerRepair`: the layer, its relative squared error on held-out examples before and
        after, the ridge, or why it was left alone.

    Raises:
        ValueError: if `small` is not what the plan makes of the model, or the data does not fit.

    Example:

    >>> small = keras_taylor.prune(model, plan)
    >>> small = keras_taylor.repair(small, model, plan, images)
    """
    with strategy_scope(small):
        small, model = functional_view(small), functional_view(model)
        labeled = label_model(model, exact=plan.exact)
        kept = kept_units(labeled, plan)
        _check_cut(small, labeled, kept)
        feed = Feed(ds, model, batch_size, targets=False)
        inputs = example_inputs(feed, labeled.graph, num_examples)
        repaired = copy_model(small)
        repairs = refit(labeled, kept, repaired, inputs)
    return (repaired, repairs) if return_repairs else repaired


def recalibrate(model, ds, *, num_examples=512, batch_size=None):
    """Takes the moving statistics of every BatchNormalization anew, from data without labels.

    Exact, not an exponential average: from the input to the output, each layer's mean and variance
    become those of all values that it reads, after the layers before it have been done.
    Where pruning is not repaired, that alone brings back a good part of the accuracy; after `repair`,
    which fits to the original's statistics, it does more harm than good.

    Args:
        model: A built Keras model. It is not changed.
        ds, num_examples, batch_size: As in `repair`.

    Returns:
        A copy of the model with new statistics, compiled as it is.

    Example:

    >>> small = keras_taylor.recalibrate(keras_taylor.prune(model, plan), images)
    """
    with strategy_scope(model):
        model = functional_view(model)
        feed = Feed(ds, model, batch_size, targets=False)
        inputs = example_inputs(feed, graphs.read_model(model), num_examples)
        copy = copy_model(model)
        reestimate(copy, in_batches(inputs))
    return copy


def _check_cut(small, labeled, kept):
    """Refuses a model that is not what this cut makes."""
    old, new = labeled.graph, graphs.read_model(small)
    names = [call.name for call in old.calls], [call.name for call in new.calls]
    if names[0] != names[1]:
        other = next((n for n in names[1] if n not in names[0]), "none")
        raise ValueError(
            "The small model is not one that was cut from the model. Expected the same layers in the same "
            f"order. Received: small={small.name!r}, whose first other layer is: {other}"
        )
    for call in old.calls:
        for index in call.outputs:
            mask = labeled.kept_mask(labeled.labels[index], kept)
            axis = int(np.argmax(mask.shape))
            if mask.size > 1 and new.shapes[index][axis] != mask.sum():
                raise ValueError(
                    "The small model was cut by another plan. Expected what `prune(model, plan)` gives: "
                    f"{mask.sum()} channels after layer '{call.name}'. "
                    f"Received: small with {new.shapes[index][axis]} there"
                )


def reestimate(model, batches):
    """Sets, in place, the moving statistics of every BatchNormalization to those of the data.

    From the input to the output: each layer's mean and variance are those of all values that it reads
    in the model at inference, the layers before it done already; no exponential average.

    Args:
        model: A Functional or Sequential model.
        batches: For each batch a list of arrays, one an input of the model.
    """
    walk = Walk(graphs.read_model(model), batches)
    done = set()
    for number, call in enumerate(walk.graph.calls):
        if isinstance(call.operation, keras.layers.BatchNormalization) and call.name not in done:
            _set_statistics(call.operation, walk.tensors[call.inputs[0]])
            done.add(call.name)
        walk.run(number)
        walk.forget(number)


def _set_statistics(layer, column):
    mean, variance = moments(column, layer.axis)
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(variance)


def moments(column, axis):
    """Mean and variance of each channel over all batches of a tensor, float64 arrays."""
    num, total, squares, shift = 0, 0.0, 0.0, None
    for x in column:
        rows = np.moveaxis(ops.convert_to_numpy(ops.cast(x, "float32")), axis, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        shift = rows.mean(0) if shift is None else shift  # so that no digits cancel
        num += len(rows)
        total = total + (rows - shift).sum(0, dtype=np.float64)
        squares = squares + np.square(rows - shift).sum(0, dtype=np.float64)
    mean = total / num
    return shift + mean, np.maximum(squares / num - np.square(mean), 0)
