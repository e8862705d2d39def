"""The login of a registry as Docker's configuration has it, or one of its credential helpers.

Reference: Docker documentation, "docker login", "Credential stores" and "Credential helpers".
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Login", "find_login"]

_HUB = "https://index.docker.io/v1/"
"""What Docker calls its own registry."""
_NOT_FOUND = "credentials not found in native keychain"
"""What a helper prints that knows no login for a registry."""
_TOKEN = "<token>"
"""The user name by which a helper says that its secret is an identity token."""
_LONGEST = 60.0
"""Seconds: a helper may ask the user to unlock a keychain."""


@dataclass(frozen=True, slots=True)
class Login:
    """What there is to sign in with."""

    credentials: Mapping[str, str] | None = None
    """``username`` and ``password``; ``None``: there are none, as for a public registry."""
    problem: str = ""
    """Why a login that is configured cannot be used, and what to do; empty: nothing is wrong.

    It matters only where the registry refuses who is not signed in.
    """


def find_login(host: str) -> Login:
    """Return what ``docker login`` has noted for a registry, or a credential helper knows.

    A helper of the registry (``credHelpers``) is asked first, then that of all registries
    (``credsStore``), and then the file itself is read.
    """
    folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    file = folder / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Login()
    if not isinstance(data, dict):
        return Login()
    key = _HUB if host == "docker.io" else host
    helper = _entry(data.get("credHelpers"), key) or data.get("credsStore")
    if isinstance(helper, str) and helper:
        found = _asked(helper, key, file)
        if found.credentials or found.problem:
            return found
    return Login(_noted(_entry(data.get("auths"), key)))


def _entry(table: Any, key: str) -> Any:
    """Return what a table has for a registry, which may be under its address."""
    if not isinstance(table, dict):
        return None
    return next((table[each] for each in (key, f"https://{key}") if each in table), None)


def _noted(entry: Any) -> Mapping[str, str] | None:
    try:
        user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
    except (ValueError, KeyError, TypeError):
        return None
    return {"username": user, "password": password} if password else None


def _asked(helper: str, key: str, file: Path) -> Login:
    """Ask a credential helper. What it prints is in no message, as it may be a password."""
    name = f"docker-credential-{helper}"
    named = f"{file} names the credential helper {helper!r} for {key}"
    program = shutil.which(name) if re.fullmatch(r"[\w.-]+", helper) else None
    if program is None:
        return Login(problem=f"{named}, and there is no program {name} in PATH: install it")
    shown = f"`echo {key} | {name} get` shows what it says"
    try:
        done = subprocess.run(
            [program, "get"],
            input=f"{key}\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Login(problem=f"{named}, which did not answer within {_LONGEST:.0f} s: {shown}")
    except OSError as exc:
        return Login(problem=f"{named}, and {program} cannot be run: {exc.strerror}")
    if done.returncode:
        if done.stdout.strip() == _NOT_FOUND:
            return Login()
        return Login(problem=f"{named}, which ended with code {done.returncode}: {shown}")
    try:
        said = json.loads(done.stdout)
        user, password = str(said["Username"]), str(said["Secret"])
    except (ValueError, KeyError, TypeError):
        return Login(problem=f"{named}, which printed no user name and secret: {shown}")
    if user == _TOKEN:
        return Login(
            problem=f"{named}, which has an identity token, and not the user name and password "
            f"that are needed: `docker login` with these"
        )
    return Login({"username": user, "password": password})
