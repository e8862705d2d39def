"""Layers are the same wherever they are packed, and only what changed makes another one."""

from __future__ import annotations

import email
import gzip
import hashlib
import io
import json
import marshal
import os
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from environment_helpers import PYTHON

from cloudexec._environment.cache import Cache
from cloudexec._environment.components import LOOSE, Component, Entry
from cloudexec._environment.layers import Layer, Node, build_layers, compile_sources, group, pack
from cloudexec._environment.target import Target

TARGET = Target(PYTHON, "linux/amd64", 36)
OTHER = Target("3.99", "linux/amd64", 36)
SITE = f"lib/python{PYTHON}/site-packages"
Building = Callable[..., dict[str, Layer]]
LARGE = os.urandom(9 * 2**20)


def component(name: str, content: bytes = b"X = 1\n", *, is_own: bool = False) -> Component:
    """Return a component with one module."""
    return Component(
        name=name, version="1", entries=(Entry(f"{SITE}/{name}.py", content),), is_own=is_own
    )


@pytest.fixture
def build(cache: Cache, tmp_path: Path) -> Building:
    """Packs components; gives the layers by title."""
    runs = iter(range(100))

    def run(*components: Component, target: Target = TARGET, **options: bool) -> dict[str, Layer]:
        folder = tmp_path / f"run-{next(runs)}"
        folder.mkdir()
        layers = build_layers(group(components), target, cache, folder, **options)
        return {layer.title: layer for layer in layers}

    return run


def files(layer: Layer) -> dict[str, tarfile.TarInfo]:
    """Return the members of a layer by path."""
    assert layer.path is not None
    with tarfile.open(layer.path) as archive:
        return {member.name: member for member in archive}


def test_changed_package_changes_one_layer(build: Building) -> None:
    """The others keep their digests, and are not even packed again."""
    names = [f"package{number}" for number in range(30)]
    before = build(*map(component, names))
    after = build(*map(component, names[1:]), component(names[0], b"X = 2\n"))
    changed = [title for title in before if before[title].digest != after[title].digest]
    assert len(changed) == 1
    assert [layer.title for layer in after.values() if layer.path is not None] == changed


def test_large_packages_and_projects_have_layers_of_their_own(build: Building) -> None:
    """What changes most often comes last."""
    large = Component(name="large", entries=(Entry(f"{SITE}/large.bin", LARGE),))
    own = [component(name, is_own=True) for name in ("mine", "cloudexec")]
    titles = list(build(component("one"), large, *own))
    assert titles[0] == "large"
    assert titles[-2:] == ["cloudexec", "mine"]
    assert len(titles) == 4


def test_number_of_layers_is_bounded(cache: Cache) -> None:
    """An image has at most 127."""
    entry = Entry(f"{SITE}/large.bin", LARGE)
    many = [Component(name=f"large{number}", entries=(entry,)) for number in range(200)]
    distinct = [
        Component(name=each.name, entries=(Entry(f"{SITE}/{each.name}.bin", LARGE),))
        for each in many
    ]
    groups = group(distinct)
    assert len(groups) <= 60
    assert sum(len(each.components) for each in groups) == 200


def test_file_of_two_packages_is_in_one_layer() -> None:
    """Two packages may bring the same file; the first one's counts."""
    shared = f"{SITE}/shared.py"
    first = Component(name="a", entries=(Entry(shared, b"1"),))
    second = Component(name="b", entries=(Entry(shared, b"2"), Entry(f"{SITE}/b.py", b"")))
    entries = [
        entry for each in group([second, first]) for one in each.components for entry in one.entries
    ]
    assert sorted((entry.path, entry.source) for entry in entries) == [
        (f"{SITE}/b.py", b""),
        (shared, b"1"),
    ]


def test_file_of_a_package_comes_before_nobodys() -> None:
    """What an older version of it has left behind is not what was fetched."""
    package, loose = component("zold", b"new"), component("zold", b"old")
    groups = group([replace(loose, name=LOOSE), package])
    (entry,) = [entry for each in groups for one in each.components for entry in one.entries]
    assert entry.read() == b"new"


def test_bytecode_is_compiled_and_never_compared(build: Building, tmp_path: Path) -> None:
    """Its header says so; a traceback shows where the source is in the image. PEP 552."""
    (layer,) = build(component("thing", b"def f():\n    return 7\n")).values()
    cached = f"opt/worker/{SITE}/__pycache__/thing.{sys.implementation.cache_tag}.pyc"
    with tarfile.open(layer.path) as archive:
        member = archive.extractfile(cached)
        assert member is not None
        content = member.read()
    assert content[4:8] == (1).to_bytes(4, "little")
    code = marshal.loads(content[16:])
    assert code.co_filename == f"/opt/worker/{SITE}/thing.py"


def test_bytecode_does_not_depend_on_what_is_compiled_beside_it() -> None:
    """Or other machines would make other layers of the same packages, and send them again."""
    sources = {f"json/{path.name}": path for path in Path(json.__file__).parent.glob("*.py")}
    sources |= {f"email/{path.name}": path for path in Path(email.__file__).parent.glob("*.py")}
    together = compile_sources(sources, "/opt/worker")
    assert len(together) == len(sources)
    for path, source in sources.items():
        (alone,) = compile_sources({path: source}, "/opt/worker").items()
        assert together[alone[0]] == alone[1]


def test_what_does_not_compile_is_left_as_it_is(build: Building) -> None:
    """It is some package's test data, or a template."""
    (layer,) = build(component("broken", b"def {{ name }}:\n")).values()
    assert not [path for path in files(layer) if path.endswith(".pyc")]


def test_tests_of_packages_get_no_bytecode(build: Building) -> None:
    """A large package may have more of them than of anything else."""
    entries = tuple(
        Entry(f"{SITE}/{path}", b"x = 1\n")
        for path in ("thing/__init__.py", "thing/tests/test_a.py", "thing/testing.py")
    )
    (layer,) = build(Component(name="thing", entries=entries)).values()
    suffix = f".{sys.implementation.cache_tag}.pyc"
    compiled = {path.removesuffix(suffix) for path in files(layer) if path.endswith(".pyc")}
    folder = f"opt/worker/{SITE}/thing/__pycache__"
    assert compiled == {f"{folder}/__init__", f"{folder}/testing"}


def test_another_python_gets_no_bytecode(build: Building) -> None:
    """This one would write what that one cannot read."""
    (layer,) = build(component("thing"), target=OTHER).values()
    assert not [path for path in files(layer) if path.endswith(".pyc")]


def test_members_say_nothing_about_this_machine(build: Building, tmp_path: Path) -> None:
    """Neither user nor time; programs can be run, and everybody may read everything."""
    script = tmp_path / "script"
    script.write_text("#!/some/where/python3\n")
    os.chmod(script, 0o700)
    entries = (Entry("bin/script", script, True), Entry(f"{SITE}/data.txt", b"1"))
    (layer,) = build(Component(name="thing", entries=entries)).values()
    found = files(layer)
    assert {(each.uid, each.gid, each.mtime, each.uname) for each in found.values()} == {
        (0, 0, 0, "")
    }
    assert oct(found["opt/worker/bin/script"].mode) == "0o755"
    assert oct(found[f"opt/worker/{SITE}/data.txt"].mode) == "0o644"
    assert oct(found[f"opt/worker/{SITE}"].mode) == "0o755"


def test_large_files_are_not_held_in_memory(
    build: Building, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries of some packages have more than a gigabyte."""
    (tmp_path / "large.so").write_bytes(LARGE)
    entry = Entry(f"{SITE}/large.so", tmp_path / "large.so")
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read as a whole"))
    tracemalloc.start()
    try:
        build(Component(name="large", entries=(entry,)), target=OTHER)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(LARGE) / 2


def test_same_content_makes_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    """With other hashes of strings, another umask, another directory, at another time."""
    script = """
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from cloudexec._environment.cache import Cache
from cloudexec._environment.components import LOOSE, Component, Entry
from cloudexec._environment.layers import build_layers, group
from cloudexec._environment.target import Target
import json, email, argparse
root = Path(sys.argv[1])
(root / "out").mkdir(parents=True)
entries = tuple(
    Entry(f"lib/{Path(module.__file__).name}", Path(module.__file__))
    for module in (json, argparse)
) + (Entry("lib/sets.py", b"def f(x):\\n    return x in {'a', 'b', 'c', 'd', 'e'}\\n"),)
component = Component(name="some", entries=entries)
python = f"{sys.version_info.major}.{sys.version_info.minor}"
target = Target(python, "linux/amd64")
layers = build_layers(group([component]), target, Cache(root / "cache"), root / "out")
print([(layer.digest, layer.diff_id, layer.size) for layer in layers])
"""
    said = set()
    for seed, umask in (("1", 0o022), ("2", 0o077)):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
            umask=umask,
        )
        said.add(done.stdout)
    assert len(said) == 1


def test_layer_is_called_what_its_bytes_are(tmp_path: Path) -> None:
    """Compressed, as a manifest has it, and not, as a configuration has it."""
    with open(tmp_path / "layer", "wb") as file:
        members = [
            ("etc/link", Node(link="passwd")),
            ("etc/passwd", Node(b"root\n")),
            ("home/me", Node(owner=7)),
        ]
        layer = pack("some", members, file)
    content = (tmp_path / "layer").read_bytes()
    assert layer.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert layer.size == len(content)
    plain = gzip.decompress(content)
    assert layer.diff_id == f"sha256:{hashlib.sha256(plain).hexdigest()}"
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        kinds = {each.name: (each.type, each.linkname, each.uid) for each in archive}
    assert kinds == {
        "etc": (tarfile.DIRTYPE, "", 0),
        "etc/link": (tarfile.SYMTYPE, "passwd", 0),
        "etc/passwd": (tarfile.REGTYPE, "", 0),
        "home": (tarfile.DIRTYPE, "", 0),
        "home/me": (tarfile.DIRTYPE, "", 7),
    }
