"""The maintainer scripts of recvirt-cloud: what an upgrade stops, in which order, and what it never touches."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from recvirt.data import RESOURCES_DIR
from recvirt.nestedcloud import portmap
from recvirt.nestedcloud.statuses import ExitStatus

PACKAGE = RESOURCES_DIR / "packages/recvirt-cloud"
UNITS = PACKAGE / "root/usr/lib/systemd/system"
SETUP = "recvirt-cloud-setup.service"

_SYSTEMCTL = """\
#!/bin/sh
echo "systemctl $*" >>"$LOG"
case "$*" in
    "is-active --quiet recvirt-cloud.target") exec test -e "$STATE/active" ;;
    "stop recvirt-cloud.target"*) rm -f "$STATE/active" ;;
    "start recvirt-cloud-setup.service") exec test ! -e "$STATE/broken" ;;
    "start recvirt-cloud.target") touch "$STATE/active" ;;
esac
"""


class Machine:
    """Runs maintainer scripts with programs that only say what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        for name in ("bin", "run/systemd/system", "state"):
            (folder / name).mkdir(parents=True)
        for name in ("systemd-sysusers", "py3compile", "py3clean"):
            self.program(name, f'#!/bin/sh\necho "{name} $*" >>"$LOG"\n')
        self.program("systemctl", _SYSTEMCTL)
        self.program("id", '#!/bin/sh\ncat "$STATE/groups" 2>/dev/null || echo libvirt-qemu kvm\n')
        # dpkg --compare-versions A gt B, for plain numbers.
        self.program(
            "dpkg", '#!/bin/sh\n[ "$2" != "$4" ] && [ "$(printf "%s\\n%s\\n" "$2" "$4" | sort -V | tail -1)" = "$2" ]\n'
        )

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    @property
    def active(self) -> Path:
        return self.folder / "state/active"

    @property
    def broken(self) -> Path:
        return self.folder / "state/broken"

    @property
    def marker(self) -> Path:
        return self.folder / "run/recvirt-cloud-upgrade"

    def run(self, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        text = (PACKAGE / "DEBIAN" / script).read_text().replace("/run/", f"{self.folder}/run/")
        env = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}", "LOG": str(self.log),
            "STATE": str(self.folder / "state"),
        }  # fmt: skip
        return subprocess.run(["sh", "-c", text, script, *words], env=env, capture_output=True, text=True, check=False)

    def said(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def asked(self) -> list[str]:
        """What systemd was told to do."""
        return [line for line in self.said() if re.match(r"systemctl (try-)?(re)?(start|stop)", line)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


TAKE_OVER = [
    f"systemctl stop recvirt-cloud.target {SETUP}",
    f"systemctl start {SETUP}",
    "systemctl start recvirt-cloud.target",
]


def test_an_upgrade_stops_the_services_sets_up_and_starts_them(machine: Machine) -> None:
    machine.active.touch()
    assert machine.run("prerm", "upgrade", "0.2.0").returncode == 0
    assert machine.asked() == ["systemctl stop recvirt-cloud.target"] and machine.marker.exists()
    assert machine.run("preinst", "upgrade", "0.1.0", "0.2.0").returncode == 0
    machine.log.unlink()
    assert machine.run("postinst", "configure", "0.1.0").returncode == 0
    assert machine.asked() == TAKE_OVER
    assert machine.said().index("systemctl daemon-reload") < machine.said().index(TAKE_OVER[0])
    assert machine.active.exists() and not machine.marker.exists()


def test_an_older_version_that_left_its_services_running_is_taken_over_too(machine: Machine) -> None:
    machine.active.touch()
    assert machine.run("postinst", "configure", "0.1.0").returncode == 0
    assert machine.asked() == TAKE_OVER


def test_what_was_stopped_stays_stopped(machine: Machine) -> None:
    machine.run("prerm", "upgrade", "0.2.0")
    assert machine.run("postinst", "configure", "0.1.0").returncode == 0
    assert machine.asked() == []


def test_a_first_installation_starts_nothing(machine: Machine) -> None:
    assert machine.run("postinst", "configure", "").returncode == 0
    assert machine.asked() == []
    assert machine.said()[:2] == ["systemd-sysusers recvirt-cloud.conf", "py3compile -p recvirt-cloud"]


def test_in_an_image_that_is_being_built_systemd_is_left_alone(machine: Machine) -> None:
    (machine.folder / "run/systemd/system").rmdir()
    for words in (("prerm", "upgrade", "0.2.0"), ("prerm", "remove"), ("postinst", "configure", "0.1.0")):
        assert machine.run(*words).returncode == 0
    assert not [line for line in machine.said() if line.startswith("systemctl")]


def test_a_set_up_that_fails_is_told_and_done_again_by_dpkg(machine: Machine) -> None:
    machine.active.touch()
    machine.broken.touch()
    machine.run("prerm", "upgrade", "0.2.0")
    failed = machine.run("postinst", "configure", "0.1.0")
    assert failed.returncode == 1
    assert "journalctl" in failed.stderr and "dpkg --configure -a" in failed.stderr
    assert not machine.active.exists()
    machine.broken.unlink()
    assert machine.run("postinst", "configure", "0.1.0").returncode == 0
    assert machine.active.exists() and not machine.marker.exists()


def test_an_upgrade_that_was_given_up_starts_the_services_again(machine: Machine) -> None:
    machine.active.touch()
    machine.run("prerm", "upgrade", "0.2.0")
    assert machine.run("postinst", "abort-upgrade", "0.2.0").returncode == 0
    assert machine.active.exists() and not machine.marker.exists()


@pytest.mark.parametrize(
    ("old", "new", "status"), [("0.1.0", "0.2.0", 0), ("0.2.0", "0.2.0", 0), ("0.10.0", "0.9.0", 1)]
)
def test_a_downgrade_is_refused_before_anything_changes(machine: Machine, old: str, new: str, status: int) -> None:
    done = machine.run("preinst", "upgrade", old, new)
    assert done.returncode == status and ("hint:" in done.stderr) == bool(status)
    assert machine.said() == []
    assert machine.run("preinst", "install").returncode == 0


def test_libvirtd_starts_anew_only_for_new_groups(machine: Machine) -> None:
    """It knows the groups of QEMU's user from its start on."""
    machine.active.touch()
    assert machine.run("postinst", "configure", "0.1.0").returncode == 0
    assert machine.asked() == TAKE_OVER
    machine.program("systemd-sysusers", '#!/bin/sh\necho libvirt-qemu kvm more >"$STATE/groups"\n')
    machine.log.unlink()
    assert machine.run("postinst", "configure", "0.1.0").returncode == 0
    assert machine.asked() == ["systemctl try-restart libvirtd.service", *TAKE_OVER]


def test_removal_stops_the_services(machine: Machine) -> None:
    assert machine.run("prerm", "remove").returncode == 0
    assert machine.asked() == ["systemctl stop recvirt-cloud.target"]


def test_nothing_else_of_libvirts_is_touched() -> None:
    allowed = "systemctl try-restart libvirtd.service"
    for path in (PACKAGE / "DEBIAN").iterdir():
        if path.name != "control":
            lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
            code = "\n".join(lines).replace("id -nG libvirt-qemu", "").replace(allowed, "")
            assert not re.search(r"virsh|libvirt|machine\.slice|qemu", code), path
            named = re.findall(r"systemctl (?:start|stop|restart|try-restart) (.*?)(?:;|$)", code, re.MULTILINE)
            assert all(word.startswith("recvirt-cloud") for line in named for word in line.split()), named
    for path in UNITS.glob("recvirt-cloud*"):
        for name, value in re.findall(r"(?m)^(Requires|BindsTo|PartOf|Conflicts)=(.*)$", path.read_text()):
            assert all(word.startswith("recvirt-cloud") for word in value.split()), (path.name, name)


def test_every_service_waits_for_the_set_up_and_ends_with_the_target() -> None:
    # The rules of forwards follow the worker's wishes, which come only once it works.
    others = (SETUP, "recvirt-cloud-forwards.service")
    services = [path for path in UNITS.glob("recvirt-cloud-*.service") if path.name not in others]
    assert len(services) >= 5
    for path in services:
        text = path.read_text()
        assert f"Requires={SETUP}" in text and re.search(rf"(?m)^After=.*{SETUP}", text), path.name
        assert "PartOf=recvirt-cloud.target" in text, path.name


def test_forwards_are_loaded_when_the_worker_wants_others_and_when_libvirt_starts() -> None:
    path = (UNITS / "recvirt-cloud-forwards.path").read_text()
    assert f"PathChanged={portmap.RUN_DIR / portmap.FOLDER_NAME}\n" in path and "PartOf=recvirt-cloud.target" in path
    service = (UNITS / "recvirt-cloud-forwards.service").read_text()
    assert re.search(r"(?m)^After=.*libvirtd.service", service) and "Type=oneshot\n" in service
    assert f"RuntimeDirectory={portmap.APPLIED_PATH.parent.name}\n" in service
    assert "CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW CAP_DAC_READ_SEARCH\n" in service
    links = (PACKAGE / "links").read_text()
    for wants in ("recvirt-cloud.target.wants/recvirt-cloud-forwards.path",
                  "libvirtd.service.wants/recvirt-cloud-forwards.service"):  # fmt: skip
        assert f"usr/lib/systemd/system/{wants}\n" in links


def test_a_database_that_can_t_be_upgraded_is_not_tried_again_and_again() -> None:
    text = (UNITS / SETUP).read_text()
    assert f"RestartPreventExitStatus={ExitStatus.UPGRADE.value}\n" in text
    # Else the services fail with the set-up's first try, and nobody starts them when the second one succeeds.
    assert "Restart=on-failure\n" in text and "RestartMode=direct\n" in text
