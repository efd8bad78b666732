"""The public names, and that the package is imported without a heavy extra."""

import subprocess
import sys

import keras_taylor


def test_public_names():
    assert sorted(keras_taylor.__all__) == [
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
    assert all(getattr(keras_taylor, name).__doc__ for name in keras_taylor.__all__)


def test_verbs_are_functions_and_no_modules():
    for name in keras_taylor.__all__:
        assert callable(getattr(keras_taylor, name))


def test_import_needs_no_picture_library():
    code = "import sys; sys.modules['matplotlib'] = None; import keras_taylor; keras_taylor.Info"
    subprocess.run([sys.executable, "-c", code], check=True)
