"""Maps and sets by identity."""

import keras
import pytest

from keras_taylor.support.identity import IdentityMap, IdentitySet

pytestmark = pytest.mark.once


def test_equal_variables_are_different_keys():
    first, second = keras.Variable([1.0, 2.0]), keras.Variable([1.0, 2.0])
    found = IdentityMap([(first, "first"), (second, "second")])
    assert (found[first], found[second]) == ("first", "second")
    assert list(map(id, found)) == [id(first), id(second)]
    del found[first]
    assert first not in found and second in found and len(found) == 1
    with pytest.raises(KeyError):
        found[first]


def test_symbolic_tensors_are_elements():
    first, second = keras.Input((2,)), keras.Input((2,))
    found = IdentitySet([first])
    found.add(first)
    assert first in found and second not in found and len(found) == 1
    found.discard(second)
    found.discard(first)
    assert len(found) == 0
