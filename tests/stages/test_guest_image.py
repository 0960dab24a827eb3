"""The tiny guest for real: its bytes repeat, and under QEMU it does what the cloud's manual says of it.

One machine lives through it all: a first boot from the seed that a worker writes, an orderly end, a second boot on a
larger disk. Then a copy of its disk becomes another machine, loses its power, and comes back. The kernel is the
profile's own, taken from the ordinary cache, or built there once.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from recvirt.errors import StageError
from recvirt.imagefile.contents import open_image
from recvirt.nestedcloud.worker.qcow2 import read_header
from recvirt.nestedcloud.worker.seed import seed_image
from recvirt.pipeline import Builder, plan
from recvirt.profile import load_profile
from recvirt.qemu import Disk, Forward, MachineSpec, Nic, SshAccess, Vm, make_key, make_overlay, running
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Work
from recvirt.stages.guest_image import SIZE_BYTES, GuestImage
from recvirt.store import Store, sha256_of
from tests.cloud.support import instance

pytestmark = pytest.mark.slow

MIB = 1024**2
LARGEST_BYTES = 25_000_000
#: For a boot under emulation on a machine that does other things too, and for one command.
BOOT_SECONDS, COMMAND_SECONDS = 900.0, 300.0
SCRIPT = """#!/bin/sh
echo run >>/root/runs
mkdir -p /var/www
echo "a page of $(hostname)" >/var/www/index.html
"""
SERIAL = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def context(tools: ToolsRoot, shared_cache: Path) -> Context:
    """A context whose packages are kept between runs; each is verified again."""
    return Context(tools=tools, cache_dir=shared_cache, jobs=2)


@pytest.fixture(scope="module")
def kernel(context: Context, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the stage that builds the kernel."""
    profile, store = load_profile("nested-cloud").model, Store(shared_cache)
    planned = plan(profile, store, context, until="kernel_build")
    return Builder(profile, store, context, tmp_path_factory.mktemp("build")).run(planned)["kernel_build"].directory


def build(context: Context, kernel: Path, folder: Path) -> Path:
    """Run the stage; the folder of its outputs."""
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True)
    stage, profile = GuestImage(), load_profile("nested-cloud").model
    inputs = stage.inputs(profile, {"kernel_build": kernel.name}, context)
    stage.build(inputs, Work(folder / "out", folder / "scratch", folder / "log", context, {"kernel_build": kernel}))
    return folder / "out"


@pytest.fixture(scope="module")
def built(context: Context, kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(context, kernel, tmp_path_factory.mktemp("built") / "work")


@pytest.fixture(scope="module")
def image(built: Path) -> Path:
    return built / "recvirt-guest.qcow2"


# -- the files ---------------------------------------------------------------------------------------------------------


def test_the_same_inputs_give_the_same_bytes(built: Path, context: Context, kernel: Path, tmp_path: Path) -> None:
    again = build(context, kernel, tmp_path / "again")
    names = sorted(path.name for path in built.iterdir())
    assert names == ["recvirt-guest-image.deb", "recvirt-guest.json", "recvirt-guest.qcow2"]
    assert [sha256_of(built / name) for name in names] == [sha256_of(again / name) for name in names]


def test_it_is_small_and_a_worker_takes_it(built: Path, image: Path) -> None:
    told = json.loads((built / "recvirt-guest.json").read_text())
    assert told["sha256"] == sha256_of(image)
    assert told["bytes"] == image.stat().st_size < LARGEST_BYTES
    with image.open("rb") as stream:
        assert read_header(stream).virtual_bytes == SIZE_BYTES == told["virtual_bytes"]


def test_the_disk_is_sound_and_boots_both_ways(image: Path, tools: ToolsRoot, tmp_path: Path) -> None:
    with open_image(image, tools) as contents:
        assert contents.boot_methods() == {"bios": "", "uefi": ""}
        tree = contents.tree()
        root = contents.root
    # Nothing that two machines would share, nothing of the one that built it.
    for path in ("/etc/machine-id", "/etc/hostname", "/root/.ssh", "/var/lib/cloud", "/etc/shadow"):
        assert path not in tree
    assert not [path for path in tree if path.startswith("/etc/dropbear/")]
    script = """qemu-img check -q "$1"; qemu-img convert -O raw "$1" disk; sfdisk --verify disk
    dd if=disk of=root bs=512 skip="$2" count="$3" conv=sparse status=none; e2fsck -fn root"""
    argv = ["sh", "-euc", script, "sh", str(image), str(root.first_lba), str(root.last_lba - root.first_lba + 1)]
    tools.run(argv, readable=[image], writable=[tmp_path], cwd=tmp_path)


def test_the_package_holds_image_facts_and_licences(built: Path, image: Path, tools: ToolsRoot, tmp_path: Path) -> None:
    deb = built / "recvirt-guest-image.deb"
    tools.run(["dpkg-deb", "--extract", str(deb), str(tmp_path)], readable=[deb], writable=[tmp_path])
    folder = tmp_path / "usr/share/recvirt-cloud/images"
    assert sha256_of(folder / "recvirt-guest.qcow2") == sha256_of(image)
    assert (folder / "recvirt-guest.json").read_bytes() == (built / "recvirt-guest.json").read_bytes()
    licences = (tmp_path / "usr/share/doc/recvirt-guest-image/copyright").read_text()
    with open_image(image, tools) as contents:
        for name in ("busybox-static", "dropbear-bin", "libc6", "e2fsprogs", "fdisk", "util-linux"):
            assert f"  {name} " in licences and contents.text(f"/usr/share/doc/{name}/copyright")


def test_a_kernel_that_can_t_run_it_is_refused(context: Context, kernel: Path, tmp_path: Path) -> None:
    poor = tmp_path / "poor"
    poor.mkdir()
    for path in kernel.iterdir():
        (poor / path.name).symlink_to(path)
    (poor / "config").unlink()
    (poor / "config").write_text((kernel / "config").read_text().replace("CONFIG_VIRTIO_BLK=y", "CONFIG_VIRTIO_BLK=m"))
    with pytest.raises(StageError, match="lacks VIRTIO_BLK"):
        build(context, poor, tmp_path / "work")


# -- a life ------------------------------------------------------------------------------------------------------------


@dataclass
class Boot:
    """A machine that runs."""

    vm: Vm
    access: SshAccess

    def run(self, command: str) -> str:
        """What a command said; it must succeed."""
        return self.access.run(command, seconds=COMMAND_SECONDS).stdout.strip()

    def page(self) -> str:
        """The page at its port 80, asked for from outside."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.vm.host_port(80)}/", timeout=120) as answer:
            return str(answer.read().decode()).strip()

    def identity(self) -> tuple[str, str]:
        """Its machine-id, and its host key's fingerprint as a client sees it."""
        seen = subprocess.run(
            ["ssh-keyscan", "-T", "120", "-t", "ed25519", "-p", str(self.access.port), "127.0.0.1"],
            capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS,
        )  # fmt: skip
        assert seen.returncode == 0, seen.stderr
        keys = sorted({" ".join(line.split()[1:3]) for line in seen.stdout.splitlines() if not line.startswith("#")})
        assert len(keys) == 1 and keys[0].startswith("ssh-ed25519 ")
        return self.run("cat /etc/machine-id"), keys[0]


@dataclass
class Lab:
    """Where machines run: one key, and disks on top of the image."""

    tools: ToolsRoot
    image: Path
    folder: Path
    key: Path

    def disk(self, name: str, size_bytes: int) -> Path:
        """A fresh root disk."""
        return make_overlay(self.tools, self.image, self.folder / f"{name}.qcow2", size_bytes=size_bytes)

    def seed(self, name: str, user_data: str = "") -> Path:
        """First-boot data as the cloud's worker writes them."""
        public = self.key.with_name(f"{self.key.name}.pub").read_text().strip()
        path = self.folder / f"{name}-seed.img"
        key = str(uuid.uuid5(uuid.NAMESPACE_DNS, name))
        spec = instance(uuid=key, name=name, ssh_keys=(public,), user_data=user_data)
        path.write_bytes(seed_image(spec))
        return path

    @contextmanager
    def boot(self, disk: Path, seed: Path, memory_mib: int = 256, firmware: str = "bios") -> Iterator[Boot]:
        """The machine, as soon as the key's owner can log in."""
        spec = MachineSpec(
            firmware="uefi" if firmware == "uefi" else "bios", memory_bytes=memory_mib * MIB, cpus=1, cpus_max=2,
            disks=(Disk(disk, bootable=True, backing=(self.image,)), Disk(seed, "raw", read_only=True)),
            nics=(Nic(forwards=(Forward(22), Forward(80))),), interactive=True, spare_port=True,
        )  # fmt: skip
        with running(self.tools, spec, self.folder / "vm") as vm:
            access = vm.ssh("root", self.key)
            vm.wait_ssh(access, BOOT_SECONDS)
            yield Boot(vm, access)

    def volume(self) -> Path:
        """An ext4 with a file in it."""
        path = self.folder / "volume.raw"
        script = 'mkdir tree; echo "on the volume" >tree/word; mke2fs -q -t ext4 -L data -d tree "$1" 32M'
        self.tools.run(["sh", "-euc", script, "sh", str(path)], writable=[self.folder], cwd=self.folder)
        return path


@dataclass
class Story:
    """What was seen, by the boot in which it was seen."""

    first: dict[str, str] = field(default_factory=dict)
    second: dict[str, str] = field(default_factory=dict)
    copy: dict[str, str] = field(default_factory=dict)
    after_cut: dict[str, str] = field(default_factory=dict)
    identities: dict[str, tuple[str, str]] = field(default_factory=dict)


def kib(df: str) -> int:
    """The size of a file system, out of ``df -k``."""
    return int(df.splitlines()[-1].split()[1])


@pytest.fixture(scope="module")
def story(tools: ToolsRoot, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("life")
    lab, told = Lab(tools, image, folder, make_key(folder)), Story()
    disk, seed = lab.disk("web", 512 * MIB), lab.seed("web", SCRIPT)
    with lab.boot(disk, seed) as boot:
        live_first(lab, boot, told)
    tools.run(["qemu-img", "resize", "-q", str(disk), "1G"], writable=[folder], readable=[image])
    with lab.boot(disk, seed) as boot:
        live_second(lab, boot, told)
    # Another instance starts with a copy of this one's disk, under the other firmware; OVMF leaves a kernel too little
    # of the 128 MiB that are enough with a BIOS.
    disk.rename(folder / "copy.qcow2")
    disk, seed = folder / "copy.qcow2", lab.seed("copy")
    with lab.boot(disk, seed, firmware="uefi") as boot:
        said = {"hostname": "hostname", "runs": "cat /root/runs", "word": "cat /word"}
        told.copy = {name: boot.run(command) for name, command in said.items()}
        told.identities["copy"] = boot.identity()
        boot.run("echo cut >/word; sync")
        boot.vm.power_cut()
    with lab.boot(disk, seed, 128) as boot:
        told.after_cut = {"word": boot.run("cat /word"), "log": boot.run("dmesg | grep -i ext4")}
        told.identities["after cut"] = boot.identity()
    return told


def live_first(lab: Lab, boot: Boot, told: Story) -> None:
    """Everything that a new machine is asked for."""
    told.first = {
        "hostname": boot.run("hostname"), "df": boot.run("df -k /"), "address": boot.run("ip -4 -o addr show eth0"),
        "routes": boot.run("ip route"), "names": boot.run("cat /etc/resolv.conf"), "modules": boot.run("lsmod"),
        "uptime": boot.run("cut -d' ' -f1 /proc/uptime"),
    }  # fmt: skip
    boot.vm.wait_until(lambda: boot.run("cat /var/www/index.html 2>/dev/null; true") != "", 300, "the script's page")
    boot.vm.wait_until(lambda: boot.run("pidof httpd; true") != "", 300, "the web server")
    told.first["page"] = boot.page()
    told.first["server"] = boot.run("ps | grep '[h]ttpd -h'")
    told.identities["first"] = boot.identity()
    stranger = make_key(lab.folder, "stranger")
    wrong = SshAccess(boot.vm.folder, boot.access.port, "root", stranger)
    argv = ["ssh", "-v", "-F", "none", "-i", str(stranger), "-p", str(wrong.port), "-o", "IdentitiesOnly=yes"]
    argv += ["-o", "IdentityAgent=none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]
    argv += ["-o", "UserKnownHostsFile=/dev/null", "root@127.0.0.1", "true"]
    refused = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
    told.first["refused"] = f"{refused.returncode} {refused.stderr}"
    boot.run("echo kept >/word")
    # Not a word about a shell without Enter; then one as root.
    boot.vm.mark()
    boot.vm.type("\n")
    boot.vm.wait_for(r"web:[^\n]*#", 300)
    boot.vm.type("echo uid=$(id -u) on $(tty)\n")
    told.first["console"] = boot.vm.wait_for(r"uid=\d+ on /dev/\S+", 300)
    boot.vm.powerdown(300)
    told.first["end"] = boot.vm.console_text()


def live_second(lab: Lab, boot: Boot, told: Story) -> None:
    """What is still there, and what comes while it runs."""
    told.second = {
        "word": boot.run("cat /word"), "df": boot.run("df -k /"), "runs": boot.run("cat /root/runs"),
        "log": boot.run("dmesg | grep -i -e ext4 -e recovery"), "processors": boot.run("nproc"),
    }  # fmt: skip
    told.identities["second"] = boot.identity()
    told.second["page"] = boot.page()
    boot.vm.plug_disk(lab.volume(), SERIAL)
    boot.vm.wait_until(lambda: boot.run("ls /dev/disk/by-id; true") != "", 300, "the volume")
    told.second["disks"] = boot.run("ls /dev/disk/by-id")
    told.second["volume"] = boot.run(f"mount /dev/disk/by-id/virtio-{SERIAL} /mnt && cat /mnt/word && umount /mnt")
    told.second["labelled"] = boot.run("mount LABEL=data /mnt && cat /mnt/word && umount /mnt")
    boot.vm.unplug_disk(SERIAL, 300)
    boot.vm.wait_until(lambda: boot.run("ls /dev/disk/by-id; true") == "", 300, "the volume's end")
    for slot in boot.vm.qmp.execute("query-hotpluggable-cpus"):
        if "qom-path" not in slot:
            boot.vm.qmp.execute("device_add", {"driver": slot["type"], "id": "cpu-more", **slot["props"]})
    boot.vm.wait_until(lambda: boot.run("nproc") == "2", 300, "the second processor")
    boot.vm.powerdown(300)


def test_it_has_the_name_that_the_cloud_gave_it(story: Story) -> None:
    assert story.first["hostname"] == "web"


def test_it_is_on_the_network_by_dhcp(story: Story) -> None:
    assert "inet 10.0.2.15/24" in story.first["address"]
    assert "default via 10.0.2.2 dev eth0" in story.first["routes"]
    assert "nameserver 10.0.2.3" in story.first["names"]


def test_a_stranger_s_key_opens_nothing_and_no_password_is_asked_for(story: Story) -> None:
    status, _, said = story.first["refused"].partition(" ")
    assert status == "255" and "Permission denied (publickey)" in said
    assert "Authentications that can continue: publickey\n" in said.replace("\r", "")


def test_the_script_s_page_is_served_and_not_by_root(story: Story) -> None:
    assert story.first["page"] == "a page of web" == story.second["page"]
    assert "www-data" in story.first["server"]


def test_whoever_holds_the_console_is_root(story: Story) -> None:
    assert story.first["console"] == "uid=0 on /dev/ttyS0"


def test_memory_can_come_and_go(story: Story) -> None:
    assert "virtio_balloon" in story.first["modules"]


def test_the_power_button_ends_it_in_order(story: Story) -> None:
    assert "reboot: Power down" in story.first["end"]
    assert "recovery" not in story.second["log"]


def test_what_was_written_is_there_after_a_reboot(story: Story) -> None:
    assert story.second["word"] == "kept"


def test_the_script_ran_once(story: Story) -> None:
    assert story.second["runs"] == story.copy["runs"] == "run"


def test_the_root_has_what_its_disk_has(story: Story) -> None:
    assert 450_000 < kib(story.first["df"]) < 512 * 1024, "it was grown at the first boot"
    assert 920_000 < kib(story.second["df"]) < 1024 * 1024, "and at the second, on a larger disk"


def test_a_volume_comes_and_goes_while_it_runs(story: Story) -> None:
    assert story.second["disks"] == f"virtio-{SERIAL}"
    assert story.second["volume"] == story.second["labelled"] == "on the volume"


def test_a_processor_that_comes_is_used(story: Story) -> None:
    assert story.second["processors"] == "1", "the second one came later, or the fixture would have ended"


def test_it_stays_who_it_is_and_a_copy_is_somebody_else(story: Story) -> None:
    first, second, copy, after_cut = (story.identities[name] for name in ("first", "second", "copy", "after cut"))
    assert first == second
    assert copy == after_cut
    assert first[0] != copy[0] and first[1] != copy[1]
    assert story.copy["hostname"] == "copy" and story.copy["word"] == "kept"


def test_it_comes_back_after_a_power_cut(story: Story) -> None:
    assert story.after_cut["word"] == "cut"
    assert "recovery complete" in story.after_cut["log"]
