"""Virtual machines under QEMU: what to run (pure), and a running one (a context manager).

Owns: command lines, the accelerator probe, QMP, NoCloud seeds, SSH access to a guest, the life and death of a VM.
Does not own: what a guest must prove (:mod:`recvirt.accept`).
"""

from recvirt.qemu.argv import DISK_BUSES, NIC_MODELS, Cable, Disk, Forward, MachineSpec, Nic, qemu_argv
from recvirt.qemu.disks import check_image, image_info, make_overlay
from recvirt.qemu.probe import Accelerator, find_accelerator
from recvirt.qemu.qmp import QmpClient, QmpError
from recvirt.qemu.seed import CloudConfig, make_config_drive, make_seed
from recvirt.qemu.ssh import SshAccess, make_key
from recvirt.qemu.vm import Vm, running

__all__ = [
    "DISK_BUSES",
    "NIC_MODELS",
    "Accelerator",
    "Cable",
    "CloudConfig",
    "Disk",
    "Forward",
    "MachineSpec",
    "Nic",
    "QmpClient",
    "QmpError",
    "SshAccess",
    "Vm",
    "check_image",
    "find_accelerator",
    "image_info",
    "make_config_drive",
    "make_key",
    "make_overlay",
    "make_seed",
    "qemu_argv",
    "running",
]
