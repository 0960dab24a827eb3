"""(c): booting our kernel without an initramfs against Debian's kernel with one, on the same Debian tree.

Counted with QEMU's ``-icount`` on one virtual CPU: a nanosecond of the guest's clock then is one instruction, whatever
else the host does. Time is measured apart, on two virtual CPUs, as the acceptance tests run. A unit handed over as a
systemd credential reports over a second serial port, so the image is booted as it is, by its own boot loader.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.l2_exit import SWITCHES
from benchmarks.measure import say, wait_for_quiet
from benchmarks.results import Result, Row
from benchmarks.workplace import Site
from recvirt.errors import GuestError
from recvirt.qemu.argv import Disk, MachineSpec, qemu_argv
from recvirt.qemu.disks import make_overlay
from recvirt.sandbox import ToolsRoot

OURS, STOCK = "default", "debian-kernel"
_LIMIT = 0.6
TIMEOUT_SECONDS = 3600.0
MARK = "recvirt-bench"
_UNIT = f"{MARK}.service"
_TICK_NS = 10_000_000  # USER_HZ is 100 on x86 (proc_stat(5))
_BUSIEST = 3  # services that a row names
#: Instructions repeat, so that one nanosecond is one of them; no sleeping while idle; no hardware randomness.
_ICOUNT = ("-icount", "shift=0,sleep=off,align=off", "-rtc", "clock=vm")
_ICOUNT_CPU = "max,-rdrand,-rdseed"
_NO_CHANGE = {"page_table_check off"}  # how it is without a word

#: After multi-user.target, and wanted by it. The port is opened by the shell alone, so that nothing hangs it up.
REPORT_UNIT = """[Unit]
Description=Report to the benchmark
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'read -r _ _ _ _ idle waiting _ < /proc/stat; exec > /dev/ttyS1; \\
    echo; echo "@MARK@ here"; \\
    echo "IdleTicks=$((idle + waiting))"; \\
    systemctl show -p UserspaceTimestampMonotonic; \\
    systemctl show -p ActiveEnterTimestampMonotonic multi-user.target; \\
    echo "Release=$(uname -r)"; \\
    echo "Failed=$(systemctl list-units --failed --plain --no-legend | wc -l)"; \\
    systemd-analyze blame --no-pager | head -n 25; systemd-analyze critical-chain --no-pager | cat; \\
    systemctl show -p Id -p CPUUsageNSec "*.service" "*.slice" | cat; \\
    echo "@MARK@ end"; \\
    exec systemctl --no-block poweroff'
"""
WANTS_DROPIN = "[Unit]\nWants=recvirt-bench.service\n"


@dataclass(frozen=True)
class Boot:
    """One boot: the guest's clock in nanoseconds from the kernel's start, and seconds on the host from power-on."""

    release: str
    kernel_ns: int  # until PID 1 of the root runs: the kernel, and the initramfs if there is one
    multi_user_ns: int
    idle_ns: int  # of all that, waiting for a timer or a device; to 10 ms
    host_seconds: float
    services: tuple[tuple[str, float], ...] = ()  # and the processor seconds of each, most first

    @property
    def instructions(self) -> int:
        """What the processor did until multi-user.target, without waiting: a nanosecond of the clock is one."""
        return self.multi_user_ns - self.idle_ns


def credentials(unit: str = REPORT_UNIT) -> dict[str, bytes]:
    """What makes PID 1 run the report (systemd-debug-generator(8), systemd.system-credentials(7))."""
    return {
        "systemd.extra-unit.recvirt-bench.service": unit.replace("@MARK@", MARK).encode(),
        "systemd.unit-dropin.multi-user.target": WANTS_DROPIN.encode(),
    }


def machine(disk: Path, image: Path, *, icount: bool) -> MachineSpec:
    """The virtual machine: the image under a throw-away overlay, without anything that differs from run to run."""
    disks = (Disk(disk, cache="unsafe", bootable=True, backing=(image,)),)
    return MachineSpec(
        accelerator="tcg", cpus=1 if icount else 2, disks=disks, credentials=credentials(), reboot_allowed=False
    )


def boot_argv(spec: MachineSpec, *, icount: bool) -> list[str]:
    """QEMU's words: the machine's own, with the report's port on standard output, counted or not."""
    words = qemu_argv(spec)
    if icount:
        words[words.index("tcg,thread=multi")] = "tcg"
        words[words.index("-cpu") + 1] = _ICOUNT_CPU
        words += _ICOUNT
    return [*words, "-chardev", "stdio,id=report,signal=off", "-serial", "chardev:report"]


def parse_report(lines: list[str], host_seconds: float) -> Boot:
    """The report's lines as figures. GuestError when the boot was not a sound one."""
    text = "\n".join(lines)
    values = dict(re.findall(r"^(\w+)=(\S+)\s*$", text, re.M))
    used = re.findall(r"^CPUUsageNSec=(\d+)\nId=(\S+)\.service$", text, re.M)
    services = sorted(((name, int(ns) / 1e9) for ns, name in used), key=lambda one: -one[1])
    try:
        userspace, multi_user = int(values["UserspaceTimestampMonotonic"]), int(values["ActiveEnterTimestampMonotonic"])
        release, failed, idle = values["Release"], int(values["Failed"]), int(values["IdleTicks"])
    except (KeyError, ValueError) as error:
        raise GuestError(f"the guest's report is not whole ({error}): {' | '.join(lines)}") from None
    if failed or not multi_user:
        raise GuestError(f"the boot was not a sound one: {failed} failed units; its report: {' | '.join(lines)}")
    busiest = tuple(one for one in services if f"{one[0]}.service" != _UNIT)[:_BUSIEST]
    return Boot(release, userspace * 1000, multi_user * 1000, idle * _TICK_NS, host_seconds, busiest)


def boot_once(tools: ToolsRoot, image: Path, overlay: Path, *, icount: bool, log_path: Path) -> Boot:
    """Boot, take the report, wait for the guest to power off."""
    folder = overlay.parent
    lines: list[str] = []
    here: list[float] = []
    started = time.monotonic()

    def on_line(line: str) -> None:
        if line.strip() == f"{MARK} here":
            here.append(time.monotonic() - started)
        lines.append(line.strip())

    tools.run(
        boot_argv(machine(overlay, image, icount=icount), icount=icount),
        writable=[folder], readable=[image], network=True, cwd=folder, log_path=log_path, on_line=on_line,
        timeout_seconds=TIMEOUT_SECONDS, hint=f"the console: {folder / 'console.log'}",
    )  # fmt: skip
    if not here:
        raise GuestError(f"{image} powered off without a report", hint=f"the console's log: {folder / 'console.log'}")
    return parse_report(lines[lines.index(f"{MARK} here") :], here[0])


def boots(site: Site, profile: str, number: int, *, icount: bool) -> list[Boot]:
    """Boot a fresh copy of the image, and then ``number`` - 1 times more."""
    tools = site.tools()
    image = site.build_dir / profile / "disk.qcow2"
    folder = site.work_dir / "boot" / profile
    folder.mkdir(parents=True, exist_ok=True)
    overlay = make_overlay(tools, image, folder / "overlay.qcow2")
    how = "counted" if icount else "timed"
    found = []
    for count in range(number):
        boot = boot_once(tools, image, overlay, icount=icount, log_path=site.log(f"boot-{profile}-{how}-{count + 1}"))
        found.append(boot)
        say(
            f"{profile} ({boot.release}) boot {count + 1}: {boot.instructions / 1e9:.2f} G instructions, "
            f"{boot.host_seconds:.1f} s on the host ({how})"
        )
    overlay.unlink()
    return found


def benchmark(site: Site) -> Result:
    """Both images, counted once and timed in turn; the first boot of an image and a later one.

    Without rounds (``--runs 0``, for a machine that is never quiet) only what is counted.
    """
    for profile in (OURS, STOCK):
        site.recvirt("build", profile, log_name=f"build-{profile}")
    counted = {profile: boots(site, profile, 2, icount=True) for profile in (OURS, STOCK)}
    rows = [
        count_row("boot to multi-user.target, instructions", counted[OURS][1], counted[STOCK][1], _LIMIT),
        count_row("the first boot of an image, instructions", counted[OURS][0], counted[STOCK][0], None),
    ]
    timed: dict[str, list[list[Boot]]] = {OURS: [], STOCK: []}
    quiet = True
    for _ in range(site.runs):
        for profile, found in timed.items():
            quiet = wait_for_quiet(site.patience_seconds) and quiet
            found.append(boots(site, profile, 2, icount=False))
    if site.runs:
        note = "TCG, two virtual CPUs" + ("" if quiet else "; others were at work")
        rows += [
            time_row("power-on to multi-user.target, time", timed, 1, _LIMIT, note),
            time_row("the first boot of an image, time", timed, 0, None, note),
        ]
    facts = {
        "counted": {name: [dataclasses.asdict(boot) for boot in found] for name, found in counted.items()},
        "timed": {name: [[dataclasses.asdict(b) for b in one] for one in found] for name, found in timed.items()},
    }
    return Result("boot", rows, facts)


def prices(site: Site) -> Result:
    """What each protection that the kernel command line can switch costs a first boot of ours, in instructions.

    The same image is packed once more with the words, and booted. A share below 100 % is what the boot would do without
    (or, for one that waits to be switched on, above 100 % with).
    """
    runs = {"as it is": ""} | {name: words for name, words in SWITCHES.items() if name not in _NO_CHANGE}
    found: dict[str, Boot] = {}
    for name, words in runs.items():
        chosen = ("--set", f"kernel.cmdline=[{words}]") if words else ()
        site.recvirt("build", OURS, *chosen, log_name="build-priced")
        found[name] = boots(site, OURS, 1, icount=True)[0]
    site.recvirt("build", OURS, log_name="build-priced")
    mine = found.pop("as it is").instructions / 1e9
    rows = [
        Row.ratio(f"the first boot of an image, {name}", boot.instructions / 1e9, mine, "G", None, f"`{runs[name]}`")
        for name, boot in found.items()
    ]
    return Result("prices", rows, {name: dataclasses.asdict(boot) for name, boot in found.items()})


def count_row(what: str, mine: Boot, other: Boot, limit: float | None) -> Row:
    """A row of instructions (10^9); the note has the guest's clock.

    With ``sleep=off`` that clock jumps to the next timer when the guest waits, so a slow host's disk makes it run on.
    What the guest executes, the clock less its idle time, is the same beside any load.
    """
    note = f"{_parts(mine, 'kernel')}; Debian: {_parts(other, 'kernel and initramfs')}"
    return Row.ratio(what, mine.instructions / 1e9, other.instructions / 1e9, "G", limit, note)


def _parts(boot: Boot, first: str) -> str:
    rest = (boot.multi_user_ns - boot.kernel_ns) / 1e9
    return (
        f"on its clock {first} {boot.kernel_ns / 1e9:.2f} s, user space {rest:.2f} s, {boot.idle_ns / 1e9:.2f} s idle"
    )


def time_row(what: str, timed: dict[str, list[list[Boot]]], which: int, limit: float | None, note: str) -> Row:
    """A row of seconds on the host from power-on: firmware, boot loader and unpacking the kernel are in it."""
    mine, other = (statistics.median(one[which].host_seconds for one in timed[name]) for name in (OURS, STOCK))
    parts = "; ".join(f"{name}: {_middle_parts([one[which] for one in timed[name]])}" for name in (OURS, STOCK))
    return Row.ratio(what, mine, other, "s", limit, f"{note}; {parts}")


def _middle_parts(found: list[Boot]) -> str:
    """Where the time of the middle one went; both run the same user space."""
    boot = sorted(found, key=lambda one: one.host_seconds)[len(found) // 2]
    total, kernel = boot.multi_user_ns / 1e9, boot.kernel_ns / 1e9
    before = boot.host_seconds - total
    parts = f"firmware and loader {before:.1f} s, kernel {kernel:.1f} s, user space {total - kernel:.1f} s"
    services = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in boot.services)
    return f"{parts} (processor time of {services})" if services else parts
