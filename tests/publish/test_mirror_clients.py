"""The mirror read by the programs that it is for: Incus over HTTPS, virt-builder from a folder and over HTTPS."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from recvirt.cli import default_cache_dir
from recvirt.run import Completed
from recvirt.sandbox import ToolsRoot
from recvirt.store import Store
from recvirt.toolsroot import ensure_tools
from tests.publish.support import Place, make_image
from tests.publish.tls import over_https

pytestmark = pytest.mark.slow
#: Read before a test takes the home away.
_CACHE_DIR = Path(os.environ.get("RECVIRT_CACHE_DIR") or default_cache_dir()).absolute()
_IMAGES = "streams/v1/images.json"


@pytest.fixture
def tree(place: Place, image: Path, tmp_path: Path) -> Path:
    place.publish("mirror", image, [f"path={tmp_path / 'mirror'}"])
    return tmp_path / "mirror"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def spoil(tree: Path, change: Callable[[Any], None]) -> None:
    """Change the image's version in the index that Incus reads."""
    said = json.loads((tree / _IMAGES).read_text())
    (product,) = said["products"].values()
    (version,) = product["versions"].values()
    change(version["items"])
    (tree / _IMAGES).write_text(json.dumps(said))


def spoil_disk(tree: Path) -> None:
    """One byte of the image, as a bad disk or a bad hand changes it."""
    (disk,) = tree.glob("images/*/*.qcow2")
    with disk.open("r+b") as stream:
        stream.seek(5000)
        stream.write(b"!")


# --- Incus


@pytest.fixture(scope="session")
def incus_root() -> ToolsRoot:
    """Debian's incus-client, in a tools root of its own; made once for all runs of this person."""
    return ensure_tools(Store(_CACHE_DIR), extra="incus")


class Incus:
    """The client with a configuration of its own."""

    def __init__(self, root: ToolsRoot, folder: Path, authority: Path) -> None:
        folder.mkdir()
        self.folder, self._root, self._authority = folder, root, authority

    def run(self, *words: str, check: bool = True, trust: bool = True) -> Completed:
        """``incus WORDS...``; only the tests' authority is trusted, or Debian's list."""
        environment = {"HOME": str(self.folder)}
        if trust:
            environment["SSL_CERT_FILE"] = str(self._authority / "ca.pem")
        return self._root.run(
            ["incus", *words], network=True, writable=[self.folder], readable=[self._authority], env=environment,
            check=check, timeout_seconds=60,
        )  # fmt: skip

    def images(self, remote: str) -> list[dict[str, Any]]:
        """What the remote lists."""
        found: list[dict[str, Any]] = json.loads(self.run("image", "list", f"{remote}:", "--format", "json").stdout)
        return found


@pytest.fixture
def incus(incus_root: ToolsRoot, tmp_path: Path, authority: Path) -> Incus:
    return Incus(incus_root, tmp_path / "incus", authority)


def test_incus_lists_the_image_by_its_fingerprint_and_fetches_it(
    incus: Incus, tree: Path, image: Path, authority: Path
) -> None:
    (metadata,) = tree.glob("images/*/incus.tar.xz")
    fingerprint = hashlib.sha256(metadata.read_bytes() + image.read_bytes()).hexdigest()
    with over_https(tree, authority) as url:
        incus.run("remote", "add", "ours", url, "--protocol", "simplestreams")
        (listed,) = incus.images("ours")
        assert (listed["fingerprint"], listed["type"]) == (fingerprint, "virtual-machine")
        assert listed["architecture"] == "x86_64"
        assert listed["size"] == metadata.stat().st_size + image.stat().st_size
        # The name by which the launch recipe starts it.
        assert "recvirt/default" in [alias["name"] for alias in listed["aliases"]]
        incus.run("image", "export", "ours:recvirt/default", str(incus.folder / "got"))
    assert digest(incus.folder / "got.root") == digest(image)
    assert digest(incus.folder / "got") == digest(metadata)


def test_incus_shows_the_newest_under_the_profiles_name(
    incus: Incus, tree: Path, place: Place, image: Path, authority: Path
) -> None:
    newer = make_image(place.folder / "newer", seed=2)
    text = (image.parent / "image.json").read_text()
    (newer.parent / "image.json").write_text(text.replace("1795", "1796"))
    place.publish("mirror", newer, [f"path={tree}"])
    with over_https(tree, authority) as url:
        incus.run("remote", "add", "ours", url, "--protocol", "simplestreams")
        assert len(incus.images("ours")) == 2
        incus.run("image", "export", "ours:recvirt/default", str(incus.folder / "got"))
    assert digest(incus.folder / "got.root") == digest(newer)


def test_incus_lists_no_image_without_a_fingerprint(incus: Incus, tree: Path, authority: Path) -> None:
    spoil(tree, lambda items: items["incus.tar.xz"].pop("combined_disk-kvm-img_sha256"))
    with over_https(tree, authority) as url:
        incus.run("remote", "add", "ours", url, "--protocol", "simplestreams")
        assert incus.images("ours") == []


def test_incus_reads_no_index_that_is_cut_short(incus: Incus, tree: Path, authority: Path) -> None:
    text = (tree / _IMAGES).read_bytes()
    (tree / _IMAGES).write_bytes(text[: len(text) // 2])
    with over_https(tree, authority) as url:
        incus.run("remote", "add", "ours", url, "--protocol", "simplestreams")
        assert incus.run("image", "list", "ours:", check=False).status != 0


@pytest.mark.parametrize("what", ["index", "disk"])
def test_incus_takes_no_image_with_another_digest(what: str, incus: Incus, tree: Path, authority: Path) -> None:
    if what == "index":
        spoil(tree, lambda items: items["disk.qcow2"].update(sha256="0" * 64))
    else:
        spoil_disk(tree)
    with over_https(tree, authority) as url:
        incus.run("remote", "add", "ours", url, "--protocol", "simplestreams")
        assert len(incus.images("ours")) == 1
        done = incus.run("image", "export", "ours:recvirt/default", str(incus.folder / "got"), check=False)
    assert done.status != 0
    assert "hash" in done.stderr.lower(), done.stderr


def test_incus_does_not_talk_to_a_server_of_an_unknown_authority(incus: Incus, tree: Path, authority: Path) -> None:
    with over_https(tree, authority) as url:
        incus.run("remote", "add", "ours", url, "--protocol", "simplestreams")
        refused = incus.run("image", "list", "ours:", check=False, trust=False)
    assert refused.status != 0


# --- virt-builder


def builder(
    folder: Path, *words: str, source: str, check: bool = True, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """virt-builder(1) with our index alone and a cache of its own; index and images are not signed by gpg."""
    environment = {
        **os.environ, **(more or {}), "XDG_CACHE_HOME": str(folder / "cache"), "XDG_CONFIG_HOME": str(folder / "none"),
        # Else it asks Debian's two repositories as well, and ends where they don't answer.
        "VIRT_BUILDER_DIRS": str(folder / "none"), "LC_ALL": "C.UTF-8",
    }  # fmt: skip
    # The tests' own home is not there, and libguestfs wants this folder to be.
    environment["XDG_RUNTIME_DIR"] = str(folder)
    argv = ["virt-builder", *words, "--source", source, "--no-check-signature"]
    done = subprocess.run(argv, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


has_builder = pytest.mark.skipif(shutil.which("virt-builder") is None, reason="wants virt-builder (guestfs-tools)")


@has_builder
@pytest.mark.parametrize("kind", ["folder", "https"])
def test_virt_builder_lists_and_fetches_the_image(
    kind: str, tree: Path, image: Path, tmp_path: Path, authority: Path
) -> None:
    (name,) = (path.name for path in (tree / "images").iterdir())
    with over_https(tree, authority) as url:
        source = f"{url}/index" if kind == "https" else f"{tree.as_uri()}/index"
        more = {"CURL_CA_BUNDLE": str(authority / "ca.pem")}
        listed = json.loads(builder(tmp_path, "--list", "--list-format", "json", source=source, more=more).stdout)
        found = {item["os-version"]: item for item in listed["templates"]}
        assert set(found) == {name, "recvirt-default"}
        for item in found.values():
            assert (item["arch"], item["size"]) == ("x86_64", 48 << 20)
            assert int(item["compressed-size"]) == image.stat().st_size
        assert "6.12.1-recvirt" in builder(tmp_path, "--notes", name, source=source, more=more).stdout
        builder(tmp_path, "--cache-all-templates", source=source, more=more)
    kept = {path.name.partition(".")[0]: path for path in (tmp_path / "cache/virt-builder").iterdir()}
    assert set(kept) == set(found)
    assert {digest(path) for path in kept.values()} == {digest(image)}


@has_builder
def test_virt_builder_takes_no_image_with_another_checksum(tree: Path, tmp_path: Path) -> None:
    def build() -> str:
        # Without libguestfs's appliance (a VM) it ends after the checksum and the plan.
        words = ["recvirt-default", "--output", str(tmp_path / "own.qcow2"), "--format", "qcow2", "--no-cache"]
        source, no_vm = f"{tree.as_uri()}/index", {"LIBGUESTFS_PATH": str(tmp_path / "none")}
        return builder(tmp_path, *words, source=source, check=False, more=no_vm).stderr

    good = build()
    assert "checksum" not in good
    assert "appliance" in good
    spoil_disk(tree)
    assert "did not match the expected checksum" in build()


@has_builder
def test_virt_builder_takes_no_index_that_is_cut_short(tree: Path, tmp_path: Path) -> None:
    text = (tree / "index").read_text()
    (tree / "index").write_text(text.replace("file=", "fil", 1))
    assert builder(tmp_path, "--list", source=f"{tree.as_uri()}/index", check=False).returncode != 0
