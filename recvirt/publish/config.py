"""``publish.yaml``: the targets that images go to, each checked whole before anything is sent.

A target is a name with keys; its provider is the name itself unless ``provider`` says another one, so that two clouds
of one kind can be told apart. Secrets have no keys here: they come from each provider's usual places.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recvirt.errors import ConfigError, Problem
from recvirt.model import Model
from recvirt.profile.check import as_tuples, fault_message
from recvirt.profile.layers import read_override, shown_path
from recvirt.profile.merge import merge
from recvirt.profile.nodes import Node, Origin, read_file
from recvirt.publish.provider import AnyProvider, TargetConfig
from recvirt.publish.signing import Signing

CONFIG_NAME = "publish.yaml"
#: Provider -> its module below ``recvirt.publish.providers``; the class is the module's ``PROVIDER``.
PROVIDERS = {
    "mirror": "mirror",
    "oci-registry": "oci",
    "libvirt": "libvirt",
    "openstack": "openstack",
    "azure": "azure",
    "aws": "aws",
    "gcp": "gcp",
    "digitalocean": "digitalocean",
    "proxmox": "proxmox",
    "oracle": "recipes:Oracle",
    "alibaba": "recipes:Alibaba",
    "hetzner": "recipes:Hetzner",
    "vmware": "recipes:VMware",
    "hyperv": "recipes:HyperV",
    "xen": "recipes:Xen",
}
_TARGET = re.compile(r"^[a-z][a-z0-9-]{0,40}$")


def provider_class(name: str) -> type[AnyProvider]:
    """The class of a provider. Imports its module, not its libraries."""
    module, _, attribute = PROVIDERS[name].partition(":")
    found: type[AnyProvider] = getattr(
        importlib.import_module(f"recvirt.publish.providers.{module}"), attribute or "PROVIDER"
    )
    return found


class Targets:
    """What a configuration says about all targets; faults are collected and told at once by :meth:`done`."""

    def __init__(self, path: Path | None, overrides: Sequence[str]) -> None:
        """``path``: unset is ``publish.yaml`` in the current folder, where there is one."""
        self.problems: list[Problem] = []
        found = path or Path(CONFIG_NAME)
        origin = Origin(shown_path(found.absolute()), 0, found.absolute().parent)
        self._root = Node({}, origin)
        if path is not None or found.exists():
            node, faults = read_file(found.absolute(), origin.file)
            self.problems += faults
            self._root = node or self._root
        for text in overrides:
            layer = read_override(text, self.problems)
            if layer is not None:
                self._root = merge(self._root, layer, None, self.problems)

    @property
    def names(self) -> list[str]:
        """The targets that are written down."""
        return [name for name in self._root.value if name != "signing"]

    def signing(self) -> Signing:
        """The section ``signing``; relative paths are relative to the file."""
        found = self._validated(Signing, "signing")
        if found is None:
            return Signing()
        folder = self._root.origin.folder
        return Signing(
            **{
                name: str(folder / Path(value).expanduser()) if value else None
                for name, value in found.model_dump().items()
            }
        )

    def load(self, target: str) -> tuple[type[AnyProvider], TargetConfig] | None:
        """The provider and checked configuration of a target, or None with :attr:`problems` longer."""
        node = self._root.value.get(target)
        said = node.value.get("provider") if node is not None and node.is_mapping else None
        name = str(said.value) if said is not None else target
        if not _TARGET.match(target) or name not in PROVIDERS:
            close = difflib.get_close_matches(name, [*PROVIDERS, *self.names], 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(PROVIDERS)}"
            self._fault(said or node or self._root, target, f"there is no provider {name!r}{hint}")
            return None
        kind = provider_class(name)
        config = self._validated(kind.config_model, target)
        return (kind, config) if isinstance(config, TargetConfig) else None

    def done(self) -> None:
        """ConfigError with every fault, if there is one."""
        if self.problems:
            raise ConfigError(
                sorted(set(self.problems)), hint="docs/publishing.md tells each provider's keys; --set TARGET.KEY=VALUE"
            )

    def _validated(self, model: type[Model], section: str) -> Model | None:
        node = self._root.value.get(section, Node({}, self._root.origin))
        if node.value is None:
            node = Node({}, node.origin)
        try:
            data = as_tuples(node.plain())
            if issubclass(model, TargetConfig) and isinstance(data, dict):
                data.setdefault("folder", str(node.origin.folder))
            return model.model_validate(data)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                self._explain(node, section, model, fault)
            return None

    def _explain(self, node: Node, section: str, model: type[Model], fault: Any) -> None:
        place = [str(part) for part in fault["loc"]]
        for part in fault["loc"]:
            in_list = node.is_list and isinstance(part, int) and part < len(node.value)
            if in_list or (node.is_mapping and part in node.value):
                node = node.value[part]
        if fault["type"] == "extra_forbidden":
            close = difflib.get_close_matches(place[-1], list(model.model_fields), 1)
            message = "unknown key" + (f"; did you mean {close[0]!r}?" if close else "")
        else:
            message = fault_message(fault["type"], fault["msg"], fault.get("ctx", {}), fault["input"])
        self._fault(node, ".".join([section, *place]), message)

    def _fault(self, node: Node, path: str, message: str) -> None:
        self.problems.append(Problem(node.origin.file, node.origin.line, path, message))
