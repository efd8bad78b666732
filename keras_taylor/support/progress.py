"""Tells the user what goes on while it goes on."""

import contextlib
import importlib
import importlib.util
import time

import keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Reporter:
    """Prints lines, and a live bar where there is a terminal or a notebook to show it.

    Args:
        verbose: 0 is silent, 1 shows lines and a live bar, in a notebook a live table and plot too,
            2 lines only; "auto" is 1 in a terminal or notebook and 2 elsewhere (a pipe, a log file).
        console: A rich `Console`, standard output by default.
    """

    def __init__(self, verbose="auto", console=None):
        if verbose not in ("auto", 0, 1, 2):
            raise ValueError(f'`verbose` is 0, 1, 2 or "auto". Received: verbose={verbose!r}')
        self._console = console or Console(soft_wrap=True)
        interactive = self._console.is_terminal or self._console.is_jupyter
        self._silent = verbose == 0
        self._live = verbose in ("auto", 1) and interactive
        self._bar = self._view = None

    def say(self, text):
        """Prints one line."""
        if not self._silent:
            self._console.print(text, highlight=False, markup=False)

    def show(self, report):
        """Keeps one view of what has been done so far in a notebook; elsewhere nothing is shown."""
        if not (self._live and self._console.is_jupyter):
            return
        if self._view is None:
            self._view = importlib.import_module("IPython.display").display(report, display_id=True)
        else:
            self._view.update(report)

    def __enter__(self):
        if self._live and _shows_bars(self._console):
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(self, *exception):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def each(self, items, phase):
        """Yields the items of a list, and moves the bar, item by item, under this name."""
        if self._bar is None:
            yield from items
            return
        task = self._bar.add_task(phase, total=len(items))
        for item in items:
            yield item
            self._bar.advance(task)
        self._bar.remove_task(task)

    def callback(self, phase):
        """A Keras callback that moves the bar, batch by batch, under this name; or none."""
        return [] if self._bar is None else [_BatchProgress(self._bar, phase)]


def about(seconds):
    """A time to come, in words: "about 40 s", "about 3 min"."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.2g} {unit}"
    return f"about {max(seconds, 1):.0f} s"


def _shows_bars(console):
    """In a notebook rich needs ipywidgets for that, and warns on every line without."""
    return not console.is_jupyter or importlib.util.find_spec("ipywidgets") is not None


class Clock:
    """Seconds of named phases."""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def phase(self, name):
        """Within it, time counts for this name."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


class _BatchProgress(keras.callbacks.Callback):
    def __init__(self, bar, phase):
        super().__init__()
        self._bar, self._phase = bar, phase

    def on_train_begin(self, logs=None):
        steps, epochs = self.params.get("steps"), self.params.get("epochs") or 1
        self._task = self._bar.add_task(self._phase, total=steps * epochs if steps else None)

    def on_train_batch_end(self, batch, logs=None):
        self._bar.advance(self._task)

    def on_train_end(self, logs=None):
        self._bar.remove_task(self._task)
