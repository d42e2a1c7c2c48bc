"""One HTML page of what evaluations wrote: figures with intervals, plots, and every question to look at.

    python -m evaluation.report DIR [DIR…] [--output FILE.html]

A DIR holds results.json, or directories below it do. The page needs nothing but a browser: style, program and data are
inside, and it loads nothing. Texts from the data reach it as JSON and are shown as text, never as HTML.
"""

import argparse
import base64
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.paper import PAPER_LABEL, paper_figures
from evaluation.report_data import (
    PREDICTIONS_FILE,
    SYSTEM_LABELS,
    find_results,
    own_name,
    read_predictions,
    read_results,
)
from evaluation.scoring import METRICS, line_scores
from openrlhf.utils.logging import write_whole

GENERATOR = '<meta name="generator" content="clara-evaluation-report">'
# What a question's chips show; the rest of METRICS is in the tables only.
_QUESTION_METRICS = ("cover_em", "em", "f1", "rouge_l", "rouge_l_reference", "recall_1", "recall_3", "recall_5")
_SHOWN_CONFIG = {
    "checkpoint": "checkpoint",
    "base_model": "base model",
    "training_stage": "stage",
    "compr_rate": "compression rate",
    "doc_max_length": "tokens of a document",
    "n_memory_tokens": "vectors of a document",
    "generation_top_k": "documents read",
    "max_new_tokens": "longest answer, tokens",
    "dtype": "dtype",
    "seed": "seed",
    "first_answer_only": "first gold answer only",
    "dense_model": "dense model",
    "cross_encoder": "cross-encoder",
    "text_rag_checkpoint": "fine-tuned text RAG",
    "llmlingua_model": "LLMLingua model",
}


def safe_json(value: Any) -> str:
    """JSON that cannot end the <script> element that holds it, whatever strings it has."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A lone surrogate cannot be encoded; inside a JSON string its escape means the same.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def section_of(metric: str) -> str:
    """The section of the page that a metric of METRICS belongs to."""
    if not METRICS[metric].share:
        return "Length and time"
    return "Retrieval" if metric.startswith(("recall", "precision", "mrr")) else "Answers"


def run_facts(results: dict) -> list[list[str]]:
    """What was run, as pairs of name and value; what is null or missing is left out."""
    config, git = results["config"], results.get("git") or {}
    facts = [[name, config.get(key)] for key, name in _SHOWN_CONFIG.items()]
    commit = git.get("commit")
    facts += [
        ["commit", f"{commit}, with uncommitted changes" if commit and git.get("dirty") else commit],
        ["started", results.get("started")],
        ["time", f"{results['seconds']:.0f} s" if isinstance(results.get("seconds"), (int, float)) else None],
        ["device", results.get("device")],
        ["processes", results.get("processes")],
        ["versions", ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items())],
        ["command", results.get("command")],
    ]
    words = {True: "yes", False: "no"}
    return [[name, words[v] if isinstance(v, bool) else str(v)] for name, v in facts if v not in (None, "")]


class Texts:
    """Documents of the page, each text once, however many questions and runs show it."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def add(self, text: str) -> int:
        """The text's number."""
        return self.numbers.setdefault(text, len(self.numbers))


def page_answer(result: dict, scores: dict[str, float]) -> dict:
    """One system's part of a question, as report.js reads it."""
    ranking = result.get("ranking")
    return {
        "prediction": result.get("prediction"),
        "selected": [[entry["index"], entry.get("score")] for entry in result.get("selected") or []],
        "ranking": ranking[:5] if ranking else None,
        "prompt_tokens": result.get("prompt_tokens"),
        "latency_s": result.get("latency_s"),
        "scores": {name: round(scores[name], 4) for name in _QUESTION_METRICS if name in scores},
    }


def page_question(line: dict, run: int, texts: Texts, first_answer_only: bool) -> dict:
    """A line of predictions as report.js reads it, its documents replaced by their numbers."""
    scores = line_scores(line, first_answer_only)
    results = {"clara": line, **line.get("baselines", {})}
    return {
        "run": run,
        "dataset": line["dataset"],
        "setting": line["setting"],
        "id": str(line.get("id", "")),
        "question": line["question"],
        "golden": line["golden"],
        "pos_index": line.get("pos_index") or [],
        "relevant": line.get("relevant"),
        "candidates": line.get("candidates"),
        "documents": {index: texts.add(text) for index, text in line["documents"].items()},
        "systems": {name: page_answer(result, scores.get(name, {})) for name, result in results.items()},
    }


def read_questions(folder: Path, results: dict, run: int, texts: Texts, limit: int) -> tuple[list[dict], int]:
    """The first questions of each data set and setting, `limit` at most in all, and how many there are."""
    share = max(1, limit // max(1, len(results["data"])))
    seen: Counter = Counter()
    kept: list[dict] = []
    first_only = bool(results["config"].get("first_answer_only"))
    for line in tqdm(read_predictions(folder), desc=folder.name, unit=" questions", disable=not sys.stderr.isatty()):
        group = line["dataset"], line["setting"]
        seen[group] += 1
        if seen[group] <= share and len(kept) < limit:
            try:
                kept.append(page_question(line, run, texts, first_only))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                number = sum(seen.values())
                raise ValueError(
                    f"{folder / PREDICTIONS_FILE}: question {number} cannot be shown: {error!r}."
                ) from None
    return kept, sum(seen.values())


def run_labels(folders: Sequence[Path]) -> list[str]:
    """A short name a run: its directory's, or the path below what all have in common where two are alike."""
    resolved = [folder.resolve() for folder in folders]
    names = [folder.name for folder in resolved]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(resolved)
    return [os.path.relpath(folder, common) for folder in resolved]


def paper_rows(read: list[dict]) -> list[dict]:
    """The paper's figures of the runs' rates and of full text, for the data sets and settings that the runs have."""
    rates = {results["config"].get("compr_rate") for results in read} | {1}
    places = {(figure["dataset"], figure["setting"]) for results in read for figure in results["figures"]}
    return [
        {key: row[key] for key in ("system", "init", "setting", "rate", "dataset", "metric", "value")}
        for metric in METRICS
        for row in paper_figures(metric)
        if row["system"] != "clara_ablation"
        and (row["rate"] in rates or row["system"] == "pisco")
        and (row["dataset"], row["setting"]) in places
    ]


def collect(folders: Sequence[Path], max_questions: int) -> tuple[dict, dict]:
    """The page's data: (runs, metrics, paper's figures) and (questions, texts)."""
    read = [read_results(folder) for folder in folders]
    texts = Texts()
    questions: list[dict] = []
    runs: list[dict] = []
    for folder, label, results in zip(folders, run_labels(folders), read, strict=True):
        kept, total = read_questions(folder, results, len(runs), texts, max_questions)
        questions += kept
        runs.append(
            {
                "label": label,
                "suite": results["suite"],
                "title": f"{own_name(results['config'].get('base_model'))}, rate {results['config'].get('compr_rate')}",
                "facts": run_facts(results),
                "notes": results.get("notes") or [],
                "data": results["data"],
                "systems": results["systems"],
                "figures": [figure for figure in results["figures"] if figure["metric"] in METRICS],
                "questions": total,
                "shown": len(kept),
            }
        )
    used = {figure["metric"] for run in runs for figure in run["figures"]}
    metrics = {
        name: {"label": m.label, "share": m.share, "decimals": m.decimals, "section": section_of(name),
               "higher": m.higher_is_better}
        for name, m in METRICS.items() if name in used
    }  # fmt: skip
    chips = {name: METRICS[name].label for name in _QUESTION_METRICS}
    about = {"runs": runs, "metrics": metrics, "chips": chips, "labels": SYSTEM_LABELS, "paper": paper_rows(read),
             "paperLabel": PAPER_LABEL}  # fmt: skip
    return about, {"questions": questions, "texts": list(texts.numbers)}


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"


def build_page(about: dict, browser: dict) -> str:
    """The whole page. Its policy lets a browser run this program and style only, and load nothing."""
    here = Path(__file__).parent
    style, program = (f"\n{(here / name).read_text(encoding='utf-8')}" for name in ("report.css", "report.js"))
    title = escape(f"CLaRa evaluation: {', '.join(run['label'] for run in about['runs'])}")
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(program)}; base-uri 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{GENERATOR}
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header id="about"><h1>CLaRa evaluation</h1></header>
<main>
<div id="figures"></div>
<section id="browser" aria-labelledby="browser-title"></section>
</main>
<noscript><p>This page needs JavaScript. The same figures are in table.md beside results.json.</p></noscript>
<script type="application/json" id="data">{safe_json(about)}</script>
<script type="application/json" id="questions">{safe_json(browser)}</script>
<script>{program}</script>
</body>
</html>
"""


def check_target(target: Path, force: bool) -> None:
    """Raises ValueError where writing would destroy a file that is no page of this command."""
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise ValueError(f"{target} cannot be written: give --output a file in a directory that exists.")
    if target.exists() and not force and GENERATOR not in target.read_bytes()[:4096].decode("utf-8", "replace"):
        raise ValueError(f"{target} exists and was not written by this command; give another --output, or --force.")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="evaluation.report", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="holds results.json, itself or below")
    parser.add_argument("--output", type=Path, help="the page; default: report.html in the first DIR")
    parser.add_argument("--max_questions", type=int, default=2000, help="most questions a run (%(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite a file that is no such page")
    args = parser.parse_args(argv)
    target = args.output or args.directories[0] / "report.html"
    try:
        if args.max_questions < 0:
            raise ValueError(f"--max_questions is {args.max_questions}; give 0 or more.")
        folders = find_results(args.directories)
        check_target(target, args.force)
        about, browser = collect(folders, args.max_questions)
        page = build_page(about, browser)
        write_whole(target, page)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    left_out = sum(run["questions"] - run["shown"] for run in about["runs"])
    rest = f", {left_out} left out (--max_questions {args.max_questions})" if left_out else ""
    size = len(page.encode("utf-8")) / 1e6
    questions = f"{len(browser['questions'])} questions{rest}"
    print(f"{target}: {len(folders)} run{'s' * (len(folders) > 1)}, {questions}, {size:.1f} MB; open it in a browser")


if __name__ == "__main__":
    main()
