"""Writes example/checkpoint: a checkpoint of scripts/reproduce_small.sh in bfloat16, with a model card of its figures.

    python scripts/ship_small.py --work results/reproduction_cpu --name retrieval_rate4 --out example/checkpoint

Every figure of the card is read from the record beside docs/REPRODUCTION.md, to which the answers of the shipped
checkpoint are added. A model that answers fewer than 7 of the ten fresh questions is said to be unfinished. These ten
were looked at between runs; the card also counts ten that were not.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from reproduction_report import SAID_AGAIN, Results, fresh_table, held_out_table, percent, table

from evaluation.report_data import SYSTEM_LABELS
from evaluation.scoring import SYSTEM
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.publish import SETTINGS_FILE
from openrlhf.utils.logging import write_whole

WANTED = 7
UNSEEN = "scripts/fresh_questions_unseen.jsonl"
PUBLISHED = {"rescale_memory": False, "spread_memory": False, "even_spans": False, "span_loss_weight": 0.0}
PUBLISHED |= {"span_decay": 1.0, "lora_dropout": 0.1, "freeze_compressor": False}
ASKS = """
Ask a folder of text files:

```bash
python -m openrlhf.cli.rag --model example/checkpoint --documents my_folder "Who built the lighthouse?"
```

`rag` and `serve` take the settings of rag_config.yaml here: files are cut into passages of 48 tokens, and the best one
is read.
"""
RAG_SETTINGS = """# What suits this checkpoint in `python -m openrlhf.cli.rag` and `serve`.
rag_master:
  compression:
    passage_tokens: 48   # full passages of doc_max_length are read much worse
  reranking:
    top_k: 1             # it was trained little on several documents
    min_score: -1.0      # its cosines rank the documents of one question; they do not tell whether any answers it
  generation:
    max_new_tokens: 32
    temperature: 0.0
"""
LABELLED = """
The query reasoner learned from labels, which passages answer a question, not from the answers' loss as in the published
stage 2, which at this size did not teach it to search (docs/REPRODUCTION_GUIDE.md).
"""
NO_REASONER = """
There is no query reasoner: stage 2 was not trained, and search with it is search with a copy of the compressor.
"""
RECITES = """
Trained by stage 1 alone, it says the passage again more than it answers: the answer stands in a sentence
of the passage, with others.
"""
DATA = """| data | what of it | licence |
| --- | --- | --- |
| SQuAD 1.1 | passages and questions | CC BY-SA 4.0 |
| Natural Questions, through QED | passages and questions | CC BY-SA 3.0 |
| FairytaleQA | passages and questions | Apache-2.0 |
| OneStopEnglish | paragraphs and their simpler versions | CC BY-SA 4.0 |"""
DATA_OF_STAGE1_2 = """
| HotpotQA, 2WikiMultiHopQA, MuSiQue | training questions with their passages | CC BY-SA 4.0, Apache-2.0, CC BY 4.0 |"""


def stages(record: Path, name: str) -> list[tuple[str, dict]]:
    """The training runs behind a checkpoint, first to last: names and flags."""
    found: list[tuple[str, dict]] = []
    while True:
        path = record / "checkpoints" / name / "training_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        found.insert(0, (name, settings))
        if not settings["pretrain_checkpoint"]:
            return found
        name = Path(settings["pretrain_checkpoint"]).name


def shares(settings: dict) -> str:
    """What a run was trained on: its files, and the share of each where there are several."""
    names = [Path(path).stem for path in settings["dataset"].split(",")]
    parts = (settings.get("dataset_probs") or "").split(",")
    return ", ".join(f"{name} {part}".strip() for name, part in zip(names, parts, strict=True))


def on_the_four_sets(results: Results, runs: list[str], does: str, metric: str) -> list[list[str]]:
    """A metric's means over the evaluation sets, of every system measured after these training runs."""
    rows = []
    for run in runs:
        measured = f"{run}_{does}"
        for system in results.systems(measured) if measured in results.runs else ():
            figures = [results.figure(measured, system, metric, setting) for setting in ("normal", "oracle")]
            label = f"CLaRa after `{run}`" if system == SYSTEM else SYSTEM_LABELS.get(system, system)
            if any(figures):
                rows.append([label, *map(percent, figures)])
    return rows


def evaluated(results: Results, runs: list[str]) -> str:
    """What was measured on the evaluation sets and held-out passages after any of these runs."""
    heading, sets = ["system", "Normal", "Oracle"], "NQ, HotpotQA, MuSiQue and 2WikiMultiHopQA"
    parts = []
    for does, metric, said in (
        ("read", "cover_em", f"Answers from five documents of {sets}, Cover-EM"),
        ("select", "recall_5", "Five of twenty candidates selected, Recall@5"),
        ("select", "cover_em", "Answers from these five, Cover-EM"),
    ):
        rows = on_the_four_sets(results, runs, does, metric)
        asked = {item["questions"] for run in runs for item in results.runs.get(f"{run}_{does}", {"data": []})["data"]}
        if rows:
            numbers = " or ".join(map(str, sorted(asked)))
            parts.append(
                f"{said}, mean of the four sets, {numbers} questions of each file, %:\n\n{table(heading, rows)}\n"
            )
    said_again = [
        [f"`{run}`", SAID_AGAIN[figure["metric"]], percent(figure)]
        for run in runs
        for figure in results.runs.get(f"{run}_say_again", {"figures": []})["figures"]
        if figure["system"] == SYSTEM and figure["metric"] in SAID_AGAIN
    ]
    if said_again:
        said = "Openings of held-out passages, 16 to 128 tokens, said again from their vectors, %:"
        parts.append(f"{said}\n\n{table(['after', 'score', 'value'], said_again)}\n")
    return "\n".join(parts) or "On the evaluation sets: not measured.\n"


def searched(record: Path, name: str) -> str:
    """What a checkpoint with a query reasoner finds and answers."""
    parts = []
    for file, which in (("shipped_selecting", "the ten"), ("shipped_unseen_selecting", "the ten others")):
        lines = json.loads((record / "fresh" / f"{file}.json").read_text(encoding="utf-8"))["answers"]
        parts.append(f"{sum(line['right'] for line in lines)} of {which}")
    right = " and ".join(parts)
    said = f"Asked over all ten documents, of which the query reasoner selects one (`--select 1`): {right} are right.\n"
    path = record / "held_out" / f"{name}.json"
    if path.is_file():
        said += f"""
One question of each of so many QA sets over held-out passages, by the passages' length (`scripts/ask_held_out.py`):

{held_out_table(json.loads(path.read_text(encoding="utf-8")))}
"""
    return said


def card(record: Path, name: str, answers: list[dict], unseen: list[dict], model: CLaRa) -> str:
    """README.md of the shipped checkpoint."""
    results, right = Results(record), sum(line["right"] for line in answers)
    right_unseen, runs = sum(line["right"] for line in unseen), stages(record, name)
    trained = [
        [
            f"`{run}`",
            s["stage"],
            shares(s),
            str(s["max_samples"]),
            str(s["train_batch_size"]),
            f"{s['learning_rate']:g}",
        ]
        for run, s in runs
    ]
    apart = [f"`--{name}`" for name, its in PUBLISHED.items() if any(s.get(name, its) != its for _, s in runs)]
    config, unfinished, limits = model.config, "", ""
    if runs[-1][1]["stage"] == "stage1":
        limits += RECITES
    if config.even_spans:
        limits += f"""
A document is {config.n_memory_tokens} vectors, however short it is, and all of them are used: one of 33
to 55 tokens, as those of the questions above are, has a vector for every one or two, and is read better than one of
{config.doc_max_length}, which has one for every {config.compr_rate}.
"""
    adapters, asks = "Two", ""
    if model.has_query_reasoner:
        adapters, asks = "Three", ASKS
        if any(settings["stage"] == "stage2_pretrain_retrieval" for _, settings in runs):
            limits += LABELLED
    else:
        limits += NO_REASONER
    if right < WANTED:
        unfinished = f"""
**Unfinished: not a model that works.** It reads its vectors in part and answers {right} of {len(answers)} fresh
questions, where {WANTED} are aimed at. It is here so that its training can be continued.
"""
    return f"""---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
license: cc-by-sa-4.0
language: en
tags: [clara, rag, compression]
---
# CLaRa, small, rate {config.compr_rate}
{unfinished}
{adapters} LoRA adapters of rank {config.lora_r} over SmolLM2-135M-Instruct: a compressor that turns a document of up to
{config.doc_max_length} tokens into {config.n_memory_tokens} vectors, a generator that answers from these vectors
without the text{", and a query reasoner that turns a question into vectors to find documents by" * bool(asks)}. It was
trained on two CPU cores.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("example/checkpoint", trust_remote_code=True)
print(model.generate_from_text(["Who built the lighthouse?"], [["The lighthouse was built by Tobias Lindqvist."]], 32))
```

It looks for the base model in `.models/SmolLM2-135M-Instruct` (`python scripts/get_base_model.py`); another place is
given with `decoder_model_name=`.
{asks}
## Training

`PART=cpu DATA_DIR=data bash scripts/reproduce_small.sh`; seed 42.

{table(["run", "stage", "data", "records", "a step", "learning rate"], trained)}

`stage1` are QA sets and paraphrases. The others of stage 1 are made from the passages: `warm_up` and `openings` are
first words, `words` words in no order, to be said again; `follow` asks which words follow four of a text
(scripts/reproduction_data.py). They and these flags (docs/TRAINING_GUIDE.md) leave the published method:
{", ".join(apart)}.

{DATA}{DATA_OF_STAGE1_2 if any(row[1] == "stage1_2" for row in trained) else ""}

The base model is Apache-2.0. None of the data is in the evaluation sets.

## Figures

{right} of {len(answers)} fresh questions about invented documents
(`python scripts/ask_fresh.py --checkpoint example/checkpoint`):

{fresh_table(answers)}

These ten were looked at between runs. Of ten others, which no checkpoint had been asked before
(`--questions {UNSEEN}`), {right_unseen} were right.

{searched(record, name) if model.has_query_reasoner else ""}
{evaluated(results, [run for run, _ in runs])}
docs/REPRODUCTION.md has the runs.

## Limits
{limits}
English, short factual questions, documents of at most {config.doc_max_length} tokens (more is cut off). Rare names and
numbers come back wrong at times, fluently, and it answers where the document does not hold the answer. Bias and errors
of the base model and of Wikipedia are in it.
"""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--work", type=Path, default=Path("results/reproduction_cpu"))
    parser.add_argument("--name", default="retrieval_rate4", help="training run whose checkpoint is shipped")
    parser.add_argument("--record", type=Path, default=Path("docs/reproduction/cpu"), help="written with the page")
    parser.add_argument("--out", type=Path, default=Path("example/checkpoint"))
    args = parser.parse_args()
    source, fresh = args.work / "checkpoints" / args.name, args.record / "fresh" / "shipped.json"
    if not (source / "config.json").is_file():
        parser.error(f"{source} holds no checkpoint: run scripts/reproduce_small.sh first")
    if not (args.record / "checkpoints" / args.name).is_dir():
        parser.error(f"{args.record} has no figures of {args.name}: scripts/reproduction_report.py writes them")
    model = CLaRa.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(args.out)
    ask = [sys.executable, "scripts/ask_fresh.py", "--checkpoint", str(args.out), "--out"]
    subprocess.run([*ask, str(fresh)], check=True)
    others = fresh.with_name("shipped_unseen.json")
    subprocess.run([*ask, str(others), "--questions", UNSEEN], check=True)
    if model.has_query_reasoner:
        subprocess.run([*ask, str(fresh.with_name("shipped_selecting.json")), "--select", "1"], check=True)
        selected = fresh.with_name("shipped_unseen_selecting.json")
        subprocess.run([*ask, str(selected), "--questions", UNSEEN, "--select", "1"], check=True)
        write_whole(args.out / SETTINGS_FILE, RAG_SETTINGS)
    answers, unseen = (json.loads(path.read_text(encoding="utf-8"))["answers"] for path in (fresh, others))
    write_whole(args.out / "README.md", card(args.record, args.name, answers, unseen, model))
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 2**20:.1f} MiB; python scripts/ask_fresh.py --checkpoint {args.out}")


if __name__ == "__main__":
    main()
