"""RAGMaster: a question and documents in, an answer and its citations out.

    candidates by BM25 and by the query reasoner → their memory vectors → the best by cosine → answer, or refusal

Contract: an answer stands on the cited documents and on nothing else; where none is good enough, that is what is said.
Texts are data: whatever they spell, they reach the model as plain text. Knows nothing about files or HTTP.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from openrlhf.models.adapters import DECODER
from openrlhf.models.fingerprint import fingerprint
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.prompts import CLOSED_BOOK_SYSTEM, CLOSED_BOOK_USER
from openrlhf.models.tokens import Prompt
from openrlhf.rag.config import RAGConfig
from openrlhf.retrieval.compress import add_documents, compressed_text, open_store
from openrlhf.retrieval.corpus import parse_record
from openrlhf.retrieval.hybrid import Bm25Index, hybrid_candidates
from openrlhf.retrieval.search import TwoStepIndex
from openrlhf.retrieval.store import Document, Store

logger = logging.getLogger(__name__)

History = Sequence[tuple[str, str]]
"""Earlier questions and their answers, oldest first."""
Documents = Store | Sequence[str | dict | Document]
Scored = list[tuple[float, int]]
"""Scores and what they are of: rows of a store, or positions in a list."""
PASSAGE_CHARACTERS = 500
KEPT_TEXTS = 1000
"""Texts whose vectors `rerank` keeps: 128 MiB at rate 16 and the width of a 7B model."""
INDEX_FOLDER = "search"
"""Of a store: where its indexes lie."""


@dataclass(frozen=True)
class Citation:
    """A document that an answer was given from; `score` is its cosine with the question, BM25's without compression.
    `metadata` is what else the document came with."""

    id: str
    title: str
    page: int | None
    passage: str
    score: float
    metadata: dict = field(default_factory=dict, hash=False)


@dataclass
class Prepared:
    """All that is known before the first token: either what the generator reads, or a refusal."""

    citations: list[Citation] = field(default_factory=list)
    prompt: Prompt | None = None
    docs_KLD: torch.Tensor | None = None
    adapter: str | None = DECODER
    refusal: str = ""


@dataclass
class _Corpus:
    store: Store
    bm25: Bm25Index
    nearest: TwoStepIndex | None = None
    """Finds candidates by cosine in a large store; without one all vectors are read."""


class RAGMaster:
    """Answers questions from documents.

    Args:
        compression_model: a checkpoint with a query reasoner: directory or Hub name, or a loaded CLaRa.
        compression_rate: the rate it must have; None takes what it has.
        top_k: documents an answer is given from; None takes the configuration's.
        config: a RAGConfig, or the path of a rag_config.yaml; None takes the one that the checkpoint's directory
            carries, or the defaults. Arguments win over it.
        options: keywords for `CLaRa.from_pretrained`, such as `decoder_model_name`, `dtype` or `device_map`.

    Raises:
        ValueError: no model is named, its rate is another, or it cannot select documents.
    """

    def __init__(
        self,
        compression_model: str | Path | CLaRa | None = None,
        compression_rate: int | None = None,
        top_k: int | None = None,
        config: RAGConfig | str | Path | None = None,
        **options: Any,
    ):
        self.config = RAGConfig.chosen(config, compression_model)
        source = compression_model or self.config.compression.model
        if source is None:
            raise ValueError("no model: give compression_model, or compression.model in rag_config.yaml")
        self.model = source if isinstance(source, CLaRa) else CLaRa.from_pretrained(source, **options)
        rate = compression_rate or self.config.compression.rate
        if rate is not None and rate != self.model.config.compr_rate:
            raise ValueError(
                f"the model was trained at rate {self.model.config.compr_rate}, and a trained rate cannot be changed: "
                f"asked for {rate}. Leave the rate out, or give a checkpoint of that rate"
            )
        if self.config.compression.enabled and not self.model.has_query_reasoner:
            raise ValueError(
                "the model has no query reasoner to choose documents with: give a stage2 checkpoint, load this one "
                "with training_stage='stage2' (a copy of the compressor then), or set compression.enabled: false"
            )
        self.top_k = top_k or self.config.reranking.top_k
        self._folder: tempfile.TemporaryDirectory | None = None
        self._given: Store | None = None
        self._corpora: dict[Store, _Corpus] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        # A list of documents takes the place of the one before it: one thread at a time.
        self._lock = threading.RLock()

    def close(self) -> None:
        """Removes the vectors of documents that were given as a list; a store that was given stays open."""
        if self._given is not None:
            self._given.close()
            self._given = None
        self._corpora.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> "RAGMaster":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def query(self, question: str, documents: Documents, history: History = ()) -> tuple[str, list[Citation]]:
        """An answer from the documents, and what it stands on, best first.

        Args:
            documents: a store, or texts, or `{"id"?, "title"?, "text", "page"?}`; lists are compressed once and kept as
                long as this object.
            history: earlier turns, for follow-up questions.

        Returns:
            the answer and its citations; a refusal and no citations where no document scores `min_score`.
        """
        return self.query_batch([question], documents, [history])[0]

    def query_batch(
        self, questions: Sequence[str], documents: Documents, histories: Sequence[History] | None = None
    ) -> list[tuple[str, list[Citation]]]:
        """`query` for several questions, answered together; each as it would be alone."""
        prepared = self.prepare(questions, documents, histories)
        answers = [p.refusal for p in prepared]
        options = self.config.generation
        for adapter in {p.adapter for p in prepared if p.prompt is not None}:
            chosen = [i for i, p in enumerate(prepared) if p.prompt is not None and p.adapter == adapter]
            texts = self.model.generate_from_prompts(
                [prepared[i].prompt for i in chosen],  # type: ignore[misc]
                None if adapter is None else [prepared[i].docs_KLD for i in chosen],  # type: ignore[misc]
                options.max_new_tokens,
                adapter,
                options.temperature,
                options.seed,
            )
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
        return [(answer, p.citations) for answer, p in zip(answers, prepared, strict=True)]

    def stream(
        self, question: str, documents: Documents, history: History = ()
    ) -> tuple[Iterator[str], list[Citation]]:
        """`query` with the answer in pieces as it is written; the citations are known before the first."""
        (prepared,) = self.prepare([question], documents, [history])
        if prepared.prompt is None:
            return iter([prepared.refusal]), []
        options = self.config.generation
        pieces = self.model.stream_from_prompt(
            prepared.prompt,
            prepared.docs_KLD,
            options.max_new_tokens,
            prepared.adapter,
            options.temperature,
            options.seed,
        )
        return pieces, prepared.citations

    def prepare(
        self,
        questions: Sequence[str],
        documents: Documents,
        histories: Sequence[History] | None = None,
        instructions: str = "",
    ) -> list[Prepared]:
        """Everything before the first token: candidates, selection, prompt or refusal.

        Args:
            instructions: how to answer, in words that the generator reads with the question; nothing is searched by
                them.
        """
        if isinstance(questions, str) or not all(isinstance(q, str) and q.strip() for q in questions):
            raise ValueError("questions must be texts that say something")
        histories = histories or [()] * len(questions)
        with self._lock:
            corpus = self._corpus(documents)
            return [
                self._prepare(q, corpus, history, instructions) for q, history in zip(questions, histories, strict=True)
            ]

    def retrieve(self, question: str, documents: Documents, history: History = ()) -> list[Citation]:
        """What `query` would answer from, best first, without answering: citations whose passage is the whole text.

        None where no document scores `min_score`.

        Raises:
            ValueError: as `query`.
        """
        if not question.strip():
            raise ValueError("the question must say something")
        with self._lock:
            corpus = self._corpus(documents)
            found, _ = self._find(_searched(question, history), corpus)
            return _cite(corpus.store, found, characters=None)

    def rerank(self, question: str, documents: Sequence[str | Document]) -> list[tuple[int, float]]:
        """The documents closest to the question: (position, cosine), best first; at most `top_k`, none below
        `min_score`, and without a search by words.

        A text is compressed once, as long as it is among the last `KEPT_TEXTS`.

        Raises:
            ValueError: the question is empty, or the model has no query reasoner.
        """
        if not question.strip():
            raise ValueError("the question must say something")
        texts = [compressed_text(item) if isinstance(item, Document) else item for item in documents]
        if not texts:
            return []
        with self._lock:
            query_1E = self.model.encode_queries([question]).cpu()
            docs_NE = self._compressed(texts).flatten(1)
        scores_N = F.cosine_similarity(query_1E.double(), docs_NE.double())
        chosen, _ = self._chosen([(score, i) for i, score in enumerate(scores_N.tolist())])
        return [(i, score) for score, i in chosen]

    def _compressed(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors `[N, L, D]` of texts, as a store would hold them; those used last are kept."""
        distinct = list(dict.fromkeys(texts))
        new = [text for text in distinct if text not in self._vectors]
        made = self.model.compress_documents(new)[0].to("cpu", torch.bfloat16) if new else ()
        known = {text: self._vectors.pop(text) for text in distinct if text in self._vectors}
        known |= {text: doc_LD.clone() for text, doc_LD in zip(new, made, strict=True)}
        self._vectors |= known
        for oldest in list(self._vectors)[:-KEPT_TEXTS]:
            del self._vectors[oldest]
        return torch.stack([known[text] for text in texts])

    def _find(self, searched: str, corpus: _Corpus) -> tuple[Scored, str]:
        """The rows to answer from with their scores, best first; where there are none, why."""
        if not self.config.compression.enabled:
            scores_K, rows_K = corpus.bm25.search(searched, self.top_k)
            return list(zip(scores_K.tolist(), rows_K.tolist(), strict=True)), "none of them shares a word with it"
        limits = self.config.retrieval
        query_1E = self.model.encode_queries([searched])
        sizes = (limits.dense_top_k, limits.sparse_top_k, limits.fusion)
        found = hybrid_candidates(corpus.store, corpus.bm25, searched, query_1E[0].cpu(), *sizes, index=corpus.nearest)
        return self._chosen([(candidate.dense, candidate.row) for candidate in found])

    def _chosen(self, scored: Scored) -> tuple[Scored, str]:
        """The `top_k` best by score that are not below the bar, equal scores by number; where there are none, why."""
        bar = self.config.reranking.min_score
        best = sorted(scored, key=lambda one: (-one[0], one[1]))[: self.top_k]
        why = f"the closest scores {best[0][0]:.2f}, below {bar:g}" if best else "there are none"
        return [one for one in best if one[0] >= bar], why

    def _prepare(self, question: str, corpus: _Corpus, history: History, instructions: str) -> Prepared:
        asked = _with_history(question, history, instructions)
        found, why = self._find(_searched(question, history), corpus)
        if not found:
            return self._without(asked, why)
        cited, rows = _cite(corpus.store, found), [row for _, row in found]
        if not self.config.compression.enabled:
            texts = [compressed_text(documents[0]) for documents in corpus.store.documents_at(rows)]
            return Prepared(cited, self.model.text_prompt(asked, texts), None, None)
        docs_KLD = corpus.store.vectors(rows).to(self.model.device, self.model.dtype)
        return Prepared(cited, self.model.answer_prompt(asked, len(rows)), docs_KLD)

    def _without(self, asked: str, why: str) -> Prepared:
        """Where no document is good enough: a refusal, or an answer from the base model where that is allowed."""
        if self.config.guardrails.allow_out_of_context:
            user = CLOSED_BOOK_USER.partition("{query}")[0] + asked
            return Prepared(prompt=self.model.tokens.plain_prompt(CLOSED_BOOK_SYSTEM, user), adapter=None)
        return Prepared(refusal=f"The documents do not answer this question: {why}.")

    def _temporary(self, name: str) -> Path:
        """A place in a folder that is made when it is first needed, and goes with this object."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="clara-rag-")
        return Path(self._folder.name) / name

    def _corpus(self, documents: Documents) -> _Corpus:
        if isinstance(documents, Store):
            return self._opened_store(documents)
        given = [_document(number, item) for number, item in enumerate(documents)]
        ids = {document.id for document in given}
        if len(ids) < len(given):
            raise ValueError("two documents have the same id: give each its own, or none any")
        if self._given is None:
            self._given = open_store(self._temporary("store"), self.model)
        store = self._given
        deleted = store.delete([document.id for document, _ in store.texts() if document.id not in ids])
        counts = add_documents(store, self.model, given)
        if self._corpora.get(store) is None or deleted or counts.new or counts.replaced:
            self._corpora[store] = _Corpus(store, Bm25Index.build(store, self._temporary("given")))
        return self._corpora[store]

    def _opened_store(self, store: Store) -> _Corpus:
        """A store that was given, with its index beside it; where that is not writable, in a temporary folder."""
        corpus = self._corpora.get(store)
        if corpus is None:
            store.check_header(fingerprint(self.model))  # hashes weights: once a store, not at every question
        else:
            corpus.bm25.refresh()
            if corpus.nearest is not None:
                corpus.nearest.refresh()
            if not corpus.bm25.n_missing:
                return corpus
        beside = store.path / INDEX_FOLDER
        try:
            index = Bm25Index.open(store, beside)
        except (FileNotFoundError, ValueError):
            writable = os.access(beside if beside.exists() else store.path, os.W_OK)
            index = Bm25Index.build(store, beside if writable else self._temporary("opened"))
        self._corpora[store] = _Corpus(store, index, _two_step(store, beside))
        return self._corpora[store]


def _two_step(store: Store, folder: Path) -> TwoStepIndex | None:
    """The index that somebody built for this store; one that does not belong to it (any more) is not used."""
    try:
        return TwoStepIndex.open(store, folder)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("all vectors are read at every question: %s", error)
        return None


def _document(number: int, item: str | dict | Document) -> Document:
    if isinstance(item, Document):
        return item
    given = {"text": item} if isinstance(item, str) else item
    if not isinstance(given, dict):
        raise ValueError(f"document {number} must be a text, or have a text under 'text'; got {item!r:.80}")
    try:
        return parse_record({**given, "id": number if given.get("id") is None else given["id"]})
    except ValueError as error:
        raise ValueError(f"document {number}: {error}") from None


def _with_history(question: str, history: History, instructions: str = "") -> str:
    """The question as the generator reads it: with how to answer, and the turns before it."""
    parts = [question]
    if instructions:
        parts.append(f"Instructions for the answer:\n{instructions}")
    if history:
        turns = "\n".join(f"Question: {asked}\nAnswer: {answered}" for asked, answered in history)
        parts.append(f"Earlier in this conversation:\n{turns}")
    return "\n\n".join(parts)


def _searched(question: str, history: History) -> str:
    """What candidates are looked for with: a follow-up question together with the one before it."""
    return " ".join([*(asked for asked, _ in history[-1:]), question])


def _cite(store: Store, scored: Scored, characters: int | None = PASSAGE_CHARACTERS) -> list[Citation]:
    documents = store.documents_at([row for _, row in scored])
    return [
        Citation(d.id, d.title, d.page, d.text[:characters], round(float(score), 4), d.metadata)
        for (score, _), found in zip(scored, documents, strict=True)
        for d in found
    ]
