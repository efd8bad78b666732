"""Data without end, and data that does not say where it ends."""

import itertools
import warnings

import keras
import numpy as np
import pytest

import keras_taylor
from keras_taylor.support import datasets
from keras_taylor.support.datasets import Feed, count_batches

pytestmark = pytest.mark.sweep(1)

X = np.random.default_rng(0).normal(size=(48, 2)).astype("float32")
Y = X[:, :1]


def narrow_model():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(6, activation="relu"), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    return model


class Endless(keras.utils.PyDataset):
    """A data set of Keras without end."""

    num_batches = None

    def __getitem__(self, index):
        return X[:16], Y[:16]


class Batches(Endless):
    """Three batches."""

    num_batches = 3


class Repeated:
    """What a repeated Grain data set is like."""

    def __len__(self):
        return 2**63 - 1

    def __iter__(self):
        return itertools.repeat((X[:16], Y[:16]))


class Unknown:
    """Six batches, of which nobody knows."""

    def __iter__(self):
        return itertools.repeat((X[:16], Y[:16]), 6)


def repeated_tensors():
    tensorflow = pytest.importorskip("tensorflow")
    return tensorflow.data.Dataset.from_tensor_slices((X, Y)).batch(16).repeat()


def sampled_loader():
    data = pytest.importorskip("torch.utils.data")

    class Stream(data.IterableDataset):
        def __iter__(self):
            return itertools.repeat((X[0], Y[0]))

    return data.DataLoader(Stream(), batch_size=16)


def test_how_many_batches_there_are():
    endless = repeated_tensors()
    assert count_batches(endless) == count_batches(Endless()) == count_batches(Repeated()) == float("inf")
    assert count_batches(endless.take(3)) == count_batches(Batches()) == count_batches([1, 2, 3]) == 3
    assert count_batches(endless.filter(lambda x, y: True)) is count_batches(Unknown()) is None
    assert count_batches(sampled_loader()) is None


WORDS = r"The data set is endless, and all of it would be read\. Pass `steps_per_epoch`.* Received: ds=<"
VERBS = {
    "score": keras_taylor.score,
    "oracle": lambda model, ds: keras_taylor.score(model, ds, criterion="oracle"),
    "activations": lambda model, ds: keras_taylor.score(model, ds, criterion="apoz"),
    "compress": lambda model, ds: keras_taylor.compress(model, ds, verbose=0),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("make", [Endless, Repeated, repeated_tensors])
def test_endless_data_is_refused_where_all_of_it_would_be_read(verb, make):
    with pytest.raises(ValueError, match=WORDS):
        VERBS[verb](narrow_model(), make())


def test_endless_examples_of_an_export_are_refused(tmp_path):
    with pytest.raises(ValueError, match=WORDS):
        keras_taylor.export(narrow_model(), tmp_path / "model.keras", data=Endless())


def test_endless_validation_data_is_refused():
    words = r"`validation_data` is endless.* Pass `validation_steps`, .* Received: validation_data=<"
    with pytest.raises(ValueError, match=words):
        keras_taylor.compress(narrow_model(), (X, Y), validation_data=Endless(), verbose=0)


@pytest.mark.parametrize("make", [Endless, repeated_tensors])
def test_a_part_of_endless_data_is_enough(make):
    model = narrow_model()
    expected = keras_taylor.score(model, make(), num_examples=32)
    assert expected.keys() == keras_taylor.score(model, make(), steps_per_epoch=2).keys()
    arguments = {"increment": 0.3, "verbose": 0, "return_info": True}
    _, info = keras_taylor.compress(
        model, make(), 0.3, steps_per_epoch=2, validation_data=make(), validation_steps=1, **arguments
    )
    assert len(info.rounds[0].step_losses) == 2
    scoring = keras_taylor.Scoring(ds=make(), num_examples=32)
    keras_taylor.compress(model, make(), 0.3, criterion=scoring, epochs=0, **arguments)
    plan = info.plan
    keras_taylor.repair(keras_taylor.prune(model, plan), model, plan, make(), num_examples=16)


@pytest.fixture
def short_patience(monkeypatch):
    monkeypatch.setattr(datasets, "MANY_EXAMPLES", 32)


@pytest.mark.usefixtures("short_patience")
def test_data_that_does_not_end_for_long_is_mentioned_once():
    feed = Feed(Unknown(), narrow_model())
    with pytest.warns(
        UserWarning, match=r"not ended after 2 batches. If it is endless, stop, and pass"
    ) as caught:
        assert len(list(feed.batches())) == 6
    assert len(caught) == 1
    with warnings.catch_warnings(action="error"):
        assert len(list(feed.batches(48))) == 3


def unknown_tensors():
    tensorflow = pytest.importorskip("tensorflow")
    shapes = [tensorflow.TensorSpec((None, size), "float32") for size in (2, 1)]
    return tensorflow.data.Dataset.from_generator(lambda: iter(Unknown()), output_signature=tuple(shapes))


@pytest.mark.parametrize(
    "run",
    [
        lambda model, ds: keras_taylor.score(model, ds),
        lambda model, ds: keras_taylor.compress(model, ds, 0.2, increment=0.2, verbose=0),
        lambda model, ds: keras_taylor.compress(
            model, (np.zeros((4, 2)), np.zeros((4, 1))), 0.2, increment=0.2, validation_data=ds, verbose=0
        ),
    ],
    ids=["score", "compress", "validation"],
)
@pytest.mark.usefixtures("short_patience")
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_passes_over_data_that_does_not_end_for_long_say_so(run):
    with pytest.warns(UserWarning, match="The data set does not say how long it is, and has not ended"):
        run(narrow_model(), unknown_tensors())
