"""What all tests share: nothing of the person who runs them (proxy, cache, home) may leak into a test."""

from __future__ import annotations

import pytest
from hypothesis import settings

from recvirt.ui import reporter

# A busy machine is no fault of the code.
settings.register_profile("recvirt", deadline=None)
settings.load_profile("recvirt")

_LEAKING = ("RECVIRT_CACHE_DIR", "RECVIRT_BUILD_DIR", "XDG_CACHE_HOME", "GITHUB_ACTIONS", "MAKEFLAGS", "MFLAGS", "YES")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _LEAKING:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _same_reporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test does to the one reporter ends with it."""
    for name in ("mode", "stream", "verbose", "quiet"):
        monkeypatch.setattr(reporter, name, getattr(reporter, name))
