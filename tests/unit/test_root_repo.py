"""The repository of pinned packages, and the choice of packages and workspace."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import cast

import pytest

from recvirt.data import data_path
from recvirt.errors import VerificationError
from recvirt.model import Profile, Root
from recvirt.rootfs.localrepo import epoch_of, packages_text, read_deb, source_line, write_repo
from recvirt.rootfs.memory import SANDBOX_TMP, fits_in_memory, sweep, workspace
from recvirt.rootfs.selection import depends_of, missing_basics, own_packages, packages_wanted
from recvirt.sandbox import ToolsRoot
from tests.support.debs import control_text, make_deb

GIB = 1024**3


def put(folder: Path, name: str, version: str = "1.0", built: int = 0) -> Path:
    content = make_deb(control_text(name, version), {"usr/share/x": b"x"})
    content = content.replace(f"{0:<12}{0:<6}{0:<6}".encode(), f"{built:<12}{0:<6}{0:<6}".encode())
    path = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
    path.write_bytes(content)
    return path


def test_a_package_is_read(tmp_path: Path) -> None:
    deb = read_deb(put(tmp_path, "one", "1:2.0", built=1_700_000_000), "ab")
    assert deb.control_field("Package") == "one" and deb.control_field("version") == "1:2.0"
    assert deb.control_field("Depends") == ""
    assert deb.built == 1_700_000_000
    assert deb.sha256 == "ab"


@pytest.mark.parametrize("cut", [0, 5, 70, 100, 180])
def test_half_a_package_is_refused(tmp_path: Path, cut: int) -> None:
    path = put(tmp_path, "one")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(VerificationError, match="not a Debian package"):
        read_deb(path, "")


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_bytes(b"<html>captive portal</html>" * 10)
    with pytest.raises(VerificationError, match="no ar archive"):
        read_deb(tmp_path / "x.deb", "")


def test_the_epoch_is_the_newest_package_s(tmp_path: Path) -> None:
    debs = [read_deb(put(tmp_path, name, built=built), "") for name, built in (("a", 5), ("b", 9), ("c", 7))]
    assert epoch_of(debs) == 9
    assert epoch_of([]) == 0


def test_the_repository(tmp_path: Path) -> None:
    debs = [read_deb(put(tmp_path, "b"), "2" * 64), read_deb(put(tmp_path, "a", "1:1"), "1" * 64)]
    write_repo(tmp_path / "repo", debs, "trixie")
    index = (tmp_path / "repo/dists/trixie/main/binary-amd64/Packages").read_bytes()
    assert index.decode() == packages_text(debs)
    stanzas = index.decode().split("\n\n")
    assert [stanza.splitlines()[0] for stanza in stanzas] == ["Package: a", "Package: b"]
    # A percent sign would be read as an escape in a file: URL.
    assert "\nFilename: pool/a_1_3a1_all.deb\n" in stanzas[0] and f"\nSHA256: {'1' * 64}" in stanzas[0]
    assert (tmp_path / "repo/pool/a_1_3a1_all.deb").samefile(tmp_path / "a_1%3a1_all.deb")
    release = (tmp_path / "repo/dists/trixie/Release").read_text()
    assert f" {hashlib.sha256(index).hexdigest()} {len(index)} main/binary-amd64/Packages\n" in release
    assert "\nSuite: trixie\nCodename: trixie\n" in release
    assert source_line("trixie") == "deb [trusted=yes] file:/run/packages trixie main"


# -- which packages ---------------------------------------------------------------------------------------------------


def profile(**root: object) -> Profile:
    return Profile(name="p", root=Root(**root))  # type: ignore[arg-type]


def test_keys_bring_their_packages() -> None:
    assert packages_wanted(profile(), ["b", "a", "own"], ["own"], ["dep"]) == ("a", "apt", "b", "dep", "e2fsprogs")
    more = profile(
        suite="bookworm", locale="de_DE.UTF-8", unattended_upgrades=True, packages=("vim",),
        users=({"name": "ada", "sudo": True},),
    )  # fmt: skip
    assert {"locales", "unattended-upgrades", "vim", "sudo", "usr-is-merged"} <= set(packages_wanted(more, [], [], []))


def test_the_kernel_and_the_file_system_bring_theirs() -> None:
    stock = Profile.model_validate({"name": "p", "kernel": "debian", "image": {"filesystem": "xfs"}})
    assert {"linux-image-cloud-amd64", "initramfs-tools", "xfsprogs"} <= set(packages_wanted(stock, [], [], []))


def test_dependencies_of_our_packages_are_read(tmp_path: Path) -> None:
    for name, text in {
        "one": "Package: one\nDepends: a (>= 1), b | c,\n d:any [amd64]\nRecommends: r\n",
        "two": "Package: two\nPre-Depends: e\nDepends: one, ${x}\n",
        "three": "Package: three\n",
    }.items():
        (tmp_path / name / "DEBIAN").mkdir(parents=True)
        (tmp_path / name / "DEBIAN/control").write_text(text.replace(", ${x}", ""))
    assert depends_of(tmp_path, ["one", "two", "three"]) == ("a", "b", "d", "e")


def test_dependencies_of_the_shipped_packages_are_names() -> None:
    names = depends_of(data_path("packages"), own_packages(["recvirt-cloud-central"]))
    assert "python3-django" in names and all(name and name == name.strip() for name in names)
    assert depends_of(data_path("packages"), own_packages(["vim"])) == ()


def test_our_packages_go_where_they_are_named() -> None:
    assert own_packages(["vim"]) == {"recvirt-boot", "recvirt-nested-check"}
    always = {"recvirt-boot", "recvirt-nested-check"}
    assert own_packages(["recvirt-cloud"]) == {*always, "recvirt-cloud"}
    # And bring those of ours that they depend on.
    assert own_packages(["recvirt-cloud-worker"]) == {*always, "recvirt-cloud", "recvirt-cloud-worker"}


def test_a_role_brings_what_the_other_alone_needs_nowhere() -> None:
    names = {
        role: set(depends_of(data_path("packages"), own_packages([f"recvirt-cloud-{role}"])))
        for role in ("central", "worker")
    }
    assert {"postgresql", "rabbitmq-server", "nginx-light", "nfs-kernel-server"} <= names["central"] - names["worker"]
    assert {"libvirt-daemon-system", "qemu-system-x86", "nfs-common"} <= names["worker"] - names["central"]
    assert {"wireguard-tools", "nftables"} <= names["central"] & names["worker"]


def test_promises_without_packages_are_faults() -> None:
    basics = frozenset("systemd-sysv udev passwd iproute2 openssh-server systemd-resolved tzdata".split())
    assert missing_basics(profile(), basics) == []
    assert [p.path for p in missing_basics(profile(nfs={}), basics)] == ["root.nfs"]
    assert missing_basics(profile(nfs={}), basics | {"nfs-common"}) == []
    assert [p.path for p in missing_basics(profile(locale="C.ISO-8859-1"), basics)] == ["root.locale"]
    assert len(missing_basics(profile(), frozenset())) == len(basics)
    assert all("base" in problem.message for problem in missing_basics(profile(), frozenset()))


# -- where ------------------------------------------------------------------------------------------------------------


def meminfo(total: int, available: int) -> str:
    lines = [f"MemTotal:       {total * 1024**2} kB", "MemFree: 1 kB", f"MemAvailable:   {available * 1024**2} kB"]
    return "\n".join([*lines, "HugePages_Total: 0", ""])


@pytest.mark.parametrize(
    ("need", "total", "available", "expected"),
    [(1, 8, 6, True), (1, 8, 1, False), (3, 4, 4, False), (2, 4, 3, True), (2, 4, 2, False)],
)  # fmt: skip
def test_memory_is_used_when_there_is_enough(need: int, total: int, available: int, expected: bool) -> None:
    assert fits_in_memory(need * GIB, meminfo(total, available)) is expected


def test_unreadable_facts_mean_disk() -> None:
    assert not fits_in_memory(1, "")


class FakeTools:
    """Removes what it is told to remove."""

    def __init__(self) -> None:
        self.removed: list[str] = []

    def run(self, argv: list[str], **_: object) -> None:
        assert argv[:3] == ["rm", "-rf", "--one-file-system"]
        self.removed.append(Path(argv[3]).name)
        shutil.rmtree(argv[3])


def test_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recvirt.rootfs.memory.fits_in_memory", lambda need, text: need < 10)
    fake = FakeTools()
    tools = cast(ToolsRoot, fake)
    trees = tmp_path / "trees"
    with workspace(1, tools, trees) as folder:
        assert folder == SANDBOX_TMP
    with workspace(100, tools, trees) as folder:
        assert folder.is_dir() and folder.parent == trees
        # Another build meanwhile leaves it alone.
        sweep(tools, trees)
        assert folder.is_dir()
    assert not list(trees.iterdir())
    # What a killed build left goes with the next one.
    (trees / "4711/etc").mkdir(parents=True)
    (trees / "4711.lock").write_text("")
    with workspace(1, tools, trees):
        assert not list(trees.iterdir())
    assert fake.removed[-1] == "4711"


def test_the_workspace_is_put_away_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recvirt.rootfs.memory.fits_in_memory", lambda need, text: False)
    with pytest.raises(RuntimeError), workspace(1, cast(ToolsRoot, FakeTools()), tmp_path / "trees"):
        raise RuntimeError
    assert not list((tmp_path / "trees").iterdir())
