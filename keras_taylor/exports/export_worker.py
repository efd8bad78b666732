"""The process that converts and runs exported models, and the way to send it jobs.

TensorFlow's converters are native code that may crash, and a process runs Keras on one backend only.
So exports happen in a process of their own, on TensorFlow whatever the user's backend is. The process
imports its libraries once and forks itself for every job, so that a crash or the memory of one job does
not affect the next. It ends when its standard input does: with the user's process, or when it has had
no job for a while.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final, TypedDict

from keras_taylor.exports import conversion, inspection, source_models, timing
from keras_taylor.exports.formats import ExportSettings
from keras_taylor.exports.source_models import UserCode
from keras_taylor.support.files import installed_first

IDLE_SECONDS = 60
CAN_FORK = sys.platform == "linux"  # macOS' system libraries do not survive a fork, Windows has none
_MAX_LOG_LINES = 8
_LOGGED_INFORMATION = re.compile(r"I\d{4} ")  # how lines of TensorFlow begin that say nothing of errors
_START = "from keras_taylor.exports.export_worker import serve_jobs; serve_jobs()"


class JobError(Exception):
    """A job failed.

    Attributes:
        error_name: Name of the exception's class, or "crash".
        message: The exception's message, or the end of the process's log.
    """

    def __init__(self, error_name: str, message: str) -> None:
        super().__init__(f"{error_name}: {message}")
        self.error_name, self.message = error_name, message


class JobRequest(TypedDict):
    """A request that the user's process writes.

    Attributes:
        job: Key of `JOBS`.
        code: The user's own classes.
        path: The user's `sys.path`.
        folder: The user's working directory.
        arguments: Arguments of the job's function.
    """

    job: str
    code: UserCode
    path: list[str]
    folder: str
    arguments: dict[str, Any]


class JobAnswer(TypedDict, total=False):
    """The answer of the worker process: a result, or the name and message of an error."""

    result: Any
    error: str
    message: str


def run_job(backend: str, job: str, code: UserCode | None = None, **arguments: Any) -> Any:
    """Has the process for a backend do a job. Starts the process if there is none.

    Args:
        backend: Keras' backend in that process.
        job: Key of `JOBS`.
        code: The user's own classes, which the process loads first.
        **arguments: Arguments of the job's function, as JSON can hold them.

    Returns:
        The result of the job's function.

    Raises:
        JobError: if the job fails, or its process dies.
    """
    request: JobRequest = {
        "job": job,
        "code": code or {"modules": [], "pickles": {}},
        "path": [os.path.abspath(entry) for entry in sys.path],
        "folder": os.getcwd(),
        "arguments": arguments,
    }
    answer = workers.run(backend, request)
    if "error" in answer:
        raise JobError(answer["error"], answer["message"])
    return answer["result"]


class Worker:
    """The user's end of the pipes to a worker process.

    Args:
        backend: Keras' backend in the process.
        lock: Held while the process does a job or is closed.

    Attributes:
        process: The process.
    """

    def __init__(self, backend: str, lock: threading.RLock) -> None:
        hidden = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
        path = os.pathsep.join(installed_first(sys.path, os.getcwd()))
        environment = {**os.environ, **hidden, "KERAS_BACKEND": backend, "PYTHONPATH": path}
        self._lock = lock
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START],  # -P: the working directory is not the first on the path
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,  # so that it can be ended together with its children
        )
        self._idle_timer: threading.Timer | None = None

    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self.process.poll() is None

    def run(self, request: JobRequest) -> JobAnswer:
        """Sends a request and waits for the answer. A process that dies makes it an error."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._log.seek(0, os.SEEK_END)
        begin = self._log.tell()
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        except BaseException:  # after Ctrl-C nobody reads the answer
            self.kill()
            raise
        answer: JobAnswer = json.loads(line) if line else {"error": "crash", "message": "its process died."}
        if answer.get("error") == "crash":
            answer["message"] += self._read_log(begin)
        if not line:
            self.kill()
        else:
            self._idle_timer = threading.Timer(IDLE_SECONDS, self._close_when_idle)
            self._idle_timer.daemon = True
            self._idle_timer.start()
        return answer

    def _read_log(self, begin: int) -> str:
        """The last lines of the log from this position on, as a sentence."""
        self._log.seek(begin)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        lines = [line for line in lines if not _LOGGED_INFORMATION.match(line)][-_MAX_LOG_LINES:]
        return " The last lines of its log: " + " | ".join(lines) if lines else ""

    def _close_when_idle(self) -> None:
        with self._lock:
            if self._idle_timer is threading.current_thread():  # else a job came in between
                self.close()

    def close(self) -> None:
        """Closes the pipe, which makes the process end by itself."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.stdout.close()
        self._log.close()

    def kill(self) -> None:
        """Ends the process and its children at once."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


class WorkerPool:
    """The worker processes of this process, one for each backend; at most one job runs at a time."""

    def __init__(self) -> None:
        self._workers: dict[tuple[int, str], Worker] = {}
        self._lock = threading.RLock()

    def worker_for(self, backend: str) -> Worker:
        """The worker for a backend, which is started if there is none."""
        key = os.getpid(), backend  # a fork of the user's process must not write to its pipes
        if key not in self._workers or not self._workers[key].is_alive():
            self._workers[key] = Worker(backend, self._lock)
        return self._workers[key]

    def start(self, backend: str) -> bool:
        """Starts the worker for a backend, which loads its libraries alone; whether there was none yet."""
        with self._lock:
            known = self._workers.get((os.getpid(), backend))
            return self.worker_for(backend) is not known

    def run(self, backend: str, request: JobRequest) -> JobAnswer:
        """Has the worker for a backend do a job."""
        with self._lock:
            return self.worker_for(backend).run(request)

    def close(self) -> None:
        """Ends all processes."""
        with self._lock:
            for worker in self._workers.values():
                worker.close()
            self._workers.clear()


workers = WorkerPool()
atexit.register(workers.close)


def serve_jobs() -> None:
    """The loop of the worker process: it reads requests and writes answers, a line of JSON each."""
    with contextlib.suppress(ImportError):  # to save a `.keras` file, Keras imports it on every backend
        import tensorflow  # noqa: F401  # once, not in every child
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to the log, not between the answers
    for line in sys.stdin:
        request: JobRequest = json.loads(line)
        answer = _execute_in_fork(request) if CAN_FORK else execute_job(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _execute_in_fork(request: JobRequest) -> JobAnswer:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            json.dump(execute_job(request), pipe)
        os._exit(0)  # the child must not clean up what belongs to the parent
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        name = signal.Signals(-status).name
        return {"error": "crash", "message": f"its process was ended by the signal {name}."}
    if not text:
        return {"error": "crash", "message": f"its process exited with status {status}."}
    answer: JobAnswer = json.loads(text)
    return answer


def execute_job(request: JobRequest) -> JobAnswer:
    """Does a job in this process; returns its result or its error."""
    try:
        sys.path[:] = request["path"]  # the user's modules are found as in the user's process
        source_models.load_user_code(request["code"])
        sys.path[:] = installed_first(request["path"], request["folder"])
        return {"result": JOBS[request["job"]](**request["arguments"])}
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__, "message": str(error)}


def _convert(source: str, target: str, settings: dict[str, Any], calibration: str | None) -> None:
    conversion.convert_file(source, target, ExportSettings(**settings), calibration)


JOBS: Final[Mapping[str, Callable[..., Any]]] = {
    "convert": _convert,
    "inspect": inspection.inspect_file,
    "time_files": timing.time_files,
    "time_file": timing.time_file,
    "time_layers": timing.time_layers,
}
