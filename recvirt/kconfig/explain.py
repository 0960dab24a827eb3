"""What a person may want to know of one symbol: who asked and why, on what it depends, what became of it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from recvirt.errors import ConfigError
from recvirt.kconfig.expression import M, evaluate, name_of, names_in, unmet
from recvirt.kconfig.symbols import Definition, Index


def explain(symbol: str, values: Mapping[str, str], report: Mapping[str, Any], index: Index | None) -> dict[str, Any]:
    """Everything known of ``symbol``, JSON-able. ``index`` is None where there is no source (a stock kernel).

    Raises ConfigError, with the nearest names, for a symbol that neither the kernel nor a fragment knows.
    """
    name = symbol.removeprefix("CONFIG_")
    entry = report["symbols"].get(name)
    skipped = [item for item in report["skipped"] if item["symbol"] == name]
    known = name in values or entry is not None or skipped or (index is not None and name in index)
    if not known:
        raise _unknown(name, values, index)
    return {
        "symbol": name,
        "value": values.get(name, "n"),
        "wanted": entry["wanted"] if entry else None,
        "asked_by": entry["asked_by"] if entry else [],
        "overridden": bool(entry) and entry["fragment"] == "profile",
        "loss": entry.get("loss") if entry else None,
        "not_for_this_kernel": skipped,
        "definitions": [_definition(d, values) for d in index.definitions.get(name, ())] if index else [],
        "selected_by": sorted(index.active_selectors(name, values)) if index else [],
        "could_be_selected_by": sorted({s.symbol for s in index.selectors.get(name, ())}) if index else [],
        "choice_with": index.rivals(name) if index else [],
        "kernel": report["release"],
    }


def _unknown(name: str, values: Mapping[str, str], index: Index | None) -> ConfigError:
    names = list(index.definitions) if index is not None else list(values)
    near = difflib.get_close_matches(name.upper(), names, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "names are as in Kconfig, as KVM_INTEL"
    return ConfigError(f"this kernel has no symbol {name}", hint=hint)


def _definition(definition: Definition, values: Mapping[str, str]) -> dict[str, Any]:
    depends = definition.depends
    names = list(dict.fromkeys(names_in(depends)))
    return {
        "where": f"{definition.file}:{definition.line}",
        "type": definition.type,
        "prompt": definition.prompt,
        "help": definition.help.strip(),
        "depends_on": str(depends) if depends is not None else "",
        "depends_value": name_of(evaluate(depends, values)) if depends is not None else "y",
        "dependencies": {name: values.get(name, "n") for name in names},
        "unmet": [str(part) for part in unmet(depends, values, M)],
        "selects": [target for target, _ in definition.selects],
    }


def explain_lines(facts: Mapping[str, Any]) -> list[str]:
    """The same for reading."""
    lines = [f"CONFIG_{facts['symbol']}={facts['value']}   ({facts['kernel']})"]
    if facts["overridden"]:
        lines.append(f"  the profile overrides it: {facts['wanted']}")
    for request in facts["asked_by"]:
        when = f", {request['when']}" if request["when"] else ""
        lines += [f"  asked by {request['fragment']}.config:{request['line']}{when}", f"    {request['reason']}"]
    if not facts["asked_by"] and not facts["overridden"]:
        lines.append("  no fragment asks for it")
    for request in facts["not_for_this_kernel"]:
        where = f"{request['fragment']}.config:{request['line']}"
        lines.append(f"  not for this kernel: ={request['value']} in {where} ({request['when']})")
    if loss := facts["loss"]:
        allowed = f"; allowed: {loss['allowed']}" if loss["allowed"] else ""
        lines.append(f"  wanted {facts['wanted']}: {loss['kind']}: {loss['detail']}{allowed}")
    if facts["selected_by"]:
        lines.append(f"  selected by {', '.join(facts['selected_by'])}")
    if facts["choice_with"]:
        lines.append(f"  one of a choice, with {', '.join(facts['choice_with'])}")
    for definition in facts["definitions"]:
        lines += _definition_lines(definition)
    return lines


def _definition_lines(definition: Mapping[str, Any]) -> list[str]:
    lines = [f'  {definition["type"] or "symbol"} "{definition["prompt"]}", {definition["where"]}']
    if not definition["prompt"]:
        lines[0] = f"  {definition['type'] or 'symbol'} without a prompt (only others set it), {definition['where']}"
    if definition["depends_on"]:
        lines.append(f"    depends on {definition['depends_on']}  [{definition['depends_value']}]")
    if definition["unmet"]:
        lines.append(f"    not met: {'; '.join(definition['unmet'])}")
    if definition["selects"]:
        lines.append(f"    selects {', '.join(definition['selects'])}")
    lines += [f"    | {line}" for line in definition["help"].splitlines()[:12]]
    return lines
