"""The tiny guest's parts: its tree, what it takes of a kernel, and its scripts, run here against stand-ins."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from recvirt.data import data_path
from recvirt.errors import StageError
from recvirt.model import Image, Kernel, Profile
from recvirt.nestedcloud.bundled import FOLDER
from recvirt.nestedcloud.central import bundled
from recvirt.nestedcloud.worker.seed import seed_files
from recvirt.pipeline import stages_for
from recvirt.profile.rules import conflicts
from recvirt.store import FileRef
from recvirt.tinyguest import modules, package
from recvirt.tinyguest.programs import Linked, Unpacked, add_programs, parse_readelf
from recvirt.tinyguest.tree import Tree, add_applets, add_own_files, grub_cfg, read_own_files
from tests.cloud.support import instance

GUEST = data_path("guest")
LIB = GUEST / "usr/lib/recvirt-guest"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIo1pM4cKk1W6hS0ZcPzj5hV4Bd4bZC2QFSYtE6jYQ2b"
CONFIG = dict.fromkeys(
    ("EXT4_FS", "EFI_PARTITION", "VIRTIO_PCI", "VIRTIO_BLK", "SERIAL_8250_CONSOLE", "DEVTMPFS", "DEVTMPFS_MOUNT",
     "TMPFS", "UNIX", "PACKET", "ACPI_BUTTON", "VIRTIO_NET"), "y",
) | {"INPUT_EVDEV": "m", "ISO9660_FS": "m"}  # fmt: skip


# -- which profiles have it --------------------------------------------------------------------------------------------


def test_only_a_profile_that_asks_for_it_builds_it() -> None:
    plain, asking = Profile(name="p"), Profile(name="p", image=Image(guest_image=True))
    assert "guest_image" not in [stage.name for stage in stages_for(plain)]
    names = [stage.name for stage in stages_for(asking)]
    assert names.index("kernel_build") < names.index("guest_image") < names.index("image")
    assert [stage.name for stage in stages_for(asking, "guest_image")] == [
        "kernel_config", "kernel_build", "guest_image",
    ]  # fmt: skip


def test_it_can_t_have_debian_s_kernel() -> None:
    data: dict[str, Any] = {"kernel": {"source": "debian"}, "image": {"initramfs": "small", "guest_image": True}}
    assert [place for place, _ in conflicts(data)] == [("image", "guest_image")]
    data["image"]["guest_image"] = False
    assert conflicts(data) == []
    assert "guest_image" not in [stage.name for stage in stages_for(Profile(name="p", kernel=Kernel(source="debian")))]


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_our_files_are_programs_where_they_are_run(tmp_path: Path) -> None:
    tree = Tree.skeleton()
    add_own_files(tree, read_own_files(GUEST))
    modes = {path: stat.S_IMODE(entry.mode) for path, entry in tree.entries.items() if stat.S_ISREG(entry.mode)}
    assert modes["etc/init.d/boot"] == modes["usr/lib/recvirt-guest/cloud"] == modes["etc/acpi/PWRF/00000080"] == 0o755
    assert modes["usr/lib/recvirt-guest/document.awk"] == modes["etc/passwd"] == 0o644
    for path in modes:
        text = (GUEST / path).read_text()
        assert (modes[path] == 0o755) == text.startswith("#!"), path


def test_nobody_has_a_password() -> None:
    for line in (GUEST / "etc/passwd").read_text().splitlines():
        assert line.split(":")[1] == "*"
    assert not (GUEST / "etc/shadow").exists()
    # Logins by SSH are by key alone (dropbear(8), -s).
    (server,) = re.findall(r".*dropbear .*", (GUEST / "etc/inittab").read_text())
    assert "-s" in server.split()


def test_the_tar_repeats_and_holds_every_kind(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tree = Tree.skeleton()
        tree.file("usr/bin/x", b"x", 0o755)
        tree.write(tmp_path / name, 1000)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with tarfile.open(tmp_path / "a") as archive:
        members = {member.name: member for member in archive}
    assert members["./bin"].linkname == "usr/bin" and members["./tmp"].mode == 0o1777
    assert members["./usr/bin/x"].mode == 0o755 and members["./root"].mode == 0o700
    assert {member.mtime for member in members.values()} == {1000}


def test_a_file_that_changed_meanwhile_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/x").write_text("before")
    refs = read_own_files(tmp_path)
    assert refs == (FileRef.of(tmp_path / "etc/x", "etc/x"),)
    (tmp_path / "etc/x").write_text("after")
    with pytest.raises(StageError, match="changed during the build"):
        add_own_files(Tree(), refs)


def test_applets_never_stand_before_a_program() -> None:
    tree = Tree.skeleton()
    tree.file("usr/sbin/sfdisk", b"real", 0o755)
    add_applets(tree, "bin/sh\nsbin/init\nusr/sbin/sfdisk\nusr/bin/awk\nlinuxrc\nbin/busybox\n../etc/x\n")
    assert tree.entries["usr/bin/sh"].link == "busybox" == tree.entries["usr/bin/awk"].link
    assert tree.entries["usr/sbin/init"].link == "../bin/busybox"
    assert tree.entries["usr/sbin/sfdisk"].data == b"real"
    assert not {"linuxrc", "usr/bin/busybox", "etc/x"} & tree.entries.keys()


def test_grub_starts_the_kernel_without_a_menu() -> None:
    assert grub_cfg("6.12.9-x", "root=PARTUUID=x ro") == "linux /boot/vmlinuz-6.12.9-x root=PARTUUID=x ro\nboot\n"


# -- programs ----------------------------------------------------------------------------------------------------------

READELF = """
Elf file type is DYN (Position-Independent Executable file)
      [Requesting program interpreter: /lib64/ld-linux-x86-64.so.2]
 0x0000000000000001 (NEEDED)             Shared library: [libz.so.1]
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
 0x000000000000000e (SONAME)             Library soname: [x.so]
"""


def test_readelf_is_understood() -> None:
    assert parse_readelf(READELF) == Linked(("libz.so.1", "libc.so.6"), "/lib64/ld-linux-x86-64.so.2")
    assert parse_readelf("There is no dynamic section in this file.") == Linked(())


def unpacked(folder: Path, names: tuple[str, ...] = ("tools", "libc6")) -> Unpacked:
    """Two packages, the second one from before the merge of /usr."""
    for path in ("busybox", "dropbearkey", "partx"):
        (folder / "tools/usr/bin").mkdir(parents=True, exist_ok=True)
        (folder / "tools/usr/bin" / path).write_text(path)
    for path in ("dropbear", "sfdisk", "resize2fs"):
        (folder / "tools/sbin").mkdir(parents=True, exist_ok=True)
        (folder / "tools/sbin" / path).write_text(path)
    libraries = folder / "libc6/lib/x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    for name in ("libc.so.6", "libz.so.1", "ld-linux-x86-64.so.2"):
        (libraries / name).write_text(name)
    (folder / "unused").mkdir()
    return Unpacked(folder, (*names, "unused"))


def test_libraries_follow_from_what_the_files_say(tmp_path: Path) -> None:
    says = {
        "sfdisk": Linked(("libz.so.1",), "/lib64/ld-linux-x86-64.so.2"), "libz.so.1": Linked(("libc.so.6",)),
        "libc.so.6": Linked(("ld-linux-x86-64.so.2",)),
    }  # fmt: skip
    tree, found = Tree.skeleton(), unpacked(tmp_path)
    add_programs(tree, found, lambda path: says.get(path.name, Linked(())))
    place = "usr/lib/x86_64-linux-gnu"
    assert {path for path in tree.entries if path.startswith(f"{place}/")} == {
        f"{place}/{name}" for name in ("libz.so.1", "libc.so.6", "ld-linux-x86-64.so.2")
    }
    assert tree.entries["usr/lib64/ld-linux-x86-64.so.2"].link == f"/{place}/ld-linux-x86-64.so.2"
    assert tree.entries["usr/sbin/sfdisk"].data == b"sfdisk"
    assert found.used == {"tools", "libc6"}


def test_what_no_package_has_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"has the library libnew\.so"):
        add_programs(Tree(), unpacked(tmp_path), lambda _: Linked(("libnew.so",)))
    (tmp_path / "tools/sbin/sfdisk").unlink()
    with pytest.raises(StageError, match="has usr/sbin/sfdisk"):
        add_programs(Tree(), Unpacked(tmp_path, ("tools",)), lambda _: Linked(()))


# -- the kernel --------------------------------------------------------------------------------------------------------


def test_modules_are_what_is_not_built_in() -> None:
    assert modules.modules_wanted(CONFIG) == ("evdev", "isofs")
    more = CONFIG | {"XFS_FS": "m", "ISO9660_FS": "y", "VIRTIO_BALLOON": "m", "VFAT_FS": "n"}
    assert modules.modules_wanted(more) == ("evdev", "virtio_balloon", "xfs")


@pytest.mark.parametrize(("symbol", "value"), [("EXT4_FS", "m"), ("VIRTIO_BLK", "n"), ("ISO9660_FS", "n")])
def test_a_kernel_that_can_t_run_it_is_named(symbol: str, value: str) -> None:
    with pytest.raises(StageError, match=f"lacks {symbol}$"):
        modules.modules_wanted(CONFIG | {symbol: value})


def test_a_module_comes_with_what_it_needs() -> None:
    dep = (
        "kernel/fs/fat/vfat.ko.zst: kernel/fs/fat/fat.ko.zst\nkernel/fs/fat/fat.ko.zst:\n"
        "kernel/drivers/char/hw_random/virtio-rng.ko.zst:\nkernel/x/other.ko:\n"
    )
    assert modules.closure(dep, ["vfat", "virtio_rng"]) == (
        "kernel/drivers/char/hw_random/virtio-rng.ko.zst", "kernel/fs/fat/fat.ko.zst", "kernel/fs/fat/vfat.ko.zst",
    )  # fmt: skip
    with pytest.raises(StageError, match="no module xfs"):
        modules.closure(dep, ["xfs"])


@pytest.mark.parametrize(("suffix", "program"), [(".zst", "zstd"), (".xz", "xz"), (".gz", "gzip"), ("", "cp")])
def test_modules_are_unpacked_by_their_ending(suffix: str, program: str) -> None:
    assert program in " ".join(modules.unpack_argv(f"/a b/x.ko{suffix}", "/out"))


# -- the package -------------------------------------------------------------------------------------------------------

FACTS = package.Facts("6.12.9", "linux-source-6.12 6.12.9-1", "trixie", 1_767_225_600, ("grub-common=2",), ("a 1",))


def test_the_cloud_understands_what_the_builder_tells(tmp_path: Path) -> None:
    (tmp_path / "recvirt-guest.json").write_text(
        package.facts_json(FACTS, sha256="0" * 64, size_bytes=5, virtual_bytes=7)
    )
    assert list(bundled.find(tmp_path)) == [
        bundled.Bundled("recvirt-guest", "recvirt-guest.qcow2", "qcow2", "0" * 64, 5, 7)
    ]
    assert package.IMAGE == bundled.DEFAULT_NAME and f"/{package.FOLDER}" == str(FOLDER)


def test_versions_sort_by_day() -> None:
    assert FACTS.version.endswith("+6.12.9+20260101")
    text = package.control_text(FACTS, 10, 14_000_000)
    assert f"Version: {FACTS.version}\n" in text and "disk image of 14 MB" in text
    assert "\n  a 1\n" in package.copyright_text(FACTS)


# -- documents ---------------------------------------------------------------------------------------------------------


def value(key: str, text: str, tmp_path: Path) -> list[str]:
    (tmp_path / "document").write_text(text)
    argv = ["awk", "-f", str(LIB / "document.awk"), "-v", f"key={key}", str(tmp_path / "document")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.splitlines()


YAML = """\
#cloud-config
# a remark
---
hostname: "box"   # another one
ssh_authorized_keys:
  - ssh-ed25519 AAAA me@host
  - 'ssh-rsa BB it''s'
  # no key
- "ecdsa-sha2-nistp256 CC \\"q\\""
users: [a, {name: b}]
url: http://x:80/y#z
flow: [ssh-ed25519 AA x, 'y, z']
deep:
  one:
    two: three
empty:
last: {}
"""


@pytest.mark.parametrize(
    ("key", "texts"),
    [
        ("hostname", ["box"]), ("ssh_authorized_keys", ["ssh-ed25519 AAAA me@host", "ssh-rsa BB it's",
         'ecdsa-sha2-nistp256 CC "q"']), ("users", ["a", "b"]), ("url", ["http://x:80/y#z"]),
        ("flow", ["ssh-ed25519 AA x", "y, z"]), ("deep", ["three"]), ("empty", []), ("last", []), ("absent", []),
        ("", ["hostname", "ssh_authorized_keys", "users", "url", "flow", "deep", "empty", "last"]),
    ],
)  # fmt: skip
def test_yaml_as_such_documents_use_it(key: str, texts: list[str], tmp_path: Path) -> None:
    assert value(key, YAML, tmp_path) == texts
    assert value(key, YAML.replace("\n", "\r\n"), tmp_path) == texts


@pytest.mark.parametrize("indent", [None, 1])
def test_json_with_all_that_python_escapes(indent: int | None, tmp_path: Path) -> None:
    keys = ['ssh-ed25519 AAAA "a\\b"', 'command="echo \\"hi, {you}\\"" ssh-rsa BB x', "tab\there", "ssh-rsa CC [é]"]
    data = {"a": {"keys": "no"}, "keys": keys, "n": [1, True, None], "b": "x: y", "two\nlines": "z", "c": "k\nv"}
    text = json.dumps(data, indent=indent)
    assert value("keys", text, tmp_path) == [*keys[:3], "ssh-rsa CC [?]"]
    assert value("b", "# a remark\n" + text, tmp_path) == ["x: y"]
    assert value("n", text, tmp_path) == ["1", "true", "null"]
    assert value("c", text, tmp_path) == [], "a text of several lines would be several keys"


@pytest.mark.parametrize(
    "text", ["", "{", '{"keys": ["a', '{"keys" "a"}', '{"keys": "\\uZZZZ"}', "[" * 50, "- a\n: b\n"]
)
def test_a_damaged_document_ends(text: str, tmp_path: Path) -> None:
    assert value("keys", text, tmp_path) == []


# -- first-boot data ---------------------------------------------------------------------------------------------------


class Machine:
    """A root folder in which the scripts run."""

    def __init__(self, folder: Path) -> None:
        self.root, self.seed, self.path = folder / "root", folder / "seed", os.environ["PATH"]
        for path in (self.root / "etc", self.seed):
            path.mkdir(parents=True)

    def boot(self, meta: Any, user: str = "") -> str:
        """What the cloud script says of these data."""
        (self.seed / "meta-data").write_text(meta if isinstance(meta, str) else json.dumps(meta))
        (self.seed / "user-data").write_text(user)
        env = {"PATH": self.path, "RECVIRT_ROOT": str(self.root), "RECVIRT_SEED": str(self.seed)}
        argv = ["sh", str(LIB / "cloud")]
        return subprocess.run(argv, env=env, check=True, capture_output=True, text=True, timeout=60).stdout

    def text(self, path: str) -> str:
        return (self.root / path).read_text()

    @property
    def keys(self) -> list[str]:
        return self.text("root/.ssh/authorized_keys").splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_what_the_worker_writes_is_understood(machine: Machine) -> None:
    spec = instance(name="web-1", ssh_keys=(f"{KEY} me", f'from="10.0.0.0/8" {KEY} ö'), user_data="#!/bin/sh\necho x\n")
    files = seed_files(spec)
    assert machine.boot(files["meta-data"].decode(), files["user-data"].decode()) == ""
    assert machine.text("etc/hostname") == "web-1\n"
    assert machine.keys == [f"{KEY} me", f'from="10.0.0.0/8" {KEY} ?']
    assert machine.text("var/lib/cloud/user-script") == "#!/bin/sh\necho x\n"
    assert machine.text("var/lib/cloud/instance-id") == f"{spec.uuid}\n"
    modes = {"root/.ssh": 0o700, "root/.ssh/authorized_keys": 0o600, "var/lib/cloud/user-script": 0o700}
    assert {path: stat.S_IMODE((machine.root / path).stat().st_mode) for path in modes} == modes


def test_user_data_s_name_and_keys_count_too(machine: Machine) -> None:
    user = f"#cloud-config\nhostname: box.example.org\nssh_authorized_keys:\n  - {KEY} two\npackages: [nginx]\n"
    said = machine.boot({"instance-id": "i", "local-hostname": "other", "public-keys": [f"{KEY} one"]}, user)
    assert machine.text("etc/hostname") == "box\n"
    assert machine.keys == [f"{KEY} one", f"{KEY} two"]
    assert said == "recvirt-guest: not understood here: packages\n"


def test_the_same_instance_keeps_what_its_owner_changed(machine: Machine) -> None:
    machine.boot({"instance-id": "i", "public-keys": [f"{KEY} one"]}, "#!/bin/sh\n")
    (machine.root / "root/.ssh/authorized_keys").write_text("changed\n")
    (machine.root / "var/lib/cloud/user-script-started").touch()
    (machine.root / "etc/machine-id").write_text("mine\n")
    machine.boot({"instance-id": "i", "public-keys": [f"{KEY} one"]}, "#!/bin/sh\n")
    assert machine.keys == ["changed"] and machine.text("etc/machine-id") == "mine\n"
    assert (machine.root / "var/lib/cloud/user-script-started").exists()


def test_a_copy_of_a_machine_s_disk_is_another_machine(machine: Machine) -> None:
    machine.boot({"instance-id": "i", "local-hostname": "a", "public-keys": [f"{KEY} one"]}, "#!/bin/sh\n")
    key = machine.root / "etc/dropbear/dropbear_ed25519_host_key"
    key.write_text("host key")
    (machine.root / "etc/machine-id").write_text("old\n")
    (machine.root / "var/lib/cloud/user-script-started").touch()
    machine.boot({"instance-id": "j", "public-keys": [f"{KEY} two"]})
    assert not key.exists() and not (machine.root / "etc/machine-id").exists()
    assert machine.keys == [f"{KEY} two"], "whoever had the first one has no key to the second"
    assert not (machine.root / "var/lib/cloud/user-script").exists()
    assert not (machine.root / "etc/hostname").exists()


def test_a_power_cut_on_the_way_makes_the_next_boot_do_it_again(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "mv").write_text("#!/bin/sh\nkill -9 $PPID\n")
    (tmp_path / "mv").chmod(0o755)
    machine.path = f"{tmp_path}:{machine.path}"
    with pytest.raises(subprocess.CalledProcessError, match="SIGKILL"):
        machine.boot({"instance-id": "i", "public-keys": [f"{KEY} one"]})
    assert machine.keys == [f"{KEY} one"], "everything else was done before"
    assert not (machine.root / "var/lib/cloud/instance-id").exists()
    (tmp_path / "mv").unlink()
    (machine.root / "root/.ssh/authorized_keys").write_text("half")
    machine.boot({"instance-id": "i", "public-keys": [f"{KEY} one"]})
    assert machine.keys == [f"{KEY} one"] and machine.text("var/lib/cloud/instance-id") == "i\n"


@pytest.mark.parametrize("name", ["", "-x", "a b", "$(reboot)", "x;y", "../x", "ä"])
def test_a_hostile_name_is_no_name(name: str, machine: Machine) -> None:
    machine.boot({"instance-id": "i", "local-hostname": name})
    assert not (machine.root / "etc/hostname").exists()


@pytest.mark.parametrize("key", ["x", "$(reboot)", "ssh-rsa", "ssh-rsa !!!! x", f"{KEY} a\nssh-rsa BBBB b"])
def test_what_is_no_key_lets_nobody_in(key: str, machine: Machine) -> None:
    machine.boot({"instance-id": "i", "public-keys": [key]})
    assert machine.keys == []


@pytest.mark.parametrize("meta", ["", "{", "\0\0", "local-hostname: x\n", "[]"])
def test_data_without_an_identifier_are_left(meta: str, machine: Machine) -> None:
    assert "no instance-id" in machine.boot(meta)
    assert not (machine.root / "var").exists()


def test_user_data_of_another_kind_are_told(machine: Machine) -> None:
    assert "not understood here" in machine.boot({"instance-id": "i"}, "Content-Type: multipart/mixed\n")
    assert not (machine.root / "var/lib/cloud/user-script").exists()


def test_plain_yaml_meta_data(machine: Machine) -> None:
    machine.boot(f"instance-id: abc\nlocal-hostname: web\npublic-keys:\n  - {KEY} me\n")
    assert (machine.text("etc/hostname"), machine.keys) == ("web\n", [f"{KEY} me"])


# -- identity and devices ----------------------------------------------------------------------------------------------


def identify(root: Path) -> None:
    fake = root.parent / "bin"
    fake.mkdir(exist_ok=True)
    for name, text in (("hostname", "exit 0"), ("dropbearkey", 'cp /proc/sys/kernel/random/uuid "$4"')):
        (fake / name).write_text(f"#!/bin/sh\n{text}\n")
        (fake / name).chmod(0o755)
    env = {"PATH": f"{fake}:{os.environ['PATH']}", "RECVIRT_ROOT": str(root)}
    subprocess.run(["sh", str(LIB / "identity")], env=env, check=True, timeout=60)


def test_keys_and_identifier_are_made_once_and_differ_between_machines(tmp_path: Path) -> None:
    seen = []
    for name in ("a", "b"):
        root = tmp_path / name
        (root / "etc/dropbear").mkdir(parents=True)
        identify(root)
        files = [root / "etc/machine-id", root / "etc/dropbear/dropbear_ed25519_host_key"]
        before = [path.read_text() for path in files]
        assert re.fullmatch(r"[0-9a-f]{32}\n", before[0])
        identify(root)
        assert [path.read_text() for path in files] == before
        seen += before
        assert not list(root.rglob("*.part"))
    assert len(set(seen)) == 4


def test_the_name_is_in_hosts(tmp_path: Path) -> None:
    (tmp_path / "r/etc/dropbear").mkdir(parents=True)
    (tmp_path / "r/etc/hostname").write_text("web\n")
    identify(tmp_path / "r")
    assert "127.0.1.1\tweb\n" in (tmp_path / "r/etc/hosts").read_text()


class Devices:
    """A /sys and a /dev to plug things into."""

    def __init__(self, folder: Path) -> None:
        self.sys, self.dev, self.net = folder / "sys", folder / "dev", folder / "net"
        self.net.write_text(f'#!/bin/sh\necho "$@" >>{folder}/net-log\n')
        self.net.chmod(0o755)
        self.log = folder / "net-log"

    def file(self, path: str, text: str) -> Path:
        target = self.sys / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def event(self, action: str, subsystem: str, path: str) -> None:
        env = {
            "PATH": os.environ["PATH"], "ACTION": action, "SUBSYSTEM": subsystem, "DEVPATH": f"/{path}",
            "RECVIRT_SYS": str(self.sys), "RECVIRT_DEV": str(self.dev), "RECVIRT_NET": str(self.net),
        }  # fmt: skip
        subprocess.run(["sh", str(LIB / "plug")], env=env, check=True, timeout=30)

    @property
    def links(self) -> dict[str, str]:
        return {path.name: str(path.readlink()) for path in (self.dev / "disk/by-id").glob("*")}


@pytest.fixture
def devices(tmp_path: Path) -> Devices:
    return Devices(tmp_path)


def test_processors_and_memory_are_put_to_work(devices: Devices) -> None:
    cpu = devices.file("devices/system/cpu/cpu1/online", "0\n")
    memory = devices.file("devices/system/memory/memory40/state", "offline\n")
    devices.event("add", "cpu", "devices/system/cpu/cpu1")
    devices.event("add", "memory", "devices/system/memory/memory40")
    assert (cpu.read_text(), memory.read_text()) == ("1\n", "online\n")
    (devices.sys / "devices/system/cpu/cpu0").mkdir()
    devices.event("add", "cpu", "devices/system/cpu/cpu0")  # the first one can't be taken away


def test_disks_are_found_by_their_serial_number_and_forgotten(devices: Devices) -> None:
    devices.file("d/vdb/serial", "0123456789abcdef0123")
    devices.file("d/vdb/vdb1/partition", "1\n")
    devices.event("add", "block", "d/vdb")
    devices.event("add", "block", "d/vdb/vdb1")
    assert devices.links == {
        "virtio-0123456789abcdef0123": "../../vdb", "virtio-0123456789abcdef0123-part1": "../../vdb1",
    }  # fmt: skip
    devices.event("remove", "block", "d/vdb/vdb1")
    assert devices.links == {"virtio-0123456789abcdef0123": "../../vdb"}


@pytest.mark.parametrize("serial", ["", "../../x", "a b", "a\nb", "$(reboot)"])
def test_a_hostile_serial_number_makes_no_link(serial: str, devices: Devices) -> None:
    devices.file("d/vdb/serial", serial)
    devices.event("add", "block", "d/vdb")
    assert not devices.dev.exists()


def test_cards_get_an_address_and_the_loopback_does_not(devices: Devices) -> None:
    for name in ("lo", "eth0", "eth1"):
        devices.event("add", "net", f"devices/virtual/net/{name}")
    assert devices.log.read_text() == "up eth0\nup eth1\n"


SCRIPTS = sorted(path for path in GUEST.rglob("*") if path.is_file() and path.read_bytes()[:2] == b"#!")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_one(path: Path) -> None:
    subprocess.run(["sh", "-n", str(path)], check=True, timeout=30)
