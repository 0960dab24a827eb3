"""Brings the database to this version's tables: all the way, or not at all.

Django commits each migration by itself, so that a failure leaves a database of no version. Here all that is pending is
one transaction. Owns that, and the refusal of a database that a newer version has written.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.core.management import call_command
from django.db import DEFAULT_DB_ALIAS, DatabaseError, InterfaceError, OperationalError, connections, transaction
from django.db.migrations.executor import MigrationExecutor

#: Somebody's forgotten session may hold a table; services of ours hold it for moments.
_LOCK_SECONDS = 60


class UpgradeError(Exception):
    """It can't be done, and the tables are as they were."""


class UnreachableError(Exception):
    """The database does not answer, so nothing is known about it."""


def upgrade(tell: Callable[[str], None], *, database: str = DEFAULT_DB_ALIAS) -> None:
    """Carry out every migration that is pending. Nothing pending changes nothing."""
    connection = connections[database]
    try:
        executor = MigrationExecutor(connection)
    except (OperationalError, InterfaceError) as error:
        raise UnreachableError(f"the database does not answer: {_line(error)}") from None
    loader = executor.loader
    if unknown := sorted(set(loader.applied_migrations) - set(loader.disk_migrations)):
        names = ", ".join(f"{app}.{name}" for app, name in unknown)
        raise UpgradeError(f"a newer version has written this database ({names})")
    pending = executor.migration_plan(loader.graph.leaf_nodes())
    if not pending:
        tell("the database is of this version")
        return
    said = io.StringIO()
    try:
        with _all_or_nothing(connection):
            call_command("migrate", database=database, verbosity=1, interactive=False, no_color=True, stdout=said)
    except Exception as error:
        # A migration runs what it likes; whatever it was, nothing of it stays.
        begun = re.findall(r"Applying (\S+?)\.\.\.", said.getvalue())
        where = f"{begun[-1]}: " if begun else ""
        raise UpgradeError(f"{where}{_line(error)}") from error
    tell(f"the database is now of this version: {', '.join(migration.name for migration, _ in pending[-3:])}")


@contextmanager
def _all_or_nothing(connection: Any) -> Iterator[None]:
    if connection.vendor == "sqlite":
        # Tables are made anew there; references to the old ones are looked at afterwards (by Django's schema editor).
        connection.disable_constraint_checking()
    try:
        with transaction.atomic(using=connection.alias):
            if connection.vendor == "postgresql":
                with connection.cursor() as cursor:
                    cursor.execute(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
                    # A table can't be altered while a check of its rows is still to come.
                    cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
            yield
    finally:
        if connection.vendor == "sqlite":
            connection.enable_constraint_checking()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, DatabaseError) and text else f"{type(error).__name__}: {text}"
