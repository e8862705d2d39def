"""Runs each benchmark in its own process, and prints one table."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile

_HERE = os.path.dirname(os.path.abspath(__file__))
_SCRIPTS: list[list[str]] = [
    ["throughput.py"],
    ["throughput.py", "--pin"],
    ["latency.py"],
    ["large.py"],
    ["arrays.py"],
    ["wire.py"],
    ["relay.py"],
    ["memory.py"],
    ["scale.py"],
    ["workers.py"],
    ["startup.py"],
    ["batching.py"],
    ["graph.py"],
]
_COLUMNS = ("what", "ours", "peer", "theirs", "ratio", "budget", "verdict")
_HEADINGS = ("what", "cloudexec", "beside", "its number", "ratio", "budget", "")
_VERSIONS = ("loky", "distributed", "ray", "parsl", "mpi4py", "grpcio", "protobuf", "cloudpickle")


def _run(script: list[str], *, quick: bool, quiet: bool) -> list[dict[str, str]] | None:
    """Run one benchmark; return its rows, or ``None`` if it failed."""
    with tempfile.TemporaryDirectory() as directory:
        rows = os.path.join(directory, "rows.json")
        command = [sys.executable, os.path.join(_HERE, script[0]), *script[1:], "--json", rows]
        if quick:
            command.append("--quick")
        # With Markdown, standard output has only the table.
        if subprocess.run(command, stdout=sys.stderr if quiet else None).returncode != 0:
            return None
        with open(rows) as file:
            found: list[dict[str, str]] = json.load(file)
            return found


def _machine() -> str:
    model = platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        model = names[0] if names else model
    except OSError:
        pass
    versions = []
    for name in _VERSIONS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores of {model}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}; {', '.join(versions)}."
    )


def _question(script: str) -> str:
    with open(os.path.join(_HERE, script)) as file:
        return file.readline().strip().strip('"')


def _markdown(script: list[str], rows: list[dict[str, str]] | None) -> str:
    lines = [f"### `{' '.join(script)}`: {_question(script[0])}", ""]
    if rows is None:
        return "\n".join([*lines, "It failed.", ""])
    lines.append("| " + " | ".join(_HEADINGS) + " |")
    lines.append("| --- | ---: | --- | ---: | ---: | ---: | --- |")
    lines += ["| " + " | ".join(row[column] for column in _COLUMNS) + " |" for row in rows]
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: a smoke test")
    parser.add_argument("--markdown", action="store_true", help="print the table for README.md")
    options = parser.parse_args()
    results = []
    for script in _SCRIPTS:
        results.append((script, _run(script, quick=options.quick, quiet=options.markdown)))
    rows = [row for _, found in results for row in found or []]
    if options.markdown:
        print(f"{_machine()}\n")
        if options.quick:
            print("Quick run: small sizes, one round; a smoke test, not a measurement.\n")
        for script, found in results:
            print(_markdown(script, found))
    passed = sum(row["verdict"] == "PASS" for row in rows)
    missed = [row for row in rows if row["verdict"] == "MISS"]
    failed = [" ".join(script) for script, found in results if found is None]
    sizes = " (at the small sizes of a quick run)" if options.quick else ""
    print(f"{passed} budgets kept, {len(missed)} missed{sizes}.")
    for row in missed:
        print(f"- missed: {row['what']}: {row['ours']} {row['ratio']} (budget {row['budget']})")
    for name in failed:
        print(f"- failed: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
