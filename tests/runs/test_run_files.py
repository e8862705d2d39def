"""Which files are sent with a run, and how they arrive."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

import cloudexec
from cloudexec import ConfigError, PayloadTooLargeError
from cloudexec._runs import files
from cloudexec._runs.files import collect, packed, unpack
from cloudexec._runs.ignoring import files_in
from cloudexec._runs.places import MachineState
from cloudexec._runs.plan import RunPlan, RunResult, check_name, new_name
from cloudexec._runs.run import make_request
from cloudexec._runs.runs import Found, Position


def write(folder: Path, texts: dict[str, str]) -> None:
    """Write files."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("rules", "ignored"),
    [
        ("*.log", {"a.log", "deep/b.log", "deep/er/c.log"}),
        ("/*.log", {"a.log"}),
        ("deep/", {"deep"}),
        ("deep/*.log", {"deep/b.log"}),
        ("deep/**/c.log", {"deep/er/c.log"}),
        ("**/er", {"deep/er"}),
        ("*.log\n!b.log", {"a.log", "deep/er/c.log"}),
        ("# *.txt\n\n[ab].log", {"a.log", "deep/b.log"}),
        ("[!a].log", {"deep/b.log", "deep/er/c.log"}),
        ("?.log/", set()),
        ("\\!odd", {"!odd"}),
        ("[z-a]*\n*.txt", {"a.txt"}),
    ],
)
def test_rules_are_those_of_git(tmp_path: Path, rules: str, ignored: set[str]) -> None:
    for name in ("a.log", "a.txt", "!odd", "deep/b.log", "deep/er/c.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_text(rules)
    found = {path.relative_to(tmp_path).as_posix() for path, out in files_in(tmp_path) if out}
    assert found == ignored


def test_our_own_rules_count_more_and_a_folder_that_is_named_is_sent(tmp_path: Path) -> None:
    rules = {"data/.gitignore": "*.csv\n", "data/.cloudexecignore": "!*.csv\n*.tmp\n"}
    write(tmp_path, {".gitignore": "data/\n", "data/a.csv": "", "data/b.tmp": "", **rules})
    found = collect("command", "", ["data"], tmp_path)
    assert set(found.files) == {"data/.gitignore", "data/.cloudexecignore", "data/a.csv"}
    assert found.ignored == 1


@pytest.mark.parametrize("at", ["", "project"])
def test_rules_of_the_folders_above_count(tmp_path: Path, at: str) -> None:
    """From the current folder on; or from the root of the Git repository that it is in."""
    (tmp_path / ".git").mkdir()
    rules = {".gitignore": ".env\n/project/src/*.key\n", "project/.gitignore": "src/*.log\n"}
    names = ("src/.env", "src/a.key", "src/deep/a.key", "src/a.log", "src/deep/a.log")
    write(tmp_path, {**rules, **{f"project/{name}": "" for name in names}})
    base = tmp_path / at
    found = collect("command", "", ["src" if at else "project/src"], base)
    assert set(found.files) == {
        (tmp_path / "project" / name).relative_to(base).as_posix()
        for name in ("src/deep/a.key", "src/deep/a.log")
    }
    assert found.ignored == 3


def test_linked_folders_are_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path, {"src/a.py": "", "large/b.csv": ""})
    (tmp_path / "src" / "data").symlink_to(tmp_path / "large")
    found = collect("command", "", ["src"], tmp_path)
    assert (set(found.files), found.links) == ({"src/a.py"}, ["src/data"])
    assert set(collect("command", "", ["src/data"], tmp_path).files) == {"src/data/b.csv"}


def test_modules_are_found_where_python_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the script, in folders without __init__.py, and in those of PYTHONPATH."""
    here, other = tmp_path / "here", tmp_path / "other"
    modules = dict.fromkeys(("tools/beside.py", "tools/space/inner.py", "tools/space/x.py"), "")
    script = "import beside, space.inner, far.away, json, numpy\n"
    wrong = "raise SystemExit('not this one')\n"
    write(here, {"tools/go.py": script, "beside.py": wrong, **modules})
    write(other, {"far/__init__.py": "", "far/away.py": "import last\n", "last.py": ""})
    monkeypatch.setenv("PYTHONPATH", str(other))
    found = collect("script", str(here / "tools" / "go.py"), (), here)
    assert set(found.files) == {
        "tools/go.py",
        "tools/beside.py",
        "tools/space/inner.py",
        ".elsewhere/1/far/__init__.py",
        ".elsewhere/1/far/away.py",
        ".elsewhere/1/last.py",
    }
    assert found.target == "tools/go.py"
    assert set(found.python_path) == {"tools", ".elsewhere/1"}


def test_too_much_is_refused_with_the_largest_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FILES_LIMIT_BYTES", 1000)
    write(tmp_path, {"data/small": "x" * 400, "data/large": "x" * 700})
    with pytest.raises(PayloadTooLargeError, match=r"the largest is .*data/large .*under data/"):
        collect("command", "", ["data"], tmp_path)


def test_files_arrive_as_they_were(tmp_path: Path) -> None:
    """With their modes and times; what a symbolic link leads to is sent in its place."""
    write(tmp_path, {"sent/go.sh": "#!/bin/sh\n", "elsewhere": "linked"})
    (tmp_path / "sent" / "go.sh").chmod(0o750)
    (tmp_path / "sent" / "link").symlink_to(tmp_path / "elsewhere")
    with packed(collect("command", "", ["sent"], tmp_path)) as archive:
        assert archive is not None
        unpack(archive.path, tmp_path / "back")
    assert not archive.path.exists()
    script = tmp_path / "back" / "sent" / "go.sh"
    assert script.stat().st_mode & 0o777 == 0o750
    assert int(script.stat().st_mtime) == int((tmp_path / "sent" / "go.sh").stat().st_mtime)
    assert (tmp_path / "back" / "sent" / "link").read_text() == "linked"
    assert not (tmp_path / "back" / "sent" / "link").is_symlink()


@pytest.mark.parametrize("name", ["/absolute", "../above", "a/../../above"])
def test_an_archive_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    path = tmp_path / "files.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(tarfile.ReadError, match="has no place in the files of a run"):
        unpack(path, tmp_path / "back")


def test_an_archive_has_no_links(tmp_path: Path) -> None:
    path = tmp_path / "files.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(info)
    with pytest.raises(tarfile.ReadError, match="'link' has no place"):
        unpack(path, tmp_path / "back")


@pytest.mark.parametrize(
    ("title", "stem"),
    [
        ("src/Train Model.py", "train-model"),
        ("2026.py", "run-2026"),
        ("日本.py", "run"),
        ("a" * 60 + ".py", "a" * 24),
        ("worker-1.py", "worker-1"),
    ],
)
def test_names_say_what_is_run_and_are_all_different(title: str, stem: str) -> None:
    name = check_name(new_name(title))
    assert name.rpartition("-")[0] == stem
    assert name != new_name(title)


@pytest.mark.parametrize("name", ["", "A", "a--b", "-a", "a-", "1a", "a" * 41, "worker-3", "a/b"])
def test_names_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="the name of a run is 1 to 40 lower-case letters"):
        check_name(name)


def test_plans_of_other_releases_are_read_as_far_as_possible() -> None:
    plan = RunPlan(name="a", kind="script", target="a.py", args=("x",), outputs=("out",))
    newer = plan.to_json().replace(b'"name"', b'"from-the-future": 1, "name"')
    assert RunPlan.from_json(newer) == plan
    with pytest.raises(ConfigError, match="was started by a newer cloudexec"):
        RunPlan.from_json(plan.to_json().replace(b'"script"', b'"hologram"'))
    with pytest.raises(ConfigError, match=r"the bucket's result\.json of a run cannot be read"):
        RunResult.from_json(b"<html>")
    with pytest.raises(ConfigError, match=r"the bucket's run\.json of a run cannot be read"):
        RunPlan.from_json(b'{"title": "of a later format"}')


def test_a_plan_with_a_number_among_its_arguments_can_be_listed() -> None:
    """Whoever lists runs reads the plans of all people that share the profile."""
    plan = RunPlan(name="a", kind="script", target="a.py", args=("1",))
    assert RunPlan.from_json(plan.to_json().replace(b'"1"', b"1")) == plan


def test_what_is_no_list_of_strings_is_refused() -> None:
    """A string is a list of its characters: folders of these names would be made."""
    for options, text in (
        ({"args": [1]}, "args must be a list of strings, and 1 is none"),
        ({"args": "--steps 3"}, "not '--steps 3': write ['--steps 3']"),
        ({"outputs": "results"}, "outputs must be a list of strings, not 'results'"),
        ({"files": Path("a.csv")}, "write ['a.csv']"),
        ({"image": ""}, "image must be the name of an image, not ''"),
        ({"env": {"N": 1}}, "env must have names and values that are strings, not 'N': 1"),
    ):
        with pytest.raises(ConfigError) as caught:
            make_request("a.py", **options)  # type: ignore[arg-type]
        assert text in str(caught.value)
    request = make_request("a.py", outputs=[Path("results")])
    assert request.outputs == ("results",)


def test_what_is_neither_a_program_nor_nodes_for_an_executor_is_refused() -> None:
    with pytest.raises(TypeError, match="the path of a program, or nodes and an executor: 3"):
        cloudexec.run(3)  # type: ignore[call-overload]


def _ended(**values: object) -> MachineState:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    return MachineState(job_id="a", phase="ended", created_at=moment, **values)  # type: ignore[arg-type]


def test_the_end_of_a_log_is_waited_for_unless_the_program_was_killed() -> None:
    """It may have ended itself with 137: then it has a result."""
    soon, late = Position(quiet=4), Position(quiet=31)
    assert soon.is_over(_ended(exit_code=137))
    assert not replace(soon, has_result=True).is_over(_ended(exit_code=137))
    assert soon.is_over(_ended(exit_code=1, was_stopped=True))
    assert not soon.is_over(_ended(exit_code=1))
    assert late.is_over(_ended(exit_code=1))


def test_a_program_that_succeeded_without_its_files_says_so() -> None:
    plan = RunPlan(name="a", kind="script", target="a.py")
    lost = RunResult(exit_code=0, reason="its files did not come back: no room")
    found = Found(plan, _ended(exit_code=0, reason="Essential container in task exited"), lost)
    assert (found.info().state, found.info().reason) == ("succeeded", lost.reason)
    found = replace(found, result=RunResult(exit_code=0))
    assert found.info().reason == ""
