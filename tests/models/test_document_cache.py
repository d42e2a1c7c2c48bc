"""Frozen documents are compressed once, and what is served again is what compressing them gives."""

import pytest
import torch

from openrlhf.models.document_cache import DocumentCache, document_keys
from openrlhf.models.modeling_clara import CLaRa
from tests.tiny import DOCS, new_model

CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture
def model(mistral) -> CLaRa:
    return new_model(mistral)


def encoded(model: CLaRa, texts: list[str]):
    return model.tokens.encoder_batch(model.tokens.encoder_rows(texts))


@torch.no_grad()
def test_cached_vectors_are_those_of_compressing_and_each_document_is_compressed_once(model):
    compressed = []

    def counting(ids, mask):
        compressed.append(len(ids))
        return model.compress(ids, mask)

    cache = DocumentCache(counting)
    texts = [DOCS[0], DOCS[1], DOCS[0], DOCS[2]]
    for _ in range(2):
        vectors, errors = cache(*encoded(model, texts))
        plain, plain_errors = model.compress(*encoded(model, texts))
        torch.testing.assert_close(vectors, plain, **CLOSE)
        torch.testing.assert_close(errors, plain_errors, rtol=1e-4, atol=1e-6)
        assert torch.equal(vectors[0], vectors[2])
    assert sum(compressed) == 3


@torch.no_grad()
def test_vectors_do_not_depend_on_what_the_cache_saw_before(model):
    early, late = DocumentCache(model.compress), DocumentCache(model.compress)
    early(*encoded(model, [DOCS[2], DOCS[0]]))
    assert torch.equal(early(*encoded(model, DOCS[:3]))[0], late(*encoded(model, DOCS[:3]))[0])


@torch.no_grad()
def test_a_full_cache_goes_on_compressing(model):
    cache = DocumentCache(model.compress, limit_bytes=1)
    for _ in range(2):
        vectors, _ = cache(*encoded(model, DOCS[:3]))
        torch.testing.assert_close(vectors, model.compress(*encoded(model, DOCS[:3]))[0], **CLOSE)
    assert len(cache.stored) == 1


@torch.no_grad()
def test_what_is_known_elsewhere_is_not_compressed(model):
    keys = document_keys(*encoded(model, DOCS[:2]))
    known = {keys[1]: (torch.full((4, model.decoder.config.hidden_size), 7.0), torch.tensor(0.5))}
    compressed, asked = [], []

    def counting(ids, mask):
        compressed.append(len(ids))
        return model.compress(ids, mask)

    def look_up(wanted):
        asked.append(wanted)
        return {key: known[key] for key in wanted if key in known}

    cache = DocumentCache(counting, look_up=look_up)
    for _ in range(2):
        vectors, errors = cache(*encoded(model, [DOCS[1], DOCS[0], DOCS[1]]))
        assert bool((vectors[[0, 2]] == 7).all()) and errors[0] == 0.5
        torch.testing.assert_close(vectors[1], model.compress(*encoded(model, [DOCS[0]]))[0][0], **CLOSE)
    assert sum(compressed) == 1 and asked == [[keys[1], keys[0]]]


def test_a_stage_that_trains_the_compressor_starts_without_a_cache(model):
    model.cache_frozen_documents()
    model.train_stage("stage1")
    assert model.document_cache is None
