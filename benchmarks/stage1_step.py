"""A training step of stage 1, forward and backward, against the public way and the most that the arithmetic allows.

    python benchmarks/stage1_step.py [--data example/pretrain_data.jsonl] [--records 32] [--micro_batch 8]
    python benchmarks/stage1_step.py --shape mistral-7b --device cuda --records 128 [--gradient_checkpointing]

Ours takes the records of a global batch by length, the public way as they come. Losses and gradients are compared in
float32 without dropout, the steps timed with it. A frozen base has no weight gradients: 4 operations for each weight
and token.
"""

import random
import statistics
from collections.abc import Callable

import public_way
import torch
from common import check_close, finish, in_turn, load_model, matrix_rate, parser, ratio, spread, work

from openrlhf.datasets.collators import COLLATORS, text_length
from openrlhf.datasets.records import load_records
from openrlhf.datasets.sampler import BatchPlan
from openrlhf.models.modeling_clara import CLaRa

MSE_WEIGHT = 0.1


def to_device(batch: dict, model: CLaRa) -> dict:
    """The batch's tensors where the model is."""
    return {key: v.to(model.device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}


def step(model: CLaRa, batches: list[dict], loss_of: Callable) -> torch.Tensor:
    """Gradients of a global batch, summed up as the trainer does; the loss, a mean over its answer tokens."""
    model.zero_grad()
    answers, documents = sum(b["loss_count"] for b in batches), sum(len(b["enc_input_ids"]) for b in batches)
    total = torch.zeros((), device=model.device)
    for batch in batches:
        loss, out = loss_of(model, batch)
        share = loss * (batch["loss_count"] / answers)
        if batch["stage"].startswith("stage1"):
            share = share + MSE_WEIGHT * out["mse_loss"] * (len(batch["enc_input_ids"]) / documents)
        share.backward()
        total += share.detach()
    return total


def gradients(model: CLaRa) -> torch.Tensor:
    """All gradients in one vector."""
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def our_loss(model: CLaRa, batch: dict) -> tuple[torch.Tensor, dict]:
    """As the trainer calls the model."""
    return model(batch=batch, compute_logits=False)


def same_results(model: CLaRa, batch: dict) -> dict:
    """Relative differences of loss and gradients of the two ways, in float32 and without dropout."""
    dtype = model.dtype
    model.float().eval()  # type: ignore[no-untyped-call]
    losses, grads = [], []
    for loss_of in (our_loss, public_way.loss):
        losses.append(step(model, [batch], loss_of))
        grads.append(gradients(model))
    model.to(dtype=dtype).train()  # type: ignore[call-arg]
    model.zero_grad()
    return {
        "loss": check_close(*losses, "the losses", "float32"),
        "gradients": check_close(*grads, "the gradients", "float32"),
    }


def main() -> None:
    """Entry point."""
    flags = parser(__doc__, "stage1_step")
    flags.add_argument("--data", default="example/pretrain_data.jsonl", help="stage-1 records")
    flags.add_argument("--records", type=int, default=32, help="of the global batch")
    flags.add_argument("--micro_batch", type=int, default=8)
    flags.add_argument("--gradient_checkpointing", action="store_true")
    args = flags.parse_args()
    data = load_records(args.data, "stage1", max_samples=max(2000, args.records))
    chosen = random.Random(0).sample(range(len(data)), args.records)
    model = load_model(args, [doc for row in data for doc in row["docs"]], compr_rate=16)
    model.train_stage("stage1")
    if args.gradient_checkpointing:
        model.checkpoint_layers()
    collate = COLLATORS["stage1"](model.tokens, "stage1", 2048, 1, 0)
    rows = {i: {**data[i], "index": i} for i in chosen}
    share = BatchPlan(len(data), args.records, args.micro_batch, 0).share(chosen, lambda i: text_length(rows[i]), 0, 1)
    by_length = [to_device(collate([rows[i] for i in micro.indices], 0), model) for micro in share]
    starts = range(0, len(chosen), args.micro_batch)
    as_given = [to_device(collate([rows[i] for i in chosen[s : s + args.micro_batch]], 0), model) for s in starts]
    difference = same_results(model, by_length[0])

    unit, tokens = work(model), sum(b["n_tokens"] for b in by_length)
    answers, limit = sum(b["loss_count"] for b in by_length), model.config.doc_max_length + 3
    lengths = [int(n) for b in by_length for key in ("enc", "dec") for n in b[f"{key}_attention_mask"].sum(1)]
    least = 2 * (tokens * unit.layers + answers * unit.head) + 3 * unit.attention(lengths)
    docs = len(chosen) * (limit + model.config.n_memory_tokens)
    written = sum(b["dec_input_ids"].numel() for b in as_given)
    most = 2 * (docs + written) * unit.layers + (docs + 2 * written) * unit.head
    most += 3 * unit.attention([limit + model.config.n_memory_tokens] * len(chosen))
    most += 3 * unit.attention([b["dec_input_ids"].shape[1] for b in as_given for _ in b["labels"]])
    peak = matrix_rate(model, args)
    ways = {
        "public way": lambda: step(model, as_given, public_way.loss),
        "ours": lambda: step(model, by_length, our_loss),
    }
    seconds = in_turn(ways, args.rounds, args.device)
    gain = ratio(seconds["public way"], seconds["ours"])
    table = [["way", "attended tokens/s", "ratio", "of the ceiling", "MFU"]]
    for name, taken in seconds.items():
        mfu = least / statistics.median(taken) / peak
        mine = name == "ours"
        share_of = f"{gain / (most / least):.0%}" if mine else ""
        table.append(
            [name, spread([tokens / s for s in taken], 0), f"{gain if mine else 1:.2f}", share_of, f"{mfu:.0%}"]
        )
    table.append(["ceiling", "", f"{most / least:.2f}", "", ""])
    padding = 1 - tokens / sum(b[f"{key}_input_ids"].numel() for b in by_length for key in ("enc", "dec"))
    print(
        f"{args.records} records, {tokens} attended tokens, {answers} of them answers, {padding:.1%} padding; matrix "
        f"products {peak / 1e12:.2f} TFLOP/s; relative difference of loss {difference['loss']:.1e}, of gradients "
        f"{difference['gradients']:.1e}. MFU is of these products' rate."
    )
    result = {"seconds": seconds, "ratio": gain, "ceiling": most / least, "difference": difference, "padding": padding}
    finish(args, table, {**result, "operations": least, "products_per_s": peak, "tokens": tokens})


if __name__ == "__main__":
    main()
