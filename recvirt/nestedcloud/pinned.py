"""HTTPS to a cloud's central node whose certificate is known by its digest; and each failure with what to do about it.

Standard library only: it runs before a machine is part of a cloud.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from recvirt.nestedcloud.statuses import ExitStatus

_SECONDS = 20.0
_ANSWER_BYTES_MAX = 1024**2
#: Clocks that are further apart make WireGuard and certificates refuse what is right.
CLOCK_SECONDS_MAX = 300.0


class LinkError(Exception):
    """The central node can't be asked, or says no. ``kind`` is for programs, ``hint`` says what to do."""

    def __init__(self, message: str, hint: str, *, kind: str = "", status: ExitStatus = ExitStatus.UNREACHABLE) -> None:
        super().__init__(message)
        self.hint, self.kind, self.status = hint, kind, status


@dataclass(frozen=True)
class Place:
    """Where an API is."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}" + ("" if self.port == 443 else f":{self.port}")


def place_of(url: str) -> Place:
    """From a URL. LinkError when it is none, or one that does not encrypt."""
    try:
        parts = urlsplit(url if "//" in url else f"https://{url}")
        port = parts.port or 443
    except ValueError:
        parts, port = urlsplit(""), 443
    if parts.scheme != "https" or not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
        raise LinkError(f"{url[:200]!r} is no address of a cloud", "want https://HOST", status=ExitStatus.USAGE)
    return Place(parts.hostname, port)


def _trouble(place: Place, error: OSError) -> LinkError:
    """A failure to connect in words, with what to do."""
    what, hint = str(error), "is recvirt-cloud-front running there? systemctl status recvirt-cloud.target"
    if isinstance(error, socket.gaierror):
        hint = f"{place.host} has no address that this machine knows: try the central node's IP address"
    elif isinstance(error, ssl.SSLCertVerificationError):
        return _certificate_trouble(place, error)
    elif isinstance(error, TimeoutError):
        what, hint = "it does not answer", f"does a firewall between the two let TCP port {place.port} through?"
    elif isinstance(error, ConnectionRefusedError):
        what = "nothing listens there"
    elif error.errno in (101, 113):
        hint = "there is no way there: look at ip route, and at the central node's address"
    return LinkError(f"{place} can't be reached: {what}", hint)


def _certificate_trouble(place: Place, error: ssl.SSLCertVerificationError) -> LinkError:
    hint = "give the certificate's digest: --fingerprint, or the whole invitation"
    if error.verify_code in (9, 10):
        hint = f"is this machine's clock right? It is {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC here"
    return LinkError(f"the certificate of {place} is not good: {error.verify_message}", hint, kind="certificate")


def _unchecked() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def certificate_of(place: Place, fingerprint: str) -> str:
    """The certificate that an API shows, as PEM, if it is the one with this digest. LinkError otherwise.

    Nothing is sent there yet.
    """
    try:
        with (
            socket.create_connection((place.host, place.port), timeout=_SECONDS) as wire,
            _unchecked().wrap_socket(wire, server_hostname=place.host) as secured,
        ):
            shown = secured.getpeercert(binary_form=True) or b""
    except OSError as error:
        raise _trouble(place, error) from None
    found = sha256(shown).hexdigest()
    if found != fingerprint:
        raise LinkError(
            f"{place} shows another certificate than the one that was expected: {found}",
            "it was changed (make a new invitation, or give --fingerprint after a look at the central node: openssl "
            "x509 -noout -fingerprint -sha256 -in /etc/recvirt-cloud/tls/cert.pem), or somebody stands between",
            kind="fingerprint", status=ExitStatus.REFUSED,
        )  # fmt: skip
    return ssl.DER_cert_to_PEM_cert(shown)


def pinned_context(pem: str) -> ssl.SSLContext:
    """Takes this one certificate and no other, whoever has signed it and whatever names are in it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=pem)
    return context


def tunnel_context() -> ssl.SSLContext:
    """For the central node's address in the tunnel: that the other end is the right one, WireGuard has seen to, as long
    as what is sent leaves by that interface (``device``).
    """
    return _unchecked()


@dataclass(frozen=True)
class Answer:
    """What came back; ``clock_seconds`` is by how much the other machine's clock is ahead."""

    data: dict[str, Any]
    clock_seconds: float


class _Connection(http.client.HTTPSConnection):
    """One that leaves by a certain interface, or not at all (root)."""

    def __init__(self, place: Place, seconds: float, context: ssl.SSLContext, device: str) -> None:
        super().__init__(place.host, place.port, timeout=seconds, context=context)
        self._tls, self._device = context, device

    def connect(self) -> None:
        """As the library does, but for the interface."""
        if not self._device:
            return super().connect()
        family, kind, number, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        wire = socket.socket(family, kind, number)
        try:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._device.encode())
            wire.settimeout(self.timeout)
            wire.connect(address)
            self.sock = self._tls.wrap_socket(wire, server_hostname=self.host)
        except BaseException:
            wire.close()
            raise


def ask(
    place: Place, path: str, body: Mapping[str, Any], context: ssl.SSLContext, seconds: float = _SECONDS,
    device: str = "",
) -> Answer:  # fmt: skip
    """POST JSON, by the interface ``device`` if one is named. LinkError when there is no answer, or it is a refusal:
    then ``kind`` is the API's own word.
    """
    connection = _Connection(place, seconds, context, device)
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
    try:
        connection.request("POST", f"/api/v1/{path}", json.dumps(body), headers)
        answer = connection.getresponse()
        raw = answer.read(_ANSWER_BYTES_MAX)
    except OSError as error:
        raise _trouble(place, error) from None
    except http.client.HTTPException as error:
        raise LinkError(f"{place} does not speak HTTP: {type(error).__name__}", "is it the cloud's address?") from None
    finally:
        connection.close()
    try:
        data = json.loads(raw)
        assert isinstance(data, dict)
    except (ValueError, AssertionError):
        hint = "try again in a minute" if answer.status >= 500 else "is it the cloud's address?"
        raise LinkError(f"{place} answered {answer.status}, and nothing that a cloud says", hint) from None
    if answer.status != http.client.OK:
        raise _refusal(answer.status, data)
    return Answer(data, _ahead(answer.getheader("Date")))


def _ahead(date: str | None) -> float:
    try:
        return email.utils.parsedate_to_datetime(date or "").timestamp() - time.time()
    except ValueError:
        return 0.0


_HINTS = {
    "invitation-unknown": "make a new one: recvirt-cloud worker invite",
    "invitation-used": "each lets in one worker; make a new one: recvirt-cloud worker invite",
    "invitation-expired": "make a new one: recvirt-cloud worker invite",
    "worker-revoked": "to come in anew: recvirt-cloud worker leave --force, then join with a new invitation",
    "worker-unknown": "to come in anew: recvirt-cloud worker leave --force, then join with a new invitation",
    "conflict": "--name gives it another one",
    "no-tunnel": "on the central node: sudo recvirt-cloud setup, and look at recvirt-cloud tunnel status",
    "throttled": "too many wrong secrets came from this address: wait a minute",
}


def _refusal(status: int, data: Mapping[str, Any]) -> LinkError:
    kind = str(data.get("type", ""))
    text = str(data.get("errors") or data.get("title") or f"status {status}")[:500]
    unreachable = status >= 500
    return LinkError(
        f"the central node says: {text}", _HINTS.get(kind, "its log tells more: journalctl -u recvirt-cloud-api"),
        kind=kind, status=ExitStatus.UNREACHABLE if unreachable else ExitStatus.REFUSED,
    )  # fmt: skip
