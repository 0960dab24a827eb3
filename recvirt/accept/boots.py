"""How each scene brings up its guest: fresh overlays, first-boot data, NFS servers, power cuts."""

from __future__ import annotations

import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from recvirt.accept import nfsserver
from recvirt.accept.context import TEST_USER, Acceptance
from recvirt.accept.guest import Guest
from recvirt.errors import GuestError
from recvirt.qemu import (
    Cable,
    CloudConfig,
    Disk,
    Forward,
    MachineSpec,
    Nic,
    Vm,
    image_info,
    make_config_drive,
    make_overlay,
    make_seed,
    running,
)
from recvirt.qemu.ssh import SshAccess
from recvirt.qemu.stuck import EmulatorError
from recvirt.sandbox import ToolsRoot
from recvirt.ui import reporter

#: A file that cloud-init writes, and what must stand in it.
MARKER_PATH = "/etc/recvirt-test-marker"
NFS_CONF = "/etc/recvirt/nfs.conf"
#: cloud-init's name of the datasource.
CONFIG_DRIVE = "ConfigDrive"
#: How much larger than the image the first guest's disk is.
GROWTH_BYTES = 1024**3
#: Memory of the guest that runs the cloud and instances.
CLOUD_BYTES = 4 * 1024**3
#: The power is cut when the guest has written so much since the start of its first boot.
CUT_AFTER_BYTES = (1, 3 * 1024**2, 10 * 1024**2)
#: The port of the machine with the cloud that may be reached from outside, besides SSH's.
FORWARDED_PORT = 8080
#: One more cut comes when cloud-init says this: users and files are made by then, and hardly any of it is on disk.
CUT_AT_WORD = "running 'modules:final'"
#: A console without a new word for so long is that of a guest that hangs (scaled like all limits).
SILENCE_SECONDS = 75.0
#: Boots that are begun before an emulator that loses interrupts, or aborts, is given up.
EMULATOR_TRIES = 3
#: Outer limit of a whole scene, as a multiple of a boot.
_SCENE_BOOTS = 8


def cloud_config(acceptance: Acceptance, name: str, files: tuple[tuple[str, str], ...] = ()) -> CloudConfig:
    """What a test guest is told at its first boot."""
    groups = ["kvm"] + (["libvirt"] if "libvirt-daemon-system" in acceptance.promises.packages else [])
    return CloudConfig(
        instance_id=f"recvirt-{name}-{secrets.token_hex(4)}", hostname=f"rv-{name}", user=TEST_USER,
        ssh_keys=(acceptance.public_key,), groups=tuple(groups), files=files,
    )  # fmt: skip


def machine(acceptance: Acceptance, overlay: Path, seed: Path, template: MachineSpec) -> MachineSpec:
    """``template`` with the disks, the accelerator and the size that this run wants."""
    system = template.disks[0] if template.disks else Disk(overlay)
    # On SATA a read-only disk is a CD-ROM, and of a CD-ROM's sectors FAT can make nothing.
    seed_bus = "virtio-blk" if system.bus == "ahci" else system.bus
    disks = (
        replace(system, path=overlay, format="qcow2", bootable=True, backing=(acceptance.image,)),
        Disk(seed, "raw", bus=seed_bus, read_only=True),
        *template.disks[1:],
    )
    nics = template.nics
    nics = (replace(nics[0], forwards=(*nics[0].forwards, Forward(22))), *nics[1:])
    return replace(
        template, accelerator=acceptance.accelerator.name, cpus=acceptance.profile.accept.cpus,
        memory_bytes=max(acceptance.memory_bytes, template.memory_bytes), disks=disks, nics=nics,
    )  # fmt: skip


def fresh_overlay(acceptance: Acceptance, folder: Path, growth_bytes: int = 0) -> Path:
    """An overlay on the image, larger than it by ``growth_bytes``."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = acceptance.image_facts
    size = facts.virtual_bytes + growth_bytes if growth_bytes else None
    return make_overlay(
        acceptance.tools, acceptance.image, folder / "overlay.qcow2", image_format=facts.format, size_bytes=size
    )


@contextmanager
def booted(
    acceptance: Acceptance,
    name: str,
    overlay: Path,
    cloud: CloudConfig,
    template: MachineSpec,
    *,
    make_data: Callable[[ToolsRoot, CloudConfig, Path], Path] = make_seed,
) -> Iterator[Guest]:
    """Boot an overlay and wait until SSH works and systemd has settled.

    A boot that the emulator brought to a stand or broke off is begun anew, from the overlay as it was before.
    """
    folder = acceptance.work_dir / name
    seed = make_data(acceptance.tools, cloud, folder)
    spec = machine(acceptance, overlay, seed, template)
    with ExitStack() as stack:
        vm, access, seconds = _up(acceptance, name, spec, folder, overlay, stack)
        guest = Guest(acceptance, name, access, vm, cloud, overlay, boot_seconds=seconds)
        reporter.info(f"{name}: SSH after {seconds:.0f} s")
        try:
            guest.facts["settled"] = guest.wait_settled()
            yield guest
        finally:
            access.close_shared()


def _up(
    acceptance: Acceptance, name: str, spec: MachineSpec, folder: Path, overlay: Path, stack: ExitStack
) -> tuple[Vm, SshAccess, float]:
    """A machine that answers over SSH, how to reach it, and the seconds that took. ``stack`` ends it."""
    limit = acceptance.patience(acceptance.profile.accept.boot_seconds)
    before = overlay.with_suffix(".before")
    shutil.copyfile(overlay, before)
    for left in reversed(range(EMULATOR_TRIES)):
        with ExitStack() as trial:
            vm = trial.enter_context(running(acceptance.tools, spec, folder))
            acceptance.qemu_version = f"{vm.qmp.version} ({vm.qmp.package})"
            access = vm.ssh(TEST_USER, acceptance.key)
            try:
                seconds = vm.wait_ssh(access, limit, silence_seconds=acceptance.patience(SILENCE_SECONDS))
            except EmulatorError as error:
                if not left:
                    raise
                reporter.warn(f"{name}: {error.message.splitlines()[0]}; the boot is begun anew")
            else:
                before.unlink()
                stack.push(trial.pop_all())
                return vm, access, seconds
        acceptance.add("boots_begun_anew", 1)
        shutil.copyfile(before, overlay)
    raise AssertionError("the last try returns or raises")


@contextmanager
def first(acceptance: Acceptance) -> Iterator[Guest]:
    """BIOS, a larger disk, an NFS server that works, everything that NoCloud data can say."""
    folder = acceptance.work_dir / "first"
    overlay = fresh_overlay(acceptance, folder, GROWTH_BYTES)
    files = [(MARKER_PATH, f"{secrets.token_hex(16)}\n")]
    with ExitStack() as stack:
        if acceptance.profile.root.nfs is not None:
            port = stack.enter_context(nfsserver.nfs_server(acceptance.tools, folder / "nfs"))
            options = f"vers=4.2,soft,timeo=100,retrans=3,port={port}"
            host = nfsserver.HOST_ADDRESS
            files.append((NFS_CONF, nfsserver.nfs_conf(f"{host}:/images", options, f"{host}:/blocks", options)))
        cloud = cloud_config(acceptance, "first", tuple(files))
        yield stack.enter_context(booted(acceptance, "first", overlay, cloud, MachineSpec(firmware="bios")))


@contextmanager
def second(acceptance: Acceptance) -> Iterator[Guest]:
    """UEFI; both NFS servers are away: one port refuses, the other accepts and says nothing. No host name is given.

    The data come on a config drive, where the profile lets cloud-init look for one, and there is room for a disk.
    """
    folder = acceptance.work_dir / "second"
    overlay = fresh_overlay(acceptance, folder)
    files: list[tuple[str, str]] = []
    with ExitStack() as stack:
        if acceptance.profile.root.nfs is not None:
            refusing = stack.enter_context(nfsserver.refusing_port())
            silent = stack.enter_context(nfsserver.silent_server())
            host, options = nfsserver.HOST_ADDRESS, acceptance.profile.root.nfs.images.options
            text = nfsserver.nfs_conf(
                f"{host}:/images", f"{options},port={refusing}", f"{host}:/blocks", f"{options},port={silent}"
            )
            files.append((NFS_CONF, text))
        cloud = replace(cloud_config(acceptance, "second", tuple(files)), hostname="")
        make_data = make_config_drive if CONFIG_DRIVE in acceptance.profile.root.cloud_init.datasources else make_seed
        template = MachineSpec(firmware="uefi", spare_port=True)
        yield stack.enter_context(booted(acceptance, "second", overlay, cloud, template, make_data=make_data))


@contextmanager
def powercut(acceptance: Acceptance) -> Iterator[Guest]:
    """Several first boots whose power is cut, on one overlay; then a boot that is left alone."""
    folder = acceptance.work_dir / "powercut"
    overlay = fresh_overlay(acceptance, folder, GROWTH_BYTES)
    cloud = cloud_config(acceptance, "powercut", ((MARKER_PATH, "powercut\n"),))
    seed = make_seed(acceptance.tools, cloud, folder)
    # Written back as ever: what the guest was told is on its disk must be there afterwards.
    spec = machine(acceptance, overlay, seed, MachineSpec())
    for number, written in enumerate(CUT_AFTER_BYTES, 1):
        with running(acceptance.tools, spec, folder / f"cut{number}") as vm:
            seconds, moment = _cut_after(acceptance, vm, written)
            reporter.info(f"powercut: cut {number} after {seconds:.0f} s ({moment})")
    last = len(CUT_AFTER_BYTES) + 1
    with running(acceptance.tools, spec, folder / f"cut{last}") as vm:
        limit = acceptance.patience(acceptance.profile.accept.boot_seconds)
        seconds = vm.wait_until(lambda: CUT_AT_WORD in vm.console_text(), limit, f"{CUT_AT_WORD!r} on the console")
        vm.power_cut()
        reporter.info(f"powercut: cut {last} after {seconds:.0f} s ({CUT_AT_WORD})")
    with booted(acceptance, "powercut", overlay, cloud, MachineSpec()) as guest:
        guest.facts["cuts"] = last
        yield guest


@contextmanager
def kernels(acceptance: Acceptance) -> Iterator[Guest]:
    """A machine with a keyboard on its serial console, which gets other kernels."""
    overlay = fresh_overlay(acceptance, acceptance.work_dir / "kernels", GROWTH_BYTES)
    cloud = cloud_config(acceptance, "kernels")
    with booted(acceptance, "kernels", overlay, cloud, MachineSpec(interactive=True)) as guest:
        yield guest


@contextmanager
def cloud(acceptance: Acceptance) -> Iterator[Guest]:
    """A machine with room for instances, which sets up its cloud at this first boot."""
    overlay = fresh_overlay(acceptance, acceptance.work_dir / "cloud", GROWTH_BYTES * 2)
    template = MachineSpec(memory_bytes=CLOUD_BYTES, nics=(Nic(forwards=(Forward(FORWARDED_PORT),)),))
    with booted(acceptance, "cloud", overlay, cloud_config(acceptance, "cloud"), template) as guest:
        yield guest


#: The two machines of the scene ``workers`` on their cable (RFC 5737's addresses for documentation).
CENTRAL_ADDRESS, WORKER_ADDRESS = "192.0.2.1", "192.0.2.2"
_CENTRAL_MAC, _WORKER_MAC = "52:54:00:c0:00:01", "52:54:00:c0:00:02"
_SOCKET = "cable.sock"


@contextmanager
def workers(acceptance: Acceptance) -> Iterator[Guest]:
    """A central node, and as ``worker`` in its facts a machine of another image; a cable joins them."""
    if acceptance.worker_image is None:
        raise GuestError("no image of workers was named")
    folder = acceptance.work_dir / "workers"
    other = _of_another_image(acceptance, acceptance.worker_image)
    # The socket lies where the sandboxes of both see it.
    overlay, second = fresh_overlay(acceptance, folder), fresh_overlay(other, folder / "worker")
    ends = (Cable(f"worker/{_SOCKET}", True, _CENTRAL_MAC), Cable(_SOCKET, False, _WORKER_MAC))
    template = MachineSpec(memory_bytes=CLOUD_BYTES, cable=ends[0])
    with booted(acceptance, "workers", overlay, cloud_config(acceptance, "workers"), template) as central:
        _give_address(central, _CENTRAL_MAC, CENTRAL_ADDRESS)
        cloud = cloud_config(acceptance, "worker")
        template = replace(template, cable=ends[1])
        with booted(other, "workers/worker", second, cloud, template) as worker:
            _give_address(worker, _WORKER_MAC, WORKER_ADDRESS)
            central.facts["worker"] = worker
            yield central


def _of_another_image(acceptance: Acceptance, image: Path) -> Acceptance:
    """The same run, with the disks of another image."""
    info = image_info(acceptance.tools, image)
    facts = replace(
        acceptance.image_facts, path=str(image), format=str(info["format"]), bytes=image.stat().st_size,
        virtual_bytes=int(info["virtual-size"]),
    )  # fmt: skip
    return replace(acceptance, image=image, image_facts=facts)


@contextmanager
def upgrade(acceptance: Acceptance) -> Iterator[Guest]:
    """A cloud from an older disk, under an overlay as always; it sets itself up when the disk was never booted."""
    if acceptance.older_disk is None:
        raise GuestError("no older disk was named")
    older = _of_another_image(acceptance, acceptance.older_disk)
    overlay = fresh_overlay(older, older.work_dir / "upgrade", GROWTH_BYTES * 2)
    template = MachineSpec(memory_bytes=CLOUD_BYTES)
    with booted(older, "upgrade", overlay, cloud_config(older, "upgrade"), template) as guest:
        yield guest


def _give_address(guest: Guest, mac: str, address: str) -> None:
    """An address for good: nobody serves DHCP on a cable."""
    text = f"[Match]\nMACAddress={mac}\n[Network]\nAddress={address}/24\n"
    path = "/etc/systemd/network/40-cable.network"
    guest.out(f"printf {shlex.quote(text)} > {path} && networkctl reload")
    guest.out(f"for i in $(seq 60); do ip -br addr | grep -q ' {address}/' && exit; sleep 1; done; exit 1", seconds=90)


def _cut_after(acceptance: Acceptance, vm: Vm, written_bytes: int) -> tuple[float, str]:
    """Cut the power when the guest has written enough, or at the latest when its SSH server greets."""
    access = vm.ssh(TEST_USER, acceptance.key)
    moments: list[str] = []
    next_banner = time.monotonic() + 5

    def now() -> bool:
        nonlocal next_banner
        total = bytes_written(vm)
        if total >= written_bytes:
            moments.append(f"{total} bytes written")
        elif time.monotonic() > next_banner:
            next_banner = time.monotonic() + 2
            if access.banner(1.0):
                moments.append("its SSH server was up")
        return bool(moments)

    limit = acceptance.patience(acceptance.profile.accept.boot_seconds)
    seconds = vm.wait_until(now, limit, "the moment for a power cut")
    vm.power_cut()
    return seconds, moments[0]


def bytes_written(vm: Vm) -> int:
    """What the guest wrote to all its disks since its start."""
    return sum(int(item["stats"]["wr_bytes"]) for item in vm.qmp.execute("query-blockstats"))


SCENE_BOOTS: dict[str, Callable[[Acceptance], object]] = {
    "first": first, "second": second, "powercut": powercut, "kernels": kernels, "cloud": cloud,
    "workers": workers, "upgrade": upgrade,
}  # fmt: skip


def scene_limit(acceptance: Acceptance) -> float:
    """Seconds after which a scene is surely stuck."""
    return _SCENE_BOOTS * acceptance.patience(acceptance.profile.accept.boot_seconds)
