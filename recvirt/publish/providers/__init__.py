"""The providers, a module each. Libraries of theirs are imported when they are used."""
