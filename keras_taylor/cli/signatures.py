"""Commands whose parameters are groups of options, in the form that typer can read."""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer


@dataclasses.dataclass(frozen=True)
class OptionGroup:
    """Base of the dataclasses of options. Each field is annotated with a typer option or argument.

    Attributes:
        panel: The title above these options in the help of a command.
    """

    panel: ClassVar[str]


def flat_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command that typer can read, from one whose parameters may be `OptionGroup`s.

    Each field of a group becomes an option of its own.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters.values()
    groups = {p.name: hints[p.name] for p in parameters if _is_group(hints[p.name])}

    @functools.wraps(command)
    def flat(**options: Any) -> None:
        values = {
            name: group(**{field.name: options.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**values, **options)

    flat_parameters: list[inspect.Parameter] = []
    for parameter in parameters:
        if parameter.name in groups:
            flat_parameters += _fields_as_parameters(groups[parameter.name])
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            flat_parameters.append(parameter.replace(kind=kind, annotation=hints[parameter.name]))
    flat.__signature__ = inspect.Signature(flat_parameters)  # type: ignore[attr-defined]  # read by inspect
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in flat_parameters}
    return flat


def _is_group(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, OptionGroup)


def _fields_as_parameters(group: type[OptionGroup]) -> Iterator[inspect.Parameter]:
    """The fields of a group as keyword parameters; its options stand in its help panel."""
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        kind, option = get_args(hints[field.name])
        option = copy.copy(option)
        if isinstance(option, typer.models.OptionInfo):
            option.rich_help_panel = group.panel
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=Annotated[kind, option],
        )
