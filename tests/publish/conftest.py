"""One small image for all tests that only read it; folders of its own for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.publish.support import Place, make_image
from tests.publish.tls import make_authority


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An accepted qcow2. Nobody writes to it."""
    return make_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority that nobody knows; see :func:`tests.publish.tls.make_authority`."""
    return make_authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """State and receipts of one test; no home, so that nobody's credentials are found."""
    for name in ("HOME", "XDG_RUNTIME_DIR", "DOCKER_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("RECVIRT_STATE_DIR", "OS_CLOUD", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)
