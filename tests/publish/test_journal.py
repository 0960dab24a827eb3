"""What a machine's runs leave each other on disk."""

from __future__ import annotations

from pathlib import Path

from recvirt.publish.journal import machine_mark


def test_a_machine_s_mark_is_made_once_and_is_its_own(tmp_path: Path) -> None:
    first = machine_mark(tmp_path / "a")
    assert machine_mark(tmp_path / "a") == first != machine_mark(tmp_path / "b")
    assert len(first) == 8 and [path.name for path in (tmp_path / "a").iterdir()] == ["machine"]
