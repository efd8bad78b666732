"""How a command fails: with one line, and where it can before Keras is loaded, which takes seconds."""

import contextlib
import os
import pathlib
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from typing import NoReturn

from rich.console import Console


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


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides what libraries write to standard error while they are imported, unless an import fails.

    Whatever its log level is, TensorFlow writes lines about the processor.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        shown = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(shown, said.read())
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)
