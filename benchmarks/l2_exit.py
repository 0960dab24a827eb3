"""Counts the instructions that an L1 kernel spends on one exit of its L2, and compares kernels.

    python benchmarks/l2_exit.py                                   our default kernel against Debian's cloud kernel
    python benchmarks/l2_exit.py --prices                          and what each hardening switch of ours costs
    python benchmarks/l2_exit.py --deb name=./linux-image.deb      and another kernel package

QEMU runs the L1 with ``-icount``: a nanosecond of its clock is an instruction, so the figures are the same in every
run and beside any load. They price instructions, not the latency of a real exit. Needs no root, no KVM, and about a
minute a kernel.
Does not own: the program inside (``l2_exit/l2_exit.c``).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recvirt.cli import App, default_cache_dir
from recvirt.cpio import Entry, newc
from recvirt.errors import StageError
from recvirt.sandbox import ToolsRoot
from recvirt.ui import reporter

SOURCE = Path(__file__).resolve().parent / "l2_exit" / "l2_exit.c"
#: One CPU whose clock counts instructions; RDRAND would bring in the host's randomness, KASLR and ticks other noise.
QEMU = (
    "qemu-system-x86_64 -machine q35 -accel tcg -icount shift=0,sleep=off,align=off -rtc clock=vm "
    "-cpu max,-rdrand,-rdseed -smp 1 -m 512 -nodefaults -display none -no-reboot -serial stdio"
).split()
COMMAND_LINE = "console=ttyS0 quiet nokaslr panic=-1"
TIMEOUT_SECONDS = 900
#: What can be switched off at boot, so that its price shows without another build.
SWITCHES = {
    "page_table_check off": "page_table_check=0",
    "page_table_check on": "page_table_check=1",
    "no init_on_alloc": "init_on_alloc=0",
    "no KFENCE": "kfence.sample_interval=0",
    "no randomize_kstack_offset": "randomize_kstack_offset=0",
    "no hardened_usercopy": "hardened_usercopy=0",
    "no AppArmor": "apparmor=0",
    "mitigations=off": "mitigations=off",
}
_RESULT = re.compile(r"^L2-EXIT (cpuid|io) median ([\d.]+) low ([\d.]+) high ([\d.]+)", re.M)
_DEPENDENCY = re.compile(r"^(?P<module>\S+):(?P<needs>.*)$", re.M)


@dataclass(frozen=True)
class Kernel:
    """A kernel to measure: its image and the modules of KVM, uncompressed, in the order of loading."""

    name: str
    vmlinuz: Path
    modules: tuple[Path, ...]


@dataclass(frozen=True)
class Cost:
    """Instructions an exit: handled in the kernel (CPUID), and by user space (an OUT)."""

    cpuid: float
    io: float


def load_order(modules_dep: str, name: str) -> list[str]:
    """The paths that loading ``name`` takes, dependencies first, from a modules.dep(5)."""
    for match in _DEPENDENCY.finditer(modules_dep):
        if match["module"].rsplit("/", 1)[-1].split(".")[0] == name:
            return [*reversed(match["needs"].split()), match["module"]]
    raise StageError(f"this kernel has no module {name}", hint="CONFIG_KVM_AMD=m is wanted: TCG emulates SVM only")


def unpack_kernel(tools: ToolsRoot, name: str, deb: Path, folder: Path) -> Kernel:
    """Take the image and KVM's modules out of a kernel package."""
    folder.mkdir()
    tools.run(["dpkg-deb", "-x", str(deb), str(folder)], readable=[deb], writable=[folder])
    (vmlinuz,) = (folder / "boot").glob("vmlinuz-*")
    release = vmlinuz.name.removeprefix("vmlinuz-")
    base = next(path for path in (folder / "usr", folder) if (path / "lib/modules" / release).is_dir())
    tools.run(["depmod", "-b", str(base), release], writable=[folder])
    root = base / "lib/modules" / release
    script = 'case $1 in *.zst) zstd -qdc "$1";; *.xz) xz -dc "$1";; *) cat "$1";; esac > "$2"'
    modules = []
    for number, path in enumerate(load_order((root / "modules.dep").read_text(), "kvm-amd")):
        plain = folder / f"{number:02}-{Path(path).name.split('.')[0]}.ko"
        tools.run(["sh", "-ec", script, "sh", str(root / path), str(plain)], writable=[folder])
        modules.append(plain)
    return Kernel(name, vmlinuz, tuple(modules))


def compile_program(tools: ToolsRoot, target: Path) -> None:
    """The measuring program, static, so that it can be process 1 of an otherwise empty system."""
    tools.run(
        ["musl-gcc", "-static", "-O2", "-Wall", "-Wextra", "-idirafter", "/usr/include", "-idirafter",
         "/usr/include/x86_64-linux-gnu", "-o", str(target), str(SOURCE)],
        readable=[SOURCE], writable=[target.parent],
    )  # fmt: skip


def initramfs(program: bytes, modules: Sequence[Path]) -> bytes:
    """The whole L1: the program, the modules, a console."""
    entries = [
        Entry("dev", 0o40755),
        Entry("dev/console", 0o20600, device=(5, 1)),
        Entry("modules", 0o40755),
        Entry("modules/order", 0o100644, "".join(f"{m.name}\n" for m in modules).encode()),
        *(Entry(f"modules/{m.name}", 0o100644, m.read_bytes()) for m in modules),
        Entry("init", 0o100755, program),
    ]
    return newc(entries)


def measure(tools: ToolsRoot, kernel: Kernel, program: bytes, folder: Path, words: str = "") -> Cost:
    """Boot the kernel as an L1 and read what it measured. StageError with its last words if it says nothing."""
    archive = folder / "initramfs"
    archive.write_bytes(initramfs(program, kernel.modules))
    argv = [
        *QEMU, "-kernel", str(kernel.vmlinuz), "-initrd", str(archive), "-append", f"{COMMAND_LINE} {words}".strip(),
    ]  # fmt: skip
    done = tools.run(argv, readable=[folder], timeout_seconds=TIMEOUT_SECONDS)
    found = {match[1]: float(match[2]) for match in _RESULT.finditer(done.stdout.replace("\r", ""))}
    if set(found) != {"cpuid", "io"}:
        said = "\n".join(f"  | {line}" for line in done.stdout.splitlines()[-15:])
        raise StageError(f"{kernel.name} measured nothing\n{said}")
    return Cost(found["cpuid"], found["io"])


def find_kernels(app: App, profile: str, extra: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, package): Debian's cloud kernel first, for the others are compared with it; then the profile's, and
    extras."""
    from recvirt import pipeline
    from recvirt.archive import Archive
    from recvirt.kconfig import stock

    context = app.context()
    archive = Archive(context.tools, context.cache_dir, suite="trixie")
    package = stock.image_package(archive, "linux-image-cloud-amd64")
    kernels = [(f"Debian {stock.release_of(package)}", archive.download(package))]
    if profile:
        model = app.load(profile).model
        planned = pipeline.plan(model, app.store, context, until="kernel_build")
        outputs = pipeline.Builder(model, app.store, context, app.build_dir.absolute()).run(planned)
        output = outputs["kernel_build"]
        kernels.append((output.path("release").read_text().strip(), output.path("linux-image.deb")))
    for word in extra:
        name, _, path = word.partition("=")
        kernels.append((name, Path(path).resolve()))
    return kernels


def rows(app: App, kernels: Sequence[tuple[str, Path]], *, prices: bool) -> list[tuple[str, Cost]]:
    """Measure every kernel; with ``prices`` also the last one with each switch."""
    tools = app.tools()
    found: list[tuple[str, Cost]] = []
    with tempfile.TemporaryDirectory(prefix="recvirt-l2-exit-") as name:
        folder = Path(name)
        compile_program(tools, folder / "program")
        program = (folder / "program").read_bytes()
        for number, (title, deb) in enumerate(kernels):
            kernel = unpack_kernel(tools, title, deb, folder / str(number))
            runs = {title: ""}
            if prices and number == len(kernels) - 1:
                runs |= {f"  {switch}": words for switch, words in SWITCHES.items()}
            for label, words in runs.items():
                reporter.info(f"measuring {label.strip()}")
                found.append((label, measure(tools, kernel, program, folder, words)))
    return found


def table(found: Sequence[tuple[str, Cost]]) -> str:
    """Markdown; percentages are against the first row."""
    first = found[0][1]
    lines = ["| L1 kernel | CPUID exit | | userspace I/O exit | |", "|---|--:|--:|--:|--:|"]
    for name, cost in found:
        shares = (100 * (cost.cpuid / first.cpuid - 1), 100 * (cost.io / first.io - 1))
        lines.append(f"| {name} | {cost.cpuid:.1f} | {shares[0]:+.1f}% | {cost.io:.1f} | {shares[1]:+.1f}% |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--profile", default="default", help="whose kernel is compared; empty: none")
    parser.add_argument("--deb", action="append", default=[], metavar="NAME=PATH", help="another kernel package")
    parser.add_argument("--prices", action="store_true", help="the last kernel again with each hardening switch")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    app = App(cache_dir=options.cache_dir, build_dir=options.build_dir)
    found = rows(app, find_kernels(app, options.profile, options.deb), prices=options.prices)
    if options.json:
        print(json.dumps([{"kernel": n.strip(), "cpuid": c.cpuid, "io": c.io} for n, c in found], indent=1))
    else:
        print(table(found))


if __name__ == "__main__":
    main()
