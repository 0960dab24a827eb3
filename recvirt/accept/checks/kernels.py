"""Kernels that come, fail and go, and what is left on the serial console when nothing else works.

One boot plays all of it, in this order: a key's owner logs in on the console; a kernel of Debian's is installed and
tried; one that can't see its disk is tried and given up; the image's own is taken again and the others are removed; the
menu's emergency entry is started.
"""

from __future__ import annotations

import secrets
import shlex

from recvirt.accept.checks.lifecycle import APT, update
from recvirt.accept.context import TEST_USER
from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed, Skipped
from recvirt.errors import GuestError
from recvirt.qemu.ssh import make_key, sign

#: What a kernel is called that never comes up.
BROKEN = "99.0.0-broken"
GRUBENV = "/boot/efi/recvirt/grubenv"
_GRUBENV_BYTES = 1024
_STATUS = "recvirt-update-boot --status"


def _running(guest: Guest) -> str:
    return guest.out("uname -r", root=False)


def notes(guest: Guest) -> dict[str, set[str]]:
    """What is known of each kernel in /boot: running, saved, prev, next, tried, failed."""
    found = {}
    for line in guest.out(_STATUS).splitlines():
        version, _, words = line.partition(" (")
        found[version] = set(words.rstrip(")").split(", ")) - {""}
    return found


def _must_be(guest: Guest, version: str, *words: str) -> None:
    known = notes(guest)
    missing = sorted(set(words) - known.get(version, set()))
    if version not in known or missing:
        raise Failed(f"of {version} it is not known that it is {', '.join(missing) or 'there'}: {known}")


@check("key-opens-the-console", "kernels")
def key_opens_the_console(guest: Guest) -> str:
    """On the serial console the owner of a key logs in by a signature, and nobody with another key"""
    vm = guest.vm
    if vm is None:
        raise GuestError("a guest inside a guest has no console here")
    if (login := guest.acceptance.profile.root.console_autologin) is not None:
        raise Skipped(f"the profile logs {login} in without being asked")
    folder = guest.acceptance.work_dir
    limit = guest.acceptance.patience(60)
    for key in (make_key(folder, "stranger"), guest.acceptance.key):
        vm.mark()
        vm.type("\n", limit)
        vm.wait_for(r"login: $", limit)
        vm.type(f"{TEST_USER}\n", limit)
        # The person sees a command to copy; what is signed is the word in it.
        shown = vm.wait_for(rf"echo '{TEST_USER}@[^ ']+ [0-9a-f]{{32}}'", limit)
        vm.wait_for("An empty line gives up", limit)
        signature = sign(f"{shown.split(chr(39))[1]}\n", key, "recvirt-console")
        vm.mark()
        for line in signature.splitlines():
            vm.type(f"{line}\n", limit)
        if key is not guest.acceptance.key:
            vm.wait_for("Login incorrect", limit)
    vm.wait_for(rf"{TEST_USER}@[^ ]+[#$] $", limit)
    word = secrets.token_hex(8)
    # The console echoes what is typed: only a shell takes the quotes out.
    vm.type(f"id -un; echo '{word[:8]}''{word[8:]}'\n", limit)
    vm.wait_for(rf"(?m)^{TEST_USER}\n{word}$", limit)
    vm.type("exit\n", limit)
    return f"{TEST_USER} by its key; a stranger's is refused"


@check("new-kernel-is-kept", "kernels")
def new_kernel_is_kept(guest: Guest) -> str:
    """A kernel that apt installs is tried at the next boot, and is the default once it came up"""
    own = _running(guest)
    guest.facts["own-kernel"] = own
    stock = guest.acceptance.profile.kernel.source == "debian"
    package = "linux-image-amd64" if stock else "linux-image-cloud-amd64"
    update(guest)
    guest.out(f"DEBIAN_FRONTEND=noninteractive {APT} -y --no-install-recommends install {package}", seconds=1200)
    new = sorted(set(notes(guest)) - {own})
    if len(new) != 1:
        raise Failed(f"{package} brought {', '.join(new) or 'no kernel into the menu'}")
    _must_be(guest, new[0], "next")
    guest.facts["new-kernel"] = new[0]
    guest.reboot()
    if (running := _running(guest)) != new[0]:
        raise Failed(f"{running} runs after the reboot, not {new[0]}")
    _must_be(guest, new[0], "running", "saved")
    _must_be(guest, own, "prev")
    return f"{new[0]} instead of {own}"


_BROKEN_PACKAGE = f"""
set -e
d=$(mktemp -d /var/tmp/recvirt-broken.XXXXXX)
mkdir -p "$d/tree/DEBIAN" "$d/tree/boot"
cp "/boot/vmlinuz-$1" "$d/tree/boot/vmlinuz-{BROKEN}"
cat > "$d/tree/DEBIAN/control" <<'END'
Package: linux-image-{BROKEN}
Version: 1
Architecture: amd64
Maintainer: nobody <nobody@localhost>
Description: kernel that can't see its disk
END
for script in postinst postrm; do
    printf '#!/bin/sh\nset -e\nexport INITRD=No\nexec run-parts --arg=%s --arg=%s %s\n' \\
        {BROKEN} /boot/vmlinuz-{BROKEN} "/etc/kernel/$script.d" > "$d/tree/DEBIAN/$script"
    chmod 755 "$d/tree/DEBIAN/$script"
done
dpkg-deb --root-owner-group -b "$d/tree" "$d/broken.deb"
dpkg -i "$d/broken.deb"
rm -r "$d"
"""


@check("failing-kernel-is-given-up", "kernels")
def failing_kernel_is_given_up(guest: Guest) -> str:
    """A kernel that does not come up is tried once; the next boot takes the one before"""
    before = _running(guest)
    # A kernel with its disk drivers as modules, and no initramfs to load them: it waits for its root, and panics.
    source = guest.facts.get("new-kernel", before)
    guest.out(f"sh -c {shlex.quote(_BROKEN_PACKAGE)} sh {source}", seconds=120)
    _must_be(guest, BROKEN, "next")
    seconds = guest.reboot()
    if (running := _running(guest)) != before:
        raise Failed(f"{running} runs after the reboot, not {before}")
    _must_be(guest, BROKEN, "failed")
    _must_be(guest, before, "running", "saved")
    return f"{before} runs again after {seconds:.0f} s"


@check("removed-kernels-leave-the-menu", "kernels")
def removed_kernels_leave_the_menu(guest: Guest) -> str:
    """After the others are removed only the image's own kernel is in the menu, and it can't be removed"""
    own = guest.facts.get("own-kernel", _running(guest))
    if _running(guest) != own:
        guest.out(f"recvirt-update-boot --try {own}")
        guest.reboot()
        _must_be(guest, own, "running", "saved")
    others = sorted(set(notes(guest)) - {own})
    if not others:
        raise Failed("there is no other kernel in the menu to be removed")
    packages = {guest.out(f"dpkg -S /boot/vmlinuz-{version}").split(":")[0] for version in others}
    guest.out(f"DEBIAN_FRONTEND=noninteractive {APT} -y purge {' '.join(sorted(packages))}", seconds=300)
    if set(left := notes(guest)) != {own}:
        raise Failed(f"in the menu after the removal: {left}")
    entries = guest.out("grep -c 'linux /boot/vmlinuz-' /boot/grub/grub.cfg")
    if entries != guest.out(f"grep -c 'linux /boot/vmlinuz-{own} ' /boot/grub/grub.cfg"):
        raise Failed("the menu names kernels that are gone")
    last = guest.run(f"DEBIAN_FRONTEND=noninteractive {APT} -y purge $(dpkg -S /boot/vmlinuz-{own} | cut -d: -f1)")
    if last.status == 0 or guest.run(f"test -f /boot/vmlinuz-{own}").status != 0:
        raise Failed("the only kernel could be removed")
    return f"{', '.join(others)} removed; {own} is kept"


@check("emergency-entry-opens-a-shell", "kernels")
def emergency_entry_opens_a_shell(guest: Guest) -> str:
    """The menu's emergency entry gives a root shell on the serial console, without a password"""
    vm = guest.vm
    if vm is None:
        raise GuestError("a guest inside a guest has no console here")
    entry = f"{_running(guest)}-emergency"
    kept = [line for line in guest.out(f"cat {GRUBENV}").splitlines() if "=" in line and "next_entry" not in line]
    block = "\n".join(["# GRUB Environment Block", *kept, f"next_entry={entry}", ""]).ljust(_GRUBENV_BYTES, "#")
    guest.copy_in(block.encode(), "/var/tmp/grubenv")
    guest.out(f"dd if=/var/tmp/grubenv of={GRUBENV} bs={_GRUBENV_BYTES} conv=notrunc,fsync status=none")
    guest.out("systemctl --no-block reboot")
    guest.access.close_shared()
    vm.mark()
    patience = guest.acceptance.patience
    limit = patience(guest.acceptance.profile.accept.boot_seconds)
    vm.wait_for(r"Press Enter for (system )?maintenance", limit)
    word = secrets.token_hex(8)
    vm.type("\n")
    vm.wait_for(r"[#\$] $", patience(60))
    # The console echoes what is typed: only a shell takes the quotes out.
    vm.type(f"id -u; echo '{word[:8]}''{word[8:]}'\n", patience(60))
    vm.wait_for(rf"(?m)^0\n{word}$", patience(60))
    vm.type("systemctl --force reboot\n", patience(60))
    vm.mark()
    vm.wait_ssh(guest.access, limit)
    guest.wait_settled()
    failed = guest.failed_units(guest.acceptance.profile.accept.unit_failures_allowed)
    if failed:
        raise Failed(f"failed units in the boot after it: {', '.join(failed)}")
    return f"{entry}: a root shell; the boot after it is an ordinary one"
