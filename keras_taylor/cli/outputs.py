"""The files that the command line writes: checked before any work, and never half-written."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

from keras_taylor.cli.failures import FileError
from keras_taylor.cli.loading import quiet_imports
from keras_taylor.cli.options import CompressOutputs
from keras_taylor.exports.formats import VARIANTS
from keras_taylor.support.files import AtomicFile


@dataclasses.dataclass(frozen=True)
class OutputPaths:
    """Where `compress` writes its files; all of them were checked.

    Attributes:
        result: The model at the last goal.
        intermediate: The models at all other goals, in their order.
        exports: Variant, as "litert-int8" -> the exported result.
        report: The HTML report, `None` for none.
    """

    result: pathlib.Path
    intermediate: list[pathlib.Path]
    exports: dict[str, pathlib.Path]
    report: pathlib.Path | None

    @property
    def info(self) -> pathlib.Path:
        """The JSON file that says what was done."""
        return self.result.with_suffix(".json")


def compress_paths(outputs: CompressOutputs, num_goals: int, force: bool) -> OutputPaths:
    """The paths of everything that `compress` writes; refuses one that it could not write."""
    result = check_output(outputs.output, force, ".keras")
    return OutputPaths(
        result,
        [_check_beside(result, f"-{number}{result.suffix}", force) for number in range(1, num_goals)],
        {
            name: _check_beside(result, f"-{name}{VARIANTS[name].suffix}", force)
            for name in outputs.export or ()
        },
        check_output(outputs.report, force, ".html") if outputs.report else None,
    )


def _check_beside(result: pathlib.Path, ending: str, force: bool) -> pathlib.Path:
    """The path beside "small.keras" that is called "small" and the ending, checked."""
    return check_output(result.with_name(f"{result.stem}{ending}"), force)


def check_output(path: str | os.PathLike[str], force: bool, suffix: str | None = None) -> pathlib.Path:
    """The path of an output; refuses one that could not be written.

    Args:
        path: The path.
        force: Whether a file that exists may be replaced.
        suffix: The ending that the name must have, "" for a directory; `None`: any.
    """
    path = pathlib.Path(path)
    if suffix is not None and path.suffix != suffix:
        raise FileError(
            f"'{path}' does not end in '{suffix}'."
            if suffix
            else f"'{path}' has an ending like a file. A SavedModel is a directory: leave out the ending."
        )
    if not path.parent.is_dir():
        raise FileError(f"There is no directory '{path.parent}' for '{path.name}'. Create it first.")
    if (path.exists() or path.is_symlink()) and not force:
        raise FileError(f"'{path}' already exists. Pass --force to overwrite it, or choose another name.")
    if not os.access(path.parent, os.W_OK):
        raise FileError(f"The directory '{path.parent}' cannot be written to.")
    return path


def check_plot(path: str, data: str, force: bool) -> pathlib.Path | None:
    """The path of the picture that `analyze` draws of its measurements; `None` for none."""
    if not path:
        return None
    if not data:
        raise FileError("--plot draws what is measured on data: pass --data as well.")
    with quiet_imports():
        from keras_taylor.reports import plots

    plots.check_picture(path)
    return check_output(path, force)


def write_file(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Writes a file with a function of a path. The file gets its name when it is complete."""
    with AtomicFile(path) as draft:
        write(draft.path)
        draft.move_to(path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file."""
    write_file(path, lambda draft: draft.write_text(text, "utf-8"))
