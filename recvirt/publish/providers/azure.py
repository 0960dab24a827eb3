"""``azure``: a page blob, and a version of a Compute Gallery's image (generation 2) made of it.

Nesting is a matter of the VM's size; the image's definition allows the security types Standard and Trusted Launch.
"""

from __future__ import annotations

import time
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator

from recvirt.errors import ConfigError, PublishError
from recvirt.publish.pageblob import PageBlob, default_credential
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

_API = "2023-07-03"
_PROVISION_SECONDS = 7200.0
#: 2 TiB less a MiB is what a generation 2 gallery image of a VHD holds; the rest is for data disks.
_LARGEST_BYTES = (2 << 40) - (1 << 20)
GalleryName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,78}[A-Za-z0-9])?$")]


class AzureConfig(TargetConfig):
    """Where the blob goes, and which gallery shows it."""

    account_url: WebAddress = Field(description="the storage account, as https://NAME.blob.core.windows.net")
    container: str = Field(
        default="recvirt", pattern=r"^[a-z0-9](-?[a-z0-9]){2,62}$", description="the blob container; it must be there"
    )
    subscription: str | None = Field(default=None, pattern=r"^[0-9a-f-]{36}$", description="the subscription's id")
    resource_group: GalleryName | None = Field(default=None, description="the gallery's resource group")
    gallery: GalleryName | None = Field(default=None, description="the Compute Gallery; unset: only the blob is made")
    definition: GalleryName | None = Field(default=None, description="the image definition; unset: recvirt-PROFILE")
    storage_account_id: str | None = Field(
        default=None, pattern=r"^/subscriptions/\S+$", description="unset: the account in the gallery's resource group"
    )
    location: str | None = Field(default=None, pattern=r"^[a-z0-9]+$", description="the gallery's location")
    regions: tuple[str, ...] = Field(default=(), description="locations that get replicas besides it")
    replicas: int = Field(default=1, ge=1, le=100, description="replicas in each location")
    verify_full: bool = Field(default=False, description="read all pages back, not some")
    management: WebAddress = Field(default="https://management.azure.com", description="the Resource Manager")

    @model_validator(mode="after")
    def _whole_gallery(self) -> AzureConfig:
        parts = (self.subscription, self.resource_group, self.location)
        if self.gallery is not None and None in parts:
            raise ValueError("a gallery wants subscription, resource_group and location as well")
        return self


class Azure(Provider[AzureConfig]):
    """One container, and one gallery."""

    name = "azure"
    config_model = AzureConfig

    def __init__(self, config: AzureConfig, job: Job) -> None:
        super().__init__(config, job)
        self._token: tuple[str, float] = ("", 0.0)

    def check(self) -> None:
        """What Azure would refuse, or a stand-in for it would not."""
        if self.job.image.format not in ("qcow2", "raw", "vhd"):
            raise ConfigError(f"{self.job.target}: the disk of a {self.job.image.format} can't be read in place")
        if self.job.image.virtual_bytes > _LARGEST_BYTES:
            raise ConfigError(f"{self.job.target}: an image's disk has at most 2 TiB there")
        if self.blob.disk_bytes % (1 << 20) or len(self.blob.footer) != 512:
            raise PublishError(f"{self.job.target}: the VHD would not be of whole MiB")

    @cached_property
    def blob(self) -> PageBlob:
        """The image's blob."""
        return PageBlob(self.config.account_url, self.config.container, self.job, self.config.timeout)

    # --- the Resource Manager

    @property
    def _definition(self) -> str:
        if self.config.definition is None and self.job.source is None:
            raise ConfigError(f"{self.job.target}: pruning wants the name of the definition")
        return self.config.definition or f"recvirt-{self.job.image.profile}"

    def _arm(self, what: str, method: str, path: str, *, ok: tuple[int, ...], **more: Any) -> Any:
        if time.time() > self._token[1] - 300:
            self._token = self._fresh_token()
        gallery = (
            f"{self.config.management}/subscriptions/{self.config.subscription}/resourceGroups/"
            f"{self.config.resource_group}/providers/Microsoft.Compute/galleries/{self.config.gallery}"
        )
        headers = {"Authorization": f"Bearer {self._token[0]}"}
        url = f"{gallery}{path}?api-version={_API}"
        return self.http.call(what, method, url, ok=ok, headers=headers, **more)

    def _fresh_token(self) -> tuple[str, float]:
        from azure.core.exceptions import ClientAuthenticationError

        from recvirt.publish.errors import DeniedError

        try:
            token = default_credential().get_token(f"{self.config.management}/.default")
        except ClientAuthenticationError as error:
            raise DeniedError(f"no token of Azure: {str(error).splitlines()[0]}", hint="az login") from None
        return token.token, float(token.expires_on)

    def _versions(self, definition: str) -> list[dict[str, Any]]:
        answer = self._arm("list the versions", "GET", f"/images/{definition}/versions", ok=(200, 404))
        return list(answer.json().get("value", [])) if answer.status_code == 200 else []

    def _version(self) -> dict[str, Any] | None:
        digest = self.job.image.sha256
        found = (v for v in self._versions(self._definition) if (v.get("tags") or {}).get(TAG_DIGEST) == digest)
        return next(found, None)

    # --- publishing

    def plan(self) -> tuple[Step, ...]:
        """See :class:`Provider`."""
        steps: list[Step] = []
        if self.blob.is_whole(self.blob.properties()):
            steps.append(Step("exists", f"blob {self.blob.name}"))
        else:
            with self.job.journal() as journal:
                there = sum(self.blob.runs.get(offset, 0) for offset in journal.parts)
            steps.append(Step("convert", f"{self.job.image.format} to a fixed VHD, on the way"))
            note = "pages of zeros left out"
            steps.append(Step("upload", f"blob {self.blob.name}", self.blob.bytes_to_send - there, note=note))
        if self.config.gallery is not None:
            steps += self._plan_version()
        return tuple(steps)

    def _plan_version(self) -> list[Step]:
        version = self._version()
        if version is not None:
            return [Step("exists", f"version {version['name']} of {self._definition}")]
        steps = []
        if self._arm("look for the definition", "GET", f"/images/{self._definition}", ok=(200, 404)).status_code == 404:
            steps.append(Step("create", f"image definition {self._definition} in {self.config.gallery}"))
        steps.append(Step("create", f"a version of {self._definition}"))
        return [*steps, *(Step("replicate", f"to {region}") for region in self.config.regions)]

    def publish(self) -> Published:
        """See :class:`Provider`."""
        sent, properties = 0, self.blob.properties()
        is_whole = self.blob.is_whole(properties)
        if not is_whole:
            tags = {key.replace("-", "_"): value for key, value in self.job.tags().items()}
            sent = self.blob.make({**tags, "recvirt_created": self.job.image.created})
        checked = self.blob.compare(whole=self.config.verify_full)
        if not is_whole:
            properties = self.blob.properties()
            assert properties is not None
            self.blob.mark_whole(properties)
        ids, locations = {"blob": self.blob.url}, [self.config.account_url]
        if self.config.gallery is not None:
            ids["version"] = self._make_version()
            locations += [str(self.config.location), *self.config.regions]
        return Published(ids=ids, checked=checked, locations=tuple(locations), sent_bytes=sent)

    def definition_body(self) -> dict[str, Any]:
        """The image definition."""
        return {
            "location": self.config.location,
            "tags": {TAG: "definition"},
            "properties": {
                "osType": "Linux", "osState": "Generalized", "hyperVGeneration": "V2", "architecture": "x64",
                "identifier": {"publisher": "recvirt", "offer": "recvirt", "sku": self.job.image.profile},
                # Both: Standard, with which nesting is documented, and Trusted Launch.
                "features": [{"name": "SecurityType", "value": "TrustedLaunchSupported"}],
            },
        }  # fmt: skip

    def version_body(self) -> dict[str, Any]:
        """A version of it."""
        account = self.config.account_url.partition("://")[2].partition(".")[0]
        storage = self.config.storage_account_id or (
            f"/subscriptions/{self.config.subscription}/resourceGroups/{self.config.resource_group}"
            f"/providers/Microsoft.Storage/storageAccounts/{account}"
        )
        regions = [
            {"name": name, "regionalReplicaCount": self.config.replicas, "storageAccountType": "Standard_LRS"}
            for name in (self.config.location, *self.config.regions)
        ]
        return {
            "location": self.config.location,
            "tags": {**self.job.tags(), "recvirt-created": self.job.image.created},
            "properties": {
                "publishingProfile": {"targetRegions": regions, "excludeFromLatest": False},
                "storageProfile": {
                    "osDiskImage": {"hostCaching": "ReadWrite", "source": {"id": storage, "uri": self.blob.url}}
                },
            },
        }

    def _make_version(self) -> str:
        found = self._version()
        if found is None:
            path = f"/images/{self._definition}"
            if self._arm("look for the definition", "GET", path, ok=(200, 404)).status_code == 404:
                self._arm("make the definition", "PUT", path, ok=(200, 201), data=self.definition_body())
            self._settled(path)
            name = self._free_version()
            self._arm("make the version", "PUT", f"{path}/versions/{name}", ok=(200, 201), data=self.version_body())
        else:
            name = str(found["name"])
        return self._settled(f"/images/{self._definition}/versions/{name}")

    def _free_version(self) -> str:
        """Year, month and day, time: what sorts as versions do; one more where two images are of one second."""
        made = datetime.fromisoformat(self.job.image.created)
        taken = {str(version["name"]) for version in self._versions(self._definition)}
        patch = int(f"{made:%H%M%S}")
        while (name := f"{made.year}.{int(f'{made:%m%d}')}.{patch}") in taken:
            patch += 1
        return name

    def _settled(self, path: str) -> str:
        deadline, pause = time.monotonic() + _PROVISION_SECONDS, 1.0
        while True:
            data = self._arm("wait for Azure", "GET", path, ok=(200,)).json()
            state = data["properties"].get("provisioningState")
            if state == "Succeeded":
                return str(data["id"])
            if state in ("Failed", "Deleting"):
                raise PublishError(f"Azure: {path.rpartition('/')[2]} is {state}", hint="delete it, and publish again")
            if time.monotonic() > deadline:
                raise PublishError(f"Azure: {path.rpartition('/')[2]} is still {state}", hint="publish it again")
            time.sleep(pause)
            pause = min(pause * 1.5, 30.0)

    # --- pruning

    def remotes(self) -> list[Remote]:
        """See :class:`Provider`. Versions of the gallery; without one there is nothing to tell ages by."""
        if self.config.gallery is None:
            raise ConfigError(f"{self.job.target}: pruning wants a gallery")
        found = []
        for version in self._versions(self._definition):
            tags = version.get("tags") or {}
            if tags.get(TAG) == "image":
                made = datetime.fromisoformat(tags["recvirt-created"])
                profile = tags.get(TAG_PROFILE, "")
                found.append(Remote(str(version["name"]), str(version["name"]), tags[TAG_DIGEST], profile, made))
        return found

    def delete(self, remote: Remote) -> None:
        """See :class:`Provider`. The blob stays: a version has copied it."""
        path = f"/images/{self._definition}/versions/{remote.identity}"
        self._arm("delete a version", "DELETE", path, ok=(200, 202, 204, 404))

    def recipe(self, published: Published) -> dict[str, Any]:
        """See :class:`Provider`."""
        version = published.ids.get("version", "/subscriptions/.../galleries/GALLERY/images/NAME/versions/VERSION")
        return {"version": version, "blob": published.ids["blob"], "location": self.config.location or "LOCATION"}


PROVIDER = Azure
