"""A pipeline of small stages that are quick and do as they are told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recvirt.model import Profile
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Stage, Work
from recvirt.store import FileRef, Upstream


@dataclass(frozen=True)
class FakeInputs:
    """Some of everything that can be part of a key."""

    text: str
    words: tuple[str, ...]
    upstream: tuple[Upstream, ...]
    files: tuple[FileRef, ...] = ()
    seen_only: str = field(default="", metadata={"key": False})


@dataclass
class FakeStage:
    """Writes its text and what its upstream wrote into ``<name>.txt``; ``act`` runs before."""

    name: str
    needs: tuple[str, ...] = ()
    text: str = "one"
    words: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    revision: int = 1
    act: Callable[[Work], None] = lambda work: None
    built: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def inputs(self, profile: Profile, upstream: Mapping[str, str], context: Context) -> FakeInputs:
        names = tuple(Upstream(name, upstream[name]) for name in self.needs)
        return FakeInputs(self.text, self.words, names, tuple(FileRef.of(path) for path in self.files))

    def build(self, inputs: Any, work: Work) -> None:
        with self.lock:
            self.built += 1
        self.act(work)
        above = [(work.upstream_dirs[name] / f"{name}.txt").read_text() for name in self.needs]
        (work.out / f"{self.name}.txt").write_text("".join([*above, inputs.text]))


def diamond() -> dict[str, FakeStage]:
    """base -> left and right -> top."""
    stages = [
        FakeStage("base"),
        FakeStage("left", ("base",)),
        FakeStage("right", ("base",)),
        FakeStage("top", ("left", "right")),
    ]
    return {stage.name: stage for stage in stages}


def as_stages(stages: Mapping[str, FakeStage]) -> tuple[Stage, ...]:
    return tuple(stages.values())


def fake_context(cache_dir: Path) -> Context:
    """A context without a tools root: fake stages need none."""
    return Context(tools=ToolsRoot(Path("/nonexistent")), cache_dir=cache_dir)
