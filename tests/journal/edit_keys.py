"""Prints the key by which a journal knows the call of each of many programs.

The arguments are a folder that has one folder for each program, and the names of the programs to
run. Each program runs as a script in a process that is forked from this one. The keys are printed
as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from cloudexec._config import TaskOptions
from cloudexec._functions import FunctionTable
from cloudexec._future import BatchFuture
from cloudexec._journal.journal import Journal
from cloudexec._journal.program import Program
from cloudexec._journal.sqlite import SqliteStore
from cloudexec._objects.options import ObjectOptions
from cloudexec._objects.store import BlobStore


def key_of(folder: Path) -> str:
    """Run a program's script and return the key of its call."""
    os.chdir(folder)
    script = types.ModuleType("__main__")
    script.__file__ = str(folder / "script.py")
    sys.modules["__main__"] = script
    sys.path.insert(0, str(folder))
    text = (folder / "script.py").read_bytes()
    exec(compile(text, script.__file__, "exec", dont_inherit=True), script.__dict__)
    values: Any = script.__dict__
    fn, args, kwargs = values["call"]
    options = TaskOptions(**values.get("options", {}))
    blobs = BlobStore(ObjectOptions().limits(), shared=False)
    function, _, payload = FunctionTable(lambda number: None, blobs).call(fn, args, kwargs)
    if function is not None and not function.pickle:
        function = None  # the callable is pickled with the arguments
    store = SqliteStore(folder / "journal")
    nobody: Any = None
    journal = Journal(store, Program(), nobody, nobody, nobody)
    journal.set_up(values.get("initializer"), is_watching=True)
    identity = journal.identify(fn, function, options)
    assert identity is not None
    future: BatchFuture[Any] = BatchFuture(nobody)
    pickled = None if function is None else payload
    assert not journal.resume(future, identity, args, kwargs, pickled, options)
    key: str = future._journaled.key.hex()
    return key


def main(root: Path, which: str) -> None:
    Program()  # computes what never changes, once for all programs
    keys = {}
    for folder in sorted(root.glob(which)):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(write, key_of(folder).encode())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            keys[folder.name] = answer.read()
        os.waitpid(child, 0)
    print(json.dumps(keys))


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main(Path(sys.argv[1]), sys.argv[2])
