"""Scoring and differentiable selection of documents. Knows nothing about text, adapters or losses.

The paper's symbols: s_bn cosine score, tau temperature, Z the selection tensor (§2.3, straight-through top-k).
"""

import torch
import torch.nn.functional as F


def cosine_scores(query_BE: torch.Tensor, docs_BNE: torch.Tensor) -> torch.Tensor:
    """Cosine similarity s_bn of each query with its N candidates, in float32: `[B, E]`, `[B, N, E]` → `[B, N]`."""
    return F.cosine_similarity(query_BE.float().unsqueeze(1), docs_BNE.float(), dim=-1)


def differentiable_topk(logits: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight-through top-k without replacement.

    Slot j holds the hard one-hot of the j-th best candidate; its gradient is that of the softmax over
    `logits / temperature` with the candidates of earlier slots masked by log(0 + 1e-8).

    Args:
        logits: scores `[B, N]`, float; `-inf` marks a candidate that must never be chosen.
        k: slots asked for, at least 1; clipped to N.
        temperature: tau > 0.

    Returns:
        Z `[B, k, N]`, in the forward pass exactly one-hot, and indices `[B, k]` (int64), best first.

    Raises:
        ValueError: k or the temperature is not positive, or there is no candidate.
    """
    if k < 1 or temperature <= 0 or logits.shape[-1] < 1:
        raise ValueError(
            f"top-k needs k ≥ 1, temperature > 0 and at least one candidate; got k={k}, temperature={temperature}, "
            f"logits {tuple(logits.shape)}"
        )
    scaled_BN = logits / temperature
    indices_BK = scaled_BN.topk(min(k, scaled_BN.shape[-1]), dim=-1).indices
    hard_BKN = F.one_hot(indices_BK, scaled_BN.shape[-1]).to(scaled_BN.dtype)
    free_BKN = 1.0 - (hard_BKN.cumsum(dim=1) - hard_BKN)
    soft_BKN = torch.softmax(scaled_BN.unsqueeze(1) + torch.log(free_BKN + 1e-8), dim=-1)
    return hard_BKN + (soft_BKN - soft_BKN.detach()), indices_BK


def pad_candidates(flat_M: torch.Tensor, counts_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lays concatenated candidate lists of unequal length side by side.

    Args:
        flat_M: `[sum(counts), ...]`, the lists one after another.
        counts_B: `[B]` int64, candidates of each question.

    Returns:
        padded `[B, max(counts), ...]` (zeros where there is no candidate) and its validity mask `[B, max(counts)]`.
    """
    valid_BN = torch.arange(int(counts_B.max()), device=flat_M.device) < counts_B.to(flat_M.device).unsqueeze(1)
    padded = flat_M.new_zeros(*valid_BN.shape, *flat_M.shape[1:])
    padded[valid_BN] = flat_M
    return padded, valid_BN


def select_documents(
    query_BE: torch.Tensor, docs_MLD: torch.Tensor, counts_B: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chooses min(k, N_b) documents for each question; gradients reach the query through the scores.

    Returns:
        chosen `[sum_b min(k, N_b), L, D]` in the order of questions and ranks, topk_idx `[B, min(k, max N)]` filled
        with −1, and scores `[B, N]` float32 with `-inf` at padded candidates.
    """
    docs_BNLD, valid_BN = pad_candidates(docs_MLD, counts_B)
    scores_BN = cosine_scores(query_BE, docs_BNLD.flatten(2)).masked_fill(~valid_BN, float("-inf"))
    z_BKN, indices_BK = differentiable_topk(scores_BN, k, temperature)
    used_BK = torch.arange(indices_BK.shape[1], device=valid_BN.device) < valid_BN.sum(1, keepdim=True)
    chosen_BKLD = torch.einsum("bkn,bnld->bkld", z_BKN, docs_BNLD.float())
    return chosen_BKLD[used_BK].to(docs_MLD.dtype), indices_BK.masked_fill(~used_BK, -1), scores_BN


def retrieval_loss(
    scores_BN: torch.Tensor, positives: list[list[int]], counts_B: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Supervised retrieval: −log Σ_{n positive} softmax(s/τ)_n, averaged over questions with positives.

    Raises:
        ValueError: a positive is not the position of a candidate.
    """
    positive_BN = torch.zeros_like(scores_BN, dtype=torch.bool)
    for row, (indices, n) in enumerate(zip(positives, counts_B.tolist(), strict=True)):
        if any(not 0 <= i < n for i in indices):
            raise ValueError(f"pos_index {list(indices)} of question {row} points outside its {n} candidates")
        positive_BN[row, indices] = True
    log_p_BN = torch.log_softmax(scores_BN / temperature, dim=-1)
    known_B = positive_BN.any(1)
    loss_B = -torch.logsumexp(log_p_BN[known_B].masked_fill(~positive_BN[known_B], float("-inf")), dim=-1)
    return loss_B.sum() / known_B.sum().clamp(min=1)
