"""What the quickstart prints and draws: losses, recall, and answers beside the base model reading the full text.

    python scripts/quickstart_report.py --root checkpoints/quickstart \
        --questions example/evaluation_data/end_to_end_evaluation/example/eval_processed_with_pos.jsonl
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from evaluation.metrics import best_over_golds, cover_exact_match_score
from openrlhf.datasets.records import load_records
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.utils.logging import METRICS_FILE, read_metrics, set_up_logging

STAGES = {"stage1": "stage 1: compression", "stage1_2": "stage 1_2: instructions", "stage2": "stage 2: end to end"}

NEXT = """
where things are
  checkpoints  {root}/stage1  {root}/stage1_2  {root}/stage2
  losses       {root}/losses.png
  figures      {root}/STAGE/metrics.jsonl

This was {steps} steps of a few records: enough to see the losses fall and every part work, far too little
for a good model; recall may go either way. To measure it beside BM25 and the base model reading the text:
  CHECKPOINT={root}/stage2 bash scripts/evaluation_end_to_end.sh
To ask documents of your own, with their sources, the model of example/checkpoint (yours: --model {root}/stage2):
  .venv/bin/python -m openrlhf.cli.rag --documents YOUR_FOLDER "YOUR QUESTION"
or in the browser, at the address that it prints (pip install fastapi uvicorn python-multipart first):
  .venv/bin/python -m openrlhf.cli.serve --documents YOUR_FOLDER
For a model to use, train on your data, on GPUs:
  MODEL_PATH=mistralai/Mistral-7B-Instruct-v0.2 DATA_PATH=YOUR_DATA bash scripts/train_pretraining.sh
then scripts/train_instruction_tuning.sh and scripts/train_stage_end_to_end.sh (docs/TRAINING_GUIDE.md)."""


def smooth(values: list[float], width: int) -> list[float]:
    """Means over the last `width` values."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def draw_losses(lines: dict[str, list[dict]], target: Path) -> None:
    """Saves the training losses of all stages side by side."""
    figure, axes = plt.subplots(1, len(lines), figsize=(4 * len(lines), 3.2), layout="constrained")
    for axis, (stage, rows) in zip(axes, lines.items(), strict=True):
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        axis.plot(steps, losses, color="#b0c4de", label="a step")
        axis.plot(steps, smooth(losses, 8), color="#1f4e79", label="mean of 8 steps")
        axis.set(title=STAGES[stage], xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axes[0].legend(frameon=False)
    figure.savefig(target, dpi=130)


def print_losses(lines: dict[str, list[dict]]) -> None:
    """First and last losses of each stage, as means of a quarter of its steps."""
    for stage, rows in lines.items():
        quarter = max(1, len(rows) // 4)
        first = sum(row["loss"] for row in rows[:quarter]) / quarter
        last = sum(row["loss"] for row in rows[-quarter:]) / quarter
        print(f"{STAGES[stage]:26} loss {first:.3f} → {last:.3f}  (first and last {quarter} of {len(rows)} steps)")


def print_recall(rows: list[dict]) -> None:
    """Retrieval on held-out questions before and after stage 2."""
    before, after = rows[0], rows[-1]
    print(f"\nretrieval on {after['records']} held-out questions, 20 candidates each, before → after stage 2:")
    for k in (1, 3, 5):
        print(f"  Recall@{k}  {before[f'recall_{k}']:.3f} → {after[f'recall_{k}']:.3f}")


def print_answers(root: Path, questions: Path, count: int) -> None:
    """Held-out questions with CLaRa's answer and the base model's, and how often each contains the gold answer."""
    rows = list(load_records(str(questions), "stage2", max_samples=count))
    asked, pools, golds = [r["question"][0] for r in rows], [r["docs"] for r in rows], [r["golden"] for r in rows]
    trained = json.loads((root / "stage2" / "training_config.json").read_text(encoding="utf-8"))
    dtype = torch.bfloat16 if trained["bf16"] else torch.float32
    model = CLaRa.from_pretrained(root / "stage2", dtype=dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    answers, chosen = model.generate_from_questions(asked, pools, max_new_tokens=32)
    selected = [[pool[i] for i in row if i >= 0] for pool, row in zip(pools, chosen.tolist(), strict=True)]
    n_memory, k = model.config.n_memory_tokens, model.config.generation_top_k
    prompts = [model.text_prompt(question, docs) for question, docs in zip(asked, selected, strict=True)]
    plain = model.generate_from_prompts(prompts, max_new_tokens=32, adapter=None)
    print(f"\n{len(rows)} held-out questions; CLaRa reads {k} documents as {k * n_memory} vectors,")
    print("the base model reads the text of the same documents:")
    for i, question in enumerate(asked):
        print(f"\n  {question}\n    gold       {golds[i][0]}\n    CLaRa      {' '.join(answers[i].split())}")
        print(f"    full text  {' '.join(plain[i].split())}")
        print(f"    selected   {' | '.join(doc.splitlines()[0] for doc in selected[i])}")
    for name, texts in (("CLaRa", answers), ("base model, full text", plain)):
        hits = sum(best_over_golds(cover_exact_match_score, t, g) for t, g in zip(texts, golds, strict=True))
        print(f"\n  {name}: {hits:.0f} of {len(rows)} answers contain the gold answer")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="holds stage1, stage1_2 and stage2")
    parser.add_argument("--questions", type=Path, required=True, help="held-out end-to-end questions")
    parser.add_argument("--count", type=int, default=8, help="questions to answer")
    args = parser.parse_args()
    set_up_logging(0)
    metrics = {stage: read_metrics(args.root / stage / METRICS_FILE) for stage in STAGES}
    training = {stage: [row for row in rows if row["split"] == "train"] for stage, rows in metrics.items()}
    print_losses(training)
    draw_losses(training, args.root / "losses.png")
    print_recall([row for row in metrics["stage2"] if row["split"] == "eval"])
    print_answers(args.root, args.questions, args.count)
    last = {stage: rows[-1]["step"] for stage, rows in training.items()}
    print(NEXT.format(root=args.root, steps=" + ".join(str(step) for step in last.values())))


if __name__ == "__main__":
    main()
