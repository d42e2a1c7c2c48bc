"""Tokens decoded a second in batches of 1, 8 and 32, against `generate` of transformers over PEFT's LoRA layers.

    python benchmarks/decode.py [--batches 1 8 32] [--new_tokens 32] [--dtype bfloat16]

Prompts are questions of --data over vectors of their own first documents, so a batch holds padding as it does in use.
Everything writes exactly --new_tokens tokens; the seconds of reading the prompts and of the first token are taken off.
Answers of the plain and our way must be equal in float32. Merged: the generator added to a copy of the weights.
"""

import statistics

import torch
from common import finish, in_turn, load_model, parser, spread
from public_way import stock_layers
from transformers import GenerationConfig

from openrlhf.datasets.records import load_records
from openrlhf.models.adapters import DECODER
from openrlhf.models.generation import gather, new_cache, steps
from openrlhf.models.modeling_clara import CLaRa

K = 5


class Prompts:
    """Embedded prompts of one batch."""

    def __init__(self, model: CLaRa, rows: list[dict]):
        prompts = [model.answer_prompt(row["question"][0], K) for row in rows]
        docs_KLD = model.compress_documents([doc for row in rows for doc in row["docs"][:K]])[0]
        ids, mask = model.tokens.pad_left([prompt.ids for prompt in prompts])
        counts = torch.full((len(rows),), K)
        self.mask_BT = mask.to(model.device)
        with torch.no_grad():
            self.embeds_BTD = model.place(ids.to(model.device), docs_KLD, counts)


@torch.no_grad()
def plain(model: CLaRa, prompts: Prompts, tokens: int) -> list[list[int]]:
    """With `generate`."""
    options = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    with stock_layers(model), model.router.route(DECODER):
        return model.decoder.generate(
            inputs_embeds=prompts.embeds_BTD, attention_mask=prompts.mask_BT, generation_config=options
        ).tolist()


@torch.no_grad()
def ours(model: CLaRa, prompts: Prompts, tokens: int) -> list[list[int]]:
    """As the model answers, without a stop."""
    with model.router.route(DECODER):
        cache = new_cache(model.decoder.config)
        parts = (model.decoder, model.embed, model.base_logits)
        written = steps(*parts, prompts.embeds_BTD, prompts.mask_BT, cache, [], tokens)
        return gather(len(prompts.embeds_BTD), written)


def main() -> None:
    """Entry point."""
    flags = parser(__doc__, "decode")
    flags.add_argument("--data", default="example/end_to_end_data.jsonl", help="end-to-end records")
    flags.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    flags.add_argument("--new_tokens", type=int, default=32)
    args = flags.parse_args()
    data = load_records(args.data, "stage2", max_samples=max(args.batches))
    rows = [data[i] for i in range(len(data))]
    model = load_model(args, [doc for row in rows for doc in row["docs"]], compr_rate=16, generation_top_k=K)
    table = [["batch", "plain tokens/s", "ours", "ratio", "ours, merged", "ratio", "equal answers", "merged"]]
    results = []
    for batch in args.batches:
        prompts = Prompts(model, rows[:batch])
        ways = {}
        for name, way in (("plain", plain), ("ours", ours)):
            for tokens in (1, args.new_tokens):
                ways[f"{name} {tokens}"] = lambda w=way, p=prompts, t=tokens: w(model, p, t)
        expected, own = plain(model, prompts, args.new_tokens), ours(model, prompts, args.new_tokens)
        if args.dtype == "float32" and own != expected:
            raise SystemExit("the answers of the two ways differ in float32: nothing was timed")
        seconds = in_turn(ways, args.rounds, args.device)
        model.merge_adapter(DECODER)
        merged = ours(model, prompts, args.new_tokens)
        ways = {f"merged {t}": lambda t=t, p=prompts: ours(model, p, t) for t in (1, args.new_tokens)}
        seconds.update(in_turn(ways, args.rounds, args.device))
        model.unmerge_adapters()
        rates = {}
        for name in ("plain", "ours", "merged"):
            pairs = zip(seconds[f"{name} 1"], seconds[f"{name} {args.new_tokens}"], strict=True)
            rates[name] = [batch * (args.new_tokens - 1) / (whole - first) for first, whole in pairs]
        middle = {name: statistics.median(values) for name, values in rates.items()}
        gains = {name: middle[name] / middle["plain"] for name in ("ours", "merged")}
        equal = [sum(a == b for a, b in zip(answers, expected, strict=True)) for answers in (own, merged)]
        line = [str(batch), spread(rates["plain"], 1), spread(rates["ours"], 1), f"{gains['ours']:.2f}"]
        line += [spread(rates["merged"], 1), f"{gains['merged']:.2f}", *(f"{n} of {batch}" for n in equal)]
        table.append(line)
        results.append({"batch": batch, "tokens_per_s": rates, "ratio": gains, "equal": equal, "seconds": seconds})
    finish(args, table, {"cases": results})


if __name__ == "__main__":
    main()
