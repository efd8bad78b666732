"""What is measured of a model, not counted: bytes of its file, time of a call; amounts with their units."""

import dataclasses
import re
from collections.abc import Mapping

from keras_taylor.exports.formats import VARIANTS

BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
TIMES = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
_DEFAULTS = {"bytes": "litert", "latency": "keras"}
_STAND_INS = {"bytes": "params", "latency": "flops"}
_EXAMPLES = {"bytes": '"256 KiB"', "latency": '"2.5 ms"'}


@dataclasses.dataclass(frozen=True)
class MeasuredCost:
    """What is measured, and of what: `MeasuredCost("bytes", "litert-int8")`.

    Attributes:
        kind: "bytes" of the file that `export` writes, or "latency" of one call.
        form: Key of `formats.VARIANTS`; the latency of "keras" is that of the model itself, on
            this process's backend, as `predict_on_batch` runs it.
    """

    kind: str
    variant: str

    @property
    def units(self):
        """Unit -> how many bytes, or nanoseconds, it is."""
        return BYTES if self.kind == "bytes" else TIMES


def measured_cost_of(what):
    """The `MeasuredCost` that a part of a goal asks for; `None` for what is no measured one.

    Args:
        what: As "bytes" (float32 LiteRT), "bytes:litert-int8", "latency" (the Keras backend),
            "latency:onnx".
    """
    if not isinstance(what, str):
        return None
    kind, _, variant = what.partition(":")
    if kind not in _DEFAULTS or (variant or _DEFAULTS[kind]) not in VARIANTS or what.endswith(":"):
        return None
    return MeasuredCost(kind, variant or _DEFAULTS[kind])


def describe_measured_costs():
    """What a goal may ask for that is measured, as text."""
    return (
        f"'bytes', 'latency', or one of these with a format ({', '.join(VARIANTS)}) as in 'bytes:litert-int8'"
    )


def parse_amount(what, value):
    """What a user lets be left of something measured, as an int: bytes or nanoseconds.

    Args:
        what: A measured part of a goal.
        value: A whole number of bytes or of milliseconds; or a text with a unit, "256 KiB", "350 us".

    Raises:
        ValueError: for anything else.
    """
    quantity = measured_cost_of(what)
    amount = None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-zµ]+)\s*", value)
        factor = match and quantity.units.get(match[2].replace("µ", "u"))
        amount = factor and round(float(match[1]) * factor)
    elif not isinstance(value, bool) and hasattr(value, "__index__"):
        amount = int(value) * (1 if quantity.kind == "bytes" else TIMES["ms"])
    if not amount or amount < 0:
        unit = "bytes" if quantity.kind == "bytes" else "milliseconds"
        raise ValueError(
            f"What may be left of '{what}' is a whole number of {unit}, or a text with a unit "
            f"({', '.join(quantity.units)}) like {_EXAMPLES[quantity.kind]}; a number between 0 and 1 is the "
            f"fraction to remove. Received: goal={{{what!r}: {value!r}}}"
        )
    return amount


def format_amount(what, value, named=True):
    """An amount of a cost as text: "20,500 params", "12,400 bytes:onnx", "1.25 ms latency".

    Args:
        what: The cost.
        value: An int; of latencies nanoseconds.
        named: Whether the cost's name follows.
    """
    quantity = measured_cost_of(what)
    counted = quantity is None or quantity.kind == "bytes"
    amount = f"{value:,}" if counted else f"{value / TIMES['ms']:.4g} ms"
    return f"{amount} {what}" if named else amount


def proxy_cost(what):
    """The counted cost that stands for a measured one; a counted one itself."""
    quantity = measured_cost_of(what)
    return what if quantity is None else _STAND_INS[quantity.kind]


def proxy_ceilings(ceilings, before):
    """What may be left of costs, those that are measured replaced by ones that are counted.

    Args:
        ceilings: Cost -> what may be left.
        before: Costs of the whole model.

    Returns:
        A dict: "params" stands for bytes and "flops" for latencies, the same share of them left.
    """
    found = {}
    for what, ceiling in ceilings.items():
        name = proxy_cost(what)
        if name != what:
            ceiling = ceiling / before[what] * before[name]
        found[name] = min(ceiling, found.get(name, ceiling))
    return found


def refuse_measured(parts: Mapping, wanted):
    """Refuses parts of a goal that have to be measured, where there is nothing to measure with."""
    found = [what for what in parts if measured_cost_of(what) is not None]
    if found:
        raise ValueError(
            f"'{found[0]}' is measured on a model that was built, which is done by `keras_taylor.compress` "
            "only. Here a goal is about what can be counted: 'params', 'flops', 'activation_memory'. "
            f"Received: {wanted}"
        )
