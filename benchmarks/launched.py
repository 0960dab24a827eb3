"""(f): an L2 as the cloud launches it, against a command line written by hand for speed.

The domain is the one that a worker would define (:func:`recvirt.nestedcloud.worker.domain.domain_xml`), the disk is the
guest that comes with the cloud, and both subjects boot it in the same L1, in turn, from the firmware to the prompt.
The L1 is the image ``default`` with one processor. A plugin of QEMU's TCG counts what it executes
(``launched_l2/count.c``): under ``-icount``, as in :mod:`benchmarks.boot`, about every third L2 hangs. Does not own:
the program inside (``launched_l2/measure.py``), which says when a boot begins and ends.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import boot
from benchmarks.measure import say
from benchmarks.results import Result, Row
from benchmarks.workplace import Site
from recvirt.errors import GuestError
from recvirt.nestedcloud.model import MIB, DiskSpec, InstanceSpec, NetworkSpec, NicSpec
from recvirt.nestedcloud.worker.domain import domain_name, domain_xml, network_xml
from recvirt.nestedcloud.worker.host import Host
from recvirt.nestedcloud.worker.seed import seed_image
from recvirt.qemu.argv import Disk, MachineSpec
from recvirt.qemu.disks import make_overlay

#: Whose image is the L1, and whose guest is the L2.
L1, CLOUD = "default", "nested-cloud"
_HERE = Path(__file__).resolve().parent / "launched_l2"
PROGRAM, PLUGIN = _HERE / "measure.py", _HERE / "count.c"
#: Beside the disks: the compiled plugin, and where it counts.
_PLUGIN_NAME, _COUNTER = "count.so", "executed"
#: The launched one has ports to spare, an agent's channel and a balloon: they should cost little more at boot.
_LIMIT = 1.05
_BOOTS = 5
_TAP = "bench0"
_L1_BYTES = 2 * 1024**3
_FOLDER = "/run/recvirt-bench"
_DISK_BYTES = 512 * MIB

UNIT = """[Unit]
Description=Benchmark of launched VMs
After=multi-user.target libvirtd.service

[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/sh -c 'mkdir -p @FOLDER@ && tar -xf /dev/vdb -C @FOLDER@ && cd @FOLDER@ && \\
    { python3 measure.py 2>&1; echo "@MARK@ status $?"; } > /dev/ttyS1; exec systemctl --no-block poweroff'
"""

SPEC = InstanceSpec(
    uuid="6b1f6f0e-7f5c-4d07-9e0b-0f5e5d1c2a11", name="bench", generation=1, vcpus=1, vcpus_max=2,
    memory_bytes=256 * MIB, memory_max_bytes=256 * MIB,
    root=DiskSpec(uuid="6b1f6f0e-7f5c-4d07-9e0b-0f5e5d1c2a11", size_bytes=_DISK_BYTES),
    nics=(NicSpec(network="0c6d1c1e-1f43-4f37-8a94-6a0c3f0d9b10", mac="52:54:00:00:be:01"),),
)  # fmt: skip
NETWORK = NetworkSpec(uuid=SPEC.nics[0].network, name="bench", cidr="10.213.7.0/24")
HOST = Host(
    owner="6b1f6f0e-7f5c-4d07-9e0b-0f5e5d1c2a12", domain_type="kvm", images_dir=Path("/var/lib/recvirt/images"),
    blocks_dir=Path("/var/lib/recvirt/blocks"),
)  # fmt: skip


@dataclass(frozen=True)
class Boots:
    """Boots of one subject: what the L1 executed, and the L2's exits, a boot each."""

    instructions: tuple[int, ...]
    exits: tuple[int, ...]


def hand_argv(disk: Path, seed: Path) -> list[str]:
    """QEMU with what is best for an L2, and nothing else: the same processor, memory, disk, card and firmware."""
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,hpet=off",
        "-accel", "kvm", "-cpu", "host,svm=off,vmx=off,kvm-poll-control=on", "-smp", "1", "-m", "256M", "-S",
        "-object", "iothread,id=io",
        "-blockdev", f"driver=qcow2,node-name=root,discard=unmap,file.driver=file,file.filename={disk},"
        "cache.direct=on,file.cache.direct=on,file.aio=native",
        "-device", "virtio-blk-pci,drive=root,iothread=io,bootindex=1",
        "-blockdev", f"driver=raw,node-name=seed,read-only=on,file.driver=file,file.filename={seed}",
        "-device", "virtio-blk-pci,drive=seed",
        "-netdev", f"tap,id=net,ifname={_TAP},script=no,downscript=no,vhost=on",
        "-device", f"virtio-net-pci,netdev=net,mac={SPEC.nics[0].mac}",
        "-device", "virtio-rng-pci", "-serial", "file:hand.log", "-qmp", "unix:hand.qmp,server=on,wait=off",
    ]  # fmt: skip


def job_tar(disk: bytes) -> bytes:
    """The L1's second disk: the program and all that it needs, as a tar archive."""
    root, seed = HOST.disk_path(SPEC.uuid, SPEC.root.format), HOST.seed_path(SPEC.uuid)
    job = {
        "domain": domain_name(SPEC), "log": str(HOST.console_log_path(SPEC.uuid)), "disk": str(root),
        "files": {"disk.qcow2": str(root), "seed.img": str(seed)}, "hand": hand_argv(root, seed), "tap": _TAP,
        "bridge": f"rv{NETWORK.uuid[:8]}", "boots": _BOOTS,
    }  # fmt: skip
    files = {
        "measure.py": PROGRAM.read_bytes(), "domain.xml": domain_xml(SPEC, HOST).encode(),
        "network.xml": network_xml(NETWORK).encode(), "seed.img": seed_image(SPEC), "disk.qcow2": disk,
        "job.json": json.dumps(job).encode(),
    }  # fmt: skip
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return target.getvalue()


class Log:
    """The program's lines, and what had been executed when each beginning and end came."""

    def __init__(self, counter: Path) -> None:
        self.lines: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self._counter, self._seen = counter, dict[str, int]()

    def take(self, line: str) -> None:
        """One line from the L1."""
        self.lines.append(line.strip())
        if not line.startswith("{"):
            return
        row, now = json.loads(line), int.from_bytes(self._counter.read_bytes(), sys.byteorder)
        self._seen[row.pop("at")] = now
        if "exits" not in row:
            return
        try:
            spent = self._seen["end"] - self._seen["begin"]
        except KeyError as error:
            raise GuestError(f"the benchmark in the L1 did not say when a boot began and ended: {error}") from None
        self._seen.clear()
        self.rows.append(row | {"instructions": spent})
        say(f"{row['how']}: {spent / 1e9:.2f} G instructions, {row['exits']} exits")

    def found(self) -> dict[str, Boots]:
        """The boots, by subject. GuestError when the program did not end well."""
        if f"{boot.MARK} status 0" not in self.lines:
            raise GuestError(f"the benchmark in the L1 did not end well: {' | '.join(self.lines[-12:])}")
        return {
            how: Boots(
                tuple(row["instructions"] for row in self.rows if row["how"] == how),
                tuple(row["exits"] for row in self.rows if row["how"] == how),
            )
            for how in ("launched", "by-hand")
        }


def benchmark(site: Site) -> Result:
    """Boot the L1 once, and in it the L2 in turn by both."""
    for profile in (L1, CLOUD):
        site.recvirt("build", profile, log_name=f"build-{profile}")
    tools = site.tools()
    folder = site.work_dir / "launched"
    folder.mkdir(parents=True, exist_ok=True)
    image = site.build_dir / L1 / "disk.qcow2"
    overlay = make_overlay(tools, image, folder / "overlay.qcow2")
    disk = site.output(CLOUD, "guest_image").path("recvirt-guest.qcow2").read_bytes()
    data = folder / "job.tar"
    data.write_bytes(job_tar(disk))
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"]
    tools.run(["gcc", *flags, "-o", str(folder / _PLUGIN_NAME), str(PLUGIN)], readable=[PLUGIN], writable=[folder])
    log = Log(folder / _COUNTER)
    tools.run(
        counted_argv(machine(overlay, image, data)), writable=[folder], readable=[image], network=True, cwd=folder,
        log_path=site.log("launched"), on_line=log.take, timeout_seconds=boot.TIMEOUT_SECONDS,
        hint=f"the console: {folder / 'console.log'}",
    )  # fmt: skip
    overlay.unlink()
    return result(log.found())


def machine(overlay: Path, image: Path, data: Path) -> MachineSpec:
    """The L1: the image, the job's disk, and a unit that does the job."""
    plain = boot.machine(overlay, image, icount=False)
    credentials = boot.credentials(UNIT.replace("@FOLDER@", _FOLDER))
    disks = (*plain.disks, Disk(data, "raw", read_only=True))
    return replace(plain, cpus=1, memory_bytes=_L1_BYTES, disks=disks, credentials=credentials)


def counted_argv(spec: MachineSpec) -> list[str]:
    """QEMU's words, with the plugin."""
    return [*boot.boot_argv(spec, icount=False), "-plugin", f"file=./{_PLUGIN_NAME},to={_COUNTER}"]


def result(found: Mapping[str, Boots]) -> Result:
    """Medians, side by side."""
    mine, other = found["launched"], found["by-hand"]

    def middle(values: Sequence[int]) -> float:
        return statistics.median(values)

    each = [middle(one.instructions) / middle(one.exits) for one in (mine, other)]
    note = "the same disk, from firmware to prompt"
    rows = [
        Row.ratio("an L2's boot as the cloud launches it against by hand, instructions in L1",
                  middle(mine.instructions) / 1e9, middle(other.instructions) / 1e9, "G", _LIMIT, note),
        Row.ratio("exits of that boot", middle(mine.exits), middle(other.exits), "", _LIMIT),
        Row.ratio("instructions an exit of that boot", each[0], each[1], "", _LIMIT),
    ]  # fmt: skip
    facts: dict[str, Any] = {how: {"instructions": b.instructions, "exits": b.exits} for how, b in found.items()}
    return Result("launched", rows, facts)
