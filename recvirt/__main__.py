"""``python -m recvirt``."""

from recvirt.cli import main

main()
