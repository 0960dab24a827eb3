"""recvirt-update-boot, run by a real shell on trees of its own: the menu, and what the boot loader remembers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from recvirt.data import data_path

SCRIPT = data_path("packages", "recvirt-boot", "root", "usr", "sbin", "recvirt-update-boot")
HEADER = "# GRUB Environment Block\n"


class Tree:
    """A system below a folder: kernels, a configuration, an ESP."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.running = "6.12.1-running"
        (root / "boot/efi/recvirt").mkdir(parents=True)
        (root / "etc/recvirt").mkdir(parents=True)
        self.configure("root=PARTUUID=1-2 ro console=ttyS0,115200")

    def configure(self, cmdline: str, more: str = "") -> None:
        (self.root / "etc/recvirt/boot.conf").write_text(f"CMDLINE='{cmdline}'\n{more}")

    def add(self, *releases: str) -> None:
        for release in releases:
            (self.root / f"boot/vmlinuz-{release}").write_text("kernel")

    def remove(self, release: str) -> None:
        (self.root / f"boot/vmlinuz-{release}").unlink()

    def run(self, *words: str, status: int = 0) -> str:
        fakes = self.root / "fakes"
        fakes.mkdir(exist_ok=True)
        (fakes / "uname").write_text(f"#!/bin/sh\necho {self.running}\n")
        (fakes / "uname").chmod(0o755)
        done = subprocess.run(
            ["sh", str(SCRIPT), "--root", str(self.root), *words], capture_output=True, text=True,
            env={"PATH": f"{fakes}:{os.environ['PATH']}"}, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def menu(self) -> str:
        return (self.root / "boot/grub/grub.cfg").read_text()

    @property
    def entries(self) -> list[str]:
        lines = self.menu.splitlines()
        return [line.split("--id ")[1].split(" ")[0].strip("'") for line in lines if "menuentry " in line]

    @property
    def memory(self) -> dict[str, str]:
        block = (self.root / "boot/efi/recvirt/grubenv").read_bytes()
        assert len(block) == 1024
        text = block.decode()
        assert text.startswith(HEADER)
        lines = text[len(HEADER) :].rstrip("#").splitlines()
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A tree with one kernel that is known to be good."""
    found = Tree(tmp_path)
    found.add("6.12.1-running")
    found.run("--set-good", "6.12.1-running")
    return found


def test_newest_kernel_comes_first_by_version_not_by_letters(tree: Tree) -> None:
    tree.add("6.9.30-old", "6.12.10-new")
    tree.run()
    assert [entry for entry in tree.entries if "-rescue" not in entry and "-emergency" not in entry][:3] == [
        "kernel-6.12.10-new",
        "kernel-6.12.1-running",
        "kernel-6.9.30-old",
    ]


def test_grub_can_take_no_identifier_for_a_number(tree: Tree) -> None:
    """To GRUB "6.12.1" means the seventh entry (grub-core/normal/menu.c), which may be any: restart, for example."""
    tree.add("6.12.10-new")
    tree.run()
    assert len(tree.entries) > 6 and all(entry[0].isalpha() for entry in tree.entries)
    assert re.findall(r'set default="(\S+)"', tree.menu) == ["kernel-$saved_entry", "kernel-$tried_entry"]


def test_the_fallback_is_the_place_of_the_good_kernel(tree: Tree) -> None:
    tree.add("6.12.10-new", "6.9.30-old")
    tree.run()
    places = re.findall(r'if \[ "\$saved_entry" = "(\S+)" \]; then\n +set fallback=(\d+)\n', tree.menu)
    assert [version for version, _ in places] == ["6.12.10-new", "6.12.1-running", "6.9.30-old"]
    assert [tree.entries[int(place)] for _, place in places] == [f"kernel-{version}" for version, _ in places]


def test_every_kernel_has_rescue_entries_that_need_no_password(tree: Tree) -> None:
    tree.add("6.12.10-new")
    tree.run()
    for release in ("6.12.1-running", "6.12.10-new"):
        for mode in ("rescue", "emergency"):
            block = tree.menu.split(f"--id 'kernel-{release}-{mode}'")[1].split("}")[0]
            assert f"systemd.unit={mode}.target" in block
            assert "SYSTEMD_SULOGIN_FORCE=1" in block
            assert f"/boot/vmlinuz-{release} " in block


def test_an_initrd_is_named_only_where_there_is_one(tree: Tree) -> None:
    tree.add("6.12.10-new")
    (tree.root / "boot/initrd.img-6.12.10-new").write_text("initrd")
    tree.run()
    assert "initrd /boot/initrd.img-6.12.10-new" in tree.menu
    assert "initrd.img-6.12.1-running" not in tree.menu


@pytest.mark.parametrize("name", ["6.1.dpkg-new", "6.1.old", "6.1;reboot", "6 1", "-rf"])
def test_files_that_are_no_kernels_stay_out_of_the_menu(tree: Tree, name: str) -> None:
    tree.add(name)
    tree.run()
    assert name not in tree.menu


def test_odd_words_of_the_command_line_are_quoted_for_grub(tree: Tree) -> None:
    tree.configure("root=PARTUUID=1-2 a=$b;c{")
    tree.run()
    assert "root=PARTUUID=1-2 'a=$b;c{'" in tree.menu


def test_a_star_in_the_command_line_is_not_expanded(tree: Tree) -> None:
    tree.configure("root=PARTUUID=1-2 x=*")
    tree.run()
    assert "'x=*'" in tree.menu


def test_later_configuration_files_win(tree: Tree) -> None:
    folder = tree.root / "etc/recvirt/boot.conf.d"
    folder.mkdir()
    (folder / "site.conf").write_text('CMDLINE="$CMDLINE nosmt"\nTIMEOUT=7\n')
    tree.run()
    assert "115200 nosmt" in tree.menu
    assert "set timeout=7" in tree.menu


def test_the_menu_is_replaced_as_a_whole(tree: Tree) -> None:
    before = (tree.root / "boot/grub/grub.cfg").stat()
    tree.run()
    assert (tree.root / "boot/grub/grub.cfg").stat().st_ino == before.st_ino, "an equal menu is left alone"
    tree.add("6.12.10-new")
    tree.run()
    assert (tree.root / "boot/grub/grub.cfg").stat().st_ino != before.st_ino
    assert not (tree.root / "boot/grub/grub.cfg.new").exists()


def test_without_any_kernel_the_old_menu_stays(tree: Tree) -> None:
    tree.remove("6.12.1-running")
    assert "left as it is" in tree.run(status=1)
    assert "6.12.1-running" in tree.menu


def test_without_a_configuration_nothing_is_written(tmp_path: Path) -> None:
    found = Tree(tmp_path)
    (tmp_path / "etc/recvirt/boot.conf").unlink()
    found.add("6.12.1-running")
    found.run("--new", "6.12.1-running")
    assert not (tmp_path / "boot/grub").exists()
    assert not (tmp_path / "boot/efi/recvirt/grubenv").exists()


def test_a_new_kernel_is_tried_once_and_the_good_one_stays_the_default(tree: Tree) -> None:
    tree.add("6.12.10-new")
    tree.run("--new", "6.12.10-new")
    assert tree.memory == {"saved_entry": "6.12.1-running", "next_entry": "6.12.10-new"}


def test_a_new_kernel_that_came_up_becomes_the_default(tree: Tree) -> None:
    tree.add("6.12.10-new")
    tree.run("--new", "6.12.10-new")
    grub_tries(tree)
    tree.running = "6.12.10-new"
    tree.run("--good")
    assert tree.memory == {"saved_entry": "6.12.10-new", "prev_entry": "6.12.1-running"}


def grub_tries(tree: Tree) -> None:
    """What the menu's own commands do before they start a kernel on trial."""
    memory = tree.memory
    memory["tried_entry"] = memory.pop("next_entry")
    text = HEADER + "".join(f"{name}={value}\n" for name, value in memory.items())
    (tree.root / "boot/efi/recvirt/grubenv").write_text(text.ljust(1024, "#"))


def test_a_new_kernel_that_did_not_come_up_is_remembered_as_failed(tree: Tree) -> None:
    tree.add("6.12.10-new")
    tree.run("--new", "6.12.10-new")
    grub_tries(tree)
    said = tree.run("--good")
    assert "6.12.10-new was tried and did not come up" in said
    assert tree.memory == {"saved_entry": "6.12.1-running", "failed_entry": "6.12.10-new"}
    assert "kernel-6.12.10-new" in tree.entries, "a person may still choose it"


def test_good_does_not_write_the_menu(tree: Tree) -> None:
    (tree.root / "boot/grub/grub.cfg").write_text("kept")
    tree.run("--good")
    assert tree.menu == "kept"


def test_a_kernel_from_outside_the_disk_is_not_remembered(tree: Tree) -> None:
    tree.running = "7.0-elsewhere"
    tree.run("--good")
    assert tree.memory == {"saved_entry": "6.12.1-running"}


def test_a_replaced_good_kernel_falls_back_to_the_one_before(tree: Tree) -> None:
    tree.add("6.12.10-new")
    tree.run("--new", "6.12.10-new")
    grub_tries(tree)
    tree.running = "6.12.10-new"
    tree.run("--good")
    tree.run("--new", "6.12.10-new")
    assert tree.memory["saved_entry"] == "6.12.1-running"
    assert tree.memory["next_entry"] == "6.12.10-new"


def test_removing_the_good_kernel_takes_the_one_before(tree: Tree) -> None:
    tree.add("6.12.10-new")
    tree.run("--new", "6.12.10-new")
    grub_tries(tree)
    tree.running = "6.12.10-new"
    tree.run("--good")
    tree.remove("6.12.10-new")
    tree.run("--removed", "6.12.10-new")
    assert tree.memory["saved_entry"] == "6.12.1-running"
    assert not any("6.12.10-new" in entry for entry in tree.entries)


def test_removing_a_kernel_ends_its_trial(tree: Tree) -> None:
    tree.add("6.12.10-new")
    tree.run("--new", "6.12.10-new")
    tree.remove("6.12.10-new")
    tree.run("--removed", "6.12.10-new")
    assert tree.memory == {"saved_entry": "6.12.1-running"}


def test_removed_means_nothing_while_the_file_is_there(tree: Tree) -> None:
    tree.run("--removed", "6.12.1-running")
    assert tree.memory == {"saved_entry": "6.12.1-running"}


def test_the_last_kernel_may_not_be_removed(tree: Tree) -> None:
    assert "the only kernel" in tree.run("--may-remove", "6.12.1-running", status=1)
    tree.add("6.12.10-new")
    tree.run("--may-remove", "6.12.1-running")


def test_words_in_the_environment_block_are_not_trusted(tree: Tree) -> None:
    block = f"{HEADER}saved_entry=x;reboot\nnext_entry=../../etc\n".ljust(1024, "#")
    (tree.root / "boot/efi/recvirt/grubenv").write_text(block)
    tree.add("6.12.10-new")
    tree.run("--new", "6.12.10-new")
    assert tree.memory == {"saved_entry": "6.12.10-new"}


def test_what_the_block_says_reaches_no_log_unchecked(tree: Tree) -> None:
    block = f"{HEADER}saved_entry=6.12.1-running\ntried_entry=\x1b[31m$(reboot)\n".ljust(1024, "#")
    (tree.root / "boot/efi/recvirt/grubenv").write_text(block)
    assert tree.run("--good") == ""


@pytest.mark.parametrize("version", ["", "a b", "$(reboot)", "../x"])
def test_versions_from_outside_are_checked(tree: Tree, version: str) -> None:
    tree.run("--new", version, status=2 if version == "" else 1)


def test_status_tells_what_each_kernel_is(tree: Tree) -> None:
    tree.add("6.12.10-new")
    tree.run("--new", "6.12.10-new")
    assert tree.run("--status") == "6.12.10-new (next)\n6.12.1-running (saved)\n"


def test_a_newer_loader_goes_to_the_esp_only_if_it_differs(tree: Tree) -> None:
    ours, target = tree.root / "usr/lib/recvirt-boot/BOOTX64.EFI", tree.root / "boot/efi/EFI/BOOT/BOOTX64.EFI"
    for path, text in ((ours, "new"), (target, "old")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    tree.run()
    assert target.read_text() == "new"
    inode = target.stat().st_ino
    tree.run()
    assert target.stat().st_ino == inode


@pytest.mark.parametrize(
    ("hook", "params", "called"),
    [
        ("postinst.d/zz-recvirt-boot", "configure", "--new 6.12.10-new"),
        ("postinst.d/zz-recvirt-boot", "abort-remove", ""),
        ("postrm.d/zz-recvirt-boot", "remove", "--removed 6.12.10-new"),
        ("postrm.d/zz-recvirt-boot", "upgrade 2", ""),
        ("prerm.d/recvirt-boot", "remove", "--may-remove 6.12.10-new"),
        ("prerm.d/recvirt-boot", "upgrade 2", ""),
    ],
)
def test_hooks_call_the_program_only_when_it_matters(tmp_path: Path, hook: str, params: str, called: str) -> None:
    source = data_path("packages", "recvirt-boot", "root", "etc", "kernel", *hook.split("/"))
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    script = source.read_text().replace("/usr/sbin/recvirt-update-boot", str(program))
    done = subprocess.run(
        ["sh", "-c", script, "hook", "6.12.10-new", "/boot/vmlinuz-6.12.10-new"], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "DEB_MAINT_PARAMS": params}, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, called)
