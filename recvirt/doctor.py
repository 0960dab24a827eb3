"""Is this machine ready to build and test images? Each check says what it found and what to do about it.

Owns: looking at the host. Does not own: installing anything (scripts/bootstrap.sh), nor the accelerator's probe
(:mod:`recvirt.qemu.probe`), which it only calls when the tools root is there.
"""

from __future__ import annotations

import getpass
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from recvirt.data import data_path
from recvirt.errors import CommandError, GuestError, MissingToolError
from recvirt.run import minimal_env, run
from recvirt.sandbox import ToolsRoot
from recvirt.ui import format_bytes

Status = Literal["ok", "warn", "fail"]
GIB = 1024**3
#: Room on the cache's disk: a kernel's tree and its objects, the tools root, packages, a few images.
_DISK_FAIL, _DISK_WARN = 6 * GIB, 20 * GIB
_MEMORY_FAIL, _MEMORY_WARN = 2 * GIB, 4 * GIB
#: Oldest versions that have the options we use: unshare --map-auto, bwrap --perms (their release notes).
_OLDEST = {"unshare": (2, 38), "setpriv": (2, 33), "bwrap": (0, 5)}
_VERSION_FLAG = {"ssh": "-V"}
_NO_VERSION = frozenset({"newuidmap"})


@dataclass(frozen=True)
class Check:
    """One finding. ``fix`` is a command or a sentence; ``package`` what apt would install."""

    name: str
    status: Status
    found: str
    fix: str = ""
    package: str = ""


@dataclass(frozen=True)
class Need:
    """One line of host-packages.txt."""

    package: str
    what: str
    who: str


def read_needs(text: str) -> list[Need]:
    """The lines of host-packages.txt; ValueError for a line that is not three words."""
    needs = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 3 or words[2] not in ("all", "user", "checkout", "check"):
            raise ValueError(f"host-packages.txt:{number}: want PACKAGE WHAT all|user|checkout|check")
        needs.append(Need(*words))
    return needs


def examine(cache_dir: Path, *, tools: ToolsRoot | None = None, network: bool = False) -> list[Check]:
    """Every check. ``tools`` is the tools root if there is one: with it a guest is run to find the accelerator.

    ``network`` also asks the archive (a few seconds).
    """
    as_root = os.geteuid() == 0
    checks = [_machine(), _python()]
    needs = read_needs(data_path("host-packages.txt").read_text())
    checks += [check_need(need) for need in needs if need.who == "all" or (need.who == "user" and not as_root)]
    checks += [_namespaces(as_root), _disk(cache_dir), _memory(), _kvm()]
    checks += [_accelerator(tools)]
    checks += _surroundings()
    if network:
        checks.append(_archive())
    return checks


def apt_line(checks: Sequence[Check]) -> str:
    """The command that installs what is missing; empty when nothing is."""
    packages = sorted({check.package for check in checks if check.package and check.status == "fail"})
    if not packages:
        return ""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}apt install {' '.join(packages)}"


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """For scripts: the checks, what to install, and whether a build can start."""
    ready = all(check.status != "fail" for check in checks)
    return {"ready": ready, "install": apt_line(checks), "checks": [asdict(check) for check in checks]}


def check_need(need: Need) -> Check:
    """Whether the host has one of the things that it must bring, and in which version."""
    if need.what.startswith("module:"):
        name = need.what.removeprefix("module:")
        there = importlib.util.find_spec(name) is not None
        return Check(f"Python module {name}", *_there(there), package=need.package)
    if need.what.startswith("/"):
        return Check(need.what, *_there(Path(need.what).exists()), package=need.package)
    path = shutil.which(need.what, path=minimal_env()["PATH"])
    if path is None:
        return Check(need.what, "fail", "not installed", f"apt install {need.package}", need.package)
    version = "" if need.what in _NO_VERSION else program_version(need.what, path)
    if not is_new_enough(need.what, version):
        oldest = ".".join(map(str, _OLDEST[need.what]))
        return Check(need.what, "fail", f"{version} ({path})", f"{oldest} or newer is needed: use Debian 12 or newer")
    return Check(need.what, "ok", f"{version} ({path})".strip(), package=need.package)


def _there(there: bool) -> tuple[Status, str]:
    return ("ok", "there") if there else ("fail", "missing")


def program_version(name: str, path: str) -> str:
    """The first number that looks like a version in what the program says of itself; empty when it says none."""
    try:
        said = run([path, _VERSION_FLAG.get(name, "--version")], check=False, timeout_seconds=10)
    except (CommandError, MissingToolError):
        return ""
    match = re.search(r"\d+\.\d+[\w.]*", said.stdout + said.stderr)
    return match[0] if match else ""


def is_new_enough(name: str, version: str) -> bool:
    """Whether a version has the options we use. One that can't be read passes: the build itself will tell."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return name not in _OLDEST or not numbers or numbers >= _OLDEST[name]


def _machine() -> Check:
    machine = platform.machine()
    cpus = len(os.sched_getaffinity(0))
    if machine != "x86_64":
        return Check("machine", "fail", machine, "images are x86_64, and so must be the build host")
    return Check("machine", "ok", f"{machine}, {cpus} CPU{'s' if cpus != 1 else ''}, Linux {platform.release()}")


def _python() -> Check:
    found = platform.python_version()
    good = sys.version_info >= (3, 11)
    return Check("Python", "ok" if good else "fail", found, "" if good else "Python 3.11 or newer is needed")


def _namespaces(as_root: bool) -> Check:
    """Start programs the way the sandbox does, rather than guess from settings; then say which setting is the cause."""
    trials = [["bwrap", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]]
    if not as_root:
        trials[0] += ["--unshare-user", "--uid", "0", "--gid", "0"]
        trials.append(["unshare", "--user", "--map-auto", "--map-root-user", "--mount", "--pid", "--fork", "--"])
    for trial in trials:
        try:
            done = run([*trial, "true"], check=False, timeout_seconds=20)
        except MissingToolError as error:
            return Check("namespaces", "fail", f"not tried: {error.message}", "install the missing tools first")
        except CommandError as error:
            return Check("namespaces", "fail", error.message, namespace_fix(as_root))
        if done.status != 0:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return Check("namespaces", "fail", said, namespace_fix(as_root))
    who = "root" if as_root else f"{_user()}, with sub-ids"
    return Check("namespaces", "ok", f"work for {who}")


def namespace_fix(as_root: bool, etc: Path = Path("/etc"), proc: Path = Path("/proc")) -> str:
    """Why namespaces are refused, from the settings that are known to do it, and what would allow them."""
    if _read(proc / "sys/user/max_user_namespaces") == "0":
        return "sysctl user.max_user_namespaces is 0: set it to 10000"
    if as_root:
        return (
            "this root may not mount (a container without privileges, or a plain chroot?): use a VM or a privileged one"
        )
    if _read(proc / "sys/kernel/unprivileged_userns_clone") == "0":
        return "sudo sysctl kernel.unprivileged_userns_clone=1 (and in /etc/sysctl.d/ to keep it)"
    if _read(proc / "sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        setting = "kernel.apparmor_restrict_unprivileged_userns"
        return f"AppArmor restricts user namespaces: sudo sysctl {setting}=0, or build as root"
    for name in ("subuid", "subgid"):
        if not _has_sub_ids(_read(etc / name), _user(), os.getuid()):
            command = f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {_user()}"
            return f"/etc/{name} gives {_user()} no ids: {command}"
    return "user namespaces are refused (a container, or a chroot?): build as root instead"


def _has_sub_ids(text: str, user: str, uid: int) -> bool:
    """Whether subuid(5) text gives ``user`` at least 65536 ids, which a Debian tree needs."""
    rows = [line.split(":") for line in text.splitlines()]
    return any(len(row) == 3 and row[0] in (user, str(uid)) and int(row[2] or 0) >= 65536 for row in rows)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _disk(cache_dir: Path) -> Check:
    folder = cache_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{format_bytes(free)} free for {cache_dir}"
    if not os.access(folder, os.W_OK):
        return Check("disk", "fail", f"{folder} may not be written", "choose another place: --cache-dir")
    fix = f"a first build of a kernel needs about {format_bytes(_DISK_WARN)}; recvirt clean, or --cache-dir"
    return Check("disk", *_bounded(free, _DISK_FAIL, _DISK_WARN, found, fix))


def _bounded(value: int, fail: int, warn: int, found: str, fix: str) -> tuple[Status, str, str]:
    if value < fail:
        return "fail", found, fix
    return ("warn", found, fix) if value < warn else ("ok", found, "")


def _memory() -> Check:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    available = int(match[1]) * 1024 if match else 0
    fix = "a test guest takes 2 GiB, a compile job about 0.5 GiB: close something, or lower --jobs and accept.memory"
    return Check(
        "memory", *_bounded(available, _MEMORY_FAIL, _MEMORY_WARN, f"{format_bytes(available)} available", fix)
    )


def _kvm() -> Check:
    device = Path("/dev/kvm")
    nested = {name: _read(Path(f"/sys/module/{name}/parameters/nested")) for name in ("kvm_intel", "kvm_amd")}
    states = ", ".join(f"{name}.nested={value}" for name, value in nested.items() if value)
    if not device.exists():
        return Check("/dev/kvm", "warn", "not there", "tests run under emulation, some ten times slower")
    if not os.access(device, os.R_OK | os.W_OK):
        return Check("/dev/kvm", "warn", "may not be opened", f"sudo adduser {_user()} kvm, then log in again")
    return Check("/dev/kvm", "ok", states or "there; whether it works shows below")


def _accelerator(tools: ToolsRoot | None) -> Check:
    name = "accelerator"
    if tools is None:
        return Check(
            name, "warn", "not tried: there is no tools root yet", "recvirt doctor --tools makes it (as a build does)"
        )
    from recvirt.qemu.probe import find_accelerator

    try:
        found = find_accelerator(tools)
    except (GuestError, CommandError, MissingToolError) as error:
        return Check(
            name, "fail", error.message.splitlines()[0], "no guest runs here at all: see recvirt --debug doctor"
        )
    return Check(name, "ok" if found.name == "kvm" else "warn", f"{found.name}: {found.reason}")


def _surroundings() -> Iterator[Check]:
    for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "SSL_CERT_FILE"):
        value = os.environ.get(name)
        if not value:
            continue
        if name == "SSL_CERT_FILE" and not Path(value).is_file():
            yield Check(name, "fail", f"{value} does not exist", "unset it, or name the file of your authority")
        else:
            # A proxy's password does not belong on a screen that gets pasted into a report.
            yield Check(name, "ok", re.sub(r"//[^/@]*@", "//***@", value))


def _archive() -> Check:
    argv = ["mmdebstrap", "--simulate", "--variant=apt", "trixie", "/dev/null"]
    try:
        done = run(argv, check=False, timeout_seconds=120)
    except (CommandError, MissingToolError) as error:
        return Check("archive", "fail", error.message.splitlines()[-1], "check the network and http_proxy")
    if done.status == 0:
        return Check("archive", "ok", "Debian's archive answers, and its signature holds")
    lines = [line for line in done.stderr.splitlines() if line.startswith(("E:", "Err:", "W:"))] or ["no answer"]
    return Check("archive", "fail", lines[0], "check the network and http_proxy; --tools-mirror names another archive")
