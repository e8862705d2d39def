"""What a script has set in the standard library, numpy and pandas holds in its tasks."""

from __future__ import annotations

import csv
import decimal
import json
import locale
import logging
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import pytest

from cloudexec import _settings

RUN = """

def observe_in_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(observe()))
    thread.start()
    thread.join()
    return found[0]


def pools():
    for kind in ("fork", "spawn"):
        context = multiprocessing.get_context(kind)
        yield kind, concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
    from cloudexec import BatchExecutor
    yield "cloudexec", BatchExecutor(1, forward_logs=False)


if __name__ == "__main__":
    found = {"client": [observe(), observe_in_thread()]}
    for kind, pool in pools():
        with pool:
            found[kind] = [pool.submit(each).result() for each in (observe, observe_in_thread)]
    print(json.dumps(found))
"""

LIBRARY = """
import concurrent.futures, csv, decimal, gc, json, locale, logging, multiprocessing, os, resource
import socket, sys, threading, warnings

class OwnWarning(UserWarning):
    pass

decimal.getcontext().prec = 50
decimal.getcontext().rounding = decimal.ROUND_DOWN
decimal.getcontext().traps[decimal.Inexact] = True
decimal.getcontext().traps[decimal.DivisionByZero] = False
decimal.setcontext(decimal.getcontext())
decimal.DefaultContext.prec = 40
warnings.simplefilter("error", UserWarning)
warnings.filterwarnings("ignore", message="old", category=FutureWarning)
warnings.simplefilter("ignore", OwnWarning)
logging.addLevelName(25, "NOTICE")
logging.basicConfig(level=logging.INFO, format="%(levelname)s!%(message)s", stream=sys.stdout)
logging.getLogger("a.b").setLevel(logging.DEBUG)
logging.getLogger("quiet").propagate = False
logging.getLogger("off").disabled = True
logging.disable(logging.DEBUG - 1)
logging.captureWarnings(True)
sys.setrecursionlimit(5000)
sys.setswitchinterval(0.05)
sys.set_int_max_str_digits(7000)
sys.tracebacklimit = 17
threading.stack_size(512 * 1024)
gc.set_threshold(50000, 20, 20)
gc.disable()
socket.setdefaulttimeout(12.5)
locale.setlocale(locale.LC_NUMERIC, "C.UTF-8")
csv.field_size_limit(1000000)
csv.register_dialect("mine", delimiter=";", quoting=csv.QUOTE_ALL)
os.umask(0o077)
os.environ["CLOUDEXEC_TEST_SETTING"] = "1"
resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def warned(kind, text):
    try:
        warnings.warn(text, kind, stacklevel=1)
    except Warning:
        return "raised"
    return "passed"


def observe():
    os.umask(umask := os.umask(0))
    threading.stack_size(stack_size := threading.stack_size())
    context = decimal.getcontext()
    traps = sorted(str(signal) for signal, is_on in context.traps.items() if is_on)
    kinds = (UserWarning, "odd"), (FutureWarning, "old"), (OwnWarning, "own")
    loggers = [logging.getLogger(name) for name in ("", "a.b", "a.b.c", "x")]
    return {
        "decimal": [context.prec, context.rounding, traps],
        "new contexts": decimal.DefaultContext.prec,
        "warnings": [warned(*each) for each in kinds],
        "options": sys.warnoptions,
        "levels": [logger.getEffectiveLevel() for logger in loggers],
        "loggers": [logging.getLogger("quiet").propagate, logging.getLogger("off").disabled],
        "names": logging.getLevelName(25),
        "disabled": logging.root.manager.disable,
        "captured": logging._warnings_showwarning is not None,
        "handlers": [type(handler).__name__ for handler in logging.root.handlers],
        "formats": [handler.formatter._fmt for handler in logging.root.handlers],
        "recursion": sys.getrecursionlimit(),
        "switch": sys.getswitchinterval(),
        "digits": sys.get_int_max_str_digits(),
        "tracebacks": sys.tracebacklimit,
        "stack": stack_size,
        "gc": [gc.isenabled(), gc.get_threshold()],
        "socket": socket.getdefaulttimeout(),
        "locale": locale.setlocale(locale.LC_NUMERIC),
        "csv": [csv.field_size_limit(), csv.get_dialect("mine").delimiter],
        "umask": umask,
        "environ": os.environ.get("CLOUDEXEC_TEST_SETTING"),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
"""

NUMPY = """
import concurrent.futures, json, multiprocessing, sys, threading
import numpy as np

def shout(kind, flag):
    pass

np.seterr(divide="raise", over="ignore", invalid="call")
np.seterrcall(shout)
np.set_printoptions(precision=2, suppress=True, linewidth=60)
try:
    import pandas as pd
except ImportError:
    pd = None
else:
    pd.options.display.max_rows = 7
    pd.set_option("display.float_format", "{:.1f}".format)


def observe():
    return {
        "numpy errors": np.geterr(),
        "called": getattr(np.geterrcall(), "__name__", None),
        "numpy printing": str(np.array([1.23456, 1e-9])),
        "pandas": pd and [pd.get_option("display.max_rows"), str(pd.Series([1.25]))],
    }
"""


def run(directory: Path, program: str) -> Any:
    """Return what the program sees in itself and in a task of each kind of pool, in two threads."""
    script = directory / "script.py"
    script.write_text(program + RUN)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=50, cwd=directory
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_settings_of_the_standard_library_hold_in_tasks(tmp_path: Path) -> None:
    found = run(tmp_path, LIBRARY)
    assert found["client"][0]["decimal"][0] == 50
    assert found["client"][1]["decimal"][0] == 40, "in a new thread"
    assert found["fork"] == found["spawn"] == found["client"]
    assert found["cloudexec"] == found["client"]


def test_settings_of_numpy_and_pandas_hold_in_tasks(tmp_path: Path) -> None:
    found = run(tmp_path, NUMPY)
    assert found["client"][0]["numpy errors"]["divide"] == "raise"
    assert found["fork"][0] == found["spawn"][0] == found["client"][0]
    assert found["cloudexec"] == found["client"]


def in_new_process(data: bytes, program: str) -> list[str]:
    """Apply settings in a new process and run a program in it."""
    program = f"import sys; from cloudexec import _settings; _settings.apply({data!r})\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert not done.stderr
    return done.stdout.splitlines()


def test_process_that_has_set_nothing_carries_nothing_over() -> None:
    program = (
        "import csv, decimal, locale, socket, sys, tempfile, cloudexec; tempfile.gettempdir()\n"
        "sys.setswitchinterval(0.005)\n"  # --restless has set another one
        "from cloudexec import _settings; print(_settings.collect())"
    )
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "b''\n"


def test_nothing_is_imported_for_it() -> None:
    program = (
        "import sys, cloudexec._settings as settings; before = set(sys.modules);"
        "settings.collect(); print(set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "set()\n"


def test_numpy_is_set_once_it_is_imported() -> None:
    with numpy.errstate(over="raise"), numpy.printoptions(precision=3):
        data = _settings.collect()
    program = (
        "print('numpy' in sys.modules, len([each for each in sys.meta_path"
        " if type(each).__module__ == 'cloudexec._settings']))\n"
        "import numpy as np\n"
        "print(np.geterr()['over'], np.array([1.23456]), 'exec_module' in vars(np.__spec__.loader))"
    )
    assert in_new_process(data, program) == ["False 1", "raise [1.235] False"]
    program = program.replace("print('numpy'", "import numpy.linalg; print('numpy'")
    program = f"import numpy\n{program}"
    assert in_new_process(data, program)[1] == "raise [1.235] False"


def test_module_that_is_not_there_is_not_missed() -> None:
    with numpy.errstate(over="raise"):
        data = _settings.collect()
    program = (
        "sys.path[:] = [path for path in sys.path if not path.endswith('site-packages')]\n"
        "try: import numpy\n"
        "except ModuleNotFoundError as exc: print(exc.name)\n"
        "import statistics; print(statistics.__name__)"
    )
    assert in_new_process(data, program) == ["numpy", "statistics"]


def test_filter_waits_for_the_module_of_its_warning() -> None:
    client = (
        "import sys, warnings, numpy; from cloudexec import _settings\n"
        "warnings.simplefilter('error', UserWarning)\n"
        "warnings.simplefilter('ignore', numpy.exceptions.RankWarning)\n"
        "warnings.simplefilter('error', SyntaxWarning)\n"
        "sys.stdout.buffer.write(_settings.collect())"
    )
    command = [sys.executable, "-c", client]
    data = subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
    program = (
        "import warnings\n"
        "def kinds(): return [each[2].__name__ for each in warnings.filters[:3]]\n"
        "print(kinds()[:2], 'numpy' in sys.modules)\n"
        "import numpy; print(kinds())\n"
        "warnings.warn('', numpy.exceptions.RankWarning); print('ignored')"
    )
    assert in_new_process(data, program) == [
        "['SyntaxWarning', 'UserWarning'] False",
        "['SyntaxWarning', 'RankWarning', 'UserWarning']",
        "ignored",
    ]


def test_what_cannot_be_carried_over_is_skipped_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "cloudexec")
    with numpy.errstate(all="raise"):
        numpy.seterrcall((_ for _ in ()).send)  # a generator's
        try:
            found = dict(pickle.loads(_settings.collect()))
        finally:
            numpy.seterrcall(None)
    assert "numpy errors" not in found
    assert "'numpy errors' is not carried over" in caplog.text
    caplog.clear()
    unknown = {"LC_NUMERIC": "xx_XX.UTF-8"}
    _settings.apply(pickle.dumps([("locale", pickle.dumps(unknown)), ("csv", b"no pickle")]))
    assert locale.setlocale(locale.LC_NUMERIC) != "xx_XX.UTF-8"
    assert "LC_NUMERIC=xx_XX.UTF-8 is not carried over" in caplog.text
    assert "'csv' is not carried over" in caplog.text


def test_settings_that_cannot_be_carried_over_do_not_hinder_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "cloudexec")
    limit = csv.field_size_limit(99)
    try:
        found = dict(pickle.loads(_settings.collect()))
        assert pickle.loads(found["csv"]) == (99, {})
    finally:
        csv.field_size_limit(limit)
    with decimal.localcontext(prec=9):
        context = pickle.loads(dict(pickle.loads(_settings.collect()))["decimal"])
    assert [each["prec"] for each in context] == [28, 9]
    assert socket.getdefaulttimeout() is None
    assert "socket" not in found


def test_handlers_of_files_append(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    handler = logging.FileHandler(path, mode="w")
    handler.setFormatter(logging.Formatter("%(name)s:%(message)s"))
    logger = logging.getLogger("tests.settings")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        logger.info("here")
        data = _settings.collect()
        program = "import logging; logging.getLogger('tests.settings.x').info('there')"
        in_new_process(data, program)
        assert path.read_text() == "tests.settings:here\ntests.settings.x:there\n"
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        handler.close()


def test_directory_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = _settings.collect()
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert in_new_process(data, "import tempfile; print(tempfile.gettempdir())") == [str(tmp_path)]
