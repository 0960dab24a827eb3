"""First-boot data: that what NoCloud says is carried out."""

from __future__ import annotations

from recvirt.accept.boots import MARKER_PATH
from recvirt.accept.context import TEST_USER
from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed


@check("cloud-init-status", "first")
def cloud_init_status(guest: Guest) -> str:
    """cloud-init has finished without errors, from the NoCloud data source"""
    said = guest.run("cloud-init status --long --wait", seconds=120).stdout
    if "status: done" not in said:
        raise Failed(f"cloud-init says: {said.strip()[-600:]}")
    source = guest.out("cat /run/cloud-init/cloud-id 2>/dev/null || readlink /run/cloud-init/cloud-id")
    if source != "nocloud":
        raise Failed(f"its data source is {source!r}")
    errors = guest.out(
        'python3 -c \'import json; print(json.load(open("/run/cloud-init/result.json"))["v1"]["errors"])\''
    )
    if errors.strip() != "[]":
        raise Failed(f"cloud-init's errors: {errors}")
    return "done, from NoCloud"


@check("cloud-init-data-applied", "first")
def cloud_init_data_applied(guest: Guest) -> str:
    """Host name, user, groups, key and file of the NoCloud data are there"""
    acceptance = guest.acceptance
    wrong = []
    name = guest.out("hostname", root=False) if guest.has("hostname") else guest.out("cat /proc/sys/kernel/hostname")
    if name != guest.cloud.hostname:
        wrong.append(f"the host name is {name} instead of {guest.cloud.hostname}")
    groups = guest.out(f"id -Gn {TEST_USER}").split()
    absent = sorted(set(guest.cloud.groups) - set(groups))
    if absent:
        wrong.append(f"{TEST_USER} is not in {', '.join(absent)}")
    for path, content in guest.cloud.files:
        said = guest.run(f"cat {path}")
        if said.stdout != content:
            wrong.append(f"{path} holds {said.stdout[:60]!r}")
    keys = guest.out(f"cat ~{TEST_USER}/.ssh/authorized_keys")
    if acceptance.public_key.split()[1] not in keys:
        wrong.append("the key is missing")
    if wrong:
        raise Failed("; ".join(wrong))
    return f"{name}, {TEST_USER} in {' '.join(guest.cloud.groups)}, {len(guest.cloud.files)} files"


@check("cloud-init-survives-power-cuts", "powercut")
def cloud_init_survives_power_cuts(guest: Guest) -> str:
    """After power cuts cloud-init still carries out its data"""
    said = guest.run("cloud-init status --long --wait", seconds=120).stdout
    if "status: done" not in said:
        raise Failed(f"cloud-init says: {said.strip()[-600:]}")
    marker = guest.run(f"cat {MARKER_PATH}").stdout
    if marker != guest.cloud.files[0][1]:
        raise Failed(f"{MARKER_PATH} holds {marker[:60]!r}")
    return "done, and the file is there"
