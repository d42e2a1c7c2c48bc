"""Memory and time of a training stage, before anything is downloaded or trained: only config.json is read.

python -m openrlhf.cli.estimate --pretrain MODEL_OR_DIRECTORY --stage stage1 --compress_rate 16 --bf16
python -m openrlhf.cli.estimate --pretrain mistral-7b --device h100 --bf16 --gradient_checkpointing
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import get_args

from transformers import AutoConfig, MistralConfig, PretrainedConfig

from openrlhf.models.configuration_clara import TEXT_RAG
from openrlhf.trainer.config import STAGE2, TrainingConfig
from openrlhf.trainer.devices import DEVICES, Device, find_device
from openrlhf.trainer.estimate import SHARED, TOKENS, plan_of, process_bytes, report
from openrlhf.trainer.skeleton import Plan

MISTRAL = "mistral-7b"
FLAGS = ("pretrain", *SHARED, "max_epochs")


def _add_shared(parser: argparse.ArgumentParser, flag: Field) -> None:
    text, name = flag.metadata["help"], f"--{flag.name}"
    if flag.default is False:
        parser.add_argument(name, action="store_true", help=text)
        return
    default = None if flag.default is MISSING else flag.default
    parser.add_argument(
        name,
        type=type(default),
        default=default,
        choices=get_args(flag.type) or None,
        help=f"{text} (default {default})",
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where one is not known."""
    parser = argparse.ArgumentParser("estimate", description=__doc__.split("\n")[0], allow_abbrev=False)
    for flag in fields(TrainingConfig):
        if flag.name in FLAGS:
            _add_shared(parser, flag)
    widths = "tokens of a {} as padded in its batch (default: those of the example data)"
    parser.add_argument("--doc_tokens", type=float, help=widths.format("document"))
    parser.add_argument("--prompt_tokens", type=float, help=widths.format("prompt without its documents"))
    parser.add_argument("--answer_tokens", type=float, help=widths.format("answer"))
    parser.add_argument("--question_tokens", type=float, help=widths.format("question, stage 2"))
    parser.add_argument("--candidates", type=int, default=20, help="N: documents of a question in stage 2 (default 20)")
    parser.add_argument("--processes", type=int, default=1, help="processes, each with a device (default 1)")
    parser.add_argument("--device", default="here", help=f"here (default), cpu, {', '.join(DEVICES)}")
    parser.add_argument("--memory_gb", type=float, help="gigabytes a process may use (default: the device's)")
    parser.add_argument("--records", type=int, default=0, help="records of the data set, to print hours")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser.parse_args(argv)


def base_config(name: str) -> PretrainedConfig:
    """The base model's config: of `mistral-7b`, a directory with config.json, or a Hub id.

    Raises:
        ValueError, OSError: there is none, or it is not a decoder's.
    """
    if name == MISTRAL:
        return MistralConfig(sliding_window=None)  # as version 0.2 has it
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name} has no config.json: give a base model's directory or Hub id")
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise FileNotFoundError(f"--pretrain {name} was not found: give a directory, a Hub id, or {MISTRAL}")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"no config.json could be read from --pretrain {name}: {reason}") from error
    if not hasattr(config.get_text_config(), "num_hidden_layers"):
        raise ValueError(f"{name} is a {config.model_type}, not a causal language model")
    return config


def check(flags: argparse.Namespace) -> Plan:
    """The flags as a plan.

    Raises:
        ValueError, OSError: with what is wrong, before anything is built.
    """
    place = tempfile.gettempdir()  # what is wrong with places is train_sft's matter
    given = {name: getattr(flags, name) for name in FLAGS}
    start = None if flags.stage == TEXT_RAG else "any"
    config = TrainingConfig(
        **given, dataset="any", pretrain_checkpoint=start, save_path=place, ckpt_path=place, dry_run=True
    )
    usual = TOKENS[flags.stage] | {"doc_tokens": min(TOKENS[flags.stage]["doc_tokens"], flags.doc_max_length)}
    tokens = {key: usual[key] if getattr(flags, key) is None else getattr(flags, key) for key in usual}
    wrong = [f"--{key} must not be negative" for key, value in tokens.items() if not 0 <= value < math.inf]
    if tokens["doc_tokens"] > flags.doc_max_length:
        wrong.append(f"--doc_tokens must not exceed --doc_max_length {flags.doc_max_length}")
    least = {"candidates": 1, "processes": 1, "records": 0}
    wrong += [f"--{key} must be at least {low}" for key, low in least.items() if getattr(flags, key) < low]
    if flags.memory_gb is not None and not flags.memory_gb > 0:
        wrong.append("--memory_gb must be positive")
    if flags.json is not None and not flags.json.absolute().parent.is_dir():
        wrong.append(f"--json {flags.json}: its directory does not exist")
    if flags.train_batch_size < flags.processes:
        wrong.append("--train_batch_size gives some processes nothing to do: raise it, or lower --processes")
    if wrong:
        raise ValueError("\n".join(wrong))
    candidates = flags.candidates if flags.stage in STAGE2 else flags.generation_top_k
    return plan_of(config, base_config(flags.pretrain), candidates, tokens, flags.processes)


def table(flags: argparse.Namespace, plan: Plan, device: Device, found: dict) -> str:
    """The report for people."""
    micro, parts = found["micro_batch"], found["memory"]
    millions = [found[name] / 1e6 for name in ("parameters", "trained")]
    used = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if name != "sum" and size)
    widths = f"{plan.doc_width} tokens each" + (f", generator {plan.width}" if plan.width else "")
    widths = f"read as text, {plan.width} tokens a question" if plan.stage == TEXT_RAG else widths
    largest = found["largest_micro_train_batch_size"]
    rows = {
        "model": "{:,.1f} M parameters, {:,.1f} M trained".format(*millions),
        "micro-batch": f"{micro['questions']} questions, {micro['documents']} documents, {widths}: "
        f"{micro['flops'] / 1e12:,.2f} TFLOP, {micro['bytes_moved'] / 1e9:,.1f} GB moved",
        "memory, GB": f"{used} = {parts['sum'] / 1e9:.2f} of {found['memory_there'] / 1e9:.1f} on {found['device']}",
        "fits": f"--micro_train_batch_size up to {largest}" if largest else "not even one question in a micro-batch",
        "step": f"{found['seconds_per_step']:,.2f} s for {plan.train_batch_size} records"
        f" ({micro['seconds']:,.2f} s a micro-batch, {plan.micro_batches} of them)",
        "": f"{found['tokens_per_s']:,.0f} tokens/s with padding"
        + (f", {found['mfu']:.1%} of the device's peak" if found["mfu"] else ""),
    }
    if found["seconds_per_step_new_documents"] is not None:
        rows["new documents"] = f"{found['seconds_per_step_new_documents']:,.2f} s a step where none was seen before"
    if found["documents_per_s"] is not None:
        rows["documents"] = (
            f"{found['documents_per_s']:,.1f} compressed a second, {found['documents_together']} at a time; "
            f"{found['bytes_per_document']:,} bytes each"
        )
    if "hours" in found:
        rows["all"] = f"{found['hours']:,.2f} hours for {flags.records:,} records, --max_epochs {flags.max_epochs}"
    rows["time"] = found["how"]
    return "\n".join(f"{name:14}{text}" for name, text in rows.items())


def next_command(flags: argparse.Namespace) -> str:
    """The training command with these flags."""
    words = [f"torchrun --nproc_per_node {flags.processes} -m openrlhf.cli.train_sft --dataset DATA"]
    if flags.stage in STAGE2:
        words.append("--pretrain_checkpoint CHECKPOINT")
    words.append(f"--pretrain {'MODEL' if flags.pretrain == MISTRAL else flags.pretrain}")
    for flag in fields(TrainingConfig):
        value = getattr(flags, flag.name, None)
        if flag.name in FLAGS[1:] and value != flag.default:
            words.append(f"--{flag.name}" if value is True else f"--{flag.name} {value}")
    return " ".join(words)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    flags = parse(argv)
    try:
        device = find_device(flags.device)
        plan = check(flags)
    except (ValueError, OSError) as error:
        said = "; ".join(line.strip().removeprefix("- ") for line in str(error).splitlines() if line.strip())
        print(f"estimate: {said}", file=sys.stderr)
        sys.exit(2)
    limit = None if flags.memory_gb is None else flags.memory_gb * 1e9
    found = report(plan, device, process_bytes(device.kind), limit, flags.records, flags.max_epochs)
    print(table(flags, plan, device, found))
    if flags.json is not None:
        from openrlhf.utils.logging import write_whole

        settings = {name: getattr(flags, name) for name in FLAGS}
        write_whole(flags.json, json.dumps({"settings": settings, **found}, indent=2) + "\n")
    print(f"next          {next_command(flags)}")


if __name__ == "__main__":
    main()
