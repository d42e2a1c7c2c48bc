"""Stage 2 learns to retrieve from the answer's loss alone, on a toy that a plain slow loop learns too.

A document says `the code of k5 is v9`, the question is `q5`, the answer `v9`: q-words never occur in documents, so
which candidate a question means can only be learned from the answers. Evaluation is over pairs of key and value that
no training record of either stage holds.
"""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.prompts import DEFAULT_PROMPTS
from openrlhf.utils.logging import read_metrics
from tests.trainer.facts import write_jsonl
from tests.trainer.launch import train

SEED, CODES, CANDIDATES = 1, 16, 4
SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}</s>"
    "{% else %}<|{{ m['role'] }}|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_base(target: Path) -> None:
    """A random two-layer Llama over words; its embeddings are wide enough for a tied head to tell them apart."""
    split = pre_tokenizers.Whitespace()
    texts = [t for prompt in DEFAULT_PROMPTS.values() for t in ([prompt] if isinstance(prompt, str) else prompt)]
    words = sorted(
        {word for text in [*texts, "the code of is Question : Answer"] for word, _ in split.pre_tokenize_str(text)}
    )
    facts = [f"{kind}{i}" for kind in "kqv" for i in range(CODES)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *words, *facts]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = split
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=SPECIAL[4:], **names)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    torch.manual_seed(SEED)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
    options = {"max_position_embeddings": 512, "tie_word_embeddings": True, "initializer_range": 0.1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes, **ids, **options))
    with torch.no_grad():
        base.get_input_embeddings().weight.normal_(0, 0.4)
    base.save_pretrained(target)


def compression_records(pairs: list[tuple[int, int]], count: int, rng: random.Random) -> list[dict]:
    """One document and its question each."""
    drawn = [rng.choice(pairs) for _ in range(count)]
    return [
        {"data_type": "qa", "question": [f"q{k}"], "answers": [f"v{v}"], "docs": [f"the code of k{k} is v{v}"]}
        for k, v in drawn
    ]


def retrieval_records(pairs: list[tuple[int, int]], count: int, rng: random.Random) -> list[dict]:
    """Candidates with keys and values of their own; one has the question's key."""
    records = []
    while len(records) < count:
        chosen = [rng.choice(pairs) for _ in range(CANDIDATES)]
        if any(len(set(column)) < CANDIDATES for column in zip(*chosen, strict=True)):
            continue
        gold = rng.randrange(CANDIDATES)
        key, value = chosen[gold]
        docs = [f"the code of k{k} is v{v}" for k, v in chosen]
        records.append({"question": f"q{key}", "docs": docs, "gold_answer": f"v{value}", "pos_index": [gold]})
    return records


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """Both stages on the toy; the held-out evaluation of stage 2 is in its metrics.jsonl."""
    folder = tmp_path_factory.mktemp("toy")
    make_base(folder / "base")
    pairs = [(k, v) for k in range(CODES) for v in range(CODES)]
    rng = random.Random(SEED)
    rng.shuffle(pairs)
    held_out, known = pairs[:32], pairs[32:]
    write_jsonl(folder / "stage1.jsonl", compression_records(known, 7680, rng))
    write_jsonl(folder / "stage2.jsonl", retrieval_records(known, 9600, rng))
    write_jsonl(folder / "held_out.jsonl", retrieval_records(held_out, 400, rng))
    common = {"pretrain": folder / "base", "doc_max_length": 8, "compress_rate": 2, "lora_r": 32, "seed": SEED}
    common.update(generation_top_k=1, train_batch_size=64, micro_train_batch_size=64, learning_rate=2e-3)
    train(folder / "s1", "stage1", data=folder / "stage1.jsonl", **common).ok()
    options = {"pretrain_checkpoint": folder / "s1", "eval_dataset": folder / "held_out.jsonl", **common}
    train(folder / "s2", "stage2", data=folder / "stage2.jsonl", **options).ok()
    return folder


def test_recall_rises_from_chance_to_above_nine_in_ten_without_relevance_labels(toy):
    before, *_, after = [line for line in read_metrics(toy / "s2" / "metrics.jsonl") if line["split"] == "eval"]
    assert before["recall_1"] < 0.45  # chance is 0.25
    assert after["recall_1"] > 0.9
    assert after["loss"] < 0.5 < before["loss"]


def test_learning_to_retrieve_leaves_every_document_vector_as_it_was(toy):
    documents = [f"the code of k{i} is v{15 - i}" for i in range(CODES)]
    before, after = (CLaRa.from_pretrained(toy / name).compress_documents(documents)[0] for name in ("s1", "s2"))
    assert torch.equal(before, after)
