"""Tiny random base models with locally trained tokenizers, CLaRa models over them, and batches for them.

Everything is made on the spot: no network, no downloads, a fraction of a second each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from openrlhf.models.modeling_clara import CLaRa, CLaRaConfig
from openrlhf.models.tokens import Prompt

DOCS = [
    "Marie Curie was born in Warsaw in 1867.",
    "The Danube flows through ten countries before it reaches the Black Sea, more than any other river.",
    "A violin has four strings.",
    "Penguins cannot fly, but they swim very well and far.",
    "Café Müller in Köln — 東京 😀 naïve ½",
    "Canberra, not Sydney, is the capital of Australia.",
]
QUESTIONS = ["Where was Marie Curie born?", "Which river crosses ten countries?", "Can penguins fly?"]
ANSWERS = ["In Warsaw.", "The Danube", "No, they swim."]
_CORPUS = [*DOCS, *QUESTIONS, *ANSWERS, "You are a helpful assistant. Read the background documents and answer."] * 3

MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{{ ' [INST] ' + (sys if loop.first else '') + m['content'] "
    "+ ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
REFUSING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start>' + m['role'] + '\n' + m['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
ALTERNATING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
DROPPING_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] + '<|end|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TRAILING_SPACE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a tiny model<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class Base:
    """A kind of base model: architecture, special tokens in the order of their ids, chat template."""

    config: type
    template: str
    special: Sequence[str | AddedToken]
    eos: str
    end_of_turn: str
    bos: str | None = None
    extra_rows: int = 0
    options: dict = field(default_factory=dict)


_BRACKETS = ("<unk>", "<s>", "</s>")
_PHI = ("<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
_UNTIED = {"tie_word_embeddings": False}
_TIED = {"tie_word_embeddings": True}
BASES = {
    "mistral": Base(MistralConfig, MISTRAL_TEMPLATE, _BRACKETS, "</s>", "</s>", "<s>", options=_UNTIED),
    "llama": Base(
        LlamaConfig, REFUSING_TEMPLATE, (*_BRACKETS, "<start>", "<end>"), "</s>", "<end>", "<s>", options=_UNTIED
    ),
    "llama_tied": Base(LlamaConfig, ALTERNATING_TEMPLATE, _BRACKETS, "</s>", "</s>", "<s>", options=_TIED),
    "qwen2": Base(
        Qwen2Config,
        CHATML_TEMPLATE,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        "<|im_end|>",
        extra_rows=24,
        options=_TIED,
    ),
    "phi3": Base(
        Phi3Config,
        PHI_TEMPLATE,
        (*_PHI, AddedToken("<|end|>", rstrip=True, normalized=False, special=True)),
        "<|endoftext|>",
        "<|end|>",
        "<s>",
        options={**_UNTIED, "pad_token_id": 2},
    ),
    "smollm2": Base(
        LlamaConfig,
        CHATML_TEMPLATE,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
        options=_TIED,
    ),
    "dropping": Base(
        MistralConfig, DROPPING_TEMPLATE, (*_PHI, "<|end|>"), "<|end|>", "<|end|>", "<s>", options=_UNTIED
    ),
    "trailing_space": Base(MistralConfig, TRAILING_SPACE_TEMPLATE, _BRACKETS, "</s>", "</s>", "<s>", options=_UNTIED),
}


def byte_level_tokenizer(base: Base) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 400 tokens trained on the texts above, with the base's special tokens and template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(base.special), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=base.eos, bos_token=base.bos)
    tokenizer.chat_template = base.template
    return tokenizer


def metaspace_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE: Metaspace with prepend_scheme `first` or `always`, or the older `normalizer` way."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "normalizer":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*_BRACKETS, *bytes_], show_progress=False)
    inner.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def save_base(name: str, target: Path) -> Path:
    """Writes the base model `BASES[name]` with random weights to `target`."""
    base = BASES[name]
    tokenizer = byte_level_tokenizer(base)
    pad = base.options.get("pad_token_id")
    config = base.config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer) + base.extra_rows,
        max_position_embeddings=1024,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{**base.options, "pad_token_id": pad},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def new_model(base: Path, query: bool = True, dtype: torch.dtype = torch.float32, **fields) -> CLaRa:
    """A CLaRa model over `base` with 4 memory tokens and random non-zero adapters; in eval mode."""
    settings = {"doc_max_length": 16, "compr_rate": 4, "lora_r": 4, "generation_top_k": 2, "max_new_tokens": 8}
    torch.manual_seed(1)
    model = CLaRa.from_base(CLaRaConfig(decoder_model_name=str(base), **{**settings, **fields}), dtype=dtype)
    if query:
        model.add_query_reasoner(fresh=True)
    shake(model)
    return model


def shake(model: CLaRa, seed: int = 2) -> None:
    """Random non-zero LoRA B matrices: a fresh adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def make_batch(
    model: CLaRa,
    stage: str,
    documents: list[list[str]],
    questions: list[str],
    answers: list[str],
    positives: list[list[int]] | None = None,
) -> dict:
    """A batch for `model(batch=…)`: `documents` holds one list a question, unequal lengths allowed."""
    tokens, k = model.tokens, model.config.generation_top_k
    if stage == "text_rag":
        texts = [tokens.text_prompt(*row) for row in zip(questions, documents, answers, strict=True)]
        return {"stage": stage, **_generator_inputs(model, texts)}
    rows = tokens.encoder_rows([doc for docs in documents for doc in docs])
    used = [min(k, len(docs)) if stage.startswith("stage2") else len(docs) for docs in documents]
    prompts = [
        model.build_prompt("answer", n, query=q, answer=a) for n, q, a in zip(used, questions, answers, strict=True)
    ]
    batch: dict = {"stage": stage, "docs_per_question": torch.tensor([len(docs) for docs in documents])}
    batch["enc_input_ids"], batch["enc_attention_mask"] = tokens.encoder_batch(rows)
    batch |= _generator_inputs(model, prompts)
    if stage.startswith("stage2"):
        query = tokens.encoder_batch(tokens.encoder_rows(questions))
        batch["query_input_ids"], batch["query_attention_mask"] = query
        batch["pos_index"] = positives if positives is not None else [[0]] * len(questions)
    return batch


def _generator_inputs(model: CLaRa, prompts: list[Prompt]) -> dict:
    ids, mask = model.tokens.pad_left([p.ids for p in prompts])
    labels = [[-100] * p.n_prompt + p.ids[p.n_prompt :] for p in prompts]
    return {"dec_input_ids": ids, "dec_attention_mask": mask, "labels": model.tokens.pad_left(labels, value=-100)[0]}


def text_rag_model(base: Path, dtype: torch.dtype = torch.float32, **fields) -> CLaRa:
    """`new_model` of the baseline stage: a random generator adapter and nothing else."""
    return new_model(base, query=False, dtype=dtype, training_stage="text_rag", **fields)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, of the parameters that have one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
