"""(a) and (b): how long building takes, from packages to a disk, and when little or nothing changed.

Owns: what is compared with what. Does not own: how a run is timed (``measure``) or how mkosi is set up (``mkosi``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import mkosi
from benchmarks.measure import Series, Subject, command, in_turn, say
from benchmarks.results import Result, Row
from benchmarks.workplace import Site
from recvirt.errors import StageError

PROFILE = "default"
#: Packages that only our images have, and mkosi's own boot loader.
_NOT_COMPARED = ("recvirt-boot", "recvirt-nested-check")
_MKOSI_LIMIT = 0.5
_REPACK_LIMIT_SECONDS = 15.0
_NOTHING_LIMIT_SECONDS = 1.0


def ours(site: Site, name: str, *stages: str) -> Subject:
    """Build PROFILE after ``stages`` were taken out of the cache."""
    return Subject(
        name,
        work=lambda: site.recvirt("build", PROFILE, "--offline", log_name=name),
        prepare=lambda: site.forget(PROFILE, *stages),
    )


def against_mkosi(site: Site) -> Result:
    """Root + image of PROFILE with packages cached, against mkosi on disk and mkosi on a tmpfs, in turn."""
    setup = mkosi_setup(site)
    tools = site.tools("mkosi")
    mkosi.prepare(setup, tools)
    say("mkosi: filling its package cache (untimed)")
    mkosi.clear(setup)
    fill = mkosi.build_argv(setup, tools, in_memory=False, cache_only=False, manifest=True)
    command(fill, site.log("mkosi-fill"))()
    differences = compare_packages(site, mkosi.installed(setup))

    def theirs(name: str, *, in_memory: bool) -> Subject:
        def work() -> None:
            argv = mkosi.build_argv(setup, tools, in_memory=in_memory, cache_only=True)
            command(argv, site.log(name))()

        return Subject(name, work, prepare=lambda: mkosi.clear(setup), settle=lambda: mkosi.clear(setup))

    subjects = [
        ours(site, "recvirt root and image", "root", "image"),
        theirs("mkosi", in_memory=False),
        theirs("mkosi in memory", in_memory=True),
    ]
    series = in_turn(subjects, site.runs, patience_seconds=site.patience_seconds)
    recvirt, disk, memory = (series[subject.name] for subject in subjects)
    rows = [
        against("root + image, packages cached, against mkosi", recvirt, disk, _MKOSI_LIMIT),
        against("the same, against mkosi with its workspace in memory", recvirt, memory, 1.0),
    ]
    facts = {"samples": samples(series), "mkosi": tools.version_of("mkosi"), "package differences": differences}
    return Result("mkosi", rows, facts)


def against(what: str, mine: Series, other: Series, limit: float) -> Row:
    """A row of wall times; the note gives the CPU times, which a busy machine changes less."""
    note = f"CPU {mine.cpu_seconds:.0f} s against {other.cpu_seconds:.0f} s"
    if mine.disturbed or other.disturbed:
        note += "; the machine was never quiet"
    return Row.ratio(what, mine.wall_seconds, other.wall_seconds, "s", limit, note)


def samples(series: dict[str, Series]) -> dict[str, Any]:
    """All samples, for the JSON file."""
    return {name: item.as_json() for name, item in series.items()}


def mkosi_setup(site: Site) -> mkosi.Setup:
    """The packages that PROFILE asks for by name, its suite, and the very kernel package that it was built with."""
    planned = site.planned(PROFILE)
    names = [name for name in planned["root"].inputs.names if name not in _NOT_COMPARED]
    kernel = site.output(PROFILE, "kernel_build")
    release = kernel.path("release").read_text().strip()
    return mkosi.Setup(
        site.work_dir / "mkosi", planned["root"].inputs.suite, tuple(sorted(names)), f"linux-image-{release}",
        kernel.path("linux-image.deb"),
    )  # fmt: skip


def compare_packages(site: Site, theirs: dict[str, str]) -> list[str]:
    """What is not the same in both images. StageError when mkosi lacks something that ours has."""
    listed = json.loads(site.output(PROFILE, "root").path("packages.json").read_text())
    mine = {item["name"]: item["version"] for item in listed if item["name"] not in _NOT_COMPARED}
    if missing := sorted(set(mine) - set(theirs)):
        raise StageError(f"mkosi's image lacks packages of ours, so it can't be compared: {', '.join(missing)}")
    found = [f"only mkosi: {name}" for name in sorted(set(theirs) - set(mine))]
    return found + [f"{name} {mine[name]}, mkosi {theirs[name]}" for name in sorted(mine) if mine[name] != theirs[name]]


def incremental(site: Site) -> Result:
    """A new kernel on a cached root, nothing changed, and one line of a package list changed."""
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    subjects = [
        ours(site, "repack", "image"),
        Subject("nothing changed", lambda: site.recvirt("build", PROFILE, log_name="nothing")),
        Subject("nothing changed, offline", lambda: site.recvirt("build", PROFILE, "--offline", log_name="offline")),
    ]
    series = in_turn(subjects, site.runs, patience_seconds=site.patience_seconds)
    facts["samples"] = samples(series)
    stages = stages_of_kernel_change(site)
    facts["stages after a kernel option changed"] = stages
    rows.append(
        Row.limit("packing the image anew on a cached root, as for a new kernel", series["repack"].wall_seconds, "s",
                  _REPACK_LIMIT_SECONDS, f"a changed kernel option builds {', '.join(stages)}; not the root")
    )  # fmt: skip
    if "root" in stages:
        raise StageError("a changed kernel option makes the root anew")
    rows.append(
        Row.limit("nothing changed: recvirt build", series["nothing changed"].wall_seconds, "s",
                  _NOTHING_LIMIT_SECONDS, f"{series['nothing changed, offline'].wall_seconds:.2f} s with --offline")
    )  # fmt: skip
    stages, seconds = list_change(site)
    facts["stages after a line of a package list changed"] = stages
    if {"kernel_config", "kernel_build"} & set(stages):
        raise StageError(f"a changed package list builds {', '.join(stages)}")
    note = f"builds {', '.join(stages)}; the kernel is not touched"
    rows.append(Row.figure("one line of a package list changed: recvirt build", seconds, "s", note))
    return Result("incremental", rows, facts)


def to_build(plan: list[dict[str, Any]]) -> list[str]:
    """The stages that a plan (``recvirt plan --json``) would build."""
    return [item["stage"] for item in plan if item["action"] == "build"]


def stages_of_kernel_change(site: Site) -> list[str]:
    """What another value of a kernel option makes recvirt build, without building it."""
    plan = site.recvirt_json("plan", PROFILE, "--set", "kernel.overrides.HZ_1000=y", "--offline", "--json")
    return to_build(plan)


def list_change(site: Site) -> tuple[list[str], float]:
    """Build with a package list, change one line, build again: the stages of the second build, and its seconds."""
    folder = site.work_dir / "listed"
    folder.mkdir(exist_ok=True)
    (folder / "listed.yaml").write_text(
        f"extends: {PROFILE}\nname: listed\nroot:\n  package_lists+: [./own.list]\n", encoding="utf-8"
    )
    profile = str(folder / "listed.yaml")
    own = folder / "own.list"
    own.write_text("file   # before\n")
    site.recvirt("build", profile, log_name="listed-before")
    own.write_text("tree   # after\n")
    # What the second build needs is fetched here: the network's speed says nothing about ours.
    stages = to_build(site.recvirt_json("plan", profile, "--json"))
    site.recvirt("build", profile, log_name="listed-fetch")
    changed = [stage for stage in stages if stage not in ("kernel_config", "kernel_build")]
    again = Subject(
        "list changed", lambda: site.recvirt("build", profile, "--offline", log_name="listed-after"),
        prepare=lambda: site.forget(profile, *changed),
    )  # fmt: skip
    series = in_turn([again], site.runs, patience_seconds=site.patience_seconds)
    drop(site, profile, own)
    return stages, series["list changed"].wall_seconds


def drop(site: Site, profile: str, own: Path) -> None:
    """Take the outputs of both builds out of the cache: nobody wants them."""
    for text in ("file   # before\n", "tree   # after\n"):
        own.write_text(text)
        site.forget(profile, "root", "image")
