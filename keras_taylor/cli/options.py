"""Arguments and options that commands share."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A .keras file, or an old Keras .h5 file.", show_default=False)]
Data = Annotated[
    str,
    typer.Option(
        help="'digits', an .npz file (x_train, y_train, x_test, y_test; or x, y), or a folder with one "
        "folder of images for each class.",
        show_default=False,
    ),
]
DivideBy = Annotated[float, typer.Option(help="Inputs are divided by this.")]
Mean = Annotated[str, typer.Option(help="Then this is taken off: a number, or one a channel: 0.5,0.4,0.4")]
Std = Annotated[str, typer.Option(help="Then they are divided by this.")]
Goal = Annotated[
    list[str] | None,
    typer.Option(
        help="The fraction of the parameters to remove (0.3), or that of another cost (flops=0.5), or what "
        "may be left (params=200000, bytes:litert-int8=90KiB). Several: all hold. With commas "
        "(0.2,0.4,0.6): stops on one way, a model at each.  [default: 0.3]",
        show_default=False,
    ),
]
RoundTo = Annotated[
    str, typer.Option(help="Keep multiples of so many channels; auto, with a latency: of what pays.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="A layer that keeps its channels, or a regular expression.")
]
Inexact = Annotated[
    bool, typer.Option("--inexact", help="Open what is normalized together (LayerNormalization), too.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")]
Trust = Annotated[bool, typer.Option("--trust", help="Load code that the model file holds (Lambda layers).")]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON on standard output.")]
Imports = Annotated[list[str] | None, typer.Option("--import", help="A module that registers custom layers.")]
Backend = Annotated[str, typer.Option(help="tensorflow, jax or torch; else KERAS_BACKEND, else Keras' own.")]
Html = Annotated[str, typer.Option(help="Write a report, one HTML file.", show_default=False)]


def multiple_of(text):
    """The number, or "auto", that `--round-to` says."""
    if text != "auto" and not text.isdecimal():
        raise ValueError(f"--round-to is a whole number from 1 on, or auto. Received: {text}")
    return text if text == "auto" else int(text)
