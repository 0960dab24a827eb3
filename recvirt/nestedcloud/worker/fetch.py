"""Images from URLs that a stranger chose, without becoming the stranger's hand inside our network.

Every address that a name resolves to has to be one of the public internet (or of a network that the worker's
configuration allows), the connection goes to the very address that was checked, and a redirection is a new URL that is
checked again. No proxy, no cookies, no credentials. Server-side request forgery is CWE-918.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from recvirt.nestedcloud.model import Fault
from recvirt.nestedcloud.worker.errors import ActionError

REDIRECTS_MAX = 5
_CONNECT_SECONDS, _READ_SECONDS, _TOTAL_SECONDS = 10.0, 30.0, 3600.0
_PIECE = 1024**2
_REDIRECTS = (301, 302, 303, 307, 308)
#: IPv6 networks whose addresses contain an IPv4 one in their last 32 bits (RFC 6052, RFC 8215).
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Source(Protocol):
    """Where bytes come from."""

    def read(self, count: int, /) -> bytes:
        """Up to so many; none at the end."""


class Sink(Protocol):
    """Where the bytes go."""

    def write(self, data: bytes, /) -> object:
        """One piece."""


def _refuse(why: str) -> ActionError:
    return ActionError(Fault.INVALID, f"the URL is refused: {why}")


def _bare(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, or itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in network for network in _TRANSLATED):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def is_allowed(address: Address, allow: Sequence[Network]) -> bool:
    """Whether something may be fetched from there: a public unicast address, or one that ``allow`` names."""
    bare = _bare(address)
    if any(candidate in network for candidate in (address, bare) for network in allow):
        return True
    return bare.is_global and not (bare.is_multicast or bare.is_reserved or bare.is_unspecified)


def resolve(host: str, port: int, allow: Sequence[Network]) -> str:
    """The address to connect to. ActionError when there is none, or when any of them is not allowed: a name with a good
    and a bad address is an attack.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ActionError(Fault.NOT_FOUND, f"there is no host called {host[:253]}") from None
    addresses = [ipaddress.ip_address(str(item[4][0]).partition("%")[0]) for item in found]
    for address in addresses:
        if not is_allowed(address, allow):
            raise _refuse(
                f"{host} is {address}, which is not on the public internet; an administrator can allow its network"
            )
    return str(addresses[0])


def split(url: str) -> urllib.parse.SplitResult:
    """The URL's parts. ActionError unless it is http or https, of a host, without credentials or odd characters."""
    if len(url) > 2048 or any(character <= " " or character > "~" for character in url):
        raise _refuse("it has characters that a URL can't have, or more than 2048")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _refuse(str(error)) from None
    if parts.scheme not in ("http", "https"):
        raise _refuse("want http:// or https://")
    if not parts.hostname or port == 0:
        raise _refuse("it names no host")
    if parts.username is not None or parts.password is not None:
        raise _refuse("it has a user or a password in it")
    return parts


class _Plain(http.client.HTTPConnection):
    """To an address that was checked, whatever the name may resolve to now; cut off after a while, however slowly the
    other side goes on.
    """

    def __init__(self, host: str, port: int, address: str) -> None:
        super().__init__(host, port, timeout=_READ_SECONDS)
        self.address = address
        self.was_cut = False
        self._wire: socket.socket | None = None
        self._timer = threading.Timer(_TOTAL_SECONDS, self._cut)
        self._timer.daemon = True

    def connect(self) -> None:
        self._wire = socket.create_connection((self.address, self.port), _CONNECT_SECONDS)
        self._timer.start()
        self._wire.settimeout(_READ_SECONDS)
        self.sock = self._secured(self._wire)

    def _secured(self, wire: socket.socket) -> socket.socket:
        return wire

    def _cut(self) -> None:
        self.was_cut = True
        if self._wire is not None:
            # Another thread's read then ends, which a close would not make it do.
            self._wire.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Close everything. (``close`` is called by the class above as soon as there is an answer.)"""
        self._timer.cancel()
        self.close()


class _Secure(_Plain):
    """The same, with the certificate checked against the name."""

    default_port = 443

    def _secured(self, wire: socket.socket) -> socket.socket:
        secured = ssl.create_default_context().wrap_socket(wire, server_hostname=self.host)
        self._wire = secured
        return secured


def _explained(host: str, error: Exception) -> ActionError:
    if isinstance(error, http.client.HTTPException):
        return ActionError(Fault.STORAGE, f"{host} broke off, or does not speak HTTP: {type(error).__name__}")
    if isinstance(error, ssl.SSLError):
        return ActionError(Fault.STORAGE, f"{host}: {error.reason or 'TLS failed'}")
    text = error.strerror if isinstance(error, OSError) else None
    return ActionError(Fault.STORAGE, f"{host} can't be reached: {text or type(error).__name__}")


@contextmanager
def _asked(url: str, allow: Sequence[Network]) -> Iterator[tuple[_Plain, http.client.HTTPResponse]]:
    """The answer of one server to one request."""
    parts = split(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    kind = _Secure if parts.scheme == "https" else _Plain
    connection = kind(host, port, resolve(host, port, allow))
    try:
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        try:
            connection.request("GET", path, headers={"Accept": "*/*", "Connection": "close"})
            answer = connection.getresponse()
        except (http.client.HTTPException, OSError) as error:
            raise _explained(host, error) from None
        with answer:
            yield connection, answer
    finally:
        connection.end()


def copy(stream: Source, sink: Sink, largest_bytes: int) -> int:
    """Everything in the stream; how many bytes that was. ActionError when it is more than ``largest_bytes``."""
    count = 0
    while piece := stream.read(_PIECE):
        count += len(piece)
        if count > largest_bytes:
            raise ActionError(Fault.INVALID, f"it has more than {largest_bytes} bytes, which is the bound for it")
        sink.write(piece)
    return count


@dataclass(frozen=True)
class _Body:
    """An answer's bytes; what goes wrong while they come is told as such, not as a fault of our own disk."""

    host: str
    connection: _Plain
    answer: http.client.HTTPResponse

    def read(self, count: int, /) -> bytes:
        data, problem = b"", None
        try:
            data = self.answer.read(count)
        except (http.client.HTTPException, OSError) as error:
            problem = _explained(self.host, error)
        if self.connection.was_cut:
            raise ActionError(Fault.TIMED_OUT, f"{self.host} did not send it within {_TOTAL_SECONDS:.0f} s")
        if problem is not None:
            raise problem
        return data


def fetch(url: str, sink: Sink, largest_bytes: int, allow: Sequence[Network] = ()) -> int:
    """What is at ``url``; how many bytes that was. ActionError says why not."""
    for _ in range(REDIRECTS_MAX + 1):
        host = split(url).hostname or ""
        with _asked(url, allow) as (connection, answer):
            if answer.status == 200:
                if answer.getheader("Content-Encoding", "identity") != "identity":
                    raise _refuse("the server compresses what it sends")
                said = answer.length
                if said is not None and said > largest_bytes:
                    raise ActionError(Fault.INVALID, f"it has {said} bytes; {largest_bytes} is the bound for it")
                count = copy(_Body(host, connection, answer), sink, largest_bytes)
                if said is not None and count != said:
                    raise ActionError(Fault.STORAGE, f"{host} broke off after {count} of {said} bytes")
                return count
            where = answer.getheader("Location")
            if answer.status not in _REDIRECTS or not where:
                raise ActionError(Fault.NOT_FOUND, f"{host} answered {answer.status}")
        target = urllib.parse.urljoin(url, where)
        if url.lower().startswith("https:") and not target.lower().startswith("https:"):
            raise _refuse("it is redirected from https to something else")
        url = target
    raise _refuse(f"it is redirected more than {REDIRECTS_MAX} times")
