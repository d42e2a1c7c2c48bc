"""Build the search indexes of a store, for stores that are too large to read at every question.

python -m openrlhf.cli.build_index --store STORE
python -m openrlhf.cli.build_index --store STORE --factory IVF1024,SQ8 --probe 64
python -m openrlhf.cli.build_index --store STORE --questions questions.jsonl --model CHECKPOINT

Writes the two-step index (FAISS) and BM25 into the store's `search` folder, where RAGMaster looks for them, and prints
how much of the exact search's result the two-step search finds. An index that is there is replaced once the new one is
whole.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from openrlhf.retrieval.layout import read_header

RECALL_AT = 10


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where one is not known, or missing."""
    parser = argparse.ArgumentParser("build_index", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--store", required=True, type=Path, help="a store that compress_corpus made")
    parser.add_argument("--factory", help="FAISS's description of the index (default: by the number of documents)")
    parser.add_argument("--projection_dim", type=int, default=256,
                        help="numbers of a projected vector (default 256)")  # fmt: skip
    parser.add_argument("--probe", type=int, help="lists that a question looks into (default: an eighth)")
    parser.add_argument("--questions", type=Path, help="JSONL with question, or a question a line, to measure with")
    parser.add_argument("--model", help="the checkpoint that made the store, to encode --questions")
    parser.add_argument("--model_path", help="base model, where the checkpoint's config names one that is not here")
    parser.add_argument("--sample", type=int, default=200, help="questions or documents to measure with (default 200)")
    args = parser.parse_args(argv)
    if (args.questions is None) != (args.model is None):
        parser.error("--questions and --model go together: the model encodes the questions")
    if args.sample < 1:
        parser.error(f"--sample must be at least 1, got {args.sample}")
    return args


def check(args: argparse.Namespace) -> list[str]:
    """What can be wrong is found here; the questions to measure with, none without --questions.

    Raises:
        ValueError, OSError: in words.
    """
    read_header(args.store)
    for module, package in (("faiss", "faiss-cpu"), ("bm25s", "bm25s")):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{package} is not installed: pip install {package}")
    if not os.access(args.store, os.W_OK):
        raise PermissionError(f"--store {args.store} is not writable")
    if args.model is None:
        return []
    from openrlhf.utils.checkpoints import can_search, inspect_checkpoint

    root, config, _ = inspect_checkpoint(args.model, args.model_path)
    if not can_search(root, config):
        raise ValueError(
            f"{root} is a {config.training_stage} checkpoint without a query reasoner: a stage2 checkpoint encodes "
            "questions"
        )
    return read_questions(args.questions)[: args.sample]


def read_questions(path: Path) -> list[str]:
    """The questions of a file: `question` of each record of a .jsonl, else one a line; blank lines are passed over.

    Raises:
        ValueError: a line is no record with a question, or there is none; the place is named.
        OSError: the file cannot be read.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line)["question"] if path.suffix == ".jsonl" else line.strip())
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number}: not a JSON object with a question") from None
        if not isinstance(found[-1], str) or not found[-1].strip():
            raise ValueError(f"{path}:{number}: the question must be a text that says something")
    if not found:
        raise ValueError(f"{path} holds no questions")
    return found


def encode(args: argparse.Namespace, questions: list[str], store: Any) -> Any:
    """The questions through the query reasoner, `[B, E]`."""
    import torch

    from openrlhf.models.fingerprint import fingerprint
    from openrlhf.models.modeling_clara import CLaRa

    options: dict = {"decoder_model_name": args.model_path} if args.model_path else {}
    if torch.cuda.is_available():
        options["device_map"] = "cuda"
    model = CLaRa.from_pretrained(args.model, **options)
    store.check_header(fingerprint(model))
    return model.encode_queries(questions).cpu()


def build(args: argparse.Namespace, questions: list[str]) -> None:
    """Builds both indexes, measures and prints."""
    from openrlhf.rag.master import INDEX_FOLDER
    from openrlhf.retrieval.hybrid import Bm25Index
    from openrlhf.retrieval.search import TwoStepIndex, evenly, measure_recall
    from openrlhf.retrieval.store import Store
    from openrlhf.utils.logging import set_up_logging

    set_up_logging(0)
    folder = args.store / INDEX_FOLDER
    with Store.open(args.store) as store:
        query_BE = encode(args, questions, store) if questions else None  # a wrong model is refused before the work
        print(f"store        {args.store}: {len(store):,} documents, {len(store.rows()):,} vectors of "
              f"{store.n_memory} x {store.width}")  # fmt: skip
        began = time.monotonic()
        index = TwoStepIndex.build(store, folder, args.factory, dimensions=args.projection_dim, probe=args.probe)
        print(f"two-step     {index.factory}: {spent(began, folder, TwoStepIndex.NAME)}")
        began = time.monotonic()
        Bm25Index.build(store, folder)
        print(f"words        BM25: {spent(began, folder, Bm25Index.NAME)}")
        if query_BE is None:
            query_BE = store.vectors(evenly(index.rows_R, args.sample)).flatten(1).float()
        k = min(RECALL_AT, len(index.rows_R))
        recall = measure_recall(store, index, query_BE, k)
        began = time.monotonic()
        index.search(query_BE, k)
        each = 1000 * (time.monotonic() - began) / len(query_BE)
    what = f"questions of {args.questions}" if questions else "of the store's own vectors"
    print(f"recall@{k:<5} {recall:.3f} of the exact search's, over {len(query_BE)} {what}; {each:.2f} ms each")
    print(f"in           {folder}")


def spent(began: float, folder: Path, name: str) -> str:
    """Seconds since then, and bytes of the index."""
    size = sum(file.stat().st_size for file in folder.glob(f"{name}*/*"))
    return f"{time.monotonic() - began:.1f} s, {size / 1e6:,.1f} MB"


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    try:
        build(args, check(args))
    except (ValueError, OSError) as error:
        print(f"build_index: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nbuild_index: stopped; the index that was there before is as it was", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
