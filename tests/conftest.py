"""One process, one backend; every test starts from the same seed."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import pytest


@pytest.fixture(autouse=True)
def fresh_start():
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
