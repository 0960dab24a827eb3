"""The scripts of a root build, run for real against stand-ins of useradd and friends."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recvirt.model import Root, User
from recvirt.rootfs.files import Facts
from recvirt.rootfs.script import (
    Step,
    cleanup_script,
    inside_script,
    outside_script,
    parse_packages,
    user_lines,
)

HOSTILE = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), min_size=1, max_size=40).filter(str.strip)


def facts(installed: str = "", **root: Any) -> Facts:
    return Facts("p", Root(**root), frozenset(installed.split()), "ext4", False, (), {})


def stand_ins(folder: Path, *names: str) -> Path:
    """Programs that append their name and arguments, NUL-separated, to ``calls``."""
    folder.mkdir(exist_ok=True)
    for name in names:
        program = folder / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >> {folder}/calls; printf "\\n" >> {folder}/calls\n')
        program.chmod(0o755)
    return folder


def calls(folder: Path) -> list[list[str]]:
    if not (folder / "calls").exists():
        return []
    return [
        line.split("\0")[:-1] for line in (folder / "calls").read_text().split("\0\n")[:-1] for line in [line + "\0"]
    ]


def run_sh(text: str, path: Path) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(["sh", "-euc", text], env=env, capture_output=True, text=True, check=False)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(group=HOSTILE, shell=HOSTILE, key=HOSTILE)
def test_hostile_values_stay_values(tmp_path: Path, group: str, shell: str, key: str) -> None:
    """Even what the model would refuse can't leave its quotes."""
    box = tmp_path / "box"
    shutil.rmtree(box, ignore_errors=True)
    path = stand_ins(box, "useradd", "install", "getent", "test")
    (box / "home/ada/.ssh").mkdir(parents=True)
    user = User.model_construct(name="ada", groups=(group,), ssh_keys=(key,), sudo=False, shell=shell)
    script = "\n".join(user_lines(user)).replace("/home/", f"{box}/home/")
    # The check of the shell's existence is looked at on its own below.
    lines = [
        'need_group() { getent group "$2"; }',
        "say() { :; }",
        *(x for x in script.split("\n") if not x.startswith("[ -x")),
    ]
    done = run_sh("\n".join(lines), path)
    assert done.returncode == 0, done.stderr
    told = calls(box)
    assert told[0] == ["getent", "group", group]
    assert told[1] == [
        "useradd", "--create-home", "--home-dir", f"{box}/home/ada", "--user-group", "--shell", shell,
        "--groups", group, "--password", "!", "--", "ada",
    ]  # fmt: skip
    assert (box / "home/ada/.ssh/authorized_keys").read_text() == key.strip() + "\n"
    assert {p.name for p in tmp_path.iterdir()} == {"box"}


def test_a_missing_group_or_shell_ends_the_build_with_its_name(tmp_path: Path) -> None:
    path = stand_ins(tmp_path / "box", "useradd")
    text = inside_script(facts(users=({"name": "ada", "groups": ("no-such-group-here",)},)), [])
    done = run_sh(text.partition("passwd --quiet")[0], path)
    assert done.returncode == 1
    assert "user ada: there is no group no-such-group-here" in done.stderr
    text = inside_script(facts(users=({"name": "ada", "shell": "/no/such/shell"},)), [])
    done = run_sh(text.partition("passwd --quiet")[0], path)
    assert done.returncode == 1
    assert "user ada: no shell /no/such/shell" in done.stderr
    assert not calls(tmp_path / "box")


def test_sudo_brings_its_group_and_a_check_of_the_drop_in() -> None:
    text = inside_script(facts(users=({"name": "ada", "sudo": True, "groups": ("kvm",)},)), [])
    assert "--groups kvm,sudo " in text
    assert "visudo -c -q -f /etc/sudoers.d/recvirt" in text
    assert "visudo" not in inside_script(facts(users=({"name": "ada"},)), [])


def test_root_is_locked_always() -> None:
    assert "passwd --quiet --lock root\n" in inside_script(facts(), [])


def test_our_units_are_enabled_when_their_files_are_there() -> None:
    unit = "etc/systemd/system/recvirt-nfs.service"
    assert "systemctl enable recvirt-nfs.service" not in inside_script(facts(), [])
    text = inside_script(facts(services=("x.service",), masked=("y.timer",)), [unit, "etc/recvirt/nfs.conf"])
    assert "systemctl enable recvirt-nfs.service\n" in text
    assert "systemctl enable x.service\n" in text
    assert "systemctl mask y.timer\n" in text and "systemctl mask rpcbind.socket\n" in text


def test_locales() -> None:
    assert "locale-gen" not in inside_script(facts("locales"), [])
    text = inside_script(facts("locales", locale="de_DE.UTF-8"), [])
    assert "'de_DE.UTF-8 UTF-8' > /etc/locale.gen" in text
    assert "'de_DE@euro ISO-8859-1' > /etc/locale.gen" in inside_script(facts("locales", locale="de_DE@euro"), [])


def test_bookworm_has_a_second_place_for_the_time_zone() -> None:
    assert "/etc/timezone" in inside_script(facts(suite="bookworm", timezone="Europe/Berlin"), [])
    text = inside_script(facts(timezone="Europe/Berlin"), [])
    assert "ln -sfn /usr/share/zoneinfo/Europe/Berlin /etc/localtime" in text and "/etc/timezone" not in text


def test_an_initramfs_is_made_when_there_is_what_makes_it() -> None:
    assert "update-initramfs -c -k" in inside_script(facts("initramfs-tools"), [])
    assert "update-initramfs" not in inside_script(facts(), [])


@pytest.mark.parametrize(
    "text",
    [
        inside_script(facts("locales", users=({"name": "ada", "sudo": True},), locale="de_DE.UTF-8"), []),
        cleanup_script(),
        outside_script([Step("overlay", "a b'c", "/x y/o.tar"), Step("chroot", "$(x)", "/x/h")], "/a b"),
    ],
)  # fmt: skip
def test_scripts_are_shell(text: str) -> None:
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)


def test_steps_come_after_the_files_and_before_cleaning() -> None:
    steps = [Step("overlay", "one", "/s/o.tar"), Step("chroot", "two", "/s/h0"), Step("host", "three", "/s/h1")]
    text = outside_script(steps, "/s")
    order = ["files.tar", "inside.sh", "/s/o.tar", "/s/h0", "/s/h1", "cleanup.sh", "dpkg-query"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)


def test_a_failing_hook_is_named(tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\nexit 3\n")
    hook.chmod(0o755)
    text = outside_script([Step("host", "make it so", str(hook))], str(tmp_path))
    part = text.partition("say 'host make it so'")
    done = run_sh(
        'tree=/nowhere\nsay() { echo "recvirt: $*" >&2; }\n' + part[1] + part[2], stand_ins(tmp_path / "box", "chroot")
    )
    assert done.returncode == 1
    assert "recvirt: the hook make it so failed" in done.stderr
    assert not calls(tmp_path / "box")  # nothing after it ran


def package(name: str, version: str, source: str, source_version: str, size: int) -> dict[str, object]:
    words = {"name": name, "version": version, "arch": "amd64", "source": source, "source_version": source_version}
    return {**words, "installed_kb": size}


def test_packages_are_read_and_sorted() -> None:
    lines = [
        "zsh 5-1 amd64 zsh 5-1 100 installed",
        "bash 1:5 amd64 bash-src 1:4  installed",
        "old 1 all old 1 1 config-files",
    ]
    text = "".join(line.replace(" ", "\t") + "\n" for line in lines)
    assert parse_packages(text) == [
        package("bash", "1:5", "bash-src", "1:4", 0),
        package("zsh", "5-1", "zsh", "5-1", 100),
    ]  # fmt: skip
