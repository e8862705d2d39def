"""What a library for Linux loads: the names in its dynamic section."""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["needed_libraries"]

_LOAD, _DYNAMIC = 1, 2
"""Of program headers, "p_type"."""
_END, _NEEDED, _STRINGS = 0, 1, 5
"""Of entries of the dynamic section, "d_tag"."""


def needed_libraries(content: bytes) -> list[str]:
    """Return the names of the libraries that a 64-bit little-endian one needs.

    They are those of ``DT_NEEDED``. ELF-64 Object File Format, "Program Header Table" and "Dynamic
    Table".
    """
    if content[:6] != b"\x7fELF\x02\x01":
        return []
    try:
        return list(_needed(content))
    except (struct.error, ValueError):
        return []  # Cut short; whoever loads it will say so.


def _needed(content: bytes) -> Iterator[str]:
    (table,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    headers = [
        struct.unpack_from("<IIQQQQ", content, table + number * size) for number in range(count)
    ]
    tags: list[tuple[int, int]] = []
    for kind, _, offset, _, _, length in headers:
        if kind == _DYNAMIC:
            tags += struct.iter_unpack("<QQ", content[offset : offset + length // 16 * 16])
    used = tags[: next((at for at, (tag, _) in enumerate(tags) if tag == _END), len(tags))]
    strings = next((value for tag, value in used if tag == _STRINGS), 0)
    for kind, _, offset, address, _, length in headers:
        if kind == _LOAD and address <= strings < address + length:
            start = offset + strings - address
            break
    else:
        return
    for tag, value in used:
        if tag == _NEEDED:
            begin = start + value
            yield content[begin : content.index(b"\0", begin)].decode(errors="replace")
