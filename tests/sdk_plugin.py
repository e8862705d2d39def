"""Keeps what the AWS SDK computes anew for each client, as tests make thousands of clients.

A program makes a few. What is kept depends on the service and on nothing else: the methods of a
client, and the names of events.
"""

from __future__ import annotations

from typing import Any

import botocore.client
import botocore.hooks

__all__: list[str] = []

_methods: dict[tuple[str, str], dict[str, Any]] = {}
_names: dict[str, str] = {}


def pytest_configure() -> None:
    """Let clients share both."""
    creator: Any = botocore.client.ClientCreator
    aliaser: Any = botocore.hooks.EventAliaser
    create_methods, init = creator._create_methods, aliaser.__init__

    def shared_methods(self: Any, service_model: Any) -> dict[str, Any]:
        key = service_model.service_name, service_model.api_version
        if key not in _methods:
            _methods[key] = create_methods(self, service_model)
        return dict(_methods[key])

    def shared_names(self: Any, event_emitter: Any, event_aliases: Any = None) -> None:
        init(self, event_emitter, event_aliases)
        if self._event_aliases == botocore.hooks.EVENT_ALIASES:
            self._alias_name_cache = _names

    creator._create_methods, aliaser.__init__ = shared_methods, shared_names
