"""Questions evaluated a minute, against answering one question at a time, in one run with the same weights.

    python benchmarks/evaluate.py --checkpoint checkpoints/quickstart/stage2 [--eval_data DIR] [--questions 1000]

The evaluation compresses each distinct document once and generates in batches of like length; the other way gives every
question's candidates to `generate_from_questions` by themselves. The second is timed on `--one_by_one` questions spread
over the others, half of them before and half after the first, and both are printed for the whole number of questions.
In float32 the answers of both must be equal. Written as JSON to --out.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import transformers
from accelerate import PartialState

from evaluation.questions import END_TO_END, NORMAL, ORACLE, Question, dataset_files, load_questions
from evaluation.runner import Runner
from evaluation.systems import CLARA, clara, clara_prompt
from openrlhf.models.modeling_clara import CLaRa


def read_questions(eval_data: str, number: int) -> list[Question]:
    """Questions of the Oracle files of all data sets, then of the Normal ones, until there are enough."""
    files = dataset_files(eval_data, END_TO_END, [], [ORACLE, NORMAL])
    found = [q for name, paths in files.items() for q in load_questions(paths, name, END_TO_END, None)]
    return sorted(found, key=lambda q: q.setting != ORACLE)[:number]


def ours(model: CLaRa, questions: list[Question], batch: int, new_tokens: int, folder: Path) -> tuple[list[str], dict]:
    """Answers, and the seconds of compressing and of the rest."""
    began = time.perf_counter()
    runner = Runner(folder, batch, PartialState())
    texts = list(dict.fromkeys(doc for q in questions for doc in q.docs))
    lengths = [len(row) for row in model.tokens.encoder_rows(texts)]
    documents = runner.compress(texts, lengths, lambda part: model.compress_documents(part)[0])
    compressed = time.perf_counter()
    lengths = [len(clara_prompt(model, q, END_TO_END).ids) for q in questions]
    runner.generate(CLARA, questions, lengths, clara(model, documents, END_TO_END, new_tokens))
    answers = [line["prediction"] for line in runner.collect(CLARA, lengths)]
    parts = {"compress": compressed - began, "answer": time.perf_counter() - compressed, "distinct": len(texts)}
    return answers, parts


def one_by_one(model: CLaRa, questions: list[Question], new_tokens: int) -> tuple[list[str], float]:
    """Answers, and seconds."""
    began = time.perf_counter()
    answers = [model.generate_from_questions([q.question], [list(q.docs)], new_tokens)[0][0] for q in questions]
    return answers, time.perf_counter() - began


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", default="checkpoints/quickstart/stage2")
    parser.add_argument("--eval_data", default="example/evaluation_data")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--one_by_one", type=int, default=8, help="questions answered by themselves")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/evaluate.json"))
    args = parser.parse_args()
    questions = read_questions(args.eval_data, args.questions)
    model = CLaRa.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype))
    model.inference_batch = args.batch_size
    number = min(args.one_by_one, len(questions))
    places = [i * len(questions) // number for i in range(number)]
    sample = [questions[i] for i in places]
    one_by_one(model, sample[:1], 2)
    before, seconds_before = one_by_one(model, sample[::2], args.max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        answers, parts = ours(model, questions, args.batch_size, args.max_new_tokens, Path(folder))
    after, seconds_after = one_by_one(model, sample[1::2], args.max_new_tokens)
    alone = dict(zip([*places[::2], *places[1::2]], [*before, *after], strict=True))
    same = sum(answers[i] == text for i, text in alone.items())
    if args.dtype == "float32" and same < number:
        raise SystemExit(f"only {same} of {number} answers are equal: the figures would mean nothing")
    total, single = parts["compress"] + parts["answer"], (seconds_before + seconds_after) / number
    ratio = single * len(questions) / total
    candidates = sum(len(q.docs) for q in questions)
    print(
        f"{len(questions)} questions, {candidates} candidates, {parts['distinct']} of them distinct; {args.dtype}, "
        f"{torch.get_num_threads()} threads; {same} of {number} answers equal"
    )
    print(f"evaluation  {total:9.1f} s: compressing {parts['compress']:.1f}, answering {parts['answer']:.1f}")
    print(f"one by one  {single * len(questions):9.1f} s: {single:.2f} s a question, measured on {number}")
    print(f"ratio       {ratio:9.2f}")
    result = {**vars(args), "out": str(args.out), "questions": len(questions), "candidates": candidates, **parts}
    result.update(seconds=total, seconds_one_question=single, ratio=ratio, equal=same, threads=torch.get_num_threads())
    result.update(torch=torch.__version__, transformers=transformers.__version__)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
