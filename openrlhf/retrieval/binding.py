"""What binds a search index to the store it was built from, and how an index gets onto the disk whole.

    NAME.json        what the index is and was built from; written last, and names the folder that counts
    NAME-1a2b3c4d/   the index's files
    NAME.lock        held by the one process that writes; the next waits

Contract: `read_index` finds the last index whose `write_index` came to its end, whatever was killed since, or says in
words that it does not belong to this store. In a store row numbers are never given twice, so an index stays true for
the rows it holds: those deleted later are missing in `store.rows()`, those added later are missing in the index.
Knows nothing about what kind of index it is.
"""

import fcntl
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from openrlhf.retrieval.shards import checksum, sync
from openrlhf.retrieval.store import Store
from openrlhf.utils.logging import write_whole

FORMAT = 1
SAMPLES = 16


def write_index(
    folder: str | Path, name: str, facts: dict, store: Store, rows_R: torch.Tensor, write: Callable[[Path], None]
) -> None:
    """Writes an index in the place of one of the same name.

    Args:
        facts: values of JSON that the index's own `open` needs.
        rows_R: the store's rows that the index holds.
        write: puts the files into the empty folder it is given.

    Raises:
        OSError: the disk is full or not writable; the index that was there before still is.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write_locked(folder, name, facts, store, rows_R, write)


def _write_locked(
    folder: Path, name: str, facts: dict, store: Store, rows_R: torch.Tensor, write: Callable[[Path], None]
) -> None:
    parts = folder / f"{name}-{secrets.token_hex(4)}"
    parts.mkdir()
    try:
        write(parts)
        for file in (*parts.iterdir(), parts, folder):
            sync(file)
        header = {"format": FORMAT, **facts, "parts": parts.name, "store": _identity(store), **_samples(store, rows_R)}
        write_whole(folder / f"{name}.json", json.dumps(header, indent=2) + "\n")
    except BaseException:
        shutil.rmtree(parts, ignore_errors=True)
        raise
    sync(folder / f"{name}.json")
    sync(folder)
    for old in folder.glob(f"{name}-*"):
        if old != parts:
            shutil.rmtree(old, ignore_errors=True)


def read_index(folder: str | Path, name: str, store: Store) -> tuple[dict, Path]:
    """The header of an index, and the folder of its files.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it cannot be read, or was built from another store.
    """
    folder = Path(folder)
    file = folder / f"{name}.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {name} index: build it first")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        parts, samples = folder / header["parts"], {int(row): value for row, value in header["samples"].items()}
        known = header["format"] == FORMAT and parts.is_dir()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): build the index again") from error
    if not known:
        raise ValueError(f"{file} is of another format, or its files are lost: build the index again")
    live = [row for row in samples if store.documents_at([row])[0]]
    found = [checksum(doc_LD).hex() for doc_LD in store.vectors(live)]
    if header["store"] != _identity(store) or found != [samples[row] for row in live]:
        raise ValueError(f"{folder} was built from another store than {store.path}: build the index again")
    return header, parts


def _identity(store: Store) -> str:
    return hashlib.sha256(json.dumps(store.header, sort_keys=True).encode()).hexdigest()


def _samples(store: Store, rows_R: torch.Tensor) -> dict:
    """Checksums of some rows: a store that was made anew in the same place has other vectors under these numbers."""
    chosen = rows_R[torch.linspace(0, len(rows_R) - 1, SAMPLES).long().unique()] if len(rows_R) else rows_R
    marks = [checksum(doc_LD).hex() for doc_LD in store.vectors(chosen)]
    return {"rows": len(rows_R), "samples": dict(zip(map(str, chosen.tolist()), marks, strict=True))}
