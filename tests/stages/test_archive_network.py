"""How the archive is reached: through a proxy, and over https with a certificate authority of a company's own."""

from __future__ import annotations

import http.server
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from recvirt.archive import Archive, forget_updates
from recvirt.errors import DownloadError, VerificationError
from recvirt.sandbox import ToolsRoot
from tests.support.archive import LocalArchive, serve
from tests.support.openpgp import Key

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def key() -> Key:
    return Key.generate("Test archive <archive@example.org>")


@pytest.fixture
def local(tmp_path: Path, key: Key) -> LocalArchive:
    made = LocalArchive(tmp_path / "www", key)
    made.add("lib")
    made.publish()
    (tmp_path / "archive.gpg").write_bytes(key.public())
    return made


def open_archive(tools: ToolsRoot, tmp_path: Path, mirror: str) -> Archive:
    forget_updates()
    return Archive(
        tools, tmp_path / "cache", suite="trixie", mirror=mirror, keyring=tmp_path / "archive.gpg",
        timeout_seconds=3, retries=0,
    )  # fmt: skip


def test_an_archive_that_expires_between_two_runs(tools: ToolsRoot, tmp_path: Path, local: LocalArchive) -> None:
    local.publish(valid_days=4 / 86400)
    with serve(local.directory) as mirror:
        open_archive(tools, tmp_path, mirror.url).update()
        time.sleep(4.5)
        with pytest.raises(VerificationError, match="out of date"):
            open_archive(tools, tmp_path, mirror.url).update()


# -- proxy -------------------------------------------------------------------------------------------------------------


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.directory = directory
        self.asked: list[str] = []


class _ProxyHandler(http.server.SimpleHTTPRequestHandler):
    """Answers for every host from one folder, and remembers the whole URLs it was asked for."""

    server: _Proxy

    def __init__(self, *args: object) -> None:
        super().__init__(*args, directory=str(args[2].directory))  # type: ignore[arg-type,attr-defined]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.path = urllib.parse.urlsplit(self.path).path
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def proxy(local: LocalArchive) -> Iterator[_Proxy]:
    (local.directory / "debian").symlink_to(".")
    server = _Proxy(local.directory)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
def test_a_proxy_is_used(
    tools: ToolsRoot, tmp_path: Path, proxy: _Proxy, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.server_port}")
    archive = open_archive(tools, tmp_path, "http://archive.invalid/debian")
    # No name server knows that host: whatever comes, came through the proxy.
    archive.download(archive.find("lib"))
    assert "http://archive.invalid/debian/dists/trixie/InRelease" in proxy.asked
    assert "http://archive.invalid/debian/pool/lib_1.0_all.deb" in proxy.asked
    proxy.asked.clear()
    open_archive(tools, tmp_path, "http://archive.invalid/debian").update()
    assert proxy.asked == ["http://archive.invalid/debian/dists/trixie/InRelease"]


# -- https -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tools: ToolsRoot, tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for the loopback, signed by itself (so it is its own authority), and its key."""
    pem, key = tmp_path / "server.pem", tmp_path / "server.key"
    tools.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=company",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(pem),
        ],
        writable=[tmp_path],
    )  # fmt: skip
    return pem, key


def test_a_company_ca_is_trusted_when_it_is_named(
    tools: ToolsRoot,
    tmp_path: Path,
    local: LocalArchive,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with serve(local.directory, tls=certificate) as mirror:
        archive = open_archive(tools, tmp_path, mirror.url)
        assert archive.download(archive.find("lib")).exists()
        mirror.requests.clear()
        open_archive(tools, tmp_path, mirror.url).update()
        assert mirror.requests == ["/dists/trixie/InRelease"]


def test_an_unknown_ca_is_refused(
    tools: ToolsRoot,
    tmp_path: Path,
    local: LocalArchive,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with serve(local.directory, tls=certificate) as mirror:
        with pytest.raises(DownloadError, match="could not prove who it is") as caught:
            open_archive(tools, tmp_path, mirror.url).update()
        assert "SSL_CERT_FILE" in caught.value.hint
        assert mirror.requests == []
