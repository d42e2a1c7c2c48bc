"""Documents compressed a second, against the public way and the most that the arithmetic allows.

    python benchmarks/compress.py [--data example/pretrain_data.jsonl] [--documents 64] [--batch 64] [--dtype float32]
    python benchmarks/compress.py --shape mistral-7b --device cuda --documents 512

The ceiling is what the ratio would be if a second did as many operations either way: the public way's, over those of
the attended tokens alone, without LM head and adapter. The rate of plain matrix products on this machine says how much
of it the attended tokens' operations use.
"""

import statistics

import public_way
from common import (
    check_close,
    finish,
    in_turn,
    load_model,
    matrix_rate,
    parser,
    ratio,
    read_documents,
    spread,
    work,
)

from openrlhf.models.adapters import ENCODER


def main() -> None:
    """Entry point."""
    flags = parser(__doc__, "compress")
    flags.add_argument("--data", default="example/pretrain_data.jsonl", help="stage-1 records")
    flags.add_argument("--documents", type=int, default=64)
    flags.add_argument("--batch", type=int, default=64, help="documents together, the public way")
    flags.add_argument("--merge", action="store_true", help="also with the compressor merged into the weights")
    args = flags.parse_args()
    documents = read_documents(args.data, "stage1", args.documents)
    model = load_model(args, documents, compr_rate=16)
    ours = lambda: model.compress_documents(documents)[0]  # noqa: E731
    public = lambda: public_way.compress(model, documents, args.batch)  # noqa: E731
    difference = check_close(ours(), public(), "the vectors", args.dtype)

    n_memory, limit = model.config.n_memory_tokens, model.config.doc_max_length + 3
    lengths = [len(row) + n_memory for row in model.tokens.encoder_rows(documents)]
    unit, padded = work(model), [limit + n_memory] * len(documents)
    least = sum(lengths) * unit.layers + unit.attention(lengths)
    most = sum(padded) * (unit.layers + unit.head) + unit.attention(padded)
    peak = matrix_rate(model, args)
    ways = {"public way": public, "ours": ours}
    seconds = in_turn(ways, args.rounds, args.device)
    if args.merge:
        model.merge_adapter(ENCODER)
        seconds["ours, merged"] = in_turn({"merged": ours}, args.rounds, args.device)["merged"]
    gains = {name: ratio(seconds["public way"], taken) for name, taken in seconds.items()}
    rows = [["way", "documents/s", "ratio", "of the ceiling", "of the products' rate"]]
    for name, taken in seconds.items():
        used = least / statistics.median(taken) / peak
        share = "" if name == "public way" else f"{gains[name] / (most / least):.0%}"
        rows.append([name, spread([len(documents) / s for s in taken]), f"{gains[name]:.2f}", share, f"{used:.0%}"])
    rows.append(["ceiling", "", f"{most / least:.2f}", "", ""])
    print(
        f"{len(documents)} documents of {statistics.mean(lengths) - n_memory:.0f} tokens (mean), padded to {limit}; "
        f"matrix products {peak / 1e12:.2f} TFLOP/s; relative difference of the vectors {difference:.1e}"
    )
    result = {"seconds": seconds, "ratio": gains, "ceiling": most / least, "difference": difference}
    result.update(operations=least, products_per_s=peak, tokens=sum(lengths))
    finish(args, rows, result)


if __name__ == "__main__":
    main()
