"""A signed Debian archive on the loopback, and the ways in which a mirror can lie."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

from tests.support.debs import control_text, make_deb
from tests.support.openpgp import Key

#: Big enough that a connection can be cut in the middle of it.
PAYLOAD = bytes(range(256)) * 4096


@dataclass
class LocalArchive:
    """An archive of one suite below ``directory``; ``publish`` writes (and signs) its indexes."""

    directory: Path
    key: Key
    suite: str = "trixie"
    packages: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # pool path -> control text, bytes
    published: int = 0

    def add(self, name: str, version: str = "1.0", depends: str = "", *, essential: bool = False) -> None:
        """Put a package into the pool."""
        control = control_text(name, version, depends=depends, essential=essential)
        content = make_deb(control, {f"usr/share/{name}/data": PAYLOAD + name.encode()})
        self.packages[f"pool/{name}_{version.replace(':', '%3a')}_all.deb"] = (control, content)

    def publish(self, *, valid_days: float = 7.0, signed: bool = True) -> None:
        """Write pool, Packages and InRelease."""
        index = ""
        for path, (control, content) in self.packages.items():
            target = self.directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            index += f"{control}Filename: {path}\nSize: {len(content)}\nSHA256: {digest}\n\n"
        dist = self.directory / "dists" / self.suite
        binary = dist / "main" / "binary-amd64"
        binary.mkdir(parents=True, exist_ok=True)
        files = {"Packages": index.encode(), "Packages.gz": gzip.compress(index.encode(), mtime=0)}
        sums = []
        for name, content in files.items():
            (binary / name).write_bytes(content)
            sums.append(f" {hashlib.sha256(content).hexdigest()} {len(content)} main/binary-amd64/{name}")
        now = time.time()
        # An archive that is already out of date was made before that.
        made = min(now - 60, now + valid_days * 86400 - 86400)
        release = "\n".join(
            [
                "Origin: Test", "Label: Test", f"Suite: {self.suite}", f"Codename: {self.suite}",
                f"Date: {formatdate(made, usegmt=True).replace('GMT', 'UTC')}",
                f"Valid-Until: {formatdate(now + valid_days * 86400, usegmt=True).replace('GMT', 'UTC')}",
                "Architectures: amd64 all", "Components: main", "SHA256:", *sums, "",
            ]
        )  # fmt: skip
        (dist / "Release").write_text(release)
        inline = dist / "InRelease"
        inline.unlink(missing_ok=True)
        if signed:
            inline.write_text(self.key.clearsign(release))
        # HTTP tells times in whole seconds: two publications within one would look the same.
        self.published += 1
        for written in dist.rglob("*"):
            os.utime(written, times=(now, now - 10_000 + 10 * self.published))


Fault = Callable[["_Handler", Path], None]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.faults: dict[str, Fault] = {}
        self.requests: list[str] = []
        self.closing = threading.Event()


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 30

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, directory=str(args[2].directory), **kwargs)

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        for part, fault in self.server.faults.items():
            if part in self.path:
                fault(self, Path(self.translate_path(self.path)))
                return
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: pytest shows what matters."""

    def send_bytes(self, content: bytes, *, announced: int | None = None) -> None:
        """A whole answer; ``announced`` lies about its length."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if announced is None else announced))
        self.send_header("Last-Modified", formatdate(time.time(), usegmt=True))
        self.end_headers()
        self.wfile.write(content)


def changed_bytes(handler: _Handler, path: Path) -> None:
    """The right size, but one byte is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    handler.send_bytes(bytes(content))


def too_long(handler: _Handler, path: Path) -> None:
    """More than the index promises."""
    handler.send_bytes(path.read_bytes() + b"more")


def too_short(handler: _Handler, path: Path) -> None:
    """Less than the index promises, sent as if whole."""
    handler.send_bytes(path.read_bytes()[:-100])


def cut_off(handler: _Handler, path: Path) -> None:
    """The connection ends in the middle."""
    content = path.read_bytes()
    handler.send_bytes(content[: len(content) // 2], announced=len(content))
    handler.close_connection = True


def missing(handler: _Handler, path: Path) -> None:
    """404."""
    handler.send_error(404)


def silent(handler: _Handler, path: Path) -> None:
    """The request is read, and nothing is ever answered."""
    handler.server.closing.wait(60)
    handler.close_connection = True


def stalled(handler: _Handler, path: Path) -> None:
    """Half the answer comes, then nothing more."""
    content = path.read_bytes()
    handler.send_bytes(content[: len(content) // 2], announced=len(content))
    handler.wfile.flush()
    silent(handler, path)


@dataclass
class Mirror:
    """A running server: its URL, what it was asked for, and the faults it has (part of a path to behaviour)."""

    url: str
    requests: list[str]
    faults: dict[str, Fault]


@contextmanager
def serve(directory: Path, *, tls: tuple[Path, Path] | None = None) -> Iterator[Mirror]:
    """Serve ``directory`` on a free port of the loopback; ``tls`` is a certificate and its key."""
    server = _Server(directory)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    scheme = "https" if tls else "http"
    try:
        yield Mirror(f"{scheme}://127.0.0.1:{server.server_port}", server.requests, server.faults)
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
