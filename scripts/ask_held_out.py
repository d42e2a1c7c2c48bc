"""Asks a stage2 checkpoint questions over held-out passages: given or found among all, whole or cut into shorter ones.

    python scripts/ask_held_out.py --checkpoint DIR --data DATA_DIR/train/stage1_val.jsonl [--passage_tokens 48]

One question of each QA set, of sets over passages of up to 64, 96 and 128 tokens, --questions of each length. Found is
the one document that the query reasoner ranks first among those of all questions. Beside it the base model reads the
whole passage as text, asked with the same words. An answer is right when it holds every word of the gold one
(Cover-EM).
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F

from evaluation.metrics import cover_exact_match_score
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.retrieval.compress import compressed_text
from openrlhf.retrieval.corpus import cut
from openrlhf.retrieval.store import Document
from openrlhf.utils.checkpoints import can_search, inspect_checkpoint
from openrlhf.utils.logging import write_whole

LENGTHS = (64, 96, 128)
NEW_TOKENS = 32


def sets_by_length(path: Path, count, questions: int) -> dict[int, list[dict]]:
    """QA sets over passages of up to each length, and longer than the one before: as many as are wanted, drawn with a
    fixed seed."""
    found: dict[int, list[dict]] = {longest: [] for longest in LENGTHS}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        longest = next((n for n in LENGTHS if count(record["docs"][0]) <= n), None)
        if record["data_type"] == "qa" and longest:
            found[longest].append(record)
    for records in found.values():
        random.Random(0).shuffle(records)
    return {longest: records[:questions] for longest, records in found.items()}


def pieces(passage: str, limit: int, count) -> list[str]:
    """A passage, "title, line break, text", cut as documents of a folder are."""
    title, _, text = passage.rpartition("\n") if passage.count("\n") == 1 else ("", "", passage)
    return [compressed_text(piece) for piece in cut(Document("", text, title), limit, count)]


def ask(model: CLaRa, asked: list[dict], limit: int) -> dict[str, list[bool]]:
    """Whether the answers of each way are right, and the documents found: one truth value a question."""

    def count(text: str) -> int:
        return len(model.tokens.plain_ids([text])[0])

    def are_right(said: list[str]) -> list[bool]:
        pairs = zip(said, asked, strict=True)
        return [cover_exact_match_score(answer, a["gold"]) for answer, a in pairs]

    questions = [a["question"] for a in asked]
    query_BE = model.encode_queries(questions).float()
    found: dict[str, list[bool]] = {}
    for how, longest in (("whole", model.config.doc_max_length), (f"cut at {limit} tokens", limit)):
        parts = [(i, piece) for i, a in enumerate(asked) for piece in pieces(a["passage"], longest, count)]
        docs_NLD = model.compress_documents([piece for _, piece in parts])[0]
        scores_BN = F.cosine_similarity(query_BE.unsqueeze(1), docs_NLD.flatten(1).float().unsqueeze(0), dim=-1)
        own_BN = torch.tensor([[owner == i for owner, _ in parts] for i in range(len(asked))])
        best, given = scores_BN.argmax(1), scores_BN.cpu().masked_fill(~own_BN, -2).argmax(1)
        found[f"passage found, {how}"] = [parts[n][0] == i for i, n in enumerate(best.tolist())]
        for name, chosen in (("given", given), ("found", best)):
            said = model.generate_from_compressed_documents_and_questions(questions, docs_NLD[chosen], NEW_TOKENS)
            found[f"answer from it {name}, {how}"] = are_right(said)
    prompts = [model.text_prompt(a["question"], [a["passage"]]) for a in asked]
    found["base model reads the text"] = are_right(model.generate_from_prompts(prompts, None, NEW_TOKENS, None))
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True, help="stage-1 records that were not trained on")
    parser.add_argument("--passage_tokens", type=int, default=48)
    parser.add_argument("--questions", type=int, default=50, help="of each length")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.data.is_file():
        parser.error(f"--data {args.data} does not exist")
    if args.passage_tokens < 1 or args.questions < 1:
        parser.error("--passage_tokens and --questions must be at least 1")
    try:
        root, saved, _ = inspect_checkpoint(args.checkpoint, None)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not can_search(root, saved):
        parser.error(f"{root} is a {saved.training_stage} checkpoint: one with a query reasoner is needed to search")
    model = CLaRa.from_pretrained(args.checkpoint)
    if torch.cuda.is_available():
        model = model.to("cuda")  # type: ignore[assignment]
    sets = sets_by_length(args.data, lambda text: len(model.tokens.plain_ids([text])[0]), args.questions)
    asked = []
    for longest, records in sets.items():
        for record in records:
            n = random.Random(record["docs"][0]).randrange(len(record["question"]))
            asked.append(
                {
                    "longest": longest,
                    "question": record["question"][n],
                    "gold": record["answers"][n],
                    "passage": record["docs"][0],
                }
            )
    right = ask(model, asked, args.passage_tokens)
    counted = {
        way: {str(n): sum(ok for ok, a in zip(oks, asked, strict=True) if a["longest"] == n) for n in LENGTHS}
        for way, oks in right.items()
    }
    numbers = {str(n): len(records) for n, records in sets.items()}
    for way, by_length in counted.items():
        print(f"{way:36}" + "".join(f"{by_length[n]:>5} of {numbers[n]:<4}" for n in numbers))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"checkpoint": args.checkpoint, "passage_tokens": args.passage_tokens, "questions": numbers}
        write_whole(args.out, json.dumps({**facts, "right": counted}, indent=1))


if __name__ == "__main__":
    main()
