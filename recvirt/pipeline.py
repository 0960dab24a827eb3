"""From a resolved profile to an image: plan what is reused and what is built, then build it, side by side where it can.

Owns: the order of the stages, reuse, and the reasons for building again.
Does not own: how a stage works (``stages/``), where outputs are cached (``store``), or what of them lands in
``build/<profile>/`` (``products``).
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recvirt.archive import forget_updates
from recvirt.cleaning import sweep
from recvirt.errors import ConfigError, RecvirtError, SpaceError, StageError, from_os_error
from recvirt.model import Profile
from recvirt.products import built_image, disk_is_full, publish
from recvirt.run import allow_start, stop_all
from recvirt.stages.base import Context, Stage, Work
from recvirt.stages.guest_debs import GuestDebs
from recvirt.stages.guest_image import GuestImage
from recvirt.stages.image import ImageStage
from recvirt.stages.kernel_build import KernelBuild
from recvirt.stages.kernel_config import KernelConfig
from recvirt.stages.root import RootStage
from recvirt.store import Output, Store, canonical, check_room, key_of, remove_tree
from recvirt.ui import reporter

__all__ = ["STAGES", "STAGE_NAMES", "Builder", "Planned", "built_image", "check_space", "plan", "stages_for"]

STAGES: tuple[Stage, ...] = (KernelConfig(), KernelBuild(), GuestImage(), GuestDebs(), RootStage(), ImageStage())
STAGE_NAMES = tuple(stage.name for stage in STAGES)
#: Room that a stage wants on the cache's disk unless it says otherwise (``space_bytes(inputs)``).
_DEFAULT_SPACE = 512 * 1024**2


@dataclass(frozen=True)
class Planned:
    """One stage of a plan: its key, and the whole output if there is one. ``reasons`` say why it must be built."""

    stage: Stage
    inputs: Any
    key: str
    output: Output | None
    reasons: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For ``plan --json``."""
        action = "reuse" if self.output else "build"
        return {"stage": self.stage.name, "key": self.key, "action": action, "reasons": list(self.reasons)}


def stages_for(profile: Profile, until: str | None = None) -> list[Stage]:
    """The stages that a profile runs through, in order. ``until`` is the last one wanted."""
    stages = list(STAGES)
    if profile.kernel.source == "debian":
        stages = [stage for stage in stages if stage.name != "kernel_build"]
    if not profile.image.guest_image:
        stages = [stage for stage in stages if stage.name != "guest_image"]
    if until is None:
        return stages
    names = [stage.name for stage in stages]
    if until not in names:
        raise ConfigError(f"there is no stage {until!r} in this profile", hint=f"one of: {', '.join(names)}")
    wanted = _closure(stages, until)
    return [stage for stage in stages if stage.name in wanted]


def _closure(stages: Sequence[Stage], name: str) -> set[str]:
    by_name = {stage.name: stage for stage in stages}
    found, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current in by_name and current not in found:
            found.add(current)
            todo.extend(by_name[current].needs)
    return found


def plan(profile: Profile, store: Store, context: Context, *, until: str | None = None) -> list[Planned]:
    """What would run, what is reused, and why not. Builds nothing."""
    forget_updates()
    planned: list[Planned] = []
    keys: dict[str, str] = {}
    for stage in stages_for(profile, until):
        upstream = {name: keys[name] for name in stage.needs if name in keys}
        inputs = stage.inputs(profile, upstream, context)
        key = keys[stage.name] = key_of(stage.name, stage.revision, inputs)
        output = store.get(stage.name, key)
        reasons = () if output else tuple(_reasons(stage, inputs, profile, store))
        planned.append(Planned(stage, inputs, key, output, reasons))
    return planned


def _reasons(stage: Stage, inputs: Any, profile: Profile, store: Store) -> list[str]:
    before = store.latest(stage.name, profile.name)
    if before is None:
        return ["never built for this profile"]
    changes = list(differences(before.manifest["inputs"], canonical(inputs)))
    return changes[:12] + ([f"and {len(changes) - 12} more"] if len(changes) > 12 else []) or [
        "the stage itself changed (its revision)"
    ]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The paths at which two canonical inputs differ, as sentences."""
    if isinstance(old, dict) and isinstance(new, dict):
        if set(old) == {"name", "sha256"} == set(new) and old["name"] == new["name"]:
            return [] if old == new else [f"{path}: {new['name']} changed"]
        if set(old) == {"stage", "key"} == set(new):
            return [] if old == new else [f"{new['stage']} is another one"]
        found = []
        for name in sorted(set(old) | set(new)):
            here = f"{path}.{name}" if path else name
            if name not in old or name not in new:
                found.append(f"{here} is {'new' if name not in old else 'gone'}")
            else:
                found += differences(old[name], new[name], here)
        return found
    if isinstance(old, list) and isinstance(new, list):
        return _list_differences(old, new, path)
    return [] if old == new else [f"{path}: {_short(old)} became {_short(new)}"]


def _list_differences(old: list[Any], new: list[Any], path: str) -> list[str]:
    if len(old) == len(new) and not all(isinstance(item, str) for item in (*old, *new)):
        pairs = enumerate(zip(old, new, strict=True))
        return [text for i, pair in pairs for text in differences(*pair, f"{path}[{i}]")]
    gone = [item for item in old if item not in new]
    came = [item for item in new if item not in old]
    if not gone and not came and old != new:
        return [f"{path}: the order changed"]
    return [f"{path}: - {_short(item)}" for item in gone] + [f"{path}: + {_short(item)}" for item in came]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Builder:
    """Carries out a plan. Stages whose needs are met run side by side; the first failure ends the rest."""

    def __init__(
        self, profile: Profile, store: Store, context: Context, build_dir: Path, *, keep_failed: bool = False
    ) -> None:
        self.profile = profile
        self.store = store
        self.context = context
        self.product_dir = build_dir / profile.name
        self.products: list[Path] = []
        self.built: list[str] = []  # the stages that this run built itself, in the order they ended
        self.keep_failed = keep_failed
        self._failed = threading.Event()

    def run(self, planned: Sequence[Planned]) -> dict[str, Output]:
        """Build what is missing and return every stage's output. Raises the first stage's error."""
        try:
            sweep(self.store)
            check_space(planned, self.store.directory)
            (self.product_dir / "logs").mkdir(parents=True, exist_ok=True)
            allow_start()
            try:
                done = self._build_all(planned)
            except BaseException:
                if not self.keep_failed:
                    allow_start()
                    sweep(self.store)
                raise
            self.products = publish(done, self.product_dir)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise from_os_error(error) from error
        return done

    def _build_all(self, planned: Sequence[Planned]) -> dict[str, Output]:
        done: dict[str, Output] = {item.stage.name: item.output for item in planned if item.output}
        waiting = {item.stage.name: item for item in planned if not item.output}
        running: dict[Future[Output], str] = {}
        with ThreadPoolExecutor(max_workers=max(2, len(planned))) as pool:
            try:
                while waiting or running:
                    for name in [n for n, item in waiting.items() if self._ready(item, planned, done)]:
                        running[pool.submit(self._build, waiting.pop(name), dict(done))] = name
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        done[running.pop(future)] = future.result()
            except BaseException:
                # The other stages' programs are ended, so that their threads end too and nothing is left running.
                self._failed.set()
                stop_all()
                raise
        return done

    def _ready(self, item: Planned, planned: Sequence[Planned], done: Mapping[str, Output]) -> bool:
        present = {other.stage.name for other in planned}
        return all(name in done for name in item.stage.needs if name in present)

    def _build(self, item: Planned, done: Mapping[str, Output]) -> Output:
        name, key = item.stage.name, item.key
        with self.store.lock(name, key, gave_up=self._failed.is_set):
            if (output := self.store.get(name, key)) is not None:
                return output
            if self._failed.is_set():
                raise StageError(f"{name} was not started: another stage failed")
            with reporter.step(name):
                return self._build_locked(item, done)

    def _build_locked(self, item: Planned, done: Mapping[str, Output]) -> Output:
        name, key = item.stage.name, item.key
        folder = self.store.fresh_work_dir(name, key)
        log = self.product_dir / "logs" / f"{name}.log"
        log.write_text("")
        for part in ("out", "scratch"):
            (folder / part).mkdir()
        upstream = {need: done[need].directory for need in item.stage.needs if need in done}
        started = time.monotonic()
        try:
            item.stage.build(item.inputs, Work(folder / "out", folder / "scratch", log, self.context, upstream))
            seconds = time.monotonic() - started
            output = self.store.commit(name, key, folder, label=self.profile.name, inputs=item.inputs, seconds=seconds)
            self.built.append(name)
            return output
        except BaseException as error:
            told = self._explain(error, name, folder, log)
            self._discard(folder)
            if told is error:
                raise
            raise told from error

    def _explain(self, error: BaseException, name: str, folder: Path, log: Path) -> BaseException:
        """The error as a person should see it. A full disk shows in many ways; look before the folder is gone."""
        if isinstance(error, (SpaceError, BrokenPipeError)) or not isinstance(error, (OSError, RecvirtError)):
            return error
        if self._failed.is_set():
            return error
        full = disk_is_full(folder, log.parent)
        if full is not None or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            said = f"\n{error.message}" if isinstance(error, RecvirtError) else ""
            return SpaceError(
                f"{name}: the disk is full ({full or folder}){said}",
                hint="free some room (recvirt clean --dry-run shows what the cache holds) or set --cache-dir",
            )
        if isinstance(error, OSError):
            told = from_os_error(error, name)
            return StageError(told.message, hint=told.hint or f"the log: {log}")
        return error

    def _discard(self, folder: Path) -> None:
        if self.keep_failed:
            reporter.warn(f"kept for a look: {folder}")
        elif folder.exists():
            with suppress(OSError):
                # What is left, because it belongs to sub-ids or a program still dies in it, is swept afterwards.
                remove_tree(folder)


def check_space(planned: Sequence[Planned], directory: Path) -> None:
    """Raise SpaceError before anything starts if the cache's disk can't hold what is about to be built."""
    wanted = 0
    for item in planned:
        if item.output is None:
            estimate = getattr(item.stage, "space_bytes", None)
            wanted += estimate(item.inputs) if estimate else _DEFAULT_SPACE
    check_room(directory, wanted)
