"""What a stage is, and the little that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from recvirt.sandbox import ToolsRoot


@dataclass(frozen=True)
class Context:
    """What the host offers to a stage besides its inputs. Nothing here may change what is built."""

    tools: ToolsRoot
    cache_dir: Path  # for caches that are shared between keys: downloaded packages, ccache
    jobs: int = 1
    offline: bool = False


@dataclass(frozen=True)
class Work:
    """Where one build of a stage happens. ``out`` becomes the output; ``scratch`` is thrown away; ``log`` is kept."""

    out: Path
    scratch: Path
    log: Path
    context: Context
    upstream_dirs: Mapping[str, Path] = field(default_factory=dict)  # stage name -> folder of its whole output


class Stage(Protocol):
    """A step of the pipeline. ``build`` reads nothing but ``inputs`` and the outputs that these name."""

    name: str
    revision: int
    needs: tuple[str, ...]

    def inputs(self, profile: Any, upstream: Mapping[str, str], context: Context) -> Any:
        """Frozen inputs for a resolved profile; ``upstream`` maps a needed stage to its key. Must be cheap and pure
        but for reading the files and the archive state that it names."""
        ...

    def build(self, inputs: Any, work: Work) -> None:
        """Write the outputs into ``work.out``."""
        ...
