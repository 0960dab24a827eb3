"""Objects of Google's Cloud Storage by its JSON API: resumable uploads, and what an object holds."""

from __future__ import annotations

import base64
import hashlib
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from recvirt.errors import PublishError, VerificationError
from recvirt.publish.errors import DeniedError, MissingSdkError, TransientError
from recvirt.publish.http import Http
from recvirt.publish.journal import Journal
from recvirt.publish.sparsetar import SparseTar, Stream
from recvirt.publish.transfer import Progress
from recvirt.ui import reporter

#: A multiple of 256 KiB, as the service wants.
CHUNK = 8 << 20
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_LATER = "gcloud auth application-default login; docs/policies/gcp.yaml lists the rights that are needed"


class Google:
    """Requests with a token of google-auth's default chain, or without one for a stand-in."""

    def __init__(self, http: Http, *, anonymous: bool) -> None:
        self._http = http
        self._credentials: Any = None
        self._anonymous = anonymous

    def call(self, what: str, method: str, url: str, **more: Any) -> Any:
        """See :meth:`recvirt.publish.http.Http.call`."""
        headers = {**more.pop("headers", {}), **self._authorization()}
        return self._http.call(what, method, url, headers=headers, **more)

    def _authorization(self) -> dict[str, str]:
        if self._anonymous:
            return {}
        try:
            import google.auth
            from google.auth import exceptions
            from google.auth.transport.requests import Request
        except ImportError:
            raise MissingSdkError("google-auth", "gcp") from None
        try:
            if self._credentials is None:
                self._credentials, _ = google.auth.default(scopes=[_SCOPE])
            if not self._credentials.valid:
                self._credentials.refresh(Request())
        except exceptions.TransportError as error:
            raise TransientError(f"no token of Google: {error}") from None
        except exceptions.GoogleAuthError as error:
            raise DeniedError(f"no token of Google: {str(error).splitlines()[0]}", hint=_LATER) from None
        return {"Authorization": f"Bearer {self._credentials.token}"}


class Bucket:
    """One bucket."""

    def __init__(self, google: Google, endpoint: str, name: str) -> None:
        self._google = google
        self._endpoint = endpoint
        self._name = name

    def _object(self, name: str) -> str:
        return f"{self._endpoint}/storage/v1/b/{self._name}/o/{urllib.parse.quote(name, safe='')}"

    def look(self, name: str) -> dict[str, Any] | None:
        """An object's facts, or None when it is not there."""
        answer = self._google.call("look for the object", "GET", self._object(name), ok=(200, 404))
        return dict(answer.json()) if answer.status_code == 200 else None

    def delete(self, name: str) -> None:
        """Delete an object; one that is gone is no fault."""
        self._google.call("delete the object", "DELETE", self._object(name), ok=(200, 204, 404))

    def begin(self, name: str, metadata: Mapping[str, str]) -> str:
        """Begin a resumable upload; the address of its session, which lets whoever knows it write the object."""
        # Only where there is none: of two publishers at once one wins.
        url = f"{self._endpoint}/upload/storage/v1/b/{self._name}/o"
        params = {"uploadType": "resumable", "name": name, "ifGenerationMatch": "0"}
        headers = {"X-Upload-Content-Type": "application/gzip"}
        body = {"name": name, "contentType": "application/gzip", "metadata": dict(metadata)}
        answer = self._google.call(
            "begin the upload", "POST", url, ok=(200, 201), params=params, headers=headers, data=body
        )
        return urllib.parse.urljoin(url, str(answer.headers["Location"]))

    def offset(self, session: str) -> int | None:
        """How many bytes a session has; -1 when it is finished, None when it is not known any more."""
        headers = {"Content-Range": "bytes */*", "Content-Length": "0"}
        answer = self._google.call(
            "ask how far the upload is", "PUT", session, ok=(200, 201, 308, 404, 410, 499), headers=headers,
            redirects=False,
        )  # fmt: skip
        if answer.status_code in (200, 201):
            return -1
        return _offset_after(answer) if answer.status_code == 308 else None

    def send(self, session: str, data: bytes, start: int, *, is_last: bool) -> int:
        """Send bytes once; how many the session has then, -1 when it is finished."""
        total = str(start + len(data)) if is_last else "*"
        span = f"{start}-{start + len(data) - 1}" if data else "*"
        answer = self._google.call(
            "send a chunk", "PUT", session, ok=(200, 201, 308), headers={"Content-Range": f"bytes {span}/{total}"},
            body=data, redirects=False, once=True,
        )  # fmt: skip
        return -1 if answer.status_code in (200, 201) else _offset_after(answer)

    def read(self, name: str) -> Any:
        """An object's content, as an answer to iterate over."""
        url = self._object(name)
        return self._google.call("read the object", "GET", url, ok=(200,), params={"alt": "media"}, stream=True)


def _offset_after(answer: Any) -> int:
    match = re.search(r"(\d+)-(\d+)$", answer.headers.get("Range", ""))
    return int(match[2]) + 1 if match else 0


class Upload:
    """Sends one image's archive to one object."""

    def __init__(self, bucket: Bucket, name: str, tar: SparseTar, journal: Journal) -> None:
        self._bucket = bucket
        self._name = name
        self._tar = tar
        self._journal = journal

    def run(self, metadata: Mapping[str, str], pause: Callable[[str, Callable[[], None]], None]) -> tuple[int, bytes]:
        """Send what is missing; how many bytes were sent now, and the MD5 of all. ``pause``: the budget's call."""
        session = self._journal.facts.get("session", "")
        start = self._bucket.offset(session) if session else None
        if start is None:
            session, start = self._new(metadata), 0
        elif start > 0:
            reporter.info(f"{start} bytes are there from an earlier run")
        stream = Stream(self._tar, CHUNK)
        progress = Progress(f"send {self._name}", None)
        state = [start]

        def step() -> None:
            data = stream.seek(state[0])
            if data is None:
                raise VerificationError(f"{self._name}: the upload stands at {state[0]}, where no byte of ours is")
            try:
                state[0] = self._bucket.send(session, data, state[0], is_last=stream.is_last)
            except TransientError:
                found = self._bucket.offset(session)
                if found is None:
                    raise PublishError("Cloud Storage has forgotten the upload", hint="publish it again") from None
                state[0] = found
                if found != -1:
                    raise
            progress.add(len(data))

        while state[0] != -1:
            pause("send the archive", step)
        # The digest is of all bytes: also of those that an earlier run sent.
        while not stream.is_last:
            stream.step()
        return progress.sent, stream.md5()

    def _new(self, metadata: Mapping[str, str]) -> str:
        session = self._bucket.begin(self._name, metadata)
        self._journal.begin({"session": session})
        return session


def compare(bucket: Bucket, name: str, md5: bytes) -> str:
    """VerificationError unless the object holds what was sent: by the service's digest, else by its bytes."""
    facts = bucket.look(name)
    if facts is None:
        raise VerificationError(f"the object {name} is gone", hint="publish it again")
    if "md5Hash" in facts:
        same, how = base64.b64decode(facts["md5Hash"]) == md5, "Cloud Storage has the same MD5"
    else:
        digest = hashlib.md5(usedforsecurity=False)
        for data in bucket.read(name).iter_content(1 << 20):
            digest.update(data)
        same, how = digest.digest() == md5, "read back, MD5 equal"
    if not same:
        raise VerificationError(f"the object {name} is not what was sent", hint="delete it and publish again")
    return how
