"""Reads whatever `model.fit` takes: checked once, then served to `fit` or as arrays."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator
from typing import Any, TypeAlias, cast

import keras
import numpy as np

from keras_taylor.support.arguments import check_whole_number
from keras_taylor.support.keras_internals import in_order_of_inputs
from keras_taylor.support.replicas import check_batches
from keras_taylor.support.types import Array, Data, IntArray, Shape, Tree

MANY_EXAMPLES = 100_000  # of data of unknown length, when it is time to say so
_INFINITE, _UNKNOWN = -1, -2  # cardinalities of a tf.data.Dataset
BATCH_SIZE = 32  # of arrays, where nothing else is said, as in `fit`

# `(x, y, sample_weight)`; the last two may be `None` or missing.
Batch: TypeAlias = tuple[Any, ...]


class Feed:
    """A checked data set in the form that `fit` takes.

    Args:
        ds: `(x, y)` or `(x, y, sample_weight)` arrays (or dicts or lists of arrays), a single array or
            dict, or any iterable of batches that `fit` takes.
        model: The model that will read it.
        batch_size: Number of examples in a batch of arrays; `None`: 32.
        steps_per_epoch: Number of batches in an epoch of an endless iterable.
        sample_weight: Weights of the examples in arrays.
        targets: Whether targets are needed.

    Attributes:
        num_examples: Number of examples. For an iterable it is the number of batches times the size of
            the first batch, `None` if the iterable does not know its length.
        has_targets: Whether the first batch has targets.
        has_weights: Whether the first batch has weights.
        first_size: Number of examples in the first batch; of arrays, as many as are looked at first.
        known_targets: Targets and weights, `None` where there are none: those of arrays, or of the first
            batch.
        form: Structure, shapes and dtypes of an example; equal forms give equal values here.

    Raises:
        ValueError: if the data is empty, has no targets where they are needed, holds values that are not
            finite, does not fit the model's inputs, or can be read only once. An endless iterable without
            `steps_per_epoch` is refused where all of it would be read.
    """

    def __init__(
        self,
        ds: Data,
        model: keras.Model,
        batch_size: int | None = None,
        steps_per_epoch: int | None = None,
        sample_weight: Array | None = None,
        targets: bool = True,
    ) -> None:
        check_whole_number("batch_size", batch_size, 1, or_none=f"{BATCH_SIZE} (of arrays)")
        check_whole_number("steps_per_epoch", steps_per_epoch, 1, or_none="all batches")
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.num_examples: int | None = None
        self.has_targets = self.has_weights = False
        self._batches: Iterable[Any] = ()
        self._num_batches: float | None = None  # of an iterable
        self._arrays = _split_arrays(ds)
        if self._arrays is not None:
            if sample_weight is not None:
                self._arrays = (*self._arrays[:2], sample_weight)
            for name, part in zip(("x", "y", "sample_weight"), self._arrays, strict=True):
                _check_are_arrays(name, part)
            self._arrays = tuple(keras.tree.map_structure(_convert_array, part) for part in self._arrays)
            self.num_examples = _count_examples(self._arrays)
        else:
            self._batches = _check_iterable(ds, steps_per_epoch)
            self._num_batches = count_batches(ds) if steps_per_epoch is None else steps_per_epoch
        first = self._check(model, targets)
        self.first_size = len(keras.tree.flatten(first[0])[0])
        self.form = repr(keras.tree.map_structure(_form_of, first))
        self.known_targets: tuple[Tree, Tree] = (first if self._arrays is None else self._arrays)[1:]
        if (
            self.num_examples is None
            and steps_per_epoch is None
            and self._num_batches not in (None, math.inf)
        ):
            self.num_examples = int(self._num_batches or 0) * self.first_size

    def fit_arguments(self, num_examples: int | None = None) -> dict[str, Any]:
        """Keyword arguments of `fit` for all examples, or for `num_examples` of them.

        They are the first ones of an iterable, and evenly spread over arrays.
        """
        if self._arrays is not None:
            x, y, weight = (self._spread(part, num_examples) for part in self._arrays)
            return {"x": x, "y": y, "sample_weight": weight, "batch_size": self.batch_size}
        if self.num_examples is not None and (num_examples or 0) >= self.num_examples:
            num_examples = None
        if num_examples is None:
            self.check_end()
            steps = {} if self.steps_per_epoch is None else {"steps_per_epoch": self.steps_per_epoch}
            return {"x": self._batches, **steps}
        return {"x": _limit_batches(self.batches(num_examples), num_examples)}

    def check_end(self) -> None:
        """Refuses an endless data set, of which a pass would read all.

        Raises:
            ValueError: if there is no `steps_per_epoch` either.
        """
        if self._num_batches == math.inf:
            raise ValueError(
                "The data set is endless, and all of it would be read. Pass `steps_per_epoch`, or a part "
                f"of it, as `ds.take(100)`. Received: ds={self._batches!r}"
            )

    def callbacks(self, num_examples: int | None = None) -> list[keras.callbacks.Callback]:
        """Callbacks for a pass: one that warns if data of unknown length does not end for long."""
        may_be_endless = self._arrays is None and self._num_batches is None and num_examples is None
        return [EndWatch(self.first_size)] if may_be_endless else []

    def check_devices(self, num_examples: int | None = None) -> None:
        """Refuses batches that cannot be divided among the devices, as far as their sizes are known.

        Args:
            num_examples: As in `fit_arguments`.

        Raises:
            ValueError: see `replicas.check_batches`.
        """
        if self._arrays is None or self.num_examples is None:
            limited = num_examples is not None and num_examples < (self.num_examples or sys.maxsize)
            check_batches(num_examples if limited else None, self.first_size)
            return
        check_batches(
            min(num_examples or self.num_examples, self.num_examples), self.batch_size or BATCH_SIZE
        )

    def batches(self, num_examples: int | None = None) -> Iterator[Batch]:
        """Iterates over `(x, y, sample_weight)` batches of one epoch.

        Args:
            num_examples: Of an iterable, stop after the batch with this example; `None`: read all.
        """
        if self._arrays is not None:
            size = self.batch_size or BATCH_SIZE
            for start in range(0, self.num_examples or 0, size):
                yield tuple(_slice_rows(part, start, start + size) for part in self._arrays)
            return
        if num_examples is None:
            self.check_end()
        watches = self.callbacks(num_examples)
        num_read = 0
        for number, batch in enumerate(itertools.islice(_iterate(self._batches), self.steps_per_epoch)):
            for watch in watches:
                watch.on_train_batch_end(number)
            yield keras.utils.unpack_x_y_sample_weight(batch)
            num_read += len(keras.tree.flatten(batch)[0])
            if num_examples is not None and num_read >= num_examples:
                return

    def take(self, num_examples: int | None = None) -> Iterator[Batch]:
        """Iterates over batches that begin with x. They hold as many examples as in `fit_arguments`."""
        if num_examples is None:
            yield from self.batches()
        elif self._arrays is not None:
            yield tuple(self._spread(part, num_examples) for part in self._arrays)
        else:
            yield from _limit_batches(self.batches(num_examples), num_examples)

    def in_memory(self, num_examples: int | None = None) -> Feed:
        """A feed of as many examples as in `fit_arguments`, in memory: each pass reads the same ones."""
        kept = copy.copy(self)
        if self._arrays is not None:
            kept._arrays = tuple(self._spread(part, num_examples) for part in self._arrays)
            kept.num_examples = _count_examples(kept._arrays)
        else:
            batches = list(_limit_batches(self.batches(num_examples), num_examples or sys.maxsize))
            kept._batches, kept.steps_per_epoch = _BatchesInMemory(batches), None
            kept._num_batches = len(batches)
            kept.num_examples = sum(len(keras.tree.flatten(batch)[0]) for batch in batches)
        return kept

    def split(self, held_out: IntArray) -> tuple[Feed, Feed]:
        """Two feeds of arrays: one without the rows of these numbers, and one of these rows alone."""
        rest = np.setdiff1d(np.arange(self.num_examples or 0), held_out)
        return self.of_rows(rest), self.of_rows(held_out)

    def of_rows(self, rows: IntArray) -> Feed:
        """A feed of these rows of arrays, in this order."""
        part = copy.copy(self)
        part._arrays = tuple(_take_rows(one, rows) for one in self._arrays or ())
        part.num_examples = len(rows)
        return part

    @property
    def num_steps(self) -> int | None:
        """Batches in an epoch; `None`: unknown."""
        if self.holds_arrays:
            return -(-(self.num_examples or 0) // (self.batch_size or BATCH_SIZE))
        return None if self._num_batches in (None, math.inf) else int(self._num_batches or 0)

    @property
    def holds_arrays(self) -> bool:
        """Whether all examples are in memory, as arrays."""
        return self._arrays is not None

    def as_arrays(self, num_examples: int | None = None) -> Batch:
        """`(x, y, sample_weight)` of as many examples as in `fit_arguments`, as arrays."""
        parts = [keras.utils.unpack_x_y_sample_weight(part) for part in self.take(num_examples)]
        return tuple(
            None if one[0] is None else keras.tree.map_structure(_join_arrays, *one)
            for one in zip(*parts, strict=True)
        )

    def _spread(self, part: Tree, num: int | None) -> Tree:
        """`num` rows, evenly spread over the array, since data is often sorted by class."""
        if num is None or self.num_examples is None or num >= self.num_examples:
            return part
        return _take_rows(part, np.linspace(0, self.num_examples - 1, num).round().astype(int))

    def _check(self, model: keras.Model, targets: bool) -> Batch:
        """Checks the first examples; returns them."""
        if self._arrays is not None:
            if not self.num_examples:
                raise ValueError(
                    "The data set is empty. Expected at least one example. Received: ds with 0 examples"
                )
            first = tuple(_slice_rows(part, 0, 2) for part in self._arrays)
            for name, part in zip(("x", "y"), self._arrays[:2], strict=True):
                _check_finite(name, part)
        else:
            first, self._batches = _peek(self._batches)
        x, y, weight = first
        self.has_targets, self.has_weights = y is not None, weight is not None
        _check_inputs(x, model)
        if targets and y is None:
            raise ValueError(
                "The data set yields no targets, and they are needed here. Expected `(x, y)` pairs. "
                f"Received: ds with elements x={_shapes_of(x)}, y=None"
            )
        return first


class _BatchesInMemory(keras.utils.PyDataset):
    """A list of batches as a data set."""

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self._kept = batches

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Batch:
        return self._kept[index]


def flat_inputs(feed: Feed, model: keras.Model, num: int | None = None) -> list[Array]:
    """A model's flattened inputs as arrays, with the shapes and dtypes that the model has.

    Args:
        feed: Where they come from.
        model: The model whose inputs they are.
        num: Number of examples: evenly spread over arrays, the first ones of an iterable; `None`: all.

    Returns:
        An array `(num_examples, ...)` for each input.
    """
    parts = [_flatten_inputs(x, model) for x, *_ in feed.take(num)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def input_batches(feed: Feed, model: keras.Model, num: int | None = None) -> Iterator[list[Array]]:
    """A model's flattened inputs as in `flat_inputs`, in batches of the feed's size."""
    size = feed.batch_size or BATCH_SIZE
    for x, *_ in feed.take(num):
        arrays = _flatten_inputs(x, model)
        for start in range(0, len(arrays[0]), size):
            yield [array[start : start + size] for array in arrays]


def inputs_and_targets(feed: Feed, model: keras.Model) -> tuple[list[Array], Tree]:
    """All flattened inputs, as `flat_inputs` gives them, and the targets in their own structure."""
    parts = [(_flatten_inputs(x, model), y) for x, y, _ in feed.batches()]
    x = [np.concatenate(column) for column in zip(*(x for x, _ in parts), strict=True)]
    return x, keras.tree.map_structure(_join_arrays, *(y for _, y in parts))


def _flatten_inputs(x: Tree, model: keras.Model) -> list[Array]:
    """A batch as a list of arrays in the order, and with the shapes and dtypes, of the model's inputs."""
    arrays = []
    for leaf, t in zip(in_order_of_inputs(x, model), model.inputs, strict=True):
        array = leaf if isinstance(leaf, np.ndarray) else keras.ops.convert_to_numpy(leaf)
        array = array.astype(keras.backend.standardize_dtype(t.dtype))
        # an axis of size 1 at the end may be missing or added, as in `fit`
        if array.ndim + 1 == len(t.shape):
            array = array[..., None]
        elif array.ndim == len(t.shape) + 1:
            array = array[..., 0]
        arrays.append(array)
    return arrays


def _split_arrays(ds: Data) -> Batch | None:
    """`(x, y, sample_weight)` of data in memory, `None` for an iterable of batches."""
    if isinstance(ds, (dict, np.ndarray)) or _is_array(ds):
        return (ds, None, None)
    if isinstance(ds, list) and ds and all(_is_array(part) for part in ds):
        return (ds, None, None)
    if isinstance(ds, tuple):
        if not 1 <= len(ds) <= 3:
            raise ValueError(
                "A tuple of data holds `(x, y)` or `(x, y, sample_weight)`. "
                f"Received: ds of {len(ds)} entries"
            )
        return (*ds, None, None)[:3]
    return None


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not hasattr(value, "element_spec")


def _convert_array(array: Any) -> Array | None:
    """A tensor of any framework, or a data frame, as an array that arrays can index."""
    if array is None or isinstance(array, np.ndarray):
        return array
    return keras.ops.convert_to_numpy(array)


def _check_are_arrays(name: str, part: Tree) -> None:
    """Refuses lists of numbers, as `fit` does."""
    for leaf in keras.tree.flatten(part):
        if leaf is not None and not getattr(leaf, "shape", ()):
            raise ValueError(
                "The data holds Python numbers or texts. Expected arrays: `numpy.asarray(...)` of lists. "
                f"Received: {name} of type {type(part).__name__} with a {type(leaf).__name__} in it"
            )


def _count_examples(arrays: Batch) -> int:
    sizes = {
        name: [len(leaf) for leaf in keras.tree.flatten(part) if leaf is not None]
        for name, part in zip(("x", "y", "sample_weight"), arrays, strict=False)
    }
    found = {size for several in sizes.values() for size in several}
    if len(found) != 1:
        listed = (f"{', '.join(map(str, several))} of {name}" for name, several in sizes.items() if several)
        raise ValueError(
            "The arrays of the data set differ in their number of examples. "
            f"Received: ds with examples: {', '.join(listed)}"
        )
    return found.pop()


def _check_iterable(ds: Data, steps_per_epoch: int | None) -> Iterable[Any]:
    """The data set, if it can be iterated over more than once."""
    if isinstance(ds, list):  # of batches
        _check_are_arrays("ds", ds)
    if isinstance(ds, str) or not (hasattr(ds, "__iter__") or hasattr(ds, "__getitem__")):
        raise ValueError(
            "Expected what `model.fit` takes: `(x, y)` arrays, a tf.data.Dataset, a PyDataset, a "
            f"DataLoader or a generator. Received: ds={ds!r} (of type {type(ds).__name__})"
        )
    if isinstance(ds, Iterator) and steps_per_epoch is None:
        raise ValueError(
            "A generator can be read only once, and the data is read many times. Pass "
            "`steps_per_epoch` with an endless generator, or use a tf.data.Dataset, a PyDataset or "
            f"arrays. Received: ds={ds!r}"
        )
    return cast("Iterable[Any]", ds)


def _peek(batches: Iterable[Any]) -> tuple[Batch, Iterable[Any]]:
    """The first batch, and the batches with the first one still among them."""
    iterator = _iterate(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("The data set is empty. Expected at least one batch. Received: ds with 0 batches")
    if isinstance(batches, Iterator):
        batches = _prepend(first, iterator)
    return keras.utils.unpack_x_y_sample_weight(first), batches


def _prepend(first: Any, rest: Iterator[Any]) -> Generator[Any, None, None]:
    yield first
    yield from rest


def count_batches(ds: Any) -> float | None:
    """The number of batches of an iterable, infinite if it is endless; `None` if it does not say."""
    try:
        if isinstance(ds, keras.utils.PyDataset):
            num = ds.num_batches
            return math.inf if num is None else num
        cardinality = getattr(ds, "cardinality", None)  # of a tf.data.Dataset
        if callable(cardinality):
            num = int(cardinality())
            return {_INFINITE: math.inf, _UNKNOWN: None}.get(num, num)
        num = len(ds)
    except (TypeError, NotImplementedError):
        return None
    return math.inf if num >= sys.maxsize else num  # a repeated Grain data set has that length


def _iterate(batches: Any) -> Iterator[Any]:
    if isinstance(batches, keras.utils.PyDataset):
        num = count_batches(batches)
        is_open = num is None or num == math.inf
        return (batches[i] for i in (itertools.count() if is_open else range(int(num or 0))))
    return iter(batches)


class EndWatch(keras.callbacks.Callback):
    """Warns once if data of unknown length has not ended after many examples.

    Args:
        batch_size: Examples in a batch.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self._at: float = max(MANY_EXAMPLES // batch_size, 1)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Warns if it is time to."""
        if batch + 1 < self._at:
            return
        self._at = math.inf
        warnings.warn(
            "The data set does not say how long it is, and has not ended after "
            f"{batch + 1:,} batches. If it is endless, stop, and pass `steps_per_epoch` (of validation data: "
            "`validation_steps`), or a part of it.",
            stacklevel=2,
        )

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Warns if it is time to."""
        self.on_train_batch_end(batch)


def _limit_batches(batches: Iterable[Batch], num_examples: int) -> Iterator[Batch]:
    """Batches of NumPy arrays that hold `num_examples` examples together; the last one is cut to fit."""
    left = num_examples
    for batch in batches:
        arrays = keras.tree.map_structure(
            lambda part: None if part is None else keras.ops.convert_to_numpy(part), tuple(batch)
        )
        yield tuple(part for part in (_slice_rows(part, 0, left) for part in arrays) if part is not None)
        left -= len(keras.tree.flatten(arrays[0])[0])
        if left <= 0:
            return


def _take_rows(part: Tree, rows: IntArray) -> Tree:
    return keras.tree.map_structure(lambda a: None if a is None else a[rows], part)


def _join_arrays(*arrays: Any) -> Array:
    return np.concatenate([keras.ops.convert_to_numpy(one) for one in arrays])


def _slice_rows(part: Tree, start: int, stop: int) -> Tree:
    return keras.tree.map_structure(lambda a: None if a is None else a[start:stop], part)


def _check_finite(name: str, part: Tree) -> None:
    for array in keras.tree.flatten(part):
        if array is None or not np.issubdtype(getattr(array, "dtype", np.int64), np.floating):
            continue
        bad = ~np.isfinite(np.asarray(array)).reshape(len(array), -1).all(1)
        if bad.any():
            raise ValueError(
                f"The data holds NaN or infinity in {bad.sum()} of {len(array)} examples. Remove "
                f"them. Received: {name} with the first such example at index {bad.argmax()}"
            )


def _check_inputs(x: Tree, model: keras.Model) -> None:
    expected = [tuple(t.shape) for t in model.inputs]
    received = _shapes_of(in_order_of_inputs(x, model))
    fits = len(expected) == len(received) and all(
        _fits_input(shape, want) for shape, want in zip(received, expected, strict=True)
    )
    if not fits:
        received = [(None, *shape[1:]) if shape else shape for shape in received]  # of any number of examples
        raise ValueError(
            f"The data does not fit the model's inputs. Expected shapes {expected} (batch first). "
            f"Received: ds with x of shapes {received}"
        )


def _fits_input(shape: Shape, want: Shape) -> bool:
    """Whether data fits an input. As in Keras, an axis of size 1 at the end may be missing or added."""
    shape, want = shape[1:], want[1:]
    if len(shape) + 1 == len(want) and want[-1] == 1:
        want = want[:-1]
    elif len(shape) == len(want) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    return len(shape) == len(want) and all(w in (None, s) for s, w in zip(shape, want, strict=True))


def _form_of(part: Any) -> tuple[Shape, str]:
    """Shape without the examples, and dtype, of a part of a batch."""
    return tuple(getattr(part, "shape", ()))[1:], str(getattr(part, "dtype", type(part)))


def _shapes_of(x: Tree) -> list[Shape]:
    return [tuple(part.shape) for part in keras.tree.flatten(x)]
