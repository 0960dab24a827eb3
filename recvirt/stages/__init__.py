"""The stages: each turns frozen inputs into files. Stages never import each other, the store or the clouds."""
