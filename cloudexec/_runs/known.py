"""What the bucket knows of the jobs of a run, for places that forget jobs which have ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from cloudexec._errors import ConfigError

__all__ = ["JobCost", "Known", "KnownEnd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCost:
    """What one job of a run has cost."""

    usd: float
    seconds: float
    """For which it ran."""
    is_own: bool
    """Whether it was a machine of the run, and not a worker of an executor in it."""
    has_ended: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownEnd:
    """How the last machine of a run ended, as somebody has seen it while its place knew it."""

    created_at: datetime
    started_at: datetime | None = None
    stopped_at: datetime | None = None
    exit_code: int | None = None
    reason: str = ""
    was_stopped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is written of the jobs of one start of a run."""

    job_id: str = ""
    """Which job runs the program; empty: that is not written."""
    attempts: Sequence[str] = ()
    """Jobs that have run it, in order, where each attempt is a job of its own."""
    costs: Mapping[str, JobCost] = field(default_factory=dict)
    """Of jobs that their place may have forgotten, by their ids."""
    end: KnownEnd | None = None

    def begun_by(self, job_id: str) -> Known:
        """Return this after another attempt has begun."""
        attempts = [each for each in self.attempts if each != job_id]
        return replace(self, job_id=job_id, attempts=(*attempts, job_id))

    def to_json(self) -> bytes:
        """Return what the bucket keeps."""
        values: dict[str, Any] = {"job_id": self.job_id}
        if self.attempts:
            values["attempts"] = list(self.attempts)
        if self.costs:
            values["costs"] = {key: asdict(each) for key, each in self.costs.items()}
        if self.end is not None:
            values["end"] = {
                key: value.isoformat() if isinstance(value, datetime) else value
                for key, value in asdict(self.end).items()
            }
        return json.dumps(values).encode()

    @classmethod
    def from_json(cls, data: bytes | None) -> Known:
        """Read what the bucket has; nothing: nothing is known.

        Raises:
            ConfigError: If that cannot be read.
        """
        if data is None:
            return cls()
        try:
            values = json.loads(data)
            end = values.get("end")
            return cls(
                job_id=str(values["job_id"]),
                attempts=tuple(map(str, values.get("attempts", ()))),
                costs={key: JobCost(**each) for key, each in values.get("costs", {}).items()},
                end=None if end is None else _end(end),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ConfigError(
                f"what the bucket has of the jobs of a run cannot be read: {exc}"
            ) from exc


def _end(values: Mapping[str, Any]) -> KnownEnd:
    times = {
        key: datetime.fromisoformat(values[key])
        for key in ("created_at", "started_at", "stopped_at")
        if values.get(key)
    }
    return KnownEnd(
        **times,
        exit_code=values.get("exit_code"),
        reason=str(values.get("reason", "")),
        was_stopped=bool(values.get("was_stopped")),
    )
