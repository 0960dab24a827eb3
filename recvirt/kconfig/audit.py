"""Looking at a resolved configuration from outside: kernel-hardening-checker's opinion, and Debian's cloud kernel
beside it.

The checker and Debian's configurations are fetched, verified, from the archive; neither is shipped here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recvirt.apt import Package
from recvirt.archive import Archive
from recvirt.errors import StageError
from recvirt.kconfig import stock
from recvirt.kconfig.dotconfig import compare, count_values, parse_dotconfig
from recvirt.sandbox import ToolsRoot
from recvirt.store import remove_tree

#: Where Debian has it: no stable release before forky, but backports.
CHECKER = "kernel-hardening-checker"
CHECKER_SUITE = "trixie-backports"
_CLOUD_MEMBER = "./usr/src/{package}/config.amd64_none_cloud-amd64.xz"
_SOURCE = re.compile(r"^linux-source-(\d+\.\d+)$")


@dataclass(frozen=True)
class Finding:
    """One check of kernel-hardening-checker."""

    option: str
    wanted: str
    result: str
    reason: str
    authority: str
    ok: bool


def parse_findings(text: str) -> tuple[Finding, ...]:
    """The checker's ``-m json`` output."""
    return tuple(
        Finding(
            item["option_name"].removeprefix("CONFIG_"), item["desired_val"], item["check_result"], item["reason"],
            item["decision"], bool(item["check_result_bool"]),
        )
        for item in json.loads(text)
    )  # fmt: skip


class Checker:
    """kernel-hardening-checker, unpacked from its package for one use."""

    def __init__(self, tools: ToolsRoot, archive: Archive, folder: Path) -> None:
        self._tools = tools
        package = archive.find(CHECKER)
        self.version = package.version
        self._folder = folder / f"{CHECKER}-{package.sha256[:12]}"
        if not (self._folder / "usr/bin" / CHECKER).exists():
            self._unpack(archive.download(package))

    def _unpack(self, deb: Path) -> None:
        partial = self._folder.with_suffix(".part")
        if partial.exists():
            remove_tree(partial)
        partial.mkdir(parents=True)
        self._tools.run(["dpkg-deb", "-x", str(deb), str(partial)], readable=[deb], writable=[partial])
        partial.replace(self._folder)

    def check(self, config: Path, cmdline: Path | None = None) -> tuple[Finding, ...]:
        """Its opinion of a configuration (and of a command line). Raises StageError if it says nothing usable."""
        argv = ["python3", str(self._folder / "usr/bin" / CHECKER), "-m", "json", "-c", str(config)]
        argv += ["-l", str(cmdline)] if cmdline else []
        env = {"PYTHONPATH": str(self._folder / "usr/lib/python3/dist-packages")}
        readable = [self._folder, config, *([cmdline] if cmdline else [])]
        done = self._tools.run(argv, readable=readable, env=env)
        try:
            return parse_findings(done.stdout)
        except (ValueError, KeyError) as error:
            raise StageError(f"{CHECKER} {self.version} said something unexpected: {done.stdout[:200]!r}") from error


def debian_config_package(source_package: str) -> str:
    """``linux-config-6.12`` for ``linux-source-6.12``; empty for what has no such companion."""
    match = _SOURCE.match(source_package)
    return f"linux-config-{match[1]}" if match else ""


def debian_cloud_config(tools: ToolsRoot, archive: Archive, package: Package) -> str:
    """Debian's configuration of its cloud kernel for amd64, from a ``linux-config-*`` package."""
    return stock.config_text(tools, archive.download(package), _CLOUD_MEMBER.format(package=package.name))


def score(findings: Sequence[Finding]) -> dict[str, int]:
    """How many checks hold."""
    good = sum(finding.ok for finding in findings)
    return {"ok": good, "fail": len(findings) - good}


def audit_facts(
    *,
    release: str,
    ours: str,
    findings: Sequence[Finding],
    checker: str,
    reasons: Mapping[str, str],
    debian: str = "",
    debian_name: str = "",
    debian_findings: Sequence[Finding] = (),
) -> dict[str, Any]:
    """The audit as JSON-able data. ``reasons`` maps a symbol to its fragment's reason: why we differ from an advice."""
    values = parse_dotconfig(ours)
    theirs = {finding.option: finding.ok for finding in debian_findings}
    facts: dict[str, Any] = {
        "release": release,
        "checker": checker,
        "score": score(findings),
        "symbols": count_values(values),
        "failed": [
            {
                "option": f.option, "wanted": f.wanted, "result": f.result, "authority": f.authority, "topic": f.reason,
                "our_reason": reasons.get(f.option, ""), "debian_ok": theirs.get(f.option),
            }
            for f in findings
            if not f.ok
        ],
    }  # fmt: skip
    if debian:
        other = parse_dotconfig(debian)
        facts["debian"] = {
            "name": debian_name,
            "score": score(debian_findings),
            "symbols": count_values(other),
            "different": len(compare(values, other)),
        }
    return facts


def audit_lines(facts: Mapping[str, Any]) -> list[str]:
    """The same for reading."""

    def row(name: str, part: Mapping[str, Any]) -> str:
        marks, symbols = part["score"], part["symbols"]
        return f"{name:<40} {marks['ok']:>4} ok {marks['fail']:>4} fail   =y {symbols['y']:>5}  =m {symbols['m']:>5}"

    lines = [f"{facts['checker']}", row(facts["release"], facts)]
    if debian := facts.get("debian"):
        lines.append(row(debian["name"], debian))
        worse = [item["option"] for item in facts["failed"] if item["debian_ok"]]
        lines.append(f"fails here, but not in Debian's: {', '.join(worse) or 'nothing'}")
    lines.append("")
    for item in facts["failed"]:
        lines.append(f"{item['option']:<36} wants {item['wanted']:<12} {item['result']}  [{item['authority']}]")
        if item["our_reason"]:
            lines.append(f"    here: {item['our_reason']}")
    return lines
