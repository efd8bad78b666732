"""What a user sees while work goes on: lines, a live bar, tables, and the seconds of each phase."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

import keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

Verbose: TypeAlias = Literal["auto", 0, 1, 2]
Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 15


@contextlib.contextmanager
def expected_tracing() -> Iterator[None]:
    """Leaves out TensorFlow's warnings that a function is traced again and again: each round has a new model.

    TensorFlow counts by addresses in memory, which the functions of a new model take over from freed ones.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return "triggered tf.function retracing" not in record.getMessage()

    logger = logging.getLogger("tensorflow")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


class Reporter:
    """Prints lines, and shows progress: as a live bar in a terminal or notebook, else in a line every 15 s.

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
        self._progress: Progress | _ProgressLines | None = None
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
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.start()
        elif not self._silent:
            self._progress = _ProgressLines(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(self._progress, Progress):
            self._progress.stop()
        self._progress = None

    def track(self, items: Sequence[Item], phase: str) -> Iterator[Item]:
        """Yields the items, and notes the progress of `phase` after each."""
        if self._progress is None:
            yield from items
            return
        task = self._progress.add_task(phase, total=len(items))
        for item in items:
            yield item
            self._progress.advance(task)
        self._progress.remove_task(task)

    def callback(self, phase: str) -> list[keras.callbacks.Callback]:
        """A list with a Keras callback that notes the progress of `phase`; empty if nothing shows it."""
        return [] if self._progress is None else [_BatchProgress(self._progress, phase)]


class _ProgressLines:
    """Says at most every 15 seconds how far a phase is, with the methods of rich's `Progress`.

    Args:
        reporter: What prints the lines.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._say = reporter.say
        self._phases: dict[TaskID, tuple[str, float | None, float]] = {}
        self._steps: dict[TaskID, int] = {}
        self._last_line = time.monotonic()

    def add_task(self, description: str, total: float | None = None) -> TaskID:
        """Begins a phase of so many steps."""
        task = TaskID(len(self._phases))
        self._phases[task], self._steps[task] = (description, total, time.monotonic()), 0
        return task

    def advance(self, task_id: TaskID) -> None:
        """Notes a step; prints a line if the last one is long ago."""
        self._steps[task_id] += 1
        now, steps = time.monotonic(), self._steps[task_id]
        phase, total, first = self._phases[task_id]
        if steps == 1:
            first = now  # compiling is over: it takes longer than many steps
            self._phases[task_id] = phase, total, first
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = "" if total is None else f" of {total}"
        if total is not None and steps > 1:
            left += f", {describe_duration((total - steps) * (now - first) / (steps - 1))} left"
        self._say(f"{phase}: step {steps}{left}")

    def remove_task(self, task_id: TaskID) -> None:
        """Ends a phase."""
        self._steps.pop(task_id)


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
    """Notes progress batch by batch."""

    def __init__(self, progress: Progress | _ProgressLines, phase: str) -> None:
        super().__init__()
        self._progress, self._phase = progress, phase
        self._task = TaskID(0)

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        steps, epochs = self.params.get("steps"), self.params.get("epochs") or 1
        self._task = self._progress.add_task(self._phase, total=steps * epochs if steps else None)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._progress.advance(self._task)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self._progress.remove_task(self._task)
