"""What a worker does for each kind of operation: look at what is there, do what is missing, report what is then there.

Each action may be killed after any call and run again from its start, in full, by another process: that is how an
operation goes on after a crash. Owns the order of the steps. Does not own: libvirt (``hypervisor``) or files
(``storage``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recvirt.nestedcloud.model import (
    Command,
    Fault,
    InstanceSpec,
    Kind,
    ModelError,
    NetworkSpec,
    Power,
    check_name,
    decode,
    encode,
)
from recvirt.nestedcloud.worker.domain import shares
from recvirt.nestedcloud.worker.errors import ActionError
from recvirt.nestedcloud.worker.site import Action, Facts, Site
from recvirt.nestedcloud.worker.storage_actions import STORAGE_ACTIONS

#: How long a guest may take to power off before its power is taken away.
GRACEFUL_SECONDS = 60.0


def _instance(command: Command) -> InstanceSpec:
    if command.instance is None:
        raise ActionError(Fault.INVALID, f"{command.kind} without an instance")
    return command.instance


def _is_stale(site: Site, domain: Any, spec: InstanceSpec) -> bool:
    return site.hypervisor.generation(domain) > spec.generation


def _check_fresh(site: Site, domain: Any, spec: InstanceSpec) -> None:
    if _is_stale(site, domain, spec):
        raise ActionError(Fault.CONFLICT, f"{spec.name} has been changed since this was asked for")


def _facts(site: Site, domain: Any, **more: Any) -> Facts:
    return {"domain": encode(site.hypervisor.facts(domain)), **more}


def launch(site: Site, command: Command) -> Facts:
    """Networks, disks, first-boot data, domain, power on."""
    spec = _instance(command)
    _ensure(site, command, spec)
    domain = site.hypervisor.find(spec.uuid)
    if domain is None or site.hypervisor.generation(domain) < spec.generation:
        site.progress(70, "defining the domain")
        domain = site.hypervisor.define(spec, command.operation)
    _check_fresh(site, domain, spec)
    site.progress(85, "powering on")
    site.hypervisor.start(domain)
    # A guest runs without them too; what is wrong is told.
    forwards = site.forwarding.ensure(spec, command.operation)
    return _facts(site, domain, **({"forwards": forwards} if forwards is not None else {}))


def _ensure_networks(site: Site, command: Command, spec: InstanceSpec) -> None:
    for number, data in enumerate(command.args.get("networks", ())):
        network = decode(NetworkSpec, data)
        site.progress(10 + number, f"network {network.name}")
        site.hypervisor.networks.ensure(network, spec)


def _ensure(site: Site, command: Command, spec: InstanceSpec) -> None:
    _ensure_networks(site, command, spec)
    site.progress(30, "copying the image")
    site.storage.ensure_root(spec)
    site.progress(60, "writing first-boot data")
    site.storage.ensure_seed(spec)


def start(site: Site, command: Command) -> Facts:
    """Power on; a domain that is gone, or that an older specification described, is defined first."""
    spec = _instance(command)
    domain = site.hypervisor.find(spec.uuid)
    if domain is None or site.hypervisor.power(domain) in (Power.STOPPED, Power.CRASHED):
        return launch(site, command)
    _check_fresh(site, domain, spec)
    site.hypervisor.start(domain)
    return _facts(site, domain)


def stop(site: Site, command: Command) -> Facts:
    """Graceful, then hard."""
    spec = _instance(command)
    domain = site.hypervisor.find(spec.uuid)
    if domain is None:
        return {"domain": None}
    _check_fresh(site, domain, spec)
    seconds = float(command.args.get("graceful_seconds", GRACEFUL_SECONDS))
    graceful = site.hypervisor.stop(domain, seconds, lambda text: site.progress(20, text))
    return _facts(site, domain, graceful=graceful)


def reboot(site: Site, command: Command) -> Facts:
    """Restart the guest. Once an operation: the domain's metadata tell whether it was this one that did it."""
    spec = _instance(command)
    domain = site.hypervisor.get(spec.uuid)
    _check_fresh(site, domain, spec)
    if site.hypervisor.last_operation(domain) != command.operation:
        site.hypervisor.reboot(domain)
        site.hypervisor.note(domain, spec, command.operation)
    return _facts(site, domain)


def suspend(site: Site, command: Command) -> Facts:
    """Stop the processors; memory stays."""
    domain = site.hypervisor.get(_instance(command).uuid)
    _check_fresh(site, domain, _instance(command))
    site.hypervisor.suspend(domain)
    return _facts(site, domain)


def resume(site: Site, command: Command) -> Facts:
    """Let the processors go on."""
    domain = site.hypervisor.get(_instance(command).uuid)
    _check_fresh(site, domain, _instance(command))
    site.hypervisor.resume(domain)
    return _facts(site, domain)


def delete(site: Site, command: Command) -> Facts:
    """Power off, forget the domain, remove its files. Volumes stay: they are things of their own."""
    spec = _instance(command)
    domain = site.hypervisor.find(spec.uuid)
    if domain is not None:
        _check_fresh(site, domain, spec)
        site.hypervisor.remove(domain)
    site.forwarding.drop(spec.uuid)
    site.hypervisor.networks.let_go(spec)
    site.progress(60, "removing its disks")
    site.storage.remove_instance(spec.uuid)
    return {"domain": None}


def needs_restart(site: Site, domain: Any, spec: InstanceSpec) -> list[str]:
    """Why a running guest can't become ``spec`` as it runs; nothing when it can."""
    vcpus_max, memory_max = site.hypervisor.maxima(domain)
    facts = site.hypervisor.facts(domain)
    reasons = []
    if spec.vcpus_max != vcpus_max:
        reasons.append(f"at most {spec.vcpus_max} vCPUs instead of {vcpus_max}")
    if spec.memory_max_bytes != memory_max:
        reasons.append(f"at most {spec.memory_max_bytes} bytes of memory instead of {memory_max}")
    # Taking a processor from a guest that runs leaves libvirt and guest disagreeing when the guest refuses.
    if spec.vcpus < facts.vcpus:
        reasons.append(f"{spec.vcpus} vCPUs instead of {facts.vcpus}: a guest does not give one back as it runs")
    return reasons


def rescale(site: Site, command: Command) -> Facts:
    """Make a guest larger or smaller: as it runs where that can be, else by a restart, if that was allowed."""
    spec = _instance(command)
    domain = site.hypervisor.get(spec.uuid)
    _check_fresh(site, domain, spec)
    # Stands in the domain's metadata while it is off only for this: whoever goes on after a kill has to start it.
    restarting = f"{command.operation} restart"
    if site.hypervisor.power(domain) in (Power.STOPPED, Power.CRASHED):
        site.storage.grow(spec.root)
        if site.hypervisor.last_operation(domain) == restarting:
            return _start_rescaled(site, spec, command.operation, restarting)
        site.hypervisor.define(spec, command.operation)
        return _facts(site, domain, how="while it was off")
    reasons = needs_restart(site, domain, spec)
    if reasons:
        if not command.args.get("restart"):
            raise ActionError(Fault.RESTART_NEEDED, f"only by a restart: {'; '.join(reasons)}")
        seconds = float(command.args.get("graceful_seconds", GRACEFUL_SECONDS))
        site.hypervisor.note(domain, spec, restarting)
        site.hypervisor.stop(domain, seconds, lambda text: site.progress(20, text))
        site.storage.grow(spec.root)
        return _start_rescaled(site, spec, command.operation, restarting)
    facts = site.hypervisor.facts(domain)
    if spec.vcpus != facts.vcpus:
        site.hypervisor.set_vcpus(domain, spec.vcpus)
    if spec.memory_bytes != facts.memory_bytes:
        site.hypervisor.set_memory(domain, spec.memory_bytes)
    if site.hypervisor.host.domain_type != "test":
        site.hypervisor.set_shares(domain, shares(spec.priority, site.hypervisor.host.cgroup))
    # What is running has been changed; now what will be started next.
    site.hypervisor.define(spec, command.operation)
    site.hypervisor.note(domain, spec, command.operation)
    return _facts(site, domain, how="as it runs")


def _start_rescaled(site: Site, spec: InstanceSpec, operation: str, restarting: str) -> Facts:
    domain = site.hypervisor.define(spec, restarting)
    site.progress(80, "powering on")
    site.hypervisor.start(domain)
    site.hypervisor.note(domain, spec, operation)
    return _facts(site, domain, how="by a restart")


def _snapshot_name(command: Command) -> str:
    try:
        return check_name(str(command.args.get("snapshot", "")))
    except ModelError as error:
        raise ActionError(Fault.INVALID, str(error)) from None


def snapshot(site: Site, command: Command) -> Facts:
    """Disks, and memory if it runs, under a name."""
    domain = site.hypervisor.get(_instance(command).uuid)
    _check_fresh(site, domain, _instance(command))
    site.hypervisor.snapshot(domain, _snapshot_name(command))
    return _facts(site, domain, snapshots=site.hypervisor.snapshots(domain))


def revert(site: Site, command: Command) -> Facts:
    """Back to a snapshot."""
    spec = _instance(command)
    domain = site.hypervisor.get(spec.uuid)
    _check_fresh(site, domain, spec)
    if site.hypervisor.last_operation(domain) != command.operation:
        site.hypervisor.revert(domain, _snapshot_name(command))
        # A snapshot brings back the description of its time.
        site.hypervisor.note(domain, spec, command.operation)
    return _facts(site, domain, snapshots=site.hypervisor.snapshots(domain))


def snapshot_remove(site: Site, command: Command) -> Facts:
    """Forget a snapshot."""
    domain = site.hypervisor.get(_instance(command).uuid)
    site.hypervisor.remove_snapshot(domain, _snapshot_name(command))
    return _facts(site, domain, snapshots=site.hypervisor.snapshots(domain))


def network_ensure(site: Site, command: Command) -> Facts:
    """Have a network, running."""
    if command.network is None:
        raise ActionError(Fault.INVALID, f"{command.kind} without a network")
    site.hypervisor.networks.ensure(command.network)
    return {}


def network_remove(site: Site, command: Command) -> Facts:
    """Have it no more."""
    if command.network is None:
        raise ActionError(Fault.INVALID, f"{command.kind} without a network")
    site.hypervisor.networks.remove(command.network.uuid)
    return {}


def forward_change(site: Site, command: Command) -> Facts:
    """Forward what the instance should have, and nothing else."""
    spec = _instance(command)
    domain = site.hypervisor.find(spec.uuid)
    if domain is not None:
        _check_fresh(site, domain, spec)
    _ensure_networks(site, command, spec)
    site.progress(40, "loading rules")
    if why := site.forwarding.ensure(spec, command.operation):
        raise ActionError(Fault.HYPERVISOR, f"not forwarded: {why}", {"forwards": why})
    if domain is not None:
        site.hypervisor.note(domain, spec, command.operation)
    facts = _facts(site, domain) if domain is not None else {"domain": None}
    return {**facts, "forwards": ""}


ACTIONS: Mapping[Kind, Action] = {
    Kind.LAUNCH: launch, Kind.START: start, Kind.STOP: stop, Kind.REBOOT: reboot, Kind.SUSPEND: suspend,
    Kind.RESUME: resume, Kind.DELETE: delete, Kind.RESCALE: rescale, Kind.SNAPSHOT: snapshot, Kind.REVERT: revert,
    Kind.SNAPSHOT_REMOVE: snapshot_remove, Kind.NETWORK_ENSURE: network_ensure, Kind.NETWORK_REMOVE: network_remove,
    Kind.FORWARD_ADD: forward_change, Kind.FORWARD_REMOVE: forward_change,
    **STORAGE_ACTIONS,
}  # fmt: skip
