"""What several test files need: random plans, predictions, fingerprints of models."""

import dataclasses
import functools
import hashlib

import keras
import numpy as np
import pytest
import zoo

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.plans.planning import kept_units, plan_of
from keras_taylor.plans.ranking import RemovalOrder
from keras_taylor.reading.graph import read_model
from keras_taylor.reading.groups import label_model
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.support.keras_internals import num_inbound_nodes, output_structure

BACKEND = keras.backend.backend()
# Models with insides that are opened: what is made of them is Functional.
OPENED = ("subclassed", "composite_layers", "reduced_attention", "unknown_layer", "custom_elementwise")
EAGER = BACKEND != "jax"  # JAX compiles single operations for longer than whole models
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "channels_first" and BACKEND == "tensorflow",
            reason="TensorFlow runs channels_first convolutions on GPUs only",
        ),
    )
    for name in zoo.BUILDERS
]


@functools.cache
def needs_compiled_steps():
    """Skips where `jit_compile=True` cannot work: `torch.compile` needs a C++ compiler on a CPU."""
    if BACKEND == "torch":
        import torch

        try:
            torch.compile(torch.sin)(torch.ones(3))
        except Exception as error:
            pytest.skip(f"torch.compile does not work here: {type(error).__name__}")


def compile_faster(monkeypatch):
    """PyTorch traces what `jit_compile=True` compiles, but makes no C++ of it, which takes half a minute."""
    if BACKEND == "torch":
        import torch

        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def random_scores(model, seed=0, exact=True):
    random = np.random.default_rng(seed)
    return {g.name: random.random(g.num_units) for g in label_model(model, exact=exact).groups}


def reachable(model, exact=True):
    """The largest fraction of the parameters that can be removed."""
    channels = label_model(model, exact=exact)
    costs = CostModel(channels)
    removal_order = RemovalOrder(channels, costs, np.zeros(channels.num_units))
    return 1 - costs(removal_order.smallest_mask())["params"] / costs()["params"]


def random_plan(model, seed=0, fraction=0.4, exact=True, choices=None):
    """A plan that takes some units, at least one, out of every group that has two or more."""
    random = np.random.default_rng(seed)
    channels = label_model(model, exact=exact, choices=choices)
    kept = np.ones(channels.num_units, bool)
    for group in channels.groups:
        num = min(group.num_units - 1, max(1, round(fraction * group.num_units)))
        kept[group.start + random.choice(group.num_units, num, replace=False)] = False
    return plan_of(channels, CostModel(channels), kept)


def predict(model, x):
    """Outputs as a flat list of arrays."""
    outputs = keras.tree.flatten(model(x, training=False) if EAGER else model.predict_on_batch(x))
    return [keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")) for y in outputs]


def targets_of(model, x, seed=2):
    """Random targets in the structure of the model's outputs."""
    random = np.random.default_rng(seed)
    arrays = [random.random(y.shape).astype("float32") for y in predict(model, x)]
    structure = arrays[0] if len(arrays) == 1 else output_structure(read_model(model).model)
    return keras.tree.pack_sequence_as(structure, arrays)


def relative_difference(first, second):
    """Largest difference of two lists of arrays, relative to the second's largest value; that may be 0."""
    pairs = zip(first, second, strict=True)
    return max(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo("float32").tiny) for a, b in pairs)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model of the zoo with a plan and what it leads to."""

    name: str
    model: keras.Model
    x: object
    plan: keras_taylor.Plan
    small: keras.Model


@functools.cache
def case(name):
    """Built once a run: no test may change it."""
    model = zoo.build(name)
    model.compile(keras.optimizers.SGD(1e-3), loss="mse", run_eagerly=EAGER)
    plan = random_plan(model)
    return Case(name, model, zoo.inputs_of(model), plan, keras_taylor.prune(model, plan))


def all_layers(model):
    """Layers of a model and of all that is made of layers in it, by path, the model itself first."""
    found = {model.name: model}
    insides = model.layers if isinstance(model, keras.Model) else model._layers
    for layer in insides:
        found.update({f"{model.name}/{path}": value for path, value in all_layers(layer).items()})
    return found


def fingerprint(model):
    """Everything about a model that no public verb may change."""
    layers = all_layers(model)
    optimizer = model.optimizer
    return {
        "weights": _hash(model.weights),
        "seeds": _hash(v for v in model.variables if "seed" in v.path),
        "config": model.to_json(),
        "trainable": {path: layer.trainable for path, layer in layers.items()},
        "trainable variables": [v.trainable for v in model.variables],
        "nodes": {path: num_inbound_nodes(layer) for path, layer in layers.items()},
        "outbound": {path: len(layer._outbound_nodes) for path, layer in layers.items()},
        "attributes": {path: sorted(vars(layer)) for path, layer in layers.items()},
        "optimizer": optimizer and _hash(optimizer.variables),
        "optimizer config": optimizer and str(optimizer.get_config()),
        "gradients": [getattr(v.value, "grad", None) is None for v in model.variables],
    }


def _hash(variables):
    digest = hashlib.sha256()
    for variable in variables:
        digest.update(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")).tobytes())
    return digest.hexdigest()


def check_law_two(model, x, tolerance=1e-5, exact=True):
    """Gates at zero equal the pruned model, for a random plan; returns that one."""
    channels = label_model(model, exact=exact)
    plan = random_plan(model, exact=exact)
    kept = kept_units(channels, plan)
    assert not kept.all()
    gated = GatedModel(channels)
    assert relative_difference(predict(gated, x), predict(model, x)) <= 1e-6
    gated.mask = kept
    small = keras_taylor.prune(model, plan)
    assert small.count_params() == plan.after["params"]
    assert relative_difference(predict(small, x), predict(gated, x)) <= tolerance
    return small
