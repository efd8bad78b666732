"""The documentation site: every public name has an entry, every block of code runs, sentences are short.

`python tests/test_site.py` prints the mean sentence length of each page.
"""

import inspect
import pathlib
import re

import keras
import numpy as np
import pytest
from site_pages import DOCS, FENCE, WIDTH, Page, blocks_of, pictures_of

import keras_taylor

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text("utf-8") for path in sorted(DOCS.rglob("*.md"))}
PAGES["../README.md"] = (ROOT / "README.md").read_text("utf-8")
FIRST_MODEL = "start/first_model.md"
MAX_WORDS = 25  # of a sentence, in the mean of a page

pytestmark = pytest.mark.once


TUTORIALS = [name for name in PAGES if name.startswith("tutorials/") and name != "tutorials/index.md"]
RUN = [name for name, text in PAGES.items() if blocks_of(text) and name not in TUTORIALS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("site")


@pytest.fixture
def pages(folder, monkeypatch, tmp_path):
    """A function that runs a page, in an empty directory, with the model that the first page trains."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    kept = folder / "first.keras"

    def run(name):
        if name == FIRST_MODEL or not kept.exists():
            monkeypatch.chdir(folder)  # what it writes is in no other page's way
            namespace = Page(FIRST_MODEL, {}).run()
            monkeypatch.chdir(tmp_path)
            namespace["model"].save(kept)
            np.savez(folder / "data.npz", **{n: namespace[n] for n in ("x", "y", "x_val", "y_val")})
        if name != FIRST_MODEL:
            Page(name, start_of_page()).run()

    def start_of_page():
        """The names that the first page defines, with fewer examples, and files for the command line."""
        data = dict(np.load(folder / "data.npz"))
        data = {name: values[: 64 if name.endswith("_val") else 256] for name, values in data.items()}
        model = keras.models.load_model(kept)
        model.save("model.keras")
        model.save("trained.keras")
        parts = {"x_train": "x", "y_train": "y", "x_test": "x_val", "y_test": "y_val"}
        np.savez("data.npz", **{part: data[name] for part, name in parts.items()})
        return {"keras": keras, "keras_taylor": keras_taylor, "np": np, "model": model, **data}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RUN, key=lambda name: name != FIRST_MODEL))
def test_the_code_of_a_page_runs(name, pages):
    pages(name)


# What must hold at the end of each tutorial, of names that its code defines.
PROMISES = {
    "tutorials/detection.md": lambda before, after, info, small, model: (
        before > 0.75
        and after > before - 0.12
        and info.reduction["flops"] >= 0.5
        and all(small.get_layer(f"{name}_head").filters == 16 for name in model.output_names)
    ),
    "tutorials/images.md": lambda model, small, accuracy, whole, tiny: (
        accuracy(small) > max(accuracy(model) - 0.04, 0.88)
        and tiny.metric > accuracy(small) - 0.02
        and tiny.num_bytes < 0.65 * whole.num_bytes
    ),
    "tutorials/regression.md": lambda model, small, before, errors: (
        small.count_params() < 0.5 * model.count_params()
        and errors(small)[0] < before[0] + 0.15
        and errors(small)[1] < before[1] + 0.1
    ),
    "tutorials/segmentation.md": lambda model, small, test_iou, file, info: (
        test_iou(model) > 0.8
        and test_iou(small) > test_iou(model) - 0.06
        and info.reduction["flops"] > 0.35
        and file.metric > file.model_metric - 0.02
    ),
    "tutorials/text.md": lambda model, small, accuracy, info: (
        accuracy(model) > 0.6
        and accuracy(small) > accuracy(model) - 0.05
        and info.reduction["params"] >= 0.3
        and type(small) is type(model)
    ),
    "tutorials/words.md": lambda model, small, accuracy, info: (
        info.reduction["flops"] >= 0.5
        and accuracy(model, 0.0) > 0.9
        and all(accuracy(small, level) > accuracy(model, level) - 0.05 for level in (0.0, 0.3))
    ),
}


def test_every_tutorial_has_a_promise_and_a_picture():
    assert PROMISES.keys() == set(TUTORIALS)
    assert all(pictures_of(PAGES[name]) for name in TUTORIALS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_keeps_its_promise(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    promise = PROMISES[name]
    if "import keras_hub" in PAGES[name]:
        pytest.importorskip("keras_hub")
    assert promise(
        **{key: value for key, value in Page(name, {}).run().items() if key in arguments_of(promise)}
    )
    for picture in pictures_of(PAGES[name]):
        assert (tmp_path / picture).stat().st_size < 100_000
        assert (DOCS / "assets/tutorials" / picture).is_file()


def arguments_of(function):
    return inspect.signature(function).parameters


def entries():
    """The names that the reference has an entry for, and the pages."""
    found = {}
    for page, text in PAGES.items():
        for path in re.findall(r"^::: keras_taylor\.([\w.]+)$", text, re.M):
            found.setdefault(path, []).append(page)
    return found


def test_every_public_name_has_one_entry_in_the_reference():
    found = entries()
    assert {name: pages for name, pages in found.items() if len(pages) > 1} == {}
    assert set(found) == {*keras_taylor.__all__, "rules.base"}
    members = re.search(r"members: \[(.*)\]", PAGES["reference/criteria.md"])[1].split(", ")
    assert set(members) == set(keras_taylor.criteria.__all__) - {"GroupStatistics", "Scores"}


def sentences_of(text):
    """The sentences of a page in Markdown: no code, tables, headings or comments."""
    text = re.sub(r"^---\n.*?^---\n", "", text, flags=re.S | re.M)
    text = FENCE.sub("\n\n", re.sub(r"<!--.*?-->(?!\n```)", "", text, flags=re.S))
    text = re.sub(r"^(?: {4,}.*|#.*|\|.*|!!!.*|:::.*|>>> .*|\.\.\. .*)$", "\n", text, flags=re.M)
    text = re.sub(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", text)
    text = re.sub(r"^\s*(?:[-*]|\d+\.)\s", "\n\n", text, flags=re.M)  # an item of a list begins a paragraph
    text = re.sub(r"\b(?:et al|e\.g|i\.e|vs)\.", lambda match: match[0].replace(".", ""), text)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    parts = [one for part in paragraphs for one in re.split(r"(?<=[.!?])\)?\s+(?=[A-Z`\"*\[(\d])", part)]
    return [one for one in parts if re.search(r"\w", one)]


def docstrings_of(page):
    """What the entries of a reference page say."""
    for path in re.findall(r"^::: keras_taylor\.([\w.]+)$", PAGES[page], re.M):
        if path not in keras_taylor.__all__:
            continue
        value = getattr(keras_taylor, path)
        members = vars(value).values() if inspect.isclass(value) else ()
        for text in filter(None, map(inspect.getdoc, [value, *members])):
            yield re.sub(r"^ {4}(\*{0,2}[\w, ]+: )?", "\n", text, flags=re.M)


def mean_words(page):
    text = "\n\n".join([PAGES[page], *docstrings_of(page)])
    lengths = [len(sentence.split()) for sentence in sentences_of(text)]
    return np.mean(lengths) if lengths else 0.0


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page):
    assert mean_words(page) <= MAX_WORDS


def test_how_sentences_are_counted():
    text = "# A title\n\nOne two three. Four `five` [six](x.md)!\n\n- Seven.\n- Eight (nine).\n"
    text += "\n```python\nx = 1\n```\n"
    assert [len(sentence.split()) for sentence in sentences_of(text)] == [3, 3, 1, 2]


if __name__ == "__main__":
    for page in sorted(PAGES, key=mean_words):
        print(f"{mean_words(page):5.1f} {page}")
