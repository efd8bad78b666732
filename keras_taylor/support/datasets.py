"""Reads whatever `model.fit` takes."""

import copy
import itertools
import sys
from collections.abc import Iterator

import keras
import numpy as np

from keras_taylor.support.replicas import check_batches

# Examples a batch of arrays where nothing is said, as in `fit`.
BATCH_SIZE = 32


class Feed:
    """A data set, checked, in the form in which `fit` wants it.

    Args:
        ds: `(x, y)` or `(x, y, sample_weight)` of arrays (or dicts or lists of them),
            a bare array or dict, or any iterable of batches that `fit` takes.
        model: The model that will be fed.
        batch_size: Examples a batch, for arrays.
        steps_per_epoch: Batches an epoch, for endless iterables.
        sample_weight: Weights of the examples, for arrays.
        targets: Whether targets are needed.

    Attributes:
        num_examples: How many there are; for an iterable the number of batches times
            the size of the first one, `None` where it does not tell.
        has_targets, has_weights: Whether the first batch has some.
    """

    def __init__(self, ds, model, batch_size=None, steps_per_epoch=None, sample_weight=None, targets=True):
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self._arrays = _as_arrays(ds)
        if self._arrays is not None:
            if sample_weight is not None:
                self._arrays = (*self._arrays[:2], sample_weight)
            self._arrays = tuple(keras.tree.map_structure(_to_numpy, part) for part in self._arrays)
            self.num_examples = _num_examples(self._arrays)
        else:
            self._batches = _iterable(ds, steps_per_epoch)
            self.num_examples = None
        first = self._check(model, targets)
        self._first_size = len(keras.tree.flatten(first)[0])
        if self.num_examples is None and steps_per_epoch is None:
            self.num_examples = _at_most(self._batches, first)

    def fit_arguments(self, num_examples=None):
        """Arguments of `fit` for all examples, or for `num_examples`: the first ones of an
        iterable, evenly spread over arrays."""
        if self._arrays is not None:
            x, y, weight = (self._spread(part, num_examples) for part in self._arrays)
            return {"x": x, "y": y, "sample_weight": weight, "batch_size": self.batch_size}
        if self.num_examples is not None and (num_examples or 0) >= self.num_examples:
            num_examples = None
        if num_examples is None and self.steps_per_epoch is None:
            return {"x": self._batches}
        if num_examples is None:
            return {"x": self._batches, "steps_per_epoch": self.steps_per_epoch}
        return {"x": _limited(self.batches(), num_examples)}

    def check_devices(self, num_examples=None, split=0.0):
        """Refuses batches that do not go round where several devices share each, as far as they are known.

        Args:
            num_examples: As in `fit_arguments`.
            split: The part of arrays that `fit` keeps for validation.

        Raises:
            ValueError: see `replicas.check_batches`.
        """
        if self._arrays is None:
            limited = num_examples is not None and num_examples < (self.num_examples or sys.maxsize)
            return check_batches(num_examples if limited else None, self._first_size)
        total = min(num_examples or self.num_examples, self.num_examples)
        trained = int(total * (1 - split))
        for part in (trained, total - trained):
            if part:
                check_batches(part, self.batch_size or BATCH_SIZE)

    def _spread(self, part, num):
        """So many examples, evenly over the array: data is often sorted by class."""
        if num is None or num >= self.num_examples:
            return part
        rows = np.linspace(0, self.num_examples - 1, num).round().astype(int)
        return keras.tree.map_structure(lambda a: None if a is None else a[rows], part)

    def batches(self):
        """Iterates over one epoch of `(x, y, sample_weight)` batches."""
        if self._arrays is not None:
            size = self.batch_size or BATCH_SIZE
            for start in range(0, self.num_examples, size):
                yield tuple(_slice(part, start, start + size) for part in self._arrays)
        else:
            for batch in itertools.islice(_elements(self._batches), self.steps_per_epoch):
                yield keras.utils.unpack_x_y_sample_weight(batch)

    def some(self, num_examples=None):
        """Iterates over batches that start with x, of as many examples as in `fit_arguments`."""
        if num_examples is None:
            yield from self.batches()
        elif self._arrays is not None:
            yield tuple(self._spread(part, num_examples) for part in self._arrays)
        else:
            yield from _limited(self.batches(), num_examples)

    def held(self, num_examples=None):
        """A feed of as many of the examples as in `fit_arguments`, in memory: each pass reads the same."""
        held = copy.copy(self)
        if self._arrays is not None:
            held._arrays = tuple(self._spread(part, num_examples) for part in self._arrays)
            held.num_examples = _num_examples(held._arrays)
        else:
            batches = list(_limited(self.batches(), num_examples or sys.maxsize))
            held._batches, held.steps_per_epoch = _Batches(batches), None
            held.num_examples = sum(len(keras.tree.flatten(batch)[0]) for batch in batches)
        return held

    def _check(self, model, targets):
        if self._arrays is not None:
            if not self.num_examples:
                raise ValueError(
                    "The data set is empty. Expected at least one example. Received: ds with 0 examples"
                )
            first = tuple(_slice(part, 0, 2) for part in self._arrays)
            for what, part in zip(("x", "y"), self._arrays[:2], strict=True):
                _check_finite(what, part)
        else:
            first, self._batches = _peek(self._batches)
        x, y, weight = first
        self.has_targets, self.has_weights = y is not None, weight is not None
        _check_inputs(x, model)
        if targets and y is None:
            raise ValueError(
                "The data set yields no targets, and they are needed here. Expected `(x, y)` pairs. "
                f"Received: ds with elements x={_shapes(x)}, y=None"
            )
        return x


class _Batches(keras.utils.PyDataset):
    """Batches in memory."""

    def __init__(self, batches):
        super().__init__()
        self._held = batches

    def __len__(self):
        return len(self._held)

    def __getitem__(self, index):
        return self._held[index]


def _as_arrays(ds):
    """`(x, y, sample_weight)` for data in memory, `None` for an iterable of batches."""
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


def _is_array(value):
    return hasattr(value, "shape") and hasattr(value, "dtype") and not hasattr(value, "element_spec")


def _to_numpy(array):
    """Tensors of any framework and data frames, as arrays that can be indexed with arrays."""
    if array is None or isinstance(array, np.ndarray):
        return array
    return keras.ops.convert_to_numpy(array)


def _num_examples(arrays):
    sizes = {len(part) for part in keras.tree.flatten(arrays) if part is not None}
    if len(sizes) != 1:
        raise ValueError(
            "The arrays of the data set differ in their number of examples. "
            f"Received: ds with arrays of {sorted(sizes)} examples"
        )
    return sizes.pop()


def _iterable(ds, steps_per_epoch):
    if not hasattr(ds, "__iter__") and not hasattr(ds, "__getitem__"):
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
    return ds


def _peek(batches):
    """The first batch, and the batches as if it had not been taken."""
    iterator = _elements(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("The data set is empty. Expected at least one batch. Received: ds with 0 batches")
    if isinstance(batches, Iterator):
        batches = _chained(first, iterator)
    return keras.utils.unpack_x_y_sample_weight(first), batches


def _at_most(batches, first):
    try:
        return len(batches) * len(keras.tree.flatten(first)[0])
    except TypeError:  # an iterable that does not know its length
        return None


def _chained(first, rest):
    yield first
    yield from rest


def _elements(batches):
    if isinstance(batches, keras.utils.PyDataset):
        return (batches[i] for i in range(batches.num_batches or len(batches)))
    return iter(batches)


def _limited(batches, num_examples):
    """Batches of NumPy arrays until so many examples are through, the last one cut to fit."""
    left = num_examples
    for batch in batches:
        batch = keras.tree.map_structure(
            lambda part: None if part is None else keras.ops.convert_to_numpy(part), tuple(batch)
        )
        yield tuple(part for part in (_slice(part, 0, left) for part in batch) if part is not None)
        left -= len(keras.tree.flatten(batch[0])[0])
        if left <= 0:
            return


def _slice(part, start, stop):
    return keras.tree.map_structure(lambda a: None if a is None else a[start:stop], part)


def _check_finite(what, part):
    for array in keras.tree.flatten(part):
        if array is None or not np.issubdtype(getattr(array, "dtype", np.int64), np.floating):
            continue
        bad = ~np.isfinite(np.asarray(array)).reshape(len(array), -1).all(1)
        if bad.any():
            raise ValueError(
                f"The data holds NaN or infinity in {bad.sum()} of {len(array)} examples. Remove "
                f"them. Received: {what} with the first such example at index {bad.argmax()}"
            )


def _check_inputs(x, model):
    expected = [tuple(t.shape) for t in model.inputs]
    received = [tuple(part.shape) for part in keras.tree.flatten(x)]
    fits = len(expected) == len(received) and all(
        _fits(shape, want) for shape, want in zip(received, expected, strict=True)
    )
    if not fits:
        raise ValueError(
            f"The data does not fit the model's inputs. Expected shapes {expected} (batch first). "
            f"Received: ds with x of shapes {received}"
        )


def _fits(shape, want):
    """As Keras does, an axis of size 1 at the end may be missing or added."""
    shape, want = shape[1:], want[1:]
    if len(shape) + 1 == len(want) and want[-1] == 1:
        want = want[:-1]
    elif len(shape) == len(want) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    return len(shape) == len(want) and all(w in (None, s) for s, w in zip(shape, want, strict=True))


def _shapes(x):
    return [tuple(part.shape) for part in keras.tree.flatten(x)]
