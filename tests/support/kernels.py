"""Small kernel trees for tests: Kconfig files with the traps of real ones."""

from __future__ import annotations

from pathlib import Path

MAKEFILE = """\
# SPDX-License-Identifier: GPL-2.0
VERSION = 6
PATCHLEVEL = 12
SUBLEVEL = 117
EXTRAVERSION ={extraversion}
NAME = Test
"""

KCONFIG = """\
mainmenu "Linux/$(ARCH)"

source "drivers/Kconfig"

config BLOCK
	bool "Block layer" if EXPERT
	default y
	help
		Words of help.

		config NOT_REAL
			bool "is an example in a help text"

config MMU
	def_bool y

choice
	prompt "Tick"
	default HZ_250

config HZ_100
	bool "100 HZ"

config HZ_250
	bool "250 HZ"

endchoice

config CRC
	tristate

config EXT
	tristate "A file system" # with a remark
	select CRC if BLOCK

config CONDITIONAL
	bool "since 7.0"
	depends on BLOCK if MMU

config LONG
	bool "continued"
	depends on BLOCK && \\
		$(cc-option,-mfoo(1)) && MMU

config OLD
	bool
	transitional
"""

DRIVERS = """\
menu "Drivers"
	depends on HAVE_BUS

comment "needs a bus"
	depends on !HAVE_BUS

config AFTER_COMMENT
	bool "after a comment"

if USB

config USB_DISK
	tristate "Disks on USB"
	depends on BLOCK || !MMU

endif
endmenu
"""


def write_tree(folder: Path, *, kconfig: str = KCONFIG, drivers: str = DRIVERS, extraversion: str = "") -> Path:
    """A tree with a Makefile that tells a version and Kconfig files that can be read; it can't be built."""
    (folder / "drivers").mkdir(parents=True)
    (folder / "Makefile").write_text(MAKEFILE.format(extraversion=f" {extraversion}" if extraversion else ""))
    (folder / "Kconfig").write_text(kconfig)
    (folder / "drivers/Kconfig").write_text(drivers)
    return folder
