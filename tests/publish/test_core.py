"""The parts that all providers stand on: budget, journal, plans, what is retired, transfers, names."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from recvirt.errors import PublishError
from recvirt.publish.budget import Budget
from recvirt.publish.errors import DeniedError, TransientError
from recvirt.publish.journal import Journal, target_lock
from recvirt.publish.plan import Plan, Step, as_table
from recvirt.publish.provider import Remote
from recvirt.publish.retire import choose
from recvirt.publish.transfer import Progress, send_all

# --- the budget


def failing(times: int, error: Exception | None = None) -> tuple[list[int], object]:
    calls: list[int] = []

    def function() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error or TransientError("cut")
        return "done"

    return calls, function


def test_what_may_pass_is_tried_again() -> None:
    waits: list[float] = []
    calls, function = failing(3)
    assert Budget(sleep=waits.append).call("x", function) == "done"  # type: ignore[arg-type]
    assert len(calls) == 4
    assert len(waits) == 3
    assert waits[0] <= 0.5 < waits[2] <= 2.0


def test_a_call_is_given_up_after_its_tries() -> None:
    calls, function = failing(100)
    with pytest.raises(PublishError, match=r"cut \(given up after 8 tries\)") as caught:
        Budget(sleep=lambda _s: None).call("send", function)  # type: ignore[arg-type]
    assert len(calls) == 8
    assert "goes on" in caught.value.hint


@pytest.mark.parametrize("error", [DeniedError("no"), PublishError("invalid"), ValueError("ours")])
def test_what_can_not_pass_is_not_tried_again(error: Exception) -> None:
    calls, function = failing(1, error)
    with pytest.raises(type(error)):
        Budget(sleep=lambda _s: None).call("x", function)  # type: ignore[arg-type]
    assert len(calls) == 1


def test_the_budget_is_one_for_all_calls_and_success_refills_it() -> None:
    budget = Budget(tokens=5, tries=100, sleep=lambda _s: None)
    calls, function = failing(100)
    with pytest.raises(PublishError):
        budget.call("x", function)  # type: ignore[arg-type]
    assert len(calls) == 6
    for _ in range(5):
        budget.call("fine", lambda: None)
    assert budget.tokens == pytest.approx(1.0)


def test_the_providers_own_wait_is_kept() -> None:
    waits: list[float] = []
    _, function = failing(1, TransientError("429", after=7.0))
    Budget(sleep=waits.append).call("x", function)  # type: ignore[arg-type]
    assert waits == [7.0]
    assert Budget().pause(1, 10_000.0) == 60.0


# --- the journal


def open_journal(folder: Path) -> Journal:
    return Journal(folder / "t.journal")


def test_a_journal_remembers_parts_and_facts(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.begin({"upload": "a"})
    journal.done(3, "x")
    journal.done(1)
    again = open_journal(tmp_path)
    assert (again.facts, again.parts) == ({"upload": "a"}, {3: "x", 1: ""})
    assert (tmp_path / "t.journal").stat().st_mode & 0o777 == 0o600
    again.begin({"upload": "b"})
    assert open_journal(tmp_path).parts == {}
    again.forget()
    assert open_journal(tmp_path).facts == {}


def test_a_line_that_a_kill_cut_is_passed_over_at_every_byte(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.begin({"upload": "a"})
    journal.done(1, "first")
    whole = (tmp_path / "t.journal").read_bytes()
    journal.done(2, "second")
    journal.close()
    both = (tmp_path / "t.journal").read_bytes()
    for length in range(len(whole), len(both)):
        (tmp_path / "t.journal").write_bytes(both[:length])
        cut = open_journal(tmp_path)
        assert cut.parts == {1: "first"}
        cut.done(7, "later")
        cut.close()
        assert open_journal(tmp_path).parts == {1: "first", 7: "later"}


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with target_lock(tmp_path, "t", "d" * 64):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with target_lock(tmp_path, "t", "d" * 64):
        inside.set()
        thread.join(0.3)
        order.append("first")
        with target_lock(tmp_path, "other", "d" * 64):
            pass
    thread.join()
    assert order == ["first", "second"]


# --- transfers


@pytest.mark.parametrize("workers", [1, 3])
def test_all_parts_are_sent_and_never_more_at_once_than_workers(workers: int) -> None:
    lock, now, most, sent = threading.Lock(), [0], [0], []

    def send(part: int) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        sent.append(part)
        with lock:
            now[0] -= 1

    send_all(range(100), send, workers)
    assert sorted(sent) == list(range(100))
    assert most[0] <= workers


def test_the_first_failure_stops_the_rest() -> None:
    sent: list[int] = []

    def send(part: int) -> None:
        if part == 5:
            raise PublishError("denied")
        sent.append(part)

    with pytest.raises(PublishError, match="denied"):
        send_all(range(10_000), send, 4)
    assert len(sent) < 100


def test_progress_tells_rate_and_time_left() -> None:
    clock = [0.0]
    progress = Progress("send", 100_000_000, lambda: clock[0])
    assert progress.pace() == "starting"
    for _ in range(10):
        clock[0] += 1.0
        progress.add(1_000_000)
    assert progress.pace() == "1.0 MB/s, 1 min 30 s left"


# --- what is retired


def remote(name: str, days: float, profile: str = "default", in_use: bool | None = None) -> Remote:
    made = datetime(2026, 11, 27, tzinfo=UTC) - timedelta(days=days)
    return Remote(name, name, name, profile, made, in_use=in_use)


def chosen(remotes: list[Remote], keep: int = 1, days: float = 10) -> list[str]:
    now = datetime(2026, 11, 27, tzinfo=UTC)
    return [item.name for item in choose(remotes, keep=keep, older_than_days=days, now=now)]


def test_the_oldest_go_first_and_the_newest_never() -> None:
    images = [remote("b", 50), remote("a", 100), remote("d", 20), remote("c", 30)]
    assert chosen(images) == ["a", "b", "c"]
    assert chosen(images, keep=3) == ["a"]
    assert chosen(images, days=40) == ["a", "b"]
    assert chosen(images, keep=0, days=0) == ["a", "b", "c"]
    assert chosen([remote("only", 1000)], keep=0) == []
    assert chosen([]) == []


def test_each_profile_keeps_its_own() -> None:
    assert chosen([remote("a", 100), remote("b", 50), remote("m", 200, "minimal")]) == ["a"]


def test_what_is_in_use_stays() -> None:
    assert chosen([remote("a", 100, in_use=True), remote("b", 60, in_use=False), remote("c", 50)]) == ["b"]


# --- plans


def test_a_plan_tells_bytes_and_whether_there_is_anything_to_do() -> None:
    plan = Plan("aws", "aws", "recvirt-default-0123", (Step("upload", "blocks", 1_500_000), Step("create", "AMI")))
    done = Plan("mirror", "mirror", "recvirt-default-0123", (Step("exists", "file"),))
    assert (plan.bytes, plan.idle, done.idle) == (1_500_000, False, True)
    assert "1.5 MB to send" in as_table([plan, done])
    assert "nothing to send" in as_table([done])
    assert json.loads(json.dumps(plan.as_json()))["steps"][0]["bytes"] == 1_500_000
