"""One process, one backend; every test starts from the same seed."""

import gc
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# XLA's optimizations cost more time in a test than they save: most functions run once
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import keras
import pytest

if keras.backend.backend() == "tensorflow":  # likewise Grappler's
    import tensorflow

    tensorflow.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def pytest_addoption(parser):
    text = "leave out tests marked `once`, which are about no backend: CI runs them on one"
    parser.addoption("--skip-once", action="store_true", help=text)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--skip-once"):
        left_out = [item for item in items if item.get_closest_marker("once")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("once")]


def pytest_collection_finish():
    gc.freeze()  # libraries stay: what collects garbage need not look at them again and again


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
