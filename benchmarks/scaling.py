"""How seconds grow with the work: the exponent p of seconds ~ size^p, fitted, and two processes instead of one.

    python benchmarks/scaling.py [--parts documents batch cached ranks] [--dtype bfloat16]

documents   compressing N documents
batch       a training step of stage 2 with B questions, their candidates cached
cached      a step's look-ups in a cache of 10^3 … 10^5 documents (search.py has the search over a store of them)
ranks       steps of the training command with one process and with two, one thread each; every rank has its share
"""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import finish, load_model, parser, read_documents, timed
from stage1_step import our_loss, step, to_device

from openrlhf.datasets.collators import COLLATORS
from openrlhf.datasets.records import load_records
from openrlhf.models.document_cache import DocumentCache


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of the least-squares line through (log size, log seconds)."""
    x, y = [math.log(size) for size in sizes], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def best(run, args) -> float:
    """The shortest of --rounds runs after one that warms up: what disturbs a machine only ever adds."""
    timed(run, args.device)
    return min(timed(run, args.device) for _ in range(args.rounds))


def documents(args) -> dict[str, tuple[list[int], list[float]]]:
    """Seconds to compress N documents, drawn from one pool so that lengths are alike."""
    pool = read_documents(args.data, "stage1", args.sizes[-1])
    random.Random(0).shuffle(pool)
    model = load_model(args, pool, compr_rate=16)
    seconds = [best(lambda n=n: model.compress_documents(pool[:n]), args) for n in args.sizes]
    return {"documents compressed": (args.sizes, seconds)}


def batch(args) -> dict[str, tuple[list[int], list[float]]]:
    """Seconds of a stage-2 step of B questions in one micro-batch, documents cached."""
    sizes = args.batches
    data = load_records(args.questions, "stage2", max_samples=sizes[-1])
    model = load_model(args, [doc for row in data for doc in row["docs"]], "stage2", compr_rate=16, generation_top_k=5)
    model.train_stage("stage2")
    model.cache_frozen_documents()
    model.train()
    collate = COLLATORS["stage2"](model.tokens, "stage2", 1024, 5, 0)
    rows = [{**data[i], "index": i} for i in range(sizes[-1])]
    batches = [to_device(collate(rows[:n], 0), model) for n in sizes]
    seconds = [best(lambda b=b: step(model, [b], our_loss), args) for b in batches]
    return {"questions in a stage-2 step": (sizes, seconds)}


def cached(args) -> dict[str, tuple[list[int], list[float]]]:
    """Seconds to look up 640 candidates among so many documents.

    The vectors are random numbers of the right shape: it does not depend on what they say.
    """
    sizes, length, looked_up = [10**3, 10**4, 10**5], 40, 640
    model = load_model(args, read_documents(args.data, "stage1", 2), compr_rate=64)
    shape = (model.config.n_memory_tokens, model.decoder.config.hidden_size)
    lookups = []
    for size in sizes:
        docs_NLD = torch.randn(size, *shape).to(model.dtype)
        places = iter(range(size))

        def vectors(ids_MT, mask_MT, docs_NLD=docs_NLD, places=places):
            taken = [next(places) for _ in ids_MT]
            return docs_NLD[taken], torch.zeros(len(taken))

        cache = DocumentCache(vectors, limit_bytes=2**40)
        ids_NT = torch.randint(0, 30000, (size, length))
        cache(ids_NT, torch.ones_like(ids_NT))
        some_MT = ids_NT[torch.randperm(size)[:looked_up]]
        lookups.append(best(lambda c=cache, m=some_MT: c(m, torch.ones_like(m)), args))
    return {"cached documents, look-up of 640": (sizes, lookups)}


def ranks(args) -> dict[str, tuple[list[int], list[float]]]:
    """Seconds of a stage-1 step of the training command, one thread a process; the first step is left out."""
    seconds = []
    steps, size = args.rounds + 1, 16
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
            command += ["--master_port", "29617", "-m", "openrlhf.cli.train_sft", "--pretrain", args.base]
            command += ["--dataset", args.data, "--max_samples", str(steps * size), "--train_batch_size", str(size)]
            command += ["--micro_train_batch_size", "4", "--max_epochs", "1", "--compress_rate", "16", "--mse_loss"]
            command += ["--save_path", f"{folder}/out", "--ckpt_path", f"{folder}/resume"]
            command += ["--bf16"] if args.dtype == "bfloat16" else []
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
            lines = [json.loads(line) for line in Path(folder, "out", "metrics.jsonl").read_text().splitlines()]
            seconds.append(
                statistics.median(line["seconds"] for line in lines if line["split"] == "train" and line["step"] > 1)
            )
    return {"processes": ([1, 2], seconds)}


PARTS = {"documents": documents, "batch": batch, "cached": cached, "ranks": ranks}


def main() -> None:
    """Entry point."""
    flags = parser(__doc__, "scaling")
    flags.add_argument("--data", default="example/pretrain_data.jsonl", help="stage-1 records")
    flags.add_argument("--questions", default="example/end_to_end_data.jsonl", help="end-to-end records")
    flags.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="documents to compress")
    flags.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16], help="questions of a step")
    flags.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = flags.parse_args()
    table, fitted = [["seconds against", "sizes", "seconds", "exponent"]], {}
    for part in args.parts:
        for name, (sizes, seconds) in PARTS[part](args).items():
            fitted[name] = {"sizes": sizes, "seconds": seconds, "exponent": exponent(sizes, seconds)}
            shown = " / ".join(f"{s:.4f}" if s < 0.1 else f"{s:.2f}" for s in seconds)
            table.append([name, " / ".join(map(str, sizes)), shown, f"{fitted[name]['exponent']:.2f}"])
    finish(args, table, {"parts": fitted})


if __name__ == "__main__":
    main()
