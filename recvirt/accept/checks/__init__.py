"""The checks, by what they look at. Importing a module registers its checks."""
