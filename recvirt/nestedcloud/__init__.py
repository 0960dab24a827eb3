"""The cloud inside the image: a central node, its workers, and the commands of both.

Never imports the builder, and the builder never imports it: it goes into an image as a package of its own.
"""
