"""In what two plans for the same model differ."""

import dataclasses
from collections.abc import Mapping

from rich.table import Table

from keras_taylor.support.console import render_table

_SHOWN = 8  # indices of channels in a cell of the table


@dataclasses.dataclass(frozen=True)
class LayerDifference:
    """In what two plans differ at a layer.

    Attributes:
        width: Channels of the original.
        first_only, second_only: Indices of the channels that only one of the plans keeps.
        second: How many channels the second plan keeps.
    """

    width: int
    first_only: tuple
    second_only: tuple
    second: int

    @property
    def first(self):
        """How many channels the first plan keeps."""
        return self.second + len(self.first_only) - len(self.second_only)


@dataclasses.dataclass(frozen=True)
class PlanDifference:
    """In what two plans differ (`first - second`); it prints as a table, and is false if they do not.

    Attributes:
        layers: Layer name -> `LayerDifference`, where the plans keep other channels.
        costs: What the first plan leaves minus what the second leaves, of each cost that both know.
    """

    layers: Mapping[str, LayerDifference]
    costs: Mapping[str, int]

    def __bool__(self):
        return bool(self.layers)

    def __str__(self):
        if not self.layers:
            return "The plans keep the same channels."
        table = Table()
        for column in ("layer", "channels", "first keeps", "second keeps", "only first", "only second"):
            table.add_column(column, justify="right" if "keeps" in column else "left", overflow="fold")
        for name, one in self.layers.items():
            numbers = map(str, (one.width, one.first, one.second))
            table.add_row(name, *numbers, _listed(one.first_only), _listed(one.second_only))
        costs = ", ".join(f"{what} {difference:+,}" for what, difference in self.costs.items())
        return f"first - second: {costs or 'costs unknown'}\n{render_table(table)}"


def _listed(indices):
    more = f" and {len(indices) - _SHOWN} more" if indices[_SHOWN:] else ""
    return ", ".join(map(str, indices[:_SHOWN])) + more
