"""Fixtures of the stage tests: the tools root, and contexts with caches of their own.

The tools root comes from ``$RECVIRT_TOOLS_ROOT`` (a folder with ``rootfs`` and ``packages.json``) when set, else from
the ordinary cache, where it is made once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from recvirt.cli import default_cache_dir
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Work
from recvirt.store import Store
from recvirt.toolsroot import ensure_tools

#: Read once: the tests themselves run without the person's settings.
_CACHE_DIR = Path(os.environ.get("RECVIRT_CACHE_DIR") or default_cache_dir())
_TOOLS_DIR = os.environ.get("RECVIRT_TOOLS_ROOT", "")


@pytest.fixture(scope="session")
def tools() -> ToolsRoot:
    """The ordinary tools root."""
    return ToolsRoot(Path(_TOOLS_DIR)) if _TOOLS_DIR else ensure_tools(Store(_CACHE_DIR.absolute()))


@pytest.fixture(scope="session")
def shared_cache() -> Path:
    """The person's own cache: for downloads that are expensive and verified anyway."""
    return _CACHE_DIR.absolute()


@pytest.fixture
def context(tools: ToolsRoot, tmp_path: Path) -> Context:
    """A context with an empty cache."""
    return Context(tools=tools, cache_dir=tmp_path / "cache", jobs=len(os.sched_getaffinity(0)))


@pytest.fixture
def make_work(context: Context, tmp_path: Path) -> Callable[..., Work]:
    """``make_work(stage=folder, ...)``: an empty work folder for one build of a stage, with its upstream outputs."""

    def make(**upstream_dirs: Path) -> Work:
        base = tmp_path / "work"
        for name in ("out", "scratch"):
            (base / name).mkdir(parents=True)
        return Work(base / "out", base / "scratch", base / "log", context, upstream_dirs)

    return make
