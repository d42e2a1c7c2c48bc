"""CLaRa in LangChain: a retriever over a store, and a compressor that ranks documents which others found.

    chain = {"context": ClaraRetriever(store="my_store", model="checkpoints/my_stage2"), "question": …} | prompt | llm

Contract: what is returned is what `RAGMaster` would answer from, with texts and scores; nothing is generated here.
Needs langchain-core (`pip install 'clara-rag[langchain]'`). The asynchronous methods are LangChain's own, which run
these in a thread; threads may share a model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from langchain_core.callbacks import CallbackManagerForRetrieverRun, Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.retrievers import BaseRetriever
    from pydantic import ConfigDict, Field, PrivateAttr, field_validator
except ImportError as error:
    raise ImportError(f"the LangChain adapters need langchain-core ({error}): pip install langchain-core") from error

from openrlhf.integrations.shared import loaded, make_master, opened
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.rag.config import RAGConfig
from openrlhf.rag.master import RAGMaster
from openrlhf.retrieval import store as stores


class ClaraRetriever(BaseRetriever):
    """The documents of a store that a question is answered from, best first.

    Candidates by words and by vectors, ranked by the query reasoner; `metadata` of a returned document has `id`,
    `title`, `page`, `score` and what else the store's document came with.

    Args:
        store: an open store, or its directory.
        model: a loaded CLaRa model with a query reasoner, or its checkpoint's directory or Hub name.
        top_k: documents returned at most; default: that of `settings`.
        min_score: cosine below which a document is not returned; default: that of `settings`.
        settings: RAGConfig or path of a rag_config.yaml.

    Raises:
        ValueError, OSError: the store or the model cannot be used.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    store: stores.Store = Field(repr=False)
    model: CLaRa = Field(repr=False)
    top_k: int | None = None
    min_score: float | None = None
    settings: RAGConfig | str | Path | None = None
    _master: RAGMaster = PrivateAttr()

    @field_validator("store", mode="before")
    @classmethod
    def _open(cls, store: Any) -> Any:
        return opened(store)

    @field_validator("model", mode="before")
    @classmethod
    def _load(cls, model: Any) -> Any:
        return loaded(model)

    def model_post_init(self, context: Any, /) -> None:
        """Checks the settings; pydantic calls it."""
        super().model_post_init(context)
        self._master = make_master(self.model, self.top_k, self.min_score, self.settings)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [
            Document(
                id=cited.id,
                page_content=cited.passage,
                metadata={
                    **cited.metadata,
                    "id": cited.id,
                    "title": cited.title,
                    "page": cited.page,
                    "score": cited.score,
                },  # fmt: skip
            )
            for cited in self._master.retrieve(query, self.store)
        ]


class ClaraCompressor(BaseDocumentCompressor):
    """Ranks documents by the query reasoner and keeps the best; `relevance_score` is added to their metadata.

    A document's `title` in its metadata is read with its text, as in training. A text is compressed once while it is
    among the last thousand.

    Args:
        model, top_k, min_score, settings: as `ClaraRetriever`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    model: CLaRa = Field(repr=False)
    top_k: int | None = None
    min_score: float | None = None
    settings: RAGConfig | str | Path | None = None
    _master: RAGMaster = PrivateAttr()

    @field_validator("model", mode="before")
    @classmethod
    def _load(cls, model: Any) -> Any:
        return loaded(model)

    def model_post_init(self, context: Any, /) -> None:
        """Checks the settings; pydantic calls it."""
        self._master = make_master(self.model, self.top_k, self.min_score, self.settings)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The best of the documents, best first; copies, those given stay as they are."""
        texts = [stores.Document("", one.page_content, one.metadata.get("title") or "") for one in documents]
        return [
            documents[i].model_copy(update={"metadata": {**documents[i].metadata, "relevance_score": score}})
            for i, score in self._master.rerank(query, texts)
        ]
