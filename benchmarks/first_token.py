"""Seconds to the first token of an answer: CLaRa's stored vectors against the full text of the same documents.

    python benchmarks/first_token.py [--documents 5 20] [--doc_tokens 512] [--rate 32] [--dtype bfloat16]
    python benchmarks/first_token.py --shape mistral-7b --device cuda

Documents are passages of --data put together until each has --doc_tokens tokens. CLaRa reads all of them from stored
vectors, --doc_tokens / --rate for each; the base model without adapters reads their text in the same prompt.
"""

import statistics

import torch
from common import finish, in_turn, load_model, parser, ratio, read_documents, spread

from openrlhf.models.adapters import DECODER
from openrlhf.models.generation import new_cache, read
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.tokens import Prompt

QUESTION = "Which of these places was founded first, and by whom?"


def long_documents(model: CLaRa, passages: list[str], number: int, tokens: int) -> list[str]:
    """Documents of at least `tokens` tokens, each of passages of its own."""
    documents: list[str] = []
    current = ""
    for passage in passages:
        current += passage + "\n"
        if len(model.tokens.plain_ids([current])[0]) >= tokens:
            documents.append(current)
            current = ""
        if len(documents) == number:
            return documents
    raise SystemExit(f"--data holds too few passages for {number} documents of {tokens} tokens: give a larger file")


@torch.no_grad()
def first_token(model: CLaRa, prompt: Prompt, docs_KLD: torch.Tensor, adapter: str | None) -> int:
    """Reads a prompt and writes one token."""
    ids_1T = torch.tensor([prompt.ids], device=model.device)
    counts = torch.tensor([len(docs_KLD)])
    with model.router.route(adapter):
        embeds = model.place(ids_1T, docs_KLD.to(model.device), counts)
        hidden = read(model.decoder, embeds, torch.ones_like(ids_1T), new_cache(model.decoder.config))
        return int(model.decoder.get_output_embeddings()(hidden).argmax(-1))


def main() -> None:
    """Entry point."""
    flags = parser(__doc__, "first_token")
    flags.add_argument("--data", default="example/pretrain_data.jsonl", help="stage-1 records")
    flags.add_argument("--documents", type=int, nargs="+", default=[5, 20])
    flags.add_argument("--doc_tokens", type=int, default=512)
    flags.add_argument("--rate", type=int, default=32)
    args = flags.parse_args()
    passages = read_documents(args.data, "stage1", 7 * max(args.documents))
    model = load_model(args, passages, doc_max_length=args.doc_tokens, compr_rate=args.rate)
    texts = long_documents(model, passages, max(args.documents), args.doc_tokens)
    stored = model.compress_documents(texts)[0].cpu()
    rows = [["documents", "CLaRa tokens", "text tokens", "CLaRa s", "text s", "ratio"]]
    results = []
    for number in args.documents:
        short, full = model.answer_prompt(QUESTION, number), model.text_prompt(QUESTION, texts[:number])
        ways = {
            "CLaRa": lambda n=number, p=short: first_token(model, p, stored[:n], DECODER),
            "text": lambda p=full: first_token(model, p, stored[:0], None),
        }
        seconds = in_turn(ways, args.rounds, args.device)
        gain = ratio(seconds["text"], seconds["CLaRa"])
        sizes = [len(short.ids), len(full.ids)]
        shown = [spread(seconds["CLaRa"], 3), spread(seconds["text"], 3), f"{gain:.1f}"]
        rows.append([f"{number} × {args.doc_tokens}", *map(str, sizes), *shown])
        results.append({"documents": number, "tokens": sizes, "seconds": seconds, "ratio": gain})
    print(f"{model.config.n_memory_tokens} vectors a document; medians of {args.rounds} rounds, smallest to largest")
    finish(args, rows, {"cases": results, "median_ratio": statistics.median(case["ratio"] for case in results)})


if __name__ == "__main__":
    main()
