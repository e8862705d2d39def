"""Programs with the word VALUE where a test edits them; the journal must notice each kind of edit.

A program consists of ``script.py``, whose name ``call`` has the call, and of files next to it.
"""

from __future__ import annotations

Files = dict[str, str]


def _files(more: Files) -> Files:
    """Return files by path; ``pkg__sub`` is a package's module, ``pkg____init__`` the package."""
    files = {}
    for name, content in more.items():
        package = name.removesuffix("____init__")
        end = ".py" if package == name else "/__init__.py"
        files[package.replace("__", "/") + end] = content
    return files


def by_module(text: str, **more: str) -> Files:
    """Return a program that calls a function ``f`` of an imported module."""
    script = "import mine\ncall = mine.f, (), {}\n"
    return {"script.py": script, "mine.py": text, **_files(more)}


def by_script(text: str, **more: str) -> Files:
    """Return a program that calls a function ``f`` of the script."""
    return {"script.py": f"{text}\ncall = f, (), {{}}\n", **_files(more)}


BODIES = {
    "constant": "def f(): return VALUE",
    "operator": "def f(): return 1 + 1 if VALUE == 1 else 1 - 1",
    "name of an attribute": "class A: x1 = x2 = 0\ndef f(): return A.xVALUE",
    "docstring": "def f():\n    'VALUE'\n    return f.__doc__",
    "default": "def f(n=VALUE): return n",
    "default in a list": "def f(n=[VALUE]): return n[0]",
    "default in a dict": "def f(n={'a': VALUE}): return n['a']",
    "default that is an object": "class A: n = VALUE\ndef f(a=A()): return a.n",
    "keyword default": "def f(*, n=[VALUE]): return n",
    "default that is a function": "def g(): return VALUE\ndef f(g=g): return g()",
    "default in a lambda": "f = lambda n=VALUE: n",
    "global": "N = VALUE\ndef f(): return N",
    "global list": "N = [VALUE]\ndef f(): return N",
    "global dict": "N = {'lr': VALUE}\ndef f(): return N['lr']",
    "global set": "N = {VALUE, 'x'}\ndef f(): return N",
    "global object": "class A:\n    def __init__(s): s.n = VALUE\na = A()\ndef f(): return a.n",
    "global by globals()": "N = VALUE\ndef f(): return globals()['N']",
    "global under a condition": "if True: N = VALUE\nelse: N = 0\ndef f(): return N",
    "global set in a loop": "for N in range(VALUE): pass\ndef f(): return N",
    "global by update": "globals().update(N=VALUE)\ndef f(): return N",
    "global by del": "N = M = 1\nif VALUE == 2: del N\ndef f(): return 'N' in globals()",
    "two globals exchanged": "a, b = (1, 2)[::3 - 2 * VALUE]\ndef f(): return a",
    "global from another": "M = VALUE\nN = M + 1\ndef f(): return N",
    "alias": "def g1(): return 1\ndef g2(): return 2\ng = gVALUE\ndef f(): return g()",
    "lambda": "g = lambda: VALUE\ndef f(): return g()",
    "lambda in a list": "gs = [lambda: 0, lambda: VALUE]\ndef f(): return gs[1]()",
    "lambda in a dict": "gs = {'a': lambda: VALUE}\ndef f(): return gs['a']()",
    "one of two lambdas": "g = (lambda: 1, lambda: 2)[VALUE - 1]\ndef f(): return g()",
    "closure": "def make(n):\n    def f(): return n\n    return f\nf = make(VALUE)",
    "closure in a list": "def make(n):\n    def f(): return n\n    return f\nf = make([VALUE])",
    "nested function": "def f():\n    def g(): return VALUE\n    return g()",
    "nested class": "def f():\n    class A: n = VALUE\n    return A.n",
    "comprehension": "def f(): return [x * VALUE for x in range(3)]",
    "generator": "def g(): yield VALUE\ndef f(): return list(g())",
    "async function": "import asyncio\nasync def g(): return VALUE\n"
    "def f(): return asyncio.run(g())",
    "f-string": "def f(): return f'{1.5:.VALUEf}'",
    "match": "def f():\n    match 1:\n        case VALUE: return 1\n    return 0",
    "walrus": "def f(): return (n := VALUE) + n",
    "try": "def f():\n    try: return 1 // (VALUE - 1)\n    except ZeroDivisionError: return 0",
    "assert": "def f():\n    assert VALUE == 1\n    return 0",
    "slice": "def f(): return 'abcdef'[VALUE:]",
    "frozenset constant": "def f(x=1): return x in {VALUE, 5}",
    "large constant": "def f(): return 0x" + "f" * 2000 + "VALUE",
    "negative zero": "def f(): return (0.0, -0.0)[VALUE - 1]",
    "bytes": "def f(): return b'VALUE'",
    "string in two parts": "def f(): return 'a' 'VALUE'",
    "annotation that is read": "def f(n: 'VALUE' = 1): return f.__annotations__",
    "annotation of a class": "class A: n: 'VALUE'\ndef f(): return A.__annotations__",
    "function attribute": "def f(): return f.n\nf.n = VALUE",
    "attribute of a helper": "def g(): return g.n\ng.n = VALUE\ndef f(): return g()",
    "attribute of a class": "class A: n = VALUE\ndef f(): return A.n",
    "attribute of a class, set later": "class A: n = 0\nA.n = VALUE\ndef f(): return A.n",
    "attribute by setattr": "class A: n = 0\nsetattr(A, 'n', VALUE)\ndef f(): return A.n",
    "table in a class": "class A: t = {'a': [VALUE]}\ndef f(): return A.t",
    "inherited": "class B: n = VALUE\nclass A(B): pass\ndef f(): return A.n",
    "inherited by mixin": "class M:\n    def g(s): return VALUE\nclass B: pass\n"
    "class A(B, M): pass\ndef f(): return A().g()",
    "method": "class A:\n    def g(s): return VALUE\ndef f(): return A().g()",
    "method patched in": "class A: pass\ndef g(s): return VALUE\nA.g = g\ndef f(): return A().g()",
    "static method": "class A:\n    @staticmethod\n    def g(): return VALUE\n"
    "def f(): return A.g()",
    "class method": "class A:\n    @classmethod\n    def g(c): return VALUE\ndef f(): return A.g()",
    "property": "class A:\n    @property\n    def n(s): return VALUE\ndef f(): return A().n",
    "descriptor": "class D:\n    def __get__(s, o, t): return VALUE\nclass A: n = D()\n"
    "def f(): return A.n",
    "descriptor with a state": "class D:\n    def __init__(s, n): s.n = n\n"
    "    def __get__(s, o, t): return s.n\nclass A: n = D(VALUE)\ndef f(): return A.n",
    "__set_name__": "class D:\n    def __set_name__(s, o, n): o.n = VALUE\nclass A: d = D()\n"
    "def f(): return A.n",
    "__init_subclass__": "class B:\n    def __init_subclass__(c, n=0): c.n = n\n"
    "class A(B, n=VALUE): pass\ndef f(): return A.n",
    "__getattr__": "class A:\n    def __getattr__(s, n): return VALUE\ndef f(): return A().n",
    "__call__": "class A:\n    def __call__(s): return VALUE\ng = A()\ndef f(): return g()",
    "metaclass": "class M(type):\n    def g(c): return VALUE\nclass A(metaclass=M): pass\n"
    "def f(): return A.g()",
    "metaclass that makes attributes": "class M(type):\n    def __new__(m, n, b, d):\n"
    "        return type.__new__(m, n, b, {**d, 'n': VALUE})\nclass A(metaclass=M): pass\n"
    "def f(): return A.n",
    "class by type()": "A = type('A', (), {'n': VALUE})\ndef f(): return A.n",
    "slots": "class A: __slots__ = ('n', 'mVALUE')\ndef f(): return A.__slots__",
    "enum": "import enum\nclass E(enum.Enum): A = VALUE\ndef f(): return E.A.value",
    "int enum": "import enum\nclass E(enum.IntEnum):\n    A = VALUE\ndef f(): return E.A + 0",
    "enum's method": "import enum\nclass E(enum.Enum):\n    A = 1\n    def g(s): return VALUE\n"
    "def f(): return E.A.g()",
    "flag": "import enum\nclass E(enum.Flag):\n    A = enum.auto()\n    B = VALUE * 4\n"
    "def f(): return E.B.value",
    "dataclass default": "import dataclasses\n@dataclasses.dataclass\nclass A: n: int = VALUE\n"
    "def f(): return A().n",
    "dataclass factory": "import dataclasses\n@dataclasses.dataclass\nclass A:\n"
    "    n: list = dataclasses.field(default_factory=lambda: [VALUE])\ndef f(): return A().n",
    "dataclass option": "import dataclasses\n@dataclasses.dataclass(eq=VALUE == 1)\n"
    "class A: n: int\n"
    "def f(): return A(1) == A(1)",
    "named tuple": "import typing\nclass A(typing.NamedTuple): n: int = VALUE\n"
    "def f(): return A().n",
    "abstract class": "import abc\nclass B(abc.ABC):\n    @abc.abstractmethod\n    def g(s): ...\n"
    "class A(B):\n    def g(s): return VALUE\ndef f(): return A().g()",
    "protocol": "import typing\n@typing.runtime_checkable\nclass P(typing.Protocol): nVALUE: int\n"
    "class A: n1 = 1\ndef f(): return isinstance(A(), P)",
    "generic": "import typing\nT = typing.TypeVar('T')\nclass A(typing.Generic[T]): n = VALUE\n"
    "def f(): return A[int].n",
    "exception class": "class E(Exception): n = VALUE\ndef f():\n    try: raise E\n"
    "    except E as exc: return exc.n",
    "decorator": "def d(g): return lambda: g() + VALUE\n@d\ndef f(): return 0",
    "decorator's argument": "def d(n): return lambda g: lambda: g() + n\n@d(VALUE)\n"
    "def f(): return 0",
    "decorator that wraps": "import functools\ndef d(g):\n    @functools.wraps(g)\n"
    "    def h(): return g() + VALUE\n    return h\n@d\ndef f(): return 0",
    "wrapped function": "import functools\ndef d(g):\n    @functools.wraps(g)\n"
    "    def h(): return g()\n    return h\n@d\ndef f(): return VALUE",
    "decorator that is an object": "class D:\n    def __init__(s, n): s.n = n\n"
    "    def __call__(s, g): return lambda: g() + s.n\n@D(VALUE)\ndef f(): return 0",
    "function within an object": "import functools\nclass D:\n    def __init__(s, g):\n"
    "        s.n = VALUE; functools.update_wrapper(s, g)\n    def __call__(s): return s.n\n"
    "def g(): return 0\nf = D(g)",
    "partial": "import functools\ndef g(n): return n\nf = functools.partial(g, VALUE)",
    "partial within": "import functools\ndef g(n): return n\nh = functools.partial(g, n=VALUE)\n"
    "def f(): return h()",
    "bound method": "class A:\n    def __init__(s): s.n = VALUE\n    def g(s): return s.n\n"
    "f = A().g",
    "bound method of C": "f = ['a', 'b', 'c'].__getitem__ if VALUE == 1 else ['a'].__getitem__",
    "operator's getter": "import operator\nf = operator.itemgetter(VALUE)",
    "registry": "R = {}\ndef reg(g): R['g'] = g\n@reg\ndef g(): return VALUE\n"
    "def f(): return R['g']()",
    "context manager": "import contextlib\n@contextlib.contextmanager\ndef g(): yield VALUE\n"
    "def f():\n    with g() as n: return n",
    "eval": "def f(): return eval('VALUE')",
    "exec": "exec('def g(): return VALUE')\ndef f(): return g()",
    "code object": "c = compile('VALUE', 'x', 'eval')\ndef f(): return eval(c)",
    "regular expression": "import re\nR = re.compile('VALUE')\ndef f(): return bool(R.match('1'))",
    "name of a function": "def gVALUE(): return 0\ng = gVALUE\ndef f(): return g.__name__",
    "recursion": "def f(n=3): return n and f(n - 1) + VALUE",
    "function that calls back": "def f(n=3): return g(n)\ndef g(n): return n and f(n - 1) + VALUE",
    "order of a dict": "D = dict([('a', 1), ('b', 2)][::3 - 2 * VALUE])\ndef f(): return list(D)",
    "order of parameters": "def g(a1, a2): return aVALUE\ndef f(): return g(1, 2)",
    "one object or two": "a = []\nb = a if VALUE == 1 else []\ndef f(): a.append(1); return b",
}

BY_REFERENCE = {
    "single dispatch": "import functools\n@functools.singledispatch\ndef g(x): return 0\n"
    "@g.register\ndef _(x: int): return VALUE\ndef f(): return g(1)",
}
"""Functions that cannot be pickled by value."""

_USE = "from {0} import {1}\ndef f(): return {1}()"
_GO = "def go(): return VALUE"
_IMPORTS: dict[str, Files] = {
    "import": by_module("import late\ndef f(): return late.go()", late=_GO),
    "import in a function": by_module("def f():\n    import late\n    return late.go()", late=_GO),
    "import in a function of the script": by_script(
        "def f():\n    import late\n    return late.go()", late=_GO
    ),
    "import in a method": by_script(
        "class A:\n    def g(s):\n        from late import go\n        return go()\n"
        "def f(): return A().g()",
        late=_GO,
    ),
    "import in a lambda": by_script("f = lambda: __import__('late').go()", late=_GO),
    "import as": by_module("import late as other\ndef f(): return other.go()", late=_GO),
    "import by import_module": by_module(
        "import importlib\ndef f(): return importlib.import_module('late').go()", late=_GO
    ),
    "import by a name for import_module": by_module(
        "from importlib import import_module as load\nNAMES = ['late']\n"
        "def f(): return [load(name).go() for name in NAMES]",
        late=_GO,
    ),
    "import by a name from another module": by_script(
        "import mine, names\ndef f(): return mine.load(names.N).go()",
        mine="from importlib import import_module as load",
        names="N = 'late'",
        late=_GO,
    ),
    "import by a name with what is in the module": by_script(
        "import pkgutil\ndef f(): return pkgutil.resolve_name('late:go')()", late=_GO
    ),
    "import by pydoc": by_script(
        "import pydoc\ndef f(): return pydoc.locate('late.go')()", late=_GO
    ),
    "import by the beginning of a name": by_script(
        "import pkg\ndef f(): return pkg.load('sub').go()",
        pkg____init__="from importlib import import_module\n"
        "def load(name): return import_module(f'{__name__}.impl.{name}')",
        pkg__impl____init__="",
        pkg__impl__sub=_GO,
    ),
    "import by eval": by_script("def f(): return eval('__import__(\"late\").go()')", late=_GO),
    "import by exec": by_script(
        "def f():\n    names = {}\n    exec('import late; n = late.go()', names)\n"
        "    return names['n']",
        late=_GO,
    ),
    "import by exec in a module": by_module(
        "def f():\n    names = {}\n    exec('import late; n = late.go()', names)\n"
        "    return names['n']",
        late=_GO,
    ),
    "import by a relative import_module": by_script(
        "from pkg import f",
        pkg____init__="import importlib\n"
        "def f(): return importlib.import_module('.sub', 'pkg').go()",
        pkg__sub=_GO,
    ),
    "import that is tried": by_module(
        "try:\n    import nowhere\nexcept ImportError:\n    import late\ndef f(): return late.go()",
        late=_GO,
    ),
    "import under a condition": by_module(
        "import sys\ndef f():\n    if sys.maxsize:\n        import late\n        return late.go()",
        late=_GO,
    ),
    "import for types only": by_module(
        "import typing\nif typing.TYPE_CHECKING:\n    import late\ndef f(): return 0", late=_GO
    ),
    "import of what is imported": by_module(
        "import a\ndef f(): return a.b.go()", a="import b", b=_GO
    ),
    "import within an import within a function": by_module(
        "def f():\n    import a\n    return a.go()",
        a="def go():\n    import b\n    return b.go()",
        b=_GO,
    ),
    "imports in a circle": by_module("import a\ndef f(): return a.go()", a="import mine\n" + _GO),
    "star import": by_module("from late import *\ndef f(): return go()", late=_GO),
    "star import of a package": by_module(
        "from pkg import *\ndef f(): return sub.go()",
        pkg____init__="__all__ = ['sub']",
        pkg__sub=_GO,
    ),
    "module by its dots": by_module("import pkg.sub\ndef f(): return pkg.sub.go()", pkg__sub=_GO)
    | {"pkg/__init__.py": ""},
    "module from its package": by_module(_USE.format("pkg.sub", "go"), pkg__sub=_GO)
    | {"pkg/__init__.py": ""},
    "module from a package in a function": by_module(
        "def f():\n    from pkg import sub\n    return sub.go()", pkg__sub=_GO, pkg____init__=""
    ),
    "package itself": by_module(_USE.format("pkg", "go"), pkg____init__=_GO),
    "package of what is imported": by_module(
        "import pkg.sub\ndef f(): return pkg.N", pkg____init__="N = VALUE", pkg__sub=""
    ),
    "package of what is imported in a function": by_module(
        "def f():\n    import pkg.sub\n    return pkg.N", pkg____init__="N = VALUE", pkg__sub=""
    ),
    "package that imports from itself": by_module(
        _USE.format("pkg", "go"), pkg____init__="from .sub import go", pkg__sub=_GO
    ),
    "relative import of two levels": by_module(
        _USE.format("pkg.a.b", "go"),
        pkg____init__="",
        pkg__a____init__="",
        pkg__a__b="def go():\n    from ..c import go\n    return go()",
        pkg__c=_GO,
    ),
    "relative import of a module": by_module(
        _USE.format("pkg.a", "go"),
        pkg____init__="",
        pkg__a="def go():\n    from . import b\n    return b.go()",
        pkg__b=_GO,
    ),
    "package without a file": by_module(_USE.format("space.sub", "go"), space__sub=_GO),
    "package without a file, in a function": by_module(
        "def f():\n    from space.deep import sub\n    return sub.go()", space__deep__sub=_GO
    ),
    "package that loads its parts lazily": by_module(
        "import pkg\ndef f(): return pkg.sub.go()",
        pkg____init__="import importlib\n"
        "def __getattr__(name): return importlib.import_module(f'pkg.{name}')",
        pkg__sub=_GO,
    ),
    "module that is loaded by a computed name": by_module(
        "import importlib, sys\nlate = importlib.import_module('la' + 'te')\n"
        "def f(): return late.go()",
        late=_GO,
    ),
    "module that imports the one that changes it": by_module(
        "import a, b\ndef f(): return a.N", a="N = 0", b="import a\na.N = VALUE"
    ),
    "module that is imported for its effect": by_module(
        "import random\nimport late\ndef f(): return random.random()",
        late="import random\nrandom.seed(VALUE)",
    ),
    "module named like one of Python's": by_module(
        "def f():\n    import antigravity\n    return antigravity.go()", antigravity=_GO
    ),
    "function made by exec that imports": by_script(
        "exec('def f():\\n    import late\\n    return late.go()')", late=_GO
    ),
    "module that travels by value": by_module(_GO.replace("go", "f"))
    | {
        "script.py": "import cloudpickle, mine\ncloudpickle.register_pickle_by_value(mine)\n"
        "call = mine.f, (), {}\n"
    },
    "module without a source": {
        "script.py": "import py_compile\npy_compile.compile('mine.txt', 'mine.pyc', 'mine.txt')\n"
        "import mine\ncall = mine.f, (), {}\n",
        "mine.txt": "def f(): return VALUE\n",
    },
    "module in an archive": {
        "script.py": "import sys, zipfile\nwith zipfile.ZipFile('all.zip', 'w') as z:\n"
        "    z.write('mine.txt', 'mine.py')\nsys.path.insert(0, 'all.zip')\n"
        "import mine\ncall = mine.f, (), {}\n",
        "mine.txt": "def f(): return VALUE\n",
    },
}

_NUMBER = "VALUE"  # content of a file; it is no code, but the value that is read from it is sent
_READ = "n = int(open('number').read())\n"
_CARRIED = {
    "argument": "def f(x): return x\ncall = f, (n,), {}",
    "argument in a list": "def f(x): return x\ncall = f, ([[n]],), {}",
    "argument in a set": "def f(x): return x\ncall = f, ({('a', n), 'b'},), {}",
    "argument's type": "def f(x): return x\ncall = f, ((1, 1.0)[n - 1],), {}",
    "argument that is true": "def f(x): return x\ncall = f, ((1, True)[n - 1],), {}",
    "argument that is minus zero": "def f(x): return x\ncall = f, ((0., -0.)[n - 1],), {}",
    "bytes or string": "def f(x): return x\ncall = f, ((b'a', 'a')[n - 1],), {}",
    "list or tuple": "def f(x): return x\ncall = f, (([1], (1,))[n - 1],), {}",
    "set or frozenset": "def f(x): return x\ncall = f, (((set, frozenset)[n - 1]('ab')),), {}",
    "large argument": "def f(x): return x\ncall = f, (b'a' * 300_000 + bytes([n]),), {}",
    "large bytearray": "def f(x): return x\ncall = f, (bytearray(300_000 + n),), {}",
    "order of a dict": "def f(x): return x\ncall = f, (dict([(1, 1), (2, 2)][::3 - 2 * n]),), {}",
    "keyword": "def f(**x): return x\ncall = f, (), {'a': n}",
    "order of keywords": "def f(**x): return list(x)\n"
    "call = f, (), dict([('a', 1), ('b', 1)][::3 - 2 * n])",
    "by position or by name": "def f(*a, **k): return a\n"
    "call = (f, (1,), {}) if n == 1 else (f, (), {'a': 1})",
    "one list or two": "def f(a, b): a.append(1); return b\nx = []\n"
    "call = f, (x, x if n == 1 else []), {}",
    "one set or two": "def f(a, b): a.add(1); return b\nx = {'a'}\n"
    "call = f, ([x, x if n == 1 else {'a'}],), {}",
    "one object in two sets or two": "class A: pass\nx = A()\ndef f(a, b): return a & b\n"
    "call = f, ({x, 'a'}, {x if n == 1 else A(), 'a'}), {}",
    "object that is bound and an argument": "class A:\n    def __init__(s): s.l = []\n"
    "    def f(s, l): l.append(1); return s.l\na = A()\ncall = a.f, (a.l if n == 1 else [],), {}",
    "state of an object": "class A: pass\na = A()\na.n = n\n"
    "def f(a): return a.n\ncall = f, (a,), {}",
    "state by __getstate__": "class A:\n    def __getstate__(s): return {'n': n}\n"
    "def f(a): return a.n\ncall = f, (A(),), {}",
    "attribute of a class": "class A: pass\nA.n = n\ndef f(): return A.n\ncall = f, (), {}",
    "member of an enum": "import enum\nclass E(enum.Enum): A = 1; B = 2\n"
    "def f(e): return e.value\ncall = f, (E(n),), {}",
    "global": "def f(): return n\ncall = f, (), {}",
    "global of a function in a function": "def f(): return (lambda: n)()\ncall = f, (), {}",
    "closure": "def g(n): return lambda: n\ncall = g(n), (), {}",
    "default": "def f(n=[n]): return n\ncall = f, (), {}",
    "keyword default": "def f(*, n={'n': n}): return n\ncall = f, (), {}",
    "function attribute": "def f(): return f.n\nf.n = n\ncall = f, (), {}",
    "annotation": "def f(x: n = 1): return f.__annotations__\ncall = f, (), {}",
    "code by exec": "exec(f'def f(): return {n}')\ncall = f, (), {}",
    "lambda among two of a line": "call = (lambda: 1, lambda: 2)[n - 1], (), {}",
    "code that was exchanged": "def f(): return 1\ndef g(): return 2\n"
    "if n == 2: f.__code__ = g.__code__\ncall = f, (), {}",
    "callable with a state": "import functools\nclass S:\n    def __init__(s, g, n):\n"
    "        functools.update_wrapper(s, g); s.n = n\n    def __call__(s): return s.n\n"
    "def g(): return 0\ncall = S(g, n), (), {}",
    "callable with a state, as an argument": "import functools\nclass S:\n"
    "    def __init__(s, g, n):\n        functools.update_wrapper(s, g); s.n = n\n"
    "    def __call__(s): return s.n\ndef g(): return 0\ndef f(s): return s()\n"
    "call = f, (S(g, n),), {}",
    "partial's argument": "import functools\ndef f(n): return n\n"
    "call = functools.partial(f, n), (), {}",
    "partial's keywords": "import functools\ndef f(**k): return list(k)\n"
    "call = functools.partial(f, **dict([('a', 1), ('b', 1)][::3 - 2 * n])), (), {}",
    "method of C": "call = ('ab'.upper, 'ab'.lower)[n - 1], (), {}",
    "function of C": "import math\ncall = (math.sin, math.cos)[n - 1], (1.0,), {}",
    "class of Python": "call = (int, float)[n - 1], (1,), {}",
    "array": "import array\ndef f(x): return x\ncall = f, (array.array('i', [n]),), {}",
    "decimal": "import decimal\ndef f(x): return x\ncall = f, (decimal.Decimal(n),), {}",
    "date": "import datetime\ndef f(x): return x\ncall = f, (datetime.date(2000, 1, n),), {}",
    "named tuple": "import collections\nP = collections.namedtuple('P', 'n')\n"
    "def f(x): return x\ncall = f, (P(n),), {}",
    "default dict": "import collections\ndef f(x): return x\n"
    "call = f, (collections.defaultdict(int, a=n),), {}",
    "cycle": "def f(x): return x\nx = [n]\nx.append(x)\ncall = f, (x,), {}",
    "environment": "def f(): return 0\ncall = f, (), {}\noptions = {'env': {'A': str(n)}}",
    "GPUs": "def f(): return 0\ncall = f, (), {}\noptions = {'gpus': n}",
    "initializer's argument": "def f(): return 0\ncall = f, (), {}\n"
    "def init(n): pass\ninitializer = init, (n,)",
    "own key": "def f(n): return n\ncall = f, (1,), {}\noptions = {'key': str(n)}",
    "method of C with a key": "call = ('ab'.upper, 'ab'.lower)[n - 1], (), {}\n"
    "options = {'key': 'x'}",
}

KINDS: dict[str, Files] = {
    **{f"script: {name}": by_script(text) for name, text in BODIES.items()},
    **{f"module: {name}": by_module(text) for name, text in BY_REFERENCE.items()},
    **{f"import: {name}": files for name, files in _IMPORTS.items()},
    **{
        f"carried: {name}": {"script.py": f"{_READ}{text}", "number": _NUMBER}
        for name, text in _CARRIED.items()
    },
}
"""Programs by the kind of edit."""
