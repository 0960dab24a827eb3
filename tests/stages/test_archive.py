"""The archive against a signed local one: what a good mirror gives, and what a lying one must not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recvirt.archive import Archive, forget_updates
from recvirt.errors import ConfigError, DownloadError, RecvirtError, VerificationError
from recvirt.sandbox import ToolsRoot
from tests.support import archive as faults
from tests.support.archive import LocalArchive, Mirror, serve
from tests.support.openpgp import Key

pytestmark = pytest.mark.slow

Open = Callable[..., Archive]


@pytest.fixture(scope="module")
def key() -> Key:
    return Key.generate("Test archive <archive@example.org>")


@pytest.fixture
def local(tmp_path: Path, key: Key) -> LocalArchive:
    """An archive of three packages, published."""
    made = LocalArchive(tmp_path / "www", key)
    made.add("tool", "1:2.0-1", depends="lib (>= 1)")
    made.add("lib", "1.5")
    made.add("ground", essential=True)
    made.publish()
    return made


@pytest.fixture
def mirror(local: LocalArchive) -> Iterator[Mirror]:
    with serve(local.directory) as running:
        yield running


@pytest.fixture
def keyring(tmp_path: Path, key: Key) -> Path:
    # A name that a source line could not hold.
    path = tmp_path / "the keys" / "archive.gpg"
    path.parent.mkdir()
    path.write_bytes(key.public())
    return path


@pytest.fixture
def open_archive(tools: ToolsRoot, tmp_path: Path, mirror: Mirror, keyring: Path) -> Open:
    """``open_archive(...)`` looks at the mirror anew, as a later run of recvirt would."""

    def make(**overrides: object) -> Archive:
        forget_updates()
        settings: dict[str, object] = {
            "suite": "trixie", "mirror": mirror.url, "keyring": keyring, "timeout_seconds": 2, "retries": 0,
        }  # fmt: skip
        settings.update(overrides)
        return Archive(tools, tmp_path / "a cache é", **settings)  # type: ignore[arg-type]

    return make


def files_of(archive: Archive) -> set[str]:
    return {str(p.relative_to(archive.debs_dir)) for p in archive.debs_dir.rglob("*") if p.is_file()}


def test_a_good_archive_resolves_and_downloads(open_archive: Open, local: LocalArchive) -> None:
    archive = open_archive()
    packages = archive.resolve(["tool"], essential=True)
    assert [package.name for package in packages] == ["ground", "lib", "tool"]
    tool = archive.find("tool")
    assert (tool.version, tool.arch, tool.file) == ("1:2.0-1", "all", "tool_1%3a2.0-1_all.deb")
    path = archive.download(tool)
    assert path.read_bytes() == local.packages["pool/tool_1%3a2.0-1_all.deb"][1]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == tool.sha256
    assert files_of(archive) == {tool.file}, "nothing but the package is left"


def test_many_are_fetched_at_once_and_only_once(open_archive: Open, mirror: Mirror) -> None:
    archive = open_archive()
    packages = archive.resolve(["tool"], essential=True)
    paths = archive.download_all(packages)
    assert [path.name for path in paths] == [package.file for package in packages]
    before = len(mirror.requests)
    assert archive.download_all(packages) == paths
    assert len(mirror.requests) == before


def test_an_unchanged_archive_is_only_asked_for_its_release_file(open_archive: Open, mirror: Mirror) -> None:
    first = open_archive()
    digest, packages = first.release_digest(), first.resolve(["tool"])
    mirror.requests.clear()
    second = open_archive()
    assert (second.release_digest(), second.resolve(["tool"])) == (digest, packages)
    assert mirror.requests == ["/dists/trixie/InRelease"]


def test_a_new_version_is_seen_at_once(open_archive: Open, local: LocalArchive) -> None:
    before = open_archive()
    assert before.find("lib").version == "1.5"
    digest = before.release_digest()
    local.add("lib", "1.6")
    local.publish(valid_days=8)
    after = open_archive()
    assert after.find("lib").version == "1.6"
    assert after.release_digest() != digest
    assert not [p for p in after.resolve(["tool"]) if p.version == "1.5"]


def test_an_update_that_was_cut_short_is_done_again(open_archive: Open, mirror: Mirror) -> None:
    first = open_archive()
    first.update()
    # As if killed between moving the release file and the index into place.
    (index,) = [p for p in (first.state_dir / "lists").iterdir() if p.name.endswith("Packages")]
    index.unlink()
    assert open_archive().find("lib").version == "1.5"
    with pytest.raises(DownloadError, match="never fetched whole"):
        index.unlink()
        open_archive(offline=True).update()


def test_offline_needs_no_mirror(open_archive: Open, mirror: Mirror) -> None:
    with pytest.raises(DownloadError, match="never fetched") as caught:
        open_archive(offline=True).resolve(["tool"])
    assert "--offline" in caught.value.hint
    online = open_archive()
    online.download(online.find("lib"))
    mirror.requests.clear()
    offline = open_archive(offline=True)
    assert [p.name for p in offline.resolve(["tool"])] == ["lib", "tool"]
    assert offline.download(offline.find("lib")).exists()
    with pytest.raises(DownloadError, match="not in the cache: tool"):
        offline.download(offline.find("tool"))
    assert mirror.requests == []


def test_names_that_the_suite_lacks(open_archive: Open) -> None:
    archive = open_archive()
    for ask in (lambda: archive.resolve(["no-such-thing"]), lambda: archive.find("no-such-thing")):
        with pytest.raises(ConfigError, match="no-such-thing"):
            ask()


def test_dependencies_that_can_not_be_met(open_archive: Open, local: LocalArchive) -> None:
    local.add("broken", depends="nowhere")
    local.publish()
    with pytest.raises(ConfigError, match="nowhere"):
        open_archive().resolve(["broken"])


# -- mirrors that lie or fail, index side -----------------------------------------------------------------------------


def republish(**options: object) -> Callable[[LocalArchive, Mirror], None]:
    return lambda local, mirror: local.publish(**options)  # type: ignore[arg-type]


def fail_with(part: str, fault: faults.Fault) -> Callable[[LocalArchive, Mirror], None]:
    return lambda local, mirror: mirror.faults.__setitem__(part, fault)


def wrong_key(local: LocalArchive, _mirror: Mirror) -> None:
    key = local.key
    local.key = Key.generate("Somebody else <else@example.org>")
    local.publish()
    local.key = key


def forged(local: LocalArchive, _mirror: Mirror) -> None:
    path = local.directory / "dists/trixie/InRelease"
    path.write_text(path.read_text().replace("Origin: Test", "Origin: Evil"))


INDEX_FAULTS = {
    "expired": (republish(valid_days=-1.0), VerificationError, "out of date", "clock"),
    "unsigned": (republish(signed=False), VerificationError, "no valid signature", "root.keyring"),
    "wrong key": (wrong_key, VerificationError, "no valid signature", "root.keyring"),
    "forged": (forged, VerificationError, "no valid signature", "root.keyring"),
    "wrong hash": (fail_with("Packages", faults.changed_bytes), VerificationError, "something else", "mirror"),
    "too long": (fail_with("Packages", faults.too_long), VerificationError, "something else", "mirror"),
    "too short": (fail_with("Packages", faults.too_short), VerificationError, "something else", "mirror"),
    "index missing": (fail_with("Packages", faults.missing), DownloadError, "could not be read", "root.mirror"),
    "no such suite": (fail_with("Release", faults.missing), DownloadError, "no suite trixie", "root.suite"),
    "cut off": (fail_with("Packages", faults.cut_off), DownloadError, "could not be read", "network"),
    "silent": (fail_with("InRelease", faults.silent), DownloadError, "could not be read", "network"),
    "stalled": (fail_with("Packages", faults.stalled), DownloadError, "could not be read", "network"),
}


@pytest.mark.parametrize("name", INDEX_FAULTS)
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_bad_index_is_refused(open_archive: Open, local: LocalArchive, mirror: Mirror, name: str, when: str) -> None:
    spoil, kind, words, hint = INDEX_FAULTS[name]
    if when == "later":
        assert open_archive().find("lib").version == "1.5"
        # Only a changed archive is read again.
        local.add("lib", "1.6")
        local.publish()
    spoil(local, mirror)
    with pytest.raises(RecvirtError) as caught:
        open_archive().resolve(["tool"])
    assert type(caught.value) is kind, caught.value
    assert words in caught.value.message
    assert hint in caught.value.hint
    # Once the mirror is well again nothing of it is in the way.
    mirror.faults.clear()
    local.add("lib", "1.7")
    local.publish(valid_days=9)
    archive = open_archive()
    assert archive.find("lib").version == "1.7"
    assert archive.download(archive.find("lib")).exists()


# -- mirrors that lie or fail, package side ---------------------------------------------------------------------------

PACKAGE_FAULTS = {
    "wrong hash": (faults.changed_bytes, VerificationError, "something else"),
    "too long": (faults.too_long, VerificationError, "something else"),
    "too short": (faults.too_short, VerificationError, "something else"),
    "missing": (faults.missing, DownloadError, "could not be read"),
    "cut off": (faults.cut_off, DownloadError, "could not be read"),
    "silent": (faults.silent, DownloadError, "could not be read"),
    "stalled": (faults.stalled, DownloadError, "could not be read"),
}


@pytest.mark.parametrize("name", PACKAGE_FAULTS)
def test_a_bad_package_is_refused(open_archive: Open, mirror: Mirror, local: LocalArchive, name: str) -> None:
    fault, kind, words = PACKAGE_FAULTS[name]
    mirror.faults["lib_1.5_all.deb"] = fault
    archive = open_archive()
    packages = archive.resolve(["tool"])
    with pytest.raises(RecvirtError) as caught:
        archive.download_all(packages)
    assert type(caught.value) is kind, caught.value
    assert words in caught.value.message
    assert not (archive.debs_dir / "lib_1.5_all.deb").exists()
    mirror.faults.clear()
    later = open_archive()
    for package, path in zip(packages, later.download_all(packages), strict=True):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
    assert files_of(later) == {package.file for package in packages}


def test_a_damaged_package_in_the_cache_is_fetched_again(open_archive: Open) -> None:
    archive = open_archive()
    lib = archive.find("lib")
    path = archive.download(lib)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!")
    assert archive.download(lib).read_bytes() == content


# -- snapshots ---------------------------------------------------------------------------------------------------------


def test_a_snapshot_may_be_old_but_not_forged(tools: ToolsRoot, tmp_path: Path, key: Key, open_archive: Open) -> None:
    stamp = "20260101T000000Z"
    old = LocalArchive(tmp_path / "snapshots" / stamp, key)
    old.add("lib", "0.9")
    old.publish(valid_days=-300)
    with serve(tmp_path / "snapshots") as server:
        settings = {"mirror": None, "snapshot": stamp, "snapshot_mirror": server.url + "/"}
        assert open_archive(**settings).find("lib").version == "0.9"
        server.requests.clear()
        assert open_archive(**settings).find("lib").version == "0.9"
        assert server.requests == [f"/{stamp}/dists/trixie/InRelease"]
        wrong_key(old, server)
        with pytest.raises(VerificationError, match="no valid signature"):
            open_archive(**settings).find("lib")
