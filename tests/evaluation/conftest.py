"""A tiny stage-2 checkpoint and evaluation files for it."""

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import DOCS, new_model

MORE_DOCS = [
    f"{name} has {i} windows and {i * i} doors." for i, name in enumerate(["Ulm", "Basel", "Turin", "Graz"], 2)
]
QUESTIONS = {
    "cities": [
        ("Where was Marie Curie born?", ["Warsaw", "Warszawa"], [0]),
        ("Which river crosses ten countries?", ["The Danube"], [1]),
        ("How many strings has a violin?", ["four", "4"], [2]),
        ("How many doors has Basel?", ["9"], [6]),
        ("Can penguins fly, and how do they swim?", ["no"], [3, 0]),
    ],
    "towns": [
        ("How many windows has Turin?", ["4"], [0, 8]),
        ("What is the capital of Australia?", ["Canberra"], [5]),
        ("Who counted the doors of Graz?", ["nobody"], [9, 1]),
    ],
}


def records(dataset: str, oracle: bool, candidates: int) -> list[dict]:
    """Pools over DOCS + MORE_DOCS: in Oracle all gold passages are in, in Normal those that a shifted window has."""
    texts, rows = [*DOCS, *MORE_DOCS], []
    for number, (question, golden, golds) in enumerate(QUESTIONS[dataset]):
        window = [(3 * number + i) % len(texts) for i in range(candidates)]
        if oracle:
            window = [*golds, *[i for i in window if i not in golds]][:candidates][::-1]
        rows.append(
            {
                "question": question,
                "docs": [texts[i] for i in window],
                "golden_answers": golden,
                "answer": golden[0],
                "pos_index": [window.index(i) for i in golds if i in window],
            }
        )
    return rows


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="package", autouse=True)
def cpu_only():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def stage2(mistral, tmp_path_factory) -> Path:
    """A checkpoint with random adapters: rate 4, 4 memory tokens, K = 2."""
    target = tmp_path_factory.mktemp("evaluated") / "stage2"
    model = new_model(mistral)
    model.config.training_stage = "stage2"
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def stage1(mistral, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("evaluated") / "stage1"
    new_model(mistral, query=False).save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def eval_data(tmp_path_factory) -> Path:
    """Both answering suites with two data sets, and paraphrases."""
    root = tmp_path_factory.mktemp("evaluation_data")
    for suite, candidates in (("end_to_end_evaluation", 6), ("instruction_tuning_evaluation", 3)):
        for dataset in QUESTIONS:
            for file, oracle in (("eval_processed_with_pos.jsonl", True), ("eval_processed_no_pos.jsonl", False)):
                write_lines(root / suite / dataset / file, records(dataset, oracle, candidates))
    paraphrases = [
        {"data_type": "paraphrase", "question": "", "answers": ["Curie came from Warsaw."], "docs": [DOCS[0]]},
        {"data_type": "qa", "question": ["How many?"], "answers": ["four"], "docs": [DOCS[2]]},
        {"data_type": "qa", "question": ["Where?"], "answers": ["Warsaw"], "docs": [DOCS[0]]},
    ]
    write_lines(root / "pretraining_evaluation" / "facts" / "eval_processed.jsonl", paraphrases)
    return root
