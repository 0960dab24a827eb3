"""Life after the first boot: package upgrades."""

from __future__ import annotations

from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed, Skipped

APT = "apt-get -q -o DPkg::Lock::Timeout=120 -o Acquire::Retries=1 -o Acquire::http::Timeout=20"


@check("apt-upgrade", "second")
def apt_upgrade(guest: Guest) -> str:
    """apt update and upgrade work inside the image, where the archive can be reached"""
    sources = update(guest)
    guest.out(f"DEBIAN_FRONTEND=noninteractive {APT} -y --with-new-pkgs upgrade", seconds=600)
    guest.out("apt-get check && dpkg --audit", seconds=120)
    left = guest.out("apt-get -s -q upgrade | grep -c '^Inst ' || :")
    if left != "0":
        raise Failed(f"{left} packages are still to be upgraded")
    return f"{sources} sources; nothing left to upgrade"


def update(guest: Guest) -> int:
    """``apt-get update``; the number of sources. Skipped without a network, Failed when apt complains."""
    printed = guest.out("apt-get -q --print-uris update")
    uris = [word.strip("'") for word in printed.split() if word.startswith("'")]
    if not uris:
        raise Failed("the image has no package sources")
    hosts = {uri.split("/")[2].split(":")[0] for uri in uris if uri.startswith(("http://", "https://"))}
    away = sorted(host for host in hosts if guest.run(f"getent ahostsv4 {host}", seconds=30).status != 0)
    if away:
        raise Skipped("the archive's name does not resolve from here: no network")
    updated = guest.run(f"{APT} update", seconds=300)
    text = updated.stdout + updated.stderr
    if updated.status != 0 and any(
        word in text for word in ("Could not connect", "Network is unreachable", "timed out")
    ):
        raise Skipped("the archive can't be reached from here")
    if updated.status != 0 or "\nW: " in text or "\nE: " in text:
        raise Failed(f"apt-get update: {text[-800:]}")
    return len(uris)
