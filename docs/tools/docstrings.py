"""Docstrings as the site shows them: their examples are code, and the public names in them are links."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.M)
_NAME = re.compile(r"`(?:keras_taylor\.)?(\w+)`")


class ShownDocstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrites all docstrings of the package."""
        public = set(map(str, pkg.exports or ()))
        self._rewrite(pkg, public, pkg.path)

    def _rewrite(self, parent: griffe.Object, public: set[str], package: str) -> None:
        if parent.docstring is not None:
            text = _EXAMPLE.sub(lambda match: f"```pycon\n{match[0]}\n```", parent.docstring.value)
            parts = re.split(r"(```pycon\n.*?\n```)", text, flags=re.S)
            parts[::2] = (_NAME.sub(lambda m: self._link(m, public, package), part) for part in parts[::2])
            parent.docstring.value = "".join(parts)
        for member in parent.members.values():
            if not member.is_alias:
                self._rewrite(member, public, package)

    @staticmethod
    def _link(match: re.Match[str], public: set[str], package: str) -> str:
        name = match[1]
        return f"[`{name}`][{package}.{name}]" if name in public else match[0]
