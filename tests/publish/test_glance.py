"""Publishers on two machines at one Glance, in many orders of their requests: one whole image, the same for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests

from recvirt.publish.provider import Published
from recvirt.publish.providers.openstack import OpenStack
from tests.publish import servers
from tests.publish.fakes_glance import URL, Glance, Killed, Turns
from tests.publish.support import Place

METHODS = ("upload", "import")


class Bench:
    """Two machines, each with a state folder of its own."""

    def __init__(self, place: Place, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._place, self._image, self._monkeypatch = place, image, monkeypatch
        self._count = 0

    def begin(self, seed: int, **more: Any) -> tuple[Turns, Glance]:
        """A new Glance, and machines that have never published."""
        turns = Turns(seed, **more)
        self._monkeypatch.setattr("recvirt.publish.providers.openstack.time", turns)
        self._count += 1
        return turns, Glance(turns)

    def machine(self, glance: Glance, name: str, method: str) -> OpenStack:
        """One of them, with a process of its own each time."""
        place = Place(self._place.folder / f"{self._count}{name}")
        provider = place.provider("openstack", self._image, [f"endpoint={URL}", "auth=none", f"method={method}"])
        assert isinstance(provider, OpenStack)
        provider.http.session.mount(URL, glance)
        provider.job.budget.sleep = glance.turns.sleep
        self._monkeypatch.setattr(provider, "_compare", lambda _there: None)
        return provider

    def both(self, glance: Glance, method: str) -> dict[str, Any]:
        """Let both publish."""
        machines = {name: self.machine(glance, name, method).publish for name in "ab"}
        glance.turns.run(**machines)
        return glance.turns.results


@pytest.fixture
def bench(place: Place, image: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(place, image, monkeypatch)


def same_whole_image(glance: Glance, *results: Any) -> None:
    """AssertionError unless there is one image, whole and tagged, which all results name."""
    (there,) = glance.there
    assert (there["status"], there["tags"]) == ("active", ["recvirt"])
    for result in results:
        assert isinstance(result, Published), result
        assert result.ids["image"] == there["id"]


@pytest.mark.parametrize("method", METHODS)
def test_in_whatever_order_two_machines_make_one_image(bench: Bench, method: str) -> None:
    for seed in range(40):
        _, glance = bench.begin(seed)
        found = bench.both(glance, method)
        same_whole_image(glance, found["a"], found["b"])
        assert sorted(bool(found[name].sent_bytes) for name in "ab") == [False, True]
        before = dict(glance.there[0])
        third = bench.machine(glance, "c", method).publish()
        same_whole_image(glance, third)
        assert (third.sent_bytes, glance.there[0]) == (0, before)


@pytest.mark.parametrize("method", METHODS)
def test_they_do_so_where_glance_fails_after_half_the_work(bench: Bench, method: str) -> None:
    for seed in range(20):
        _, glance = bench.begin(seed)
        glance.fails = 2 + seed % 5
        found = bench.both(glance, method)
        same_whole_image(glance, found["a"], found["b"])


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_machine_keeps_the_other_from_nothing(bench: Bench, method: str) -> None:
    """Whatever it was killed at, the other waits no longer than is said, and its own next run finds the same."""
    for step in range(1, 9):
        turns, glance = bench.begin(step, time_passes=True)
        begun = turns.now
        turns.kill["a"] = step
        found = bench.both(glance, method)
        assert isinstance(found["a"], Killed | Published)
        same_whole_image(glance, found["b"])
        assert turns.now - begun < 400
        same_whole_image(glance, bench.machine(glance, "a", method).publish())


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_is_gone_on_with_at_once_on_its_machine(bench: Bench, method: str) -> None:
    for step in range(1, 9):
        turns, glance = bench.begin(step, time_passes=True)
        turns.kill["a"] = step
        turns.run(a=bench.machine(glance, "a", method).publish)
        begun = turns.now
        same_whole_image(glance, bench.machine(glance, "a", method).publish())
        assert turns.now - begun < 10
        assert len(glance.images) == 1


@pytest.mark.parametrize("method", METHODS)
def test_one_that_slept_too_long_goes_over_to_the_others_image(bench: Bench, method: str) -> None:
    """Its own was deleted as abandoned; and it takes nothing away from the other."""
    _, glance = bench.begin(1, time_passes=True)
    slow = bench.machine(glance, "a", method)
    create = slow._create

    def create_and_sleep(identity: str, mark: str) -> dict[str, Any] | None:
        made = create(identity, mark)
        if len(glance.images) == 1:
            glance.turns.now += 3600
            same_whole_image(glance, bench.machine(glance, "b", method).publish())
        return made

    slow._create = create_and_sleep  # type: ignore[method-assign]
    same_whole_image(glance, slow.publish())
    assert [image["status"] for image in glance.images.values()] == ["deleted", "active"]


def test_what_was_deleted_is_published_anew(bench: Bench) -> None:
    _, glance = bench.begin(1)
    first = bench.machine(glance, "a", "upload").publish()
    glance.images[first.ids["image"]]["status"] = "deleted"
    found = bench.both(glance, "upload")
    same_whole_image(glance, found["a"], found["b"])
    assert found["a"].ids["image"] != first.ids["image"]


def test_what_may_not_be_deleted_stays_and_another_is_made(bench: Bench) -> None:
    turns, glance = bench.begin(1, time_passes=True)
    glance.protected = True
    turns.kill["a"] = 4
    found = bench.both(glance, "upload")
    assert isinstance(found["a"], Killed | Published)
    (whole,) = [image for image in glance.there if image["status"] == "active"]
    assert found["b"].ids["image"] == whole["id"]


@pytest.mark.slow
@pytest.mark.parametrize("left", ["queued", "staged in part", "whole without a tag"])
def test_what_another_machine_left_in_a_real_glance(
    place: Place, image: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    if servers.why_not("openstack"):
        pytest.skip(servers.why_not("openstack"))
    monkeypatch.setattr("recvirt.publish.providers.openstack._IDLE_SECONDS", 3.0)
    method = "upload" if left.startswith("whole") else "import"
    with servers.glance(place.folder / "server") as url:
        settings = [f"endpoint={url}", "auth=none", f"method={method}"]
        gone, provider = (Place(place.folder / name).provider("openstack", image, settings) for name in "ab")
        assert isinstance(gone, OpenStack)
        assert isinstance(provider, OpenStack)
        made = gone._create(next(gone._identities()), "another's")
        assert made is not None
        place_of = f"{url}/v2/images/{made['id']}"
        kind = {"Content-Type": "application/octet-stream"}
        if left.startswith("staged"):
            assert requests.put(f"{place_of}/stage", b"a part", headers=kind, timeout=60).status_code == 204
        if left.startswith("whole"):
            assert requests.put(f"{place_of}/file", image.read_bytes(), headers=kind, timeout=60).status_code == 204
            assert requests.delete(f"{place_of}/tags/recvirt", timeout=60).status_code == 204
        done = provider.publish()
        (there,) = requests.get(f"{url}/v2/images", timeout=60).json()["images"]
    assert (there["id"], there["status"], there["tags"]) == (done.ids["image"], "active", ["recvirt"])
    assert (there["id"] == made["id"], done.sent_bytes == 0) == (left.startswith("whole"), left.startswith("whole"))
