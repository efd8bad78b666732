"""Really smaller Keras 3 models: whole channels leave, on TensorFlow, JAX and PyTorch.

A trained model goes in, a plain and smaller `keras.Model` comes out:

>>> import keras_taylor
>>> print(keras_taylor.analyze(model))                         # what can go, what stays and why
>>> small, info = keras_taylor.compress(
...     model, (x, y), goal=0.3, epochs=2,                     # 30 % of the parameters leave
...     validation_data=(x_val, y_val), return_info=True,
... )
>>> print(info)                                                # a table of the rounds
>>> small.save("small.keras")                                  # loads anywhere, without this package

The verbs, in the order in which they are used:

    analyze            what can be removed, and what each part is worth
    compress           score, prune, repair and fine-tune, round by round, down to a goal
    export             a SavedModel, LiteRT, ONNX or Keras file, run and compared with the model
    measure_artifacts  times several exported models against each other

What `compress` does, one step at a time:

    score              how important each channel is
    make_plan          which channels leave for a goal: a `Plan`, which can be printed, edited and saved
    prune              the smaller model of a plan
    repair             refits the layers that lost inputs, without labels
    recalibrate        renews the statistics of BatchNormalization

Inside a `fit` or a training loop of your own:

    PrunableModel      a copy of the model that scores its channels while it trains
    TaylorPruning      the callback that closes more and more of them

Settings and layers of your own:

    Selection          how the channels that leave are selected: shares of layers, multiples, floors
    Scoring            where scores come from: a criterion, examples, labels
    FineTuning         how rounds are fine-tuned: learning rate, whether the best state is kept
    MetricLimit        when to stop: how much worse which metric may become
    criteria           what makes a channel important: the module of all criteria
    register_rule      how a layer class of your own treats channels

`help(keras_taylor.compress)` and so on explain each. The other names are what these verbs return or raise:
`Info`, `Round`, `Analysis`, `Group`, `Sensitivity`, `LossCurve`, `Scores`, `GroupStatistics`, `Plan`,
`LayerPlan`, `PlanDifference`, `LayerRepair`, `Artifact`, `ExportError`, `CompressionInterrupted` and
`UnsupportedModelError`. The same on the command line: `keras-taylor --help`.
"""

import importlib
import pathlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# `python -m keras_taylor` begins here, with the working directory first on the path: a `keras.py` that lies
# there must not pass for the library. The command then closes the directory.
_IS_MODULE_RUN = sys.argv[:1] == ["-m"] and "-m keras_taylor" in " ".join(sys.orig_argv)
if _IS_MODULE_RUN and not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))

if TYPE_CHECKING:
    from keras_taylor.cutting.layer_fits import LayerRepair
    from keras_taylor.cutting.repairing import recalibrate, repair
    from keras_taylor.cutting.surgery import prune
    from keras_taylor.exports.artifacts import Artifact, ExportError
    from keras_taylor.exports.exporting import export, measure_artifacts
    from keras_taylor.loop.callbacks import TaylorPruning
    from keras_taylor.loop.compression import compress
    from keras_taylor.loop.compression_run import CompressionInterrupted
    from keras_taylor.loop.fine_tuning import FineTuning
    from keras_taylor.loop.metric_limits import MetricLimit
    from keras_taylor.loop.wrapper import PrunableModel
    from keras_taylor.plans.plan import LayerPlan, Plan
    from keras_taylor.plans.plan_difference import PlanDifference
    from keras_taylor.plans.planning import make_plan
    from keras_taylor.plans.selection import Selection
    from keras_taylor.reading.groups import Group
    from keras_taylor.reading.tracing import UnsupportedModelError
    from keras_taylor.reports.analysis import Analysis, analyze
    from keras_taylor.reports.info import Info
    from keras_taylor.reports.loss_curves import LossCurve, Sensitivity
    from keras_taylor.reports.run_record import Round
    from keras_taylor.rules.registry import register_rule
    from keras_taylor.scores import criteria
    from keras_taylor.scores.criteria import GroupStatistics, Scores
    from keras_taylor.scores.scoring import Scoring, score

__all__ = [
    "Analysis",
    "Artifact",
    "CompressionInterrupted",
    "ExportError",
    "FineTuning",
    "Group",
    "GroupStatistics",
    "Info",
    "LayerPlan",
    "LayerRepair",
    "LossCurve",
    "MetricLimit",
    "Plan",
    "PlanDifference",
    "PrunableModel",
    "Round",
    "Scores",
    "Scoring",
    "Selection",
    "Sensitivity",
    "TaylorPruning",
    "UnsupportedModelError",
    "analyze",
    "compress",
    "criteria",
    "export",
    "make_plan",
    "measure_artifacts",
    "prune",
    "recalibrate",
    "register_rule",
    "repair",
    "score",
]


# Each name is imported when it is first used. So the command `keras-taylor` answers `--help` and refuses a
# missing file without loading Keras, and chooses the backend before Keras does.
_NAMES_BY_MODULE = {
    "cutting.layer_fits": ("LayerRepair",),
    "cutting.repairing": ("recalibrate", "repair"),
    "cutting.surgery": ("prune",),
    "exports.artifacts": ("Artifact", "ExportError"),
    "exports.exporting": ("export", "measure_artifacts"),
    "loop.callbacks": ("TaylorPruning",),
    "loop.compression": ("compress",),
    "loop.compression_run": ("CompressionInterrupted",),
    "loop.fine_tuning": ("FineTuning",),
    "loop.metric_limits": ("MetricLimit",),
    "loop.wrapper": ("PrunableModel",),
    "plans.plan": ("LayerPlan", "Plan"),
    "plans.plan_difference": ("PlanDifference",),
    "plans.planning": ("make_plan",),
    "plans.selection": ("Selection",),
    "reading.groups": ("Group",),
    "reading.tracing": ("UnsupportedModelError",),
    "reports.analysis": ("Analysis", "analyze"),
    "reports.info": ("Info",),
    "reports.loss_curves": ("LossCurve", "Sensitivity"),
    "reports.run_record": ("Round",),
    "rules.registry": ("register_rule",),
    "scores.criteria": ("GroupStatistics", "Scores", "criteria"),
    "scores.scoring": ("Scoring", "score"),
}
_MODULES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    value = module if _MODULES[name].endswith(f".{name}") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, without the packages that hold them."""
    return [*__all__, "__version__"]


# Keras loads a file with a `PrunableModel` once that class is registered, which its module does.
if not (_IS_MODULE_RUN or pathlib.PurePath(*sys.argv[:1]).stem == "keras-taylor"):
    importlib.import_module("keras_taylor.loop.wrapper")
