"""Tasks of KerasHub: which models are such, and their data as their layers read it."""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_taylor.support.datasets import BATCH_SIZE
from keras_taylor.support.types import Data

_CHUNK = 1024  # examples that are preprocessed at once
_COMPARED = 8  # examples that are preprocessed twice, to see whether chance is in it


def is_task(model: object) -> bool:
    """Whether a model is a task of KerasHub: a backbone, a preprocessor and a head."""
    return _is_instance(model, "Task")


def is_from_hub(model: object) -> bool:
    """Whether a model is a task or a backbone of KerasHub."""
    return is_task(model) or _is_instance(model, "Backbone")


def has_configuration(model: keras.Model) -> bool:
    """Whether a task or backbone can be made from its configuration: a plain `Task` of layers cannot."""
    return not is_task(model) or getattr(model, "backbone", None) is not None


def hub_class(name: str) -> Any:
    """A class of KerasHub's models; an empty tuple if KerasHub, which is optional, is not imported."""
    return getattr(getattr(sys.modules.get("keras_hub"), "models", None), name, ())


def _is_instance(model: object, name: str) -> bool:
    return isinstance(model, hub_class(name))


def preprocessed(model: keras.Model, ds: Data, batch_size: int | None = None, argument: str = "ds") -> Data:
    """What the layers of a model read of the data that its `fit` takes.

    The preprocessor of a task is applied as `fit` applies it: once to data in memory, unless it draws random
    numbers; else in each pass. Other models get their data as it is.

    Args:
        model: Any model.
        ds: Data, as for `model.fit`; `None`: none.
        batch_size: Examples in a batch of data in memory; `None`: 32.
        argument: The name of the argument, for messages.

    Raises:
        ValueError: if a model of KerasHub without a preprocessor gets texts, or a task something that its
            `fit` does not take.
    """
    if ds is None or not is_from_hub(model):
        return ds
    if getattr(model, "preprocessor", None) is None:
        _refuse_texts(model, ds, argument)
        return ds

    def prepare(batch: tuple[Any, ...]) -> tuple[Any, ...]:
        parts = keras.utils.unpack_x_y_sample_weight(model.preprocess_samples(*map(_as_taken, batch)))
        return tuple(keras.tree.map_structure(_as_array, part) for part in parts if part is not None)

    parts = _parts_in_memory(ds)
    if parts is None:
        return _map_batches(ds, model, prepare, argument)
    size = len(_leaves(parts[0])[0])
    first, again = (keras.tree.flatten(prepare(_rows(parts, 0, _COMPARED))) for _ in range(2))
    if not all(map(np.array_equal, first, again)):
        step = batch_size or BATCH_SIZE
        return _MappedBatches([_rows(parts, start, start + step) for start in range(0, size, step)], prepare)
    chunks = [prepare(_rows(parts, start, start + _CHUNK)) for start in range(0, size, _CHUNK)]
    return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *chunks)


def _as_array(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else keras.ops.convert_to_numpy(value)


class _MappedBatches(keras.utils.PyDataset):
    """A data set of batches, each of which is preprocessed when it is read."""

    def __init__(self, batches: Any, prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
        super().__init__()
        self._batches, self._prepare = batches, prepare

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self._prepare(keras.utils.unpack_x_y_sample_weight(self._batches[index]))


def _map_batches(
    ds: Data, model: keras.Model, prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]], argument: str
) -> Data:
    """A data set whose batches are preprocessed when they are read."""
    if hasattr(ds, "element_spec"):  # a tf.data.Dataset, which calls the preprocessor in a graph
        return ds.map(model.preprocess_samples)
    if isinstance(ds, (list, keras.utils.PyDataset)):
        return _MappedBatches(ds, prepare)
    if isinstance(ds, Iterator):
        return (prepare(keras.utils.unpack_x_y_sample_weight(batch)) for batch in ds)
    if hasattr(ds, "map"):  # of Grain
        return ds.map(lambda batch: prepare(keras.utils.unpack_x_y_sample_weight(batch)))
    raise ValueError(
        f"The task '{model.name}' preprocesses its data. Expected what its `fit` takes: arrays, texts, or a "
        f"data set of batches (tf.data, Grain, PyDataset). Received: {argument}={ds!r}"
    )


def _parts_in_memory(ds: Data) -> tuple[Any, ...] | None:
    """`(x, y, sample_weight)` of data in memory without `None` at the end, `None` for a data set."""
    if isinstance(ds, tuple):
        return tuple(ds[: 1 + max((i for i, part in enumerate(ds) if part is not None), default=0)])
    is_listed = isinstance(ds, list) and bool(ds) and not isinstance(ds[0], (tuple, list, dict))
    is_array = hasattr(ds, "shape") and hasattr(ds, "dtype") and not hasattr(ds, "element_spec")
    return (ds,) if is_listed or is_array or isinstance(ds, dict) else None


def _map_leaves(function: Callable[[Any], Any], part: Any) -> Any:
    """Maps the leaves of data as KerasHub's `fit` sees them: a list is one, of an entry for each example."""
    if isinstance(part, tuple):
        return tuple(_map_leaves(function, one) for one in part)
    if isinstance(part, dict):
        return {key: _map_leaves(function, one) for key, one in part.items()}
    return function(part)


def _leaves(part: Any) -> list[Any]:
    found: list[Any] = []
    _map_leaves(found.append, part)
    return found


def _rows(part: Any, start: int, stop: int) -> Any:
    return _map_leaves(lambda leaf: None if leaf is None else leaf[start:stop], part)


def _as_taken(part: Any) -> Any:
    """A part of a batch as a preprocessor takes it: lists of texts, arrays of numbers."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "USO":
            return [text.decode() if isinstance(text, bytes) else text for text in leaf.tolist()]
        if isinstance(leaf, list) and not isinstance(leaf[0], (str, bytes)):
            array = np.asarray(leaf)
            return array.astype({"f": "float32", "i": "int32"}.get(array.dtype.kind, array.dtype))
        return leaf

    return _map_leaves(convert, part)


def _refuse_texts(model: keras.Model, ds: Data, argument: str) -> None:
    """Refuses texts for a model that has nothing to make numbers of them."""
    for leaf in itertools.chain.from_iterable(map(_leaves, _parts_in_memory(ds) or ())):
        first = leaf[0] if isinstance(leaf, list) and leaf else leaf
        kind = getattr(getattr(first, "dtype", None), "kind", None)
        if isinstance(first, (str, bytes)) or kind in ("U", "S", "O"):
            raise ValueError(
                f"The model '{model.name}' has no preprocessor, and the data holds texts. Expected a task "
                "with its preprocessor (`task.preprocessor = ...`), or what its layers read, such as the ids "
                f"of tokens. Received: {argument} with texts, preprocessor=None"
            )
