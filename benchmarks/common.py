"""What all benchmarks share: models, documents of real lengths, timing in turn, tables, JSON with its circumstances."""

import argparse
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig
from transformers.utils import logging as transformers_logging

from openrlhf.datasets.records import load_records
from openrlhf.models.modeling_clara import CLaRa, CLaRaConfig
from openrlhf.models.prompts import DEFAULT_PROMPTS
from openrlhf.utils.logging import write_whole

# The other defaults of this class are Mistral-7B's sizes; version 0.2 attends to all that came before.
SHAPES = {"mistral-7b": {"sliding_window": None, "max_position_embeddings": 32768}}
RESULTS = Path(__file__).parent / "results"


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark; `name` is that of its JSON file."""
    lines = (doc or "").strip().split("\n")
    made = argparse.ArgumentParser(description=lines[0], allow_abbrev=False)
    made.add_argument(
        "--base", default=".models/SmolLM2-135M-Instruct", help="base model, and the tokenizer of --shape"
    )
    made.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape in place of --base's")
    made.add_argument("--layers", type=int, help="of --shape: only so many layers")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    made.add_argument("--rounds", type=int, default=5, help="timed runs of each way, in turn, after one that warms up")
    made.add_argument(
        "--out", type=Path, help=f"JSON file (default: benchmarks/results/{name}_DEVICE_MODEL_DTYPE.json)"
    )
    made.set_defaults(benchmark=name)
    return made


def load_model(args: argparse.Namespace, corpus: Sequence[str], stage: str = "stage1", **settings: Any) -> CLaRa:
    """The model of --base, or of --shape with random weights and a tokenizer of its size trained on `corpus`."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    config = CLaRaConfig(decoder_model_name=args.base, prompts=DEFAULT_PROMPTS, **settings)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    if args.shape:
        shape = MistralConfig(**SHAPES[args.shape], **({"num_hidden_layers": args.layers} if args.layers else {}))
        tokenizer = AutoTokenizer.from_pretrained(args.base)
        tokenizer = tokenizer.train_new_from_iterator(corpus, shape.vocab_size, show_progress=False)
        with device:
            decoder = AutoModelForCausalLM.from_config(shape, dtype=dtype)
            decoder.resize_token_embeddings(max(shape.vocab_size, len(tokenizer)))
            model = CLaRa(config, decoder, tokenizer)
    else:
        model = CLaRa.from_base(config, dtype=dtype)
    if stage.startswith("stage2"):
        model.add_query_reasoner()
    torch.manual_seed(1)
    with torch.no_grad():  # a fresh B is zero, and products with zeros can be faster than others
        for layer in model.router.layers:
            for weights in layer.lora_B.values():
                torch.nn.init.normal_(weights.weight, std=1e-3)
    return model.to(device=device, dtype=dtype)  # type: ignore[call-arg]


def read_documents(path: str, stage: str, number: int) -> list[str]:
    """The first distinct documents of training data, so that lengths are distributed as they are there."""
    records = load_records(path, stage, max_samples=4 * number)
    documents = list(dict.fromkeys(doc for row in records for doc in row["docs"]))[:number]
    if len(documents) < number:
        raise SystemExit(f"{path} holds only {len(documents)} distinct documents, asked for {number}")
    return documents


def wait(device: str | torch.device) -> None:
    """Until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each way, run in turn so that a drifting machine hits all alike; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            taken = timed(run, device)
            if number:
                seconds[name].append(taken)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over the rounds of slow / fast."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def check_close(ours: torch.Tensor, other: torch.Tensor, what: str, dtype: str) -> float:
    """The relative difference ‖ours − other‖ / ‖other‖; ends the program where it is more than rounding."""
    difference = float((ours.double() - other.double()).norm() / other.double().norm())
    limit = {"float32": 1e-3, "bfloat16": 5e-2}[dtype]
    if not difference <= limit:
        raise SystemExit(f"{what} of the two ways differ by {difference:.1e} (limit {limit:.0e}): nothing was timed")
    return difference


def matrix_rate(model: CLaRa, args: argparse.Namespace, tokens: int = 4096) -> float:
    """Operations a second (2 for each multiplication with its addition) of plain matrix products at this model's sizes.

    The products are those of one layer over `tokens` rows, in the model's dtype, on random numbers; median of 9.
    """
    shapes = [layer.base_layer.weight.shape for layer in model.router.layers]
    layer = shapes[: len(shapes) // model.decoder.config.num_hidden_layers]
    weights = [torch.randn(shape, device=args.device).to(model.dtype) for shape in layer]
    inputs = {shape[1]: torch.randn(tokens, shape[1], device=args.device).to(model.dtype) for shape in layer}

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    seconds = in_turn({"products": run}, 9, args.device)["products"]
    return 2 * tokens * sum(weight.numel() for weight in weights) / statistics.median(seconds)


@dataclass
class Work:
    """Operations that a model cannot do without, per token: 2 for each weight of the layers, 2 for each of the head."""

    layers: float
    head: float
    hidden: int
    n_layers: int

    def attention(self, lengths: Sequence[int]) -> float:
        """Of scores and weighted sums over rows of these lengths, each position reading those before it."""
        return sum(4 * self.hidden * self.n_layers * length * (length + 1) / 2 for length in lengths)


def work(model: CLaRa) -> Work:
    """Counted from the weights, without adapters."""
    config = model.decoder.config
    layers = 2.0 * sum(layer.base_layer.weight.numel() for layer in model.router.layers)
    head = 2.0 * model.decoder.get_output_embeddings().weight.numel()
    return Work(layers, head, config.hidden_size, config.num_hidden_layers)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the heading, as a Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (smallest to largest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def circumstances(args: argparse.Namespace) -> dict:
    """When, where and with which versions a run was made."""
    names = ("torch", "transformers", "peft", "deepspeed")
    found: dict[str, Any] = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "device": args.device}
    found["command"] = shlex.join(["python", str(Path(sys.argv[0])), *sys.argv[1:]])
    found.update({name: importlib.metadata.version(name) for name in names}, python=platform.python_version())
    if torch.device(args.device).type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        shown = subprocess.run(query, capture_output=True, text=True, check=False)
        found.update(name=torch.cuda.get_device_name(), driver=shown.stdout.strip(), cuda=torch.version.cuda)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names_found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        found.update(name=names_found[0] if names_found else platform.processor(), threads=torch.get_num_threads())
    return found


def finish(args: argparse.Namespace, rows: Sequence[Sequence[str]], result: dict) -> None:
    """Prints the table and writes the JSON, whole."""
    model = f"{args.shape}{f'-{args.layers}l' if args.layers else ''}" if args.shape else Path(args.base).name
    name = f"{args.benchmark}_{torch.device(args.device).type}_{model}_{args.dtype}.json"
    out = args.out or RESULTS / name
    out.parent.mkdir(parents=True, exist_ok=True)
    flags = {key: value for key, value in vars(args).items() if key not in ("out", "benchmark")}
    whole = {"benchmark": args.benchmark, **circumstances(args), "flags": flags, "table": list(rows), **result}
    write_whole(out, json.dumps(whole, indent=1) + "\n")
    print(table(rows))
    print(f"written to {out}")
