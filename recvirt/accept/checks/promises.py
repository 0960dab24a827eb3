"""What the profile promises: packages, users, modules, kernel configuration, parameters, services, files."""

from __future__ import annotations

import re

from recvirt.accept.context import Acceptance
from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed, Skipped


@check("packages", "first")
def packages(guest: Guest) -> str:
    """Every package of the profile is installed, and dpkg is content"""
    acceptance = guest.acceptance
    wanted = set(acceptance.promises.packages)
    if not wanted:
        raise Skipped("the profile names no packages")
    listed = guest.out("dpkg-query -W -f '${db:Status-Abbrev} ${Package}\\n'")
    states = {line.split()[-1]: line.split()[0] for line in listed.splitlines() if line.strip()}
    missing = sorted(name for name in wanted if states.get(name) != "ii")
    if missing:
        raise Failed(f"not installed: {', '.join(missing)}")
    broken = sorted(name for name, state in states.items() if state not in ("ii", "rc", "hi"))
    audit = guest.out("dpkg --audit")
    if broken or audit:
        raise Failed(f"half-installed: {', '.join(broken)} {audit}")
    return f"{len(wanted)} asked for, {len(states)} installed"


@check("users", "first")
def users(guest: Guest) -> str:
    """Every user of the profile is there, with its groups, shell, keys and rights"""
    acceptance = guest.acceptance
    wanted = acceptance.profile.root.users
    if not wanted:
        raise Skipped("the profile names no users")
    wrong: list[str] = []
    for user in wanted:
        account = guest.host.user(user.name)
        if not account.exists:
            wrong.append(f"{user.name} is missing")
            continue
        absent = sorted(set(user.groups) - set(account.groups))
        wrong += [f"{user.name} is not in {', '.join(absent)}"] if absent else []
        wrong += [f"{user.name}'s shell is {account.shell}"] if account.shell != user.shell else []
        keys = guest.run(f"cat {account.home}/.ssh/authorized_keys").stdout
        wrong += [f"a key of {user.name} is missing" for key in user.ssh_keys if key.split()[1] not in keys]
        may = guest.run(f"sudo -n -l -U {user.name} | grep -q NOPASSWD").status == 0
        wrong += [f"{user.name} {'has' if may else 'has no'} sudo"] if may != user.sudo else []
    if wrong:
        raise Failed("; ".join(wrong))
    return ", ".join(user.name for user in wanted)


@check("modules", "first")
def modules(guest: Guest) -> str:
    """Every kernel module of the profile is loaded"""
    acceptance = guest.acceptance
    wanted = acceptance.profile.root.modules
    if not wanted:
        raise Skipped("the profile names no modules")
    command = (
        "for m in {}; do test -d /sys/module/$(echo $m | tr - _)"
        " || grep -q /$m.ko /lib/modules/$(uname -r)/modules.builtin || echo $m; done"
    )
    missing = guest.out(command.format(" ".join(wanted))).split()
    if missing:
        raise Failed(f"not loaded: {', '.join(missing)}")
    return ", ".join(wanted)


@check("kernel-release", "first")
def kernel_release(guest: Guest) -> str:
    """The kernel that runs is the one that was built, and the image's dpkg knows it"""
    acceptance = guest.acceptance
    running = guest.out("uname -r", root=False)
    said = _find_release(acceptance)
    if said and running != said:
        raise Failed(f"{running} runs, {said} was put in")
    owner = guest.run(f"dpkg -S /boot/vmlinuz-{running}")
    if owner.status != 0:
        raise Failed(f"no package owns /boot/vmlinuz-{running}")
    if not guest.run(f"test -d /lib/modules/{running}").status == 0:
        raise Failed(f"no modules of {running}")
    acceptance.measure("kernel_release", running)
    return f"{running}, of {owner.stdout.split(':')[0]}"


def _find_release(acceptance: Acceptance) -> str:
    facts = acceptance.promises.facts
    kernel = facts.get("kernel")
    for value in (facts.get("kernel_release"), kernel.get("release") if isinstance(kernel, dict) else None):
        if isinstance(value, str):
            return value
    return ""


def parse_config(text: str) -> dict[str, str]:
    """Symbol to value out of a ``.config``; symbols that are off are left out."""
    return dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, flags=re.MULTILINE))


@check("kernel-config", "first")
def kernel_config(guest: Guest) -> str:
    """The running kernel's configuration is the one that was resolved and audited, symbol by symbol"""
    acceptance = guest.acceptance
    if acceptance.promises.kernel_config is None:
        raise Skipped("no resolved configuration is known for this image")
    # Debian's kernels don't carry theirs inside.
    text = guest.out("if [ -e /proc/config.gz ]; then zcat /proc/config.gz; else cat /boot/config-$(uname -r); fi")
    running = parse_config(text)
    wanted = parse_config(acceptance.promises.kernel_config)
    different = sorted(
        f"{name}: {running.get(name, 'off')} instead of {wanted.get(name, 'off')}"
        for name in set(running) | set(wanted)
        if running.get(name) != wanted.get(name) and not name.startswith(_TOOLCHAIN)
    )
    if different:
        text = f"{len(different)} symbols differ: " + "; ".join(different[:12])
        if running.get("LOCALVERSION") != wanted.get("LOCALVERSION"):
            text += "\nthe image is of another build than the configuration beside it: recvirt build makes them one"
        raise Failed(text)
    return f"{len(wanted)} symbols agree"


#: What kbuild finds out about the compiler anew at each build; no promise of a fragment.
_TOOLCHAIN = (
    "CC_VERSION",
    "GCC_VERSION",
    "LD_VERSION",
    "AS_VERSION",
    "CLANG_VERSION",
    "LLD_VERSION",
    "PAHOLE_VERSION",
    "RUSTC",
)


@check("nested-parameters", "first")
def nested_parameters(guest: Guest) -> str:
    """KVM allows nesting: in the loaded module, and in what is set for the other processor's"""
    acceptance = guest.acceptance
    if not acceptance.profile.root.nested:
        raise Skipped("the profile does not ask for nesting")
    loaded = guest.out(
        "grep -H . /sys/module/kvm_amd/parameters/nested /sys/module/kvm_intel/parameters/nested 2>/dev/null || :"
    )
    values = [line.split(":")[1] for line in loaded.splitlines()]
    if not values:
        raise Failed("neither kvm_amd nor kvm_intel is loaded")
    off = [line for line in loaded.splitlines() if line.split(":")[1] not in ("1", "Y")]
    if off:
        raise Failed(f"nesting is off: {', '.join(off)}")
    options = guest.out("modprobe --showconfig | grep -E '^options kvm_(intel|amd) ' || :")
    cmdline = guest.out("cat /proc/cmdline")
    for module in ("kvm_intel", "kvm_amd"):
        said = re.findall(rf"^options {module} .*\bnested=(\w+)", options, re.MULTILINE)
        said += re.findall(rf"\b{module}\.nested=(\w+)", cmdline)
        if not said or any(value not in ("1", "Y") for value in said):
            raise Failed(f"{module}.nested is not set to 1 for the next load (modprobe.d or the command line): {said}")
    return loaded.replace("/sys/module/", "").replace("\n", ", ")


@check("sysctls", "first")
def sysctls(guest: Guest) -> str:
    """Every kernel parameter of the profile has its value"""
    acceptance = guest.acceptance
    wanted = acceptance.profile.root.sysctl
    if not wanted:
        raise Skipped("the profile sets no kernel parameters")
    wrong = []
    for name, value in wanted.items():
        found = guest.run(f"sysctl -n {name.removeprefix('-')}").stdout.split()
        if found != value.split():
            wrong.append(f"{name} is {' '.join(found)} instead of {value}")
    if wrong:
        raise Failed("; ".join(wrong))
    return f"{len(wanted)} values"


@check("services", "first")
def services(guest: Guest) -> str:
    """Units that the profile enables are enabled and have not failed; units that it masks are masked"""
    acceptance = guest.acceptance
    root = acceptance.profile.root
    if not root.services and not root.masked:
        raise Skipped("the profile names no units")
    wrong = []
    for unit in root.services:
        state = guest.run(f"systemctl is-enabled {unit}").stdout.strip()
        wrong += [f"{unit} is {state or 'unknown'}"] if not state.startswith(("enabled", "static", "alias")) else []
        failed = guest.run(f"systemctl is-failed {unit}").stdout.strip() == "failed"
        wrong += [f"{unit} has failed"] if failed else []
    for unit in root.masked:
        state = guest.run(f"systemctl is-enabled {unit}").stdout.strip()
        wrong += [f"{unit} is {state or 'unknown'} instead of masked"] if not state.startswith("masked") else []
    if wrong:
        raise Failed("; ".join(wrong))
    return f"{len(root.services)} enabled, {len(root.masked)} masked"


@check("kernel-command-line", "first")
def kernel_command_line(guest: Guest) -> str:
    """The profile's words stand on the kernel's command line"""
    wanted = [word for text in guest.acceptance.profile.kernel.cmdline for word in text.split()]
    if not wanted:
        raise Skipped("the profile names no words")
    running = guest.out("cat /proc/cmdline").split()
    missing = [word for word in wanted if word not in running]
    if missing:
        raise Failed(f"not on the command line: {' '.join(missing)}")
    return " ".join(wanted)


@check("unattended-upgrades", "first")
def unattended_upgrades(guest: Guest) -> str:
    """Security updates install themselves if the profile says so, and only then"""
    wanted = guest.acceptance.profile.root.unattended_upgrades
    said = guest.out("apt-config dump APT::Periodic::Unattended-Upgrade")
    on = '"1"' in said and guest.run("command -v unattended-upgrade").status == 0
    if on and guest.run("systemctl is-enabled --quiet apt-daily-upgrade.timer").status != 0:
        raise Failed("apt is told to upgrade, but apt-daily-upgrade.timer is off")
    if on != wanted:
        raise Failed(f"unattended upgrades are {_WORD[on]}; the profile wants them {_WORD[wanted]}")
    return _WORD[on]


_WORD = {True: "on", False: "off"}


@check("console-login", "first")
def console_login(guest: Guest) -> str:
    """Nobody is logged in on the serial console by itself but the user whom the profile names"""
    wanted = guest.acceptance.profile.root.console_autologin
    said = guest.out("systemctl cat 'serial-getty@ttyS0.service' 'getty@tty1.service'")
    found = re.findall(r"--autologin[ =]'?([\w-]+)", said)
    if set(found) != ({wanted} if wanted else set()):
        raise Failed(f"logged in by itself: {', '.join(found) or 'nobody'}; the profile names {wanted or 'nobody'}")
    return wanted or "nobody"


@check("name-resolution", "first")
def name_resolution(guest: Guest) -> str:
    """Names are resolved by systemd-resolved, with the name servers that DHCP told"""
    target = guest.out("readlink -f /etc/resolv.conf")
    if target != "/run/systemd/resolve/stub-resolv.conf":
        raise Failed(f"/etc/resolv.conf is {target}")
    servers = guest.out("resolvectl dns").splitlines()
    told = [line.partition(": ")[2] for line in servers if line.startswith("Link ") and line.partition(": ")[2].strip()]
    if not told:
        raise Failed(f"no link has a name server: {servers}")
    return ", ".join(told)


@check("locale-and-time-zone", "first")
def locale_and_time_zone(guest: Guest) -> str:
    """Locale and time zone are the profile's"""
    acceptance = guest.acceptance
    root = acceptance.profile.root
    said = guest.out("cat /etc/locale.conf /etc/default/locale 2>/dev/null || :")
    if not re.search(rf'^LANG="?{re.escape(root.locale)}"?$', said, re.MULTILINE):
        raise Failed(f"LANG is not {root.locale}: {said!r}")
    zone = guest.out("readlink -f /etc/localtime").removeprefix("/usr/share/zoneinfo/")
    if guest.out(f"cmp /etc/localtime '/usr/share/zoneinfo/{root.timezone}' 2>&1 || :"):
        raise Failed(f"the time zone is {zone} instead of {root.timezone}")
    return f"{root.locale}, {zone}"


@check("hostname", "second")
def hostname(guest: Guest) -> str:
    """Without another word from the cloud the host name is the profile's"""
    acceptance = guest.acceptance
    found = guest.out("cat /proc/sys/kernel/hostname", root=False)
    if found != acceptance.profile.root.hostname:
        raise Failed(f"{found!r} instead of {acceptance.profile.root.hostname!r}")
    return found


@check("mounts", "first")
def mounts(guest: Guest) -> str:
    """The root has the profile's file system and the ESP is mounted"""
    acceptance = guest.acceptance
    root_type = guest.out("findmnt -n -o FSTYPE /")
    if root_type != acceptance.profile.image.filesystem:
        raise Failed(f"the root is {root_type} instead of {acceptance.profile.image.filesystem}")
    esp = guest.run("findmnt -n -o FSTYPE,LABEL /boot/efi").stdout.split()
    if esp[:1] != ["vfat"]:
        raise Failed(f"/boot/efi is {' '.join(esp) or 'not mounted'}")
    verified = guest.run("findmnt --verify")
    if verified.status != 0:
        raise Failed(f"/etc/fstab: {verified.stdout.strip()[-400:]}")
    return f"/ is {root_type}, /boot/efi is vfat, fstab is sound"
