"""What is written to disk: files that get their name when they are complete, JSON that all languages read."""

import contextlib
import hashlib
import importlib
import json
import math
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
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, Union, get_args, get_origin, get_type_hints, is_typeddict

_DRAFT: Final = ".unfinished-"
_SCRATCH: Final = "keras_taylor-"
_NAMESPACE = "/proc/self/ns/pid"  # containers number their processes themselves
_MACHINE = socket.gethostname() + (os.readlink(_NAMESPACE) if os.path.islink(_NAMESPACE) else "")
_HOST: Final = hashlib.sha256(_MACHINE.encode()).hexdigest()[:8]
_LONGEST_RUN = 24 * 3600.0  # seconds; of a process on another machine, which cannot be asked for
# JSON has no numbers for these
_INFINITIES = {math.inf: "Infinity", -math.inf: "-Infinity"}


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


def to_json_text(value: object, default: Callable[[Any], object] | None = None) -> str:
    """Returns a value as one line of JSON. NaN is `null`, and infinity is "Infinity" or "-Infinity".

    Args:
        value: Dicts, lists, tuples, texts and numbers.
        default: A function that makes one of these of anything else; `None`: there is nothing else.
    """
    return json.dumps(_finite(value), default=default, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value if not isinstance(value, float) or math.isfinite(value) else _INFINITIES.get(value)


def with_nan(hint: Any, value: Any) -> Any:
    """Returns a value that came from JSON, with the numbers that are not finite.

    NaN is where its type has a number and there is `None`.

    Args:
        hint: The type: of a field, for instance. Where it allows `None`, that stays.
        value: The value.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if value in _INFINITIES.values() and float in (hint, *inner):
        return float(value)
    if value is None:
        return math.nan if float in (hint, *inner) and type(None) not in inner else None
    if kind in (Union, types.UnionType):
        structures = [one for one in inner if is_typeddict(one) or get_origin(one) is not None]
        return with_nan(structures[0], value) if structures else value
    if is_typeddict(hint) and isinstance(value, dict):
        return {**value, **with_nan_by_name(hint, value)}
    if kind is list and isinstance(value, list):
        return [with_nan(inner[0], one) for one in value]
    if kind is dict and isinstance(value, dict):
        return {key: with_nan(inner[1], one) for key, one in value.items()}
    return value


def with_nan_by_name(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of the fields of a class, each as `with_nan` gives it."""
    hints = get_type_hints(owner)
    return {name: with_nan(hints.get(name), value) for name, value in values.items()}


def installed_first(path: Sequence[str], folder: str) -> list[str]:
    """A `sys.path` on which a folder stands last: no file that lies there takes the place of a library."""
    entries = [os.path.abspath(entry) for entry in path]
    others = [entry for entry in entries if os.path.realpath(entry) != os.path.realpath(folder)]
    return others if len(others) == len(entries) else [*others, folder]
