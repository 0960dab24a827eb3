"""What the tests with booted images share: the tools root and a built image.

The image is ``$RECVIRT_TEST_IMAGE``, else ``build/default/disk.qcow2``; its profile ``$RECVIRT_TEST_PROFILE``, else the
one that image.json names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from recvirt.cli import App, default_cache_dir
from recvirt.cli.vm import for_vmx
from recvirt.model import Profile
from recvirt.profile import load_profile
from recvirt.sandbox import ToolsRoot
from recvirt.store import Store
from recvirt.toolsroot import ensure_tools

#: Read once: the tests themselves run without the person's settings.
_CACHE_DIR = Path(os.environ.get("RECVIRT_CACHE_DIR") or default_cache_dir())
_TOOLS_DIR = os.environ.get("RECVIRT_TOOLS_ROOT", "")
_IMAGE = Path(os.environ.get("RECVIRT_TEST_IMAGE", "build/default/disk.qcow2"))
_PROFILE = os.environ.get("RECVIRT_TEST_PROFILE", "")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "few: a handful of spoilt images that one boot rejects; quick enough for CI")


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """The person's own cache, for other tools roots."""
    return _CACHE_DIR.absolute()


@pytest.fixture(scope="session")
def tools(cache_dir: Path) -> ToolsRoot:
    """The ordinary tools root."""
    return ToolsRoot(Path(_TOOLS_DIR)) if _TOOLS_DIR else ensure_tools(Store(cache_dir))


@pytest.fixture(scope="session")
def image() -> Path:
    """A built image with its image.json."""
    path = _IMAGE.absolute()
    if not path.exists():
        pytest.fail(f"{path} does not exist: build it (recvirt build), or set RECVIRT_TEST_IMAGE")
    return path


@pytest.fixture(scope="session")
def profile(image: Path) -> Profile:
    """The profile that the image was built from."""
    name = _PROFILE or str(json.loads((image.parent / "image.json").read_text())["profile"])
    return load_profile(name).model


@pytest.fixture(scope="session")
def intel_side(profile: Profile, cache_dir: Path) -> tuple[dict[str, ToolsRoot], dict[str, Path]]:
    """Bochs, and the packages that the image's kernel and nested check came in."""
    return for_vmx(App(cache_dir=cache_dir), profile)
