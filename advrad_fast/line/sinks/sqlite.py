"""Results in an SQLite database."""

from __future__ import annotations

import os
import sqlite3
import threading

from advrad_fast import checks
from advrad_fast.errors import SinkError
from advrad_fast.line.results import ROW_KEYS, StreamInspection, Value

VERSION = 2  #: of the table, in the database's user_version; 1, without the columns of drift, is changed into it when opened

_TYPES = {"sequence": "INTEGER NOT NULL", "dropped": "INTEGER NOT NULL"}
_TYPES |= dict.fromkeys(("run", "source", "captured_at", "outcome", "backend"), "TEXT NOT NULL")
_TYPES |= dict.fromkeys(("item", "error", "message"), "TEXT")
_TYPES |= dict.fromkeys(("threshold", "latency_ms"), "REAL NOT NULL") | dict.fromkeys(("score", "p_value"), "REAL")
_ADDED = {"drift_e_value": "REAL", "drift_alarm": "INTEGER", "drift_direction": "TEXT", "drift_since": "TEXT"}  # by version 2
_TYPES |= _ADDED
_CREATE = f"CREATE TABLE inspections ({', '.join(f'{key} {_TYPES[key]}' for key in ROW_KEYS)}, PRIMARY KEY (run, sequence))"
_INSERT = f"INSERT INTO inspections VALUES ({', '.join('?' * len(ROW_KEYS))}) ON CONFLICT DO NOTHING"


class Sqlite:
    """A row a result in the table ``inspections``, with the columns ``ROW_KEYS``; (run, sequence) is the key.

    Write-ahead log: a row that has been handed over survives ``kill -9``, and with ``fsync`` also the machine's power, on a disk
    that tells the truth about what it has written.  Others may read meanwhile.

    Args:
        path: the database; made if it is missing.
        fsync: wait for the disk after every row.  Without it a loss of power takes the last rows, and leaves the database whole.
        busy_ms: how long to wait for another writer.

    Raises:
        ConfigError: an argument is out of range or of the wrong type.
        SinkError: it cannot be opened, is no database, or holds a table of another version.
    """

    retry = True

    def __init__(self, path: str | os.PathLike[str], *, fsync: bool = True, busy_ms: float = 1000.0) -> None:
        file = checks.path("path", path)
        timeout = checks.number("busy_ms", busy_ms, 0.0, 3_600_000.0, "a number of milliseconds") / 1e3
        self.name = f"sqlite {file}"
        self._synchronous = "FULL" if checks.truth("fsync", fsync) else "NORMAL"
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=timeout)
            try:
                self._prepare()
            except BaseException:
                self._database.close()
                raise
        except sqlite3.Error as error:
            raise SinkError(f"{self.name}: {error}") from error

    def write(self, result: StreamInspection) -> None:
        """Insert the row and commit it; a row that is there already is left as it is."""
        with self._lock:
            try:
                self._database.execute(_INSERT, tuple(map(_storable, result.row().values())))
            except sqlite3.Error as error:
                raise SinkError(f"{self.name}: {error}") from error

    def close(self) -> None:
        """Close the database; the last to do so folds the log into it."""
        with self._lock:
            self._database.close()

    def _prepare(self) -> None:
        database = self._database
        (mode,) = database.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise SinkError(f"{self.name}: expected a file system with a write-ahead log, got journal mode {mode}")
        database.execute(f"PRAGMA synchronous={self._synchronous}")
        database.execute("BEGIN IMMEDIATE")  # two streams may make the table at the same time
        try:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            if version == 0 and not tables:
                database.execute(_CREATE)
                database.execute(f"PRAGMA user_version={VERSION}")
            elif version == 1 and ("inspections",) in tables:
                for key, kind in _ADDED.items():
                    database.execute(f"ALTER TABLE inspections ADD COLUMN {key} {kind}")
                database.execute(f"PRAGMA user_version={VERSION}")
            elif version != VERSION or ("inspections",) not in tables:
                raise SinkError(f"{self.name}: expected an empty database or table version {VERSION}, got version {version}")
        except BaseException:
            database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")


def _storable(value: Value) -> Value:
    """Text that SQLite takes: the bytes of a file name that is not UTF-8 become escapes, as JSON has them."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
