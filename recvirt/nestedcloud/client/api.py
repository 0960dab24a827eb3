"""The API as Python calls: retries that can't do a thing twice, and refusals as one kind of error."""

from __future__ import annotations

import json
import os
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

VARIABLE = "RECVIRT_CLOUD_CLIENT"
_TIMEOUT_SECONDS = (10, 60)
_TRIES = 4
_POLL_SECONDS = 0.5


class ApiError(Exception):
    """What the cloud answered, or that it did not. ``kind`` is for programs."""

    def __init__(self, message: str, *, kind: str = "", hint: str = "", data: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message, self.kind, self.hint, self.data = message, kind, hint, dict(data or {})


@dataclass(frozen=True)
class Access:
    """Where a cloud is and how one gets in. ``ca`` is a file with its certificate authority."""

    url: str
    token: str
    project: str = "default"
    ca: str = ""


def access_path() -> Path:
    """The file with the access."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get(VARIABLE) or home / "recvirt-cloud" / "client.toml")


def load_access(project: str | None = None) -> Access:
    """From the file; the project may be another one. ApiError tells how to get there."""
    path = access_path()
    try:
        data = tomllib.loads(path.read_text())
        access = Access(**data)
    except FileNotFoundError:
        raise ApiError(
            f"{path} is not there, so no cloud is known",
            hint=f"recvirt-cloud login URL, or {VARIABLE} with the file that 'recvirt-cloud dev' names",
        ) from None
    except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
        raise ApiError(f"{path}: {error}") from None
    return Access(access.url, access.token, project or access.project, access.ca)


def save_access(access: Access, path: Path) -> None:
    """For this user's eyes only: the token is a key."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lines = [f"{name} = {json.dumps(value)}" for name, value in vars(access).items() if value]
    part = path.with_name(f".{path.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write("\n".join(lines) + "\n")
    part.rename(path)


class Api:
    """One cloud, as one user, in one project."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {access.token}"
        self._session.headers["Accept"] = "application/json"
        if access.ca:
            self._session.verify = access.ca

    def _url(self, path: str) -> str:
        return f"{self.access.url.rstrip('/')}/api/v1/{path}"

    def below(self, path: str) -> str:
        """A path in the project."""
        return f"projects/{self.access.project}/{path}"

    def call(self, method: str, path: str, body: Any = None, *, data: bytes | None = None, **query: Any) -> Any:
        """One request, with ``body`` as JSON or ``data`` as they are. What changes something carries a key, so that it
        is done once however often it is sent.
        """
        headers = {"Idempotency-Key": uuid.uuid4().hex} if method != "GET" else {}
        if data is not None:
            headers["Content-Type"] = "application/octet-stream"
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                answer = self._session.request(
                    method,
                    self._url(path),
                    json=body,
                    data=data,
                    params=query,
                    headers=headers,
                    timeout=_TIMEOUT_SECONDS,
                )
            except requests.RequestException as error:
                problem = str(error)
                continue
            if answer.status_code in (502, 504):
                problem = f"the server answered {answer.status_code}"
                continue
            return self._result(answer)
        raise ApiError(
            f"{self.access.url} does not answer: {problem}", kind="unreachable", hint="is the cloud running?"
        )

    @staticmethod
    def _result(answer: requests.Response) -> Any:
        if answer.status_code == 204:
            return None
        try:
            data = answer.json()
        except ValueError:
            raise ApiError(f"{answer.url} answered {answer.status_code} and no JSON", kind="protocol") from None
        if answer.ok:
            return data
        kind = str(data.get("type", ""))
        hints = {
            "not_authenticated": "log in: recvirt-cloud login URL",
            "authentication_failed": "the token was revoked or has expired: log in again",
            "operation-active": f"recvirt-cloud operation {data.get('operation', '')}",
            "restart-needed": "--restart allows it",
        }
        raise ApiError(_text(data), kind=kind, hint=hints.get(kind, ""), data=data)

    def pages(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list."""
        offset = 0
        while True:
            data = self.call("GET", path, limit=100, offset=offset, **query)
            yield from data["results"]
            offset += len(data["results"])
            if not data["next"] or not data["results"]:
                return

    def stream(self, path: str, last: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Server-sent events after the one called ``last``, each with its id, until the connection ends."""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
        try:
            with self._session.get(self._url(path), headers=headers, stream=True, timeout=_TIMEOUT_SECONDS) as answer:
                if not answer.ok:
                    self._result(answer)
                fields: dict[str, str] = {}
                for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
                    name, _, value = line.partition(":")
                    if line and name:
                        fields[name] = value.removeprefix(" ")
                    elif not line and "data" in fields:
                        yield fields.get("id", ""), json.loads(fields["data"])
                        fields = {}
        except (requests.RequestException, ValueError) as error:
            raise ApiError(f"the connection to {self.access.url} broke: {error}", kind="unreachable") from None

    def wait(
        self, operation: Mapping[str, Any], seconds: float, progress: Callable[[Mapping[str, Any]], None]
    ) -> dict[str, Any]:
        """Until an operation has ended; ApiError when it failed or time is up (it then goes on)."""
        deadline = time.monotonic() + seconds
        now = dict(operation)
        while now["finished"] is None:
            if time.monotonic() > deadline:
                raise ApiError(
                    f"{now['kind']} has not ended after {seconds:.0f} s ({now['phase']}); it goes on",
                    kind="timed-out", hint=f"recvirt-cloud operation {now['uuid']}",
                )  # fmt: skip
            progress(now)
            time.sleep(_POLL_SECONDS)
            now = self.call("GET", self.below(f"operations/{now['uuid']}"))
        progress(now)
        if now["phase"] != "succeeded":
            hint = "--restart allows it" if now["fault"] == "restart-needed" else ""
            raise ApiError(f"{now['kind']} {now['phase']}: {now['message']}", kind=now["fault"], hint=hint, data=now)
        return now


def _text(data: Mapping[str, Any]) -> str:
    if isinstance(errors := data.get("errors"), dict):
        lines = [f"{name}: {' '.join(map(str, texts))}" for name, texts in errors.items() if isinstance(texts, list)]
        return "; ".join(lines) or str(errors)
    return str(data.get("title") or data)
