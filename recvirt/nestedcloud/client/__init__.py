"""The command line, and the small HTTP client below it."""
