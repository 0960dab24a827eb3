"""SQLite for trying the cloud on one machine, with writers that queue up (a database backend for Django)."""
