"""The kernel command line and the file that tells the boot menu about it. Pure functions.

Does not own: the menu itself (the package ``recvirt-boot`` writes it, here and in a running image).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from recvirt.disk.layout import Layout
from recvirt.errors import ConfigError, Problem

#: What a word may hold: enough for every documented parameter, nothing that GRUB's or a shell's parser would act on.
_WORD = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.,:=/@%+*!~^-]*$")
#: Words that would contradict what the image stage knows.
_OWNED = ("root", "rootfstype", "BOOT_IMAGE", "recvirt.trial")


def check_words(words: Iterable[str], where: str = "kernel.cmdline") -> tuple[str, ...]:
    """The profile's words, split at blanks. ConfigError names every word that is refused, and why."""
    found: list[str] = []
    problems: list[Problem] = []
    for index, item in enumerate(words):
        for word in item.split():
            path = f"{where}[{index}]"
            if not _WORD.match(word):
                problems.append(Problem("profile", 0, path, f"{word!r} can't stand on a kernel command line here"))
            elif word.split("=", 1)[0] in _OWNED:
                problems.append(Problem("profile", 0, path, f"{word!r}: the image sets this word itself"))
            else:
                found.append(word)
    if problems:
        raise ConfigError(problems, hint="one parameter a line, without quotes, as mitigations=auto")
    return tuple(found)


def command_line(layout: Layout, filesystem: str, extra: Iterable[str]) -> str:
    """Our words, then the profile's: of two with one name the kernel takes the last (consoles add up)."""
    words = (
        f"root=PARTUUID={layout.root.part_uuid}",
        f"rootfstype={filesystem}",
        "ro",
        # Disks may appear late; without an initramfs nobody else waits. With a limit, so that a kernel that can't see
        # its disk panics and the next boot takes the last good one.
        "rootwait=60",
        "panic=10",
        "loglevel=4",
        "console=tty0",
        # The last console is /dev/console: the one that a cloud's log shows.
        "console=ttyS0,115200",
    )
    return " ".join((*words, *extra))


def boot_conf(cmdline: str, timeout_seconds: int) -> str:
    """The content of /etc/recvirt/boot.conf. ``cmdline`` holds checked words only, so single quotes are safe."""
    return (
        "# Read by recvirt-update-boot. Changes of yours belong into /etc/recvirt/boot.conf.d/NAME.conf, as\n"
        '#   CMDLINE="$CMDLINE mitigations=auto,nosmt"\n'
        "# then run recvirt-update-boot.\n"
        f"CMDLINE='{cmdline}'\n"
        f"TIMEOUT={timeout_seconds}\n"
    )
