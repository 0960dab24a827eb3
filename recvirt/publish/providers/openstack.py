"""``openstack``: an image of Glance (API v2), by upload or by stage and import, with properties for nesting."""

from __future__ import annotations

import hashlib
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property, partial
from typing import Any, Literal

from pydantic import Field

from recvirt.errors import ConfigError, PublishError, VerificationError
from recvirt.publish.errors import DeniedError
from recvirt.publish.http import refusal
from recvirt.publish.openstackauth import Identity
from recvirt.publish.plan import Step
from recvirt.publish.provider import Provider, Published, Remote, TargetConfig, WebAddress
from recvirt.publish.transfer import FileBody, Progress
from recvirt.ui import reporter

_TAG = "recvirt"
_FORMATS = {"qcow2": "qcow2", "raw": "raw", "vhd": "vhd", "vmdk": "vmdk"}
#: Who created an image, and alone sends to it.
_PUBLISHER = "recvirt_publisher"
_GONE = ("killed", "deleted", "pending_delete")
#: An image that nobody sends to, or that waits for its import, is another's abandoned one after so many seconds...
_IDLE_SECONDS = 300.0
#: ...and one that is being sent or imported, when nothing else becomes of it.
_BUSY_SECONDS = 4 * 3600.0
#: How often Glance may refuse data for an image that seems to wait for it.
_REFUSALS = 4
#: Deleted images whose identities are passed over; Glance's operator purges such records now and then.
_IDENTITIES = 256


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

    def _ours(self) -> dict[str, Any] | None:
        """Our image of this digest: the oldest that is whole, else the oldest that is on its way."""
        found = [i for i in self._list(recvirt_digest=self.job.image.sha256) if i["status"] not in _GONE]
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
        there, sent = self._ours(), 0
        if there is None or there["status"] != "active":
            there, sent = self._make()
        if _TAG not in there["tags"]:
            # What a creation left behind whose answer was an error. Not before: Glance would write the status back too.
            # One that another project shares stays as it is.
            self._call("tag the image", "PUT", f"images/{there['id']}/tags/{_TAG}", ok=(204, 403))
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

    # Publishers on several machines, who don't see each other, make one image of a digest: its identity follows from
    # the digest, and Glance gives an identity out once, even if its image is deleted later. Who creates the image (it
    # bears that publisher's mark) is the only one to send to it; the others wait until it is whole. One that its
    # publisher abandoned is deleted, and everybody, its publisher too, goes on to the digest's next identity: the first
    # one whose image is not deleted, which is the same for all.

    def _make(self) -> tuple[dict[str, Any], int]:
        """Our image, made whole by us or by another publisher; and how many bytes we sent to it."""
        sent = 0
        with self.job.journal() as journal:
            # A run that was killed left the mark in the journal: what it created is ours.
            mark = journal.facts.get("publisher") or uuid.uuid4().hex
            if not journal.facts:
                journal.begin({"publisher": mark})
            for identity in self._identities():
                there = self._create(identity, mark)
                if there is not None:
                    attempt = _Attempt(self, there, is_mine=there.get(_PUBLISHER) == mark)
                    there, sent = attempt.whole(), sent + attempt.sent
                if there is not None:
                    journal.forget()
                    return there, sent
        raise PublishError(
            f"Glance has no identity left for {self.job.image.name}: {_IDENTITIES} were deleted",
            hint="its operator can purge the records of deleted images (glance-manage db purge)",
        )

    def _identities(self) -> Iterator[str]:
        for number in range(_IDENTITIES):
            yield str(uuid.uuid5(uuid.NAMESPACE_URL, f"recvirt:{self.job.image.sha256}:{number}"))

    def _create(self, identity: str, mark: str) -> dict[str, Any] | None:
        """The image of this identity, created now or there before; None when it was deleted, or can't be seen."""
        image = self.job.image
        body = {
            "id": identity, "name": image.name, "disk_format": _FORMATS[image.format], "container_format": "bare",
            "visibility": self.config.visibility, "protected": self.config.protected, "tags": [_TAG],
            "min_disk": -(-image.virtual_bytes // (1 << 30)), _PUBLISHER: mark, **self.properties(),
        }  # fmt: skip
        answer = self._call("create the image", "POST", "images", ok=(201, 409), data=body)
        return dict(answer.json()) if answer.status_code == 201 else self._image(identity)

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


class _Attempt:
    """Brings one image to its whole state, or sees another publisher do so."""

    def __init__(self, cloud: OpenStack, there: dict[str, Any], *, is_mine: bool) -> None:
        self._cloud, self._there, self._is_mine = cloud, there, is_mine
        self._identity = str(there["id"])
        self._staged = False
        self._refused = 0
        self.sent = 0

    def whole(self) -> dict[str, Any] | None:
        """The image once it is active; None once it is deleted, by us if it was abandoned."""
        now: dict[str, Any] | None = self._there
        if not self._is_mine:
            reporter.info(f"another publisher makes image {self._identity}: waiting for it")
        seen, since, pause = None, time.monotonic(), 0.2
        while now is not None and now["status"] not in _GONE:
            if now["status"] == "active":
                return now
            if now["status"] == "deactivated":
                raise PublishError(f"image {self._identity} is deactivated", hint="openstack image set --activate")
            look = (now["status"], now.get("size"), now["updated_at"])
            if look != seen:
                seen, since, pause = look, time.monotonic(), 0.2
            if self._is_mine and self._is_idle(now) and self._refused < _REFUSALS and not self._failed(now):
                self._cloud.job.budget.call("send the data", self._advance)
            elif self._refused >= _REFUSALS or time.monotonic() - since > self._patience(now) or self._failed(now):
                break
            else:
                time.sleep(pause)
                pause = min(pause * 1.5, 10.0)
            now = self._cloud._image(self._identity)
        if now is not None:
            reporter.warn(f"image {self._identity} was left {now['status']}: it goes, and another one is made")
            # One that is protected or another project's stays.
            self._cloud._call("delete what was left", "DELETE", f"images/{self._identity}", ok=(204, 403, 404, 409))
        return None

    def _is_idle(self, now: dict[str, Any]) -> bool:
        """Whether it waits for its publisher: for data, or for the import of data that has arrived."""
        arrived = self._staged or now.get("size") is not None
        return now["status"] == "queued" or (now["status"] == "uploading" and arrived)

    def _patience(self, now: dict[str, Any]) -> float:
        # Of ours no request is open any more, but Glance may still be importing.
        waits = self._is_idle(now) or (self._is_mine and now["status"] != "importing")
        return _IDLE_SECONDS if waits else _BUSY_SECONDS

    def _failed(self, now: dict[str, Any]) -> bool:
        """Whether an import of ours failed. PublishError for one of this very run: another would fail as well."""
        failed = now.get("os_glance_failed_import") if self._is_mine else None
        if failed and self.sent:
            raise PublishError(f"Glance did not take the image: {now['status']}, {failed}")
        return bool(failed)

    def _advance(self) -> None:
        """Send the data, or have it imported; Glance can't go on with a part of it."""
        now = self._cloud._image(self._identity)
        if now is None or not self._is_idle(now):
            return
        ok, image = (202, 204, 404, 409, 410), self._cloud.job.image
        if now["status"] == "uploading":
            method = {"method": {"name": "glance-direct"}}
            answer = self._cloud._call("import", "POST", f"images/{self._identity}/import", ok=ok, data=method)
        else:
            place = "stage" if self._cloud.config.method == "import" else "file"
            progress = Progress(f"send {image.name}", image.file_bytes)
            answer = self._cloud._call(
                "send the data", "PUT", f"images/{self._identity}/{place}", ok=ok, once=True,
                body=partial(FileBody, image.path, progress), headers={"Content-Type": "application/octet-stream"},
            )  # fmt: skip
            self._staged = answer.status_code == 204
            self.sent = image.file_bytes
        if answer.status_code >= 400:
            # Deleted; or a killed run's request still holds it, or its data lies there.
            self._refused += 1
            time.sleep(0.5)


PROVIDER = OpenStack
