"""Requests to a provider: time-outs on each, one retry budget, and errors that say what the provider said.

Tried again: cut connections, time-outs, bodies that end early, 408, 423 (a lock), 425, 429, 5xx. Never tried again:
what was denied or is invalid. Addresses are shown without their query, and headers never: both carry signatures.
"""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from recvirt import __version__
from recvirt.errors import PublishError
from recvirt.publish.budget import Budget
from recvirt.publish.errors import DeniedError, TransientError

_PASSING = (408, 423, 425, 429, 500, 502, 503, 504)
_CONNECT_SECONDS = 10.0
_SAID_MAX = 400
_DENIED_HINT = "are the credentials there, not expired, and allowed to do this? docs/publishing.md lists the rights"
Body = bytes | Callable[[], Any] | None


class Http:
    """A session with one provider. Threads may share it."""

    def __init__(
        self, budget: Budget, *, timeout: float, workers: int = 4, netrc: bool = False, ca: Path | None = None
    ) -> None:
        self.budget = budget
        # Said with each request: a session's own would yield to REQUESTS_CA_BUNDLE.
        self._verify = str(ca) if ca else None
        self._timeout = (_CONNECT_SECONDS, timeout)
        self.session = requests.Session()
        # Credentials of ~/.netrc are only for those providers that say so.
        self.session.trust_env = True
        if not netrc:
            self.session.auth = _no_auth
        self.session.headers["User-Agent"] = f"recvirt/{__version__}"
        adapter = HTTPAdapter(pool_connections=workers + 2, pool_maxsize=workers + 2)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)

    def call(
        self,
        what: str,
        method: str,
        url: str,
        *,
        ok: tuple[int, ...] = (200,),
        headers: Mapping[str, str] | None = None,
        body: Body = None,
        params: Mapping[str, str] | None = None,
        data: Any = None,
        stream: bool = False,
        redirects: bool = True,
        once: bool = False,
    ) -> requests.Response:
        """The answer, if its status is in ``ok``. ``data`` is sent as JSON; a ``body`` that can be called gives a fresh
        stream for each try. ``once``: the caller knows better when to try again.
        """

        def attempt() -> requests.Response:
            content = body() if callable(body) else body
            try:
                answer = self.session.request(
                    method, url, headers=dict(headers or {}), data=content, json=data, params=dict(params or {}),
                    timeout=self._timeout, stream=stream, allow_redirects=redirects, verify=self._verify,
                )  # fmt: skip
                if not stream:
                    check_length(answer)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                raise TransientError(f"{place_of(url)}: {reason_of(error)}") from error
            except requests.exceptions.ContentDecodingError as error:
                raise TransientError(f"{place_of(url)}: the answer is damaged") from error
            except requests.RequestException as error:
                raise PublishError(f"{what}: {place_of(url)}: {reason_of(error)}") from error
            if answer.status_code not in ok:
                raise refusal(what, answer)
            return answer

        return attempt() if once else self.budget.call(what, attempt)

    def json(self, what: str, method: str, url: str, **more: Any) -> Any:
        """The answer's JSON. What is no JSON is tried again: a proxy's page, a body that was cut."""

        def attempt() -> Any:
            answer = self.call(what, method, url, once=True, **more)
            try:
                return answer.json() if answer.content else None
            except ValueError as error:
                raise TransientError(f"{place_of(url)}: the answer is no JSON") from error

        return self.budget.call(what, attempt)


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keeps requests from looking into ~/.netrc."""
    return request


def check_length(answer: requests.Response) -> None:
    """TransientError for a body that ended before its announced length."""
    announced = answer.headers.get("Content-Length", "")
    encoded = answer.headers.get("Content-Encoding")
    method = answer.request.method if answer.request is not None else ""
    if announced.isdigit() and not encoded and method != "HEAD" and len(answer.content) != int(announced):
        raise TransientError(f"{place_of(answer.url)}: the answer was cut short")


def refusal(what: str, answer: requests.Response) -> PublishError:
    """An answer that was not wanted, as an error: one to try again, a denial, or a refusal for good."""
    text = f"{place_of(answer.url)}: {answer.status_code} {said_by(answer)}".rstrip()
    if answer.status_code in _PASSING:
        return TransientError(text, after=retry_after(answer))
    if answer.status_code in (401, 403):
        return DeniedError(f"{what}: denied: {text}", hint=_DENIED_HINT)
    if answer.status_code in (507, 413):
        return PublishError(f"{what}: {text}", hint="the provider has no room (quota, disk) for this image")
    return PublishError(f"{what}: {text}")


def said_by(answer: requests.Response) -> str:
    """The provider's own words, from JSON, XML or text, on one line."""
    try:
        body = answer.text
    except requests.RequestException:
        body = ""
    try:
        words = _message_in(json.loads(body))
    except ValueError:
        match = re.search(r"<(?:Message|message|s:message)>([^<]+)</", body)
        words = match[1] if match else re.sub(r"<[^>]*>", " ", body)
    return re.sub(r"\s+", " ", words or answer.reason or "").strip()[:_SAID_MAX]


def _message_in(data: Any) -> str:
    """``message`` wherever providers put it: at the top, in ``error``, in the first of ``errors``."""
    if isinstance(data, list):
        return _message_in(data[0]) if data else ""
    if not isinstance(data, dict):
        return str(data)
    for key in ("error", "errors"):
        if data.get(key) and not isinstance(data[key], str):
            return _message_in(data[key])
    code, message = data.get("code") or data.get("id"), data.get("message") or data.get("error") or data.get("detail")
    return f"{code}: {message}" if code and message else str(message or data)


def retry_after(answer: requests.Response) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3), whichever form it has."""
    text = answer.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()) if text else None
    except (TypeError, ValueError):
        return None


def place_of(url: str | None) -> str:
    """Host and path: a query may hold a signature, user information a password."""
    text = re.sub(r"^(https?://)[^/@]*@", r"\1", url or "")
    return text.partition("?")[0]


def reason_of(error: BaseException) -> str:
    """The innermost cause in a few words, addresses' queries left out."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    text = re.sub(r"\?[^\s'\"]*", "", str(error)) or type(error).__name__
    return text[:200]
