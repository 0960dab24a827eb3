"""An older database comes to this version with all that is in it, or stays what it is."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from django.apps import apps as current_apps
from django.core.management import call_command
from django.db import connections
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder

from recvirt.nestedcloud import provision
from recvirt.nestedcloud.central import migrations, restore, upgrade
from recvirt.nestedcloud.central.models import Instance, Operation
from recvirt.nestedcloud.central.upgrade import UnreachableError, UpgradeError
from recvirt.nestedcloud.cli import main_group
from recvirt.nestedcloud.model import GIB, Fault, Phase
from recvirt.nestedcloud.provision import Machine, UpgradeFailedError
from recvirt.nestedcloud.statuses import ExitStatus
from tests.cloud.conftest import Cloud
from tests.cloud.test_operations import launched
from tests.cloud.test_provision import Programs, machine, programs

__all__ = ["machine", "programs"]

ALIAS = "older"
FOLDER = Path(migrations.__file__).parent
STATES = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))
AT = datetime(2026, 11, 1, 8, tzinfo=UTC)


@pytest.fixture
def older(transactional_db: None, django_db_blocker: Any, tmp_path: Path) -> Iterator[str]:
    """An empty database of the run's kind, under a name of its own."""
    with django_db_blocker.unblock():
        default = connections["default"]
        name = f"older_{uuid.uuid4().hex[:12]}"
        on_server = default.vendor == "postgresql"
        if on_server:
            with default.cursor() as cursor:
                cursor.execute(f"CREATE DATABASE {name}")
        connections.databases[ALIAS] = {
            **default.settings_dict, "NAME": name if on_server else str(tmp_path / name),
        }  # fmt: skip
        try:
            yield ALIAS
        finally:
            connections[ALIAS].close()
            del connections[ALIAS]
            del connections.databases[ALIAS]
            if on_server:
                with default.cursor() as cursor:
                    cursor.execute(f"DROP DATABASE {name}")


def migrate_to(state: str) -> Any:
    """Bring the database to a state of ours; the models as they were then."""
    executor = MigrationExecutor(connections[ALIAS])
    executor.migrate([("cloud", state)])
    return executor.loader.project_state(("cloud", state)).apps


def fill(apps: Any) -> None:
    """A row of each table, as the first version has them."""

    def make(model: str, **values: Any) -> Any:
        return apps.get_model(*model.split(".")).objects.using(ALIAS).create(**values)

    user = make("auth.User", username="ada", password="!")
    project = make("cloud.Project", name="lab")
    make("cloud.Membership", project=project, user=user, role="operator")
    make("cloud.ApiToken", user=user, name="laptop", digest="0" * 64, project=project, expires=AT)
    worker = make(
        "cloud.Worker", name="w1", vcpus=8, memory_bytes=16 * GIB, disk_bytes=100 * GIB, features={"kvm": True}
    )
    image = make("cloud.Image", name="tiny", state="ready", sha256="1" * 64, virtual_bytes=GIB, worker=worker)
    network = make("cloud.Network", name="inner", project=project, kind="isolated", cidr="10.9.0.0/24")
    sizes = {"memory_bytes": GIB, "disk_bytes": GIB}
    instance = make(
        "cloud.Instance", project=project, worker=worker, image=image, name="wéb", state="on", power="running",
        generation=7, vcpus=1, vcpus_max=2, memory_max_bytes=2 * GIB, ssh_keys=["ssh-ed25519 AAAA"], snapshots=["s"],
        promised_vcpus=2, promised_memory_bytes=2 * GIB, promised_disk_bytes=GIB, user_data="#!/bin/sh\n", **sizes,
    )  # fmt: skip
    make("cloud.Nic", instance=instance, network=network, position=0, mac="52:54:00:00:00:01")
    volume = make(
        "cloud.Volume", project=project, worker=worker, instance=instance, slot=1, name="data", state="ready",
        size_bytes=GIB, promised_bytes=GIB, snapshots={"s": GIB},
    )  # fmt: skip
    common: dict[str, Any] = {"project": project, "user": user, "worker": worker}
    done = make(
        "cloud.Operation", instance=instance, kind="launch", phase="succeeded", idempotency_key="k",
        facts={"how": "live"}, finished=AT, **common,
    )  # fmt: skip
    make("cloud.Operation", instance=instance, kind="stop", phase="running", attempt=2, lease_until=AT, **common)
    make("cloud.Operation", volume=volume, kind="volume-resize", phase="queued", args={"size_bytes": 2 * GIB}, **common)
    make("cloud.Event", project=project, user=user, kind="operation.succeeded", subject=done.uuid, data={"a": [1, "é"]})
    schedule = make(
        "cloud.Schedule", project=project, user=user, instance=instance, name="night", kind="stop", begins=AT,
        rule="FREQ=DAILY", zone="Europe/Budapest", next_at=AT,
    )  # fmt: skip
    make("cloud.Firing", schedule=schedule, at=AT, outcome="asked", operation=done)
    make("cloud.Reservation", schedule=schedule, begins=AT, ends=AT + timedelta(hours=1), vcpus=2, **common, **sizes)
    make("cloud.Pulse", name="dispatcher", at=AT)


def rows(apps: Any) -> dict[str, list[dict[str, Any]]]:
    """What is in our tables: every column of every row, by table."""
    found = {}
    for model in apps.get_app_config("cloud").get_models():
        found[model.__name__] = list(model._default_manager.using(ALIAS).order_by("pk").values())
    return found


def assert_kept(before: dict[str, list[dict[str, Any]]], after: dict[str, list[dict[str, Any]]]) -> None:
    """Every row is there with every value; there may be more columns, and more tables."""
    for table, old in before.items():
        assert [{name: row[name] for name in was} for was, row in zip(old, after[table], strict=True)] == old, table


def test_the_tables_are_what_the_models_say(db: None) -> None:
    call_command("makemigrations", check=True, dry_run=True, verbosity=0)


def test_a_migration_can_be_taken_back_by_its_transaction() -> None:
    loader = MigrationLoader(None)
    ours = [migration for (app, _), migration in loader.disk_migrations.items() if app == "cloud"]
    assert len(ours) == len(STATES) and all(migration.atomic for migration in ours)


@pytest.mark.parametrize("state", STATES)
def test_every_earlier_state_comes_to_this_one(older: str, state: str) -> None:
    fill(migrate_to(STATES[0]))
    before = rows(migrate_to(state))
    assert all(before[table] for table in ("Project", "Instance", "Operation", "Pulse"))
    told: list[str] = []
    upgrade.upgrade(told.append, database=older)
    assert_kept(before, rows(current_apps))
    assert MigrationExecutor(connections[older]).loader.graph.leaf_nodes("cloud") == [("cloud", STATES[-1])]
    upgrade.upgrade(told.append, database=older)
    assert told[-1] == "the database is of this version"


def test_an_empty_database_gets_everything(older: str) -> None:
    upgrade.upgrade(lambda _text: None, database=older)
    fill(current_apps)
    assert len(rows(current_apps)["Operation"]) == 3


_HEAD = "from django.db import migrations, models\n\n\nclass Migration(migrations.Migration):\n"
_ROWS = """\
from django.db import migrations


def more(apps, schema_editor):
    alias = schema_editor.connection.alias
    project = apps.get_model("cloud", "Project").objects.using(alias).first()
    apps.get_model("cloud", "Event").objects.using(alias).create(kind="upgraded", project=project)


class Migration(migrations.Migration):
    dependencies = [("cloud", "{before}")]
    operations = [migrations.RunPython(more, migrations.RunPython.noop)]
"""
_COLUMN = (
    _HEAD + '    dependencies = [("cloud", "9001_rows")]\n'
    '    operations = [migrations.AddField("event", "extra", models.CharField(max_length=9, default="new")),\n'
    '                  migrations.RenameModel("pulse", "beat")]\n'
)
_LAST = """\
from django.db import migrations


def last(apps, schema_editor):
    {code}


class Migration(migrations.Migration):
    dependencies = [("cloud", "9002_column")]
    operations = [migrations.RunPython(last, migrations.RunPython.noop)]
"""


@pytest.fixture
def later(older: str, tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three migrations of a version to come, the last one still without a file, and a full database of this version."""
    fill(migrate_to(STATES[-1]))
    folder = tmp_path / f"later_{uuid.uuid4().hex[:12]}"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "9001_rows.py").write_text(_ROWS.format(before=STATES[-1]))
    (folder / "9002_column.py").write_text(_COLUMN)
    monkeypatch.syspath_prepend(tmp_path)
    settings.MIGRATION_MODULES = {"cloud": folder.name}
    return folder


def tables() -> dict[str, list[str]]:
    """Every table's columns."""
    with connections[ALIAS].cursor() as cursor:
        inspect = connections[ALIAS].introspection
        return {
            name: [column.name for column in inspect.get_table_description(cursor, name)]
            for name in sorted(inspect.table_names(cursor))
        }


def test_a_migration_that_fails_leaves_what_was_there(later: Path) -> None:
    before, shape = rows(current_apps), tables()
    (later / "9003_last.py").write_text(_LAST.format(code='raise RuntimeError("the data are odd")'))
    with pytest.raises(UpgradeError, match=r"cloud\.9003_last: RuntimeError: the data are odd"):
        upgrade.upgrade(lambda _text: None, database=ALIAS)
    assert tables() == shape and rows(current_apps) == before
    applied = MigrationRecorder(connections[ALIAS]).applied_migrations()
    assert max(name for app, name in applied if app == "cloud") == STATES[-1]
    with pytest.raises(Exception, match=r"(?i)foreign key"), connections[ALIAS].cursor() as cursor:
        # References are looked at again.
        cursor.execute("UPDATE cloud_nic SET network_id = %s", [uuid.uuid4().hex])


def test_once_it_is_mended_it_goes_through(later: Path) -> None:
    before = rows(current_apps)
    (later / "9003_last.py").write_text(_LAST.format(code="pass"))
    upgrade.upgrade(lambda _text: None, database=ALIAS)
    shape = tables()
    assert "extra" in shape["cloud_event"] and "cloud_beat" in shape and "cloud_pulse" not in shape
    with connections[ALIAS].cursor() as cursor:
        cursor.execute("SELECT kind, extra FROM cloud_event ORDER BY id")
        assert cursor.fetchall() == [("operation.succeeded", "new"), ("upgraded", "new")]
        cursor.execute("SELECT count(*) FROM cloud_operation")
        assert cursor.fetchone() == (len(before["Operation"]),)


def test_what_a_newer_version_has_written_is_left_alone(later: Path, settings: Any) -> None:
    upgrade.upgrade(lambda _text: None, database=ALIAS)
    settings.MIGRATION_MODULES = {}
    shape = tables()
    with pytest.raises(UpgradeError, match=r"newer version .*cloud\.9001_rows, cloud\.9002_column"):
        upgrade.upgrade(lambda _text: None, database=ALIAS)
    assert tables() == shape


def test_a_database_that_is_away_is_no_failed_upgrade(older: str) -> None:
    connections.databases[older]["NAME"] = "/nonexistent/cloud"
    connections[older].settings_dict["NAME"] = "/nonexistent/cloud"
    with pytest.raises(UnreachableError, match="does not answer"):
        upgrade.upgrade(lambda _text: None, database=older)


@pytest.mark.parametrize(("error", "status"), [(UpgradeError("odd data"), 7), (UnreachableError("away"), 5)])
def test_the_command_tells_the_two_apart(monkeypatch: pytest.MonkeyPatch, error: Exception, status: int) -> None:
    def fails(_tell: Any) -> None:
        raise error

    monkeypatch.setattr(upgrade, "upgrade", fails)
    result = CliRunner().invoke(main_group, ["central", "migrate"])
    assert result.exit_code == status and str(error) in result.output and "hint: " in result.output


def test_the_set_up_hands_a_failed_upgrade_on(
    machine: Machine, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs.fails = ("central migrate", ExitStatus.UPGRADE)
    with pytest.raises(UpgradeFailedError):
        provision.setup(machine)
    monkeypatch.setattr(provision, "Machine", lambda **_: machine)
    assert CliRunner().invoke(main_group, ["setup"]).exit_code == ExitStatus.UPGRADE
    programs.fails = ("central init", ExitStatus.UPGRADE)
    assert CliRunner().invoke(main_group, ["setup"]).exit_code == ExitStatus.CONFIG
    programs.fails = None
    assert CliRunner().invoke(main_group, ["setup"]).exit_code == 0


# --- after a backup was restored


def test_what_was_under_way_at_the_backup_is_ended_and_not_sent_again(cloud: Cloud) -> None:
    instance = launched(cloud)
    asked = cloud.client.post(cloud.url("instances/web/stop"), {}, format="json")
    assert asked.status_code == 202
    result = CliRunner().invoke(main_group, ["central", "restored"])
    assert result.output.startswith("1 operations") and result.exit_code == 0
    operation = Operation.objects.get(uuid=asked.data["uuid"])
    assert (operation.phase, operation.fault) == (Phase.FAILED.value, Fault.CONFLICT.value)
    assert operation.message == restore.MESSAGE and operation.lease_until is None and operation.finished
    # Whatever the worker has seen since the backup, what is asked for now is newer.
    assert Instance.objects.get(pk=instance.pk).generation > instance.generation + 1000
    assert cloud.client.post(cloud.url("instances/web/stop"), {}, format="json").status_code == 202
    assert restore.settle() == 1
