"""A line that is not to be trusted: cuts connections, loses answers, delays, says 429 and 503, ends bodies early."""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

#: What may be done to one request.
FAULTS = ("cut", "lost", "truncated", "429", "500", "503", "slow")
#: As EC2 says it; others look at the status.
_DENIED = (
    b"<Response><Errors><Error><Code>UnauthorizedOperation</Code><Message>You are not authorized</Message></Error>"
    b"</Errors></Response>"
)
#: (method, path, number of the request) -> one of FAULTS, or nothing.
Policy = Callable[[str, str, int], str]
#: Status, headers, body.
Answer = tuple[int, list[tuple[str, str]], bytes]
#: (method, path, body, the server) -> what is answered; it may ask the server or not.
Rules = Callable[[str, str, bytes, Callable[[], Answer]], Answer]


def now_and_then(seed: int, share: float, *faults: str) -> Policy:
    """Each request meets one of ``faults`` with this chance."""
    chance, lock = random.Random(seed), threading.Lock()

    def policy(_method: str, _path: str, _number: int) -> str:
        with lock:
            return chance.choice(faults or FAULTS) if chance.random() < share else ""

    return policy


class Line:
    """What passed through, and the policy, which may be changed at any time."""

    def __init__(self, upstream: str, policy: Policy) -> None:
        self.upstream = urlsplit(upstream if "://" in upstream else f"http://{upstream}")
        self.policy = policy
        self.requests: list[tuple[str, str, int, str]] = []
        self.url = ""
        self.lock = threading.Lock()
        self.timeout = 60.0
        self.rules: Rules = lambda _method, _path, _body, ask: ask()

    @property
    def body_bytes(self) -> int:
        """Bytes of all requests' bodies that reached the server."""
        return sum(size for *_, size, fault in self.requests if fault in ("", "lost", "truncated", "slow"))

    def count(self, method: str) -> int:
        """Requests of a method."""
        return sum(request[0] == method for request in self.requests)


@contextmanager
def line(upstream: str, policy: Policy = lambda _m, _p, _n: "") -> Iterator[Line]:
    """A proxy in front of ``upstream`` (an address, or HOST:PORT)."""
    state = Line(upstream, policy)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body go out one after the other: the client's delayed acknowledgement would hold up each answer.
        disable_nagle_algorithm = True

        def __getattr__(self, name: str) -> Any:
            if name.startswith("do_"):
                return self._pass_on
            raise AttributeError(name)

        def log_message(self, *_arguments: Any) -> None:
            pass

        def _pass_on(self) -> None:
            try:
                _serve(self, state)
            except (OSError, http.client.HTTPException):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_a: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}{state.upstream.path}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def _serve(handler: BaseHTTPRequestHandler, state: Line) -> None:
    body = _body(handler)
    with state.lock:
        fault = state.policy(handler.command, handler.path, len(state.requests))
        state.requests.append((handler.command, handler.path, len(body), fault))
    if fault == "cut":
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
        return
    if fault in ("429", "500", "503", "401", "403", "507"):
        said = _DENIED if fault in ("401", "403") else b""
        handler.send_response(int(fault))
        handler.send_header("Content-Length", str(len(said)))
        if fault == "429":
            handler.send_header("Retry-After", "1")
        handler.end_headers()
        handler.wfile.write(said if handler.command != "HEAD" else b"")
        return
    if fault == "slow":
        time.sleep(0.3)
    ask = partial(_asked, handler, state, body)
    status, headers, content = state.rules(handler.command, handler.path, body, ask)
    if fault == "lost":
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
        return
    handler.send_response_only(status)
    for name, value in headers:
        if name.lower() not in ("transfer-encoding", "content-length", "connection"):
            handler.send_header(name, value)
    length = next((v for n, v in headers if n.lower() == "content-length"), None) if handler.command == "HEAD" else None
    if status != 204:
        handler.send_header("Content-Length", length or str(len(content)))
    handler.end_headers()
    if fault == "truncated" and content:
        handler.wfile.write(content[: len(content) // 2])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
        return
    handler.wfile.write(content)


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Expect", "").lower() == "100-continue":
        handler.send_response_only(100)
        handler.end_headers()
    if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
        parts = []
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        handler.rfile.readline()
        return b"".join(parts)
    return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))


def _asked(handler: BaseHTTPRequestHandler, state: Line, body: bytes) -> Answer:
    connection = http.client.HTTPConnection(str(state.upstream.netloc), timeout=state.timeout)
    connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
    for name, value in handler.headers.items():
        if name.lower() not in ("transfer-encoding", "expect", "content-length", "connection"):
            connection.putheader(name, value)
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.getheaders(), content
