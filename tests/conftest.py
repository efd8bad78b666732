"""One process, one backend; every test starts from the same seed."""

import gc
import importlib.metadata
import inspect
import os
import zlib

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
if os.environ["KERAS_BACKEND"] == "jax":
    # XLA's optimizations cost more time in a test than they save: most functions run once. Level 0 is wrong:
    # the gradient of a maximum looks for the largest value among values that were rounded differently.
    flags = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

import keras
import pytest

if keras.backend.backend() == "tensorflow":  # likewise Grappler's
    import tensorflow

    tensorflow.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

from keras_taylor.exports import export_worker

pytest_plugins = ["command_line"]  # its fixture types a command line
NUM_LEFT_OUT = pytest.StashKey[int]()


def pytest_configure(config):
    """JAX keeps what it compiles on the disk, for other tests and other runs."""
    if keras.backend.backend() == "jax" and hasattr(config, "cache"):
        import jax

        settings = {
            "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        for name, value in settings.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)  # other processes share it


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run everything, as CI does on each backend")
    text = "leave out tests marked `once`, which are about no backend: CI runs them on one"
    parser.addoption("--skip-once", action="store_true", help=text)
    text = "of sweeps, run a sample that SEED draws; with --all: CI does so on all backends but one"
    parser.addoption("--sample", metavar="SEED", help=text)
    text = "draw other random models for the laws; by default, those of the backend"
    parser.addoption("--graphs", metavar="SEED", help=text)


def is_short(config):
    """Whether this is `pytest` alone: neither `--all`, nor chosen files or tests."""
    chosen = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    return not (chosen or config.getoption("--all") or config.getoption("-k") or config.getoption("-m"))


def is_about_an_error(item):
    """Whether a test holds the words of an error: the short run has all of these."""
    source = inspect.getsource(item.function)
    return "raises(" in source or "refused(" in source


def is_left_out(item, config):
    """Whether a test does not run: a slow one in the short run, or all but a share of a sweep."""
    if config.getoption("--skip-once") and item.get_closest_marker("once"):
        return True
    short, seed = is_short(config), config.getoption("--sample")
    if short and item.get_closest_marker("slow"):
        return True
    sweep, laws = item.get_closest_marker("sweep"), item.get_closest_marker("laws")
    if laws is not None:  # all tests of a model or none: the models are shared
        return seed is not None and hash_of(seed, item.callspec.id) % laws.args[0] != 0
    if sweep is None or not (short or seed) or (short and is_about_an_error(item)):
        return False
    return hash_of(seed, item.nodeid) % (sweep.args[0] * (1 if short else 2)) != 0


def hash_of(seed, name):
    """The same number in each process."""
    return zlib.crc32(f"{seed or ''}{name}".encode())


def pytest_collection_modifyitems(config, items):
    left_out, kept = [], []
    for item in items:
        (left_out if is_left_out(item, config) else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
    config.stash[NUM_LEFT_OUT] = len(left_out)


def pytest_report_header(config):
    backend = keras.backend.backend()
    version = importlib.metadata.version(backend)
    kind = "the short run" if is_short(config) else "all that was asked for"
    return f"Keras {keras.__version__} on {backend} {version}: {kind}"


def pytest_terminal_summary(terminalreporter, config):
    num = config.stash.get(NUM_LEFT_OUT, 0)
    if num and is_short(config):
        terminalreporter.write_line(
            f"The short run left out {num} tests: slow ones, and all but a sample of sweeps. "
            "`pytest --all` runs them too."
        )


def pytest_collection_finish():
    gc.freeze()  # libraries stay: what collects garbage need not look at them again and again
    export_worker.IDLE_SECONDS = 900  # between tests that export; loading its libraries takes many seconds


@pytest.fixture(autouse=True)
def fresh_start():
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="module")
def nothing_left_behind():
    """Compiled functions of a whole run take more memory maps than Linux gives a process (65,530)."""
    yield
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    gc.collect()
    gc.freeze()
