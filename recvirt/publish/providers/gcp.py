"""``gcp``: an archive in Cloud Storage, and an image of Compute Engine with the licence that turns nesting on."""

from __future__ import annotations

import re
import time
import uuid
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from recvirt.errors import ConfigError, PublishError
from recvirt.publish.cloudstorage import Bucket, Google, Upload, compare
from recvirt.publish.plan import Step
from recvirt.publish.provider import (
    TAG,
    TAG_DIGEST,
    TAG_PROFILE,
    Job,
    Provider,
    Published,
    Remote,
    TargetConfig,
    WebAddress,
)
from recvirt.publish.sparsetar import SparseTar, Stream

LICENCE = "projects/vm-options/global/licenses/enable-vmx"
FEATURES = ("UEFI_COMPATIBLE", "GVNIC", "VIRTIO_SCSI_MULTIQUEUE")
_OPERATION_SECONDS = 3600.0
#: A label's value has at most 63 characters; the description has the whole digest.
_LABEL = 63
GcpName = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")]


class GcpConfig(TargetConfig):
    """Which project, and what the image is like there."""

    project: Annotated[str, StringConstraints(pattern=r"^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$")] = Field(
        description="the project's identity"
    )
    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$", description="a bucket for the archive")
    family: GcpName | None = Field(default=None, description="the image family; unset: recvirt-PROFILE")
    features: tuple[str, ...] = Field(default=FEATURES, description="guestOsFeatures")
    licences: tuple[str, ...] = Field(default=(LICENCE,), description="licences; the first turns nesting on")
    storage_location: str | None = Field(default=None, pattern=r"^[a-z0-9-]+$", description="where the image is kept")
    keep_archive: bool = Field(default=False, description="leave the archive in the bucket")
    storage_endpoint: WebAddress = Field(default="https://storage.googleapis.com", description="Cloud Storage")
    compute_endpoint: WebAddress = Field(
        default="https://compute.googleapis.com/compute/v1", description="Compute Engine"
    )
    auth: Literal["default", "none"] = Field(default="default", description="`none`: for stand-ins")


class Gcp(Provider[GcpConfig]):
    """One project."""

    name = "gcp"
    config_model = GcpConfig

    def __init__(self, config: GcpConfig, job: Job) -> None:
        super().__init__(config, job)
        self._google = Google(self.http, anonymous=config.auth == "none")
        self.bucket = Bucket(self._google, config.storage_endpoint, config.bucket)

    def check(self) -> None:
        """What Google would refuse."""
        image = self.job.image
        if image.format not in ("qcow2", "raw", "vhd"):
            raise ConfigError(f"{self.job.target}: the disk of a {image.format} can't be read in place")
        for what, name in (("image", image.name), ("family", self._family)):
            if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
                raise ConfigError(f"{self.job.target}: Google does not take {name!r} as the name of an {what}")

    @property
    def _family(self) -> str:
        return self.config.family or f"recvirt-{self.job.image.profile.replace('.', '-').replace('_', '-')}"[:63]

    @property
    def _object(self) -> str:
        return f"{self.job.image.name}.tar.gz"

    @cached_property
    def tar(self) -> SparseTar:
        """The archive."""
        return SparseTar(self.job.image, int(datetime.fromisoformat(self.job.image.created).timestamp()))

    # --- Compute Engine

    def _compute(self, what: str, method: str, path: str, *, ok: tuple[int, ...] = (200,), **more: Any) -> Any:
        url = f"{self.config.compute_endpoint}/projects/{self.config.project}/global/{path}"
        return self._google.call(what, method, url, ok=ok, **more)

    def _image(self) -> dict[str, Any] | None:
        image = self.job.image
        answer = self._compute("look for the image", "GET", f"images/{image.name}", ok=(200, 404))
        if answer.status_code == 404:
            return None
        found = dict(answer.json())
        if (found.get("labels") or {}).get(TAG_DIGEST) != image.sha256[:_LABEL]:
            raise PublishError(f"the name {image.name} is taken in {self.config.project}", hint="delete that image")
        return found

    def _wait(self, operation: dict[str, Any]) -> None:
        deadline, pause = time.monotonic() + _OPERATION_SECONDS, 0.5
        while operation.get("status") != "DONE":
            if time.monotonic() > deadline:
                raise PublishError(f"Google's operation {operation['name']} does not end", hint="publish it again")
            time.sleep(pause)
            pause = min(pause * 1.5, 10.0)
            operation = self._compute("wait for Google", "GET", f"operations/{operation['name']}").json()
        errors = (operation.get("error") or {}).get("errors") or []
        if errors:
            hint = "a quota is used up: recvirt prune gcp" if "QUOTA" in str(errors[0].get("code")) else ""
            raise PublishError(f"Google: {errors[0].get('code')}: {errors[0].get('message')}", hint=hint)

    def image_body(self) -> dict[str, Any]:
        """``images.insert``'s body."""
        image = self.job.image
        labels = {
            key: re.sub(r"[^a-z0-9_-]", "-", value.lower())[:_LABEL] for key, value in self.job.tags().items()
        }
        body = {
            "name": image.name,
            "description": f"recvirt {image.profile}, kernel {image.kernel}, sha256 {image.sha256}",
            "family": self._family,
            "sourceType": "RAW",
            "rawDisk": {
                "source": f"https://storage.googleapis.com/{self.config.bucket}/{self._object}",
                "containerType": "TAR",
            },
            "architecture": "X86_64",
            "licenses": list(self.config.licences),
            "guestOsFeatures": [{"type": feature} for feature in self.config.features],
            "labels": labels,
        }
        if self.config.storage_location:
            body["storageLocations"] = [self.config.storage_location]
        return body

    # --- publishing

    def plan(self) -> tuple[Step, ...]:
        """See :class:`Provider`."""
        image = self.job.image
        if self._image() is not None:
            return (Step("exists", f"image {image.name} in {self.config.project}"),)
        steps = []
        if self.bucket.look(self._object) is not None:
            steps.append(Step("exists", f"gs://{self.config.bucket}/{self._object}"))
        else:
            steps.append(Step("convert", f"{image.format} to a sparse tar with gzip, on the way"))
            what = f"gs://{self.config.bucket}/{self._object}"
            steps.append(Step("upload", what, self.tar.data_bytes, at_most=True, note="before compression"))
        note = f"family {self._family}, with {LICENCE.rpartition('/')[2]}"
        steps.append(Step("create", f"image {image.name} in {self.config.project}", note=note))
        return tuple(steps)

    def publish(self) -> Published:
        """See :class:`Provider`."""
        image, sent, checked = self.job.image, 0, "Google has an image with the same digest on its label"
        there = self._image()
        if there is None or there.get("status") in ("PENDING", "FAILED"):
            sent, checked = self._send()
            there = self._insert(there)
        if there.get("status", "READY") != "READY":
            raise PublishError(f"Google's image {image.name} is {there['status']}", hint="delete it, publish again")
        if not self.config.keep_archive:
            self.bucket.delete(self._object)
        ids = {"image": f"projects/{self.config.project}/global/images/{image.name}", "family": self._family}
        return Published(ids=ids, checked=checked, locations=(self.config.project,), sent_bytes=sent)

    def _send(self) -> tuple[int, str]:
        """Send the archive, or compare the one that is there; how many bytes went, and how it was compared."""
        if self.bucket.look(self._object) is not None:
            stream = Stream(self.tar, 1 << 20)
            while not stream.is_last:
                stream.step()
            return 0, compare(self.bucket, self._object, stream.md5())
        metadata = {key: value for key, value in self.job.tags().items() if key in (TAG, TAG_DIGEST)}
        with self.job.journal() as journal:
            sent, md5 = Upload(self.bucket, self._object, self.tar, journal).run(metadata, self.job.budget.call)
            how = compare(self.bucket, self._object, md5)
            journal.forget()
        return sent, how

    def _insert(self, there: dict[str, Any] | None) -> dict[str, Any]:
        if there is None:
            # The same request twice is one request: a retry after a lost answer makes no second image.
            request = uuid.uuid5(uuid.NAMESPACE_OID, f"{self.config.project}/{self.job.image.sha256}")
            params = {"requestId": str(request)}
            answer = self._compute(
                "make the image", "POST", "images", ok=(200, 409), params=params, data=self.image_body()
            )
            if answer.status_code == 200:
                self._wait(answer.json())
        deadline = time.monotonic() + _OPERATION_SECONDS
        while (found := self._image()) is None or found.get("status") == "PENDING":
            if time.monotonic() > deadline:
                raise PublishError("Google's image does not become ready", hint="publish it again")
            time.sleep(2.0)
        return found

    # --- pruning

    def remotes(self) -> list[Remote]:
        """See :class:`Provider`. Google does not tell which disks came from an image."""
        found: list[Remote] = []
        params = {"filter": f"labels.{TAG}=image", "maxResults": "500"}
        while True:
            data = self._compute("list our images", "GET", "images", params=params).json()
            for item in data.get("items", []):
                labels = item.get("labels") or {}
                if labels.get(TAG) == "image":
                    made = datetime.fromisoformat(item["creationTimestamp"])
                    digest, profile = labels.get(TAG_DIGEST, ""), labels.get(TAG_PROFILE, "")
                    found.append(Remote(item["name"], item["name"], digest, profile, made))
            if "nextPageToken" not in data:
                return found
            params["pageToken"] = data["nextPageToken"]

    def delete(self, remote: Remote) -> None:
        """See :class:`Provider`."""
        answer = self._compute("delete an image", "DELETE", f"images/{remote.identity}", ok=(200, 404))
        if answer.status_code == 200:
            self._wait(answer.json())

    def recipe(self, published: Published) -> dict[str, Any]:
        """See :class:`Provider`."""
        return {"image": published.ids["image"], "project": self.config.project}


PROVIDER = Gcp
