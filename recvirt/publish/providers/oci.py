"""``oci-registry``: a container disk of KubeVirt in any registry: one tar layer that holds ``disk/NAME.qcow2``.

The layer is never on the disk: its header and padding are made up around the image's file, so any part of it can be
sent again. The tag carries the image's digest; other tags that are wanted move.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from datetime import datetime
from functools import cached_property
from typing import Any

from pydantic import Field

from recvirt.errors import ConfigError, PublishError, VerificationError
from recvirt.publish.plan import Step
from recvirt.publish.provider import TAG, TAG_DIGEST, TAG_PROFILE, Job, Provider, Published, Remote, TargetConfig
from recvirt.publish.registry import MANIFEST_TYPE, Registry, resume
from recvirt.publish.source import Source
from recvirt.publish.transfer import Progress

#: KubeVirt reads the disk as this user.
_QEMU_ID = 107
_BLOCK = 512
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_ANNOTATION = "io.recvirt."
_TITLE = "org.opencontainers.image.title"


class OciConfig(TargetConfig):
    """Which repository."""

    repository: str = Field(
        pattern=r"^[a-z0-9.-]+(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+$", description="HOST[:PORT]/PATH"
    )
    insecure: bool = Field(default=False, description="plain HTTP, for a registry on this machine")
    tags: tuple[str, ...] = Field(default=(), description="tags besides the one with the digest; they move")
    chunk_mib: int = Field(default=16, ge=5, le=512, description="size of a chunk, MiB")


class Layer:
    """The layer's bytes, at any place, without a copy of the image."""

    def __init__(self, image: Source) -> None:
        when = int(datetime.fromisoformat(image.created).timestamp())
        folder, disk = tarfile.TarInfo("disk"), tarfile.TarInfo(f"disk/{image.name}.qcow2")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o555
        disk.size, disk.mode = image.file_bytes, 0o440
        for member in (folder, disk):
            member.mtime, member.uid, member.gid = when, _QEMU_ID, _QEMU_ID
        self._head = b"".join(member.tobuf(tarfile.PAX_FORMAT) for member in (folder, disk))
        body = image.file_bytes
        # Two blocks of zeros end an archive (POSIX, pax).
        self._tail = bytes(-body % _BLOCK + 2 * _BLOCK)
        self._image = image
        self.size = len(self._head) + body + len(self._tail)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the layer."""
        end = min(offset + length, self.size)
        first, last = len(self._head), len(self._head) + self._image.file_bytes
        parts = [self._head[offset:end] if offset < first else b""]
        if offset < last and end > first:
            with self._image.path.open("rb") as stream:
                stream.seek(max(offset, first) - first)
                parts.append(stream.read(min(end, last) - max(offset, first)))
        if end > last:
            parts.append(self._tail[max(offset, last) - last : end - last])
        data = b"".join(parts)
        if len(data) != end - offset:
            raise VerificationError(f"{self._image.path} became shorter while it was read")
        return data

    @cached_property
    def digest(self) -> str:
        """Its digest, in the registry's form."""
        found = hashlib.sha256()
        for offset in range(0, self.size, 1 << 20):
            found.update(self.read(offset, 1 << 20))
        return f"sha256:{found.hexdigest()}"


class OciRegistry(Provider[OciConfig]):
    """One repository."""

    name = "oci-registry"
    config_model = OciConfig

    def __init__(self, config: OciConfig, job: Job) -> None:
        super().__init__(config, job)
        self.registry = Registry(self.http, config.repository, insecure=config.insecure)

    def check(self) -> None:
        """A container disk is a qcow2 here: a raw one would be sent with all its zeros."""
        if self.job.image.format != "qcow2":
            raise ConfigError(
                f"{self.job.target}: a container disk is made of a qcow2, this is {self.job.image.format}",
                hint="recvirt build --set image.formats+=qcow2",
            )

    @cached_property
    def layer(self) -> Layer:
        """The layer of the image."""
        return Layer(self.job.image)

    @cached_property
    def config_blob(self) -> bytes:
        """The image's configuration: no program, only a disk."""
        image = self.job.image
        data = {
            "architecture": "amd64", "os": "linux", "created": image.created,
            "config": {"Labels": self.job.tags()},
            "rootfs": {"type": "layers", "diff_ids": [self.layer.digest]},
            "history": [{"created": image.created, "created_by": "recvirt publish"}],
        }  # fmt: skip
        return json.dumps(data, sort_keys=True).encode()

    def _manifest(self) -> bytes:
        image = self.job.image
        words = {name.removeprefix(TAG).lstrip("-") or "kind": value for name, value in self.job.tags().items()}
        annotations = {_ANNOTATION + word: value for word, value in words.items()}
        annotations["org.opencontainers.image.created"] = image.created
        annotations[_TITLE] = image.name
        data = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {
                "mediaType": _CONFIG_TYPE, "digest": _digest(self.config_blob), "size": len(self.config_blob),
            },
            "layers": [
                {
                    "mediaType": _LAYER_TYPE, "digest": self.layer.digest, "size": self.layer.size,
                    # oras(1) leaves out what has no file name.
                    "annotations": {_TITLE: f"{image.name}.tar"},
                }
            ],
            "annotations": annotations,
        }  # fmt: skip
        return json.dumps(data, sort_keys=True).encode()

    def _there(self) -> tuple[bytes, str] | None:
        """The manifest under our tag, if it is of this image. PublishError when it is another's."""
        tag = self.job.image.name
        found = self.registry.manifest(tag)
        if found is None:
            return None
        layers = json.loads(found[0]).get("layers") or [{}]
        if layers[0].get("digest") != self.layer.digest:
            raise PublishError(
                f"the tag {tag} in {self.config.repository} is taken: it holds something else",
                hint="delete it there, or publish to another repository",
            )
        return found

    def plan(self) -> tuple[Step, ...]:
        """See :class:`Provider`."""
        there = self._there()
        steps = []
        if there is None:
            if self.registry.has_blob(self.layer.digest):
                steps.append(Step("exists", f"the layer {self.layer.digest[:19]}"))
            else:
                what = f"the layer {self.layer.digest[:19]}"
                steps.append(Step("upload", what, self._left(), note="the qcow2 in a tar"))
            steps.append(Step("create", f"{self.config.repository}:{self.job.image.name}"))
        else:
            steps.append(Step("exists", f"{self.config.repository}:{self.job.image.name}"))
        for tag in self._stale_tags(there):
            steps.append(Step("create", f"{self.config.repository}:{tag}", note="moves"))
        return tuple(steps)

    def _stale_tags(self, there: tuple[bytes, str] | None) -> list[str]:
        return [tag for tag in self.config.tags if there is None or self.registry.manifest(tag) != there]

    def _left(self) -> int:
        """What an upload that an earlier run began still wants."""
        with self.job.journal() as journal:
            url = journal.facts.get("upload")
            found = self.registry.upload_offset(url) if url else None
        return self.layer.size - (found[1] if found else 0)

    def publish(self) -> Published:
        """See :class:`Provider`."""
        sent = 0
        there = self._there()
        if there is None:
            sent = self._send_layer()
            self.registry.put_blob(_digest(self.config_blob), self.config_blob)
            content = self._manifest()
            self.registry.put_manifest(self.job.image.name, content)
            there = self.registry.manifest(self.job.image.name)
            if there is None or there[0] != content:
                raise VerificationError(f"the manifest in {self.config.repository} is not what was sent")
        for tag in self._stale_tags(there):
            self.registry.put_manifest(tag, there[0])
        if not self.registry.has_blob(self.layer.digest):
            raise VerificationError(f"the layer in {self.config.repository} is gone", hint="publish it again")
        digest = there[1] or _digest(there[0])
        reference = f"{self.config.repository}@{digest}"
        ids = {"reference": reference, "tag": f"{self.config.repository}:{self.job.image.name}"}
        return Published(
            ids=ids, locations=(self.config.repository,), sent_bytes=sent, checked="the registry has the same digests"
        )

    def _send_layer(self) -> int:
        if self.registry.has_blob(self.layer.digest):
            return 0
        progress = Progress(f"send {self.job.image.name}", self.layer.size)
        first: list[int] = []
        with self.job.journal() as journal:

            def note(url: str, offset: int) -> None:
                journal.begin({"upload": url})
                first.append(offset)
                progress.add(offset - progress.sent)

            url = resume(
                self.registry, self.layer.read, self.layer.size, self.config.chunk_mib << 20,
                journal.facts.get("upload"), note, self.job.budget.call,
            )  # fmt: skip
            self.registry.finish_upload(url, self.layer.digest)
            journal.forget()
        return self.layer.size - first[0]

    # --- pruning

    def remotes(self) -> list[Remote]:
        """See :class:`Provider`."""
        found: dict[str, Remote] = {}
        for tag in self.registry.tags():
            manifest = self.registry.manifest(tag)
            said = json.loads(manifest[0]).get("annotations") or {} if manifest else {}
            if manifest is None or said.get(f"{_ANNOTATION}kind") != "image":
                continue
            digest = manifest[1] or _digest(manifest[0])
            found[digest] = Remote(
                digest, said[_TITLE], said[_ANNOTATION + TAG_DIGEST.removeprefix("recvirt-")],
                said[_ANNOTATION + TAG_PROFILE.removeprefix("recvirt-")],
                datetime.fromisoformat(said["org.opencontainers.image.created"]),
            )  # fmt: skip
        return list(found.values())

    def delete(self, remote: Remote) -> None:
        """See :class:`Provider`."""
        self.registry.delete_manifest(remote.identity)

    def recipe(self, published: Published) -> dict[str, Any]:
        """See :class:`Provider`."""
        return {"reference": published.ids["reference"]}


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


PROVIDER = OciRegistry
