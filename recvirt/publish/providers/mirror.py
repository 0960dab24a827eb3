"""``mirror``: a static tree for HTTP servers, Incus and virt-builder, in a folder, on a WebDAV server or in S3.

    images/NAME/NAME.qcow2, incus.tar.xz, SHA256SUMS, SHA256SUMS.sig, manifest.json   written in this order, once
    streams/v1/index.json, images.json                                                what Incus reads
    index                                                                             what virt-builder reads
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from recvirt.errors import ConfigError, VerificationError
from recvirt.publish import indexes
from recvirt.publish.http import Http
from recvirt.publish.journal import machine_mark
from recvirt.publish.plan import Step
from recvirt.publish.provider import Job, Provider, Published, Remote, TargetConfig, WebAddress
from recvirt.publish.signing import CHECKSUMS
from recvirt.publish.transfer import Progress
from recvirt.publish.trees import FolderTree, Tree, WebDavTree
from recvirt.ui import format_bytes

_MANIFEST = "manifest.json"
_CHUNK = 1 << 20


class MirrorConfig(TargetConfig):
    """Where the tree is. Exactly one of ``path``, ``url`` and ``s3``."""

    path: str | None = Field(default=None, description="a folder")
    url: WebAddress | None = Field(
        default=None, description="a WebDAV collection; RECVIRT_WEBDAV_USER and _PASSWORD, or ~/.netrc, hold the login"
    )
    s3: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._/-]*)?$",
                           description="BUCKET or BUCKET/PREFIX")  # fmt: skip
    endpoint: WebAddress | None = Field(default=None, description="for `s3`: another service than AWS")
    region: str | None = Field(default=None, pattern=r"^[a-z0-9-]+$", description="for `s3`: the bucket's region")
    public_url: WebAddress | None = Field(default=None, description="where readers find the tree; for launch recipes")

    @property
    def path_of_tree(self) -> Path:
        """The folder of ``path``, absolute."""
        return self.path_to(self.path or ".")

    @model_validator(mode="after")
    def _one_place(self) -> MirrorConfig:
        if sum(place is not None for place in (self.path, self.url, self.s3)) != 1:
            raise ValueError("must name exactly one of path, url and s3")
        return self


class Mirror(Provider[MirrorConfig]):
    """One tree."""

    name = "mirror"
    config_model = MirrorConfig

    def __init__(self, config: MirrorConfig, job: Job) -> None:
        super().__init__(config, job)
        self._tree: Tree | None = None

    @property
    def tree(self) -> Tree:
        """The place, opened when it is first used."""
        if self._tree is None:
            self._tree = self._open()
        return self._tree

    def _open(self) -> Tree:
        if self.config.path is not None:
            return FolderTree(self.config.path_of_tree, machine_mark(self.job.state_dir))
        if self.config.url is not None:
            http = Http(self.job.budget, timeout=self.config.timeout, workers=self.job.workers, netrc=True)
            user = os.environ.get("RECVIRT_WEBDAV_USER")
            if user is not None:
                http.session.auth = (user, os.environ.get("RECVIRT_WEBDAV_PASSWORD", ""))
            return WebDavTree(self.config.url, http, machine_mark(self.job.state_dir))
        from recvirt.publish.s3tree import S3Tree

        assert self.config.s3 is not None
        return S3Tree(self.config.s3, self.config.endpoint, self.config.region, self.config.timeout, self.job)

    def check(self) -> None:
        """A folder that can't be written to, or a disk too small, is told before anything is sent."""
        if isinstance(self.tree, FolderTree) and self.job.source is not None:
            free, needed = self.tree.free_bytes(), self.job.image.file_bytes
            if free < needed and self.tree.size(self._file("")) is None:
                raise ConfigError(
                    f"{self.config.path} has {format_bytes(free)} free, the image takes {format_bytes(needed)}",
                    hint="recvirt prune mirror frees room",
                )

    def _file(self, name: str) -> str:
        image = self.job.image
        return f"images/{image.name}/{name or indexes.file_name(image)}"

    # --- publishing

    def plan(self) -> tuple[Step, ...]:
        """See :class:`Provider`."""
        image = self.job.image
        if self.tree.size(self._file(_MANIFEST)) is not None:
            indexes_there = self._stale_indexes() == {}
            rest = () if indexes_there else (Step("create", "the indexes of Incus and virt-builder"),)
            return (Step("exists", self._file("")), *rest)
        return (
            Step("upload", self._file(""), image.file_bytes, note="as it is"),
            Step("create", f"images/{image.name}/: checksums with a signature, manifest, Incus metadata"),
            Step("create", "the indexes of Incus and virt-builder"),
        )

    def publish(self) -> Published:
        """See :class:`Provider`."""
        image, sent = self.job.image, 0
        found = self.tree.read(self._file(_MANIFEST))
        there = self.tree.size(self._file("")) == image.file_bytes and self._read_back() == image.sha256
        if found is None and not there:
            progress = Progress(f"send {indexes.file_name(image)}", image.file_bytes)
            sent, there = self.tree.put(self._file(""), image.path, image.sha256, progress), False
        digest = image.sha256 if there else self._read_back()
        if digest != image.sha256:
            raise VerificationError(
                f"{self._file('')} in the mirror is not what was sent (SHA-256 {digest[:12]}...)",
                hint="delete it there and publish again",
            )
        if found is None:
            self._write_about()
        for name, content in self._stale_indexes().items():
            self.tree.write(name, content)
        place = self.config.public_url or self.config.url or (self.config.s3 and f"s3://{self.config.s3}")
        where = place or str(self.config.path_of_tree)
        return Published(
            ids={"path": self._file("")}, locations=(where,), sent_bytes=sent, checked="read back, SHA-256 equal"
        )

    def _read_back(self) -> str:
        digest = hashlib.sha256()
        for data in self.tree.chunks(self._file("")):
            digest.update(data)
        return digest.hexdigest()

    def _write_about(self) -> None:
        """All that tells about the image; the manifest last: what has one is whole."""
        image = self.job.image
        metadata = indexes.incus_metadata(image)
        combined, sha512 = hashlib.sha256(metadata), hashlib.sha512()
        with image.path.open("rb") as stream:
            while data := stream.read(_CHUNK):
                combined.update(data)
                sha512.update(data)
        metadata_sha256 = hashlib.sha256(metadata).hexdigest()
        manifest = indexes.manifest_of(image, sha512.hexdigest(), metadata, metadata_sha256, combined.hexdigest())
        sums = f"{image.sha256}  {indexes.file_name(image)}\n{metadata_sha256}  {indexes.METADATA}\n".encode()
        self.tree.write(self._file(indexes.METADATA), metadata)
        self.tree.write(self._file("SHA256SUMS"), sums)
        self.tree.write(self._file("SHA256SUMS.sig"), self.job.signer.sign(sums, CHECKSUMS))
        self.tree.write(self._file(_MANIFEST), indexes.as_json(manifest))

    def _manifests(self) -> list[dict[str, Any]]:
        found = []
        for name in self.tree.names("images"):
            text = self.tree.read(f"images/{name}/{_MANIFEST}")
            if text is None:
                continue  # one that is on its way, or that somebody is deleting
            try:
                manifest = json.loads(text)
                if manifest["name"] == name and manifest["schema"] == 1:
                    found.append(manifest)
            except (ValueError, KeyError, TypeError):
                raise VerificationError(
                    f"images/{name}/{_MANIFEST} in the mirror is damaged", hint="delete that folder and publish again"
                ) from None
        return found

    def _stale_indexes(self) -> dict[str, bytes]:
        """The indexes that don't say what the manifests say, as they should be."""
        manifests = self._manifests()
        wanted = {**indexes.simplestreams(manifests), indexes.BUILDER_INDEX: indexes.virt_builder(manifests)}
        return {name: content for name, content in wanted.items() if self.tree.read(name) != content}

    # --- pruning

    def remotes(self) -> list[Remote]:
        """See :class:`Provider`."""
        return [
            Remote(m["name"], m["name"], m["disk"]["sha256"], m["profile"], datetime.fromisoformat(m["created"]))
            for m in self._manifests()
        ]

    def delete(self, remote: Remote) -> None:
        """See :class:`Provider`. Readers lose the index's entry first, then the files."""
        self.tree.remove(f"images/{remote.identity}/{_MANIFEST}")
        for name, content in self._stale_indexes().items():
            self.tree.write(name, content)
        self.tree.remove(f"images/{remote.identity}")

    def recipe(self, published: Published) -> dict[str, Any]:
        """See :class:`Provider`."""
        url = self.config.public_url or self.config.url
        if self.config.path is not None and url is None:
            url = self.config.path_of_tree.as_uri()
        return {"url": url or "https://MIRROR.EXAMPLE", "path": published.ids["path"]}


PROVIDER = Mirror
