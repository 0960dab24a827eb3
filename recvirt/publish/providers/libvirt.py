"""``libvirt``: a volume of a storage pool, here or over SSH, by virsh(1).

A volume has no tags: its name carries the digest, and its content is read back. VMs get overlays on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from recvirt.errors import CommandError, PublishError, VerificationError
from recvirt.publish.plan import Step
from recvirt.publish.provider import Provider, Published, Remote, TargetConfig, Word
from recvirt.publish.transfer import Progress
from recvirt.run import run, start, stop
from recvirt.ui import format_bytes, reporter

_NAME = re.compile(r"^recvirt-(?P<profile>.+)-(?P<digest>[0-9a-f]{12})\.(qcow2|raw)$")
#: What moves a whole image may take this much longer than one answer.
_TRANSFER_FACTOR = 120
_STEP = 1 << 20
#: No header of a new qcow2 is longer: its tables for 64 TiB take 1 MiB.
_HEADER_MAX = 4 << 20
_LATER = "is libvirtd running there, and may you use it? virsh -c URI pool-list tells"


class LibvirtConfig(TargetConfig):
    """Which libvirt and pool."""

    uri: str = Field(
        default="qemu:///system", pattern=r"^[a-z+]+://[A-Za-z0-9@:._-]*/[A-Za-z0-9/._?=&-]*$",
        description="as `qemu:///system` or `qemu+ssh://host/system`",
    )  # fmt: skip
    pool: Word = Field(default="default", description="the storage pool")


class Libvirt(Provider[LibvirtConfig]):
    """One pool."""

    name = "libvirt"
    config_model = LibvirtConfig

    def check(self) -> None:
        """A pool takes anything; QEMU starts qcow2 and raw."""
        if self.job.image.format not in ("qcow2", "raw"):
            raise PublishError(f"{self.job.target}: QEMU starts qcow2 and raw, not {self.job.image.format}")

    def _virsh(self, *words: str, seconds: float | None = None) -> str:
        argv = ["virsh", "--quiet", "--connect", self.config.uri, *words]
        try:
            return run(argv, timeout_seconds=seconds or self.config.timeout).stdout
        except CommandError as error:
            said = " ".join(line.removeprefix("error: ").strip() for line in error.last_lines) or error.message
            raise PublishError(f"libvirt at {self.config.uri}: {said}", hint=_LATER) from None

    @property
    def _volume(self) -> str:
        return f"{self.job.image.name}.{self.job.image.format}"

    def _volumes(self) -> list[str]:
        listed = self._virsh("vol-list", "--pool", self.config.pool)
        return [line.split()[0] for line in listed.splitlines() if line.split()]

    def _described(self, volume: str) -> ET.Element:
        text = self._virsh("vol-dumpxml", "--pool", self.config.pool, volume)
        return ET.fromstring(text)  # noqa: S314 (libvirt's own words)

    def _is_as_long(self) -> bool:
        """Whether the volume is there with the image's length; what it holds is read back when it counts."""
        if self._volume not in self._volumes():
            return False
        return int(self._described(self._volume).findtext("physical") or 0) == self.job.image.file_bytes

    def plan(self) -> tuple[Step, ...]:
        """See :class:`Provider`."""
        what = f"volume {self._volume} in pool {self.config.pool}"
        if self._is_as_long():
            return (Step("exists", what),)
        there = self._left_behind()
        note = f"as it is, from {format_bytes(there)} on" if there else "as it is"
        return (Step("upload", what, self.job.image.file_bytes - there, note=note),)

    def publish(self) -> Published:
        """See :class:`Provider`."""
        image, sent = self.job.image, 0
        if not (self._is_as_long() and self._read_back() == image.sha256):
            there = self._left_behind()
            sent = self._go_on(there) if there else self._send()
            if there and self._read_back() != image.sha256:
                reporter.info(f"what was there of {self._volume} is not the image's; it is sent anew")
                sent += self._send()
            if self._read_back() != image.sha256:
                raise VerificationError(
                    f"the volume {self._volume} is not what was sent", hint="delete it (virsh vol-delete), try again"
                )
        path = self._virsh("vol-path", "--pool", self.config.pool, self._volume).strip()
        ids = {"pool": self.config.pool, "volume": self._volume, "path": path}
        return Published(ids, "read back, SHA-256 equal", locations=(self.config.uri,), sent_bytes=sent)

    def _left_behind(self) -> int:
        """From where on a killed run's volume can be gone on with; 0: not at all.

        A new qcow2 volume has a small header of libvirt's, which the first bytes replace. A raw one has its full length
        from the start, and says nothing.
        """
        if self.job.image.format != "qcow2" or self._volume not in self._volumes():
            return 0
        length = int(self._described(self._volume).findtext("physical") or 0)
        whole = length // _STEP * _STEP
        return whole if whole > _HEADER_MAX and length < self.job.image.file_bytes else 0

    def _send(self) -> int:
        image, pool = self.job.image, self.config.pool
        if self._volume in self._volumes():
            # A killed run's, or a spoilt one; a longer file would keep its end.
            self._virsh("vol-delete", "--pool", pool, self._volume)
        size, kind = str(image.virtual_bytes), image.format
        self._virsh("vol-create-as", pool, self._volume, size, "--format", kind, "--allocation", "0")
        if kind == "qcow2":
            return self._go_on(0)
        words = ["vol-upload", "--pool", pool, self._volume, str(image.path), "--sparse"]
        self._virsh(*words, seconds=self.config.timeout * _TRANSFER_FACTOR)
        Progress(f"send {self._volume}", image.file_bytes).add(image.file_bytes)
        self._virsh("pool-refresh", pool)
        return image.file_bytes

    def _go_on(self, offset: int) -> int:
        """Send the file from ``offset`` on; how many bytes that were. virsh's own offset is the volume's alone."""
        image, pool = self.job.image, self.config.pool
        left = image.file_bytes - offset
        progress = Progress(f"send {self._volume}", image.file_bytes)
        progress.restart(offset)
        words = ["vol-upload", "--pool", pool, self._volume, "/dev/stdin", "--offset", str(offset)]
        process = self._started([*words, "--length", str(left)], stdin=subprocess.PIPE)
        with self._limited(process), image.path.open("rb") as stream:
            assert process.stdin is not None
            assert process.stdout is not None
            stream.seek(offset)
            with contextlib.suppress(BrokenPipeError):  # its last words tell why
                while data := stream.read(_STEP):
                    process.stdin.write(data)
                    progress.add(len(data))
                process.stdin.close()
            said = process.stdout.read().decode(errors="replace").strip().removeprefix("error: ")
            if process.wait() != 0:
                raise PublishError(f"libvirt at {self.config.uri}: {said or 'no answer in time'}", hint=_LATER)
        self._virsh("pool-refresh", pool)
        return left

    def _started(
        self, words: list[str], *, stdin: int = subprocess.DEVNULL, stderr: int | None = subprocess.STDOUT
    ) -> subprocess.Popen[bytes]:
        return start(["virsh", "--quiet", "--connect", self.config.uri, *words], stdin=stdin, stderr=stderr)

    @contextmanager
    def _limited(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Ends a transfer that takes too long, and whatever is left of it."""
        timer = threading.Timer(self.config.timeout * _TRANSFER_FACTOR, stop, (process,))
        try:
            timer.start()
            yield
        finally:
            timer.cancel()
            stop(process)

    def _read_back(self) -> str:
        words = ["vol-download", "--pool", self.config.pool, self._volume, "/dev/stdout"]
        process = self._started(words, stderr=None)
        digest = hashlib.sha256()
        with self._limited(process):
            assert process.stdout is not None
            while data := process.stdout.read(_STEP):
                digest.update(data)
            if process.wait() != 0:
                raise PublishError(f"the volume {self._volume} can't be read back", hint=_LATER)
        return digest.hexdigest()

    # --- pruning

    def remotes(self) -> list[Remote]:
        """See :class:`Provider`."""
        volumes = {name: self._described(name) for name in self._volumes()}
        used = {node.findtext("backingStore/path") for node in volumes.values()} | self._paths_of_domains()
        found = []
        for name, node in volumes.items():
            match = _NAME.match(name)
            if match is None:
                continue
            seconds = float(node.findtext("target/timestamps/mtime") or 0)
            when, in_use = datetime.fromtimestamp(seconds, UTC), node.findtext("target/path") in used
            found.append(Remote(name, name, match["digest"], match["profile"], when, in_use=in_use))
        return found

    def _paths_of_domains(self) -> set[str | None]:
        paths: set[str | None] = set()
        for domain in self._virsh("list", "--all", "--name").split():
            text = self._virsh("dumpxml", domain)
            for node in ET.fromstring(text).iterfind(".//disk//source"):  # noqa: S314 (libvirt's own words)
                paths.add(node.get("file") or node.get("volume"))
        return paths

    def delete(self, remote: Remote) -> None:
        """See :class:`Provider`."""
        try:
            self._virsh("vol-delete", "--pool", self.config.pool, remote.identity)
        except PublishError:
            if remote.identity in self._volumes():
                raise

    def recipe(self, published: Published) -> dict[str, Any]:
        """See :class:`Provider`."""
        return {**published.ids, "uri": self.config.uri}


PROVIDER = Libvirt
