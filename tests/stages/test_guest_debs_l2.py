"""recvirt-nested-check where it matters: in an L1 with emulated SVM it boots L2s, and says so only when they ran.

Debian's own cloud kernel and the package's initramfs are the L1; QEMU emulates its processor (no /dev/kvm is needed).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from recvirt.accept.bochs import answer_for
from recvirt.archive import Archive
from recvirt.cpio import newc
from recvirt.data import data_path
from recvirt.model import Profile
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Work
from recvirt.stages.guest_debs import PROGRAMS, GuestDebs, archive_entries, compile_argv

pytestmark = pytest.mark.slow

NAME = "recvirt-nested-check"
SECONDS = 240.0


@dataclass(frozen=True)
class Kernel:
    tree: Path
    release: str

    @property
    def image(self) -> Path:
        return self.tree / f"boot/vmlinuz-{self.release}"


@dataclass(frozen=True)
class Machine:
    """What an L1 said."""

    lines: tuple[str, ...]

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(
            next(w for w in self.lines if w.startswith("check ")).removeprefix("check ")
        )
        return report

    @property
    def status(self) -> int:
        return int(next(w for w in self.lines if w.startswith("status ")).split()[1])


@pytest.fixture(scope="module")
def kernel(tools: ToolsRoot, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    archive = Archive(tools, shared_cache, suite="trixie")
    packages = archive.resolve(["linux-image-cloud-amd64"])
    package = next(p for p in packages if p.name.startswith("linux-image-6") and p.name.endswith("-cloud-amd64"))
    deb = archive.download(package)
    tree = tmp_path_factory.mktemp("kernel")
    tools.run(["dpkg-deb", "--extract", str(deb), str(tree)], readable=[deb], writable=[tree])
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    release = package.name.removeprefix("linux-image-")
    tools.run(["depmod", "--basedir", str(tree), release], writable=[tree])
    return Kernel(tree, release)


@pytest.fixture(scope="module")
def installed(tools: ToolsRoot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("debs")
    for name in ("out", "scratch", "tree"):
        (base / name).mkdir()
    context = Context(tools=tools, cache_dir=base / "cache")
    stage = GuestDebs()
    stage.build(
        stage.inputs(Profile(name="p"), {}, context), Work(base / "out", base / "scratch", base / "log", context)
    )
    tools.run(["dpkg-deb", "--extract", str(base / f"out/{NAME}.deb"), str(base / "tree")], writable=[base])
    return base / "tree"


def with_modules(tools: ToolsRoot, kernel: Kernel, installed: Path, base: Path, output: Path) -> Path:
    program = installed / "usr/bin/recvirt-nested-check"
    words = [
        f"--root={kernel.tree}",
        f"--kernel-release={kernel.release}",
        f"--base={base}",
        f"--write-initramfs={output}",
    ]
    tools.run([str(program), *words], readable=[installed, kernel.tree, base], writable=[output.parent])
    return output


@pytest.fixture(scope="module")
def initramfs(tools: ToolsRoot, kernel: Kernel, installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = installed / "usr/lib/recvirt/l2-initramfs.cpio"
    return with_modules(tools, kernel, installed, base, tmp_path_factory.mktemp("l1") / "l1.cpio")


@pytest.fixture(scope="module")
def hooked(tools: ToolsRoot, kernel: Kernel, installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a program that can be told, by the environment, to be lied to."""
    folder = tmp_path_factory.mktemp("hooked")
    sources = data_path("packages", NAME, "src")
    for installed_path, output, extra in (
        ("usr/bin/recvirt-nested-check", "check", ["-DRECVIRT_TEST_HOOKS"]),
        ("usr/lib/recvirt/l2-init", "init", []),
    ):
        argv = compile_argv(PROGRAMS[NAME][installed_path], folder / output, "0", extra=extra)
        tools.run(argv, readable=[sources], writable=[folder], cwd=sources)
    programs = {"init": (folder / "init").read_bytes(), NAME: (folder / "check").read_bytes()}
    (folder / "base.cpio").write_bytes(newc(archive_entries(programs)))
    return with_modules(tools, kernel, installed, folder / "base.cpio", folder / "l1.cpio")


def boot(tools: ToolsRoot, kernel: Kernel, initramfs: Path, words: Sequence[str] = (), *, cpu: str = "max") -> Machine:
    line = " ".join(["console=ttyS0", "quiet", "panic=-1", "recvirt.nonce=7e57", "recvirt.timeout=60", *words])
    argv = [
        "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", cpu, "-m", "512", "-nodefaults",
        "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel.image), "-initrd", str(initramfs),
        "-append", line,
    ]  # fmt: skip
    done = tools.run(argv, readable=[kernel.tree, initramfs], timeout_seconds=SECONDS)
    word = "RECVIRT-L2 "
    lines = tuple(text.rstrip("\r")[len(word) :] for text in done.stdout.splitlines() if text.startswith(word))
    assert lines[-1] == "end", done.stdout[-2000:]
    return Machine(lines)


def test_l2_runs_and_proves_itself(tools: ToolsRoot, kernel: Kernel, initramfs: Path) -> None:
    machine = boot(tools, kernel, initramfs)
    assert f"kernel {kernel.release}" in machine.lines
    assert f"nonce 7e57 answer {answer_for('7e57')}" in machine.lines
    assert machine.status == 0
    report = machine.report
    assert (report["verdict"], report["deeper"], report["cpu"]["extension"]) == ("works", True, "svm")
    assert report["features_source"] == "cpuid"
    assert report["features"]["npt"] is True
    assert report["hypervisor"]["signature"] == "TCGTCGTCGTCG"
    assert [guest["mode"] for guest in report["l2"]] == ["real", "long"]
    for guest in report["l2"]:
        assert guest["state"] == "proved"
        assert guest["answer"] == guest["expected"] != guest["nonce"]
        assert guest["kvm_counted"]["exits"] >= guest["rounds"] + guest["port_accesses"]
        assert guest["kvm_counted"]["io_exits"] == guest["port_accesses"] == 64
    assert report["l2"][1]["device_writes"] == 1


def test_nested_off_is_found(tools: ToolsRoot, kernel: Kernel, initramfs: Path) -> None:
    machine = boot(tools, kernel, initramfs, ["kvm_amd.nested=0"])
    assert machine.status == 14
    report = machine.report
    assert (report["verdict"], report["deeper"], report["device"]["offers_extension"]) == ("not-deeper", False, False)
    assert {guest["state"] for guest in report["l2"]} == {"proved"}


def test_processor_without_svm(tools: ToolsRoot, kernel: Kernel, initramfs: Path) -> None:
    machine = boot(tools, kernel, initramfs, cpu="max,-svm")
    assert (machine.status, machine.report["verdict"]) == (10, "no-cpu-support")
    step = next(check["next"] for check in machine.report["checks"] if check["name"] == "cpu")
    assert "-cpu max" in step


def test_without_modules_there_is_no_device(tools: ToolsRoot, kernel: Kernel, installed: Path) -> None:
    machine = boot(tools, kernel, installed / "usr/lib/recvirt/l2-initramfs.cpio")
    assert (machine.status, machine.report["verdict"]) == (11, "no-device")


@pytest.mark.parametrize(
    ("hook", "state", "said"),
    [("lie", "failed", "a wrong intermediate state"), ("count-nothing", "emulated", "KVM counts 0 exits")],
)
def test_guest_that_does_not_prove_itself(
    tools: ToolsRoot, kernel: Kernel, hooked: Path, hook: str, state: str, said: str
) -> None:
    # The kernel hands words that it does not know to init as its environment.
    machine = boot(tools, kernel, hooked, [f"RECVIRT_TEST_L2={hook}"])
    assert (machine.status, machine.report["verdict"]) == (13, "l2-failed")
    for guest in machine.report["l2"]:
        assert guest["state"] == state
        assert said in guest["error"]


def test_check_can_be_left_out(tools: ToolsRoot, kernel: Kernel, initramfs: Path) -> None:
    machine = boot(tools, kernel, initramfs, ["recvirt.check=0"])
    assert not [line for line in machine.lines if line.startswith(("check ", "status "))]
