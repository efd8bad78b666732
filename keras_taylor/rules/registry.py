"""Rules for layers of the user's own (`register_rule`)."""

import math

import keras

from keras_taylor.rules import elementwise
from keras_taylor.rules.base import Effect, Work, count, elements, size, weight_of

REGISTERED: dict = {}  # class -> rule
_AXES = ("channels", "inputs", "units")


def register_rule(layer_class, rule=None, *, like=None, weights=None, config=None, axis=-1):
    """Says what a layer class of your own does to channels, so that they can leave.

    A rule holds for the class itself, not for its subclasses. When a model with such a
    layer is read, the rule is tried on a copy of the layer with random weights and inputs:
    without some channels, it must put out the same for those that stay.

    Args:
        layer_class: A subclass of `keras.Layer`, with a `get_config`.
        rule: A function from a `rules.base.Context` to a `rules.base.Effect`, for what
            the other arguments cannot say. Without any of them, a decorator for one.
        like: `"elementwise"`: each value that comes out depends on the value at the same
            place only. Or a Keras layer class that does the same, with weights and
            configuration of the same names.
        weights: For each weight (attribute, or path as "projection.kernel") what lies along each of its axes:
            `"channels"`, those that go through the layer; `"inputs"` and `"units"` of a
            layer that mixes channels; or `None`.
        config: For each configuration value that is such a number: which.
        axis: The axis of the channels.

    Returns:
        `layer_class`; a decorator where nothing was said of it.

    Raises:
        ValueError: for what is no such class, or does not fit together. A rule that does
            not hold is refused when a model is read.

    Example:

    >>> import keras, keras_taylor
    >>> class Scale(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")
    ...     def call(self, x):
    ...         return x * self.scale
    >>> _ = keras_taylor.register_rule(Scale, weights={"scale": ("channels",)})
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), Scale(), keras.layers.Dense(2)])
    >>> [group.num_units for group in keras_taylor.analyze(model).groups if group.prunable]
    [8]

    A layer with a kernel: `register_rule(Mix, weights={"kernel": ("inputs", "units")},
    config={"width": "units"})`. One without weights: `register_rule(Swish, like="elementwise")`.
    """
    _check(layer_class, rule, like, weights, config)
    if rule is None and like is None and weights is None:
        return lambda function: _register(layer_class, function) and function
    if like is not None:
        rule = elementwise.unary if like == "elementwise" else _of_keras(like)
    elif weights is not None:
        rule = _described(dict(weights), dict(config or {}), axis)
    return _register(layer_class, rule)


def _register(layer_class, rule):
    REGISTERED[layer_class] = rule
    return layer_class


def _of_keras(layer_class):
    from keras_taylor.rules import LAYERS  # the table has rules of this package

    return LAYERS[layer_class.__name__]


def _described(weights, config, axis):
    """The rule that follows from what lies along the axes of weights."""
    names = {name for axes in weights.values() for name in axes}

    def rule(ctx):
        tensor = ctx.inputs[0]
        if len(ctx.inputs) > 1 or len(ctx.output_shapes) > 1:
            return elementwise.unknown(ctx)
        if names <= {"channels", None}:
            labels = {"channels": tensor.along(axis)}
            outputs, reads = tensor.labels, {}
            work = elements(outputs, ctx.output_shapes[0])
        else:
            labels = {"inputs": ctx.contracted(0, axis)}
            outputs, reads = ctx.fixed(), {0: axis % tensor.rank}
            if "units" in names:
                labels["units"] = ctx.fresh(ctx.output_shapes[0][axis])
                outputs = ctx.placed(labels["units"], axis)
            work = _products(ctx, weights, labels, axis)
        return Effect(
            outputs=[outputs],
            weights={
                name: tuple(None if a is None else labels[a] for a in axes) for name, axes in weights.items()
            },
            config={key: count(labels[what]) for key, what in config.items()},
            reads=reads,
            work=work,
        )

    rule.__doc__ = "What its weights say."
    return rule


def _products(ctx, weights, labels, axis):
    """A multiplication and an addition for each value of a kernel, at every place."""
    shape = ctx.output_shapes[0]
    places = size(shape, (axis % len(shape),))
    work = []
    for name, axes in weights.items():
        kernel = weight_of(ctx.operation, name)
        if kernel is not None and "inputs" in axes:
            rest = math.prod(d for d, a in zip(kernel.shape, axes, strict=True) if a is None)
            work.append(Work(2.0 * places * rest, tuple(labels[a] for a in axes if a is not None)))
    return tuple(work)


def _check(layer_class, rule, like, weights, config):
    own = isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)
    if not own or layer_class.__module__.split(".")[0] == "keras":
        raise ValueError(
            "A rule is registered for a layer class of your own. Expected a subclass of `keras.Layer`. "
            f"Received: layer_class={layer_class!r}"
        )
    given = [k for k, v in {"rule": rule, "like": like, "weights": weights}.items() if v is not None]
    if len(given) > 1 or (config and weights is None):
        raise ValueError(
            "Expected one of `rule`, `like` and `weights`, and `config` beside `weights` only. "
            f"Received: {', '.join(given + ['config'] * bool(config))}"
        )
    if rule is not None and not callable(rule):
        raise ValueError(f"Expected a function from a Context to an Effect. Received: rule={rule!r}")
    if like is not None and like != "elementwise":
        from keras_taylor.rules import LAYERS

        if not (isinstance(like, type) and getattr(keras.layers, like.__name__, None) is like):
            raise ValueError(f'Expected "elementwise" or a layer class of Keras. Received: like={like!r}')
        if like.__name__ not in LAYERS:
            raise ValueError(f"`{like.__name__}` has no rule itself. Received: like={like!r}")
    names = {name for axes in (weights or {}).values() for name in axes} - {None}
    unknown = (names | set((config or {}).values())) - set(_AXES)
    if unknown:
        raise ValueError(
            f"Expected {', '.join(repr(a) for a in _AXES)} or None along the axes of weights, and the "
            f"first three in `config`. Received: {', '.join(sorted(map(repr, unknown)))}"
        )
    used = names | set((config or {}).values())
    if weights is not None and (("channels" in used and len(used) > 1) or not used <= names):
        raise ValueError(
            'Channels go through a layer ("channels"), or are mixed by it ("inputs", "units"). Expected '
            "either, and `config` to speak of what weights have. "
            f"Received: weights={weights!r}, config={config!r}"
        )
    if "units" in names and "units" not in (config or {}).values():
        raise ValueError(
            "A layer is made again with fewer units from its configuration. Expected the key that says "
            f'how many it has, as in `config={{"units": "units"}}`. Received: config={config!r}'
        )
