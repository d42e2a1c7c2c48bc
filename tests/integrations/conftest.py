"""A tiny model, a store of its vectors, and what both libraries' adapters must return."""

from collections.abc import Iterator

import pytest
import torch

from openrlhf.models.modeling_clara import CLaRa
from openrlhf.retrieval.compress import add_documents, compressed_text, open_store
from openrlhf.retrieval.store import Document, Store
from tests.tiny import DOCS, new_model

LONG = " It was repaired many times." * 30
DOCUMENTS = [
    Document(f"d{i}", text + LONG, f"Title {i}" if i % 2 else "", i if i % 3 else None, {"shelf": f"s{i}"})
    for i, text in enumerate(DOCS)
]


@pytest.fixture(scope="package")
def model(mistral) -> CLaRa:
    return new_model(mistral, doc_max_length=64, compr_rate=16)


@pytest.fixture
def store(model, tmp_path) -> Iterator[Store]:
    with open_store(tmp_path / "store", model) as made:
        add_documents(made, model, DOCUMENTS)
        yield made


@pytest.fixture(scope="package")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("integrations") / "checkpoint"
    stage, model.config.training_stage = model.config.training_stage, "stage2"
    model.save_pretrained(folder)
    model.config.training_stage = stage
    return folder


def ranked(model: CLaRa, question: str, documents: list[Document]) -> list[tuple[Document, float]]:
    """Every document with its cosine, best first, in float64."""
    query = model.encode_queries([question]).double()
    vectors = model.compress_documents([compressed_text(document) for document in documents])[0]
    scores = torch.nn.functional.cosine_similarity(query, vectors.to(torch.bfloat16).flatten(1).double()).tolist()
    return sorted(zip(documents, scores, strict=True), key=lambda pair: -pair[1])
