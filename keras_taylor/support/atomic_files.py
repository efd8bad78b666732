"""Files that take their final name only when they are complete."""

import os
import pathlib
import secrets
import shutil
from types import TracebackType
from typing import Self


class AtomicFile:
    """A context for a file or directory that is written beside its target, under a temporary name.

    The temporary file is removed on exit unless `move_to` moved it away.

    Args:
        target: The path that the file will have.

    Attributes:
        path: The temporary path to write to. It keeps the ending of the target, since Keras' writers
            look at it.
    """

    def __init__(self, target: pathlib.Path) -> None:
        self.path = target.with_name(f".unfinished-{secrets.token_hex(4)}-{target.name}").absolute()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _remove(self.path)

    def move_to(self, target: pathlib.Path) -> pathlib.Path:
        """Moves the complete file to its target; returns the target.

        An existing target is removed only after the new one has arrived.
        """
        old = self.path.with_name(self.path.name + ".old")
        # a directory cannot replace another one in one step, as a file can
        set_aside = target.exists() and (target.is_dir() or self.path.is_dir())
        if set_aside:
            target.rename(old)
        try:
            os.replace(self.path, target)
        except OSError:
            if set_aside:
                old.rename(target)
            raise
        _remove(old)
        return target


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
