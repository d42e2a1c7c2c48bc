"""Straight-through top-k and the choice of documents (SPEC 2)."""

import pytest
import torch

from openrlhf.models.selection import cosine_scores, differentiable_topk, pad_candidates, select_documents

TAU = 0.02


def slow_gradient(scores_N: torch.Tensor, upstream_KN: torch.Tensor, chosen: list[int], tau: float) -> torch.Tensor:
    """d/ds of the sum over slots of upstream · softmax(s/τ + log(free + 1e-8)), by the softmax's own Jacobian."""
    total = torch.zeros_like(scores_N)
    for slot, upstream_N in enumerate(upstream_KN):
        masked = scores_N / tau
        for taken in chosen[:slot]:
            masked[taken] += torch.log(torch.tensor(1e-8, dtype=scores_N.dtype))
        p = torch.exp(masked - masked.max())
        p /= p.sum()
        for i in range(len(p)):
            for j in range(len(p)):
                total[i] += upstream_N[j] * p[j] * (float(i == j) - p[i]) / tau
    return total


@pytest.mark.parametrize("tau", [0.02, 0.5])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_forward_is_the_hard_choice_and_the_gradient_is_the_soft_ones(k, tau):
    generator = torch.Generator().manual_seed(k)
    scores = (0.1 * torch.randn(3, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(3, k, 4, generator=generator, dtype=torch.float64)
    z, indices = differentiable_topk(scores, k, tau)
    (z * upstream).sum().backward()
    for row in range(3):
        best = sorted(range(4), key=lambda i: -float(scores[row, i]))[:k]
        assert indices[row].tolist() == best
        hard = torch.zeros(k, 4, dtype=torch.float64)
        hard[range(k), best] = 1.0
        assert torch.equal(z[row], hard)
        slow = slow_gradient(scores[row].detach().clone(), upstream[row], best, tau)
        torch.testing.assert_close(scores.grad[row], slow, rtol=1e-6, atol=1e-9)


def test_selected_vectors_are_the_documents_bit_for_bit():
    docs, query = torch.randn(7, 3, 5) * 1e3, torch.randn(2, 15)
    chosen, indices, _ = select_documents(query, docs, torch.tensor([3, 4]), 2, TAU)
    assert torch.equal(chosen[:2], docs[:3][indices[0]])
    assert torch.equal(chosen[2:], docs[3:][indices[1]])


def test_scores_are_cosines_in_float32_even_of_half_precision_vectors():
    docs, query = torch.randn(1, 4, 64).bfloat16(), torch.randn(1, 64).bfloat16()
    scores = cosine_scores(query, docs)
    d, q = docs[0].double(), query[0].double()
    slow = torch.stack([(q * row).sum() / (q.norm() * row.norm()) for row in d])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[0].double(), slow, rtol=1e-5, atol=1e-6)


def test_selection_keeps_the_type_of_the_vectors():
    chosen, _, scores = select_documents(
        torch.randn(1, 6).bfloat16(), torch.randn(3, 2, 3).bfloat16(), torch.tensor([3]), 2, TAU
    )
    assert chosen.dtype == torch.bfloat16 and scores.dtype == torch.float32


def test_gradient_through_the_choice_equals_a_slow_version():
    """The query's gradient: upstream · docs gives dL/dZ, the softmax Jacobian dL/ds, the cosine dL/dq."""
    generator = torch.Generator().manual_seed(5)
    docs = torch.randn(4, 2, 3, generator=generator)
    query = torch.randn(1, 6, generator=generator).requires_grad_()
    upstream = torch.randn(2, 2, 3, generator=generator)
    chosen, indices, scores = select_documents(query, docs, torch.tensor([4]), 2, 0.5)
    (chosen * upstream).sum().backward()

    dz = torch.einsum("kld,nld->kn", upstream, docs)
    ds = slow_gradient(scores[0].detach().double().clone(), dz.double(), indices[0].tolist(), 0.5)
    q, flat = query[0].detach().double(), docs.flatten(1).double()
    unit, slow = q / q.norm(), torch.zeros(6, dtype=torch.float64)
    for n in range(4):
        doc = flat[n] / flat[n].norm()
        slow += ds[n] * (doc - (doc @ unit) * unit) / q.norm()
    torch.testing.assert_close(query.grad[0].double(), slow, rtol=1e-4, atol=1e-5)


def test_unequal_lists_choose_as_each_question_alone():
    generator = torch.Generator().manual_seed(3)
    counts = [3, 5, 1, 2]
    docs, queries = torch.randn(11, 2, 4, generator=generator), torch.randn(4, 8, generator=generator)
    together = queries.clone().requires_grad_()
    chosen, indices, scores = select_documents(together, docs, torch.tensor(counts), 3, TAU)
    weight = torch.randn(2, 4, generator=generator)
    (chosen * weight).sum().backward()
    rows, lists = list(chosen.split([3, 3, 1, 2])), list(docs.split(counts))
    for b, count in enumerate(counts):
        alone = queries[b : b + 1].clone().requires_grad_()
        one, index, score = select_documents(alone, lists[b], torch.tensor([count]), 3, TAU)
        (one * weight).sum().backward()
        assert torch.equal(rows[b], one)
        assert indices[b].tolist() == index[0].tolist() + [-1] * (3 - min(3, count))
        torch.testing.assert_close(scores[b, :count], score[0])
        assert bool((scores[b, count:] == float("-inf")).all())
        torch.testing.assert_close(together.grad[b], alone.grad[0], rtol=1e-4, atol=1e-6)


def test_a_padded_candidate_is_never_chosen_even_when_all_others_are_worse():
    query = torch.ones(2, 4)
    docs = torch.cat([-torch.ones(2, 1, 4), torch.ones(5, 1, 4)])  # cosine −1 is below a zero vector's 0
    chosen, indices, _ = select_documents(query, docs, torch.tensor([2, 5]), 4, TAU)
    assert sorted(indices[0, :2].tolist()) == [0, 1] and indices[0, 2:].tolist() == [-1, -1]
    assert torch.equal(chosen[:2], docs[:2]) and len(chosen) == 2 + 4


def test_k_beyond_the_candidates_is_clipped():
    z, indices = differentiable_topk(torch.tensor([[0.1, 0.3]]), 5, TAU)
    assert z.shape == (1, 2, 2) and indices.tolist() == [[1, 0]]


@pytest.mark.parametrize(("n", "k", "tau"), [(3, 0, TAU), (3, -1, TAU), (3, 1, 0.0), (0, 1, TAU)])
def test_impossible_requests_are_refused_in_words(n, k, tau):
    with pytest.raises(ValueError, match="top-k needs"):
        differentiable_topk(torch.zeros(2, n), k, tau)


def test_padding_of_candidate_lists_keeps_order_and_marks_what_is_real():
    flat = torch.arange(6.0)
    padded, valid = pad_candidates(flat, torch.tensor([1, 3, 2]))
    assert padded.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 0]]
    assert valid.tolist() == [[True, False, False], [True, True, True], [True, True, False]]


def test_a_chosen_document_far_ahead_dominates_later_slots():
    """Kept as published: log(0 + 1e-8) is −18.4, so a lead of more than 18·τ in cosine outlives the mask."""
    scores = torch.tensor([[0.9, 0.1, 0.0]]).requires_grad_()
    z, indices = differentiable_topk(scores, 2, TAU)
    assert indices.tolist() == [[0, 1]]
    z[0, 1, 1].backward()
    assert abs(float(scores.grad[0, 1])) < 1e-4
