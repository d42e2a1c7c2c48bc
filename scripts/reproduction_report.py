"""Writes docs/REPRODUCTION.md from what scripts/reproduce_small.sh left; every figure is read from its files.

    python scripts/reproduction_report.py --work results/reproduction_cpu --part cpu --out docs/REPRODUCTION.md

What was not run is said to be not run.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from evaluation.paper import PAPER_DATASETS, paper_figures
from evaluation.report_data import DATASET_LABELS, SYSTEM_LABELS, read_results
from evaluation.scoring import AVERAGE, SYSTEM
from openrlhf.utils.logging import METRICS_FILE, read_metrics, write_whole

METRICS = {"cover_em": "Cover-EM", "recall_5": "Recall@5"}
SAID_AGAIN = {"rouge_1": "ROUGE-1", "rouge_l": "ROUGE-L"}
SECONDS = "seconds.json"  # of every step, in the order in which they were run
OF_A_RUN = ("config.json", "training_config.json", METRICS_FILE)
SETTINGS = ("normal", "oracle")
TRAINED = ["run", "stage", "precision", "steps × records", "learning rate", "loss", "span loss", "minutes"]


def table(heading: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are set to the right."""
    lines = [heading, ["---", *["--:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(figure: dict | None) -> str:
    """A share with its interval, in per cent."""
    if figure is None or figure["value"] is None:
        return "–"
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


class Results:
    """All measurements under a directory, by the name of the step's directory."""

    def __init__(self, work: Path):
        folders = sorted(path.parent for path in (work / "results").glob("*/results.json"))
        self.runs = {folder.name: read_results(folder) for folder in folders}

    def figure(self, run: str, system: str, metric: str, setting: str, dataset: str = AVERAGE) -> dict | None:
        """One figure, or None where it was not measured."""
        wanted = (system, metric, setting, dataset)
        for figure in self.runs.get(run, {}).get("figures", []):
            if (figure["system"], figure["metric"], figure["setting"], figure["dataset"]) == wanted:
                return figure
        return None

    def anywhere(self, ending: str, *wanted: str) -> dict | None:
        """The first such figure among runs with this ending: baselines are measured once, beside the first rate."""
        found = (self.figure(run, *wanted) for run in self.runs if run.endswith(ending))
        return next((figure for figure in found if figure is not None), None)

    def systems(self, run: str) -> list[str]:
        """Systems measured in a run, CLaRa first."""
        found = dict.fromkeys(figure["system"] for figure in self.runs[run]["figures"])
        return sorted(found, key=lambda name: name != SYSTEM)


def without_places(text: str) -> str:
    """Absolute paths shortened to their last part: where things lay on one machine helps nobody."""
    return re.sub(r"(?<=[\s\"])/[^\s\"]*/", "…/", text)


def keep(work: Path, kept: Path) -> None:
    """Adds the figures under `work` to those that lie beside the page: metrics, flags, seconds, results and answers.

    So a part that is run bit by bit, on several machines, has one record. Checkpoints and predictions stay where they
    are.
    """
    trained = [path.parent for path in work.glob("checkpoints/**/config.json")]
    files = [folder / name for folder in trained if (folder / METRICS_FILE).is_file() for name in OF_A_RUN]
    answers = (*work.glob("fresh/*.json"), *work.glob("held_out/*.json"))
    for path in (*files, *work.glob("results/*/results.json"), *answers):
        target = kept / path.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, without_places(path.read_text(encoding="utf-8")))
    seconds: dict[str, float] = {}
    for path in (kept / SECONDS, work / SECONDS):
        seconds.update(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
    write_whole(kept / SECONDS, json.dumps(seconds, indent=1) + "\n")


def training_rows(work: Path) -> list[list[str]]:
    """Losses of each training run: means over the first and last quarter of its steps."""
    rows = []
    seconds = json.loads((work / SECONDS).read_text(encoding="utf-8"))
    for name in seconds:
        folder = work / "checkpoints" / name
        if not (folder / "config.json").is_file():  # not trained to its end, or no training
            continue
        settings = json.loads((folder / "training_config.json").read_text(encoding="utf-8"))
        lines = [line for line in read_metrics(folder / METRICS_FILE) if line["split"] == "train"]
        quarter = max(1, len(lines) // 4)
        means = [sum(line["loss"] for line in part) / quarter for part in (lines[:quarter], lines[-quarter:])]
        size = f"{len(lines)} × {settings['train_batch_size']}"
        losses = f"{means[0]:.2f} → {means[1]:.2f}"
        spans = [line["span_loss"] for line in lines[-quarter:] if "span_loss" in line]
        span = f"{sum(spans) / quarter:.2f}" if spans else "–"
        precision = "bfloat16" if settings["bf16"] else "float32"
        minutes = f"{seconds[name] / 60:.0f}"
        rows.append(
            [f"`{name}`", settings["stage"], precision, size, f"{settings['learning_rate']:g}", losses, span, minutes]
        )
    return rows


def measured(results: Results, run: str, datasets: list[str]) -> str:
    """Tables of one run: each system's figures in both settings, on these data sets or their average."""
    facts = results.runs[run]
    parts = [f"### `{run}`\n"]
    counts = {item["questions"] for item in facts["data"]}
    command = without_places(facts["command"])
    parts.append(f"{' or '.join(map(str, sorted(counts)))} questions of each file. `{command}`\n")
    selects = facts["suite"] == "end_to_end"  # elsewhere all documents are read: there is nothing to recall
    for metric, label in METRICS.items() if selects else [("cover_em", METRICS["cover_em"])]:
        rows = []
        for system in results.systems(run):
            for setting in SETTINGS:
                figures = [results.figure(run, system, metric, setting, data) for data in datasets]
                if any(figure is not None and figure["value"] is not None for figure in figures):
                    rows.append([SYSTEM_LABELS.get(system, system), setting, *map(percent, figures)])
        if rows:
            parts.append(f"{label}, %:\n")
            parts.append(table(["system", "setting", *(DATASET_LABELS[data] for data in datasets)], rows) + "\n")
    said_again = [f for f in facts["figures"] if f["metric"] in SAID_AGAIN]
    if facts["suite"] == "pretraining" and said_again:
        rows = [[SYSTEM_LABELS.get(f["system"], f["system"]), SAID_AGAIN[f["metric"]], percent(f)] for f in said_again]
        parts.append(table(["system", "score", "value, %"], rows) + "\n")
    return "\n".join(parts)


def target(label: str, ours: dict | None, wanted: str, met: Any) -> list[str]:
    """One row of the table of targets."""
    return [label, percent(ours), wanted, "not measured" if met is None else "met" if met else "missed"]


def targets(results: Results) -> str:
    """What was aimed at, and whether it was reached."""
    rows = []
    tuned = results.anywhere("_read", "text_rag_tuned", "cover_em", "normal")
    for at, margin in ((4, 0.0), (16, 0.03)):
        ours = results.figure(f"stage1_2_rate{at}_read", SYSTEM, "cover_em", "normal")
        met = None if ours is None or tuned is None else ours["value"] >= tuned["value"] - margin
        wanted = f"≥ {percent(tuned)}" + (" less 3 points" if margin else "")
        rows.append(target(f"answers at rate {at}: Cover-EM, Normal, against fine-tuned full text", ours, wanted, met))
    for run in (name for name in results.runs if name.startswith("stage2_rate")):
        rate = run.removeprefix("stage2_rate").removesuffix("_select")
        pairs = [
            (
                results.figure(run, SYSTEM, "recall_5", "oracle", dataset),
                results.anywhere("_select", "bm25", "recall_5", "oracle", dataset),
            )
            for dataset in PAPER_DATASETS
        ]
        known = [(ours["value"], bm25["value"]) for ours, bm25 in pairs if ours and bm25]
        above = sum(ours > bm25 for ours, bm25 in known)
        average = results.figure(run, SYSTEM, "recall_5", "oracle")
        met = above >= 3 if len(known) == 4 else None
        rows.append(
            target(f"Recall@5 at rate {rate}, Oracle, above BM25", average, f"on 3 of 4 sets (on {above})", met)
        )
        hotpot = results.figure(run, SYSTEM, "recall_5", "oracle", "hotpotqa")
        rows.append(target(f"the same on HotpotQA at rate {rate}", hotpot, "> 90", hotpot and hotpot["value"] > 0.9))
        before = results.figure(f"stage1_2_rate{rate}_select", SYSTEM, "recall_5", "oracle")
        met = None if not average or not before else average["value"] - before["value"] >= 0.15
        rows.append(target(f"the same, against before stage 2 at rate {rate}", average, f"{percent(before)} + 15", met))
    return table(["aim", "ours, %", "wanted", "result"], rows)


def aims(results: Results, part: str) -> str:
    """What was aimed at, and the paper's figures beside ours; of less than the whole plan there is nothing to judge."""
    if part != "full":
        return """## What was aimed at

Nothing of it can be judged from so few questions: the aims, and the paper's figures beside ours, are printed for the
whole plan.
"""
    return f"""## What was aimed at

{targets(results)}

## Beside the paper

Cover-EM averages over the four sets in per cent, ours with 95 % intervals over questions. The paper's model has 7
billion parameters and was trained on about two million passages; ours has 0.135 billion.

{paper_table(results)}
"""


def ablations(results: Results) -> str:
    """Each ablation beside the published recipe on the same records: averages in the Oracle pools."""
    runs = [name for name in results.runs if name.startswith("ablation_")]
    if not runs:
        return "Not run."
    rows = []
    for run in sorted(runs, key=lambda name: "published" not in name):
        name = run.removeprefix("ablation_").removesuffix("_stage2_select").replace("_", " ")
        figures = [results.figure(run, SYSTEM, metric, setting) for metric in METRICS for setting in SETTINGS]
        rows.append([name, *map(percent, figures)])
    return table(["ablation", *(f"{label}, {setting}" for label in METRICS.values() for setting in SETTINGS)], rows)


def paper_table(results: Results) -> str:
    """Ours beside the paper's 7B model, Cover-EM averages."""
    printed = paper_figures("cover_em", system="clara")
    figures = {(f["rate"], f["setting"]): f["value"] for f in printed if f["dataset"] == AVERAGE}
    rows = []
    for rate in (4, 16, 32, 64, 128, 256):
        ours = [percent(results.figure(f"stage1_2_rate{rate}_read", SYSTEM, "cover_em", s)) for s in SETTINGS]
        theirs = [f"{figures[rate, s]:.2f}" if (rate, s) in figures else "–" for s in SETTINGS]
        rows.append([str(rate), *ours, *theirs])
    return table(["rate", "Normal, ours", "Oracle, ours", "Normal, paper's 7B", "Oracle, paper's 7B"], rows)


def pictures(work: Path, part: str, out: Path) -> str:
    """Copies the pictures of a whole run beside the page, and shows them."""
    if part != "full":
        return ""
    shown = []
    for path in sorted((work / "plots").rglob("*.png")):
        target = out.parent / "reproduction" / f"{path.parent.name}_{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        shown.append(f"![{path.parent.name}, {path.stem}](reproduction/{target.name})")
    return "\n\n".join(shown) + "\n"


def fresh_table(lines: list[dict]) -> str:
    """Answers of scripts/ask_fresh.py beside the gold ones."""
    rows = [[line["question"], line["golden_answers"][0], " ".join(line["answer"].split()).replace("|", "\\|"),
             "right" if line["right"] else "wrong"] for line in lines]  # fmt: skip
    return table(["question", "gold", "answer", ""], rows)


def fresh(work: Path) -> str:
    """The ten questions about invented documents, with the answers given."""
    parts = []
    for path in sorted((work / "fresh").glob("*.json")):
        lines = json.loads(path.read_text(encoding="utf-8"))["answers"]
        parts.append(f"`{path.stem}`: {sum(line['right'] for line in lines)} of {len(lines)} right.\n")
        parts.append(fresh_table(lines) + "\n")
    return "\n".join(parts) or "Not run.\n"


def held_out_table(facts: dict) -> str:
    """What scripts/ask_held_out.py counted."""
    numbers = facts["questions"]
    rows = [[way, *(f"{right[n]} of {numbers[n]}" for n in numbers)] for way, right in facts["right"].items()]
    return table(["", *(f"up to {n} tokens" for n in numbers)], rows)


def held_out(work: Path) -> str:
    """Questions over held-out passages, by the passages' length."""
    parts = []
    for path in sorted((work / "held_out").glob("*.json")):
        parts.append(f"`{path.stem}`:\n\n{held_out_table(json.loads(path.read_text(encoding='utf-8')))}\n")
    return "\n".join(parts) or "Not run.\n"


def missing(part: str, not_run: dict[str, list[str]]) -> str:
    """What was not run: every step of the part, the training runs of the whole plan."""
    said = []
    if part != "full" and not_run["part"]:
        said.append("Of this part: " + ", ".join(f"`{name}`" for name in not_run["part"]) + ".")
    if not_run["plan"]:
        trained = ", ".join(f"`{name}`" for name in not_run["plan"] if " " not in name)
        said.append(
            "Of the whole plan (`python scripts/reproduce_small.py --data data --list`) these training runs, and all "
            f"that is measured on them: {trained}."
        )
    return "\n\n".join(said) or "Everything of the plan was run."


def page(work: Path, part: str, not_run: dict[str, list[str]], shown: str = "") -> str:
    """The whole page."""
    results = Results(work)
    first = max(results.runs.values(), key=lambda run: run["started"], default=None)
    if first is None:
        raise ValueError(f"{work} holds no measurement yet: run scripts/reproduce_small.sh first")
    where = f"{first['device']}, torch {first['versions']['torch']}, transformers {first['versions']['transformers']}"
    command = "DATA_DIR=data bash scripts/reproduce_small.sh"
    if part != "full":
        command = f"PART={part} {command}"
    datasets = list(DATASET_LABELS) if part == "full" else [AVERAGE]
    runs = [measured(results, run, datasets) for run in results.runs if not run.startswith("ablation_")]
    opening = (
        "This is the part of the plan for machines without a GPU, one rate and short documents: it shows that the "
        "steps work on the real data, and how far so little training gets. **It is not a measurement of the method**."
        if part == "cpu"
        else "The whole plan."
    )
    return f"""# Reproduction: the small model on real data

Written by `python scripts/reproduction_report.py` from the files of

    {command}

on {first["started"][:10]} ({where}, commit {first["git"]["commit"][:10]}). {opening}
[REPRODUCTION_GUIDE.md](REPRODUCTION_GUIDE.md) says where the data come from and what each step does.

## What was trained

SmolLM2-135M-Instruct, seed 42. Loss: mean of the first → of the last quarter of the steps, nats a token. Span
loss: mean of the last quarter.{" Every step is in `reproduction/cpu/checkpoints/`." if part == "cpu" else ""}

{table(TRAINED, training_rows(work))}

{aims(results, part)}
## What was measured

{shown}
{chr(10).join(runs)}
## Ablations

{ablations(results)}

## Ten fresh questions

Invented documents of `scripts/fresh_questions.jsonl`, answered through `AutoModel`
(`python scripts/ask_fresh.py --checkpoint DIR`); `shipped` is example/checkpoint. The questions of
`scripts/fresh_questions_unseen.jsonl` (`shipped_unseen`) were asked of it alone, once it was chosen.

{fresh(work)}
## Questions over held-out passages

One question of each of so many QA sets of `stage1_val.jsonl`, by the length of the passage
(`python scripts/ask_held_out.py`). Found: the one document, of all questions' passages or their parts, that the query
reasoner ranks first. An answer counts as above.

{held_out(work)}
## Not run

{missing(part, not_run)}
"""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", default="full")
    parser.add_argument("--out", type=Path, default=Path("docs/REPRODUCTION.md"))
    parser.add_argument(
        "--not_run", type=Path, help="JSON: names of the steps of the part, and of the whole plan, not run"
    )
    args = parser.parse_args()
    try:
        not_run = json.loads(args.not_run.read_text(encoding="utf-8")) if args.not_run else {"part": [], "plan": []}
        work = args.work
        if args.part != "full":
            work = args.out.parent / "reproduction" / args.part
            keep(args.work, work)
        write_whole(args.out, page(work, args.part, not_run, pictures(args.work, args.part, args.out)))
    except (ValueError, OSError) as error:
        sys.exit(f"reproduction_report: {error}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
