"""An older disk of the Nested Cloud becomes this version by apt, and what it runs runs on."""

from __future__ import annotations

import secrets
import shlex
from typing import Any

from recvirt.accept.checks.lifecycle import APT, update
from recvirt.accept.checks.nestedcloud import (
    INSTANCE,
    cloud,
    cloud_is_set_up,
    domain_of,
    inside,
    instance_key,
    operation,
    wait_for,
)
from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed

_FOLDER = "/var/tmp/recvirt-upgrade"
_APT_SECONDS = 900
_LATER = "later"


def _versions(guest: Guest) -> dict[str, str]:
    """Our packages that are there, and their versions."""
    rows = guest.out("dpkg-query -W -f '${db:Status-Abbrev} ${Package} ${Version}\\n' 'recvirt-cloud*'").splitlines()
    return {name: version for state, name, version in (row.split() for row in rows) if state == "ii"}


def _process(guest: Guest, domain: str) -> str:
    """The QEMU of a domain: its process, and since when it runs."""
    pid = guest.out(f"cat /run/libvirt/qemu/{shlex.quote(domain)}.pid")
    return f"{pid} {guest.out(f'stat -c %Y /proc/{pid}')}"


def _instances(guest: Guest) -> list[tuple[str, str]]:
    rows: list[dict[str, Any]] = cloud(guest, "list")
    return sorted((row["name"], row["uuid"]) for row in rows)


@check("cloud-upgrades-under-instances", "upgrade")
def cloud_upgrades_under_instances(guest: Guest) -> str:
    """An older cloud gets this build's packages by apt; its instance runs on meanwhile, and is known afterwards"""
    cloud_is_set_up(guest)
    operation(guest, "launch", INSTANCE, "--ssh-key", f"{instance_key(guest)}.pub", "--memory", "256M")
    word = secrets.token_hex(16)
    inside(guest, f"echo {word} > /dev/shm/word")
    domain = domain_of(guest, INSTANCE)
    before, process, known = _versions(guest), _process(guest, domain), _instances(guest)

    update(guest)
    guest.out(f"mkdir -p {_FOLDER} && chmod 1777 {_FOLDER}")
    wanted = guest.acceptance.debs
    packages = {name: path for name, path in wanted.items() if name.startswith("recvirt-cloud")}
    for name, path in packages.items():
        guest.copy_in(path.read_bytes(), f"{_FOLDER}/{name}.deb")
    files = " ".join(f"{_FOLDER}/{name}.deb" for name in packages)
    new = {name: guest.out(f"dpkg-deb -f {_FOLDER}/{name}.deb Version") for name in packages}
    if not any(
        guest.run(f"dpkg --compare-versions {old} lt {max(new.values())}").status == 0 for old in before.values()
    ):
        raise Failed(f"nothing on the disk is older than {new}: it has {before}")
    guest.out(f"DEBIAN_FRONTEND=noninteractive {APT} -y install {files}", seconds=_APT_SECONDS)
    after = _versions(guest)
    if after != new:
        raise Failed(f"the packages are {after}, not {new}")

    said = cloud_is_set_up(guest)
    if _process(guest, domain) != process:
        raise Failed(f"{domain} did not run on: it was begun again")
    if inside(guest, "cat /dev/shm/word") != word:
        raise Failed(f"{domain} has lost what was in its memory")
    if _instances(guest) != known:
        raise Failed(f"the cloud knew {known} before, and knows {_instances(guest)} now")
    # The new version works on what the old one made, and makes its own.
    operation(guest, "snapshot", INSTANCE, "upgraded")
    operation(guest, "launch", _LATER, "--memory", "128M")
    operation(guest, "stop", INSTANCE)
    operation(guest, "start", INSTANCE)
    wait_for(guest, f"{INSTANCE} runs", lambda: cloud(guest, "show", INSTANCE)["power"] == "running")
    olds = ", ".join(sorted(set(before.values())))
    return f"from {olds} to {', '.join(sorted(set(new.values())))}: {said}; {domain} ran on"
