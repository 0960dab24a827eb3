"""The programs of the tools root that decide about a kernel's bytes, for cache keys."""

from __future__ import annotations

import re

from recvirt.errors import StageError
from recvirt.sandbox import ToolsRoot

_GCC = re.compile(r"^gcc-(\d+)$")
#: What reads Kconfig files.
_CONFIG_TOOLS = ("make", "flex", "bison")
#: What compiles, links, compresses and packs besides.
_BUILD_TOOLS = ("bc", "kmod", "zstd", "libelf-dev", "libssl-dev", "pahole", "dpkg", "dwarves")


def compiler(tools: ToolsRoot) -> str:
    """``gcc-14=14.2.0-19``: the newest versioned compiler package, which the ``gcc`` command is."""
    found = [(int(match[1]), name) for name in tools.versions if (match := _GCC.match(name))]
    if not found:
        raise StageError("the tools root has no compiler", hint="recvirt clean --tools, then build again")
    name = max(found)[1]
    return f"{name}={tools.versions[name]}"


def config_tools(tools: ToolsRoot) -> tuple[str, ...]:
    """Versions that a resolved configuration depends on (it records the compiler's and linker's)."""
    return (compiler(tools), *tools.version_of("binutils", *_CONFIG_TOOLS))


def build_tools(tools: ToolsRoot) -> tuple[str, ...]:
    """Versions that a built kernel depends on."""
    return (*config_tools(tools), *tools.version_of(*_BUILD_TOOLS))
