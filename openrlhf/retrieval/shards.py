"""Rows of numbers in files of a bounded size, memory-mapped for reading.

Contract: row r lies in the file of shard r // rows_per_shard. What is appended is synced before `append` returns. Which
rows count is for the caller to know; nothing here looks at what a row holds.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHECKSUM_BYTES = 8


class Shards:
    """Rows `[L, D]` bfloat16 in `folder/00000.bin`, `folder/00001.bin` …"""

    def __init__(self, folder: Path, n_memory: int, width: int, rows_per_shard: int):
        self.folder, self.rows_per_shard, self.shape = folder, rows_per_shard, (n_memory, width)
        self.row_bytes = 2 * n_memory * width
        self._maps: dict[int, torch.Tensor] = {}

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{shard:05}.bin"

    def numbers(self) -> list[int]:
        """Shards that have a file, ascending."""
        return sorted(int(file.stem) for file in self.folder.glob("*.bin"))

    def size(self, shard: int) -> int:
        """Bytes of a shard's file, 0 where there is none."""
        path = self.path(shard)
        return path.stat().st_size if path.is_file() else 0

    def mapped(self, shard: int, needed: int) -> torch.Tensor:
        """The whole rows of a shard's file `[N, L, D]`; mapped again where fewer than `needed` were mapped before."""
        docs_NLD = self._maps.get(shard)
        if docs_NLD is None or len(docs_NLD) < needed:
            n_rows = self.size(shard) // self.row_bytes
            if n_rows == 0:
                return torch.empty(0, *self.shape, dtype=torch.bfloat16)
            # Copy on write: PyTorch knows no read-only memory, and nothing that is done to it reaches the file.
            numbers = np.memmap(self.path(shard), dtype=np.int16, mode="c", shape=(n_rows, *self.shape))
            self._maps[shard] = docs_NLD = torch.from_numpy(numbers).view(torch.bfloat16)
        return docs_NLD

    def at(self, row: int) -> torch.Tensor | None:
        """The row `[L, D]`, None where its file does not reach so far."""
        shard, position = divmod(row, self.rows_per_shard)
        docs_NLD = self.mapped(shard, position + 1)
        return docs_NLD[position] if position < len(docs_NLD) else None

    def append(self, first: int, vectors: Sequence[torch.Tensor]) -> list[tuple[int, bytes]]:
        """Writes rows from number `first` on, over whatever lies there, and syncs them: their numbers and checksums.

        Raises:
            ValueError: a row is not `[L, D]`.
            OSError: the disk is full or not writable.
        """
        wrong = [tuple(vector.shape) for vector in vectors if vector.shape != self.shape]
        if wrong:
            raise ValueError(f"the vectors of a document must be {self.shape} in this store, got {wrong[0]}")
        if not vectors:
            return []
        docs_NLD = torch.stack([vector.detach().to("cpu", torch.bfloat16) for vector in vectors])
        for shard in range(first // self.rows_per_shard, (first + len(vectors) - 1) // self.rows_per_shard + 1):
            start = shard * self.rows_per_shard
            part_NLD = docs_NLD[max(0, start - first) : start + self.rows_per_shard - first]
            self._write(shard, max(0, first - start), part_NLD)
        return [(first + i, checksum(doc_LD)) for i, doc_LD in enumerate(docs_NLD)]

    def _write(self, shard: int, position: int, docs_NLD: torch.Tensor) -> None:
        path = self.path(shard)
        new = not path.exists()
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            data, offset = memoryview(_bytes(docs_NLD)), position * self.row_bytes
            while data:
                written = os.pwrite(file, data, offset)
                data, offset = data[written:], offset + written
            os.fsync(file)
        finally:
            os.close(file)
        if new:
            sync(self.folder)

    def remove(self, shard: int) -> None:
        """Deletes a shard's file; what others have mapped of it stays readable to them."""
        self._maps.pop(shard, None)
        self.path(shard).unlink()

    def close(self) -> None:
        """Forgets the maps; tensors that were returned keep theirs."""
        self._maps.clear()


def checksum(doc_LD: torch.Tensor) -> bytes:
    """BLAKE2b of a row's bytes, 8 bytes long."""
    return hashlib.blake2b(_bytes(doc_LD), digest_size=CHECKSUM_BYTES).digest()


def sync(path: Path) -> None:
    """Returns once a file, or a directory's list of names, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _bytes(docs: torch.Tensor) -> Any:
    return docs.contiguous().view(torch.int16).numpy().reshape(-1).view(np.uint8)
