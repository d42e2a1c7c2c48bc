"""Answers written together as they come and go, against one at a time: the server's engine, without HTTP.

    python benchmarks/serve.py [--batches 8 32] [--requests 32] [--new_tokens 48] [--dtype bfloat16]

All requests are there from the start, as in a rush: questions of --data over vectors of their own first documents, each
with its own length between a quarter of --new_tokens and all of it. With room for one answer at a time the engine is a
server without batching, prompts included. In float32 every answer must be the one that it is alone.
"""

import random
import statistics

from common import finish, in_turn, load_model, parser, ratio, spread

from openrlhf.datasets.records import load_records
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.rag.master import Prepared
from openrlhf.serving.engine import LocalEngine

K = 5
Requests = list[tuple[Prepared, int]]


def make_requests(model: CLaRa, rows: list[dict], number: int, new_tokens: int) -> Requests:
    """Prepared prompts, and how long each answer may be."""
    rng, made = random.Random(0), []
    for i in range(number):
        row = rows[i % len(rows)]
        docs_KLD = model.compress_documents(row["docs"][:K])[0]
        prompt = model.answer_prompt(row["question"][0], len(docs_KLD))
        made.append((Prepared(prompt=prompt, docs_KLD=docs_KLD), rng.randint(max(1, new_tokens // 4), new_tokens)))
    return made


def answer(model: CLaRa, requests: Requests, max_batch: int) -> tuple[list[str], int]:
    """All answers, and their tokens."""
    engine = LocalEngine(model, max_batch)
    try:
        writing = [engine.submit(prepared, limit, 0.0, 0) for prepared, limit in requests]
        return ["".join(pieces) for pieces in writing], sum(pieces.n_tokens for pieces in writing)
    finally:
        engine.close()


def main() -> None:
    """Entry point."""
    flags = parser(__doc__, "serve")
    flags.add_argument("--data", default="example/end_to_end_data.jsonl", help="end-to-end records")
    flags.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="answers at once, each against 1")
    flags.add_argument("--requests", type=int, default=32)
    flags.add_argument("--new_tokens", type=int, default=48, help="of the longest answer")
    args = flags.parse_args()
    data = load_records(args.data, "stage2", max_samples=args.requests)
    rows = [data[i] for i in range(len(data))]
    model = load_model(args, [doc for row in rows for doc in row["docs"]], compr_rate=16, generation_top_k=K)
    requests = make_requests(model, rows, args.requests, args.new_tokens)
    alone, tokens = answer(model, requests, 1)
    ways, equal = {"1": lambda: answer(model, requests, 1)}, {1: len(requests)}
    for batch in args.batches:
        together, _ = answer(model, requests, batch)
        equal[batch] = sum(a == b for a, b in zip(alone, together, strict=True))
        if args.dtype == "float32" and equal[batch] != len(requests):
            raise SystemExit("answers differ from what they are alone in float32: nothing was timed")
        ways[str(batch)] = lambda batch=batch: answer(model, requests, batch)
    seconds = in_turn(ways, args.rounds, args.device)
    table = [["at once", "seconds", "answers/s", "tokens/s", "ratio", "equal answers"]]
    gains = {name: ratio(seconds["1"], values) for name, values in seconds.items()}
    for name, values in seconds.items():
        middle = statistics.median(values)
        rates = [f"{len(requests) / middle:.2f}", f"{tokens / middle:.1f}", f"{gains[name]:.2f}"]
        table.append([name, spread(values, 2), *rates, f"{equal[int(name)]} of {len(requests)}"])
    sizes = {"requests": len(requests), "tokens": tokens}
    finish(args, table, {**sizes, "seconds": seconds, "ratio": gains, "equal": equal})


if __name__ == "__main__":
    main()
