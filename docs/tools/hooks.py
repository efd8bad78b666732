"""What mkdocs does beside its own: files of the repository that lie outside of `docs/` become pages.

Links between files are written as in the repository, so that they also work there. Here they are turned into
links between pages.
"""

import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {"DESIGN.md": "design/map.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES |= {
    path.relative_to(ROOT).as_posix(): f"benchmarks/{path.name}"
    for path in sorted((ROOT / "benchmarks/results").iterdir())
}
# Programs are shown as pages.
PROGRAMS = {
    path.relative_to(ROOT).as_posix(): f"examples/{path.stem}.md"
    for path in sorted((ROOT / "examples").glob("*.py"))
}
_DIRECTORIES = {"benchmarks/results": "benchmarks/index.md"}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for source, target in PROGRAMS.items():
        code = (ROOT / source).read_text("utf-8")
        content = f"# `{source}`\n\n```python\n{code}```\n"
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    own = page.file.src_uri
    if own.startswith(("benchmarks/", "examples/", "experiments/")):
        page.meta["search"] = {"boost": 0.2}  # after the guides and the reference
    sources = {target: source for source, target in PAGES.items()}
    folder = posixpath.dirname(sources.get(own, f"docs/{own}"))

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        target = {**PAGES, **PROGRAMS, **_DIRECTORIES}.get(path)
        if target is None and not path.startswith("docs/"):
            return match[0]  # mkdocs says that there is no such page
        return posixpath.relpath(target or path.removeprefix("docs/"), posixpath.dirname(own) or ".")

    return _LINK.sub(link, markdown.replace("<!-- results -->", _table_of_results()))


def _table_of_results() -> str:
    """The pages of `benchmarks/results`: title, machine and date."""
    rows = ["| what was measured | machine | date |", "|---|---|---|"]
    for source, target in PAGES.items():
        if source.startswith("benchmarks/results/") and source.endswith(".md"):
            text = (ROOT / source).read_text("utf-8")
            title = text.partition("\n")[0].removeprefix("# ")
            found = re.search(r"^(.*?); Python .*?(\d{4}-\d\d-\d\d)\.?$", text, re.M)
            machine, date = found.groups() if found else ("", "")
            date = date.replace("-", "\N{NON-BREAKING HYPHEN}")
            rows.append(f"| [{title}]({posixpath.basename(target)}) | {machine} | {date} |")
    return "\n".join(rows)
