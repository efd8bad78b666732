"""How long the layers of a model take at any widths, from a table of times that is measured once."""

import os
from collections.abc import Callable
from typing import Final

from keras_taylor.budget.layer_grids import COARSEST_MULTIPLE, WidthGrid, WidthTimes, find_kernel_calls
from keras_taylor.budget.time_table import TimeTable
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.support.types import BoolArray

# Multiple -> by how many channels its widths may be below those of the coarsest multiple.
_OFFSETS: Final = {1: (3, 7), 4: (4,), 8: (8,)}
_MAX_SLOWDOWN = 1.05


class LayerTimes:
    """Times of a network's layers with kernels, each alone, at any widths.

    Each layer is timed at a grid of widths. Times at other widths are interpolated. NetAdapt (Yang et al.,
    2018, arXiv:1804.03230) also predicts latencies by sums over look-up tables of single layers.

    Args:
        labeled: The whole model.
        variant: Key of `formats.VARIANTS`; "keras" is this process's backend.
        batch_size: Number of examples in a call.
        cache_dir: Folder of the table; `None` for `keras_taylor` in Keras' own folder (`KERAS_HOME`, else
            `~/.keras`).
        say: A function that gets progress messages: how many layers have to be timed, and about how long
            that takes.

    Attributes:
        table: The `TimeTable`.

    Raises:
        ValueError: if no layer can be timed alone.
    """

    def __init__(
        self,
        labeled: LabeledModel,
        variant: str,
        batch_size: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.table = TimeTable(variant, batch_size, cache_dir, say)
        grids = {key: WidthGrid(call) for key, call in find_kernel_calls(labeled).items()}
        self.table.fill([layer for grid in grids.values() for layer in grid.layers()])
        found = {key: self._interpolate(grid) for key, grid in grids.items()}
        self._times = {key: times for key, times in found.items() if times is not None}
        self._grids = {key: grids[key] for key in self._times}
        if not self._times:
            names = sorted({key.name for key in grids})
            raise ValueError(
                "None of the layers can be timed alone, so the time that narrower layers save is unknown. "
                f"Ask for FLOPs instead of a latency. Received: layers {names} as '{variant}'"
            )

    def __call__(self, labeled: LabeledModel) -> Callable[[BoolArray], float]:
        """A function that maps a mask of kept units to the sum of the layers' times, in nanoseconds.

        Args:
            labeled: The same network, which may have lost channels and residual branches.
        """
        calls = find_kernel_calls(labeled)
        pairs = [(times, calls[key]) for key, times in self._times.items() if key in calls]
        return lambda kept: sum(times(call.widths(kept)) for times, call in pairs if call.stays(kept))

    def best_multiple(self) -> int:
        """The multiple of channels that widths should keep to: 1, 4, 8 or 16.

        The table holds times of round widths. If layers of other widths take more than 5 % longer than
        interpolation says for the same number of channels, the next coarser multiple is tried. Layers of
        less than 32 channels do not count.
        """
        for multiple, offsets in _OFFSETS.items():
            if all(self._slowdown(offset) <= _MAX_SLOWDOWN for offset in offsets):
                return multiple
        return COARSEST_MULTIPLE

    def _interpolate(self, grid: WidthGrid) -> WidthTimes | None:
        """The times of a layer at any widths, `None` if it cannot be timed alone."""
        times = [self.table[layer] for layer in grid.layers()]
        known = [nanoseconds for nanoseconds in times if nanoseconds is not None]
        return grid.interpolate(known) if len(known) == len(times) else None

    def _slowdown(self, offset: int) -> float:
        """Ratio of measured to interpolated time of all wide layers, `offset` channels below half width."""
        masks = {key: grid.mask_below_half(offset) for key, grid in self._grids.items()}
        layers = {key: self._grids[key].call.isolate(kept) for key, kept in masks.items() if not kept.all()}
        self.table.fill(layers.values())
        measured = interpolated = 0.0
        for key, layer in layers.items():
            nanoseconds = self.table[layer]
            if nanoseconds is not None:
                measured += nanoseconds
                interpolated += self._times[key](self._grids[key].call.widths(masks[key]))
        return measured / interpolated if interpolated else 1.0
