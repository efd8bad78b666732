"""Arguments as Python code, names of metrics, and arguments that moved into a value."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import keras
import numpy as np

OMITTED = "..."
P = ParamSpec("P")
Returned = TypeVar("Returned")
_MAX_ENTRIES = 50  # of lists and dicts that are written out
# A metric with one of these in its name is better the larger it is.
_LARGER_IS_BETTER = ("acc", "auc", "precision", "recall", "f1", "fbeta", "iou", "dice", "r2")


def larger_is_better(name: str) -> bool:
    """Whether larger values of a metric are better, by its name."""
    return any(part in name.lower() for part in _LARGER_IS_BETTER)


class MovedArgument(NamedTuple):
    """Where an argument of earlier versions is now.

    Attributes:
        argument: The argument that takes its place.
        kind: The frozen dataclass that this argument takes.
        field: The field of that dataclass.
    """

    argument: str
    kind: type[Any]
    field: str


def refuse_moved_arguments(
    verb: str,
    others: Mapping[str, Any],
    moved: Mapping[str, MovedArgument],
    given: Mapping[str, Any] | None = None,
    takes_others: bool = False,
) -> None:
    """Refuses arguments that moved into a value, and shows the new spelling with the values passed.

    Args:
        verb: Name of the public function or class that was called.
        others: The keyword arguments that its signature does not name.
        moved: Where arguments of earlier versions are now.
        given: Values passed for arguments that take such a value and also a plain one: `max_drop=0.01`. They
            become the first field.
        takes_others: Whether it takes other keyword arguments: `compress` takes those of `fit`.

    Raises:
        TypeError: if there are such arguments, or others that are not taken.
    """
    old = {name: value for name, value in others.items() if name in moved}
    if old:
        fields: dict[str, dict[str, Any]] = {}
        for name, value in old.items():
            fields.setdefault(moved[name].argument, {})[moved[name].field] = value
        kinds = {one.argument: one.kind for one in moved.values()}
        spelled = []
        for argument, values in fields.items():
            if (given or {}).get(argument) is not None:
                values = {dataclasses.fields(kinds[argument])[0].name: (given or {})[argument], **values}
            inside = ", ".join(f"{name}={format_value(value)}" for name, value in values.items())
            spelled.append(f"{argument}=keras_taylor.{kinds[argument].__name__}({inside})")
        raise TypeError(
            f"{_join_quoted(old)} {'is' if len(old) == 1 else 'are'} part of {_join_quoted(fields)} now: "
            f"keras_taylor.{verb}(..., {', '.join(spelled)})"
        )
    if others and not takes_others:
        raise TypeError(f"{verb}() got an unexpected keyword argument {next(iter(others))!r}")


def check_model_class(model: object) -> None:
    """Refuses what is no Keras model, such as the path of one."""
    if not isinstance(model, keras.Model):
        is_path = isinstance(model, (str, os.PathLike))
        way_out = f"Load the file first: `keras.models.load_model({model!r})`. " if is_path else ""
        raise ValueError(
            f"Expected a `keras.Model`. {way_out}Received: model={model!r} (of type {type(model).__name__})"
        )


def check_whole_number(name: str, value: object, least: int, or_none: str = "") -> None:
    """Refuses anything but a whole number.

    Args:
        name: The argument.
        value: Its value.
        least: The smallest number that is accepted.
        or_none: What `None` stands for, where it is accepted too.

    Raises:
        ValueError: for another number.
        TypeError: for another type.
    """
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if (value is None and or_none) or (is_whole and value >= least):  # type: ignore[operator]  # a number
        return
    raise (ValueError if is_whole else TypeError)(
        f"Expected a whole number from {least} on{f', or `None` for {or_none}' if or_none else ''}. "
        f"Received: {name}={value!r}"
    )


def takes_data_as_one(verb: Callable[P, Returned]) -> Callable[P, Returned]:
    """A verb `(model, ds, ...)` that says so if it is called as `(model, x, y)`, like `fit`."""

    @functools.wraps(verb)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Returned:
        third = args[2] if len(args) > 2 else None
        if hasattr(third, "shape") or {"x", "y"} & kwargs.keys():
            name = f"keras_taylor.{verb.__name__}"
            received = f"{type(third).__name__} in the third place" if len(args) > 2 else ", ".join(kwargs)
            raise TypeError(
                f"`{name}` takes inputs and targets as one argument: {name}(model, (x, y), ...). "
                f"Received: {received}"
            )
        return verb(*args, **kwargs)

    return checked


def format_value(value: Any) -> str:
    """Returns a value as Python code; `...` stands for a part without such a text, such as an array."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if isinstance(value, keras.Layer):
        return repr(value.name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: format_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
        defaults = {field.name: format_value(field.default) for field in dataclasses.fields(value)}
        inside = ", ".join(f"{name}={text}" for name, text in fields.items() if text != defaults[name])
        return f"keras_taylor.{type(value).__name__}({inside})"
    if isinstance(value, (list, tuple, dict)) and len(value) <= _MAX_ENTRIES:
        return _format_collection(value)
    name = getattr(value, "__name__", "") if callable(value) else ""
    return name if name.isidentifier() else OMITTED


def _format_collection(value: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{format_value(k)}: {format_value(v)}' for k, v in value.items())}}}"
    inside = ", ".join(format_value(one) for one in value)
    if isinstance(value, list):
        return f"[{inside}]"
    return f"({inside},)" if len(value) == 1 else f"({inside})"


def _join_quoted(names: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)
