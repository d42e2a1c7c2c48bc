"""Candidates by words and by vectors: BM25 over a store's texts, fused with the search over its vectors.

Contract: a candidate is a row of the store, so that documents with one vector are one candidate. Equal scores are
ordered by the smaller row. Deleted rows never come back; rows added after BM25 was built are found by their vectors
alone, and `Bm25Index.open` refuses such an index.

BM25 is that of the evaluation (`evaluation/rankers.py`), whose words it uses too; runs of Chinese and Japanese
characters, which have no spaces, are taken as overlapping pairs. bm25s is imported where it is used.
"""

import logging
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from openrlhf.retrieval.binding import read_index, write_index
from openrlhf.retrieval.search import TwoStepIndex, exact_search, score_rows
from openrlhf.retrieval.store import Store

BM25 = {"method": "lucene", "k1": 1.5, "b": 0.75}
STOP_WORDS = "english"
RRF_K = 60
FUSIONS = ("union", "rrf")
_WORD = re.compile(r"(?u)\b\w\w+\b")
_UNSPACED = re.compile(
    "([\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+)"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A row, the cosine of its vector and the query, and its BM25 score, 0 where it shares no word with the question.

    Of several documents with this vector, the BM25 score is the best.
    """

    row: int
    dense: float
    sparse: float


def words(text: str) -> list[str]:
    """Words of a text in lower case: runs of two or more word characters; of Chinese and Japanese ones, each pair."""
    found: list[str] = []
    for i, part in enumerate(_UNSPACED.split(text.lower())):
        if i % 2:  # re.split puts what it splits at in every other place
            found += [part[j : j + 2] for j in range(max(1, len(part) - 1))]
        else:
            found += _WORD.findall(part)
    return found


class Bm25Index:
    """BM25 over all documents of a store, titles included: Lucene's formula by the library bm25s.

    Attributes:
        rows_R: rows that the index holds, `[R]` int64, ascending.
        n_missing: live rows that it does not hold, as of the last `refresh`.
    """

    NAME = "bm25"

    def __init__(self, store: Store, row_of_D: np.ndarray, index: Any):
        self.store, self._row_of_D, self._index = store, row_of_D, index
        rows, self._place_of_D = np.unique(row_of_D, return_inverse=True)
        self.rows_R = torch.from_numpy(rows)
        self._changes: tuple[int, int] | None = None
        self.refresh()

    @classmethod
    def build(cls, store: Store, folder: str | Path) -> "Bm25Index":
        """Builds the index from the store's texts, one at a time, and writes it.

        Holds numbers of words in memory, not texts: 4 bytes a word, and three times as much while scores are computed.

        Args:
            folder: where to write it; an index that is there is replaced once the new one is whole.

        Raises:
            ValueError: bm25s is not installed.
            OSError: the disk is full or not writable.
        """
        bm25s = _bm25s()
        tokenizer = bm25s.tokenization.Tokenizer(splitter=words, stopwords=STOP_WORDS)
        rows = array("q")

        def texts() -> Iterator[str]:
            for document, row in tqdm(store.texts(), desc="bm25", unit=" documents", total=len(store), disable=None):
                rows.append(row)
                yield f"{document.title}\n{document.text}"

        numbered = tokenizer.streaming_tokenize(texts(), update_vocab=True, allow_empty=False)
        ids = [np.array(one, dtype=np.int32) for one in numbered]
        index = None
        if tokenizer.word_to_id:
            index = bm25s.BM25(**BM25)
            index.index((ids, tokenizer.word_to_id), create_empty_token=False, show_progress=False)
        row_of_D = np.array(rows, dtype=np.int64)

        def write(parts: Path) -> None:
            np.save(parts / "rows.npy", row_of_D, allow_pickle=False)
            if index is not None:
                index.save(parts, show_progress=False)

        facts = {**BM25, "words": len(tokenizer.word_to_id), "documents": len(row_of_D)}
        write_index(folder, cls.NAME, facts, store, torch.from_numpy(np.unique(row_of_D)), write)
        return cls(store, row_of_D, index)

    @classmethod
    def open(cls, store: Store, folder: str | Path) -> "Bm25Index":
        """An index that was built from this store.

        Raises:
            FileNotFoundError: there is none.
            ValueError: bm25s is not installed, the index is damaged, was built from another store, or documents were
                added to the store since.
        """
        bm25s = _bm25s()
        header, parts = read_index(folder, cls.NAME, store)
        try:
            index = bm25s.BM25.load(parts) if header["words"] else None
            opened = cls(store, np.load(parts / "rows.npy", allow_pickle=False), index)
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(f"the bm25 index in {folder} is damaged ({error}): build it again") from error
        if opened.n_missing:
            raise ValueError(f"{opened.n_missing} rows were added since {folder} was built: build the bm25 index again")
        return opened

    def refresh(self) -> None:
        """Looks up what was added to the store and deleted from it since the index was built; logs the former.

        Asks for all rows only where something was committed since the last time.
        """
        if (changes := self.store.changes()) == self._changes:
            return
        live = self.store.rows()
        self._live_R = torch.isin(self.rows_R, live, assume_unique=True).numpy()
        self.n_missing = len(live) - int(self._live_R.sum())
        if self.n_missing:
            logger.info("BM25 lacks %d of %d rows until its index is built again", self.n_missing, len(live))
        self._changes = changes

    def scores(self, question: str) -> torch.Tensor:
        """The score of each row of `rows_R`, `[R]` float32; 0 where it shares no word with the question."""
        best_R = np.zeros(len(self.rows_R), dtype=np.float32)
        if self._index is not None:
            ids = self._index.get_tokens_ids(words(question))  # stop words are not in its vocabulary
            if ids:
                np.maximum.at(best_R, self._place_of_D, self._index.get_scores_from_ids(ids))
        return torch.from_numpy(best_R)

    def scores_of(self, question: str, rows: Sequence[int]) -> torch.Tensor:
        """The score of each of some rows, `[N]` float32; 0 for one that the index does not hold."""
        rows_N = torch.tensor(rows, dtype=torch.int64)
        held_N = torch.isin(rows_N, self.rows_R)
        scores_N = torch.zeros(len(rows_N))
        scores_N[held_N] = self.scores(question)[torch.searchsorted(self.rows_R, rows_N[held_N])]
        return scores_N

    def search(self, question: str, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores `[K]` float32 of the best live rows, best first, and the rows `[K]` int64.

        K is k, or the number of rows that share a word with the question where those are fewer.

        Raises:
            ValueError: k is not positive.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        scores_R = self.scores(question)
        found_K = self._best(scores_R.numpy(), k)
        if not all(self.store.documents_at(self.rows_R[found_K])):  # deleted since the last `refresh`
            self.refresh()
            found_K = self._best(scores_R.numpy(), k)
        return scores_R[found_K], self.rows_R[found_K]

    def _best(self, scores_R: np.ndarray, k: int) -> np.ndarray:
        """Places of the best live rows, best first."""
        there = np.flatnonzero((scores_R > 0) & self._live_R)
        if len(there) > k:
            there = there[scores_R[there] >= np.partition(scores_R[there], -k)[-k]]
        return there[np.lexsort((there, -scores_R[there]))][:k]


def fuse(lists: Sequence[Sequence[int]], method: str = "union", limit: int | None = None) -> list[int]:
    """One list from several, each best first, without duplicates.

    Args:
        method: "union": the first list, then what the second adds, and so on. "rrf": by the sum of 1 / (60 + rank) over
            the lists, ranks from 1 (Cormack, Clarke, Büttcher 2009); equal sums by the smaller number.
        limit: keep so many.

    Raises:
        ValueError: an unknown method.
    """
    if method not in FUSIONS:
        raise ValueError(f"'{method}' is no fusion; choose from {', '.join(FUSIONS)}")
    lists = [list(dict.fromkeys(one)) for one in lists]
    if method == "union":
        return list(dict.fromkeys(item for one in lists for item in one))[:limit]
    sums: dict[int, float] = {}
    for item, part in sorted((item, 1 / (RRF_K + rank)) for one in lists for rank, item in enumerate(one, 1)):
        sums[item] = sums.get(item, 0.0) + part
    return sorted(sums, key=lambda item: (-sums[item], item))[:limit]


def hybrid_candidates(
    store: Store,
    bm25: Bm25Index,
    question: str,
    query_E: torch.Tensor,
    dense_top_k: int = 12,
    sparse_top_k: int = 25,
    fusion: str = "union",
    limit: int | None = None,
    index: TwoStepIndex | None = None,
) -> list[Candidate]:
    """The rows that BM25 finds and those nearest to the query, fused; every one with both its scores.

    Args:
        question: for BM25.
        query_E: the flattened query of the query reasoner, `[E]`.
        dense_top_k, sparse_top_k: at most so many from each; 0 for none.
        fusion: see `fuse`, to which the words' list is given first.
        limit: keep so many.
        index: finds the nearest rows; the exact search does without one.

    Raises:
        ValueError: as `exact_search` and `fuse`; a negative number.
    """
    if min(dense_top_k, sparse_top_k) < 0 or fusion not in FUSIONS:
        raise ValueError(
            f"dense_top_k={dense_top_k} and sparse_top_k={sparse_top_k} must not be negative, and fusion='{fusion}' "
            f"must be one of {', '.join(FUSIONS)}"
        )
    query_1E, near = query_E.reshape(1, -1), []
    if dense_top_k:
        found = index.search(query_1E, dense_top_k) if index else exact_search(store, query_1E, dense_top_k)
        near = found[1][0].tolist()
    wordy = bm25.search(question, sparse_top_k)[1].tolist() if sparse_top_k else []
    rows = fuse([wordy, near], fusion, limit)
    dense, sparse = score_rows(store, query_1E, rows)[0], bm25.scores_of(question, rows)
    return [Candidate(*scores) for scores in zip(rows, dense.tolist(), sparse.tolist(), strict=True)]


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ValueError("BM25 needs a package that is not installed: pip install bm25s") from error
    return bm25s
