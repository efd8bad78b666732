"""Tables as plain text."""

import io

from rich.console import Console


def render(table, width=100):
    """A rich table as text of at most `width` columns."""
    # plain in notebooks too, where rich would display the table, or write it with colors
    console = Console(
        file=io.StringIO(), width=width, force_jupyter=False, force_terminal=False, color_system=None
    )
    console.print(table)
    return console.file.getvalue().rstrip()
