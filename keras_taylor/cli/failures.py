"""How a command fails: with one line, and where it can before Keras is loaded, which takes seconds."""

import pathlib
import zipfile
from typing import NoReturn

from rich.console import Console

GOAL_MISSED = 3  # the exit code of a run that ended before its goal, after it wrote what it reached


class FileError(ValueError):
    """A file cannot be used. The message is one line that says what to do."""


def check_model_file(path: str | pathlib.Path) -> pathlib.Path:
    """The path of a model file.

    Raises:
        FileError: for a file that is missing, has another ending, or is visibly damaged.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileError(f"There is no file '{path}'. Check the name.")
    if path.suffix not in (".keras", ".h5", ".hdf5"):
        raise FileError(f"'{path}' is not a model file. Expected a .keras or .h5 file.")
    if path.suffix == ".keras" and not zipfile.is_zipfile(path):
        raise FileError(f"'{path}' is damaged or not a .keras file. Save the model again with `model.save`.")
    return path


def check_source(source: str) -> str:
    """The name of data: "digits", a file or a directory; "" for none.

    Raises:
        FileError: for a path that is neither.
    """
    path = pathlib.Path(source)
    if source not in ("", "digits") and not (path.is_file() or path.is_dir()):
        raise FileError(
            f"There is no data '{source}'. Expected 'digits', an .npz file or a directory of images."
        )
    return source


def fail(text: str, code: int) -> NoReturn:
    """Prints one line on standard error, and ends the process with an exit code."""
    Console(stderr=True, soft_wrap=True).print(f"keras-taylor: {text}", markup=False, highlight=False)
    raise SystemExit(code)
