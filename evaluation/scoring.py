"""From a line of predictions.jsonl to numbers, and from numbers to figures with intervals and to a Markdown table.

The one place that knows which metrics there are and what each is computed from. Shares are in [0, 1]; tables print
them × 100. Knows no model and no file.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from evaluation.intervals import Figure, average_interval, mean_interval
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
    rouge_1,
    rouge_l,
)

SYSTEM = "clara"
"""Whose answers stand at the top level of a line; all other systems are under "baselines"."""
PARAPHRASE = "paraphrase"
"""The setting in which a document is to be restated, not a question answered."""
AVERAGE = "average"
"""Stands for a data set in figures: the macro average over the data sets."""
KS = (1, 3, 5)


@dataclass(frozen=True)
class Metric:
    """How a metric is printed: a share × 100. `higher_is_better` is None where neither is better."""

    label: str
    share: bool = True
    decimals: int = 1
    higher_is_better: bool | None = True

    def text(self, value: float, sign: str = "-") -> str:
        """The value as tables print it; sign "+" for a difference."""
        return f"{value * (100 if self.share else 1):{sign}.{self.decimals}f}"


METRICS = {
    "cover_em": Metric("Cover-EM"),
    "cover_span": Metric("Cover-EM, contiguous"),
    "f1": Metric("F1"),
    "em": Metric("EM"),
    "rouge_1": Metric("ROUGE-1 to document"),
    "rouge_l": Metric("ROUGE-L to document"),
    "rouge_1_reference": Metric("ROUGE-1 to reference"),
    "rouge_l_reference": Metric("ROUGE-L to reference"),
    "entities": Metric("Entities kept"),
    "bertscore": Metric("BERTScore F1"),
    **{f"recall_{k}": Metric(f"Recall@{k}") for k in KS},
    **{f"precision_{k}": Metric(f"Precision@{k}") for k in KS},
    "mrr": Metric("MRR"),
    "answer_words": Metric("Words in the answer", share=False, higher_is_better=None),
    "prompt_tokens": Metric("Tokens in the prompt", share=False, decimals=0, higher_is_better=False),
    "latency_s": Metric("Seconds a question", share=False, decimals=3, higher_is_better=False),
}
"""Every metric, in the order of tables."""

_TABLES = {
    "Answers": ["cover_em", "cover_span", "f1", "em"],
    "Paraphrases": ["rouge_1", "rouge_l", "rouge_1_reference", "rouge_l_reference", "entities", "bertscore"],
    "Retrieval": ["recall_1", "recall_3", "recall_5", "mrr"],
    "Length and time": ["answer_words", "prompt_tokens", "latency_s"],
}


def answer_scores(prediction: str, golden: list[str], first_answer_only: bool = False) -> dict[str, float]:
    """em, f1, cover_em, cover_span, each the best over the gold answers, and answer_words.

    A gold answer that normalises to nothing is covered by anything, so the cover forms leave it out; where no other
    is left they are missing. Without a gold answer only answer_words is there. first_answer_only: the first gold
    answer alone counts.
    """
    golds = golden[:1] if first_answer_only else golden
    scores = {"answer_words": float(len(prediction.split()))}
    if golds:
        scores["em"] = best_over_golds(exact_match_score, prediction, golds)
        scores["f1"] = best_over_golds(f1_score, prediction, golds)
    if tangible := [gold for gold in golds if normalize_answer(gold)]:
        scores["cover_em"] = best_over_golds(cover_exact_match_score, prediction, tangible)
        scores["cover_span"] = best_over_golds(cover_span_score, prediction, tangible)
    return scores


def ranking_scores(ranking: list[int], positives: list[int], relevant: int) -> dict[str, float]:
    """recall_k, precision_k (k = 1, 3, 5) and mrr of one question; {} where it has no relevant document.

    ranking: candidate indices, best first. positives: those among them that are gold. relevant: how many gold
    documents the question has, recall's denominator.
    """
    if relevant == 0:
        return {}
    scores = {f"recall_{k}": recall_at_k(ranking, positives, k, relevant) for k in KS}
    scores |= {f"precision_{k}": precision_at_k(ranking, positives, k) for k in KS}
    return scores | {"mrr": reciprocal_rank(ranking, positives)}


def paraphrase_scores(prediction: str, document: str, reference: str | None) -> dict[str, float]:
    """rouge_1 and rouge_l against the document, the same with `_reference` against a given paraphrase, answer_words."""
    scores = {
        "rouge_1": rouge_1(prediction, document),
        "rouge_l": rouge_l(prediction, document),
        "answer_words": float(len(prediction.split())),
    }
    if reference is not None:
        scores["rouge_1_reference"] = rouge_1(prediction, reference)
        scores["rouge_l_reference"] = rouge_l(prediction, reference)
    return scores


def line_scores(line: dict, first_answer_only: bool = False) -> dict[str, dict[str, float]]:
    """The scores of every system of one predictions line, by system and metric; a system without any is left out.

    `line["extra_scores"]`, system → metric → value or None, joins them where it is given.
    """
    found = {}
    for system, result in {SYSTEM: line, **line.get("baselines", {})}.items():
        scores: dict[str, float] = {}
        prediction, ranking, relevant = result.get("prediction"), result.get("ranking"), line.get("relevant")
        if prediction is not None and line["setting"] == PARAPHRASE:
            reference = line["golden"][0] if line["golden"] else None
            scores |= paraphrase_scores(prediction, line["documents"]["0"], reference)
        elif prediction is not None:
            scores |= answer_scores(prediction, line["golden"], first_answer_only)
        if ranking is not None and relevant is not None:
            scores |= ranking_scores(ranking, line["pos_index"], relevant)
        measured = {name: result.get(name) for name in ("prompt_tokens", "latency_s")}
        measured |= line.get("extra_scores", {}).get(system, {})
        scores |= {name: float(value) for name, value in measured.items() if value is not None}
        if scores:
            found[system] = {name: scores[name] for name in sorted(scores, key=list(METRICS).index)}
    return found


def figures(lines: Iterable[dict], first_answer_only: bool = False, seed: int = 0) -> list[dict]:
    """The "figures" of results.json: the mean of each data set × setting × system × metric, with its interval.

    A setting with several data sets also gets rows of the data set "average", for the systems and metrics that all
    of its data sets have. Data sets, settings and systems are in order of first appearance, the averages last.
    """
    # dataset → setting → system → metric → one value a question
    values: dict[str, dict[str, dict[str, dict[str, list[float]]]]] = {}
    settings: dict[str, list[str]] = {}
    for line in lines:
        by_system = values.setdefault(line["dataset"], {}).setdefault(line["setting"], {})
        datasets = settings.setdefault(line["setting"], [])
        if line["dataset"] not in datasets:
            datasets.append(line["dataset"])
        for system, scores in line_scores(line, first_answer_only).items():
            by_metric = by_system.setdefault(system, {})
            for metric, value in scores.items():
                by_metric.setdefault(metric, []).append(value)
    rows = [
        _row(dataset, setting, system, metric, mean_interval(by_metric[metric], seed))
        for dataset, by_setting in values.items()
        for setting, by_system in by_setting.items()
        for system, by_metric in by_system.items()
        for metric in METRICS
        if metric in by_metric
    ]
    for setting, datasets in settings.items():
        if len(datasets) < 2:
            continue
        for system in values[datasets[0]][setting]:
            for metric in METRICS:
                groups = [values[dataset][setting].get(system, {}).get(metric, []) for dataset in datasets]
                if all(groups):
                    rows.append(_row(AVERAGE, setting, system, metric, average_interval(groups, seed)))
    return rows


def _row(dataset: str, setting: str, system: str, metric: str, figure: Figure) -> dict:
    return {"dataset": dataset, "setting": setting, "system": system, "metric": metric, **asdict(figure)}


def markdown_table(results: dict, paper_rows: Sequence[dict] = ()) -> str:
    """The figures of a results.json as Markdown: for each setting a table of each group of metrics that it has.

    A cell is the mean and its 95 % interval. The heading of a data set has its number of questions; a cell that
    counts fewer says so. paper_rows are printed under the answers, as not measured here: {"label": …, dataset: value
    in percent, …}, with "setting" (default: every setting) and "metric" (default: cover_em).
    """
    blocks = []
    for setting in dict.fromkeys(figure["setting"] for figure in results["figures"]):
        rows = [figure for figure in results["figures"] if figure["setting"] == setting]
        blocks.append(f"## {setting.capitalize()}")
        paper = [row for row in paper_rows if row.get("setting", setting) == setting]
        for title, metrics in _TABLES.items():
            if chosen := [row for row in rows if row["metric"] in metrics]:
                blocks += [f"### {title}", _table(chosen, metrics, paper if title == "Answers" else [])]
    return "\n\n".join(blocks) + "\n"


def _table(rows: list[dict], metrics: list[str], paper: list[dict]) -> str:
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    questions = {dataset: max(row["n"] for row in rows if row["dataset"] == dataset) for dataset in datasets}
    cells = {}
    for row in rows:
        text = METRICS[row["metric"]].text
        fewer = f" (n = {row['n']})" if row["n"] < questions[row["dataset"]] else ""
        cell = f"{text(row['value'])} [{text(row['low'])}, {text(row['high'])}]{fewer}"
        cells[row["system"], row["metric"], row["dataset"]] = cell
    lines = [["metric", "system", *(f"{dataset} (n = {questions[dataset]})" for dataset in datasets)]]
    lines.append(["---", "---", *("---:" for _ in datasets)])
    for metric in metrics:
        for system in dict.fromkeys(row["system"] for row in rows):
            line = [cells.get((system, metric, dataset), "") for dataset in datasets]
            if any(line):
                lines.append([METRICS[metric].label, system, *line])
        for row in paper:
            if row.get("metric", "cover_em") == metric:
                printed = [f"{row[dataset]:.1f}" if dataset in row else "" for dataset in datasets]
                lines.append([METRICS[metric].label, f"{row['label']} (not measured here)", *printed])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
