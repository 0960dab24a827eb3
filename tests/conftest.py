"""What all tests share: nothing of the person who runs them (proxy, cache, home) may leak into a test."""

from __future__ import annotations

import pytest

_LEAKING = ("RECVIRT_CACHE_DIR", "RECVIRT_BUILD_DIR", "XDG_CACHE_HOME", "GITHUB_ACTIONS")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _LEAKING:
        monkeypatch.delenv(name, raising=False)
