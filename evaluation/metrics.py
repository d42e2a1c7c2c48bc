"""Scores of answers and of rankings. Knows strings and numbers only: no model, no file, no third-party package.

Answers are compared after `normalize_answer`. Each answer score takes one prediction and one truth;
`best_over_golds` takes the maximum over the aliases of a gold answer. Tokens are separated by white space, so in text
written without spaces (Chinese, Japanese) an answer is found only where it stands by itself.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FILL_INDEX = -1
"""What pads `topk_idx` where a question has fewer candidates than slots; no document."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ROUGE_TOKEN = re.compile(r"[^\W_]+")
_BOOLEAN_WORDS = {"True": "yes", "False": "no"}
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and the articles a/an/the, white space squeezed to single blanks."""
    text = text.lower().translate(_DROP_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _comparable(text: str) -> str:
    """The normalised answer, after exactly "True" and "False" have become "yes" and "no"."""
    return normalize_answer(_BOOLEAN_WORDS.get(text, text))


def exact_match_score(prediction: str, truth: str) -> bool:
    """True when both normalise to the same string, the empty one included."""
    return _comparable(prediction) == _comparable(truth)


def f1_score(prediction: str, truth: str) -> float:
    """Harmonic mean of token precision and recall, in [0, 1].

    An answer "yes", "no" or "noanswer" on either side scores only by an exact match. Two empty answers score 0.
    """
    prediction, truth = _comparable(prediction), _comparable(truth)
    if prediction != truth and (prediction in _CLOSED_ANSWERS or truth in _CLOSED_ANSWERS):
        return 0.0
    prediction_tokens, truth_tokens = prediction.split(), truth.split()
    common = (Counter(prediction_tokens) & Counter(truth_tokens)).total()
    return _harmonic_mean(common, len(prediction_tokens), len(truth_tokens))


def cover_exact_match_score(prediction: str, truth: str) -> bool:
    """Cover-EM (`acc`): every token of the truth occurs among the prediction's tokens, in any order.

    True for a truth that normalises to nothing: leave such questions out of an average.
    """
    return set(_comparable(truth).split()) <= set(_comparable(prediction).split())


def cover_span_score(prediction: str, truth: str) -> bool:
    """Cover-EM's stricter form: the truth's tokens occur in the prediction side by side and in order.

    True for a truth that normalises to nothing, as in `cover_exact_match_score`.
    """
    return f" {_comparable(truth)} ".replace("  ", " ") in f" {_comparable(prediction)} "


def best_over_golds(score: Callable[[str, str], float], prediction: str, golds: Sequence[str]) -> float:
    """The maximum of `score(prediction, gold)` over all aliases. Raises ValueError when there is none."""
    if isinstance(golds, str):
        raise ValueError("golds is a list of strings; put a single gold answer into a list.")
    if not golds:
        raise ValueError("A question needs at least one gold answer to be scored.")
    return float(max(score(prediction, gold) for gold in golds))


def _rouge_tokens(text: str) -> list[str]:
    # NFC, so that one letter written as one or as two code points is the same token.
    return _ROUGE_TOKEN.findall(unicodedata.normalize("NFC", text.lower()))


def _harmonic_mean(common: int, prediction_length: int, truth_length: int) -> float:
    """F1 of common / prediction_length and common / truth_length; 0 without anything in common."""
    if common == 0:
        return 0.0
    precision, recall = common / prediction_length, common / truth_length
    return 2 * precision * recall / (precision + recall)


def rouge_1(prediction: str, reference: str) -> float:
    """ROUGE-1 (Lin 2004) as F1, in [0, 1]: tokens in common, each counted as often as the rarer side has it.

    Tokens are lower-cased runs of letters and digits. The `rouge_score` package gives the same figures on ASCII text
    without its stemmer; it drops every letter outside a–z, here letters of any script count.
    """
    prediction_tokens, reference_tokens = _rouge_tokens(prediction), _rouge_tokens(reference)
    common = (Counter(prediction_tokens) & Counter(reference_tokens)).total()
    return _harmonic_mean(common, len(prediction_tokens), len(reference_tokens))


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L (Lin 2004) as F1, in [0, 1]: longest common subsequence of the tokens, the text as one sequence.

    Tokens as in `rouge_1`, with the same differences from the `rouge_score` package.
    """
    prediction_tokens, reference_tokens = _rouge_tokens(prediction), _rouge_tokens(reference)
    common = _common_subsequence(prediction_tokens, reference_tokens)
    return _harmonic_mean(common, len(prediction_tokens), len(reference_tokens))


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, a whole row of the dynamic programme in one integer (Hyyrö 2004).

    Bit i of `row` is 0 where the length grows at left[i]; the zeros are counted at the end.
    """
    places: dict[str, int] = {}
    for i, token in enumerate(left):
        places[token] = places.get(token, 0) | 1 << i
    full = (1 << len(left)) - 1
    row = full
    for token in right:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(left) - row.bit_count()


def _hits(ranked: Sequence[int], positives: Sequence[int], k: int) -> int:
    if k < 1:
        raise ValueError(f"k is {k}; it counts documents and starts at 1.")
    retrieved = [index for index in ranked if index != FILL_INDEX][:k]
    return len(set(retrieved) & set(positives))


def recall_at_k(ranked: list[int], positives: list[int], k: int, relevant: int | None = None) -> float:
    """Share of the relevant documents among the first k of the ranking.

    ranked: document indices, best first; the fill value −1 is ignored. positives: indices of gold documents in the
    pool, repetitions ignored. relevant: how many gold documents the question has, where the pool may lack some
    (Normal mode takes it from the Oracle file); default: the positives. Raises ValueError without any relevant
    document, since recall is undefined there.
    """
    relevant = len(set(positives)) if relevant is None else relevant
    if relevant < max(1, len(set(positives))):
        raise ValueError(f"{relevant} relevant documents with {len(set(positives))} positives: recall is undefined.")
    return _hits(ranked, positives, k) / relevant


def precision_at_k(ranked: list[int], positives: list[int], k: int) -> float:
    """Gold documents among the first k of the ranking, divided by k even where the ranking is shorter."""
    return _hits(ranked, positives, k) / k


def reciprocal_rank(ranked: Sequence[int], positives: Sequence[int]) -> float:
    """1 / rank of the first gold document, the fill value −1 not counted; 0 where none is ranked."""
    documents = (index for index in ranked if index != FILL_INDEX)
    return next((1 / rank for rank, index in enumerate(documents, start=1) if index in positives), 0.0)


@dataclass(frozen=True)
class RetrievalScores:
    """Means over the questions that have gold documents, by k; zeros when there is no such question."""

    recall: dict[int, float]
    precision: dict[int, float]
    evaluated: int
    skipped: int


def retrieval_scores(
    rankings: Sequence[list[int]],
    positives: Sequence[list[int]],
    ks: Sequence[int] = (1, 3, 5),
    relevant: Sequence[int] | None = None,
) -> RetrievalScores:
    """Recall@k and Precision@k averaged over questions; those without a relevant document are skipped and counted.

    rankings, positives, relevant: one entry a question, as in `recall_at_k`. Raises ValueError when the lengths differ.
    """
    counts = [len(set(p)) for p in positives] if relevant is None else list(relevant)
    if not len(rankings) == len(positives) == len(counts):
        raise ValueError(f"{len(rankings)} rankings, {len(positives)} positives, {len(counts)} relevant: not the same.")
    rows = [row for row in zip(rankings, positives, counts, strict=True) if row[2]]
    number = max(1, len(rows))
    return RetrievalScores(
        recall={k: sum(recall_at_k(r, p, k, n) for r, p, n in rows) / number for k in ks},
        precision={k: sum(precision_at_k(r, p, k) for r, p, _ in rows) / number for k in ks},
        evaluated=len(rows),
        skipped=len(counts) - len(rows),
    )
