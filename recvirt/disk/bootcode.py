"""Puts what firmware starts onto a disk: GRUB for BIOS and UEFI, the ESP, and the partition table.

Owns the order. Does not own: the bytes (:mod:`recvirt.disk.grub`, :mod:`recvirt.disk.gpt`) or GRUB's menu.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from recvirt.disk import filesystem, gpt, grub
from recvirt.disk.layout import Layout
from recvirt.sandbox import ToolsRoot


@dataclass(frozen=True)
class Loader:
    """The disk (a sparse file of full length) and what writing to it needs."""

    disk: Path
    layout: Layout
    tools: ToolsRoot
    scratch: Path
    log: Path
    epoch: int

    def write(self, esp: Path) -> None:
        """Make both loaders, fill the ESP from the folder ``esp`` (which gets the UEFI one), write table and core."""
        core, loader = self.scratch / "core.img", self.scratch / "BOOTX64.EFI"
        for target, output in (("i386-pc", core), ("x86_64-efi", loader)):
            self._run(grub.mkimage_argv(target, output))
        (esp / "EFI/BOOT").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(loader, esp / "EFI/BOOT/BOOTX64.EFI")
        for path in (esp, *esp.rglob("*")):
            os.utime(path, (self.epoch, self.epoch))
        self._run(filesystem.mkfs_esp_argv(self.disk, self.layout))
        self._run(filesystem.copy_to_esp_argv(self.disk, self.layout, sorted(esp.iterdir())))
        boot_image = (self.tools.rootfs / "usr/lib/grub/i386-pc/boot.img").read_bytes()
        with self.disk.open("r+b") as stream:
            gpt.write_table(stream, self.layout, grub.boot_code(boot_image, self.layout.bios.first_lba))
            grub.write_core(stream, self.layout, core.read_bytes())

    def _run(self, argv: list[str]) -> None:
        env = {"SOURCE_DATE_EPOCH": str(self.epoch), "TZ": "UTC", "MTOOLS_SKIP_CHECK": "1"}
        self.tools.run(argv, writable=[self.scratch], log_path=self.log, env=env)
