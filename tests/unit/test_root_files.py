"""The files that the root stage renders: conditions, quoting, and what must never be in them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from recvirt.apt import sources_lines
from recvirt.data import data_path
from recvirt.model import Root
from recvirt.rootfs.files import IMAGE_KEYRING, RULES, Facts, TreeFile, image_sources, public_root, render_files

TEMPLATES = data_path("templates", "root")
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIo1pM4cKk1W6hS0ZcPzj5hV4Bd4bZC2QFSYtE6jYQ2b someone@somewhere"
EVERYTHING = frozenset(
    (
        "systemd cloud-init libvirt-daemon-config-network libvirt-clients nfs-common initramfs-tools locales ssl-cert"
        " postgresql-common"
    ).split()
)
BOTH = ["http://archive.example/debian trixie main", "http://sec.example/s trixie-security main"]
DEFAULT_LINES = [f"deb {line}" for line in BOTH]


def facts(installed: frozenset[str] = EVERYTHING, **root: Any) -> Facts:
    return Facts(
        profile="p",
        root=Root(**root),
        installed=installed,
        filesystem="ext4",
        kernel_is_debian=False,
        sources=("deb http://archive.example/debian trixie main",),
        build={"recvirt": "1", "suite": "trixie"},
    )


def rendered(given: Facts) -> dict[str, str]:
    return {file.path: file.data.decode() for file in render_files(given, TEMPLATES)}


def test_every_template_has_a_rule_and_every_rule_a_template() -> None:
    on_disk = {
        path.relative_to(TEMPLATES).as_posix().removesuffix(".j2") for path in TEMPLATES.rglob("*") if path.is_file()
    }
    assert on_disk == {path for path, _, _ in RULES}


def test_everything_renders_at_once() -> None:
    both = [
        facts(
            users=({"name": "ada", "sudo": True, "ssh_keys": (KEY,)},),
            nfs={},
            unattended_upgrades=True,
            console_autologin="ada",
            modules=("nbd",),
            sysctl={"vm.swappiness": "10"},
            cloud_init={"enabled": enabled},
        )
        for enabled in (True, False)
    ]
    assert {path for one in both for path in rendered(one)} == {path for path, _, _ in RULES}


def test_modes() -> None:
    modes = {f.path: f.mode for f in render_files(facts(users=({"name": "ada", "sudo": True},), nfs={}), TEMPLATES)}
    assert modes["etc/sudoers.d/recvirt"] == 0o440
    assert modes["usr/lib/systemd/system-generators/recvirt-nfs"] == 0o755
    assert all(mode == 0o755 for path, mode in modes.items() if (TEMPLATES / path).exists() and "usr/lib/" in path)
    assert not any(mode & 0o022 for mode in modes.values())


def test_a_template_that_asks_for_something_unknown_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for path, _, _ in RULES:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    (tmp_path / "etc/hosts").unlink()
    (tmp_path / "etc/hosts.j2").write_text("{{ root.host_name }}")
    with pytest.raises(jinja2.UndefinedError):
        render_files(facts(), tmp_path)


def test_without_a_package_its_files_stay_away() -> None:
    bare = rendered(facts(frozenset({"systemd"}), nfs={}))
    assert not [path for path in bare if "cloud" in path or "libvirt" in path or "nfs" in path or "initramfs" in path]


def test_the_nfs_units_need_the_profile_too() -> None:
    assert not [path for path in rendered(facts()) if "nfs" in path]
    text = rendered(facts(nfs={"images": {"source": "server:/images"}}))["etc/recvirt/nfs.conf"]
    assert "\nIMAGES_SOURCE=server:/images\n" in text
    assert "\nBLOCKS_SOURCE=\n" in text


def test_cloud_config_is_yaml_with_the_profile_s_user() -> None:
    given = facts(
        users=({"name": "ada", "groups": ("kvm", "libvirt"), "sudo": True, "shell": "/bin/sh"}, {"name": "bob"}),
        cloud_init={"datasources": ("NoCloud", "None")},
    )
    config = yaml.safe_load(rendered(given)["etc/cloud/cloud.cfg.d/90_recvirt.cfg"])
    assert config["datasource_list"] == ["NoCloud", "None"]
    assert config["system_info"]["default_user"] == {
        "name": "ada", "gecos": "", "lock_passwd": True, "groups": ["kvm", "libvirt"], "shell": "/bin/sh",
        "sudo": ["ALL=(ALL:ALL) NOPASSWD:ALL"],
    }  # fmt: skip
    assert config["system_info"]["network"]["renderers"] == ["networkd"]
    assert config["ssh_pwauth"] is False and config["disable_root"] is True
    assert config["growpart"]["mode"] == "off" and config["resize_rootfs"] is False


def test_cloud_config_of_a_user_without_sudo_and_of_nobody() -> None:
    user = yaml.safe_load(rendered(facts(users=({"name": "ada"},)))["etc/cloud/cloud.cfg.d/90_recvirt.cfg"])
    assert user["system_info"]["default_user"]["sudo"] is None
    nobody = yaml.safe_load(rendered(facts())["etc/cloud/cloud.cfg.d/90_recvirt.cfg"])
    assert "default_user" not in nobody["system_info"]


def test_datasources_that_look_like_yaml_stay_text() -> None:
    config = rendered(facts(cloud_init={"datasources": ("None", "Yes", "Null")}))[
        "etc/cloud/cloud.cfg.d/90_recvirt.cfg"
    ]
    assert yaml.safe_load(config)["datasource_list"] == ["None", "Yes", "Null"]


def test_sudoers_names_only_those_who_may() -> None:
    text = rendered(facts(users=({"name": "ada", "sudo": True}, {"name": "bob"})))["etc/sudoers.d/recvirt"]
    assert re.findall(r"^(\w+) ALL=", text, re.MULTILINE) == ["ada"]
    assert "etc/sudoers.d/recvirt" not in rendered(facts(users=({"name": "bob"},)))


def test_the_file_system_decides_about_fstab() -> None:
    assert re.search(r"^PARTLABEL=root\t/\text4\t\S*x-systemd.growfs\t0\t1$", rendered(facts())["etc/fstab"], re.M)
    xfs = rendered(replace(facts(), filesystem="xfs"))["etc/fstab"]
    assert re.search(r"^PARTLABEL=root\t/\txfs\t\S*\t0\t0$", xfs, re.M)
    assert re.search(r"^PARTLABEL=esp\t/boot/efi\tvfat\tumask=0077,nofail\t0\t2$", xfs, re.M)


def test_dpkg_keeps_copyrights_and_the_profile_s_language() -> None:
    def policy(locale: str) -> list[str]:
        return rendered(facts(locale=locale))["etc/dpkg/dpkg.cfg.d/recvirt"].splitlines()

    plain, german = policy("C.UTF-8"), policy("de_AT.UTF-8")
    assert "path-include=/usr/share/doc/*/copyright" in plain
    assert "path-exclude=/usr/share/i18n/*" in plain and "path-exclude=/usr/share/i18n/*" not in german
    assert {"path-include=/usr/share/locale/de/*", "path-include=/usr/share/locale/de_AT/*"} <= set(german)
    # An include only overrides what comes before it (dpkg.cfg(5)).
    assert german.index("path-include=/usr/share/locale/de/*") > german.index("path-exclude=/usr/share/locale/*")
    assert not [line for line in plain if "unsafe" in line]


def test_profile_json_has_no_path_of_the_build_machine() -> None:
    given = facts(
        overlays=("/home/me/overlay",), hooks=({"where": "host", "path": "/home/me/hook"},), keyring="/home/me/k.gpg",
        mirror="http://secret.example/debian", users=({"name": "ada", "ssh_keys": (KEY,)},),
    )  # fmt: skip
    text = rendered(given)["etc/recvirt/profile.json"]
    assert "/home/me" not in text and "secret" not in text
    read = json.loads(text)
    assert read["name"] == "p" and read["root"]["users"][0]["ssh_keys"] == [KEY]
    assert set(read["root"]) == set(public_root(given.root))


def test_values_reach_their_files() -> None:
    given = facts(
        hostname="l1", journal_max="200M", sysctl={"vm.swappiness": "10", "net.ipv4.ip_forward": "1"},
        modules=("nbd", "vhost_net"), services=("a.service",), masked=("b.timer",),
        users=({"name": "ada"},), console_autologin="ada",
    )  # fmt: skip
    files = rendered(given)
    assert files["etc/hostname"] == "l1\n"
    assert "127.0.1.1\tl1\n" in files["etc/hosts"]
    assert "\nSystemMaxUse=200M\n" in files["etc/systemd/journald.conf.d/50-recvirt.conf"]
    assert files["etc/sysctl.d/60-recvirt.conf"].endswith("\nnet.ipv4.ip_forward = 1\nvm.swappiness = 10\n")
    assert files["etc/modules-load.d/recvirt.conf"] == "nbd\nvhost_net\n"
    assert files["etc/systemd/system-preset/50-recvirt.preset"] == "enable a.service\ndisable b.timer\n"
    login = "etc/systemd/system/serial-getty@.service.d/recvirt.conf"
    assert "--autologin ada " in files[login] and "console-login" not in files[login]
    assert "--login-program /usr/lib/recvirt/console-login " in rendered(facts())[login]


def test_nesting_is_said_only_when_wanted() -> None:
    assert "kvm_intel nested=1 ept=1" in rendered(facts())["etc/modprobe.d/recvirt-nested.conf"]
    assert "etc/modprobe.d/recvirt-nested.conf" not in rendered(facts(nested=False))


def test_a_file_s_key_is_its_content() -> None:
    one, two = TreeFile.of("a", b"x"), TreeFile.of("a", b"y")
    assert one.sha256 != two.sha256 and one == TreeFile.of("a", b"x")


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ({}, BOTH),
        ({"mirror": "http://near.example/debian"}, ["http://near.example/debian trixie main"]),
        # What the VM can't reach, or would never be upgraded from:
        ({"mirror": "http://127.0.0.1:8000/d"}, BOTH),
        ({"mirror": "http://localhost/d"}, BOTH),
        (
            {"snapshot": "20260101T000000Z", "snapshot_mirror": "http://snap.example/d"},
            BOTH,
        ),
    ],
)  # fmt: skip
def test_the_image_upgrades_from_somewhere_sensible(root: dict[str, Any], expected: list[str]) -> None:
    signed = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    assert image_sources(DEFAULT_LINES, Root(**root), sources_lines) == tuple(
        f"deb {signed} {line}" for line in expected
    )


def test_a_mirror_with_its_own_keyring_keeps_it() -> None:
    lines = image_sources(DEFAULT_LINES, Root(mirror="http://near.example/d", keyring="/k.gpg"), sources_lines)
    assert lines == (f"deb [signed-by={IMAGE_KEYRING}] http://near.example/d trixie main",)
