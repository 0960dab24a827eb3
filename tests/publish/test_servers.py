"""Every provider against a real server or an emulator: what arrives, second runs, kills, bad lines, two at once.

The stand-ins come from Debian, or from ``scripts/publish-servers.sh``; a test whose stand-in is absent is skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recvirt.errors import PublishError, RecvirtError
from recvirt.publish.errors import DeniedError
from tests.publish import servers
from tests.publish.proxy import now_and_then
from tests.publish.services import ENVIRONMENT, SERVICES, Service, environment, is_same_disk
from tests.publish.support import Place, make_image

pytestmark = pytest.mark.slow
SEEDS = (1, 2, 3)


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    make, wants, _ = SERVICES[request.param]
    if servers.why_not(wants):
        pytest.skip(servers.why_not(wants))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with make(tmp_path / "server") as found:
        found.kind = SERVICES[request.param][2]
        yield found


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recvirt.publish.budget.Budget.pause", lambda _self, _attempt, _asked: 0.02)


def holds_the_image(service: Service, image: Path, folder: Path) -> None:
    (name,) = service.names()
    folder.mkdir(exist_ok=True)
    copy = service.fetch(name, folder)
    is_same_disk(image, copy, service.kind)


#: In the folder of a run in a process of its own.
STDERR = "stderr.txt"


def start(service: Service, place: Place, image: Path) -> subprocess.Popen[bytes]:
    """A run in a process of its own."""
    sets = [word for setting in service.settings for word in ("--set", f"{service.target}.{setting}")]
    place.folder.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "recvirt", "publish", service.target, str(image), *sets, *place.options, "--json"]
    with (place.folder / STDERR).open("ab") as stderr:
        return subprocess.Popen(words, cwd=place.folder, env=environment(), stdout=subprocess.PIPE, stderr=stderr)


def test_what_arrives_is_the_image_and_a_second_run_sends_nothing(service: Service, place: Place, image: Path) -> None:
    plan = place.plan(service.target, image, service.settings)
    assert plan["bytes"] > 0
    assert service.names() == []
    assert service.line.body_bytes < 10_000  # questions, at most
    (first,) = place.publish(service.target, image, service.settings)
    assert first["new"]
    holds_the_image(service, image, place.folder / "back")
    if not plan["steps"][-1].get("at_most"):
        assert first["sent_bytes"] <= plan["bytes"]
    before = service.line.body_bytes
    second_plan = place.plan(service.target, image, service.settings)
    assert (second_plan["idle"], second_plan["bytes"]) == (True, 0)
    (second,) = place.publish(service.target, image, service.settings)
    assert (second["sent_bytes"], second["new"], second["ids"]) == (0, False, first["ids"])
    assert service.line.body_bytes - before < 20_000
    assert len(service.names()) == 1
    verified = json.loads(place.run("published", "--verify", "--json", *place.options).stdout)
    assert [item["problem"] for item in verified] == [""]


def test_without_a_journal_nothing_is_sent_twice_either(service: Service, place: Place, image: Path) -> None:
    (first,) = place.publish(service.target, image, service.settings)
    elsewhere = Place(place.folder / "elsewhere")
    (second,) = elsewhere.publish(service.target, image, service.settings)
    assert (second["sent_bytes"], second["ids"]) == (0, first["ids"])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_line_is_survived(service: Service, place: Place, image: Path, seed: int) -> None:
    service.line.policy = now_and_then(seed, 0.15)
    for _ in range(3):
        try:
            place.publish(service.target, image, service.settings)
            break
        except PublishError as error:
            assert "goes on" in error.hint or "again" in error.hint, error.message
    service.line.policy = lambda _m, _p, _n: ""
    place.publish(service.target, image, service.settings)
    holds_the_image(service, image, place.folder / "back")


def test_a_dead_line_is_given_up(service: Service, place: Place, image: Path) -> None:
    service.line.policy = lambda _m, _p, _n: "503"
    with pytest.raises(PublishError, match="given up after"):
        place.publish(service.target, image, service.settings)
    assert len(service.line.requests) < 60


def test_the_older_one_is_retired_once_the_newer_is_there(service: Service, place: Place, tmp_path: Path) -> None:
    older, newer = (make_image(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    facts = json.loads((older.parent / "image.json").read_text())
    (older.parent / "image.json").write_text(json.dumps({**facts, "epoch": 1_700_000_000}))
    if service.kind == "vpc":
        pytest.skip("without a gallery there is nothing to retire")
    place.publish(service.target, older, service.settings)
    keep = [*service.settings, "keep=1"]
    plan = place.plan(service.target, newer, keep)
    assert [step["action"] for step in plan["steps"]].count("retire") == 1
    assert len(service.names()) == 1
    (done,) = place.publish(service.target, newer, keep)
    assert len(service.names()) == 1
    assert "retire" not in [step["action"] for step in place.plan(service.target, newer, keep)["steps"]]
    assert json.loads(Path(done["receipt"]).read_text())["image"]["name"] in service.names()[0]


def test_denied_is_said_once_and_not_tried_again(service: Service, place: Place, image: Path) -> None:
    service.line.policy = lambda _m, _p, _n: "403"
    with pytest.raises(DeniedError) as caught:
        place.publish(service.target, image, service.settings)
    assert "denied" in caught.value.message
    assert caught.value.hint
    assert len(service.line.requests) <= 2
    assert caught.value.exit_code == 8


def test_killed_at_several_points_the_next_run_ends_the_same(service: Service, place: Place, tmp_path: Path) -> None:
    image = make_image(tmp_path / "larger", size=96 << 20, pieces=24, seed=7)
    # Slow enough that a kill meets the transfer.
    service.line.policy = lambda _m, _p, _n: "slow"
    for requests in (3, 8, 14, 20):
        process = start(service, place, image)
        begun = len(service.line.requests)
        deadline = time.monotonic() + 60
        while len(service.line.requests) < begun + requests and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        process.communicate()
    service.line.policy = lambda _m, _p, _n: ""
    (done,) = place.publish(service.target, image, service.settings)
    holds_the_image(service, image, place.folder / "back")
    assert done["ids"]
    if service.target in ("aws", "azure"):
        assert done["sent_bytes"] < 24 << 20  # what the killed ones sent is not sent again
    (again,) = place.publish(service.target, image, service.settings)
    assert (again["sent_bytes"], again["ids"]) == (0, done["ids"])


@pytest.mark.parametrize("kind", ["webdav-apache", "s3"])
def test_an_upload_that_was_cut_goes_on_where_it_was(
    kind: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, wants, _ = SERVICES[kind]
    if servers.why_not(wants):
        pytest.skip(servers.why_not(wants))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("recvirt.publish.trees._PIECE_BYTES", 4 << 20)
    image = make_image(tmp_path / "larger", size=96 << 20, pieces=24, seed=7)
    with make(tmp_path / "server") as service:
        service.kind = SERVICES[kind][2]

        def dead_after_a_part(method: str, path: str, _number: int) -> str:
            large = [r for r in service.line.requests if r[2] >= 4 << 20 and r[3] == ""]
            return "503" if method == "PUT" and large and ("qcow2" in path) else ""

        service.line.policy = dead_after_a_part
        with pytest.raises(PublishError, match="given up after"):
            place.publish(service.target, image, service.settings, "--workers", "1")
        service.line.policy = lambda _m, _p, _n: ""
        (done,) = place.publish(service.target, image, service.settings)
        assert image.stat().st_size - (9 << 20) < done["sent_bytes"] <= image.stat().st_size - (4 << 20)
        holds_the_image(service, image, place.folder / "back")


def test_two_runs_at_once_make_one(service: Service, place: Place, image: Path) -> None:
    both = [start(service, place, image) for _ in range(2)]
    said = [json.loads(process.communicate()[0])[0] for process in both]
    assert said[0]["ids"] == said[1]["ids"]
    assert sorted(bool(item["sent_bytes"]) for item in said) == [False, True]
    holds_the_image(service, image, place.folder / "back")


def test_two_machines_at_once_end_with_one_whole_image(service: Service, place: Place, image: Path) -> None:
    places = [Place(place.folder / name) for name in ("a", "b")]
    both = [start(service, one, image) for one in places]
    texts = [process.communicate()[0] for process in both]
    told = "\n".join((one.folder / STDERR).read_text() for one in places)
    assert [process.returncode for process in both] == [0, 0], told
    said = [json.loads(text)[0] for text in texts]
    assert said[0]["ids"] == said[1]["ids"]
    holds_the_image(service, image, place.folder / "back")
    (third,) = place.publish(service.target, image, service.settings)
    assert (third["sent_bytes"], third["ids"]) == (0, said[0]["ids"])
    assert len(service.names()) == 1


def test_no_secret_is_in_what_is_written_or_said(
    service: Service, place: Place, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.run(
        "--verbose", "publish", service.target, image, *place.options,
        *(word for setting in service.settings for word in ("--set", f"{service.target}.{setting}")),
    )  # fmt: skip
    said = capsys.readouterr()
    texts = [said.out, said.err]
    texts += [path.read_text(errors="replace") for path in place.receipts.rglob("*") if path.is_file()]
    secrets = [ENVIRONMENT["AZURE_STORAGE_KEY"], "Signature=", "sig=", "Bearer "]
    for text in texts:
        assert not any(secret in text for secret in secrets)


def test_a_server_that_is_not_there_is_an_error(service: Service, place: Place, image: Path) -> None:
    service.line.policy = lambda _m, _p, _n: "cut"
    with pytest.raises(RecvirtError, match="given up after"):
        place.publish(service.target, image, service.settings)
