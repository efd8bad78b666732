"""The options of the commands, as small values that check themselves.

Keras takes seconds to load. So it is loaded where an option needs it, and not for `--help` or a file that is
missing.
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from keras_taylor.cli.failures import FileError, check_model_file, check_source
from keras_taylor.cli.loading import quiet_imports
from keras_taylor.cli.signatures import OptionGroup
from keras_taylor.exports.formats import VARIANTS

if TYPE_CHECKING:
    from keras_taylor.budget.goals import GoalLike
    from keras_taylor.loop.metric_limits import MaxDrop
    from keras_taylor.plans.selection import Selection

RequiredData = Annotated[
    str,
    typer.Option(
        callback=check_source,
        help="'digits', an .npz file (x_train, y_train, perhaps x_val, y_val, x_test, y_test; or x, y), or a "
        "directory with one directory of images for each class.",
        show_default=False,
        rich_help_panel="Data",
    ),
]
GoalTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--goal",
        help="What to remove: a part of the parameters (0.3 or 30%) or of another cost (flops=0.5). "
        "Or what may be left at most (params=200000, bytes:litert-int8=90KiB). Repeat the option for several "
        "costs: all must hold. With commas (0.2,0.4,0.6): several goals in one run, and a model for each. "
        "none: as far as --max-drop allows.  "
        "\\[default: 0.3]",
        show_default=False,
    ),
]
ReportPath = Annotated[str, typer.Option(help="Write a report, one HTML file.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Backend = Annotated[
    str, typer.Option(help="tensorflow, jax or torch. Default: KERAS_BACKEND, then the Keras configuration.")
]


@dataclasses.dataclass(frozen=True)
class ModelOptions(OptionGroup):
    """The model file, and how far to trust it."""

    panel: ClassVar[str] = "Model file"

    model: Annotated[str, typer.Argument(help="A model file: .keras, or the older .h5.", show_default=False)]
    trust: Annotated[
        bool, typer.Option("--trust", help="Load code that the model file holds (Lambda layers).")
    ] = False
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            help="A module of your own that registers custom layers. It may lie in the working directory, "
            "whose files are not imported otherwise.",
        ),
    ] = None

    def __post_init__(self) -> None:
        check_model_file(self.model)


@dataclasses.dataclass(frozen=True)
class InputOptions(OptionGroup):
    """How to split the data, and how to scale its inputs."""

    panel: ClassVar[str] = "Data"

    divide_by: Annotated[float, typer.Option(help="Divide the inputs by this number.")] = 1.0
    mean: Annotated[
        str, typer.Option(help="Then subtract this: one number, or one for each channel (0.5,0.4,0.4).")
    ] = ""
    std: Annotated[str, typer.Option(help="Then divide by this: one number, or one for each channel.")] = ""
    validation: Annotated[
        float,
        typer.Option(
            help="The fraction of the training data that judges rounds, if there is no x_val, y_val."
        ),
    ] = 0.1
    test: Annotated[
        float,
        typer.Option(
            help="The fraction of the data that is measured at the end only, if there is no x_test, y_test."
        ),
    ] = 0.2

    def __post_init__(self) -> None:
        parse_numbers(self.mean)
        for option, share in (("--validation", self.validation), ("--test", self.test)):
            if not 0 < share < 1:
                raise FileError(
                    f"{option} is a fraction of the examples, above 0 and below 1. Received: {share:g}"
                )
        if 0 in (self.divide_by, *(parse_numbers(self.std) or ())):
            raise FileError("--divide-by and --std divide the inputs. Expected numbers other than 0.")


@dataclasses.dataclass(frozen=True)
class ChannelOptions(OptionGroup):
    """Which channels may leave."""

    panel: ClassVar[str] = "Channels"

    exclude: Annotated[
        list[str] | None, typer.Option(help="A layer that keeps its channels, or a regular expression.")
    ] = None
    inexact: Annotated[
        bool,
        typer.Option(
            "--inexact", help="Also open channels that are normalized together (LayerNormalization)."
        ),
    ] = False
    branches: Annotated[bool, typer.Option("--branches", help="Whole residual branches may leave, too.")] = (
        False
    )


@dataclasses.dataclass(frozen=True)
class SensitivityOptions(OptionGroup):
    """What `analyze` measures on data."""

    panel: ClassVar[str] = "Data"

    data: Annotated[
        str,
        typer.Option(
            callback=check_source,
            help="Measure the loss of the training examples while a growing share of each group of channels "
            "is removed. The same kinds of data as for `compress`.",
            show_default=False,
        ),
    ] = ""
    num_examples: Annotated[int, typer.Option(help="Measure on this many examples; 0: all.")] = 512
    criterion: Annotated[
        str | None, typer.Option(help="What orders the channels of a group. Default: taylor.")
    ] = None
    plot: Annotated[
        str, typer.Option(help="Draw the losses into a .png, .svg or .pdf file.", show_default=False)
    ] = ""


@dataclasses.dataclass(frozen=True)
class PruningOptions(OptionGroup):
    """What `compress` removes."""

    panel: ClassVar[str] = "Pruning"

    goal: GoalTexts = None
    increment: Annotated[
        float | None,
        typer.Option(
            help="The fraction of the original to remove in each round. Default: 0.05 if each is fine-tuned, "
            "else at most 0.25."
        ),
    ] = None
    criterion: Annotated[
        str | None, typer.Option(help="What makes a channel important. Default: depends on the model.")
    ] = None
    round_to: Annotated[
        str,
        typer.Option(
            help="Keep a multiple of this many channels in every group. auto, for a latency goal: the "
            "multiple that is fast on this machine."
        ),
    ] = "1"
    repair: Annotated[
        bool, typer.Option("--repair/--no-repair", help="Refit the layers that lost inputs after each cut.")
    ] = True
    max_drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Undo a round that makes the validation accuracy worse by more than this, and stop. Or name "
            "the metric (accuracy=0.01); repeat the option for several metrics: all must hold.",
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        if parse_goal_texts(self.goal) is None and not self.max_drop:
            raise FileError("--goal none goes as far as --max-drop allows. Expected --max-drop 0.01, say.")
        parse_max_drop(self.max_drop)
        self.selection()

    def selection(self, branches: bool = False) -> "Selection":
        """How `compress` selects the channels, and with `branches` the residual branches, that leave."""
        with quiet_imports():
            from keras_taylor.plans.selection import AUTO, Selection

        if self.round_to == AUTO:
            return Selection(round_to=AUTO, branches=branches)
        if not self.round_to.isdecimal() or int(self.round_to) < 1:
            raise ValueError(
                f"--round-to takes a whole number, 1 or larger, or auto. Received: {self.round_to}"
            )
        return Selection(round_to=int(self.round_to), branches=branches)


@dataclasses.dataclass(frozen=True)
class FineTuningOptions(OptionGroup):
    """How `compress` trains after each cut."""

    panel: ClassVar[str] = "Fine-tuning"

    epochs: Annotated[
        int,
        typer.Option(
            help="Epochs of fine-tuning for each round, trained together where a goal is reached; 0: none."
        ),
    ] = 1
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.")] = 32
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="The rate that each round begins with, and falls from. Default: that of the compiled model, "
            "or 0.001; after a repair a tenth of it, or what trials find in rounds of 240 steps or more."
        ),
    ] = None
    keep_best: Annotated[
        bool,
        typer.Option(
            "--keep-best/--keep-last",
            help="Which state of a round's model is kept: the best one on the validation data, by the "
            "loss, or the accuracy with --max-drop; or the last one.",
        ),
    ] = True
    every_round: Annotated[
        bool | None,
        typer.Option(
            "--every-round/--at-goals",
            help="Whether every round is fine-tuned, or all epochs come where a goal is reached. "
            "Default: every round with --max-drop or --no-repair.",
        ),
    ] = None
    distill: Annotated[
        bool, typer.Option("--distill", help="Fine-tune with the given model as the teacher.")
    ] = False
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0


@dataclasses.dataclass(frozen=True)
class CompressOutputs(OptionGroup):
    """What `compress` writes."""

    panel: ClassVar[str] = "Outputs"

    output: Annotated[
        str, typer.Option("--output", "-o", help="The .keras file to write.", show_default=False)
    ]
    export: Annotated[
        list[str] | None,
        typer.Option(help=f"Also export the original and the result: {', '.join(VARIANTS)}."),
    ] = None
    report: ReportPath = ""
    resume: Annotated[
        str,
        typer.Option(
            help="A directory for the state of the run. The same command continues a run that was stopped."
        ),
    ] = ""

    def __post_init__(self) -> None:
        for variant in self.export or ():
            check_variant(variant)


@dataclasses.dataclass(frozen=True)
class ExportOptions(OptionGroup):
    """What `export` writes, and how large it may be."""

    panel: ClassVar[str] = "Outputs"

    output: Annotated[
        str, typer.Option("--output", "-o", help="The file or directory to write.", show_default=False)
    ]
    format: Annotated[str, typer.Option(help=f"{', '.join(VARIANTS)}.")] = "litert"
    batch_size: Annotated[int, typer.Option(help="A fixed number of examples in a call; 0: any number.")] = 0
    int8_io: Annotated[
        bool, typer.Option("--int8-io", help="litert-int8: integers as inputs and outputs.")
    ] = False
    max_kib: Annotated[
        float, typer.Option(help="Refuse a file that is larger than this many KiB (flash); 0: no limit.")
    ] = 0.0
    max_arena_kib: Annotated[
        float,
        typer.Option(help="LiteRT: refuse a tensor arena larger than this many KiB (RAM); 0: no limit."),
    ] = 0.0

    def __post_init__(self) -> None:
        check_variant(self.format)

    def arguments(self) -> dict[str, Any]:
        """The options that `keras_taylor.export` takes as keyword arguments."""
        return {
            "batch_size": self.batch_size or None,
            "int8_io": self.int8_io,
            "max_bytes": self.max_kib * 1024 or None,
            "max_arena_bytes": self.max_arena_kib * 1024 or None,
        }


@dataclasses.dataclass(frozen=True)
class GeneralOptions(OptionGroup):
    """What most commands take."""

    panel: ClassVar[str] = "Options"

    force: Force = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON on standard output.")] = (
        False
    )
    backend: Backend = ""  # `commands.main` has read it before typer does


def parse_numbers(text: str) -> list[float] | None:
    """Numbers with commas between them; `None` for an empty text."""
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise FileError(f"'{text}' is neither a number nor a list of numbers like 0.5,0.4,0.4.") from error


def parse_goal_texts(texts: list[str] | None) -> "GoalLike | list[GoalLike] | None":
    """The goal that `--goal` asks for, 0.3 by default; a list where it asks for several, `None` for none."""
    with quiet_imports():
        from keras_taylor.budget.goals import goals_from_texts

    return goals_from_texts(texts or ["0.3"])


def parse_max_drop(texts: list[str] | None) -> "MaxDrop | None":
    """The limits that `--max-drop` sets: a number for the first metric, or numbers by metric."""
    with quiet_imports():
        from keras_taylor.budget.goals import number_of_text

    if not texts:
        return None
    limits: dict[str, float] = {}
    for text in texts:
        metric, equals, number = text.rpartition("=")
        try:
            limits[metric] = number_of_text(number)
        except ValueError as error:
            raise FileError(
                "--max-drop takes a number, such as 0.01 or 1%, or the name of a metric and a number, "
                f"such as accuracy=0.01. Received: {text}"
            ) from error
        if (equals and not metric) or not limits[metric] >= 0:
            raise FileError(f"--max-drop is how much worse a metric may become, 0 or more. Received: {text}")
    if len(limits) < len(texts) or ("" in limits and len(limits) > 1):
        raise FileError(
            "--max-drop sets one limit for each metric, by its name: accuracy=0.01. "
            f"Received: {' '.join(texts)}"
        )
    return limits.get("", limits)


def check_variant(name: str) -> str:
    """The name of an export format, if there is such a format."""
    if name not in VARIANTS:
        raise FileError(f"There is no format '{name}'. Expected one of {', '.join(VARIANTS)}.")
    return name
