"""Workers that are copies of the client: what they have of it, and what they must not have."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="workers are copies on Linux alone"
)


def run_script(tmp_path: Path, text: str, *flags: str, **environ: str) -> list[str]:
    """Run a program with one thread; return the lines that it prints."""
    (tmp_path / "program.py").write_text(textwrap.dedent(text))
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **environ}
    done = subprocess.run(
        [sys.executable, *flags, "program.py"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not done.stderr, done.stderr[-4000:]
    return done.stdout.splitlines()


_KIND = """
import logging
import re

class Kinds(logging.Handler):
    found = []
    def emit(self, record):
        if "process %d" in record.msg:
            self.found.append(record.args[2])

def watch():
    log = logging.getLogger("cloudexec")
    log.addHandler(Kinds())
    log.propagate = False
    log.setLevel("DEBUG")
"""


def test_installed_modules_of_the_client_are_there_and_the_settings_of_these(
    tmp_path: Path,
) -> None:
    """They are not imported again: an import of each would take its time."""
    found = run_script(
        tmp_path,
        """
        import sys
        import numpy, wsgiref.util
        from cloudexec import BatchExecutor

        numpy.a_setting = 5

        def look():
            return "wsgiref.util" in sys.modules, sys.modules["numpy"].a_setting

        with BatchExecutor(1) as executor:
            print(executor.submit(look).result())
        """,
    )
    assert found == ["(True, 5)"]


def test_the_own_modules_of_the_program_are_imported_anew(tmp_path: Path) -> None:
    """As in a worker elsewhere: with what the program has set in them, but without its objects."""
    (tmp_path / "mine.py").write_text(
        "import os\nvalue = 1\ndef where(pid=os.getpid()): return pid\n"
    )
    found = run_script(
        tmp_path,
        """
        import os, sys
        import mine, numpy
        from cloudexec import BatchExecutor

        mine.value = 2

        def look():
            had = "mine" in sys.modules
            import mine as here
            return "numpy" in sys.modules, here.value, here.where() == os.getpid()

        if __name__ == "__main__":
            with BatchExecutor(1) as executor:
                print(executor.submit(look).result())
        """,
    )
    assert found == ["(True, 2, True)"]


def test_what_libraries_know_of_the_script_is_of_the_script_that_tasks_see(tmp_path: Path) -> None:
    """Its classes as keys of registries, its functions as methods: the same ones, not copies."""
    found = run_script(
        tmp_path,
        """
        import copyreg, enum, fractions, numbers, pickle, sqlite3
        from cloudexec import BatchExecutor

        class Point:
            def __init__(self, x):
                self.x = x

        class Color(enum.Enum):
            RED = 1

        class Slotted:
            __slots__ = ("x",)

        calls = 0

        def count(self):
            global calls
            calls += 1
            return calls

        fractions.Fraction.count = count
        numbers.Number.register(Point)
        sqlite3.register_adapter(Point, lambda point: point.x)
        sqlite3.register_adapter(Color, lambda color: color.value)
        sqlite3.register_adapter(Slotted, lambda _: 3)
        copyreg.pickle(Point, lambda point: (Point, (point.x + 100,)))
        table = list(range(100_000))

        def look():
            row = sqlite3.connect(":memory:").execute(
                "select ?, ?, ?", (Point(7), Color.RED, Slotted())
            )
            return (
                row.fetchone(),
                isinstance(Point(1), numbers.Number),
                pickle.loads(pickle.dumps(Point(1))).x,
                (fractions.Fraction(1).count(), calls),
                len(globals()["ta" + "ble"]),
            )

        if __name__ == "__main__":
            with BatchExecutor(1) as executor:
                print(executor.submit(look).result())
                Point.extra = 5
                print(executor.submit(look).result()[0], executor.submit(Point(1)).exception())
        """,
    )
    assert found == [
        "((7, 1, 3), True, 101, (1, 1), 100000)",
        "(7, 1, 3) 'Point' object is not callable",
    ]


def test_nothing_of_the_client_is_finished_off_in_a_worker(tmp_path: Path) -> None:
    """Neither files that it removes at its end, nor text that it has not written yet."""
    found = run_script(
        tmp_path,
        """
        import atexit, contextvars, gc, os, tempfile, threading, weakref
        from cloudexec import BatchExecutor

        me = os.getpid()
        log = open("log", "a")
        log.write("once\\n")
        gone = open("gone", "a")

        def note(what):
            if os.getpid() != me:
                with open("gone", "a") as file:
                    file.write(what)

        class Noted:
            def __init__(self, what):
                self.what = what
            def __del__(self, note=note):
                note(self.what)

        directory = tempfile.TemporaryDirectory()
        kept, local, variable = Noted("global"), threading.local(), contextvars.ContextVar("v")
        local.noted = Noted("local")
        variable.set(Noted("context"))
        atexit.register(Noted("atexit").__repr__)
        weakref.finalize(kept, note, "finalizer")
        cycle = [Noted("cycle")]
        cycle.append(cycle)
        del cycle

        def work(n):
            import gc
            return len([gc.collect() for _ in range(3)])

        def main():
            inner = Noted("frame")
            try:
                raise ValueError(Noted("exception"))
            except ValueError:
                with BatchExecutor(2, idle_timeout=60) as executor:
                    print(sum(executor.map(work, range(20))))

        main()
        print(os.path.isdir(directory.name))
        log.close()
        print(open("log").read().split(), open("gone").read())
        """,
    )
    assert found == ["60", "True", "['once'] "]


def test_a_slot_does_at_its_end_what_its_tasks_have_asked_for(tmp_path: Path) -> None:
    """And nothing that the client has asked for."""
    found = run_script(
        tmp_path,
        """
        import atexit, logging, os, sys, weakref
        from cloudexec import BatchExecutor

        logging.basicConfig(filename="of_client", level="INFO")
        me = os.getpid()
        atexit.register(lambda: os.getpid() == me or open("of_worker", "a").write("client's"))

        class Held: pass
        held = []

        def note(what):
            with open("of_worker", "a") as file:
                file.write(what + " ")

        def work(n):
            if n:
                pid = os.fork()
                if not pid:
                    sys.exit(5)
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            held.append(Held())
            held.append(open("unflushed", "w"))
            held[1].write("written")
            weakref.finalize(held[0], note, "finalizer")
            atexit.register(note, "atexit")
            logging.getLogger("mine").info("logged")

        with BatchExecutor(1) as executor:
            print(*executor.map(work, range(2)))
        print(open("of_worker").read(), open("unflushed").read(), open("of_client").read().strip())
        """,
    )
    # The child that a task has forked ends as any program does.
    assert found == ["None 5", "atexit finalizer atexit finalizer  written INFO:mine:logged"]


def test_a_task_has_none_of_the_state_of_the_thread_that_submits(tmp_path: Path) -> None:
    """Its exception, its context, its depth, its signal handlers, its loop: as if it were fresh."""
    found = run_script(
        tmp_path,
        """
        import asyncio, contextvars, inspect, logging, signal, sys, threading
        from cloudexec import BatchExecutor

        variable = contextvars.ContextVar("variable", default=0)
        local = threading.local()

        def look():
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                running = False
            else:
                running = True
            return (
                sys.exc_info()[0],
                [each for each in contextvars.copy_context() if each.name == "variable"],
                signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL,
                signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN,
                running,
                len(inspect.stack()) < 60,
                threading.current_thread() is threading.main_thread(),
                threading.active_count(),
                signal.pthread_sigmask(signal.SIG_BLOCK, ()),
                asyncio.run(asyncio.sleep(0, "slept")),
            )

        def fail():
            raise KeyError("mine")

        async def main(depth):
            if depth:
                return await main(depth - 1)
            loop = asyncio.get_running_loop()
            with BatchExecutor(1) as executor:
                try:
                    raise ValueError("the client's")
                except ValueError:
                    print(await loop.run_in_executor(executor, look))
                    error = await asyncio.wrap_future(executor.submit(try_it))
                    print(error)

        def try_it():
            try:
                fail()
            except KeyError as exc:
                return exc.__context__

        variable.set(1)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGUSR2])
        signal.signal(signal.SIGUSR1, lambda *_: None)
        asyncio.run(main(60))
        """,
    )
    assert found == ["(None, [], True, True, False, True, True, 1, set(), 'slept')", "None"]


def test_a_task_has_no_thread_local_data_of_the_program(tmp_path: Path) -> None:
    """What a library keeps for each thread, such as a connection, is made anew in a worker."""
    found = run_script(
        tmp_path,
        """
        import contextvars, inspect, threading
        from cloudexec import BatchExecutor

        class Prepared(threading.local):
            def __init__(self, value):
                self.value = value

        # Of a module, as what is of the script is sent by value.
        inspect.bare, inspect.prepared = threading.local(), Prepared(1)
        inspect.variable = contextvars.ContextVar("variable")
        inspect.bare.value, inspect.prepared.value = 2, 2
        inspect.variable.set(2)

        def look():
            return vars(inspect.bare), inspect.prepared.value, inspect.variable.get(None)

        with BatchExecutor(1) as executor:
            print(executor.submit(look).result())
        print(inspect.bare.value, inspect.prepared.value, inspect.variable.get())
        """,
    )
    assert found == ["({}, 1, None)", "2 2 2"]


def test_thread_local_data_that_this_thread_cannot_have_do_no_harm(tmp_path: Path) -> None:
    """A library may make an object in a thread of its own, and refuse other threads."""
    found = run_script(
        tmp_path,
        '''
        import inspect, threading
        from cloudexec import BatchExecutor

        library = """
        import threading
        class Strict(threading.local):
            def __init__(self):
                if threading.current_thread() is threading.main_thread():
                    raise RuntimeError("not here")
        def make():
            global strict
            strict = Strict()
        """
        exec(inspect.cleandoc(library), vars(inspect))
        thread = threading.Thread(target=inspect.make)
        thread.start()
        thread.join()

        def look():
            return type(inspect.strict).__name__  # which a fresh interpreter does not have

        with BatchExecutor(1) as executor:
            print(executor.submit(look).result())
        ''',
    )
    assert found == ["Strict"]


def run_task(tmp_path: Path, way: str, text: str) -> str:
    """Call the function ``task`` in a copy of a program or in a fresh worker; return its result."""
    program = f"""
import ctypes, resource, threading
from cloudexec import BatchExecutor
{textwrap.dedent(text)}
go_on = threading.Event()
if {way == "fresh"}:
    threading.Thread(target=go_on.wait).start()
with BatchExecutor(1) as executor:
    print(executor.submit(task).result())
go_on.set()
"""
    return run_script(tmp_path, program)[0]


@pytest.mark.parametrize("way", ["copy", "fresh"])
def test_memory_is_allocated_without_locks(way: str, tmp_path: Path) -> None:
    """In a process with a second thread, or forked from one, glibc's malloc() takes locks."""
    if not hasattr(ctypes.CDLL(None), "__libc_single_threaded"):
        pytest.skip("this C library does not say whether it takes locks")
    text = """
        def task():
            return ctypes.c_char.in_dll(ctypes.CDLL(None), "__libc_single_threaded").value
    """
    assert run_task(tmp_path, way, text) == r"b'\x01'"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep other amounts")
@pytest.mark.parametrize("way", ["copy", "fresh"])
def test_memory_that_a_task_frees_is_used_again(way: str, tmp_path: Path) -> None:
    """Or each array that a calculation makes and drops takes fresh pages of the system."""
    text = """
        def task():
            for turn in range(110):
                if turn == 10:
                    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                some = [bytearray(200_000) for _ in range(8)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    """
    assert int(run_task(tmp_path, way, text)) < 1000  # 18,000 if each turn takes fresh pages


def test_the_other_end_of_what_the_client_closes_sees_that(tmp_path: Path) -> None:
    """Workers hold no copies of its pipes and sockets."""
    found = run_script(
        tmp_path,
        """
        import os, socket
        from cloudexec import BatchExecutor

        one, other = socket.socketpair()
        read, write = os.pipe()
        server = socket.create_server(("127.0.0.1", 0))
        with BatchExecutor(1) as executor:
            executor.submit(len, "").result()
            one.close()
            os.close(write)
            other.settimeout(20)
            print(other.recv(1), os.read(read, 1))
            port = server.getsockname()[1]
            server.close()
            with socket.socket() as again:
                again.bind(("127.0.0.1", port))
            print("bound")
        """,
    )
    assert found == ["b'' b''", "bound"]


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("numpy.taken = ''", "copy"),
        # Some libraries take each name once, and some warn of the second time.
        ("assert not hasattr(numpy, 'taken')\nnumpy.taken = ''", "fresh"),
        (
            "import warnings\nif hasattr(numpy, 'taken'): warnings.warn('!')\nnumpy.taken = 1",
            "fresh",
        ),
        # One that takes long is not tried to its end.
        ("import time\nif hasattr(numpy, 'taken'): time.sleep(60)\nnumpy.taken = 1", "fresh"),
    ],
)
def test_a_module_that_can_be_imported_only_once_has_fresh_workers(
    module: str, kind: str, tmp_path: Path
) -> None:
    """Those do not have what libraries of the client remember of the first time."""
    (tmp_path / "mine.py").write_text(f"import numpy\n{module}\ndef work(n): return n + 1\n")
    found = run_script(
        tmp_path,
        """
        import sys
        import mine, numpy
        from cloudexec import BatchExecutor

        numpy.of_client = True

        def look():
            import numpy
            return "copy" if hasattr(numpy, "of_client") else "fresh"

        if __name__ == "__main__":
            with BatchExecutor(2) as executor:
                print(list(executor.map(mine.work, range(3))))
                print(executor.submit(look).result())
        """,
    )
    assert found == ["[1, 2, 3]", kind]


_REASONS = {
    "it has threads": """
        import threading
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    """,
    "a library that it uses has started threads": """
        import ctypes
        run = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        pause = ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p)
        thread = ctypes.c_ulong()
        ctypes.CDLL(None).pthread_create(ctypes.byref(thread), None, pause, None)
    """,
    "it is being traced": "import sys; sys.settrace(lambda *_: None)",
    "it has chosen 'spawn' (multiprocessing.set_start_method)": """
        import multiprocessing
        multiprocessing.set_start_method("spawn")
    """,
    "it has taken more than 1 GiB of memory": "data = b'x' * (1100 << 20)",
    "it has more than 200 files open": "import os; files = [os.dup(0) for _ in range(200)]",
    "it uses gevent": "import sys, types; sys.modules['gevent'] = types.ModuleType('gevent')",
    "preload= asks for one": "options['preload'] = False",
    "": "",
}


@pytest.mark.parametrize("reason", _REASONS)
def test_it_is_said_why_workers_are_no_copies(reason: str, tmp_path: Path) -> None:
    """And they run tasks all the same."""
    (tmp_path / "kinds.py").write_text(_KIND)
    program = f"""
import kinds
from cloudexec import BatchExecutor
options = {{}}
{textwrap.dedent(_REASONS[reason])}
kinds.watch()
if __name__ == "__main__":
    with BatchExecutor(1, **options) as executor:
        print(executor.submit(len, "abc").result())
    print(*kinds.Kinds.found)
    import os
    os._exit(0) if {bool(reason)} and not __import__("sys").stdout.flush() else None
"""
    (tmp_path / "program.py").write_text(program)
    kind = f"fresh interpreter: {reason}" if reason else "copy of this process"
    assert run_script(tmp_path, program) == ["3", kind]


def test_hashes_of_strings_agree_whenever_a_worker_was_started(tmp_path: Path) -> None:
    """Also of one that takes the place of another, and in the client."""
    found = run_script(
        tmp_path,
        """
        import logging, os
        from cloudexec import BatchExecutor, Local

        logging.disable()

        def look(_=None):
            return hash("a"), os.getppid()

        with BatchExecutor(2, launcher=Local(slots_per_worker=1)) as executor:
            first = {executor.submit(look).result() for _ in range(20)}
            import psutil
            for _, zygote in first:
                psutil.Process(zygote).parent().kill()
            second = {executor.submit(look).result() for _ in range(20)}
            print(not {zygote for _, zygote in first} & {zygote for _, zygote in second})
            print({value for value, _ in first | second} == {hash("a")})
        """,
    )
    assert found == ["True", "True"]


def test_generators_of_random_numbers_differ_from_slot_to_slot(tmp_path: Path) -> None:
    """And from the client's, though all are copies."""
    found = run_script(
        tmp_path,
        """
        import random, time
        import numpy
        from cloudexec import BatchExecutor

        random.seed(1), numpy.random.seed(1)

        def draw(_):
            time.sleep(0.05)
            return random.random(), numpy.random.random()

        with BatchExecutor(3) as executor:
            drawn = list(executor.map(draw, range(9)))
        drawn.append(draw(0))
        print(*(len(set(each)) for each in zip(*drawn)))
        """,
    )
    assert found == ["10 10"]


def _template_of(client: psutil.Process) -> psutil.Process:
    (template,) = client.children()
    return template


_LONG_LIVED = """
import sys
from cloudexec import BatchExecutor, Local

def work(n):
    return n

with BatchExecutor(1, idle_timeout=600, launcher=Local(slots_per_worker=1)) as executor:
    print(executor.submit(work, 1).result(), flush=True)
    for line in sys.stdin:
        print(executor.submit(work, 2).result(), flush=True)
"""


@pytest.fixture
def client(tmp_path: Path) -> Any:
    """A program with one worker that runs a task for each line that it reads."""
    (tmp_path / "program.py").write_text(_LONG_LIVED)
    with subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "1\n"
        yield program
        program.kill()


def test_a_program_that_ignores_the_end_of_its_children_has_copies(tmp_path: Path) -> None:
    """Whether threads of a library outlive a fork is found out without waiting for the child."""
    found = run_script(
        tmp_path,
        """
        import signal
        import numpy
        from cloudexec import BatchExecutor

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        numpy.of_client = True
        numpy.ones((500, 500)) @ numpy.ones((500, 500))  # starts OpenBLAS's threads

        def look():
            return hasattr(numpy, "of_client")

        for _ in range(2):
            with BatchExecutor(1) as executor:
                print(executor.submit(look).result())
        """,
        OPENBLAS_NUM_THREADS="2",
    )
    assert found == ["True", "True"]


def test_ctrl_c_and_the_end_of_children_do_not_end_the_process_that_forks_workers(
    client: Any,
) -> None:
    """A terminal sends Ctrl-C to all processes of a program, but for those of its workers."""
    template = _template_of(psutil.Process(client.pid))
    (supervisor,) = template.children()
    for _ in range(3):
        template.send_signal(signal.SIGINT)
        supervisor.kill()
        client.stdin.write("\n")
        client.stdin.flush()
        assert client.stdout.readline() == "2\n"
        (supervisor,) = (
            each for each in template.children() if each.status() != psutil.STATUS_ZOMBIE
        )
    client.stdin.close()
    assert client.wait(30) == 0


def test_a_client_without_standard_files_has_copies(tmp_path: Path) -> None:
    """Nor do those of the workers get mixed up then."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, numpy\n"
        "from cloudexec import BatchExecutor\n"
        "numpy.of_client = True\n"
        "def look():\n"
        "    print('printed')\n"
        "    os.write(2, b'written')\n"
        "    return hasattr(numpy, 'of_client'), os.readlink('/proc/self/fd/0')\n"
        "with BatchExecutor(1, output='off') as executor:\n"
        "    found = executor.submit(look).result()\n"
        "open('found', 'w').write(repr(found))\n"
    )
    shell = f"exec {sys.executable} program.py <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", shell], cwd=tmp_path, timeout=50)
    assert done.returncode == 0
    assert (tmp_path / "found").read_text() == "(True, '/dev/null')"


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_go_on_without_the_process_that_has_forked_them(
    client: Any, signum: signal.Signals
) -> None:
    """And others are started without it."""
    template = _template_of(psutil.Process(client.pid))
    (supervisor,) = template.children()
    template.send_signal(signum)
    client.stdin.write("\n")
    client.stdin.flush()
    assert client.stdout.readline() == "2\n"
    assert supervisor.is_running()
    if signum == signal.SIGSTOP:
        template.send_signal(signal.SIGCONT)
    supervisor.kill()
    client.stdin.write("\n")
    client.stdin.flush()
    assert client.stdout.readline() == "2\n"
    client.stdin.close()
    assert client.wait(30) == 0


@pytest.mark.parametrize("is_stopped", [False, True])
def test_nothing_is_left_of_a_client_that_is_killed(client: Any, is_stopped: bool) -> None:
    """Not even a process that was stopped."""
    process = psutil.Process(client.pid)
    everything = process.children(recursive=True)
    assert len(everything) == 4  # the template, the supervisor, the zygote, the slot
    if is_stopped:
        _template_of(process).suspend()
    client.kill()
    client.wait()
    _, left = psutil.wait_procs(everything, timeout=30)
    assert [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == []


def test_nothing_is_left_of_an_executor_that_has_ended(tmp_path: Path) -> None:
    """Neither a process nor a file, and the next one can be a copy again."""
    found = run_script(
        tmp_path,
        """
        import os
        import psutil
        import numpy
        from cloudexec import BatchExecutor

        numpy.of_client = True

        def look():
            return hasattr(numpy, "of_client")

        me = psutil.Process()
        for n in range(2):
            with BatchExecutor(1) as executor:
                print(executor.submit(look).result(), end=" ")
        while me.num_threads() > 1:
            pass  # the thread of the last executor is about to end
        files = me.num_fds()
        for n in range(3):
            with BatchExecutor(1) as executor:
                print(executor.submit(look).result(), end=" ")
        while me.num_threads() > 1:
            pass
        print(me.children(recursive=True), me.num_fds() - files, me.num_threads())
        """,
    )
    assert found == ["True True True True True [] 0 1"]
