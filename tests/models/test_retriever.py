"""Stage-2 batches without documents: the model fetches its candidates and then goes on as with those of the batch."""

import pytest
import torch

from openrlhf.models.modeling_clara import CLaRa
from tests.tiny import ANSWERS, DOCS, QUESTIONS, gradients, make_batch, new_model

CANDIDATES = [DOCS[:4], [DOCS[5], DOCS[1]]]


@pytest.fixture
def model(mistral) -> CLaRa:
    found = new_model(mistral, query=True)
    found.config.generation_top_k = 2
    found.train_stage("stage2")
    return found


def without_documents(batch: dict) -> dict:
    return {key: value for key, value in batch.items() if not key.startswith("enc_")}


def test_fetched_candidates_train_as_those_of_the_batch(model):
    batch = make_batch(model, "stage2", CANDIDATES, QUESTIONS[:2], ANSWERS[:2])
    loss, out = model(batch=batch)
    loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    asked = []

    def fetch(query_BE: torch.Tensor, n: int) -> torch.Tensor:
        asked.append((query_BE, n))
        # The second question is given more than its two: what lies beyond docs_per_question is not looked at.
        return torch.stack([model.compress_documents((docs * 2)[:n])[0].flatten(1) for docs in CANDIDATES])

    model.retriever = fetch
    model.zero_grad()
    fetched_loss, fetched = model(batch=without_documents(batch))
    fetched_loss.backward()
    ((query_BE, n),) = asked
    assert n == 4 and not query_BE.requires_grad
    torch.testing.assert_close(query_BE, model.encode_queries(QUESTIONS[:2]), rtol=0, atol=2e-5)
    torch.testing.assert_close(fetched_loss, loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(fetched["topk_idx"], out["topk_idx"])
    torch.testing.assert_close(fetched["scores"], out["scores"], rtol=0, atol=1e-5)
    assert float(fetched["mse_loss"]) == 0
    found = gradients(model)
    assert set(found) == set(expected) and any("query" in name and bool(g.any()) for name, g in found.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_stored_bfloat16_does_not_coarsen_the_gradients(model):
    """What is fetched takes the dtype of the queries before anything is computed with it."""
    docs_NLD = model.compress_documents(DOCS[:4])[0].bfloat16()
    batch = without_documents(make_batch(model, "stage2", [DOCS[:4]], QUESTIONS[:1], ANSWERS[:1]))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model.retriever = lambda query_BE, n, dtype=dtype: docs_NLD.to(dtype).flatten(1).unsqueeze(0)
        model.zero_grad()
        model(batch=batch)[0].backward()
        found.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_batch_without_documents_needs_a_retriever_and_their_number(model):
    batch = without_documents(make_batch(model, "stage2", CANDIDATES, QUESTIONS[:2], ANSWERS[:2]))
    with pytest.raises(ValueError, match="the batch holds no documents: give enc_input_ids, or"):
        model(batch=batch)
    model.retriever = lambda query_BE, n: torch.zeros(2, n, query_BE.shape[1])
    del batch["docs_per_question"]
    with pytest.raises(ValueError, match="or docs_per_question and set model.retriever"):
        model(batch=batch)
