"""Loading whole profiles: layers, names and paths, overrides, and every fault at once with its place."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from recvirt.data import fragment_path, package_list_path, shipped_names
from recvirt.errors import ConfigError
from recvirt.profile import DEFAULT, LoadedProfile, load_profile, profile_names

Write = Callable[..., Path]
SHIPPED = shipped_names("profiles")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file below an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str = "") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write_file


def faults_of(name: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_profile(name, overrides)
    return str(caught.value).splitlines()


# --- the shipped ones


def test_every_profile_that_was_promised_is_shipped() -> None:
    assert {"minimal", "default", "debian-kernel", "debug", "bench", "kernel-7", "bookworm"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_and_names_files_that_exist(name: str) -> None:
    loaded = load_profile(name)
    assert loaded.name == name
    assert loaded.model.description
    for fragment in loaded.model.kernel.fragments:
        assert fragment_path(fragment).is_file()
    for package_list in loaded.model.root.package_lists:
        assert package_list_path(package_list).is_file()


def test_profiles_share_one_kernel_unless_they_must_differ() -> None:
    def kernel_of(name: str) -> str:
        return load_profile(name).model.kernel.model_dump_json()

    assert kernel_of("minimal") == kernel_of("default") == kernel_of("bookworm")
    assert len({kernel_of(name) for name in ("default", "debug", "bench", "kernel-7", "debian-kernel")}) == 5


def test_the_same_fragments_serve_every_kernel() -> None:
    fragments = load_profile("default").model.kernel.fragments
    assert load_profile("kernel-7").model.kernel.fragments == fragments
    assert load_profile("debian-kernel").model.kernel.fragments == fragments


def test_minimal_has_neither_libvirt_nor_nfs() -> None:
    model = load_profile("minimal").model
    assert model.root.nfs is None
    assert not {"kvm-host", "nfs"} & set(model.root.package_lists)


# --- finding


def test_a_name_is_looked_up_in_the_current_folders_profiles_first(write: Write) -> None:
    write("profiles/default.yaml", "extends: default\ndescription: mine\n")
    loaded = load_profile("default")
    assert loaded.model.description == "mine"
    assert loaded.model.kernel.fragments  # came from the shipped default
    assert profile_names()["default"].parent == Path.cwd() / "profiles"


def test_a_profile_takes_its_files_name_unless_it_has_its_own(write: Write) -> None:
    write("one.yaml", "extends: minimal\n")
    write("two.yaml", "extends: ./one.yaml\nname: other\n")
    write("three.yaml", "extends: ./two.yaml\n")
    assert load_profile("one.yaml").name == "one"
    assert load_profile("./two.yaml").name == "other"
    assert load_profile("three.yaml").name == "three"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("defualt", "there is no profile 'defualt'; did you mean 'default'?"),
        ("zzzzz", "there is no profile 'zzzzz'"),
        ("./none.yaml", "there is no file ./none.yaml"),
        ("../../etc", "there is no file ../../etc"),
    ],
)
def test_what_is_not_there(write: Write, name: str, wanted: str) -> None:
    assert faults_of(name) == [wanted]


# --- layers


def test_several_parents_are_laid_in_order_and_each_file_once(write: Write) -> None:
    write("base.yaml", "extends: minimal\nroot: {hostname: base, timezone: Etc/UTC, packages: [one]}\n")
    write("left.yaml", "extends: base\nroot: {hostname: left, packages+: [two]}\n")
    write("right.yaml", "extends: base\nroot: {timezone: Europe/Berlin, packages+: [three]}\n")
    write("leaf.yaml", "extends: [left, right]\nimage: {size: 9G}\n")
    loaded = load_profile("leaf.yaml")
    # base is not laid again below right: that would take left's host name back.
    assert loaded.model.root.hostname == "left"
    assert loaded.model.root.timezone == "Europe/Berlin"
    assert loaded.model.root.packages == ("one", "two", "three")
    assert [path.name for path in loaded.files] == ["minimal.yaml", "base.yaml", "left.yaml", "right.yaml", "leaf.yaml"]


def test_the_later_parent_wins(write: Write) -> None:
    write("a.yaml", "extends: minimal\nroot: {hostname: a}\n")
    write("b.yaml", "extends: minimal\nroot: {hostname: b}\n")
    write("ab.yaml", "extends: [a, b]\n")
    write("ba.yaml", "extends: [b, a]\n")
    assert load_profile("ab.yaml").model.root.hostname == "b"
    assert load_profile("ba.yaml").model.root.hostname == "a"


def test_circles_and_missing_parents_are_faults_with_their_line(write: Write) -> None:
    write("a.yaml", "description: a\nextends: b\n")
    write("b.yaml", "extends:\n  - c\n  - nowhere\n  - 5\nkernel: debian\nimage: {initramfs: small}\n")
    write("c.yaml", "extends: ./a.yaml\n")
    assert faults_of("a.yaml") == [
        "b.yaml:3: extends: there is no profile 'nowhere'",
        "b.yaml:4: extends: must be a profile's name, its path, or a list",
        "c.yaml:1: extends: goes round in a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml",
    ]


def test_a_profile_that_extends_itself(write: Write) -> None:
    write("mine.yaml", "extends: mine\nkernel: debian\nimage: {initramfs: small}\n")
    assert faults_of("mine.yaml") == ["mine.yaml:1: extends: there is no profile 'mine'"]


def test_a_very_long_chain_is_refused(write: Write) -> None:
    for number in range(70):
        write(f"p{number}.yaml", f"extends: p{number + 1}\n")
    write("p70.yaml", "extends: minimal\n")
    assert any("more than 64 profiles in one" in fault for fault in faults_of("p0.yaml"))


def test_kernel_debian_keeps_the_fragments_for_the_audit(write: Write) -> None:
    write("p.yaml", "extends: default\nkernel: debian\nimage: {initramfs: small}\n")
    kernel = load_profile("p.yaml").model.kernel
    assert kernel.source == "debian"
    assert kernel.fragments == load_profile("default").model.kernel.fragments


# --- all faults at once


def test_every_fault_of_every_file_is_told_at_once(write: Write) -> None:
    write("parent.yaml", "extends: minimal\nroot:\n  hostnam: x\n  hostname: Bad_Name\n  hostname: twice\n")
    write(
        "p.yaml",
        """\
        extends: parent
        kernel:
          fragments+: [nothing]
          frgments: [x]
          overrides: {NR_CPUS: 64, 'A-B': y}
        root:
          packages-: [emacs]
          package_lists+: [bse]
          overlays: [./no-folder]
          hooks:
            - {where: nowhere, path: ./no-file.sh}
          users:
            - {name: admin, ssh_keys: ["-----BEGIN OPENSSH PRIVATE KEY-----"]}
            - {name: admin, sudo: yes}
        image:
          size: 4 GB
          boot_timeout: fast
          formats: qcow2
        acept: {}
        """,
    )
    assert faults_of("p.yaml", "root.suite=jessie", "image.filesystem") == [
        "--set image.filesystem: must look like key.key=value (null takes the built-in default back)",
        "--set root.suite=jessie: root.suite: must be one of 'trixie', 'bookworm' or 'sid', not 'jessie'",
        "p.yaml:3: kernel.fragments[21]: there is no kernel fragment 'nothing'",
        "p.yaml:4: kernel.frgments: unknown key; did you mean 'fragments'?",
        "p.yaml:5: kernel.overrides.A-B: the key 'A-B' is not of the form ^[A-Za-z0-9_]+$",
        "p.yaml:7: root.packages-: 'emacs' is not in the list that it would be removed from",
        "p.yaml:8: root.package_lists[2]: there is no package list 'bse'; did you mean 'base'?",
        f"p.yaml:9: root.overlays[0]: there is no folder {Path.cwd()}/no-folder",
        f"p.yaml:11: root.hooks[0].path: there is no file {Path.cwd()}/no-file.sh",
        "p.yaml:11: root.hooks[0].where: must be one of 'host' or 'chroot', not 'nowhere'",
        "p.yaml:13: root.users[0].ssh_keys[0]: this is a private key: an image gets the public one "
        "(the .pub file's line)",
        "p.yaml:14: root.users[1].name: 'admin' stands twice in users",
        "p.yaml:14: root.users[1].sudo: must be true or false, not 'yes'",
        "p.yaml:16: image.size: a size is a whole number with K, M, G or T, as 4G",
        "p.yaml:17: image.boot_timeout: must be a whole number, not 'fast'",
        "p.yaml:18: image.formats: must be a list, not text",
        "p.yaml:19: acept: unknown key; did you mean 'accept'?",
        "parent.yaml:3: root.hostnam: unknown key; did you mean 'hostname'?",
        "parent.yaml:4: root.hostname: 'Bad_Name' is not of the form ^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        "parent.yaml:5: root.hostname: stands twice (first in line 4)",
    ]


def test_a_file_that_is_not_yaml_does_not_hide_the_others(write: Write) -> None:
    write("broken.yaml", "a: [\n")
    write("p.yaml", "extends: [minimal, broken]\nfoo: 1\n")
    found = faults_of("p.yaml")
    assert found[0].startswith("broken.yaml:2: not YAML: ")
    assert found[1] == "p.yaml:2: foo: unknown key"


@pytest.mark.parametrize("text", ["a: [\n", "", "- a\n", "extends: nowhere\n", "extends: p\n"])
def test_what_a_file_that_can_not_be_read_says_is_not_missing(write: Write, text: str) -> None:
    write("p.yaml", text)
    (fault,) = faults_of("p.yaml")
    assert fault.startswith("p.yaml")


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("kernel=debian", "image.initramfs: Debian's kernel has its disk drivers as modules: it needs initramfs: s"),
        ("kernel.source=tarball", "kernel.source: is tarball, but kernel.tarball is not set"),
        ("kernel.source=tree", "kernel.source: is tree, but kernel.tree is not set"),
        ("kernel.fragments=[]", "kernel.fragments: a kernel of our own needs fragments"),
        ("image.filesystem=xfs", "image.filesystem: the kernel can't mount xfs as its root: add 61-root-xfs"),
        ("root.snapshot=20260101T000000Z", "root.snapshot: needs root.snapshot_mirror"),
        ("root.console_autologin=nobody2", "root.console_autologin: 'nobody2' is none of root.users"),
        ("image.size=100M", "image.size: a Debian root needs at least 512M"),
        ("image.esp_size=8M", "image.esp_size: FAT32 needs at least 33M"),
        ("image.esp_size=3G", "image.esp_size: takes more than half of image.size"),
        ("accept.memory=64M", "accept.memory: a guest needs at least 256M"),
        ("root.package_lists=[base, base]", "root.package_lists[1]: 'base' stands twice"),
        ("root.cloud_init.datasources=[]", "root.cloud_init.datasources: cloud-init without a datasource finds n"),
        ("root.packages=['-oProxyCommand=x']", "root.packages[0]: '-oProxyCommand=x' is not of the form"),
        ("root.mirror='http://x y'", "root.mirror: must be a URL"),
        ("root.nfs.images.source='server:/a b'", "root.nfs.images.source: 'server:/a b' is not of the form"),
        ("kernel.cmdline=[\"a\\nb\"]", "kernel.cmdline[0]: control characters and line breaks are not allowed here"),
        ("kernel.cmdline=['a \"b\"']", "kernel.cmdline[0]: '\"b\"' can't stand on a kernel command line here"),
        ("kernel.cmdline=[root=/dev/sda]", "kernel.cmdline[0]: 'root=/dev/sda': the image sets this word itself"),
        ("root.users=[{name: root}]", "root.users[0].name: root is an account of the system"),
        ("root.users=[{name: a, ssh_keys: [ssh-rsa AAAA]}]", "root.users[0].ssh_keys[0]: is not a public SSH key"),
        ("name=Default", "name: 'Default' is not of the form"),
        ("root.users=5", "root.users: must be a list, not a number"),
        ("root=5", "root: must hold keys and values, not a number"),
    ],
)  # fmt: skip
def test_contradictions_and_bad_values(override: str, fault: str) -> None:
    found = faults_of("minimal", override)
    assert len(found) == 1, found
    assert fault in found[0]


def test_a_unit_that_is_enabled_and_masked() -> None:
    found = faults_of("minimal", "root.services=[a.service]", "root.masked=[a.service]")
    assert found == ["--set root.services=[a.service]: root.services[0]: 'a.service' is also in root.masked"]


def test_a_fault_in_a_default_needs_a_source(write: Write) -> None:
    write("p.yaml", "description: no parent\n")
    assert faults_of("p.yaml")[0].startswith(f"{DEFAULT}: kernel.fragments: a kernel of our own needs fragments")


# --- overrides and paths


def loaded_with(*overrides: str) -> LoadedProfile:
    return load_profile("minimal", overrides)


def test_overrides_are_yaml_and_edit_lists() -> None:
    loaded = loaded_with(
        "image.size=8G", "image.formats=[raw, qcow2]", "root.packages+=vim", "root.packages+=[tmux, jq]",
        "root.packages-=qemu-utils", 'root.sysctl."net.ipv4.ip_forward"=1', "root.nested=false", "root.nfs={}",
        "description=a=b", "kernel.overrides.NR_CPUS=64",
    )  # fmt: skip
    assert loaded.model.image.size == "8G"
    assert loaded.model.image.formats == ("raw", "qcow2")
    assert loaded.model.root.packages == ("qemu-system-x86", "vim", "tmux", "jq")
    assert loaded.model.root.sysctl == {"net.ipv4.ip_forward": "1"}
    assert loaded.model.root.nested is False
    assert loaded.model.root.nfs is not None
    assert loaded.model.description == "a=b"
    assert loaded.model.kernel.overrides == {"NR_CPUS": "64"}
    assert loaded.origins["image.size"] == ("--set image.size=8G", 0)


def test_the_later_override_wins_and_null_takes_the_default_back() -> None:
    loaded = loaded_with("root.hostname=a", "root.hostname=b", "image.size=9G", "image.size=null")
    assert loaded.model.root.hostname == "b"
    assert loaded.model.image.size == "4G"
    assert loaded.origins["image.size"] == (DEFAULT, 0)


@pytest.mark.parametrize(
    "word",
    ["", "a", "a=", "=1", ".a=1", "a.=1", "a..b=1", 'a."b=1', 'a."b"c=1', "root.hostname=[", "root.hostname=!x y"],
)
def test_overrides_that_can_not_be_read(word: str) -> None:
    found = faults_of("minimal", word)
    assert len(found) == 1
    assert found[0].startswith(f"--set {word}: ")


def test_relative_paths_are_relative_to_the_file_that_wrote_them(write: Write) -> None:
    write("a/base.yaml", "extends: minimal\nroot: {overlays: [./tree], hooks: [{where: host, path: do.sh}]}\n")
    write("a/tree/etc/motd")
    write("a/do.sh")
    write("b/own.config", "# mine\n")
    write("b/leaf.yaml", "extends: ../a/base.yaml\nkernel: {fragments+: [./own.config]}\n")
    write("c/more.list")
    model = load_profile("b/leaf.yaml", ["root.package_lists+=./c/more.list"]).model
    here = Path.cwd()
    assert model.root.overlays == (str(here / "a/tree"),)
    assert model.root.hooks[0].path == str(here / "a/do.sh")
    assert model.kernel.fragments[-1] == str(here / "b/own.config")
    assert fragment_path(model.kernel.fragments[-1]) == here / "b/own.config"
    assert package_list_path(model.root.package_lists[-1]) == here / "c/more.list"


def test_a_file_where_a_folder_is_wanted(write: Write) -> None:
    write("p.yaml", "extends: minimal\nroot: {overlays: [p.yaml]}\n")
    assert faults_of("p.yaml") == [f"p.yaml:2: root.overlays[0]: there is no folder {Path.cwd()}/p.yaml"]


def test_origins_name_file_and_line_of_every_value(write: Write) -> None:
    path = write("p.yaml", "extends: minimal\nroot:\n  users:\n    - name: admin\n      sudo: true\n")
    loaded = load_profile(str(path))
    assert loaded.origins["root.users[0].name"] == ("p.yaml", 4)
    assert loaded.origins["root.users[0].sudo"] == ("p.yaml", 5)
    assert loaded.origins["root.hostname"] == (DEFAULT, 0)
    file, line = loaded.origins["kernel.fragments[0]"]
    assert Path(file).name == "minimal.yaml"
    assert "10-base" in Path(file).read_text().splitlines()[line - 1]


@pytest.mark.parametrize("text", ["root: {mirror: %s}", "root: {snapshot_mirror: %s}", "kernel: {tarball: {url: %s}}"])
def test_urls_hold_no_passwords(write: Write, text: str) -> None:
    write("p.yaml", "extends: minimal\n" + text % '"https://me:secret@mirror.example/x"')
    faults = faults_of("p.yaml")
    assert any("must not hold a user name or password" in fault for fault in faults)
    assert not any("secret" in fault for fault in faults)
