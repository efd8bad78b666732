"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import inspect
import pkgutil

import keras
import numpy as np
import pytest

import keras_taylor

pytestmark = [pytest.mark.once, pytest.mark.sweep(10)]


def examples():
    """Every docstring example of the package, by the name of what it belongs to."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    yield finder.find(keras_taylor, "keras_taylor")[0]
    for found in pkgutil.walk_packages(keras_taylor.__path__, "keras_taylor."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            yield from (test for test in finder.find(module, found.name) if test.examples)


EXAMPLES = {test.name: test for test in examples()}


class Checker(doctest.OutputChecker):
    """An example that shows no output may print lines, as `compress` does while it runs."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


def small_classifier():
    """A compiled CNN for 8x8 images in three classes."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="conv1"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(12, 3, padding="same", activation="relu", name="conv2"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, activation="softmax", name="classes"),
        ],
        name="small",
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def given():
    """What examples may use."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(64, 8, 8, 1)).astype("float32"), random.integers(0, 3, 64)
    return {
        "keras": keras, "np": np, "keras_taylor": keras_taylor, "model": small_classifier(),
        "x": x, "y": y, "x_val": x[:16], "y_val": y[:16],
    }  # fmt: skip


FIRST_LINE = "small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)\n"


@pytest.fixture(scope="module")
def after_first_line():
    """What there is after the line with which many examples begin; it runs once for all of them."""
    names = given()
    exec(FIRST_LINE, names)
    return names


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_run(name, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    test = EXAMPLES[name]
    if test.examples[0].source == FIRST_LINE:
        test.globs = {**test.globs, **request.getfixturevalue("after_first_line")}
        test.examples = test.examples[1:]
    else:
        test.globs = {**test.globs, **given()}
    failures = []
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(Checker(), verbose=False, optionflags=options).run(test, out=failures.append)
    assert not failures, "".join(failures)


def public_members():
    for name in keras_taylor.__all__:
        value = getattr(keras_taylor, name)
        yield name, value
        if inspect.isclass(value):
            for member, function in vars(value).items():
                if not member.startswith("_") and (
                    inspect.isfunction(function) or isinstance(function, property | classmethod)
                ):
                    yield f"{name}.{member}", function


MEMBERS = dict(public_members())


@pytest.mark.parametrize("name", MEMBERS)
def test_everything_public_has_a_docstring(name):
    assert inspect.getdoc(MEMBERS[name]), name


@pytest.mark.parametrize(
    "name", [n for n in keras_taylor.__all__ if inspect.isfunction(getattr(keras_taylor, n))]
)
def test_verbs_document_every_argument(name):
    function = getattr(keras_taylor, name)
    arguments = inspect.getdoc(function).partition("Args:")[2].partition("Returns:")[0]
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}:" in arguments or f"{parameter}, " in arguments, parameter
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in function.__doc__, section
