"""recvirt-nested-check: its help, header, manual page, documentation and packaging tell the same story."""

from __future__ import annotations

import re

from recvirt.data import data_path
from recvirt.stages.guest_debs import changelog_epoch, parse_control

PACKAGE = data_path("packages", "recvirt-nested-check")
SOURCES = {path.name: path.read_text() for path in (PACKAGE / "src").iterdir()}
MANUAL = (PACKAGE / "root/usr/share/man/man8/recvirt-nested-check.8").read_text()
GUIDE = (data_path("packages").parents[2] / "docs/nested-check.md").read_text()
HELP = re.search(r"print_help.*?\n}", SOURCES["main.c"], re.DOTALL)


def options() -> set[str]:
    return set(re.findall(r'\{ "([a-z-]+)", (?:no|required)_argument', SOURCES["main.c"]))


def statuses() -> set[int]:
    return {int(n) for n in re.findall(r"^    EXIT_[A-Z0-9_]+ = (\d+)", SOURCES["nested.h"], re.MULTILINE)}


def test_every_option_is_in_help_and_manual() -> None:
    assert HELP is not None
    assert {"json", "no-boot", "timeout", "root", "write-initramfs", "answer-for"} <= options()
    assert set(re.findall(r"--([a-z-]+)", HELP[0])) == options()
    # groff writes hyphens as \-
    manual = MANUAL.replace("\\-", "-")
    assert set(re.findall(r"--([a-z-]+)", manual)) == options()


def test_every_status_is_in_help_manual_and_guide() -> None:
    assert statuses() == {0, 1, 2, 10, 11, 12, 13, 14}
    assert HELP is not None
    assert {int(n) for n in re.findall(r'^ +" +(\d+)  ', HELP[0], re.MULTILINE)} == statuses()
    section = MANUAL.split(".SH EXIT STATUS")[1].split(".SH ")[0]
    assert {int(n) for n in re.findall(r"^\.B (\d+)$", section, re.MULTILINE)} == statuses()
    assert {int(n) for n in re.findall(r"^\| (\d+) \|", GUIDE, re.MULTILINE)} == statuses()


def test_every_verdict_is_in_the_guide() -> None:
    words = set(re.findall(r'conclude\(verdict, EXIT_\w+, "([a-z0-9-]+)"', SOURCES["verdict.c"]))
    assert len(words) == 7
    assert words == set(re.findall(r"^\| \d+ \| `([a-z0-9-]+)`", GUIDE, re.MULTILINE))


def test_every_key_of_the_report_is_in_the_guide() -> None:
    keys = set(re.findall(r'(?:put_\w+|open_bracket|key)\(out, "(\w+)"', SOURCES["report.c"]))
    assert {"version", "verdict", "deeper", "l2", "kvm_counted", "checks", "next"} <= keys
    section = GUIDE.split("## JSON")[1].split("\n## ")[0]
    assert {key for key in keys if not re.search(rf"\b{key}\b", section)} == set()
    for table in ("intel_features", "amd_features"):
        body = SOURCES["facts.c"].split(f"static void {table}")[1].split("\n}\n")[0]
        for name in re.findall(r'^        \{ "(\w+)",', body, re.MULTILINE):
            assert f"`{name}`" in section, name


def test_schema_version_is_the_documented_one() -> None:
    version = re.search(r"#define SCHEMA_VERSION (\d+)", SOURCES["nested.h"])
    assert version is not None
    assert f"| `version` | {version[1]}, the version of this schema |" in GUIDE


def test_ports_and_words_are_the_same_on_both_sides() -> None:
    for port in ("PORT_NONCE", "PORT_STATE", "PORT_ANSWER"):
        values = {re.search(rf"#define {port} (\w+)", SOURCES[name])[1] for name in ("guest.S", "l2.c")}  # type: ignore[index]
        assert len(values) == 1
    words = set(re.findall(r'option\("(recvirt\.\w+)"', SOURCES["init.c"]))
    assert words == {"recvirt.nonce", "recvirt.check", "recvirt.timeout", "recvirt.rounds", "recvirt.end"}
    assert {word for word in words if word not in MANUAL or word not in GUIDE} == set()


def test_no_test_hook_is_compiled_into_the_package() -> None:
    hooks = [name for name, text in SOURCES.items() if "getenv(" in text]
    assert hooks == ["kvm.h"]
    before, after = SOURCES["kvm.h"].split("#ifdef RECVIRT_TEST_HOOKS", 1)
    assert "getenv(" not in before + after.split("#else", 1)[1]


def test_packaging_is_consistent() -> None:
    fields = parse_control((PACKAGE / "DEBIAN/control").read_text(), "control")
    changelog = (PACKAGE / "changelog").read_text()
    assert changelog.startswith(f"recvirt-nested-check ({fields['Version']}) ")
    assert changelog_epoch(changelog) > 0
    assert fields["Architecture"] == "amd64"
    assert "Depends" not in fields
    copyright_text = (PACKAGE / "root/usr/share/doc/recvirt-nested-check/copyright").read_text()
    assert "Rich Felker" in copyright_text
    assert "THE SOFTWARE IS PROVIDED" in copyright_text
