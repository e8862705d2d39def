"""``cloudexec run``, attached, with real programs on a fake AWS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_helpers import account, eventually

from cloudexec._aws.profile import Profile
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(120)

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An account that was set up."""
    with (
        pytest.MonkeyPatch.context() as patch,
        account(tmp_path_factory.mktemp("profiles"), patch) as fake,
    ):
        yield fake


@pytest.fixture(autouse=True)
def _nothing_is_refused(aws: FakeAWS) -> Iterator[None]:
    """The role of runs is enough for all that happens on the machine."""
    aws.clear_requests()
    yield
    aws.faults.clear()
    refused = {(each.operation, each.message) for each in aws.requests if each.status == 403}
    assert not refused
    assert not [each for each in aws.requests if each.problems]


def script(folder: Path, text: str, name: str = "job.py") -> None:
    """Write a program."""
    (folder / name).write_text(text, encoding="utf-8")


def test_a_script_runs_with_its_modules_and_its_files_come_back(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    script(folder, "import inner.deep\nWORD = inner.deep.WORD\n", "helper.py")
    (folder / "inner").mkdir()
    script(folder, "", "inner/__init__.py")
    script(folder, "WORD = 'grüße'\n", "inner/deep.py")
    script(folder, "raise SystemExit('not needed')\n", "unrelated.py")
    script(
        folder,
        "import pathlib, sys, helper\n"
        "print(helper.WORD, sys.argv[1:])\n"
        "print('to stderr', file=sys.stderr)\n"
        "pathlib.Path('out/deeper').mkdir(parents=True)\n"
        "pathlib.Path('out/deeper/a.txt').write_text('content')\n"
        "pathlib.Path('elsewhere.txt').write_text('stays there')\n"
        "print(sorted(str(p) for p in pathlib.Path('.').rglob('*.py')))\n",
    )
    done = run_here("run", "job.py", "--epochs", "3", "--outputs", "out", "--log-file", "log.txt")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "grüße ['--epochs', '3']"
    assert "to stderr" in lines
    assert lines[-1] == "['helper.py', 'inner/__init__.py', 'inner/deep.py', 'job.py']"
    assert (folder / "out" / "deeper" / "a.txt").read_text() == "content"
    assert not (folder / "elsewhere.txt").exists()
    assert (folder / "log.txt").read_text() == done.stdout
    assert "1 vCPU with 2 GiB, about $0.054 an hour; it ends after 24 h" in done.stderr
    assert "1 file, 0.0 MB, in out" in done.stderr
    assert "succeeded with exit code 0 after" in done.stderr


@pytest.mark.parametrize("code", [1, 4, 137])
def test_the_exit_code_is_the_programs(
    aws: FakeAWS, run_here: Run, folder: Path, code: int
) -> None:
    script(folder, f"print('so far')\nraise SystemExit({code})\n")
    done = run_here("run", "job.py")
    assert (done.returncode, done.stdout) == (code, "so far\n")
    assert f"failed with exit code {code} after" in done.stderr
    assert "could not reach the program" not in run_here("jobs", "--limit", "1").stdout


def test_a_program_that_a_signal_ends_has_the_exit_code_that_shells_give_it(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    script(folder, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n")
    done = run_here("run", "job.py")
    assert done.returncode == 137
    assert "it was killed by SIGKILL, most likely since memory ran out" in done.stderr


def test_a_traceback_is_shown(aws: FakeAWS, run_here: Run, folder: Path) -> None:
    script(folder, "1 / 0\n")
    done = run_here("run", "job.py", "--quiet")
    assert done.returncode == 1
    assert done.stdout.endswith("ZeroDivisionError: division by zero\n")
    assert done.stderr == ""


def test_a_module_of_a_package_runs(aws: FakeAWS, run_here: Run, folder: Path) -> None:
    (folder / "shop" / "data").mkdir(parents=True)
    script(folder, "", "shop/__init__.py")
    script(folder, "1.5", "shop/data/rate.txt")
    script(
        folder,
        "import sys\nfrom pathlib import Path\nfrom .prices import double\n"
        "rate = (Path(__file__).parent / 'data' / 'rate.txt').read_text()\n"
        "print(double(float(rate)), sys.argv[1:])\n",
        "shop/report.py",
    )
    script(folder, "import tools\ndouble = tools.double\n", "shop/prices.py")
    script(folder, "def double(n):\n    return 2 * n\n", "tools.py")
    done = run_here("run", "-m", "shop.report", "a", "--", "--cpus", "7")
    assert (done.returncode, done.stdout) == (0, "3.0 ['a', '--cpus', '7']\n"), done.stderr


def test_a_command_runs_with_the_files_that_are_named(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    (folder / "src" / "build").mkdir(parents=True)
    for name in ("src/a.c", "src/notes.md", "src/build/a.o", "src/big.log", "other.c"):
        script(folder, "x", name)
    script(folder, "# what is made\nbuild/\n*.log\n", "src/.gitignore")
    script(folder, "#!/bin/sh\necho ran\n", "src/go.sh")
    (folder / "src" / "go.sh").chmod(0o755)
    done = run_here(
        "run", "--files", "src", "--", "src/go.sh && find . -type f | sort && echo $0 && exit 5"
    )
    assert done.returncode == 5, done.stderr
    assert done.stdout.splitlines() == [
        "ran",
        "./src/.gitignore",
        "./src/a.c",
        "./src/go.sh",
        "./src/notes.md",
        "/bin/sh",
    ]
    assert "sending 4 files, 0.0 MB; 2 left out by rules" in done.stderr
    done = run_here("run", "--files", "*.c", "--", "ls", "-1", "other.c")
    assert (done.returncode, done.stdout) == (0, "other.c\n")


def test_a_notebook_runs_and_comes_back_with_its_outputs(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    script(folder, "WORD = 'from a module'\n", "beside.py")
    (folder / "books").mkdir()
    cells = ["import beside\nprint(beside.WORD)", "6 * 7"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in cells])
    nbformat.write(book, folder / "books" / "a.ipynb")
    script(folder, "WORD = 'beside the notebook'\n", "books/beside.py")
    done = run_here("run", "books/a.ipynb", "--outputs", "books")
    assert done.returncode == 0, done.stdout + done.stderr
    # A kernel may have warnings of its own.
    assert done.stdout.endswith("beside the notebook\n42\n")
    back = nbformat.read(folder / "books" / "a.ipynb", as_version=4)
    assert back.cells[1].outputs[0].data["text/plain"] == "42"


@pytest.mark.parametrize(
    ("cell", "kernel", "said"),
    [
        ("import os; os._exit(9)", "python3", "the notebook's kernel ended while a cell ran"),
        ("1", "of-another-machine", "wants the kernel 'of-another-machine', which is not"),
    ],
)
def test_a_notebook_whose_kernel_fails_says_so(
    aws: FakeAWS, run_here: Run, folder: Path, cell: str, kernel: str, said: str
) -> None:
    """In a line, and not by a traceback of what runs it. What was done before is kept."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    cells = [nbformat.v4.new_code_cell(each) for each in ("print('before')", cell)]
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata["kernelspec"] = {"name": kernel, "display_name": kernel}
    nbformat.write(book, folder / "a.ipynb")
    done = run_here("run", "a.ipynb", "--outputs", "a.ipynb")
    assert done.returncode == 1
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    back = nbformat.read(folder / "a.ipynb", as_version=4)
    assert [each.text for each in back.cells[0].outputs] == ["before\n"] * (kernel == "python3")


def test_much_output_comes_back_whole_and_in_order(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    script(folder, "for n in range(100_000): print(n, 'ä€😀')\n")
    done = run_here("run", "job.py")
    assert done.returncode == 0
    assert done.stdout == "".join(f"{n} ä€😀\n" for n in range(100_000))


def test_files_larger_than_a_part_come_back(aws: FakeAWS, run_here: Run, folder: Path) -> None:
    """And files that were sent, and not changed, do not."""
    (folder / "out").mkdir()
    script(folder, "as it was", "out/sent.txt")
    script(
        folder,
        "import os, pathlib\n"
        "pathlib.Path('out/large.bin').write_bytes(bytes(range(256)) * 160_000)\n"
        "pathlib.Path('out/empty').write_bytes(b'')\n"
        "pathlib.Path('out/gr\\u00fc\\u00dfe & more').write_text(open('out/sent.txt').read())\n",
    )
    done = run_here("run", "job.py", "--files", "out/sent.txt", "--outputs", "out")
    assert done.returncode == 0, done.stderr
    assert "3 files, 41.0 MB, in out" in done.stderr
    assert (folder / "out" / "large.bin").read_bytes() == bytes(range(256)) * 160_000
    assert (folder / "out" / "empty").read_bytes() == b""
    assert (folder / "out" / "grüße & more").read_text() == "as it was"


def test_variables_go_through_the_bucket_and_are_deleted_at_the_end(
    aws: FakeAWS, run_here: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(folder, "import os; print(os.environ['TOKEN'][:3], os.environ['MODE'])\n")
    done = run_here("run", "job.py", "--env", "MODE=fast", "--env", "TOKEN=secret-4711")
    assert (done.returncode, done.stdout) == (0, "sec fast\n")
    requests = [each for each in aws.requests if each.service == "batch"]
    assert "secret-4711" not in repr(requests)
    assert "secret-4711" not in done.stderr
    names = _objects(aws)
    assert any(each.endswith("/result.json") for each in names)
    assert not [each for each in names if "/variables-" in each]
    done = run_here("run", "job.py", "--env", "NOT_SET_HERE")
    assert done.returncode == 2
    assert "--env NOT_SET_HERE: there is no such variable here; give NAME=VALUE" in done.stderr


def _objects(aws: FakeAWS) -> list[str]:
    import boto3

    pages = boto3.client("s3").get_paginator("list_objects_v2")
    bucket = Profile.load("default").bucket
    return [
        each["Key"] for page in pages.paginate(Bucket=bucket) for each in page.get("Contents", ())
    ]


def test_an_executor_in_it_has_workers_that_join_and_keeps_its_journal_with_the_run(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    script(folder, "def square(n):\n    return n * n\n", "tasks.py")
    script(
        folder,
        "import os, tasks\n"
        "from cloudexec import Batch, BatchExecutor\n"
        "journal = os.environ['CLOUDEXEC_RUN_JOURNAL']\n"
        "with BatchExecutor(2, launcher=Batch(), journal=journal) as executor:\n"
        "    print(sum(executor.map(tasks.square, range(100))))\n",
    )
    done = run_here("run", "job.py", "--name", "sums")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "328350" in done.stdout.splitlines()
    assert "for workers" in done.stderr
    workers = [each for each in aws.jobs() if each.size == 2]
    assert workers[-1].tags["cloudexec:run"] == "sums"
    assert [each for each in _objects(aws) if "cloudexec/runs/sums/journal/segments/" in each]


def test_an_executor_of_an_unchanged_script_starts_its_workers_where_it_would_here(
    aws: FakeAWS, run_here: Run, folder: Path, environment: dict[str, str]
) -> None:
    script(
        folder,
        "from cloudexec import BatchExecutor\n"
        "with BatchExecutor(1) as executor:\n"
        "    print(executor.submit(pow, 2, 5).result())\n",
    )
    before = len(aws.jobs())
    assert run_here("run", "job.py", "-q").stdout == "32\n"
    assert len(aws.jobs()) == before + 1
    environment["CLOUDEXEC_PROFILE"] = "default"
    assert "32" in run_here("run", "job.py", "-q").stdout.splitlines()
    assert len(aws.jobs()) == before + 3


def test_workers_that_a_killed_program_leaves_end_with_the_run(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    """Also those that wait for a place, which would find nobody hours later."""
    script(
        folder,
        "import os, signal, time\n"
        "from cloudexec import Batch, BatchExecutor\n"
        "executor = BatchExecutor(40, launcher=Batch(vcpus=16, memory='32GiB'), min_workers=40)\n"
        "executor.submit(pow, 2, 5).result()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    done = run_here("run", "job.py")
    assert done.returncode == 137
    left = [each for each in aws.jobs() if each.status not in ("SUCCEEDED", "FAILED")]
    assert not [each for each in left if each.status == "RUNNABLE"]
    eventually(lambda: all(each.status in ("SUCCEEDED", "FAILED") for each in aws.jobs()))


def test_what_cannot_be_run_is_refused_before_anything_is_sent(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    script(folder, "")
    for words, text in (
        (("absent.py",), "there is no file 'absent.py'; `-m MODULE` runs a module"),
        (("-m", "absent.module"), "there is no module 'absent.module'"),
        ((), "say what is to be run"),
        (("job.py", "--files", "absent/*"), "there is no file that 'absent/*' names"),
        (("job.py", "--files", "/etc/hostname"), "is not below the current folder"),
        (("job.py", "--outputs", "../up"), "outputs are folders or files below the current folder"),
        (("job.py", "--name", "Worker"), "the name of a run is 1 to 40 lower-case letters"),
        (("job.py", "--name", "worker-1"), "not like a worker's"),
        (("job.py", "--name", ""), "the name of a run is 1 to 40 lower-case letters"),
        (("job.py", "--cpus", "0"), "cpus must be"),
        (("job.py", "--memory", "much"), "much"),
        (("job.py", "--gpu", "1"), "has no queue for ec2"),
        (("job.py", "--cpus", "64"), "has no queue for ec2"),
        (("job.py", "--max-hours", "0.001"), "max_hours must be 0.0167 to 336"),
        (("job.py", "--max-cost", "0.0001"), "max_cost=$0.0001 is not enough for this machine"),
        (("job.py", "--on", "moon"), "on must be batch, ec2 or fargate, not 'moon'"),
        (("job.py", "--profile", "absent"), "there is no profile 'absent'"),
        (("job.py", "--image", "a", "--packages", "here"), "give either image or packages"),
    ):
        done = run_here("run", *words)
        assert done.returncode == 2, words
        assert text in done.stderr, (words, done.stderr)
    assert not [each for each in aws.requests if each.operation in ("PutObject", "SubmitJob")]


def test_a_profile_without_role_or_bucket_says_how_to_get_them(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    from dataclasses import replace

    script(folder, "")
    profile = Profile.load("default")
    for lacking, text in (
        (
            replace(profile, name="old", stack="", run_role=""),
            "has no role for runs: `cloudexec up",
        ),
        (replace(profile, name="old", stack="", bucket=""), "has no bucket, through which files"),
        (replace(profile, name="old", stack="theirs", run_role=""), "--adopt theirs --name old`"),
    ):
        lacking.save()
        done = run_here("run", "job.py", "--profile", "old")
        assert done.returncode == 2
        assert text in done.stderr
    lacking.delete()


def test_a_program_that_is_not_there_is_said_to_be(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    done = run_here("run", "--", "no-such-program", "a")
    assert done.returncode == 125
    assert "no-such-program a: No such file or directory" in done.stdout
    assert "it could not be run" in done.stderr


# Ctrl-C.

_ENDLESS = (
    "import pathlib, time\n"
    "pathlib.Path('out').mkdir(exist_ok=True)\n"
    "pathlib.Path('out/first.txt').write_text('so far')\n"
    "print('up', flush=True)\n"
    "time.sleep(600)\n"
)


def _until(stream: object, text: str) -> str:
    assert hasattr(stream, "readline")
    seen = ""
    while line := stream.readline():
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"no {text!r} in {seen!r}")


def test_ctrl_c_without_a_terminal_stops_the_run(
    aws: FakeAWS, start: Start, run_here: Run, folder: Path
) -> None:
    script(folder, _ENDLESS)
    client = start("run", "job.py", "--outputs", "out", "--name", "ctrl-c")
    _until(client.stdout, "up")
    client.send_signal(signal.SIGINT)
    _, errors = client.communicate(timeout=60)
    assert client.returncode == 130
    assert "The run was told to stop. `cloudexec fetch ctrl-c` brings its files." in errors
    eventually(lambda: aws.jobs()[-1].status == "FAILED")
    assert aws.jobs()[-1].status_reason.startswith("stopped by ")  # type: ignore[union-attr]
    assert run_here("fetch", "ctrl-c").stdout == "out/first.txt\n"
    assert (folder / "out" / "first.txt").read_text() == "so far"
    (line,) = (each for each in run_here("runs").stdout.splitlines() if "ctrl-c" in each)
    assert line.split()[1] == "stopped"


@pytest.mark.parametrize(("answer", "goes_on"), [("s", False), ("l", True)])
def test_ctrl_c_at_a_terminal_asks(
    aws: FakeAWS,
    run_here: Run,
    folder: Path,
    environment: dict[str, str],
    answer: str,
    goes_on: bool,
) -> None:
    """Enter goes on watching; then the run is stopped, or left running."""
    import pty

    script(folder, _ENDLESS)
    name = f"asked-{answer}"
    ours, theirs = pty.openpty()
    client = subprocess.Popen(
        [sys.executable, "-m", "cloudexec.cli", "run", "job.py", "--name", name],
        cwd=folder,
        env=environment,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert client.stdout is not None
        assert client.stderr is not None
        assert client.stdout.readline() == b"up\n"
        for reply, said in (("", "Going on."), (answer, "The run ")):
            client.send_signal(signal.SIGINT)
            _read_until(client.stderr.fileno(), "(Enter)?")
            os.write(ours, f"{reply}\n".encode())
            _read_until(client.stderr.fileno(), said)
        _, errors = client.communicate(timeout=60)
    finally:
        client.kill()
        client.wait()
        os.close(ours)
        os.close(theirs)
    assert client.returncode == 130
    if goes_on:
        assert f"goes on. `cloudexec attach {name}` shows it again" in errors.decode()
        assert aws.jobs()[-1].status == "RUNNING"
        assert run_here("stop", name, "--yes").returncode == 0
    eventually(lambda: aws.jobs()[-1].status == "FAILED")


def _read_until(descriptor: int, text: str) -> None:
    seen = b""
    while text.encode() not in seen:
        # One at a time, so that what follows is there for the next reader.
        data = os.read(descriptor, 1)
        assert data, f"no {text!r} in {seen.decode()!r}"
        seen += data


def test_a_run_needs_no_standard_input(
    aws: FakeAWS, folder: Path, environment: dict[str, str]
) -> None:
    script(folder, "import sys; print(repr(sys.stdin.read()))\n")
    done = subprocess.run(
        f"exec {sys.executable} -m cloudexec.cli run job.py <&-",
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "''\n"), done.stderr
