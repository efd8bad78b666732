"""What the command line writes: refused before any work, and whole when it has its name."""

import os
import pathlib

from keras_taylor.cli.loading import FileError
from keras_taylor.reports import plots
from keras_taylor.support.atomic_files import AtomicFile


def writable(path, force, suffix=None):
    """The path of an output, refused before any work if it could not be written."""
    path = pathlib.Path(path)
    if suffix is not None and path.suffix != suffix:
        raise FileError(
            f"'{path}' does not end in '{suffix}'." if suffix else f"'{path}' is a directory: no ending."
        )
    if not path.parent.is_dir():
        raise FileError(f"There is no directory '{path.parent}' to write '{path.name}' into. Make it first.")
    if path.exists() and not force:
        raise FileError(f"'{path}' is there already. Pass --force to overwrite it, or another name.")
    if not os.access(path.parent, os.W_OK):
        raise FileError(f"The directory '{path.parent}' cannot be written to.")
    return path


def stop_paths(target, goals, force):
    """Paths of the models at all goals but the last, checked: "small-1.keras", ... beside "small.keras"."""
    if not isinstance(goals, list):
        return []
    names = [f"{target.stem}-{number}{target.suffix}" for number in range(1, len(goals))]
    return [writable(target.with_name(name), force) for name in names]


def picture_path(path, data, force):
    """The path of a picture of what is measured on data, checked; `None` for none."""
    if not path:
        return None
    if not data:
        raise FileError("--plot draws what is measured on data: pass --data, too.")
    plots.check_picture(path)
    return writable(path, force)


def write(path, make):
    """Writes what a function makes of a path: under another name until all of it is there."""
    with AtomicFile(path) as draft:
        make(draft.path)
        draft.move_to(path)


def write_text(path, text):
    """Writes a text file."""
    write(path, lambda draft: draft.write_text(text, "utf-8"))
