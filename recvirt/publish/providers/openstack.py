"""``openstack``: an image of Glance (API v2), by upload or by stage and import, with properties for nesting."""

from __future__ import annotations

import hashlib
import time
import urllib.parse
from datetime import datetime
from functools import cached_property, partial
from typing import Any, Literal

from pydantic import Field

from recvirt.errors import ConfigError, PublishError, VerificationError
from recvirt.publish.errors import DeniedError, TransientError
from recvirt.publish.http import refusal
from recvirt.publish.openstackauth import Identity
from recvirt.publish.plan import Step
from recvirt.publish.provider import Provider, Published, Remote, TargetConfig, WebAddress
from recvirt.publish.transfer import FileBody, Progress
from recvirt.ui import reporter

_TAG = "recvirt"
_FORMATS = {"qcow2": "qcow2", "raw": "raw", "vhd": "vhd", "vmdk": "vmdk"}
_IMPORT_SECONDS = 3600.0
_UNDER_WAY = ("saving", "uploading", "importing")


class OpenStackConfig(TargetConfig):
    """Which cloud, and what the image is like there."""

    cloud: str | None = Field(default=None, description="an entry of clouds.yaml; unset: OS_CLOUD, or OS_* variables")
    region: str | None = Field(default=None, description="the region")
    interface: Literal["public", "internal", "admin"] = Field(default="public", description="which endpoint")
    endpoint: WebAddress | None = Field(default=None, description="the image service, past the catalogue")
    auth: Literal["keystone", "none"] = Field(default="keystone", description="`none`: an image service of one's own")
    method: Literal["upload", "import"] = Field(default="upload", description="`import`: stage, then glance-direct")
    visibility: Literal["private", "shared", "community", "public"] = Field(
        default="private", description="who sees it"
    )
    protected: bool = Field(default=False, description="can't be deleted by mistake, nor by `recvirt prune`")
    require: Literal["vmx", "svm"] | None = Field(
        default=None, description="start on hosts with this trait only; one image can't say `either`"
    )
    properties: dict[str, str] = Field(default_factory=dict, description="more image properties, or others than ours")


class OpenStack(Provider[OpenStackConfig]):
    """One project of one cloud."""

    name = "openstack"
    config_model = OpenStackConfig

    def check(self) -> None:
        """What Glance would refuse."""
        if self.config.auth == "none" and self.config.endpoint is None:
            raise ConfigError(f"{self.job.target}: auth: none wants an endpoint")
        reserved = sorted(key for key in self.config.properties if key.startswith(("os_glance", "recvirt_")))
        if reserved:
            raise ConfigError(f"{self.job.target}: these properties are not for setting: {', '.join(reserved)}")

    # --- requests

    @cached_property
    def _identity(self) -> Identity | None:
        if self.config.auth == "none":
            return None
        return Identity(self.config.cloud, self.config.region, self.config.interface, self.config.timeout)

    @cached_property
    def _base(self) -> str:
        identity = self._identity
        found = self.config.endpoint or (
            self.job.budget.call("ask the catalogue", identity.image_endpoint) if identity else ""
        )
        return found.rstrip("/").removesuffix("/v2") + "/v2"

    def _call(self, what: str, method: str, path: str, *, ok: tuple[int, ...], **more: Any) -> Any:
        headers = dict(more.pop("headers", {}))
        for fresh in (False, True):
            if self._identity is not None:
                asked = partial(self._identity.token, fresh=fresh)
                headers["X-Auth-Token"] = self.job.budget.call("get a token", asked)
            url = path if path.startswith("http") else f"{self._base}/{path}"
            answer = self.http.call(what, method, url, ok=(*ok, 401), headers=headers, **more)
            if answer.status_code != 401:
                return answer
            if self._identity is None:
                break
        error = refusal(what, answer)
        raise DeniedError(error.message, hint="are the credentials right and not expired?")

    def _image(self, identity: str) -> dict[str, Any] | None:
        answer = self._call("look at the image", "GET", f"images/{identity}", ok=(200, 404))
        return None if answer.status_code == 404 else dict(answer.json())

    def _list(self, **filters: str) -> list[dict[str, Any]]:
        query = urllib.parse.urlencode({"limit": "100", **filters})
        path, found = f"images?{query}", []
        while path:
            data = self._call("list images", "GET", path, ok=(200,)).json()
            found += data["images"]
            following = data.get("next")
            path = f"images?{following.partition('?')[2]}" if following else ""
        return found

    def _living(self) -> list[dict[str, Any]]:
        """Our images of this digest that are there or on their way; the tag comes last, and may be missing."""
        found = self._list(recvirt_digest=self.job.image.sha256)
        return [i for i in found if i["status"] not in ("killed", "deleted")]

    def _ours(self) -> dict[str, Any] | None:
        """Our image: the oldest that is whole, else the oldest that is on its way."""
        found = [i for i in self._living() if _TAG in i["tags"]]
        return min(found, key=lambda i: (i["status"] != "active", i["created_at"], i["id"]), default=None)

    # --- publishing

    def plan(self) -> tuple[Step, ...]:
        """See :class:`Provider`."""
        image, there = self.job.image, self._ours()
        if there is not None and there["status"] == "active":
            return (Step("exists", f"image {there['name']} ({there['id']})"),)
        note = f"{image.format}, by {self.config.method}"
        upload = Step("upload", f"image {image.name}", image.file_bytes, note=note)
        return (upload,) if there else (Step("create", f"image {image.name}, {self.config.visibility}"), upload)

    def publish(self) -> Published:
        """See :class:`Provider`."""
        image, sent = self.job.image, 0
        there = self._ours()
        if there is None or there["status"] != "active":
            mine = there or self._create()
            try:
                there, sent = self._send(mine), image.file_bytes
            except PublishError:
                # Another publisher, whose image was whole before, took ours away.
                there = self._ours()
                if there is None or there["status"] != "active" or there["id"] == mine["id"]:
                    raise
            there = self._without_twin(there)
        self._compare(there)
        return Published(
            ids={"image": there["id"], "name": there["name"]}, sent_bytes=sent,
            locations=tuple(filter(None, (self.config.cloud, self.config.region))) or (self._base,),
            checked=f"Glance has the same {there.get('os_hash_algo') or 'size'}",
        )  # fmt: skip

    def properties(self) -> dict[str, str]:
        """What the image says of itself to Nova."""
        image = self.job.image
        said = {
            "architecture": "x86_64", "hw_machine_type": "q35", "hw_firmware_type": "uefi", "hw_disk_bus": "virtio",
            "hw_vif_model": "virtio", "hw_rng_model": "virtio", "os_type": "linux", "os_distro": "debian",
            "recvirt_digest": image.sha256, "recvirt_profile": image.profile,
            "recvirt_accepted": self.job.tags()["recvirt-accepted"], "recvirt_created": image.created,
        }  # fmt: skip
        if self.config.require:
            said[f"trait:HW_CPU_X86_{self.config.require.upper()}"] = "required"
        return {**said, **self.config.properties}

    def _create(self) -> dict[str, Any]:
        image = self.job.image
        body = {
            "name": image.name, "disk_format": _FORMATS[image.format], "container_format": "bare",
            "visibility": self.config.visibility, "protected": self.config.protected, "tags": [_TAG],
            "min_disk": -(-image.virtual_bytes // (1 << 30)), **self.properties(),
        }  # fmt: skip
        return dict(self._call("create the image", "POST", "images", ok=(201,), data=body).json())

    def _send(self, there: dict[str, Any]) -> dict[str, Any]:
        """Send the data, as often as the budget lets us; Glance can't go on with a part of it."""
        image = self.job.image
        progress = Progress(f"send {image.name}", image.file_bytes)
        identity = str(there["id"])
        place = "stage" if self.config.method == "import" else "file"

        def attempt() -> None:
            now = self._image(identity)
            if now is None:
                raise PublishError(f"the image {identity} was deleted while it was sent to")
            if now["status"] == "active":
                return
            if now["status"] in ("saving", "importing"):
                raise TransientError("an upload is under way there already", after=2.0)
            if now["status"] != "uploading":
                body = FileBody(image.path, progress)
                self._call(
                    "send the data", "PUT", f"images/{identity}/{place}", ok=(204,), body=body, once=True,
                    headers={"Content-Type": "application/octet-stream"},
                )  # fmt: skip
            if self.config.method == "import":
                method = {"method": {"name": "glance-direct"}}
                self._call("import", "POST", f"images/{identity}/import", ok=(202,), data=method)

        self.job.budget.call("send the data", attempt)
        return self._wait(identity)

    def _wait(self, identity: str) -> dict[str, Any]:
        deadline, pause = time.monotonic() + _IMPORT_SECONDS, 0.2
        while True:
            now = self._image(identity)
            if now is None or now["status"] in ("killed", "deleted"):
                raise PublishError(f"Glance gave the image {identity} up", hint="its operator's logs tell why")
            if now["status"] == "active":
                return now
            failed = now.get("os_glance_failed_import")
            if failed or (now["status"] not in _UNDER_WAY and self.config.method == "upload"):
                raise PublishError(f"Glance did not take the image: {now['status']} {failed or ''}".rstrip())
            if time.monotonic() > deadline:
                raise PublishError(f"the image {identity} is still {now['status']} after {_IMPORT_SECONDS:.0f} s")
            time.sleep(pause)
            pause = min(pause * 1.5, 10.0)

    def _without_twin(self, mine: dict[str, Any]) -> dict[str, Any]:
        """Two publishers at once on two machines made two: the one that was whole first stays.

        Not the one that was begun first: its publisher may still be sending when the other has its receipt already.
        What has no data yet goes too: another publisher's (who finds this one instead), or what a request left behind
        whose answer was an error.
        """
        found = self._living()
        whole = (i for i in found if i["status"] == "active" and _TAG in i["tags"])
        first = min(whole, key=lambda i: (i["updated_at"], i["id"]), default=mine)
        for twin in (i for i in found if i["id"] != first["id"] and i["status"] in ("active", "queued")):
            reporter.warn(f"another publisher was quicker: image {first['id']} stays, {twin['id']} goes")
            # One that is protected, in use or another project's stays.
            self._call("delete the twin", "DELETE", f"images/{twin['id']}", ok=(204, 403, 404, 409))
        return first

    def _compare(self, there: dict[str, Any]) -> None:
        image = self.job.image
        algorithm, value = there.get("os_hash_algo"), there.get("os_hash_value")
        same = there.get("size") == image.file_bytes
        if same and algorithm in hashlib.algorithms_available:
            with image.path.open("rb") as stream:
                same = hashlib.file_digest(stream, str(algorithm)).hexdigest() == value
        if not same:
            raise VerificationError(
                f"the image {there['id']} is not what was sent",
                hint="does the cloud convert what it imports? then publish that format, or use method: upload",
            )

    # --- pruning

    def remotes(self) -> list[Remote]:
        """See :class:`Provider`."""
        return [
            Remote(
                str(i["id"]), str(i["name"]), str(i["recvirt_digest"]), str(i.get("recvirt_profile", "")),
                datetime.fromisoformat(str(i["created_at"]).replace("Z", "+00:00")),
                in_use=True if i.get("protected") else None,
            )
            for i in self._list(tag=_TAG)
            if "recvirt_digest" in i
        ]  # fmt: skip

    def delete(self, remote: Remote) -> None:
        """See :class:`Provider`. One that a server's disk hangs on stays."""
        answer = self._call("delete an image", "DELETE", f"images/{remote.identity}", ok=(204, 404, 409))
        if answer.status_code == 409:
            reporter.warn(f"{remote.name} is in use, and stays")

    def recipe(self, published: Published) -> dict[str, Any]:
        """See :class:`Provider`."""
        return {"image": published.ids["image"], "cloud": self.config.cloud or "", "require": self.config.require or ""}


PROVIDER = OpenStack
