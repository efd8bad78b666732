"""Values as JSON that every language reads: it has no numbers for NaN and infinity."""

import json
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

_INFINITIES = {math.inf: "Infinity", -math.inf: "-Infinity"}


def to_json_text(value: object, default: Callable[[Any], object] | None = None) -> str:
    """Returns a value as one line of JSON. NaN is `null`, and infinity is "Infinity" or "-Infinity".

    Args:
        value: Dicts, lists, tuples, texts and numbers.
        default: A function that makes one of these of anything else; `None`: there is nothing else.
    """
    return json.dumps(_finite(value), default=default, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value if not isinstance(value, float) or math.isfinite(value) else _INFINITIES.get(value)


def with_nan(hint: Any, value: Any) -> Any:
    """Returns a value that came from JSON, with the numbers that are not finite.

    NaN is where its type has a number and there is `None`.

    Args:
        hint: The type: of a field, for instance. Where it allows `None`, that stays.
        value: The value.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if value in _INFINITIES.values() and float in (hint, *inner):
        return float(value)
    if value is None:
        return math.nan if float in (hint, *inner) and type(None) not in inner else None
    if kind in (Union, types.UnionType):
        structures = [one for one in inner if is_typeddict(one) or get_origin(one) is not None]
        return with_nan(structures[0], value) if structures else value
    if is_typeddict(hint) and isinstance(value, dict):
        return {**value, **with_nan_by_name(hint, value)}
    if kind is list and isinstance(value, list):
        return [with_nan(inner[0], one) for one in value]
    if kind is dict and isinstance(value, dict):
        return {key: with_nan(inner[1], one) for key, one in value.items()}
    return value


def with_nan_by_name(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of the fields of a class, each as `with_nan` gives it."""
    hints = get_type_hints(owner)
    return {name: with_nan(hints.get(name), value) for name, value in values.items()}
