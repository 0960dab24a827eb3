"""Overlays on an image, and what ``qemu-img`` says about one. The image itself is never opened for writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recvirt.sandbox import ToolsRoot


def overlay_argv(image: Path, image_format: str, overlay: Path, size_bytes: int | None = None) -> list[str]:
    """Make ``overlay`` (qcow2) on top of ``image``; larger than it when ``size_bytes`` says so."""
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", image_format, str(overlay)]
    return [*words, str(size_bytes)] if size_bytes else words


def make_overlay(
    tools: ToolsRoot, image: Path, overlay: Path, *, image_format: str = "qcow2", size_bytes: int | None = None
) -> Path:
    """A fresh overlay; an older file of that name is replaced."""
    overlay.unlink(missing_ok=True)
    argv = overlay_argv(image, image_format, overlay, size_bytes)
    tools.run(argv, readable=[image], writable=[overlay.parent])
    return overlay


def image_info(tools: ToolsRoot, image: Path) -> dict[str, Any]:
    """``qemu-img info`` of one file: ``format``, ``virtual-size`` in bytes, ``backing-filename`` ..."""
    done = tools.run(["qemu-img", "info", "--output=json", str(image)], readable=[image])
    info: dict[str, Any] = json.loads(done.stdout)
    return info


def check_image(tools: ToolsRoot, image: Path) -> dict[str, Any]:
    """``qemu-img check``: errors and leaks found. Status 3 means leaked clusters, 2 damage (qemu-img(1))."""
    done = tools.run(["qemu-img", "check", "--output=json", str(image)], readable=[image], ok_statuses=(0, 2, 3, 63))
    result: dict[str, Any] = json.loads(done.stdout) if done.status != 63 else {"check-errors": 0}
    return result
