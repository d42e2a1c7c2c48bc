"""Texts that say nearly the same: which of them to keep, and which documents are versions of one another.

Contract: exact set similarity over shingles (runs of words, of single characters where Chinese or Japanese is written),
no sampling, so that equal input gives equal output everywhere. What is compared are hashes of 64 bits. Knows nothing
about chunks, questions or files.
"""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

_UNSPACED = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
# A shingle in more documents than this is boilerplate: it tells nothing, and counting its pairs would take forever.
_BOILERPLATE = 1000


def tokens(text: str) -> list[str]:
    """Words and numbers in lower case, Chinese and Japanese characters one by one; no punctuation."""
    return _TOKEN.findall(text.lower())


def shingles(text: str, size: int) -> np.ndarray:
    """Hashes of all runs of `size` tokens, `[S]` uint64, ascending, each once; of all tokens where there are fewer."""
    found = tokens(text)
    if not found:
        return np.empty(0, dtype=np.uint64)
    runs = {" ".join(found[i : i + size]) for i in range(max(1, len(found) - size + 1))}
    digests = b"".join(hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs)
    return np.sort(np.frombuffer(digests, dtype="<u8").astype(np.uint64))


def common(first: np.ndarray, second: np.ndarray) -> int:
    """How many shingles two texts share."""
    return len(np.intersect1d(first, second, assume_unique=True))


def near_duplicates(
    texts: Sequence[str],
    threshold: float,
    size: int = 3,
    agree: Callable[[int, int], bool] = lambda one, other: True,
) -> list[int]:
    """Of each text the index of the first kept text that it nearly repeats, its own where it is kept itself.

    Two texts are near-duplicates when |A ∩ B| / |A ∪ B| ≥ threshold over their shingles and `agree(later, kept)`. A
    text without a word is kept. Found through the rarest shingles of each: sets as similar as this must share one of
    the |A| − ⌈threshold · |A|⌉ + 1 rarest, in any common order of rarity.
    """
    sets = [shingles(text, size) for text in texts]
    if not sets:
        return []
    values, counts = np.unique(np.concatenate(sets), return_counts=True)
    kept_with: dict[int, list[int]] = defaultdict(list)
    kept_as = []
    for i, own in enumerate(sets):
        count = counts[np.searchsorted(values, own)]
        rarest = np.lexsort((own, count))[: len(own) - math.ceil(threshold * len(own)) + 1]
        telling = own[rarest][count[rarest] > 1].tolist()
        near = sorted({j for shingle in telling for j in kept_with.get(shingle, ())})
        first = next((j for j in near if _jaccard(own, sets[j]) >= threshold and agree(i, j)), i)
        kept_as.append(first)
        if first == i:
            for shingle in telling:
                kept_with[shingle].append(i)
    return kept_as


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    shared = common(first, second)
    return shared / (len(first) + len(second) - shared)


def versions(texts: Sequence[str], threshold: float, size: int = 3) -> list[int]:
    """Groups documents that are versions of one another, or one of which holds much of another.

    Two are in one group when they share at least `threshold` of the shingles of the smaller one, or when a third joins
    them.

    Returns:
        of each document the smallest index in its group.
    """
    sets = [shingles(text, size) for text in texts]
    if not sets:
        return []
    owners = np.repeat(np.arange(len(sets)), [len(own) for own in sets])
    everything = np.concatenate(sets)
    owners = owners[np.argsort(everything, kind="stable")]
    values, starts, counts = np.unique(np.sort(everything), return_index=True, return_counts=True)
    group = list(range(len(sets)))
    first_with: dict[bytes, int] = {}
    sizes = np.zeros(len(sets), dtype=np.int64)
    for i, own in enumerate(sets):
        _join(group, i, first_with.setdefault(own.tobytes(), i) if len(own) else i)
        places = np.searchsorted(values, own)
        sizes[i] = np.count_nonzero(counts[places] <= _BOILERPLATE)
        shared = [owners[starts[p] : starts[p] + counts[p]] for p in places if 1 < counts[p] <= _BOILERPLATE]
        overlap = np.bincount(np.concatenate(shared), minlength=len(sets)) if shared else np.zeros(len(sets))
        for j in np.flatnonzero(overlap[:i]):
            if overlap[j] >= threshold * min(sizes[i], sizes[j]):
                _join(group, i, int(j))
    return [_root(group, i) for i in range(len(sets))]


def _root(group: list[int], i: int) -> int:
    while group[i] != i:
        group[i] = i = group[group[i]]
    return i


def _join(group: list[int], i: int, j: int) -> None:
    low, high = sorted((_root(group, i), _root(group, j)))
    group[high] = low
