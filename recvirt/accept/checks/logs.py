"""Logs and leftovers: what the kernel complained of, and what the build must not have left behind."""

from __future__ import annotations

import re

from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed

#: Kernel messages of priority "err" or worse that are known, and why they are no fault of the image.
KERNEL_ALLOWED = {
    r"MP-BIOS bug: 8254 timer not connected": "the timer is calibrated while a busy host keeps the emulator waiting",
    r"mtrr: your CPUs had inconsistent": "QEMU's TCG starts each virtual CPU with its own MTRRs",
    r"amd_pstate: the _CPC object is not present": "a virtual machine has no ACPI CPPC tables",
    r"x86/cpu: SGX disabled": "no virtual SGX",
    r"i8042: (No controller found|Can't read CTR)": "machines without a PS/2 controller",
    r"SVM: kvm: .*Unhandled (RDMSR|WRMSR)": "an L2's kernel probes a model-specific register that KVM does not offer",
    r"kvm.*: vcpu\d+, guest rIP: .* [Uu]nhandled (RDMSR|WRMSR)": "the same, in newer kernels' words",
    r"tpm.*(TPM interrupt|No TPM chip found)": "no virtual TPM",
    r"watchdog: watchdog\d+: watchdog did not stop!": (
        "said at every reboot: systemd hands the running watchdog over, so that a shutdown that hangs still ends"
    ),
    r"RAS: Correctable Errors collector initialized": "a notice, printed as an error by some kernels",
    r"Failed to query local AF_VSOCK CID": "no vsock device; systemd asks for one on every VM",
    r"system-generators/systemd-ssh-generator failed": "the same",
    r"Speculative Return Stack Overflow: IBPB-extending microcode not applied": "microcode belongs to the host",
    r"Transient Scheduler Attacks|Spectre|RETBleed|SRSO|MDS CPU bug|TAA CPU bug|MMIO Stale Data": (
        "a processor's weakness that the kernel tells; the host's microcode decides"
    ),
}


@check("kernel-log", "first")
def kernel_log(guest: Guest) -> str:
    """The kernel's log holds no error but known ones"""
    lines = guest.out("journalctl -k -b -p err --no-pager -o cat || :").splitlines()
    unknown = unknown_lines(lines)
    if unknown:
        raise Failed("\n".join(unknown[:20]))
    return f"{len(lines)} known lines" if lines else "no errors"


@check("kernel-log-after-vms", "reboot")
def kernel_log_after_reboot(guest: Guest) -> str:
    """Neither the boot that ran VMs nor the next one has an unknown error in the kernel's log"""
    lines = guest.out("journalctl -k -b -1 -p err --no-pager -o cat; journalctl -k -b -p err --no-pager -o cat")
    unknown = unknown_lines(lines.splitlines())
    if unknown:
        raise Failed("\n".join(unknown[:20]))
    return "no unknown errors"


def unknown_lines(lines: list[str]) -> list[str]:
    """Those that no pattern of :data:`KERNEL_ALLOWED` explains."""
    return [line for line in lines if line.strip() and not any(re.search(p, line) for p in KERNEL_ALLOWED)]


@check("no-crashes", "first")
def no_crashes(guest: Guest) -> str:
    """No oops, no warning with a trace, nothing killed for want of memory"""
    pattern = "BUG:|Oops|WARNING: CPU|Call Trace|Out of memory|segfault|general protection|hung_task|soft lockup"
    found = guest.out(f"journalctl -k -b --no-pager -o cat | grep -E '{pattern}' || :")
    if found:
        raise Failed("\n".join(found.splitlines()[:10]))
    return "none"


#: Below /var/log: what may be there after a first boot. Patterns of whole paths.
LOGS_ALLOWED = (
    r"journal/.*", r"cloud-init(-output)?\.log", r"wtmp(\.db)?", r"btmp", r"lastlog", r"faillog", r"README",
    r"private/.*", r"libvirt/.*", r"swtpm/.*", r"unattended-upgrades/.*", r"apt/(history\.log|term\.log|eipp\.log\.xz)",
    r"vmware-.*\.log", r"alternatives\.log", r"dpkg\.log", r"sysstat/.*", r"chrony/.*",
)  # fmt: skip
#: Of the cloud's services; they have to be of this boot.
SERVICE_LOGS = (r"postgresql/.*", r"nginx/.*", r"rabbitmq/.*", r"recvirt-cloud/.*")
#: Of those above, what must not tell of the build: empty, or only lines of this boot.
_BUILD_LOGS = ("dpkg.log", "alternatives.log", "apt/history.log", "apt/term.log")


@check("log-files", "first")
def log_files(guest: Guest) -> str:
    """/var/log holds only files of this boot, none of the build"""
    booted, *rows = guest.out(
        "sed -n 's/^btime //p' /proc/stat; find /var/log -xdev -type f -printf '%T@ %s %P\\n'"
    ).splitlines()
    wrong = []
    for row in rows:
        changed, size, path = row.split(" ", 2)
        if any(re.fullmatch(pattern, path) for pattern in SERVICE_LOGS):
            # An empty one came with its package.
            if int(size) > 0 and float(changed) < int(booted):
                wrong.append(f"{path} (older than this boot)")
        elif not any(re.fullmatch(pattern, path) for pattern in LOGS_ALLOWED):
            wrong.append(path)
        elif path in _BUILD_LOGS and int(size) > 0:
            wrong.append(f"{path} ({size} bytes of the build)")
    if wrong:
        raise Failed(f"in /var/log: {', '.join(wrong)}")
    return f"{len(rows)} files"


@check("empty-caches", "first")
def empty_caches(guest: Guest) -> str:
    """No package, package index, temporary file or shell history came with the image"""
    command = (
        "find /var/cache/apt/archives /var/lib/apt/lists -xdev -type f ! -name lock ! -name '*.lock';"
        "find /var/cache/apt -maxdepth 1 -type f;"
        "find /tmp /var/tmp -xdev -mindepth 1 -maxdepth 1 ! -name 'systemd-private-*' ! -name '.*-unix'"
        " ! -name 'recvirt-l2' ! -name 'vmware*' ! -name 'cloud-init*' ! -name 'dracut*';"
        "find /root /home -xdev -name '.*_history';"
        "find /etc /var/lib/dpkg -xdev \\( -name '*.dpkg-old' -o -name '*.dpkg-dist' -o -name '*.dpkg-new' \\)"
    )
    found = guest.out(f"{{ {command}; }} 2>/dev/null || :").splitlines()
    if found:
        raise Failed(f"left in the image: {', '.join(found[:12])}")
    return "empty"


@check("journal-bounded", "first")
def journal_bounded(guest: Guest) -> str:
    """The journal is kept over reboots and takes no more room than the profile says"""
    acceptance = guest.acceptance
    text = guest.out("systemd-analyze cat-config systemd/journald.conf")
    values = re.findall(r"^SystemMaxUse=(\S+)", text, re.MULTILINE)
    wanted = acceptance.profile.root.journal_max
    if not values or values[-1] != wanted:
        raise Failed(f"SystemMaxUse is {values[-1:] or 'not set'} instead of {wanted}")
    if guest.run("test -n \"$(find /var/log/journal -name 'system.journal')\"").status != 0:
        raise Failed("there is no journal in /var/log/journal")
    return f"at most {wanted}"
