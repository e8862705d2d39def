"""What goes into an image, and what it is called: without an engine."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from cloudexec import ConfigError
from cloudexec._aws import image_contents
from cloudexec._aws.image_contents import WORKER_REQUIREMENTS, ImageSpec, collect, worker_pins
from cloudexec._aws.images import Planned


def written(tmp_path: Path, text: str, name: str = "requirements.txt") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def user_files(path: Path) -> dict[str, str]:
    files = collect(ImageSpec(requirements=path)).files
    own = {"requirements/worker.txt"}
    return {
        name.removeprefix("requirements/"): content.decode()
        for name, content in files.items()
        if name.startswith("requirements/") and name not in own and isinstance(content, bytes)
    }


def tag(spec: ImageSpec, base_id: str = "sha256:1") -> str:
    return Planned(contents=collect(spec), base_id=base_id).tag


def test_same_content_has_the_same_tag_whatever_the_time(tmp_path: Path) -> None:
    """Times of files are no part of the content."""
    requirements = written(tmp_path, "numpy==2.0\n")
    first = tag(ImageSpec(requirements=requirements))
    os.utime(requirements, (1, 1))
    assert tag(ImageSpec(requirements=requirements)) == first


def test_tag_tells_version_python_and_platform() -> None:
    """Whoever sees only the tag can say whether the image fits."""
    parts = tag(ImageSpec(python="3.12", platform="linux/arm64")).split("-")
    assert parts[1:3] == ["py3.12", "arm64"]
    assert len(parts[3]) == 16


def test_everything_that_goes_in_changes_the_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two images that differ share a tag."""
    wheelhouse = tmp_path / "wheels"
    wheelhouse.mkdir()
    written(wheelhouse, "one", "thing-1-py3-none-any.whl")
    requirements = written(tmp_path, "numpy==2.0\n")
    tags = [
        tag(ImageSpec()),
        tag(ImageSpec(), base_id="sha256:2"),
        tag(ImageSpec(python="3.14")),
        tag(ImageSpec(platform="linux/arm64")),
        tag(ImageSpec(base="other")),
        tag(ImageSpec(packages=("git",))),
        tag(ImageSpec(requirements=requirements)),
        tag(ImageSpec(wheelhouse=wheelhouse)),
    ]
    written(tmp_path, "numpy==2.1\n")
    tags.append(tag(ImageSpec(requirements=requirements)))
    written(wheelhouse, "two", "thing-1-py3-none-any.whl")
    tags.append(tag(ImageSpec(wheelhouse=wheelhouse)))
    monkeypatch.setattr(image_contents, "INIT_REQUIREMENT", "dumb-init==1")
    tags.append(tag(ImageSpec()))
    assert len(set(tags)) == len(tags)


def test_order_of_packages_does_not_matter() -> None:
    """The same packages make the same image."""
    assert tag(ImageSpec(packages=("git", "curl"))) == tag(ImageSpec(packages=("curl", "git")))


def test_worker_gets_the_versions_of_the_client() -> None:
    """Payloads and messages fit if both sides have the same versions."""
    pins = worker_pins()
    for name in WORKER_REQUIREMENTS:
        assert f"{name}=={importlib.metadata.version(name)}" in pins
    assert all("==" in pin for pin in pins)


def test_worker_requires_nothing_of_the_client_only() -> None:
    """No SDK, no command line, no terminal in the image."""
    names = {pin.partition("==")[0] for pin in worker_pins()}
    assert not names & {"aiobotocore", "botocore", "boto3", "click", "cryptography", "rich"}


def test_worker_imports_nothing_but_its_requirements(tmp_path: Path) -> None:
    """With only the worker's requirements at hand, all of the worker can be imported.

    Also what its functions import when they are called.
    """
    package = Path(image_contents.__file__).parents[1]
    later = {
        node.module
        for path in (package / "worker").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__"
    }
    assert "cloudexec._objects.s3_transfer" in later
    allowed = {pin.partition("==")[0] for pin in worker_pins()}
    modules = {
        module
        for module, projects in importlib.metadata.packages_distributions().items()
        if allowed & {project.lower().replace("_", "-") for project in projects}
    }
    program = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names | {modules | {"cloudexec"}}:
            raise ModuleNotFoundError(f"the worker imports {{name}}", name=name)
sys.meta_path.insert(0, Blocker())
sys.path.append({str(package.parent)!r})
import cloudexec.worker.__main__, cloudexec.worker.running
import cloudexec.worker.slot, cloudexec.worker.zygote
import importlib
for name in {sorted(later)}:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_wheel_is_the_running_code_and_requires_nothing(tmp_path: Path) -> None:
    """pip installs it without an index, and what it installs is this very code."""
    package = Path(image_contents.__file__).parents[1]
    name, content = inspect.unwrap(image_contents._own_wheel)(package, "1.0")
    wheel = tmp_path / name
    wheel.write_bytes(content)
    target = tmp_path / "target"
    pytest.importorskip("pip", reason="this environment has no pip")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, timeout=60)
    for path in package.rglob("*.py"):
        assert (target / path.relative_to(package.parent)).read_bytes() == path.read_bytes()
    assert not list(target.rglob("*.pyc"))


def test_wheel_of_an_installed_package_is_made_without_a_source_tree(tmp_path: Path) -> None:
    """What pip installed is enough: no pyproject.toml, and the recipe inside the package."""
    package = Path(image_contents.__file__).parents[1]
    copy = tmp_path / "site" / "cloudexec"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if not (copy / "_aws" / "_image").exists():
        shutil.copytree(package.parent / "images", copy / "_aws" / "_image")
    info = copy.parent / "cloudexec-9.8.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cloudexec\nVersion: 9.8.7\n")
    program = (
        "from cloudexec._aws.image_contents import *\n"
        "found = collect(ImageSpec())\n"
        "print(found.version, *found.files)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "9.8.7",
        "Dockerfile",
        "assemble.py",
        "requirements/worker.txt",
        "cloudexec/cloudexec-9.8.7-py3-none-any.whl",
    ]


def test_wheel_is_the_same_each_time() -> None:
    """Its bytes depend on the code only."""
    make = inspect.unwrap(image_contents._own_wheel)
    package = Path(image_contents.__file__).parents[1]
    name, content = make(package, "1.0")
    assert make(package, "1.0") == (name, content)
    with zipfile.ZipFile(BytesIO(content)) as wheel:
        assert {entry.date_time for entry in wheel.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_requirements_are_taken_with_the_files_that_they_name(tmp_path: Path) -> None:
    """Nested files are joined, and constraints kept apart."""
    (tmp_path / "more").mkdir()
    written(tmp_path, "scipy  # needed\n-c limits.txt\n", "more/base.txt")
    written(tmp_path, "scipy<2\n", "more/limits.txt")
    path = written(
        tmp_path,
        "# ours\n--index-url=https://index.example/simple\n-r more/base.txt\nnumpy \\\n  ==2.0\n",
    )
    assert user_files(path) == {
        "user.txt": "--index-url=https://index.example/simple\nscipy\nnumpy ==2.0\n",
        "constraints.txt": "scipy<2\n",
    }


@pytest.mark.parametrize(
    "line",
    [
        "cloudexec==0.0.1",
        "Cloudexec[image] >= 0.0",
        "cloudexec @ https://example.org/cloudexec.whl",
        "cloudexec==1 --hash=sha256:0",
    ],
)
def test_cloudexec_itself_is_not_taken_from_the_requirements(tmp_path: Path, line: str) -> None:
    """The image has the code that runs here, not what a lock file says."""
    assert user_files(written(tmp_path, f"{line}\nnumpy\n"))["user.txt"] == "numpy\n"


def test_hashes_are_noticed(tmp_path: Path) -> None:
    """pip wants hashes for all or for none: then ours are installed apart."""
    path = written(tmp_path, "numpy==2.0 \\\n    --hash=sha256:abc \\\n    --hash=sha256:def\n")
    assert user_files(path) == {
        "user.txt": "numpy==2.0 --hash=sha256:abc --hash=sha256:def\n",
        "hashed": "",
    }


@pytest.mark.parametrize(
    "line",
    ["-e .", "./package", "../package", "/srv/package", "tool @ file:///srv/tool", "-f wheels"],
)
def test_requirements_of_this_machine_are_refused_with_a_remedy(tmp_path: Path, line: str) -> None:
    """What the image cannot reach is said at once, with the line's number."""
    path = written(tmp_path, f"numpy\n{line}\n")
    with pytest.raises(ConfigError, match=r"requirements\.txt:2: .*--wheelhouse"):
        collect(ImageSpec(requirements=path))


@pytest.mark.parametrize("name", ["uv.lock", "poetry.lock", "pylock.toml", "Pipfile"])
def test_other_lock_files_are_refused_with_a_remedy(tmp_path: Path, name: str) -> None:
    """pip cannot read them; what makes a file that it can is named."""
    with pytest.raises(ConfigError, match="export"):
        collect(ImageSpec(requirements=written(tmp_path, "", name)))


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    """An option that would be lost is not passed over."""
    with pytest.raises(ConfigError, match="--target"):
        collect(ImageSpec(requirements=written(tmp_path, "--target /x\n")))


def test_empty_wheelhouse_is_refused(tmp_path: Path) -> None:
    """Without any wheel nothing could be installed."""
    with pytest.raises(ConfigError, match="no wheel"):
        collect(ImageSpec(wheelhouse=tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"python": "3"},
        {"python": "3.11.2"},
        {"platform": "linux/s390x"},
        {"packages": ("git; rm",)},
        {"packages": ("--force",)},
        {"requirements": Path("/nowhere.txt")},
        {"wheelhouse": Path("/nowhere")},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    """Each names what is wrong."""
    with pytest.raises(ConfigError):
        ImageSpec(**wrong)  # type: ignore[arg-type]  # that is the test


def test_context_holds_every_file(tmp_path: Path) -> None:
    """The directory that the engine gets has it all, and is gone afterwards."""
    contents = collect(ImageSpec(requirements=written(tmp_path, "numpy\n")))
    with contents.directory() as directory:
        found = {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
        assert set(contents.files) < found
        assert "wheelhouse" in found
    assert not directory.exists()
