"""From flags to a model, data and a plan: the steps between parsing and training. Knows nothing about the loop."""

import copy
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, get_scheduler

from openrlhf.datasets.collators import (
    COLLATORS,
    IGNORE,
    Collator,
    RetrievedCollator,
    documents_to_read,
    text_length,
)
from openrlhf.datasets.records import RETRIEVED, load_records
from openrlhf.models.adapters import DECODER, QUERY, adapter_state, set_dropout
from openrlhf.models.checkpoint import find_base, find_checkpoint, read_config, trained_state
from openrlhf.models.configuration_clara import TEXT_RAG
from openrlhf.models.document_cache import LookUp
from openrlhf.models.fingerprint import fingerprint
from openrlhf.models.modeling_clara import STAGE_TRAINS, CLaRa, CLaRaConfig
from openrlhf.models.prompts import DEFAULT_PROMPTS
from openrlhf.models.tokens import ClaraTokens
from openrlhf.retrieval.client import RetrievalClient, RetrievalError
from openrlhf.retrieval.layout import read_header
from openrlhf.retrieval.store import Store
from openrlhf.trainer import estimate
from openrlhf.trainer.config import STAGE2, TrainingConfig
from openrlhf.trainer.sft_trainer import batch_plan
from openrlhf.trainer.skeleton import ROW_TOKENS
from openrlhf.utils.distributed import Engine, barrier, rank, seed_everything, writing

logger = logging.getLogger(__name__)


def resolve_paths(config: TrainingConfig) -> Path | None:
    """Finds base model and checkpoint, and checks the flags against the checkpoint, all before anything big loads.

    Returns:
        the checkpoint's directory, None without --pretrain_checkpoint.

    Raises:
        FileNotFoundError, ValueError: something is missing or does not fit.
    """
    if config.use_ms:
        from modelscope import snapshot_download

        config.pretrain = snapshot_download(config.pretrain)
    find_base(config.pretrain, Path.cwd())
    if config.document_store:
        header = read_header(Path(config.document_store))
        for flag, name in (("doc_max_length", "doc_max_length"), ("compress_rate", "compr_rate")):
            if header.get(name) != getattr(config, flag):
                raise ValueError(
                    f"--document_store {config.document_store} was compressed with --{flag} {header.get(name)}, this "
                    f"run asks for {getattr(config, flag)}: compress the corpus with this run's checkpoint"
                )
    if config.stage2_mips:
        check_service(config)
    if not config.pretrain_checkpoint:
        return None
    root = find_checkpoint(config.pretrain_checkpoint)
    _, saved = read_config(root, None, {})
    if saved.training_stage == TEXT_RAG:
        raise ValueError(
            f"{root} is a text_rag checkpoint, the baseline without a compressor; no stage can continue from it"
        )
    wanted = {"doc_max_length": config.doc_max_length, "compr_rate": config.compress_rate, "lora_r": config.lora_r}
    for name, value in wanted.items():
        if getattr(saved, name) != value:
            flag = "compress_rate" if name == "compr_rate" else name
            raise ValueError(
                f"{root} was trained with --{flag} {getattr(saved, name)}, this run asks for {value}: pass the "
                "checkpoint's value, or start from a checkpoint of the setting you want"
            )
    return root


def retrieval_client(config: TrainingConfig) -> RetrievalClient:
    """Asks the service of --retrieval_url, with the key in CLARA_API_KEY where there is one."""
    return RetrievalClient(config.retrieval_url, os.environ.get("CLARA_API_KEY"))


def check_service(config: TrainingConfig, model: CLaRa | None = None) -> RetrievalClient:
    """Whether the retrieval service is there, can give what is asked of it and, given the model, serves its documents.

    Raises:
        ConnectionError: it is not there or cannot.
        ValueError: another compressor made its documents.
    """
    client = retrieval_client(config)
    try:
        found = client.check(config.micro_train_batch_size, config.stage2_retrieval_top_n)
    except RetrievalError as error:  # which all ranks meet
        raise ConnectionError(f"--stage2_mips: {error}") from None
    if model is None:
        known = {"doc_max_length": config.doc_max_length, "compr_rate": config.compress_rate}
    else:
        known = fingerprint(model)
    there = found["made_by"]
    differ = [
        f"{name} is {there.get(name)!r} there, {known[name]!r} here" for name in known if there.get(name) != known[name]
    ]
    if differ:
        raise ValueError(
            f"--stage2_mips: the store behind {config.retrieval_url} was not made by --pretrain_checkpoint "
            f"{config.pretrain_checkpoint}: " + "; ".join(differ) + ". Compress the corpus with this checkpoint "
            "(compress_corpus), or serve the store that was"
        )
    if model is None and rank() == 0:
        logger.info(
            "candidates: the %d nearest of %d documents at %s; docs and pos_index of the records are not read",
            config.stage2_retrieval_top_n, found["documents"], config.retrieval_url,
        )  # fmt: skip
    return client


def retriever(client: RetrievalClient):
    """What `CLaRa.retriever` is to be in a run that can be resumed."""

    def retrieve(query_BE: torch.Tensor, n: int) -> torch.Tensor:
        try:
            return client(query_BE, n)
        except RetrievalError as error:
            raise RetrievalError(
                f"{error}. Checkpoints written before are whole: put the service right, then go on with "
                "--load_checkpoint"
            ) from None

    return retrieve


def model_config(config: TrainingConfig, root: Path | None) -> CLaRaConfig:
    """The CLaRaConfig of the run: the checkpoint's where there is one, with this run's flags on top."""
    if root is not None:
        model = read_config(root, None, {})[0]
        model.prompts = model.prompts or DEFAULT_PROMPTS
    else:
        model = CLaRaConfig(
            doc_max_length=config.doc_max_length,
            compr_rate=config.compress_rate,
            lora_r=config.lora_r,
            rescale_memory=config.rescale_memory,
            spread_memory=config.spread_memory,
            prompts=DEFAULT_PROMPTS,
        )
    model.even_spans = model.even_spans or config.even_spans
    model.decoder_model_name = config.pretrain
    model.training_stage = config.stage
    model.generation_top_k = config.generation_top_k
    model.topk_temperature = config.topk_temperature
    model.stage2_retrieval_top_n = config.stage2_retrieval_top_n
    model.optimize_mem_tokens = not config.freeze_memory_embeddings
    model.check()
    return model


def load_tokens(config: TrainingConfig, model: CLaRaConfig) -> ClaraTokens:
    """Tokenizer, layouts and prompts, without any weights; checks that max_len holds the K documents.

    Raises:
        ValueError: max_len is too small, or the tokenizer has no usable chat template.
        FileNotFoundError: there is no tokenizer.
    """
    source, _ = find_base(config.pretrain, Path.cwd())
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=not config.disable_fast_tokenizer)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"no tokenizer could be loaded from --pretrain {config.pretrain}: {error}") from error
    tokens, k = ClaraTokens(tokenizer, model), config.generation_top_k
    if config.stage == TEXT_RAG:
        document = f"{tokens.text_limit} tokens of text"
        shortest = len(tokens.text_prompt("", [""] * k).ids) + k * tokens.text_limit
    else:
        document = f"{model.n_memory_tokens} memory tokens"
        shortest = len(tokens.build_prompt("answer", k).ids)
    if shortest >= config.max_len:
        raise ValueError(
            f"--max_len {config.max_len} leaves no room for an answer: {k} documents of {document} and the prompt "
            f"already take {shortest}"
        )
    return tokens


def load_data(config: TrainingConfig):
    """(training records, evaluation records or None)."""
    stage = RETRIEVED if config.stage2_mips else config.stage
    options: dict[str, Any] = {"stage": stage, "seed": config.seed, "skip_bad": config.skip_bad_records}
    options.update(max_samples=config.max_samples, paraphrases_only=not config.qa_loss)
    train = load_records(config.dataset, split=config.dataset_split, probs=config.probs, **options)
    if not config.eval_dataset:
        return train, None
    return train, load_records(config.eval_dataset, split=config.eval_split, **options)


def attention(config: TrainingConfig) -> str | None:
    """The attention implementation; says in one line when flash-attn was asked for and is not there."""
    if not config.flash_attn:
        return None
    if torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    logger.info("--flash_attn: flash-attn needs CUDA and the package flash-attn; using PyTorch's SDPA")
    return "sdpa"


def build_model(config: TrainingConfig, model_cfg: CLaRaConfig, root: Path | None, device: torch.device) -> CLaRa:
    """The model of a stage on `device`, with `requires_grad` as the stage wants it."""
    seed_everything(config.seed, "initialisation")
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    options = {"dtype": dtype, "use_fast": not config.disable_fast_tokenizer}
    model_cfg.attn_implementation = attention(config)
    if root is None:
        model = CLaRa.from_base(model_cfg, **options)
    else:
        model = CLaRa.from_pretrained(root, config=model_cfg, **options)
    model.config.attn_implementation = None  # a choice of this machine, not of the checkpoint
    if model.has_query_reasoner and config.stage not in STAGE2 and not config.freeze_compressor:
        logger.warning("%s: training its compressor again outdates its query reasoner, which is left out", root)
        model.remove_query_reasoner()
    if config.reset_decoder:
        model.reset_adapter(DECODER)
    if config.fresh_query_reasoner:
        model.reset_adapter(QUERY)
    set_dropout(model.decoder, config.lora_dropout)
    model.to(device=device)  # type: ignore[call-arg]
    model.train_stage(config.stage, config.freeze_query_reasoner, config.freeze_compressor)
    if config.gradient_checkpointing:
        model.checkpoint_layers()
    if config.stage2_mips:
        model.retriever = retriever(check_service(config, model))
    elif config.stage in STAGE2 and config.zero_stage < 3:  # with ZeRO-3 all ranks must run the same forward passes
        model.cache_frozen_documents(store_reader(config, model) if config.document_store else None)
    return model


def store_reader(config: TrainingConfig, model: CLaRa) -> LookUp:
    """Reads documents from --document_store.

    Raises:
        ValueError, OSError: there is no store, or another compressor filled it.
    """
    store = Store.open(str(config.document_store), fingerprint(model))
    logger.info("documents are read from %s, which holds %d", config.document_store, len(store))
    return store.looked_up_in(model.dtype)


def build_engine(config: TrainingConfig, model: CLaRa, n_steps: int) -> Engine:
    """AdamW and the schedule over what trains, in a DeepSpeed engine."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.learning_rate, betas=(config.adam_betas[0], config.adam_betas[1]), weight_decay=config.l2
    )
    warm_up = int(config.lr_warmup_ratio * n_steps)
    specific = {"min_lr_rate": 0.1} if config.lr_scheduler == "cosine_with_min_lr" else None
    scheduler = get_scheduler(config.lr_scheduler, optimizer, warm_up, n_steps, scheduler_specific_kwargs=specific)
    return Engine(model, optimizer, scheduler, config)


def build_collator(config: TrainingConfig, tokens: ClaraTokens) -> Collator:
    """The stage's collator."""
    common = (tokens, config.stage, config.max_len, config.generation_top_k, config.seed)
    if config.stage2_mips:
        return RetrievedCollator(*common, candidates=config.stage2_retrieval_top_n)
    return COLLATORS[config.stage](*common)


def answerer(model: CLaRa, config: TrainingConfig):
    """Answers records as the stage's users would: from K given documents, or from those that it selects."""

    def answer(rows: list[dict]) -> list[str]:
        questions = [row["question"][0] for row in rows]
        k = config.generation_top_k
        if config.stage == "stage1_2":
            return model.generate_from_text(questions, [row["docs"][:k] for row in rows], 64)
        if config.stage == TEXT_RAG:
            read = [[row["docs"][i] for i in documents_to_read(row, k)] for row in rows]
            return model.generate_from_text(questions, read, 64)
        if model.retriever is not None:
            docs_BKE = model.retriever(model.encode_queries(questions), k)
            docs_BKLD = docs_BKE.unflatten(-1, (model.config.n_memory_tokens, -1))
            return model.generate_from_compressed_documents_and_questions(questions, docs_BKLD.flatten(0, 1), 64)
        return model.generate_from_questions(questions, [row["docs"] for row in rows], 64)[0]

    return answer


def saver(engine: Engine, config: TrainingConfig):
    """Writes a checkpoint that `from_pretrained` loads, with its model card; called on all ranks."""

    def save(target: Path, last: dict) -> None:
        model = engine.model
        small = [p for name, p in model.named_parameters() if "lora_" in name or name.startswith("special.")]
        with engine.gathered(small), writing(target):
            if rank() == 0:
                model.save_pretrained(target, state=trained_state(model), card=model_card(model, config, last))
        barrier()

    return save


def model_card(model: CLaRa, config: TrainingConfig, last: dict) -> str:
    """README.md of a checkpoint: base model, stage, data, hyperparameters, last figures."""
    base = os.path.basename(config.pretrain.rstrip("/")) if model.base_path else config.pretrain
    title, what, tags = f"CLaRa, {config.stage}, rate {config.compress_rate}", "", "clara, rag, compression"
    if config.stage == TEXT_RAG:
        title, tags = "Text RAG baseline, fine-tuned", "clara, rag, lora, baseline"
        what = (
            "The base model with one LoRA adapter, `decoder_adapter`, that answers from documents as text: what CLaRa "
            "of the same rank is to be compared with. There is no compressor and no query reasoner, and the "
            "embeddings of CLaRa's tokens in `special_embeddings.safetensors` are untrained and unused. "
            "`generate_from_text` answers with it, `compress_documents` refuses.\n"
        )
    shown = "stage generation_top_k doc_max_length compress_rate lora_r learning_rate lr_scheduler train_batch_size"
    names = [name for name in (*shown.split(), "max_epochs", "seed") if not (name == "compress_rate" and what)]
    rows = [f"| {name} | {getattr(config, name)} |" for name in names]
    origin = config.pretrain_checkpoint or "nothing"
    figures = [f"| {split} | {json.dumps(line)} |" for split, line in last.items()]
    return "\n".join(
        [
            f"---\nbase_model: {base}\nlibrary_name: transformers\ntags: [{tags}]\n---",
            f"# {title}\n",
            *([what] if what else []),
            f"Base model: `{base}`. Data: `{config.dataset}`. Continued from: `{origin}`.\n",
            "| setting | value |\n|---|---|",
            *rows,
            "\nLast figures of the run (`metrics.jsonl` beside this file has all):\n\n| split | figures |\n|---|---|",
            *figures,
            "\n```python\nfrom transformers import AutoModel\n\n"
            'model = AutoModel.from_pretrained("PATH_OF_THIS_DIRECTORY", trust_remote_code=True)\n```\n',
        ]
    )


def describe(config: TrainingConfig, model_cfg: CLaRaConfig, tokens: ClaraTokens, data, world: int) -> dict:
    """What --dry_run prints: sizes from the base model's config alone, steps, tokens and expected memory."""
    source, _ = find_base(config.pretrain, Path.cwd())
    model_cfg = copy.copy(model_cfg)
    model_cfg.rescale_memory = False  # changes no size, and takes a length from weights that are not there
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        model = CLaRa(model_cfg, base, tokens.tokenizer)
        if config.stage in STAGE2:
            model.add_query_reasoner()
    model.train_stage(config.stage, config.freeze_query_reasoner, config.freeze_compressor)
    trainable = {
        name: sum(p.numel() for p in adapter_state(model.decoder, name).values() if p.requires_grad)
        for name in model.decoder.peft_config
    }
    trainable["memory_embeddings"] = model.special.memory.numel() if model.special.memory.requires_grad else 0
    steps = -(-len(data) // config.train_batch_size) * config.max_epochs
    some = [{**data[i], "index": i} for i in range(0, len(data), max(1, len(data) // 200))]
    collate = build_collator(config, tokens)
    batches = [collate([row], epoch=0) for row in some]
    tokens_a_record = sum(batch["n_tokens"] for batch in batches) / len(batches)
    widths = [padded_to(batch, config, model_cfg.n_memory_tokens) for batch in batches]
    widest = {name: max(width[name] for width in widths) for name in widths[0]}
    plan = batch_plan(config, data)
    share = plan.share(plan.global_batch(0)[1], lambda index: text_length(data[index]), rank=0, world=1)
    groups = [collate([{**data[i], "index": i} for i in micro.indices], epoch=0) for micro in share]
    padded = [padded_to(batch, config, model_cfg.n_memory_tokens) for batch in groups]
    return {
        "records": len(data),
        "steps": steps,
        "trainable_parameters": trainable,
        "all_parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_record": round(tokens_a_record, 1),
        "tokens_in_all": round(tokens_a_record * len(data) * config.max_epochs),
        "padded_to": {name: round(sum(width[name] for width in padded) / len(padded)) for name in padded[0]},
        "expected_memory_gb": expected_memory(config, base.config, widest, world),
        "adapters_trained": list(STAGE_TRAINS[config.stage][0]),
    }


def padded_to(batch: dict, config: TrainingConfig, n_memory: int) -> dict[str, int]:
    """Tokens a row of a batch takes, as `estimate.plan_of` wants them, and its documents as `candidates`."""
    used = int(batch["docs_per_question"].clamp(max=config.generation_top_k).max())
    answers = round(int((batch["labels"][:, 1:] != IGNORE).sum()) / len(batch["labels"]))
    if config.stage == TEXT_RAG:  # where the documents end is not known: they count as prompt
        found = {"candidates": used, "doc_tokens": 0, "prompt_tokens": batch["labels"].shape[1] - answers}
        return {**found, "answer_tokens": answers, "question_tokens": 0}
    query = batch.get("query_input_ids", batch["labels"][:, : n_memory + ROW_TOKENS])
    return {
        "candidates": int(batch["docs_per_question"].max()),
        "doc_tokens": batch["enc_input_ids"].shape[1] - n_memory - ROW_TOKENS if "enc_input_ids" in batch else 0,
        "prompt_tokens": batch["labels"].shape[1] - used * (n_memory + 1) - answers,
        "answer_tokens": answers,
        "question_tokens": query.shape[1] - n_memory - ROW_TOKENS,
    }


def expected_memory(config: TrainingConfig, base: PretrainedConfig, widest: dict, world: int) -> dict[str, float]:
    """Gigabytes a rank needs by `estimate.memory`, were all records of a micro-batch as wide as `widest`."""
    device, tokens = "cuda" if torch.cuda.is_available() else "cpu", dict(widest)
    plan = estimate.plan_of(config, base, tokens.pop("candidates"), tokens, world)
    parts = estimate.memory(plan, estimate.counted(plan, device), device, estimate.process_bytes(device))
    return {name: round(value / 1e9, 2) for name, value in parts.items()}
