"""Kills at every boundary: of commits, messages, libvirt calls and files, each by name.

    python -m tests.cloud.faults.boundaries --list
    python -m tests.cloud.faults.boundaries [--only launch] [--part 1/4]

An operation is run once undisturbed and every call that lasts is written down. Then it is run once for each of them,
with the process killed right after it (or before the first one); what it had in hand is delivered again, or lost until
its lease has run out. Then nothing is helped along any more, and the cloud must be what it is after the undisturbed
run: rows, promises, domains, files. Then every message that ever was comes once more; then all is deleted; then every
message comes again, backwards, and nothing may be there.
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cloud.faults.bench import Bench, Request, StepError
from tests.cloud.faults.libvirtd import Libvirtd, scratch, why_not
from tests.cloud.faults.scenarios import SCENARIOS, Scenario, make_state

#: Who is stepped, in order. The client's requests come before.
_PARTS = ("dispatcher", "worker", "consumer")
_NOTHING: dict[str, Any] = {
    "instances": {}, "volumes": {}, "images": {}, "forwards": [[], []], "domains": {}, "files": {}, "loose ends": [],
}  # fmt: skip


@dataclass(frozen=True)
class Boundary:
    """Where a process dies: after its call number ``at`` in the scenario's step ``step``."""

    scenario: str
    part: str
    step: int
    at: int
    call: str
    lost: bool

    @property
    def name(self) -> str:
        """As it is listed."""
        fate = "" if self.part not in ("worker", "consumer") else ", message lost" if self.lost else ", delivered again"
        return f"{self.scenario}: {self.part} {self.step}.{self.at} {self.call}{fate}"


class Runner:
    """Runs scenarios on one bench."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.expected: dict[str, dict[str, Any]] = {}

    def _steps(self, scenario: Scenario) -> list[tuple[str, Any, tuple[Any, ...]]]:
        bench = self.bench
        asked = [("api", bench.ask, (request, f"key-{number}")) for number, request in enumerate(scenario.requests)]
        return [*asked, ("dispatcher", bench.dispatch, ()), ("worker", bench.work, ()), ("consumer", bench.consume, ())]

    def begin(self, scenario: Scenario) -> None:
        """The state before the operation, with a worker that was heard of just now."""
        make_state(self.bench, scenario.state)
        self.bench.load(scenario.state)
        self.bench.step(self.bench.beat)

    def record(self, scenario: Scenario) -> list[Boundary]:
        """Run it undisturbed; its boundaries."""
        self.begin(scenario)
        found = []
        for number, (part, function, arguments) in enumerate(self._steps(scenario)):
            done = self.bench.step(function, *arguments)
            self.bench.keep_messages()
            fates = (False, True) if part in ("worker", "consumer") else (False,)
            for at, call in enumerate(("before anything", *(f"after {name}" for name in done.calls))):
                found += [Boundary(scenario.name, part, number, at, call, lost) for lost in fates]
        self.expected[scenario.name] = self.bench.step(self.bench.world).result
        if ends := self.expected[scenario.name]["loose ends"]:
            raise StepError(f"{scenario.name}: undisturbed, and {ends}")
        return found

    def check(self, scenario: Scenario, boundary: Boundary) -> list[str]:
        """Run it with the kill; what is wrong afterwards."""
        bench = self.bench
        self.begin(scenario)
        for number, (part, function, arguments) in enumerate(self._steps(scenario)):
            bench.keep_messages()
            before = bench.under_way()
            if number != boundary.step:
                bench.step(function, *arguments)
                continue
            if not bench.step(function, *arguments, at=boundary.at).killed:
                return ["it was not killed: the calls differ from run to run"]
            if part == "api":
                # The client has heard nothing, and asks again in the same words.
                if problem := self._ask_again(*arguments):
                    return [problem]
            elif not boundary.lost and (taken := sorted(set(before) - set(bench.under_way()))):
                bench.deliver_again(taken[-1:])
            break
        try:
            return self._afterwards(scenario)
        except StepError as error:
            return [str(error)]

    def _ask_again(self, request: Request, key: str) -> str:
        # Whoever asks again may be slow: the operation may be over by then.
        self.bench.step(self.bench.settle)
        status, answer = self.bench.step(self.bench.ask, request, key).result
        return f"asked again, the answer is {status}: {answer}" if status >= 300 else ""

    def _afterwards(self, scenario: Scenario) -> list[str]:
        bench, found = self.bench, []
        rest = self._steps(scenario)[: len(scenario.requests)]
        for _, function, arguments in rest:
            # A client that was to ask for more does so; what was asked for before is known by its key.
            bench.step(function, *arguments)
        bench.step(bench.settle)
        found += _differences("", self.expected[scenario.name], bench.step(bench.world).result)
        bench.keep_messages()
        bench.deliver_again()
        bench.step(bench.settle)
        found += _differences("late messages: ", self.expected[scenario.name], bench.step(bench.world).result)
        bench.step(bench.clear)
        bench.keep_messages()
        bench.deliver_again(backwards=True)
        bench.step(bench.settle)
        found += _differences("after all was deleted: ", _NOTHING, bench.step(bench.world).result)
        return found


def _differences(when: str, expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        f"{when}{what}: {found[what]} instead of {expected[what]}" for what in expected if found[what] != expected[what]
    ]


def chosen(only: str) -> Iterator[Scenario]:
    """The scenarios whose names match."""
    yield from (scenario for scenario in SCENARIOS if fnmatch.fnmatch(scenario.name, only))


def run(folder: Path, only: str = "*", part: tuple[int, int] = (1, 1), *, listing: bool = False) -> tuple[int, int]:
    """Run them; how many boundaries there were, and how many of them had something wrong, which is printed."""
    libvirtd = Libvirtd(folder / "libvirt")
    libvirtd.start()
    try:
        runner = Runner(Bench(folder, libvirtd))
        count = bad = 0
        for scenario in chosen(only):
            boundaries = runner.record(scenario)
            if not listing:
                print(f"# {scenario.name}: {len(boundaries)} boundaries", flush=True)
            for number, boundary in enumerate(boundaries):
                if number % part[1] != part[0] - 1:
                    continue
                count += 1
                problems = [] if listing else runner.check(scenario, boundary)
                bad += bool(problems)
                if listing or problems:
                    print("\n  ".join([boundary.name, *problems]), flush=True)
        return count, bad
    finally:
        libvirtd.kill()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.cloud.faults.boundaries", description=__doc__)
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="scenarios")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every Nth boundary")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    first, _, last = options.part.partition("/")
    folder = scratch("recvirt-boundaries-")
    try:
        count, bad = run(folder, options.only, (int(first), int(last)), listing=options.list)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{count} boundaries" + ("" if options.list else f", {bad} with something wrong"))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
