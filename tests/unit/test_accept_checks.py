"""Each check is shown a good system and bad ones; the images that are really spoilt are in tests/acceptance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from recvirt.accept.checks import image as image_checks
from recvirt.accept.checks import logs, nestedcloud, promises, security, storage, system, virtual
from recvirt.accept.context import Promises
from recvirt.accept.registry import all_checks
from recvirt.accept.results import Failed, Skipped
from recvirt.errors import GuestError
from tests.support.fake_guest import acceptance, guest

CHECKS = {item.name: item for item in all_checks()}
Answers = Mapping[str, str | tuple[int, str]]


def run(tmp_path: Path, name: str, answers: Answers, *, promised: Promises | None = None, **profile: Any) -> str:
    return CHECKS[name].function(guest(tmp_path, answers, promises=promised, **profile))


def rejects(tmp_path: Path, name: str, answers: Answers, words: str, **more: Any) -> None:
    with pytest.raises(Failed, match=re.escape(words)):
        run(tmp_path, name, answers, **more)


SHADOW = "root:*:1::::::\nrvtest:!:1::::::\ndaemon:!*:1::::::\n"
PASSWD = {"$2 !=": "", "$3 == 0": "root\n"}


def test_passwords(tmp_path: Path) -> None:
    assert "3 accounts" in run(tmp_path, "no-passwords", {"shadow": SHADOW, **PASSWD})
    for line in ("eve::1::::::", "eve:$y$j9T$x$y:1::::::", "eve:!$y$j9T$x$y:1::::::"):
        rejects(tmp_path, "no-passwords", {"shadow": SHADOW + line + "\n", **PASSWD}, "eve")
    rejects(tmp_path, "no-passwords", {"shadow": SHADOW, **PASSWD, "$3 == 0": "root\ntoor\n"}, "toor")


LISTENERS = (
    "udp UNCONN 0 0 127.0.0.53%lo:53 0.0.0.0:*\n"
    "udp UNCONN 0 0 10.0.2.15%eth0:68 0.0.0.0:*\n"
    "udp UNCONN 0 0 0.0.0.0%virbr0:67 0.0.0.0:*\n"
    "tcp LISTEN 0 32 192.168.123.1:53 0.0.0.0:*\n"
    'tcp LISTEN 0 128 0.0.0.0:22 0.0.0.0:* users:(("sshd",pid=1,fd=3))\n'
    "tcp LISTEN 0 128 [::]:22 [::]:*\n"
    "tcp LISTEN 0 128 [::1]:631 [::]:*\n"
)


def test_listeners(tmp_path: Path) -> None:
    assert "7 sockets" in run(tmp_path, "listening-sockets", {"ss -H": LISTENERS})
    for row in (
        "tcp LISTEN 0 9 0.0.0.0:111 0.0.0.0:*",
        "tcp LISTEN 0 9 *:16509 *:*",
        "udp UNCONN 0 0 [::]:5355 [::]:*",
    ):
        rejects(tmp_path, "listening-sockets", {"ss -H": LISTENERS + row + "\n"}, row.split()[4])


def test_listeners_of_a_central_node(tmp_path: Path) -> None:
    central = Promises(packages=("recvirt-cloud-central",))
    rows = LISTENERS + (
        "tcp LISTEN 0 511 [::]:443 [::]:*\nudp UNCONN 0 0 0.0.0.0:51820 0.0.0.0:*\n"
        "tcp LISTEN 0 64 [fd81:2:3::1]:2049 [::]:*\ntcp LISTEN 0 128 [fd81:2:3::1]:5672 [::]:*\n"
    )
    assert run(tmp_path, "listening-sockets", {"ss -H": rows}, promised=central)
    rejects(tmp_path, "listening-sockets", {"ss -H": rows}, "443")
    for row in ("tcp LISTEN 0 64 *:2049 *:*", "tcp LISTEN 0 9 [2001:db8::1]:5672 [::]:*", "tcp LISTEN 0 9 *:5432 *:*"):
        rejects(tmp_path, "listening-sockets", {"ss -H": f"{rows}{row}\n"}, row.split()[4], promised=central)


def test_foreign_keys(tmp_path: Path) -> None:
    good = "/home/rvtest/.ssh/authorized_keys:ssh-ed25519 AAAAtestkey x\n"
    assert run(tmp_path, "no-authorized-keys", {"authorized_keys": good})
    bad = good + '/root/.ssh/authorized_keys:no-pty,command="x" ssh-ed25519 AAAAother y\n'
    rejects(tmp_path, "no-authorized-keys", {"authorized_keys": bad}, "/root/.ssh/authorized_keys")


def test_private_keys(tmp_path: Path) -> None:
    own = "1000\n1030 /etc/ssh/ssh_host_ed25519_key\n1040 /etc/ssl/private/ssl-cert-snakeoil.key\n"
    assert "2 of this boot" in run(tmp_path, "no-private-keys", {"grep": own})
    rejects(tmp_path, "no-private-keys", {"grep": own.replace("1040", "900")}, "snakeoil.key (older than this boot)")
    rejects(tmp_path, "no-private-keys", {"grep": own + "1030 /etc/x y.key\n"}, "/etc/x y.key")


def test_host_key_modes(tmp_path: Path) -> None:
    assert run(tmp_path, "host-key-modes", {"stat": "/etc/ssh/ssh_host_ed25519_key root 600\n"})
    rejects(tmp_path, "host-key-modes", {"stat": "/etc/ssh/ssh_host_ed25519_key root 644\n"}, "644")
    rejects(tmp_path, "host-key-modes", {"stat": ""}, "none")


def test_packages(tmp_path: Path) -> None:
    promised = Promises(packages=("qemu-utils", "sudo"))
    listed = {"dpkg-query": "ii  qemu-utils\nii  sudo\nrc  old\n", "--audit": ""}
    assert "2 asked for" in run(tmp_path, "packages", listed, promised=promised)
    rejects(tmp_path, "packages", {**listed, "dpkg-query": "ii  sudo\n"}, "qemu-utils", promised=promised)
    half = {**listed, "dpkg-query": "ii  sudo\nii  qemu-utils\niF  broken\n"}
    rejects(tmp_path, "packages", half, "broken", promised=promised)
    with pytest.raises(Skipped):
        run(tmp_path, "packages", {})


def test_kernel_config(tmp_path: Path) -> None:
    promised = Promises(kernel_config="CONFIG_KVM=m\nCONFIG_NFS_FS=m\n# CONFIG_SOUND is not set\n")
    same = 'CONFIG_KVM=m\nCONFIG_NFS_FS=m\nCONFIG_CC_VERSION_TEXT="gcc"\n'
    assert run(tmp_path, "kernel-config", {"zcat": same}, promised=promised)
    for text, words in (("CONFIG_KVM=y\nCONFIG_NFS_FS=m\n", "KVM: y instead of m"), ("CONFIG_KVM=m\n", "NFS_FS: off")):
        rejects(tmp_path, "kernel-config", {"zcat": text}, words, promised=promised)
    rejects(
        tmp_path, "kernel-config", {"zcat": same + "CONFIG_SOUND=y\n"}, "SOUND: y instead of off", promised=promised
    )


NESTED = {
    "grep -H": "/sys/module/kvm_amd/parameters/nested:1\n",
    "modprobe": "options kvm_intel nested=1 ept=1\noptions kvm_amd nested=1\n",
    "cmdline": "quiet\n",
}


def test_nested_parameters(tmp_path: Path) -> None:
    assert "kvm_amd" in run(tmp_path, "nested-parameters", NESTED)
    rejects(tmp_path, "nested-parameters", {**NESTED, "grep -H": "/sys/module/kvm_amd/parameters/nested:0\n"}, "off")
    rejects(tmp_path, "nested-parameters", {**NESTED, "grep -H": ""}, "neither")
    only_amd = {**NESTED, "modprobe": "options kvm_amd nested=1\n"}
    rejects(tmp_path, "nested-parameters", only_amd, "kvm_intel.nested")
    assert run(tmp_path, "nested-parameters", {**only_amd, "cmdline": "kvm_intel.nested=1\n"})
    rejects(tmp_path, "nested-parameters", {**only_amd, "cmdline": "kvm_intel.nested=0\n"}, "kvm_intel.nested")


def test_failed_units(tmp_path: Path) -> None:
    good = {"list-units": "", "is-system-running": "running\n"}
    assert "running" in run(tmp_path, "no-failed-unit", good)
    bad = {**good, "list-units": "bad.service loaded failed failed Bad\n", "journalctl": "it broke"}
    rejects(tmp_path, "no-failed-unit", bad, "bad.service")
    assert run(tmp_path, "no-failed-unit", bad, accept={"unit_failures_allowed": ["bad.service"]})
    rejects(tmp_path, "no-failed-unit", {**good, "is-system-running": "starting", "list-jobs": "x"}, "starting")


def test_kernel_log(tmp_path: Path) -> None:
    assert run(tmp_path, "kernel-log", {"journalctl": "mtrr: your CPUs had inconsistent fixed MTRR settings\n"})
    rejects(tmp_path, "kernel-log", {"journalctl": "EXT4-fs error (device vda3)\n"}, "EXT4-fs error")
    assert all(len(reason) >= 8 for reason in logs.KERNEL_ALLOWED.values())


def test_log_files(tmp_path: Path) -> None:
    good = "1000\n1030.5 800 journal/abc/system.journal\n9.5 0 dpkg.log\n1030.5 7 nginx/error.log\n"
    assert run(tmp_path, "log-files", {"find": good}) == "3 files"
    rejects(tmp_path, "log-files", {"find": good + "9.5 99 bootstrap.log\n"}, "bootstrap.log")
    rejects(tmp_path, "log-files", {"find": good.replace("0 dpkg.log", "7 dpkg.log")}, "dpkg.log")
    rejects(
        tmp_path, "log-files", {"find": good.replace("1030.5 7", "9.5 7")}, "nginx/error.log (older than this boot)"
    )


def test_caches(tmp_path: Path) -> None:
    assert run(tmp_path, "empty-caches", {"find": ""}) == "empty"
    rejects(tmp_path, "empty-caches", {"find": "/var/cache/apt/archives/x.deb\n"}, "x.deb")


def test_journal(tmp_path: Path) -> None:
    good = {"cat-config": "[Journal]\nSystemMaxUse=64M\n", "system.journal": ""}
    assert run(tmp_path, "journal-bounded", good)
    rejects(tmp_path, "journal-bounded", {**good, "cat-config": "#SystemMaxUse=\n"}, "not set")
    rejects(tmp_path, "journal-bounded", {**good, "system.journal": (1, "")}, "no journal")


def test_growth(tmp_path: Path) -> None:
    assert "4.8" in run(tmp_path, "root-grown", {"stat -f": f"{int(4.8 * 1024**2)} 1024"})
    rejects(tmp_path, "root-grown", {"stat -f": f"{int(3.8 * 1024**2)} 1024"}, "3.80 GiB")


def test_nfs_is_skipped_only_where_no_mounts_are_promised(tmp_path: Path) -> None:
    with pytest.raises(Skipped):
        run(tmp_path, "nfs-mounts", {})
    answers = {"ls ": "", "findmnt": "", "systemctl status": "failed"}
    rejects(tmp_path, "nfs-mounts", answers, "is not mounted", root={"nfs": {}})
    assert len(storage.MOUNT_POINTS) == 2


def test_sysctls_services_and_locale(tmp_path: Path) -> None:
    root = {"sysctl": {"vm.swappiness": "10"}, "services": ["a.service"], "masked": ["b.service"]}
    settings: dict[str, Any] = {"root": root}
    assert run(tmp_path, "sysctls", {"vm.swappiness": "10\n"}, **settings)
    rejects(tmp_path, "sysctls", {"vm.swappiness": "60\n"}, "60 instead of 10", **settings)
    units = {"a.service": "enabled\n", "b.service": "masked\n"}
    assert run(tmp_path, "services", units, **settings)
    rejects(tmp_path, "services", {**units, "a.service": (1, "disabled\n")}, "a.service is disabled", **settings)
    rejects(tmp_path, "services", {**units, "b.service": "enabled\n"}, "instead of masked", **settings)
    place = {"locale": "LANG=C.UTF-8\n", "readlink": "/usr/share/zoneinfo/Etc/UTC", "cmp": ""}
    assert run(tmp_path, "locale-and-time-zone", place)
    rejects(tmp_path, "locale-and-time-zone", {**place, "locale": "LANG=C\n"}, "not C.UTF-8")
    rejects(tmp_path, "locale-and-time-zone", {**place, "cmp": "differ: char 21"}, "time zone")


def test_kvm_device(tmp_path: Path) -> None:
    good: Answers = {"stat": "kvm 660\n", "setpriv": (1, "denied"), "exec 3": ""}
    assert run(tmp_path, "kvm-device", good)
    rejects(tmp_path, "kvm-device", {**good, "stat": "root 600\n"}, "root 600")
    rejects(tmp_path, "kvm-device", {**good, "exec 3": (2, "no")}, "can't open")
    rejects(tmp_path, "kvm-device", {**good, "setpriv": ""}, "nobody can open")


def test_virt_host_validate(tmp_path: Path) -> None:
    promised = Promises(packages=("libvirt-clients",))
    good = "QEMU: Checking for hardware virtualization : PASS\nQEMU: Checking for IOMMU : WARN (x)\n"
    assert "1 pass" in run(tmp_path, "virt-host-validate", {"virt-host": good}, promised=promised)
    bad = good + "QEMU: Checking if device '/dev/kvm' exists : FAIL (load the module)\n"
    rejects(tmp_path, "virt-host-validate", {"virt-host": bad}, "/dev/kvm", promised=promised)
    rejects(tmp_path, "virt-host-validate", {"virt-host": (127, "not found")}, "not found", promised=promised)


def test_a_libvirt_subnet_that_the_machine_uses_is_a_clash() -> None:
    xml = "<network><ip address='192.168.122.1' netmask='255.255.255.0'><dhcp/></ip></network>"
    subnet = virtual.network_of(xml)
    assert str(subnet) == "192.168.122.0/24"
    own = {"dst": "192.168.122.0/24", "dev": "virbr0"}
    assert (
        virtual.clashes(subnet, [own, {"dst": "default", "dev": "eth0"}, {"dst": "10.0.2.0/24", "dev": "eth0"}]) == []
    )
    assert virtual.clashes(subnet, [{"dst": "192.168.0.0/16", "dev": "eth0"}]) == ["192.168.0.0/16 dev eth0"]
    with pytest.raises(Failed, match="no IPv4 subnet"):
        virtual.network_of("<network/>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Startup finished in 1.25s (kernel) + 1min 3.4s (userspace) = 1min 4.6s", {"kernel": 1.25, "userspace": 63.4}),
        ("Startup finished in 900ms (kernel) + 2s (initrd) + 3.5s (userspace) = 6.4s",
         {"kernel": 0.9, "initrd": 2.0, "userspace": 3.5}),
    ],
)  # fmt: skip
def test_boot_times_are_read_in_seconds(text: str, expected: dict[str, float]) -> None:
    assert system.parse_analyze(text) == expected


def test_boot_times_that_are_no_times_are_a_failure() -> None:
    with pytest.raises(Failed):
        system.parse_analyze("Bootup is not yet finished")


def test_two_copies(tmp_path: Path) -> None:
    run_ = acceptance(tmp_path)
    facts = {"machine-id": "a" * 32, "host-keys": "SHA256:x SHA256:y"}
    run_.found = {"first": facts, "second": {"machine-id": "b" * 32, "host-keys": "SHA256:z"}}
    assert image_checks.copies_differ_in_host_keys(run_)
    assert image_checks.copies_differ_in_machine_id(run_)
    run_.found["second"]["host-keys"] = "SHA256:z SHA256:y"
    with pytest.raises(Failed, match="SHA256:y"):
        image_checks.copies_differ_in_host_keys(run_)
    run_.found["second"]["machine-id"] = "a" * 32
    with pytest.raises(Failed, match="both copies"):
        image_checks.copies_differ_in_machine_id(run_)
    run_.found.pop("second")
    with pytest.raises(Failed, match="told no machine-id"):
        image_checks.copies_differ_in_machine_id(run_)


def test_config_parsing_ignores_what_is_off() -> None:
    assert promises.parse_config('CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="x y"\n') == {"A": "y", "C": '"x y"'}


def test_loopback_addresses() -> None:
    assert all(map(security._is_loopback, ("127.0.0.54%lo", "[::1]", "127.0.0.1")))
    assert not any(map(security._is_loopback, ("0.0.0.0", "[::]", "*", "10.0.2.15%eth0")))


def test_what_listens_outside_is_told_from_what_is_for_instances() -> None:
    text = (
        'udp UNCONN 0 0 192.168.122.1:53 0.0.0.0:* users:(("dnsmasq",pid=9,fd=5))\n'
        "udp UNCONN 0 0 0.0.0.0%virbr0:67 0.0.0.0:*\n"
        "tcp LISTEN 0 128 127.0.0.1:5672 0.0.0.0:*\n"
        "tcp LISTEN 0 4096 127.0.0.53%lo:53 0.0.0.0:*\n"
        'tcp LISTEN 0 511 [::]:443 [::]:* users:(("nginx",pid=7,fd=6))\n'
        'tcp LISTEN 0 128 0.0.0.0:22 0.0.0.0:* users:(("sshd",pid=8,fd=6))\n'
        "udp UNCONN 0 0 10.0.2.15%enp0s5:68 0.0.0.0:*\n"
    )
    found = nestedcloud.listeners(text, ["192.168.122.1"])
    assert set(found) == {("tcp", 443), ("tcp", 22), ("udp", 68)}
    assert "nginx" in found["tcp", 443]
    assert ("udp", 53) in nestedcloud.listeners(text, [])


_RULES = "table inet recvirt_cloud { chain input { type filter hook input priority filter; policy drop; } }"
_CENTRAL = Promises(packages=("recvirt-cloud-central",))
_WORKER = Promises(packages=("recvirt-cloud-worker",))


def _closed(listening: str, rules: str | tuple[int, str] = _RULES) -> dict[str, str | tuple[int, str]]:
    links = '[{"ifname": "recvirt0", "addr_info": [{"local": "fd81::1"}]}, {"ifname": "eth0"}]'
    return {"ip -json": links, "ss -H": listening, "nft list": rules}


_SSH = "tcp LISTEN 0 128 0.0.0.0:22 0.0.0.0:*\n"
_API = "tcp LISTEN 0 511 [::]:443 [::]:*\n"
_TUNNEL = "tcp LISTEN 0 64 [fd81::1]:2049 [::]:*\nudp UNCONN 0 0 0.0.0.0:51820 0.0.0.0:*\n"


@pytest.mark.parametrize(("promises", "listening", "words"), [
    (_CENTRAL, _SSH + _API + _TUNNEL, ""),
    (_CENTRAL, _SSH + _TUNNEL, "nothing listens on port 443"),
    (_CENTRAL, _SSH + _API + "tcp LISTEN 0 64 [::]:2049 [::]:*\n", "2049/tcp"),
    (_WORKER, _SSH, ""),
    (_WORKER, _SSH + _API, "443/tcp"),
])  # fmt: skip
def test_what_may_listen_is_what_the_roles_of_an_image_need(
    tmp_path: Path, promises: Promises, listening: str, words: str
) -> None:
    looked_at = guest(tmp_path, _closed(listening), promises=promises)
    if not words:
        assert "22/tcp" in nestedcloud.cloud_is_closed(looked_at)
        return
    with pytest.raises(Failed, match=words):
        nestedcloud.cloud_is_closed(looked_at)


@pytest.mark.parametrize("rules", [(1, "No such file or directory"), "chain input { policy accept; }"])
def test_a_cloud_without_its_firewall_is_open(tmp_path: Path, rules: str | tuple[int, str]) -> None:
    with pytest.raises(Failed, match="not in force"):
        nestedcloud.cloud_is_closed(guest(tmp_path, _closed(_SSH, rules), promises=_WORKER))


@pytest.mark.parametrize(("promises", "left"), [
    (_CENTRAL, {"cloud-is-set-up", "cloud-is-closed", "cloud-keeps-its-secrets"}), (_WORKER, {"cloud-is-closed"}),
])  # fmt: skip
def test_what_another_role_is_for_is_skipped(tmp_path: Path, promises: Promises, left: set[str]) -> None:
    asked = set()
    for check in (check for check in CHECKS.values() if check.scene == "cloud"):
        try:
            check.function(guest(tmp_path, {}, promises=promises))
        except Skipped as error:
            assert "the image is no " in str(error)
        except AssertionError:
            # It wanted to know something of the guest.
            asked.add(check.name)
    assert asked == left


@pytest.mark.parametrize(("health", "good"), [
    ({"database": "ok", "workers": "none is up"}, True), ({"database": "ok", "broker": "away", "workers": "ok"}, False),
])  # fmt: skip
def test_a_central_node_is_healthy_without_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, health: dict[str, str], good: bool
) -> None:
    status = json.dumps({"healthy": False, "health": health, "version": "1", "workers": {"up": 0}})
    answers: dict[str, str | tuple[int, str]] = {
        "is-active": "active", "login-here": "", "recvirt-cloud status": (1, status), "systemctl": "",
    }  # fmt: skip
    monkeypatch.setattr(nestedcloud, "wait_for", lambda _guest, what, look, *_: look() or pytest.fail(what))
    looked_at = guest(tmp_path, answers, promises=_CENTRAL)
    if good:
        assert "0 worker up" in nestedcloud.cloud_is_set_up(looked_at)
    else:
        with pytest.raises(pytest.fail.Exception):
            nestedcloud.cloud_is_set_up(looked_at)


def test_a_reboot_may_cut_its_own_answer_off_but_not_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def cut(command: str) -> str:
        asked.append(command)
        raise GuestError("SSH to the guest failed")

    machine = guest(tmp_path, {})
    monkeypatch.setattr(machine, "run", cut)
    machine._ask_for_reboot()
    assert asked == ["systemctl --no-block reboot"]
    # The answer was lost after it had been obeyed, and the question was asked again.
    told = "Call to Reboot failed: Action reboot already in progress, refusing requested reboot operation."
    guest(tmp_path, {"reboot": (1, told)})._ask_for_reboot()
    refused = guest(tmp_path, {"reboot": (1, "denied")})
    with pytest.raises(Failed, match="denied"):
        refused._ask_for_reboot()
