"""The syntax of package lists, and that the shipped ones keep it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recvirt.data import package_list_path, shipped_names
from recvirt.errors import ConfigError
from recvirt.rootfs.lists import SUITES, parse_list, read_lists


def test_names_suites_and_comments() -> None:
    entries, problems = parse_list("# why\n\nsystemd   # init\nsystemd-repart [trixie sid]\nlibc6\n", "x.list")
    assert not problems
    assert [(e.name, e.suites, e.line) for e in entries] == [
        ("systemd", (), 3),
        ("systemd-repart", ("trixie", "sid"), 4),
        ("libc6", (), 5),
    ]
    assert entries[1].wanted_in("sid") and not entries[1].wanted_in("bookworm")
    assert entries[0].wanted_in("bookworm")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("Systemd", "not a Debian package name"),
        ("a", "not a Debian package name"),
        ("-x", "not a Debian package name"),
        ("two names", "is not a package name with suites in brackets"),
        ("foo=1.0", "not a Debian package name"),
        ("foo/trixie", "not a Debian package name"),
        ("foo;reboot", "not a Debian package name"),
        ("foo [jessie]", "'jessie' is not one of the suites"),
        ("foo []", "the brackets are empty"),
        ("foo [trixie", "is not a package name with suites in brackets"),
        ("systemd", "systemd is in line 1 already"),
        ("systemd [sid]", "systemd is in line 1 already"),
    ],
)
def test_every_fault_is_told_with_its_line(line: str, fault: str) -> None:
    _, problems = parse_list(f"systemd\n\n{line}\n", "some.list")
    assert len(problems) == 1
    assert str(problems[0]).startswith("some.list:3: ")
    assert fault in problems[0].message


def test_a_name_may_stand_twice_for_different_suites() -> None:
    entries, problems = parse_list("dhcp-one [bookworm]\ndhcp-one [trixie]\n", "x")
    assert len(entries) == 2 and not problems


def test_an_empty_list_is_a_fault() -> None:
    assert parse_list("# nothing\n", "x")[1][0].message == "the list names no package"


def test_all_faults_of_all_lists_at_once(tmp_path: Path) -> None:
    (tmp_path / "one.list").write_text("Bad\ngood\nx [y]\n")
    (tmp_path / "two.list").write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError) as caught:
        read_lists([tmp_path / "one.list", tmp_path / "gone.list", tmp_path / "two.list"], "trixie")
    places = [(Path(p.file).name, p.line) for p in caught.value.problems]
    assert places == [("one.list", 1), ("one.list", 3), ("one.list", 3), ("gone.list", 0), ("two.list", 0)]


def test_lists_are_joined_for_a_suite(tmp_path: Path) -> None:
    (tmp_path / "a.list").write_text("zsh\nnew [trixie]\nold [bookworm]\n")
    (tmp_path / "b.list").write_text("bash\nzsh\n")
    paths = [tmp_path / "a.list", tmp_path / "b.list"]
    assert read_lists(paths, "trixie") == ("bash", "new", "zsh")
    assert read_lists(paths, "bookworm") == ("bash", "old", "zsh")


@given(st.text())
def test_any_text_gives_entries_or_problems(text: str) -> None:
    entries, problems = parse_list(text, "x")
    assert entries or problems
    assert all(p.line <= len(text.splitlines()) for p in problems)


def test_the_shipped_lists_are_the_promised_ones() -> None:
    assert set(shipped_names("package-lists")) == {
        "base", "bench", "cloud", "debug", "kvm-host", "nested-cloud", "nested-cloud-central", "nested-cloud-worker",
        "nfs",
    }  # fmt: skip


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", shipped_names("package-lists"))
def test_a_shipped_list_parses_and_says_something_for_every_suite(name: str, suite: str) -> None:
    assert read_lists([package_list_path(name)], suite)


@pytest.mark.parametrize("name", shipped_names("package-lists"))
def test_a_shipped_list_says_what_it_is_for(name: str) -> None:
    assert package_list_path(name).read_text().startswith("# ")
