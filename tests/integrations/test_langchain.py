"""The LangChain adapters in real chains of langchain-core: what they return, alone, in threads and asynchronously."""

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.load import dumpd
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough

from openrlhf.integrations.langchain import ClaraCompressor, ClaraRetriever
from openrlhf.rag.config import RAGConfig
from tests.integrations.conftest import DOCUMENTS, LONG, ranked
from tests.tiny import DOCS, QUESTIONS

ALL = {"min_score": -1.0}


def test_a_retriever_returns_the_best_documents_of_the_store_with_whole_texts_and_scores(model, store):
    retriever = ClaraRetriever(store=store, model=model, top_k=3, **ALL)
    for question in QUESTIONS:
        found, expected = retriever.invoke(question), ranked(model, question, DOCUMENTS)[:3]
        assert [one.id for one in found] == [document.id for document, _ in expected]
        for one, (document, score) in zip(found, expected, strict=True):
            assert one.page_content == document.text and one.page_content.endswith(LONG), "longer than a citation shows"
            assert one.metadata.pop("score") == pytest.approx(score, abs=1e-3)
            facts = {"id": document.id, "title": document.title, "page": document.page}
            assert one.metadata == {**facts, **document.metadata}


def test_documents_below_the_bar_are_not_returned(model, store):
    (_, first), (_, second), *_ = ranked(model, QUESTIONS[0], DOCUMENTS)
    assert len(ClaraRetriever(store=store, model=model, min_score=(first + second) / 2).invoke(QUESTIONS[0])) == 1
    assert ClaraRetriever(store=store, model=model, min_score=min(1.0, first + 1e-3)).invoke(QUESTIONS[0]) == []


def test_a_chain_reads_what_the_retriever_found(model, store):
    seen = []
    prompt = ChatPromptTemplate.from_template("Background:\n{context}\n\nQuestion: {question}")
    llm = FakeListChatModel(responses=["an answer"])
    chain = (
        {
            "context": ClaraRetriever(store=store, model=model, top_k=2, **ALL)
            | (lambda documents: "\n".join(document.page_content for document in documents)),
            "question": RunnablePassthrough(),
        }
        | prompt
        | RunnableLambda(lambda value: seen.append(value.to_string()) or value)
        | llm
        | StrOutputParser()
    )
    assert chain.invoke(QUESTIONS[0]) == "an answer"
    assert asyncio.run(chain.ainvoke(QUESTIONS[0])) == "an answer"
    assert "".join(chain.stream(QUESTIONS[0])) == "an answer"
    best = [document.text for document, _ in ranked(model, QUESTIONS[0], DOCUMENTS)[:2]]
    expected = "Human: Background:\n" + "\n".join(best) + f"\n\nQuestion: {QUESTIONS[0]}"
    assert seen == [expected] * 3


def test_a_compressor_ranks_what_others_found_and_leaves_it_as_it_was(model):
    given = [
        Document(page_content=d.text, metadata={"title": d.title, "source": d.id} if d.title else {"source": d.id})
        for d in DOCUMENTS
    ]
    before = [document.model_copy(deep=True) for document in given]
    compressor = ClaraCompressor(model=model, top_k=4, **ALL)
    for question in QUESTIONS:
        kept, expected = compressor.compress_documents(given, question), ranked(model, question, DOCUMENTS)[:4]
        assert [one.metadata["source"] for one in kept] == [document.id for document, _ in expected]
        assert [one.metadata["relevance_score"] for one in kept] == pytest.approx([s for _, s in expected], abs=1e-6)
        assert [one.page_content for one in kept] == [document.text for document, _ in expected]
    assert given == before and compressor.compress_documents([], QUESTIONS[0]) == []
    blank = compressor.compress_documents([Document(page_content="")], QUESTIONS[0])
    assert len(blank) == 1, "an empty text can be compressed, and has a score"


def test_a_text_is_compressed_once(model, monkeypatch):
    read = []
    compress = model.compress_documents
    monkeypatch.setattr(model, "compress_documents", lambda texts: read.extend(texts) or compress(texts))
    compressor = ClaraCompressor(model=model, **ALL)
    given = [Document(page_content=text) for text in ("one", "two", "one")]
    first = compressor.compress_documents(given, "Which?")
    assert read == ["one", "two"] and len(first) == 3
    assert compressor.compress_documents(given, "Which?") == first and read == ["one", "two"]
    compressor.compress_documents([*given, Document(page_content="three")], "Which?")
    assert read == ["one", "two", "three"]


def test_a_retriever_and_a_compressor_go_one_after_another(model, store):
    """As LangChain's ContextualCompressionRetriever puts them."""
    wide, narrow = (
        ClaraRetriever(store=store, model=model, top_k=6, **ALL),
        ClaraCompressor(model=model, top_k=2, **ALL),
    )
    chain = RunnablePassthrough.assign(found=lambda x: wide.invoke(x["q"])) | (
        lambda x: narrow.compress_documents(x["found"], x["q"])
    )
    kept = chain.invoke({"q": QUESTIONS[1]})
    assert [one.id for one in kept] == [document.id for document, _ in ranked(model, QUESTIONS[1], DOCUMENTS)[:2]]
    assert [one.metadata["relevance_score"] for one in kept] == pytest.approx(
        [one.metadata["score"] for one in kept], abs=1e-3
    )


def test_threads_on_one_model_get_what_each_gets_alone(model, store):
    """A question goes through one adapter and documents through another, while a third thread generates."""
    retriever = ClaraRetriever(store=store, model=model, top_k=3, **ALL)
    questions = [f"{question} {i}" for i in range(4) for question in QUESTIONS]
    texts = [[f"{document.text[:40]} {i}" for document in DOCUMENTS[:3]] for i in range(len(questions))]

    def work(i: int):
        compressor = ClaraCompressor(model=model, top_k=3, **ALL)
        documents = [Document(page_content=text) for text in texts[i]]
        kept = compressor.compress_documents(documents, questions[i])
        answers = model.generate_from_text([questions[i]], [texts[i]], 4)
        return retriever.invoke(questions[i]), kept, answers

    alone = [work(i) for i in range(len(questions))]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(len(questions)))) == alone
    assert retriever.batch(questions) == [found for found, _, _ in alone]

    async def together():
        return await asyncio.gather(*(retriever.ainvoke(question) for question in questions))

    assert asyncio.run(together()) == [found for found, _, _ in alone]
    compressor = ClaraCompressor(model=model, top_k=3, **ALL)
    documents = [Document(page_content=text) for text in texts[0]]
    assert asyncio.run(compressor.acompress_documents(documents, questions[0])) == alone[0][1]


def test_paths_are_opened_and_settings_are_read(checkpoint, model, store, tmp_path):
    (tmp_path / "rag.yaml").write_text("rag_master:\n  reranking: {top_k: 4, min_score: -1}\n")
    by_path = ClaraRetriever(store=str(store.path), model=str(checkpoint), settings=str(tmp_path / "rag.yaml"))
    expected = [document.id for document, _ in ranked(model, QUESTIONS[0], DOCUMENTS)]
    assert [one.id for one in by_path.invoke(QUESTIONS[0])] == expected[:4]
    fewer = by_path.configurable_fields(top_k=ConfigurableField(id="k"))
    found = fewer.with_config(configurable={"k": 1}).invoke(QUESTIONS[0])
    assert [one.id for one in found] == expected[:1]
    shown = dumpd(by_path)
    assert shown["type"] == "not_implemented" and shown["id"][-1] == "ClaraRetriever"
    by_path.store.close()


def test_settings_may_be_an_object_and_what_cannot_work_is_refused_in_words(model, store, tmp_path):
    settings = RAGConfig.from_dict({"reranking": {"top_k": 2, "min_score": -1.0}})
    given = [Document(page_content=text) for text in DOCS]
    assert len(ClaraCompressor(model=model, settings=settings).compress_documents(given, QUESTIONS[0])) == 2
    with pytest.raises(ValueError, match="reranking.top_k must be positive"):
        ClaraCompressor(model=model, top_k=0)
    with pytest.raises(FileNotFoundError, match="is not a store"):
        ClaraRetriever(store=tmp_path / "nothing", model=model)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        ClaraCompressor(model=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="must say something"):
        ClaraRetriever(store=store, model=model).invoke("  ")


MISSING = """
import sys
sys.modules[sys.argv[1]] = None
try:
    __import__(sys.argv[2])
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("package", "module", "pip"),
    [
        ("langchain_core", "openrlhf.integrations.langchain", "pip install langchain-core"),
        ("llama_index", "openrlhf.integrations.llamaindex", "pip install llama-index-core"),
    ],
)
def test_without_the_package_the_import_says_what_to_install(package, module, pip):
    done = subprocess.run(
        [sys.executable, "-c", MISSING, package, module], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip().endswith(pip), done.stdout
