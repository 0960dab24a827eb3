"""What a worker does for operations on volumes and images. The same rules as for instances (``actions``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recvirt.nestedcloud.model import (
    Command,
    DiskSpec,
    Fault,
    ImageSpec,
    InstanceSpec,
    Kind,
    ModelError,
    Power,
    VolumeSpec,
    check_name,
    check_uuid,
    encode,
)
from recvirt.nestedcloud.worker.errors import ActionError, UnreachableError
from recvirt.nestedcloud.worker.site import Action, Facts, Site
from recvirt.nestedcloud.worker.volumes import guest_has_to

#: How long a guest may take to let go of a disk.
UNPLUG_SECONDS = 30.0
_AT_REST = (Power.STOPPED, Power.CRASHED)


def _instance(command: Command) -> InstanceSpec:
    if command.instance is None:
        raise ActionError(Fault.INVALID, f"{command.kind} without an instance")
    return command.instance


def _volume(command: Command) -> VolumeSpec:
    if command.volume is None:
        raise ActionError(Fault.INVALID, f"{command.kind} without a volume")
    return command.volume


def _image(command: Command) -> ImageSpec:
    if command.image is None:
        raise ActionError(Fault.INVALID, f"{command.kind} without an image")
    return command.image


def _disk(command: Command) -> DiskSpec:
    """The volume as a disk of its instance."""
    volume = _volume(command)
    return DiskSpec(volume.uuid, volume.size_bytes, volume.format, slot=int(command.args.get("slot", 0)))


def _domain(site: Site, spec: InstanceSpec) -> Any:
    domain = site.hypervisor.get(spec.uuid)
    if site.hypervisor.generation(domain) > spec.generation:
        raise ActionError(Fault.CONFLICT, f"{spec.name} has been changed since this was asked for")
    return domain


def _facts(site: Site, domain: Any, **more: Any) -> Facts:
    return {"domain": encode(site.hypervisor.facts(domain)), **more}


def _is_live(site: Site, domain: Any) -> bool:
    """Whether there is a guest to be told. libvirt's test driver has none, and no hot-plug."""
    return site.hypervisor.host.domain_type != "test" and site.hypervisor.power(domain) not in _AT_REST


def _settle(site: Site, domain: Any, spec: InstanceSpec, operation: str) -> None:
    """What will be started next has these volumes, and the running one knows which state it was given."""
    site.hypervisor.define(spec, operation)
    site.hypervisor.note(domain, spec, operation)


def volume_allocate(site: Site, command: Command) -> Facts:
    """The file, with a file system in it."""
    volume = _volume(command)
    site.progress(10, f"making {volume.filesystem} in {volume.size_bytes} bytes")
    site.volumes.make(volume, command.operation)
    return {"size_bytes": site.volumes.size(volume)}


def volume_resize(site: Site, command: Command) -> Facts:
    """Larger: as its guest runs, or with its file system while nobody uses it."""
    volume = _volume(command)
    if command.instance is None:
        how = site.volumes.grow(volume, command.operation)
        return {"size_bytes": site.volumes.size(volume), "how": how}
    domain = _domain(site, command.instance)
    if _is_live(site, domain):
        site.volumes.check_fresh(volume)
        if site.volumes.size(volume) > volume.size_bytes:
            raise ActionError(Fault.NOT_SUPPORTED, "a volume can't be made smaller")
        site.hypervisor.resize_disk(domain, _disk(command))
        site.volumes.note(volume, command.operation)
        how = f"as it runs; {guest_has_to(volume.filesystem)}".removesuffix("; ")
    else:
        how = site.volumes.grow(volume, command.operation)
    return _facts(site, domain, size_bytes=site.volumes.size(volume), how=how)


def _snapshot_name(command: Command) -> str:
    try:
        return check_name(str(command.args.get("snapshot", "")))
    except ModelError as error:
        raise ActionError(Fault.INVALID, str(error)) from None


def _of_one_at_rest(site: Site, command: Command) -> Facts:
    """The facts of the volume's instance, which has to be off: a guest at work changes what is being copied."""
    if command.instance is None:
        return {}
    domain = _domain(site, command.instance)
    if site.hypervisor.power(domain) not in _AT_REST:
        raise ActionError(Fault.CONFLICT, f"{command.instance.name} runs: stop it or detach the volume first")
    return _facts(site, domain)


def volume_snapshot(site: Site, command: Command) -> Facts:
    """Keep what is in it."""
    facts = _of_one_at_rest(site, command)
    site.volumes.snapshot(_volume(command), _snapshot_name(command), command.operation)
    return facts


def volume_revert(site: Site, command: Command) -> Facts:
    """Back to what was kept, and to the size of that time."""
    facts = _of_one_at_rest(site, command)
    site.volumes.revert(_volume(command), _snapshot_name(command), command.operation)
    return {**facts, "size_bytes": site.volumes.size(_volume(command))}


def volume_snapshot_remove(site: Site, command: Command) -> Facts:
    """Forget what was kept."""
    facts = _of_one_at_rest(site, command)
    site.volumes.remove_snapshot(_volume(command), _snapshot_name(command), command.operation)
    return facts


def volume_remove(site: Site, command: Command) -> Facts:
    """The file and what was kept of it."""
    site.volumes.remove(_volume(command))
    return {}


def attach(site: Site, command: Command) -> Facts:
    """Into the guest if it runs, and into what is started next. What can't be done whole is taken back."""
    spec, volume = _instance(command), _volume(command)
    try:
        domain = _domain(site, spec)
        site.volumes.size(volume)
    except UnreachableError:
        # Nothing is known then; an earlier attempt may have plugged it.
        raise
    except ActionError as error:
        raise ActionError(error.fault, error.message, {"attached": False}) from None
    live = _is_live(site, domain)
    try:
        if live:
            site.progress(30, "telling the guest")
            site.hypervisor.plug(domain, _disk(command))
        _settle(site, domain, spec, command.operation)
    except UnreachableError:
        raise
    except ActionError as error:
        # Only when the guest surely has nothing of it is the volume free again.
        gone = not live or not site.hypervisor.is_plugged(domain, _disk(command))
        raise ActionError(error.fault, error.message, {"attached": False} if gone else {}) from None
    return _facts(site, domain, attached=True, how="as it runs" if live else "")


def detach(site: Site, command: Command) -> Facts:
    """Out of the guest, which has to let go of it, and out of what is started next."""
    spec = _instance(command)
    domain = site.hypervisor.find(spec.uuid)
    if domain is None:
        return {"attached": False, "domain": None}
    domain = _domain(site, spec)
    live = _is_live(site, domain)
    if live:
        site.progress(30, "waiting for the guest to let go")
        site.hypervisor.unplug(domain, _disk(command), UNPLUG_SECONDS)
    _settle(site, domain, spec, command.operation)
    return _facts(site, domain, attached=False, how="as it runs" if live else "")


def image_import(site: Site, command: Command) -> Facts:
    """Fetched, looked at, written anew."""
    return site.images.bring_in(_image(command), site.progress)


def image_remove(site: Site, command: Command) -> Facts:
    """The file and what is known of it."""
    site.images.remove(_image(command).uuid)
    return {}


def export(site: Site, command: Command) -> Facts:
    """A root disk into the catalogue."""
    spec = _instance(command)
    domain = _domain(site, spec)
    if site.hypervisor.power(domain) not in (*_AT_REST, Power.SUSPENDED):
        raise ActionError(Fault.CONFLICT, f"{spec.name} runs: stop or suspend it first")
    site.progress(10, "copying the root disk")
    return _facts(site, domain, **site.images.export(spec, _image(command)))


def clone(site: Site, command: Command) -> Facts:
    """A new instance, off, with a copy of another one's root disk and first-boot data of its own."""
    spec = _instance(command)
    source = check_uuid(str(command.args.get("source", "")))
    original = site.hypervisor.get(source)
    if site.hypervisor.power(original) not in _AT_REST:
        raise ActionError(Fault.CONFLICT, "the instance to be cloned runs: stop it first")
    site.progress(10, "copying the root disk")
    site.images.clone(source, spec)
    site.storage.ensure_seed(spec)
    site.progress(80, "defining the domain")
    domain = site.hypervisor.find(spec.uuid)
    if domain is None:
        domain = site.hypervisor.define(spec, command.operation)
    return _facts(site, domain)


STORAGE_ACTIONS: Mapping[Kind, Action] = {
    Kind.VOLUME_ALLOCATE: volume_allocate, Kind.VOLUME_RESIZE: volume_resize, Kind.VOLUME_SNAPSHOT: volume_snapshot,
    Kind.VOLUME_REVERT: volume_revert, Kind.VOLUME_SNAPSHOT_REMOVE: volume_snapshot_remove,
    Kind.VOLUME_REMOVE: volume_remove, Kind.ATTACH: attach, Kind.DETACH: detach, Kind.IMAGE_IMPORT: image_import,
    Kind.IMAGE_REMOVE: image_remove, Kind.EXPORT: export, Kind.CLONE: clone,
}  # fmt: skip
