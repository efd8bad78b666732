"""The README is short, and its links lead somewhere. Its code runs with that of the site."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
MAX_LINES = 150


def test_it_is_short():
    assert len(README.splitlines()) <= MAX_LINES


def test_its_links_lead_to_files():
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", README)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []
