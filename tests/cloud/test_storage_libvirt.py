"""One guest under a real libvirtd and QEMU without KVM: a volume comes, grows and goes as it runs.

``RECVIRT_TEST_KERNEL`` names a kernel with virtio-blk and PCI hot-plug built in; without one there is firmware only,
which does not let go of a disk, and that is what is then tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt
import pytest

from recvirt.nestedcloud.model import (
    GIB,
    MIB,
    Command,
    DiskSpec,
    Fault,
    InstanceSpec,
    Kind,
    Phase,
    Power,
    Report,
    VolumeSpec,
)
from recvirt.nestedcloud.worker import storage_actions
from recvirt.nestedcloud.worker.agent import Agent
from recvirt.nestedcloud.worker.domain import domain_xml
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.hypervisor import Hypervisor
from recvirt.nestedcloud.worker.storage import QemuStorage, run_tool
from tests.cloud.support import instance

URI = "qemu:///system"
_TOOLS = ("libvirtd", "virtlogd", "qemu-system-x86_64", "qemu-img", "mkfs.ext4")
os.environ["PATH"] += ":/usr/sbin:/sbin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="a system's libvirtd wants root"),
    pytest.mark.skipif(any(shutil.which(tool) is None for tool in _TOOLS), reason=f"wants {', '.join(_TOOLS)}"),
]

#: The guest's only program: says the sizes of the disks behind root disk and first-boot data whenever they change.
_INIT = r"""
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <fcntl.h>
#include <unistd.h>
int main(void) {
    char last[256] = "", now[256];
    mkdir("/sys", 0755); mkdir("/dev", 0755);
    mount("sysfs", "/sys", "sysfs", 0, ""); mount("devtmpfs", "/dev", "devtmpfs", 0, "");
    int console = open("/dev/console", O_RDWR);
    for (;;) {
        now[0] = 0;
        for (char name = 'c'; name <= 'e'; name++) {
            char path[64]; unsigned long long size;
            snprintf(path, sizeof path, "/sys/block/vd%c/size", name);
            FILE *file = fopen(path, "r");
            if (!file) continue;
            if (fscanf(file, "%llu", &size) == 1)
                snprintf(now + strlen(now), sizeof now - strlen(now), " vd%c=%llu", name, size * 512);
            fclose(file);
        }
        if (strcmp(now, last)) { dprintf(console, "disks%s.\n", now[0] ? now : " none"); strcpy(last, now); }
        else if (!last[0]) { dprintf(console, "disks none.\n"); strcpy(last, " "); }
        usleep(100000);
    }
}
"""


def initramfs(folder: Path) -> Path:
    """An archive (Linux's Documentation/driver-api/early-userspace/buffer-format.rst) with /init and /dev/console."""
    source, program, target = folder / "init.c", folder / "init", folder / "initramfs"
    source.write_text(_INIT)
    run_tool(["gcc", "-O1", "-static", "-o", str(program), str(source)])

    def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
        numbers = [0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08X" % number for number in numbers) + name.encode() + b"\0"
        return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)

    parts = [entry("dev", 0o040755), entry("dev/console", 0o020600, device=(5, 1))]
    parts += [entry("init", 0o100755, program.read_bytes()), entry("TRAILER!!!", 0)]
    target.write_bytes(b"".join(parts))
    return target


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[None]:
    """A libvirtd that answers; one that was not there before is ended."""
    started: list[subprocess.Popen[bytes]] = []
    for program in ("virtlogd", "libvirtd"):
        if subprocess.run(["pidof", program], capture_output=True, check=False).returncode != 0:
            # libvirtd asks QEMU about KVM too, and where nested KVM hangs, that takes minutes.
            hide = f"[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm; exec {program}"
            words = ["unshare", "--mount", "sh", "-c", hide]
            started.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    deadline = time.monotonic() + 30
    while True:
        try:
            libvirt.open(URI).close()
            break
        except libvirt.libvirtError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    yield
    for process in reversed(started):
        process.terminate()
        process.wait(20)


class Bench:
    """A worker on the real thing."""

    def __init__(self, folder: Path) -> None:
        self.host = Host(str(uuid.uuid4()), "qemu", folder / "images", folder / "blocks", log_dir=folder)
        for path in (self.host.images_dir, self.host.blocks_dir):
            path.mkdir()
        self.hypervisor = Hypervisor(URI, self.host)
        self.agent = Agent(
            str(uuid.uuid4()), "w1", self.hypervisor, QemuStorage(self.host), folder / "run", "boot-1", {}
        )
        self.reports: list[Report] = []

    def do(self, kind: Kind, spec: InstanceSpec | None, volume: VolumeSpec | None = None, **args: Any) -> Report:
        return self.agent.execute(
            Command(
                str(uuid.uuid4()), 1, kind, spec.generation if spec else 1, spec, volume=volume, args=args
            ),
            self.reports.append,
        )  # fmt: skip

    def live_xml(self, spec: InstanceSpec) -> ET.Element:
        return ET.fromstring(self.hypervisor.get(spec.uuid).XMLDesc())

    def sources(self, spec: InstanceSpec, *, inactive: bool = False) -> dict[str, str]:
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
        disks = ET.fromstring(self.hypervisor.get(spec.uuid).XMLDesc(flags)).findall("devices/disk")
        return {
            disk.find("target").get("dev", ""): disk.find("source").get("file", "")  # type: ignore[union-attr]
            for disk in disks
        }

    def wait_for_console(self, spec: InstanceSpec, text: str, seconds: float = 240) -> None:
        path = self.host.console_log_path(spec.uuid)
        deadline = time.monotonic() + seconds
        while text not in (path.read_text(errors="replace") if path.exists() else ""):
            assert time.monotonic() < deadline, path.read_text(errors="replace")[-3000:]
            time.sleep(0.2)


@pytest.fixture
def bench(libvirtd: None) -> Iterator[Bench]:
    # Not below pytest's own folder: QEMU runs as a user who can't look into that.
    folder = Path(tempfile.mkdtemp(prefix="recvirt-storage-", dir="/var/tmp"))
    folder.chmod(0o755)
    made = Bench(folder)
    try:
        yield made
    finally:
        for facts in made.hypervisor.all_facts():
            made.hypervisor.remove(made.hypervisor.get(facts.uuid))
        shutil.rmtree(folder)


def test_a_volume_comes_grows_and_goes_as_the_guest_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = os.environ.get("RECVIRT_TEST_KERNEL")
    folder = bench.host.images_dir
    if kernel:
        shutil.copy(kernel, folder / "kernel")
        archive = initramfs(folder)

        def with_kernel(*args: Any, **words: Any) -> str:
            domain = ET.fromstring(domain_xml(*args, **words))
            system = domain.find("os")
            assert system is not None
            ET.SubElement(system, "kernel").text = str(folder / "kernel")
            ET.SubElement(system, "initrd").text = str(archive)
            ET.SubElement(system, "cmdline").text = "console=ttyS0 quiet"
            return ET.tostring(domain, encoding="unicode")

        monkeypatch.setattr("recvirt.nestedcloud.worker.hypervisor.domain_xml", with_kernel)
    monkeypatch.setattr(storage_actions, "UNPLUG_SECONDS", 60.0 if kernel else 2.0)
    base = str(uuid.uuid4())
    run_tool(["qemu-img", "create", "-q", "-f", "qcow2", str(bench.host.image_path(base)), "16M"])
    key = str(uuid.uuid4())
    sizes = {"memory_bytes": 192 * MIB, "memory_max_bytes": 192 * MIB, "vcpus_max": 1}
    spec = instance(uuid=key, root=DiskSpec(key, 16 * MIB, image=base), **sizes)
    volume = VolumeSpec(str(uuid.uuid4()), "data", 1, 64 * MIB, "raw", "ext4")
    assert bench.do(Kind.VOLUME_ALLOCATE, None, volume).phase is Phase.SUCCEEDED, bench.reports[-1]
    last = bench.do(Kind.LAUNCH, spec)
    assert last.phase is Phase.SUCCEEDED, last
    if kernel:
        bench.wait_for_console(spec, "disks none.")

    # Attached: in the guest that runs, and in what will be started next.
    disk = DiskSpec(volume.uuid, volume.size_bytes, "raw", slot=1)
    with_volume = instance(**{**vars(spec), "generation": 2, "volumes": (disk,)})
    for _ in range(2):
        last = bench.do(Kind.ATTACH, with_volume, volume, slot=1)
        assert last.phase is Phase.SUCCEEDED, last
        assert last.facts["attached"] is True and last.facts["how"] == "as it runs"
    path = str(bench.host.disk_path(volume.uuid, "raw"))
    assert bench.sources(spec)["vdb"] == path == bench.sources(spec, inactive=True)["vdb"]
    if kernel:
        bench.wait_for_console(spec, f"disks vdc={64 * MIB}.")
    # A second QEMU, or a tool of ours, can't write to it meanwhile.
    refused = bench.do(Kind.VOLUME_RESIZE, None, VolumeSpec(volume.uuid, "data", 2, 96 * MIB, "raw", "ext4"))
    assert refused.phase is Phase.FAILED and "lock" in refused.message

    # Larger, as it runs.
    larger = VolumeSpec(volume.uuid, "data", 3, 128 * MIB, "raw", "ext4")
    last = bench.do(Kind.VOLUME_RESIZE, with_volume, larger, slot=1)
    assert last.phase is Phase.SUCCEEDED and last.facts["size_bytes"] == 128 * MIB, last
    assert "resize2fs" in last.facts["how"] and Path(path).stat().st_size == 128 * MIB
    if kernel:
        bench.wait_for_console(spec, f"disks vdc={128 * MIB}.")
    # A snapshot would copy what the guest is writing.
    assert bench.do(Kind.VOLUME_SNAPSHOT, with_volume, larger, snapshot="a").fault is Fault.CONFLICT

    without = instance(**{**vars(spec), "generation": 3})
    last = bench.do(Kind.DETACH, without, larger, slot=1)
    if kernel:
        assert last.phase is Phase.SUCCEEDED and last.facts["attached"] is False, last
        assert bench.hypervisor.power(bench.hypervisor.get(spec.uuid)) is Power.RUNNING
    else:
        assert last.fault is Fault.TIMED_OUT and "unmount it there" in last.message, last
        assert bench.do(Kind.STOP, without, graceful_seconds=0).phase is Phase.SUCCEEDED
        assert bench.do(Kind.DETACH, without, larger, slot=1).facts["attached"] is False
    assert "vdb" not in bench.sources(spec) and "vdb" not in bench.sources(spec, inactive=True)
    # A message from before that: the instance is newer, and nothing comes back.
    late = bench.do(Kind.ATTACH, with_volume, larger, slot=1)
    assert late.fault is Fault.CONFLICT and "vdb" not in bench.sources(spec)
    # Nobody has it now: it grows with its file system.
    last = bench.do(Kind.VOLUME_RESIZE, None, VolumeSpec(volume.uuid, "data", 4, GIB, "raw", "ext4"))
    assert last.facts == {"size_bytes": GIB, "how": "with its file system"}, last
