"""Really smaller Keras 3 models: Taylor pruning of whole channels."""

from keras_taylor.analysis import Analysis, analyze
from keras_taylor.artefacts import Artefact, ExportError
from keras_taylor.callbacks import TaylorPruning
from keras_taylor.compression import compress
from keras_taylor.descent import CompressionInterrupted
from keras_taylor.exporting import export, measure_artefacts
from keras_taylor.opening import UnsupportedModelError
from keras_taylor.plan import Plan
from keras_taylor.planning import make_plan
from keras_taylor.repairing import recalibrate, repair
from keras_taylor.report import Info
from keras_taylor.rules.registry import register_rule
from keras_taylor.scoring import score
from keras_taylor.surgery import prune
from keras_taylor.version import VERSION
from keras_taylor.wrapper import PrunableModel

__all__ = [
    "Analysis",
    "Artefact",
    "CompressionInterrupted",
    "ExportError",
    "Info",
    "Plan",
    "PrunableModel",
    "TaylorPruning",
    "UnsupportedModelError",
    "analyze",
    "compress",
    "export",
    "make_plan",
    "measure_artefacts",
    "prune",
    "recalibrate",
    "register_rule",
    "repair",
    "score",
]
__version__ = VERSION
