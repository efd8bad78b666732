"""Moving statistics of BatchNormalizations from what the layers read, with the function kept or not."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_taylor.cutting.downstream import ChannelReader, find_channel_readers
from keras_taylor.cutting.layer_fits import LayerRepair
from keras_taylor.reading.graph import Call, Graph
from keras_taylor.reading.walk import InputBatch, Observer, Walk
from keras_taylor.rules.base import override_attributes
from keras_taylor.support.arrays import assign_rounded, to_float64, view_float32
from keras_taylor.support.keras_internals import layers_inside, mask_of_tensor
from keras_taylor.support.types import Array, FloatArray, Tensor

# Moving statistics average over this share of a training's steps, but over so many steps and values at least.
_SHARE_AVERAGED, _LEAST_AVERAGED, _LEAST_VALUES = 1 / 10, 4, 4096
_ROWS_OF_A_SUM = 1024


class _Moments(NamedTuple):
    """Mean and variance of each channel, float64 arrays `(num_channels,)`."""

    mean: FloatArray
    variance: FloatArray


class NormalizationInputs:
    """What the BatchNormalizations of a model read, gathered while a walk goes through it.

    Args:
        graph: The graph of the model.

    Attributes:
        graph: As passed.
        observers: What the walk is to be made with.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._read: dict[keras.layers.BatchNormalization, list[_ChannelSums]] = {}
        self._calls: dict[keras.layers.BatchNormalization, Call] = {}
        self.observers: dict[int, Observer] = {}
        for call in graph.calls:
            if _is_plain_normalization(call):
                self._observe(call)

    def run(self, walk: Walk, number: int) -> None:
        """Runs a call of the walk; normalizations inside of a layer are run as at inference."""
        call = self.graph.calls[number]
        if _is_plain_normalization(call) or not _normalizations_inside(call.operation):
            walk.run(number)
            return
        with _record_moments(call.operation) as read:
            walk.run_alone(number)
        for layer, sums in read.items():
            self._read.setdefault(layer, []).append(sums)
            self._calls.setdefault(layer, call)

    def moments(self) -> list[tuple[Call, keras.layers.BatchNormalization, _Moments]]:
        """Each layer with its first call and what it reads, in the order of the calls."""
        order = sorted(self._read, key=lambda layer: self._calls[layer].number)
        return [
            (self._calls[layer], layer, _average([sums.moments() for sums in self._read[layer]]))
            for layer in order
        ]

    def _observe(self, call: Call) -> None:
        """Makes an observer for a call, beside those of other calls that read the same tensor."""
        layer, others = call.operation, self.observers.get(call.inputs[0])
        sums = _ChannelSums(layer.axis)

        def observe(column: list[Tensor]) -> None:
            if others is not None:
                others(column)
            self._calls.setdefault(layer, call)
            if all(sums is not one for one in self._read.setdefault(layer, [])):
                self._read[layer].append(sums)
            for x in column:
                sums.add(x, mask_of_tensor(x))

        self.observers[call.inputs[0]] = observe


def gather_inputs(graph: Graph, batches: Sequence[InputBatch], training: bool = False) -> NormalizationInputs:
    """What the BatchNormalizations of a model read in one pass of the batches.

    Args:
        graph: The graph of the model.
        batches: The inputs.
        training: Whether the other layers (dropout, augmentation) run as in training.
    """
    read = NormalizationInputs(graph)
    walk = Walk(graph, batches, training, read.observers)
    for number in range(len(graph.calls)):
        read.run(walk, number)
        walk.free_after(number)
    walk.outputs()
    return read


def renew_statistics(read: NormalizationInputs) -> list[LayerRepair]:
    """Sets the moving statistics to those of what the layers read, in place; inference does not change.

    Training normalizes by the statistics of the batch. With other moving statistics it therefore starts from
    another function than the one that inference computes. Here scale and offset make up for the change:
    gamma' = gamma · sqrt(v1 + eps) / sqrt(v0 + eps) and beta' = beta + gamma · (m1 - m0) / sqrt(v0 + eps),
    where m0, v0 are the statistics so far, m1, v1 those of the data. Since the function stays, one pass is
    enough for all layers.

    Without a scale, the linear layers that read the output take over the factor, where they alone do.
    A layer that is used several times gets the mean of the statistics of its uses, as in training. Layers
    that are not trainable stay as they are: training takes their moving statistics.

    Args:
        read: What the layers read.

    Returns:
        The layers whose training still differs from inference, each with the reason.
    """
    repairs, graph = [], read.graph
    for call, layer, moments in read.moments():
        readers = None
        is_inner = layer is not call.operation
        if not layer.scale and not is_inner and graph.is_used_once(layer):
            axis = layer.axis % len(graph.shapes[call.outputs[0]])
            readers = find_channel_readers(graph, call.outputs[0], axis)
        reason = _exchange_statistics(layer, moments, readers)
        if reason is not None:
            name = f"{call.name}/{layer.name}" if is_inner else call.name
            repairs.append(LayerRepair(name, reason=f"its moving statistics stay: {reason}"))
    return repairs


def recompute_statistics(graph: Graph, batches: Sequence[InputBatch]) -> None:
    """Sets the moving statistics to those of what the layers read, in place, from the input to the output.

    Nothing makes up for the change: each layer reads what the layers before it put out with new statistics.
    """
    walk = Walk(graph, batches)
    done: set[keras.Layer] = set()
    for number, call in enumerate(graph.calls):
        if not _normalizations_inside(call.operation):
            walk.run(number)
            walk.free_after(number)
            continue
        while True:
            with _record_moments(call.operation) as read:
                walk.run_alone(number)
            layer = next((one for one in read if one not in done), None)
            if layer is None:
                break
            _assign_statistics(layer, read[layer].moments())
            done.add(layer)
        walk.free_after(number)


@contextlib.contextmanager
def shorter_averages(model: keras.Model, num_steps: int | None, batch_size: int) -> Iterator[None]:
    """A context in which moving statistics average over a part of a training, if over more steps before.

    With the usual momentum of 0.99 they would lag behind the weights at the end of a short training. Of few
    values, such as those behind a dense layer, they would be noise: there they average over more steps. A
    momentum of 1 stays: it freezes statistics.

    Args:
        model: The compiled model that is trained.
        num_steps: Steps of the training; `None`: unknown, so that nothing changes.
        batch_size: Examples of a step.
    """
    layers = _normalizations_inside(model) if num_steps is not None else []
    momenta = {layer: _momentum_for(layer, num_steps or 0, batch_size) for layer in layers}
    before = {layer: layer.momentum for layer in layers if momenta[layer] < layer.momentum < 1}
    for layer in before:
        layer.momentum = momenta[layer]
    try:
        yield
    finally:
        for layer, value in before.items():
            layer.momentum = value
        if before:
            model.make_train_function(force=True)  # the compiled one has the other momenta


def _momentum_for(layer: keras.layers.BatchNormalization, num_steps: int, batch_size: int) -> float:
    """The momentum with which statistics average over a part of so many steps, and over enough values."""
    num_positions = _num_positions(layer)
    num_needed = _LEAST_VALUES / (batch_size * num_positions) if num_positions else 0
    return 1 - 1 / max(_SHARE_AVERAGED * num_steps, _LEAST_AVERAGED, num_needed)


def _num_positions(layer: keras.layers.BatchNormalization) -> int | None:
    """How many values of a channel one example has; `None` if that is not known, as of images of any size."""
    if layer.input_spec.ndim == 2:
        return 1
    try:
        shape = layer.input.shape
    except Exception:  # of a layer inside of another one, or one that is called twice
        return None
    sizes = [size for k, size in enumerate(shape) if k not in (0, layer.axis % len(shape))]
    return None if None in sizes else math.prod(sizes)


class _ChannelSums:
    """Adds up values, and gives the moments of each channel.

    Args:
        axis: The axis of the channels.
    """

    def __init__(self, axis: int) -> None:
        self._axis, self._num = axis, 0
        self._shift: Array | float = 0.0
        self._total: FloatArray = np.zeros(())
        self._squares: FloatArray = np.zeros(())

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Adds a batch; `mask` says which positions count, all if it is `None`."""
        values = np.moveaxis(view_float32(x), self._axis, -1)
        rows = values.reshape(-1, values.shape[-1])
        if mask is not None:
            rows = rows[np.broadcast_to(ops.convert_to_numpy(mask), values.shape[:-1]).reshape(-1)]
        if not len(rows):
            return
        if not self._num:
            self._shift = rows.mean(0)  # close to the mean, so that the subtraction cancels no digits
        self._num += len(rows)
        for start in range(0, len(rows), _ROWS_OF_A_SUM):  # each sum in single precision, in double over them
            centered = rows[start : start + _ROWS_OF_A_SUM] - self._shift
            ones = np.ones(len(centered), np.float32)
            self._total = self._total + (ones @ centered).astype(np.float64)
            self._squares = self._squares + (ones @ np.square(centered)).astype(np.float64)

    def moments(self) -> _Moments:
        """Mean and variance of all values; not a number if there are none."""
        if not self._num:
            return _Moments(np.full((), np.nan), np.full((), np.nan))
        mean = self._total / self._num
        return _Moments(self._shift + mean, np.maximum(self._squares / self._num - np.square(mean), 0))


@contextlib.contextmanager
def _record_moments(
    operation: keras.Operation,
) -> Iterator[dict[keras.layers.BatchNormalization, _ChannelSums]]:
    """Within it, what the BatchNormalizations of an operation read is added up, and they run as at inference.

    Yields:
        The sums of the operation itself or of the layers inside, in the order in which they run.
    """
    read: dict[keras.layers.BatchNormalization, _ChannelSums] = {}
    with contextlib.ExitStack() as stack:
        for layer in _normalizations_inside(operation):
            stack.enter_context(override_attributes(layer, call=_call_recorded(layer, read)))
        yield read


def _is_plain_normalization(call: Call) -> bool:
    """Whether a call is that of a BatchNormalization, which gets no mask as an argument."""
    return isinstance(call.operation, keras.layers.BatchNormalization) and len(call.inputs) == 1


def _normalizations_inside(operation: keras.Operation) -> list[keras.layers.BatchNormalization]:
    """The BatchNormalizations among an operation and the layers inside of it."""
    inside = [operation, *layers_inside(operation)] if isinstance(operation, keras.Layer) else []
    return [layer for layer in inside if isinstance(layer, keras.layers.BatchNormalization)]


def _call_recorded(
    layer: keras.layers.BatchNormalization, read: dict[keras.layers.BatchNormalization, _ChannelSums]
) -> Callable[..., Tensor]:
    """A layer's `call` at inference that first adds its input to `read`."""
    call = layer.call
    signature = inspect.signature(call)

    def call_and_record(*args: Any, **kwargs: Any) -> Tensor:
        arguments = signature.bind(*args, **kwargs).arguments
        sums = read.setdefault(layer, _ChannelSums(layer.axis))
        sums.add(next(iter(arguments.values())), arguments.get("mask"))
        if "training" in signature.parameters:
            arguments["training"] = False
        return call(**arguments)

    call_and_record.__signature__ = signature  # type: ignore[attr-defined]
    return call_and_record


def _average(moments: Sequence[_Moments]) -> _Moments:
    """The mean of several means and that of several variances."""
    return _Moments(*(np.mean(column, axis=0) for column in zip(*moments, strict=True)))


def _assign_statistics(layer: keras.layers.BatchNormalization, moments: _Moments) -> None:
    """Sets the moving statistics; with renormalization also those by which training normalizes."""
    assign_rounded(layer.moving_mean, moments.mean)
    assign_rounded(layer.moving_variance, moments.variance)
    if getattr(layer, "renorm", False):
        deviation = np.sqrt(moments.variance + layer.epsilon)
        assign_rounded(layer.renorm_mean, moments.mean)
        assign_rounded(layer.renorm_stddev, deviation)
        assign_rounded(layer.moving_stddev, deviation)


def _exchange_statistics(
    layer: keras.layers.BatchNormalization, moments: _Moments, readers: Sequence[ChannelReader] | None
) -> str | None:
    """Sets the moving statistics, and makes up for it by scale and offset.

    Args:
        layer: The layer.
        moments: The statistics of what it reads.
        readers: The layers that can take over the factor of a layer without a scale.

    Returns:
        Why training still differs from inference; `None` if it does not.
    """
    if not layer.trainable:
        return None
    if type(layer).call is not keras.layers.BatchNormalization.call:
        return "its class computes something of its own"
    if not {weight.dtype for weight in layer.weights} <= {"float32", "float64"}:
        return "its weights have fewer digits than float32"
    if not all(np.isfinite(value).all() for value in moments):
        return "what it reads is not finite"
    old_mean, old_variance = to_float64(layer.moving_mean), to_float64(layer.moving_variance)
    # as the weights will hold them
    new_mean, new_variance = (value.astype(layer.moving_mean.dtype).astype(np.float64) for value in moments)
    takes_factor = layer.scale or readers is not None
    mean = new_mean if layer.center else old_mean
    variance = new_variance if takes_factor else old_variance
    missing = [name for name, is_there in (("offset", layer.center), ("scale", takes_factor)) if not is_there]
    gamma = to_float64(layer.gamma) if layer.scale else np.ones(())
    slope = gamma / np.sqrt(old_variance + layer.epsilon)
    factor = np.sqrt((variance + layer.epsilon) / (old_variance + layer.epsilon))
    new_values = []
    if layer.scale:
        new_values.append((layer.gamma, gamma * factor, layer.gamma_constraint))
    if layer.center:
        beta = to_float64(layer.beta) + slope * (mean - old_mean)
        new_values.append((layer.beta, beta if layer.scale else beta / factor, layer.beta_constraint))
    if not all(_is_allowed(value, constraint) for _, value, constraint in new_values):
        return "a constraint would change its new scale or offset"
    for weight, value, _ in new_values:
        assign_rounded(weight, value)
    if not layer.scale:
        for reader in readers or ():
            reader.multiply(factor)
    _assign_statistics(layer, _Moments(mean, variance))
    return f"it has no {' and no '.join(missing)}" if missing else None


def _is_allowed(value: FloatArray, constraint: Callable[[Tensor], Tensor] | None) -> bool:
    """Whether a constraint leaves a value as it is."""
    if constraint is None:
        return True
    constrained = ops.convert_to_numpy(constraint(ops.convert_to_tensor(value, "float32")))
    return bool(np.allclose(constrained, value, rtol=1e-6, atol=1e-7))
