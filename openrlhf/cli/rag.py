"""Ask a folder of documents: prints the answer and its sources.

python -m openrlhf.cli.rag --documents my_folder "Who built the lighthouse?"
python -m openrlhf.cli.rag --documents STORE --model CHECKPOINT --config rag_config.yaml "…"

The folder is compressed once; asked again, only what changed is.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

from openrlhf.rag.config import RAGConfig
from openrlhf.retrieval.corpus import Corpus
from openrlhf.retrieval.layout import HEADER_FILE
from openrlhf.utils.checkpoints import can_search, inspect_checkpoint

DEFAULT_MODEL = "example/checkpoint"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where one is not known, or missing."""
    parser = argparse.ArgumentParser("rag", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("question")
    parser.add_argument("--documents", required=True, type=Path,
                        help="folder of .txt and .md files, JSONL file with text, or a store")  # fmt: skip
    parser.add_argument("--model", help=f"stage2 checkpoint (default: rag_config's, else {DEFAULT_MODEL})")
    parser.add_argument("--model_path", help="base model, where the checkpoint's config names one that is not here")
    parser.add_argument("--config", type=Path, help="rag_config.yaml (default: the one in the checkpoint's directory)")
    parser.add_argument("--store", type=Path, help="where the compressed documents are kept (default: a cache folder)")
    parser.add_argument("--top_k", type=int, help="documents to answer from")
    parser.add_argument("--min_score", type=float, help="cosine below which a document is not read")
    parser.add_argument("--max_new_tokens", type=int, help="tokens of the answer at most")
    parser.add_argument("--temperature", type=float, help="0: the most likely answer")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> tuple[RAGConfig, Corpus | None]:
    """What can be wrong is found here, before the model loads; the corpus is None where a store was given.

    Raises:
        ValueError, OSError: in words.
    """
    config = RAGConfig.chosen(args.config, args.model or DEFAULT_MODEL)
    for section, name in (("reranking", "min_score"), ("generation", "max_new_tokens"), ("generation", "temperature")):
        if getattr(args, name) is not None:
            setattr(getattr(config, section), name, getattr(args, name))
    if args.top_k is not None:
        config.reranking.top_k = args.top_k
    config.__post_init__()
    if not args.question.strip():
        raise ValueError("the question is empty")
    args.model = args.model or config.compression.model or DEFAULT_MODEL
    if not Path(args.model).is_dir() and args.model == DEFAULT_MODEL:
        raise FileNotFoundError(
            f"no model: {DEFAULT_MODEL} is not in this directory; go to the project's, or give --model"
        )
    root, saved, _ = inspect_checkpoint(args.model, args.model_path)
    if config.compression.enabled and not can_search(root, saved):
        raise ValueError(
            f"{root} is a {saved.training_stage} checkpoint without a query reasoner: a stage2 checkpoint is needed to "
            "choose documents"
        )
    if (args.documents / HEADER_FILE).is_file():
        if args.store:
            raise ValueError(f"{args.documents} is a store already: leave --store out")
        return config, None
    corpus = Corpus(args.documents, skip_bad=True, passage_tokens=config.compression.passage_tokens)
    corpus.check()
    return config, corpus


def kept_at(documents: Path, made_by: dict) -> Path:
    """Where a folder's documents lie, compressed by the model of this fingerprint, when --store is not given."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(f"{documents.resolve()} {sorted(made_by.items())}".encode()).hexdigest()[:12]
    return cache / "clara" / f"{documents.resolve().name}-{name}"


def ask(args: argparse.Namespace, config: RAGConfig, corpus: Corpus | None) -> None:
    """Compresses what is new, answers and prints."""
    import torch

    from openrlhf.models.fingerprint import fingerprint
    from openrlhf.models.modeling_clara import CLaRa
    from openrlhf.rag.master import RAGMaster
    from openrlhf.retrieval.compress import update_store
    from openrlhf.retrieval.store import Store
    from openrlhf.utils.logging import set_up_logging

    set_up_logging(0)
    options: dict = {"decoder_model_name": args.model_path} if args.model_path else {}
    if torch.cuda.is_available():
        options["device_map"] = "cuda"
    model = CLaRa.from_pretrained(args.model, **options)
    where = args.documents
    if corpus is not None:
        where = args.store or kept_at(args.documents, fingerprint(model))
        update_store(where, model, corpus)
    with Store.open(where) as store, RAGMaster(model, config=config) as master:
        pieces, citations = master.stream(args.question, store)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        for number, cited in enumerate(citations, 1):
            page = f", page {cited.page}" if cited.page is not None else ""
            title = f" ({cited.title})" if cited.title else ""
            passage = " ".join(cited.passage.split())
            print(f"\n[{number}] {cited.id}{title}{page}  score {cited.score:.3f}\n    {passage[:300]}")
        print(f"\n{len(store):,} passages kept in {where}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    try:
        config, corpus = check(args)
        ask(args, config, corpus)
    except (ValueError, OSError) as error:
        print(f"rag: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nrag: stopped; what is compressed is kept", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
