"""Django's SQLite backend with transactions that take the write lock when they begin.

By default SQLite takes it at the first write; two transactions that have read and now both want to write can't wait for
each other, so one fails at once (SQLite's "Transactions", BEGIN IMMEDIATE). Django 5.1 has an option for it, 4.2 not.
"""

from __future__ import annotations

from django.db.backends.sqlite3 import base


class DatabaseWrapper(base.DatabaseWrapper):
    """BEGIN IMMEDIATE, and a write-ahead log, so that readers are not held up."""

    def _start_transaction_under_autocommit(self) -> None:
        self.cursor().execute("BEGIN IMMEDIATE")

    def init_connection_state(self) -> None:
        """Once for each connection."""
        super().init_connection_state()
        with self.cursor() as cursor:
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = FULL")
