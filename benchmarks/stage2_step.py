"""A training step of stage 2, forward and backward, in the first epoch and after it, against the public way.

    python benchmarks/stage2_step.py --data END_TO_END.jsonl [--questions 4] [--steps 4]

Ours compresses a document when it is first seen. So steps are taken from the whole first epoch over --data, evenly
spread; before each is timed, the documents that earlier steps of the epoch hold are put into the cache, as they would
be. The same steps are then timed again with everything seen. The public way compresses all candidates in every step
and pads questions to 1,027 tokens; a third row pads them to doc_max_length + 3 instead.
"""

import functools
import statistics

import public_way
import torch
from common import finish, load_model, parser, spread, timed
from stage1_step import our_loss, same_results, step, to_device

from openrlhf.datasets.collators import COLLATORS, text_length
from openrlhf.datasets.records import load_records
from openrlhf.datasets.sampler import BatchPlan
from openrlhf.models.modeling_clara import CLaRa


@torch.no_grad()
def fill(model: CLaRa, batches: list[dict], documents: list[list[str]], seen: set[str]) -> int:
    """Puts those of the documents into an emptied cache that were seen before; how many distinct ones were not."""
    model.cache_frozen_documents()
    assert model.document_cache is not None
    with model.frozen():
        for batch, docs in zip(batches, documents, strict=True):
            rows = [i for i, doc in enumerate(docs) if doc in seen]
            if rows:
                model.document_cache(batch["enc_input_ids"][rows], batch["enc_attention_mask"][rows])
    return len({doc for docs in documents for doc in docs} - seen)


def main() -> None:
    """Entry point."""
    flags = parser(__doc__, "stage2_step")
    flags.add_argument("--data", default="example/end_to_end_data.jsonl", help="end-to-end records: one epoch")
    flags.add_argument("--questions", type=int, default=4, help="of the global batch")
    flags.add_argument("--micro_batch", type=int, default=4)
    flags.add_argument("--steps", type=int, default=4, help="sampled from the epoch")
    args = flags.parse_args()
    data = load_records(args.data, "stage2")
    plan = BatchPlan(len(data), args.questions, args.micro_batch, 42)
    corpus = [doc for row in data.select(range(min(len(data), 500))) for doc in row["docs"]]
    model = load_model(args, corpus, "stage2", compr_rate=16, generation_top_k=5)
    model.train_stage("stage2")
    collate = COLLATORS["stage2"](model.tokens, "stage2", 1024, 5, 42)
    less = functools.partial(public_way.loss, query_tokens=model.config.doc_max_length + 3)
    sampled = {(2 * i + 1) * plan.steps_per_epoch // (2 * args.steps) for i in range(args.steps)}
    seen: set[str] = set()
    seconds: dict[str, list[float]] = {
        name: [] for name in ("public way", "questions less padded", "first epoch", "after")
    }
    missing, slots, difference = [], 0, {}
    for number in range(plan.steps_per_epoch):
        _, indices = plan.global_batch(number)
        if number in sampled:
            rows = {i: {**data[i], "index": i} for i in indices}
            share = plan.share(indices, lambda i, rows=rows: text_length(rows[i]), 0, 1)
            chosen = [[rows[i] for i in micro.indices] for micro in share]
            batches = [to_device(collate(part, 0), model) for part in chosen]
            texts = [
                [doc for row in part for doc in collate.arrange(row, collate._rng(row, 0))["docs"]] for part in chosen
            ]
            if not missing:
                difference = same_results(model, batches[0])
            missing.append(fill(model, batches, texts, seen))
            ways = {
                "first epoch": our_loss,
                "after": our_loss,
                "public way": public_way.loss,
                "questions less padded": less,
            }
            for name, loss_of in ways.items():
                seconds[name].append(timed(lambda f=loss_of, b=batches: step(model, b, f), args.device))
        for i in indices:
            seen.update(data[i]["docs"])
            slots += len(data[i]["docs"])
    rows_out = [["way", "questions/s", "against the public way", "against less padded questions"]]
    for name, taken in seconds.items():
        # Over an epoch seconds add up, so the ratio of their sums counts.
        gains = [sum(seconds[other]) / sum(taken) for other in ("public way", "questions less padded")]
        rate = spread([args.questions / s for s in taken])
        rows_out.append([name, rate, *(f"{gain:.2f}" for gain in gains)])
    print(
        f"{len(data)} questions, {slots} candidates, {len(seen)} of them distinct: {len(seen) / len(data):.1f} new a "
        f"question over the first epoch, {statistics.mean(missing) / args.questions:.1f} in the steps timed; "
        f"relative difference of loss {difference['loss']:.1e}, of gradients {difference['gradients']:.1e}"
    )
    result = {
        "seconds": seconds,
        "missing": missing,
        "distinct": len(seen),
        "candidates": slots,
        "difference": difference,
    }
    finish(args, rows_out, result)


if __name__ == "__main__":
    main()
