"""The image that is published: which file, which disk, and whether it proved what its profile promises."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recvirt.errors import RecvirtError, VerificationError
from recvirt.imagefile.container import Container, identify
from recvirt.publish.accepted import Acceptance
from recvirt.publish.reader import DiskReader, data_blocks, open_disk
from recvirt.store import sha256_of

#: As many digits of a digest as names carry: enough to tell images apart, short enough for every provider.
SHORT = 12


@dataclass(frozen=True)
class Source:
    """An image file, by its digest."""

    path: Path
    format: str
    sha256: str
    file_bytes: int
    virtual_bytes: int
    profile: str
    kernel: str
    suite: str
    created: str
    acceptance: Acceptance | None
    stamp: tuple[int, int, int]

    @property
    def short(self) -> str:
        """The digest's beginning, as in names."""
        return self.sha256[:SHORT]

    @property
    def name(self) -> str:
        """What the image is called everywhere: product, profile and digest; letters, digits and hyphens only."""
        profile = "".join(c if c.isalnum() else "-" for c in self.profile)
        return f"recvirt-{profile[:40]}-{self.short}"

    @contextmanager
    def disk(self) -> Iterator[DiskReader]:
        """The disk inside, for reading."""
        reader = open_disk(Container(self.path, self.format, self.virtual_bytes))
        try:
            yield reader
        finally:
            reader.close()

    def blocks(self, block_bytes: int) -> list[int]:
        """The numbers of the blocks that hold something else than zeros."""
        with self.disk() as reader:
            return data_blocks(reader, block_bytes)

    def check_unchanged(self) -> None:
        """VerificationError when the file was written to since it was hashed."""
        if _stamp(self.path) != self.stamp:
            raise VerificationError(
                f"{self.path} was changed while it was published", hint="publish it again when its build has ended"
            )


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def load_source(path: Path, judge: Callable[[str, str], Acceptance | None]) -> Source:
    """Hash an image file and look at what lies beside it. ``judge(sha256, profile)`` says what it proved, or raises."""
    path = path.absolute()
    container = identify(path)
    stamp = _stamp(path)
    digest = sha256_of(path)
    facts = _facts_beside(path)
    if _stamp(path) != stamp:
        raise VerificationError(f"{path} was changed while it was read", hint="publish it when its build has ended")
    if container.format == "ova":
        raise VerificationError(
            f"{path} is an OVA: no provider here takes one", hint="publish the qcow2 or raw of the same build"
        )
    profile = str(facts.get("profile") or path.parent.name)
    kernel = facts.get("kernel")
    return Source(
        path=path, format=container.format, sha256=digest, file_bytes=stamp[1], virtual_bytes=container.virtual_bytes,
        profile=profile, kernel=str(kernel.get("release", "")) if isinstance(kernel, dict) else "",
        suite=str(facts.get("suite", "")), created=_created(facts, path), acceptance=judge(digest, profile),
        stamp=stamp,
    )  # fmt: skip


def _facts_beside(path: Path) -> dict[str, Any]:
    try:
        data = json.loads((path.parent / "image.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict):
        raise RecvirtError(f"{path.parent / 'image.json'} holds no facts about an image", hint="build the image again")
    return data


def _created(facts: dict[str, Any], path: Path) -> str:
    """When the image's content is from: its clock if it is known, so that the same bytes give the same time."""
    epoch = facts.get("epoch")
    seconds = epoch if isinstance(epoch, int) else int(path.stat().st_mtime)
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
