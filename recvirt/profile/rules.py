"""Contradictions between the keys of a profile, each found on its own, so that one fault does not hide another.

Works on merged plain data that may still have wrong types: a rule that can't read what it needs says nothing, since the
types' own check does. Does not own: what a single value may be (:mod:`recvirt.model`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from recvirt.model import parse_size

Place = tuple[str | int, ...]
Finding = tuple[Place, str]


def conflicts(data: Any) -> list[Finding]:
    """Every contradiction in a merged profile: its place and what is wrong."""
    return [finding for rule in _RULES for finding in rule(data)]


def _get(data: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(data, dict):
            return None
        data = data.get(key)
    return data


def _texts(data: Any, *keys: str) -> list[str]:
    value = _get(data, *keys)
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _size(data: Any, *keys: str) -> int | None:
    value = _get(data, *keys)
    try:
        return parse_size(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _kernel_source(data: Any) -> Iterator[Finding]:
    source = _get(data, "kernel", "source")
    if source in ("tarball", "tree") and _get(data, "kernel", source) is None:
        yield ("kernel", "source"), f"is {source}, but kernel.{source} is not set"
    if source == "debian" and _get(data, "image", "initramfs") == "none":
        yield ("image", "initramfs"), "Debian's kernel has its disk drivers as modules: it needs initramfs: small"
    if source == "debian" and _get(data, "image", "guest_image") is True:
        yield ("image", "guest_image"), "the tiny guest has no initramfs: it needs a kernel that is built"
    if source == "debian" and _get(data, "kernel", "patches"):
        yield ("kernel", "patches"), "patches need a kernel that is built, not kernel: debian"
    if source in ("package", "tarball", "tree") and _get(data, "kernel", "fragments") == []:
        yield ("kernel", "fragments"), "a kernel of our own needs fragments (extend a shipped profile, or name some)"


#: A kernel that mounts its root itself needs the file system built in. ext4 is in the base fragment.
_ROOT_FRAGMENTS = {"xfs": ("61-root-xfs", "XFS_FS"), "btrfs": ("62-root-btrfs", "BTRFS_FS")}


def _root_filesystem(data: Any) -> Iterator[Finding]:
    filesystem = _get(data, "image", "filesystem")
    if filesystem not in _ROOT_FRAGMENTS or _get(data, "kernel", "source") == "debian":
        return
    fragment, symbol = _ROOT_FRAGMENTS[filesystem]
    if fragment not in _texts(data, "kernel", "fragments") and _get(data, "kernel", "overrides", symbol) != "y":
        message = f"the kernel can't mount {filesystem} as its root: add {fragment} to kernel.fragments"
        yield ("image", "filesystem"), message


def _tarball(data: Any) -> Iterator[Finding]:
    signature, keyring = (_get(data, "kernel", "tarball", key) for key in ("signature_url", "keyring"))
    if (signature is None) != (keyring is None):
        yield ("kernel", "tarball"), "signature_url and keyring go together"


def _snapshot(data: Any) -> Iterator[Finding]:
    if _get(data, "root", "snapshot") and not _get(data, "root", "snapshot_mirror"):
        yield ("root", "snapshot"), "needs root.snapshot_mirror, the base URL of a snapshot archive"
    if _get(data, "root", "snapshot") and _get(data, "root", "mirror"):
        yield ("root", "mirror"), "stands against root.snapshot: packages come from one of the two"


#: Accounts that every Debian has, or that our packages make; making them again fails in the middle of a build.
_SYSTEM_USERS = frozenset(
    "root daemon bin sys sync games man lp mail news uucp proxy www-data backup list irc nobody _apt sshd "
    "messagebus systemd-network systemd-resolve systemd-timesync polkitd libvirt-qemu dnsmasq statd".split()
)


def _users(data: Any) -> Iterator[Finding]:
    users = _get(data, "root", "users")
    names = [_get(user, "name") for user in users] if isinstance(users, list) else []
    for index, name in enumerate(names):
        if name is not None and name in names[:index]:
            yield ("root", "users", index, "name"), f"{name!r} stands twice in users"
        if name in _SYSTEM_USERS:
            message = f"{name} is an account of the system (root stays locked: give a user sudo instead)"
            yield ("root", "users", index, "name"), message
    login = _get(data, "root", "console_autologin")
    if login is not None and login not in names:
        yield ("root", "console_autologin"), f"{login!r} is none of root.users"


def _units(data: Any) -> Iterator[Finding]:
    masked = _texts(data, "root", "masked")
    for index, unit in enumerate(_texts(data, "root", "services")):
        if unit in masked:
            yield ("root", "services", index), f"{unit!r} is also in root.masked"


def _sizes(data: Any) -> Iterator[Finding]:
    size, esp = _size(data, "image", "size"), _size(data, "image", "esp_size")
    if size is not None and size < 512 * 1024**2:
        yield ("image", "size"), "a Debian root needs at least 512M"
    elif size is not None and esp is not None and esp * 2 > size:
        yield ("image", "esp_size"), "takes more than half of image.size"
    if esp is not None and esp < 33 * 1024**2:
        yield ("image", "esp_size"), "FAT32 needs at least 33M"
    memory = _size(data, "accept", "memory")
    if memory is not None and memory < 256 * 1024**2:
        yield ("accept", "memory"), "a guest needs at least 256M"


def _repeated(data: Any) -> Iterator[Finding]:
    for keys in (("kernel", "fragments"), ("root", "package_lists"), ("image", "formats"), ("root", "overlays")):
        items = _texts(data, *keys)
        for index, item in enumerate(items):
            if item in items[:index]:
                yield (*keys, index), f"{item!r} stands twice"


def _datasources(data: Any) -> Iterator[Finding]:
    enabled = _get(data, "root", "cloud_init", "enabled")
    if enabled is True and _get(data, "root", "cloud_init", "datasources") == []:
        yield ("root", "cloud_init", "datasources"), "cloud-init without a datasource finds nothing: name one, or None"


_RULES: tuple[Callable[[Any], Iterator[Finding]], ...] = (
    _kernel_source, _root_filesystem, _tarball, _snapshot, _users, _units, _sizes, _repeated, _datasources,
)  # fmt: skip
