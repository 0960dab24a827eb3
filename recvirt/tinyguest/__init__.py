"""The tiny guest that comes with the Nested Cloud: what is on its disk, so that a first launch needs no network.

A kernel that a profile builds, busybox, an SSH server and the few programs that let a root file system grow, all of it
from Debian packages. The files of its own lie in ``resources/guest``. Does not own: the order of the work
(``stages/guest_image.py``), partitions and boot code (:mod:`recvirt.disk`).
"""
