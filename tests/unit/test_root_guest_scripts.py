"""The scripts that run inside the image, run here against stand-ins: NFS units, libvirt's subnet, SSH host keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from recvirt.data import data_path

TREE = data_path("templates", "root")
GENERATOR = TREE / "usr/lib/systemd/system-generators/recvirt-nfs"


def generate(tmp_path: Path, conf: str | None) -> tuple[Path, str]:
    """The generator's folder and what it told the kernel's log."""
    out, log = tmp_path / "out", tmp_path / "log"
    out.mkdir()
    log.write_text("")
    if conf is not None:
        (tmp_path / "nfs.conf").write_text(conf)
    env = {"PATH": os.environ["PATH"], "RECVIRT_NFS_CONF": str(tmp_path / "nfs.conf"), "RECVIRT_NFS_LOG": str(log)}
    subprocess.run(["sh", str(GENERATOR), str(out)], env=env, check=True)
    return out, log.read_text()


def test_both_mounts_become_automounts(tmp_path: Path) -> None:
    conf = "IMAGES_SOURCE=server:/images\nIMAGES_OPTIONS=vers=4.2,port=12049\nBLOCKS_SOURCE='[fd00::1]:/b/c'\n"
    out, log = generate(tmp_path, conf)
    assert log == ""
    mount = (out / "var-lib-recvirt-images.mount").read_text()
    assert "\nWhat=server:/images\nWhere=/var/lib/recvirt/images\nType=nfs4\n" in mount
    assert "\nOptions=vers=4.2,port=12049,nosuid,nodev,retry=0,_netdev,nofail\n" in mount
    assert "\nTimeoutSec=30s\n" in mount
    blocks = (out / "var-lib-recvirt-blocks.mount").read_text()
    assert "\nWhat=[fd00::1]:/b/c\n" in blocks
    for name in ("images", "blocks"):
        link = out / "remote-fs.target.wants" / f"var-lib-recvirt-{name}.automount"
        assert link.read_text().endswith(f"[Automount]\nWhere=/var/lib/recvirt/{name}\n")
    # Nobody waits for a mount: only the automount points are part of the boot.
    assert not list((out / "remote-fs.target.wants").glob("*.mount"))


@pytest.mark.parametrize("conf", [None, "", "IMAGES_SOURCE=\nBLOCKS_SOURCE=\n", "# nothing\n"])
def test_without_a_source_the_folders_stay_local(tmp_path: Path, conf: str | None) -> None:
    out, log = generate(tmp_path, conf)
    assert not list(out.iterdir()) and log == ""


@pytest.mark.parametrize(
    "source",
    [
        "server",
        "/path",
        ":/path",
        "server:path",
        "a b:/c",
        "$(reboot):/x",
        "s:/x%y",
        "-o:/x",
        "s:/x;y",
        "s:/\\x",
        "s:/ü",
    ],
)
def test_a_source_that_is_none_is_told_and_passed_over(tmp_path: Path, source: str) -> None:
    out, log = generate(tmp_path, f"IMAGES_SOURCE={source}\nBLOCKS_SOURCE=good:/b\n")
    assert "IMAGES_SOURCE is not SERVER:/PATH" in log
    assert not (out / "var-lib-recvirt-images.mount").exists()
    assert (out / "var-lib-recvirt-blocks.mount").exists()


def test_options_that_are_none_are_told_and_passed_over(tmp_path: Path) -> None:
    out, log = generate(tmp_path, "IMAGES_SOURCE=s:/i\nIMAGES_OPTIONS=rw %h\n")
    assert "IMAGES_OPTIONS" in log and not list(out.iterdir())


def test_the_last_word_counts_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    out, _ = generate(tmp_path, 'IMAGES_SOURCE=old:/i\r\nIMAGES_SOURCE="new:/i"  \r\n')
    assert "\nWhat=new:/i\n" in (out / "var-lib-recvirt-images.mount").read_text()


# -- libvirt's subnet ------------------------------------------------------------------------------------------------


def choose(tmp_path: Path, addresses: list[str], routes: list[str]) -> tuple[str, str]:
    """The prefix that libvirt-network takes and the network's XML, on a machine with these addresses and routes."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    lines = "".join(
        f"2: eth0    inet {a} brd 1.2.3.4 scope global eth0\\\\       valid_lft forever\n" for a in addresses
    )
    (tmp_path / "addresses").write_text(lines)
    (tmp_path / "routes").write_text("".join(f"{route} dev eth0 proto kernel\n" for route in routes))
    (bin_dir / "ip").write_text(
        f'#!/bin/sh\ncase "$*" in *address*) cat {tmp_path}/addresses;; *route*) cat {tmp_path}/routes;; esac\n'
    )
    (bin_dir / "ip").chmod(0o755)
    networks, state = tmp_path / "networks", tmp_path / "state"
    networks.mkdir()
    state.mkdir()
    text = (TREE / "usr/lib/recvirt/libvirt-network").read_text()
    text = text.replace("/etc/libvirt/qemu/networks", str(networks)).replace("/var/lib/recvirt", str(state))
    text = text.replace("/usr/lib/systemd/systemd-networkd-wait-online", "true")
    env = {"PATH": f"{bin_dir}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", text], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (networks / "autostart/default.xml").resolve() == networks / "default.xml"
    assert sorted(p.name for p in networks.iterdir()) == ["autostart", "default.xml"]
    return (state / "libvirt-network").read_text().strip(), (networks / "default.xml").read_text()


@pytest.mark.parametrize(
    ("addresses", "routes", "expected"),
    [
        (["127.0.0.1/8", "10.0.2.15/24"], ["default", "10.0.2.0/24"], "192.168.122.0/24"),
        ([], [], "192.168.122.0/24"),
        # An L2 sees L1's network as its own and goes one higher; an L3 again.
        (["192.168.122.77/24"], ["default", "192.168.122.0/24"], "192.168.123.0/24"),
        (["192.168.123.5/24"], ["192.168.123.0/24"], "192.168.124.0/24"),
        # Lower numbers than libvirt's own are no level of nesting.
        (["192.168.1.5/24"], ["192.168.1.0/24"], "192.168.122.0/24"),
        # A /23 covers two of the candidates.
        (["192.168.122.9/23"], [], "192.168.124.0/24"),
        # A cloud that owns all of 192.168: another block.
        (["192.168.3.4/16"], ["192.168.0.0/16"], "172.31.1.0/24"),
        (["192.168.3.4/16"], ["192.168.0.0/16", "172.16.0.0/12"], "10.201.1.0/24"),
        # Host routes count as well, a default route does not.
        (["10.0.0.2/8"], ["default", "192.168.130.7"], "192.168.131.0/24"),
        (["192.168.254.2/24"], [], "172.31.1.0/24"),
    ],
)
def test_the_subnet_is_free(tmp_path: Path, addresses: list[str], routes: list[str], expected: str) -> None:
    prefix, xml = choose(tmp_path, addresses, routes)
    assert prefix == expected
    stem = expected.removesuffix(".0/24")
    assert f"<ip address='{stem}.1' netmask='255.255.255.0'>" in xml
    assert f"<range start='{stem}.2' end='{stem}.254'/>" in xml


# -- a first boot that was cut short -----------------------------------------------------------------------------------


def first_boot(folder: Path, word: str) -> str:
    """What the script said of a folder that stands for /var/lib/cloud."""
    words = ["sh", str(TREE / "usr/lib/recvirt/first-boot"), word]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "RECVIRT_CLOUD_DIR": str(folder)}
    return subprocess.run(words, check=True, env=env, capture_output=True, text=True).stdout


@pytest.fixture
def cloud_dir(tmp_path: Path) -> Path:
    """As cloud-init leaves it when the power is cut: every module noted as done."""
    (tmp_path / "instances/i-1/sem").mkdir(parents=True)
    (tmp_path / "instances/i-1/sem/config_users_groups").write_text("")
    (tmp_path / "instances/i-1/user-data.txt").write_text("#cloud-config\n")
    (tmp_path / "instance").symlink_to("instances/i-1")
    return tmp_path


def test_a_first_boot_that_was_cut_short_begins_anew(cloud_dir: Path) -> None:
    assert "i-1 was cut short" in first_boot(cloud_dir, "again")
    assert [path.name for path in (cloud_dir / "instances/i-1").iterdir()] == ["user-data.txt"]


def test_a_first_boot_that_was_finished_is_not_done_again(cloud_dir: Path) -> None:
    first_boot(cloud_dir, "mark")
    assert first_boot(cloud_dir, "again") == ""
    assert (cloud_dir / "instances/i-1/sem/config_users_groups").exists()
    # Another instance's work says nothing of it: a copy of the disk with other data.
    (cloud_dir / "instances/i-2/sem").mkdir(parents=True)
    assert "i-2 was cut short" in first_boot(cloud_dir, "again")
    assert (cloud_dir / "instances/i-1/sem").exists()


def test_before_the_first_instance_there_is_nothing_to_do(tmp_path: Path) -> None:
    for word in ("again", "mark"):
        assert first_boot(tmp_path, word) == ""
    assert list(tmp_path.iterdir()) == []


# -- SSH host keys ---------------------------------------------------------------------------------------------------


def make_keys(folder: Path) -> dict[str, bytes]:
    text = (TREE / "usr/lib/recvirt/ssh-keys").read_text().replace("cd /etc/ssh", f"cd {folder}")
    subprocess.run(["sh", "-c", text], check=True)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def ssh_dir(tmp_path: Path) -> Path:
    assert shutil.which("ssh-keygen"), "openssh-client is needed"
    return tmp_path


NAMES = [f"ssh_host_{kind}_key{end}" for kind in ("ecdsa", "ed25519") for end in ("", ".pub")]


def test_keys_are_made_once(ssh_dir: Path) -> None:
    made = make_keys(ssh_dir)
    assert list(made) == NAMES
    assert (ssh_dir / "ssh_host_ed25519_key").stat().st_mode & 0o777 == 0o600
    assert make_keys(ssh_dir) == made


def test_what_a_power_cut_left_is_made_anew(ssh_dir: Path) -> None:
    made = make_keys(ssh_dir)
    (ssh_dir / "ssh_host_ed25519_key").write_bytes(b"")
    (ssh_dir / "ssh_host_ecdsa_key.pub").unlink()
    (ssh_dir / ".new-host-key").mkdir()
    (ssh_dir / ".new-host-key/half").write_bytes(b"x")
    again = make_keys(ssh_dir)
    assert list(again) == NAMES
    assert all(again[name] != made[name] for name in NAMES)
    for kind in ("ecdsa", "ed25519"):
        subprocess.run(
            ["ssh-keygen", "-y", "-P", "", "-f", ssh_dir / f"ssh_host_{kind}_key"], check=True, capture_output=True
        )


def test_the_server_uses_the_keys_that_are_made() -> None:
    config = (TREE / "etc/ssh/sshd_config.d/10-recvirt.conf").read_text()
    kinds = re.findall(r"^HostKey /etc/ssh/ssh_host_(\w+)_key$", config, re.MULTILINE)
    assert sorted(kinds) == ["ecdsa", "ed25519"]
    assert "\nPasswordAuthentication no\n" in config and "\nPermitRootLogin no\n" in config


@pytest.mark.parametrize(
    "path", sorted(p for p in TREE.rglob("*") if p.is_file() and p.read_bytes().startswith(b"#!/bin/sh"))
)
def test_scripts_are_plain_shell(path: Path) -> None:
    subprocess.run(["sh", "-n", str(path)], check=True)
    assert "[[" not in re.sub(r"\[\[:\w+:\]\]", "", path.read_text())
