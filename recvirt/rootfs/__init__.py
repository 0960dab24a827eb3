"""Pure helpers of the root stage: package lists, checks, templates, scripts, overlays, a pinned local repository."""
