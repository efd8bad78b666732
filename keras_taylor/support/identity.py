"""Maps and sets of objects that are told apart by identity, such as variables and symbolic tensors."""

from collections.abc import Hashable, Iterable, Iterator, MutableMapping, MutableSet
from typing import Any, Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class _Same(Generic[Key]):
    """An object as a key: equal to itself only, whatever its own `__eq__` says."""

    __slots__ = ("it",)

    def __init__(self, it: Key) -> None:
        self.it = it

    def __hash__(self) -> int:
        return object.__hash__(self.it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it


class IdentityMap(MutableMapping[Key, Value]):
    """A dict whose keys are compared with `is`, and kept alive. It iterates in the order of insertion.

    Keras variables and tensors define `==` elementwise, so they cannot be keys of a plain dict. Layers,
    operations, and dataclasses with `eq=False` can: use a plain dict for those.

    Args:
        items: Pairs of a key and a value.
    """

    def __init__(self, items: Iterable[tuple[Key, Value]] = ()) -> None:
        self._items: dict[Hashable, tuple[Key, Value]] = {}
        for key, value in items:
            self[key] = value

    def __getitem__(self, key: Key) -> Value:
        return self._items[_Same(key)][1]

    def __setitem__(self, key: Key, value: Value) -> None:
        self._items[_Same(key)] = key, value

    def __delitem__(self, key: Key) -> None:
        del self._items[_Same(key)]

    def __iter__(self) -> Iterator[Key]:
        return (key for key, _ in self._items.values())

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return _Same(key) in self._items


class IdentitySet(MutableSet[Any]):
    """A set whose elements are compared with `is`, and kept alive. It iterates in the order of insertion.

    Args:
        elements: Its first elements.
    """

    def __init__(self, elements: Iterable[Any] = ()) -> None:
        self._elements: IdentityMap[Any, None] = IdentityMap((each, None) for each in elements)

    def __contains__(self, element: object) -> bool:
        return element in self._elements

    def __iter__(self) -> Iterator[Any]:
        return iter(self._elements)

    def __len__(self) -> int:
        return len(self._elements)

    def add(self, value: Any) -> None:
        """Adds an element."""
        self._elements[value] = None

    def discard(self, value: Any) -> None:
        """Removes an element, if it is there."""
        self._elements.pop(value, None)
