"""Values as JSON that every language reads: it has no NaN and no infinity."""

import json
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict


def to_json_text(value: object, default: Callable[[Any], object] | None = None) -> str:
    """Returns a value as one line of JSON. Numbers that are not finite are `null`.

    Args:
        value: Dicts, lists, tuples, texts and numbers.
        default: A function that makes one of these of anything else; `None`: there is nothing else.
    """
    return json.dumps(_with_nulls(value), default=default, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_nulls(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_nulls(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_nan(hint: Any, value: Any) -> Any:
    """Returns a value that came from JSON, with NaN where its type has a number and there is `None`.

    Args:
        hint: The type: of a field, for instance. Where it allows `None`, that stays.
        value: The value.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
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
