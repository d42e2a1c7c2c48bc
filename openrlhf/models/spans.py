"""Spans: the tokens that each memory vector stands for, and what follows from having them.

The span loss asks each vector to name its tokens through the LM head; spread positions put each memory token beside
them. Neither is part of the published method. There, the compressor learns only what the generator's loss sends back
through the memory vectors, of which a small model makes no use for a long time, and it has to learn for each memory
token anew how far behind the document's end its part lies. Knows nothing about adapters or stages.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def spans(
    ids_MT: torch.Tensor, mask_MT: torch.Tensor, n_memory: int, rate: int, n_words: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that each memory vector stands for: `rate` consecutive ones, the last vector for the last of them.

    A memory token is as far from its tokens in every document, whatever the document's length. Of a document that is
    shorter than L · `rate` tokens, the first vectors stand for nothing.

    Args:
        ids_MT: compressor inputs, which end with the L memory tokens.
        mask_MT: their attention mask.
        n_memory: L.
        rate: R, tokens of a span.
        n_words: ids below this are words; others, the added tokens, are in no span.

    Returns:
        ids `[M, L, R]`, 0 where there is no such token, and whether there is one `[M, L, R]`, bool.
    """
    missing = n_memory * (rate + 1) - ids_MT.shape[1]
    words_MT = mask_MT.bool() & (ids_MT < n_words)
    ids_MT = ids_MT.masked_fill(~words_MT, 0)
    ids_MT, words_MT = (F.pad(x_MT[:, :-n_memory], (missing, 0)) for x_MT in (ids_MT, words_MT))  # or cut on the left
    return ids_MT.unflatten(1, (n_memory, rate)), words_MT.unflatten(1, (n_memory, rate))


def span_loss(
    docs_MLD: torch.Tensor,
    ids_MLR: torch.Tensor,
    words_MLR: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    decay: float = 1.0,
) -> torch.Tensor:
    """−log p of a document's tokens under the memory vectors of their spans, mean over its tokens: `[M]`, float32.

    Where the R tokens of a span differ, it is at best the entropy of their weights: log R when all weigh the same. A
    vector that names them alike says which they are, and nothing of their order; with `decay` below 1 the likelier one
    comes first. The LM head runs on vectors that stand for something, only.

    Args:
        docs_MLD: memory vectors.
        ids_MLR, words_MLR: from `spans`.
        head: from `[U, D]` to logits `[U, V]`.
        decay: weight of a token over that of the one before it in its span; a span's weights add up to its tokens.
    """
    used_ML = words_MLR.any(-1)
    log_p_UV = head(docs_MLD[used_ML]).float().log_softmax(-1)
    words_UR = words_MLR[used_ML]
    weight_UR = words_UR * decay ** (words_UR.cumsum(1) - 1)  # from 1 on, however late the span's first token is
    weight_UR = weight_UR * (words_UR.sum(1, keepdim=True) / weight_UR.sum(1, keepdim=True))
    named_UR = log_p_UV.gather(1, ids_MLR[used_ML]) * weight_UR
    document_U = used_ML.nonzero()[:, 0]
    total_M = torch.zeros(len(docs_MLD), device=docs_MLD.device).index_add(0, document_U, named_UR.sum(1))
    return -total_M / words_MLR.sum((1, 2)).clamp(min=1)


def spread_positions(position_MT: torch.Tensor, n_memory: int, rate: int) -> torch.Tensor:
    """Positions with each memory token at that of the last token of its span (`spans`): `[M, T]`, int64.

    The distance between a memory token and its tokens is then the same for every memory token, 0 to `rate` − 1, as
    between neighbours in a text. Memory tokens that stand for nothing stay at 0.

    Args:
        position_MT: positions of compressor inputs, counted from 0 at the first token that is no padding.
        n_memory: L, memory tokens at the end.
        rate: R, tokens of a span.
    """
    text_MT = position_MT[:, :-n_memory]
    behind_L = rate * torch.arange(n_memory - 1, -1, -1, device=position_MT.device)
    return torch.cat([text_MT, (text_MT[:, -1:] - behind_L).clamp(min=0)], dim=1)
