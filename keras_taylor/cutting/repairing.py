"""Makes up for pruning without training: refitted kernels (`repair`), new statistics (`recalibrate`)."""

import re

import keras
import numpy as np

from keras_taylor.cutting.batch_statistics import recompute_statistics
from keras_taylor.cutting.counterparts import find_counterparts, is_left
from keras_taylor.cutting.layer_fits import LayerRepair
from keras_taylor.cutting.refitting import refit
from keras_taylor.cutting.remade_tasks import as_task
from keras_taylor.cutting.surgery import copy_model
from keras_taylor.plans.plan import Plan, check_plan_class
from keras_taylor.plans.planning import kept_units, label_as_planned
from keras_taylor.reading import graph as graphs
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.reading.tracing import functional_view, origin_of
from keras_taylor.reading.walk import NUM_EXAMPLES, fixed_batch_size, sample_inputs, split_into_batches
from keras_taylor.support.arguments import check_whole_number
from keras_taylor.support.datasets import Feed
from keras_taylor.support.hub_tasks import preprocessed
from keras_taylor.support.replicas import strategy_scope
from keras_taylor.support.types import BoolArray, Data


def repair(
    small: keras.Model,
    model: keras.Model,
    plan: Plan,
    ds: Data,
    *,
    num_examples: int = NUM_EXAMPLES,
    batch_size: int | None = None,
    return_repairs: bool = False,
) -> keras.Model | tuple[keras.Model, list[LayerRepair]]:
    """Refits the layers that lost inputs, so that the smaller model comes close to the original one again.

    A removed channel is often nearly a linear combination of the remaining ones. `repair` visits the layers
    from the input to the output. Each layer that lost inputs, or that reads what such layers made and comes
    before another layer with a kernel, gets a new kernel by ridge regression, towards the kernel that it
    has: it minimizes |Y - X W - b|² + ridge · s · |W - W₀|², where W₀ is the kernel in `small` and s the
    mean of the diagonal of XᵀX. The rows X are what the layer reads in the smaller model, as it has been
    repaired so far. The rows Y are the output of the layer in `model`. If the output goes into a residual
    sum, Y also makes up for what the other terms of the sum have lost. If a ReLU follows, the fit ignores
    how negative its input is.

    A quarter of the examples is held out. They choose the ridge. A layer whose error on them does not fall
    is left unchanged. If the outputs of the whole model on them do not come closer to those of `model`, all
    layers are left unchanged.

    At the end the moving statistics of each BatchNormalization become those of what it reads in the repaired
    model, and its scale and offset make up for that: inference does not change, and training, which
    normalizes by the statistics of the batch, starts from the same function. Frozen layers stay as they are.
    Without a scale the variance stays, without an offset the mean.

    Related work: He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017),
    reconstruct the output of each layer by least squares after they have selected its input
    channels. Luo, Wu and Lin, "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression"
    (ICCV 2017), scale the remaining channels by least squares.

    Args:
        small: The smaller model, a `keras.Model`: the result of `prune(model, plan)`, which may have been
            trained since. It is not changed.
        model: The model that was pruned, a `keras.Model`. It is not changed.
        plan: The `Plan` by which it was pruned.
        ds: The examples: an array `(num_examples, ...)` or a structure of arrays, or anything else that
            `model.fit` takes. Targets are ignored.
        num_examples: Number of examples to use, an `int`, by default 1024. They are evenly spread over
            arrays, or the first ones of an iterable. Fewer are used if the layer outputs for them would
            take more than 1 GiB of memory.
        batch_size: Examples in a batch of arrays, an `int`; `None` (the default): 32, as in `model.fit`.
        return_repairs: A `bool`, by default `False`. `True` also returns the result for each layer.

    Returns:
        A repaired copy of `small`, compiled like `small`. With `return_repairs=True` a tuple of this model
        and a list of `LayerRepair`: the name of the layer, its relative squared error on held-out examples
        before and after, and the ridge, or why the layer was left unchanged. For a BatchNormalization it
        says why its statistics could not become those of the data.

    Raises:
        ValueError: if `small` is not the result of `prune(model, plan)`, or if the data does not fit the
            model.

    Example:

    >>> plan = keras_taylor.make_plan(model, keras_taylor.score(model, (x, y)), 0.3)
    >>> small = keras_taylor.prune(model, plan)
    >>> repaired, repairs = keras_taylor.repair(small, model, plan, x, return_repairs=True)
    >>> repaired.count_params() == small.count_params()
    True
    >>> all(one.error_after < one.error_before for one in repairs if one.ridge is not None)
    True
    """
    check_plan_class(plan)
    check_whole_number("num_examples", num_examples, 1)
    ds = preprocessed(model, ds, batch_size)
    with strategy_scope(small):
        small, model = functional_view(small), functional_view(model)
        labeled = label_as_planned(model, plan)
        kept = kept_units(labeled, plan)
        _check_pruned(small, labeled, kept)
        feed = Feed(ds, model, batch_size, targets=False)
        inputs = sample_inputs(feed, labeled.graph, num_examples)
        repaired = copy_model(small)
        repairs = refit(labeled, kept, repaired, inputs)
        repaired = as_task(repaired)
    return (repaired, repairs) if return_repairs else repaired


def recalibrate(
    model: keras.Model, ds: Data, *, num_examples: int = NUM_EXAMPLES, batch_size: int | None = None
) -> keras.Model:
    """Computes the moving statistics of every BatchNormalization again, from data without labels.

    From the input to the output, the mean and variance of each layer become those of all values that it
    reads at inference, after the layers before it have been updated. They are exact over the examples, not
    exponential averages. Related work: the adaptive batch normalization of Li et al., "EagleEye: Fast
    Sub-net Evaluation for Efficient Neural Network Pruning" (ECCV 2020).

    Recalibration brings back a good part of the accuracy of a model that is not repaired. It changes what
    the model computes. After `repair`, whose statistics are those of its examples already, it only does harm
    where other examples have others.

    Args:
        model: A built `keras.Model`. It is not changed.
        ds: The examples: an array `(num_examples, ...)` or a structure of arrays, or anything else that
            `model.fit` takes. Targets are ignored.
        num_examples: Number of examples to use, an `int`, by default 1024, as in `repair`.
        batch_size: Examples in a batch of arrays, an `int`; `None` (the default): 32, as in `model.fit`.

    Returns:
        A copy of the model with new statistics, compiled like `model`.

    Raises:
        ValueError: if the data does not fit the model.

    Example:

    >>> plan = keras_taylor.make_plan(model, keras_taylor.score(model, (x, y)), 0.3)
    >>> small = keras_taylor.recalibrate(keras_taylor.prune(model, plan), x)
    >>> bool(np.isfinite(small.predict(x, verbose=0)).all())
    True
    """
    check_whole_number("num_examples", num_examples, 1)
    ds = preprocessed(model, ds, batch_size)
    with strategy_scope(model):
        model = functional_view(model)
        feed = Feed(ds, model, batch_size, targets=False)
        inputs = sample_inputs(feed, graphs.read_model(model), num_examples)
        copy = copy_model(model)
        graph = graphs.read_model(copy)
        recompute_statistics(graph, split_into_batches(inputs, fixed_batch_size(graph)))
        return as_task(copy)


def _check_pruned(small: keras.Model, labeled: LabeledModel, kept: BoolArray) -> None:
    """Raises an error if a model is not the one that remains of another when these units are kept."""
    old, new = labeled.graph, graphs.read_model(small)
    counterparts = find_counterparts(labeled, kept, new)
    has_branches_left = not labeled.bypassed_sums(kept)
    if counterparts is None or (has_branches_left and _call_names(old) != _call_names(new)):
        known = [
            name
            for name, call in zip(_call_names(old), old.calls, strict=True)
            if is_left(labeled, kept, call)
        ]
        other = next((name for name in _call_names(new) if name not in known), "none")
        raise ValueError(
            "The small model is not one that was cut from the model. Expected the same layers in the same "
            f"order, without those that the plan removes. Received: small={small.name!r}, whose first other "
            f"layer is: {other}"
        )
    for new_index, index in counterparts.old_tensors.items():
        mask = labeled.kept_mask(labeled.labels[index], kept)
        axis = int(np.argmax(mask.shape))
        if mask.size > 1 and new.shapes[new_index][axis] != mask.sum():
            maker = next(call.name for call in new.calls if new_index in call.outputs)
            raise ValueError(
                "The small model was cut by another plan. Expected what `prune(model, plan)` gives: "
                f"{mask.sum()} channels after layer '{maker}'. "
                f"Received: small with {new.shapes[new_index][axis]} there"
            )


def _call_names(graph: graphs.Graph) -> list[str]:
    """Names of calls; of a task those without counters, which are others whenever its class makes it."""
    names = [call.name for call in graph.calls]
    return names if origin_of(graph.model) is None else [re.sub(r"_\d+(?=/|$)", "", name) for name in names]
