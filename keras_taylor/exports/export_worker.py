"""The process that converts and runs exported models, and the way to ask it.

TensorFlow's converters are native code that may crash, and Keras runs on one backend a
process, so all of it happens in a process of its own, on TensorFlow whatever the user's
backend is. The process imports its libraries once and forks itself for every job, so that
a crash or the memory of one is not that of the next. It ends when its standard input does:
with the user's process, or when it has had no job for a while.
"""

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback

from keras_taylor.exports import conversion, runners, timing

JOBS = {
    "convert": conversion.convert,
    "inspect": runners.inspect,
    "time_in_turn": runners.time_in_turn,
    "time_file": timing.time_file,
    "time_layers": timing.time_layers,
}
IDLE_SECONDS = 60
CAN_FORK = sys.platform == "linux"  # on macOS system libraries do not survive it, Windows has none


class JobError(Exception):
    """A job failed.

    Attributes:
        kind: Name of the exception's class, or "crash".
        message: What the exception, or the end of the process's log, says.
    """

    def __init__(self, kind, message):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


def ask(backend, job, modules=(), **arguments):
    """Has a job done by the process for a backend, which is started if there is none.

    Args:
        backend: Keras' backend in that process.
        job: Key of `JOBS`.
        modules: Names of modules to import before: they register the user's classes.
        **arguments: The job's, as JSON can hold them.

    Returns:
        What the job's function returns.

    Raises:
        JobError: if it fails, or its process dies.
    """
    request = {"job": job, "modules": sorted(modules), "path": sys.path, "arguments": arguments}
    with _lock:
        key = os.getpid(), backend  # a fork of the user's process must not talk into its pipes
        if key not in _workers or not _workers[key].alive():
            _workers[key] = _Worker(backend)
        answer = _workers[key].ask(request)
    if "error" in answer:
        raise JobError(answer["error"], answer["message"])
    return answer["result"]


def close_workers():
    """Ends the processes that wait for jobs."""
    with _lock:
        for worker in _workers.values():
            worker.close()
        _workers.clear()


_workers: dict = {}
_lock = threading.RLock()
atexit.register(close_workers)


class _Worker:
    """The user's end of the pipes."""

    def __init__(self, backend):
        hidden = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
        path = os.pathsep.join(filter(None, sys.path))
        environment = {**os.environ, **hidden, "KERAS_BACKEND": backend, "PYTHONPATH": path}
        self._backend = backend
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from keras_taylor.exports.export_worker import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,  # so that it can be ended with its children
        )
        self._timer = None

    def alive(self):
        return self._process.poll() is None

    def ask(self, request):
        if self._timer is not None:
            self._timer.cancel()
        self._log.seek(0, os.SEEK_END)
        begin = self._log.tell()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = b""
        except BaseException:  # Ctrl-C: nobody will read the answer
            self.kill()
            raise
        answer = json.loads(line) if line else {"error": "crash", "message": "its process died."}
        if answer.get("error") == "crash":
            answer["message"] += self._tail(begin)
        if not line:
            self.kill()
        else:
            self._timer = threading.Timer(IDLE_SECONDS, self._close_when_idle)
            self._timer.daemon = True
            self._timer.start()
        return answer

    def _tail(self, begin):
        self._log.seek(begin)
        lines = self._log.read().decode(errors="replace").strip().splitlines()[-8:]
        return " The last lines of its log: " + " | ".join(lines) if lines else ""

    def _close_when_idle(self):
        with _lock:
            timer = self._timer
            if timer is threading.current_thread():  # else a job came in between
                self.close()

    def close(self):
        """Lets it end by itself."""
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()
        self._log.close()

    def kill(self):
        """Ends it and its children at once."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()


def serve():
    """The process's own loop: a line of JSON in, a line of JSON out."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow  # noqa: F401  # once, not in every child
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    for line in sys.stdin:
        request = json.loads(line)
        answer = _in_a_child(request) if CAN_FORK else perform(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _in_a_child(request):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            json.dump(perform(request), pipe)
        os._exit(0)  # nothing of the parent's is to be cleaned up here
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        name = signal.Signals(-status).name
        return {"error": "crash", "message": f"its process was ended by the signal {name}."}
    if not text:
        return {"error": "crash", "message": f"its process exited with status {status}."}
    return json.loads(text)


def perform(request):
    """Does a job in this process; its result, or its error, as JSON can hold it."""
    try:
        sys.path[:] = request["path"]
        for name in request["modules"]:
            importlib.import_module(name)
        return {"result": JOBS[request["job"]](**request["arguments"])}
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__, "message": str(error)}
