"""evaluation/scoring.py: which metrics a predictions line has, their values, the figures and the table over them."""

import json

import pytest

from evaluation.intervals import average_interval, mean_interval
from evaluation.metrics import rouge_1, rouge_l
from evaluation.scoring import (
    METRICS,
    answer_scores,
    figures,
    line_scores,
    markdown_table,
    paraphrase_scores,
    ranking_scores,
)


def make_line(dataset="nq", setting="normal", **fields) -> dict:
    """A predictions line as the evaluation writes it."""
    line = {
        "dataset": dataset,
        "setting": setting,
        "id": "0",
        "question": "Where was Marie Curie born?",
        "golden": ["Warsaw", "Warszawa"],
        "pos_index": [2],
        "relevant": 2,
        "candidates": 4,
        "documents": {"2": "Marie Curie was born in Warsaw."},
        "prediction": "In Warsaw.",
        "selected": [{"index": 0, "score": 0.5}, {"index": 2, "score": 0.4}],
        "ranking": [0, 2, 1, 3],
        "prompt_tokens": 40,
        "latency_s": 0.25,
        "baselines": {
            "closed_book": {"prediction": "Paris", "prompt_tokens": 12, "latency_s": 0.5},
            "bm25": {"ranking": [2, 0, 1, 3], "selected": [{"index": 2, "score": 1.0}]},
        },
    }
    return {**line, **fields}


def test_answer_scores_take_the_best_gold_answer():
    scores = answer_scores("It is Warszawa", ["Warsaw", "Warszawa"])
    assert scores == {"em": 0.0, "f1": pytest.approx(0.5), "cover_em": 1.0, "cover_span": 1.0, "answer_words": 3.0}
    assert all(type(value) is float for value in scores.values())


def test_first_answer_only_leaves_the_aliases_out():
    scores = answer_scores("It is Warszawa", ["Warsaw", "Warszawa"], first_answer_only=True)
    assert (scores["f1"], scores["cover_em"], scores["cover_span"]) == (0.0, 0.0, 0.0)


def test_a_gold_answer_that_normalises_to_nothing_covers_nothing():
    scores = answer_scores("Paris", ["The", "Warsaw"])
    assert (scores["cover_em"], scores["cover_span"]) == (0.0, 0.0)
    assert answer_scores("Warsaw", ["The", "Warsaw"])["cover_em"] == 1.0


def test_where_no_gold_answer_is_left_the_cover_forms_are_missing():
    assert set(answer_scores("anything", ["The", "..."])) == {"em", "f1", "answer_words"}
    assert answer_scores("the", ["The"])["em"] == 1.0
    assert set(answer_scores("anything", ["The", "Warsaw"], first_answer_only=True)) == {"em", "f1", "answer_words"}
    assert answer_scores("two words", []) == {"answer_words": 2.0}


def test_ranking_scores_by_hand():
    scores = ranking_scores([0, 2, 1, 3], [2, 3], relevant=3)
    assert scores == {
        **{"recall_1": 0.0, "recall_3": pytest.approx(1 / 3), "recall_5": pytest.approx(2 / 3)},
        **{"precision_1": 0.0, "precision_3": pytest.approx(1 / 3), "precision_5": 0.4, "mrr": 0.5},
    }
    assert ranking_scores([0, 1], [], relevant=0) == {}
    assert set(ranking_scores([0, 1], [], relevant=1).values()) == {0.0}


def test_paraphrases_are_scored_against_the_document_and_a_given_paraphrase():
    scores = paraphrase_scores("A b c", "a b d e", "a c")
    assert scores == {
        **{"rouge_1": rouge_1("A b c", "a b d e"), "rouge_l": rouge_l("A b c", "a b d e"), "answer_words": 3.0},
        **{"rouge_1_reference": pytest.approx(0.8), "rouge_l_reference": pytest.approx(0.8)},
    }
    assert set(paraphrase_scores("a", "b", None)) == {"rouge_1", "rouge_l", "answer_words"}


def test_a_line_gives_each_system_the_metrics_of_what_it_did():
    scores = line_scores(make_line())
    answers, costs = {"em", "f1", "cover_em", "cover_span", "answer_words"}, {"prompt_tokens", "latency_s"}
    rankings = {f"{name}_{k}" for name in ("recall", "precision") for k in (1, 3, 5)} | {"mrr"}
    assert {system: set(found) for system, found in scores.items()} == {
        "clara": answers | costs | rankings,
        "closed_book": answers | costs,
        "bm25": rankings,
    }
    assert (scores["clara"]["cover_em"], scores["closed_book"]["cover_em"]) == (1.0, 0.0)
    assert (scores["clara"]["recall_1"], scores["bm25"]["recall_1"], scores["clara"]["recall_3"]) == (0.0, 0.5, 0.5)
    assert (scores["clara"]["latency_s"], scores["closed_book"]["prompt_tokens"]) == (0.25, 12.0)


@pytest.mark.parametrize("relevant", [None, 0])
def test_without_known_gold_documents_there_are_no_ranking_scores(relevant):
    scores = line_scores(make_line(relevant=relevant, pos_index=[]))
    assert "mrr" not in scores["clara"] and "bm25" not in scores


def test_no_ranking_no_ranking_scores():
    assert "recall_1" not in line_scores(make_line(ranking=None))["clara"]


def test_a_paraphrase_line_is_scored_as_a_paraphrase_and_takes_scores_made_elsewhere():
    line = make_line(setting="paraphrase", golden=[], documents={"0": "In Warsaw"}, ranking=None, relevant=None)
    line["baselines"] = {"oracle_text": {"prediction": "Paris"}}
    line["extra_scores"] = {"clara": {"entities": 0.5, "bertscore": 0.9}, "oracle_text": {"entities": None}}
    scores = line_scores(line)
    assert set(scores["clara"]) == {
        *("rouge_1", "rouge_l", "entities", "bertscore", "answer_words", "prompt_tokens", "latency_s"),
    }
    assert (scores["clara"]["rouge_1"], scores["clara"]["entities"]) == (1.0, 0.5)
    assert set(scores["oracle_text"]) == {"rouge_1", "rouge_l", "answer_words"}
    assert line_scores({**line, "extra_scores": {"clara": {"entities": 0.0}}})["clara"]["entities"] == 0.0
    given = line_scores({**line, "golden": ["In Warsaw"]})
    assert given["clara"]["rouge_l_reference"] == 1.0 and given["oracle_text"]["rouge_l_reference"] == 0.0


def test_a_score_of_unknown_name_is_not_dropped_in_silence():
    with pytest.raises(ValueError, match="bleu"):
        line_scores(make_line(extra_scores={"clara": {"bleu": 1.0}}))


def lines_of_two_data_sets() -> list[dict]:
    right, wrong = {"prediction": "Warsaw"}, {"prediction": "Paris"}
    lines = [make_line("nq", **right), make_line("nq", **wrong), make_line("nq", **wrong, golden=["the"])]
    lines += [make_line("nq", "oracle", **right)]
    lines += [make_line("musique", **right), make_line("musique", **right, relevant=0, pos_index=[])]
    lines[-1]["baselines"] = lines[-2]["baselines"] = {"bm25": {"ranking": [0, 1, 2]}}
    return lines


def by_place(rows: list[dict]) -> dict[tuple, dict]:
    return {(row["dataset"], row["setting"], row["system"], row["metric"]): row for row in rows}


def test_figures_are_means_with_intervals_by_data_set_setting_system_and_metric():
    rows = by_place(figures(lines_of_two_data_sets(), seed=3))
    row = rows["nq", "normal", "clara", "em"]
    expected = mean_interval([1.0, 0.0, 0.0], seed=3)
    assert (row["value"], row["low"], row["high"], row["n"]) == (1 / 3, expected.low, expected.high, 3)
    assert rows["nq", "normal", "clara", "cover_em"]["n"] == 2
    assert rows["musique", "normal", "clara", "recall_1"]["n"] == 1
    assert rows["nq", "oracle", "clara", "em"]["n"] == 1
    json.dumps(list(rows.values()), allow_nan=False)


def test_the_average_is_over_data_sets_and_only_where_all_of_them_have_the_metric():
    rows = by_place(figures(lines_of_two_data_sets()))
    row, expected = rows["average", "normal", "clara", "em"], average_interval([[1.0, 0.0, 0.0], [1.0, 1.0]])
    assert row["value"] == pytest.approx((1 / 3 + 1) / 2)
    assert (row["low"], row["high"], row["n"]) == (expected.low, expected.high, 5)
    assert ("average", "normal", "bm25", "mrr") in rows
    assert ("average", "normal", "closed_book", "em") not in rows
    assert ("average", "oracle", "clara", "em") not in rows


def test_figures_keep_the_order_of_first_appearance_with_averages_last():
    rows = figures(lines_of_two_data_sets())
    groups = list(dict.fromkeys((r["dataset"], r["setting"]) for r in rows))
    assert groups == [("nq", "normal"), ("nq", "oracle"), ("musique", "normal"), ("average", "normal")]
    metrics = [r["metric"] for r in rows if (r["dataset"], r["setting"], r["system"]) == ("nq", "normal", "clara")]
    assert metrics == [name for name in METRICS if name in metrics]


def test_first_answer_only_reaches_the_figures():
    lines = [make_line(prediction="Warszawa")]
    values = [
        next(r["value"] for r in figures(lines, first) if (r["system"], r["metric"]) == ("clara", "em"))
        for first in (False, True)
    ]
    assert values == [1.0, 0.0]


FIGURES = [
    {**{"dataset": d, "setting": s, "system": system, "metric": m}, **{"value": v, "low": lo, "high": hi, "n": n}}
    for d, s, system, m, v, lo, hi, n in [
        ("nq", "normal", "clara", "cover_em", 0.4625, 0.4213, 0.5031, 98),
        ("nq", "normal", "clara", "em", 0.25, 0.2, 0.3, 100),
        ("nq", "normal", "bm25", "recall_1", 0.1, 0.05, 0.15, 80),
        ("nq", "normal", "clara", "latency_s", 0.1234, 0.12, 0.13, 100),
        ("nq", "normal", "clara", "precision_1", 0.5, 0.5, 0.5, 80),
        ("average", "normal", "clara", "em", 0.25, 0.2, 0.3, 100),
        ("nq", "oracle", "clara", "em", 1.0, 1.0, 1.0, 7),
    ]
]
TABLE = """\
## Normal

### Answers

| metric | system | nq (n = 100) | average (n = 100) |
| --- | --- | ---: | ---: |
| Cover-EM | clara | 46.2 [42.1, 50.3] (n = 98) |  |
| Cover-EM | paper, Mistral-7B, rate 16 (not measured here) | 55.6 | 39.0 |
| EM | clara | 25.0 [20.0, 30.0] | 25.0 [20.0, 30.0] |

### Retrieval

| metric | system | nq (n = 80) |
| --- | --- | ---: |
| Recall@1 | bm25 | 10.0 [5.0, 15.0] |

### Length and time

| metric | system | nq (n = 100) |
| --- | --- | ---: |
| Seconds a question | clara | 0.123 [0.120, 0.130] |

## Oracle

### Answers

| metric | system | nq (n = 7) |
| --- | --- | ---: |
| EM | clara | 100.0 [100.0, 100.0] |
"""


def test_the_table_has_a_block_a_setting_and_marks_what_was_not_measured():
    paper = [{"label": "paper, Mistral-7B, rate 16", "setting": "normal", "nq": 55.56, "average": 38.96, "2wiki": 1.0}]
    assert markdown_table({"figures": FIGURES}, paper) == TABLE


def test_the_table_takes_what_figures_makes():
    table = markdown_table({"figures": figures(lines_of_two_data_sets())})
    assert "| EM | clara | 33.3 [0.0, 100.0] | 100.0 [100.0, 100.0] |" in table
    assert "not measured" not in table
