"""Spans: the tokens that each memory vector stands for, and what follows from having them.

The span loss asks each vector to name its tokens through the LM head; spread positions put each memory token beside
them. Neither is part of the published method. There, the compressor learns only what the generator's loss sends back
through the memory vectors, of which a small model makes no use for a long time, and it has to learn for each memory
token anew how far behind the document's end its part lies. Knows nothing about adapters or stages.
"""

from collections.abc import Callable

import torch


def bounds(n_M: torch.Tensor, n_memory: int, rate: int, even: bool) -> torch.Tensor:
    """Where the spans of texts of n tokens begin and end: span j holds the tokens from bound j to before bound j + 1.

    A span has `rate` tokens, the last one ends with the text, and the first spans of a text of less than L · `rate`
    tokens are empty. With `even` such a text is shared among all L: every span has n / L tokens, rounded down or up.

    Args:
        n_M: tokens of each text.
        n_memory: L.
        rate: R, tokens of a span at most.

    Returns:
        `[M, L + 1]`, int64, never falling.
    """
    j_L1 = torch.arange(n_memory + 1, device=n_M.device)
    n_M1 = n_M.unsqueeze(1)
    if even:
        used_M1 = n_M1.clamp(max=n_memory * rate)
        return n_M1 - used_M1 + used_M1 * j_L1 // n_memory
    return (n_M1 - rate * (n_memory - j_L1)).clamp(min=0)


def spans(
    ids_MT: torch.Tensor, mask_MT: torch.Tensor, n_memory: int, rate: int, n_words: int, even: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that each memory vector stands for, as `bounds` shares them out.

    Not `even`, a memory token is as far from its tokens in every document, whatever the document's length.

    Args:
        ids_MT: compressor inputs, padded on the left, which end with the L memory tokens.
        mask_MT: their attention mask.
        n_memory: L.
        rate: R, tokens of a span at most.
        n_words: ids below this are words; others, the added tokens, are in no span.

    Returns:
        ids `[M, L, R]`, 0 where there is no such token, and whether there is one `[M, L, R]`, bool; a span of fewer
        tokens has them at its end.
    """
    text_MT, n_M = ids_MT[:, :-n_memory], mask_MT[:, :-n_memory].sum(1)
    bounds_ML1 = bounds(n_M, n_memory, rate, even).unsqueeze(-1)
    place_MLR = bounds_ML1[:, 1:] - rate + torch.arange(rate, device=ids_MT.device)
    column_MLR = (place_MLR + (text_MT.shape[1] - n_M)[:, None, None]).clamp(min=0)
    ids_MLR = text_MT.gather(1, column_MLR.flatten(1)).view_as(column_MLR)
    words_MLR = (place_MLR >= bounds_ML1[:, :-1]) & (ids_MLR < n_words)
    return ids_MLR.masked_fill(~words_MLR, 0), words_MLR


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


def spread_positions(position_MT: torch.Tensor, n_memory: int, rate: int, even: bool = False) -> torch.Tensor:
    """Positions with each memory token at that of the last token of its span (`bounds`): `[M, T]`, int64.

    The distance between a memory token and its tokens is then the same for every memory token, 0 to `rate` − 1, as
    between neighbours in a text. Memory tokens that stand for nothing are where the span before them ends, or at 0.

    Args:
        position_MT: positions of compressor inputs, counted from 0 at the first token that is no padding.
        n_memory: L, memory tokens at the end.
        rate: R, tokens of a span at most.
        even: as in `bounds`.
    """
    text_MT = position_MT[:, :-n_memory]
    ends_ML = bounds(text_MT[:, -1] + 1, n_memory, rate, even)[:, 1:]
    return torch.cat([text_MT, (ends_ML - 1).clamp(min=0)], dim=1)
