"""Runs in the builder stage: lay out what the worker's image has beyond its base.

Each step fills a directory that the Dockerfile copies as one layer: ``system`` (the user, bytecode
of the standard library), ``dependencies`` (an environment in /opt/worker with the worker's and the
user's requirements), ``cloudexec`` (cloudexec itself). Only the standard library is at hand here,
in whatever Python the base has.
"""

from __future__ import annotations

import os
import platform
import py_compile
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CONTEXT = Path("/context")
OUT = Path("/out")
ENVIRONMENT = Path("/opt/worker")
PYTHON = ENVIRONMENT / "bin" / "python"
USER = "worker:x:10001:10001::/home/worker:/usr/sbin/nologin\n"
GROUP = "worker:x:10001:\n"
MACHINES = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}
NOT_COMPILED = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}
"""Directories of the standard library whose bytecode no worker is likely to want."""


def fail(message: str) -> None:
    """End the build; the last line of its log is what the user sees."""
    sys.exit(f"cloudexec: {message}")


def site_packages(root: Path) -> Path:
    """Return where packages are in the environment at ``root``."""
    return root / "lib" / f"python{version()}" / "site-packages"


def version() -> str:
    """Return the minor version of the base's Python, such as ``"3.11"``."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def is_cross() -> bool:
    """Say whether the image is for another platform than the one this runs on."""
    return os.environ["PLATFORM"] != os.environ["BUILDER_PLATFORM"]


def compile_tree(tree: Path, shown_as: Path) -> None:
    """Write bytecode for all of ``tree``, which will be at ``shown_as`` in the image."""
    for source in tree.rglob("*.py"):
        compile_file(source, shown_as / source.relative_to(tree), source)


def compile_file(source: Path, shown_as: Path, beside: Path) -> None:
    """Write the bytecode of one file; what does not compile is some package's test data."""
    name = f"{source.stem}.{sys.implementation.cache_tag}.pyc"
    target = beside.parent / "__pycache__" / name
    try:
        # Never compared with the source: this bytecode is right whatever time a layer's files say.
        py_compile.compile(
            str(source),
            cfile=str(target),
            dfile=str(shown_as),
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    except (py_compile.PyCompileError, UnicodeDecodeError, ValueError):
        pass


def make_system() -> None:
    """Make the user and its home, and bytecode of the standard library where the base has none.

    Some bases, the official Python images among them, come without; the worker's user could not
    keep what it compiles, so every start would compile again all that it imports.
    """
    if version() != os.environ["PYTHON"]:
        fail(
            f"the base image has Python {version()}, but the image is to be for Python "
            f"{os.environ['PYTHON']}: choose another with --base, or --python {version()}"
        )
    system = OUT / "system"
    for name, line in (("passwd", USER), ("group", GROUP)):
        target = system / "etc" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (Path("/etc") / name).read_text()
        target.write_text(text.rstrip("\n") + "\n" + line)
    (OUT / "home" / "worker").mkdir(parents=True)
    library = Path(sysconfig.get_path("stdlib")).resolve()
    for folder, names, files in os.walk(library):
        names[:] = sorted(set(names) - NOT_COMPILED)
        for name in files:
            source = Path(folder) / name
            cached = (
                source.parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc"
            )
            if source.suffix == ".py" and not cached.exists():
                compile_file(source, source, system / source.relative_to("/"))


def pip(*arguments: str) -> None:
    """Run pip for the environment in /opt/worker."""
    command = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install"]
    command += ["--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--root-user-action=ignore", "--no-warn-script-location", *arguments]
    environment = dict(os.environ)
    certificates = CONTEXT / "requirements" / "certificates.pem"
    if certificates.exists():
        environment["PIP_CERT"] = str(certificates)
    if subprocess.run(command, check=False, env=environment).returncode:
        fail("pip could not install the requirements; what it says is above")


def target_options(target: Path) -> list[str]:
    """Return pip's options that install for another platform, wheels only, into ``target``."""
    machine = MACHINES[os.environ["PLATFORM"]]
    glibc = platform.libc_ver()[1].partition(".")[2] or "17"
    options = ["--target", str(target), "--only-binary", ":all:"]
    options += ["--python-version", version(), "--implementation", "cp"]
    # pip does not know that a newer glibc runs what was built for an older one.
    for minor in range(int(glibc), 16, -1):
        options += ["--platform", f"manylinux_2_{minor}_{machine}"]
    return [*options, "--platform", f"manylinux2014_{machine}", "--platform", f"linux_{machine}"]


def install(options: list[str]) -> None:
    """Install into the environment what ``options`` ask pip for."""
    if not is_cross():
        pip(*options)
        return
    # Merged by hand: pip leaves out a directory that is there, such as that of a name space.
    staged = OUT / "staged"
    pip(*options, *target_options(staged))
    if (staged / "bin").is_dir():
        shutil.copytree(staged / "bin", ENVIRONMENT / "bin", symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(staged / "bin")
    packages = site_packages(ENVIRONMENT)
    for record in staged.glob("*.dist-info"):
        project = record.name.partition("-")[0]
        for older in packages.glob(f"{project}-*.dist-info"):
            shutil.rmtree(older)
    shutil.copytree(staged, packages, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(staged)


def make_dependencies() -> None:
    """Make the environment, with what the worker and the user's functions need."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], check=False).returncode:
        fail("the base image has no pip: choose another with --base")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(ENVIRONMENT)], check=True)
    requirements = CONTEXT / "requirements"
    common = []
    if (requirements / "no-index").exists():
        common.append("--no-index")
    if any((CONTEXT / "wheelhouse").iterdir()):
        common += ["--find-links", str(CONTEXT / "wheelhouse")]
    worker = ["-r", str(requirements / "worker.txt")]
    user = []
    if (requirements / "user.txt").exists():
        user += ["-r", str(requirements / "user.txt")]
    if (requirements / "constraints.txt").exists():
        user += ["-c", str(requirements / "constraints.txt")]
    if (requirements / "hashed").exists():
        # With one hash in it, pip wants hashes for all, and ours have none.
        install([*common, *user])
        install([*common, *worker])
    else:
        install([*common, *worker, *user])
    compile_tree(site_packages(ENVIRONMENT), site_packages(ENVIRONMENT))


def make_cloudexec() -> None:
    """Lay out cloudexec itself, and see whether the worker can be imported."""
    (wheel,) = (CONTEXT / "cloudexec").glob("*.whl")
    packages = site_packages(OUT / "cloudexec")
    pip("--no-index", "--no-deps", "--target", str(packages), str(wheel))
    compile_tree(packages, site_packages(ENVIRONMENT))
    if not is_cross():
        probe = "import cloudexec.worker.running, cloudexec.worker.slot"
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        if subprocess.run([str(PYTHON), "-c", probe], check=False, env=environment).returncode:
            fail("the worker cannot be imported with these requirements; the reason is above")


if __name__ == "__main__":
    os.umask(0o022)
    {"system": make_system, "dependencies": make_dependencies, "cloudexec": make_cloudexec}[
        sys.argv[1]
    ]()
