"""What exceptions of users say."""

from __future__ import annotations

import linecache
import re
import sys
from types import ModuleType

__all__ = ["with_sources"]

_FRAME = re.compile(r'( *(?:\| *)*)  File "(.+)", line (\d+)(?:, in .*)?')


def with_sources(text: str) -> str:
    """Add the lines of source that a traceback's text lacks, where this process has them.

    A worker elsewhere has no copy of the script, and none has the cells of a notebook. Only files
    of modules that are loaded here are looked at, whatever the text says.
    """
    lines = text.split("\n")
    found = []
    known: set[str] | None = None
    for number, line in enumerate(lines):
        found.append(line)
        frame = _FRAME.fullmatch(line)
        if frame is None:
            continue
        margin, name, at = frame.groups()
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if following.startswith(f"{margin}    "):
            continue
        if known is None:
            known = _files_at_hand()
        if name in known and (source := linecache.getline(name, int(at[:9])).strip()):
            found.append(f"{margin}    {source}")
    return "\n".join(found)


def _files_at_hand() -> set[str]:
    modules = [vars(each) for each in list(sys.modules.values()) if type(each) is ModuleType]
    names = [names.get("__file__") for names in modules]
    return {name for name in (*names, *list(linecache.cache)) if type(name) is str}
