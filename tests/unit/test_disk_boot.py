"""Command line, boot.conf, dpkg's part of the kernel's installation, and the facts told about an image."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from recvirt.disk import bootconf, facts, packages, spdx
from recvirt.disk.initramfs import check_tool
from recvirt.disk.kernelpkg import dpkg_argv, is_wanted, path_options, unsettled
from recvirt.disk.layout import MIB, derived_uuid, plan_layout
from recvirt.disk.rootfill import check_memory
from recvirt.disk.tarmerge import TarIndex
from recvirt.errors import ConfigError, SpaceError

LAYOUT = plan_layout(512 * MIB, 64 * MIB, "s")
STATUS = """Package: bash
Status: install ok installed
Architecture: amd64
Version: 5.2-2+b1
Source: bash (5.2-2)
Installed-Size: 7000
Maintainer: M <m@example>
Description: shell
 Source: not a field

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: linux-image-6.12-recvirt
Status: install ok installed
Architecture: amd64
Version: 1
"""


def test_the_command_line_finds_its_root_without_an_initramfs() -> None:
    words = bootconf.command_line(LAYOUT, "ext4", ["mitigations=auto"]).split()
    assert words[0] == f"root=PARTUUID={LAYOUT.root.part_uuid}"
    assert {"rootfstype=ext4", "panic=10", "console=tty0"} <= set(words)
    assert [word for word in words if word.startswith("console=")][-1] == "console=ttyS0,115200"
    assert words[-1] == "mitigations=auto", "the profile's words come last and win"
    assert "gpt" in words, "a torn primary partition table would leave the root unfound, though its backup is whole"
    assert any(word.startswith("rootwait=") for word in words), "without a limit a lost disk would hang for ever"


def test_words_are_split_at_blanks() -> None:
    assert bootconf.command_line(LAYOUT, "ext4", ["a=1 b", "c"]).endswith(" a=1 b c")


def test_boot_conf_is_read_back_by_a_shell(tmp_path: Path) -> None:
    path = tmp_path / "boot.conf"
    line = bootconf.command_line(LAYOUT, "xfs", ["a=b*c"])
    path.write_text(bootconf.boot_conf(line, 7))
    done = subprocess.run(
        ["sh", "-c", '. "$1"; printf "%s|%s" "$CMDLINE" "$TIMEOUT"', "x", str(path)], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == f"{line}|7"


def test_only_installed_packages_count_with_their_sources() -> None:
    found = packages.installed(packages.parse_status(STATUS).values())
    assert [package.name for package in found] == ["bash", "linux-image-6.12-recvirt"]
    assert found[0].as_json() == {
        "name": "bash", "version": "5.2-2+b1", "arch": "amd64", "source": "bash", "source_version": "5.2-2",
        "installed_kb": 7000,
    }  # fmt: skip
    assert (found[1].source_name, found[1].source_version) == ("linux-image-6.12-recvirt", "1")


def test_the_owner_of_a_kernel_is_found_in_dpkg_s_lists(tmp_path: Path) -> None:
    (tmp_path / "bash.list").write_text("/bin/bash\n")
    (tmp_path / "linux-image-6.list").write_text("/.\n/boot\n/boot/vmlinuz-6\n")
    assert packages.owner_of("/boot/vmlinuz-6", tmp_path) == "linux-image-6"
    assert packages.owner_of("/boot/vmlinuz", tmp_path) == ""


def test_packages_that_the_kernel_disturbed_are_told() -> None:
    before = packages.parse_status(STATUS)
    half = STATUS.replace("ok installed", "ok half-configured", 1)
    after = packages.parse_status(half)
    assert unsettled(before, before) == []
    assert len(unsettled(before, packages.parse_status(STATUS.replace("Version: 5.2-2+b1", "Version: 6")))) == 1
    assert any("half-configured" in text for text in unsettled(before, after))


def test_a_kernel_package_that_is_not_configured_is_told() -> None:
    new = STATUS + "\nPackage: linux-image-x\nStatus: install ok unpacked\nArchitecture: amd64\nVersion: 1\n"
    assert unsettled(packages.parse_status(STATUS), packages.parse_status(new)) == [
        "linux-image-x:amd64 is 'install ok unpacked'"
    ]


def test_the_image_s_own_exclusions_hold_for_the_kernel_too() -> None:
    config = "# comment\npath-exclude=/usr/share/doc/*\npath-include=/usr/share/doc/*/copyright\nlog /var/log/x\n"
    assert path_options([config]) == [
        "--path-exclude=/usr/share/doc/*",
        "--path-include=/usr/share/doc/*/copyright",
    ]


def test_dpkg_runs_no_script_of_the_tools_and_writes_no_log() -> None:
    argv = dpkg_argv(Path("/t"), Path("/k.deb"))
    assert "--root=/t" in argv and "--force-script-chrootless" in argv and "--log=/dev/null" in argv


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("var/lib/dpkg/status", True), ("lib", True), ("boot/vmlinuz-6", True), ("usr/bin/bash", False),
     ("var/lib/dpkgx", False), ("etc/passwd", True), ("etc/passwd-", False), ("usr/lib/os-release", True)],
)  # fmt: skip
def test_only_what_dpkg_and_the_menu_need_is_unpacked(name: str, wanted: bool) -> None:
    assert is_wanted(name) is wanted


def test_an_initramfs_needs_its_tools(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="update-initramfs"):
        check_tool(TarIndex(tmp_path / "none", ()))


def test_a_tree_that_does_not_fit_into_memory_is_refused_with_both_numbers(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        2000000 kB\nMemAvailable:    1800000 kB\n")
    check_memory(800_000_000, meminfo)
    with pytest.raises(SpaceError, match=r"1\.1 GB, 1\.0 GB"):
        check_memory(1_000_000_000, meminfo)


def some_facts() -> facts.Facts:
    found = packages.installed(packages.parse_status(STATUS).values())
    return facts.Facts(
        profile="default", suite="trixie", filesystem="ext4", initramfs="none", release="6.12-recvirt",
        kernel_package="linux-image-6.12-recvirt", cmdline="root=x", epoch=1_700_000_000, stages={"root": "key"},
        tools=("grub-common=2.12",), layout=LAYOUT, packages=found,
    )  # fmt: skip


def test_facts_name_partitions_and_packages() -> None:
    told = some_facts().as_json()
    assert [part["name"] for part in told["partitions"]] == ["bios", "esp", "root"]
    assert (told["packages"], told["installed_kb"]) == (2, 7000)
    assert told["kernel"]["release"] == "6.12-recvirt"


def test_the_source_note_names_every_package_s_copyright_file() -> None:
    note = facts.sources_note(some_facts(), {"source": "linux-source-6.12"}, {"usr/share/doc/bash/copyright"})
    assert "bash 5.2-2+b1 bash 5.2-2 /usr/share/doc/bash/copyright" in note
    assert "linux-image-6.12-recvirt 1 linux-image-6.12-recvirt 1 see the source package" in note
    assert 'source: "linux-source-6.12"' in note
    assert "grub-common=2.12" in note


def subject() -> spdx.Subject:
    return spdx.Subject(
        "image", "trixie", "linux-image-6.12-recvirt", 1_700_000_000, derived_uuid("s", "sbom"), "ab" * 32
    )


def test_the_bill_of_materials_lists_each_package_once_and_ties_it_to_the_image() -> None:
    document = spdx.document(some_facts().packages, subject())
    assert document["spdxVersion"] == "SPDX-2.3"
    assert document["creationInfo"]["created"] == "2023-11-14T22:13:20Z"
    names = {package["SPDXID"]: package["name"] for package in document["packages"]}
    assert list(names.values()) == ["image", "bash", "linux-image-6.12-recvirt"]
    related = {item["relatedSpdxElement"] for item in document["relationships"]}
    assert related == set(names)
    assert document["packages"][0]["checksums"] == [{"algorithm": "SHA256", "checksumValue": "ab" * 32}]


def test_package_urls_are_given_for_debian_s_packages_only() -> None:
    _, bash, kernel = spdx.document(some_facts().packages, subject())["packages"]
    locator = bash["externalRefs"][0]["referenceLocator"]
    assert locator == "pkg:deb/debian/bash@5.2-2%2Bb1?arch=amd64&distro=debian-trixie"
    assert "externalRefs" not in kernel
    assert kernel["supplier"] == "Organization: recvirt"
