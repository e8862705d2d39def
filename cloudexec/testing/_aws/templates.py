"""Evaluates CloudFormation templates: parameters, conditions, references and functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["Evaluator", "TemplateError", "creation_order", "parse_template", "resolve_parameters"]

_SUB = re.compile(r"\$\{(!?)([^}]*)\}")
_NOTHING = object()


class TemplateError(Exception):
    """CloudFormation would refuse the template."""


def parse_template(body: str) -> dict[str, Any]:
    """Read a template from JSON or YAML."""
    try:
        found = json.loads(body)
    except ValueError:
        from moto.cloudformation.models import Stack

        found = Stack.parse_template(body)
    if not isinstance(found, dict) or not found.get("Resources"):
        raise TemplateError("Template format error: At least one Resources member must be defined.")
    return found


def resolve_parameters(template: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """Return the value of every parameter as text: the given one, or its default.

    Raises:
        TemplateError: If one is missing, unknown or not allowed.
    """
    declared = template.get("Parameters", {})
    unknown = sorted(set(given) - set(declared))
    if unknown:
        raise TemplateError(f"Parameters: [{', '.join(unknown)}] do not exist in the template")
    found = {}
    for name, about in declared.items():
        if name in given:
            found[name] = given[name]
        elif "Default" in about:
            found[name] = str(about["Default"])
        else:
            raise TemplateError(f"Parameters: [{name}] must have values")
        _check_parameter(name, about, found[name])
    return found


def _check_parameter(name: str, about: Mapping[str, Any], value: str) -> None:
    allowed = about.get("AllowedValues")
    if allowed and value not in [str(each) for each in allowed]:
        raise TemplateError(
            f"Parameter '{name}' must be one of AllowedValues [{', '.join(map(str, allowed))}]"
        )
    if about.get("Type") == "Number":
        try:
            number = float(value)
        except ValueError:
            raise TemplateError(f"Parameter '{name}' must be a number.") from None
        if number < about.get("MinValue", number) or number > about.get("MaxValue", number):
            raise TemplateError(f"Parameter '{name}' is out of its range.")
    pattern = about.get("AllowedPattern")
    if pattern and not re.fullmatch(pattern, value):
        raise TemplateError(f"Parameter '{name}' failed to satisfy constraint: {pattern}")


class Evaluator:
    """Replaces references and functions by their values.

    Args:
        template: The template.
        parameters: Every parameter's value as text.
        pseudo: The pseudo parameters, such as ``AWS::Region``.
        reference: Returns a resource's ``Ref``; ``None`` if it has not been created.
        attribute: Returns a resource's attribute.
    """

    def __init__(
        self,
        template: Mapping[str, Any],
        parameters: Mapping[str, str],
        pseudo: Mapping[str, str],
        reference: Callable[[str], Any],
        attribute: Callable[[str, str], Any],
    ) -> None:
        self._template = template
        self._parameters = parameters
        self._pseudo = pseudo
        self._reference = reference
        self._attribute = attribute

    def exists(self, entry: Mapping[str, Any]) -> bool:
        """Return whether the condition of a resource or output holds."""
        return "Condition" not in entry or self.condition(entry["Condition"])

    def condition(self, name: str) -> bool:
        """Return whether a named condition holds."""
        conditions = self._template.get("Conditions", {})
        if name not in conditions:
            raise TemplateError(f"Unresolved condition {name}")
        return bool(self.value(conditions[name]))

    def value(self, node: Any) -> Any:
        """Return a node of the template with all references and functions replaced."""
        found = self._value(node)
        return None if found is _NOTHING else found

    def _value(self, node: Any) -> Any:
        if isinstance(node, list):
            return [found for each in node if (found := self._value(each)) is not _NOTHING]
        if not isinstance(node, dict):
            return node
        if len(node) == 1:
            (name, argument), *_ = node.items()
            if name in ("Ref", "Condition") and isinstance(argument, str):
                return self.condition(argument) if name == "Condition" else self._ref(argument)
            function = getattr(self, "_" + name.replace("Fn::", "fn_").lower(), None)
            if name.startswith("Fn::"):
                if function is None:
                    raise TemplateError(f"FakeAWS has no {name}")
                return function(argument)
        return {
            key: found for key, each in node.items() if (found := self._value(each)) is not _NOTHING
        }

    def _ref(self, name: str) -> Any:
        if name == "AWS::NoValue":
            return _NOTHING
        if name in self._pseudo:
            return self._pseudo[name]
        if name in self._parameters:
            text = self._parameters[name]
            kind = self._template["Parameters"][name].get("Type", "String")
            if kind == "CommaDelimitedList" or kind.startswith("List<"):
                return [part.strip() for part in text.split(",")]
            if kind == "Number":
                return float(text) if "." in text else int(text)
            return text
        return self._reference(name)

    def _fn_getatt(self, argument: Any) -> Any:
        name, attribute = argument.split(".", 1) if isinstance(argument, str) else argument
        return self._attribute(name, self._value(attribute))

    def _fn_sub(self, argument: Any) -> str:
        text, names = argument if isinstance(argument, list) else (argument, {})

        def replaced(found: re.Match[str]) -> str:
            literal, name = found.groups()
            if literal:
                return f"${{{name}}}"
            if name in names:
                return str(self._value(names[name]))
            if "." in name:
                return str(self._fn_getatt(name))
            return str(self._ref(name))

        return _SUB.sub(replaced, text)

    def _fn_join(self, argument: Any) -> str:
        return str(argument[0]).join(str(each) for each in self._value(argument[1]))

    def _fn_split(self, argument: Any) -> list[str]:
        return str(self._value(argument[1])).split(argument[0])

    def _fn_select(self, argument: Any) -> Any:
        return self._value(argument[1])[int(self._value(argument[0]))]

    def _fn_if(self, argument: Any) -> Any:
        return self._value(argument[1] if self.condition(argument[0]) else argument[2])

    def _fn_equals(self, argument: Any) -> bool:
        first, second = (self._value(each) for each in argument)
        return bool(str(first) == str(second))

    def _fn_not(self, argument: Any) -> bool:
        return not self._value(argument[0])

    def _fn_and(self, argument: Any) -> bool:
        return all(self._value(each) for each in argument)

    def _fn_or(self, argument: Any) -> bool:
        return any(self._value(each) for each in argument)

    def _fn_findinmap(self, argument: Any) -> Any:
        found = self._template["Mappings"]
        for each in argument:
            found = found[self._value(each)]
        return found

    def _fn_getazs(self, argument: Any) -> list[str]:
        return [f"{self._pseudo['AWS::Region']}{letter}" for letter in "abcdef"]

    def _fn_base64(self, argument: Any) -> str:
        import base64

        return base64.b64encode(str(self._value(argument)).encode()).decode()


def creation_order(resources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the logical names, each after all names that it refers to or depends on.

    Raises:
        TemplateError: If resources refer to each other in a circle.
    """
    order: list[str] = []
    visiting: set[str] = set()

    def visit(name: str) -> None:
        if name in order:
            return
        if name in visiting:
            raise TemplateError(f"Circular dependency between resources: [{name}]")
        visiting.add(name)
        depends = resources[name].get("DependsOn", [])
        for other in [*([depends] if isinstance(depends, str) else depends)]:
            if other in resources:
                visit(other)
        for other in _references(resources[name].get("Properties", {})):
            if other in resources and other != name:
                visit(other)
        order.append(name)

    for name in resources:
        visit(name)
    return order


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for each in node:
            yield from _references(each)
    if not isinstance(node, dict):
        return
    for key, each in node.items():
        if key == "Ref" and isinstance(each, str):
            yield each
        elif key == "Fn::GetAtt":
            yield each.split(".")[0] if isinstance(each, str) else each[0]
        elif key == "Fn::Sub":
            text = each[0] if isinstance(each, list) else each
            for _, name in _SUB.findall(text):
                yield name.split(".")[0]
        yield from _references(each)
