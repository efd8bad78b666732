"""What the benchmarks share: one process a backend, and tables."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys

BACKENDS = ["tensorflow", "jax", "torch"]
_DISTRIBUTIONS = {"tensorflow": ("tensorflow-cpu", "tensorflow"), "jax": ("jax",), "torch": ("torch",)}


def on_each_backend(script, backends, **arguments):
    """Runs a script's measuring function in a fresh process a backend; results by backend."""
    results = {}
    for backend in backends:
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, script, "--measure", json.dumps(arguments)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[backend] = json.loads(done.stdout.splitlines()[-1])
        print(f"{backend} done", file=sys.stderr, flush=True)
    return results


def in_process(measure, argv):
    """Measures and prints one line of JSON, if this is such a process."""
    if len(argv) != 3 or argv[1] != "--measure":
        return False
    print(json.dumps(measure(**json.loads(argv[2]))))
    return True


def machine(backends):
    """One line: processor, versions, date."""
    versions = [f"{b} {_version(*_DISTRIBUTIONS[b])}" for b in backends]
    return (
        f"{os.cpu_count()}-core CPU ({platform.machine()}), no GPU; Python {platform.python_version()}, "
        f"Keras {_version('keras')}, {', '.join(versions)}; {datetime.date.today().isoformat()}."
    )


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _version(*names):
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
