"""The image file itself, and the comparison of two copies of it."""

from __future__ import annotations

from recvirt.accept.context import Acceptance
from recvirt.accept.registry import check
from recvirt.accept.results import Failed
from recvirt.qemu import check_image, image_info
from recvirt.store import sha256_of


@check("image-self-contained", "image")
def image_self_contained(acceptance: Acceptance) -> str:
    """The image has no backing or data file and no snapshot"""
    info = image_info(acceptance.tools, acceptance.image)
    found = []
    if info.get("backing-filename") or info.get("full-backing-filename"):
        found.append(f"a backing file: {info.get('backing-filename')}")
    if info.get("format-specific", {}).get("data", {}).get("data-file"):
        found.append("an external data file")
    if info.get("snapshots"):
        found.append(f"{len(info['snapshots'])} snapshots")
    if found:
        raise Failed("the image holds " + ", ".join(found))
    return f"{info['format']}, {info['virtual-size'] / 1024**3:.1f} GiB, nothing outside the file"


@check("image-clean", "image")
def image_clean(acceptance: Acceptance) -> str:
    """qemu-img check finds neither errors nor leaks"""
    found = check_image(acceptance.tools, acceptance.image)
    bad = {name: found[name] for name in ("check-errors", "corruptions", "leaks") if found.get(name)}
    if bad:
        raise Failed(f"qemu-img check: {bad}")
    return "no errors, no leaks"


@check("image-never-written", "pair")
def image_never_written(acceptance: Acceptance) -> str:
    """After all boots the image is still the same file"""
    now = sha256_of(acceptance.image)
    if now != acceptance.image_facts.sha256:
        raise Failed(f"its SHA-256 was {acceptance.image_facts.sha256} and is {now}")
    return f"SHA-256 {now}"


def _both(acceptance: Acceptance, what: str) -> tuple[str, str]:
    values = [str(acceptance.found.get(scene, {}).get(what, "")) for scene in ("first", "second")]
    if not all(values):
        raise Failed(f"one of the two copies told no {what}")
    return values[0], values[1]


@check("copies-differ-in-machine-id", "pair")
def copies_differ_in_machine_id(acceptance: Acceptance) -> str:
    """Two copies of the image get different machine-ids"""
    one, two = _both(acceptance, "machine-id")
    if one == two:
        raise Failed(f"both copies have the machine-id {one}")
    return f"{one[:8]}... and {two[:8]}..."


@check("copies-differ-in-host-keys", "pair")
def copies_differ_in_host_keys(acceptance: Acceptance) -> str:
    """Two copies of the image share no SSH host key"""
    one, two = _both(acceptance, "host-keys")
    shared = set(one.split()) & set(two.split())
    if shared:
        raise Failed(f"both copies have the SSH host keys {', '.join(sorted(shared))}")
    return f"{len(one.split())} and {len(two.split())} keys, none shared"
