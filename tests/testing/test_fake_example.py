"""A user's own sweep against the fake AWS."""

from __future__ import annotations

import textwrap
from typing import Any

from cloudexec.testing import FakeAWS


def test_example_in_the_documentation_runs() -> None:
    """The test in the docstring of ``FakeAWS`` is one that passes."""
    text = FakeAWS.__doc__ or ""
    example = text.partition("A test of your own sweep::")[2].partition("As a pytest fixture")[0]
    names: dict[str, Any] = {}
    exec(compile(textwrap.dedent(example), "<example>", "exec"), names)
    names["test_the_sweep_survives_a_spot_reclaim"]()
