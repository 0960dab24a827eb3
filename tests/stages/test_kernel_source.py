"""Kernel sources for real: tarballs from a server with signatures, local trees and checkouts, patches, interruption.

Small trees stand in for kernels: unpacking does not care what is in them. No network beyond the loopback.
"""

from __future__ import annotations

import http.server
import lzma
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from recvirt.errors import ConfigError, DownloadError, StageError, VerificationError
from recvirt.kconfig import localtree, tarball
from recvirt.kconfig.source import DEFAULT_EPOCH, Source, Unpacked, Where, ensure_source
from recvirt.sandbox import ToolsRoot
from recvirt.store import FileRef, sha256_of
from tests.support.kernels import write_tree
from tests.support.openpgp import Key

EPOCH = 1_760_000_000
PATCH = """\
--- a/Kconfig
+++ b/Kconfig
@@ -1,3 +1,4 @@
+# patched
 mainmenu "Linux/$(ARCH)"
\x20
 source "drivers/Kconfig"
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word; what ends in .short promises more bytes than it sends."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if not self.path.endswith(".short"):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"only this")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address that it is served at."""
    folder = tmp_path / "site"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def signing_key() -> Key:
    return Key.generate("A releaser <releaser@localhost>")


@pytest.fixture
def release(tmp_path: Path, site: tuple[Path, str]) -> tuple[Path, bytes]:
    """A release on the server: the .tar.xz, and the bytes of the tar in it."""
    tree = write_tree(tmp_path / "linux-6.12.117")
    plain = tmp_path / "linux.tar"
    with tarfile.open(plain, "w") as tar:

        def fixed(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.mtime = EPOCH
            return info

        tar.add(tree, tree.name, filter=fixed)
    target = site[0] / "linux-6.12.117.tar.xz"
    target.write_bytes(lzma.compress(plain.read_bytes()))
    return target, plain.read_bytes()


Ensure = Callable[..., Unpacked]


@pytest.fixture
def ensure(tools: ToolsRoot, tmp_path: Path) -> Ensure:
    return lambda source, **words: ensure_source(source, tools, tmp_path / "cache", tmp_path / "log", **words)


def tarball_source(path: Path, url: str, **words: Any) -> Source:
    where = Where(url=f"{url}/{path.name}", signature_url=f"{url}/{path.stem}.sign")
    return Source("tarball", path.name, sha256_of(path), where=where, **words)


def signed(site: tuple[Path, str], release: tuple[Path, bytes], key: Key, tmp_path: Path) -> FileRef:
    (site[0] / f"{release[0].stem}.sign").write_bytes(key.detached(release[1]))
    keyring = tmp_path / "keys.gpg"
    keyring.write_bytes(key.public())
    return FileRef.of(keyring)


def test_a_signed_release_is_fetched_verified_and_kept(
    site: tuple[Path, str], release: tuple[Path, bytes], signing_key: Key, tmp_path: Path, ensure: Ensure
) -> None:
    source = tarball_source(release[0], site[1], keyring=signed(site, release, signing_key, tmp_path))
    found = ensure(source)
    assert (found.version, found.epoch) == ("6.12.117", EPOCH)
    assert (found.tree / "drivers/Kconfig").read_text().startswith('menu "Drivers"')
    shutil.rmtree(site[0])
    assert ensure(source, offline=True) == found


def test_an_armored_keyring_serves_as_well(
    site: tuple[Path, str], release: tuple[Path, bytes], signing_key: Key, tmp_path: Path, ensure: Ensure
) -> None:
    import base64

    ref = signed(site, release, signing_key, tmp_path)
    text = base64.encodebytes(ref.path.read_bytes()).decode()
    ref.path.write_text(f"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n{text}=AAAA\n-----END PGP PUBLIC KEY BLOCK-----\n")
    assert ensure(tarball_source(release[0], site[1], keyring=FileRef.of(ref.path))).version == "6.12.117"


def test_a_signature_by_a_stranger_is_refused(
    site: tuple[Path, str], release: tuple[Path, bytes], signing_key: Key, tmp_path: Path, ensure: Ensure
) -> None:
    ref = signed(site, release, signing_key, tmp_path)
    ref.path.write_bytes(Key.generate("Somebody else <x@localhost>", 1024).public())
    with pytest.raises(VerificationError, match="signature"):
        ensure(tarball_source(release[0], site[1], keyring=FileRef.of(ref.path)))
    assert not [path for path in (tmp_path / "cache/sources").iterdir() if path.is_dir()]


def test_a_signature_over_other_bytes_is_refused(
    site: tuple[Path, str], release: tuple[Path, bytes], signing_key: Key, tmp_path: Path, ensure: Ensure
) -> None:
    ref = signed(site, release, signing_key, tmp_path)
    (site[0] / f"{release[0].stem}.sign").write_bytes(signing_key.detached(release[1] + b"x"))
    with pytest.raises(VerificationError, match="signature"):
        ensure(tarball_source(release[0], site[1], keyring=ref))


def test_a_server_that_lies_or_is_away_is_told_apart(
    site: tuple[Path, str], release: tuple[Path, bytes], tmp_path: Path, ensure: Ensure
) -> None:
    source = tarball_source(release[0], site[1])
    release[0].write_bytes(b"something else")
    with pytest.raises(VerificationError, match="is not what the profile pins"):
        ensure(source)
    assert not list((tmp_path / "cache/downloads").iterdir())
    release[0].unlink()
    with pytest.raises(DownloadError, match="404"):
        ensure(source)
    with pytest.raises(DownloadError, match="offline"):
        ensure(source, offline=True)
    with pytest.raises(DownloadError, match="ended after 9 of 1000 bytes"):
        tarball.fetch(f"{site[1]}/x.short", "0" * 64, tmp_path / "cache/downloads")


def test_a_local_tree_counts_by_content_and_is_copied(tools: ToolsRoot, tmp_path: Path, ensure: Ensure) -> None:
    tree = write_tree(tmp_path / "tree")
    digest, label = localtree.digest_of(tools, tree)
    (tree / "Makefile").touch()
    assert localtree.digest_of(tools, tree) == (digest, label)
    found = ensure(Source("tree", label, digest, where=Where(tree=tree)))
    assert found.epoch == DEFAULT_EPOCH and (found.tree / "Kconfig").exists()
    (tree / "Kconfig").chmod(0o755)
    assert localtree.digest_of(tools, tree)[0] != digest
    with pytest.raises(StageError, match="was changed while it was copied"):
        ensure(Source("tree", label, "0" * 64, where=Where(tree=tree)))


@pytest.mark.parametrize("remains", [".config", "include/generated/autoconf.h"])
def test_a_tree_that_was_built_in_is_refused(tools: ToolsRoot, tmp_path: Path, remains: str) -> None:
    tree = write_tree(tmp_path / "tree")
    (tree / remains).parent.mkdir(parents=True, exist_ok=True)
    (tree / remains).write_text("")
    with pytest.raises(ConfigError, match="remains of a build") as caught:
        localtree.digest_of(tools, tree)
    assert "mrproper" in caught.value.hint
    with pytest.raises(ConfigError, match="is no kernel tree"):
        localtree.digest_of(tools, tmp_path)


def git(tools: ToolsRoot, tree: Path, *words: str) -> None:
    identity = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "A"), ("EMAIL", "a@localhost"), ("DATE", f"{EPOCH} +0000"))
    }  # fmt: skip
    tools.run(["git", "-C", str(tree), *words], writable=[tree], env=identity)


def test_a_checkout_counts_by_commit_changes_and_new_files(tools: ToolsRoot, tmp_path: Path, ensure: Ensure) -> None:
    tree = write_tree(tmp_path / "tree")
    (tree / ".gitignore").write_text("*.o\n")
    git(tools, tree, "init", "-q")
    git(tools, tree, "add", ".")
    git(tools, tree, "commit", "-q", "-m", "all")
    clean, label = localtree.digest_of(tools, tree)
    (tree / "ignored.o").write_text("object")
    assert localtree.digest_of(tools, tree) == (clean, label) and "changed" not in label
    (tree / "Kconfig").write_text((tree / "Kconfig").read_text() + "\n# changed\n")
    changed, words = localtree.digest_of(tools, tree)
    (tree / "new file.c").write_text("new")
    new, _ = localtree.digest_of(tools, tree)
    assert len({clean, changed, new}) == 3 and words.endswith("with 1 changed files")
    found = ensure(Source("tree", words, new, where=Where(tree=tree)))
    assert found.epoch == EPOCH and (found.tree / "new file.c").read_text() == "new"
    assert not (found.tree / "ignored.o").exists() and not (found.tree / ".git").exists()
    assert (found.tree / "Kconfig").read_text().endswith("# changed\n")


def test_patches_are_applied_in_order_and_one_that_does_not_apply_is_named(
    tools: ToolsRoot, tmp_path: Path, ensure: Ensure
) -> None:
    tree = write_tree(tmp_path / "tree")
    digest, label = localtree.digest_of(tools, tree)
    good = tmp_path / "good.patch"
    good.write_text(PATCH)
    patched = Source("tree", label, digest, patches=(FileRef.of(good),), where=Where(tree=tree))
    assert (ensure(patched).tree / "Kconfig").read_text().startswith("# patched\n")
    twice = Source("tree", label, digest, patches=(FileRef.of(good), FileRef.of(good)), where=Where(tree=tree))
    with pytest.raises(StageError, match=r"good\.patch does not apply"):
        ensure(twice)
    assert not (tree / "Kconfig").read_text().startswith("# patched")
    assert len({patched.key, twice.key, Source("tree", label, digest).key}) == 3


def test_what_a_killed_run_left_is_not_taken_for_whole(tools: ToolsRoot, tmp_path: Path, ensure: Ensure) -> None:
    tree = write_tree(tmp_path / "tree")
    digest, label = localtree.digest_of(tools, tree)
    source = Source("tree", label, digest, where=Where(tree=tree))
    for name in (source.key, f"{source.key}.part"):
        leftover = tmp_path / "cache/sources" / name / "tree"
        leftover.mkdir(parents=True)
        (leftover / "Makefile").write_text("half of it")
    found = ensure(source)
    assert found.version == "6.12.117" and (found.tree / "Kconfig").exists()
    assert not (tmp_path / "cache/sources" / f"{source.key}.part").exists()
