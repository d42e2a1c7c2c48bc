"""Compress a corpus once, into a store that search and answering read.

python -m openrlhf.cli.compress_corpus --model CHECKPOINT --input corpus.jsonl --output STORE
torchrun --nproc_per_node 8 -m openrlhf.cli.compress_corpus --model CHECKPOINT --input FOLDER --output STORE
python -m openrlhf.cli.compress_corpus --output STORE --verify

Interrupted, it goes on where it was when the same command is given again.
"""

import argparse
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

from openrlhf.retrieval.corpus import Corpus
from openrlhf.retrieval.layout import HEADER_FILE, check_header, check_new, read_header
from openrlhf.retrieval.store import Store
from openrlhf.utils.checkpoints import inspect_checkpoint

MODES = ("delete", "verify", "repair", "compact")
SHOWN = 5


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where one is not known, or missing."""
    parser = argparse.ArgumentParser("compress_corpus", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", required=True, type=Path, help="the store: a new directory, or one to go on with")
    parser.add_argument("--model", help="CLaRa checkpoint: directory or Hub repository")
    parser.add_argument("--input", type=Path, help="corpus: JSONL with text, or a folder of .txt and .md files")
    parser.add_argument("--model_path", help="base model, where the checkpoint's config names one that is not here")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="of the model; auto (default): bfloat16 on CUDA, float32 on CPU")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32, help="texts that are compressed together (default 32)")
    parser.add_argument("--ray", action="store_true", help="compress on a Ray cluster (RAY_ADDRESS, or this machine)")
    parser.add_argument("--ray_workers", type=int, help="models on the cluster (default: its GPUs, or 1)")
    parser.add_argument(
        "--passage_tokens",
        type=int,
        help="of a passage that files are cut into (default: doc_max_length), and lines (default: whole)",
    )
    parser.add_argument("--skip_bad_records", action="store_true", help="pass over bad lines and files, and count them")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--delete", type=Path, metavar="IDS", help="remove the documents whose ids this file lists")
    other.add_argument("--verify", action="store_true", help="read everything and report what is damaged or lost")
    other.add_argument("--repair", action="store_true", help="compress what is damaged or lost again (needs --model)")
    other.add_argument("--compact", action="store_true", help="free the room of deleted documents")
    args = parser.parse_args(argv)
    mode = next((name for name in MODES if getattr(args, name)), None)
    needed = {None: ("model", "input"), "repair": ("model",)}.get(mode, ())
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    idle = [f"--{name}" for name in ("model", "input") if name not in needed and getattr(args, name) is not None]
    if missing:
        parser.error(f"{' and '.join(missing)} must be given")
    if idle:
        parser.error(f"{' and '.join(idle)} has no use with --{mode}: leave it out")
    if args.ray_workers is not None and (args.ray_workers < 1 or not args.ray):
        parser.error("--ray_workers must be at least 1, and has no use without --ray")
    if args.ray and (mode or os.environ.get("WORLD_SIZE", "1") != "1"):
        parser.error("--ray is for compressing a corpus, and not under torchrun: Ray starts its own processes")
    if args.ray and importlib.util.find_spec("ray") is None:
        parser.error("--ray needs Ray, which is not installed: pip install 'clara-rag[ray]'")
    for name in ("batch_size", "passage_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return args


def check(args: argparse.Namespace) -> tuple[Corpus | None, int]:
    """What can be wrong is found here, before the model loads: the corpus, and how many lines or files it has.

    Corpus and store are the first process's alone; the others only compress.

    Raises:
        ValueError, OSError: in words.
    """
    first = os.environ.get("RANK", "0") == "0"
    if first:
        check_output(args)
    if args.model is not None:
        _, config, _ = inspect_checkpoint(args.model, args.model_path)
        if first and (args.output / HEADER_FILE).is_file():
            here = {name: getattr(config, name) for name in ("doc_max_length", "compr_rate")}
            check_header(args.output, read_header(args.output), here)
    if args.input is None or not first:
        return None, 0
    corpus = Corpus(args.input, args.skip_bad_records, args.passage_tokens)
    return corpus, corpus.check()


def check_output(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError unless --output can be used."""
    if (args.output / HEADER_FILE).is_file():
        # Whether it is whole, and whether another process writes.
        Store.open(args.output, write=not args.verify, damaged=args.verify or args.repair).close()
    elif args.input is None:
        raise FileNotFoundError(f"--output {args.output} is not a store: it has no {HEADER_FILE}")
    else:
        check_new(args.output)
    if args.delete is not None and not args.delete.is_file():
        raise FileNotFoundError(f"--delete {args.delete} is not a file: give one with an id on each line")
    place = next(path for path in (args.output.absolute(), *args.output.absolute().parents) if path.exists())
    if not args.verify and not os.access(place, os.W_OK):
        raise PermissionError(f"--output {args.output}: {place} is not writable")


def load(args: argparse.Namespace, device=None):
    """The model on its device, by default the first CUDA device or else the CPU."""
    import torch

    from openrlhf.models.modeling_clara import CLaRa

    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    auto = torch.bfloat16 if on_cuda else torch.float32
    options = {"decoder_model_name": args.model_path} if args.model_path else {}
    dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
    model = CLaRa.from_pretrained(args.model, dtype=dtype, **options)
    if model.config.quantization == "no":
        model.to(device)
    model.inference_batch = args.batch_size
    return model


def compress(args: argparse.Namespace, corpus: Corpus | None, total: int) -> None:
    """Compresses what is missing, and prints what was done."""
    import torch
    from accelerate import PartialState

    from openrlhf.retrieval.compress import (
        BATCHES,
        Counts,
        fill,
        in_processes,
        in_ray,
        open_store,
        portion_size,
        portions,
    )
    from openrlhf.utils.logging import set_up_logging

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))
    set_up_logging(state.process_index)
    model = load(args, state.device)
    if corpus is None:  # not the first process
        for _ in in_processes(model, state, None):
            pass
        return
    counts, began = Counts(), time.monotonic()
    with open_store(args.output, model) as store:
        # With --ray the devices that compress are elsewhere.
        size = args.batch_size * BATCHES if args.ray else portion_size(model, state.num_processes)
        todo = portions(store, model.tokens, corpus, size, counts)
        if args.ray:
            work = in_ray(functools.partial(load, args), todo, args.ray_workers)
        else:
            work = in_processes(model, state, todo)
        with closing(work), told_when_memory_runs_out(args.batch_size):
            fill(store, work, counts, total, corpus)
        seconds = time.monotonic() - began
    with Store.open(args.output) as store:  # its size at rest
        print(summary(args, corpus, counts, store, seconds))


@contextmanager
def told_when_memory_runs_out(batch_size: int) -> Iterator[None]:
    """Turns an out-of-memory error into a ValueError that says what to do."""
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise ValueError(
            f"memory runs out with --batch_size {batch_size}: give the same command with a smaller one, it goes on "
            "where it was"
        ) from error


def summary(args: argparse.Namespace, corpus: Corpus, counts, store: Store, seconds: float) -> str:
    """The report for people."""
    said = f"{counts.documents:,} in {args.input}: {counts.new:,} new, {counts.replaced:,} replaced the older one of "
    said += f"their id, {counts.unchanged:,} were there already"
    lines = {"documents": said}
    if corpus.skipped:
        lines["skipped"] = f"{corpus.skipped:,} bad lines or files; the first: {corpus.first_skipped}"
    if counts.cut:
        length = store.header["doc_max_length"]
        lines["cut"] = f"{counts.cut:,} are longer than {length} tokens: of them the compressor reads the beginning"
    lines["compressed"] = f"{counts.compressed:,} texts in {seconds:,.1f} s, {counts.compressed / seconds:,.1f} docs/s"
    rows = len(store.rows())
    lines["store"] = f"{len(store):,} documents, {rows:,} vectors, {store.nbytes() / 1e6:,.1f} MB on disk"
    lines["next"] = f"python -m openrlhf.cli.compress_corpus --output {args.output} --verify"
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())


def maintain(args: argparse.Namespace) -> int:
    """--delete, --verify, --repair and --compact; the exit code."""
    with Store.open(args.output, write=not args.verify, damaged=args.verify or args.repair) as store:
        if args.delete:
            ids = [line.strip() for line in args.delete.read_text(encoding="utf-8").splitlines() if line.strip()]
            deleted = store.delete(ids)
            print(
                f"deleted {deleted:,} of {len(ids):,} listed ids; {len(store):,} documents left. --compact frees room"
            )
            return 0
        if args.compact:
            freed = store.compact()
            print(f"freed {freed / 1e6:,.1f} MB; {store.nbytes() / 1e6:,.1f} MB on disk. Build search indexes again")
            return 0
        damaged = store.verify()
        if args.verify or not damaged:
            print(verified(store, damaged))
            return 1 if damaged else 0
        return repair(args, store, damaged)


def verified(store: Store, damaged: list[int]) -> str:
    """What --verify says."""
    if not damaged:
        return f"{len(store):,} documents: every vector is there and as it was written"
    ids = [document.id for found in store.documents_at(damaged[:SHOWN]) for document in found]
    return (
        f"{len(damaged):,} vectors are damaged or lost, of the documents {', '.join(ids[:SHOWN])}"
        + (" …" if len(damaged) > SHOWN or len(ids) > SHOWN else "")
        + f"\nnext        python -m openrlhf.cli.compress_corpus --output {store.path} --repair --model CHECKPOINT"
    )


def repair(args: argparse.Namespace, store: Store, damaged: list[int]) -> int:
    """--repair; the exit code."""
    from openrlhf.retrieval import compress as library

    model = load(args)
    store.check_header(library.fingerprint(model))
    written = library.repair(store, model, damaged, args.batch_size)
    print(f"compressed {written:,} vectors again; --compact frees the room of the damaged ones")
    return 0


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    first = os.environ.get("RANK", "0") == "0"
    code = 2
    try:
        corpus, total = check(args)
        code = 1
        if args.input is None:
            sys.exit(maintain(args))
        compress(args, corpus, total)
    except KeyboardInterrupt:
        if first:
            print("\ncompress_corpus: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if first:
            print(f"compress_corpus: {error}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
