"""In which channels and costs two plans for the same model differ."""

import dataclasses
from collections.abc import Mapping, Sequence

from rich.table import Table

from keras_taylor.support.console import render_table

_MOST_INDICES_SHOWN = 8  # in a cell of the table


@dataclasses.dataclass(frozen=True)
class LayerDifference:
    """In which channels two plans differ at one layer.

    Attributes:
        width: Number of channels of the layer in the original model.
        first_only: Indices of the channels that only the first plan keeps, a tuple of ints.
        second_only: Indices of the channels that only the second plan keeps, a tuple of ints.
        second: Number of channels that the second plan keeps.
    """

    width: int
    first_only: tuple[int, ...]
    second_only: tuple[int, ...]
    second: int

    @property
    def first(self) -> int:
        """Number of channels that the first plan keeps."""
        return self.second + len(self.first_only) - len(self.second_only)


@dataclasses.dataclass(frozen=True)
class PlanDifference:
    """In which channels and costs two plans differ: the value of `first - second`.

    It prints as a table. It is false if the plans keep the same channels.

    Attributes:
        layers: Layer name -> `LayerDifference`, for layers that keep different channels.
        costs: Cost -> how much the first plan leaves minus how much the second leaves, an int (parameters,
            FLOPs, bytes), for each cost that both plans know.

    Example:

    >>> scores = keras_taylor.score(model, (x, y))
    >>> first, second = (keras_taylor.make_plan(model, scores, goal) for goal in (0.2, 0.4))
    >>> difference = first - second
    >>> difference.costs["params"] > 0
    True
    >>> bool(first - first)
    False
    """

    layers: Mapping[str, LayerDifference]
    costs: Mapping[str, int]

    def __bool__(self) -> bool:
        return bool(self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "The plans keep the same channels."
        table = Table()
        for column in ("layer", "channels", "first keeps", "second keeps", "only first", "only second"):
            table.add_column(column, justify="right" if "keeps" in column else "left", overflow="fold")
        for name, layer in self.layers.items():
            numbers = map(str, (layer.width, layer.first, layer.second))
            table.add_row(name, *numbers, _list_indices(layer.first_only), _list_indices(layer.second_only))
        costs = ", ".join(f"{cost} {difference:+,}" for cost, difference in self.costs.items())
        return f"first - second: {costs or 'costs unknown'}\n{render_table(table)}"


def _list_indices(indices: Sequence[int]) -> str:
    num_more = len(indices) - _MOST_INDICES_SHOWN
    more = f" and {num_more} more" if num_more > 0 else ""
    return ", ".join(map(str, indices[:_MOST_INDICES_SHOWN])) + more
