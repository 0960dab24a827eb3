"""Timing programs beside others on a shared machine: wall time, CPU time, and how much somebody else was running.

Owns: one timed run, rounds of runs in turn (A B A B), medians. Does not own: what is run.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recvirt.run import run

#: A run counts as disturbed when others (or the hypervisor below) kept more than this many CPUs busy meanwhile.
#: The kernel's own threads (writing back what the run wrote) count as others and take about 0.1.
FOREIGN_CPUS = 0.3
#: Rounds that are run again because they were disturbed, before the figures are taken as they are.
EXTRA_ROUNDS = 3
_METER_SECONDS = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """One run: seconds on the wall, seconds of CPU, and the CPUs that others kept busy on average meanwhile."""

    wall_seconds: float
    cpu_seconds: float
    foreign_cpus: float

    @property
    def disturbed(self) -> bool:
        """Whether somebody else was at work."""
        return self.foreign_cpus > FOREIGN_CPUS


@dataclass
class Series:
    """The samples of one subject, undisturbed rounds first of all."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def counted(self) -> list[Sample]:
        """The samples that decide: the undisturbed ones, or all when there are none."""
        return [sample for sample in self.samples if not sample.disturbed] or self.samples

    @property
    def wall_seconds(self) -> float:
        """Median."""
        return statistics.median(sample.wall_seconds for sample in self.counted)

    @property
    def cpu_seconds(self) -> float:
        """Median. Contention hardly changes it."""
        return statistics.median(sample.cpu_seconds for sample in self.samples)

    @property
    def disturbed(self) -> bool:
        """Whether no run at all was undisturbed."""
        return all(sample.disturbed for sample in self.samples)

    def as_json(self) -> dict[str, Any]:
        """Medians and every sample."""
        return {
            "wall_seconds": round(self.wall_seconds, 3), "cpu_seconds": round(self.cpu_seconds, 3),
            "disturbed": self.disturbed, "samples": [asdict(sample) for sample in self.samples],
        }  # fmt: skip


def busy_seconds(stat_text: str) -> float:
    """Seconds that all CPUs together were busy or taken away, from the text of /proc/stat (proc(5), since boot)."""
    for line in stat_text.splitlines():
        if line.startswith("cpu "):
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) for word in line.split()[1:9])
            return (user + nice + system + irq + softirq + steal) / _TICKS
    raise ValueError("/proc/stat has no line for all CPUs")


def _busy_now() -> float:
    return busy_seconds(Path("/proc/stat").read_text())


def processes(proc: Path = Path("/proc")) -> dict[int, tuple[int, float]]:
    """Every process: its parent, and the CPU seconds of itself and of the children that it has waited for."""
    found = {}
    for folder in proc.iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            # proc_pid_stat(5): the fields after the name; ppid, then utime, stime, cutime, cstime.
            found[int(folder.name)] = (int(fields[1]), sum(int(word) for word in fields[11:15]) / _TICKS)
    return found


def below(root: int, table: Mapping[int, tuple[int, float]]) -> float:
    """CPU seconds of all descendants of ``root`` and of what it has waited for, not of itself."""
    family, todo = set(), [root]
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in table.items():
        children.setdefault(parent, []).append(pid)
    while todo:
        for pid in children.get(todo.pop(), ()):
            if pid not in family:
                family.add(pid)
                todo.append(pid)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(table[pid][1] for pid in family) + usage.ru_utime + usage.ru_stime


class CpuMeter:
    """Adds up the CPU time of everything below this process while it is open, by looking every fifth of a second.

    Waiting alone isn't enough: a sandbox's first process ends without waiting for its child, and the time of all that
    ran inside is then in nobody's account. What such a tree used in its last fifth of a second is missed.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuMeter:
        self._last = below(os.getpid(), processes())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._end.wait(_METER_SECONDS):
            self._look()

    def _look(self) -> None:
        now = below(os.getpid(), processes())
        # Less than before: a tree ended unaccounted. What was added so far stays added.
        self.seconds += max(0.0, now - self._last)
        self._last = now


def timed(work: Callable[[], object]) -> Sample:
    """Do ``work`` (which starts programs and waits for them) and say what it took."""
    busy_before, started = _busy_now(), time.monotonic()
    with CpuMeter() as meter:
        work()
    wall = time.monotonic() - started
    busy = _busy_now() - busy_before
    return Sample(round(wall, 3), round(meter.seconds, 2), round(max(0.0, busy - meter.seconds) / max(wall, 0.001), 2))


def command(argv: Sequence[str], log_path: Path, *, env: Mapping[str, str] | None = None) -> Callable[[], object]:
    """Work that runs ``argv`` with its output in ``log_path``; CommandError when it fails."""
    return lambda: run(argv, log_path=log_path, env=env)


def wait_for_quiet(patience_seconds: float, *, window_seconds: float = 2.0) -> bool:
    """Wait until others keep less than FOREIGN_CPUS busy. False when they don't stop for so long."""
    deadline = time.monotonic() + patience_seconds
    while True:
        before = _busy_now()
        time.sleep(window_seconds)
        if (_busy_now() - before) / window_seconds < FOREIGN_CPUS:
            return True
        if time.monotonic() >= deadline:
            return False


@dataclass(frozen=True)
class Subject:
    """Something to time. ``prepare`` and ``settle`` run before and after each run, untimed."""

    name: str
    work: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    settle: Callable[[], object] = lambda: None


def in_turn(subjects: Sequence[Subject], runs: int, *, patience_seconds: float = 60.0) -> dict[str, Series]:
    """Run the subjects in turn, ``runs`` rounds; disturbed rounds are repeated a few times. Tells its progress."""
    found = {subject.name: Series() for subject in subjects}
    good, tried = 0, 0
    while good < runs and tried < runs + EXTRA_ROUNDS:
        tried += 1
        samples = [_one(subject, patience_seconds) for subject in subjects]
        for subject, sample in zip(subjects, samples, strict=True):
            found[subject.name].samples.append(sample)
        good += not any(sample.disturbed for sample in samples)
    return found


def _one(subject: Subject, patience_seconds: float) -> Sample:
    subject.prepare()
    wait_for_quiet(patience_seconds)
    sample = timed(subject.work)
    subject.settle()
    note = f"  (others kept {sample.foreign_cpus} CPUs busy)" if sample.disturbed else ""
    say(f"{subject.name}: {sample.wall_seconds:.2f} s, CPU {sample.cpu_seconds:.2f} s{note}")
    return sample


def say(text: str) -> None:
    """News on stderr."""
    print(f"  {text}", file=sys.stderr, flush=True)
