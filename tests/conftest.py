"""One process, one backend; every test starts from the same seed."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# XLA's optimizations cost more time in a test than they save: most functions run once
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import keras
import pytest


@pytest.fixture(autouse=True)
def fresh_start():
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
