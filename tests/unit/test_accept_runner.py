"""How checks become results, scenes are chosen and played, and reports are written."""

from __future__ import annotations

import json
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from recvirt.accept import boots, nfsserver, runner, tinyvm
from recvirt.accept.context import Acceptance, Options
from recvirt.accept.promise import promises_of
from recvirt.accept.registry import NEEDS, OPTIONAL_SCENES, SCENES, Check, all_checks, scenes_of, select
from recvirt.accept.reports import html_page, junit_xml, write_reports
from recvirt.accept.results import CheckResult, Failed, ImageFacts, Report, Skipped
from recvirt.cli import cli
from recvirt.errors import ConfigError, GuestError
from recvirt.model import Profile
from recvirt.qemu.stuck import EmulatorError
from recvirt.rootfs.selection import ALWAYS
from tests.support.fake_guest import FakeGuest, acceptance, guest


def check(name: str, scene: str = "first", error: Exception | None = None) -> Check:
    def function(_subject: Any) -> str:
        if error is not None:
            raise error
        return "good"

    return Check(name, scene, f"Title of {name}", function)


def outcomes(run: Acceptance) -> dict[str, str]:
    return {result.name: result.outcome for result in run.results}


@pytest.mark.parametrize(
    ("error", "outcome", "words"),
    [
        (None, "passed", "good"),
        (Failed("bad unit"), "failed", "bad unit"),
        (Skipped("no libvirt"), "skipped", "no libvirt"),
        (GuestError("it died"), "failed", "it died"),
        (KeyError("x"), "failed", "the check itself broke"),
    ],
)
def test_whatever_happens_in_a_check_becomes_a_result(
    tmp_path: Path, error: Exception | None, outcome: str, words: str
) -> None:
    run = acceptance(tmp_path)
    assert runner.run_check(run, check("a", error=error), guest(tmp_path, {})) == outcome
    assert words in run.results[0].detail


def play(monkeypatch: pytest.MonkeyPatch, run: Acceptance, checks: list[Check], boot: Any) -> None:
    monkeypatch.setattr(runner, "_BOOTS", {"first": boot, "second": boot})
    monkeypatch.setattr(runner, "remember_identity", lambda _guest, scene: run.found.update({scene: {"x": 1}}))
    runner.play(run, checks)


def good_boot(tmp_path: Path) -> Any:
    @contextmanager
    def boot(_run: Acceptance) -> Iterator[FakeGuest]:
        yield guest(tmp_path, {"marker": ""})

    return boot


def test_a_scene_runs_its_checks_and_a_pair_comes_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = acceptance(tmp_path)
    checks = [check("p", "pair"), check("i", "image"), check("a"), check("b", "second")]
    play(monkeypatch, run, checks, good_boot(tmp_path))
    assert set(outcomes(run).values()) == {"passed"} and len(run.results) == 4
    assert (run.results[0].name, run.results[-1].name) == ("i", "p")
    assert set(run.found) == {"first", "second"}


def test_a_guest_that_does_not_come_up_fails_all_that_needed_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @contextmanager
    def boot(_run: Acceptance) -> Iterator[FakeGuest]:
        if not run.results:
            raise GuestError("no login\n  | Kernel panic")
        yield guest(tmp_path, {})

    run = acceptance(tmp_path)
    play(monkeypatch, run, [check("a"), check("b"), check("c", "reboot")], boot)
    assert outcomes(run) == {"a": "failed", "b": "not-run", "c": "not-run"}
    assert "Kernel panic" in run.results[0].detail and "see a" in run.results[1].detail


def test_a_broken_scene_is_a_failure_and_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def boot(_run: Acceptance) -> Iterator[FakeGuest]:
        yield guest(tmp_path, {"x": str(1 // len(_run.results))})

    run = acceptance(tmp_path)
    play(monkeypatch, run, [check("a")], boot)
    assert outcomes(run) == {"a": "failed"} and "ZeroDivisionError" in run.results[0].detail


def test_a_machine_that_dies_half_way_leaves_the_rest_not_run(tmp_path: Path) -> None:
    class Dead:
        class process:  # noqa: N801
            @staticmethod
            def poll() -> int:
                return 1

    run = acceptance(tmp_path)
    dying = guest(tmp_path, {})
    dying.vm = Dead()  # type: ignore[assignment]
    runner.run_guest_checks(run, [check("a"), check("b")], dying)
    assert outcomes(run) == {"a": "not-run", "b": "not-run"}


@pytest.mark.parametrize(("faults", "outcome"), [(0, "passed"), (2, "passed"), (3, "failed")])
def test_a_reboot_that_the_emulator_lost_is_done_once_more(tmp_path: Path, faults: int, outcome: str) -> None:
    told: list[str] = []

    class Shaken(FakeGuest):
        def reboot(self) -> float:
            told.append("reboot")
            if told.count("reboot") <= faults:
                raise EmulatorError("an interrupt was lost\n  | console")
            return 1.0

        def begin_anew(self) -> float:
            told.append("reset")
            return 1.0

    run = acceptance(tmp_path)
    shaken: Any = guest(tmp_path, {"marker": ""})
    shaken.__class__ = Shaken
    runner._reboot(run, shaken, [check("c", "reboot")])
    assert outcomes(run) == {"c": outcome}
    assert told.count("reset") == min(faults, 2) == run.measures.get("boots_begun_anew", 0)


def test_a_failure_after_a_panic_says_so(tmp_path: Path) -> None:
    class Rebooted:
        @staticmethod
        def console_text() -> str:
            return "[  316.0] Kernel panic - not syncing: corrupted stack\r\n[  316.1] CPU: 0\r\nlogin: "

    run = acceptance(tmp_path)
    shaken = guest(tmp_path, {})
    shaken.vm = Rebooted()  # type: ignore[assignment]
    runner.run_check(run, check("a", error=Failed("no answer")), shaken)
    runner.run_check(run, check("b"), shaken)
    assert run.results[0].detail.splitlines() == [
        "no answer", "the guest's kernel had panicked before: Kernel panic - not syncing: corrupted stack",
    ]  # fmt: skip
    assert run.results[1].outcome == "passed" and "panic" not in run.results[1].detail


def test_an_interrupt_ends_every_program_and_does_not_wait_for_the_boots(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped = threading.Event()

    @contextmanager
    def boot(_run: Acceptance) -> Iterator[FakeGuest]:
        assert stopped.wait(20), "nobody ended the programs"
        yield guest(tmp_path, {})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_check", interrupted)
    monkeypatch.setattr(runner, "stop_all", stopped.set)
    run = acceptance(tmp_path)
    run.options = Options(parallel=2)
    with pytest.raises(KeyboardInterrupt):
        play(monkeypatch, run, [check("m", "matrix"), check("a")], boot)
    assert stopped.is_set()


def test_every_check_has_a_place_and_a_title() -> None:
    every = all_checks()
    assert len({item.name for item in every}) == len(every) > 50
    assert all(item.title and not item.title.endswith(".") for item in every)
    assert {item.scene for item in every} <= set(SCENES)
    assert set(OPTIONAL_SCENES) | set(NEEDS) <= set(SCENES)


def test_a_default_run_leaves_out_what_is_asked_for_by_name() -> None:
    ordinary = {item.scene for item in select((), ())}
    assert ordinary == set(SCENES) - set(OPTIONAL_SCENES)
    assert "deep" in {item.scene for item in select((), ("deep",))}
    assert {item.name for item in select(("l3-under-kvm",), ())} == {"l3-under-kvm"}


def test_an_unknown_check_is_named_with_the_next_step() -> None:
    with pytest.raises(ConfigError, match="no-such-check") as caught:
        select(("no-such-check", "no-failed-unit"), ())
    assert "--list" in caught.value.hint


def test_a_comparison_needs_both_boots() -> None:
    assert scenes_of(select(("copies-differ-in-host-keys",), ())) == {"pair", "first", "second"}
    assert scenes_of(select(("survives-reboot",), ())) == {"reboot", "first"}
    assert scenes_of(select(("image-clean",), ())) == {"image"}


def report(*results: CheckResult, **more: Any) -> Report:
    facts = ImageFacts("/x/disk.qcow2", "ab" * 32, "qcow2", 126_000_000, 4 * 1024**3)
    return Report(
        "default", facts, "tcg", "no KVM: /dev/kvm does not exist", "10.0.13 (Debian)", "2026-11-20T12:00:00+00:00",
        61.0, results, **more,
    )  # fmt: skip


NASTY = "line\nwith <tags> & \x1b[31mescapes\x00 and \ud800 surrogates ]]>"
RESULTS = (
    CheckResult("a", "first", "A", "passed", 1.0, "fine"),
    CheckResult("b", "first", "B", "failed", 2.0, NASTY),
    CheckResult("c", "second", "C", "not-run", 0.0, "no boot"),
    CheckResult("d", "second", "D", "skipped", 0.0, "no libvirt"),
)


def test_a_report_is_good_only_with_a_pass_and_no_failure() -> None:
    assert report(RESULTS[0], RESULTS[3]).ok
    assert not report(*RESULTS).ok
    assert not report(RESULTS[0], RESULTS[2]).ok
    assert not report(RESULTS[3]).ok
    assert not report().ok


def test_junit_is_xml_with_right_counts_whatever_a_guest_said() -> None:
    root = ET.fromstring(junit_xml(report(*RESULTS)).encode("utf-8", "strict"))
    assert {name: root.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "1", "errors": "1", "skipped": "1",
    }  # fmt: skip
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["default.first", "default.second"]
    failure = suites["default.first"].find("testcase[@name='b']/failure")
    assert failure is not None and "<tags>" in (failure.text or "")
    assert suites["default.second"].find("testcase[@name='c']/error") is not None
    assert suites["default.second"].find("testcase[@name='d']/skipped") is not None


class Outside(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {value}" for name, value in attrs if name in ("src", "href")]
        self.loads += [tag] if tag in ("script", "link", "img", "iframe") else []

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_escapes_what_a_guest_said() -> None:
    console = "<script>alert(1)</script> Kernel panic"
    page = Outside()
    page.feed(html_page(report(*RESULTS, consoles={"first": console}, measures={"memory_bytes": {"used": 5}})))
    # Links lead nowhere but into the page.
    assert page.loads == ["a #b", "a #c"]
    for words in (console, "with <tags> &", "not proved", "no KVM: /dev/kvm does not exist", "ab" * 32, '{"used": 5}'):
        assert words in page.text
    assert "1 passed, 1 failed, 1 not run" in " ".join(page.text.split())


def test_reports_are_written_whole(tmp_path: Path) -> None:
    paths = write_reports(report(*RESULTS, consoles={"first": "x"}), tmp_path / "new")
    data = json.loads(paths[0].read_text())
    assert data["ok"] is False and data["counts"]["not-run"] == 1 and data["consoles"] == ["first"]
    assert data["image"]["sha256"] == "ab" * 32 and data["accelerator"] == "tcg"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["junit.xml", "report.html", "report.json"]


def test_a_tiny_vm_is_believed_only_for_the_right_answer() -> None:
    import hashlib

    good = hashlib.sha256(b"abc").hexdigest()
    line = "[    1.0] x\nRECVIRT-L2 answer={} nesting=svm hypervisor=KVM kernel=6.12.1-recvirt\n"
    found = tinyvm.parse_console(line.format(good), "abc")
    assert found is not None and found.answer_ok and (found.nesting, found.kernel) == ("svm", "6.12.1-recvirt")
    wrong = tinyvm.parse_console(line.format(good), "abd")
    assert wrong is not None and not wrong.answer_ok
    assert tinyvm.parse_console("recvirt.nonce=abc on the command line", "abc") is None


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (tinyvm.TinyVm(False, "svm", "KVM", "6", {"exits": 9000}), "nonce"),
        (tinyvm.TinyVm(True, "svm", "TCG", "6", {}), "0 exits"),
        (tinyvm.TinyVm(True, "none", "KVM", "6", {"exits": 9000}), "nesting is off"),
    ],
)
def test_a_tiny_vm_without_proof_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: tinyvm.TinyVm, words: str
) -> None:
    monkeypatch.setattr(tinyvm, "run_tiny_vm", lambda _guest: found)
    with pytest.raises(Failed, match=words):
        tinyvm.prove(guest(tmp_path, {}), deeper=True)


def test_exits_are_summed_over_processors_and_only_kvms_count() -> None:
    stats: list[dict[str, Any]] = [
        {"provider": "kvm", "stats": [{"name": "exits", "value": 3}, {"name": "halt_wait_hist", "value": [1]}]},
        {"provider": "kvm", "stats": [{"name": "exits", "value": 4}, {"name": "io_exits", "value": 2}]},
        {"provider": "other", "stats": [{"name": "exits", "value": 100}]},
    ]
    assert tinyvm.sum_exits(stats) == {"exits": 7, "io_exits": 2}


def test_the_tiny_vms_archive_holds_an_init_and_a_console() -> None:
    archive = tinyvm.initramfs(b"#!busybox")
    assert archive.startswith(b"070701") and len(archive) % 512 == 0
    for name in (b"init\0", b"bin/busybox\0", b"dev/console\0", b"#!busybox"):
        assert name in archive


def test_a_silent_server_accepts_and_says_nothing() -> None:
    import socket

    with nfsserver.silent_server() as port, socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"hello")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    with nfsserver.refusing_port() as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_the_nfs_server_listens_on_the_loopback_alone(tmp_path: Path) -> None:
    text = nfsserver.ganesha_config(tmp_path, 23456)
    assert "Bind_addr = 127.0.0.1; NFS_Port = 23456;" in text
    assert text.count("Name = MEM") == 2 and text.count("{") == text.count("}")


def test_promises_are_the_lists_the_profile_and_our_own(tmp_path: Path) -> None:
    profile = Profile.model_validate(
        {"name": "x", "root": {"package_lists": ["nfs"], "packages": ["htop"]}}, strict=False
    )
    found = promises_of(profile, tmp_path)
    assert {"nfs-common", "htop", *ALWAYS} <= set(found.packages) and found.kernel_config is None
    (tmp_path / "kernel_config-config").write_text("CONFIG_KVM=m\n")
    (tmp_path / "image.json").write_text('{"kernel": {"release": "6.12"}}')
    assert promises_of(profile, tmp_path).kernel_config == "CONFIG_KVM=m\n"
    assert promises_of(profile, tmp_path).facts["kernel"]["release"] == "6.12"
    stock = profile.model_copy(update={"kernel": Profile.model_validate({"name": "x", "kernel": "debian"}).kernel})
    assert promises_of(stock, tmp_path).kernel_config == "CONFIG_KVM=m\n"


def test_patience_grows_with_emulation_and_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = acceptance(tmp_path)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert run.patience(10) == 10
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert run.patience(10) == 40


def test_boots_at_once_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = acceptance(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3})
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 0.0, 0.0))
    monkeypatch.setattr(runner, "_available_bytes", lambda: 100 * 1024**3)
    assert runner.parallel_boots(run) == 4
    monkeypatch.setattr("os.getloadavg", lambda: (20.0, 0.0, 0.0))
    assert runner.parallel_boots(run) == 1
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 0.0, 0.0))
    monkeypatch.setattr(runner, "_available_bytes", lambda: 3 * 1024**3)
    assert runner.parallel_boots(run) == 1
    run.options = Options(parallel=5)
    assert runner.parallel_boots(run) == 5


def test_a_guest_gets_its_groups_only_where_they_exist(tmp_path: Path) -> None:
    assert boots.cloud_config(acceptance(tmp_path), "first").groups == ("kvm",)


def test_list_names_every_check_without_any_image() -> None:
    result = CliRunner().invoke(cli, ["test", "--list", "--json"])
    assert result.exit_code == 0
    names = [item["name"] for item in json.loads(result.stdout)]
    assert "l2-under-kvm" in names and "l3-under-kvm" not in names
    deep = CliRunner().invoke(cli, ["test", "--list", "--deep"])
    assert "l3-under-kvm" in deep.stdout
