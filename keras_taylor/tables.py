"""Tables as plain text."""

import io

from rich.console import Console


def render(table, width=100):
    """A rich table as text of at most `width` columns."""
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().rstrip()
