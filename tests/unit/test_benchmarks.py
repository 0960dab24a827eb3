"""The benchmarks' arithmetic and command lines. Nothing here is timed."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks import boot, builds, launched, measure, mkosi, publishing, results, run, sizes
from benchmarks.measure import Sample, Series, Subject
from benchmarks.results import BEGIN, END, Result, Row
from benchmarks.workplace import Site
from recvirt.errors import GuestError, PublishError, StageError
from recvirt.ui import reporter
from tests.publish import servers

# -- measuring ---------------------------------------------------------------------------------------------------------

STAT = "cpu  100 20 30 4000 500 6 7 8 9 0\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 5\n"


def test_busy_time_leaves_idle_and_waiting_out_and_takes_stolen_time_in() -> None:
    assert measure.busy_seconds(STAT) * measure._TICKS == 100 + 20 + 30 + 6 + 7 + 8


def test_a_stat_file_without_a_total_is_refused() -> None:
    with pytest.raises(ValueError, match="all CPUs"):
        measure.busy_seconds("intr 5\n")


def fake_process(proc: Path, pid: int, name: str, parent: int, ticks: tuple[int, int, int, int]) -> None:
    folder = proc / str(pid)
    folder.mkdir()
    fields = ["S", str(parent), *["0"] * 9, *map(str, ticks), "20"]
    (folder / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")


def test_a_process_table_survives_names_with_parentheses_and_blanks(tmp_path: Path) -> None:
    fake_process(tmp_path, 7, "a) S 1 (b", 3, (1, 2, 3, 4))
    (tmp_path / "self").mkdir()
    (tmp_path / "9").mkdir()  # ended between listing and reading
    assert measure.processes(tmp_path) == {7: (3, 10 / measure._TICKS)}


def test_only_descendants_count(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(ru_utime=0.0, ru_stime=0.0)
    monkeypatch.setattr("resource.getrusage", lambda _who: usage)
    table = {1: (0, 100.0), 10: (1, 50.0), 11: (10, 1.0), 12: (11, 2.0), 20: (1, 7.0)}
    assert measure.below(10, table) == 3.0


def test_the_meter_keeps_what_a_vanished_tree_had_used(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([5.0, 7.0, 6.0, 6.5])
    monkeypatch.setattr(measure, "below", lambda *_: next(readings))
    monkeypatch.setattr(measure, "processes", dict)
    monkeypatch.setattr(measure, "_METER_SECONDS", 3600)
    with measure.CpuMeter() as meter:
        meter._look()  # 2 more
        meter._look()  # a tree is gone: nothing is taken back
    assert meter.seconds == 2.5


def sample(wall: float, foreign: float = 0.0, cpu: float = 1.0) -> Sample:
    return Sample(wall, cpu, foreign)


def test_a_median_counts_undisturbed_runs_only_as_long_as_there_are_any() -> None:
    series = Series([sample(10), sample(90, 1.5), sample(12)])
    assert series.wall_seconds == 11
    assert not series.disturbed
    lost = Series([sample(90, 1.5), sample(70, 1.5)])
    assert lost.wall_seconds == 80
    assert lost.disturbed


def timings(monkeypatch: pytest.MonkeyPatch, foreign: list[float]) -> list[str]:
    """Make ``timed`` hand out samples with these disturbances, and return the order of what was called."""
    calls: list[str] = []
    left = iter(foreign)

    def timed(work: Any) -> Sample:
        work()
        return sample(1.0, next(left))

    monkeypatch.setattr(measure, "timed", timed)
    monkeypatch.setattr(measure, "wait_for_quiet", lambda *_: True)
    return calls


def subject(name: str, calls: list[str]) -> Subject:
    return Subject(name, lambda: calls.append(name), lambda: calls.append(f"{name}+"), lambda: calls.append(f"{name}-"))


def test_subjects_run_in_turn_and_are_prepared_outside_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = timings(monkeypatch, [0.0] * 4)
    found = measure.in_turn([subject("a", calls), subject("b", calls)], 2)
    assert calls == ["a+", "a", "a-", "b+", "b", "b-"] * 2
    assert [len(series.samples) for series in found.values()] == [2, 2]


def test_a_disturbed_round_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = timings(monkeypatch, [0.0, 1.0, 0.0, 0.0])
    found = measure.in_turn([subject("a", calls), subject("b", calls)], 1)
    assert [len(series.samples) for series in found.values()] == [2, 2]


def test_a_machine_that_is_never_quiet_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = timings(monkeypatch, [1.0] * 20)
    found = measure.in_turn([subject("a", calls)], 2)
    assert len(found["a"].samples) == 2 + measure.EXTRA_ROUNDS


# -- mkosi -------------------------------------------------------------------------------------------------------------


def setup(tmp_path: Path) -> mkosi.Setup:
    deb = tmp_path / "linux-image.deb"
    deb.write_bytes(b"!<arch>\n")
    return mkosi.Setup(tmp_path / "m", "trixie", ("sudo", "kmod"), "linux-image-6.12.1-recvirt", deb)


def conf(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def test_mkosi_gets_the_same_packages_the_kernel_and_no_documentation(tmp_path: Path) -> None:
    made = setup(tmp_path)
    text = mkosi.conf_text(made, workspace=tmp_path / "w", cache_only=True, manifest=False)
    packages = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert packages == ["kmod", "linux-image-6.12.1-recvirt", "sudo", "systemd-boot"]
    values = conf(text)
    assert values["Release"] == "trixie"
    assert values["Bootable"] == "yes"
    assert values["WithDocs"] == "no"
    assert values["CacheOnly"] == "always"
    assert values["WorkspaceDirectory"] == str(tmp_path / "w")
    assert "ManifestFormat" not in values
    assert values["PackageDirectories"] == str(tmp_path / "m/kernel")


def test_mkosi_is_prepared_with_the_kernel_and_the_archive_of_its_tools_root(tmp_path: Path) -> None:
    made = setup(tmp_path)
    rootfs = tmp_path / "tools/rootfs"
    (rootfs / "etc/apt").mkdir(parents=True)
    (rootfs / "etc/apt/sources.list").write_text("deb http://mirror.example/debian trixie main\n")
    stale = made.part("kernel") / "linux-image-old_1_amd64.deb"
    stale.parent.mkdir(parents=True)
    stale.touch()
    mkosi.prepare(made, SimpleNamespace(rootfs=rootfs))  # type: ignore[arg-type]
    assert [path.name for path in made.part("kernel").iterdir()] == ["linux-image-6.12.1-recvirt_1_amd64.deb"]
    sources = (made.part("sandbox") / "etc/apt/sources.list.d/mkosi.sources").read_text()
    assert "URIs: http://mirror.example/debian\n" in sources


def test_sources_keep_every_suite_and_drop_options() -> None:
    text = mkosi.sources_text(
        [
            "deb http://a.example/d trixie main contrib",
            "",
            "# deb no",
            "deb [arch=amd64 signed-by=/k] http://b.example/s x-security main",
        ]
    )
    assert text.count("Types: deb\n") == 2
    assert "Components: main contrib\n" in text
    assert "URIs: http://b.example/s\nSuites: x-security\nComponents: main\n" in text
    assert text.count(f"Signed-By: {mkosi.KEYRING}\n") == 2


@pytest.mark.parametrize("in_memory", [False, True])
def test_mkosi_runs_without_network_once_its_packages_are_cached(tmp_path: Path, in_memory: bool) -> None:
    made = setup(tmp_path)
    made.part("src").mkdir(parents=True)
    asked: list[dict[str, Any]] = []

    def argv(words: list[str], **options: Any) -> list[str]:
        asked.append(options)
        return words

    tools = SimpleNamespace(argv=argv)
    words = mkosi.build_argv(made, tools, in_memory=in_memory, cache_only=True)  # type: ignore[arg-type]
    assert words == ["mkosi", "--force", "build"]
    assert asked[0]["network"] is False
    assert asked[0]["writable"] == [made.folder]
    workspace = conf((made.part("src") / "mkosi.conf").read_text())["WorkspaceDirectory"]
    assert workspace == ("/tmp" if in_memory else str(made.part("workspace")))


# -- builds ------------------------------------------------------------------------------------------------------------


def test_only_stages_that_are_built_are_named() -> None:
    plan = [{"stage": "kernel_build", "action": "reuse"}, {"stage": "root", "action": "build"}]
    assert builds.to_build(plan) == ["root"]


class ListedSite:
    """A site whose root holds two packages and one of ours."""

    def __init__(self, folder: Path) -> None:
        listed = [("a", "1"), ("b", "2"), ("recvirt-boot", "0")]
        (folder / "packages.json").write_text(json.dumps([{"name": n, "version": v} for n, v in listed]))
        self.folder = folder

    def output(self, _profile: str, _stage: str) -> Any:
        return SimpleNamespace(path=lambda name: self.folder / name)


def test_other_versions_and_extra_packages_of_mkosi_are_told(tmp_path: Path) -> None:
    site: Any = ListedSite(tmp_path)
    assert builds.compare_packages(site, {"a": "1", "b": "3", "c": "1"}) == ["only mkosi: c", "b 2, mkosi 3"]


def test_an_image_of_mkosi_that_lacks_packages_is_not_compared(tmp_path: Path) -> None:
    site: Any = ListedSite(tmp_path)
    with pytest.raises(StageError, match=r"lacks packages of ours.*: b"):
        builds.compare_packages(site, {"a": "1"})


def test_a_busy_machine_is_told_beside_the_figures() -> None:
    row = builds.against("x", Series([sample(5, 1.0, cpu=4)]), Series([sample(20, cpu=16)]), 0.5)
    assert row.met is True
    assert row.relation == "25.0 %"
    assert row.note == "CPU 4 s against 16 s; the machine was never quiet"


# -- boot --------------------------------------------------------------------------------------------------------------

REPORT = [
    "recvirt-bench here", "UserspaceTimestampMonotonic=3500000",
    "ActiveEnterTimestampMonotonic=9000000", "Release=6.12.1-cloud", "Failed=0", "IdleTicks=42",
    "recvirt-bench end",
]  # fmt: skip


def test_a_report_becomes_figures() -> None:
    found = boot.parse_report(REPORT, 21.5)
    assert found == boot.Boot("6.12.1-cloud", 3_500_000_000, 9_000_000_000, 420_000_000, 21.5)


def test_the_busiest_services_are_named_but_not_the_benchmarks_own() -> None:
    used = [
        "CPUUsageNSec=42200000000", "Id=-.slice", "", "CPUUsageNSec=1104913000", "Id=systemd-journald.service", "",
        "CPUUsageNSec=9900000000", "Id=recvirt-bench.service", "", "CPUUsageNSec=[not set]", "Id=plymouth.service", "",
        "CPUUsageNSec=8021646000", "Id=systemd-udevd.service", "", "CPUUsageNSec=5000", "Id=ssh.service", "",
        "CPUUsageNSec=4228519000", "Id=libvirtd.service",
    ]  # fmt: skip
    found = boot.parse_report([*REPORT, *used], 21.5)
    assert found.services == (
        ("systemd-udevd", 8.021646), ("libvirtd", 4.228519), ("systemd-journald", 1.104913),
    )  # fmt: skip
    row = boot.time_row("x", {boot.OURS: [[found]], boot.STOCK: [[found]]}, 0, 0.6, "TCG")
    assert "user space 5.5 s (processor time of systemd-udevd 8.0 s, libvirtd 4.2 s, " in row.note


def test_each_switch_is_priced_against_the_image_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = Site(tmp_path, tmp_path, 0, 0.0)
    built: list[tuple[str, ...]] = []
    monkeypatch.setattr(Site, "recvirt", lambda _self, *words, log_name: built.append(words))

    def boots(_site: Site, _profile: str, number: int, *, icount: bool) -> list[boot.Boot]:
        assert icount
        cheap = any("apparmor=0" in word for word in built[-1])
        return [boot.Boot("r", 1, 4_000_000_000 if cheap else 8_000_000_000, 0, 1.0)] * number

    monkeypatch.setattr(boot, "boots", boots)
    rows = {row.what.rpartition(", ")[2]: row for row in boot.prices(site).rows}
    assert rows["no AppArmor"].relation == "50.0 %"
    assert rows["no AppArmor"].note == "`apparmor=0`"
    assert rows["mitigations=off"].relation == "100.0 %"
    assert "page_table_check off" not in rows
    assert built[0] == built[-1] == ("build", "default")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Failed=0", "Failed=2", "2 failed units"),
        ("Release=6.12.1-cloud", "", "not whole"),
        ("ActiveEnterTimestampMonotonic=9000000", "ActiveEnterTimestampMonotonic=0", "not a sound one"),
        ("ActiveEnterTimestampMonotonic=9000000", "ActiveEnterTimestampMonotonic=[n/a]", "not whole"),
    ],
)
def test_an_unsound_boot_gives_no_figures(old: str, new: str, said: str) -> None:
    with pytest.raises(GuestError, match=said):
        boot.parse_report([line.replace(old, new) for line in REPORT], 1)


def test_a_counted_boot_has_one_cpu_and_nothing_random() -> None:
    spec = boot.machine(Path("/o.qcow2"), Path("/i.qcow2"), icount=True)
    words = boot.boot_argv(spec, icount=True)
    assert words[words.index("-accel") + 1] == "tcg"
    assert words[words.index("-cpu") + 1] == "max,-rdrand,-rdseed"
    assert words[words.index("-smp") + 1] == "1"
    assert words[words.index("-icount") + 1] == "shift=0,sleep=off,align=off"
    assert words[words.index("-rtc") + 1] == "clock=vm"


def test_a_timed_boot_is_an_ordinary_one() -> None:
    words = boot.boot_argv(boot.machine(Path("/o.qcow2"), Path("/i.qcow2"), icount=False), icount=False)
    assert "-icount" not in words
    assert words[words.index("-accel") + 1] == "tcg,thread=multi"
    assert words[words.index("-smp") + 1] == "2"


def test_the_time_of_the_middle_boot_is_taken_apart() -> None:
    def boots(*seconds: float) -> list[list[boot.Boot]]:
        return [[boot.Boot("r", 2_000_000_000, 12_000_000_000, 0, one)] for one in seconds]

    row = boot.time_row("x", {boot.OURS: boots(30, 15, 16), boot.STOCK: boots(20, 32, 40)}, 0, 0.6, "TCG")
    assert (row.mine, row.other, row.met) == ("16.0 s", "32.0 s", True)
    mine = "firmware and loader 4.0 s, kernel 2.0 s, user space 10.0 s"
    assert row.note == f"TCG; default: {mine}; debian-kernel: {mine.replace('4.0', '20.0')}"


def test_the_report_has_a_serial_port_of_its_own() -> None:
    words = boot.boot_argv(boot.machine(Path("/o.qcow2"), Path("/i.qcow2"), icount=True), icount=True)
    ports = [words[i + 1] for i, word in enumerate(words) if word == "-serial"]
    assert ports[1:] == ["chardev:report"]
    unit = boot.credentials()["systemd.extra-unit.recvirt-bench.service"].decode()
    assert "/dev/ttyS1" in unit
    assert "After=multi-user.target" in unit
    assert "@" not in unit
    assert b"recvirt-bench.service" in boot.credentials()["systemd.unit-dropin.multi-user.target"]


# -- a launched L2 -----------------------------------------------------------------------------------------------------


def test_the_job_has_the_domain_that_a_worker_would_define() -> None:
    with tarfile.open(fileobj=io.BytesIO(launched.job_tar(b"qcow2"))) as archive:
        files = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    job = json.loads(files["job.json"])
    assert ET.fromstring(files["domain.xml"]).findtext("name") == job["domain"]
    assert ET.fromstring(files["domain.xml"]).get("type") == "kvm"
    paths = {source.get("file") for source in ET.fromstring(files["domain.xml"]).iter("source") if source.get("file")}
    # Both boot the same files.
    assert paths == set(job["files"].values())
    assert all(any(path in word for word in job["hand"]) for path in paths)
    assert ET.fromstring(files["network.xml"]).find("bridge").get("name") == job["bridge"]  # type: ignore[union-attr]
    assert ET.fromstring(files["domain.xml"]).find(".//serial/log").get("file") == job["log"]  # type: ignore[union-attr]
    assert files["disk.qcow2"] == b"qcow2"
    assert set(job["files"]) <= set(files)


def test_the_job_is_the_second_disk_of_a_counted_machine() -> None:
    spec = launched.machine(Path("/o.qcow2"), Path("/i.qcow2"), Path("/job.tar"))
    assert [disk.path for disk in spec.disks] == [Path("/o.qcow2"), Path("/job.tar")]
    assert spec.disks[1].read_only
    unit = spec.credentials["systemd.extra-unit.recvirt-bench.service"].decode()
    assert "tar -xf /dev/vdb" in unit
    assert "@" not in unit
    argv = launched.counted_argv(spec)
    assert argv[argv.index("-plugin") + 1] == "file=./count.so,to=executed" and argv[argv.index("-smp") + 1] == "1"


def counted(folder: Path, boots: list[tuple[str, int, int]], *last: str) -> dict[str, launched.Boots]:
    """What becomes of boots of these subjects, instructions and exits, and of the program's last lines."""
    counter = folder / "executed"
    log, now = launched.Log(counter), 1000
    for how, instructions, exits in boots:
        counter.write_bytes(now.to_bytes(8, "little"))
        log.take(json.dumps({"how": how, "at": "begin"}))
        log.take("[   17.4] noise of the L1")
        now += instructions
        counter.write_bytes(now.to_bytes(8, "little"))
        log.take(json.dumps({"how": how, "at": "end"}))
        now += 12345  # not measured
        counter.write_bytes(now.to_bytes(8, "little"))
        log.take(json.dumps({"how": how, "at": "known", "exits": exits}))
    for line in last:
        log.take(f"{line}\n")
    return log.found()


def test_boots_of_an_l2_become_medians(tmp_path: Path) -> None:
    boots = [*(("launched", n, 100) for n in (9, 1000, 1200)), ("by-hand", 2000, 100)]
    rows = launched.result(counted(tmp_path, boots, "recvirt-bench status 0")).rows
    assert [row.relation for row in rows] == ["50.0 %", "100.0 %", "50.0 %"]
    assert all(row.met for row in rows)
    slow = counted(tmp_path, [("launched", 106, 1), ("by-hand", 100, 1)], "recvirt-bench status 0")
    assert [row.met for row in launched.result(slow).rows] == [False, True, False]


def test_a_boot_that_was_lost_is_counted_from_its_next_beginning(tmp_path: Path) -> None:
    counter = tmp_path / "executed"
    log = launched.Log(counter)
    for now, line in (
        (0, '{"how": "launched", "at": "begin"}'), (500, "# no prompt"), (600, '{"how": "launched", "at": "begin"}'),
        (700, '{"how": "launched", "at": "end"}'), (800, '{"how": "launched", "at": "known", "exits": 3}'),
        (900, "recvirt-bench status 0"),
    ):  # fmt: skip
        counter.write_bytes(now.to_bytes(8, "little"))
        log.take(line)
    assert log.found()["launched"] == launched.Boots((100,), (3,))


def test_a_boot_whose_end_was_not_heard_is_no_figure(tmp_path: Path) -> None:
    (tmp_path / "executed").write_bytes(bytes(8))
    log = launched.Log(tmp_path / "executed")
    log.take('{"how": "launched", "at": "begin"}')
    with pytest.raises(GuestError, match="did not say when a boot began and ended: 'end'"):
        log.take('{"how": "launched", "at": "known", "exits": 3}')


def test_a_job_that_did_not_end_well_gives_no_figures(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="in a row came to no end"):
        counted(tmp_path, [("launched", 1, 1)], "4 boots in a row came to no end", "recvirt-bench status 1")


# -- sizes, the table, the command line --------------------------------------------------------------------------------


def test_a_kernels_parts_are_told_apart() -> None:
    files = {
        "boot/vmlinuz-1": 10,
        "boot/initrd.img-1": 20,
        "usr/lib/modules/1/a.ko": 3,
        "usr/lib/x": 100,
        "boot/grub/g": 9,
    }
    assert sizes.kernel_bytes(files) == {"kernel": 10, "modules": 3, "initramfs": 20}


def test_a_target_is_met_at_its_very_limit_and_missed_above() -> None:
    assert Row.ratio("x", 50, 100, "s", 0.5).met is True
    assert Row.ratio("x", 51, 100, "s", 0.5).met is False
    assert Row.ratio("x", 51, 100, "s", None).met is None
    assert Row.limit("x", 0.99, "s", 1).met is True
    assert Row.limit("x", 1.0, "s", 1).met is False


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.4321, "s", "0.43 s"), (43.21, "s", "43.2 s"), (2327.4, "", "2,327"), (184_942_592, "B", "184.9 MB")],
)
def test_figures_have_three_digits_or_so(value: float, unit: str, text: str) -> None:
    assert results.figure(value, unit) == text


def test_the_table_says_missed_in_words() -> None:
    rows = [Row.ratio("slow", 2, 1, "s", 1.0, "why"), Row.limit("fine", 0.5, "s", 1), Row.figure("known", 3, "s")]
    text = results.markdown([Result("r", rows)], "Measured here.")
    assert "| slow | 2.00 s | 1.00 s | 200.0 % | at most 100 % | **missed**; why |" in text
    assert "| fine | 0.50 s |  |  | below 1 s | met |" in text
    assert "| known | 3.00 s |  |  |  |  |" in text
    assert text.endswith("\nMeasured here.\n")


def test_a_result_survives_its_file() -> None:
    result = Result("r", [Row.ratio("x", 1, 2, "s", 0.5)], {"k": [1]})
    assert Result.of_json(json.loads(json.dumps(result.as_json()))) == result


def test_the_table_replaces_what_was_between_the_marks() -> None:
    assert results.insert(f"a\n{BEGIN}\nold\n{END}\nz\n", "new\n") == f"a\n{BEGIN}\nnew\n{END}\nz\n"


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_a_readme_without_both_marks_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match="there must be one"):
        results.insert(text, "new")


def test_benchmarks_are_chosen_by_name_in_the_tables_order() -> None:
    assert run.chosen("sizes, mkosi,") == ["mkosi", "sizes"]
    with pytest.raises(argparse.ArgumentTypeError, match="no benchmark nonsense; there are mkosi"):
        run.chosen("sizes,nonsense")


def test_a_benchmark_that_fails_leaves_the_others_and_their_earlier_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_site: Site) -> Result:
        raise StageError("no power", hint="plug it in")

    row = Row.figure("x", 1, "s")
    monkeypatch.setattr(run, "BENCHMARKS", {"boot": broken, "l2": lambda _site: Result("l2", [row])})
    said = io.StringIO()
    monkeypatch.setattr(reporter, "stream", said)
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"boot": {"name": "boot", "rows": [], "facts": {}, "date": "2020-01-01"}}))
    site = Site(tmp_path, tmp_path, 1, 0.0)
    assert run.measure(site, ["boot", "l2"], path) == ["boot"]
    data = run.load(path)
    assert data["boot"]["date"] == "2020-01-01"
    assert Result.of_json(data["l2"]).rows == [row]
    assert "plug it in" in said.getvalue()


def test_what_amazons_stand_in_says_is_one_line_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")

    @contextlib.contextmanager
    def server(_folder: Path) -> Iterator[str]:
        yield "http://127.0.0.1:1"

    def send(_url: str) -> None:
        said = {"Error": {"Code": "500", "Message": "Internal Server Error"}}
        raise exceptions.ClientError(said, "CompleteMultipartUpload")

    monkeypatch.setattr(servers, "moto", server)
    monkeypatch.setattr(publishing, "_warm_up", lambda _url: None)
    monkeypatch.setattr(run, "BENCHMARKS", {"publish": lambda _site: publishing.measured(tmp_path, send)})
    said = io.StringIO()
    monkeypatch.setattr(reporter, "stream", said)
    assert run.measure(Site(tmp_path, tmp_path, 1, 0.0), ["publish"], tmp_path / "results.json") == ["publish"]
    assert "CompleteMultipartUpload" in said.getvalue()
    assert "--only publish" in said.getvalue()
    assert "Traceback" not in said.getvalue()


def test_an_object_that_the_stand_in_cant_hold_is_not_begun() -> None:
    publishing._want_memory(4 << 30, 11 << 30)
    with pytest.raises(PublishError, match="of memory are free"):
        publishing._want_memory(4 << 30, 9 << 30)


def test_the_machine_is_named() -> None:
    assert run.cpu_model("processor : 0\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: B\n") == "A CPU @ 2 GHz"
    assert "2026-01-02 and 2026-01-03" in run.machine_line(["2026-01-03", "2026-01-02", "2026-01-02"])
