"""Train one stage of CLaRa.

torchrun --nproc_per_node 8 -m openrlhf.cli.train_sft --pretrain MODEL --dataset DATA --stage stage1 …
python -m openrlhf.cli.train_sft --help
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
from transformers import HfArgumentParser

from openrlhf.trainer.config import TrainingConfig

logger = logging.getLogger("openrlhf")
RUN_FILE = "run.json"
# A resumed run must agree with the run it continues in these, or its curve would be another one.
FIXED = (
    *("stage", "seed", "train_batch_size", "micro_train_batch_size", "max_epochs", "learning_rate", "lr_scheduler"),
    *("lr_warmup_ratio", "l2", "max_norm", "adam_betas", "mse_loss", "mse_loss_weight", "max_len", "generation_top_k"),
    *("topk_temperature", "zero_stage", "bf16", "doc_max_length", "compress_rate", "lora_r", "freeze_query_reasoner"),
    *("span_loss_weight", "freeze_memory_embeddings", "rescale_memory", "spread_memory", "stage2_mips"),
    *("stage2_retrieval_top_n", "group_by_length", "span_decay", "lora_dropout", "even_spans", "freeze_compressor"),
)


def parse(argv: list[str] | None = None) -> TrainingConfig:
    """Flags to a checked configuration; prints what is wrong and exits with 2."""
    parser = HfArgumentParser(TrainingConfig, allow_abbrev=False, description=__doc__.split("\n")[0])  # type: ignore[arg-type]
    try:
        (config,) = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.exit(2, f"train_sft: these flags cannot train:\n{error}\n")
    if config.use_wandb not in (None, "env"):
        print(
            "train_sft: a wandb key on the command line is seen by others; export WANDB_API_KEY instead",
            file=sys.stderr,
        )
        os.environ["WANDB_API_KEY"] = config.use_wandb
    return config


def check_resumed(config: TrainingConfig, now: dict) -> None:
    """Raises ValueError when the run to resume had other settings than `now`."""
    path = Path(config.ckpt_path) / RUN_FILE
    if not (config.load_checkpoint and path.is_file() and any(path.parent.glob("global_step*"))):
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{key}: {before.get(key)} then, {now[key]} now" for key in now if before.get(key, now[key]) != now[key]]
    if changed:
        raise ValueError(f"{config.ckpt_path} is a run of other settings and cannot be resumed: " + "; ".join(changed))


def run_facts(config: TrainingConfig, data, world: int) -> dict:
    """What must stay the same when a run is resumed."""
    from openrlhf.datasets.records import fingerprint

    shown = config.shown()
    facts = {name: shown[name] for name in FIXED}
    for name in ("pretrain", "pretrain_checkpoint"):
        local = shown[name] and Path(shown[name]).exists()
        facts[name] = str(Path(shown[name]).resolve()) if local else shown[name]
    return {**facts, "records": len(data), "fingerprint of the records": fingerprint(data), "world_size": world}


def train(config: TrainingConfig) -> dict[str, dict]:
    """Runs one stage; returns the last figures of each split."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess
    from openrlhf.trainer import build
    from openrlhf.trainer.sft_trainer import SFTTrainer, checkpoints, step_of
    from openrlhf.utils import distributed
    from openrlhf.utils.logging import MetricsLog, set_up_logging, write_whole

    device = distributed.start_processes(config.local_rank)
    first, world = distributed.rank() == 0, distributed.world_size()
    set_up_logging(distributed.rank())
    root = build.resolve_paths(config)
    data, eval_data = build.load_data(config)
    model_cfg = build.model_config(config, root)
    tokens = build.load_tokens(config, model_cfg)
    facts = run_facts(config, data, world)
    check_resumed(config, facts)
    shown = {**config.shown(), "world_size": world, "device": str(device)}
    if first:
        print("configuration " + json.dumps(shown, indent=2))
    if config.dry_run:
        if first:
            print("would train " + json.dumps(build.describe(config, model_cfg, tokens, data, world), indent=2))
        return {}
    save_path, ckpt_path = Path(config.save_path), Path(config.ckpt_path)
    if first:
        save_path.mkdir(parents=True, exist_ok=True)
        ckpt_path.mkdir(parents=True, exist_ok=True)
        write_whole(save_path / "training_config.json", json.dumps(shown, indent=2) + "\n")
        write_whole(ckpt_path / RUN_FILE, json.dumps(facts) + "\n")
    model = build.build_model(config, model_cfg, root, device)
    n_steps = -(-len(data) // config.train_batch_size) * config.max_epochs
    engine = build.build_engine(config, model, n_steps)
    start = 0
    if config.load_checkpoint:
        found = checkpoints(ckpt_path)
        newest = distributed.min_over_ranks(step_of(found[-1]) if found else 0, device)
        if newest:
            start = engine.load(ckpt_path, f"global_step{newest}")["step"]
            logger.info("resumed from step %d of %d", start, n_steps)
        else:
            logger.warning("--load_checkpoint: no checkpoint in %s yet, starting from the beginning", ckpt_path)
    wandb = None
    if config.use_wandb:
        name = config.wandb_run_name or time.strftime("clara_%Y%m%d_%H%M%S")
        wandb = {"project": config.wandb_project, "entity": config.wandb_org, "group": config.wandb_group, "name": name}
    log = MetricsLog(save_path, start, shown, wandb, config.use_tensorboard) if first else None
    save = build.saver(engine, config)
    trainer = SFTTrainer(
        engine,
        config,
        data,
        build.build_collator(config, model.tokens),
        device,
        log,
        eval_data,
        build.answerer(model, config) if config.do_eval_gen else None,
        save,
    )
    last = trainer.fit(start)
    save(save_path, last)
    if log is not None:
        log.close()
    return last


def main() -> None:
    """Entry point."""
    config = parse()
    began = time.monotonic()
    try:
        last = train(config)
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("\ntrain_sft: interrupted; the same command with --load_checkpoint goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        from openrlhf.retrieval.client import RetrievalError
        from openrlhf.utils.distributed import WriteError

        # What is wrong from the start is wrong on all ranks of a node; a full disk, and a service that does not answer,
        # may be one rank's alone.
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, (WriteError, RetrievalError)):
            print(f"train_sft: {error}", file=sys.stderr)
        sys.exit(1)
    if os.environ.get("RANK", "0") == "0" and not config.dry_run:
        minutes = (time.monotonic() - began) / 60
        figures = {
            split: {k: v for k, v in line.items() if k in ("loss", "recall_1", "em", "f1")}
            for split, line in last.items()
        }
        print(
            f"{config.stage} finished in {minutes:.1f} min. Last figures: {json.dumps(figures)}\n"
            f"checkpoint  {config.save_path}\nfigures     {config.save_path}/metrics.jsonl\n"
            f"next        AutoModel.from_pretrained({config.save_path!r}, trust_remote_code=True)"
        )


if __name__ == "__main__":
    main()
