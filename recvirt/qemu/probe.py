"""Which accelerator really works here: found by running a tiny guest that must speak.

``/dev/kvm`` may exist and be useless (a host without VMX/SVM whose kernel offers a paravirtual KVM): machines can be
created, yet QEMU aborts or says nothing. So a boot sector of a few bytes has to print a fresh word on the serial port,
say whether its CPU has VMX or SVM (else nothing could be nested in it), and end QEMU with a status of its own.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from recvirt.errors import GuestError
from recvirt.qemu.argv import AcceleratorName
from recvirt.run import run
from recvirt.sandbox import ToolsRoot
from recvirt.ui import reporter

KVM_DEVICE = Path("/dev/kvm")
_EXIT_VALUE = 0x2A
#: isa-debug-exit ends QEMU with (value << 1) | 1.
EXIT_STATUS = (_EXIT_VALUE << 1) | 1
_KVM_SECONDS = 10.0
_TCG_SECONDS = 60.0

#: 16-bit code at 0x7c00: put V, S or - into the byte at 0x7dfd, print the text at 0x7d00 (zero-terminated), leave.
_CODE = bytes.fromhex(
    "fa31c08ed8fc"  # cli; xor ax,ax; mov ds,ax; cld
    "66b801000000 0fa2"  # mov eax,1; cpuid
    "f6c120 7514"  # test cl,1<<5 (VMX); jnz vmx
    "66b801000080 0fa2"  # mov eax,0x80000001; cpuid
    "f6c104 740e"  # test cl,1<<2 (SVM); jz print
    "c606 007d 53 eb07"  # mov byte [0x7d00],'S'; jmp print
    "c606 007d 56 9090"  # vmx: mov byte [0x7d00],'V'
    "be007d baf803"  # print: mov si,0x7d00; mov dx,0x3f8
    "ac84c07403eeebf8"  # lodsb; test al,al; jz done; out dx,al; jmp lodsb
    f"baf400b0{_EXIT_VALUE:02x}ee"  # done: mov dx,0xf4; mov al,value; out dx,al
    "f4ebfd"  # hlt; jmp hlt
)
_TEXT_OFFSET = 0x100
#: SeaBIOS reads nothing from a disk of less than one cylinder (16 heads of 63 sectors).
_DISK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Accelerator:
    """The accelerator to use and why. ``nesting`` is what the tiny guest's CPU showed: ``VMX``, ``SVM`` or nothing."""

    name: AcceleratorName
    reason: str
    nesting: str = ""

    @property
    def time_factor(self) -> float:
        """How much longer than under KVM a guest may take."""
        return 1.0 if self.name == "kvm" else 4.0


def boot_sector(word: str) -> bytes:
    """A disk whose first sector says ``-``, ``V`` or ``S`` and then ``word``."""
    text = b"-" + word.encode("ascii") + b"\0"
    if len(text) > 0xF0:
        raise ValueError("the word is too long for a boot sector")
    sector = _CODE.ljust(_TEXT_OFFSET, b"\0") + text
    return (sector.ljust(510, b"\0") + b"\x55\xaa").ljust(_DISK_BYTES, b"\0")


def probe_argv(accelerator: AcceleratorName, sector: Path, serial_log: Path) -> list[str]:
    """Boot ``sector`` under one accelerator; what it prints goes to ``serial_log``."""
    accel = ["-accel", "kvm", "-cpu", "host"] if accelerator == "kvm" else ["-accel", "tcg", "-cpu", "max"]
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-machine", "q35", *accel, "-m", "32M",
        "-display", "none", "-drive", f"if=none,id=d,format=raw,readonly=on,file={sector}",
        "-device", "virtio-blk-pci,drive=d,bootindex=0", "-chardev", f"file,id=s,path={serial_log}",
        "-serial", "chardev:s", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-no-reboot",
    ]  # fmt: skip


def read_answer(text: str, word: str) -> str:
    """What the guest said of its CPU: ``VMX``, ``SVM`` or an empty string. ValueError when the word is not there."""
    place = text.find(word)
    if place < 1:
        raise ValueError("the guest said nothing")
    return {"V": "VMX", "S": "SVM", "-": ""}[text[place - 1]]


def run_tiny_guest(tools: ToolsRoot, accelerator: AcceleratorName, seconds: float) -> str:
    """Run the tiny guest; return its nesting extension. GuestError when it does not speak in time."""
    word = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="recvirt-probe-") as name:
        folder = Path(name)
        sector, log = folder / "sector.img", folder / "serial.log"
        sector.write_bytes(boot_sector(word))
        argv = tools.argv(
            ["timeout", "-s", "KILL", f"{seconds:.0f}", *probe_argv(accelerator, sector, log)],
            writable=[folder], devices=[KVM_DEVICE] if accelerator == "kvm" else [],
        )  # fmt: skip
        done = run(argv, check=False, timeout_seconds=seconds + 10)
        said = log.read_text(errors="replace") if log.exists() else ""
    problem = done.stderr.strip().splitlines()[-1:]
    if done.status == 137:
        raise GuestError(f"a tiny guest under {accelerator} said nothing in {seconds:.0f} s")
    if done.status != EXIT_STATUS:
        why = problem[0] if problem else "no message"
        raise GuestError(f"a tiny guest under {accelerator} ended with status {done.status}: {why}")
    try:
        return read_answer(said, word)
    except ValueError:
        raise GuestError(f"a tiny guest under {accelerator} ran to its end and said nothing") from None


_lock = threading.Lock()
_found: dict[tuple[Path, bool], Accelerator] = {}


def find_accelerator(tools: ToolsRoot, *, nested: bool = True) -> Accelerator:
    """KVM where a guest runs under it (and could itself nest, when ``nested``), else TCG. Probed once a process."""
    with _lock:
        key = (tools.directory, nested)
        if key not in _found:
            _found[key] = _probe(tools, nested)
            reporter.info(f"accelerator: {_found[key].name} ({_found[key].reason})")
        return _found[key]


def _probe(tools: ToolsRoot, nested: bool) -> Accelerator:
    reason = _why_not_kvm()
    if not reason:
        try:
            extension = run_tiny_guest(tools, "kvm", _KVM_SECONDS)
        except GuestError as error:
            reason = error.message
        else:
            if extension or not nested:
                return Accelerator("kvm", f"a tiny guest ran under KVM; nesting: {extension or 'none'}", extension)
            reason = "KVM works, but its guests see neither VMX nor SVM (kvm_intel.nested / kvm_amd.nested is off)"
    extension = run_tiny_guest(tools, "tcg", _TCG_SECONDS)
    return Accelerator("tcg", f"no KVM: {reason}", extension)


def _why_not_kvm() -> str:
    if not KVM_DEVICE.exists():
        return f"{KVM_DEVICE} does not exist"
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return f"{KVM_DEVICE} may not be opened by this user (is it in the group kvm?)"
    return ""
