"""The image's own mending of a torn partition table, with the real sfdisk on a disk in a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recvirt.data import data_path
from recvirt.sandbox import ToolsRoot

_SECTOR = 512
_DISK_BYTES = 64 * 1024**2
#: In the partition's name: a byte that only the checksum of the table covers.
_NAME_OFFSET = 2 * 128 + 56 + 40
TEARS = {
    "primary table": 2 * _SECTOR + _NAME_OFFSET,
    "primary header": _SECTOR + 24,
    "backup table": _DISK_BYTES - 33 * _SECTOR + _NAME_OFFSET,
    "backup header": _DISK_BYTES - _SECTOR + 24,
}


@pytest.fixture
def disk(tools: ToolsRoot, tmp_path: Path) -> Path:
    """A disk with three partitions, like an image's."""
    path = tmp_path / "disk"
    with path.open("wb") as stream:
        stream.truncate(_DISK_BYTES)
    table = "label: gpt\nsize=1MiB, name=bios\nsize=8MiB, type=uefi, name=esp\ntype=linux, name=root\n"
    tools.run(["sfdisk", "--quiet", str(path)], input_text=table, writable=[tmp_path])
    return path


def mend(tools: ToolsRoot, disk: Path) -> str:
    """Run the script on this disk instead of the one that holds the root."""
    text = data_path("templates", "root", "usr/lib/recvirt/gpt-mend").read_text()
    text, found = re.subn(r"(?s)^partition=/sys/dev.*?^(?=case \$\(LC_ALL)", f"disk={disk}\n", text, flags=re.MULTILINE)
    assert found == 1
    return tools.run(["sh", "-c", text], writable=[disk.parent]).stdout


@pytest.mark.parametrize("where", TEARS)
def test_a_torn_copy_is_written_anew_from_the_whole_one(tools: ToolsRoot, disk: Path, where: str) -> None:
    whole = disk.read_bytes()
    with disk.open("r+b") as stream:
        stream.seek(TEARS[where])
        stream.write(bytes([whole[TEARS[where]] ^ 0x55]))
    assert "mending" in mend(tools, disk)
    assert disk.read_bytes() == whole
    assert mend(tools, disk) == ""


def test_a_whole_table_is_left_alone(tools: ToolsRoot, disk: Path) -> None:
    before = disk.stat().st_mtime_ns
    assert mend(tools, disk) == ""
    assert disk.stat().st_mtime_ns == before
