"""``python -m recvirt.nestedcloud``."""

from recvirt.nestedcloud.cli import main

main()
