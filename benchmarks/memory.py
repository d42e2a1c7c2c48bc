"""Peak memory of a training step of each stage, against the public way, and the micro-batch that fits.

    python benchmarks/memory.py [--micro_batches 2 4] [--stages stage1 stage1_2 stage2] [--gradient_checkpointing]
    python benchmarks/memory.py --shape mistral-7b --device cuda --micro_batches 2 8

Every step is run in a process of its own: on a GPU the peak is what torch allocated, on a CPU what the process held of
real memory. Printed is the whole and what the step took on top of the loaded model. The micro-batch that fits
--memory_gb (default: this device's) is on the straight line through the two that were measured.
"""

import argparse
import json
import resource
import subprocess
import sys

import public_way
import torch
from common import finish, load_model, parser
from stage1_step import our_loss, step, to_device

from openrlhf.datasets.collators import COLLATORS
from openrlhf.datasets.records import load_records

WAYS = {"public way": public_way.loss, "ours": our_loss}
MAX_LEN = {"stage1": 2048, "stage1_2": 2048, "stage2": 1024}
FILES = {"stage1": "pretrain_data.jsonl", "stage1_2": "instruction_data.jsonl", "stage2": "end_to_end_data.jsonl"}


def held(args: argparse.Namespace) -> int:
    """Bytes at the peak so far."""
    if torch.device(args.device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(args: argparse.Namespace, stage: str, way: str, micro_batch: int) -> None:
    """Prints the bytes of the loaded model and of the peak in a step; stage 2 with nothing cached, its largest step."""
    k = 1 if stage == "stage1" else 5
    data = load_records(f"{args.data}/{FILES[stage]}", stage, max_samples=200)
    corpus = [doc for row in data for doc in row["docs"]]
    model = load_model(args, corpus, stage, compr_rate=16, generation_top_k=k)
    model.train_stage(stage)
    model.train()
    if args.gradient_checkpointing:
        model.checkpoint_layers()
    if stage == "stage2" and way == "ours":
        model.cache_frozen_documents()
    collate = COLLATORS[stage](model.tokens, stage, MAX_LEN[stage], k, 0)
    batch = to_device(collate([{**data[i], "index": i} for i in range(micro_batch)], 0), model)
    loaded = held(args)
    step(model, [batch], WAYS[way])
    print(json.dumps([loaded, held(args)]))


def device_bytes(args: argparse.Namespace) -> int:
    """What the device has, or --memory_gb."""
    if args.memory_gb:
        return int(args.memory_gb * 1e9)
    if torch.device(args.device).type == "cuda":
        return torch.cuda.get_device_properties(args.device).total_memory
    import psutil

    return psutil.virtual_memory().total


def main() -> None:
    """Entry point."""
    flags = parser(__doc__, "memory")
    flags.add_argument("--data", default="example", help="directory with the three training files")
    flags.add_argument("--stages", nargs="+", choices=sorted(FILES), default=["stage1", "stage1_2", "stage2"])
    flags.add_argument("--micro_batches", type=int, nargs=2, default=[2, 4])
    flags.add_argument("--gradient_checkpointing", action="store_true")
    flags.add_argument("--memory_gb", type=float)
    flags.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # what this program asks of its own processes
    args = flags.parse_args()
    if args.measure:
        stage, way, micro_batch = args.measure
        return measure(args, stage, way, int(micro_batch))
    limit = device_bytes(args)
    table = [["stage", "micro-batch", "public way GB", "ours GB", "ratio", "above the model: public", "ours", "ratio"]]
    cases = []
    for stage in args.stages:
        found: dict[str, list[list[int]]] = {way: [] for way in WAYS}
        for micro_batch in args.micro_batches:
            for way in WAYS:
                command = [sys.executable, *sys.argv, "--measure", stage, way, str(micro_batch)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
                found[way].append(json.loads(done.stdout.strip().splitlines()[-1]))
        fits = {}
        for way, points in found.items():
            (small, large), (_, first), (_, second) = args.micro_batches, *points
            each = max((second - first) / (large - small), 1)
            fits[way] = int((limit - first) / each + small)
        for i, micro_batch in enumerate(args.micro_batches):
            (before, theirs), (loaded, own) = found["public way"][i], found["ours"][i]
            extra = [theirs - before, own - loaded]
            shown = [theirs / 1e9, own / 1e9, own / theirs, extra[0] / 1e9, extra[1] / 1e9, extra[1] / max(extra[0], 1)]
            table.append([stage, str(micro_batch), *(f"{value:.2f}" for value in shown)])
            cases.append({"stage": stage, "micro_batch": micro_batch, "peak": [theirs, own], "above_the_model": extra})
        cases.append({"stage": stage, "fits": fits, "memory": limit})
        table.append([stage, f"fits {limit / 1e9:.0f} GB", str(fits["public way"]), str(fits["ours"]), "", "", "", ""])
    finish(args, table, {"cases": cases})


if __name__ == "__main__":
    main()
