"""First-boot data: that what a NoCloud seed or a config drive says is carried out."""

from __future__ import annotations

import json

from recvirt.accept.boots import CONFIG_DRIVE, MARKER_PATH
from recvirt.accept.context import TEST_USER
from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed, Skipped


@check("cloud-init-status", "first")
def cloud_init_status(guest: Guest) -> str:
    """cloud-init has finished without errors, from the NoCloud data source"""
    _must_come_from(guest, "nocloud")
    return "done, from NoCloud"


def _must_come_from(guest: Guest, wanted: str) -> None:
    said = guest.run("cloud-init status --long --wait", seconds=120).stdout
    if "status: done" not in said:
        raise Failed(f"cloud-init says: {said.strip()[-600:]}")
    data = json.loads(guest.out("cat /run/cloud-init/result.json"))["v1"]
    if not str(data["datasource"]).lower().startswith(f"datasource{wanted.lower()}"):
        raise Failed(f"its data source is {data['datasource']!r}")
    if data["errors"]:
        raise Failed(f"cloud-init's errors: {data['errors']}")


@check("config-drive", "second")
def config_drive(guest: Guest) -> str:
    """On a config drive, as OpenStack attaches one, cloud-init finds its data"""
    if CONFIG_DRIVE not in guest.acceptance.profile.root.cloud_init.datasources:
        raise Skipped(f"{CONFIG_DRIVE} is not among the profile's datasources")
    _must_come_from(guest, CONFIG_DRIVE)
    instance = guest.out("cat /var/lib/cloud/data/instance-id")
    if instance != guest.cloud.instance_id:
        raise Failed(f"it takes itself for {instance}, not {guest.cloud.instance_id}")
    for path, content in guest.cloud.files:
        if (said := guest.run(f"cat {path}").stdout) != content:
            raise Failed(f"{path} holds {said[:60]!r}")
    return f"instance {instance}, {len(guest.cloud.files)} files"


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
    if (rights := guest.run("sudo -n true", root=False)).status != 0:
        raise Failed(f"{TEST_USER} may not use sudo: {rights.stderr.strip()}")
    said = guest.run("cloud-init status --long --wait", seconds=120).stdout
    if "status: done" not in said:
        raise Failed(f"cloud-init says: {said.strip()[-600:]}")
    marker = guest.run(f"cat {MARKER_PATH}").stdout
    if marker != guest.cloud.files[0][1]:
        raise Failed(f"{MARKER_PATH} holds {marker[:60]!r}")
    return "done, and the file is there"
