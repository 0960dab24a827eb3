"""Writes a run's findings: report.json for scripts, junit.xml for CI, report.html for people (one file, no network)."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recvirt.accept.registry import SCENES
from recvirt.accept.results import CheckResult, Report
from recvirt.data import data_path
from recvirt.ui import format_bytes, format_seconds

#: Characters that XML 1.0 can't hold, not even escaped (section 2.2).
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
#: What a run leaves: for scripts, for CI, for people.
REPORTS = ("report.json", "junit.xml", "report.html")
_CONSOLE_BYTES_MAX = 400_000


def junit_xml(report: Report) -> str:
    """JUnit's XML as CI systems read it: a test suite a scene; ``not-run`` is an error, a failed check a failure."""
    totals = {"name": "recvirt acceptance", **_totals(report.results), "time": f"{report.seconds:.2f}"}
    root = ET.Element("testsuites", totals)
    for scene in SCENES:
        results = [result for result in report.results if result.scene == scene]
        if not results:
            continue
        seconds = sum(result.seconds for result in results)
        facts = {"name": f"{report.profile}.{scene}", "time": f"{seconds:.2f}", "timestamp": report.started}
        suite = ET.SubElement(root, "testsuite", {**facts, **_totals(results)})
        for result in results:
            _case(suite, report.profile, result)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _totals(results: list[CheckResult] | tuple[CheckResult, ...]) -> dict[str, str]:
    def count(outcome: str) -> str:
        return str(sum(result.outcome == outcome for result in results))

    counts = {"failures": count("failed"), "errors": count("not-run"), "skipped": count("skipped")}
    return {"tests": str(len(results)), **counts}


def _case(suite: ET.Element, profile: str, result: CheckResult) -> None:
    case = ET.SubElement(
        suite, "testcase", classname=f"{profile}.{result.scene}", name=result.name, time=f"{result.seconds:.2f}"
    )
    detail = _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", result.detail)
    tag = {"failed": "failure", "not-run": "error", "skipped": "skipped"}.get(result.outcome)
    if tag is None:
        ET.SubElement(case, "system-out").text = f"{result.title}: {detail}"
        return
    node = ET.SubElement(case, tag, message=detail.splitlines()[0][:200] if detail else result.title)
    if tag != "skipped":
        node.set("type", result.outcome)
        node.text = detail


def html_page(report: Report) -> str:
    """The report as one page: what was tested, every check, the console logs folded away."""
    loader = FileSystemLoader(data_path("templates", "report"))
    env = Environment(loader=loader, undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters["seconds"] = format_seconds
    env.filters["bytes"] = format_bytes
    scenes = [
        (scene, text, [result for result in report.results if result.scene == scene])
        for scene, text in SCENES.items()
        if any(result.scene == scene for result in report.results)
    ]
    consoles = {name: text[-_CONSOLE_BYTES_MAX:] for name, text in sorted(report.consoles.items())}
    values: dict[str, Any] = {
        "report": report, "scenes": scenes, "consoles": consoles,
        "measures": {name: _measure(value) for name, value in sorted(report.measures.items())},
    }  # fmt: skip
    return env.get_template("report.html.j2").render(values)


def _measure(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def write_reports(report: Report, folder: Path) -> tuple[Path, Path, Path]:
    """Write all three into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for_scripts, for_ci, for_people = (folder / name for name in REPORTS)
    paths = for_scripts, for_ci, for_people
    texts = json.dumps(report.as_json(), indent=1, sort_keys=True) + "\n", junit_xml(report), html_page(report)
    for path, text in zip(paths, texts, strict=True):
        partial = path.with_name(f".{path.name}.part")
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    return paths
