"""The central node: what people ask for, what was promised, and which worker is told to do it."""
