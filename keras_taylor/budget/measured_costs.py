"""Costs that are measured, not counted: bytes of a file, time of a call; amounts with their units."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Final

from keras_taylor.exports.formats import VARIANTS
from keras_taylor.support.types import Costs

BYTES: Final = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
TIMES: Final = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
_DEFAULT_VARIANTS: Final = {"bytes": "litert", "latency": "keras"}
_PROXIES: Final = {"bytes": "params", "latency": "flops"}
_EXAMPLES: Final = {"bytes": '"256 KiB"', "latency": '"2.5 ms"'}


@dataclasses.dataclass(frozen=True)
class MeasuredCost:
    """A cost that is measured: `MeasuredCost("bytes", "litert-int8")`.

    Attributes:
        kind: "bytes" of the file that `export` writes, or "latency" of one call.
        variant: Key of `formats.VARIANTS`. The latency of "keras" is that of the model itself, on
            this process's backend, as `predict_on_batch` runs it.
    """

    kind: str
    variant: str

    def __post_init__(self) -> None:
        if self.kind not in _DEFAULT_VARIANTS or self.variant not in VARIANTS:
            raise ValueError(f"There is no such measured cost. Received: {self!r}")

    @property
    def units(self) -> Mapping[str, int]:
        """Unit -> number of bytes, or of nanoseconds."""
        return BYTES if self.kind == "bytes" else TIMES


def measured_cost_of(cost: object) -> MeasuredCost | None:
    """The `MeasuredCost` that a part of a goal asks for, `None` for every other cost.

    Args:
        cost: For example "bytes" (float32 LiteRT), "bytes:litert-int8", "latency" (the Keras backend) or
            "latency:onnx".
    """
    if not isinstance(cost, str):
        return None
    kind, colon, variant = cost.partition(":")
    if kind in _DEFAULT_VARIANTS and not colon:
        variant = _DEFAULT_VARIANTS[kind]
    is_measured = kind in _DEFAULT_VARIANTS and variant in VARIANTS
    return MeasuredCost(kind, variant) if is_measured else None


def describe_measured_costs() -> str:
    """The measured costs that a goal may ask for, as text."""
    return (
        f"'bytes', 'latency', or one of these with a format ({', '.join(VARIANTS)}) as in 'bytes:litert-int8'"
    )


def parse_amount(cost: str, value: object) -> int:
    """The limit that a user sets for a measured cost, in bytes or nanoseconds.

    Args:
        cost: A measured part of a goal.
        value: A whole number of bytes or of milliseconds; or a text with a unit, "256 KiB", "350 us".

    Raises:
        ValueError: for anything else.
    """
    measured = measured_cost_of(cost)
    assert measured is not None, f"{cost} is not measured"
    amount = None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-zµ]+)\s*", value)
        factor = match and measured.units.get(match[2].replace("µ", "u"))
        amount = round(float(match[1]) * factor) if match and factor else None
    elif not isinstance(value, bool) and hasattr(value, "__index__"):
        amount = int(value) * (1 if measured.kind == "bytes" else TIMES["ms"])
    if not amount or amount < 0:
        unit = "bytes" if measured.kind == "bytes" else "milliseconds"
        raise ValueError(
            f"The limit for '{cost}' is a whole number of {unit}, or a text with a unit "
            f"({', '.join(measured.units)}) like {_EXAMPLES[measured.kind]}. A number between 0 and 1 is the "
            f"fraction to remove. Received: goal={{{cost!r}: {value!r}}}"
        )
    return amount


def format_amount(cost: str, value: int, named: bool = True) -> str:
    """An amount of a cost as text: "20,500 params", "12,400 bytes:onnx", "1.25 ms latency".

    Args:
        cost: The cost.
        value: The amount. Latencies are in nanoseconds.
        named: Whether the cost's name follows.
    """
    measured = measured_cost_of(cost)
    is_time = measured is not None and measured.kind == "latency"
    amount = f"{value / TIMES['ms']:.4g} ms" if is_time else f"{value:,}"
    return f"{amount} {cost}" if named else amount


def proxy_cost(cost: str) -> str:
    """The counted cost that a measured one is nearly proportional to; a counted cost itself."""
    measured = measured_cost_of(cost)
    return cost if measured is None else _PROXIES[measured.kind]


def proxy_ceilings(ceilings: Mapping[str, float], before: Costs) -> dict[str, float]:
    """Ceilings of costs, with counted costs in place of measured ones.

    Args:
        ceilings: Cost -> largest amount that may be left.
        before: Costs of the whole model.

    Returns:
        A dict of ceilings. "params" stands for bytes and "flops" for latencies, with the same fraction
        of them left.
    """
    proxies: dict[str, float] = {}
    for cost, ceiling in ceilings.items():
        name = proxy_cost(cost)
        if name != cost:
            measured, counted = before[cost], before[name]
            assert measured is not None and counted is not None, f"{cost} or {name} is unknown"
            ceiling = ceiling / measured * counted
        proxies[name] = min(ceiling, proxies.get(name, ceiling))
    return proxies


def refuse_measured(costs: Iterable[str], wanted: str) -> None:
    """Raises a ValueError if any cost must be measured; `wanted` is the argument that asks for it."""
    measured = [cost for cost in costs if measured_cost_of(cost) is not None]
    if measured:
        raise ValueError(
            f"'{measured[0]}' is measured on models that only `keras_taylor.compress` builds. Expected costs "
            "that can be counted: 'params', 'flops', 'activation_memory'. "
            f"Received: {wanted}"
        )
