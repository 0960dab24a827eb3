"""``digitalocean``: a custom image that DigitalOcean fetches from a URL, as a mirror's. Nesting there is unverified."""

from __future__ import annotations

import hashlib
import os
import time
from datetime import datetime
from typing import Any

from pydantic import Field

from recvirt.errors import ConfigError, PublishError, VerificationError
from recvirt.publish.errors import DeniedError
from recvirt.publish.plan import Step
from recvirt.publish.provider import (
    TAG,
    TAG_DIGEST,
    TAG_PROFILE,
    Provider,
    Published,
    Remote,
    TargetConfig,
    WebAddress,
)

_LARGEST_BYTES = 100 << 30
_FETCH_SECONDS = 7200.0
_VARIABLES = ("DIGITALOCEAN_TOKEN", "DIGITALOCEAN_ACCESS_TOKEN")


class DigitalOceanConfig(TargetConfig):
    """Where the image is fetched from."""

    url: WebAddress = Field(description="where the image's file is; {name} and {format} stand for the image's")
    region: str = Field(default="fra1", pattern=r"^[a-z]{3}[0-9]$", description="the region")
    endpoint: WebAddress = Field(default="https://api.digitalocean.com", description="the API")


class DigitalOcean(Provider[DigitalOceanConfig]):
    """One account. The token comes from DIGITALOCEAN_TOKEN."""

    name = "digitalocean"
    config_model = DigitalOceanConfig

    def check(self) -> None:
        """What DigitalOcean would refuse."""
        image = self.job.image
        if image.format not in ("qcow2", "raw", "vhd", "vmdk"):
            raise ConfigError(f"{self.job.target}: DigitalOcean takes no {image.format}")
        if image.file_bytes > _LARGEST_BYTES:
            raise ConfigError(f"{self.job.target}: an image has at most 100 GiB there")

    @property
    def _url(self) -> str:
        image = self.job.image
        return self.config.url.replace("{name}", image.name).replace("{format}", image.format)

    def _call(self, what: str, method: str, path: str, *, ok: tuple[int, ...], **more: Any) -> Any:
        token = next(filter(None, map(os.environ.get, _VARIABLES)), None)
        if token is None:
            raise DeniedError(f"{what}: there is no token", hint="set DIGITALOCEAN_TOKEN (docs/policies/README.md)")
        headers = {"Authorization": f"Bearer {token}"}
        return self.http.call(what, method, f"{self.config.endpoint}/v2/{path}", ok=ok, headers=headers, **more)

    def _images(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        page = 1
        while True:
            params = {"private": "true", "per_page": "200", "page": str(page)}
            data = self._call("list images", "GET", "images", ok=(200,), params=params).json()
            found += [image for image in data["images"] if TAG in (image.get("tags") or [])]
            if not ((data.get("links") or {}).get("pages") or {}).get("next"):
                return found
            page += 1

    def _ours(self) -> dict[str, Any] | None:
        tag = f"{TAG_DIGEST}:{self.job.image.sha256}"
        return next((image for image in self._images() if tag in image["tags"]), None)

    def _check_url(self) -> None:
        """Their fetcher asks HEAD first; and nobody can ask for the digest of what it took, so it is compared here."""
        image, url = self.job.image, self._url
        answer = self.http.call("look at the URL", "HEAD", url, ok=(200,))
        if int(answer.headers.get("Content-Length", -1)) != image.file_bytes:
            raise VerificationError(f"{url} has another length than the image", hint="publish it to the mirror first")

    def plan(self) -> tuple[Step, ...]:
        """See :class:`Provider`."""
        there = self._ours()
        if there is not None:
            return (Step("exists", f"image {there['name']} ({there['id']}) in {self.config.region}"),)
        self._check_url()
        return (Step("create", f"image {self.job.image.name} in {self.config.region}", note="fetched from the URL"),)

    def body(self) -> dict[str, Any]:
        """The request for a custom image."""
        image = self.job.image
        tags = [TAG, f"{TAG_DIGEST}:{image.sha256}", f"{TAG_PROFILE}:{image.profile}"]
        return {
            "name": image.name, "url": self._url, "region": self.config.region, "distribution": "Debian",
            "description": f"recvirt {image.profile}, kernel {image.kernel}"[:500], "tags": tags,
        }  # fmt: skip

    def publish(self) -> Published:
        """See :class:`Provider`."""
        there, checked = self._ours(), "DigitalOcean has an image with the same digest on its tag"
        if there is None:
            checked = self._compare_url()
            there = self._call("make the image", "POST", "images", ok=(202,), data=self.body()).json()["image"]
        identity, deadline = str(there["id"]), time.monotonic() + _FETCH_SECONDS
        while there["status"] != "available":
            if there["status"] == "deleted" or there.get("error_message"):
                raise PublishError(f"DigitalOcean did not take the image: {there.get('error_message') or 'deleted'}")
            if time.monotonic() > deadline:
                raise PublishError(f"image {identity} is still {there['status']}", hint="publish it again")
            time.sleep(5.0 if there["status"] == "pending" else 1.0)
            there = self._call("look at the image", "GET", f"images/{identity}", ok=(200,)).json()["image"]
        return Published(ids={"image": identity}, checked=checked, locations=(self.config.region,))

    def _compare_url(self) -> str:
        self._check_url()
        digest = hashlib.sha256()
        answer = self.http.call("read the URL", "GET", self._url, ok=(200,), stream=True)
        for data in answer.iter_content(1 << 20):
            digest.update(data)
        if digest.hexdigest() != self.job.image.sha256:
            raise VerificationError(f"{self._url} holds another image", hint="publish it to the mirror first")
        return "what the URL holds was compared before DigitalOcean fetched it"

    def remotes(self) -> list[Remote]:
        """See :class:`Provider`."""
        found = []
        for image in self._images():
            words = dict(tag.split(":", 1) for tag in image["tags"] if ":" in tag)
            made = datetime.fromisoformat(image["created_at"].replace("Z", "+00:00"))
            digest, profile = words.get(TAG_DIGEST, ""), words.get(TAG_PROFILE, "")
            found.append(Remote(str(image["id"]), image["name"], digest, profile, made))
        return found

    def delete(self, remote: Remote) -> None:
        """See :class:`Provider`."""
        self._call("delete an image", "DELETE", f"images/{remote.identity}", ok=(204, 404))

    def recipe(self, published: Published) -> dict[str, Any]:
        """See :class:`Provider`."""
        return {"image": published.ids["image"], "region": self.config.region}


PROVIDER = DigitalOcean
