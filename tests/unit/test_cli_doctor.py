"""``recvirt doctor``: what it finds on machines that lack this or that, and what it tells people to do."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from recvirt import doctor
from recvirt.cli import cli
from recvirt.data import data_path
from recvirt.doctor import Check, Need, apt_line, as_json, check_need, namespace_fix, read_needs

ROOT = Path(__file__).resolve().parents[2]


def needs() -> list[Need]:
    return read_needs(data_path("host-packages.txt").read_text())


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH of the host."""
    folder = tmp_path / "bin"
    folder.mkdir()
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    (folder / "setpriv").symlink_to(setpriv)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(doctor, "minimal_env", lambda: {"PATH": str(folder)})
    return folder


def put(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_list_of_host_packages_is_short_and_well_formed() -> None:
    found = needs()
    assert {"mmdebstrap", "bwrap", "newuidmap", "ssh"} <= {need.what for need in found}
    # What the tools root brings must not be asked of the host.
    asked = {need.package for need in found if need.who != "check"}
    assert not {"qemu-system-x86", "gcc", "grub-common", "e2fsprogs"} & asked
    assert len(asked) <= 14 and len(found) - len(asked) <= 10


@pytest.mark.parametrize("line", ["onlyone", "a b", "a b nobody", "a b all extra"])
def test_a_list_that_is_not_well_formed(line: str) -> None:
    with pytest.raises(ValueError, match=r"host-packages.txt:2"):
        read_needs(f"# comment\n{line}\n")


def test_a_missing_program_names_its_package(programs: Path) -> None:
    check = check_need(Need("bubblewrap", "bwrap", "all"))
    assert (check.status, check.package) == ("fail", "bubblewrap")
    assert "apt install bubblewrap" in check.fix


def test_a_program_is_found_with_its_version(programs: Path) -> None:
    put(programs, "bwrap", "echo bubblewrap 0.8.0")
    check = check_need(Need("bubblewrap", "bwrap", "all"))
    assert (check.status, check.found) == ("ok", f"0.8.0 ({programs}/bwrap)")


@pytest.mark.parametrize(
    ("name", "version", "good"),
    [
        ("unshare", "2.36.1", False), ("unshare", "2.38", True), ("unshare", "2.41", True), ("unshare", "", True),
        ("bwrap", "0.4.1", False), ("bwrap", "0.11.0", True), ("tar", "0.1", True),
    ],
)  # fmt: skip
def test_versions_that_are_too_old(name: str, version: str, good: bool) -> None:
    assert doctor.is_new_enough(name, version) is good


def test_a_program_that_is_too_old_fails_with_the_version_that_is_needed(programs: Path) -> None:
    put(programs, "unshare", "echo unshare from util-linux 2.36.1")
    check = check_need(Need("util-linux", "unshare", "all"))
    assert check.status == "fail"
    assert "2.36.1" in check.found
    assert "2.38 or newer" in check.fix
    assert apt_line([check]) == ""  # apt can't help


def test_files_and_modules(tmp_path: Path) -> None:
    assert check_need(Need("p", str(tmp_path), "all")).status == "ok"
    assert check_need(Need("p", str(tmp_path / "none"), "all")).status == "fail"
    assert check_need(Need("p", "module:json", "all")).status == "ok"
    assert check_need(Need("p", "module:no_such_module", "all")).status == "fail"


def test_the_apt_line_names_each_package_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        Check("unshare", "fail", "", package="util-linux"),
        Check("setpriv", "fail", "", package="util-linux"),
        Check("bwrap", "fail", "", package="bubblewrap"),
        Check("tar", "ok", "", package="tar"),
    ]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert apt_line(checks) == "sudo apt install bubblewrap util-linux"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert apt_line(checks) == "apt install bubblewrap util-linux"
    assert apt_line([]) == ""


@pytest.mark.parametrize(
    ("files", "as_root", "wanted"),
    [
        ({"proc/sys/user/max_user_namespaces": "0"}, False, "max_user_namespaces is 0"),
        ({}, True, "may not mount"),
        ({"proc/sys/kernel/unprivileged_userns_clone": "0"}, False, "kernel.unprivileged_userns_clone=1"),
        ({"proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"}, False, "AppArmor restricts"),
        ({"etc/subuid": "", "etc/subgid": ""}, False, "/etc/subuid gives someone no ids: sudo usermod --add-subuids"),
        ({"etc/subuid": "someone:100000:100", "etc/subgid": ""}, False, "/etc/subuid gives someone no ids"),
        ({"etc/subuid": "someone:100000:65536", "etc/subgid": "other:1:65536"}, False, "/etc/subgid gives someone no"),
        ({"etc/subuid": "someone:1:65536", "etc/subgid": "someone:1:65536"}, False, "build as root instead"),
    ],
)
def test_why_namespaces_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], as_root: bool, wanted: str
) -> None:
    monkeypatch.setattr(doctor, "_user", lambda: "someone")
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert wanted in namespace_fix(as_root, tmp_path / "etc", tmp_path / "proc")


def test_namespaces_that_are_refused_for_real(programs: Path) -> None:
    put(programs, "bwrap", "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    check = doctor._namespaces(True)
    assert check.status == "fail"
    assert "No permissions" in check.found
    assert check.fix


def test_little_room_is_a_warning_and_none_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, status in ((1, "fail"), (10 * doctor.GIB, "warn"), (100 * doctor.GIB, "ok")):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, _usage=usage: _usage)
        assert doctor._disk(tmp_path / "not" / "there").status == status


def test_a_cache_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    assert doctor._disk(tmp_path).status == "fail"


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert doctor._machine().status == "fail"


def test_a_proxys_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy.example:3128")
    found = " ".join(check.found for check in doctor._surroundings())
    assert "secret" not in found
    assert "proxy.example:3128" in found


def test_a_certificate_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    assert any(check.status == "fail" for check in doctor._surroundings())


def test_an_archive_that_lies_or_is_away(programs: Path) -> None:
    put(programs, "mmdebstrap", "echo 'I: running' >&2; echo 'E: The repository is not signed.' >&2; exit 25")
    check = doctor._archive()
    assert (check.status, check.found) == ("fail", "E: The repository is not signed.")
    put(programs, "mmdebstrap", "exit 0")
    assert doctor._archive().status == "ok"


def test_without_a_tools_root_the_accelerator_is_not_guessed() -> None:
    check = doctor._accelerator(None)
    assert check.status == "warn"
    assert "not tried" in check.found


def test_json_and_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = [Check("a", "ok", "x"), Check("b", "warn", "y", "do this")]
    bad = [*good, Check("c", "fail", "not installed", package="pkg")]
    assert as_json(good)["ready"] is True
    for checks, status in ((good, 0), (bad, 4)):
        monkeypatch.setattr(doctor, "examine", lambda *_a, _checks=checks, **_k: _checks)
        result = CliRunner().invoke(cli, ["--cache-dir", str(tmp_path), "doctor", "--json"], standalone_mode=False)
        assert result.return_value == status
        assert json.loads(result.stdout)["ready"] is (status == 0)
        text = CliRunner().invoke(cli, ["--cache-dir", str(tmp_path), "doctor"], standalone_mode=False).stdout
        assert ("apt install pkg" in text) is (status == 4)
        assert "do this" in text


# --- the script that installs


def bootstrap(path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": str(path), "HOME": "/nonexistent", "VENV": str(path.parent / "venv"), **env}
    return subprocess.run(
        ["/bin/sh", str(ROOT / "scripts/bootstrap.sh")],
        env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A PATH with little more than a shell (the script adds the host's sbin, which holds nothing that counts)."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("dirname", "sort", "tr", "cat", "env"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    put(folder, "id", "echo 1000")
    put(folder, "apt-get", f'echo "apt-get $*" >> {tmp_path}/calls')
    return folder


def test_the_script_asks_before_it_uses_root(bare: Path, tmp_path: Path) -> None:
    put(bare, "sudo", f'echo "sudo $*" >> {tmp_path}/calls; shift; exec "$@"')
    done = bootstrap(bare)
    assert done.returncode == 4
    assert "This machine lacks: " in done.stderr
    assert "YES=1" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_with_yes_it_installs_through_sudo_and_checks_again(bare: Path, tmp_path: Path) -> None:
    put(bare, "sudo", f'echo "sudo $*" >> {tmp_path}/calls; shift; exec "$@"')
    done = bootstrap(bare, YES="1", http_proxy="http://proxy:1")
    calls = (tmp_path / "calls").read_text()
    assert re.search(r"sudo -- env DEBIAN_FRONTEND=noninteractive http_proxy=http://proxy:1 apt-get -q update", calls)
    assert re.search(r"apt-get -q install -y --no-install-recommends bubblewrap .*mmdebstrap", calls)
    # This apt-get installs nothing, and that does not go unnoticed.
    assert done.returncode == 4
    assert "still missing" in done.stderr


def test_without_sudo_it_says_what_an_administrator_must_do(bare: Path, tmp_path: Path) -> None:
    done = bootstrap(bare, YES="1")
    assert done.returncode == 4
    assert "there is no sudo" in done.stderr
    assert "as root: apt-get install --no-install-recommends bubblewrap" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_without_apt_it_names_the_packages(bare: Path) -> None:
    (bare / "apt-get").unlink()
    done = bootstrap(bare, YES="1")
    assert done.returncode == 4
    assert "has no apt-get" in done.stderr


def test_with_nothing_missing_nothing_is_installed(bare: Path, tmp_path: Path) -> None:
    put(bare, "sudo", f'echo "sudo $*" >> {tmp_path}/calls')
    for need in needs():
        if not need.what.startswith(("/", "module:")):
            put(bare, need.what, "exit 0")
    venv = tmp_path / "venv/bin"
    make = f"/bin/mkdir -p {venv}; /bin/ln -sf /bin/true {venv}/python"
    put(bare, "python3", f'case "$*" in *venv*) {make};; esac')
    done = bootstrap(bare)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "calls").exists()
    assert (tmp_path / "venv/.made-run").exists()
    # A second run finds the environment made, and a development one serves for both.
    assert "Making" not in bootstrap(bare).stderr
    assert "Making" in bootstrap(bare, DEV="1").stderr
    assert "Making" not in bootstrap(bare, DEV="1").stderr


@pytest.mark.parametrize(("answer", "installs"), [("n", False), ("", False), ("y", True)])
def test_a_person_is_asked_and_heard(bare: Path, tmp_path: Path, answer: str, installs: bool) -> None:
    put(bare, "sudo", f'echo "sudo $*" >> {tmp_path}/calls; shift; exec "$@"')
    person, terminal = os.openpty()
    try:
        os.write(person, f"{answer}\n".encode())
        done = subprocess.run(
            ["/bin/sh", str(ROOT / "scripts/bootstrap.sh")], env={"PATH": str(bare), "VENV": str(tmp_path / "venv")},
            stdin=terminal, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    finally:
        os.close(person)
        os.close(terminal)
    assert "Install them with apt-get through sudo? [y/N]" in done.stderr
    assert (tmp_path / "calls").exists() is installs
    assert done.returncode == 4  # nothing was installed, by choice or because this apt-get does nothing
