"""The documentation site: every public name has an entry, every block of code runs, sentences are short.

`python tests/test_site.py` prints the mean sentence length of each page.
"""

import dataclasses
import doctest
import inspect
import pathlib
import re
import shlex
import sys

import keras
import numpy as np
import pytest

import keras_taylor
from keras_taylor.cli import commands

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text("utf-8") for path in sorted(DOCS.rglob("*.md"))}
PAGES["../README.md"] = (ROOT / "README.md").read_text("utf-8")
FIRST_MODEL = "start/first_model.md"
MAX_WORDS = 25  # of a sentence, in the mean of a page

pytestmark = pytest.mark.once


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code: its language, what the comment above it says, its text and where it begins."""

    language: str
    comment: str
    text: str
    line: int


_FENCE = re.compile(r"(?:<!-- ((?:(?!-->).)*) -->\n)?```(\w+)[^\n]*\n(.*?)^```$", re.S | re.M)


def blocks_of(text):
    return [
        Block(found[2], found[1] or "", found[3], text[: found.start(3)].count("\n"))
        for found in _FENCE.finditer(text)
    ]


RUN = {name: found for name, text in PAGES.items() if (found := blocks_of(text))}


class Page:
    """Runs the blocks of a page from top to bottom, and compares what they print."""

    def __init__(self, name, namespace, capsys):
        self.name, self.namespace, self.capsys = name, dict(namespace), capsys

    def run(self):
        printed = None
        for block in RUN[self.name]:
            where = f"docs/{self.name}, line {block.line + 1}"
            if block.language == "text":
                if not block.comment.startswith("not compared: "):
                    compare(block.text, printed, bool(block.comment), where)
            elif not block.comment.startswith("not run: "):
                assert not block.comment, where
                self.capsys.readouterr()
                getattr(self, f"run_{block.language}")(block, where)
                printed = self.capsys.readouterr().out
        return self.namespace

    def run_python(self, block, where):
        code = compile("\n" * block.line + block.text, str(DOCS / self.name), "exec")
        exec(code, self.namespace)

    def run_sh(self, block, where):
        for line in block.text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line, comments=True) or [""]
            if program:
                assert program == "keras-taylor", f"{where}: {line}"
                self.type_command(arguments, where)

    def type_command(self, arguments, where):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["keras-taylor", *arguments])
            patch.setattr(sys, "path", list(sys.path))
            with pytest.raises(SystemExit) as stopped:
                commands.main()
        assert stopped.value.code == 0, f"{where}: {self.capsys.readouterr().err}"


def compare(want, got, numbers_differ, where):
    """Whether an output is what the page says; `...` stands for anything, and spaces do not matter."""
    if numbers_differ:
        want, got = (
            re.sub(r"[─━═┏┓┗┛┡┩┳╇┴┬┼└┘┌┐├┤ -]+|\d[\d,.]*(e-?\d+)?", "", text) for text in (want, got)
        )
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(want, got, options), f"{where}: it printed\n{got}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("site")


@pytest.fixture
def pages(folder, monkeypatch, tmp_path, capsys):
    """A function that runs a page, in an empty directory, with the model that the first page trains."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    kept = folder / "first.keras"

    def run(name):
        if name == FIRST_MODEL or not kept.exists():
            monkeypatch.chdir(folder)  # what it writes is in no other page's way
            namespace = Page(FIRST_MODEL, {}, capsys).run()
            monkeypatch.chdir(tmp_path)
            namespace["model"].save(kept)
            np.savez(folder / "data.npz", **{n: namespace[n] for n in ("x", "y", "x_val", "y_val")})
        if name != FIRST_MODEL:
            Page(name, start_of_page(), capsys).run()

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
    text = _FENCE.sub("\n\n", re.sub(r"<!--.*?-->(?!\n```)", "", text, flags=re.S))
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
