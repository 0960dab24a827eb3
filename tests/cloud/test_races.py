"""Two requests at one moment, on two connections: promises hold. On the database of the run (SQLite, PostgreSQL)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, connections
from django.utils import timezone

from recvirt.nestedcloud.central import dispatcher, operations, reservations, schedules
from recvirt.nestedcloud.central.admission import Need
from recvirt.nestedcloud.central.models import (
    Firing,
    Image,
    ImageState,
    Instance,
    Operation,
    Project,
    Reservation,
    Schedule,
    Worker,
)
from recvirt.nestedcloud.central.problems import Refused
from recvirt.nestedcloud.model import GIB, Kind
from tests.cloud.conftest import Cloud, client_of, make_user, make_worker
from tests.cloud.test_operations import launched, wish

ROUNDS = 5
THREADS = 4


@pytest.fixture
def cloud(transactional_db: None) -> Cloud:
    """Committed, so that other connections see it."""
    project = Project.objects.create(name="lab", instances_max=1000, vcpus_max=1000)
    user = make_user("ada", project)
    image = Image.objects.create(name="tiny", state=ImageState.READY, virtual_bytes=GIB)
    return Cloud(project, user, make_worker(), image, client_of(user))


def together(*functions: Callable[[], Any]) -> list[Any]:
    """What each function gave, or the refusal it raised; all begin at one moment, each on a connection of its own."""
    start = threading.Barrier(len(functions))
    found: list[Any] = [None] * len(functions)

    def run(index: int, function: Callable[[], Any]) -> None:
        try:
            connection.ensure_connection()
            start.wait(10)
            found[index] = function()
        except BaseException as error:
            found[index] = error
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "they wait for each other"
    for item in found:
        if isinstance(item, BaseException) and not isinstance(item, Refused):
            raise item
    return found


def kinds(found: list[Any]) -> Counter[str]:
    return Counter(item.default_code if isinstance(item, Refused) else "done" for item in found)


def test_a_quota_is_not_passed_by_two_at_once(cloud: Cloud) -> None:
    Project.objects.update(instances_max=1)
    cloud.project.refresh_from_db()
    names = [f"i{number}" for number in range(THREADS)]
    bodies = [wish(cloud, name=name) for name in names]
    found = together(*(lambda body=body: operations.launch(cloud.project, cloud.user, body) for body in bodies))
    assert kinds(found) == {"done": 1, "quota-exceeded": THREADS - 1}


def test_a_worker_s_memory_is_not_promised_twice(cloud: Cloud) -> None:
    """From projects of their own, so that only the worker's row stands between them."""
    asks = []
    for number in range(THREADS):
        project = Project.objects.create(name=f"p{number}")
        other = Cloud(project, cloud.user, cloud.worker, cloud.image, cloud.client)
        body = wish(other, memory_bytes=8 * GIB, memory_max_bytes=8 * GIB)
        asks.append(lambda project=project, body=body: operations.launch(project, cloud.user, body))
    assert kinds(together(*asks)) == {"done": 1, "no-capacity": THREADS - 1}
    assert Instance.objects.count() == 1


def test_room_is_reserved_once(cloud: Cloud) -> None:
    begins = timezone.now() + timedelta(hours=1)
    need = Need(1, 1, 8 * GIB, GIB)
    projects = [Project.objects.create(name=f"p{number}") for number in range(THREADS)]
    found = together(
        *(lambda project=project: reservations.reserve(project, cloud.user, begins, None, need) for project in projects)
    )
    assert kinds(found) == {"done": 1, "no-capacity": THREADS - 1} and Reservation.objects.count() == 1


def test_one_key_is_one_instance(cloud: Cloud) -> None:
    body = wish(cloud)
    found = together(*[lambda: operations.launch(cloud.project, cloud.user, body, "key")] * THREADS)
    assert len({operation.pk for operation in found}) == 1 and Instance.objects.count() == 1


def test_one_operation_at_a_time(cloud: Cloud) -> None:
    for number in range(ROUNDS):
        instance = launched(cloud, name=f"i{number}", memory_max_bytes=GIB)
        found = together(*[lambda item=instance: operations.request(item, cloud.user, Kind.STOP, {})] * THREADS)
        assert kinds(found) == {"done": 1, "operation-active": THREADS - 1}


def test_two_dispatchers_send_each_operation_once(cloud: Cloud) -> None:
    Worker.objects.update(memory_bytes=999 * GIB, vcpus=999)
    for number in range(8):
        operations.launch(cloud.project, cloud.user, wish(cloud, name=f"i{number}"))
    sent: list[str] = []
    together(*[lambda: dispatcher.tick(lambda _, command: sent.append(command.operation))] * THREADS)
    assert sorted(sent) == sorted(str(key) for key in Operation.objects.values_list("pk", flat=True))


def test_two_dispatchers_fire_a_schedule_once(cloud: Cloud) -> None:
    Worker.objects.update(memory_bytes=999 * GIB, vcpus=999)
    due = timezone.now().replace(microsecond=0)
    for number in range(6):
        Schedule.objects.create(
            project=cloud.project, user=cloud.user, instance=launched(cloud, name=f"i{number}"), name=f"s{number}",
            kind=Kind.STOP.value, begins=due, next_at=due,
        )  # fmt: skip
    counts = together(*[lambda: schedules.fire(due)] * THREADS)
    assert sum(counts) >= 6
    assert Firing.objects.count() == 6 == Operation.objects.filter(kind="stop").count()
    assert set(Firing.objects.values_list("outcome", flat=True)) == {"asked"}
