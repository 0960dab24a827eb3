"""What all scenes of a run share: the image, what its profile promises, the tools, and what was found so far."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recvirt.accept.results import CheckResult, ImageFacts
from recvirt.model import Profile, parse_size
from recvirt.qemu import Accelerator
from recvirt.sandbox import ToolsRoot
from recvirt.ui import format_seconds, reporter

#: The login of a test guest, made by its NoCloud data; it has no password and sudo.
TEST_USER = "rvtest"
_LOAD_FACTOR_MAX = 4.0


@dataclass(frozen=True)
class Options:
    """What a person asked for."""

    deep: bool = False
    kernels: bool = False
    matrix: bool = False
    vmx: bool = False
    workers: bool = False
    upgrade: bool = False
    checks: tuple[str, ...] = ()
    parallel: int = 0  # boots at once; 0: as many as cores and memory allow

    @property
    def scenes(self) -> tuple[str, ...]:
        """The optional scenes that are wanted."""
        return tuple(name for name in ("deep", "kernels", "matrix", "vmx", "workers", "upgrade") if getattr(self, name))


@dataclass(frozen=True)
class Promises:
    """What the image should hold besides what the profile itself says.

    ``packages`` are names; ``kernel_config`` is the resolved configuration, or None if it is not known;
    ``facts`` is image.json.
    """

    packages: tuple[str, ...] = ()
    kernel_config: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Acceptance:
    """One run. ``found`` holds what a scene hands to a later comparison, below the scene's name."""

    image: Path
    image_facts: ImageFacts
    profile: Profile
    promises: Promises
    tools: ToolsRoot
    accelerator: Accelerator
    work_dir: Path
    key: Path
    options: Options = field(default_factory=Options)
    extra_tools: dict[str, ToolsRoot] = field(default_factory=dict)
    debs: dict[str, Path] = field(default_factory=dict)
    worker_image: Path | None = None
    older_disk: Path | None = None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    results: list[CheckResult] = field(default_factory=list)
    qemu_version: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def public_key(self) -> str:
        """The throwaway key of this run."""
        return self.key.with_name(f"{self.key.name}.pub").read_text().strip()

    @property
    def memory_bytes(self) -> int:
        """Memory of a test guest."""
        return parse_size(self.profile.accept.memory)

    def patience(self, seconds: float) -> float:
        """``seconds`` on a quiet machine with KVM, scaled for emulation and for what else runs here."""
        load = os.getloadavg()[0] / max(1, len(os.sched_getaffinity(0)))
        return seconds * self.accelerator.time_factor * min(_LOAD_FACTOR_MAX, max(1.0, load))

    def record(self, result: CheckResult) -> None:
        """Keep a result and tell it."""
        with self._lock:
            self.results.append(result)
        if result.outcome == "passed":
            reporter.info(f"ok      {result.name} ({format_seconds(result.seconds)}): {_first_line(result.detail)}")
        elif result.outcome == "skipped":
            reporter.info(f"skipped {result.name}: {_first_line(result.detail)}")
        else:
            reporter.info(f"FAILED  {result.name} ({format_seconds(result.seconds)})\n{_indented(result.detail)}")

    def measure(self, name: str, value: Any) -> None:
        """Keep a figure for the report."""
        with self._lock:
            self.measures[name] = value

    def add(self, name: str, number: int) -> None:
        """Add to a figure for the report."""
        with self._lock:
            self.measures[name] = self.measures.get(name, 0) + number


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""


def _indented(text: str) -> str:
    return "\n".join(f"        {line}" for line in text.splitlines())
