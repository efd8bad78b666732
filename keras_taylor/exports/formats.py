"""The file formats of exported models, and their variants: a format with the precision of its numbers."""

import dataclasses
import importlib.util
import pathlib
from typing import Final

SUFFIXES: Final = {"saved_model": "", "litert": ".tflite", "onnx": ".onnx", "keras": ".keras"}
QUANTIZATIONS: Final = (None, "float16", "dynamic", "int8")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A format with the precision of its numbers.

    Attributes:
        name: Its name for users, such as "litert-int8".
        format: Key of `SUFFIXES`.
        quantize: One of `QUANTIZATIONS`.
    """

    name: str
    format: str
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.format not in SUFFIXES or self.quantize not in QUANTIZATIONS:
            raise ValueError(f"There is no such format or precision. Received: {self!r}")

    @property
    def suffix(self) -> str:
        """How the names of its files end, "" for the directory of a SavedModel."""
        return SUFFIXES[self.format]


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """The format of a file and its options, from the arguments of `export`.

    Attributes:
        format: Key of `SUFFIXES`.
        quantize: One of `QUANTIZATIONS`.
        int8_io: Whether a model with int8 activations also takes and gives integers.
        batch_size: Number of examples that a call takes; `None` for any number.

    Raises:
        ValueError: if these do not go together.
    """

    format: str
    quantize: str | None = None
    int8_io: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.quantize not in QUANTIZATIONS:
            raise ValueError(f"Expected one of {list(QUANTIZATIONS)}. Received: quantize={self.quantize!r}")
        if self.quantize is not None and self.format != "litert":
            raise ValueError(
                "Only LiteRT files are quantized. Expected format='litert', or no `quantize`. "
                f"Received: quantize={self.quantize!r}, format={self.format!r}"
            )
        size = self.batch_size
        is_positive = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if size is not None and (not is_positive or self.format == "keras"):
            raise ValueError(
                "Expected a positive integer, or `None` for any number (the only choice for "
                f"format='keras'). Received: batch_size={size!r}"
            )

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(self).items())


VARIANTS: Final = {
    variant.name: variant
    for variant in (
        Variant("saved-model", "saved_model"),
        Variant("litert", "litert"),
        Variant("litert-float16", "litert", "float16"),
        Variant("litert-dynamic", "litert", "dynamic"),
        Variant("litert-int8", "litert", "int8"),
        Variant("onnx", "onnx"),
        Variant("keras", "keras"),
    )
}


@dataclasses.dataclass(frozen=True)
class _Requirement:
    """The packages that a format needs, and the extra that installs them."""

    extra: str
    packages: tuple[str, ...]


_REQUIREMENTS: Final = {
    "saved_model": _Requirement("tensorflow", ("tensorflow",)),
    "litert": _Requirement("tensorflow", ("tensorflow",)),
    "onnx": _Requirement("tensorflow,onnx", ("tensorflow", "tf2onnx", "onnx", "onnxruntime")),
    "keras": _Requirement("", ()),
}


def checked_format(target: pathlib.Path, format: str | None) -> str:
    """The format, or the one that the suffix of the path stands for if it is `None`.

    Raises:
        ValueError: if the format is unknown, or does not fit the suffix.
    """
    format_of = {suffix: name for name, suffix in SUFFIXES.items()}
    if format is None:
        format = format_of.get(target.suffix, "saved_model")
    if format not in SUFFIXES:
        raise ValueError(f"Unknown format. Expected one of {sorted(SUFFIXES)}. Received: format={format!r}")
    suffix = SUFFIXES[format]
    if suffix and target.suffix != suffix:
        raise ValueError(
            f"A file of the format '{format}' is called '<name>{suffix}'. Received: path='{target}'"
        )
    if not suffix and target.suffix in (*SUFFIXES.values(), ".h5") and target.suffix:
        raise ValueError(
            f"A SavedModel is a directory; a name that ends in '{target.suffix}' says that it is a file. "
            f"Choose another name, or another format. Received: path='{target}', format={format!r}"
        )
    return format


def check_installed(format: str) -> None:
    """Raises an ImportError that names the extra if a package is missing that the format needs."""
    requirement = _REQUIREMENTS[format]
    for name in requirement.packages:
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"The format '{format}' needs the package `{name}`: "
                f'pip install "keras-taylor[{requirement.extra}]". Received: format={format!r}'
            )
