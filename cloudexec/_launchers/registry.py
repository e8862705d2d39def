"""Makes launchers by name: those of this package, and those that other packages register."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cloudexec._errors import ConfigError
from cloudexec._launchers.base import Launcher

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["GROUP", "default_launcher", "launcher_named"]

GROUP = "cloudexec.launchers"
"""The group of entry points under which packages register launchers."""
_OWN = {
    "batch": "cloudexec._launchers.batch:Batch",
    "ec2": "cloudexec._launchers.ec2:EC2",
    "fargate": "cloudexec._launchers.fargate:Fargate",
    "lambda": "cloudexec._launchers.lambda_:Lambda",
    "local": "cloudexec._launchers.local:Local",
}


def default_launcher() -> Launcher:
    """Return the launcher that ``CLOUDEXEC_LAUNCHER`` names, else ``Batch()`` or ``Local()``.

    It is ``Batch()`` if ``CLOUDEXEC_PROFILE`` names a profile.

    Raises:
        ConfigError: If there is no such launcher, or if it cannot be made.
    """
    if name := os.environ.get("CLOUDEXEC_LAUNCHER", ""):
        return launcher_named(name, f"CLOUDEXEC_LAUNCHER={name}")
    is_local = os.environ.get("CLOUDEXEC_PROFILE", "local") in ("", "local")
    return launcher_named("local" if is_local else "batch")


def launcher_named(name: str, where: str = "") -> Launcher:
    """Make a launcher with its default settings.

    Args:
        name: ``"local"``, ``"batch"``, ``"fargate"``, ``"ec2"``, ``"lambda"``, or a name that an
            installed package registers.
            package registers.
        where: Who gave the name, for messages.

    Raises:
        ConfigError: If there is no such launcher, or if it cannot be made.
    """
    where = where or f"launcher={name!r}"
    if name in _OWN:
        from importlib import import_module

        module, _, kind = _OWN[name].partition(":")
        own: Launcher = getattr(import_module(module), kind)()
        return own
    others = _registered()
    if name not in others:
        known = ", ".join(sorted({*_OWN, *others}))
        raise ConfigError(
            f"{where}: there is no such launcher; installed are: {known}. Install the package "
            f"with this launcher in this environment; the package must register the name as an "
            f"entry point of the group {GROUP!r}"
        )
    try:
        made: Launcher = others[name].load()()
    except ConfigError:
        raise
    except Exception as exc:
        raise ConfigError(
            f"{where}: the launcher cannot be made from {others[name].value}: "
            f"{type(exc).__name__}: {exc}. A launcher that needs settings is made in the program: "
            f"launcher=ItsClass(...)"
        ) from exc
    if not hasattr(made, "slots_per_worker"):
        raise ConfigError(
            f"{where}: {others[name].value} is no launcher: its class must derive from "
            f"cloudexec.launchers.PlatformLauncher"
        )
    return made


def _registered() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {each.name: each for each in entry_points(group=GROUP)}
