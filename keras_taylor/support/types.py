"""Names for the kinds of values that functions pass to each other."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
IntArray: TypeAlias = npt.NDArray[np.integer[Any]]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

# A tensor of whichever backend Keras runs on, eager or symbolic. Backends share no common class.
Tensor: TypeAlias = Any

# A nested structure of tensors, as `keras.tree` walks it.
Tree: TypeAlias = Any

# Whatever `model.fit` takes: `(x, y)` arrays, a tf.data.Dataset, a PyDataset, a DataLoader, a generator.
Data: TypeAlias = Any

# Sizes of all axes, the batch's among them; `None` where a size is not known.
Shape: TypeAlias = tuple[int | None, ...]

# Which entries stay along each axis of a weight, `None` for an axis that stays whole.
Masks: TypeAlias = Sequence[BoolArray | None]

# What is counted or measured of a model: "params", "flops", ... -> a number, `None` where it is unknown.
Costs: TypeAlias = Mapping[str, int | None]

# How users name layers: names, regular expressions that match whole names, or layers; one or several.
LayerPatterns: TypeAlias = str | keras.Layer | Iterable[str | keras.Layer]
