"""The span loss against a plain version: which tokens a memory vector stands for, and how well it names them."""

import math

import pytest
import torch

from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.spans import spans
from tests.tiny import ANSWERS, DOCS, QUESTIONS, gradients, make_batch, new_model

LISTS = [[doc] for doc in DOCS[:3]]


@pytest.fixture
def model(mistral) -> CLaRa:
    return new_model(mistral)


def words(model: CLaRa, text: str) -> list[int]:
    """The tokens of a document that its spans can hold: all that the compressor reads but the added ones."""
    (row,) = model.tokens.encoder_rows([text])
    kept = [token for token in row if token < model.tokens.first_special_id]
    return kept[-model.config.doc_max_length :]


def loss_of(model: CLaRa, text: str, vectors_LD: torch.Tensor) -> float:
    """Token by token, counted from the end: the last R under the last vector, those before it under the one before."""
    tokens, rate = words(model, text), model.config.compr_rate
    total = 0.0
    for back, token in enumerate(reversed(tokens)):
        logits = model.head(vectors_LD[-1 - back // rate], added=False).tolist()
        top = max(logits)
        total += top + math.log(sum(math.exp(x - top) for x in logits)) - logits[token]
    return total / len(tokens)


def test_each_vector_stands_for_the_same_place_before_the_end_in_every_document(model):
    texts = ["", *DOCS, " ".join(DOCS)]
    ids, mask = model.tokens.encoder_batch(model.tokens.encoder_rows(texts))
    n_memory, rate = model.config.n_memory_tokens, model.config.compr_rate
    ids_MLR, words_MLR = spans(ids, mask, n_memory, rate, model.tokens.first_special_id)
    assert ids_MLR.shape == words_MLR.shape == (len(texts), n_memory, rate)
    for text, row, there in zip(texts, ids_MLR.flatten(1), words_MLR.flatten(1), strict=True):
        tokens = words(model, text)
        assert row[-len(tokens) :].tolist() == tokens and not row[: -len(tokens)].any()
        assert there.tolist() == [False] * (n_memory * rate - len(tokens)) + [True] * len(tokens)
    assert words_MLR.flatten(1).sum(1).max() == model.config.doc_max_length, "the longest text must be one that is cut"


def test_the_span_loss_is_that_of_a_plain_loop_over_documents_and_tokens(model):
    batch = make_batch(model, "stage1", LISTS, QUESTIONS, ANSWERS)
    with torch.no_grad():
        _, out = model(batch=batch, compute_span_loss=True)
        vectors, _ = model.compress(batch["enc_input_ids"], batch["enc_attention_mask"])
        known = [loss_of(model, docs[0], vectors[i]) for i, docs in enumerate(LISTS)]
    assert float(out["span_loss"]) == pytest.approx(sum(known) / len(known), rel=1e-5)


def test_the_span_loss_reaches_the_compressor_and_the_memory_embeddings_alone(model):
    model.train_stage("stage1")
    _, out = model(batch=make_batch(model, "stage1", LISTS, QUESTIONS, ANSWERS), compute_span_loss=True)
    out["span_loss"].backward()
    moved = {name for name, grad in gradients(model).items() if bool(grad.any())}
    assert moved and all("encoder_adapter" in name or name == "special.memory" for name in moved)
    assert "special.memory" in moved


def test_nothing_is_computed_unless_asked_for(model):
    with torch.no_grad():
        _, out = model(batch=make_batch(model, "stage1", LISTS, QUESTIONS, ANSWERS))
    assert out["span_loss"] is None
