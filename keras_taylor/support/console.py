"""What a user sees while work goes on: lines, a live bar, tables, and the seconds of each phase."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

import keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

Verbose: TypeAlias = Literal["auto", 0, 1, 2]
Item = TypeVar("Item")


class Reporter:
    """Prints lines, and a live bar where a terminal or a notebook can show it.

    Args:
        verbose: 0 is silent. 1 shows lines and a live bar, in a notebook also a live table and plot.
            2 shows lines only. "auto" is 1 in a terminal or notebook and 2 elsewhere (a pipe, a log file).
        console: A rich `Console`; `None`: standard output.

    Raises:
        ValueError: if `verbose` has another value.
    """

    def __init__(self, verbose: Verbose = "auto", console: Console | None = None) -> None:
        if verbose not in ("auto", 0, 1, 2):
            raise ValueError(f'`verbose` is 0, 1, 2 or "auto". Received: verbose={verbose!r}')
        self._console = console or Console(soft_wrap=True)
        interactive = self._console.is_terminal or self._console.is_jupyter
        self._silent = verbose == 0
        self._live = verbose in ("auto", 1) and interactive
        self._bar: Progress | None = None
        self._view: Any = None  # IPython's display handle

    def say(self, text: str) -> None:
        """Prints one line."""
        if not self._silent:
            self._console.print(text, highlight=False, markup=False)

    def show(self, report: object) -> None:
        """In a notebook, keeps one view of a report up to date. Elsewhere it does nothing."""
        if not (self._live and self._console.is_jupyter):
            return
        if self._view is None:
            self._view = importlib.import_module("IPython.display").display(report, display_id=True)
        else:
            self._view.update(report)

    def __enter__(self) -> Reporter:
        if self._live and _can_show_bars(self._console):
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def track(self, items: Sequence[Item], phase: str) -> Iterator[Item]:
        """Yields the items, and moves the bar named `phase` after each."""
        if self._bar is None:
            yield from items
            return
        task = self._bar.add_task(phase, total=len(items))
        for item in items:
            yield item
            self._bar.advance(task)
        self._bar.remove_task(task)

    def callback(self, phase: str) -> list[keras.callbacks.Callback]:
        """A list with a Keras callback that moves the bar named `phase`; an empty list without a bar."""
        return [] if self._bar is None else [_BatchProgress(self._bar, phase)]


def describe_duration(seconds: float) -> str:
    """A duration in words, such as "about 40 s" or "about 3 min"."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.2g} {unit}"
    return f"about {max(seconds, 1):.0f} s"


def render_table(table: Table, width: int = 100) -> str:
    """A rich table as plain text of at most `width` columns."""
    # in a notebook rich would display the table itself, or write it with colors
    console = Console(
        file=io.StringIO(),
        width=width,
        force_jupyter=False,
        force_terminal=False,
        color_system=None,
        markup=False,  # names may hold brackets
        emoji=False,
    )
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


class Clock:
    """Measures the seconds of named phases.

    Attributes:
        seconds: Phase -> wall time in seconds.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose duration is noted under a name."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _can_show_bars(console: Console) -> bool:
    """In a notebook, rich needs ipywidgets for bars. Without it, rich warns on every line."""
    return not console.is_jupyter or importlib.util.find_spec("ipywidgets") is not None


class _BatchProgress(keras.callbacks.Callback):
    """Moves a bar batch by batch."""

    def __init__(self, bar: Progress, phase: str) -> None:
        super().__init__()
        self._bar, self._phase = bar, phase
        self._task = TaskID(0)

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        steps, epochs = self.params.get("steps"), self.params.get("epochs") or 1
        self._task = self._bar.add_task(self._phase, total=steps * epochs if steps else None)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._bar.advance(self._task)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self._bar.remove_task(self._task)
