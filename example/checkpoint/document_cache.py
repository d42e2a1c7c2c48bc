"""Vectors of documents that do not change while a run lasts: in stage 2 the compressor is frozen, and candidates come
again in other questions, epochs and evaluations. Knows nothing about stages; whoever makes a cache vouches for that.
"""

import hashlib
from collections.abc import Callable

import torch

LIMIT_BYTES = 4 * 2**30
Known = dict[bytes, tuple[torch.Tensor, torch.Tensor]]
"""Memory vectors `[L, D]` and MSE (a scalar) by key."""
LookUp = Callable[[list[bytes]], Known]


def document_keys(ids_MT: torch.Tensor, mask_MT: torch.Tensor) -> list[bytes]:
    """SHA-256 of the token ids that the compressor reads of each row of a left-padded batch, memory tokens included."""
    lengths = mask_MT.sum(1).tolist()
    rows_MT = ids_MT.cpu().numpy()
    return [hashlib.sha256(row[len(row) - n :].tobytes()).digest() for row, n in zip(rows_MT, lengths, strict=True)]


class DocumentCache:
    """Memory vectors by the hash of the documents' token ids, held on the CPU.

    On a CPU documents are compressed one at a time: batches gain little there, and a document's vectors then depend on
    nothing else, so that a resumed run, which starts with an empty cache, is equal bit for bit. On CUDA all that are
    missing go in one batch.

    Args:
        compress: `CLaRa.compress`, without gradients and dropout.
        limit_bytes: what the cache may hold; documents beyond are compressed each time.
        look_up: gives what is known of these keys from elsewhere, say a store on disk, so that it is not compressed.
    """

    def __init__(self, compress: Callable, limit_bytes: int = LIMIT_BYTES, look_up: LookUp | None = None):
        self.compress, self.limit_bytes, self.held_bytes = compress, limit_bytes, 0
        self.look_up = look_up
        self.stored: Known = {}

    def __call__(self, ids_MT: torch.Tensor, mask_MT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `compress` returns, `[M, L, D]` and `[M]`, computed only for documents not seen before."""
        lengths = mask_MT.sum(1).tolist()
        keys = document_keys(ids_MT, mask_MT)
        missing = list({key: i for i, key in enumerate(keys) if key not in self.stored}.values())
        fresh: Known = {}
        if self.look_up is not None and missing:
            fresh |= self.look_up([keys[i] for i in missing])
            missing = [i for i in missing if keys[i] not in fresh]
        together = 1 if ids_MT.device.type == "cpu" else max(len(missing), 1)
        for start in range(0, len(missing), together):
            rows = missing[start : start + together]
            longest = max(lengths[i] for i in rows)
            docs, errors = self.compress(ids_MT[rows, -longest:], mask_MT[rows, -longest:])
            for i, doc_LD, error in zip(rows, docs.cpu(), errors.cpu(), strict=True):
                fresh[keys[i]] = (doc_LD.clone(), error)
        for key, (doc_LD, error) in fresh.items():
            if self.held_bytes < self.limit_bytes:
                self.stored[key] = (doc_LD, error)
                self.held_bytes += doc_LD.nbytes
        found = [fresh.get(key) or self.stored[key] for key in keys]
        return tuple(torch.stack(column).to(ids_MT.device) for column in zip(*found, strict=True))  # type: ignore
