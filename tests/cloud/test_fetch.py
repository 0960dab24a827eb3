"""Fetching from URLs that a stranger chose: what is public is taken, and nothing leads into our own network."""

from __future__ import annotations

import io
import ipaddress
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from recvirt.nestedcloud.model import Fault
from recvirt.nestedcloud.worker import fetch as fetching
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.fetch import REDIRECTS_MAX, fetch, is_allowed, resolve, split

LOOPBACK = (ipaddress.ip_network("127.0.0.1/32"),)


class Handler(BaseHTTPRequestHandler):
    """What a test's path asks for."""

    seen: ClassVar[list[str]] = []

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def _head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self) -> None:
        self.seen.append(self.path)
        where = self.path.partition("?to=")[2]
        if self.path == "/image":
            self._head(200, Content_Length="5")
            self.wfile.write(b"bytes")
        elif self.path == "/short":
            self._head(200, Content_Length="500")
            self.wfile.write(b"bytes")
        elif self.path == "/endless":
            self._head(200)
            try:
                while True:
                    self.wfile.write(bytes(65536))
            except OSError:
                pass
        elif self.path == "/slow":
            self._head(200, Content_Length="5000")
            self.wfile.flush()
            released.wait(10)
        elif self.path == "/large":
            self._head(200, Content_Length=str(10**15))
        elif self.path == "/packed":
            self._head(200, Content_Encoding="gzip")
        elif self.path == "/loop":
            self._head(302, Location="/loop")
        elif where:
            self._head(307, Location=where)
        else:
            self._head(404)


released = threading.Event()


@pytest.fixture
def server() -> Iterator[str]:
    Handler.seen.clear()
    released.clear()
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_address[1]}"
    released.set()
    made.shutdown()
    made.server_close()


def got(url: str, largest: int = 1000, allow: Any = LOOPBACK) -> bytes:
    sink = io.BytesIO()
    fetch(url, sink, largest, allow)
    return sink.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.30.0.1", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1",
        "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2002:7f00:1::", "2002:a9fe:a9fe::1",
        "2001:db8::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_of_the_public_internet_is_refused(text: str) -> None:
    assert not is_allowed(ipaddress.ip_address(text), ())


@pytest.mark.parametrize("text", ["8.8.8.8", "151.101.2.132", "2606:4700::1111", "::ffff:8.8.8.8", "2002:808:808::1"])
def test_a_public_address_is_taken(text: str) -> None:
    assert is_allowed(ipaddress.ip_address(text), ())


def test_a_network_that_the_configuration_allows_is_taken_and_no_other_one() -> None:
    allow = (ipaddress.ip_network("10.1.0.0/16"),)
    assert is_allowed(ipaddress.ip_address("10.1.2.3"), allow)
    assert is_allowed(ipaddress.ip_address("::ffff:10.1.2.3"), allow)
    assert not is_allowed(ipaddress.ip_address("10.2.0.1"), allow)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://example.org/x", "gopher://127.0.0.1:6379/_x", "//example.org/x", "/etc/passwd", "",
        "http://", "http:///x", "http://user:secret@example.org/", "http://user@example.org/", "http://example.org:0/",
        "http://example.org:99999/", "http://example.org/a b", "http://example.org/\r\nX: y", "http://[::1", "json:{}",
        "http://exämple.org/", "http://example.org/" + "a" * 2048, "dict://127.0.0.1/",
    ],
)  # fmt: skip
def test_a_url_that_is_none_of_the_web_is_refused(url: str) -> None:
    with pytest.raises(ActionError, match="the URL is refused") as caught:
        split(url)
    assert caught.value.fault is Fault.INVALID


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.1", "0x7f000001", "2130706433", "017700000001", "[::1]", "[::ffff:7f00:1]", "169.254.169.254"],
)
def test_another_spelling_of_an_inner_address_is_refused(host: str) -> None:
    with pytest.raises(ActionError, match="not on the public internet"):
        got(f"http://{host}/latest/meta-data/", allow=())


def answers(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Names resolve to these addresses; what was asked for."""
    asked: list[str] = []

    def resolved(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr("socket.getaddrinfo", resolved)
    return asked


def test_a_name_that_resolves_to_the_inside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "127.0.0.1")
    with pytest.raises(ActionError, match=r"images.example.org is 127.0.0.1, which is not on the public internet"):
        got("http://images.example.org/x", allow=())


def test_a_name_with_one_bad_address_among_good_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "8.8.8.8", "169.254.169.254")
    with pytest.raises(ActionError, match=r"169\.254\.169\.254"):
        resolve("images.example.org", 80, ())


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    asked = answers(monkeypatch, "127.0.0.1")
    connected: list[Any] = []
    real = socket.create_connection

    def connecting(where: Any, *more: Any) -> socket.socket:
        connected.append(where)
        return real(where, *more)

    monkeypatch.setattr("socket.create_connection", connecting)
    port = server.rpartition(":")[2]
    assert got(f"http://images.example.org:{port}/image") == b"bytes"
    # Resolved once: a second answer could be another one (DNS rebinding).
    assert asked.count("images.example.org") == 1 and connected == [("127.0.0.1", int(port))]


def test_an_image_comes_as_it_is(server: str) -> None:
    assert got(f"{server}/image") == b"bytes"
    assert got(f"{server}/moved?to=/image") == b"bytes"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254"),
        ("http://127.0.0.2/", "127.0.0.2"),
        ("http://[::1]/", "::1"),
        ("file:///etc/passwd", "want http"),
        ("//10.0.0.1/x", "10.0.0.1"),
        ("http://root:x@127.0.0.1/", "a password"),
    ],
)
def test_a_redirection_is_checked_like_the_first_url(server: str, target: str, words: str) -> None:
    with pytest.raises(ActionError, match=words) as caught:
        got(f"{server}/r?to={target}")
    assert caught.value.fault is Fault.INVALID


def test_redirections_end(server: str) -> None:
    with pytest.raises(ActionError, match="redirected more than"):
        got(f"{server}/loop")
    assert len(Handler.seen) == REDIRECTS_MAX + 1


@pytest.mark.parametrize(
    ("path", "fault", "words"),
    [
        ("/absent", Fault.NOT_FOUND, "answered 404"),
        ("/short", Fault.STORAGE, "broke off after 5 of 500 bytes"),
        ("/endless", Fault.INVALID, "more than 1000 bytes"),
        ("/large", Fault.INVALID, "it has 1000000000000000 bytes; 1000 is the bound"),
        ("/packed", Fault.INVALID, "compresses"),
    ],
)
def test_what_is_no_whole_image_is_told(server: str, path: str, fault: Fault, words: str) -> None:
    with pytest.raises(ActionError, match=words) as caught:
        got(f"{server}{path}")
    assert caught.value.fault is fault


def test_a_server_that_never_ends_is_cut_off(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_TOTAL_SECONDS", 0.2)
    with pytest.raises(ActionError, match="did not send it within") as caught:
        got(f"{server}/slow", 10000)
    assert caught.value.fault is Fault.TIMED_OUT


def test_nobody_there_is_told() -> None:
    with pytest.raises(ActionError, match="can't be reached"):
        got("http://127.0.0.1:1/")


def test_a_full_disk_is_not_the_server_s_fault(server: str) -> None:
    class Full:
        def write(self, _data: bytes, /) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fetch(f"{server}/image", Full(), 100, LOOPBACK)
