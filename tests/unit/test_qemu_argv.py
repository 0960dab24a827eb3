"""The command lines of virtual machines: pure, so a test is a comparison."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from recvirt.qemu import DISK_BUSES, NIC_MODELS, Cable, Disk, Forward, MachineSpec, Nic, qemu_argv
from recvirt.qemu.argv import disk_words, nic_words
from recvirt.qemu.disks import overlay_argv


def value_after(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_tcg_emulates_a_processor_with_svm_on_many_threads() -> None:
    argv = qemu_argv(MachineSpec(accelerator="tcg"))
    assert value_after(argv, "-accel") == "tcg,thread=multi"
    assert value_after(argv, "-cpu") == "max"
    assert value_after(argv, "-machine") == "q35"


def test_kvm_passes_the_hosts_processor() -> None:
    argv = qemu_argv(MachineSpec(accelerator="kvm"))
    assert (value_after(argv, "-accel"), value_after(argv, "-cpu")) == ("kvm", "host")


def test_uefi_reads_its_code_and_writes_only_the_vms_own_variables() -> None:
    drives = [word for word in qemu_argv(MachineSpec(firmware="uefi")) if "pflash" in word]
    assert len(drives) == 2
    assert "readonly=on" in drives[0] and drives[0].endswith("OVMF_CODE_4M.fd")
    assert "file=uefi-vars.fd" in drives[1] and "readonly" not in drives[1]
    assert not any("pflash" in word for word in qemu_argv(MachineSpec(firmware="bios")))


@pytest.mark.parametrize("bus", DISK_BUSES)
def test_each_bus_has_a_controller_and_one_boot_disk(bus: str) -> None:
    argv = qemu_argv(
        MachineSpec(disks=(Disk(Path("/a.qcow2"), bus=bus, bootable=True), Disk(Path("/b.img"), "raw", bus=bus)))  # type: ignore[arg-type]
    )
    devices = [argv[i + 1] for i, word in enumerate(argv) if word == "-device"]
    assert sum("bootindex" in device for device in devices) == 1
    assert sum("drive=disk0" in device for device in devices) == 1
    assert sum("drive=disk1" in device for device in devices) == 1
    driver = {"virtio-blk": "virtio-blk-pci", "virtio-scsi": "virtio-scsi-pci", "ahci": "ich9-ahci"}.get(bus, bus)
    assert sum(device.startswith(driver) for device in devices) == 2


@pytest.mark.parametrize("model", NIC_MODELS)
def test_each_card_is_on_a_user_network_without_a_boot_rom(model: str) -> None:
    words = nic_words(0, Nic(model, (Forward(22), Forward(80, 8080))))  # type: ignore[arg-type]
    assert words[1] == "user,id=net0,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=tcp:127.0.0.1:8080-:80"
    assert words[3].endswith("netdev=net0,romfile=")


def test_a_cable_has_two_ends_with_cards_of_their_own() -> None:
    ends = [MachineSpec(cable=Cable("a,b.sock", makes, mac)) for makes, mac in ((True, "52:54:00:c0:00:01"),
                                                                                (False, "52:54:00:c0:00:02"))]
    words = [qemu_argv(spec) for spec in ends]
    netdevs = [next(word for word in line if word.startswith("stream,")) for line in words]
    assert [("server=on" in text, "server=off" in text) for text in netdevs] == [(True, False), (False, True)]
    assert all(text.endswith("addr.type=unix,addr.path=a,,b.sock") for text in netdevs)
    macs = [next(word for word in line if "netdev=cable," in word).split("mac=")[1][:17] for line in words]
    assert macs == ["52:54:00:c0:00:01", "52:54:00:c0:00:02"]


def test_a_read_only_disk_is_never_opened_for_writing() -> None:
    assert disk_words(0, Disk(Path("/seed.img"), "raw", read_only=True))[1].endswith(",readonly=on")
    assert "readonly" not in disk_words(0, Disk(Path("/x.qcow2")))[1]


def test_a_read_only_sata_disk_is_a_cd_rom() -> None:
    """QEMU refuses a read-only ide-hd."""
    assert any(word.startswith("ide-cd,") for word in disk_words(0, Disk(Path("/s"), "raw", "ahci", read_only=True)))
    assert any(word.startswith("ide-hd,") for word in disk_words(0, Disk(Path("/s"), bus="ahci")))


def test_a_comma_in_a_path_does_not_become_an_option() -> None:
    assert "file=/odd,,readonly=on/x.img" in disk_words(0, Disk(Path("/odd,readonly=on/x.img")))[1]


def test_the_serial_console_is_logged_and_interactive_adds_two_sockets() -> None:
    plain = qemu_argv(MachineSpec())
    assert value_after(plain, "-serial") == "chardev:log"
    both = qemu_argv(MachineSpec(interactive=True))
    assert value_after(both, "-serial") == "chardev:console"
    hub = next(word for word in both if word.startswith("hub,"))
    assert hub.split(",")[2:] == ["chardevs.0=con1", "chardevs.1=con2", "chardevs.2=log"]


def test_a_port_for_later_comes_after_everything_that_has_a_place() -> None:
    argv = qemu_argv(MachineSpec(disks=(Disk(Path("/d")),), spare_port=True))
    assert argv[-2:] == ["-device", "pcie-root-port,id=spare,chassis=1"]
    assert "pcie-root-port" not in " ".join(qemu_argv(MachineSpec()))


def test_linux_knows_the_hypervisor_where_processors_may_come() -> None:
    emulated = qemu_argv(MachineSpec(cpus=1, cpus_max=2))
    assert value_after(emulated, "-smp") == "1,maxcpus=2"
    assert value_after(emulated, "-cpu") == "max,-hypervisor" and "type=1,serial=VMware-0" in emulated
    plain, under_kvm = qemu_argv(MachineSpec(cpus=1)), qemu_argv(MachineSpec(accelerator="kvm", cpus=1, cpus_max=2))
    assert value_after(plain, "-cpu") == "max" and value_after(under_kvm, "-cpu") == "host"
    assert "VMware" not in " ".join([*plain, *under_kvm])


def test_no_screen_unless_asked_for() -> None:
    assert value_after(qemu_argv(MachineSpec()), "-display") == "none"
    assert value_after(qemu_argv(MachineSpec(vnc=3)), "-display") == "vnc=127.0.0.1:3"


def test_credentials_travel_as_smbios_strings() -> None:
    argv = qemu_argv(MachineSpec(credentials={"ssh.authorized_keys.root": b"ssh-ed25519 AAAA x"}))
    encoded = value_after(argv, "-smbios").split("ssh.authorized_keys.root=")[1]
    assert base64.b64decode(encoded) == b"ssh-ed25519 AAAA x"


def test_a_kernel_of_its_own_brings_its_words() -> None:
    argv = qemu_argv(MachineSpec(kernel=Path("/k"), initrd=Path("/i"), cmdline="root=x quiet"))
    assert (value_after(argv, "-kernel"), value_after(argv, "-initrd")) == ("/k", "/i")
    assert value_after(argv, "-append") == "root=x quiet"
    assert "-kernel" not in qemu_argv(MachineSpec())


def test_an_overlay_names_its_backing_format_so_that_nothing_is_probed() -> None:
    assert overlay_argv(Path("/i.qcow2"), "qcow2", Path("/o.qcow2"), 5)[-6:] == [
        "-b", "/i.qcow2", "-F", "qcow2", "/o.qcow2", "5",
    ]  # fmt: skip
    assert overlay_argv(Path("/i.raw"), "raw", Path("/o.qcow2"))[-1] == "/o.qcow2"
