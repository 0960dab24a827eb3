"""A mount namespace for tests that need a disk of limited size, or one that can only be read."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


class Namespace:
    """A mount namespace with file systems of its own, in which recvirt runs. It ends with the test."""

    def __init__(self, script: str, *words: str) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root can mount a file system of limited size")
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-euc", f"{script}; echo ready; exec sleep 3600",
             "sh", *words],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "ready\n"

    @property
    def prefix(self) -> list[str]:
        return ["nsenter", f"--target={self.holder.pid}", "--mount", "--"]

    def path(self, path: Path) -> Path:
        """Where a path of the namespace is seen from outside."""
        return Path(f"/proc/{self.holder.pid}/root{path}")

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.holder.kill()
        self.holder.wait()
