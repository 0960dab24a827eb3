"""The pipeline with small stages: reuse, reasons, order, side by side, and what happens when something goes wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recvirt import pipeline
from recvirt.errors import CommandError, ConfigError, RecvirtError, SpaceError, StageError
from recvirt.model import Kernel, Profile
from recvirt.pipeline import STAGE_NAMES, Builder, Planned, differences, plan, stages_for
from recvirt.run import run
from recvirt.stages.base import Work
from recvirt.store import Output, Store
from recvirt.ui import reporter
from tests.support.fakes import FakeStage, as_stages, diamond, fake_context

PROFILE = Profile(name="lab")


class Lab:
    """Four fake stages in a cache of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.stages = diamond()
        self._monkeypatch = monkeypatch
        self.use(self.stages)

    def use(self, stages: dict[str, FakeStage]) -> None:
        self.stages = stages
        self._monkeypatch.setattr(pipeline, "STAGES", as_stages(stages))

    @property
    def cache_dir(self) -> Path:
        return self.folder / "cache"

    def plan(self, until: str | None = None, profile: Profile = PROFILE) -> list[Planned]:
        return plan(profile, Store(self.cache_dir), fake_context(self.cache_dir), until=until)

    def builder(self, *, keep_failed: bool = False) -> Builder:
        context = fake_context(self.cache_dir)
        return Builder(PROFILE, Store(self.cache_dir), context, self.folder / "build", keep_failed=keep_failed)

    def build(self, until: str | None = None) -> dict[str, Output]:
        return self.builder().run(self.plan(until))

    def actions(self, until: str | None = None) -> dict[str, str]:
        return {item.stage.name: item.as_json()["action"] for item in self.plan(until)}

    def reasons(self, name: str) -> tuple[str, ...]:
        return next(item.reasons for item in self.plan() if item.stage.name == name)

    def work_folders(self) -> list[str]:
        folder = self.cache_dir / "work"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(tmp_path, monkeypatch)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(reporter, "stream", stream)
    return stream


# -- reuse -------------------------------------------------------------------------------------------------------------


def test_each_stage_gets_its_upstream(lab: Lab) -> None:
    outputs = lab.build()
    assert outputs["top"].path("top.txt").read_text() == "oneoneoneoneone"
    assert [stage.built for stage in lab.stages.values()] == [1, 1, 1, 1]


def test_nothing_changed_builds_nothing(lab: Lab) -> None:
    first = lab.build()
    builder = lab.builder()
    second = builder.run(lab.plan())
    assert {name: out.key for name, out in first.items()} == {name: out.key for name, out in second.items()}
    assert [stage.built for stage in lab.stages.values()] == [1, 1, 1, 1]
    assert builder.built == []


def test_a_change_rebuilds_what_depends_on_it_and_no_more(lab: Lab) -> None:
    lab.build()
    lab.stages["left"].text = "two"
    assert lab.actions() == {"base": "reuse", "left": "build", "right": "reuse", "top": "build"}
    builder = lab.builder()
    builder.run(lab.plan())
    assert sorted(builder.built) == ["left", "top"]
    lab.stages["left"].text = "one"
    assert set(lab.actions().values()) == {"reuse"}, "what was built before is still there"


def test_the_reasons_name_what_changed(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_text("x")
    lab.stages["base"].files = (path,)
    lab.stages["base"].words = ("a", "b")
    assert lab.reasons("base") == ("never built for this profile",)
    lab.build()
    path.write_text("y")
    assert lab.reasons("base") == ("files[0]: input changed",)
    assert lab.reasons("left") == ("base is another one",)
    path.write_text("x")
    lab.stages["base"].words = ("a", "c")
    assert lab.reasons("base") == ("words: - b", "words: + c")
    lab.stages["base"].words = ("b", "a")
    assert lab.reasons("base") == ("words: the order changed",)
    lab.stages["base"].words = ("a", "b")
    lab.stages["base"].text = "two"
    assert lab.reasons("base") == ("text: one became two",)
    lab.stages["base"].text = "one"
    lab.stages["base"].revision = 2
    assert lab.reasons("base") == ("the stage itself changed (its revision)",)


def test_many_reasons_are_cut_short(lab: Lab) -> None:
    lab.build()
    lab.stages["base"].words = tuple(f"w{i}" for i in range(20))
    reasons = lab.reasons("base")
    assert len(reasons) == 13
    assert reasons[-1] == "and 8 more"


def test_differences_of_nested_values() -> None:
    old = {"a": {"b": [{"c": 1}, {"c": 2}]}, "gone": 1, "long": "x"}
    new = {"a": {"b": [{"c": 1}, {"c": 3}]}, "came": 1, "long": "y" * 100}
    assert differences(old, new) == [
        "a.b[1].c: 2 became 3", "came is new", "gone is gone", f"long: x became {'y' * 57}...",
    ]  # fmt: skip
    assert differences(old, old) == []


# -- which stages ------------------------------------------------------------------------------------------------------


def test_until_takes_only_what_it_needs(lab: Lab) -> None:
    assert list(lab.actions("left")) == ["base", "left"]
    outputs = lab.build("left")
    assert list(outputs) == ["base", "left"]
    assert lab.stages["right"].built == lab.stages["top"].built == 0
    assert lab.actions() == {"base": "reuse", "left": "reuse", "right": "build", "top": "build"}


def test_an_unknown_stage_is_refused_with_the_choice(lab: Lab) -> None:
    with pytest.raises(ConfigError, match="no stage 'roof'") as caught:
        lab.plan("roof")
    assert caught.value.hint == "one of: base, left, right, top"


def test_the_real_stages_and_their_order() -> None:
    names = [stage.name for stage in stages_for(PROFILE)]
    assert names == ["kernel_config", "kernel_build", "guest_debs", "root", "image"]
    for position, stage in enumerate(stages_for(PROFILE)):
        # What a profile does not ask for is needed by nobody.
        assert set(stage.needs) & set(names) <= set(names[:position]) and set(stage.needs) <= set(STAGE_NAMES)
    assert [stage.name for stage in stages_for(PROFILE, "root")] == ["guest_debs", "root"]
    assert [stage.name for stage in stages_for(PROFILE, "kernel_build")] == ["kernel_config", "kernel_build"]


def test_debians_kernel_is_not_built() -> None:
    profile = Profile(name="lab", kernel=Kernel(source="debian"))
    assert "kernel_build" not in [stage.name for stage in stages_for(profile)]
    with pytest.raises(ConfigError, match="no stage 'kernel_build'"):
        stages_for(profile, "kernel_build")


# -- side by side ------------------------------------------------------------------------------------------------------


def test_independent_stages_run_side_by_side(lab: Lab) -> None:
    meeting = threading.Barrier(2, timeout=20)

    def meet(work: Work) -> None:
        meeting.wait()

    for name in ("left", "right"):
        lab.stages[name].act = meet
    lab.build()
    assert lab.stages["top"].built == 1


def sleep_in(pid_file: Path, started: threading.Event) -> Callable[[Work], None]:
    """A stage that runs a program which runs another one, both for a minute."""

    def act(work: Work) -> None:
        started.set()
        run(["sh", "-c", f"echo $$ > '{pid_file}'; sleep 60 & wait"], log_path=work.log)

    return act


def wait_for(path: Path) -> str:
    for _ in range(400):
        if path.exists() and path.read_text():
            return path.read_text().strip()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def group_is_gone(leader: int) -> bool:
    for _ in range(100):
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_the_first_failure_ends_the_others(lab: Lab, tmp_path: Path, said: io.StringIO) -> None:
    started, pid_file = threading.Event(), tmp_path / "pid"
    lab.stages["left"].act = sleep_in(pid_file, started)

    def fail(work: Work) -> None:
        wait_for(pid_file)
        raise StageError("right fell over")

    lab.stages["right"].act = fail
    before = time.monotonic()
    with pytest.raises(StageError, match="right fell over"):
        lab.build()
    assert time.monotonic() - before < 30
    assert group_is_gone(int(pid_file.read_text()))
    assert lab.work_folders() == []
    assert lab.stages["top"].built == 0
    # What was whole is kept, and the next run carries on from it.
    lab.stages["left"].act = lab.stages["right"].act = lambda work: None
    assert lab.actions() == {"base": "reuse", "left": "build", "right": "build", "top": "build"}
    assert lab.build()["top"].path("top.txt").exists()


def test_a_failure_also_ends_a_stage_that_waits_for_another_recvirt(lab: Lab, said: io.StringIO) -> None:
    planned = lab.plan()
    left = next(item for item in planned if item.stage.name == "left")

    def fail(work: Work) -> None:
        for _ in range(400):
            if "waiting for another recvirt that builds the same left" in said.getvalue():
                break
            time.sleep(0.05)
        raise StageError("right fell over")

    lab.stages["right"].act = fail
    # The other one does not end: only giving up gets us out of here.
    with Store(lab.cache_dir).lock("left", left.key), pytest.raises(StageError, match="right fell over"):
        lab.builder().run(planned)
    assert "waiting" in said.getvalue()
    assert lab.stages["left"].built == 0


# -- failures ----------------------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[[Work], None]:
    def act(work: Work) -> None:
        (work.out / "half").write_text("half")
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), SpaceError, "base: the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), SpaceError, "base: the disk is full"),
        (PermissionError(errno.EACCES, "no", "/some/where"), StageError, "base: Permission denied: /some/where"),
        (
            FileNotFoundError(errno.ENOENT, "no", "/some/file"),
            StageError,
            "base: No such file or directory: /some/file",
        ),
        (StageError("as it was"), StageError, "as it was"),
        (CommandError(["cc"], 1, last_lines=["cc: error"]), CommandError, "cc: error"),
        (KeyError("bug"), KeyError, "bug"),
    ],
)
def test_a_failed_stage_leaves_nothing_half(
    lab: Lab, error: Exception, kind: type[Exception], words: str, said: io.StringIO
) -> None:
    lab.stages["base"].act = failing(error)
    with pytest.raises(kind) as caught:
        lab.build()
    assert type(caught.value) is kind
    assert words in str(caught.value)
    if isinstance(caught.value, SpaceError):
        assert "recvirt clean" in caught.value.hint
    assert lab.work_folders() == []
    assert lab.actions()["base"] == "build"
    assert "base: FAILED" in said.getvalue()


def test_a_full_disk_is_told_however_a_program_puts_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """cc says "No space left" hundreds of lines before make's last words; only the disk itself tells."""
    lab.stages["base"].act = failing(CommandError(["make"], 2, last_lines=["make: *** [all] Error 2"]))
    asked: list[Path] = []

    def full(*folders: Path) -> Path:
        asked.extend(folders)
        assert folders[0].exists(), "asked before the folder was cleared away"
        return folders[0]

    monkeypatch.setattr(pipeline, "disk_is_full", full)
    with pytest.raises(SpaceError, match="base: the disk is full") as caught:
        lab.build()
    assert "Error 2" in caught.value.message
    assert asked


def test_the_folder_of_a_failed_stage_can_be_kept(lab: Lab, said: io.StringIO) -> None:
    lab.stages["base"].act = failing(StageError("no"))
    with pytest.raises(StageError):
        lab.builder(keep_failed=True).run(lab.plan())
    (kept,) = lab.work_folders()
    assert f"kept for a look: {lab.cache_dir / 'work' / kept}" in said.getvalue()
    assert (lab.cache_dir / "work" / kept / "out" / "half").exists()
    # But it is neither reused nor in the way.
    lab.stages["base"].act = lambda work: None
    assert not (lab.build()["base"].directory / "half").exists()
    assert lab.work_folders() == []


def test_too_little_room_is_found_before_anything_starts(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStage, "space_bytes", lambda self, inputs: 10**18, raising=False)
    with pytest.raises(SpaceError, match=r"about 4000000\.0 TB are needed") as caught:
        lab.build()
    assert "--cache-dir" in caught.value.hint
    assert all(stage.built == 0 for stage in lab.stages.values())
    # What is reused needs no room.
    monkeypatch.undo()


def test_reused_stages_need_no_room(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.build()
    monkeypatch.setattr(FakeStage, "space_bytes", lambda self, inputs: 10**18, raising=False)
    lab.build()


def test_what_killed_builds_left_is_swept_but_not_what_others_build(lab: Lab) -> None:
    work = lab.cache_dir / "work"
    for name in ("base-0123", "other-4567", "top-89.aside-1-2"):
        (work / name / "out").mkdir(parents=True)
    with Store(lab.cache_dir).lock("other", "4567"):
        lab.build()
        assert lab.work_folders() == ["other-4567"]
    lab.build()
    assert lab.work_folders() == []


# -- two builds at once ------------------------------------------------------------------------------------------------


def test_the_second_of_two_builds_waits_and_reuses(lab: Lab, said: io.StringIO) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def act(work: Work) -> None:
        entered.set()
        assert go_on.wait(30)

    lab.stages["base"].act = act
    builders = [lab.builder(), lab.builder()]
    plans = [lab.plan(), lab.plan()]
    outputs: list[dict[str, Output]] = [{}, {}]

    def build(number: int) -> None:
        outputs[number] = builders[number].run(plans[number])

    threads = [threading.Thread(target=build, args=(number,)) for number in (0, 1)]
    threads[0].start()
    assert entered.wait(30)
    threads[1].start()
    for _ in range(400):
        if "waiting for another recvirt that builds the same base" in said.getvalue():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the second build did not say that it waits")
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert lab.stages["base"].built == 1
    assert [stage.built for stage in lab.stages.values()] == [1, 1, 1, 1]
    assert {n: o.key for n, o in outputs[0].items()} == {n: o.key for n, o in outputs[1].items()} != {}
    assert sorted(builders[0].built + builders[1].built) == ["base", "left", "right", "top"]


# -- outputs under attack ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", "same size", "gone"])
def test_a_damaged_output_is_built_again(lab: Lab, said: io.StringIO, how: str) -> None:
    path = lab.build()["left"].path("left.txt")
    whole = path.read_text()
    path.chmod(0o644)
    if how == "gone":
        path.unlink()
    else:
        path.write_text("x" if how == "cut" else "X" * len(whole))
    assert lab.actions() == {"base": "reuse", "left": "build", "right": "reuse", "top": "reuse"}
    assert "damaged" in said.getvalue()
    assert lab.build()["left"].path("left.txt").read_text() == whole
    assert lab.work_folders() == []


def test_a_restored_cache_with_other_times_is_still_good(lab: Lab) -> None:
    path = lab.build()["left"].path("left.txt")
    os.utime(path, (1, 1))
    assert set(lab.actions().values()) == {"reuse"}
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert path.stat().st_mtime_ns == manifest["outputs"]["left.txt"]["mtime_ns"], "hashed once, not at each build"


def test_errors_of_the_product_folder_are_told(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "build").write_text("a file where a folder should be")
    with pytest.raises(RecvirtError, match="build"):
        lab.build()
