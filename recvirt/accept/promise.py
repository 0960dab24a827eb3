"""What an image promises, gathered from its profile and from the files that were built beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recvirt.accept.context import Promises
from recvirt.data import package_list_path
from recvirt.model import Profile
from recvirt.rootfs.lists import read_lists
from recvirt.rootfs.selection import ALWAYS

#: Names below ``build/<profile>/``.
IMAGE_FACTS = "image.json"
KERNEL_CONFIG = "kernel_config-config"


def promises_of(profile: Profile, folder: Path) -> Promises:
    """``folder`` is where the image lies; what is not beside it is not promised. ConfigError for a faulty list."""
    paths = [package_list_path(name) for name in profile.root.package_lists]
    packages = set(read_lists(paths, profile.root.suite)) | set(profile.root.packages) | set(ALWAYS)
    facts = _read_json(folder / IMAGE_FACTS)
    config = folder / KERNEL_CONFIG
    return Promises(
        packages=tuple(sorted(packages)),
        kernel_config=config.read_text() if config.is_file() else None,
        facts=facts,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
