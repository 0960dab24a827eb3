"""Every check and the fault that it must find: how the image is spoilt, and the words the check must say of it.

The words make sure that a check fails for its own reason, and not because something else broke.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recvirt.qemu import make_key
from tests.support.spoil import SpoiltImage

Spoil = Callable[[SpoiltImage], None]


@dataclass(frozen=True)
class Mutant:
    """``words`` is a pattern in the check's detail. Without ``spoil`` another entry's fault is the one to be found."""

    check: str
    words: str
    spoil: Spoil | None = None


def _sub(path: str, pattern: str, replacement: str, mode: int = 0o644) -> Spoil:
    return lambda image: image.change(path, lambda text: re.sub(pattern, replacement, text, flags=re.MULTILINE), mode)


def _file(path: str, text: str, mode: int = 0o644) -> Spoil:
    return lambda image: image.write(path, text, mode)


def _broken_unit(image: SpoiltImage) -> None:
    image.oneshot("broken", "exit 3")


def _kernel_messages(image: SpoiltImage) -> None:
    image.oneshot("messages", 'echo "<3>disk on fire" >/dev/kmsg; echo "<4>spoilt BUG: of the test" >/dev/kmsg')


def _listener(image: SpoiltImage) -> None:
    image.unit("spoilt.socket", "[Socket]\nListenStream=0.0.0.0:9999\nAccept=yes\n", "sockets.target")
    image.write("/etc/systemd/system/spoilt@.service", "[Service]\nExecStart=/bin/true\n")


def _foreign_key(image: SpoiltImage) -> None:
    image.make_dir("/root/.ssh", 0o700)
    key = make_key(image.folder, "foreign")
    image.write("/root/.ssh/authorized_keys", key.with_name("foreign.pub").read_text(), 0o600)


def _private_key(image: SpoiltImage) -> None:
    image.write("/etc/ssl/private/spoilt.key", "-----BEGIN " + "PRIVATE KEY-----\nMIIE\n", 0o600)


def _shared_host_key(image: SpoiltImage) -> None:
    key = make_key(image.folder, "ssh_host_ed25519_key")
    for name, mode in ((key.name, 0o600), (f"{key.name}.pub", 0o644)):
        image.write(f"/etc/ssh/{name}", (key.parent / name).read_text(), mode)


def _host_key_modes(image: SpoiltImage) -> None:
    words = "\nchmod 644 /etc/ssh/ssh_host_ecdsa_key\necho junk > /etc/ssh/ssh_host_rsa_key\n"
    image.append("/usr/lib/recvirt/ssh-keys", words, 0o755)


def _missing_package(image: SpoiltImage) -> None:
    def drop(text: str) -> str:
        return "\n\n".join(part for part in text.split("\n\n") if not part.startswith("Package: qemu-utils\n"))

    image.change("/var/lib/dpkg/status", drop)


def _libvirt_subnet(image: SpoiltImage) -> None:
    image.change("/etc/libvirt/qemu/networks/default.xml", lambda text: text.replace("192.168.122.", "10.0.2."))
    image.write("/var/lib/recvirt/libvirt-network", "10.0.2\n")


def _kvm_held(image: SpoiltImage) -> None:
    image.unit("kvm-held.service", "[Service]\nStandardInput=file:/dev/kvm\nExecStart=/bin/sleep infinity\n")


def _nfs_options(image: SpoiltImage) -> None:
    def edit(text: str) -> str:
        return text.replace("nosuid,nodev,retry=0", "hard,retry=10000").replace("TimeoutSec=30s", "TimeoutSec=infinity")

    image.change("/usr/lib/systemd/system-generators/recvirt-nfs", edit, 0o755)


def _tearing(image: SpoiltImage) -> None:
    # In place of the mending: a byte of the last partition's name changes at each boot in the second copy, wherever the
    # first one says that it lies, and the checksum does not. Of a torn first copy nothing would boot, for the disk of
    # some scenes is larger than its table knows.
    word = (
        "#!/bin/sh\nlast=$(od -An -tu8 -j544 -N8 /dev/vda)\n"
        "head -c 2 /dev/urandom |"
        " dd of=/dev/vda bs=1 seek=$(((last - 32) * 512 + 372)) conv=notrunc,fsync status=none\n"
    )
    image.change("/usr/lib/recvirt/gpt-mend", lambda _: word, 0o755)


def _menu(image: SpoiltImage) -> None:
    image.change(
        "/boot/grub/grub.cfg",
        lambda text: text.replace("console=tty0 ", "").replace(" systemd.setenv=SYSTEMD_SULOGIN_FORCE=1", ""),
    )


def _cloud(image: SpoiltImage) -> None:
    text = "bootcmd: [['/bin/false']]\npreserve_hostname: true\nssh_deletekeys: false\n"
    image.write("/etc/cloud/cloud.cfg.d/99_spoilt.cfg", text)


#: What one boot finds without running a VM.
FEW = (
    Mutant("no-failed-unit", r"broken\.service", _broken_unit),
    Mutant("packages", r"not installed: qemu-utils", _missing_package),
    Mutant("nested-parameters", r"nesting is off", _sub("/etc/modprobe.d/recvirt-nested.conf", "nested=1", "nested=0")),
    Mutant("no-passwords", r"root", _sub("/etc/shadow", r"^root:[^:]*:", "root:$y$j9T$spoilt$spoilt:")),
    Mutant("listening-sockets", r"0\.0\.0\.0:9999", _listener),
    Mutant("no-authorized-keys", r"/root/\.ssh/authorized_keys", _foreign_key),
    Mutant("kernel-log", r"disk on fire", _kernel_messages),
    Mutant("mounts", r"/boot/efi is not mounted", _sub("/etc/fstab", r"^PARTLABEL=esp.*\n", "")),
)

#: The rest of the ordinary scenes.
MANY = (
    # A word with a colon at the start would be taken for the name of the program that wrote it.
    Mutant("no-crashes", r"BUG: of the test"),
    Mutant("boot-time", r"systemd-analyze said", _file("/usr/local/bin/systemd-analyze", '#!/bin/sh\n[ "$1" = time ] &&'
           " echo broken && exit\nexec /usr/bin/systemd-analyze \"$@\"\n", 0o755)),
    Mutant("rescue-needs-no-password", r"sulogin", _menu),
    Mutant("locale-and-time-zone", r"LANG is not", _file("/etc/locale.conf", "LANG=de_DE.UTF-8\n")),
    Mutant("name-resolution", r"/etc/resolv\.conf is", _file("/etc/resolv.conf", "nameserver 10.0.2.3\n")),
    Mutant("cloud-init-status", r"cloud-init says", _cloud),
    Mutant("cloud-init-data-applied", r"the host name is"),
    Mutant("ssh-refuses-passwords", r"passwordauthentication yes", _sub(
        "/etc/ssh/sshd_config.d/10-recvirt.conf", "PasswordAuthentication no", "PasswordAuthentication yes")),
    Mutant("host-key-modes", r"644", _host_key_modes),
    Mutant("no-private-keys", r"spoilt\.key", _private_key),
    Mutant("setuid-files-belong-to-packages", r"/usr/local/bin/spoilt", _file("/usr/local/bin/spoilt", "x", 0o4755)),
    Mutant("world-writable", r"/opt/spoilt", lambda image: image.make_dir("/opt/spoilt", 0o777)),
    Mutant("only-root-and-user-have-sudo", r"eve", _file("/etc/sudoers.d/eve", "eve ALL=(ALL) NOPASSWD: ALL\n", 0o440)),
    Mutant("log-files", r"bootstrap\.log", _file("/var/log/bootstrap.log", "x\n")),
    Mutant("empty-caches", r"spoilt\.deb", _file("/var/cache/apt/archives/spoilt.deb", "x")),
    Mutant("journal-bounded", r"1G", _sub(
        "/etc/systemd/journald.conf.d/50-recvirt.conf", r"SystemMaxUse=\S+", "SystemMaxUse=1G")),
    Mutant("root-grown", r"GiB on a disk of", lambda image: image.remove("/etc/repart.d/50-root.conf")),
    Mutant("partitions-change-after-remount", r"systemd-repart began after", _file(
        "/etc/systemd/system/systemd-repart.service.d/recvirt.conf", "[Unit]\nBefore=systemd-remount-fs.service\n")),
    Mutant("nfs-mounts", r"without nosuid", _nfs_options),
    Mutant("kvm-device", r"kvm 666", _file("/etc/udev/rules.d/99-spoilt.rules", 'KERNEL=="kvm", MODE="0666"\n')),
    Mutant("virt-host-validate", r"not found", lambda image: image.remove("/usr/bin/virt-host-validate")),
    Mutant("libvirt-network", r"10\.0\.2\.0/24", _libvirt_subnet),
    Mutant("l2-under-kvm", r"nesting is off"),
    Mutant("l2-needs-kvm", r"modprobe -r", _kvm_held),
    Mutant("nested-check-agrees", r"status 14"),
    Mutant("survives-reboot", r"reboot-marker", _file(
        "/etc/tmpfiles.d/spoilt.conf", "r! /var/lib/recvirt-reboot-marker\n")),
    Mutant("kernel-log-after-vms", r"disk on fire"),
    Mutant("no-failed-unit-on-uefi", r"broken\.service"),
    Mutant("screen-shows-something", r"consoles are only"),
    Mutant("hostname", r"'spoilt' instead of", _file("/etc/hostname", "spoilt\n")),
    Mutant("nfs-server-away", r"hangs"),
    Mutant("config-drive", r"cloud-init says"),
    Mutant("volume-attach", r"mkfs\.ext4.*Operation not permitted", _file("/etc/udev/rules.d/99-spoilt-volume.rules",
           'ENV{ID_SERIAL}=="recvirt-volume", RUN+="/usr/sbin/blockdev --setro /dev/%k"\n')),
    Mutant("apt-upgrade", r"apt-get update", _sub(
        "/etc/apt/sources.list", r"signed-by=\S+\]", "signed-by=/absent.gpg]")),
    Mutant("no-failed-unit-after-power-cuts", r"broken\.service"),
    Mutant("whole-after-power-cuts", r"can't be read.*rsa"),
    Mutant("cloud-init-survives-power-cuts", r"cloud-init says"),
    Mutant("partition-table-whole", r"GPT table is corrupt", _tearing),
    Mutant("root-grown-after-power-cuts", r"GiB on a disk of"),
    Mutant("copies-differ-in-machine-id", r"both copies have the machine-id", _file(
        "/etc/machine-id", f"{'ab' * 16}\n")),
    Mutant("copies-differ-in-host-keys", r"both copies have the SSH host keys", _shared_host_key),
)  # fmt: skip


def _same_subnet(image: SpoiltImage) -> None:
    # As if the choice had been made: every level keeps libvirt's own default.
    image.write("/var/lib/recvirt/libvirt-network", "192.168.122.0/24\n")


def _no_controllers(image: SpoiltImage) -> None:
    # Without its driver a disk never appears: the kernel gives up after rootwait=.
    drivers = "virtio_scsi_init,nvme_init,ahci_pci_driver_init,pvscsi_init"
    image.change("/boot/grub/grub.cfg", lambda text: text.replace(" ro ", f" ro initcall_blacklist={drivers} "))


#: One level down (``--deep``): a broken unit, nesting off, and the subnet of the level above.
DEEP = (
    Mutant("image-boots-as-l2", r"failed units in the L2: broken\.service", _broken_unit),
    Mutant("libvirt-network-in-l2", r"192\.168\.122\.0/24", _same_subnet),
    Mutant(
        "file-to-l2-and-back",
        r"they differ",
        _file("/usr/local/bin/sha256sum", "#!/bin/sh\n/usr/bin/sha256sum | tr 0-8 1-9\n", 0o755),
    ),
    Mutant("l3-under-kvm", r"[Kk][Vv][Mm]", _sub("/etc/modprobe.d/recvirt-nested.conf", "nested=1", "nested=0")),
)

_NEVER_CAME = r"an SSH login as rvtest did not come.*(rootwait|unable to mount root|panic)"


def _deaf_boot_menu(image: SpoiltImage) -> None:
    image.change("/usr/sbin/recvirt-update-boot", lambda _: "#!/bin/sh\nexit 0\n", 0o755)


#: Kernels that come and go (``--kernels``): a menu that nobody keeps, and a root that is locked in emergency mode too.
KERNELS = (
    Mutant(
        "key-opens-the-console",
        r"Login incorrect.*did not come",
        _sub("/usr/lib/recvirt/console-login", r"said=\$\(ssh-keygen", "said=$(: ssh-keygen", 0o755),
    ),
    Mutant("new-kernel-is-kept", r"no kernel into the menu", _deaf_boot_menu),
    Mutant("failing-kernel-is-given-up", r"of 99\.0\.0-broken it is not known"),
    Mutant("removed-kernels-leave-the-menu", r"no other kernel in the menu"),
    Mutant(
        "emergency-entry-opens-a-shell",
        r"Press Enter for .*did not come",
        lambda image: image.change(
            "/boot/grub/grub.cfg", lambda text: text.replace(" systemd.setenv=SYSTEMD_SULOGIN_FORCE=1", "")
        ),
    ),
)

#: Other hardware (``--matrix``): no driver for four of the disks, and a broken unit for the boot that is left.
MATRIX = (
    Mutant("boots-on-virtio-blk-and-virtio-net", r"failed units: broken\.service", _broken_unit),
    Mutant("boots-on-virtio-scsi-and-e1000e", _NEVER_CAME, _no_controllers),
    Mutant("boots-on-nvme-and-vmxnet3", _NEVER_CAME),
    Mutant("boots-on-ahci-and-e1000e", _NEVER_CAME),
    Mutant("boots-on-pvscsi-and-vmxnet3", _NEVER_CAME),
)
#: The Intel side (``--vmx``): a kernel package whose kvm_intel is another module.
VMX = (Mutant("vmx-on-bochs", r"kvm_intel"),)

_CLOUD = "/usr/lib/python3/dist-packages/recvirt/nestedcloud"
#: A cloud whose parts leave undone what they say they did.
CLOUD = (
    Mutant("cloud-is-closed", r"9999/tcp", _listener),
    Mutant(
        "cloud-keeps-its-secrets",
        r"an ordinary user can read",
        _sub(f"{_CLOUD}/machine.py", r"mode: int = 0o640", "mode: int = 0o644"),
    ),
    Mutant(
        "cloud-forwards-a-port",
        r"the instance's page is ['\"](Connection|ReadTimeout)",
        _sub(f"{_CLOUD}/portmap.py", r'"fib daddr type local jump wanted"\]', '"accept"]'),
    ),
    Mutant(
        "cloud-rescales-live",
        r"a second processor",
        _sub(f"{_CLOUD}/worker/hypervisor.py", r"^( +)self\._call\(domain\.setVcpusFlags,.*$", r"\1pass"),
    ),
    Mutant(
        "cloud-reverts-to-a-snapshot",
        r"holds 'after'",
        _sub(f"{_CLOUD}/worker/hypervisor.py", r"^( +)self\._call\(domain\.revertToSnapshot,.*$", r"\1pass"),
    ),
    Mutant(
        "cloud-gives-volumes",
        r"mount",
        _sub(f"{_CLOUD}/worker/volumes.py", r"^( +)self\._run\(words\)$", r"\1pass"),
    ),
    Mutant(
        "cloud-keeps-appointments",
        r"before its time",
        _sub(f"{_CLOUD}/central/schedules.py", r"next_at__lte=now\)", "next_at__lte=now + timedelta(seconds=50))"),
    ),
    Mutant(
        "cloud-survives-a-power-cut",
        # Nobody tells the cloud, so that it may go on believing that they run.
        r"the same instances as before|an SSH login on web",
        _sub(f"{_CLOUD}/central/reports.py", r"restarted = bool\(.*$", "restarted = False"),
    ),
)
#: Each of these leaves nothing for the others to look at.
CLOUD_ALONE = (
    Mutant(
        "cloud-is-set-up",
        r"a healthy cloud with a worker",
        _sub("/usr/lib/systemd/system/recvirt-cloud-worker.service", r"^ExecStart=.*$", "ExecStart=/bin/false"),
    ),
    Mutant(
        "cloud-launches-under-kvm",
        r"does not run it under KVM",
        _sub(f"{_CLOUD}/provision.py", r'return "kvm"', 'return "qemu"'),
    ),
)

#: A central node whose workers reach and are told too little or too much, and (the second) a worker's image.
WORKERS_CENTRAL = (
    Mutant(
        "lost-worker-is-told",
        r"shelf-2 is away",
        _sub(f"{_CLOUD}/central/things.py", r"< settings\.WORKER_LOST_SECONDS", "< 10**9"),
    ),
    Mutant(
        "revoked-worker-is-shut-out",
        r"silence in the tunnel",
        _sub(f"{_CLOUD}/central/peers.py", r"for peer in rows if not peer\.worker\.revoked", "for peer in rows"),
    ),
)
WORKERS_WORKER = (
    Mutant(
        "worker-joins",
        r"another certificate than its invitation names",
        _sub(f"{_CLOUD}/pinned.py", r"if found != fingerprint:", 'if found == "":'),
    ),
    Mutant(
        "worker-runs-an-instance",
        r"does not run it under KVM",
        _sub(f"{_CLOUD}/provision.py", r'return "kvm"', 'return "qemu"'),
    ),
    Mutant(
        "worker-shares-volumes",
        r"disks are mounted from ''",
        _sub(f"{_CLOUD}/mounts.py", r'^( +)which\.append\("BLOCKS"\)$', r"\1pass"),
    ),
)


def _older_and_deadly(image: SpoiltImage) -> None:
    older = "0.1.0.9"
    for pattern, text in (
        (r"^Version: 0\.1\.\d+$", f"Version: {older}"),
        (r"(recvirt-cloud) \((=|<<) 0\.1\.\d+\)", rf"\1 (\2 {older})"),
    ):
        _sub("/var/lib/dpkg/status", pattern, text)(image)
    unit = "[Service]\nExecStopPost=+/usr/bin/pkill -KILL qemu-system\n"
    _file("/etc/systemd/system/recvirt-cloud-worker.service.d/spoilt.conf", unit)(image)


#: An older disk whose instances do not outlive the upgrade: what stops the services stops QEMU, too.
UPGRADE = (
    Mutant(
        "cloud-upgrades-under-instances", r"it was begun again|cat /(proc|run/libvirt/qemu)/", _older_and_deadly
    ),
)  # fmt: skip

#: Promises that the image never kept: the profile is what is changed.
BROKEN_PROMISES = {
    "users": r"eve is missing",
    "modules": r"not loaded: pcspkr_absent",
    "sysctls": r"vm\.swappiness is",
    "services": r"absent\.service",
    "kernel-command-line": r"recvirt_absent",
    "unattended-upgrades": r"are off; the profile wants them on",
    "console-login": r"logged in by itself: nobody; the profile names eve",
    "kernel-release": r"0\.0\.0-absent",
    "kernel-config": r"KVM|config\.gz",
}

#: Checks whose spoilt images have tests of their own.
ELSEWHERE = {
    "boots-on-bios", "boots-on-uefi", "image-self-contained", "image-clean", "image-never-written",
}  # fmt: skip


def spoil(image: SpoiltImage, mutants: tuple[Mutant, ...]) -> Path:
    """Spoil ``image`` in all these ways; returns the file."""
    for mutant in mutants:
        if mutant.spoil is not None:
            mutant.spoil(image)
    return image.path
