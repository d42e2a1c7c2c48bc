"""Time and memory to answer from N documents: CLaRa's vectors against their full text, in one run.

    python -m evaluation.efficiency --checkpoint DIR --documents FILE.jsonl [--counts 5 20] [--rounds 3] [--questions 3]
        [--new_tokens 32] [--output_dir DIR] [--model_path BASE] [--dtype bfloat16] [--baseline_text yes]

FILE holds evaluation records (question, docs, …). Questions are answered one at a time, by each system in turn, round
by round; a first round warms up and is not counted. Every system writes exactly --new_tokens tokens, greedily, on
through its end-of-answer tokens. The systems:
    clara_selected  compress N documents, encode the question, select the best generation_top_k, read their vectors
    clara_all       compress N documents, read the vectors of all of them
    full_text       the base model without adapters reads the texts, each cut where the compressor cuts it
Phases, in seconds: compress and query (tokenising included), select (cosine and top-k), first_token (prefill of the
prompt's token ids and the first new token), decode (the other new tokens).

Writes efficiency.json (every sample) and efficiency.png to --output_dir, and a Markdown table to stdout.
Other work on the machine makes the figures useless: look at their spread.
"""

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from evaluation.cli import OneLineParser, check_checkpoint, load, prepare_output, save_figure
from evaluation.results import versions
from openrlhf.datasets.records import file_rows
from openrlhf.models.adapters import DECODER
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.selection import select_documents
from openrlhf.models.tokens import Prompt
from openrlhf.utils.logging import write_whole

RESULTS, PICTURE = "efficiency.json", "efficiency.png"
SELECTED, ALL, TEXT = "clara_selected", "clara_all", "full_text"
PHASES = ("query", "select", "first_token", "decode", "compress")
COLOURS = dict(zip(PHASES, ("#c46a1b", "#7d4fa8", "#2e8b57", "#9fd3b5", "#c9ddf0"), strict=True))


@dataclass
class Case:
    """A question and its documents, the first `own` of them its own, the others those of other questions."""

    question: str
    docs: list[str]
    own: int


@dataclass
class Sample:
    """One answer of one system. `seconds` by phase; `peak_bytes` of "answer" and "compress", CUDA only."""

    documents: int
    system: str
    question: int
    round: int
    prompt_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    new_ids: list[int] = field(default_factory=list)

    @property
    def answer_seconds(self) -> float:
        """Question to answer, the documents having been compressed before."""
        return sum(s for phase, s in self.seconds.items() if phase != "compress")

    @property
    def total_seconds(self) -> float:
        """Question to answer with the compression of all N documents."""
        return sum(self.seconds.values())


# What a row or a ratio is made of, by name; seconds where nothing else is said.
FIGURES: dict[str, Callable[[Sample], float]] = {
    "prompt_tokens": lambda s: s.prompt_tokens,
    "first_token": lambda s: s.seconds["first_token"],
    "decode_per_token": lambda s: s.seconds["decode"] / (len(s.new_ids) - 1),
    "answer_compressed_before": lambda s: s.answer_seconds,
    "answer_with_compression": lambda s: s.total_seconds,
}


def read_cases(path: Path, n_docs: int, n_questions: int) -> list[Case]:
    """The first questions of a file of records, each with n_docs different documents.

    Raises:
        ValueError: a bad record, or too few questions or documents in the file.
        OSError: the file cannot be read.
    """
    rows: list[dict[str, Any]] = []
    pool: dict[str, None] = {}
    for row in file_rows(path, "stage2"):
        rows.append(row)
        pool.update(dict.fromkeys(rows[-1]["docs"]))
        if len(rows) >= n_questions and len(pool) >= n_docs:
            break
    if len(rows) < n_questions:
        raise ValueError(f"{path} holds {len(rows)} questions: lower --questions {n_questions}")
    if len(pool) < n_docs:
        raise ValueError(f"{path} holds {len(pool)} different documents: lower --counts {n_docs}")
    cases = []
    for record in rows[:n_questions]:
        own = dict.fromkeys(record["docs"])
        cases.append(Case(record["question"][0], list({**own, **pool})[:n_docs], len(own)))
    return cases


@contextmanager
def timed(sample: Sample, phase: str, device: torch.device) -> Iterator[None]:
    """Adds the seconds of the body to a phase, with all work on a GPU finished before and after."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    yield
    if on_gpu:
        torch.cuda.synchronize(device)
    sample.seconds[phase] = time.perf_counter() - began
    if on_gpu:
        kind = "compress" if phase == "compress" else "answer"
        peak = torch.cuda.max_memory_allocated(device)
        sample.peak_bytes[kind] = max(peak, sample.peak_bytes.get(kind, 0))


@torch.inference_mode()
def answer(model: CLaRa, sample: Sample, prompt: Prompt, docs_KLD: torch.Tensor | None, new_tokens: int) -> None:
    """Writes exactly `new_tokens` greedy tokens into `sample.new_ids`, timing the first and the others.

    docs_KLD: the vectors that the generator reads; None runs the bare base model on a prompt of text.
    """
    ids_1T = torch.tensor([prompt.ids], device=model.device)
    with model.router.route(None if docs_KLD is None else DECODER):
        with timed(sample, "first_token", model.device):
            if docs_KLD is None:
                embeds_1TD = model.embed(ids_1T)
            else:
                embeds_1TD = model.place(ids_1T, docs_KLD, torch.tensor([len(docs_KLD)]))
            out = model.decoder(inputs_embeds=embeds_1TD, use_cache=True, logits_to_keep=1)
            new = [out.logits[:, -1:].argmax(-1)]
        with timed(sample, "decode", model.device):
            for _ in range(new_tokens - 1):
                out = model.decoder(input_ids=new[-1], past_key_values=out.past_key_values, use_cache=True)
                new.append(out.logits[:, -1:].argmax(-1))
    sample.new_ids = torch.cat(new, dim=1)[0].tolist()


def systems(model: CLaRa, n: int, text: bool) -> dict[str, int]:
    """How many of n documents each system reads; without a query reasoner nothing is selected."""
    selected = {SELECTED: min(model.config.generation_top_k, n)} if model.has_query_reasoner else {}
    return {**selected, ALL: n, **({TEXT: n} if text else {})}


def build_prompts(
    model: CLaRa, cases: list[Case], counts: Sequence[int], new_tokens: int, text: bool
) -> tuple[dict[tuple[int, str], list[Prompt]], dict[tuple[int, str], str]]:
    """The prompts of each (N, system), one a question, and why the others are left out.

    Raises:
        ValueError: the checkpoint's prompts are not known.
    """
    limit = getattr(model.decoder.config, "max_position_embeddings", None)
    prompts, skipped = {}, {}
    for n in counts:
        for system, read in systems(model, n, text).items():
            if system == TEXT:
                made = [model.text_prompt(case.question, case.docs[:n]) for case in cases]
            else:
                made = [model.answer_prompt(case.question, read) for case in cases]
            longest = max(len(prompt.ids) for prompt in made)
            if limit and longest + new_tokens > limit:
                skipped[n, system] = f"{longest} prompt tokens and {new_tokens} new ones: the base model has {limit}"
            else:
                prompts[n, system] = made
    return prompts, skipped


@torch.inference_mode()
def measure(
    model: CLaRa, cases: list[Case], prompts: dict[tuple[int, str], list[Prompt]], rounds: int, new_tokens: int
) -> tuple[list[Sample], int]:
    """All samples of `rounds` rounds after one that is not counted, and the bytes of one document's vectors.

    The N documents are compressed once for the CLaRa systems of a question and round, so these share that time.
    """
    config, samples, counts = model.config, [], sorted({n for n, _ in prompts})
    turns = [(r, q, n) for r in range(rounds + 1) for q in range(len(cases)) for n in counts]
    for r, q, n in tqdm(turns, desc="measuring", disable=not sys.stderr.isatty()):
        case, compressed = cases[q], Sample(n, "", q, r, 0)
        with timed(compressed, "compress", model.device):
            docs_NLD, _ = model.compress_documents(case.docs[:n])
        for system in (SELECTED, ALL, TEXT):
            if (n, system) not in prompts:
                continue
            prompt = prompts[n, system][q]
            sample = Sample(n, system, q, r, len(prompt.ids))
            docs_KLD = None if system == TEXT else docs_NLD
            if system != TEXT:
                sample.seconds, sample.peak_bytes = dict(compressed.seconds), dict(compressed.peak_bytes)
            if system == SELECTED:
                with timed(sample, "query", model.device):
                    query_1E = model.encode_queries([case.question])
                with timed(sample, "select", model.device):
                    docs_KLD, _, _ = select_documents(
                        query_1E, docs_NLD, torch.tensor([n]), config.generation_top_k, config.topk_temperature
                    )
            answer(model, sample, prompt, docs_KLD, new_tokens)
            if r:
                samples.append(sample)
    return samples, docs_NLD[0].nbytes


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarize(samples: list[Sample]) -> tuple[list[dict], list[dict]]:
    """Rows of each (N, system), and the ratios full text / CLaRa, taken within each question and round."""
    groups: dict[tuple[int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.documents, sample.system), []).append(sample)
    rows, ratios = [], []
    for (n, system), group in groups.items():
        row: dict = {"documents": n, "system": system, "samples": len(group)}
        row["seconds"] = {p: spread([s.seconds[p] for s in group]) for p in PHASES if p in group[0].seconds}
        row |= {name: spread([figure(s) for s in group]) for name, figure in FIGURES.items()}
        row["peak_bytes"] = {kind: max(s.peak_bytes[kind] for s in group) for kind in group[0].peak_bytes}
        rows.append(row)
        if system != TEXT and (n, TEXT) in groups:
            pairs = list(zip(groups[n, TEXT], group, strict=True))
            ratio = {name: spread([figure(t) / figure(c) for t, c in pairs]) for name, figure in FIGURES.items()}
            ratios.append({"documents": n, "system": system, **ratio})
    return rows, ratios


def shown(figure: dict[str, float] | None, scale: float = 1.0) -> str:
    """`median (low–high)` with three digits of the median."""
    if figure is None:
        return "–"
    median = figure["median"] * scale
    digits = max(0, 2 - math.floor(math.log10(median))) if median > 0 else 0
    values = [f"{figure[key] * scale:.{digits}f}" for key in ("median", "low", "high")]
    return values[0] if values[1] == values[2] else f"{values[0]} ({values[1]}–{values[2]})"


def label(result: dict, system: str, n: int) -> str:
    """A row's name, with how many documents the model reads."""
    k = min(result["config"]["generation_top_k"], n)
    return {SELECTED: f"CLaRa, best {k} of {n}", ALL: f"CLaRa, all {n}", TEXT: f"full text, all {n}"}[system]


def table(result: dict) -> str:
    """The Markdown tables of a result: phases, totals and ratios."""
    on_gpu = any(row["peak_bytes"] for row in result["rows"])
    heads = ["", "prompt tokens", "compress (s)", "query (ms)", "select (ms)", "first token (ms)", "decode (ms/token)"]
    heads += ["answer, compressed before (s)", "answer with compression (s)"]
    heads += ["peak memory, answer (MiB)", "peak memory, compress (MiB)"] * on_gpu
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for row in result["rows"]:
        seconds = row["seconds"]
        cells = [label(result, row["system"], row["documents"]), shown(row["prompt_tokens"])]
        cells += [shown(seconds.get("compress")), shown(seconds.get("query"), 1e3), shown(seconds.get("select"), 1e3)]
        cells += [shown(row["first_token"], 1e3), shown(row["decode_per_token"], 1e3)]
        cells += [shown(row["answer_compressed_before"]), shown(row["answer_with_compression"])]
        peaks = [row["peak_bytes"].get(kind) for kind in ("answer", "compress")] if on_gpu else []
        cells += ["–" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {label(result, s['system'], s['documents'])} | skipped: {s['skipped']} |" for s in result["skipped"]]
    if result["ratios"]:
        heads = ["full text / CLaRa (times)", "prompt tokens", "first token", "decode"]
        heads += ["answer, compressed before", "answer with compression"]
        lines += ["", f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
        for ratio in result["ratios"]:
            cells = [label(result, ratio["system"], ratio["documents"]), *(shown(ratio[name]) for name in FIGURES)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in result["notes"])])


def draw(result: dict, target: Path) -> None:
    """Stacked bars of the median phases in seconds, one bar for each row; compression comes last, hatched."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = result["rows"]
    figure = Figure(figsize=(11, 1.9 + 0.55 * len(rows)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    place, places = 0.0, []
    for row, before in zip(rows, [None, *rows], strict=False):
        place += 0.6 * (before is not None and before["documents"] != row["documents"])
        places.append(place)
        left = 0.0
        for phase in PHASES:
            width = row["seconds"].get(phase, {}).get("median", 0.0)
            hatch = "///" if phase == "compress" else None
            axes.barh(place, width, 0.72, left, color=COLOURS[phase], edgecolor="white", linewidth=0.4, hatch=hatch)
            left += width
        note = f"{shown(row['answer_compressed_before'])} s"
        if "compress" in row["seconds"]:
            note += f", with compression {shown(row['answer_with_compression'])} s"
        axes.text(left, place, f"  {note}", va="center", fontsize=9)
        place += 1
    axes.set_yticks(places, [label(result, row["system"], row["documents"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.75 * max(row["answer_with_compression"]["median"] for row in rows))
    config = result["config"]
    axes.set_xlabel(f"seconds from question to answer of {config['new_tokens']} tokens; median (lowest–highest)")
    axes.set_title(f"{config['base_model']}, rate {config['compr_rate']}, {config['dtype']}, {result['device']}")
    names = [phase.replace("_", " ") + " (once a document)" * (phase == "compress") for phase in PHASES]
    keys = [Patch(facecolor=COLOURS[p], hatch="///" if p == "compress" else None, edgecolor="w") for p in PHASES]
    figure.legend(keys, names, loc="outside lower center", ncols=len(PHASES), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, target)


def notes(args: argparse.Namespace, model: CLaRa, cases: list[Case], store_bytes: int) -> list[str]:
    """What a reader must know to judge the figures."""
    config, width = model.config, model.decoder.config.hidden_size
    text_bytes = statistics.mean(len(model.tokens.seen_text(d).encode()) for case in cases for d in case.docs)
    lines = [
        f"one question at a time; median (lowest–highest) of {args.questions} questions × {args.rounds} rounds after "
        f"one that is not counted; {args.new_tokens} new tokens in every system",
        f"store: {store_bytes} bytes a document ({config.n_memory_tokens} vectors × {width} × "
        f"{store_bytes // (config.n_memory_tokens * width)} bytes), its text {text_bytes:.0f} bytes on average; "
        "the vectors lie in memory, reading them from disk is not timed",
        "the adapters are not merged into the weights: CLaRa pays for them, full text runs the bare base model",
    ]
    if not model.has_query_reasoner:
        lines.append("the checkpoint has no query reasoner: nothing is selected, CLaRa reads all documents")
    for n in args.counts:
        borrowed = [max(0, n - case.own) for case in cases]
        if any(borrowed):
            lines.append(f"{n} documents: topped up with other questions' documents, {borrowed} of {n} a question")
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags, checked as far as they can be without reading a file; exits 2 with one line."""
    parser = OneLineParser("efficiency", description=str(__doc__).split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="directory of a CLaRa checkpoint")
    parser.add_argument("--documents", required=True, type=Path, help="evaluation records, JSON Lines")
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 20], help="numbers of documents N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=3, help="the first so many of the file")
    parser.add_argument("--new_tokens", type=int, default=32, help="length of every answer")
    parser.add_argument("--output_dir", type=Path, default=Path("results/efficiency"))
    parser.add_argument("--model_path", help="base model, where the checkpoint names one that is not here")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--baseline_text", choices=["yes", "no"], default="yes", help="measure full text too")
    args = parser.parse_args(argv)
    args.counts = sorted(set(args.counts))
    for name, least in (("counts", 1), ("rounds", 1), ("questions", 1), ("new_tokens", 2)):
        value = args.counts[0] if name == "counts" else getattr(args, name)
        if value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    if (args.output_dir / RESULTS).exists():
        parser.error(f"{args.output_dir} already holds {RESULTS}: choose another --output_dir")
    return args


def run(args: argparse.Namespace, command: list[str]) -> dict:
    """Checks the inputs, loads the model, measures; the content of efficiency.json."""
    cases = read_cases(args.documents, args.counts[-1], args.questions)
    root = check_checkpoint(args.checkpoint, args.model_path)
    prepare_output(args.output_dir, ("matplotlib", "matplotlib"))
    started, began = datetime.now(timezone.utc), time.monotonic()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    model = load(root, args.model_path, args.dtype)
    prompts, skipped = build_prompts(model, cases, args.counts, args.new_tokens, args.baseline_text == "yes")
    if not prompts:
        raise ValueError(f"nothing fits the base model's positions ({next(iter(skipped.values()))}): lower --counts")
    samples, store_bytes = measure(model, cases, prompts, args.rounds, args.new_tokens)
    rows, ratios = summarize(samples)
    on_gpu = model.device.type == "cuda"
    fields = ("training_stage", "compr_rate", "doc_max_length", "n_memory_tokens", "generation_top_k")
    given = ("counts", "rounds", "questions", "new_tokens")
    return {
        "format": 1,
        "command": shlex.join(["python", "-m", "evaluation.efficiency", *command]),
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.monotonic() - began,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "config": {
            "checkpoint": args.checkpoint,
            "base_model": Path(model.config.decoder_model_name).name,
            "documents_file": str(args.documents),
            "dtype": str(model.dtype).removeprefix("torch."),
            **{name: getattr(model.config, name) for name in fields},
            **{name: getattr(args, name) for name in given},
        },
        "questions": [{"question": case.question, "own_documents": case.own} for case in cases],
        "store_bytes_per_document": store_bytes,
        "rows": rows,
        "ratios": ratios,
        "skipped": [{"documents": n, "system": system, "skipped": why} for (n, system), why in skipped.items()],
        "notes": notes(args, model, cases, store_bytes),
        "samples": [
            {**asdict(s), "answer_seconds": s.answer_seconds, "total_seconds": s.total_seconds} for s in samples
        ],
    }


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    try:
        result = run(args, sys.argv[1:] if argv is None else argv)
        write_whole(args.output_dir / RESULTS, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    except (ValueError, OSError) as error:
        print(f"efficiency: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(table(result))
    draw(result, args.output_dir / PICTURE)
    print(f"wrote {args.output_dir / RESULTS} and {args.output_dir / PICTURE}", file=sys.stderr)


if __name__ == "__main__":
    main()
