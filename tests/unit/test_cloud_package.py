"""The maintainer scripts of the cloud's packages: what an upgrade stops, in which order, and what it never touches."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from recvirt.data import RESOURCES_DIR
from recvirt.nestedcloud import portmap
from recvirt.nestedcloud.statuses import ExitStatus

COMMON, CENTRAL, WORKER = PACKAGES = ("recvirt-cloud", "recvirt-cloud-central", "recvirt-cloud-worker")
FOLDER = RESOURCES_DIR / "packages"
SYSTEM = "root/usr/lib/systemd/system"
SETUP, PREPARE = "recvirt-cloud-setup.service", "recvirt-cloud-prepare.service"
TRIGGER = "dpkg-trigger --no-await recvirt-cloud-take-over"

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
        for name in ("systemd-sysusers", "py3compile", "py3clean", "dpkg-trigger"):
            self.program(name, f'#!/bin/sh\necho "{name} $*" >>"$LOG"\n')
        self.program("systemctl", _SYSTEMCTL)
        self.program("id", '#!/bin/sh\ncat "$STATE/groups" 2>/dev/null || echo libvirt-qemu kvm\n')
        # The last word is the package.
        self.program("dpkg-query", '#!/bin/sh\nshift 3\ncat "$STATE/$1" 2>/dev/null || echo installed\n')
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

    def run(self, script: str, *words: str, package: str = COMMON) -> subprocess.CompletedProcess[str]:
        text = (FOLDER / package / "DEBIAN" / script).read_text()
        for name in ("/run/", "/etc/recvirt-cloud/", "/usr/lib/recvirt-cloud/"):
            text = text.replace(name, f"{self.folder}{name}")
        env = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}", "LOG": str(self.log),
            "STATE": str(self.folder / "state"),
        }  # fmt: skip
        return subprocess.run(["sh", "-c", text, script, *words], env=env, capture_output=True, text=True, check=False)

    def configure(self, before: str = "0.1.1") -> subprocess.CompletedProcess[str]:
        """What dpkg does at the end: every package is configured, and then the trigger is looked at."""
        for package in PACKAGES:
            assert self.run("postinst", "configure", before, package=package).returncode == 0
        return self.triggered()

    def triggered(self) -> subprocess.CompletedProcess[str]:
        """The trigger's part, if it was pulled."""
        if TRIGGER not in self.said():
            return subprocess.CompletedProcess((), 0)
        return self.run("postinst", "triggered", "recvirt-cloud-take-over")

    def said(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def asked(self) -> list[str]:
        """What systemd was told to do."""
        return [line for line in self.said() if re.match(r"systemctl (try-)?(re)?(start|stop)", line)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


TAKE_OVER = [
    f"systemctl stop recvirt-cloud.target {SETUP} {PREPARE}",
    f"systemctl start {SETUP}",
    "systemctl start recvirt-cloud.target",
]


def test_an_upgrade_stops_the_services_sets_up_and_starts_them_once(machine: Machine) -> None:
    machine.active.touch()
    for package in PACKAGES:
        assert machine.run("prerm", "upgrade", "0.2.0", package=package).returncode == 0
        assert machine.run("preinst", "upgrade", "0.1.1", "0.2.0", package=package).returncode == 0
    assert machine.asked() == ["systemctl stop recvirt-cloud.target"] and machine.marker.exists()
    machine.log.unlink()
    assert machine.configure().returncode == 0
    assert machine.asked() == TAKE_OVER
    assert machine.said().index("systemctl daemon-reload") < machine.said().index(TAKE_OVER[0])
    assert machine.active.exists() and not machine.marker.exists()
    # dpkg may look at the trigger a second time.
    machine.log.unlink()
    assert machine.run("postinst", "triggered", "recvirt-cloud-take-over").returncode == 0
    assert machine.asked() == []


@pytest.mark.parametrize("state", ["unpacked", "half-configured", "half-installed"])
def test_nothing_starts_while_a_package_is_between_two_versions(machine: Machine, state: str) -> None:
    machine.marker.touch()
    (machine.folder / "state" / WORKER).write_text(state)
    assert machine.run("postinst", "triggered", "recvirt-cloud-take-over").returncode == 0
    for package in (COMMON, CENTRAL):
        assert machine.run("postinst", "abort-upgrade", "0.2.0", package=package).returncode == 0
    assert machine.asked() == [] and machine.marker.exists()


def test_the_one_package_of_the_first_version_is_taken_over(machine: Machine) -> None:
    """Its services are stopped by its own script, or by that of a package whose files it held before."""
    machine.active.touch()
    assert machine.run("preinst", "install", package=CENTRAL).returncode == 0
    assert machine.asked() == ["systemctl stop recvirt-cloud.target"] and machine.marker.exists()
    machine.log.unlink()
    assert machine.run("preinst", "install", package=WORKER).returncode == 0
    assert machine.run("postinst", "configure", "0.1.0").returncode == 0
    for package in (CENTRAL, WORKER):
        assert machine.run("postinst", "configure", "", package=package).returncode == 0
    assert machine.asked() == [] and machine.triggered().returncode == 0
    assert machine.asked() == TAKE_OVER and machine.active.exists()


def test_a_central_node_whose_services_would_be_missing_is_told(machine: Machine) -> None:
    (machine.folder / "etc/recvirt-cloud").mkdir(parents=True)
    (machine.folder / "etc/recvirt-cloud/central.toml").touch()
    said = machine.run("postinst", "configure", "0.1.0").stderr
    assert "hint: install recvirt-cloud-central" in said
    (machine.folder / "usr/lib/recvirt-cloud/roles").mkdir(parents=True)
    (machine.folder / "usr/lib/recvirt-cloud/roles/central").touch()
    assert machine.run("postinst", "configure", "0.1.0").stderr == ""


def test_an_older_version_that_left_its_services_running_is_taken_over_too(machine: Machine) -> None:
    machine.active.touch()
    assert machine.configure().returncode == 0
    assert machine.asked() == TAKE_OVER


def test_a_role_that_is_added_to_a_running_cloud_is_set_up(machine: Machine) -> None:
    machine.active.touch()
    assert machine.run("preinst", "install", package=WORKER).returncode == 0
    assert machine.run("postinst", "configure", "", package=WORKER).returncode == 0
    assert machine.triggered().returncode == 0
    assert machine.asked() == ["systemctl stop recvirt-cloud.target", *TAKE_OVER]


def test_what_was_stopped_stays_stopped(machine: Machine) -> None:
    for package in PACKAGES:
        machine.run("prerm", "upgrade", "0.2.0", package=package)
    assert machine.configure().returncode == 0
    assert machine.asked() == []


def test_a_first_installation_starts_nothing(machine: Machine) -> None:
    for package in PACKAGES:
        assert machine.run("preinst", "install", package=package).returncode == 0
    assert machine.configure("").returncode == 0
    assert machine.asked() == []
    made = [line for line in machine.said() if not line.startswith("systemctl")]
    assert made == [
        "systemd-sysusers recvirt-cloud.conf", "py3compile -p recvirt-cloud",
        # With the common file: members that it does not name would be made with any number.
        "systemd-sysusers recvirt-cloud.conf recvirt-cloud-central.conf",
        "systemd-sysusers recvirt-cloud.conf recvirt-cloud-worker.conf",
    ]  # fmt: skip


def test_in_an_image_that_is_being_built_systemd_is_left_alone(machine: Machine) -> None:
    (machine.folder / "run/systemd/system").rmdir()
    for package in PACKAGES:
        for words in (("preinst", "install"), ("prerm", "upgrade", "0.2.0"), ("prerm", "remove"),
                      ("postinst", "configure", "0.1.1")):  # fmt: skip
            assert machine.run(*words, package=package).returncode == 0
    assert not [line for line in machine.said() if line.startswith(("systemctl", "dpkg-trigger"))]


def test_a_set_up_that_fails_is_told_and_done_again_by_dpkg(machine: Machine) -> None:
    machine.active.touch()
    machine.broken.touch()
    machine.run("prerm", "upgrade", "0.2.0")
    failed = machine.configure()
    assert failed.returncode == 1
    assert "journalctl" in failed.stderr and "dpkg --configure -a" in failed.stderr
    assert not machine.active.exists()
    machine.broken.unlink()
    machine.log.unlink()
    # The one that has failed is configured again.
    assert machine.run("postinst", "configure", "0.1.1").returncode == 0
    assert machine.triggered().returncode == 0
    assert machine.active.exists() and not machine.marker.exists()


def test_an_upgrade_that_was_given_up_starts_the_services_again(machine: Machine) -> None:
    machine.active.touch()
    machine.run("prerm", "upgrade", "0.2.0")
    assert machine.run("postinst", "abort-upgrade", "0.2.0").returncode == 0
    assert machine.active.exists() and not machine.marker.exists()
    machine.run("prerm", "upgrade", "0.2.0", package=WORKER)
    assert machine.run("postinst", "abort-upgrade", "0.2.0", package=WORKER).returncode == 0
    assert machine.active.exists() and not machine.marker.exists()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("old", "new", "status"), [("0.1.0", "0.2.0", 0), ("0.2.0", "0.2.0", 0), ("0.10.0", "0.9.0", 1)]
)
def test_a_downgrade_is_refused_before_anything_changes(
    machine: Machine, old: str, new: str, status: int, package: str
) -> None:
    done = machine.run("preinst", "upgrade", old, new, package=package)
    assert done.returncode == status and ("hint:" in done.stderr) == bool(status)
    assert not machine.asked()
    assert machine.run("preinst", "install", package=package).returncode == 0


def test_libvirtd_starts_anew_only_for_new_groups(machine: Machine) -> None:
    """It knows the groups of QEMU's user from its start on."""
    machine.active.touch()
    assert machine.configure().returncode == 0
    assert machine.asked() == TAKE_OVER
    text = '#!/bin/sh\n[ "$2" != recvirt-cloud-worker.conf ] || echo libvirt-qemu kvm more >"$STATE/groups"\n'
    machine.program("systemd-sysusers", text)
    machine.log.unlink()
    assert machine.configure().returncode == 0
    assert machine.asked() == ["systemctl try-restart libvirtd.service", *TAKE_OVER]


def test_removal_stops_the_services(machine: Machine) -> None:
    assert machine.run("prerm", "remove").returncode == 0
    assert machine.asked() == [
        "systemctl stop recvirt-cloud.target recvirt-cloud-tunnel.service recvirt-cloud-firewall.service"
    ]


@pytest.mark.parametrize("package", [CENTRAL, WORKER])
def test_a_role_that_is_removed_stops_what_it_brought_and_leaves_the_other(machine: Machine, package: str) -> None:
    assert machine.run("prerm", "remove", package=package).returncode == 0
    stopped = {word for line in machine.asked() for word in line.split()[2:]}
    # What a path unit starts stops beside it.
    assert stopped - {"recvirt-cloud-forwards.service"} == set(members(package))
    assert {path.name for path in (FOLDER / package / SYSTEM).glob("recvirt-cloud-*.service")} - stopped <= {
        # It ends by itself.
        "recvirt-cloud-refresh.service"
    }


def members(package: str) -> list[str]:
    """What of a package the target consists of."""
    pairs = [line.split() for line in (FOLDER / package / "links").read_text().splitlines() if line[0] != "#"]
    wanted = [(target, Path(name)) for target, name in pairs]
    assert all(target == f"../{name.name}" for target, name in wanted), package
    assert {name.parent.name for _, name in wanted} <= {"recvirt-cloud.target.wants", "libvirtd.service.wants"}, package
    return [name.name for _, name in wanted if name.parent.name == "recvirt-cloud.target.wants"]


def units() -> list[Path]:
    """Every unit of the three packages."""
    paths = [path for package in PACKAGES for path in sorted((FOLDER / package / SYSTEM).glob("recvirt-cloud*.*"))]
    return [path for path in paths if path.is_file()]


def test_each_role_says_that_it_is_there_and_brings_what_its_links_name() -> None:
    for role, package in (("central", CENTRAL), ("worker", WORKER)):
        assert (FOLDER / package / "root/usr/lib/recvirt-cloud/roles" / role).read_bytes() == b""
        assert all((FOLDER / package / SYSTEM / name).is_file() for name in members(package))
    for line in (FOLDER / COMMON / "links").read_text().splitlines():
        assert line[0] == "#" or (FOLDER / COMMON / SYSTEM / Path(line.split()[1]).name).is_file()


def test_no_file_is_in_two_packages_and_all_are_of_one_version() -> None:
    files = [path.relative_to(FOLDER / name).as_posix() for name in PACKAGES
             for path in (FOLDER / name / "root").rglob("*") if path.is_file()]  # fmt: skip
    assert len(files) == len(set(files))
    controls = [(FOLDER / name / "DEBIAN/control").read_text() for name in PACKAGES]
    versions = {found[1] for text in controls if (found := re.search(r"(?m)^Version: (.*)$", text))}
    assert len(versions) == 1
    version = versions.pop()
    for text in controls[1:]:
        # What was in the one package of 0.1.0 is theirs now.
        for name in ("Breaks", "Replaces"):
            assert f"{name}: recvirt-cloud (<< 0.1.1)\n" in text
        assert f"recvirt-cloud (= {version})" in text
    assert all((FOLDER / name / "changelog").read_text().startswith(f"{name} ({version})") for name in PACKAGES)


def test_nothing_else_of_libvirts_is_touched() -> None:
    allowed = "systemctl try-restart libvirtd.service"
    for path in (path for name in PACKAGES for path in (FOLDER / name / "DEBIAN").iterdir()):
        if path.name not in ("control", "triggers"):
            lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
            code = "\n".join(lines).replace("id -nG libvirt-qemu", "").replace(allowed, "")
            assert not re.search(r"virsh|libvirt|machine\.slice|qemu", code), path
            named = re.findall(r"systemctl (?:start|stop|restart|try-restart) (.*?)(?:;|$)", code, re.MULTILINE)
            assert all(word.startswith("recvirt-cloud") for line in named for word in line.split()), named
    for path in units():
        for name, value in re.findall(r"(?m)^(Requires|BindsTo|PartOf|Conflicts)=(.*)$", path.read_text()):
            # Debian's own firewall flushes every table: ours goes and comes with it.
            words = [word for word in value.split() if word not in ("nftables.service", "shutdown.target")]
            assert all(word.startswith("recvirt-cloud") for word in words), (path.name, name)


def test_every_service_waits_for_the_set_up_and_ends_with_the_target() -> None:
    services = [path for path in units() if path.name in (*members(CENTRAL), *members(WORKER))]
    assert len(services) >= 8
    for path in services:
        text = path.read_text()
        if path.suffix == ".service":
            assert f"Requires={SETUP}" in text and re.search(rf"(?m)^After=.*{SETUP}", text), path.name
        assert "PartOf=recvirt-cloud.target" in text, path.name


def test_a_worker_waits_until_it_has_joined() -> None:
    for name in ("worker", "console"):
        text = (FOLDER / WORKER / SYSTEM / f"recvirt-cloud-{name}.service").read_text()
        assert "ConditionPathExists=/etc/recvirt-cloud/worker.toml\n" in text


def test_the_broker_starts_once_with_the_tunnel_s_address() -> None:
    """What says where it listens comes before it, and so does the address."""
    text = (FOLDER / CENTRAL / SYSTEM / "rabbitmq-server.service.d/recvirt-cloud.conf").read_text()
    assert f"Wants={PREPARE}\n" in text and f"After={PREPARE} recvirt-cloud-tunnel.service\n" in text
    # It starts the tunnel and waits for it: no order the other way round.
    tunnel = (FOLDER / COMMON / SYSTEM / "recvirt-cloud-tunnel.service").read_text()
    assert "prepare" not in tunnel and "rabbitmq" not in (FOLDER / COMMON / SYSTEM / SETUP).read_text()
    after = re.search(r"(?m)^After=(.*)$", (FOLDER / COMMON / SYSTEM / PREPARE).read_text())
    assert after is not None and not re.search(r"rabbitmq|setup|nfs|tunnel", after[1])


def test_forwards_are_loaded_when_the_worker_wants_others_and_when_libvirt_starts() -> None:
    path = (FOLDER / WORKER / SYSTEM / "recvirt-cloud-forwards.path").read_text()
    assert f"PathChanged={portmap.RUN_DIR / portmap.FOLDER_NAME}\n" in path and "PartOf=recvirt-cloud.target" in path
    service = (FOLDER / WORKER / SYSTEM / "recvirt-cloud-forwards.service").read_text()
    assert re.search(r"(?m)^After=.*libvirtd.service", service) and "Type=oneshot\n" in service
    assert f"RuntimeDirectory={portmap.APPLIED_PATH.parent.name}\n" in service
    assert "CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW CAP_DAC_READ_SEARCH\n" in service
    links = (FOLDER / WORKER / "links").read_text()
    for wants in ("recvirt-cloud.target.wants/recvirt-cloud-forwards.path",
                  "libvirtd.service.wants/recvirt-cloud-forwards.service"):  # fmt: skip
        assert f"usr/lib/systemd/system/{wants}\n" in links


def test_a_database_that_can_t_be_upgraded_is_not_tried_again_and_again() -> None:
    text = (FOLDER / COMMON / SYSTEM / SETUP).read_text()
    assert f"RestartPreventExitStatus={ExitStatus.UPGRADE.value}\n" in text
    # Else the services fail with the set-up's first try, and nobody starts them when the second one succeeds.
    assert "Restart=on-failure\n" in text and "RestartMode=direct\n" in text
