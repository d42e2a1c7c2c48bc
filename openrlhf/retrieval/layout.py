"""The files of a store: its header, its lock and its index's connection. Knows nothing about what the index holds."""

import fcntl
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORMAT = 1
HEADER_FILE, INDEX_FILE, LOCK_FILE, VECTORS = "store.json", "index.sqlite", "store.lock", "vectors"
_OWN_FILES = {INDEX_FILE, f"{INDEX_FILE}-wal", f"{INDEX_FILE}-shm", f"{INDEX_FILE}-journal", LOCK_FILE, VECTORS}


def read_header(path: Path) -> dict:
    """What store.json says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or is of a later format.
    """
    file = Path(path) / HEADER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a store: it has no {HEADER_FILE}")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        sizes = [int(header[name]) for name in ("format", "n_memory", "width", "rows_per_shard")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a store's header ({error!r})") from error
    if sizes[0] != FORMAT:
        raise ValueError(f"{path} is a store of format {sizes[0]}, this program reads {FORMAT}: compress anew")
    return header


def check_header(path: Path, found: dict, wanted: dict) -> None:
    """Raises ValueError, naming each field that differs, when the header `found` does not have the values `wanted`."""
    differ = {key: value for key, value in wanted.items() if found.get(key) != value}
    if differ:
        raise ValueError(
            f"{path} was not made by this model: "
            + "; ".join(f"{key} is {found.get(key)!r} there, {value!r} here" for key, value in differ.items())
            + ". Use the checkpoint that made it, or compress the corpus into another store"
        )


def check_new(path: Path) -> None:
    """Raises FileExistsError unless a store can be created there: nothing, or what a killed `create` left."""
    if (path / HEADER_FILE).exists():
        raise FileExistsError(f"{path} already holds a store")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: give a directory for the store")
    others = {file.name for file in path.iterdir()} - _OWN_FILES - {"store.draft"} if path.is_dir() else set()
    if others:
        raise FileExistsError(f"{path} is not a store and not empty ({min(others)} is there): give another directory")


def connect(path: Path, write: bool) -> sqlite3.Connection:
    """A connection to a store's index.

    Raises:
        ValueError: the index is damaged.
        OSError: it is missing or cannot be opened.
    """
    # Readers too may write to the file: who comes first after a crash rolls back what the crash left. Where they have
    # no right to, SQLite opens it for reading alone.
    uri = f"{(path / INDEX_FILE).resolve().as_uri()}?mode=rw"
    sql = None
    try:
        # Threads may share the connection: statements are read to their ends at once, and SQLite itself takes turns.
        # None is kept for later, since from Python 3.12 on two threads could be given the same one at the same moment,
        # and one of them the other's rows.
        sql = sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, timeout=60, cached_statements=0
        )
        # WAL: readers go on while a transaction is written. FULL: it is synced when COMMIT returns.
        pragmas = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON") if write else ("query_only=ON",)
        for pragma in pragmas:
            sql.execute(f"PRAGMA {pragma}").fetchall()
        sql.execute("SELECT next_row FROM state").fetchall()
        return sql
    except sqlite3.DatabaseError as error:
        if sql is not None:
            sql.close()
        if isinstance(error, sqlite3.OperationalError):
            raise OSError(f"{path / INDEX_FILE} cannot be opened ({error})") from error
        raise ValueError(f"{path / INDEX_FILE} is damaged ({error}): compress the corpus anew") from error


def take_lock(path: Path) -> int:
    """An open file that holds the store's lock until it is closed or the process dies.

    Raises:
        ValueError: another process holds it.
    """
    file = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        holder = os.pread(file, 20, 0).decode() or "?"
        os.close(file)
        raise ValueError(
            f"{path} is being written by another process ({holder}): wait for it, or write to another store"
        ) from None
    return file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full disk makes of a write to a store into an OSError in words."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        free = shutil.disk_usage(path).free / 1e9
        raise OSError(
            f"{path} could not be written ({error}), {free:.1f} GB are free there. What was committed before is whole: "
            "make room and give the same command again"
        ) from error
