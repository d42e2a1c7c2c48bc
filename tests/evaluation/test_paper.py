"""evaluation/paper.py: the paper's tables are whole, and equal the averages that are known apart from them."""

from collections import Counter

import pytest

from evaluation.paper import PAPER_DATASETS, PAPER_FILE, paper_figures, paper_rows

RATES = (4, 16, 32, 64, 128, 256)
AVERAGES = {
    "normal": (39.86, 38.96, 38.82, 38.39, 37.85, 37.38),
    "oracle": (66.76, 63.90, 61.53, 58.66, 55.50, 52.86),
}


@pytest.mark.parametrize("setting", AVERAGES)
@pytest.mark.parametrize("position", range(len(RATES)))
def test_rows_of_table_5_agree_with_the_papers_averages(setting, position):
    figures = paper_figures("cover_em", setting, "instruct", RATES[position], "clara")
    values = {figure["dataset"]: figure["value"] for figure in figures}
    assert set(values) == {*PAPER_DATASETS, "average"}
    mean = sum(values[dataset] for dataset in PAPER_DATASETS) / 4
    assert mean == pytest.approx(AVERAGES[setting][position], abs=0.02)
    assert values["average"] == AVERAGES[setting][position]


def test_every_row_of_the_tables_is_there():
    metrics = ("cover_em", "f1", "em", "recall_1", "recall_3", "recall_5")
    counts = Counter((row["table"], row["system"], metric) for metric in metrics for row in paper_figures(metric))
    expected = {("5", "clara", "cover_em"): 2 * 6 * 5}
    expected |= {("6", "clara", metric): 2 * 2 * 6 * 4 for metric in ("f1", "em")}
    for k in (1, 3, 5):
        expected |= {("7", "clara", f"recall_{k}"): 2 * 6 * 4}
        expected |= {("7", system, f"recall_{k}"): 4 for system in ("bm25", "bge_reranker")}
    expected |= {("", system, "cover_em"): 2 for system in ("text_rag", "pisco")} | {
        ("", "clara_ablation", "cover_em"): 5
    }
    assert counts == expected
    assert sum(counts.values()) == len(PAPER_FILE.read_text(encoding="utf-8").splitlines()) - 1


def test_no_figure_is_there_twice():
    columns = ("table", "system", "init", "setting", "rate", "dataset", "metric")
    rows = [
        row for metric in ("cover_em", "f1", "em", "recall_1", "recall_3", "recall_5") for row in paper_figures(metric)
    ]
    assert max(Counter(tuple(row[column] for column in columns) for row in rows).values()) == 1
    assert all(0 < row["value"] < 100 for row in rows)


def test_single_figures_are_found_by_their_filters():
    (figure,) = (f for f in paper_figures("recall_3", "oracle", "pretrain", 32) if f["dataset"] == "2wiki")
    assert (figure["value"], figure["table"], figure["rate"]) == (64.96, "7", 32)
    assert [f["value"] for f in paper_figures("cover_em", "normal", system="text_rag")] == [37.67]
    assert {f["init"]: f["value"] for f in paper_figures("cover_em", system="clara_ablation")}["paraphrase"] == 60.64


def test_what_the_paper_has_not_is_an_empty_list():
    assert paper_figures("bertscore") == []
    assert paper_figures("recall_1", "normal") == []


def test_a_caller_may_change_what_it_was_given():
    paper_figures("em")[0]["value"] = -1
    assert paper_figures("em")[0]["value"] == 31.21


def test_rows_of_a_table_are_those_of_the_suite_and_the_rate():
    (normal, oracle) = paper_rows("instruction_tuning", 16)
    assert normal["nq"] == 55.56 and oracle["2wiki"] == 66.16 and normal["metric"] == "cover_em"
    rows = paper_rows("end_to_end", 4)
    assert {(row["metric"], row["setting"]) for row in rows} == {
        (m, s) for m in ("f1", "em") for s in ("normal", "oracle")
    }
    assert {
        row["label"].split()[-1]: row["2wiki"] for row in rows if (row["metric"], row["setting"]) == ("em", "oracle")
    } == {"pretrain": 69.14, "instruct": 69.74}
    assert paper_rows("end_to_end", 8) == paper_rows("pretraining", 16) == []
