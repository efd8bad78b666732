"""When to stop: how much worse a metric may become."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

# A metric with one of these in its name is better the larger it is.
_LARGER_IS_BETTER = ("acc", "auc", "precision", "recall", "f1", "fbeta", "iou", "dice", "r2")


@dataclasses.dataclass(frozen=True)
class MetricLimit:
    """Says how much worse a metric may become before pruning stops.

    `compress` and `TaylorPruning` take it as `max_drop`. A plain number is short for
    `MetricLimit(number)`.

    Args:
        max_drop: How much worse the metric may be than the reference, in the metric's own unit: 0.01 of
            an accuracy is one percentage point. A float of 0 or more.
        monitor: Name of the metric, such as "accuracy" or "val_accuracy". `None`: `compress` takes the
            first metric that the model is compiled with, or the loss if there is none; `TaylorPruning`
            takes "val_accuracy".
        baseline: The reference, a float. `None`: the metric of the model before pruning.
            `MetricLimit(0, baseline=0.9)` is a floor of 0.9.
        mode: "max" if larger values are better, "min" if smaller ones are. "auto": "max" for accuracies,
            AUC, precision, recall, F-scores, IoU, Dice and R2, which it knows by their names; "min" for
            every other metric.

    Raises:
        ValueError: If `max_drop` is not a number of 0 or more, `monitor` is not a name, `baseline` is not
            a finite number, or `mode` is unknown.

    Example:

    >>> limit = keras_taylor.MetricLimit(0.01, monitor="accuracy")
    >>> limit.allows("accuracy", 0.895, reference=0.9)
    True
    >>> small = keras_taylor.compress(model, (x, y), None, max_drop=limit, validation_data=(x_val, y_val))
    """

    max_drop: float
    monitor: str | None = None
    baseline: float | None = None
    mode: str = "auto"

    def __post_init__(self) -> None:
        if not _is_number(self.max_drop) or not self.max_drop >= 0:
            raise ValueError(f"`max_drop` is a number from 0 on. Received: max_drop={self.max_drop!r}")
        if self.monitor is not None and not (isinstance(self.monitor, str) and self.monitor):
            raise ValueError(f"`monitor` is the name of a metric. Received: monitor={self.monitor!r}")
        if self.baseline is not None and not (_is_number(self.baseline) and math.isfinite(self.baseline)):
            raise ValueError(
                "`baseline` is the value of the metric to compare with. Expected a finite number. "
                f"Received: baseline={self.baseline!r}"
            )
        if self.mode not in ("auto", "min", "max"):
            raise ValueError(f'Expected "auto", "min" or "max". Received: mode={self.mode!r}')

    def direction(self, name: str) -> int:
        """Returns which values of a metric are better.

        Args:
            name: Name of the metric. It counts only if `mode` is "auto".

        Returns:
            1 if larger values are better, -1 if smaller ones are.
        """
        if self.mode != "auto":
            return 1 if self.mode == "max" else -1
        return 1 if any(part in name.lower() for part in _LARGER_IS_BETTER) else -1

    def worst_allowed(self, name: str, reference: float) -> float:
        """Returns the worst value that the limit allows.

        Args:
            name: Name of the metric.
            reference: Value of the metric to compare with.

        Returns:
            A float, `max_drop` worse than the reference.
        """
        return reference - self.direction(name) * self.max_drop

    def allows(self, name: str, value: float, reference: float) -> bool:
        """Returns whether a value is good enough.

        Args:
            name: Name of the metric.
            value: Value of the metric. NaN is never good enough.
            reference: Value of the metric to compare with.
        """
        sign = self.direction(name)
        return bool(sign * value >= sign * reference - self.max_drop)


def parse_metric_limit(max_drop: float | MetricLimit | None) -> MetricLimit | None:
    """Returns the `MetricLimit` that a user passes as `max_drop`, a number or a limit; `None`: no limit."""
    return max_drop if max_drop is None or isinstance(max_drop, MetricLimit) else MetricLimit(max_drop)


def refuse_old_limit_arguments(
    verb: str, max_drop: object, arguments: Mapping[str, object], takes_others: bool = False
) -> None:
    """Refuses keyword arguments that belong to `MetricLimit`, and shows the new spelling.

    Args:
        verb: Name of the public class or function that was called.
        max_drop: The value passed as `max_drop`.
        arguments: The keyword arguments that its signature does not name.
        takes_others: Whether it takes other keyword arguments: `compress` takes those of `fit`.

    Raises:
        TypeError: if there are such arguments, or others that are not taken.
    """
    fields = [field.name for field in dataclasses.fields(MetricLimit)[1:]]
    old = {name: value for name, value in arguments.items() if name in fields}
    if old:
        names = ", ".join(f"`{name}`" for name in old)
        spelled = ", ".join([repr(max_drop or 0.0), *(f"{name}={value!r}" for name, value in old.items())])
        raise TypeError(
            f"{names} {'is' if len(old) == 1 else 'are'} part of `max_drop` now: "
            f"keras_taylor.{verb}(..., max_drop=keras_taylor.MetricLimit({spelled}))"
        )
    if arguments and not takes_others:
        raise TypeError(f"{verb}() got an unexpected keyword argument {next(iter(arguments))!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
