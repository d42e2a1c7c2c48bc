"""The LlamaIndex adapters inside a real query engine of llama-index-core, with its own mock of a language model."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from openrlhf.integrations.llamaindex import ClaraPostprocessor, ClaraRetriever
from openrlhf.retrieval.store import Document
from tests.integrations.conftest import DOCUMENTS, ranked
from tests.tiny import QUESTIONS

ALL = {"min_score": -1.0}


def nodes(documents: list[Document]) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(id_=d.id, text=d.text, metadata={"title": d.title} if d.title else {}), score=0.5)
        for d in documents
    ]


def test_a_retriever_returns_the_best_documents_of_the_store_as_nodes(model, store):
    retriever = ClaraRetriever(store, model, top_k=3, **ALL)
    for question in QUESTIONS:
        found, expected = retriever.retrieve(question), ranked(model, question, DOCUMENTS)[:3]
        assert [one.node.node_id for one in found] == [document.id for document, _ in expected]
        assert [one.score for one in found] == pytest.approx([score for _, score in expected], abs=1e-3)
        for one, (document, _) in zip(found, expected, strict=True):
            facts = {"title": document.title, "page": document.page}
            there = {key: value for key, value in facts.items() if value not in ("", None)}
            assert one.node.get_content() == document.text and one.node.metadata == {**document.metadata, **there}


def test_a_postprocessor_ranks_what_others_found(model):
    given = nodes(DOCUMENTS)
    ranker = ClaraPostprocessor(model, top_k=4, **ALL)
    for question in QUESTIONS:
        kept, expected = ranker.postprocess_nodes(given, query_str=question), ranked(model, question, DOCUMENTS)[:4]
        assert [one.node.node_id for one in kept] == [document.id for document, _ in expected]
        assert [one.score for one in kept] == pytest.approx([score for _, score in expected], abs=1e-6)
    assert [one.score for one in given] == [0.5] * len(given), "what was given stays as it is"
    assert ranker.postprocess_nodes([], query_str=QUESTIONS[0]) == []
    (_, first), *_ = ranked(model, QUESTIONS[0], DOCUMENTS)
    barred = ClaraPostprocessor(model, min_score=min(1.0, first + 1e-3))
    assert barred.postprocess_nodes(given, QueryBundle(QUESTIONS[0])) == []
    with pytest.raises(ValueError, match="give query_bundle or query_str"):
        ranker.postprocess_nodes(given)


def test_a_query_engine_answers_from_what_was_found_and_ranked(model, store):
    engine = RetrieverQueryEngine.from_args(
        ClaraRetriever(store, model, top_k=6, **ALL),
        llm=MockLLM(),  # says what it was asked
        node_postprocessors=[ClaraPostprocessor(model, top_k=2, **ALL)],
    )
    best = [document for document, _ in ranked(model, QUESTIONS[0], DOCUMENTS)]
    for response in (engine.query(QUESTIONS[0]), asyncio.run(engine.aquery(QUESTIONS[0]))):
        assert [one.node.node_id for one in response.source_nodes] == [document.id for document in best[:2]]
        assert QUESTIONS[0] in str(response) and all(document.text in str(response) for document in best[:2])
        assert not any(document.text in str(response) for document in best[2:])


def test_threads_and_tasks_on_one_model_get_what_each_gets_alone(model, store):
    retriever, ranker = ClaraRetriever(store, model, top_k=3, **ALL), ClaraPostprocessor(model, top_k=3, **ALL)
    questions = [f"{question} {i}" for i in range(4) for question in QUESTIONS]

    def of(found: list[NodeWithScore]) -> list:
        return [(one.node.node_id, one.score) for one in found]

    def work(question: str):
        some = nodes([Document(d.id, f"{question} {d.text[:20]}") for d in DOCUMENTS[:3]])
        return of(retriever.retrieve(question)), of(ranker.postprocess_nodes(some, query_str=question))

    alone = [work(question) for question in questions]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, questions)) == alone

    async def together():
        return await asyncio.gather(*(retriever.aretrieve(question) for question in questions))

    assert [of(found) for found in asyncio.run(together())] == [found for found, _ in alone]


def test_a_slow_question_does_not_hold_up_other_tasks(model, store, monkeypatch):
    """The asynchronous way gives the event loop back while the model computes."""
    retriever = ClaraRetriever(store, model, **ALL)
    ran = []

    async def main():
        waiting = asyncio.Event()
        loop = asyncio.get_running_loop()
        retrieve = retriever._master.retrieve

        def slowly(*args):
            # Only a loop that is free can set the event that this thread waits for.
            asyncio.run_coroutine_threadsafe(waiting.wait(), loop).result(60)
            ran.append("model")
            return retrieve(*args)

        monkeypatch.setattr(retriever._master, "retrieve", slowly)

        async def other():
            ran.append("other")
            waiting.set()

        found, _ = await asyncio.gather(retriever.aretrieve(QUESTIONS[0]), other())
        return found

    assert asyncio.run(main()) and ran == ["other", "model"]


def test_a_postprocessor_is_written_down_by_its_checkpoint(checkpoint, model, tmp_path):
    (tmp_path / "rag.yaml").write_text("rag_master:\n  reranking: {top_k: 3, min_score: -1}\n")
    ranker = ClaraPostprocessor(checkpoint, settings=tmp_path / "rag.yaml")
    assert json.loads(ranker.to_json())["class_name"] == "ClaraPostprocessor"
    again = ClaraPostprocessor.from_dict(ranker.to_dict())
    kept = [one.node.node_id for one in again.postprocess_nodes(nodes(DOCUMENTS), query_str=QUESTIONS[0])]
    assert kept == [document.id for document, _ in ranked(model, QUESTIONS[0], DOCUMENTS)[:3]]
    loaded = ClaraPostprocessor(model)
    assert loaded.to_dict()["model"] == ""
    with pytest.raises(ValueError, match="no model"):
        ClaraPostprocessor.from_dict(loaded.to_dict())


def test_paths_are_opened(checkpoint, model, store):
    found = ClaraRetriever(str(store.path), checkpoint, top_k=2, **ALL).retrieve(QUESTIONS[0])
    assert [one.node.node_id for one in found] == [d.id for d, _ in ranked(model, QUESTIONS[0], DOCUMENTS)[:2]]
