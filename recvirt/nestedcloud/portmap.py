"""Ports of this host that lead to instances: what a worker wishes for becomes nftables' rules. Runs as root, and does
not trust the worker.

Owns the table ``ip recvirt_forwards``, and one rule that lets its connections pass libvirt's, which turn away whatever
begins outside of a network: a packet that one table accepts is still seen by the others. Both of libvirt's backends
only ever insert behind the jumps of their own base chain, so a rule before those jumps stays the first one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

from recvirt.nestedcloud.addresses import AppliedForwards, AppliedState, ForwardSpec, WantedForwards
from recvirt.nestedcloud.codec import ModelError, decode, encode

TABLE = "recvirt_forwards"
#: On every connection that was forwarded; no number that anybody else is likely to choose.
MARK = 0x72766677
#: Where the worker writes, below its run folder, and where it reads what became of it.
FOLDER_NAME = "forwards"
RUN_DIR = Path("/run/recvirt-worker")
APPLIED_PATH = Path("/run/recvirt-forwards/applied.json")
#: More than a thousand forwards of one instance; and of all.
_FILE_BYTES_MAX = 256 * 1024
_ALL_BYTES_MAX = 64 * 1024**2
_FILES_MAX = 10_000
_NAME = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.json")
_PROGRAM_SECONDS = 60
_COMMENT = "recvirt-forwards"
#: A worker that changes its mind faster than rules are loaded is not followed for ever.
_ROUNDS_MAX = 20

#: argv and stdin -> status, stdout, stderr.
Run = Callable[[Sequence[str], str], tuple[int, str, str]]


class PortmapError(Exception):
    """The rules could not be loaded; what was in effect still is."""


def run_program(argv: Sequence[str], text: str) -> tuple[int, str, str]:
    """Run a program. A status of 127 when it is not there."""
    try:
        done = subprocess.run(
            list(argv), input=text, capture_output=True, text=True, timeout=_PROGRAM_SECONDS, check=False
        )
    except FileNotFoundError:
        return 127, "", f"{argv[0]} is not installed"
    except subprocess.TimeoutExpired:
        return 124, "", f"{argv[0]} did not end in {_PROGRAM_SECONDS} s"
    return done.returncode, done.stdout, done.stderr


@dataclass(frozen=True)
class Wish:
    """A file of the worker's: whose, its digest, and what is in it, or what is wrong with it."""

    sha256: str
    wanted: WantedForwards | None
    fault: str = ""


def read_wishes(run_dir: Path) -> dict[str, Wish]:
    """What the worker wants, by instance. Links, large files and strange names are not followed, read or taken."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        above = os.open(run_dir, flags)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise PortmapError(f"{run_dir}: {error.strerror}") from None
    try:
        try:
            folder = os.open(FOLDER_NAME, flags, dir_fd=above)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise PortmapError(f"{run_dir / FOLDER_NAME}: {error.strerror}") from None
        try:
            # By the descriptor: what the name leads to may have changed.
            names = sorted(name for name in os.listdir(folder) if _NAME.fullmatch(name))  # noqa: PTH208
            if len(names) > _FILES_MAX:
                raise PortmapError(f"{run_dir / FOLDER_NAME} has more than {_FILES_MAX} files")
            found, left = {}, _ALL_BYTES_MAX
            for name in names:
                found[name.removesuffix(".json")], size = _read_wish(folder, name, min(left, _FILE_BYTES_MAX))
                left -= size
        finally:
            os.close(folder)
    finally:
        os.close(above)
    return {instance: wish for instance, wish in found.items() if wish is not None}


def _read_wish(folder: int, name: str, bytes_max: int) -> tuple[Wish | None, int]:
    """One file, and its size; None when it has just gone."""
    try:
        # Not waited for, should it be a pipe.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None, 0
    except OSError as error:
        return Wish("", None, f"{name}: {error.strerror}"), 0
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return Wish("", None, f"{name} is no plain file"), 0
        data = stream.read(bytes_max + 1)
    if len(data) > bytes_max:
        return Wish(hashlib.sha256(data).hexdigest(), None, f"{name} is too large"), bytes_max
    return _parse_wish(name, data), len(data)


def _parse_wish(name: str, data: bytes) -> Wish:
    digest = hashlib.sha256(data).hexdigest()
    try:
        wanted = decode(WantedForwards, json.loads(data))
    except (ModelError, ValueError, RecursionError) as error:
        return Wish(digest, None, f"{name}: {error}")
    if f"{wanted.instance}.json" != name:
        return Wish(digest, None, f"{name} speaks of {wanted.instance}")
    return Wish(digest, wanted)


def subnets(run: Run) -> dict[str, IPv4Interface]:
    """The bridges of our networks on this host, each with its own address."""
    status, text, said = run(["ip", "-json", "-4", "address", "show", "type", "bridge"], "")
    if status != 0:
        raise PortmapError(f"ip: {said.strip()}")
    found = {}
    for link in json.loads(text or "[]"):
        for address in link.get("addr_info", ()):
            if re.fullmatch(r"rv[0-9a-f]{8}", link.get("ifname", "")):
                found[link["ifname"]] = IPv4Interface(f"{address['local']}/{address['prefixlen']}")
    return found


def fault_of(forward: ForwardSpec, bridges: Mapping[str, IPv4Interface]) -> str:
    """Why a forward can't be; nothing when it can."""
    own = bridges.get(f"rv{forward.network[:8]}")
    port = f"port {forward.host_port}/{forward.protocol}"
    if own is None:
        return f"{port}: the network of {forward.address} is not there"
    address = IPv4Address(forward.address)
    if address not in own.network or address in (own.ip, own.network.network_address, own.network.broadcast_address):
        return f"{port}: {forward.address} is no guest's address in {own.network}"
    return ""


def ruleset(forwards: Sequence[ForwardSpec], bridges: Mapping[str, IPv4Interface]) -> str:
    """The whole table, in one transaction: the old one is in effect until the new one is. Everything was checked."""
    wanted, standing = [], []
    for forward in forwards:
        source, port = forward.source, f"{forward.protocol} dport {forward.host_port}"
        target = f"{forward.address}:{forward.guest_port}"
        wanted.append(f"{f'ip saddr {source} ' if source else ''}{port} ct mark set {MARK:#x} dnat to {target}")
        began = f"{f'ct original ip saddr {source} ' if source else ''}ct original proto-dst {forward.host_port}"
        standing.append(f"meta l4proto {forward.protocol} {began} ct reply ip saddr {forward.address} return")
    # A guest that asks its own host for a neighbour would get the neighbour's answer straight, from a stranger.
    subnets = sorted({str(bridges[f"rv{forward.network[:8]}"].network) for forward in forwards})
    same = [f"ct mark {MARK:#x} ct status dnat ip saddr {net} ip daddr {net} masquerade" for net in subnets]
    chains = {
        "wanted": wanted,
        "standing": [*standing, "drop"],
        "prerouting": ["type nat hook prerouting priority dstnat; policy accept;", "fib daddr type local jump wanted"],
        # What begins on the host itself. The loopback's own addresses lead nowhere else.
        "output": [
            "type nat hook output priority -100; policy accept;",
            "ip daddr != 127.0.0.0/8 fib daddr type local jump wanted",
        ],
        # What began before its forward was removed ends with it: the address may be another guest's by now.
        "forward": [
            "type filter hook forward priority filter - 10; policy accept;",
            f"ct mark {MARK:#x} ct status dnat jump standing",
        ],
        "postrouting": ["type nat hook postrouting priority srcnat - 10; policy accept;", *same],
    }
    lines = [f"add table ip {TABLE}", f"delete table ip {TABLE}", f"table ip {TABLE} {{"]
    for name, words in chains.items():
        lines += [f"\tchain {name} {{", *(f"\t\t{word}" for word in words), "\t}"]
    return "\n".join([*lines, "}", ""])


def let_pass(run: Run) -> list[str]:
    """Put our rule before libvirt's, whichever backend it has; which ones were found."""
    found = []
    status, text, _ = run(["nft", "-json", "-a", "list", "chain", "ip", "libvirt_network", "forward"], "")
    if status == 0:
        found.append("nftables")
        rules = [item["rule"] for item in json.loads(text)["nftables"] if "rule" in item]
        ours = [rule["handle"] for rule in rules if rule.get("comment") == _COMMENT]
        if not rules or ours != [rules[0]["handle"]]:
            lines = [f"delete rule ip libvirt_network forward handle {handle}" for handle in ours]
            lines.append(
                f"insert rule ip libvirt_network forward ct mark {MARK:#x} ct status dnat accept comment {_COMMENT}"
            )
            _checked(run(["nft", "-f", "-"], "\n".join(lines) + "\n"), "nft")
    status, text, _ = run(["iptables", "-w", "5", "-S", "FORWARD"], "")
    if status == 0 and "-j LIBVIRT_FWI" in text:
        found.append("iptables")
        rules = [line for line in text.splitlines() if line.startswith("-A ")]
        ours = [line for line in rules if f"--comment {_COMMENT} " in line]
        if not rules or ours != [rules[0]]:
            words = ["FORWARD", "-m", "connmark", "--mark", f"{MARK:#x}", "-m", "conntrack", "--ctstate", "DNAT",
                     "-m", "comment", "--comment", _COMMENT, "-j", "ACCEPT"]  # fmt: skip
            for _ in ours:
                _checked(run(["iptables", "-w", "5", "-D", *words], ""), "iptables")
            _checked(run(["iptables", "-w", "5", "-I", *words], ""), "iptables")
    return found


def _checked(result: tuple[int, str, str], program: str) -> None:
    status, _, said = result
    if status != 0:
        raise PortmapError(f"{program}: {said.strip()[-500:] or f'status {status}'}")


def apply(run_dir: Path = RUN_DIR, applied: Path = APPLIED_PATH, run: Run = run_program) -> AppliedState:
    """Have what the worker wants, and say what became of it. PortmapError when the rules could not be loaded."""
    wishes = read_wishes(run_dir)
    for _ in range(_ROUNDS_MAX):
        state = _apply(wishes, run)
        _write(applied, state)
        # Changes that came meanwhile wake nobody up.
        again = read_wishes(run_dir)
        if again == wishes:
            break
        wishes = again
    return state


def _apply(wishes: Mapping[str, Wish], run: Run) -> AppliedState:
    bridges = subnets(run)
    taken: dict[tuple[str, int], ForwardSpec] = {}
    became: dict[str, AppliedForwards] = {}
    for instance, wish in wishes.items():
        faults = [wish.fault] if wish.fault else []
        for forward in wish.wanted.forwards if wish.wanted is not None else ():
            fault = fault_of(forward, bridges)
            if not fault and (forward.protocol, forward.host_port) in taken:
                fault = f"port {forward.host_port}/{forward.protocol} is another instance's"
            if fault:
                faults.append(fault)
            else:
                taken[forward.protocol, forward.host_port] = forward
        became[instance] = AppliedForwards(wish.sha256, "; ".join(faults)[:500])
    if taken:
        let_pass(run)
    _checked(run(["nft", "-f", "-"], ruleset(list(taken.values()), bridges)), "nft")
    return AppliedState(became)


def _write(path: Path, state: AppliedState) -> None:
    """For everybody to read; whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    text: Any = json.dumps(encode(state))
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "w") as stream:
        os.fchmod(stream.fileno(), 0o644)
        stream.write(text)
    part.rename(path)
