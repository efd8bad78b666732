"""Functions run on random numbers: does each value, or each channel, depend on itself only?"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import keras
import numpy as np
from keras import ops

from keras_taylor.rules.labels import BatchAxis
from keras_taylor.support.types import Array, BoolArray, IntArray, Tensor

Result = TypeVar("Result")

_INPUT_SCALES = (0.1, 1.0, 10.0)  # of random inputs, each with its own seed
NUM_PROBED_EXAMPLES = 2  # in each random input
_NUM_SUBSETS = 6
_PROBE_TOLERANCE = {"float32": 1e-5, "float64": 1e-5}  # relative to the largest value
_LOW_PRECISION_PROBE_TOLERANCE = 1e-2  # for all other types


@functools.cache
def is_elementwise_function(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether each output value depends on the input value at the same place only, judged by random inputs.

    Args:
        function: A function from one tensor to one tensor. The result is remembered.
    """
    return _attempt(lambda: _are_elements_alone(_on_arrays(function))) or False


class ProbedInput(NamedTuple):
    """An input on which an operation is probed.

    Attributes:
        shape: Its shape, all sizes known, the batch axis first.
        channel_axis: The axis of its channels, `None` without channels.
        dtype: Name of its type.
    """

    shape: tuple[int, ...]
    channel_axis: int | None
    dtype: str


class ProbedOutput(NamedTuple):
    """Where the channels of an output are: their axis, and the unit of each, int64 `(num,)`."""

    channel_axis: int
    units: IntArray

    def without_units(self, y: Array, stays: BoolArray) -> Array:
        """The output without the units that do not stay."""
        return np.compress(stays[self.units], y, self.channel_axis)


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelMap:
    """How an operation carries channels from its inputs to its outputs, in units that leave together.

    Attributes:
        units: The unit of each channel of every input that has channels, int64 `(num,)`.
        outputs: The channels of each output.
    """

    units: IntArray
    outputs: tuple[ProbedOutput, ...]


def find_channel_map(
    run: Callable[[Sequence[Array]], Sequence[Array]],
    run_smaller: Callable[[Sequence[Array]], Sequence[Array]],
    inputs: Sequence[ProbedInput],
    batch: BatchAxis,
    dtype: str = "float32",
) -> ChannelMap | None:
    """How channels go through an operation, judged by random inputs; `None` if they mix.

    Channels may be reversed or repeated, and several may make one, as in a gated linear unit or a pixel
    shuffle. All other axes may change. Without some units, the operation must return what it returned for
    those that stay, and an example must not depend on others.

    Args:
        run: The operation, from arrays to arrays.
        run_smaller: The same operation for arrays with fewer channels. It is cloned for each call.
        inputs: Its inputs, of two examples. Those with channels have equally many.
        batch: Where the examples are in all inputs and outputs.
        dtype: Name of the type in which the operation computes.
    """
    tolerance = _PROBE_TOLERANCE.get(dtype, _LOW_PRECISION_PROBE_TOLERANCE)
    probe = _Probe(run, run_smaller, inputs, batch, tolerance)
    for units in _attempt(lambda: list(probe.possible_units())) or ():
        channel_map = _attempt(functools.partial(probe.find_map, units))
        if channel_map is not None:
            return channel_map
    return None


class _Draw(NamedTuple):
    """Random inputs of an operation, and its outputs."""

    seed: int
    x: list[Array]
    y: list[Array]


class _Probe:
    """An operation that is run on random inputs, with all channels and with fewer."""

    def __init__(
        self,
        run: Callable[[Sequence[Array]], Sequence[Array]],
        run_smaller: Callable[[Sequence[Array]], Sequence[Array]],
        inputs: Sequence[ProbedInput],
        batch: BatchAxis,
        tolerance: float,
    ) -> None:
        self._run, self._run_smaller = run, run_smaller
        self._inputs, self._batch, self._tolerance = inputs, batch, tolerance
        self._draws: dict[int, _Draw] = {}
        self._num_channels = next(i.shape[i.channel_axis] for i in inputs if i.channel_axis is not None)

    def possible_units(self) -> Iterator[IntArray]:
        """Yields what may be the unit of each input channel, the largest number of units first."""
        sizes = {size for y in self._draw(0).y for size in y.shape}
        numbers = {self._num_channels, *(math.gcd(size, self._num_channels) for size in sizes)} - {1}
        for num_units in sorted(numbers, reverse=True):
            yield from _repetitions(num_units, self._num_channels)

    def find_map(self, units: IntArray) -> ChannelMap:
        """Where these units are in each output; raises an error if they mix."""
        num_units = int(units.max()) + 1
        possible = [list(self._possible_outputs(y.shape, num_units)) for y in self._draw(0).y]
        for number in range(len(_INPUT_SCALES)):
            draw = self._draw(number)
            for stays in _subsets(draw.seed, num_units):
                found = self._run_smaller(self._without_channels(draw.x, stays[units]))
                possible = [
                    [o for o in outputs if _is_close(y_small, o.without_units(y, stays), self._tolerance)]
                    for outputs, y_small, y in zip(possible, found, draw.y, strict=True)
                ]
                if not all(possible):
                    raise _ProbeFailedError
        return ChannelMap(units, tuple(outputs[0] for outputs in possible))

    def _draw(self, number: int) -> _Draw:
        """A draw, remembered; raises an error if the operation is random or mixes examples."""
        if number not in self._draws:
            random = np.random.default_rng(number)
            scale = _INPUT_SCALES[number]
            x, other = ([_draw_input(random, i, scale) for i in self._inputs] for _ in range(2))
            y = [_require_finite(output) for output in self._run(x)]
            axis, is_first = self._batch.axis, self._batch.rows_of_first(NUM_PROBED_EXAMPLES)
            mixed = [
                np.where(np.expand_dims(is_first, [*range(1, a.ndim - axis)]), a, b)
                for a, b in zip(x, other, strict=True)
            ]
            for same, alone, output in zip(self._run(x), self._run(mixed), y, strict=True):
                _require_equal(same, output, self._tolerance)
                if output.shape[axis] != is_first.size:
                    raise _ProbeFailedError
                found, expected = np.compress(is_first, alone, axis), np.compress(is_first, output, axis)
                _require_equal(found, expected, self._tolerance)
            self._draws[number] = _Draw(number, x, y)
        return self._draws[number]

    def _without_channels(self, x: Sequence[Array], stays: BoolArray) -> list[Array]:
        return [
            a if i.channel_axis is None else np.compress(stays, a, i.channel_axis)
            for a, i in zip(x, self._inputs, strict=True)
        ]

    def _possible_outputs(self, shape: Sequence[int], num_units: int) -> Iterator[ProbedOutput]:
        """Yields the ways in which an output of this shape may hold units, the usual axes first."""
        usual = {i.channel_axis for i in self._inputs}
        axes = [axis for axis in range(len(shape)) if axis != self._batch.axis]
        for axis in sorted(axes, key=lambda axis: axis not in usual):
            for units in _repetitions(num_units, shape[axis]):
                yield ProbedOutput(axis, units)
            if shape[axis] == num_units:
                yield ProbedOutput(axis, np.arange(num_units)[::-1])


def _repetitions(num_units: int, num_channels: int) -> Iterator[IntArray]:
    """Yields units of channels: each unit several times, side by side or in turn."""
    times, rest = divmod(num_channels, num_units)
    if times and not rest:
        yield np.repeat(np.arange(num_units), times)
        if times > 1:
            yield np.tile(np.arange(num_units), times)


def _subsets(seed: int, num: int) -> Iterator[BoolArray]:
    """Yields random subsets with their complements, of few sizes: JAX compiles an operation for each size.

    One subset is a single member: what needs an even number of channels fails with all others.
    """
    random = np.random.default_rng(seed)
    for size in (1, *(num // 2,) * (_NUM_SUBSETS - 1)):
        stays = random.permutation(num) < size
        yield stays
        yield ~stays


def _draw_input(random: np.random.Generator, probed: ProbedInput, scale: float) -> Array:
    """Random values. Integers may be indices: they are 0 or 1."""
    if "float" in probed.dtype:
        return (scale * random.normal(size=probed.shape)).astype("float32")
    return random.integers(0, 2, probed.shape).astype(probed.dtype)


class _ProbeFailedError(Exception):
    """A random input contradicts what was to be shown."""


def _attempt(function: Callable[[], Result]) -> Result | None:
    """What a function returns, `None` after an error of any kind: what fails proves nothing."""
    try:
        return function()
    except Exception:
        return None


def _are_elements_alone(run: Callable[[Array], Array]) -> bool:
    """Raises an error unless values can be reordered, left out and zeroed without an effect on others."""
    for seed, scale in enumerate(_INPUT_SCALES):
        random = np.random.default_rng(seed)
        x = scale * random.normal(size=(3, 4, 5)).astype("float32")
        y = _require_finite(run(x))
        _require_equal(run(x), y)
        order = random.permutation(x.size)
        _require_equal(run(x.reshape(-1)[order].reshape(x.shape)).reshape(-1), y.reshape(-1)[order])
        _require_equal(run(x[:1, :1, :2]), y[:1, :1, :2])
        for _ in range(_NUM_SUBSETS):
            stays = random.random(x.shape) < 0.5
            _require_equal(run(np.where(stays, x, 0))[stays], y[stays])
    return True


def _require_equal(found: Array, expected: Array, tolerance: float = 1e-5) -> None:
    """Raises an error unless two arrays are equal, up to `tolerance` times the largest expected value."""
    if not _is_close(found, expected, tolerance):
        raise _ProbeFailedError


def _is_close(found: Array, expected: Array, tolerance: float) -> bool:
    """Whether two arrays are equal, up to `tolerance` times the largest expected value."""
    if found.shape != expected.shape:
        return False
    return bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())


def _require_finite(y: Array) -> Array:
    """The same array; raises an error if a value is infinite or NaN."""
    if not np.isfinite(y).all():
        raise _ProbeFailedError
    return y


def _on_arrays(function: Callable[[Tensor], Tensor]) -> Callable[[Array], Array]:
    """The function from float32 arrays to float32 arrays."""

    def run(x: Array) -> Array:
        y = function(ops.convert_to_tensor(np.asarray(x, np.float32)))
        if not keras.ops.is_tensor(y):
            raise _ProbeFailedError
        return np.asarray(ops.convert_to_numpy(ops.cast(y, "float32")))

    return run
