"""A model with gates that is compiled once, and stands for the smaller ones of later rounds."""

import keras
import numpy as np
from keras import ops

from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.groups import mask_of
from keras_taylor.rules.base import weight_of
from keras_taylor.scores.scoring_passes import gate_statistics


class MaskedScorer:
    """Scores smaller models by their mask: gates at zero are the pruned model, and nothing compiles anew.

    Args:
        channels: `groups.LabeledModel` of the model that the smaller ones are cut from.
        gated: The `gates.GatedModel` of it.
    """

    def __init__(self, labeled, gated):
        self._labeled, self._gated = labeled, gated
        weights = {id(weight) for weight in gated.weights}
        seeds = [variable for variable in gated.variables if id(variable) not in weights]
        self._seeds = [(variable, np.array(ops.convert_to_numpy(variable))) for variable in seeds]

    def statistics(self, small, plan, feed, num_examples, class_weight, callbacks):
        """Sums over one pass, as `passes.gate_statistics` gives them for the smaller model.

        Args:
            small: `groups.LabeledModel` of the smaller model, trained since or not.
            plan: The `Plan` that led to it; `None`: nothing was cut.
            feed, num_examples, class_weight, callbacks: As in `gate_statistics`.

        Returns:
            A float64 array `(num_rows, small.num_units)`; `None` if the units of the smaller model are
            not simply those that the plan keeps.
        """
        kept = np.ones(self._labeled.num_units, bool)
        if plan is not None:
            kept = kept_units(self._labeled, plan)
        if not self._stands_for(small, kept):
            return None
        self._take_weights(small, kept)
        for variable, value in self._seeds:  # what a pass draws does not depend on the passes before it
            variable.assign(value)
        self._gated.mask = kept
        arguments = self._labeled, feed, num_examples, class_weight, callbacks
        return gate_statistics(self._gated, *arguments)[:, kept]

    def _stands_for(self, small, kept):
        """Whether the small model has the same calls, and the groups that the kept units make."""
        names = [[call.name for call in one.graph.calls] for one in (self._labeled, small)]
        left = {g.name: int(kept[g.start :][: g.num_units].sum()) for g in self._labeled.groups}
        return names[0] == names[1] and left == {g.name: g.num_units for g in small.groups}

    def _take_weights(self, small, kept):
        """Puts the small model's weights where the kept units are; behind closed gates stays what was."""
        done = set()
        base = self._labeled
        for call, effect, other in zip(base.graph.calls, base.effects, small.graph.calls, strict=True):
            if id(call.operation) in done or not isinstance(call.operation, keras.Layer):
                continue
            done.add(id(call.operation))
            axes = {id(weight_of(call.operation, name)): axes for name, axes in effect.weights.items()}
            copy = self._gated.network.copy_of(call.operation)
            weights = zip(call.operation.weights, other.operation.weights, copy.weights, strict=True)
            for weight, source, target in weights:
                labels = axes.get(id(weight), ())
                masks = [None if a is None else mask_of(base, a, kept).reshape(-1) for a in labels]
                target.assign(_scattered(source, target, masks))


def _scattered(source, target, masks):
    """The target's values as a new array, those of the source where the masks (one an axis) are true."""
    value = np.array(ops.convert_to_numpy(target))
    masks = masks or [None] * value.ndim
    places = [
        np.arange(n) if m is None else np.flatnonzero(m) for n, m in zip(value.shape, masks, strict=True)
    ]
    value[np.ix_(*places)] = ops.convert_to_numpy(source)
    return value
