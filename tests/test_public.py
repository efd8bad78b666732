"""The public names, and that the package is imported without a heavy extra."""

import inspect
import pathlib
import pydoc
import re
import subprocess
import sys

import pytest

import keras_taylor

pytestmark = pytest.mark.once


def test_public_names():
    assert sorted(keras_taylor.__all__) == [
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
    assert all(getattr(keras_taylor, name).__doc__ for name in keras_taylor.__all__)


def test_verbs_are_functions_and_no_modules():
    for name in keras_taylor.__all__:
        assert callable(getattr(keras_taylor, name)) or name == "criteria"


def test_dir_lists_the_public_names_only():
    assert dir(keras_taylor) == sorted([*keras_taylor.__all__, "__version__"])


def test_help_names_everything_public():
    first, _, page = keras_taylor.__doc__.partition("\n")
    assert len(first) < 100
    missing = [name for name in keras_taylor.__all__ if not re.search(rf"\b{name}\b", page)]
    assert not missing
    verbs = re.findall(r"^    (\w+)  +", page, re.M)
    assert verbs.index("analyze") < verbs.index("compress") < verbs.index("export")
    rendered = pydoc.plain(pydoc.render_doc(keras_taylor))
    assert "compress           score, prune" in rendered and ">>> small.save" in rendered


def test_docstrings_point_to_public_names_only():
    hidden = set()
    for name in {*keras_taylor.__all__} - {"criteria"}:  # whose docstring also says how to add one here
        value = getattr(keras_taylor, name)
        members = vars(value).values() if inspect.isclass(value) else ()
        for text in filter(None, map(inspect.getdoc, [value, *members])):
            hidden.update(re.findall(r"\bkeras_taylor\.([a-z]\w+\.[\w.]+)", text))
    reached = {path for path in hidden if path.split(".")[0] in keras_taylor.__all__}
    assert {path.removesuffix(".") for path in hidden - reached} == {
        "rules.base",  # and what it holds: documented on the site under this name
        "rules.base.Context",
        "rules.base.Effect",
    }


def test_all_of_criteria_are_documented_functions():
    criteria = keras_taylor.criteria
    named = {**criteria.LOSS_CRITERIA, **criteria.ACTIVATION_CRITERIA, **criteria.DATA_FREE_CRITERIA}
    assert {name for name in criteria.__all__ if name in named} == set(named)
    for name, function in named.items():
        assert getattr(criteria, name) is function and f"    {name} " in criteria.__doc__


def test_import_needs_no_picture_library():
    code = "import sys; sys.modules['matplotlib'] = None; import keras_taylor; keras_taylor.Info"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_citation_names_this_version():
    citation = (pathlib.Path(__file__).parents[1] / "CITATION.cff").read_text()
    assert f"\nversion: {keras_taylor.__version__}\n" in citation
