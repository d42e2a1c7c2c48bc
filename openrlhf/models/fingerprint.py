"""What identifies a compressor: hashes of all that its vectors depend on. Knows nothing about stores."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from .adapters import ENCODER, adapter_state, read_adapter

# Facts of a base model's config that change what it computes.
_ARCHITECTURE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "vocab_size", "hidden_act", "rms_norm_eps", "sliding_window"),
)
_FIRST_NUMBERS = 32
_PROBE = "Zwölf  Boxkämpfer\n\n\t3.14 != 2,71; def f(x): return x**2 <b>東京</b> 😀 naïve </s> don't"


def fingerprint(model: Any) -> dict:
    """What must be the same for vectors to share a store; the fields that `Store.check_header` compares.

    Tensors are hashed after rounding to bfloat16, so a float32 and a bfloat16 load of one checkpoint have the same
    fingerprint: their vectors differ by rounding, as the stored bfloat16 does anyway. Hashed are

    - compressor: every tensor of the encoder adapter;
    - memory_embeddings: the rows of the memory tokens, `<AE>`, `<ENC>` and `<SEP>`;
    - base: the numbers of its config that shape it, its first and last embedding rows, and the first 32 numbers of each
      further parameter (not of quantised ones): enough to tell fine-tunes and versions of a model apart, cheaply;
    - tokenizer: the vocabulary, and the ids of a text of many scripts;
    - input_layout: the ids that surround a text, the memory tokens, where a long text is cut, and
      the positions of spread memory tokens.
    """
    config, tokens = model.config, model.tokens
    vocabulary = sorted(tokens.tokenizer.get_vocab().items(), key=lambda item: item[1])
    long_row = tokens.encoder_rows(["a " * (config.doc_max_length + 8)])[0]
    layout = [tokens.encoder_rows([""])[0], tokens.memory_ids, len(long_row), long_row[:2]]
    if config.spread_memory:
        layout.append(["spread", config.even_spans])
    return {
        "compressor": _hash_tensors(adapter_state(model.decoder, ENCODER)),
        "memory_embeddings": _hash_tensors({"memory": model.special.memory, "others": model.special.others}),
        "base": _hash_base(model),
        "tokenizer": _hash(json.dumps([vocabulary, tokens.plain_ids([_PROBE])])),
        "input_layout": _hash(json.dumps(layout)),
        "quantization": config.quantization,
        "doc_max_length": config.doc_max_length,
        "compr_rate": config.compr_rate,
        "n_memory": config.n_memory_tokens,
        "width": model.decoder.config.hidden_size,
    }


def of_files(checkpoint: Path, config: Any) -> dict:
    """What a checkpoint's files alone tell of its fingerprint; less for one of the public format."""
    known = {name: getattr(config, name) for name in ("quantization", "doc_max_length", "compr_rate")}
    if (checkpoint / ENCODER).is_dir():
        known["compressor"] = _hash_tensors(read_adapter(checkpoint / ENCODER, config.lora_r))
    return known


def _hash_base(model: Any) -> str:
    config = model.decoder.config
    rope = getattr(config, "rope_parameters", None) or {}
    facts = {name: getattr(config, name, None) for name in _ARCHITECTURE}
    facts["rope_theta"] = rope.get("rope_theta", getattr(config, "rope_theta", None))
    embedding_VD = model.decoder.get_input_embeddings().weight
    parts = {"first": embedding_VD[:8], "last": embedding_VD[model.tokens.first_special_id - 8 : len(embedding_VD)][:8]}
    for name, parameter in model.decoder.named_parameters():
        if "lora_" not in name and parameter.is_floating_point():
            parts[name.replace(".base_layer", "")] = parameter.flatten()[:_FIRST_NUMBERS]
    return _hash(json.dumps(facts) + _hash_tensors(parts))


def _hash_tensors(tensors: Any) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        rounded = tensors[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(rounded.shape)}".encode())
        digest.update(rounded.view(torch.int16).numpy())
    return digest.hexdigest()[:32]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
