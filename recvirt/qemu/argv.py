"""The command line of a virtual machine. Pure: the same description gives the same words, and nothing is started.

File names inside the VM's own folder (sockets, logs) are relative, because QEMU runs with that folder as its working
directory and a UNIX socket's path may hold only 107 bytes (unix(7)).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

DiskBus = Literal["virtio-blk", "virtio-scsi", "nvme", "ahci", "pvscsi"]
NicModel = Literal["virtio-net", "e1000e", "vmxnet3"]
Firmware = Literal["bios", "uefi"]
AcceleratorName = Literal["kvm", "tcg"]

DISK_BUSES: tuple[DiskBus, ...] = get_args(DiskBus)
NIC_MODELS: tuple[NicModel, ...] = get_args(NicModel)

#: Names inside the VM's folder.
QMP_SOCKET = "qmp.sock"
CONSOLE_LOG = "console.log"
CONSOLE_SOCKET = "console.sock"
CONSOLE_SOCKET_2 = "console2.sock"
VIRTIO_CONSOLE_LOG = "hvc0.log"
UEFI_VARIABLES = "uefi-vars.fd"
#: QEMU's name of the port that ``spare_port`` gives.
SPARE_PORT = "spare"

#: Firmware of Debian's package ``ovmf``, inside the tools root. The variables are copied, for each VM writes its own.
OVMF_CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
OVMF_VARIABLES = "/usr/share/OVMF/OVMF_VARS_4M.fd"

_CONTROLLERS: dict[DiskBus, str] = {"virtio-scsi": "virtio-scsi-pci", "ahci": "ich9-ahci", "pvscsi": "pvscsi"}
_NIC_DEVICES: dict[NicModel, str] = {"virtio-net": "virtio-net-pci", "e1000e": "e1000e", "vmxnet3": "vmxnet3"}


@dataclass(frozen=True)
class Disk:
    """A disk of the guest. ``bootable`` puts it first in the firmware's order; ``backing`` lies below an overlay."""

    path: Path
    format: Literal["qcow2", "raw"] = "qcow2"
    bus: DiskBus = "virtio-blk"
    read_only: bool = False
    bootable: bool = False
    cache: Literal["writeback", "unsafe"] = "writeback"
    backing: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Forward:
    """A TCP port of the host's loopback that leads into the guest. Host port 0: the kernel picks a free one."""

    guest_port: int
    host_port: int = 0


@dataclass(frozen=True)
class Nic:
    """A network card on QEMU's user network (the guest reaches the host as 10.0.2.2)."""

    model: NicModel = "virtio-net"
    forwards: tuple[Forward, ...] = ()


@dataclass(frozen=True)
class Cable:
    """A card whose cable leads to another machine of ours: a UNIX socket that one end makes first.

    ``socket`` is relative to the VM's folder. ``mac`` has to differ between the ends.
    """

    socket: str
    makes: bool
    mac: str


@dataclass(frozen=True)
class MachineSpec:
    """A whole virtual machine.

    ``kernel`` and ``initrd`` start a kernel without any boot loader. ``credentials`` are systemd system credentials
    (name to bytes), handed over as SMBIOS strings of type 11 (systemd.exec(5), "Credentials").
    ``interactive`` gives the serial console two sockets besides its log; ``vnc`` is a display number, or None.
    ``spare_port`` is an empty PCI Express port, for a device that comes while the guest runs; up to ``cpus_max``
    processors may come likewise. Linux keeps room for them only where it knows the hypervisor (arch/x86/kernel/acpi/
    boot.c), and it does not know TCG, which then looks like VMware.
    """

    accelerator: AcceleratorName = "tcg"
    firmware: Firmware = "bios"
    memory_bytes: int = 2 * 1024**3
    cpus: int = 2
    cpus_max: int = 0
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = (Nic(),)
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    credentials: Mapping[str, bytes] = field(default_factory=dict)
    interactive: bool = False
    spare_port: bool = False
    vnc: int | None = None
    reboot_allowed: bool = True
    cable: Cable | None = None


def _escape(value: object) -> str:
    """A comma inside an option's value is doubled (qemu(1), -drive)."""
    return str(value).replace(",", ",,")


def qemu_argv(spec: MachineSpec) -> list[str]:
    """The words that start ``spec``; see the module's text for what is relative to the VM's folder."""
    words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-machine", "q35"]
    words += _accelerator_words(spec.accelerator, known=bool(spec.cpus_max))
    words += ["-smp", f"{spec.cpus},maxcpus={max(spec.cpus, spec.cpus_max)}" if spec.cpus_max else str(spec.cpus)]
    words += ["-m", f"{spec.memory_bytes // 1024**2}M"]
    words += _firmware_words(spec.firmware)
    words += ["-device", "virtio-rng-pci"]
    words += _display_words(spec)
    words += _console_words(spec)
    words += ["-qmp", f"unix:{QMP_SOCKET},server=on,wait=off"]
    for index, disk in enumerate(spec.disks):
        words += disk_words(index, disk)
    for index, nic in enumerate(spec.nics):
        words += nic_words(index, nic)
    if spec.cable is not None:
        words += cable_words(spec.cable)
    if spec.spare_port:
        words += ["-device", f"pcie-root-port,id={SPARE_PORT},chassis=1"]
    if spec.kernel is not None:
        words += ["-kernel", str(spec.kernel)]
        words += ["-initrd", str(spec.initrd)] if spec.initrd else []
        words += ["-append", spec.cmdline] if spec.cmdline else []
    for name, value in sorted(spec.credentials.items()):
        text = base64.b64encode(value).decode()
        words += ["-smbios", f"type=11,value=io.systemd.credential.binary:{_escape(name)}={text}"]
    if not spec.reboot_allowed:
        words += ["-no-reboot"]
    return words


def _accelerator_words(accelerator: AcceleratorName, *, known: bool) -> list[str]:
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    words = ["-accel", "tcg,thread=multi"]
    if known:
        # Without the CPUID bit, VMware is what has its serial number and its backdoor port, which QEMU's vmport is.
        return [*words, "-cpu", "max,-hypervisor", "-smbios", "type=1,serial=VMware-0"]
    # "max" emulates SVM with nested paging, which the L2 checks need.
    return [*words, "-cpu", "max"]


def _firmware_words(firmware: Firmware) -> list[str]:
    if firmware == "bios":
        return []  # SeaBIOS is QEMU's own default
    return [
        "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={OVMF_CODE}",
        "-drive", f"if=pflash,unit=1,format=raw,file={UEFI_VARIABLES}",
    ]  # fmt: skip


def _display_words(spec: MachineSpec) -> list[str]:
    words = ["-vga", "std" if spec.vnc is not None or spec.firmware == "uefi" else "none"]
    return [*words, "-display", "none" if spec.vnc is None else f"vnc=127.0.0.1:{spec.vnc}"]


def _console_words(spec: MachineSpec) -> list[str]:
    words = ["-chardev", f"file,id=log,path={CONSOLE_LOG}"]
    serial = "log"
    if spec.interactive:
        # Two people may look at the console; a hub copies what the guest writes to each (QEMU 10).
        words += ["-chardev", f"socket,id=con1,path={CONSOLE_SOCKET},server=on,wait=off"]
        words += ["-chardev", f"socket,id=con2,path={CONSOLE_SOCKET_2},server=on,wait=off"]
        words += ["-chardev", "hub,id=console,chardevs.0=con1,chardevs.1=con2,chardevs.2=log"]
        serial = "console"
    words += ["-serial", f"chardev:{serial}"]
    words += ["-device", "virtio-serial-pci", "-chardev", f"file,id=hvc,path={VIRTIO_CONSOLE_LOG}"]
    return [*words, "-device", "virtconsole,chardev=hvc"]


def disk_words(index: int, disk: Disk) -> list[str]:
    """One disk with a controller of its own, so that any mix of buses works."""
    drive = f"if=none,id=disk{index},format={disk.format},cache={disk.cache},file={_escape(disk.path)}"
    drive += ",readonly=on" if disk.read_only else ""
    words = ["-drive", drive]
    # With -kernel, QEMU gives its own loader the index 0.
    suffix = ",bootindex=1" if disk.bootable else ""
    if disk.bus == "virtio-blk":
        return [*words, "-device", f"virtio-blk-pci,drive=disk{index}{suffix}"]
    if disk.bus == "nvme":
        return [*words, "-device", f"nvme,drive=disk{index},serial=recvirt{index}{suffix}"]
    words += ["-device", f"{_CONTROLLERS[disk.bus]},id=ctl{index}"]
    # QEMU's SATA disk can't be read-only; first-boot data come on a CD-ROM there, as clouds attach them.
    sata = "ide-cd" if disk.read_only else "ide-hd"
    device = sata if disk.bus == "ahci" else "scsi-hd"
    return [*words, "-device", f"{device},bus=ctl{index}.0,drive=disk{index}{suffix}"]


def cable_words(cable: Cable) -> list[str]:
    """One card, and QEMU's end of its cable."""
    netdev = f"stream,id=cable,server={'on' if cable.makes else 'off'},addr.type=unix,addr.path={_escape(cable.socket)}"
    return ["-netdev", netdev, "-device", f"virtio-net-pci,netdev=cable,mac={cable.mac},romfile="]


def nic_words(index: int, nic: Nic) -> list[str]:
    """One card on a user network of its own."""
    netdev = f"user,id=net{index}"
    for forward in nic.forwards:
        netdev += f",hostfwd=tcp:127.0.0.1:{forward.host_port}-:{forward.guest_port}"
    # No boot ROM: a guest boots from its disk or says why not, it does not try the network for minutes.
    return ["-netdev", netdev, "-device", f"{_NIC_DEVICES[nic.model]},netdev=net{index},romfile="]
