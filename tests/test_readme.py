"""The README's table of layers is generated from the rules: `python tests/test_readme.py` writes it."""

import pathlib
import re

import pytest

from keras_taylor.rules import registry

pytestmark = pytest.mark.once

README = pathlib.Path(__file__).parent.parent / "README.md"
START, END = "<!-- layers: generated -->\n", "<!-- /layers -->\n"


def table():
    rows = ["| `keras.layers` | what happens to channels |", "|---|---|"]
    families = {}
    for name, rule in registry.LAYERS.items():
        families.setdefault(rule, []).append(name)
    for rule, names in families.items():
        rows.append(f"| {', '.join(names)} | {rule.__doc__.splitlines()[0]} |")
    return "\n".join(rows) + "\n"


def test_table_of_layers_is_what_the_rules_say():
    text = README.read_text()
    assert text[text.index(START) + len(START) : text.index(END)] == table()


def test_python_blocks_are_valid():
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S):
        compile(block, "README.md", "exec")


if __name__ == "__main__":
    content = README.read_text()
    README.write_text(content[: content.index(START) + len(START)] + table() + content[content.index(END) :])
