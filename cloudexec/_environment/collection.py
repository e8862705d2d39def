"""The components of a worker's environment: copied, fetched and built, whichever fits."""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from cloudexec._environment.cache import Cache
from cloudexec._environment.components import (
    Component,
    is_native,
    libraries_of,
    misfit,
    missing_libraries,
    of_directory,
    of_distribution,
    of_loose,
)
from cloudexec._environment.fetching import Installer, NoWheelError, names_of
from cloudexec._environment.inventory import (
    Distribution,
    Inventory,
    signature_of,
    take_inventory,
)
from cloudexec._environment.local_requirements import (
    all_lines_of,
    is_dynamic,
    masked,
    places_of,
    project_name,
)
from cloudexec._environment.packages import Packages
from cloudexec._environment.selection import Selection, merged, needs_of, select
from cloudexec._environment.target import Target
from cloudexec._errors import ConfigError
from cloudexec._log import Log

__all__ = ["Collection"]

_logger = Log()
_NAME = re.compile(r"[\w.-]+")
"""The name at the beginning of a requirement."""

_REMEDIES = (
    "Leave it out if tasks do not need it (exclude=), name a version that has a wheel (extra=), or "
    "have workers run an image of your own (image=). What needs a compiler or system packages can "
    "be built by `cloudexec image push -r ... --apt ...` with a container engine, or in AWS by "
    "CodeBuild"
)


class Collection:
    """What workers are to have, of one inventory.

    Args:
        packages: What is wanted.
        inventory: What is installed here.
        required: Requirements of a worker itself, ``name==version``.
        cache: Keeps what was fetched and built.
        installer: Returns what fetches and builds; asked when it is needed.
        is_fresh: Whether to fetch again what may have newer versions by now.
    """

    def __init__(
        self,
        packages: Packages,
        inventory: Inventory,
        required: Sequence[str],
        cache: Cache,
        installer: Callable[[], Installer],
        *,
        is_fresh: bool = False,
    ) -> None:
        self._packages = packages
        self._required: dict[str, str] = {
            canonicalize_name(pin.partition("==")[0]): pin for pin in required
        }
        self._installed = inventory.distributions
        if packages.source != "here":
            own = {
                name: self._installed[name] for name in self._required if name in self._installed
            }
            inventory = Inventory(distributions=own, paths=())
        self._inventory = inventory
        self._cache = cache
        self._installer = installer
        self._is_fresh = is_fresh
        self._exclude = {
            canonicalize_name(name) for name in packages.exclude
        } - self._required.keys()
        self._left_out: set[str] = set()
        """Names of what is not installed here, would be fetched, and is excluded."""
        self._reasons: dict[str, str] = {}
        self._known: dict[str, Distribution] = {}
        self._built: dict[str, str] = {}
        """Where what this machine has built came from, for messages, by name."""

    def signature(self) -> str:
        """Return what differs whenever the components may: found from names, sizes and times."""
        whole = hashlib.sha256(self._inventory.signature(frozenset({"cloudexec"})).encode())
        packages = self._packages
        named = (packages.exclude, packages.extra, str(packages.source), self._wheelhouse)
        whole.update(repr(named).encode())
        if packages.file is not None:
            whole.update(_digest_of(packages.file).encode())
            if (project := self._own_project(packages.file)) is not None:
                whole.update(signature_of(project).encode())
        return whole.hexdigest()

    def components(self, target: Target) -> list[Component]:
        """Copy, fetch and build what workers on a target need.

        Raises:
            ConfigError: If something cannot be had for it.
        """
        found: dict[str, Component] = {}
        unfit: dict[str, str] = {}
        self._known, self._built = {}, {}
        if self._packages.file is not None:
            found.update(self._of_file(self._packages.file, target))
        selection = self._select(target)
        wanted = dict(selection.wanted)
        for name, texts in _for_target(self._packages.extra, target).items():
            wanted[name] = merged(texts)
        for name in selection.here:
            each = self._installed[name]
            if name == "cloudexec" or name in found or name in wanted:
                continue
            if each.source is not None:
                if not each.source.is_dir():
                    raise ConfigError(
                        f"the project {each.source}, which is installed here as editable, is gone: "
                        f"uninstall {name}, or leave it out (exclude=[{name!r}])"
                    )
                found[name] = self._project(each.source, target)
                continue
            component = of_distribution(each, target)
            why = self._why_not(each, component, target)
            found[name] = component
            self._known[name] = each
            if why:
                unfit[name] = why
        self._replace(wanted, unfit, found, target)
        fetched = self._fetch_all(wanted, target)
        # Which libraries workers get is known only now, and again when a wheel takes the place of
        # what was copied.
        while unfit := self._without_libraries({**found, **fetched}, target):
            self._replace(wanted, unfit, found, target)
            fetched = self._fetch_all(wanted, target)
        components = list({**found, **fetched}.values())
        components += [of_directory(path, target) for path in self._inventory.paths]
        loose = [
            path
            for path in self._inventory.loose
            if canonicalize_name(_module(path)) not in self._exclude
        ]
        if loose:
            components.append(_of_loose(loose, target))
        if self._packages.source == "here":
            self._check_exclude()
        return components

    def _check_exclude(self) -> None:
        """Warn of names to leave out that are no package's: they are most likely misspelled."""
        there = self._installed.keys() | self._left_out
        there |= {canonicalize_name(_module(path)) for path in self._inventory.loose}
        if not there.issuperset(map(canonicalize_name, self._packages.exclude)):
            # Also what is required on other machines alone.
            texts = [text for each in self._installed.values() for text in each.requires]
            there |= {canonicalize_name(found[0]) for text in texts if (found := _NAME.match(text))}
        for name in self._packages.exclude:
            if canonicalize_name(name) not in there:
                close = difflib.get_close_matches(canonicalize_name(name), sorted(there), 1)
                meant = f"; did you mean {close[0]!r}?" if close else ""
                _logger.warning(
                    "exclude names %r, but no such package is installed here or required%s",
                    name,
                    meant,
                )

    def _select(self, target: Target) -> Selection:
        return select(self._inventory, target, exclude=self._exclude, required=self._required)

    def _why_not(self, each: Distribution, component: Component, target: Target) -> str:
        """Say why a distribution cannot be copied; empty: it can."""
        if each.files is None:
            by = f" by {each.installer}" if each.installer else ""
            return f"it was installed here{by} without a list of its files"
        why = misfit(component, each.tags, target)
        if each.installer == "conda" and (why or is_native(component)):
            why = why or "its libraries need those of conda"
            return f"conda has installed it here, in a form that is not a wheel ({why})"
        if not why:
            return ""
        if each.origin:
            return f"{why}, made from {each.origin}"
        if any("-linux_" in tag for tag in each.tags):
            return f"{why}, made on a machine and not for others"
        return why

    def _replace(
        self,
        wanted: dict[str, str],
        unfit: dict[str, str],
        found: dict[str, Component],
        target: Target,
    ) -> None:
        """Want the wheels of what is installed here in a form that does not fit.

        Args:
            wanted: Requirements of what is to be fetched, by name; more are added.
            unfit: Why what is installed here does not fit, by name.
            found: Loses what is to be fetched.
            target: Where it does not fit.
        """
        for name, why in unfit.items():
            self._reasons[name] = why
            wanted[name] = self._pinned(self._installed[name], why, target)
        for name in wanted:
            found.pop(name, None)
            self._known.pop(name, None)

    def _pinned(self, each: Distribution, why: str, target: Target) -> str:
        if not _is_version(each):
            raise ConfigError(
                f"workers on {target} cannot have {each.name} in the version {each.version!r} that "
                f"is installed here: {why}, and no wheel of it can be looked for, as this is not a "
                f"version as PEP 440 has them. {_REMEDIES}"
            )
        return each.label

    def _without_libraries(self, found: dict[str, Component], target: Target) -> dict[str, str]:
        """Say of what was copied which libraries it needs, and no worker has; by name.

        What a base of one's own has is not known.

        Raises:
            ConfigError: If a project that was built here needs one.
        """
        if self._packages.base:
            return {}
        present = frozenset(name for each in found.values() for name in libraries_of(each))
        unfit = {}
        for name, component in found.items():
            each = self._known.get(name)
            if each is None or not (name in self._built or each is self._installed.get(name)):
                continue
            missing = missing_libraries(component, each.tags, target, present)
            if not missing:
                continue
            why = (
                f"it was compiled here, and needs {' and '.join(missing)}, which no package brings"
            )
            if name in self._built:
                raise ConfigError(
                    f"workers on {target} cannot have {self._built[name]}: {why}. Name an image to "
                    f"build on that has them (base=), or an image of your own (image=)"
                )
            unfit[name] = why
        return unfit

    # What is not here in a form that fits.

    def _fetch_all(self, wanted: dict[str, str], target: Target) -> dict[str, Component]:
        """Fetch what is wanted, and what that requires, until nothing is missing."""
        found: dict[str, Component] = {}
        fetched: dict[str, Distribution] = {}
        tried: set[str] = set()
        while True:
            demands = self._demands(wanted, fetched, target)
            todo = {}
            for name, asked in demands.items():
                have = fetched.get(name) or self._known.get(name)
                if have is not None and all(_meets(have, text) for text, _ in asked):
                    continue
                text = self._choice(name, [text for text, _ in asked], wanted)
                if name in self._known or text in tried:
                    raise self._conflict(have, name, asked, target)
                tried.add(text)
                todo[name] = text
                if len(asked) > 1:
                    self._reasons[name] = _who(asked)
            if not todo:
                break
            for name, each in self._fetch(sorted(todo.values()), target).items():
                component = of_distribution(each, target)
                if why := misfit(component, each.tags, target):
                    raise self._lies(each, why, target)
                found[name] = component
                fetched[name] = each
        for name in fetched.keys() - demands.keys():
            del found[name]  # What required it has been replaced by another version.
        return found

    def _demands(
        self, wanted: dict[str, str], fetched: dict[str, Distribution], target: Target
    ) -> dict[str, list[tuple[str, str]]]:
        """Return what has to be there beside what was copied: by name, the requirements and who has
        each of them."""
        demands = {name: [(text, "")] for name, text in wanted.items()}
        pending = [(name, each) for name, text in wanted.items() for each in ("", *_extras(text))]
        seen: set[tuple[str, str]] = set()
        while pending:
            name, extra = pending.pop()
            by = fetched.get(name) or self._known.get(name)
            # What was copied, and needs without its extras, has been selected.
            if by is None or (name, extra) in seen or not (extra or name in fetched):
                continue
            seen.add((name, extra))
            for need in needs_of(by.requires, target):
                if extra not in need.when:
                    continue
                is_as_here = self._is_as_here(need.name, by)
                known = self._extras_here(need.name, name) if is_as_here else set()
                pending += [(need.name, each) for each in {"", *need.extras} - known]
                if need.name != name and self._is_missed(need.name, name):
                    text = need.name if is_as_here else need.text
                    demands.setdefault(need.name, []).append((text, by.label))
        return demands

    def _is_missed(self, needed: str, by: str) -> bool:
        """Whether something that was fetched has a requirement that is to be met."""
        if needed in self._exclude or needed == "cloudexec":
            self._left_out.add(needed)
            return False
        here = self._installed.get(by) if self._packages.source == "here" else None
        if here is None or needed in self._installed:
            return True
        # What is missing here, too, is missing on purpose.
        return not any(
            need.name == needed and "" in need.when for need in needs_of(here.requires, None)
        )

    def _is_as_here(self, needed: str, by: Distribution) -> bool:
        """Whether two go together because they do here, whatever the metadata says."""
        here = self._installed.get(by.name)
        return (
            self._packages.source == "here"
            and here is not None
            and here.version == by.version
            and needed in self._installed
        )

    def _extras_here(self, needed: str, by: str) -> set[str]:
        """Return the extras that have been selected: what they lack here is missing on purpose.

        Those that only an extra of ``by`` requires have not been selected: such as ``[plot]`` of
        itself, which its extra ``all`` requires.
        """
        needs = needs_of(self._installed[by].requires, None)
        return {
            extra
            for need in needs
            if need.name == needed and "" in need.when
            for extra in need.extras
        }

    def _choice(self, name: str, texts: list[str], wanted: dict[str, str]) -> str:
        """Return the requirement to fetch by: of the version that is here, if that will do."""
        here = self._installed.get(name)
        if here is None or name in wanted or not _is_version(here):
            return merged(texts)
        return here.label if all(_meets(here, text) for text in texts) else merged(texts)

    def _conflict(
        self, have: Distribution | None, name: str, asked: list[tuple[str, str]], target: Target
    ) -> ConfigError:
        chosen = ""
        if have is not None:
            is_here = have is self._installed.get(name)
            chosen = f", and {have.label} is {'installed here' if is_here else 'what was chosen'}"
        texts = [masked(text) for text, by in asked if by]
        example = f", such as extra=[{texts[0]!r}]" if len(texts) == 1 else " (extra=)"
        return ConfigError(
            f"workers on {target} cannot have these packages together: {_who(asked)}{chosen}. Name "
            f"versions that suit each other{example}, or leave one of them out (exclude=)"
        )

    @functools.cached_property
    def _wheelhouse(self) -> str:
        """What differs whenever the wheelhouse has other wheels; empty: there is none."""
        folder = self._packages.wheels
        if folder is None:
            return ""
        whole = hashlib.sha256(str(folder.absolute()).encode())
        for path in sorted(folder.iterdir()):
            whole.update(signature_of(path).encode())
        return whole.hexdigest()

    def _fetch(self, requirements: Sequence[str], target: Target) -> dict[str, Distribution]:
        key = hashlib.sha256(repr((requirements, target, self._wheelhouse)).encode()).hexdigest()
        tree = None if self._is_fresh else self._cache.directory("wheels", key)
        if tree is None:
            try:
                with self._cache.fill("wheels", key, replace=self._is_fresh) as into:
                    self._installer().fetch(requirements, target, into)
            except NoWheelError as exc:
                raise self._nothing(exc.reasons, target) from exc
            tree = self._cache.directory("wheels", key)
            assert tree is not None
        return take_inventory([str(tree)]).distributions

    def _lies(self, each: Distribution, why: str, target: Target) -> ConfigError:
        return self._nothing({each.label: f"its wheel is not what it says: {why}"}, target)

    def _nothing(self, reasons: dict[str, str], target: Target) -> ConfigError:
        lines = []
        for requirement, said in reasons.items():
            (name,) = names_of([requirement])
            here = self._reasons.get(name, "")
            lines.append(f"\n  {requirement}: {said}" + (f" ({here})" if here else ""))
        several = "these packages" if len(lines) > 1 else "a package"
        conda = self._inventory.conda
        hint = ""
        if conda:
            hint = (
                f"\n  In the conda environment {conda}, pip can install the versions that have "
                f"wheels; or build an image from the environment yourself."
            )
        return ConfigError(
            f"workers on {target} cannot have {several}:{''.join(lines)}{hint}\n{_REMEDIES}"
        )

    # Projects and files.

    def _project(self, source: Path, target: Target) -> Component:
        key = hashlib.sha256(
            f"{signature_of(source)} {target.python} {target.machine}".encode()
        ).hexdigest()
        tree = self._cache.directory("projects", key)
        if tree is None:
            with self._cache.fill("projects", key) as into:
                self._installer().build(source, into)
            tree = self._cache.directory("projects", key)
            assert tree is not None
        (each,) = take_inventory([str(tree)]).distributions.values()
        self._known[each.name] = each
        component = of_distribution(each, target, is_own=True)
        if why := misfit(component, each.tags, target):
            raise ConfigError(
                f"workers on {target} cannot have the project {each.name} in {source}: its wheel "
                f"was built here, and {why}. Choose workers of this machine's kind (arch=), or "
                f"have them run an image of your own (image=)"
            )
        self._built[each.name] = f"the project {each.name} in {source}"
        return component

    def _of_file(self, file: Path, target: Target) -> dict[str, Component]:
        said = f"{file} {_digest_of(file)} {target} {self._wheelhouse} {sorted(self._exclude)}"
        key = hashlib.sha256(said.encode()).hexdigest()
        tree = None if self._is_fresh else self._cache.directory("wheels", key)
        if tree is None:
            with self._cache.fill("wheels", key, replace=self._is_fresh) as into:
                self._installer().fetch_file(file, target, into, self._exclude)
                into.mkdir(exist_ok=True)
            tree = self._cache.directory("wheels", key)
            assert tree is not None
        found = {}
        for name, each in take_inventory([str(tree)]).distributions.items():
            if name in self._exclude or name == "cloudexec":
                continue
            if each.source is not None:
                raise ConfigError(
                    f"{file} brings {name} as an editable project, {each.source}, which workers do "
                    f"not have: name its directory in {file} without -e"
                )
            is_own = each.origin.startswith("file:")
            component = of_distribution(each, target, is_own=is_own)
            why = misfit(component, each.tags, target)
            if is_own:
                self._built[name] = f"{each.label}, which {file} takes from this machine"
                if why:
                    raise ConfigError(
                        f"workers on {target} cannot have {self._built[name]}: {why}. Choose "
                        f"workers of this machine's kind (arch=), or have them run an image of "
                        f"your own (image=)"
                    )
            if why:
                raise self._lies(each, why, target)
            found[name] = component
            self._known[name] = each
        project = self._own_project(file)
        if project is not None:
            component = self._project(project, target)
            if component.name not in self._exclude:
                found[component.name] = component
        return found

    def _own_project(self, file: Path) -> Path | None:
        """Return the project of a file, if its wheel is still to be built."""
        project = _project_of(file)
        if project is None or project_name(project) in self._exclude:
            return None
        # What only the wheel says has been read from it, and the wheel is there.
        return None if file.name == "pyproject.toml" and is_dynamic(file) else project


def _module(path: Path) -> str:
    return path.name.partition(".")[0]


def _of_loose(paths: Sequence[Path], target: Target) -> Component:
    for path in paths:
        if why := misfit(of_loose([path], target), frozenset(), target):
            raise ConfigError(
                f"workers on {target} cannot have {path}, which belongs to no package: {why}. "
                f"Leave it out if tasks do not need it (exclude=[{_module(path)!r}]), or have "
                f"workers run an image of your own (image=)"
            )
    return of_loose(paths, target)


def _project_of(file: Path) -> Path | None:
    """Return the directory of the project that a file belongs to, if it is to be built."""
    if file.name not in ("uv.lock", "pyproject.toml"):
        return None
    about = file.with_name("pyproject.toml")
    try:
        is_package = "build-system" in tomllib.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return file.parent if is_package else None


def _digest_of(file: Path) -> str:
    """Return what differs when a file does, or one that it includes."""
    if file.suffix == ".txt":
        whole = hashlib.sha256("\n".join(all_lines_of(file)).encode())
    else:
        try:
            whole = hashlib.sha256(file.read_bytes())
        except OSError as exc:
            raise ConfigError(f"{file} cannot be read: {exc.strerror}") from exc
    for place in places_of(file):
        whole.update(signature_of(place).encode())
    return whole.hexdigest()


def _extras(requirement: str) -> tuple[str, ...]:
    from packaging.requirements import Requirement

    return tuple(canonicalize_name(extra) for extra in Requirement(requirement).extras)


def _for_target(requirements: Sequence[str], target: Target) -> dict[str, list[str]]:
    """Return those whose markers are true there, by name."""
    from packaging.requirements import Requirement

    found: dict[str, list[str]] = {}
    for name, text in zip(names_of(requirements), requirements, strict=True):
        marker = Requirement(text).marker
        if marker is None or marker.evaluate({**target.markers(), "extra": ""}):
            found.setdefault(name, []).append(text)
    return found


def _is_version(each: Distribution) -> bool:
    """Whether its version can be asked for: old tools installed others as well."""
    from packaging.version import InvalidVersion, Version

    try:
        Version(each.version)
    except InvalidVersion:
        return False
    return True


def _meets(have: Distribution, requirement: str) -> bool:
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion

    try:
        return Requirement(requirement).specifier.contains(have.version, prereleases=True)
    except InvalidVersion:
        return True  # An old package: nobody can compare its version.


def _who(asked: Sequence[tuple[str, str]]) -> str:
    """Say who requires what."""
    return " and ".join(
        f"{by} requires {masked(text)}" if by else f"{masked(text)} is asked for"
        for text, by in asked
    )
