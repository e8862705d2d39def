"""The package as a whole: what it exports, what imports what."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FunctionType

import pytest

import cloudexec
from cloudexec import launchers

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cloudexec"

# Which parts of the package each part may import, itself aside. Everyone may import the errors,
# what puts them into words, annotations, and the decorator for classes of named values.
ANYWHERE = {"_annotations", "_describing", "_errors", "_plain_json", "_record_class", "_rpc"}
MAY_IMPORT = {
    "_core": {"_config"},
    "_server": {
        "_config",
        "_core",
        "_descriptors",
        "_direct",
        "_enrolment",
        "_forked",
        "_functions",
        "_future",
        "_journal",
        "_launchers",
        "_log",
        "_logs",
        "_memory",
        "_nesting",
        "_objects",
        "_payload",
        "_plain",
        "_proto",
        "_records",
        "_relay",
        "_sharing",
        "_story",
        "_transfer",
        "_versions",
        "_wire",
    },
    "_server/bucket.py": {"_aws", "_log", "_objects", "_proto", "_transfer"},
    "_objects": {
        "_config",
        "_descriptors",
        "_direct",
        "_memory",
        "_proto",
        "_records",
        "_wire",
    },
    "_objects/s3.py": {"_aws", "_transfer"},
    "_objects/s3_requests.py": {"_aws", "_transfer"},
    "_objects/s3_answers.py": {"_transfer"},
    "_objects/s3_transfer.py": {"_transfer"},
    "_launchers": {"_config", "_log", "_pricing"},
    "_launchers/aws": {
        "_aws",
        "_config",
        "_enrolment",
        "_environment",
        "_log",
        "_pricing",
        "_relay",
    },
    "_launchers/batch": {"_aws", "_config", "_environment", "_log", "_pricing"},
    "_launchers/ec2": {"_aws", "_config", "_environment", "_log", "_pricing"},
    "_launchers/fargate": {"_aws", "_config", "_environment", "_log"},
    "_launchers/lambda_": {"_aws", "_config", "_enrolment", "_environment", "_log"},
    "_launchers/local.py": {"_config", "_descriptors", "_log", "_proto"},
    "_launchers/copies.py": {"_forked", "_modules", "worker"},
    "_aws": {"_config", "_enrolment", "_pricing"},
    "_aws/doctor_relay.py": {"_relay"},
    "_environment": {"_aws", "_log"},
    "_relay": {"_enrolment"},
    "_runs": {
        "_aws",
        "_config",
        "_enrolment",
        "_environment",
        "_journal",
        "_launchers",
        "_log",
        "_modules",
        "_objects",
        "_pricing",
    },
    "worker": {
        "_descriptors",
        "_direct",
        "_enrolment",
        "_forked",
        "_logs",
        "_anew",
        "_main",
        "_modules",
        "_module_state",
        "_nesting",
        "_objects",
        "_payload",
        "_plain",
        "_proto",
        "_records",
        "_relay",
        "_runs",
        "_settings",
        "_sharing",
        "_transfer",
        "_unsendable",
        "_versions",
        "_wire",
    },
    "_graph": {
        "_config",
        "_executor",
        "_future",
        "_graph_drawing",
        "_graph_report",
        "_objects",
        "_progress",
    },
    "_graph_drawing": set(),
    "_graph_report": {"_future"},
    "_journal": {
        "_fingerprints",
        "_functions",
        "_log",
        "_modules",
        "_objects",
        "_payload",
        "_records",
    },
    "_journal/bucket.py": {"_aws", "_log", "_objects", "_payload", "_transfer"},
    "_story": {"_config"},
    "launchers": {"_config", "_launchers", "_pricing"},
    "metrics": {"_executor", "_launchers", "_stats"},
    "tracing": {"_core", "_executor", "_server"},
    "_sizing": {"_config", "_core", "_launchers"},
    "_memory": set(),
    "_records": {"_memory"},
    "_inputs": {"_records"},
    "_payload": {"_anew", "_inputs", "_main", "_objects", "_records", "_sharing"},
    "_main": set(),
    "_script": {
        "_anew",
        "_fingerprints",
        "_functions",
        "_main",
        "_module_state",
        "_objects",
        "_payload",
        "_records",
        "_registrations",
        "_shared_state",
        "_unsendable",
    },
    "_shared_state": {"_fingerprints"},
    "_registrations": {"_main", "_modules"},
    "_plain_json": set(),
    "_unsendable": {"_fingerprints", "_payload", "_sharing"},
    "_fingerprints": {"_main"},
    "_functions": {
        "_core",
        "_fingerprints",
        "_main",
        "_module_state",
        "_objects",
        "_payload",
        "_records",
        "_script",
    },
    "_anew": {"_anew_basics"},
    "_anew_basics": set(),
    "_anew_ctypes": {"_anew_basics"},
    "_anew_weak": {"_anew_basics"},
    "_settings": {"_anew", "_log"},
    "_module_state": {"_log", "_main", "_modules", "_settings"},
    "_describing": set(),
    "_forked": set(),
    "_log": {"_forked"},
    "_logs": set(),
    "_sharing": {"_direct", "_forked"},
    "_ending": {"_core"},
    "_mapping": {"_future", "_progress"},
    "_future": {"_forked", "_log"},
    "_config": set(),
    "_modules": set(),
    "_preload": {"_modules"},
    "_plain": {"_wire"},
    "_pricing": set(),
    "_record_class": set(),
    "_rpc": set(),
    "_versions": set(),
    "_nesting": set(),
    "_errors": set(),
    "_enrolment": set(),
    "_descriptors": set(),
    "_direct": {"_descriptors"},
    "_transfer": set(),
    "_wire": {"_proto"},
    "_progress": {"_future"},
    "_stats": {"_core", "_launchers"},
}


def _import_nodes(path: Path) -> list[ast.AST]:
    """Return what a file imports, lazily or not, but not for types alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    return [node for node in ast.walk(tree) if node not in typing_only]


def _imports(path: Path) -> set[str]:
    """Return which parts of cloudexec a file imports."""
    found: set[str] = set()
    for node in _import_nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "cloudexec":
                names = [f"cloudexec.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("cloudexec.")}
    return found


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_point_inward(part: str) -> None:
    """No part of the package imports one that lies further out."""
    where = PACKAGE / part
    files = sorted(where.rglob("*.py")) if where.is_dir() else [where.with_suffix(".py")]
    own = {PACKAGE / other for other in MAY_IMPORT if other.startswith(f"{part}/")}
    files = [file for file in files if not own & {file, *file.parents}]
    assert files
    for file in files:
        excess = _imports(file) - MAY_IMPORT[part] - ANYWHERE - {part.partition("/")[0]}
        assert not excess, f"{file.relative_to(ROOT)} imports {sorted(excess)}"


FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}


def _modules_in(code: str) -> set[str]:
    """Return the modules of cloudexec that code imports, lazily or for types alone as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written with the package's name"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in FILES else node.module or "")
    return found & FILES.keys()


def test_no_module_imports_itself_by_a_detour() -> None:
    """Each can be understood with what lies below it alone; what is imported for types counts."""
    graph = {name: _modules_in(file.read_text()) - {name} for name, file in FILES.items()}
    assert "cloudexec._server.driver" in graph["cloudexec._submission"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        raise AssertionError(f"these import each other: {' <- '.join(exc.args[1])}") from exc


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import cloudexec._core.queue", {"cloudexec._core.queue"}),
        ("from cloudexec._core import queue", {"cloudexec._core.queue"}),
        ("from cloudexec._core.queue import Queues", {"cloudexec._core.queue"}),
        ("from cloudexec import BatchExecutor", {"cloudexec"}),
        ("def f():\n    from cloudexec import _log", {"cloudexec._log"}),
        ("if TYPE_CHECKING:\n    from cloudexec import _log", {"cloudexec._log"}),
        ("import json, grpc.aio", set()),
    ],
)
def test_each_way_to_import_a_module_is_found(code: str, found: set[str]) -> None:
    assert _modules_in(code) == found


def test_nothing_is_too_large_to_be_held_in_mind() -> None:
    """No class has more than 500 lines, no module more than 650; what is generated may."""
    too_large: list[str] = []
    for name, file in FILES.items():
        if name.endswith("_pb2"):
            continue
        text = file.read_text()
        if (lines := len(text.splitlines())) > 650:
            too_large.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 500:
                    too_large.append(f"{name}.{node.name}: {lines} lines")
    assert not too_large


def test_what_is_exported_is_listed_sorted_and_named_after_the_package() -> None:
    """``__all__`` is complete, and users' tracebacks say ``cloudexec.X``."""
    public = {
        name
        for name, value in vars(cloudexec).items()
        if not name.startswith("_") and isinstance(value, type | FunctionType)
    }
    assert list(cloudexec.__all__) == sorted(cloudexec.__all__)
    assert public == set(cloudexec.__all__)
    for name in cloudexec.__all__:
        assert getattr(cloudexec, name).__module__ == "cloudexec", name


def test_what_launchers_of_others_are_written_with_is_listed_and_public() -> None:
    """Their tracebacks, and their documentation, say where it is to be imported from."""
    assert list(launchers.__all__) == sorted(launchers.__all__)
    for name in launchers.__all__:
        assert getattr(launchers, name).__module__ in ("cloudexec", "cloudexec.launchers"), name


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


@pytest.mark.parametrize(
    "name",
    [name for name in cloudexec.__all__ if _is_error(getattr(cloudexec, name))],
)
def test_errors_survive_pickling(name: str) -> None:
    """Every error comes back with its type, its words and its attributes."""
    error = getattr(cloudexec, name)("what happened")
    error.extra = [1, 2]
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert "what happened" in str(back)
    assert back.__dict__ == error.__dict__


def _modules_after(code: str) -> set[str]:
    script = f"import sys; {code}; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    """gRPC comes with the first executor, the rest with their first use."""
    heavy = {"grpc", "asyncio", "google.protobuf", "rich", "click", "aiobotocore", "cryptography"}
    heavy |= {"ctypes", "mmap", "hashlib", "numpy", "cloudpickle"}
    assert not heavy & _modules_after("import cloudexec")


def test_a_worker_loads_no_aws_sdk_and_nothing_of_the_client() -> None:
    """What runs in a container stays small."""
    loaded = _modules_after("import cloudexec.worker.running, cloudexec.worker.slot")
    assert not {"aiobotocore", "botocore", "rich", "click", "cryptography"} & loaded
    assert not {
        name for name in loaded if name.startswith(("cloudexec._server", "cloudexec._core"))
    }
