"""Takes an accepted image to clouds, registries and mirrors, and hands back what starts it with nesting on.

Owns: plans, transfers, receipts, launch recipes, pruning. Does not own: how an image is built or proved.
"""
