"""Documents compressed a second, against what the public code does, in one run with the same weights.

    python benchmarks/compress.py [--base .models/SmolLM2-135M-Instruct] [--data example/pretrain_data.jsonl]

The public way pads every document to doc_max_length + 3 tokens, computes the LM head on all of them and keeps every
layer's hidden states. Its vectors are checked to be equal before anything is timed. The two are timed in turn, round
by round; printed are medians with their range, and written as JSON to --out.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers

from openrlhf.datasets.records import load_records
from openrlhf.models.adapters import ENCODER
from openrlhf.models.modeling_clara import CLaRa, CLaRaConfig


@torch.no_grad()
def public_way(model: CLaRa, documents: list[str], batch: int) -> torch.Tensor:
    """Memory vectors `[N, L, D]`, made as the public code makes them."""
    width, n_memory = model.config.doc_max_length + 3, model.config.n_memory_tokens
    vectors = []
    for start in range(0, len(documents), batch):
        rows = model.tokens.encoder_rows(documents[start : start + batch])
        padded = [[model.tokens.pad_id] * (width - len(row)) + row + model.tokens.memory_ids for row in rows]
        mask = torch.tensor([[0] * (width - len(row)) + [1] * (len(row) + n_memory) for row in rows])
        with model.router.route(ENCODER):
            output = model.decoder(
                inputs_embeds=model.embed(torch.tensor(padded)),
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                output_hidden_states=True,
                use_cache=False,
            )
        vectors.append(output.hidden_states[-1][:, -n_memory:])
    return torch.cat(vectors)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default=".models/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="example/pretrain_data.jsonl", help="stage-1 records")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/compress.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    records = load_records(args.data, "stage1", max_samples=2 * args.documents)
    documents = list(dict.fromkeys(doc for row in records for doc in row["docs"]))[: args.documents]
    model = CLaRa.from_base(CLaRaConfig(decoder_model_name=args.base, compr_rate=16), dtype=torch.float32)

    ours = lambda: model.compress_documents(documents)[0]  # noqa: E731
    public = lambda: public_way(model, documents, args.batch)  # noqa: E731
    difference = (ours() - public()).abs().max().item()
    largest = public().abs().max().item()
    if difference > 1e-4 * largest:
        raise SystemExit(f"the two ways differ by {difference} (largest value {largest}): nothing was timed")
    seconds: dict[str, list[float]] = {"public": [], "ours": []}
    for _ in range(args.rounds):
        for name, run in (("public", public), ("ours", ours)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    rates = {name: sorted(len(documents) / s for s in taken) for name, taken in seconds.items()}
    ratio = statistics.median(p / o for p, o in zip(seconds["public"], seconds["ours"], strict=True))
    lengths = [len(row) for row in model.tokens.encoder_rows(documents)]
    print(
        f"{len(documents)} documents of {sum(lengths) / len(lengths):.0f} tokens on average, float32, "
        f"largest difference {difference:.1e}"
    )
    for name, values in rates.items():
        print(f"{name:8} {statistics.median(values):7.2f} documents/s  ({values[0]:.2f} to {values[-1]:.2f})")
    print(f"ratio    {ratio:7.2f} (median of {args.rounds} rounds)")
    result = {"documents": len(documents), "documents_per_s": rates, "ratio": ratio, "difference": difference}
    result.update(torch=torch.__version__, transformers=transformers.__version__, threads=torch.get_num_threads())
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
