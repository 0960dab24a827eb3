"""What a check can say, and what a whole run found. Plain data; :mod:`recvirt.accept.reports` writes it down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from recvirt.errors import RecvirtError

#: ``not-run`` is a check whose guest never came up: it counts as a failure. ``skipped`` does not apply, and says why.
Outcome = Literal["passed", "failed", "not-run", "skipped"]
BAD: tuple[Outcome, ...] = ("failed", "not-run")


class Failed(RecvirtError):  # noqa: N818 - it reads as a verdict
    """A check found that the image does not keep a promise."""


class Skipped(RecvirtError):  # noqa: N818
    """A check does not apply here; the message says why. Never used for something that went wrong."""


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check. ``seconds`` is wall time; ``detail`` is for people."""

    name: str
    scene: str
    title: str
    outcome: Outcome
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class ImageFacts:
    """Which image was tested."""

    path: str
    sha256: str
    format: str
    bytes: int
    virtual_bytes: int


@dataclass(frozen=True)
class Report:
    """Everything a run found. ``measures`` are figures that no check judges: boot time, memory in use."""

    profile: str
    image: ImageFacts
    accelerator: str
    accelerator_reason: str
    qemu_version: str
    started: str
    seconds: float
    results: tuple[CheckResult, ...]
    measures: Mapping[str, Any] = field(default_factory=dict)
    consoles: Mapping[str, str] = field(default_factory=dict)

    @property
    def bad(self) -> tuple[CheckResult, ...]:
        """What failed or could not be run."""
        return tuple(result for result in self.results if result.outcome in BAD)

    @property
    def ok(self) -> bool:
        """Whether the image proved itself: at least one check passed and none failed."""
        return not self.bad and any(result.outcome == "passed" for result in self.results)

    def count(self, outcome: Outcome) -> int:
        """How many checks ended so."""
        return sum(result.outcome == outcome for result in self.results)

    def as_json(self) -> dict[str, Any]:
        """For report.json. The console logs stay in files of their own; their names are listed."""
        data = asdict(self)
        data["consoles"] = sorted(self.consoles)
        counts = {name: self.count(name) for name in ("passed", "failed", "not-run", "skipped")}
        whole = {"schema": 1, "ok": self.ok, "counts": counts, **data}
        # As it will be read back: tuples are lists there.
        return {**whole, "seal": seal_of(json.loads(json.dumps(whole)))}


def seal_of(data: Mapping[str, Any]) -> str:
    """The SHA-256 of a report without its seal. It shows damage and careless edits; it is no signature."""
    rest = {name: value for name, value in data.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
