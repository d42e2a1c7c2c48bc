"""evaluation/metrics.py against the conformance vectors and the sentences of SPEC section 8."""

import json
import random
import time
from pathlib import Path

import pytest

from evaluation.metrics import (
    best_over_golds,
    cover_exact_match_score,
    cover_span_score,
    exact_match_score,
    f1_score,
    normalize_answer,
    precision_at_k,
    recall_at_k,
    reciprocal_rank,
    retrieval_scores,
    rouge_1,
    rouge_l,
)

VECTORS = json.loads((Path(__file__).parents[1] / "data/vectors/metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pair", VECTORS["pairs"], ids=lambda pair: f"{pair['prediction']!r}~{pair['truth']!r}")
def test_answer_scores_equal_the_vectors(pair):
    prediction, truth = pair["prediction"], pair["truth"]
    assert normalize_answer(prediction) == pair["norm_pred"] == pair["norm_pred_trainer"]
    assert normalize_answer(truth) == pair["norm_truth"]
    assert exact_match_score(prediction, truth) is pair["em"] is pair["em_trainer"]
    assert cover_exact_match_score(prediction, truth) is pair["cover_em"] is pair["cover_em_trainer"]
    assert f1_score(prediction, truth) == pytest.approx(pair["f1"], abs=1e-12)
    assert f1_score(prediction, truth) == pytest.approx(pair["f1_trainer"], abs=1e-12)


@pytest.mark.parametrize("case", VECTORS["trainer_recall_precision"], ids=lambda case: str(case["pos"]))
def test_retrieval_scores_equal_the_vectors(case):
    scores = retrieval_scores(case["pred"], case["pos"])
    assert scores.evaluated == case["valid_samples"]
    assert scores.skipped == len(case["pos"]) - case["valid_samples"]
    for k in (1, 3, 5):
        assert scores.recall[k] == pytest.approx(case["metrics"][f"recall_{k}"], abs=1e-12)
        assert scores.precision[k] == pytest.approx(case["metrics"][f"precision_{k}"], abs=1e-12)


def test_only_the_exact_words_true_and_false_become_yes_and_no():
    assert exact_match_score("False", "no")
    assert exact_match_score("yes", "True")
    assert not exact_match_score("TRUE", "yes")
    assert not exact_match_score("True.", "yes")


def test_span_form_wants_the_gold_tokens_in_order_and_side_by_side():
    assert cover_span_score("It is the New York Times.", "New York")
    assert not cover_span_score("York is not new", "New York")
    assert cover_exact_match_score("York is not new", "New York")
    assert not cover_span_score("the theatre", "the atre")
    assert not cover_span_score("annex", "an ex")
    assert cover_span_score("anything", "")
    assert cover_span_score("", "the")


@pytest.mark.parametrize("pair", VECTORS["pairs"], ids=lambda pair: f"{pair['prediction']!r}~{pair['truth']!r}")
def test_exact_match_implies_span_and_span_implies_cover(pair):
    prediction, truth = pair["prediction"], pair["truth"]
    assert cover_span_score(prediction, truth) >= exact_match_score(prediction, truth)
    assert cover_exact_match_score(prediction, truth) >= cover_span_score(prediction, truth)


def test_best_over_golds_takes_the_maximum_over_aliases():
    assert best_over_golds(exact_match_score, "NYC", ["New York", "NYC"]) == 1.0
    assert best_over_golds(f1_score, "New York City", ["Boston", "New York"]) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="at least one gold"):
        best_over_golds(f1_score, "x", [])
    with pytest.raises(ValueError, match="list"):
        best_over_golds(f1_score, "x", "gold")


def test_fill_value_is_no_document():
    assert recall_at_k([2, -1, -1], [2], 3) == 1.0
    assert precision_at_k([2, -1, -1], [2, -1], 3) == pytest.approx(1 / 3)
    assert precision_at_k([-1, -1], [0], 1) == 0.0


def test_precision_divides_by_k():
    assert precision_at_k([0], [0], 5) == 0.2


def test_recall_may_take_its_denominator_from_elsewhere():
    assert recall_at_k([0, 1], [0], 1, relevant=2) == 0.5
    scores = retrieval_scores([[0, 1], [0, 1], [0]], [[0], [], []], ks=(1,), relevant=[2, 1, 0])
    assert (scores.recall[1], scores.precision[1]) == (0.25, 0.5)
    assert (scores.evaluated, scores.skipped) == (2, 1)


def test_undefined_scores_are_errors():
    with pytest.raises(ValueError, match="undefined"):
        recall_at_k([0], [], 1)
    with pytest.raises(ValueError, match="undefined"):
        recall_at_k([0], [0, 1], 1, relevant=1)
    with pytest.raises(ValueError, match="starts at 1"):
        precision_at_k([0], [0], 0)
    with pytest.raises(ValueError, match="not the same"):
        retrieval_scores([[0]], [])


def test_reciprocal_rank_is_that_of_the_first_gold_document():
    assert reciprocal_rank([4, 2, 0], [0, 2]) == 0.5
    assert reciprocal_rank([4, 2, 0], [4]) == 1.0
    assert reciprocal_rank([4, 2, 0], [7]) == 0.0
    assert reciprocal_rank([], [0]) == 0.0


def test_fill_value_has_no_rank_and_is_never_gold():
    assert reciprocal_rank([-1, -1, 3], [3]) == 1.0
    assert reciprocal_rank([-1, 3], [-1]) == 0.0


# The figures of the rouge_score package, version 0.1.2, use_stemmer=False: prediction, reference, rouge1, rougeL.
ROUGE = [
    ("The cat sat on the mat.", "The mat: a cat sat!", 0.7272727272727272, 0.5454545454545454),
    (
        "Marie Curie was born in Warsaw in 1867.",
        "In 1867, Marie Curie was born, in Warsaw, the capital of Poland.",
        0.8,
        0.6,
    ),
    ("the the the", "the cat the", 0.6666666666666666, 0.6666666666666666),
    ("snake_case and state-of-the-art", "snake case or state of the art", 0.8571428571428571, 0.8571428571428571),
    ("", "nothing here", 0.0, 0.0),
    ("one two three", "four five six", 0.0, 0.0),
    (
        "The Danube flows through ten countries before it reaches the Black Sea",
        "Before it reaches the Black Sea the Danube crosses ten countries, more than any other river",
        0.7142857142857143,
        0.42857142857142855,
    ),
]


@pytest.mark.parametrize(("prediction", "reference", "unigram", "longest"), ROUGE)
def test_rouge_equals_the_rouge_score_package_on_ascii(prediction, reference, unigram, longest):
    assert rouge_1(prediction, reference) == pytest.approx(unigram, abs=1e-12)
    assert rouge_l(prediction, reference) == pytest.approx(longest, abs=1e-12)


def test_rouge_counts_letters_of_any_script():
    assert rouge_1("Café in Köln", "cafe in koln") == pytest.approx(1 / 3)
    assert rouge_l("Москва столица России", "МОСКВА — столица России!") == 1.0
    assert rouge_1("東京 は 日本", "東京") == pytest.approx(0.5)
    assert rouge_1("Cafe\u0301", "caf\u00e9") == 1.0
    assert rouge_1("… — !", "?") == 0.0


def slow_common_subsequence(left: list[str], right: list[str]) -> int:
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_equals_the_plain_table_of_the_longest_common_subsequence():
    draw = random.Random(0)
    for _ in range(200):
        left, right = ([draw.choice("abcde") for _ in range(draw.randint(1, 40))] for _ in range(2))
        f1 = 2 * slow_common_subsequence(left, right) / (len(left) + len(right))
        assert rouge_l(" ".join(left), " ".join(right)) == pytest.approx(f1, abs=1e-12)


def test_rouge_l_is_quick_on_whole_documents():
    draw = random.Random(1)
    left, right = (" ".join(draw.choice("abcdefghij") for _ in range(3000)) for _ in range(2))
    start = time.perf_counter()
    assert 0.3 < rouge_l(left, right) < 1
    assert time.perf_counter() - start < 1
