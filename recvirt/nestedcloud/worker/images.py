"""Files of the image catalogue: fetched or uploaded, looked at, and written anew, so that nothing but the content of
the disk is left of what a stranger sent.

What is fetched is copied to a file of our own before it is looked at: nobody can change it between the look and the
use. ``QemuImages`` works with qemu-img; ``SparseImages`` stands beside libvirt's test driver.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from recvirt.nestedcloud import bundled, spool
from recvirt.nestedcloud.model import MIB, Fault, ImageSpec, InstanceSpec
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.fetch import copy, fetch
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.qcow2 import read_header
from recvirt.nestedcloud.worker.storage import DISK_MODE, Limits, check_room, run_tool, storage_error, whole_file

#: Room for qcow2's own tables in a file: one part in 64 and a little is several times what they take.
_TABLES_PART, _TABLES_BYTES = 64, 64 * MIB
#: qemu-img(1), check: no errors, or clusters that nobody uses.
_CHECK_GOOD = (0, 3)

Facts = dict[str, Any]


class Images(Protocol):
    """The catalogue's files of one host."""

    def bring_in(self, spec: ImageSpec, progress: Callable[[int, str], None]) -> Facts:
        """From its URL or out of the spool: sha256 and virtual_bytes."""

    def export(self, instance: InstanceSpec, spec: ImageSpec) -> Facts:
        """What is on an instance's root disk, as an image that needs no other one: virtual_bytes."""

    def clone(self, source: str, instance: InstanceSpec) -> None:
        """The root disk of ``instance`` as a copy of that of the instance ``source``; one that is there is left."""

    def remove(self, image: str) -> None:
        """The image, as far as it is there."""


class _Digest:
    """Writes to a file, and says the SHA-256 of all of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes, /) -> None:
        self._sha256.update(data)
        self._stream.write(data)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


class _Common:
    def __init__(self, host: Host) -> None:
        self.host = host

    def _known(self, image: str) -> Facts | None:
        """What was found out when the image was made, if it is there whole."""
        if not self.host.image_path(image).is_file():
            return None
        try:
            found = json.loads(self.host.image_facts_path(image).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _remember(self, image: str, facts: Facts) -> None:
        # Before the image itself, which makes it count.
        with whole_file(self.host.image_facts_path(image)) as part:
            part.write_text(json.dumps(facts))

    def bring_in(self, spec: ImageSpec, progress: Callable[[int, str], None]) -> Facts:
        """See :class:`Images`."""
        known = self._known(spec.uuid)
        if known is None:
            known = self._bring_in(spec, progress)
        self._forget_upload(spec)
        return known

    def _forget_upload(self, spec: ImageSpec) -> None:
        if not spec.url and self.host.spool_dir is not None:
            spool.remove(self.host.spool_dir, spec.uuid)

    def _bring_in(self, spec: ImageSpec, progress: Callable[[int, str], None]) -> Facts:
        path = self.host.image_path(spec.uuid)
        fetched = path.with_name(f".{path.name}.fetched-{os.getpid()}")
        check_room(self.host.images_dir, 0)
        try:
            progress(5, "fetching" if spec.url else "reading the upload")
            digest = self._fetch(spec, fetched)
            if spec.sha256 and digest != spec.sha256:
                raise ActionError(Fault.INVALID, f"its SHA-256 is {digest}, not {spec.sha256}")
            progress(50, "looking at it")
            virtual_bytes = self._look(spec, fetched)
            progress(60, "writing it anew")
            with whole_file(path) as part:
                facts = {"sha256": digest, "virtual_bytes": self._convert(spec, fetched, part, virtual_bytes)}
                self._remember(spec.uuid, facts)
        except OSError as error:
            raise storage_error(error) from None
        finally:
            fetched.unlink(missing_ok=True)
        return facts

    def _fetch(self, spec: ImageSpec, target: Path) -> str:
        with target.open("xb") as stream:
            sink = _Digest(stream)
            if spec.url.startswith(bundled.SCHEME):
                self._read_bundled(spec, sink)
            elif spec.url:
                fetch(spec.url, sink, spec.largest_bytes, self.host.fetch_allow)
            elif self.host.spool_dir is None:
                raise ActionError(Fault.NOT_FOUND, "this worker does not share a host with the API")
            else:
                with spool.read(self.host.spool_dir, spec.uuid) as source:
                    copy(source, sink, spec.largest_bytes)
        return sink.hexdigest()

    def _read_bundled(self, spec: ImageSpec, sink: _Digest) -> None:
        """What a package brought, on the way that everything takes. Only with a digest: the file may be another one by
        the time that it is read.
        """
        name = spec.url.removeprefix(bundled.SCHEME)
        if not bundled.FILE_NAME.fullmatch(name) or not spec.sha256:
            raise ActionError(Fault.INVALID, f"{name!r} is no image that a package brings")
        try:
            with (self.host.bundled_dir / name).open("rb") as source:
                copy(source, sink, spec.largest_bytes)
        except FileNotFoundError:
            raise ActionError(Fault.NOT_FOUND, f"no package of this host brings {name}") from None

    @staticmethod
    def _look(spec: ImageSpec, path: Path) -> int:
        """What a guest would see, in bytes."""
        if spec.format == "qcow2":
            with path.open("rb") as stream:
                return read_header(stream, largest_bytes=spec.largest_bytes).virtual_bytes
        count = path.stat().st_size
        if count == 0:
            raise ActionError(Fault.INVALID, "the image is refused: it is empty")
        return count

    def _convert(self, spec: ImageSpec, source: Path, target: Path, virtual_bytes: int) -> int:
        raise NotImplementedError

    def remove(self, image: str) -> None:
        """See :class:`Images`."""
        for path in (self.host.image_path(image), self.host.image_facts_path(image)):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(error) from None
        if self.host.spool_dir is not None:
            spool.remove(self.host.spool_dir, image)

    def _source(self, source: str) -> Path:
        path = self.host.disk_path(source, "qcow2")
        if not path.is_file():
            raise ActionError(Fault.NOT_FOUND, f"the root disk {source} is not on this host")
        return path


class SparseImages(_Common):
    """Looked at like real ones; then files of the right size with nothing in them."""

    def _convert(self, spec: ImageSpec, source: Path, target: Path, virtual_bytes: int) -> int:  # noqa: ARG002
        with target.open("wb") as stream:
            stream.truncate(virtual_bytes)
        return virtual_bytes

    def export(self, instance: InstanceSpec, spec: ImageSpec) -> Facts:
        """See :class:`Images`."""
        if (known := self._known(spec.uuid)) is not None:
            return known
        facts = {"virtual_bytes": self._source(instance.uuid).stat().st_size}
        with whole_file(self.host.image_path(spec.uuid)) as part:
            with part.open("wb") as stream:
                stream.truncate(facts["virtual_bytes"])
            self._remember(spec.uuid, facts)
        return facts

    def clone(self, source: str, instance: InstanceSpec) -> None:
        """See :class:`Images`."""
        path = self.host.disk_path(instance.uuid, "qcow2")
        if not path.exists():
            with whole_file(path, DISK_MODE) as part, part.open("wb") as stream:
                stream.truncate(self._source(source).stat().st_size)


class QemuImages(_Common):
    """By qemu-img, which sees an image only after its header was looked at, and may use only so much."""

    def __init__(self, host: Host, run: Callable[..., str] = run_tool) -> None:
        super().__init__(host)
        self._run = run

    def _convert(self, spec: ImageSpec, source: Path, target: Path, virtual_bytes: int) -> int:
        limits = Limits(file_bytes=virtual_bytes + virtual_bytes // _TABLES_PART + _TABLES_BYTES)
        # The format is named, never guessed: a raw image that begins like a qcow2 stays raw.
        words = ["qemu-img", "convert", "-q", "-f", spec.format, "-O", "qcow2", str(source), str(target)]
        try:
            if spec.format == "qcow2":
                # What lies behind the end of a file that was cut off would be read as zeros.
                check = ["qemu-img", "check", "-q", "-f", "qcow2", str(source)]
                self._run(check, good=_CHECK_GOOD, limits=limits)
            self._run(words, limits=limits)
        except ActionError as error:
            if error.fault is not Fault.STORAGE:
                raise
            raise ActionError(Fault.INVALID, f"the image is refused: {error.message}") from None
        return self._virtual_bytes(target)

    @staticmethod
    def _virtual_bytes(path: Path) -> int:
        with path.open("rb") as stream:
            return read_header(stream, largest_bytes=2**63).virtual_bytes

    def export(self, instance: InstanceSpec, spec: ImageSpec) -> Facts:
        """See :class:`Images`."""
        if (known := self._known(spec.uuid)) is not None:
            return known
        source = self._source(instance.uuid)
        check_room(self.host.images_dir, source.stat().st_blocks * 512)
        with whole_file(self.host.image_path(spec.uuid)) as part:
            # A suspended QEMU holds the file's lock, and has written everything when it was suspended (-U).
            self._run(["qemu-img", "convert", "-q", "-U", "-f", "qcow2", "-O", "qcow2", str(source), str(part)])
            facts = {"virtual_bytes": self._virtual_bytes(part)}
            self._remember(spec.uuid, facts)
        return facts

    def clone(self, source: str, instance: InstanceSpec) -> None:
        """See :class:`Images`."""
        path = self.host.disk_path(instance.uuid, "qcow2")
        if path.exists():
            return
        original = self._source(source)
        check_room(self.host.blocks_dir, original.stat().st_blocks * 512)
        words = ["qemu-img", "convert", "-q", "-f", "qcow2", "-O", "qcow2"]
        if instance.root.image is not None:
            # Only what differs from the image is copied.
            words += ["-B", str(self.host.image_path(instance.root.image)), "-F", "qcow2"]
        with whole_file(path, DISK_MODE) as part:
            self._run([*words, str(original), str(part)])


def make_images(host: Host) -> Images:
    """What suits the host's hypervisor."""
    return SparseImages(host) if host.domain_type == "test" else QemuImages(host)
