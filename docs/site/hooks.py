"""Makes pages of the site from files outside of docs/, and leads links to these pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

_ROOT = Path(__file__).parents[2]
_OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "README.md": "index.md",
}
"""Files of the repository that pages link to, and the pages of the site that they become."""


def on_files(files: Any, config: Any) -> Any:
    """Add the files that have no page of their own."""
    for path, page in _OUTSIDE.items():
        if files.get_file_from_path(page) is None:
            file = File.generated(config, page, abs_src_path=str(_ROOT / path))
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links between docs/ and files outside of it by links between pages of the site."""
    here = posixpath.dirname(page.file.src_uri)
    sources = {made: path for path, made in _OUTSIDE.items() if made != "index.md"}
    source = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def target(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(source, match[1]))
        made = _OUTSIDE.get(path, path.removeprefix("docs/"))
        return f"]({posixpath.relpath(made, here or '.')}{match[2] or ''})"

    return re.sub(r"\]\(([^)#:\s]+)(#[^)]*)?\)", target, markdown)
