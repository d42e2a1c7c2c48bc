"""Reads what an evaluation wrote: `results.json` and `predictions.jsonl` of a directory. Knows nothing of pages.

Everything raises ValueError with a sentence for the user; a file is named in it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.jsonl"
RESULTS_FORMAT = 1
SYSTEM_LABELS = {
    "clara": "CLaRa",
    "closed_book": "closed book",
    "text_rag": "text RAG",
    "oracle_text": "gold passages as text",
    "text_rag_tuned": "text RAG, fine-tuned",
    "oracle_text_tuned": "gold passages, fine-tuned",
    "llmlingua2": "LLMLingua-2",
    "random": "random order",
    "bm25": "BM25",
    "dense": "dense",
    "cross_encoder": "cross-encoder",
    "pisco": "PISCO",
    "bge_reranker": "BGE-reranker",
}
"""What pictures and pages call a system; another one by its own name."""
DATASET_LABELS = {"nq": "NQ", "hotpotqa": "HotpotQA", "musique": "MuSiQue", "2wiki": "2Wiki", "average": "Average"}
_SECTIONS = {"suite": str, "config": dict, "data": list, "systems": dict, "figures": list}
_FIGURE_TEXTS = ("dataset", "setting", "system", "metric")
_LINE_KEYS = {"dataset": str, "setting": str, "question": str, "golden": list, "documents": dict}


def _parse(text: str, where: str) -> dict:
    """A JSON object, with null where Python's writer put NaN or an infinity."""
    try:
        parsed = json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); run the evaluation again.") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{where} is not a JSON object; run the evaluation again.")
    return parsed


def _check(holder: dict, wanted: Mapping[str, type], where: str) -> None:
    for key, kind in wanted.items():
        if not isinstance(holder.get(key), kind):
            raise ValueError(f"{where} has no usable {key!r} ({kind.__name__}); was it written by evaluation.evaluate?")


def _check_figure(figure: Any, where: str) -> None:
    if not isinstance(figure, dict):
        raise ValueError(f"{where} is not an object; was it written by evaluation.evaluate?")
    _check(figure, dict.fromkeys(_FIGURE_TEXTS, str), where)
    for key in ("value", "low", "high"):
        value = figure.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            raise ValueError(f"{where} has a {key!r} that is not a number: {value!r}.")


def read_text(path: Path) -> str:
    """A file's text. Raises ValueError in words when it is missing, unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None


def read_results(folder: Path) -> dict:
    """The checked content of `results.json`; figures that could not be computed have the value None."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {RESULTS_FILE}; give a directory that evaluation.evaluate wrote.")
    results = _parse(read_text(path), str(path))
    if results.get("format") != RESULTS_FORMAT:
        raise ValueError(f"{path} has format {results.get('format')!r}; this version reads format {RESULTS_FORMAT}.")
    _check(results, _SECTIONS, str(path))
    for number, figure in enumerate(results["figures"]):
        _check_figure(figure, f"{path}: figure {number}")
    return results


def find_results(paths: Sequence[Path]) -> list[Path]:
    """Directories with a `results.json`: those given, and those found below one that has none itself, in order."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is no directory; give one that evaluation.evaluate wrote.")
        here = [path] if (path / RESULTS_FILE).is_file() else sorted(file.parent for file in path.rglob(RESULTS_FILE))
        if not here:
            raise ValueError(f"{path} holds no {RESULTS_FILE}, nor does any directory below it.")
        found.update(dict.fromkeys(here))
    return list(found)


def read_predictions(folder: Path) -> Iterator[dict]:
    """The lines of `predictions.jsonl`, checked one by one; nothing when there is no such file."""
    path = folder / PREDICTIONS_FILE
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                line = _parse(text, f"{path}:{number}")
                _check(line, _LINE_KEYS, f"{path}:{number}")
                if line.get("prediction", "") is not None:  # null: it only ranks
                    _check(line, {"prediction": str}, f"{path}:{number}")
                yield line


def own_name(value: Any) -> str:
    """The last part of a path or Hub id: mistralai/Mistral-7B → Mistral-7B."""
    return str(value or "").replace("\\", "/").rstrip("/").rpartition("/")[2]
