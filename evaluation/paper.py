"""The figures of the CLaRa paper (arXiv 2511.18659, version 3, Mistral-7B), to stand beside ours, never as ours.

They are in `paper_mistral.csv` with the columns table, system, init, setting, rate, dataset, metric, value: `table` is
the paper's table, empty where only the text's summary is known; `init` says what CLaRa was trained from (pretrain or
instruct), for the system `clara_ablation` which data its pretraining had; rate 1 is full text. Values are in percent,
as printed there.
"""

import csv
from functools import cache
from pathlib import Path

PAPER_LABEL = "paper, Mistral-7B"
PAPER_DATASETS = ("nq", "hotpotqa", "musique", "2wiki")
PAPER_FILE = Path(__file__).with_name("paper_mistral.csv")


@cache
def _rows() -> tuple[dict, ...]:
    with open(PAPER_FILE, encoding="utf-8", newline="") as file:
        return tuple(
            {**row, "rate": int(row["rate"]), "value": float(row["value"])} for row in csv.DictReader(file, strict=True)
        )


def paper_figures(
    metric: str,
    setting: str | None = None,
    init: str | None = None,
    rate: int | None = None,
    system: str | None = None,
) -> list[dict]:
    """The paper's figures of one metric (cover_em, f1, em, recall_1, recall_3, recall_5), in percent.

    Each is a dict of the file's columns, `rate` an int and `value` a float. What is None is not filtered by. The list
    is empty where the paper has nothing of the kind. Where the paper prints no average, there is none here.
    """
    wanted = {"metric": metric, "setting": setting, "init": init, "rate": rate, "system": system}
    return [
        dict(row) for row in _rows() if all(value is None or row[column] == value for column, value in wanted.items())
    ]


def paper_rows(suite: str, rate: int) -> list[dict]:
    """What the paper printed for a suite at a compression rate, as rows of `scoring.markdown_table`."""
    metrics = {"instruction_tuning": ("cover_em",), "end_to_end": ("f1", "em")}.get(suite, ())
    rows: dict[tuple, dict] = {}
    for metric in metrics:
        for figure in paper_figures(metric, rate=rate, system="clara"):
            label = f"{PAPER_LABEL}, rate {rate}, from {figure['init']}"
            row = rows.setdefault((metric, figure["setting"], label), {"label": label})
            row.update({"metric": metric, "setting": figure["setting"], figure["dataset"]: figure["value"]})
    return list(rows.values())
