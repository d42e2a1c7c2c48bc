"""rag_config.yaml: its keys, defaults, and what is refused."""

from dataclasses import asdict
from pathlib import Path

import pytest

from openrlhf.rag.config import RAGConfig

ROOT = Path(__file__).parents[2]


def test_the_file_that_comes_with_the_project_holds_every_key_with_its_default():
    assert RAGConfig.from_yaml(ROOT / "rag_config.yaml") == RAGConfig()
    text = (ROOT / "rag_config.yaml").read_text(encoding="utf-8")
    assert all(f"{key}:" in text for section in asdict(RAGConfig()).values() for key in section)


def test_defaults_are_those_of_the_contract():
    config = RAGConfig()
    assert (config.retrieval.dense_top_k, config.retrieval.sparse_top_k, config.retrieval.fusion) == (12, 25, "union")
    assert (config.reranking.top_k, config.reranking.min_score) == (5, 0.55)
    assert (config.generation.max_new_tokens, config.generation.temperature) == (256, 0.7)
    assert not config.guardrails.allow_out_of_context and config.guardrails.require_citations


def test_values_given_take_the_place_of_defaults(tmp_path):
    path = tmp_path / "rag.yaml"
    path.write_text("rag_master:\n  retrieval:\n    fusion: rrf\n  compression:\n    rate: 16\n")
    config = RAGConfig.from_yaml(path)
    assert config.retrieval.fusion == "rrf" and config.retrieval.dense_top_k == 12 and config.compression.rate == 16


def test_a_checkpoints_own_settings_are_taken_where_no_others_are_given(tmp_path):
    assert RAGConfig.chosen(None, tmp_path) == RAGConfig.chosen(None, "organisation/name") == RAGConfig()
    (tmp_path / "rag_config.yaml").write_text("rag_master:\n  reranking: {min_score: 0.1}\n")
    assert (
        RAGConfig.chosen(None, tmp_path).reranking.min_score
        == RAGConfig.chosen(None, str(tmp_path)).reranking.min_score
    )
    assert RAGConfig.chosen(None, tmp_path).reranking.min_score == 0.1
    other = tmp_path / "other.yaml"
    other.write_text("rag_master:\n  reranking: {top_k: 3}\n")
    assert RAGConfig.chosen(other, tmp_path) == RAGConfig.from_yaml(other)
    given = RAGConfig()
    assert RAGConfig.chosen(given, tmp_path) is given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retrieval: {}", "root key rag_master"),
        ("rag_master:\n  retreival: {}", "unknown key retreival; there are compression, retrieval"),
        ("rag_master:\n  retrieval: {top: 3}", "unknown key retrieval.top; there are retrieval.dense_top_k"),
        ("rag_master:\n  retrieval: {fusion: best}", "union or rrf"),
        ("rag_master:\n  retrieval: {dense_top_k: 0, sparse_top_k: 0}", "leave no candidates"),
        ("rag_master:\n  retrieval: {dense_top_k: many}", "retrieval.dense_top_k must be int"),
        ("rag_master:\n  reranking: {top_k: 0}", "reranking.top_k must be positive"),
        ("rag_master:\n  compression: {passage_tokens: 0}", "compression.passage_tokens must be positive"),
        ("rag_master:\n  compression: {passage_tokens: many}", "compression.passage_tokens must be positive"),
        ("rag_master:\n  reranking: {min_score: 55}", "between -1 and 1"),
        ("rag_master:\n  generation: {temperature: -1}", "at least 0"),
        ("rag_master:\n  generation: {max_new_tokens: true}", "max_new_tokens must be int"),
        ("rag_master:\n  guardrails: {allow_out_of_context: true}", "set require_citations to false"),
        ("rag_master:\n  compression: yes please", "compression. must hold keys and values"),
        ("rag_master: [", "rag.yaml"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tmp_path, text, message):
    path = tmp_path / "rag.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        RAGConfig.from_yaml(path)
    assert message in str(raised.value) and str(path) in str(raised.value)
