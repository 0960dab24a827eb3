"""The root stage for real: names resolve, bytes repeat, hooks and overlays arrive, nothing secret stays.

Packages come from the suite's own archive through the person's cache; the trees are made from the list ``base`` alone.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from recvirt.archive import Archive
from recvirt.data import data_path, package_list_path, shipped_names
from recvirt.errors import CommandError, ConfigError, DownloadError, StageError
from recvirt.model import Profile
from recvirt.rootfs.lists import read_lists
from recvirt.rootfs.selection import depends_of, own_packages
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Work
from recvirt.stages.root import RootInputs, RootStage
from recvirt.store import key_of, sha256_of

pytestmark = pytest.mark.slow

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIo1pM4cKk1W6hS0ZcPzj5hV4Bd4bZC2QFSYtE6jYQ2b someone@somewhere"


def profile(**root: Any) -> Profile:
    return Profile.model_validate({"name": "small", "root": {"package_lists": ("base",), **root}})


@pytest.fixture
def cached(tools: ToolsRoot, shared_cache: Path) -> Context:
    """A context whose packages are kept between runs; each is verified again."""
    return Context(tools=tools, cache_dir=shared_cache, jobs=2)


Build = Callable[..., Path]


@pytest.fixture
def build(cached: Context, tmp_path: Path) -> Build:
    """``build(profile)``: the folder with root.tar and packages.json. Our own packages are left out."""
    count = 0

    def act(given: Profile, context: Context = cached) -> Path:
        nonlocal count
        count += 1
        inputs = inputs_of(given, context)
        folder = tmp_path / f"build-{count}"
        for name in ("out", "scratch", "debs"):
            (folder / name).mkdir(parents=True)
        RootStage().build(
            inputs, Work(folder / "out", folder / "scratch", folder / "log", context, {"guest_debs": folder / "debs"})
        )
        return folder / "out"

    return act


def inputs_of(given: Profile, context: Context, debs: str = "no-debs") -> RootInputs:
    return RootStage().inputs(given, {"guest_debs": debs}, context)


class Tree(Mapping[str, tarfile.TarInfo]):
    """What a root.tar holds, by path below the root."""

    def __init__(self, path: Path) -> None:
        self.tar = tarfile.open(path)  # noqa: SIM115 - lives as long as the tree
        self.members = {m.name.removeprefix("./").rstrip("/"): m for m in self.tar}

    def __getitem__(self, name: str) -> tarfile.TarInfo:
        return self.members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def read(self, name: str) -> bytes:
        stream = self.tar.extractfile(self.members[name])
        assert stream is not None
        with stream:
            return stream.read()

    def text(self, name: str) -> str:
        return self.read(name).decode()


# -- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["trixie", "bookworm"])
@pytest.mark.parametrize("name", shipped_names("package-lists"))
def test_every_name_of_a_list_is_in_the_suite(cached: Context, name: str, suite: str) -> None:
    """With the list ``base``, as profiles use it: conflicts between the two would show as well."""
    listed = read_lists([package_list_path(name), package_list_path("base")], suite)
    # Ours come from here; what they need is the suite's.
    ours = own_packages(listed)
    names = sorted({*listed, *depends_of(data_path("packages"), ours)} - ours)
    closure = {
        package.name for package in Archive(cached.tools, cached.cache_dir, suite=suite).resolve(names, essential=True)
    }
    assert set(names) <= closure


def test_a_name_that_the_suite_lacks_is_a_fault_of_the_profile(cached: Context) -> None:
    with pytest.raises(ConfigError, match="no-such-package-anywhere"):
        inputs_of(profile(packages=("no-such-package-anywhere",)), cached)


def test_the_base_list_is_needed(cached: Context) -> None:
    with pytest.raises(ConfigError, match="add the list base"):
        inputs_of(profile(package_lists=(), packages=("bash",)), cached)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_the_key_follows_what_matters_and_nothing_else(cached: Context, tmp_path: Path) -> None:
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay/file").write_text("1")
    (tmp_path / "hook").write_text("#!/bin/sh\n")

    def key(given: Profile, debs: str = "x") -> str:
        return key_of("root", 1, inputs_of(given, cached, debs))

    hook = {"where": "chroot", "path": str(tmp_path / "hook")}
    with_files = profile(overlays=(str(tmp_path / "overlay"),), hooks=(hook,))
    keys = [
        key(profile()),
        key(with_files),
        key(profile(), "y"),
        key(profile(hostname="other")),
        key(profile(packages=("file",))),
    ]
    (tmp_path / "overlay/file").write_text("2")
    keys.append(key(with_files))
    (tmp_path / "hook").write_text("#!/bin/sh\n:\n")
    keys.append(key(with_files))
    assert len(set(keys)) == len(keys)
    # The kernel's options are the kernel's: a root is not made again for them.
    other_kernel = profile().model_copy(
        update={"kernel": profile().kernel.model_copy(update={"localversion": "-other"})}
    )
    assert key(other_kernel) == key(profile())


# -- trees ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def extras(tmp_path: Path) -> dict[str, Any]:
    """An overlay with traps, and hooks on both sides."""
    overlay = tmp_path / "overlay"
    (overlay / "etc/extra").mkdir(parents=True, mode=0o700)
    (overlay / "etc").chmod(0o777)
    (overlay / "etc/motd").write_text("hello\n")
    (overlay / "etc/extra/tool").write_text("#!/bin/sh\n")
    (overlay / "etc/extra/tool").chmod(0o750)
    # /var/run and /bin are links in the tree; /etc/out leads out of it on the build machine.
    (overlay / "var/run/from-overlay").mkdir(parents=True)
    (overlay / "bin").mkdir()
    (overlay / "bin/from-overlay").write_text("x")
    (overlay / "etc/out").symlink_to(tmp_path)
    inside = tmp_path / "inside"
    inside.write_text("#!/bin/sh\nset -e\ntest -x /usr/bin/dpkg\nid -u > /etc/from-chroot-hook\nls / > /etc/top\n")
    outside = tmp_path / "outside"
    outside.write_text('#!/bin/sh\nset -e\ntest -d "$1/etc"\necho yes > "$1/etc/from-host-hook"\n')
    return {
        "overlays": (str(overlay),),
        "hooks": ({"where": "chroot", "path": str(inside)}, {"where": "host", "path": str(outside)}),
    }


def test_a_tree_is_what_the_profile_says_and_its_bytes_repeat(build: Build, extras: dict[str, Any]) -> None:
    given = profile(
        users=({"name": "ada", "ssh_keys": (KEY,), "groups": ("systemd-journal",), "sudo": True},),
        hostname="l1", timezone="Europe/Berlin", masked=("apt-daily.timer",), services=("systemd-pstore.service",),
        **extras,
    )  # fmt: skip
    first, second = build(given), build(given)
    assert sha256_of(first / "root.tar") == sha256_of(second / "root.tar")
    assert (first / "packages.json").read_text() == (second / "packages.json").read_text()
    tree = Tree(first / "root.tar")
    check_users(tree)
    check_nothing_of_one_machine(tree)
    check_overlay_and_hooks(tree)
    check_policy(tree, first / "packages.json")
    assert tree.text("etc/hostname") == "l1\n"
    assert tree["etc/localtime"].linkname == "/usr/share/zoneinfo/Europe/Berlin"
    assert tree["etc/resolv.conf"].linkname == "../run/systemd/resolve/stub-resolv.conf"
    assert tree["etc/systemd/system/apt-daily.timer"].linkname == "/dev/null"
    wants = "etc/systemd/system/multi-user.target.wants"
    assert {f"{wants}/ssh.service", f"{wants}/recvirt-ssh-keys.service", f"{wants}/systemd-networkd.service"} <= set(
        tree
    )
    assert {"var/lib/recvirt/images", "var/lib/recvirt/blocks", "boot/efi"} <= set(tree)


def check_users(tree: Tree) -> None:
    shadow = {line.split(":")[0]: line.split(":") for line in tree.text("etc/shadow").splitlines()}
    assert all(fields[1].startswith(("!", "*")) for fields in shadow.values())
    assert shadow["root"][1].startswith("!")
    # The day of the newest package, not of the build.
    epoch = max(member.mtime for member in tree.values())
    assert {fields[2] for fields in shadow.values()} == {str(int(epoch) // 86400)}
    groups = {line.split(":")[0]: line.split(":")[3].split(",") for line in tree.text("etc/group").splitlines()}
    assert "ada" in groups["sudo"] and "ada" in groups["systemd-journal"]
    keys = tree["home/ada/.ssh/authorized_keys"]
    assert tree.text(keys.name.removeprefix("./")) == KEY + "\n"
    assert (keys.mode, keys.uid, tree["home/ada/.ssh"].mode) == (0o600, 1000, 0o700)
    assert "root/.ssh" not in tree
    assert tree["etc/sudoers.d/recvirt"].mode == 0o440


def check_nothing_of_one_machine(tree: Tree) -> None:
    assert not [name for name in tree if name.startswith("etc/ssh/ssh_host_") or name.endswith(".key")]
    assert tree["etc/machine-id"].size == 0 and tree["etc/machine-id"].isreg()
    for folder in ("tmp", "var/tmp", "var/lib/apt/lists", "run/lock", "var/log/journal", "var/lib/cloud"):
        assert not [name for name in tree if name.startswith(f"{folder}/")], folder
    logs = [name for name, member in tree.items() if name.startswith("var/log/") and member.isreg() and member.size]
    assert not logs
    assert not [name for name in tree if "mmdebstrap" in name or name.endswith(("-old", "/.pwd.lock"))]
    assert not [name for name in tree if name.startswith("run/") and name != "run/lock"]


def check_overlay_and_hooks(tree: Tree) -> None:
    assert tree.text("etc/motd") == "hello\n"
    assert (tree["etc/extra/tool"].mode, tree["etc/extra/tool"].uid, tree["etc/extra"].mode) == (0o750, 0, 0o700)
    assert tree["etc"].mode == 0o755, "a folder of the tree keeps its mode"
    assert tree["bin"].issym() and tree.text("usr/bin/from-overlay") == "x"
    assert tree["var/run"].issym()
    assert tree["etc/out"].issym(), "a link stays a link"
    assert tree.text("etc/from-chroot-hook") == "0\n"
    assert "packages" not in tree.text("etc/top").split()
    assert "etc/from-host-hook" in tree


def check_policy(tree: Tree, packages: Path) -> None:
    assert "usr/share/doc/bash/copyright" in tree and "usr/share/doc/systemd/copyright" in tree
    texts = [name for name, member in tree.items() if name.startswith("usr/share/doc/") and member.isreg()]
    assert {Path(name).name for name in texts} == {"copyright"}
    assert not [
        name for name, m in tree.items() if name.startswith(("usr/share/man/", "usr/share/i18n/")) and m.isreg()
    ]
    assert "path-exclude=/usr/share/man/*" in tree.text("etc/dpkg/dpkg.cfg.d/recvirt")
    # dpkg's records stay whole: what is listed as installed is exactly what packages.json says.
    stanzas = tree.text("var/lib/dpkg/status").split("\n\n")
    recorded = {
        s.partition("\n")[0].removeprefix("Package: ") for s in stanzas if "\nStatus: install ok installed\n" in s
    }
    assert recorded == {item["name"] for item in json.loads(packages.read_text())}
    assert "usr/share/man/man1/bash.1.gz" in tree.text("var/lib/dpkg/info/bash.list")
    assert "packages" not in tree.text("etc/apt/sources.list") and "trixie-security" in tree.text(
        "etc/apt/sources.list"
    )


def test_too_little_memory_means_disk_and_the_same_bytes(
    build: Build, cached: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = build(profile())
    monkeypatch.setattr("recvirt.rootfs.memory.fits_in_memory", lambda need, text: False)
    on_disk = build(profile())
    assert sha256_of(in_memory / "root.tar") == sha256_of(on_disk / "root.tar")
    assert not list((cached.cache_dir / "trees").iterdir()), "the tree is put away"


def test_offline_works_from_what_is_cached(build: Build, cached: Context, tmp_path: Path) -> None:
    online = build(profile())
    offline = Context(tools=cached.tools, cache_dir=cached.cache_dir, jobs=2, offline=True)
    assert sha256_of(build(profile(), offline) / "root.tar") == sha256_of(online / "root.tar")
    nothing = Context(tools=cached.tools, cache_dir=tmp_path / "empty", jobs=2, offline=True)
    with pytest.raises(DownloadError, match="offline"):
        build(profile(), nothing)


def test_debootstrap_makes_the_same_system(build: Build) -> None:
    with_mmdebstrap, with_debootstrap = build(profile()), build(profile(bootstrapper="debootstrap"))
    assert (with_mmdebstrap / "packages.json").read_text() == (with_debootstrap / "packages.json").read_text()
    ours, theirs = Tree(with_mmdebstrap / "root.tar"), Tree(with_debootstrap / "root.tar")
    check_nothing_of_one_machine(theirs)
    # What it leaves by its own way of starting, besides.
    assert set(ours) ^ set(theirs) <= {"var/lib/dpkg/arch", "var/lib/dpkg/alternatives/builtins.7.gz"}
    common = set(ours) & set(theirs)
    assert [name for name in sorted(common) if kind(ours[name]) != kind(theirs[name])] == []


def kind(member: tarfile.TarInfo) -> tuple[int, bytes]:
    return member.mode, member.type


def test_a_hook_that_fails_ends_the_build_and_is_named(build: Build, tmp_path: Path) -> None:
    (tmp_path / "bad-hook").write_text("#!/bin/sh\necho 'it is not so' >&2\nexit 9\n")
    with pytest.raises(CommandError) as caught:
        build(profile(hooks=({"where": "chroot", "path": str(tmp_path / "bad-hook")},)))
    assert "it is not so" in caught.value.message and "the hook bad-hook failed" in caught.value.message


def test_a_hook_can_t_change_the_packages_behind_the_key(build: Build, tmp_path: Path) -> None:
    (tmp_path / "remover").write_text("#!/bin/sh\ndpkg --purge --force-all nano-tiny\n")
    with pytest.raises(StageError, match="not installed: nano-tiny"):
        build(profile(hooks=({"where": "chroot", "path": str(tmp_path / "remover")},)))


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ({"users": ({"name": "ada", "groups": ("nobodys-group",)},)}, "there is no group nobodys-group"),
        ({"timezone": "Europe/Atlantis"}, "time zone Europe/Atlantis is unknown"),
        ({"locale": "xx_YY.UTF-8"}, "locale xx_YY.UTF-8 is unknown"),
        ({"services": ("no-such-unit.service",)}, "no-such-unit.service"),
    ],
)
def test_what_only_the_tree_knows_is_told_by_name(build: Build, root: dict[str, Any], words: str) -> None:
    with pytest.raises(CommandError) as caught:
        build(profile(**root))
    assert words in caught.value.message


def test_a_damaged_package_in_the_cache_is_fetched_anew(cached: Context, tmp_path: Path) -> None:
    context = Context(tools=cached.tools, cache_dir=tmp_path / "cache", jobs=2)
    archive = Archive(context.tools, context.cache_dir, suite="trixie")
    package = archive.find("netbase")
    (path,) = archive.download_all([package])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert archive.download_all([package]) == [path] and path.read_bytes() == whole
