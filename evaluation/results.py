"""What a run leaves behind: lines of predictions.jsonl, and where its figures come from."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from evaluation import systems
from evaluation.config import EvaluationConfig
from evaluation.paraphrase import bert_scores, entity_preservation
from evaluation.questions import PRETRAINING, Question

LIBRARIES = (
    *("torch", "transformers", "peft", "accelerate", "numpy", "bm25s", "sentence-transformers", "llmlingua", "spacy"),
)


def prediction_line(question: Question, answer: dict, baselines: dict[str, dict]) -> dict:
    """One line of predictions.jsonl."""
    read = [s["index"] for result in (answer, *baselines.values()) for s in result.get("selected", [])]
    shown = sorted({*question.positives, *read})
    return {
        "dataset": question.dataset,
        "setting": question.setting,
        "id": question.id,
        "question": question.question,
        "golden": list(question.golden),
        "pos_index": list(question.positives),
        "relevant": question.relevant,
        "candidates": len(question.docs),
        "documents": {str(i): question.docs[i] for i in shown},
        **answer,
        "baselines": baselines,
    }


def add_paraphrase_scores(lines: list[dict], config: EvaluationConfig) -> None:
    """Scores that need a model of their own, as `extra_scores` of each line."""
    for system in (systems.CLARA, systems.ORACLE_TEXT):
        results = [line if system == systems.CLARA else line["baselines"].get(system) for line in lines]
        if not lines or any(result is None for result in results):
            continue
        predictions = [result["prediction"] for result in results]
        documents = [line["documents"]["0"] for line in lines]
        extra: dict[str, list] = {}
        if config.entity_model:
            extra["entities"] = entity_preservation(predictions, documents, config.entity_model)
        if config.bertscore_model:
            extra["bertscore"] = bert_scores(predictions, documents, config.bertscore_model)
        for i, line in enumerate(lines):
            if extra:
                line.setdefault("extra_scores", {})[system] = {name: values[i] for name, values in extra.items()}


def notes(config: EvaluationConfig, lines: list[dict], dtype: torch.dtype, resumed: bool) -> list[str]:
    """What a reader of the figures must know."""
    found = [
        "Intervals are 95 % bootstrap intervals over questions; they say nothing about another training run.",
        "float32: the figures do not depend on the number of processes."
        if dtype == torch.float32
        else f"{dtype}: another number of processes, or another device, changes figures by rounding only.",
    ]
    if config.max_questions:
        found.append(f"The first {config.max_questions} questions of each file.")
    if resumed:
        found.append("The run was interrupted and taken up again: its seconds are those of the last part.")
    if config.first_answer_only:
        found.append("Only the first gold answer of each question counts, as in the public script.")
    if config.suite != PRETRAINING:
        unknown = sum(line["relevant"] is None for line in lines)
        without = sum(line["relevant"] == 0 for line in lines)
        if without:
            found.append(f"{without} questions have no gold passage and are left out of the retrieval figures.")

        if unknown:
            found.append(f"{unknown} questions are not in an Oracle file: no retrieval figures for them.")
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that matter, where they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict:
    """The commit of this code and whether files differ from it; None where it is no clone."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}
