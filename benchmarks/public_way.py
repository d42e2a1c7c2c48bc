"""The public way of each step, over the weights of the same model, to compare with.

As the public code does it: every document is padded to doc_max_length + 3 tokens and every question to 1,027; the
compressor passes go through the LM head on all positions and return the hidden states of all layers; document vectors
are put into the prompts one document at a time; full logits of the generator; frozen documents are compressed again in
every step; PEFT's own LoRA layers.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear

from openrlhf.models.adapters import DECODER, ENCODER, QUERY
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.selection import select_documents

QUERY_TOKENS = 1027


@contextmanager
def stock_layers(model: CLaRa) -> Iterator[None]:
    """Every LoRA layer with PEFT's forward pass."""
    for layer in model.router.layers:
        layer.forward = types.MethodType(Linear.forward, layer)
    try:
        yield
    finally:
        for layer in model.router.layers:
            del layer.forward


def pad_to(model: CLaRa, ids_BT: torch.Tensor, mask_BT: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left padding up to `width`, the memory tokens included in it."""
    more = max(0, width - ids_BT.shape[1])
    return F.pad(ids_BT, (more, 0), value=model.tokens.pad_id), F.pad(mask_BT, (more, 0))


def compress_ids(
    model: CLaRa, ids_MT: torch.Tensor, mask_MT: torch.Tensor, adapter: str = ENCODER, text: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory vectors `[M, L, D]` and their MSE `[M]`; inputs padded to `text` tokens and the memory tokens."""
    n_memory = model.config.n_memory_tokens
    ids_MT, mask_MT = pad_to(model, ids_MT, mask_MT, (text or model.config.doc_max_length + 3) + n_memory)
    with model.router.route(adapter):
        output = model.decoder(
            inputs_embeds=model.embed(ids_MT),
            attention_mask=mask_MT,
            position_ids=(mask_MT.cumsum(-1) - 1).clamp(min=0),
            output_hidden_states=True,
            use_cache=False,
        )
    hidden_MTD = output.hidden_states[-1]
    docs_MLD = hidden_MTD[:, -n_memory:]
    text_MT1 = mask_MT[:, :-n_memory].unsqueeze(-1).to(hidden_MTD.dtype)
    text_MD = (hidden_MTD[:, :-n_memory] * text_MT1).sum(1) / text_MT1.sum(1)
    return docs_MLD, (docs_MLD.mean(1) - text_MD).float().square().mean(-1)


def compress(model: CLaRa, documents: list[str], batch: int) -> torch.Tensor:
    """Memory vectors `[N, L, D]`, `batch` documents at a time in the order given."""
    vectors = []
    with torch.no_grad(), stock_layers(model):
        for start in range(0, len(documents), batch):
            ids, mask = model.tokens.encoder_batch(model.tokens.encoder_rows(documents[start : start + batch]))
            vectors.append(compress_ids(model, ids.to(model.device), mask.to(model.device))[0])
    return torch.cat(vectors)


def place(model: CLaRa, ids_BT: torch.Tensor, docs_KLD: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Generator inputs, one document at a time in Python."""
    embeds_BTD = model.embed(ids_BT)
    first = model.tokens.memory_ids[0]
    n_memory, used = docs_KLD.shape[1], 0
    rows = []
    for row, count in enumerate(counts):
        embeds_TD = embeds_BTD[row].clone()
        for start in (ids_BT[row] == first).nonzero().flatten().tolist()[:count]:
            embeds_TD[start : start + n_memory] = docs_KLD[used]
            used += 1
        rows.append(embeds_TD)
    return torch.stack(rows)


def loss(model: CLaRa, batch: dict, query_tokens: int = QUERY_TOKENS) -> tuple[torch.Tensor, dict]:
    """What `CLaRa.forward` returns of a batch of stage1, stage1_2 or stage2."""
    counts_B = batch["docs_per_question"]
    with stock_layers(model):
        if batch["stage"] == "stage2":
            with torch.no_grad(), model.frozen():
                docs_MLD, mse_M = compress_ids(model, batch["enc_input_ids"], batch["enc_attention_mask"])
            query = (batch["query_input_ids"], batch["query_attention_mask"])
            query_BLD, _ = compress_ids(model, *query, adapter=QUERY, text=query_tokens)
            k, temperature = model.config.generation_top_k, model.config.topk_temperature
            docs_MLD, _, _ = select_documents(query_BLD.flatten(1), docs_MLD, counts_B, k, temperature)
            counts_B = counts_B.clamp(max=k)
        else:
            docs_MLD, mse_M = compress_ids(model, batch["enc_input_ids"], batch["enc_attention_mask"])
        embeds_BTD = place(model, batch["dec_input_ids"], docs_MLD, counts_B.tolist())
        mask_BT = batch["dec_attention_mask"]
        with model.router.route(DECODER):
            output = model.decoder.base_model(
                inputs_embeds=embeds_BTD,
                attention_mask=mask_BT,
                position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
                output_hidden_states=True,
                use_cache=False,
            )
            logits_BTV = model.head(output.last_hidden_state)  # with the rows of the added tokens, as ours
    entropy = F.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten())
    return entropy, {"mse_loss": mse_M.mean(), "logits": logits_BTV}
