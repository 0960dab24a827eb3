"""``libvirt``: a volume of a storage pool, here or over SSH, by virsh(1).

A volume has no tags: its name carries the digest, and its content is read back. VMs get overlays on it.
"""

from __future__ import annotations

import hashlib
import re
import threading
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from recvirt.errors import CommandError, PublishError, VerificationError
from recvirt.publish.plan import Step
from recvirt.publish.provider import Job, Provider, Published, Remote, TargetConfig, Word
from recvirt.publish.transfer import Progress
from recvirt.run import run, start, stop

_NAME = re.compile(r"^recvirt-(?P<profile>.+)-(?P<digest>[0-9a-f]{12})\.(qcow2|raw)$")
#: What moves a whole image may take this much longer than one answer.
_TRANSFER_FACTOR = 120
_LATER = "is libvirtd running there, and may you use it? virsh -c URI pool-list tells"


class LibvirtConfig(TargetConfig):
    """Which libvirt and pool."""

    uri: str = Field(
        default="qemu:///system", pattern=r"^[a-z+]+://[A-Za-z0-9@:._-]*/[A-Za-z0-9/._?=&-]*$",
        description="as `qemu:///system` or `qemu+ssh://host/system`",
    )  # fmt: skip
    pool: Word = Field(default="default", description="the storage pool")


class Libvirt(Provider):
    """One pool."""

    name = "libvirt"
    config_model = LibvirtConfig

    def __init__(self, config: TargetConfig, job: Job) -> None:
        super().__init__(config, job)
        assert isinstance(config, LibvirtConfig)
        self.config = config

    def check(self) -> None:
        """A pool takes anything; QEMU starts qcow2 and raw."""
        if self.job.image.format not in ("qcow2", "raw"):
            raise PublishError(f"{self.job.target}: QEMU starts qcow2 and raw, not {self.job.image.format}")

    def _virsh(self, *words: str, seconds: float | None = None) -> str:
        argv = ["virsh", "--quiet", "--connect", self.config.uri, *words]
        try:
            return run(argv, timeout_seconds=seconds or self.timeout).stdout
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
        return (Step("upload", what, self.job.image.file_bytes, note="as it is"),)

    def publish(self) -> Published:
        """See :class:`Provider`."""
        image, sent = self.job.image, 0
        if not (self._is_as_long() and self._read_back() == image.sha256):
            sent = image.file_bytes
            self._send()
            if self._read_back() != image.sha256:
                raise VerificationError(
                    f"the volume {self._volume} is not what was sent", hint="delete it (virsh vol-delete), try again"
                )
        path = self._virsh("vol-path", "--pool", self.config.pool, self._volume).strip()
        ids = {"pool": self.config.pool, "volume": self._volume, "path": path}
        return Published(ids, "read back, SHA-256 equal", locations=(self.config.uri,), sent_bytes=sent)

    def _send(self) -> None:
        image, pool = self.job.image, self.config.pool
        if self._volume in self._volumes():
            # A killed run's; a longer file would keep its end.
            self._virsh("vol-delete", "--pool", pool, self._volume)
        size, kind = str(image.virtual_bytes), image.format
        self._virsh("vol-create-as", pool, self._volume, size, "--format", kind, "--allocation", "0")
        words = ["vol-upload", "--pool", pool, self._volume, str(image.path)]
        if image.format == "raw":
            words.append("--sparse")
        self._virsh(*words, seconds=self.timeout * _TRANSFER_FACTOR)
        Progress(f"send {self._volume}", image.file_bytes).add(image.file_bytes)
        self._virsh("pool-refresh", pool)

    def _read_back(self) -> str:
        words = ["vol-download", "--pool", self.config.pool, self._volume, "/dev/stdout"]
        process = start(["virsh", "--quiet", "--connect", self.config.uri, *words], stderr=None)
        timer = threading.Timer(self.timeout * _TRANSFER_FACTOR, stop, (process,))
        digest = hashlib.sha256()
        try:
            timer.start()
            assert process.stdout is not None
            while data := process.stdout.read(1 << 20):
                digest.update(data)
            if process.wait() != 0:
                raise PublishError(f"the volume {self._volume} can't be read back", hint=_LATER)
        finally:
            timer.cancel()
            stop(process)
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
