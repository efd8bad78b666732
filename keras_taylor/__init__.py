"""Really smaller Keras 3 models: Taylor pruning of whole channels."""

__version__ = "0.1.0"

from keras_taylor.cutting.layer_fits import LayerRepair
from keras_taylor.cutting.repairing import recalibrate, repair
from keras_taylor.cutting.surgery import prune
from keras_taylor.exports.artifacts import Artifact, ExportError
from keras_taylor.exports.exporting import export, measure_artifacts
from keras_taylor.loop.callbacks import TaylorPruning
from keras_taylor.loop.compression import compress
from keras_taylor.loop.compression_run import CompressionInterrupted
from keras_taylor.loop.judging import MetricLimit
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
from keras_taylor.scores.criteria import GroupStatistics, Scores
from keras_taylor.scores.scoring import Scoring, score

__all__ = [
    "Analysis",
    "Artifact",
    "CompressionInterrupted",
    "ExportError",
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
    "export",
    "make_plan",
    "measure_artifacts",
    "prune",
    "recalibrate",
    "register_rule",
    "repair",
    "score",
]
