"""A store of compressed documents: memory vectors in memory-mapped shards, keys and texts in SQLite.

    store.json           the header: what made the vectors, and their shape; written last when a store is created
    vectors/00000.bin …  bfloat16 rows of L·D numbers, `rows_per_shard` of them a file
    index.sqlite         which row holds the vector of which key, its checksum, and the documents
    store.lock           held by the one process that writes

Contract: a row is written and synced before the transaction that names it, and never changes afterwards, so that after
a crash at any moment the store holds exactly what was committed; bytes that no transaction names are overwritten by the
next append. One process writes, any number read; readers wait for nobody and see what is committed when they ask.
Documents of one key share one row. A deleted row is a hole until `compact` moves what lives around it.

Knows nothing about models, tokens or questions: keys are bytes and headers are dictionaries that others make.

Shape suffixes: N rows asked for, R live rows, L memory tokens, D hidden size.
"""

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openrlhf.retrieval.layout import (
    FORMAT,
    HEADER_FILE,
    INDEX_FILE,
    VECTORS,
    check_header,
    check_new,
    connect,
    read_header,
    take_lock,
    writing,
)
from openrlhf.retrieval.shards import Shards, checksum, sync
from openrlhf.utils.logging import write_whole

SHARD_BYTES = 2**30
PAGE = 500
_TABLES = """
CREATE TABLE vectors(row INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, checksum BLOB NOT NULL, mse REAL);
CREATE TABLE documents(number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    key BLOB NOT NULL REFERENCES vectors(key), title TEXT NOT NULL, text TEXT NOT NULL, page INTEGER,
    metadata TEXT NOT NULL);
CREATE INDEX documents_of_key ON documents(key);
CREATE TABLE state(next_row INTEGER NOT NULL);
INSERT INTO state VALUES(0);
"""
_DOCUMENT = "documents.id, text, title, page, metadata"


Known = dict[bytes, tuple[torch.Tensor, torch.Tensor]]
"""Memory vectors `[L, D]` and compression error (a scalar) by key."""


@dataclass(frozen=True)
class Document:
    """One passage, as it was given; `text` is without its title."""

    id: str
    text: str
    title: str = ""
    page: int | None = None
    metadata: dict = field(default_factory=dict)


class Store:
    """An open store; made by `Store.create` or `Store.open`, closed by `close` or as a context manager.

    Attributes:
        header: what store.json says, with `n_memory`, `width` and `rows_per_shard`.
        n_memory: L, memory vectors of a document.
        width: D, numbers of a memory vector.
    """

    def __init__(self, path: Path, header: dict, sql: sqlite3.Connection, lock: int | None):
        self.path, self.header, self._sql, self._lock = path, header, sql, lock
        self.n_memory, self.width = int(header["n_memory"]), int(header["width"])
        self.rows_per_shard = int(header["rows_per_shard"])
        self._shards = Shards(path / VECTORS, self.n_memory, self.width, self.rows_per_shard)

    @classmethod
    def create(cls, path: str | Path, header: dict) -> "Store":
        """A new, empty store, open for writing.

        Args:
            path: a directory that is not there, is empty, or holds what a killed `create` left.
            header: `n_memory` (L), `width` (D), optionally `rows_per_shard`, and whatever binds the store to the model
                that makes its vectors; values of JSON.

        Raises:
            FileExistsError: a store, or anything else, is there.
            ValueError: the header gives no shape, or another process is creating the store.
        """
        path = Path(path)
        sizes = [header.get("n_memory"), header.get("width"), header.get("rows_per_shard", 1)]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError("a store's header needs n_memory and width, positive whole numbers")
        check_new(path)
        (path / VECTORS).mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
        try:
            check_new(path)
            for left in path.glob(f"{INDEX_FILE}*"):
                left.unlink()
            with sqlite3.connect(path / INDEX_FILE) as sql:
                sql.executescript(_TABLES)
            sql.close()
            fitting = max(1, SHARD_BYTES // (2 * header["n_memory"] * header["width"]))
            whole = {"format": FORMAT, "rows_per_shard": fitting, **header}
            write_whole(path / HEADER_FILE, json.dumps(whole, indent=2) + "\n")
            for made in (path / HEADER_FILE, path / VECTORS, path, path.absolute().parent):
                sync(made)
            return cls(path, whole, connect(path, write=True), lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def open(cls, path: str | Path, header: dict | None = None, write: bool = False, damaged: bool = False) -> "Store":
        """An existing store.

        Args:
            header: fields that the store's header must have with these values, see `check_header`.
            write: also take the lock that allows `add`, `delete` and `compact`.
            damaged: open it even where shards are cut short, for `verify` and `rewrite`.

        Raises:
            FileNotFoundError: there is no store.
            ValueError: its header does not fit, a shard or the index is damaged, or another process is writing.
            OSError: the index is missing or cannot be opened.
        """
        path = Path(path)
        found = read_header(path)
        lock = take_lock(path) if write else None
        try:
            store = cls(path, found, connect(path, write), lock)
        except BaseException:
            if lock is not None:
                os.close(lock)
            raise
        try:
            store.check_header(header or {})
            if not damaged:
                store._check_shards()
        except BaseException:
            store.close()
            raise
        return store

    def check_header(self, header: dict) -> None:
        """Raises ValueError, naming each field that differs, when the store's header does not have these values."""
        check_header(self.path, self.header, header)

    def close(self) -> None:
        """Gives the lock back. What was returned by `blocks` stays valid."""
        if self._lock is not None:
            # At rest the index is one plain file, which a read-only disk can serve; refused while others read.
            with suppress(sqlite3.OperationalError):
                self._sql.execute("PRAGMA busy_timeout=0")
                self._sql.execute("PRAGMA journal_mode=DELETE")
        self._sql.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._shards.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of documents."""
        return self._one("SELECT COUNT(*) FROM documents")[0]

    def changes(self) -> tuple[int, int]:
        """Counters of what others and what this object committed: equal to what they were, nothing has changed."""
        return self._one("PRAGMA data_version")[0], self._sql.total_changes

    def nbytes(self) -> int:
        """Bytes on disk, holes included."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def known(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether the store has a vector of each key."""
        return [self._one("SELECT 1 FROM vectors WHERE key=?", key) is not None for key in keys]

    def errors(self, keys: Sequence[bytes]) -> list[float | None]:
        """The compression error (MSE) of each key; None where there is no vector of it, or its error is not known."""
        found = [self._one("SELECT mse FROM vectors WHERE key=?", key) for key in keys]
        return [None if row is None else row[0] for row in found]

    def find(self, ids: Sequence[str]) -> list[Document | None]:
        """The document of each id, None where there is none."""
        found = [self._one(f"SELECT {_DOCUMENT} FROM documents WHERE id=?", name) for name in ids]
        return [None if row is None else _document(row) for row in found]

    def get(self, ids: Sequence[str]) -> list[Document]:
        """The document of each id.

        Raises:
            KeyError: ids that the store does not have.
        """
        found = self.find(ids)
        unknown = [name for name, document in zip(ids, found, strict=True) if document is None]
        if unknown:
            raise KeyError(f"{self.path} has no document {unknown[0]!r}" + _and_more(len(unknown) - 1))
        return [document for document in found if document is not None]

    def rows(self) -> torch.Tensor:
        """Numbers of the live vector rows, ascending, `[R]` int64: shard · rows_per_shard + position in the shard."""
        rows = self._sql.execute("SELECT row FROM vectors ORDER BY row")
        return torch.from_numpy(np.fromiter((row for (row,) in rows), dtype=np.int64))

    def n_rows(self) -> int:
        """Number of live vector rows; fewer than documents where several have one vector."""
        return self._one("SELECT COUNT(*) FROM vectors")[0]

    def by_key(self, keys: Sequence[bytes]) -> torch.Tensor:
        """Vectors `[N, L, D]` bfloat16 of keys.

        Raises:
            KeyError: a key that the store does not have.
            ValueError: a vector is damaged.
        """
        found = [self._one("SELECT row FROM vectors WHERE key=?", key) for key in keys]
        if None in found:
            raise KeyError(f"{self.path} has no vector of key {keys[found.index(None)].hex()}")
        return self.vectors(torch.tensor([row for (row,) in found], dtype=torch.int64))

    def vectors(self, rows: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Vectors `[N, L, D]` bfloat16 of rows in any order; each is compared with its checksum.

        Raises:
            ValueError: a row is not live (any more), or damaged.
        """
        numbers = [int(row) for row in rows]
        docs_NLD = torch.empty(len(numbers), self.n_memory, self.width, dtype=torch.bfloat16)
        for i, row in enumerate(numbers):
            found = self._one("SELECT checksum FROM vectors WHERE row=?", row)
            if found is None:
                raise ValueError(f"{self.path} has no row {row}: deleted or moved since it was found, search again")
            doc_LD = self._shards.at(row)
            if doc_LD is None or checksum(doc_LD) != found[0]:
                raise ValueError(f"{self.path}: row {row} is damaged. {self._repair_hint()}")
            docs_NLD[i] = doc_LD
        return docs_NLD

    def looked_up_in(self, dtype: torch.dtype) -> Callable[[list[bytes]], Known]:
        """A function that gives a document cache what the store holds of some keys: vectors `[L, D]` in `dtype` and
        their compression errors."""

        def look_up(keys: list[bytes]) -> Known:
            errors = {key: error for key, error in zip(keys, self.errors(keys), strict=True) if error is not None}
            docs_NLD = self.by_key(list(errors)).to(dtype)
            return {
                key: (doc_LD, torch.tensor(error))
                for (key, error), doc_LD in zip(errors.items(), docs_NLD, strict=True)
            }

        return look_up

    def blocks(self, rows_per_block: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All live rows in ascending order, at most `rows_per_block` at a time: numbers `[N]` int64 and vectors
        `[N, L, D]` bfloat16. A block without holes is the file itself, memory-mapped: do not write to it."""
        start = 0
        while (first := self._one("SELECT MIN(row) FROM vectors WHERE row>=?", start)[0]) is not None:
            shard = first // self.rows_per_shard
            end = (shard + 1) * self.rows_per_shard
            query = "SELECT row FROM vectors WHERE row>=? AND row<? ORDER BY row LIMIT ?"
            numbers = [row for (row,) in self._sql.execute(query, (first, end, rows_per_block)).fetchall()]
            if not numbers:  # a writer moved them in between
                start = first + 1
                continue
            rows_N = torch.tensor(numbers, dtype=torch.int64)
            at_N = rows_N - shard * self.rows_per_shard
            docs = self._shards.mapped(shard, int(at_N[-1]) + 1)
            if int(at_N[-1]) >= len(docs):
                raise ValueError(f"{self.path} was compacted while it was read: begin again")
            dense = numbers[-1] - first + 1 == len(numbers)
            yield rows_N, docs[int(at_N[0]) : int(at_N[-1]) + 1] if dense else docs[at_N]
            start = numbers[-1] + 1

    def documents_at(self, rows: torch.Tensor | Sequence[int]) -> list[list[Document]]:
        """All documents of each row, in the order they came; none for a row that is not live."""
        query = f"SELECT {_DOCUMENT} FROM vectors JOIN documents USING(key) WHERE row=? ORDER BY number"
        return [[_document(found) for found in self._sql.execute(query, (int(row),)).fetchall()] for row in rows]

    def texts(self) -> Iterator[tuple[Document, int]]:
        """Every document with its row, in the order they came."""
        query = (
            f"SELECT {_DOCUMENT}, row, number FROM documents JOIN vectors USING(key) WHERE number>? "
            "ORDER BY number LIMIT ?"
        )
        last = -1
        while page := self._sql.execute(query, (last, PAGE)).fetchall():
            for *document, row, last in page:  # noqa: B007  the page's last number is where the next one starts
                yield _document(document), row

    def listed(self, limit: int, after: int = -1) -> list[tuple[int, Document]]:
        """At most `limit` documents in the order they came, each with its number; those behind number `after`."""
        query = f"SELECT number, {_DOCUMENT} FROM documents WHERE number>? ORDER BY number LIMIT ?"
        found = self._sql.execute(query, (after, limit)).fetchall()
        return [(number, _document(document)) for number, *document in found]

    def named(self, name: str) -> list[Document]:
        """The documents whose id is `name`, or `name`, `#` and whatever follows."""
        query = f"SELECT {_DOCUMENT} FROM documents WHERE id=? OR (id>=? AND id<?) ORDER BY number"
        found = self._sql.execute(query, (name, f"{name}#", f"{name}$")).fetchall()  # $ is the sign behind #
        return [_document(document) for document in found]

    def add(
        self,
        documents: Sequence[Document],
        keys: Sequence[bytes],
        vectors: dict[bytes, torch.Tensor],
        mse: dict[bytes, float] | None = None,
        without: Sequence[str] = (),
    ) -> None:
        """Adds documents, or puts them in the place of those with the same ids; all of them or, on an error, none.

        Args:
            keys: one for each document.
            without: ids of documents that go in the same commit.
            vectors: `[L, D]` of every key that is not known yet; stored as bfloat16.
            mse: the compression error of keys, where it is known.

        Raises:
            ValueError: a vector is missing or of another shape, or the store is open for reading only.
            OSError: the disk is full or not writable.
        """
        self._check_writable()
        if len(documents) != len(keys):
            raise ValueError(f"{len(keys)} keys for {len(documents)} documents")
        distinct = list(dict.fromkeys(keys))
        new = [key for key, known in zip(distinct, self.known(distinct), strict=True) if not known]
        missing = [key.hex() for key in new if key not in vectors]
        if missing:
            raise ValueError(f"no vectors were given for {len(missing)} new keys, e.g. {missing[0]}")
        with writing(self.path):
            places = self._shards.append(self._next_row(), [vectors[key] for key in new])
            with self._transaction():
                self._sql.executemany(
                    "INSERT INTO vectors(row, key, checksum, mse) VALUES(?, ?, ?, ?)",
                    [(row, key, check, (mse or {}).get(key)) for key, (row, check) in zip(new, places, strict=True)],
                )
                self._put(documents, keys)
                self._take_out(without)
                self._sql.execute("UPDATE state SET next_row=next_row+?", (len(new),))

    def _put(self, documents: Sequence[Document], keys: Sequence[bytes]) -> None:
        """Inserts documents, or replaces those of the same id; vectors that lose their last document go."""
        left = []
        for document, key in zip(documents, keys, strict=True):
            before = self._one("SELECT key FROM documents WHERE id=?", document.id)
            values = (key, document.title, document.text, document.page, json.dumps(document.metadata), document.id)
            if before is None:
                self._sql.execute(
                    "INSERT INTO documents(key, title, text, page, metadata, id) VALUES(?, ?, ?, ?, ?, ?)", values
                )
            else:
                self._sql.execute("UPDATE documents SET key=?, title=?, text=?, page=?, metadata=? WHERE id=?", values)
                left.append(before[0])
        for key in left:  # only now: a later document may have taken up the text that an earlier one gave up
            self._drop_unused(key)

    def _drop_unused(self, key: bytes) -> None:
        self._sql.execute(
            "DELETE FROM vectors WHERE key=? AND NOT EXISTS (SELECT 1 FROM documents WHERE documents.key=vectors.key)",
            (key,),
        )

    def delete(self, ids: Sequence[str]) -> int:
        """Removes documents, in one commit; their vectors too where no other document has them.

        Returns:
            how many there were; ids that the store does not have are passed over.
        """
        self._check_writable()
        with writing(self.path), self._transaction():
            return self._take_out(ids)

    def _take_out(self, ids: Sequence[str]) -> int:
        deleted = 0
        for name in ids:
            found = self._one("SELECT key FROM documents WHERE id=?", name)
            if found is not None:
                self._sql.execute("DELETE FROM documents WHERE id=?", (name,))
                self._drop_unused(found[0])
                deleted += 1
        return deleted

    def rewrite(self, vectors: dict[bytes, torch.Tensor]) -> None:
        """Writes vectors `[L, D]` of known keys to new rows, in one commit; their old rows become holes.

        Raises:
            KeyError: a key that the store does not have.
            ValueError, OSError: as `add`.
        """
        self._check_writable()
        unknown = [key for key, known in zip(vectors, self.known(list(vectors)), strict=True) if not known]
        if unknown:
            raise KeyError(f"{self.path} has no vector of key {unknown[0].hex()}")
        with writing(self.path):
            places = self._shards.append(self._next_row(), list(vectors.values()))
            with self._transaction():
                self._sql.executemany(
                    "UPDATE vectors SET row=?, checksum=? WHERE key=?",
                    [(row, check, key) for key, (row, check) in zip(vectors, places, strict=True)],
                )
                self._sql.execute("UPDATE state SET next_row=next_row+?", (len(vectors),))

    def start_shard(self) -> None:
        """Lets the next rows go to a new shard: before `rewrite`, so that damaged or holey shards get no more rows."""
        self._check_writable()
        with writing(self.path), self._transaction():
            self._sql.execute(
                "UPDATE state SET next_row=(next_row+?)/?*?",
                (self.rows_per_shard - 1, self.rows_per_shard, self.rows_per_shard),
            )

    def compact(self) -> int:
        """Removes holes: live rows of shards with holes move to new ones, then shards without live rows go.

        Row numbers change: search indexes must be built again. Needs the room of one shard and of the index; a crash
        leaves a whole store, and the next `compact` goes on.

        Returns:
            bytes freed.
        """
        self._check_writable()
        before = self.nbytes()
        next_row = self._next_row()
        holey = [shard for shard in self._shards.numbers() if self._live(shard) < self._used(shard, next_row)]
        if next_row // self.rows_per_shard in holey:
            self.start_shard()
        for shard in holey:
            while page := self._keys_of(shard, max(1, min(PAGE, 2**26 // self._shards.row_bytes))):
                moving = self.vectors([row for row, _ in page])
                self.rewrite({key: doc_LD for (_, key), doc_LD in zip(page, moving, strict=True)})
            self._shards.remove(shard)
        with writing(self.path):
            self._sql.execute("VACUUM")
            self._sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return before - self.nbytes()

    def _live(self, shard: int) -> int:
        first = shard * self.rows_per_shard
        return self._one("SELECT COUNT(*) FROM vectors WHERE row>=? AND row<?", first, first + self.rows_per_shard)[0]

    def _used(self, shard: int, next_row: int) -> int:
        """Rows of a shard that were given out; 1 for what a killed append left beyond, so that it is cleared away."""
        return max(1, min(self.rows_per_shard, next_row - shard * self.rows_per_shard))

    def _keys_of(self, shard: int, limit: int) -> list[tuple[int, bytes]]:
        first = shard * self.rows_per_shard
        query = "SELECT row, key FROM vectors WHERE row>=? AND row<? ORDER BY row LIMIT ?"
        return self._sql.execute(query, (first, first + self.rows_per_shard, limit)).fetchall()

    def verify(self) -> list[int]:
        """Reads everything; the rows that are missing from their shards or do not fit their checksums, ascending.

        Raises:
            ValueError: the index itself is damaged.
        """
        try:
            said = [line for (line,) in self._sql.execute("PRAGMA quick_check").fetchall()]
        except sqlite3.DatabaseError as error:
            said = [str(error)]
        if said != ["ok"]:
            raise ValueError(f"{self.path / INDEX_FILE} is damaged ({said[0]}): compress the corpus anew")
        damaged, last = [], -1
        query = "SELECT row, checksum FROM vectors WHERE row>? ORDER BY row LIMIT ?"
        while page := self._sql.execute(query, (last, PAGE)).fetchall():
            for row, stored in page:
                doc_LD = self._shards.at(row)
                if doc_LD is None or checksum(doc_LD) != stored:
                    damaged.append(row)
            last = page[-1][0]
        return damaged

    def _check_shards(self) -> None:
        """Raises ValueError when a shard is shorter than the index says."""
        start = 0
        while (first := self._one("SELECT MIN(row) FROM vectors WHERE row>=?", start)[0]) is not None:
            shard = first // self.rows_per_shard
            start = (shard + 1) * self.rows_per_shard
            last = self._one("SELECT MAX(row) FROM vectors WHERE row<?", start)[0]
            size = self._shards.size(shard)
            needed = (last % self.rows_per_shard + 1) * self._shards.row_bytes
            if size < needed:
                raise ValueError(
                    f"{self._shards.path(shard)} has {size:,} bytes, the index needs {needed:,}: cut short or lost. "
                    + self._repair_hint()
                )

    def _repair_hint(self) -> str:
        return "`compress_corpus --output STORE --verify` lists what is lost, `--repair` compresses it again"

    def _next_row(self) -> int:
        return self._one("SELECT next_row FROM state")[0]

    def _one(self, query: str, *values) -> Any:
        return self._sql.execute(query, values).fetchone()

    def _check_writable(self) -> None:
        if self._lock is None:
            raise ValueError(f"{self.path} is open for reading only: open it with write=True")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._sql.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._sql.execute("COMMIT")
        except BaseException:
            if self._sql.in_transaction:
                self._sql.execute("ROLLBACK")
            raise


def _document(row: Sequence) -> Document:
    name, text, title, page, metadata = row
    return Document(name, text, title, page, json.loads(metadata))


def _and_more(count: int) -> str:
    return f", nor {count} others that were asked for" if count else ""
