"""Asks a checkpoint questions about documents that no training has seen, as someone does who only has transformers.

    python scripts/ask_fresh.py --checkpoint DIR [--questions scripts/fresh_questions.jsonl] [--out answers.json]

The checkpoint is loaded by AutoModel with the code that it carries; this project's package is not imported. An answer
is right when it holds every word of a gold answer (Cover-EM). The documents are invented, so nothing but the document
can tell the answer. With --select K each question is asked over the documents of all questions, of which a stage2
checkpoint's query reasoner selects K.
"""

import argparse
import json
import re
import string
import sys
from pathlib import Path

import torch
from transformers import AutoModel


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (SPEC 8)."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def is_right(answer: str, golden: list[str]) -> bool:
    """Whether all words of one of the gold answers occur."""
    return any(set(words(gold)) <= set(words(answer)) for gold in golden)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--questions", type=Path, default=Path("scripts/fresh_questions.jsonl"))
    parser.add_argument("--model_path", help="base model, where it is not at the place that the checkpoint names")
    parser.add_argument("--select", type=int, metavar="K", help="select K of all documents, with a stage2 checkpoint")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not Path(args.checkpoint, "config.json").is_file():
        parser.error(f"{args.checkpoint} holds no checkpoint")
    if args.select is not None and args.select < 1:
        parser.error(f"--select must be at least 1, got {args.select}")
    if args.select and not Path(args.checkpoint, "query_reasoner_adapter").is_dir():
        parser.error(f"--select needs a query reasoner, and {args.checkpoint} has none: give a stage2 checkpoint")
    rows = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines()]
    options: dict = {"decoder_model_name": args.model_path} if args.model_path else {}
    if args.select:
        options["generation_top_k"] = args.select
    model = AutoModel.from_pretrained(args.checkpoint, trust_remote_code=True, **options)
    if torch.cuda.is_available():
        model = model.to("cuda")
    questions, docs = [row["question"] for row in rows], [row["docs"] for row in rows]
    if args.select:
        together = [doc for its in docs for doc in its]
        answers, chosen_BK = model.generate_from_questions(questions, [together] * len(rows), 32)
        pairs = zip(chosen_BK.tolist(), docs, strict=True)
        found = [bool({together[i] for i in chosen} & set(its)) for chosen, its in pairs]
        print(f"{sum(found)} of {len(rows)} documents found among {len(together)}")
    else:
        answers = model.generate_from_text(questions, docs, 32)
    if "openrlhf" in sys.modules:
        sys.exit("ask_fresh: the checkpoint's code imported the package openrlhf; it must stand alone")
    lines = [
        {**row, "answer": answer, "right": is_right(answer, row["golden_answers"])}
        for row, answer in zip(rows, answers, strict=True)
    ]
    for line in lines:
        print(f"{'right' if line['right'] else 'wrong'}  {line['question']}  {line['answer']!r}")
    print(f"{sum(line['right'] for line in lines)} of {len(lines)} right")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draft = args.out.with_suffix(".draft")
        draft.write_text(json.dumps({"checkpoint": args.checkpoint, "answers": lines}, indent=1), encoding="utf-8")
        draft.replace(args.out)


if __name__ == "__main__":
    main()
