"""Blocks of code in pages of the documentation: they run from top to bottom, and print what the page says.

`python tests/site_pages.py tutorials/regression.md` runs a page of `docs/`, and writes into it what its code
prints today. Pictures that the code draws and the page shows go to `docs/assets/tutorials`.
"""

import contextlib
import dataclasses
import doctest
import io
import os
import pathlib
import re
import shlex
import shutil
import sys
import tempfile
import time

import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
WIDTH = 100  # of a terminal, in characters

FENCE = re.compile(r"(?:<!-- ((?:(?!-->).)*) -->\n)?```(\w+)[^\n]*\n(.*?)^```$", re.S | re.M)
_PICTURE = re.compile(r"!\[[^\]]*\]\(\.\./assets/tutorials/([^)]+)\)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code: its language, what the comment above it says, its text and where it begins."""

    language: str
    comment: str
    text: str
    start: int
    line: int

    @property
    def runs(self):
        return self.language != "text" and not self.comment.startswith("not run: ")


def blocks_of(text):
    return [
        Block(found[2], found[1] or "", found[3], found.start(3), text[: found.start(3)].count("\n"))
        for found in FENCE.finditer(text)
    ]


def pictures_of(text):
    """The names of the pictures that a tutorial draws and shows."""
    return _PICTURE.findall(text)


class Page:
    """A page whose blocks run in the current directory, from top to bottom."""

    def __init__(self, name, namespace):
        self.name, self.namespace = name, dict(namespace)
        self.text = (DOCS / name).read_text("utf-8")

    def outputs(self):
        """Runs block after block. Yields each block of output, where it is, what was printed before it."""
        printed = None
        for block in blocks_of(self.text):
            where = f"docs/{self.name}, line {block.line + 1}"
            if block.language == "text":
                yield block, where, printed
            elif block.runs:
                assert not block.comment, where
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    getattr(self, f"run_{block.language}")(block, where)
                printed = output.getvalue()

    def run(self):
        """Runs the page, compares what it prints with what it says, and returns its names."""
        for block, where, printed in self.outputs():
            if not block.comment.startswith("not compared: "):
                compare(block.text, printed, bool(block.comment), where)
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
        from keras_taylor.cli import commands

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as errors:
            patch.setattr(sys, "argv", ["keras-taylor", *arguments])
            patch.setattr(sys, "path", list(sys.path))
            with pytest.raises(SystemExit) as stopped:
                commands.main()
        assert stopped.value.code == 0, f"{where}: {errors.getvalue()}"


def compare(want, got, numbers_differ, where):
    """Whether an output is what the page says; `...` stands for anything, and spaces do not matter."""
    if numbers_differ:
        want, got = (
            re.sub(r"[─━═┏┓┗┛┡┩┳╇┴┬┼└┘┌┐├┤ -]+|\d[\d,.]*(e-?\d+)?", "", text) for text in (want, got)
        )
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(want, got, options), f"{where}: it printed\n{got}"


def renew(name):
    """Writes into a page what its code prints and draws; of blocks that begin with `...` the last lines."""
    page = Page(name, {})
    parts, end, start = [], 0, time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for block, _, printed in page.outputs():
            lines = "\n".join(line.rstrip() for line in printed.splitlines() if line.strip()) + "\n"
            if block.text.startswith("...\n"):
                num = len(block.text.splitlines()) - 1
                lines = "...\n" + "".join(lines.splitlines(keepends=True)[-num:] if num else [])
            parts += [page.text[end : block.start], lines]
            end = block.start + len(block.text)
        for picture in pictures_of(page.text):
            shutil.copy(picture, DOCS / "assets/tutorials" / picture)
    (DOCS / name).write_text("".join([*parts, page.text[end:]]), "utf-8")
    print(f"{name}: {time.process_time() - start:.0f} s of one core", file=sys.stderr)


if __name__ == "__main__":
    os.environ["COLUMNS"] = str(WIDTH)
    for argument in sys.argv[1:]:
        renew(argument)
