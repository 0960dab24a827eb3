"""Each disk controller and each network card that QEMU emulates: the image boots from it and is reached through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from recvirt.accept import boots
from recvirt.accept.context import Acceptance
from recvirt.accept.registry import check
from recvirt.accept.results import Failed
from recvirt.qemu import Disk, MachineSpec, Nic
from recvirt.qemu.argv import DiskBus, NicModel

#: Every controller once, every card at least once.
PAIRS: tuple[tuple[DiskBus, NicModel], ...] = (
    ("virtio-blk", "virtio-net"),
    ("virtio-scsi", "e1000e"),
    ("nvme", "vmxnet3"),
    ("ahci", "e1000e"),
    ("pvscsi", "vmxnet3"),
)
#: The kernel driver that must hold the root disk and the card.
DISK_DRIVERS: dict[DiskBus, str] = {
    "virtio-blk": "virtio_blk", "virtio-scsi": "virtio_scsi", "nvme": "nvme", "ahci": "ahci", "pvscsi": "vmw_pvscsi",
}  # fmt: skip
NIC_DRIVERS: dict[NicModel, str] = {"virtio-net": "virtio_net", "e1000e": "e1000e", "vmxnet3": "vmxnet3"}

#: The root's disk, the drivers on the way from it up to the PCI bus, and that of the card with the default route.
_DRIVERS_OF_DISK = (
    # A kernel that mounted its root itself calls it /dev/root; btrfs has no number of a disk. One of the two leads on.
    "p=/sys/dev/block/$(findmnt -n -o MAJ:MIN /);"
    " [ -e $p ] || p=/sys/class/block/$(basename $(findmnt -n -o SOURCE / | sed 's/\\[.*//'));"
    "d=$(readlink -f $p/..); basename $d; d=$(readlink -f $d/device);"
    'while [ "$d" != / ]; do [ -e "$d/driver" ] && basename "$(readlink -f "$d/driver")"; d=$(dirname "$d"); done'
)
_DRIVER_OF_NIC = (
    "n=$(ip -o -4 route show default | sed -n 's/.* dev \\([^ ]*\\).*/\\1/p' | head -n 1);"
    'basename "$(readlink -f /sys/class/net/$n/device/driver)"'
)


def _boots_on(bus: DiskBus, model: NicModel) -> Callable[[Acceptance], str]:
    def run(acceptance: Acceptance) -> str:
        name = f"matrix-{bus}"
        overlay = boots.fresh_overlay(acceptance, acceptance.work_dir / name)
        template = MachineSpec(disks=(Disk(overlay, bus=bus),), nics=(Nic(model),))
        with boots.booted(acceptance, name, overlay, boots.cloud_config(acceptance, name), template) as guest:
            disk_drivers = guest.out(_DRIVERS_OF_DISK).split()
            nic_driver = guest.out(_DRIVER_OF_NIC)
            # With multipathing an NVMe disk hangs on no PCI device, but on its subsystem; its name tells the driver.
            if DISK_DRIVERS[bus] not in disk_drivers and not disk_drivers[0].startswith(DISK_DRIVERS[bus]):
                raise Failed(f"the root disk is held by {', '.join(disk_drivers)} instead of {DISK_DRIVERS[bus]}")
            if nic_driver != NIC_DRIVERS[model]:
                raise Failed(f"the network card is held by {nic_driver} instead of {NIC_DRIVERS[model]}")
            failed = guest.failed_units(acceptance.profile.accept.unit_failures_allowed)
            if failed:
                raise Failed(f"failed units: {', '.join(failed)}")
            return f"SSH after {guest.boot_seconds:.0f} s; {DISK_DRIVERS[bus]}, {nic_driver}"

    run.__doc__ = f"The image boots from {bus} and is reached through {model}"
    return run


def _register() -> None:
    if {bus for bus, _ in PAIRS} != set(get_args(DiskBus)) or {nic for _, nic in PAIRS} != set(get_args(NicModel)):
        raise ValueError("the matrix leaves out a controller or a card")
    for bus, model in PAIRS:
        check(f"boots-on-{bus}-and-{model}", "matrix")(_boots_on(bus, model))


_register()
