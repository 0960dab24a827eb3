"""The kernel command line and the file that tells the boot menu about it. Pure functions.

Does not own: the menu itself (the package ``recvirt-boot`` writes it, here and in a running image).
"""

from __future__ import annotations

from collections.abc import Iterable

from recvirt.disk.layout import Layout


def command_line(layout: Layout, filesystem: str, extra: Iterable[str]) -> str:
    """Our words, then the profile's: of two with one name the kernel takes the last (consoles add up).

    The profile's were judged where it was read (``recvirt.model``): nothing that a shell or GRUB would act on.
    """
    words = (
        f"root=PARTUUID={layout.root.part_uuid}",
        f"rootfstype={filesystem}",
        "ro",
        # A power cut while the first boot grows the partition table can leave the primary one torn; with this word the
        # kernel takes the backup at the disk's end (block/partitions/efi.c).
        "gpt",
        # Disks may appear late; without an initramfs nobody else waits. With a limit, so that a kernel that can't see
        # its disk panics and the next boot takes the last good one.
        "rootwait=60",
        "panic=10",
        "loglevel=4",
        "console=tty0",
        # The last console is /dev/console: the one that a cloud's log shows.
        "console=ttyS0,115200",
    )
    return " ".join((*words, *(word for item in extra for word in item.split())))


def boot_conf(cmdline: str, timeout_seconds: int) -> str:
    """The content of /etc/recvirt/boot.conf. ``cmdline`` holds no quotes (``recvirt.model``)."""
    return (
        "# Read by recvirt-update-boot. Changes of yours belong into /etc/recvirt/boot.conf.d/NAME.conf, as\n"
        '#   CMDLINE="$CMDLINE mitigations=auto,nosmt"\n'
        "# then run recvirt-update-boot.\n"
        f"CMDLINE='{cmdline}'\n"
        f"TIMEOUT={timeout_seconds}\n"
    )
