"""How far a metric may fall."""

# Metrics with one of these in their names are the better the larger they are.
_LARGER_IS_BETTER = ("acc", "auc", "precision", "recall", "f1", "fbeta", "iou", "dice", "r2")


class MetricLimit:
    """Says whether a metric has become worse by more than it may.

    Args:
        max_drop: How much worse it may be; `None`: as much as it likes.
        monitor: Name of the metric.
        mode: "min", "max", or "auto": "max" for accuracies, AUC, precision, recall and F-scores,
            otherwise "min".

    Raises:
        ValueError: for a `max_drop` or `mode` that is none.
    """

    def __init__(self, max_drop, monitor, mode="auto"):
        if max_drop is not None and (isinstance(max_drop, bool) or not max_drop >= 0):
            raise ValueError(f"`max_drop` is a number from 0 on. Received: max_drop={max_drop!r}")
        if mode not in ("auto", "min", "max"):
            raise ValueError(f'Expected "auto", "min" or "max". Received: mode={mode!r}')
        self.max_drop, self.monitor = max_drop, monitor
        larger = any(name in monitor.lower() for name in _LARGER_IS_BETTER)
        self.sign = 1 if mode == "max" or (mode == "auto" and larger) else -1

    def holds(self, value, reference):
        """Whether a value is not too much worse than a reference; NaN always is."""
        if self.max_drop is None:
            return True
        return self.sign * value >= self.sign * reference - self.max_drop
