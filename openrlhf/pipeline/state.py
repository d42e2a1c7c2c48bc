"""What the pipeline has done: one SQLite file, keyed by the content that each piece of work was done on.

Contract: `put` is whole or not there, whenever the process is killed; `get` gives back what `put` was given. A key is
made of everything a result depends on (`content_key`), so that the same work is never done twice and a changed
document is other work. One process writes at a time; its threads share the object. Knows nothing about the steps.
"""

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def content_key(*parts: Any) -> str:
    """sha256 over JSON values and bytes: equal for equal content, in every process and on every machine."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, ensure_ascii=False).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


class State:
    """Results by (step, key).

    Args:
        path: the SQLite file; made where it is absent.
        shared: the process that started this one holds the lock, and lends the state.

    Raises:
        BlockingIOError: another process has it open.
        OSError: it cannot be opened; the same goes for `get` and `put`.
        ValueError: the file is not such a state.
    """

    def __init__(self, path: str | Path, shared: bool = False):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._process = FileLock(f"{self.path}.lock")
        try:
            if not shared:
                self._process.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(f"{self.path} is in use by another run: wait for it, or stop it") from None
        try:
            with self._told():
                self._open()
        except (OSError, ValueError):
            self._process.release()
            raise

    def _open(self) -> None:
        try:
            self._base = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=FULL")
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS done (step TEXT, key TEXT, result TEXT NOT NULL, PRIMARY KEY (step, key))"
            )
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is not a state of this pipeline ({error}): move it aside") from None

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Says what to do where the disk is at fault."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(
                f"{self.path} cannot be used ({error}): see to the rights and the room on its disk, then give the same "
                "command again; what it holds is kept"
            ) from None

    def get(self, step: str, key: str) -> Any | None:
        """The result of this work; None where it has not been done."""
        with self._lock, self._told():
            row = self._base.execute("SELECT result FROM done WHERE step = ? AND key = ?", (step, key)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, step: str, key: str, result: Any) -> None:
        """Keeps the result (JSON, not None) of this work; on disk when it returns."""
        data = json.dumps(result, ensure_ascii=False)
        with self._lock, self._told():
            self._base.execute("INSERT OR REPLACE INTO done VALUES (?, ?, ?)", (step, key, data))

    def close(self) -> None:
        """Lets other processes in."""
        with self._lock:
            self._base.close()
        self._process.release()

    def __enter__(self) -> "State":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
