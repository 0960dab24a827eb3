#!/usr/bin/env python3
"""Measure recvirt and print a table: ratios from one run on one machine, medians, subjects in turn.

    benchmarks/run.py                          everything (an hour or two; builds what is not in the cache)
    benchmarks/run.py --only sizes,l2          some of it
    benchmarks/run.py --write-readme           and put the table into README.md
    benchmarks/run.py --from-results --write-readme

Benchmarks that were not run keep their rows from the results file, with the date of their own run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import boot, builds, launched, publishing, sizes
from benchmarks.results import Result, Row, insert, markdown
from benchmarks.workplace import CHECKOUT, Site
from recvirt.cli import default_cache_dir
from recvirt.errors import RecvirtError
from recvirt.ui import reporter

_L2_LIMIT = 1.03


def l2_exits(site: Site) -> Result:
    """(d): instructions that an L1 spends on an exit of its L2."""
    from benchmarks import l2_exit

    found = l2_exit.rows(site.app, l2_exit.find_kernels(site.app, "default", []), prices=False)
    (stock_name, stock), (name, mine) = found
    rows = [
        Row.ratio("an L2's CPUID exit, instructions in L1", mine.cpuid, stock.cpuid, "", _L2_LIMIT),
        Row.ratio("an L2's userspace I/O exit, instructions in L1", mine.io, stock.io, "", _L2_LIMIT),
    ]
    facts = {label: {"cpuid": cost.cpuid, "io": cost.io} for label, cost in ((stock_name, stock), (name, mine))}
    return Result("l2", rows, facts)


BENCHMARKS: dict[str, Callable[[Site], Result]] = {
    "mkosi": builds.against_mkosi,
    "incremental": builds.incremental,
    "boot": boot.benchmark,
    "prices": boot.prices,
    "l2": l2_exits,
    "launched": launched.benchmark,
    "sizes": sizes.benchmark,
    "publish": publishing.benchmark,
}


def chosen(text: str) -> list[str]:
    """The benchmarks that ``--only`` names, in the table's order. ArgumentTypeError for an unknown one."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := sorted(names - set(BENCHMARKS)):
        raise argparse.ArgumentTypeError(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    return [name for name in BENCHMARKS if name in names]


def cpu_model(cpuinfo: str) -> str:
    """The processor's name from the text of /proc/cpuinfo."""
    match = re.search(r"^model name\s*: (.+)$", cpuinfo, re.M)
    return match[1].strip() if match else platform.machine()


def machine_line(dates: Sequence[str]) -> str:
    """What was measured on, and when: the ratios carry over to other machines, the seconds do not."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    when = " and ".join(sorted({date for date in dates if date}))
    cpus = len(os.sched_getaffinity(0))
    model = cpu_model(Path("/proc/cpuinfo").read_text())
    return f"Measured {when} on {cpus} CPUs ({model}), {pages * size / 1024**3:.0f} GiB of memory, by `make bench`."


def load(path: Path) -> dict[str, Any]:
    """Earlier results, by benchmark; none when there is no file."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return data


def measure(site: Site, names: Sequence[str], path: Path) -> list[str]:
    """Run the benchmarks and save each one's result as it comes. Returns the names of those that failed."""
    failed = []
    for name in names:
        reporter.info(f"benchmark {name}")
        try:
            result = BENCHMARKS[name](site)
        except (RecvirtError, LookupError, OSError, ValueError) as error:
            reporter.error(f"{name}: {error}", getattr(error, "hint", ""))
            failed.append(name)
            continue
        data = load(path)
        data[name] = {**result.as_json(), "date": time.strftime("%Y-%m-%d")}
        path.write_text(json.dumps(data, indent=1) + "\n")
    return failed


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=chosen, default=list(BENCHMARKS), metavar="A,B", help=", ".join(BENCHMARKS))
    parser.add_argument("--runs", type=int, default=3, help="rounds of each timed comparison [default: 3]")
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS",
                        help="wait so long for a quiet machine before each timed run [default: 60]")  # fmt: skip
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="recvirt's cache")
    parser.add_argument("--work-dir", type=Path, default=CHECKOUT / "build" / "bench", help="[default: build/bench]")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON instead of the table")
    parser.add_argument("--from-results", action="store_true", help="measure nothing, use the last results")
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    return parser


def main() -> int:
    """Run it; 1 when a benchmark could not be run. A missed target is a finding, not a failure."""
    options = arguments().parse_args()
    site = Site(options.cache_dir.absolute(), options.work_dir.absolute(), options.runs, options.patience)
    site.work_dir.mkdir(parents=True, exist_ok=True)
    path = site.work_dir / "results.json"
    failed = [] if options.from_results else measure(site, options.only, path)
    data = {name: load(path)[name] for name in BENCHMARKS if name in load(path)}
    table = markdown([Result.of_json(item) for item in data.values()], machine_line([d["date"] for d in data.values()]))
    if not data:
        return 1
    print(json.dumps(data, indent=1) if options.json else table)
    if options.write_readme:
        readme = CHECKOUT / "README.md"
        readme.write_text(insert(readme.read_text(), table))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
