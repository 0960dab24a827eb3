"""The cloud as a whole: status, metrics, and the command line on both."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.core.cache import cache
from django.utils import timezone

from recvirt.nestedcloud.central import health, operations, reservations
from recvirt.nestedcloud.central.admission import MEMORY_RESERVE_BYTES, Need
from recvirt.nestedcloud.central.models import ApiToken, Pulse, Worker
from recvirt.nestedcloud.model import GIB, Kind, Phase
from recvirt.nestedcloud.queue import make_app, trouble_with
from tests.cloud.conftest import Cloud, client_of, make_user, make_worker
from tests.cloud.test_operations import launched, report, sent


@pytest.fixture(autouse=True)
def _fresh() -> None:
    cache.clear()


def get(cloud: Cloud) -> Any:
    answer = cloud.client.get("/api/v1/status")
    assert answer.status_code == 200
    return answer.data


def test_a_cloud_with_nothing_wrong_is_healthy(cloud: Cloud) -> None:
    health.beat(health.DISPATCHER)
    launched(cloud)
    found = get(cloud)
    assert found["healthy"], found["health"]
    assert found["workers"] == {"up": 1, "total": 1, "draining": 0}
    assert found["capacity"]["vcpus"] == {"total": 32, "promised": 4, "free": 28}
    whole = 16 * GIB - MEMORY_RESERVE_BYTES
    assert found["capacity"]["memory_bytes"] == {"total": whole, "promised": GIB, "free": whole - GIB}
    assert found["instances"] == {"on": 1}


def test_what_is_reserved_is_not_free(cloud: Cloud) -> None:
    reservations.reserve(cloud.project, None, timezone.now() + timedelta(days=1), None, Need(1, 2, GIB, GIB))
    assert get(cloud)["capacity"]["vcpus"] == {"total": 32, "promised": 0, "free": 30}


def test_each_part_that_is_away_is_named(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    Pulse.objects.create(name=health.DISPATCHER, at=timezone.now() - timedelta(minutes=5))
    Worker.objects.update(last_seen=None)
    monkeypatch.setattr(health, "trouble_with", lambda *_: "ConnectionRefusedError")
    found = get(cloud)
    assert not found["healthy"]
    assert found["health"] == {
        "database": "ok", "broker": "ConnectionRefusedError", "dispatcher": "it has not been heard of lately",
        "workers": "none is up",
    }  # fmt: skip
    assert found["capacity"]["vcpus"]["total"] == 0


def test_a_broker_that_is_away_is_told_without_its_password() -> None:
    broker = "amqp://cloud:hunter2@127.0.0.1:1/"
    trouble = trouble_with(make_app(broker), broker)
    assert trouble and "hunter2" not in trouble
    assert "can't be written to" in trouble_with(make_app("filesystem:/tmp"), "filesystem:/absent")


def test_a_pulse_is_written_now_and_then(cloud: Cloud, django_assert_num_queries: Any) -> None:
    health.beat("x")
    with django_assert_num_queries(1):
        health.beat("x")


def test_metrics_are_for_administrators_and_well_formed(cloud: Cloud) -> None:
    assert cloud.client.get("/metrics").status_code == 403
    root = make_user("root")
    root.is_superuser = True
    root.save()
    client = client_of(root)
    ApiToken.objects.filter(user=root).update(read_only=True)
    instance = launched(cloud)
    operation = operations.request(instance, cloud.user, Kind.STOP, {})
    sent()
    operation.refresh_from_db()
    from recvirt.nestedcloud.central import reports

    reports.apply(report(operation, Phase.FAILED))
    make_worker("w2", last_seen=None)
    answer = client.get("/metrics")
    assert answer["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.content.decode().splitlines()
    sample = re.compile(r'[a-z_]+(\{[a-z_]+="[^"\n]*"(,[a-z_]+="[^"\n]*")*\})? -?[0-9.e+]+')
    assert all(line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line) for line in lines)
    for line in ('recvirt_instances{state="on"} 1', 'recvirt_operations_total{phase="failed"} 1',
                 'recvirt_worker_up{worker="w2"} 0.0', 'recvirt_vcpus{part="total"} 32',
                 'recvirt_operation_queued_seconds 0.0'):  # fmt: skip
        assert line in lines, line


def test_a_label_can_t_break_the_format() -> None:
    (_, _, line) = health._family("x", "gauge", "y", [({"a": 'b"\n\\'}, 1)])
    assert line == 'x{a="b\\"\\n\\\\"} 1'
