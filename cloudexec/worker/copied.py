"""Starts workers on the client's machine as copies of the client, which saves importing modules.

While the client has a single thread, it forks one process, the template. The template does nothing
but fork a worker when the client asks for one. Such a worker shares the memory of the modules that
the client has imported. Otherwise it behaves like a fresh interpreter:

- The client's objects are kept alive and never used. Deleting them would run finalizers, which
  would for instance remove the client's temporary files.
- Sockets, pipes and terminals are replaced by the null device, so that their other ends notice when
  the client closes them.
- The script is there as it was at the fork, and what is sent of it takes the place of what it has.
  Its classes stay the same objects, because libraries may know them: as keys of a table of
  adapters, for instance. So may they know functions, which go on using the script's globals.
- The user's own modules are imported anew by the slots that need them, as on other machines. This
  is tried first, because some modules register themselves with a library that accepts each name
  only once. If it fails, the zygote starts over as a fresh interpreter.
"""

from __future__ import annotations

import atexit
import contextvars
import gc
import os
import select
import signal
import socket
import stat
import struct
import sys
import threading
import warnings
import weakref
from collections.abc import Mapping
from types import FrameType, FunctionType, ModuleType
from typing import Any, NoReturn

from cloudexec import _plain_json

__all__ = ["BEGUN", "ENDED", "MESSAGE", "serve_template"]

MESSAGE = struct.Struct("<Bii")
"""A message of the template: its kind, a process id and a wait status."""
BEGUN, ENDED = 1, 2
_REQUEST_BYTES = 1 << 20
_MOST_FRAMES = 40
"""Frames of the client's program that may stay beneath those of tasks."""

_STATELESS = {
    "cloudexec._config",
    "cloudexec._errors",
    "cloudexec._proto",
    "cloudexec._proto.tasks_pb2",
}
"""Modules of this package that hold no state, and are kept because importing them takes time."""
_kept: list[object] = []
"""Objects of the client, which are kept alive."""


def serve_template(connection: socket.socket, clients: socket.socket, client_pid: int) -> NoReturn:
    """Run as the template, in a process that was just forked, until the client is gone.

    Args:
        connection: The socket to the client.
        clients: The client's end of that socket, which is closed here.
        client_pid: The client's process id.
    """
    try:
        gc.disable()
        from cloudexec.worker.zygote import end_with_parent

        end_with_parent(client_pid, signal.SIGKILL)
        clients.close()
        _replace_files({connection.fileno()})
        _reset_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C must reach the client only
        wake_ups = _wake_up_files()
        is_clean = _forget_thread()
        gc.freeze()
        if is_clean:
            contextvars.Context().run(_serve, connection, *wake_ups)
        # A process that is forked from a new thread has that thread only. So it has no frames of
        # the client's program, no exception that is being handled, and no thread-local data. But
        # once there was a second thread, glibc's malloc() takes locks, also in all processes that
        # are forked from this one: tasks that allocate much memory take up to a fifth longer.
        thread = threading.Thread(target=_serve, args=(connection, *wake_ups), name="MainThread")
        thread.start()
        thread.join()
    finally:
        os._exit(1)


def _forget_thread() -> bool:
    """Forget what the client's program has left in this thread. All of it is kept alive.

    Returns:
        Whether nothing is left that tasks could notice, but a few frames of the client's program.
    """
    _kept.extend((contextvars.copy_context(), sys.exc_info()))
    if not _forget_thread_locals() or sys.exc_info()[0] is not None:
        return False
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        if depth == _MOST_FRAMES or _is_of_asyncio(frame):
            return False
        frame, depth = frame.f_back, depth + 1
    return True


def _is_of_asyncio(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__")
    return isinstance(name, str) and name.partition(".")[0] == "asyncio"


def _forget_thread_locals() -> bool:
    """Remove thread-local data from this thread. Return whether all of it is gone."""
    if sys.version_info < (3, 13):
        import ctypes

        get_dict = ctypes.pythonapi.PyThreadState_GetDict
        get_dict.restype = ctypes.py_object
        found = get_dict()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(found))  # the thread owns this reference
        _kept.append(dict(found))
        found.clear()
        return True
    # On other implementations, thread-local data is found only through the objects that hold it.
    is_gone = True
    for each in gc.get_objects():
        if issubclass(type(each), threading.local):
            # Python calls this method for each further thread, with arguments that are not known.
            is_gone = is_gone and type(each).__init__ is object.__init__
            try:
                _kept.append(dict(each.__dict__))
                each.__dict__.clear()
            except Exception:  # that method raises it, as this thread had not used the object yet
                continue
    return is_gone


def _serve(connection: socket.socket, wake_read: int, wake_write: int) -> None:
    try:
        while True:
            sources: list[Any] = [connection, wake_read]
            ready = select.select(sources, [], [])[0]
            if wake_read in ready:
                os.read(wake_read, 4096)
                _tell_ends(connection)
            if connection in ready:
                data, files, _, _ = socket.recv_fds(connection, _REQUEST_BYTES, 2)
                if not data:
                    break
                told = _plain_json.decode(data)
                with warnings.catch_warnings():
                    # Python warns of forking with threads; this process was made for it, see above.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    pid = os.fork()
                if not pid:
                    connection.close()
                    for fd in (wake_read, wake_write):
                        os.close(fd)
                    _become_worker(told, *files)
                for fd in files:
                    os.close(fd)
                connection.send(MESSAGE.pack(BEGUN, pid, 0))
    except OSError:
        pass  # the client is gone
    finally:
        os._exit(0)


def _wake_up_files() -> tuple[int, int]:
    files = os.pipe()
    for fd in files:
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(files[1], warn_on_full_buffer=False)
    return files


def _tell_ends(connection: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        connection.send(MESSAGE.pack(ENDED, pid, status))


def _become_worker(told: Mapping[str, Any], stdin: int, stderr: int) -> NoReturn:
    """Continue as a worker that was started as a fresh interpreter."""
    try:
        os.setsid()  # Ctrl-C in the terminal must reach the client only
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open(os.devnull, os.O_RDWR)
        for fd, number in ((stdin, 0), (null, 1), (stderr, 2)):
            os.dup2(fd, number)
        for fd in (stdin, null, stderr):
            if fd > 2:
                os.close(fd)
        try:
            os.chdir(told["cwd"])
        except OSError:
            pass  # the directory is gone: the process stays in the client's former directory
        os.environ.clear()
        os.environ.update(told["environ"])
        own_modules = _forget_client()
        gc.enable()
        from cloudexec.worker.__main__ import main

        main({**told["bootstrap"], "own_modules": own_modules})
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def _replace_files(but: set[int]) -> None:
    """Replace open sockets, pipes and terminals, whose other ends wait for them to be closed."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    while null <= 2:  # the client has closed some standard streams; do not take their numbers
        null = os.dup(null)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd in but or fd == null:
            continue
        try:
            mode = os.fstat(fd).st_mode
            # Regular files stay open, because libraries go on reading those that they have open.
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                os.dup2(null, fd, os.get_inheritable(fd))
        except OSError:
            continue  # the descriptor belonged to the listing itself
    os.close(null)


def _reset_signals() -> None:
    """Set the signal handlers that a fresh interpreter has."""
    signal.set_wakeup_fd(-1)
    for signum in signal.valid_signals():
        if callable(signal.getsignal(signum)):
            signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, lambda *_: None)


def _forget_client() -> list[str]:
    """Remove from this copy of the client all but the installed modules that it has imported.

    Returns:
        The names of the user's own modules, which were removed.
    """
    own = _forget_modules()
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        errors = "backslashreplace" if fd == 2 else None
        file = os.fdopen(fd, "w" if fd else "r", 1, errors=errors, closefd=False)
        for attribute in (name, f"__{name}__"):
            _kept.append(getattr(sys, attribute))
            setattr(sys, attribute, file)
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    _forget_ends()
    _forget_logging()
    _forget_multiprocessing()
    _forget_loop()
    return own


def _forget_modules() -> list[str]:
    from cloudexec._modules import own_modules

    own = own_modules()
    for name in list(sys.modules):
        is_ours = name.partition(".")[0] == "cloudexec" and name not in _STATELESS
        if name in own or is_ours or name == "__mp_main__":
            _kept.append(sys.modules.pop(name))
    former = sys.modules["__main__"]
    _kept.append(former)
    main: Any = ModuleType("__main__")
    if type(former) is ModuleType:
        _forget_what_is_imported(former, own)
        main.__former__ = former  # for main_module.py
    sys.modules["__main__"] = main
    sys.meta_path[:] = [
        each for each in sys.meta_path if not type(each).__module__.startswith("cloudexec")
    ]
    return own


def _forget_what_is_imported(former: ModuleType, own: list[str]) -> None:
    """Remove from the script what belongs to modules that are imported anew."""
    gone = {*own, "__mp_main__"}
    space = vars(former)
    for name, value in list(space.items()):
        at = value.__name__ if issubclass(type(value), ModuleType) else _module_of(value)
        if at in gone or at.partition(".")[0] == "cloudexec":
            _kept.append(space.pop(name))


def _module_of(value: object) -> str:
    named = value if issubclass(type(value), (FunctionType, type)) else type(value)
    module = named.__module__
    return module if isinstance(module, str) else ""


def _forget_loop() -> None:
    events: Any = sys.modules.get("asyncio.events")
    if events is None:
        return
    events._set_running_loop(None)
    policy = getattr(events, "_event_loop_policy", None)
    if policy is not None:
        _kept.append(policy)
        events._event_loop_policy = type(policy)() if _is_standard(policy) else None


def _is_standard(policy: object) -> bool:
    return type(policy).__module__.partition(".")[0] == "asyncio"


def _forget_ends() -> None:
    """Forget the functions that the client runs when it exits."""
    from cloudexec._forked import forget_exit_functions  # the module as imported by this process

    ends: Any = threading
    _kept.append(list(ends._threading_atexits))
    ends._threading_atexits.clear()
    forget_exit_functions()
    finalizers: Any = weakref.finalize
    _kept.append(dict(finalizers._registry))
    finalizers._registry.clear()
    finalizers._registered_with_atexit = False


def _forget_logging() -> None:
    logging: Any = sys.modules.get("logging")
    if logging is None:
        return
    atexit.register(logging.shutdown)
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            _kept.append(logger.handlers)
            logger.handlers = []
    _kept.extend((list(logging._handlerList), dict(logging._handlers)))
    logging._handlerList.clear()
    logging._handlers.clear()


def _forget_multiprocessing() -> None:
    modules: Mapping[str, Any] = sys.modules
    util = modules.get("multiprocessing.util")
    if util is not None:
        _kept.append(dict(util._finalizer_registry))
        util._finalizer_registry.clear()
        atexit.register(util._exit_function)
    tracker = modules.get("multiprocessing.resource_tracker")
    if tracker is not None:
        _kept.append(tracker._resource_tracker)
        tracker._resource_tracker.__dict__.update(type(tracker._resource_tracker)().__dict__)
    server = modules.get("multiprocessing.forkserver")
    if server is not None:
        server._forkserver.__dict__.update(type(server._forkserver)().__dict__)
