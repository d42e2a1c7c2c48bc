"""TrainingConfig: every flag of `train_sft`, its default, and what may not be combined. Loads no model and no data."""

import importlib.util
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from openrlhf.models.configuration_clara import TEXT_RAG
from openrlhf.retrieval.client import wrong_url

RETRIEVAL_URL = "http://127.0.0.1:5004"
STAGE2 = ("stage2", "stage2_pretrain_retrieval")


def _flag(default, text: str, **options):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **options})
    return field(default=default, metadata={"help": text, **options})


@dataclass
class TrainingConfig:
    """Flags of a training run, checked when made.

    Raises:
        ValueError: a value or a combination that cannot train; all that is wrong is listed, each with what to do.
    """

    pretrain: str = _flag("", "base model: Hub id or directory (required)")
    pretrain_checkpoint: str | None = _flag(None, "CLaRa checkpoint to continue from")
    stage: Literal["stage1", "stage1_2", "stage2", "stage2_pretrain_retrieval", "text_rag"] = _flag(
        "stage1", "what to train"
    )
    generation_top_k: int = _flag(1, "K: documents an answer is given from")
    doc_max_length: int = _flag(256, "tokens of a document")
    compress_rate: int = _flag(32, "compression rate; divides doc_max_length")
    qa_loss: bool = _flag(True, "stage 1: train on QA sets (off: paraphrases only)")
    mse_loss: bool = _flag(False, "add the MSE between memory and text means")
    mse_loss_weight: float = _flag(0.1, "lambda of the MSE loss")
    span_loss_weight: float = _flag(0.0, "weight of the span loss: memory vectors name the tokens they stand for")
    span_decay: float = _flag(1.0, "in the span loss a token of a span weighs this times the one before it")
    topk_temperature: float = _flag(0.02, "tau of the straight-through top-k")
    lora_r: int = _flag(16, "rank of the adapters")
    lora_dropout: float = _flag(0.1, "share of the adapters' inputs that training leaves out")
    reset_decoder: bool = _flag(False, "stage1_2: start a fresh generator adapter")
    freeze_query_reasoner: bool = _flag(False, "stage 2: train the generator only")
    fresh_query_reasoner: bool = _flag(False, "stage 2: do not start the query reasoner from the compressor")
    rescale_memory: bool = _flag(
        False, "stage 1 from a base model: the generator reads memory vectors at the length of input embeddings"
    )
    spread_memory: bool = _flag(
        False, "stage 1 from a base model: the compressor has a memory token at the position of those it stands for"
    )
    even_spans: bool = _flag(
        False, "stages 1 and 1_2: all memory vectors of a short document stand for a part of it; kept by the checkpoint"
    )
    freeze_compressor: bool = _flag(
        False, "stages 1 and 1_2: train the generator only; a store and a query reasoner made before stay valid"
    )
    freeze_memory_embeddings: bool = _flag(False, "stages 1 and 1_2: keep the memory embeddings as they are")
    document_store: str | None = _flag(
        None, "stage 2: a store of compressed documents to read candidates from; others are compressed"
    )
    stage2_mips: bool = _flag(False, "stage 2: candidates from the retrieval service, not from the records")
    stage2_retrieval_top_n: int = _flag(1, "N: candidates that --stage2_mips retrieves for a question")
    retrieval_url: str = _flag(RETRIEVAL_URL, "the retrieval service of --stage2_mips; see serve_retrieval")

    dataset: str = _flag("", "training data: JSONL files, directories or Hub names, comma-separated (required)")
    dataset_probs: str | None = _flag(None, "share of each data set in the blend, comma-separated")
    dataset_split: str = _flag("train", "split of a Hub data set or directory")
    eval_dataset: str | None = _flag(None, "evaluation data, as --dataset")
    eval_split: str = _flag("train", "split of the evaluation data")
    max_samples: int = _flag(1000000, "use the first so many records, for training and for evaluation")
    max_len: int = _flag(2048, "tokens of prompt and answer together")
    skip_bad_records: bool = _flag(False, "skip and count records that cannot be used, instead of stopping")

    train_batch_size: int = _flag(128, "records of an optimiser step, over all ranks")
    micro_train_batch_size: int = _flag(8, "records of one forward pass of one rank")
    group_by_length: bool = _flag(False, "records of a step are of like length: less padding where they are few")
    learning_rate: float = _flag(5e-6, "highest learning rate")
    lr_scheduler: Literal["cosine_with_min_lr", "linear", "cosine", "constant", "constant_with_warmup"] = _flag(
        "cosine_with_min_lr", "learning-rate schedule; cosine_with_min_lr ends at a tenth"
    )
    lr_warmup_ratio: float = _flag(0.03, "share of the steps that warm up")
    l2: float = _flag(0.0, "weight decay")
    adam_betas: list[float] = _flag([0.9, 0.95], "betas of AdamW", nargs=2)
    max_norm: float = _flag(1.0, "gradient norm to clip at, 0 for none")
    max_epochs: int = _flag(2, "passes over the data")

    zero_stage: Literal[1, 2, 3] = _flag(2, "ZeRO stage")
    bf16: bool = _flag(False, "weights and activations in bfloat16")
    gradient_checkpointing: bool = _flag(False, "recompute activations in the backward pass")
    flash_attn: bool = _flag(False, "flash-attn where installed and CUDA is there, else SDPA")
    seed: int = _flag(42, "of every random draw")
    disable_fast_tokenizer: bool = _flag(False, "use the base model's slow tokenizer")
    use_ms: bool = _flag(False, "fetch --pretrain from ModelScope")
    local_rank: int = _flag(-1, "set by launchers")

    logging_steps: int = _flag(1, "steps between lines of figures")
    eval_steps: int = _flag(-1, "steps between evaluations, -1 each epoch")
    do_eval_gen: bool = _flag(False, "also generate answers when evaluating: EM, F1, Cover-EM")
    save_path: str = _flag("./ckpt", "where the trained checkpoint and the figures go")
    save_steps: int = _flag(-1, "steps between resumable checkpoints, -1 never, -2 each epoch")
    ckpt_path: str = _flag("./ckpt/checkpoints_sft", "where resumable checkpoints go")
    load_checkpoint: bool = _flag(False, "resume from the newest checkpoint in --ckpt_path")
    max_ckpt_num: int = _flag(3, "resumable checkpoints kept")
    max_ckpt_mem: float | None = _flag(None, "gigabytes of checkpoints kept")
    save_hf_ckpt: bool = _flag(False, "with each resumable checkpoint also write one that from_pretrained loads")
    disable_ds_ckpt: bool = _flag(False, "write no resumable checkpoints, only those of --save_hf_ckpt")
    use_wandb: str | None = _flag(None, "log to wandb; the key is read from WANDB_API_KEY", nargs="?", const="env")
    wandb_project: str = _flag("CLaRa", "wandb project")
    wandb_org: str | None = _flag(None, "wandb entity")
    wandb_group: str | None = _flag(None, "wandb group")
    wandb_run_name: str | None = _flag(None, "wandb run name (default clara_TIME)")
    use_tensorboard: str | None = _flag(None, "directory for TensorBoard")
    dry_run: bool = _flag(False, "check everything and print what would be trained")

    def __post_init__(self):
        problems = [*self._wrong_values(), *self._wrong_combinations(), *self._wrong_places()]
        if problems:
            raise ValueError("\n".join(f"- {problem}" for problem in problems))

    def _wrong_values(self) -> list[str]:
        found = [f"--{name} is required" for name in ("pretrain", "dataset") if not getattr(self, name)]
        positive = (
            "generation_top_k doc_max_length compress_rate lora_r max_samples max_len train_batch_size "
            "micro_train_batch_size max_epochs logging_steps max_ckpt_num learning_rate topk_temperature "
            "stage2_retrieval_top_n"
        )
        found += [f"--{name} must be positive" for name in positive.split() if not 0 < getattr(self, name) < math.inf]
        not_negative = ("l2", "max_norm", "mse_loss_weight", "span_loss_weight")
        found += [f"--{name} must not be negative" for name in not_negative if not 0 <= getattr(self, name) < math.inf]
        if self.compress_rate > 0 and self.doc_max_length % self.compress_rate:
            legal = [d for d in range(1, self.doc_max_length + 1) if self.doc_max_length % d == 0]
            found.append(f"--compress_rate must divide --doc_max_length {self.doc_max_length}: one of {legal}")
        if not 0 < self.span_decay <= 1:
            found.append("--span_decay must be above 0 and at most 1, where all tokens of a span weigh the same")
        elif self.span_decay < 1 and not self.span_loss_weight:
            found.append("--span_decay weighs the tokens of the span loss: it needs --span_loss_weight")
        for name in ("lr_warmup_ratio", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"--{name} must be at least 0 and below 1")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            found.append("--adam_betas must be two numbers, at least 0 and below 1")
        if self.eval_steps != -1 and self.eval_steps < 1:
            found.append("--eval_steps must be -1 (each epoch) or a positive number")
        if self.save_steps not in (-1, -2) and self.save_steps < 1:
            found.append("--save_steps must be -1 (never), -2 (each epoch) or a positive number")
        if self.max_ckpt_mem is not None and not self.max_ckpt_mem > 0:
            found.append("--max_ckpt_mem must be positive")
        if self.micro_train_batch_size > self.train_batch_size:
            found.append("--micro_train_batch_size must not exceed --train_batch_size")
        if self.dataset_probs is not None:
            found += self._wrong_probs()
        return found

    def _wrong_probs(self) -> list[str]:
        try:
            probs = self.probs or []
        except ValueError:
            return [f"--dataset_probs must be numbers separated by commas, got {self.dataset_probs!r}"]
        sets = len([name for name in self.dataset.split(",") if name.strip()])
        if len(probs) != sets or not min(probs) > 0 or not abs(sum(probs) - 1) < 1e-6:
            return [f"--dataset_probs needs {sets} positive numbers that add up to 1, one for each data set"]
        return []

    def _wrong_combinations(self) -> list[str]:
        stage, found = self.stage, []

        def only(flag: str, stages: tuple[str, ...], why: str) -> None:
            if getattr(self, flag) and stage not in stages:
                said = "it reads documents as text, with a fresh generator adapter" if stage == TEXT_RAG else why
                found.append(f"--{flag} does not go with --stage {stage}: {said}")

        first = ("stage1", "stage1_2")
        only("mse_loss", first, "the documents are frozen there")
        only("span_loss_weight", first, "the documents are frozen there")
        only("even_spans", first, "the documents are frozen there, and a checkpoint keeps its choice")
        only("freeze_memory_embeddings", first, "they are always frozen there")
        only("freeze_compressor", first, "it is always frozen there")
        if self.freeze_compressor and stage in first:
            if not self.pretrain_checkpoint:
                found.append("--freeze_compressor needs --pretrain_checkpoint: it keeps a compressor that is trained")
            for flag in ("mse_loss", "span_loss_weight", "even_spans"):
                if getattr(self, flag):
                    found.append(f"--{flag} does not go with --freeze_compressor: it is for a compressor that trains")
        if stage == TEXT_RAG:
            only("pretrain_checkpoint", (), "")
            only("rescale_memory", (), "")
            only("spread_memory", (), "")
        elif stage not in first or self.pretrain_checkpoint:
            found.extend(
                f"--{flag} is chosen where training starts from the base model: a checkpoint keeps its choice"
                for flag in ("rescale_memory", "spread_memory")
                if getattr(self, flag)
            )
        if self.spread_memory and self.flash_attn:
            found.append("--spread_memory does not go with --flash_attn, which takes its positions for several texts")
        only("reset_decoder", ("stage1_2",), "only stage1_2 can start a fresh generator")
        only("freeze_query_reasoner", ("stage2",), "only stage2 trains something beside the query reasoner")
        only("fresh_query_reasoner", STAGE2, "there is no query reasoner before stage 2")
        only("document_store", STAGE2, "documents are compressed anew while their compressor trains")
        if self.document_store and self.zero_stage == 3:
            found.append(
                "--document_store does not go with --zero_stage 3, where all ranks compress the same documents"
            )
        only("do_eval_gen", ("stage1_2", "stage2", TEXT_RAG), "there are no questions to answer")
        if not self.qa_loss and stage != "stage1":
            found.append(f"--no_qa_loss does not go with --stage {stage}: only stage1 has QA sets")
        if stage == "stage1" and self.generation_top_k != 1:
            found.append("--generation_top_k must be 1 in stage1: each record has one document")
        if stage in STAGE2 and not self.pretrain_checkpoint:
            found.append(
                f"--stage {stage} needs --pretrain_checkpoint: it freezes the compressor, so it must be trained"
            )
        if self.reset_decoder and not self.pretrain_checkpoint:
            found.append("--reset_decoder needs --pretrain_checkpoint: without one the generator is fresh anyway")
        if self.freeze_query_reasoner and self.fresh_query_reasoner:
            found.append("--freeze_query_reasoner and --fresh_query_reasoner together leave retrieval at random")
        only("stage2_mips", ("stage2",), "only stage2 learns from candidates without labels")
        found += self._wrong_retrieval()
        if self.do_eval_gen and not self.eval_dataset:
            found.append("--do_eval_gen needs --eval_dataset")
        if self.do_eval_gen and self.zero_stage == 3:
            found.append("--do_eval_gen does not go with --zero_stage 3: evaluate the saved checkpoint instead")
        if self.disable_ds_ckpt and self.load_checkpoint:
            found.append("--load_checkpoint resumes from the checkpoints that --disable_ds_ckpt does not write")
        if self.use_wandb and importlib.util.find_spec("wandb") is None:
            found.append("--use_wandb needs the package wandb: pip install wandb")
        elif self.use_wandb == "env" and not os.environ.get("WANDB_API_KEY"):
            found.append("--use_wandb reads the key from the environment: export WANDB_API_KEY first")
        if self.use_tensorboard and importlib.util.find_spec("tensorboard") is None:
            found.append("--use_tensorboard needs the package tensorboard: pip install tensorboard")
        if self.use_ms and importlib.util.find_spec("modelscope") is None:
            found.append("--use_ms needs the package modelscope: pip install modelscope")
        return found

    def _wrong_retrieval(self) -> list[str]:
        if not self.stage2_mips:
            given = {"stage2_retrieval_top_n": 1, "retrieval_url": RETRIEVAL_URL}
            named = [name for name, default in given.items() if getattr(self, name) != default]
            return [f"--{name} only goes with --stage2_mips" for name in named]
        found = [f"--retrieval_url {problem}"] if (problem := wrong_url(self.retrieval_url)) else []
        if self.document_store:
            found.append("--document_store does not go with --stage2_mips: the service reads a store of its own")
        if self.stage2_retrieval_top_n < self.generation_top_k:
            found.append(
                f"--stage2_retrieval_top_n must be at least --generation_top_k {self.generation_top_k}: so many "
                "documents are selected from those that are retrieved"
            )
        return found

    def _wrong_places(self) -> list[str]:
        found = []
        for flag in ("save_path", "ckpt_path"):
            place = Path(getattr(self, flag)).expanduser().absolute()
            existing = next(p for p in (place, *place.parents) if p.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK):
                found.append(f"--{flag} {place} cannot be written: {existing} is not a writable directory")
        if not self.load_checkpoint and not self.dry_run:
            if (Path(self.save_path) / "config.json").exists():
                found.append(
                    f"--save_path {self.save_path} already holds a checkpoint: choose another, move it away, or resume "
                    "the run that made it with --load_checkpoint"
                )
            if any(Path(self.ckpt_path).glob("global_step*")):
                found.append(
                    f"--ckpt_path {self.ckpt_path} holds checkpoints of an earlier run: resume it with "
                    "--load_checkpoint, or choose another directory"
                )
        return found

    @property
    def probs(self) -> list[float] | None:
        """--dataset_probs as numbers."""
        return [float(p) for p in self.dataset_probs.split(",")] if self.dataset_probs else None

    def shown(self) -> dict:
        """The resolved configuration without secrets, to print and to save."""
        return {**asdict(self), "use_wandb": bool(self.use_wandb)}
