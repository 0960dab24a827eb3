"""The checks: each a function with a name, joined to the boot (the *scene*) in which it runs.

A check returns a sentence for the report, raises :class:`Failed` with what is wrong, or :class:`Skipped` with why it
does not apply. Modules in ``checks/`` register theirs at import; the order of registration is the order of running.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recvirt.errors import ConfigError

if TYPE_CHECKING:
    from recvirt.accept.context import Acceptance

#: Scenes in the order in which they start. Those of the last row only run when they are asked for.
SCENES = {
    "image": "the image file, without a boot",
    "first": "first boot, BIOS, on a larger disk, with NoCloud data and an NFS server",
    "reboot": "the same machine after a reboot",
    "second": "a second copy, UEFI, with a config drive and its NFS servers away",
    "powercut": "a third copy, whose power is cut several times during the first boot",
    "cloud": "the Nested Cloud, where the profile has it: instances under KVM, by its own commands",
    "pair": "first and second copy, compared",
    "deep": "an L2 that is the image itself, and an L3 in it",
    "kernels": "a login on the serial console; kernels that come, fail and go; the rescue shell",
    "workers": "a machine of another image, which joins the cloud as a worker",
    "upgrade": "an older disk of the Nested Cloud, whose packages become this build's",
    "matrix": "a boot for each disk controller and network card",
    "vmx": "the kernel on an emulated Intel processor (Bochs)",
}
OPTIONAL_SCENES = ("cloud", "deep", "kernels", "workers", "upgrade", "matrix", "vmx")
#: A scene that is a later part of another one's boot, or needs several.
NEEDS = {"reboot": ("first",), "pair": ("first", "second")}

_MODULES = (
    "image",
    "system",
    "promises",
    "cloud",
    "security",
    "logs",
    "storage",
    "virtual",
    "lifecycle",
    "kernels",
    "nestedcloud",
    "workers",
    "upgrade",
    "deeper",
    "matrix",
    "vmx",
)


@dataclass(frozen=True)
class Check:
    """One promise. ``function`` gets the guest; in a scene without one, the run's context."""

    name: str
    scene: str
    title: str
    function: Callable[..., str]

    def call(self, acceptance: Acceptance, guest: Any) -> str:
        """Run it; some scenes have no guest."""
        return self.function(acceptance if guest is None else guest)


_checks: dict[str, Check] = {}


def check(name: str, scene: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register the decorated function as a check; the first line of its docstring is the title."""

    def register(function: Callable[..., str]) -> Callable[..., str]:
        if name in _checks:
            raise ValueError(f"two checks are called {name}")
        if scene not in SCENES:
            raise ValueError(f"{name}: there is no scene {scene}")
        title = (function.__doc__ or name).strip().splitlines()[0].rstrip(".")
        _checks[name] = Check(name, scene, title, function)
        return function

    return register


def all_checks() -> tuple[Check, ...]:
    """Every check, by scene, in the order in which they run."""
    for module in _MODULES:
        importlib.import_module(f"recvirt.accept.checks.{module}")
    order = list(SCENES)
    return tuple(sorted(_checks.values(), key=lambda item: order.index(item.scene)))


def select(names: Iterable[str], scenes: Iterable[str]) -> tuple[Check, ...]:
    """The checks called ``names``; without any, all of the ordinary scenes and of the optional ``scenes``.

    Raises ConfigError for a name that no check has.
    """
    every = all_checks()
    wanted = list(names)
    unknown = sorted(set(wanted) - {item.name for item in every})
    if unknown:
        raise ConfigError(f"there is no check called {', '.join(unknown)}", hint="recvirt test --list shows the names")
    if wanted:
        return tuple(item for item in every if item.name in wanted)
    allowed = [scene for scene in SCENES if scene not in OPTIONAL_SCENES or scene in scenes]
    return tuple(item for item in every if item.scene in allowed)


def scenes_of(checks: Iterable[Check]) -> set[str]:
    """The scenes that have to be played for ``checks``."""
    found = {item.scene for item in checks}
    for scene in tuple(found):
        found.update(NEEDS.get(scene, ()))
    return found
