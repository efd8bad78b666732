"""Files that take their final name only when they are complete, and what killed processes left of others."""

import contextlib
import hashlib
import importlib
import os
import pathlib
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

_DRAFT: Final = ".unfinished-"
_SCRATCH: Final = "keras_taylor-"
_NAMESPACE = "/proc/self/ns/pid"  # containers number their processes themselves
_MACHINE = socket.gethostname() + (os.readlink(_NAMESPACE) if os.path.islink(_NAMESPACE) else "")
_HOST: Final = hashlib.sha256(_MACHINE.encode()).hexdigest()[:8]
_LONGEST_RUN = 24 * 3600.0  # seconds; of a process on another machine, which cannot be asked for


class AtomicFile:
    """A context for a file or directory that is written beside its target, under a temporary name.

    The temporary file is removed on exit unless `move_to` moved it away. Those of processes that were killed
    before are removed on entry.

    Args:
        target: The path that the file will have.

    Attributes:
        path: The temporary path to write to. It keeps the ending of the target, since Keras' writers
            look at it.
    """

    def __init__(self, target: pathlib.Path) -> None:
        self._target = target.absolute()
        self.path = self._target.with_name(f"{_DRAFT}{_owner()}-{secrets.token_hex(4)}-{target.name}")

    def __enter__(self) -> Self:
        for left in _left_behind(self.path.parent, _DRAFT):
            if left.name.endswith(f"-{self._target.name}.old") and not self._target.exists():
                with contextlib.suppress(OSError):  # another process is faster
                    left.rename(self._target)  # it was about to be replaced
            elif left.name.endswith((f"-{self._target.name}", f"-{self._target.name}.old")):
                _remove(left)
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


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary directory. Those of processes that were killed before are removed."""
    for left in _left_behind(pathlib.Path(tempfile.gettempdir()), _SCRATCH):
        _remove(left)
    return tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{_owner()}-")


@contextlib.contextmanager
def exclusive(directory: pathlib.Path) -> Iterator[bool]:
    """A context that at most one process has for a directory; gives `False` if another one has it.

    The system ends it with the process, in whatever way that ends. Where a system or a file system has no
    such locks, everybody gets `True`.
    """
    try:
        fcntl = importlib.import_module("fcntl")
        handle = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):  # on Windows
        yield True
        return
    try:
        free = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:  # of file systems in networks, say
            pass
        yield free
        if free:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # children that were forked have the handle, too
    finally:
        os.close(handle)


def _owner() -> str:
    return f"{_HOST}-{os.getpid()}"


def _left_behind(folder: pathlib.Path, prefix: str) -> Iterator[pathlib.Path]:
    """Files and directories of this user in a folder whose process has ended."""
    for path in folder.glob(f"{prefix}*"):
        found = re.match(rf"{re.escape(prefix)}(\w+)-(\d+)-", path.name)
        try:
            status = path.lstat()
        except OSError:  # its process is faster
            continue
        is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if found and is_own and not stat.S_ISLNK(status.st_mode):
            host, process = found.groups()
            if not _may_run(host, int(process), time.time() - status.st_mtime):
                yield path


def _may_run(host: str, process: int, seconds: float) -> bool:
    """Whether a process may still run that wrote something so many seconds ago."""
    if host != _HOST or sys.platform == "win32":  # where a signal 0 would end the process
        return seconds < _LONGEST_RUN
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return seconds < _LONGEST_RUN  # numbers of processes come again


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
