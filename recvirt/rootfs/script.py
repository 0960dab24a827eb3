"""The shell scripts of a build: what happens in the tree after its packages are installed, and in which order.

All are texts made by pure functions; every value is quoted with :func:`shlex.quote`. ``inside`` runs in the tree with
the tree's own programs, ``outside`` in the sandbox with the tree's path in ``$1``. Does not own: files (``files``).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from recvirt.model import User
from recvirt.rootfs.files import Facts
from recvirt.rootfs.localrepo import MOUNT_POINT

_Q = shlex.quote
#: Never wanted in the image: what belongs to one machine, and what only this build has left. Shell patterns.
MACHINE_FILES = (
    "/etc/ssh/ssh_host_*", "/etc/.pwd.lock", "/etc/*-", "/etc/ssl/private/ssl-cert-snakeoil.key",
    "/etc/ssl/certs/ssl-cert-snakeoil.pem", "/var/lib/systemd/random-seed", "/var/lib/systemd/credential.secret",
    "/var/lib/dbus/machine-id", "/var/lib/cloud/*", "/root/.ssh", "/root/.bash_history",
)  # fmt: skip
_BUILD_FILES = (
    "/var/log/apt/*", "/var/log/*.log", "/var/log/journal/*", "/var/cache/apt/*.bin", "/var/cache/apt/archives/*",
    "/var/cache/debconf/*-old", "/var/cache/debconf/tmp.ci", "/var/lib/dpkg/available", "/var/lib/dpkg/cmethopt",
    "/usr/share/info/dir", "/var/lib/dpkg/*-old", "/var/cache/ldconfig/aux-cache", "/var/lib/apt/lists/*",
    "/etc/dpkg/dpkg.cfg.d/99mmdebstrap", "/etc/apt/apt.conf.d/99mmdebstrap", "/etc/apt/sources.list.d/0000*",
    "/tmp/*", "/var/tmp/*", "/run/lock/*",
)  # fmt: skip
_RECVIRT_UNITS = {
    "etc/systemd/system/recvirt-first-boot.service": "recvirt-first-boot.service",
    "etc/systemd/system/recvirt-first-boot-done.service": "recvirt-first-boot-done.service",
    "etc/systemd/system/recvirt-gpt.service": "recvirt-gpt.service",
    "etc/systemd/system/recvirt-ssh-keys.service": "recvirt-ssh-keys.service",
    "etc/systemd/system/recvirt-nfs.service": "recvirt-nfs.service",
    "etc/systemd/system/recvirt-nfs.path": "recvirt-nfs.path",
    "etc/systemd/system/recvirt-libvirt-network.service": "recvirt-libvirt-network.service",
    "etc/systemd/system/recvirt-ssl-cert.service": "recvirt-ssl-cert.service",
}
_BASE_UNITS = ("systemd-networkd.service", "systemd-resolved.service", "fstrim.timer")
#: Both look for LVM, which is not here, at every boot and every week.
_UNWANTED_UNITS = ("e2scrub_reap.service", "e2scrub_all.timer")
#: NFS version 4 needs none of these, and two of them listen on the network. nfs-client.target (disabled, not masked)
#: brings what Kerberos needs.
_NFS_MASKED = (
    "rpcbind.service",
    "rpcbind.socket",
    "rpc-statd.service",
    "rpc-statd-notify.service",
    "nfs-blkmap.service",
)


@dataclass(frozen=True)
class Step:
    """One thing that the outside script does after the packages: an overlay's tar, or a hook. Paths of the sandbox."""

    kind: str  # "overlay", "chroot" or "host"
    label: str
    path: str


def inside_script(facts: Facts, file_paths: Sequence[str]) -> str:
    """Users, locale, time zone, links and units. Runs in the tree after our files were written."""
    root = facts.root
    lines = ["#!/bin/sh", "set -eu", 'say() { echo "recvirt: $*" >&2; }']
    if root.users:
        lines += _GROUPS_FUNCTION
    for user in root.users:
        lines += user_lines(user)
    lines += ["passwd --quiet --lock root"]
    if any(user.sudo for user in root.users):
        lines += ["visudo -c -q -f /etc/sudoers.d/recvirt"]
    lines += _locale_lines(root.locale, facts.has("locales")) + _zone_lines(root.timezone, root.suite)
    lines += ["ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf"]
    lines += [f"mkdir -p -m 755 {folder}" for folder in _FOLDERS]
    lines += _unit_lines(facts, file_paths)
    if facts.has("initramfs-tools"):
        # Once, now that fstab is there: the kernel's own scripts were told to leave it (INITRD=No).
        lines += ['for folder in /usr/lib/modules/*/; do update-initramfs -c -k "$(basename "$folder")"; done']
    return "\n".join(lines) + "\n"


_FOLDERS = ("/boot/efi", "/var/lib/recvirt", "/var/lib/recvirt/images", "/var/lib/recvirt/blocks")
_GROUPS_FUNCTION = [
    "need_group() { # USER GROUP",
    '    getent group "$2" >/dev/null && return',
    '    say "user $1: there is no group $2; no package of this profile makes it"',
    "    exit 1",
    "}",
]


def user_lines(user: User) -> list[str]:
    """Make one user: no password that could ever match, keys, groups."""
    name, home = _Q(user.name), _Q(f"/home/{user.name}")
    groups = sorted({*user.groups, *(("sudo",) if user.sudo else ())})
    lines = [f"need_group {name} {_Q(group)}" for group in groups]
    lines += [f"[ -x {_Q(user.shell)} ] || {{ say {_Q(f'user {user.name}: no shell {user.shell}')}; exit 1; }}"]
    option = f"--groups {_Q(','.join(groups))} " if groups else ""
    words = f"--create-home --home-dir {home} --user-group --shell {_Q(user.shell)} {option}--password '!'"
    lines += [f"useradd {words} -- {name}"]
    if user.ssh_keys:
        keys = " ".join(_Q(key.strip()) for key in user.ssh_keys)
        lines += [
            f"install -d -m 700 -o {name} -g {name} {home}/.ssh",
            f"install -m 600 -o {name} -g {name} /dev/null {home}/.ssh/authorized_keys",
            f"printf '%s\\n' {keys} > {home}/.ssh/authorized_keys",
        ]
    return lines


def _locale_lines(locale: str, has_locales: bool) -> list[str]:
    lines = ["ln -sf ../locale.conf /etc/default/locale"]
    if locale.split(".")[0] in ("C", "POSIX"):
        return lines
    if not has_locales:
        raise AssertionError("a locale without the package locales: packages_wanted adds it")
    return [
        f"grep -q -x -F -e {_Q(locale + ' ' + _charset(locale))} /usr/share/i18n/SUPPORTED || "
        f"{{ say {_Q(f'locale {locale} is unknown to Debian')}; exit 1; }}",
        f"printf '%s\\n' {_Q(locale + ' ' + _charset(locale))} > /etc/locale.gen",
        "locale-gen",
        *lines,
    ]


def _charset(locale: str) -> str:
    return locale.partition(".")[2].partition("@")[0] or "ISO-8859-1"


def _zone_lines(zone: str, suite: str) -> list[str]:
    path = _Q(f"/usr/share/zoneinfo/{zone}")
    lines = [
        f"[ -f {path} ] || {{ say {_Q(f'time zone {zone} is unknown to tzdata')}; exit 1; }}",
        f"ln -sfn {path} /etc/localtime",
    ]
    # Later releases read the link alone.
    return [*lines, f"printf '%s\\n' {_Q(zone)} > /etc/timezone"] if suite == "bookworm" else lines


def _unit_lines(facts: Facts, file_paths: Sequence[str]) -> list[str]:
    ours = [unit for path, unit in _RECVIRT_UNITS.items() if path in file_paths]
    masked = [*facts.root.masked, *(_NFS_MASKED if "etc/recvirt/nfs.conf" in file_paths else ())]
    lines = [f"systemctl enable {_Q(unit)}" for unit in (*_BASE_UNITS, *ours, *facts.root.services)]
    unwanted = [*_UNWANTED_UNITS, *(("nfs-client.target",) if "etc/recvirt/nfs.conf" in file_paths else ())]
    lines += [f"systemctl disable {unit}" for unit in unwanted]
    return lines + [f"systemctl mask {_Q(unit)}" for unit in masked]


def cleanup_script() -> str:
    """Remove what belongs to one machine or to this build alone. Runs in the tree, last."""
    patterns = " ".join((*MACHINE_FILES, *_BUILD_FILES))
    return "\n".join(
        [
            "#!/bin/sh",
            "set -eu",
            f"for path in {patterns}; do",
            '    rm -rf -- "$path"',
            "done",
            # Empty and there: PID 1 makes the id on the first boot and writes it here (machine-id(5)). Not
            # "uninitialized", which would let presets decide anew which units are enabled.
            ": > /etc/machine-id",
            "chmod 444 /etc/machine-id",
            # As new as /usr: the first boot need not work out again what packages have made (systemd-update-done(8)).
            "touch -r /usr /etc/.updated /var/.updated",
            "",
        ]
    )


#: Run inside the tree, so that no link of the tree leads out of it. Folders and links to folders that are there stay.
_UNPACK = "-x -C / --numeric-owner --same-permissions --no-overwrite-dir --keep-directory-symlink"


def outside_script(steps: Sequence[Step], scratch: str) -> str:
    """The one hook that the bootstrapper calls. ``$1`` is the tree; ``scratch`` holds what the build prepared."""
    at = _Q(scratch)
    lines = [
        "#!/bin/sh",
        "set -eu",
        "tree=$1",
        'say() { echo "recvirt: $*" >&2; }',
        "unpack() {",
        f'    chroot "$tree" tar {_UNPACK} -f - < "$1"',
        "}",
        f'if mountpoint -q "$tree"{MOUNT_POINT}; then umount "$tree"{MOUNT_POINT}; fi',
        f'rmdir "$tree"{MOUNT_POINT}',
        "say writing files",
        f"unpack {at}/files.tar",
        "say making users, locale and units",
        f'chroot "$tree" /bin/sh -s < {at}/inside.sh',
    ]
    for step in steps:
        lines += [f"say {_Q(f'{step.kind} {step.label}')}", *_step_lines(step)]
    lines += [
        "say cleaning",
        f'chroot "$tree" /bin/sh -s < {at}/cleanup.sh',
        f"chroot \"$tree\" dpkg-query -W -f '{DPKG_FORMAT}' > {at}/packages.tsv",
    ]
    return "\n".join(lines) + "\n"


#: One line a package for :func:`parse_packages`.
DPKG_FORMAT = (
    "${Package}\\t${Version}\\t${Architecture}\\t${source:Package}\\t${source:Version}\\t${Installed-Size}\\t"
    "${db:Status-Status}\\n"
)


def _step_lines(step: Step) -> list[str]:
    path = _Q(step.path)
    if step.kind == "overlay":
        return [f"unpack {path}"]
    if step.kind == "host":
        return [f'{path} "$tree" || {{ say {_Q(f"the hook {step.label} failed")}; exit 1; }}']
    return [
        f'install -m 700 {path} "$tree/run/hook"',
        f'chroot "$tree" /run/hook || {{ say {_Q(f"the hook {step.label} failed")}; exit 1; }}',
        'rm -f "$tree/run/hook"',
    ]


def parse_packages(text: str) -> list[dict[str, object]]:
    """``packages.tsv`` as the list of ``packages.json``, sorted by name."""
    found = []
    for line in text.splitlines():
        name, version, arch, source, source_version, size, status = line.split("\t")
        if status == "installed":
            found.append(
                {
                    "name": name, "version": version, "arch": arch, "source": source, "source_version": source_version,
                    "installed_kb": int(size or 0),
                }
            )  # fmt: skip
    return sorted(found, key=lambda item: str(item["name"]))
