"""The image as a hypervisor: /dev/kvm, VMs inside, libvirt, and the check that ships in the image."""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Any

from recvirt.accept import tinyvm
from recvirt.accept.context import TEST_USER
from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed, Skipped
from recvirt.errors import GuestError

#: virt-host-validate(1) prints these; FAIL ends it with an error, WARN does not.
_VALIDATE_SECONDS = 60


@check("kvm-device", "first")
def kvm_device(guest: Guest) -> str:
    """/dev/kvm belongs to group kvm, whose members can open it, and nobody else can"""
    facts = guest.out("stat -c '%G %a' /dev/kvm")
    if facts not in ("kvm 660", "kvm 600"):
        raise Failed(f"/dev/kvm is {facts}")
    opened = guest.run("exec 3<>/dev/kvm", root=False)
    if opened.status != 0:
        raise Failed(f"{TEST_USER}, a member of kvm, can't open /dev/kvm: {opened.stderr.strip()}")
    if guest.run("setpriv --reuid=65534 --regid=65534 --clear-groups sh -c 'exec 3<>/dev/kvm'").status == 0:
        raise Failed("nobody can open /dev/kvm")
    return facts


@check("virt-host-validate", "first")
def virt_host_validate(guest: Guest) -> str:
    """libvirt's virt-host-validate qemu finds nothing missing"""
    acceptance = guest.acceptance
    if "libvirt-clients" not in acceptance.promises.packages:
        raise Skipped("the profile has no libvirt")
    said = guest.run("virt-host-validate qemu", seconds=_VALIDATE_SECONDS)
    failed = [line.strip() for line in said.lines if ": FAIL" in line]
    if said.status != 0 or failed or "PASS" not in said.stdout:
        raise Failed("\n".join(failed) or said.stdout + said.stderr)
    warned = [line.split(":")[1].strip() for line in said.lines if ": WARN" in line]
    return f"{said.stdout.count('PASS')} pass; warnings: {'; '.join(warned) or 'none'}"


def network_of(xml: str) -> ipaddress.IPv4Network:
    """The IPv4 subnet of a libvirt network's XML (formatnetwork)."""
    found = re.search(r"<ip address=['\"]([\d.]+)['\"][^>]*netmask=['\"]([\d.]+)['\"]", xml)
    if not found:
        raise Failed("libvirt's network has no IPv4 subnet")
    return ipaddress.IPv4Network(f"{found[1]}/{found[2]}", strict=False)


def clashes(subnet: ipaddress.IPv4Network, routes: list[dict[str, Any]]) -> list[str]:
    """Routes of other devices than libvirt's bridges that overlap ``subnet`` (``ip -json route``)."""
    found = []
    for route in routes:
        target = str(route.get("dst", "default"))
        device = str(route.get("dev", ""))
        if target == "default" or device.startswith("virbr"):
            continue
        if ipaddress.IPv4Network(target, strict=False).overlaps(subnet):
            found.append(f"{target} dev {device}")
    return found


def judge_libvirt_network(guest: Guest) -> ipaddress.IPv4Network:
    """The default network's subnet; Failed when it clashes with a route of the guest or can't be used."""
    xml = guest.out("virsh -c qemu:///system net-dumpxml default", seconds=60)
    subnet = network_of(xml)
    found = clashes(subnet, guest.json("ip -json -4 route show table all type unicast"))
    if found:
        raise Failed(f"libvirt's subnet {subnet} is also {', '.join(found)}")
    if guest.run("virsh -c qemu:///system net-info default | grep -q 'Active: *yes'").status != 0:
        guest.out("virsh -c qemu:///system net-start default", seconds=60)
    return subnet


@check("libvirt-network", "first")
def libvirt_network(guest: Guest) -> str:
    """libvirt's default network starts, on a subnet that the machine does not use itself"""
    acceptance = guest.acceptance
    if "libvirt-daemon-system" not in acceptance.promises.packages:
        raise Skipped("the profile has no libvirt")
    subnet = judge_libvirt_network(guest)
    said = guest.run(f"sudo -n -u {TEST_USER} virsh -c qemu:///system list --all")
    if said.status != 0:
        raise Failed(f"{TEST_USER}, a member of libvirt, can't use it: {said.stderr.strip()}")
    return str(subnet)


@check("l2-under-kvm", "first")
def l2_under_kvm(guest: Guest) -> str:
    """An L2 boots under KVM inside the image, and proves it"""
    acceptance = guest.acceptance
    found, sentence = tinyvm.prove(guest, deeper=acceptance.profile.root.nested)
    acceptance.measure("l2_exits", found.exits)
    guest.facts["l2-proved"] = True
    return sentence


@check("l2-needs-kvm", "first")
def l2_needs_kvm(guest: Guest) -> str:
    """With KVM unloaded the same check fails: it was not fooled"""
    modules = [name for name in ("kvm_amd", "kvm_intel") if guest.run(f"test -d /sys/module/{name}").status == 0]
    if not modules:
        raise Failed("neither kvm_amd nor kvm_intel is loaded")
    if not guest.facts.get("l2-proved"):
        # An L2 that never comes up would look as if it needed KVM.
        tinyvm.prove(guest, deeper=False)
    guest.out(f"modprobe -r {modules[0]} kvm")
    try:
        _, sentence = tinyvm.prove(guest, deeper=False)
    except (GuestError, Failed) as error:
        words = error.message.splitlines()[0]
        if "kvm" not in words.lower():
            raise Failed(f"without KVM the VM inside failed, but for another reason: {words}") from None
        return f"without {modules[0]}: {words}"
    finally:
        guest.out(f"modprobe {modules[0]}")
    raise Failed(f"without KVM the check still passed: {sentence}")


@check("nested-check-agrees", "first")
def nested_check_agrees(guest: Guest) -> str:
    """recvirt-nested-check, run by an ordinary member of kvm, says that nesting works"""
    acceptance = guest.acceptance
    if not guest.has("recvirt-nested-check"):
        raise Failed("recvirt-nested-check is not in the image")
    said = guest.run("recvirt-nested-check --json", root=False, seconds=120)
    if said.status != 0:
        raise Failed(f"it ended with status {said.status}: {(said.stdout or said.stderr)[-600:]}")
    try:
        facts = json.loads(said.stdout)
        states = {item["mode"]: item["state"] for item in facts["l2"]}
        counted = sum(int(item["kvm_counted"]["exits"]) for item in facts["l2"])
        verdict, deeper = facts["verdict"], facts["deeper"]
    except (ValueError, KeyError, TypeError) as error:
        raise Failed(f"its JSON lacks something ({error!r}): {said.stdout[:300]}") from None
    if verdict != "works" or set(states.values()) != {"proved"}:
        raise Failed(f"it says {verdict}: {states}")
    if acceptance.profile.root.nested and deeper is not True:
        raise Failed("it says that an L2 could not be a hypervisor itself")
    acceptance.measure("nested_check", facts)
    return f"{verdict}; L2 in {' and '.join(states)} mode, {counted} exits counted"
