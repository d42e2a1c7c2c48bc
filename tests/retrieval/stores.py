"""Small real stores of given vectors."""

import hashlib
from pathlib import Path

import torch

from openrlhf.retrieval.store import Document, Store


def key_of(name: str) -> bytes:
    """A key for a document's name."""
    return hashlib.sha256(name.encode()).digest()


def fill(store: Store, docs_NLD: torch.Tensor, texts: list[str] | None = None, first: int = 0) -> Store:
    """Adds documents d<first>, d<first + 1> … with these vectors."""
    names = [f"d{first + i}" for i in range(len(docs_NLD))]
    documents = [Document(name, text) for name, text in zip(names, texts or names, strict=True)]
    keys = [key_of(name) for name in names]
    store.add(documents, keys, dict(zip(keys, docs_NLD.to(torch.bfloat16), strict=True)))
    return store


def new_store(path: Path, docs_NLD: torch.Tensor, texts: list[str] | None = None, **header) -> Store:
    """A store, open for writing, of these vectors; row i is document d<i>. 64 rows a shard."""
    shape = {"n_memory": docs_NLD.shape[1], "width": docs_NLD.shape[2], "rows_per_shard": 64}
    return fill(Store.create(path, {**shape, **header}), docs_NLD, texts)


def cosines(store: Store, query_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain float64 cosines of every live row, rounded to float32, and the rows."""
    rows_R = store.rows()
    docs_RE = store.vectors(rows_R).flatten(1).double()
    return torch.nn.functional.cosine_similarity(query_BE.double().unsqueeze(1), docs_RE, dim=-1).float(), rows_R


def plain_search(store: Store, query_BE: torch.Tensor, k: int) -> tuple[list, list]:
    """The k best by those, equal ones by the smaller row."""
    scores_BR, rows_R = cosines(store, query_BE)
    scores, rows = [], []
    for scores_R in scores_BR.tolist():
        order = sorted(zip(scores_R, rows_R.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))[:k]
        scores.append([score for score, _ in order])
        rows.append([row for _, row in order])
    return scores, rows
