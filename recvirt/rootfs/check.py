"""What the profile's root section may say: the rules that types and patterns of the model don't hold.

Every value that reaches a file of the image or a script is either checked here (or by the model's pattern) or quoted
where it is used; most are both. Owns the rules and their words. All faults are reported at once.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable

from recvirt.errors import ConfigError, Problem
from recvirt.model import Profile, Root
from recvirt.rootfs.lists import PACKAGE_NAME

_UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]+\.(service|socket|timer|path|mount|automount|swap|target|slice)")
_SYSCTL = re.compile(r"-?[A-Za-z0-9][A-Za-z0-9_*-]*([./][A-Za-z0-9_*-]+)+")
_DATASOURCE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_LOCALE = re.compile(r"(C|POSIX|[a-z]{2,3}(_[A-Z]{2})?)(\.[A-Za-z0-9-]+)?(@[a-z]+)?")
_ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*")
_MIRROR = re.compile(r"(https?://|file:/|copy:/)[^\s\[\]]+")
_KEY_TYPES = r"(?:ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(?:256|384|521)|sk-ssh-ed25519@openssh\.com|sk-ecdsa-sha2-nistp256@openssh\.com)"
_SSH_KEY = re.compile(rf"(?:\S.*\s)?(?P<type>{_KEY_TYPES})\s+(?P<blob>[A-Za-z0-9+/]+={{0,2}})(?:\s.*)?")
#: Accounts that every Debian has; making them again fails in the middle of a build.
_SYSTEM_USERS = frozenset(
    "root daemon bin sys sync games man lp mail news uucp proxy www-data backup list irc nobody _apt sshd "
    "messagebus systemd-network systemd-resolve systemd-timesync polkitd libvirt-qemu dnsmasq statd".split()
)


def is_ssh_key(line: str) -> bool:
    """Whether ``line`` is one entry of an authorized_keys file (sshd(8)): options, a type, a blob of that type."""
    match = _SSH_KEY.fullmatch(line.strip())
    if not match:
        return False
    try:
        blob = base64.b64decode(match["blob"], validate=True)
    except binascii.Error:
        return False
    # RFC 4253: the blob starts with the type's name, preceded by its length.
    name = match["type"].encode()
    return blob[: 4 + len(name)] == len(name).to_bytes(4, "big") + name and len(blob) > 4 + len(name)


def check_root(profile: Profile) -> None:
    """Raise ConfigError with everything that is wrong with ``profile.root``."""
    problems = [Problem(f"profile {profile.name}", 0, f"root.{path}", text) for path, text in _faults(profile.root)]
    if problems:
        raise ConfigError(problems, hint="recvirt profile show tells where each value comes from")


def _faults(root: Root) -> Iterable[tuple[str, str]]:
    yield from _patterns(root)
    yield from _users(root)
    if root.mirror is not None and not _MIRROR.fullmatch(root.mirror):
        yield "mirror", f"{root.mirror!r} is not the URL of an archive (http:, https: or file:)"
    if root.snapshot_mirror is not None and not _MIRROR.fullmatch(root.snapshot_mirror):
        yield "snapshot_mirror", f"{root.snapshot_mirror!r} is not a URL"
    for unit in sorted(set(root.services) & set(root.masked)):
        yield "masked", f"{unit} can't be enabled and masked at once"


def _patterns(root: Root) -> Iterable[tuple[str, str]]:
    for i, name in enumerate(root.packages):
        if not PACKAGE_NAME.fullmatch(name):
            yield f"packages[{i}]", f"{name!r} is not a Debian package name"
    for field in ("services", "masked"):
        for i, unit in enumerate(getattr(root, field)):
            if not _UNIT.fullmatch(unit):
                yield f"{field}[{i}]", f"{unit!r} is not a unit's name with its type, as ssh.service"
    for key in root.sysctl:
        if not _SYSCTL.fullmatch(key):
            yield "sysctl", f"{key!r} is not the name of a kernel parameter"
    for i, name in enumerate(root.cloud_init.datasources):
        if not _DATASOURCE.fullmatch(name):
            yield f"cloud_init.datasources[{i}]", f"{name!r} is not the name of a datasource"
    if not _LOCALE.fullmatch(root.locale):
        yield "locale", f"{root.locale!r} is not a locale, as C.UTF-8 or de_DE.UTF-8"
    if not _ZONE.fullmatch(root.timezone):
        yield "timezone", f"{root.timezone!r} is not a time zone, as Etc/UTC or Europe/Berlin"


def _users(root: Root) -> Iterable[tuple[str, str]]:
    names: set[str] = set()
    for i, user in enumerate(root.users):
        where = f"users[{i}]"
        if user.name in names:
            yield f"{where}.name", f"{user.name} is there twice"
        if user.name in _SYSTEM_USERS:
            yield f"{where}.name", f"{user.name} is an account of the system; root stays locked, give a user sudo instead"
        names.add(user.name)
        for k, key in enumerate(user.ssh_keys):
            if not is_ssh_key(key):
                yield f"{where}.ssh_keys[{k}]", f"{key[:40]!r} is not a public SSH key, as: ssh-ed25519 AAAA... comment"
    if root.console_autologin is not None and root.console_autologin not in names:
        yield "console_autologin", f"{root.console_autologin} is not one of root.users"
