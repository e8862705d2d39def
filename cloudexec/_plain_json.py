"""JSON between the processes of an executor, whatever a program has put in place of ``json.dumps``.

Local workers may be copies of the program, so this holds for both ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

__all__ = ["decode", "encode"]


def encode(value: object, default: Callable[[Any], object] | None = None) -> bytes:
    """Return a value as JSON; ``default`` makes something of what is none."""
    return json.encoder.JSONEncoder(default=default).encode(value).encode()


def decode(data: bytes | bytearray | str) -> Any:
    """Return the value that ``encode`` was given."""
    return json.decoder.JSONDecoder().decode(data if isinstance(data, str) else str(data, "utf-8"))
