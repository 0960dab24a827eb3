"""That the system comes up whole, on each firmware."""

from __future__ import annotations

import re

from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed, Skipped


def _firmware(guest: Guest) -> str:
    return "uefi" if guest.run("test -d /sys/firmware/efi").status == 0 else "bios"


def remember_identity(guest: Guest, scene: str) -> None:
    """Remember what must differ between copies."""
    keys = guest.out("for k in /etc/ssh/ssh_host_*_key.pub; do ssh-keygen -lf $k | cut -d' ' -f2; done")
    guest.acceptance.found[scene] = {
        "machine-id": guest.out("cat /etc/machine-id"),
        "host-keys": " ".join(keys.split()),
    }


def _settled(guest: Guest) -> str:
    acceptance = guest.acceptance
    allowed = acceptance.profile.accept.unit_failures_allowed
    failed = guest.failed_units(allowed)
    if failed:
        words = guest.out(f"journalctl -b --no-pager -n 15 -o cat -u {' -u '.join(failed)}")
        raise Failed(f"failed units: {', '.join(failed)}\n{words}")
    state = guest.facts.get("settled", "") or guest.out("systemctl is-system-running || :")
    if state not in ("running", "degraded"):
        raise Failed(f"systemd says the system is {state!r}: {guest.out('systemctl list-jobs --no-legend')}")
    return f"systemd: {state}, none failed"


@check("boots-on-bios", "first")
def boots_on_bios(guest: Guest) -> str:
    """The image boots on BIOS"""
    found = _firmware(guest)
    if found != "bios":
        raise Failed(f"it came up on {found}")
    return f"SeaBIOS; SSH login after {guest.boot_seconds:.0f} s"


@check("no-failed-unit", "first")
def no_failed_unit(guest: Guest) -> str:
    """After the first boot no unit has failed"""
    return _settled(guest)


@check("boot-time", "first")
def boot_time(guest: Guest) -> str:
    """Boot time (systemd-analyze) and memory in use are reported"""
    acceptance = guest.acceptance
    text = guest.out("systemd-analyze time")
    memory = guest.out("free -b | awk '/^Mem:/ {print $2, $3, $7}'").split()
    total, used, available = (int(word) for word in memory)
    acceptance.measure("systemd_analyze", text.splitlines()[0])
    acceptance.measure("boot_seconds", parse_analyze(text))
    acceptance.measure("memory_bytes", {"total": total, "used": used, "available": available})
    acceptance.measure("ssh_after_seconds", round(guest.boot_seconds, 1))
    return f"{text.splitlines()[0]}; {used / 1e6:.0f} MB of {total / 1e6:.0f} MB in use"


def parse_analyze(text: str) -> dict[str, float]:
    """``Startup finished in 1.2s (kernel) + 1min 3.4s (userspace) = ...`` as seconds by phase."""
    found: dict[str, float] = {}
    for amount, phase in re.findall(r"((?:\d+min )?[\d.]+m?s) \((\w+)\)", text):
        minutes = re.search(r"(\d+)min", amount)
        rest = re.search(r"([\d.]+)(m?s)$", amount)
        if rest:
            seconds = float(rest[1]) / (1000 if rest[2] == "ms" else 1)
            found[phase] = round((int(minutes[1]) * 60 if minutes else 0) + seconds, 3)
    if not found:
        raise Failed(f"systemd-analyze said: {text!r}")
    return found


@check("boots-on-uefi", "second")
def boots_on_uefi(guest: Guest) -> str:
    """The image boots on UEFI"""
    found = _firmware(guest)
    if found != "uefi":
        raise Failed(f"it came up on {found}")
    return f"OVMF; SSH login after {guest.boot_seconds:.0f} s"


@check("no-failed-unit-on-uefi", "second")
def no_failed_unit_on_uefi(guest: Guest) -> str:
    """On UEFI, with its NFS servers away, no unit has failed"""
    return _settled(guest)


@check("no-failed-unit-after-power-cuts", "powercut")
def no_failed_unit_after_power_cuts(guest: Guest) -> str:
    """After power cuts during the first boot the system comes up whole"""
    return f"{guest.facts['cuts']} cuts; {_settled(guest)}"


@check("whole-after-power-cuts", "powercut")
def whole_after_power_cuts(guest: Guest) -> str:
    """After power cuts the host keys, the machine-id and the file system are sound"""
    acceptance = guest.acceptance
    remember_identity(guest, "powercut")
    machine_id = acceptance.found["powercut"]["machine-id"]
    if not re.fullmatch(r"[0-9a-f]{32}", machine_id):
        raise Failed(f"the machine-id is {machine_id!r}")
    bad_keys = guest.out(
        "for k in /etc/ssh/ssh_host_*_key; do ssh-keygen -y -P '' -f $k >/dev/null 2>&1 || echo $k; done"
    )
    if bad_keys:
        raise Failed(f"host keys that can't be read: {bad_keys}")
    errors = guest.out("journalctl -b -k --no-pager -o cat | grep -E '(EXT4|XFS|BTRFS).*(error|corrupt)' || :")
    if errors:
        raise Failed(f"the file system complains:\n{errors}")
    empty = guest.out(
        "find /etc -xdev -type f -size 0 -newer /etc/os-release -not -name '*.lock' -not -name '.*' | head"
    )
    broken = [name for name in empty.splitlines() if name in _NEVER_EMPTY]
    if broken:
        raise Failed(f"empty after the power cuts: {', '.join(broken)}")
    return "host keys, machine-id and file system are sound"


_NEVER_EMPTY = ("/etc/machine-id", "/etc/hostname", "/etc/passwd", "/etc/shadow", "/etc/group", "/etc/hosts")


@check("screen-shows-something", "second")
def screen_shows_something(guest: Guest) -> str:
    """Under UEFI the screen is not left blank: the kernel has a console on it"""
    consoles = guest.out("cat /proc/consoles")
    if "tty0" not in consoles and "tty1" not in consoles:
        raise Failed(f"the kernel's consoles are only: {consoles}")
    drivers = guest.out("cat /sys/class/vtconsole/*/name")
    if "frame buffer" not in drivers and "VGA" not in drivers:
        raise Failed(f"no frame buffer console: {drivers}")
    return drivers.replace("\n", ", ")


@check("survives-reboot", "reboot")
def survives_reboot(guest: Guest) -> str:
    """A reboot keeps a marker file and the machine's identity, and no unit fails"""
    acceptance = guest.acceptance
    before = acceptance.found.get("first", {})
    word = guest.facts["reboot-word"]
    if (said := guest.out("cat /var/lib/recvirt-reboot-marker")) != word:
        raise Failed(f"the marker file says {said!r} instead of {word!r}")
    remember_identity(guest, "reboot")
    after = acceptance.found["reboot"]
    changed = [name for name in ("machine-id", "host-keys") if before and before[name] != after[name]]
    if changed:
        raise Failed(f"changed by a reboot: {', '.join(changed)}")
    guest.facts["settled"] = ""
    return f"back after {guest.facts['reboot-seconds']:.0f} s; {_settled(guest)}"


@check("rescue-needs-no-password", "first")
def rescue_needs_no_password(guest: Guest) -> str:
    """The boot menu offers emergency mode, which does not ask for a password that nobody has"""
    if guest.run("test -f /boot/grub/grub.cfg").status != 0:
        raise Skipped("there is no /boot/grub/grub.cfg to read")
    menu = guest.out("cat /boot/grub/grub.cfg")
    entries = [line for line in menu.splitlines() if re.search(r"rescue|emergency", line)]
    if not entries:
        raise Failed("no rescue or emergency entry in /boot/grub/grub.cfg")
    forced = guest.out("systemctl cat emergency.service rescue.service | grep -c SYSTEMD_SULOGIN_FORCE=1 || :")
    if "SYSTEMD_SULOGIN_FORCE=1" not in menu and not int(forced or 0) and "init=" not in menu:
        raise Failed("root is locked and sulogin is not told so (SYSTEMD_SULOGIN_FORCE=1): emergency mode has no shell")
    return f"{len(entries)} lines of the menu"
