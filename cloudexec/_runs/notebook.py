"""``python -m cloudexec._runs.notebook``: runs a notebook, and writes it with its outputs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(path: str) -> int:
    """Run the cells of a notebook one after the other, and print what they print.

    The notebook is written in its place, with the outputs so far, also if a cell fails.

    Args:
        path: Of the notebook.

    Returns:
        The exit code: 1 if a cell failed or the notebook's kernel ended.
    """
    nbformat: Any = importlib.import_module("nbformat")
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook: Any = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        resources={"metadata": {"path": str(Path(path).parent)}},
        on_cell_executed=lambda cell, cell_index, execute_reply: _print(cell),
    )
    try:
        client.execute()
    except CellExecutionError as exc:
        print(exc, file=sys.stderr, flush=True)
        return 1
    except DeadKernelError:
        print(
            "the notebook's kernel ended while a cell ran: it crashed, was killed because memory "
            "was used up (--memory), or a cell ended it",
            file=sys.stderr,
            flush=True,
        )
        return 1
    except NoSuchKernel as exc:
        print(
            f"the notebook wants the kernel {exc.name!r}, which is not installed here: choose "
            f"another one in the notebook, or install its package (packages=, an image of yours)",
            file=sys.stderr,
            flush=True,
        )
        return 1
    finally:
        nbformat.write(notebook, path)
    return 0


def _print(cell: Any) -> None:
    """Print the output of a cell, as far as it is text."""
    for output in cell.get("outputs", ()):
        if output["output_type"] == "stream":
            stream = sys.stderr if output["name"] == "stderr" else sys.stdout
            print(output["text"], end="", file=stream, flush=True)
        elif text := output.get("data", {}).get("text/plain"):
            print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
