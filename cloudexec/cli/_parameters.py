"""The parameters of a function, which are compared with the columns of the input."""

from __future__ import annotations

import difflib
import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cloudexec.cli._errors import CommandError

type_names: Mapping[object, str] = {
    str: "str",
    int: "int",
    float: "float",
    bool: "bool",
    list: "json",
    dict: "json",
    pathlib.Path: "path",
}
"""Annotations that decide a CSV column's type, and the type's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """A function's parameters, as far as they can be read."""

    title: str
    """The function as a message shows it, e.g. ``score(price, quantity=1)``."""
    positional_only: tuple[str, ...]
    """Names that can only be passed by position, in order."""
    required: tuple[str, ...]
    """Names without a default, in order."""
    defaults: Mapping[str, object]
    """Names with a default, and the default."""
    takes_any: bool
    """Whether other names are accepted: ``**kwargs``, or a signature that cannot be read."""
    annotated: Mapping[str, str]
    """Names whose annotation decides a CSV column's type, and the type's name."""
    one_value: str | None
    """Why the function cannot be called with a single positional value; None if it can."""
    first: str | None
    """The name of the first positional parameter."""

    def accepts(self, name: str) -> bool:
        """Whether an argument of this name can be passed."""
        return self.takes_any or name in self.required or name in self.defaults

    def check_names(
        self, names: Collection[str], *, place: str, noun: str, ignore_extra: bool
    ) -> None:
        """Compare the names that a row gives with those that the function takes.

        Args:
            names: The row's columns or keys.
            place: The file or row, as the message shows it.
            noun: What a name is called there: ``column`` or ``key``.
            ignore_extra: Whether names that the function does not take are allowed.

        Raises:
            CommandError: If a required name is missing or a name is not accepted.
        """
        missing = [name for name in self.required if name not in names]
        extra = [name for name in names if not self.accepts(name)]
        if missing:
            given = ", ".join(names) or "none"
            raise CommandError(
                f"{place} has no {noun} {missing[0]!r}, which {self.title} needs"
                f"{_did_you_mean(missing[0], extra)} ({noun}s there: {given})"
            )
        if extra and not ignore_extra:
            free = [name for name in (*self.required, *self.defaults) if name not in names]
            raise CommandError(
                f"{self.title} has no parameter for the {noun} {extra[0]!r} of {place}"
                f"{_did_you_mean(extra[0], free)} (--ignore-extra leaves such {noun}s out)"
            )

    def bind(self, values: Mapping[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Turn a row's values into a call's arguments.

        Args:
            values: The values to pass by name; names that are not accepted are left out.

        Returns:
            The positional and the keyword arguments.
        """
        if self.takes_any:
            keywords = dict(values)
        else:
            keywords = {name: value for name, value in values.items() if self.accepts(name)}
        positional: list[object] = []
        for name in self.positional_only:
            if name not in keywords and name not in self.defaults:
                break
            positional.append(keywords.pop(name, self.defaults.get(name)))
        return tuple(positional), keywords


def read_parameters(function: Callable[..., object], name: str) -> Parameters:
    """Read a function's signature.

    Args:
        function: Any callable.
        name: What messages call it.

    Returns:
        Its parameters; those of a callable without a readable signature accept anything.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return Parameters(
            title=f"{name}()",
            positional_only=(),
            required=(),
            defaults={},
            takes_any=True,
            annotated={},
            one_value=None,
            first=None,
        )
    parameters = signature.parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    positional = [p for p in named if p.kind is not p.KEYWORD_ONLY]
    return Parameters(
        title=_title(name, signature),
        positional_only=tuple(p.name for p in named if p.kind is p.POSITIONAL_ONLY),
        required=tuple(p.name for p in named if p.default is p.empty),
        defaults={p.name: p.default for p in named if p.default is not p.empty},
        takes_any=any(p.kind is p.VAR_KEYWORD for p in parameters),
        annotated=_annotated(function),
        one_value=_why_not_one_value(signature),
        first=positional[0].name if positional else None,
    )


def _title(name: str, signature: inspect.Signature) -> str:
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = f"{name}{inspect.Signature(bare)}"
    return text if len(text) <= 120 else f"{name}(...)"


def _why_not_one_value(signature: inspect.Signature) -> str | None:
    try:
        signature.bind(object())
    except TypeError as exc:
        return str(exc)
    return None


def _annotated(function: Callable[..., object]) -> dict[str, str]:
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # an annotation that cannot be evaluated decides nothing
        return {}
    chosen = {name: _type_name(hint) for name, hint in hints.items()}
    return {name: kind for name, kind in chosen.items() if kind is not None}


def _type_name(hint: object) -> str | None:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        return _type_name(members[0]) if len(members) == 1 else None
    try:
        return type_names.get(hint if origin is None else origin)
    except TypeError:  # an unhashable annotation is none of the known types
        return None


def _did_you_mean(name: str, candidates: Collection[str]) -> str:
    folded = {candidate.casefold(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""
