"""Builds the packages in the tools root for real: their bytes, contents, and what the program says of fake machines.

The L2 itself is proved in test_guest_debs_l2.py, on an emulated processor with SVM.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from recvirt.data import data_path
from recvirt.model import Profile
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Work
from recvirt.stages.guest_debs import PROGRAMS, GuestDebs, compile_argv, read_package
from recvirt.store import sha256_of

NAME = "recvirt-nested-check"


def build(context: Context, base: Path) -> Path:
    for name in ("out", "scratch"):
        (base / name).mkdir(parents=True)
    stage = GuestDebs()
    stage.build(
        stage.inputs(Profile(name="p"), {}, context), Work(base / "out", base / "scratch", base / "log", context)
    )
    return base / "out"


@pytest.fixture(scope="module")
def debs(tools: ToolsRoot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("debs")
    return build(Context(tools=tools, cache_dir=base / "cache"), base / "work")


@pytest.fixture(scope="module")
def installed(tools: ToolsRoot, debs: Path) -> Path:
    tree = debs / "tree"
    tree.mkdir()
    tools.run(["dpkg-deb", "--extract", str(debs / f"{NAME}.deb"), str(tree)], writable=[debs])
    return tree


@pytest.fixture(scope="module")
def program(installed: Path) -> Path:
    return installed / "usr/bin/recvirt-nested-check"


# -- the packages ----------------------------------------------------------------------------------------------------


def test_bytes_repeat_in_another_folder_with_another_umask(debs: Path, context: Context, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        again = build(context, tmp_path / "some/where else")
    finally:
        os.umask(before)
    names = sorted(path.name for path in debs.glob("*.deb"))
    assert f"{NAME}.deb" in names
    assert {n: sha256_of(again / n) for n in names} == {n: sha256_of(debs / n) for n in names}


def test_contents_owners_and_modes(debs: Path, tools: ToolsRoot) -> None:
    listing = tools.run(["dpkg-deb", "--contents", str(debs / f"{NAME}.deb")], readable=[debs]).stdout
    files = {line.split()[-1]: line.split() for line in listing.splitlines()}
    assert {words[1] for words in files.values()} == {"root/root"}
    modes = {name: words[0] for name, words in files.items() if not name.endswith("/")}
    assert modes == {
        "./usr/bin/recvirt-nested-check": "-rwxr-xr-x",
        "./usr/lib/recvirt/l2-initramfs.cpio": "-rw-r--r--",
        f"./usr/share/doc/{NAME}/changelog.gz": "-rw-r--r--",
        f"./usr/share/doc/{NAME}/copyright": "-rw-r--r--",
        "./usr/share/man/man8/recvirt-nested-check.8.gz": "-rw-r--r--",
    }
    assert len({" ".join(words[3:5]) for words in files.values()}) == 1, "one time for everything"


def test_packages_install_and_verify(debs: Path, tools: ToolsRoot, tmp_path: Path) -> None:
    admin = tmp_path / "root/var/lib/dpkg"
    admin.mkdir(parents=True)
    (admin / "status").write_text("")
    words = ["dpkg", f"--root={tmp_path}/root", "--force-not-root", "--log=/dev/null"]
    words += ["--path-include=*"]  # a tools root leaves documentation out
    tools.run([*words, "--force-depends", "-i", str(debs / f"{NAME}.deb")], readable=[debs], writable=[tmp_path])
    assert tools.run([*words, "--verify", NAME], writable=[tmp_path]).stdout == ""
    (tmp_path / "root/usr/bin/recvirt-nested-check").write_text("changed")
    assert NAME in tools.run([*words, "--verify", NAME], writable=[tmp_path], check=False).stdout


def test_program_is_small_and_static(program: Path, installed: Path) -> None:
    data = program.read_bytes()
    assert len(data) < 200_000
    assert (installed / "usr/lib/recvirt/l2-initramfs.cpio").stat().st_size < 1_000_000
    (offset,) = struct.unpack_from("<Q", data, 0x20)
    size, count = struct.unpack_from("<HH", data, 0x36)
    kinds = {struct.unpack_from("<I", data, offset + i * size)[0] for i in range(count)}
    assert 3 not in kinds, "it asks for a dynamic loader (PT_INTERP)"


def test_manual_page_is_compressed_without_name_and_time(installed: Path) -> None:
    data = (installed / "usr/share/man/man8/recvirt-nested-check.8.gz").read_bytes()
    assert data[:2] == b"\x1f\x8b"
    assert data[3] & 0x08 == 0
    assert data[4:8] == b"\0\0\0\0"


def test_initramfs_unpacks_with_cpio(installed: Path, tools: ToolsRoot) -> None:
    archive = installed / "usr/lib/recvirt/l2-initramfs.cpio"
    listing = tools.run(["sh", "-c", f"cpio -tv < {archive}"], readable=[archive]).stdout
    assert {line.split()[-1] for line in listing.splitlines()} == {
        "dev", "proc", "sys", "modules", "dev/console", "init", "recvirt-nested-check",
    }  # fmt: skip
    assert "crw-------" in next(line for line in listing.splitlines() if line.endswith("dev/console"))


# -- the program on fake machines ------------------------------------------------------------------------------------


@dataclass
class Machine:
    """A fake machine below a folder, for ``--root``."""

    root: Path
    vendor: str = "AuthenticAMD"
    flags: str = "fpu lm svm npt avic vgif"
    files: dict[str, str] = field(default_factory=dict)

    def write(self) -> Path:
        cpuinfo = f"processor\t: 0\nvendor_id\t: {self.vendor}\nmodel name\t: A  Processor\nflags\t\t: {self.flags}\n"
        for name, text in {"proc/cpuinfo": cpuinfo, **self.files}.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return self.root


KVM = {"dev/kvm": "", "sys/module/kvm/parameters/nx_huge_pages": "N\n"}
AMD = {**KVM, "sys/module/kvm_amd/parameters/nested": "1\n", "sys/module/kvm_amd/parameters/npt": "Y\n"}
INTEL = {**KVM, "sys/module/kvm_intel/parameters/nested": "Y\n", "sys/module/kvm_intel/parameters/ept": "Y\n"}


@pytest.fixture
def judge(program: Path, tools: ToolsRoot, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(**facts: Any) -> dict[str, Any]:
        root = Machine(tmp_path / "machine", **facts).write()
        done = tools.run(
            [str(program), "--json", "--root", str(root)], readable=[program, root], ok_statuses=(0, 10, 11, 12, 13, 14)
        )
        report: dict[str, Any] = json.loads(done.stdout)
        assert report["status"] == done.status
        assert done.stdout.count("\n") == 1
        assert {guest["state"] for guest in report["l2"]} == {"skipped"}
        return report

    return run


def steps(report: dict[str, Any], name: str) -> tuple[str, str]:
    check = next(check for check in report["checks"] if check["name"] == name)
    return check["state"], check["next"] or ""


def test_amd_with_everything(judge: Callable[..., dict[str, Any]]) -> None:
    report = judge(files=AMD)
    assert (report["status"], report["verdict"], report["deeper"]) == (0, "not-proved", True)
    assert report["cpu"]["extension"] == "svm"
    assert report["cpu"]["model"] == "A Processor"
    assert report["features"]["npt"] is True
    assert report["features"]["x2avic"] is False
    assert report["features_source"] == "cpuinfo"
    assert report["modules"]["kvm_amd"]["parameters"]["nested"] == "1"
    assert report["modules"]["kvm_amd"]["parameters"]["vls"] is None
    assert report["device"]["state"] == "not-tried"


def test_nested_switched_off(judge: Callable[..., dict[str, Any]]) -> None:
    report = judge(files={**AMD, "sys/module/kvm_amd/parameters/nested": "0\n"})
    assert (report["status"], report["verdict"], report["deeper"]) == (14, "not-deeper", False)
    state, step = steps(report, "deeper")
    assert state == "fail"
    assert "options kvm_amd nested=1" in step


def test_nested_paging_switched_off_is_a_warning(judge: Callable[..., dict[str, Any]]) -> None:
    report = judge(files={**AMD, "sys/module/kvm_amd/parameters/npt": "N\n"})
    assert report["status"] == 0
    state, step = steps(report, "paging")
    assert state == "warn"
    assert "kvm_amd.npt=1" in step


def test_no_device(judge: Callable[..., dict[str, Any]]) -> None:
    report = judge(files={})
    assert (report["status"], report["verdict"]) == (11, "no-device")
    assert steps(report, "module") == ("fail", "modprobe kvm_amd; if that fails, dmesg says why")


@pytest.mark.parametrize(
    ("vendor", "words"),
    [
        ("Google", "--enable-nested-virtualization"),
        ("Amazon EC2", "NestedVirtualization=enabled"),
        ("Microsoft Corporation", "ExposeVirtualizationExtensions"),
        ("VMware, Inc.", "vhv.enable"),
        ("OpenStack Foundation", "host-passthrough"),
        ("Somebody", "turn nested virtualization on at the provider"),
    ],
)
def test_no_flag_says_how_to_get_it_by_provider(judge: Callable[..., dict[str, Any]], vendor: str, words: str) -> None:
    report = judge(flags="fpu lm hypervisor", files={**KVM, "sys/class/dmi/id/sys_vendor": f"{vendor}\n"})
    assert (report["status"], report["verdict"]) == (10, "no-cpu-support")
    assert report["cpu"]["extension"] is None
    state, step = steps(report, "cpu")
    assert state == "fail"
    assert words in step


def test_real_machine_without_flag_is_sent_to_its_firmware(judge: Callable[..., dict[str, Any]]) -> None:
    report = judge(flags="fpu lm", files=KVM)
    assert report["hypervisor"]["present"] is False
    assert "firmware" in steps(report, "cpu")[1]


def test_interpreting_kvm_is_named(judge: Callable[..., dict[str, Any]]) -> None:
    report = judge(flags="fpu lm hypervisor", files={**KVM, "sys/module/kvm_pvm/x": ""})
    assert report["modules"]["kvm_pvm"]["loaded"] is True
    assert steps(report, "module")[0] == "warn"


def cpuid_dump(signature: str = "KVMKVMKVM\0\0\0", *, vmx: bool = True, extra: str = "") -> str:
    ebx, ecx, edx = struct.unpack("<III", signature.encode())
    features = 0x80000000 | (0x20 if vmx else 0)
    return (
        "CPU:\n"
        "   0x00000000 0x00: eax=0x0000000d ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69\n"
        f"   0x00000001 0x00: eax=0x00000000 ebx=0x00000000 ecx=0x{features:08x} edx=0x00000000\n"
        f"   0x40000000 0x00: eax=0x4000000a ebx=0x{ebx:08x} ecx=0x{ecx:08x} edx=0x{edx:08x}\n{extra}"
    )


VMX_MSRS = "0x482 0xfff9fffe04006172\n0x48b {controls:x}00000000\n0x3a {lock:x}\n"


def test_intel_by_cpuid_and_msr(judge: Callable[..., dict[str, Any]]) -> None:
    controls = 1 << 1 | 1 << 5 | 1 << 7 | 1 << 8  # EPT, VPID, unrestricted guest, half of APICv
    files = {**INTEL, "cpuid": cpuid_dump(), "msr": VMX_MSRS.format(controls=controls, lock=5)}
    report = judge(vendor="GenuineIntel", flags="fpu lm vmx", files=files)
    assert report["cpu"]["vendor"] == "GenuineIntel"
    assert report["cpu"]["locked_by_firmware"] is False
    assert report["hypervisor"]["signature"] == "KVMKVMKVM"
    assert report["features_source"] == "msr"
    assert report["features"] == {
        "ept": True, "vpid": True, "unrestricted_guest": True, "shadow_vmcs": False, "apicv": False,
        "enlightened_vmcs": False,
    }  # fmt: skip
    assert report["status"] == 0


def test_intel_by_cpuinfo_alone(judge: Callable[..., dict[str, Any]]) -> None:
    flags = "fpu lm vmx hypervisor\nvmx flags\t: vnmi ept shadow_vmcs vapic_reg vid"
    report = judge(vendor="GenuineIntel", flags=flags, files=INTEL)
    assert report["features_source"] == "cpuinfo"
    names = {name for name, present in report["features"].items() if present}
    assert names == {"ept", "shadow_vmcs", "apicv"}
    assert report["features"]["enlightened_vmcs"] is None


def test_firmware_lock(judge: Callable[..., dict[str, Any]]) -> None:
    files = {**INTEL, "cpuid": cpuid_dump(), "msr": VMX_MSRS.format(controls=2, lock=1)}
    report = judge(vendor="GenuineIntel", flags="fpu lm", files=files)
    assert (report["status"], report["cpu"]["locked_by_firmware"]) == (10, True)
    assert "firmware" in steps(report, "cpu")[1]


HYPER_V = (
    "   0x40000004 0x00: eax=0x00004000 ebx=0x00000000 ecx=0x00000000 edx=0x00000000\n"
    "   0x4000000a 0x00: eax=0x00000101 ebx=0x00000000 ecx=0x00000000 edx=0x00000000\n"
)


@pytest.mark.parametrize(("value", "state"), [("N", "warn"), ("Y", "ok")])
def test_enlightened_vmcs_of_hyper_v(judge: Callable[..., dict[str, Any]], value: str, state: str) -> None:
    files = {
        **INTEL,
        "cpuid": cpuid_dump("Microsoft Hv", extra=HYPER_V),
        "sys/module/kvm_intel/parameters/enlightened_vmcs": value,
    }
    report = judge(vendor="GenuineIntel", flags="fpu lm vmx", files=files)
    assert report["hypervisor"]["name"] == "Hyper-V"
    assert report["features"]["enlightened_vmcs"] is True
    assert steps(report, "enlightened_vmcs")[0] == state


def test_kvm_behind_hyper_vs_interface_is_seen(judge: Callable[..., dict[str, Any]]) -> None:
    ebx, ecx, edx = struct.unpack("<III", b"KVMKVMKVM\0\0\0")
    extra = f"   0x40000100 0x00: eax=0x40000101 ebx=0x{ebx:08x} ecx=0x{ecx:08x} edx=0x{edx:08x}\n"
    report = judge(
        vendor="GenuineIntel", flags="lm", files={"cpuid": cpuid_dump("Microsoft Hv", vmx=False, extra=extra)}
    )
    assert report["hypervisor"] == {
        "present": True, "signature": "Microsoft Hv", "second_signature": "KVMKVMKVM", "name": "KVM",
    }  # fmt: skip
    assert "QEMU: -cpu host" in steps(report, "cpu")[1]


def test_odd_names_stay_json(judge: Callable[..., dict[str, Any]]) -> None:
    report = judge(files={**AMD, "sys/class/dmi/id/product_name": 'a "quoted\\ \t\x01näme\n'})
    assert report["machine"]["product"].startswith('a "quoted\\ ')


# -- the program itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "Exit status:"),
        (["--version"], 0, "recvirt-nested-check 0."),
        (["--answer-for=a"], 0, "af63dc4c8601ec8c"),
        (["--bogus"], 2, "--help lists the options"),
        (["--timeout=0"], 2, "whole number from 1 to 3600"),
        (["--rounds=1x"], 2, "whole number from 1"),
        (["--rounds=-1"], 2, "whole number from 1"),
        (["--root=/nowhere"], 2, "not a directory"),
        (["more"], 2, "one word too many"),
        (["--write-initramfs=/tmp/x", "--kernel-release=none"], 1, "modules.dep: No such file"),
    ],
)
def test_options(program: Path, tools: ToolsRoot, words: list[str], status: int, said: str) -> None:
    done = tools.run([str(program), *words], readable=[program], check=False)
    assert done.status == status
    assert said in done.stdout + done.stderr


def test_without_a_device_it_says_so(program: Path, tools: ToolsRoot) -> None:
    # The sandbox has no /dev/kvm; what the processor is depends on where the tests run.
    done = tools.run([str(program)], readable=[program], check=False)
    assert done.status in (10, 11)
    assert "there is no /dev/kvm" in done.stdout
    assert "was not started" in done.stdout


def test_full_disk_is_an_error(program: Path, tools: ToolsRoot) -> None:
    done = tools.run(["sh", "-c", f"{program} --json > /dev/full"], readable=[program], check=False)
    assert done.status == 1
    assert "No space left" in done.stderr


# -- guests that hang, lie or die ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooked(tools: ToolsRoot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with the hooks for tests, and warnings as errors."""
    folder = tmp_path_factory.mktemp("hooked")
    sources = data_path("packages", NAME, "src")
    argv = compile_argv(
        PROGRAMS[NAME]["usr/bin/recvirt-nested-check"], folder / "check", "0",
        extra=["-DRECVIRT_TEST_HOOKS", "-Werror"],
    )  # fmt: skip
    tools.run(argv, readable=[sources], writable=[folder], cwd=sources)
    return folder / "check"


@pytest.mark.parametrize(("hook", "state", "said"), [("hang", "timeout", "silent for 1 s"), ("die", "failed", "died")])
def test_guest_that_hangs_or_dies(hooked: Path, tools: ToolsRoot, hook: str, state: str, said: str) -> None:
    started = time.monotonic()
    done = tools.run(
        [str(hooked), "--json", "--timeout=1"], readable=[hooked], env={"RECVIRT_TEST_L2": hook}, ok_statuses=(10, 13)
    )
    assert time.monotonic() - started < 8
    report = json.loads(done.stdout)
    assert report["l2"][0]["state"] == state
    assert said in report["l2"][0]["error"]
    assert report["l2"][1]["state"] == "failed"
    assert report["verdict"] in ("no-cpu-support", "l2-failed")


def test_killed_check_leaves_no_guest(hooked: Path, tools: ToolsRoot) -> None:
    count = "grep -lzx RECVIRT_TEST_L2=hang /proc/[0-9]*/environ | wc -l"
    script = (
        f"env RECVIRT_TEST_L2=hang {hooked} --timeout=60 >/dev/null & sleep 1; {count}; kill -9 $!; sleep 1; {count}"
    )
    done = tools.run(["sh", "-c", script], readable=[hooked], check=False)
    assert done.stdout.split() == ["2", "0"], "the check and its guest"


def test_shipped_folder_is_what_is_built() -> None:
    package = read_package(data_path("packages", NAME))
    assert any(item.path == "src/l2.c" for item in package.files)
