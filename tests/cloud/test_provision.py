"""The first set-up: what is made once, what is made again, who may read it, and where a secret never stands."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from recvirt.data import data_path
from recvirt.nestedcloud import broker, exports, login, provision, tunnel
from recvirt.nestedcloud.central import config as central_config
from recvirt.nestedcloud.central.bodies import BODY_BYTES_MAX
from recvirt.nestedcloud.provision import Machine, ProvisionError, password_hash, permissions
from recvirt.nestedcloud.worker import service


class Programs:
    """Stands in for the programs of a machine, and keeps what it was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[tuple[str, ...], str, str | None]] = []
        self.users = {"guest": password_hash("guest")}
        self.permissions: dict[str, str] = {}
        self.clusters = ""
        self.rows: set[str] = set()
        self.fails: tuple[str, int] | None = None
        self.interface = ""
        self.listens = True

    def __call__(self, argv: Sequence[str], text: str, user: str | None) -> str:
        self.calls.append((tuple(argv), text, user))
        words = " ".join(argv)
        if self.fails is not None and self.fails[0] in words:
            raise ProvisionError(f"{argv[0]}: broken", self.fails[1])
        if argv[0] == "openssl":
            for option in ("-keyout", "-out"):
                Path(argv[argv.index(option) + 1]).write_text("pem")
        elif argv[0] == "ip":
            return self.interface
        elif words == "systemctl restart rabbitmq-server.service":
            self.listens = True
        elif argv[0] == "pg_lsclusters":
            return self.clusters
        elif argv[0] == "pg_createcluster":
            self.clusters = "17 main 5432 online\n"
        elif argv[0] in ("createuser", "createdb"):
            self.rows.add(argv[0])
        elif argv[0] == "psql":
            return "1\n" if ("createuser" if "pg_roles" in words else "createdb") in self.rows else "\n"
        elif tuple(argv[: len(provision.RABBITMQCTL)]) == provision.RABBITMQCTL:
            return self._broker(argv[len(provision.RABBITMQCTL) :])
        return ""

    def _broker(self, argv: Sequence[str]) -> str:
        if argv[0] == "import_definitions":
            said = json.loads(Path(argv[1]).read_text())
            self.users |= {item["name"]: item["password_hash"] for item in said["users"]}
            self.permissions = {item["user"]: item["read"] for item in said["permissions"]}
        if argv[0] == "delete_user":
            del self.users[argv[1]]
        return ""

    def can_log_in(self, url: str) -> bool:
        """As RabbitMQ does: the salt is the first four bytes."""
        parts = urlsplit(url)
        if parts.hostname != "127.0.0.1" and not self.listens:
            return False
        raw = base64.b64decode(self.users.get(parts.username or "", ""))
        return raw[4:] == hashlib.sha256(raw[:4] + (parts.password or "").encode()).digest()

    def named(self, program: str) -> list[tuple[str, ...]]:
        return [argv for argv, _, _ in self.calls if argv[0] == program]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    (tmp_path / "usr/lib/postgresql/17").mkdir(parents=True)
    return Programs(tmp_path)


def has_roles(machine: Machine, *roles: str) -> None:
    """Packages of these roles, and no others, are installed."""
    folder = machine.root / "usr/lib/recvirt-cloud/roles"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for role in roles:
        (folder / role).touch()


@pytest.fixture
def machine(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One of a cloud of one machine, whose tunnel comes up."""

    def ensure_central(where: Machine, cloud: uuid.UUID) -> None:
        programs.interface = f"5: recvirt0    inet6 {tunnel.central_address(cloud)}/64 scope global\n"
        provision.write(where, where.etc / "tunnel/tunnel.json", "{}", reader=None, mode=0o600)

    monkeypatch.setattr(tunnel, "ensure_central", ensure_central)
    (programs.root / "run").mkdir()
    owner = (os.geteuid(), os.getegid())
    made = Machine(
        programs.root, programs, lambda _user: owner, lambda _text: None, programs.can_log_in, lambda _group: owner[1]
    )
    has_roles(made, "central", "worker")
    return made


def test_both_services_can_read_their_configuration_afterwards(machine: Machine) -> None:
    provision.setup(machine)
    central = central_config.load(machine.central)
    worker = service.load(machine.worker)
    assert central.cloud == worker.cloud and worker.domain_type == "kvm"
    assert len(central.secret_key) > 40
    assert central.broker.startswith("amqp://central:") and worker.broker.startswith(f"amqp://{worker.uuid}:")


def test_again_changes_nothing(machine: Machine, programs: Programs) -> None:
    provision.setup(machine)
    files = {path: path.read_bytes() for path in machine.etc.rglob("*") if path.is_file()}
    programs.calls.clear()
    provision.setup(machine)
    assert {path: path.read_bytes() for path in machine.etc.rglob("*") if path.is_file()} == files
    made = ("openssl", "pg_createcluster", "createuser", "createdb", "recvirt-nested-check")
    assert not [argv for argv, _, _ in programs.calls if argv[0] in made]


@pytest.mark.parametrize(
    "step", ["openssl", "pg_createcluster", "createuser", "createdb", "import_definitions", "delete_user",
             "central migrate", "central init"]
)  # fmt: skip
def test_a_run_that_was_cut_short_is_finished_by_the_next(machine: Machine, programs: Programs, step: str) -> None:
    programs.fails = (step, 1)
    with pytest.raises(ProvisionError):
        provision.setup(machine)
    programs.fails = None
    provision.setup(machine)
    assert set(programs.users) == {"central", service.load(machine.worker).uuid}
    assert not list((machine.root / "run").iterdir())
    assert programs.rows == {"createuser", "createdb"}
    assert not list(machine.etc.rglob(".*"))


def test_no_secret_stands_on_a_command_line_or_is_open_to_others(machine: Machine, programs: Programs) -> None:
    told: list[str] = []
    provision.setup(replace(machine, tell=told.append))
    secrets = [(machine.etc / "secret-key").read_text()]
    for path in (machine.central, machine.worker):
        secrets.append(provision.read(path)["broker"].split(":")[2].split("@")[0])
    said = [" ".join(argv) for argv, _, _ in programs.calls] + told
    assert not [secret for secret in secrets if any(secret in line for line in said)]
    assert len(set(secrets)) == 3
    for path in (machine.etc / "secret-key", machine.central, machine.worker):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_the_broker_knows_both_accounts_and_loses_its_guest(machine: Machine, programs: Programs) -> None:
    provision.setup(machine)
    worker = service.load(machine.worker)
    for url in (worker.broker, central_config.load(machine.central).broker):
        assert programs.can_log_in(url)
    assert not programs.can_log_in("amqp://guest:guest@127.0.0.1:5672//")
    assert programs.permissions[worker.uuid] == permissions(worker.uuid)[2]


def test_a_broker_that_lost_its_data_gets_the_same_accounts_again(machine: Machine, programs: Programs) -> None:
    provision.setup(machine)
    programs.users = {"guest": password_hash("guest")}
    provision.setup(machine)
    assert programs.can_log_in(service.load(machine.worker).broker) and "guest" not in programs.users


def test_a_worker_reaches_its_own_queue_and_the_inbox_of_the_central_node() -> None:
    import re

    own, other = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
    configure, send, receive = (re.compile(text) for text in permissions(own))
    for name in (f"worker.{own}", f"worker.{own}.console"):
        assert configure.search(name) and receive.search(name)
    assert send.search("central")
    for name in (f"worker.{other}", "central", f"worker.{own}x", f"x.worker.{own}", f"worker.{other}.console"):
        assert not receive.search(name) and not configure.search(name), name
    # The default exchange leads everywhere.
    others = (f"worker.{other}", f"worker.{other}.console", f"worker.{own}.consoles", f"worker.{own}xconsole")
    for name in (*others, "amq.default", ""):
        assert not send.search(name), name


def test_what_an_older_version_allowed_at_the_broker_is_brought_to_this_one_s(
    machine: Machine, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(broker, "permissions", lambda user: ("^old$", "^old$", f"^{user}$"))
        provision.setup(machine)
    worker = service.load(machine.worker)
    accounts = dict(programs.users)
    assert programs.permissions[worker.uuid] == f"^{worker.uuid}$"
    provision.setup(machine)
    assert programs.permissions[worker.uuid] == permissions(worker.uuid)[2]
    # The passwords stay, and the tools are slow: nothing is imported when there is nothing new.
    assert set(programs.users) == set(accounts) and all(
        programs.can_log_in(url) for url in (worker.broker, central_config.load(machine.central).broker)
    )
    count = len(programs.calls)
    provision.setup(machine)
    assert not [argv for argv, _, _ in programs.calls[count:] if "import_definitions" in argv]


@pytest.mark.parametrize(("status", "kind"), [(14, "kvm"), (10, "qemu"), (11, "qemu"), (13, "qemu"), (1, "qemu")])
def test_vms_run_under_kvm_only_where_one_was_seen_to(
    machine: Machine, programs: Programs, status: int, kind: str
) -> None:
    programs.fails = ("recvirt-nested-check", status)
    assert provision.domain_type(machine) == kind


def test_a_cluster_that_is_there_is_taken(machine: Machine, programs: Programs) -> None:
    programs.clusters = "16 main 5432 down\n"
    provision.setup(machine)
    assert not programs.named("pg_createcluster")
    assert ("systemctl", "start", "postgresql@16-main.service") in programs.named("systemctl")


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(ProvisionError, match="recvirt-absent is not installed"):
        provision.run_program(["recvirt-absent"], "", None)
    with pytest.raises(ProvisionError, match="status 3") as caught:
        provision.run_program(["sh", "-c", "exit 3"], "", None)
    assert caught.value.status == 3


def test_api_and_worker_share_a_folder_for_uploads(machine: Machine) -> None:
    provision.setup(machine)
    spool = central_config.load(machine.central).spool
    assert Path(service.load(machine.worker).spool_dir) == spool == machine.spool
    assert stat.S_IMODE(spool.stat().st_mode) == 0o2770


def test_the_worker_can_remove_what_consoles_said(machine: Machine) -> None:
    provision.setup(machine)
    assert Path(service.load(machine.worker).log_dir) == machine.logs
    assert machine.logs.is_dir()


def test_an_older_configuration_keeps_its_values_and_gets_what_it_lacks(machine: Machine) -> None:
    provision.setup(machine)
    text = machine.worker.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("spool_dir")]
    machine.worker.write_text("\n".join([*lines, "concurrency = 9", ""]).replace('"kvm"', '"qemu"'))
    provision.setup(machine)
    found = service.load(machine.worker)
    assert (found.concurrency, found.domain_type) == (9, "qemu")
    assert found.spool_dir == str(machine.spool)


def test_the_front_lets_through_what_the_api_takes() -> None:
    text = (data_path("packages") / "recvirt-cloud-central/root/usr/share/recvirt-cloud/nginx.conf").read_text()
    found = re.search(r"client_max_body_size (\d+)k;", text)
    assert found is not None
    assert int(found[1]) * 1024 == BODY_BYTES_MAX


# --- roles


def test_a_central_node_has_no_worker_of_its_own(machine: Machine, programs: Programs) -> None:
    has_roles(machine, "central")
    provision.setup(machine)
    assert not machine.worker.exists() and not programs.named("recvirt-nested-check")
    assert set(programs.users) == {"central"}
    init = [argv for argv, _, _ in programs.calls if "init" in argv]
    assert [argv[-2:] for argv in init] == [("central", "init")]
    # What is added later joins by itself.
    has_roles(machine, "central", "worker")
    provision.setup(machine)
    worker = service.load(machine.worker)
    assert worker.cloud == central_config.load(machine.central).cloud and worker.uuid in programs.users


def test_a_worker_has_nothing_to_do_before_it_has_joined(machine: Machine, programs: Programs) -> None:
    has_roles(machine, "worker")
    told: list[str] = []
    provision.setup(replace(machine, tell=told.append))
    assert programs.calls == [] and not list(machine.etc.iterdir())
    assert machine.logs.is_dir() and machine.spool.is_dir() and "recvirt-cloud worker join" in told[-1]
    machine.worker.write_text('cloud = "c"\n')
    provision.setup(machine)
    assert programs.calls == [] and machine.worker.read_text() == 'cloud = "c"\n'
    with pytest.raises(ProvisionError, match="no central node"):
        login.login_here(machine)


def test_without_a_role_there_is_no_set_up(machine: Machine, programs: Programs) -> None:
    has_roles(machine)
    with pytest.raises(ProvisionError, match="recvirt-cloud-central"):
        provision.setup(machine)
    assert programs.calls == []


def test_a_worker_of_another_cloud_stays_there(machine: Machine, programs: Programs) -> None:
    machine.etc.mkdir(parents=True)
    machine.worker.write_text(text := f'cloud = "{uuid.uuid4()}"\nbroker = "amqp://w:p@[fd00::1]:5672//"\n')
    provision.setup(machine)
    assert machine.worker.read_text() == text and set(programs.users) == {"central"}


def test_a_worker_s_mounted_folders_are_left_to_their_server(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "etc/recvirt").mkdir(parents=True)
    (tmp_path / "etc/recvirt/nfs.conf").write_text("IMAGES_SOURCE=[fd00::1]:/var/lib/recvirt/images\nBLOCKS_SOURCE=\n")
    has_roles(machine, "worker")
    provision.setup(machine)
    assert [path.exists() for path in exports.folders(machine)] == [False, True]


def test_a_file_server_that_keeps_its_owners_stops_nothing(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc/recvirt").mkdir(parents=True)
    (tmp_path / "etc/recvirt/nfs.conf").write_text("IMAGES_SOURCE='nas:/images'\r\n")
    told: list[str] = []
    made = Path.chmod

    def chmod(path: Path, mode: int, **more: bool) -> None:
        if path.name == "images":
            raise PermissionError(1, "Operation not permitted")
        made(path, mode, **more)

    monkeypatch.setattr(Path, "chmod", chmod)
    provision.setup(replace(machine, tell=told.append))
    assert any("nas:/images" in line and "not permitted" in line for line in told)
