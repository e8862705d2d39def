"""Reads the annotations of functions and classes, which Python 3.14 evaluates only when asked.

An annotation may name what exists only for a type checker. Python up to 3.13 would have failed when
it defined the function; Python 3.14 fails when the annotations are read. They are then taken as
text, as ``from __future__ import annotations`` has them on every version.

References:
    PEP 649 and PEP 749.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterable
from types import FunctionType
from typing import Any

__all__ = [
    "CLASS_NAMES",
    "annotations_of",
    "evaluated",
    "names_in",
    "reduce_forward",
    "settle",
    "with_annotations",
]

_WORD = re.compile(r"[^\W\d]\w*")

CLASS_NAMES = ("__annotate_func__", "__annotations_cache__", "__annotate__")
"""Attributes of a class in which Python 3.14 keeps its annotations, evaluated or not."""


def evaluated(obj: Any) -> dict[str, Any] | None:
    """Return the annotations of a function or class; ``None`` if they cannot be evaluated."""
    try:
        found: dict[str, Any] = obj.__annotations__
    except Exception:  # of whatever the annotations call
        return None
    return found


def annotations_of(obj: Any) -> dict[str, Any]:
    """Return the annotations of a function or class; as text if they cannot be evaluated."""
    try:
        return inspect.get_annotations(obj)
    except Exception:
        if sys.version_info < (3, 14):
            raise
    import annotationlib  # type: ignore[import-not-found]

    found: dict[str, Any] = annotationlib.get_annotations(obj, format=annotationlib.Format.STRING)
    return found


def with_annotations(fn: FunctionType) -> FunctionType:
    """Return a function whose annotations can be read: a copy if those of ``fn`` cannot."""
    if sys.version_info < (3, 14) or evaluated(fn) is not None:
        return fn
    copy = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__dict__.update(fn.__dict__)
    for name in ("__qualname__", "__kwdefaults__", "__module__", "__doc__", "__type_params__"):
        setattr(copy, name, getattr(fn, name))
    copy.__annotations__ = annotations_of(fn)
    return copy


def settle(cls: type, content: dict[str, Any]) -> None:
    """Remove from the attributes of a class those that Python adds when the class is used."""
    content.pop("__slotnames__", None)
    if sys.version_info >= (3, 14):
        for name in CLASS_NAMES:
            content.pop(name, None)
        content["__annotations__"] = annotations_of(cls)
    if content.get("__annotations__", True) == {}:
        del content["__annotations__"]


def names_in(text: str) -> Iterable[str]:
    """Return the names in an annotation that is text, which is evaluated at run time."""
    return _WORD.findall(text)


def reduce_forward(ref: Any) -> tuple[Any, ...]:
    """Pickle a reference of Python 3.14 to a name that did not exist when it was evaluated.

    It has the globals of the module that it stands in, such as the field of a dataclass whose type
    is the class itself. They are not sent: in a worker it finds that module by its name.
    """
    module = ref.__forward_module__
    if module is None and ref.__globals__ is not None:
        module = ref.__globals__.get("__name__")
    forward_ref: Any = type(ref)
    make = functools.partial(
        forward_ref,
        ref.__forward_arg__,
        module=module,
        owner=ref.__owner__,
        is_argument=ref.__forward_is_argument__,
        is_class=ref.__forward_is_class__,
    )
    return make, (), (None, {"__cell__": ref.__cell__, "__extra_names__": ref.__extra_names__})
