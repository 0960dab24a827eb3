"""One level down: the L2 is the image itself, and runs an L3."""

from __future__ import annotations

import base64
import hashlib
import secrets

from recvirt.accept import tinyvm
from recvirt.accept.checks.virtual import judge_libvirt_network
from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed, Skipped

_FILE_BYTES = 1_000_000


@check("image-boots-as-l2", "deep")
def image_boots_as_l2(guest: Guest) -> str:
    """The image boots under KVM inside itself, as an L2, with no failed unit"""
    acceptance = guest.acceptance
    kind = guest.out("systemd-detect-virt", root=False)
    if kind != "kvm":
        raise Failed(f"the L2 says that it runs on {kind}")
    exits = tinyvm.sum_exits(guest.facts["qmp"].execute("query-stats", {"target": "vcpu"}))
    if exits.get("exits", 0) < tinyvm.EXITS_MIN:
        raise Failed(f"the L1's KVM counted {exits.get('exits', 0)} exits of the L2")
    failed = guest.failed_units(acceptance.profile.accept.unit_failures_allowed)
    if failed:
        raise Failed(f"failed units in the L2: {', '.join(failed)}")
    return f"the L1's KVM counted {exits['exits']} exits; {guest.out('systemd-analyze time').splitlines()[0]}"


@check("libvirt-network-in-l2", "deep")
def libvirt_network_in_l2(guest: Guest) -> str:
    """In the L2, which lives on the L1's libvirt network, libvirt takes another subnet"""
    outer = guest.facts["outer"].facts.get("subnet")
    if outer is None:
        raise Skipped("the profile has no libvirt")
    inner = judge_libvirt_network(guest)
    if inner.overlaps(outer):
        raise Failed(f"L1 and L2 both use {inner}")
    return f"L1: {outer}, L2: {inner}"


@check("file-to-l2-and-back", "deep")
def file_to_l2_and_back(guest: Guest) -> str:
    """A file goes through the L1 into the L2 and comes back unchanged"""
    data = secrets.token_bytes(_FILE_BYTES)
    guest.copy_in(data, "/var/tmp/recvirt-file")
    inside = guest.out("sha256sum < /var/tmp/recvirt-file").split()[0]
    back = base64.b64decode(guest.out("base64 -w 0 /var/tmp/recvirt-file"))
    if inside != hashlib.sha256(data).hexdigest() or back != data:
        raise Failed(f"{len(data)} bytes went in, {len(back)} came back, and they differ")
    return f"{len(data)} bytes"


@check("l3-under-kvm", "deep")
def l3_under_kvm(guest: Guest) -> str:
    """An L3 boots under KVM in the L2, and proves it"""
    acceptance = guest.acceptance
    found, sentence = tinyvm.prove(guest, deeper=False)
    acceptance.measure("l3_exits", found.exits)
    return sentence
