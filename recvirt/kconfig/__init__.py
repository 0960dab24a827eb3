"""Kernel configuration: fragments, their merge, resolution by the tree's own tool, and where kernel sources come from.

Knows nothing of profiles, stages or the cache's layout; the two kernel stages and ``recvirt kernel`` stand on it.
"""
