"""A client of the OCI distribution API (v1.1): blobs in chunks that can be gone on with, manifests, tags, tokens."""

from __future__ import annotations

import base64
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import requests

from recvirt.errors import PublishError
from recvirt.publish.errors import DeniedError, TransientError
from recvirt.publish.http import Http, place_of, refusal

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_HINT = "log in: docker login, podman login, or RECVIRT_REGISTRY_USER and RECVIRT_REGISTRY_PASSWORD"


def stored_login(host: str) -> tuple[str, str] | None:
    """User and password for a registry: from the environment, else from where docker and podman keep them."""
    user = os.environ.get("RECVIRT_REGISTRY_USER")
    if user is not None:
        return user, os.environ.get("RECVIRT_REGISTRY_PASSWORD", "")
    folder = os.environ.get("DOCKER_CONFIG") or str(Path.home() / ".docker")
    places = [Path(folder, "config.json"), Path(os.environ.get("XDG_RUNTIME_DIR", "/run"), "containers/auth.json")]
    for path in places:
        try:
            word = json.loads(path.read_text())["auths"][host]["auth"]
            user, _, password = base64.b64decode(word).decode().partition(":")
            return user, password
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


class Registry:
    """One repository of a registry."""

    def __init__(self, http: Http, repository: str, *, insecure: bool) -> None:
        host, _, self.path = repository.partition("/")
        self._host = host
        self._base = f"{'http' if insecure else 'https'}://{host}"
        self._http = http
        self._authorization: str | None = None

    def url(self, rest: str) -> str:
        """The address of a part of the repository."""
        return f"{self._base}/v2/{self.path}/{rest}"

    def call(
        self, what: str, method: str, url: str, *, ok: tuple[int, ...], headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> requests.Response:  # fmt: skip
        """A request with the token that the registry wants; asks for a new one when the old one ran out."""
        for last in (False, True):
            said = {**(headers or {}), **({"Authorization": self._authorization} if self._authorization else {})}
            answer = self._http.call(what, method, url, ok=(*ok, 401), headers=said, **more)
            if answer.status_code != 401 or 401 in ok:
                return answer
            if last:
                break
            self._authorization = self._authorize(what, answer)
        error = refusal(what, answer)
        raise DeniedError(error.message, hint=_HINT)

    def _authorize(self, what: str, answer: requests.Response) -> str:
        challenge = answer.headers.get("WWW-Authenticate", "")
        login = stored_login(self._host)
        if challenge.lower().startswith("basic"):
            if login is None:
                raise DeniedError(f"{what}: {self._host} wants a login", hint=_HINT)
            return "Basic " + base64.b64encode(":".join(login).encode()).decode()
        asked = dict(re.findall(r'([a-z]+)="([^"]*)"', challenge))
        if not challenge.lower().startswith("bearer") or "realm" not in asked:
            raise DeniedError(f"{what}: {self._host} wants a login of a kind that is not known here", hint=_HINT)
        params = {"scope": f"repository:{self.path}:pull,push,delete"}
        if "service" in asked:
            params["service"] = asked["service"]
        headers = {}
        if login is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(":".join(login).encode()).decode()
        data = self._http.json(f"get a token of {self._host}", "GET", asked["realm"], params=params, headers=headers)
        token = data.get("token") or data.get("access_token")
        if not token:
            raise DeniedError(f"{what}: {self._host} gave no token", hint=_HINT)
        return f"Bearer {token}"

    # --- blobs

    def has_blob(self, digest: str) -> bool:
        """Whether a blob is there."""
        answer = self.call("look for a blob", "HEAD", self.url(f"blobs/{digest}"), ok=(200, 404))
        return answer.status_code == 200

    def put_blob(self, digest: str, content: bytes) -> None:
        """Send a small blob in one piece, unless it is there."""
        if not self.has_blob(digest):
            url = self.begin_upload()
            self.finish_upload(url, digest, content)

    def begin_upload(self) -> str:
        """Begin an upload; the address where its first chunk goes."""
        answer = self.call("begin an upload", "POST", self.url("blobs/uploads/"), ok=(202,))
        return self._location(answer)

    def upload_offset(self, url: str) -> tuple[str, int] | None:
        """Where an upload goes on, and from which byte; None when the registry has forgotten it."""
        answer = self.call("ask how far an upload is", "GET", url, ok=(204, 202, 404, 400))
        if answer.status_code in (404, 400):
            return None
        last = answer.headers.get("Range", "0-0").rpartition("-")[2]
        # An empty upload says 0-0 too, as one byte would (distribution-spec): no chunk of ours has one byte.
        return self._location(answer), 0 if last in ("", "0") else int(last) + 1

    def send_chunk(self, url: str, offset: int, data: bytes) -> str:
        """Send one chunk, once; the address of the next. TransientError: ask how far it came."""
        headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{offset}-{offset + len(data) - 1}"}
        answer = self.call("send a chunk", "PATCH", url, ok=(202, 416), headers=headers, body=data, once=True)
        if answer.status_code == 416:
            raise TransientError(f"{place_of(url)}: the chunk does not fit to what is there")
        return self._location(answer)

    def finish_upload(self, url: str, digest: str, content: bytes = b"") -> None:
        """Give the blob its digest. PublishError when the registry has another one."""
        joint = "&" if "?" in url else "?"
        headers = {"Content-Type": "application/octet-stream"}
        whole = f"{url}{joint}digest={urllib.parse.quote(digest)}"
        try:
            self.call("finish an upload", "PUT", whole, ok=(201,), headers=headers, body=content)
        except PublishError:
            # The answer to an earlier try may have been lost: then it is there.
            if not self.has_blob(digest):
                raise

    def _location(self, answer: requests.Response) -> str:
        return urllib.parse.urljoin(answer.url, answer.headers.get("Location", "")) or answer.url

    # --- manifests

    def manifest(self, reference: str) -> tuple[bytes, str] | None:
        """A manifest's bytes and digest by tag or digest; None when it is not there."""
        headers = {"Accept": MANIFEST_TYPE}
        url = self.url(f"manifests/{reference}")
        answer = self.call(f"read {reference}", "GET", url, ok=(200, 404), headers=headers)
        if answer.status_code == 404:
            return None
        return answer.content, answer.headers.get("Docker-Content-Digest", "")

    def put_manifest(self, reference: str, content: bytes) -> None:
        """Put a manifest under a tag."""
        headers = {"Content-Type": MANIFEST_TYPE}
        url = self.url(f"manifests/{reference}")
        self.call(f"tag {reference}", "PUT", url, ok=(201,), headers=headers, body=content)

    def delete_manifest(self, digest: str) -> None:
        """Delete a manifest and with it its tags; one that is gone is no fault."""
        answer = self.call("delete a manifest", "DELETE", self.url(f"manifests/{digest}"), ok=(202, 404, 405))
        if answer.status_code == 405:
            raise PublishError(
                f"{self._host} deletes nothing", hint="its operator can allow it (storage.delete.enabled)"
            )

    def tags(self) -> list[str]:
        """All tags of the repository."""
        found: list[str] = []
        url = self.url("tags/list?n=1000")
        while url:
            answer = self.call("list the tags", "GET", url, ok=(200, 404))
            if answer.status_code == 404:
                return found
            found += answer.json().get("tags") or []
            following = answer.links.get("next", {}).get("url")
            url = urllib.parse.urljoin(answer.url, following) if following else ""
        return found


def resume(registry: Registry, read: Callable[[int, int], bytes], size: int, chunk: int, start: str | None,
           note: Callable[[str, int], None], pause: Callable[[str, Callable[[], None]], None]) -> str:  # fmt: skip
    """Send ``size`` bytes in chunks from where the upload ``start`` stands (None: a new one); the address to finish at.

    ``note(address, offset)`` is told after each chunk, ``pause`` runs a step under the budget of retries.
    """
    state: list[Any] = [None, 0]

    def sync() -> None:
        found = registry.upload_offset(state[0]) if state[0] else None
        state[:] = list(found) if found else [registry.begin_upload(), 0]
        note(state[0], state[1])

    def step() -> None:
        try:
            data = read(state[1], min(chunk, size - state[1]))
            state[0] = registry.send_chunk(state[0], state[1], data)
        except TransientError:
            sync()
            raise
        state[1] += len(data)
        note(state[0], state[1])

    state[0] = start
    sync()
    while state[1] < size:
        pause("send the layer", step)
    return str(state[0])
